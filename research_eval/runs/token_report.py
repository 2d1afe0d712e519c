"""What a language model does with each token of a text: its loss, the class of the token, and the path of its row.

B batch  L block  U tokens  T steps
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.nn import functional as F

from research_eval.datasets.language.stream import StreamBatches
from research_eval.datasets.language.vocabulary import piece_texts
from research_eval.models.language.base import LanguageModel, LanguageWalk
from research_eval.routing.token_classes import class_information, class_numbers, means_by_class
from research_eval.training.runtime import Runtime

MAX_TOKENS = 100_000


@dataclass(frozen=True)
class TokenReport:
    """Row u predicts `targets_U[u]` with the loss `losses_U[u]`; it stands at the token `inputs_U[u]`.

    `paths_UT` are its experts, -1 after the end of its path; None for a model without experts.
    """

    inputs_U: NDArray[np.int64]
    targets_U: NDArray[np.int64]
    losses_U: NDArray[np.float32]
    classes_U: NDArray[np.int64]
    paths_UT: NDArray[np.int64] | None
    pieces: list[str]  # text of every id

    def metrics(self) -> dict[str, Any]:
        """Loss by class of the target; for a model with experts what they tell about the class, and path lengths."""
        found: dict[str, Any] = {"loss_by_class": means_by_class(self.losses_U, self.classes_U)}
        if self.paths_UT is None:
            return found
        rng = np.random.default_rng(0)
        steps = []
        for experts_U in self.paths_UT.T:
            runs_U = experts_U >= 0
            steps.append(
                class_information(experts_U[runs_U], self.classes_U[runs_U], rng) if runs_U.any() else (0.0, 0.0)
            )
        lengths_U = (self.paths_UT >= 0).sum(1)
        found["expert_class_information"] = [round(bits, 5) for bits, _ in steps]
        found["expert_class_information_by_chance"] = [round(bits, 5) for _, bits in steps]
        if lengths_U.min() < lengths_U.max():
            found["length_by_class"] = means_by_class(lengths_U, self.classes_U)
        return found


@torch.no_grad()
def token_report(
    model: LanguageModel, batches: StreamBatches, tokenizer: Tokenizer, runtime: Runtime, max_tokens: int = MAX_TOKENS
) -> TokenReport:
    """One evaluation pass over whole blocks, at most `max_tokens` tokens, spread evenly over the text."""
    model.eval()
    starts = np.concatenate(batches.order(0))
    wanted = max(1, max_tokens // batches.data.block_size)
    if len(starts) > wanted:
        starts = starts[np.linspace(0, len(starts) - 1, wanted).astype(int)]
    inputs, targets, losses, paths = [], [], [], []
    for first in range(0, len(starts), batches.batch_size):
        batch = batches.take(starts[first : first + batches.batch_size])
        with runtime.autocast():
            outcome = model.pass_over(batch.input_ids, batch.documents)
        logits_SV, labels_S = outcome.outputs.float().flatten(0, 1), batch.labels.flatten()
        kept = labels_S >= 0
        losses.append(F.cross_entropy(logits_SV[kept], labels_S[kept], reduction="none").cpu())
        inputs.append(batch.input_ids.flatten()[kept].cpu())
        targets.append(labels_S[kept].cpu())
        walk = outcome.details
        if isinstance(walk, LanguageWalk) and walk.experts:
            paths.append(walk.paths()[kept.cpu().numpy()])
    pieces = [piece.decode("utf-8", "replace") for piece in piece_texts(tokenizer)]
    targets_U = torch.cat(targets).numpy()
    return TokenReport(
        torch.cat(inputs).numpy(),
        targets_U,
        torch.cat(losses).numpy(),
        class_numbers(pieces)[targets_U],
        np.concatenate(paths) if paths else None,
        pieces,
    )
