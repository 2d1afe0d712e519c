"""Generated tasks for models of the next token: a line asks a question, and the rest of the line is the answer.

N lines  L characters of the longest line  B batch
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.nn import functional as F

from research_eval.annotations import Count, Natural, Younger
from research_eval.datasets.language.line_task import LINE_TASKS, texts_of
from research_eval.datasets.language.vocabulary import build_tokenizer, encode_many
from research_eval.datasets.token_data import IGNORED, Batch, Batches, DataSplits, TokenData
from research_eval.errors import ConfigError
from research_eval.registry import NEXT_TOKEN
from research_eval.seeding import derive_seed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LARGEST_SHARE = 0.8  # of all possible questions that the splits may take
LONGER = "longer"  # the test split with questions of more than `size`
MAX_ROUNDS = 50  # of draws, before a task counts as having too few questions
Rows = Annotated[int, Field(ge=10, le=10_000_000)]
Size = Annotated[int, Field(ge=1, le=500)]


@dataclass(frozen=True)
class LineData(TokenData):
    """One split. `labels` [N] are the places of the separators: only tokens after them are scored."""

    longest: int = 0  # of all splits

    def batches(
        self,
        batch_size: int,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        curriculum_epochs: float = 0.0,
    ) -> LineBatches:
        return LineBatches(self, batch_size, device, seed, curriculum_epochs)


class LineBatches(Batches):
    """Batches of lines, padded to the longest line of all splits. Labels are the next tokens of the answers."""

    data: LineData

    def take(self, rows: NDArray[np.int64]) -> Batch:
        batch = super().take(rows)
        missing = self.data.longest - batch.input_ids.shape[1]
        ids_BL = F.pad(batch.input_ids, (0, missing))
        next_BL = F.pad(ids_BL[:, 1:], (0, 1))
        places_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        is_answer_BL = (places_L >= batch.labels.unsqueeze(1)) & (next_BL != 0)
        return batch._replace(
            input_ids=ids_BL,
            attention_mask=F.pad(batch.attention_mask, (0, missing)),
            labels=next_BL.masked_fill(~is_answer_BL, IGNORED),
        )


class GeneratedLines:
    """Lines of a task, without repetition: no question is in two splits. Every run of a `task_seed` has the same lines.

    Sizes are drawn evenly from 1 to `size`, and from `size` + 1 to `longest_test_size` for the test split "longer", if
    that is given. The task says what a size is. Raises ConfigError if there are too few questions.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        num_samples: Rows = 10_000,
        size: Size = 3,
        val_samples: Count = 1_000,
        test_samples: Natural = 1_000,
        task_seed: Natural = 0,
        longest_test_size: Annotated[Size | None, Younger()] = None,
    ) -> None:
        self.dataset_name, self.size, self.task_seed = dataset_name, size, task_seed
        self.task = LINE_TASKS.get_or_explain(dataset_name)()
        self.sizes = {"train": num_samples, "validation": val_samples, "test": test_samples}
        self.longest_test_size = longest_test_size
        if longest_test_size is not None and longest_test_size <= size:
            raise ConfigError(f"longest_test_size={longest_test_size} has to be larger than size={size}")
        total, known = sum(self.sizes.values()), self.task.num_questions(size)
        if total > LARGEST_SHARE * known:
            raise self._too_few(f"{known:,.0f} different questions", total)

    def _too_few(self, there_are: str, total: int) -> ConfigError:
        return ConfigError(
            f"{self.dataset_name} with size={self.size} has {there_are}, too few for {total:,} lines. Raise "
            "size, or lower num_samples, val_samples or test_samples."
        )

    def splits(self) -> DataSplits:
        """Draw the lines and encode their characters."""
        total = sum(self.sizes.values())
        lines = self._drawn(f"lines {self.dataset_name}", 1, self.size, total)
        tokenizer = build_tokenizer(
            "char", [f"{self.task.alphabet}{self.task.separator}\n"], separated=False, vocab_size=0
        )
        longest, start, parts = max(map(len, lines)), 0, {}
        for name, number in self.sizes.items():
            parts[name] = self._encoded(lines[start : start + number], tokenizer, longest)
            start += number
        further: dict[str, TokenData] = {}
        if self.longest_test_size is not None and self.sizes["test"]:
            longer = self._drawn(LONGER, self.size + 1, self.longest_test_size, self.sizes["test"], lines)
            further[LONGER] = self._encoded(longer, tokenizer, max(map(len, longer)))
            lines += longer
        whole = hashlib.sha256("".join(lines).encode()).hexdigest()
        fingerprint: dict[str, Any] = {
            "source": "generated",
            "sha256": {name: part.sha256() for name, part in (parts | further).items()},
            "data_sha256": whole,
        }
        size = tokenizer.get_vocab_size()
        return DataSplits(
            train=parts["train"],
            validation=parts["validation"],
            test=parts["test"] if self.sizes["test"] else None,
            vocab_size=size,
            num_classes=size,
            label_names=[],
            max_length=max(map(len, lines)),
            tokenizer=tokenizer,
            fingerprint=fingerprint,
            task=NEXT_TOKEN,
            further_tests=further,
        )

    def _drawn(self, stream: str, smallest: int, largest: int, number: int, others: Sequence[str] = ()) -> list[str]:
        """So many different lines with sizes from `smallest` to `largest`, none of the `others`.

        Raises ConfigError if there are fewer.
        """
        rng = np.random.default_rng(derive_seed(self.task_seed, stream))
        seen = dict.fromkeys(others)
        number += len(seen)
        for _ in range(MAX_ROUNDS):
            sizes_N = rng.integers(smallest, largest, number + 100, endpoint=True)
            pairs = zip(*map(texts_of, self.task.draw(rng, sizes_N)), strict=True)
            seen |= dict.fromkeys(f"{question}{self.task.separator}{answer}\n" for question, answer in pairs)
            if len(seen) >= number:
                return list(seen)[len(others) : number]
        raise self._too_few(f"about {len(seen):,} different questions", number)

    def _encoded(self, lines: Sequence[str], tokenizer: Tokenizer, longest: int) -> LineData:
        """One split. A question may have the separator too, as equations do: the last one counts."""
        ids, lengths = encode_many(tokenizer, lines)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = [line.rindex(self.task.separator) for line in lines]
        return LineData(ids, offsets, np.array(places, np.int64), longest=longest)
