"""Generated tasks for models of the next token: a line asks a question, and the rest of the line is the answer.

N lines  L characters of the longest line  B batch
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.nn import functional as F

from research_eval.annotations import Count, Natural
from research_eval.datasets.language.vocabulary import build_tokenizer, encode_many
from research_eval.datasets.token_data import IGNORED, Batch, Batches, DataSplits, TokenData
from research_eval.errors import ConfigError
from research_eval.registry import NEXT_TOKEN
from research_eval.seeding import derive_seed

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LARGEST_SHARE = 0.8  # of all possible questions that the splits may take
Rows = Annotated[int, Field(ge=10, le=10_000_000)]
Size = Annotated[int, Field(ge=1, le=64)]


def addition_line(rng: np.random.Generator, size: int) -> str:
    """Two numbers of up to `size` digits, and all digits of their sum. The length of a number is drawn first."""
    first, second = (int(rng.integers(10 ** int(rng.integers(1, size + 1)))) for _ in range(2))
    return f"{first}+{second}={first + second}\n"


def reversal_line(rng: np.random.Generator, size: int) -> str:
    """Up to `size` letters, and the same in reverse order."""
    letters = [LETTERS[place] for place in rng.integers(26, size=int(rng.integers(1, size + 1)))]
    return f"{''.join(letters)}>{''.join(reversed(letters))}\n"


def sorting_line(rng: np.random.Generator, size: int) -> str:
    """Up to `size` letters, and the same in alphabetical order."""
    letters = [LETTERS[place] for place in rng.integers(26, size=int(rng.integers(1, size + 1)))]
    return f"{''.join(letters)}>{''.join(sorted(letters))}\n"


LINES: Mapping[str, Callable[[np.random.Generator, int], str]] = {
    "addition_text": addition_line,
    "reversal": reversal_line,
    "sorting": sorting_line,
}
SEPARATORS = "=>"


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

    `size` is the number of digits of a summand, or of letters. Raises ConfigError if there are too few questions.
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
    ) -> None:
        self.dataset_name, self.size, self.task_seed = dataset_name, size, task_seed
        self.sizes = {"train": num_samples, "validation": val_samples, "test": test_samples}
        base = 10 ** (2 * size) if dataset_name == "addition_text" else sum(26**length for length in range(1, size + 1))
        total = sum(self.sizes.values())
        if total > LARGEST_SHARE * base:
            raise ConfigError(
                f"{dataset_name} with size={size} has {base:,} different questions, too few for {total:,} lines. Raise "
                "size, or lower num_samples, val_samples or test_samples."
            )

    def splits(self) -> DataSplits:
        """Draw the lines and encode their characters."""
        rng = np.random.default_rng(derive_seed(self.task_seed, f"lines {self.dataset_name}"))
        draw, seen = LINES[self.dataset_name], dict[str, None]()
        while len(seen) < sum(self.sizes.values()):
            seen.setdefault(draw(rng, self.size))
        lines = list(seen)
        alphabet = "0123456789+=\n" if self.dataset_name == "addition_text" else f"{LETTERS}>\n"
        tokenizer = build_tokenizer("char", [alphabet], separated=False, vocab_size=0)
        longest, start, parts = max(map(len, lines)), 0, {}
        for name, number in self.sizes.items():
            chosen = lines[start : start + number]
            start += number
            ids, lengths = encode_many(tokenizer, chosen)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            places = [max(line.find(mark) for mark in SEPARATORS) for line in chosen]
            parts[name] = LineData(ids, offsets, np.array(places, np.int64), longest=longest)
        whole = hashlib.sha256("".join(lines).encode()).hexdigest()
        fingerprint: dict[str, Any] = {
            "source": "generated",
            "sha256": {name: part.sha256() for name, part in parts.items()},
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
            max_length=longest,
            tokenizer=tokenizer,
            fingerprint=fingerprint,
            task=NEXT_TOKEN,
        )
