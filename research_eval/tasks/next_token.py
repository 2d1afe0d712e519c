"""The task of running text: the next token at every position.

B batch  L length  V vocabulary  N blocks of a split
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from research_eval.datasets.language.lines import LineData
from research_eval.datasets.language.vocabulary import piece_bytes, piece_characters
from research_eval.datasets.token_data import IGNORED, DataSplits
from research_eval.registry import NEXT_TOKEN, TASKS
from research_eval.tasks.base import Evaluation, Task

BANDS = 8  # of the positions in a block, for the loss by position


@TASKS.register(NEXT_TOKEN)
class NextToken(Task):
    """Cross-entropy in nats per token, over all targets but the special ones. The lowest loss selects the weights.

    `bytes_V` and `characters_V` are the UTF-8 bytes and the characters of each token, 0 for special tokens. With
    `has_answers` a row is a line with a question: `exact_match` is the share of lines whose answer is right as a whole.
    It is the same for answers that the model writes greedily: up to the first mistake, both see the same tokens.
    """

    name = NEXT_TOKEN
    selected_by = "loss"

    def __init__(
        self,
        bytes_V: NDArray[np.int64] | None = None,
        characters_V: NDArray[np.int64] | None = None,
        has_answers: bool = False,
    ) -> None:
        self._bytes_V, self._characters_V, self._has_answers = bytes_V, characters_V, has_answers

    @classmethod
    def of(cls, data: DataSplits) -> NextToken:
        if data.tokenizer is None:
            return cls()
        has_answers = isinstance(data.validation, LineData)
        return cls(piece_bytes(data.tokenizer), piece_characters(data.tokenizer), has_answers)

    def num_outputs(self, data: DataSplits) -> int:
        return data.vocab_size

    def loss_per_sample(self, outputs_BO: Tensor, targets_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The loss of each token, in the shape of the targets; 0 where the target is ignored."""
        losses = F.cross_entropy(
            outputs_BO.flatten(0, -2),
            targets_B.flatten(),
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        return losses.view_as(targets_B)

    def loss(self, outputs_BO: Tensor, targets_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The mean over the targets that are not ignored."""
        logits_SV, targets_S = outputs_BO.flatten(0, -2), targets_B.flatten()
        return F.cross_entropy(logits_SV, targets_S, ignore_index=IGNORED, label_smoothing=label_smoothing)

    def answers(self, outputs_BO: Tensor) -> Tensor:
        """The most probable token at each position, [B, L]."""
        return outputs_BO.argmax(-1)

    def evaluation(
        self,
        answers_N: Tensor,
        targets_N: Tensor,
        losses_N: Tensor,
        rows_N: NDArray[np.int64],
        num_outputs: int,
    ) -> Evaluation:
        """Scores of answers, targets and losses [N, L]. Every scored target counts once, whatever the batch size."""
        targets = targets_N.numpy()
        sizes_V = np.ones(num_outputs, np.int64) if self._bytes_V is None else self._bytes_V
        is_real = targets >= 0
        is_scored = is_real & (sizes_V[np.maximum(targets, 0)] > 0)
        losses = losses_N.double().numpy() * is_scored
        total, count = float(losses.sum()), max(int(is_scored.sum()), 1)
        loss = total / count
        scores = {
            "perplexity": math.exp(min(loss, 700.0)),
            "acc": float(((answers_N.numpy() == targets) & is_scored).sum() / count),
        }
        for name, numbers_V in (("bits_per_byte", self._bytes_V), ("bits_per_char", self._characters_V)):
            if numbers_V is not None:
                pieces = int(numbers_V[targets[is_scored]].sum())
                scores[name] = total / math.log(2) / max(pieces, 1)
        if self._has_answers:
            wrong_N = ((answers_N.numpy() != targets) & is_scored).any(-1)
            scores["exact_match"] = float(1 - wrong_N.mean())
        per_block_N = losses.sum(-1) / np.maximum(is_scored.sum(-1), 1) if targets.ndim > 1 else losses
        details: dict[str, list[Any]] = {"scored_targets": [count]}
        if targets.ndim > 1:
            details["loss_by_position"] = _by_position(losses, is_scored)
        return Evaluation(loss, scores, details, rows_N, per_block_N.astype(np.float32))

    def costs(self, costs: Mapping[str, Any], data: DataSplits, tokens_per_second: float) -> dict[str, float]:
        """FLOPs of one token, forward, and the speed of the training without its evaluations."""
        # Generated lines are padded to the longest of the usual splits, and not to those of the longer test split.
        longest = data.validation.longest if isinstance(data.validation, LineData) else data.max_length
        flops = costs["inference_flops_per_sample"] / longest
        return {"inference_flops_per_token": flops, "tokens_per_second": tokens_per_second}


def _by_position(losses_NL: NDArray[np.float64], is_scored_NL: NDArray[np.bool_]) -> list[float]:
    """The mean loss in bands of equal width from the beginning of a block to its end."""
    bands = min(BANDS, losses_NL.shape[1])
    sums, counts = (
        [float(part.sum()) for part in np.array_split(array, bands, axis=1)] for array in (losses_NL, is_scored_NL)
    )
    return [round(total / max(count, 1), 6) for total, count in zip(sums, counts, strict=True)]
