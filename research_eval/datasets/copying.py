"""Copying: does the sequence hold one fixed pattern as a contiguous block?

The pattern belongs to the task (`task_seed`), so it is the same in all splits and has to be learned. Half of the
samples hold it at a random place, the others nowhere.

>>> solve([4, 7, 1, 2, 3], pattern=[7, 1, 2])
1
>>> solve([4, 7, 2, 1, 3], pattern=[7, 1, 2])
0

N samples  L length  P length of the pattern  W places where it could start
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.seeding import derive_seed


@SYNTHETIC_DATASETS.register("copying")
class CopyingDataset(SequenceBaseDataset):
    """Find a fixed block. `pattern_length` is 3, or the least above it that is rare enough in random sequences."""

    VERSION = 1

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=1)] = 16,
        vocab_size: Annotated[int, Field(ge=2)] = 8,
        pattern_length: Annotated[int, Field(ge=1)] | None = None,
        task_seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        super().__init__(num_samples, seq_len, vocab_size)
        if vocab_size < 2:
            raise ConfigError(f"copying: vocab_size={vocab_size}: expected at least 2")

        def rare_enough(length: int) -> bool:
            """By the union bound at most half of all random sequences hold the pattern."""
            return bool(2 * (seq_len - length + 1) <= vocab_size**length)

        if pattern_length is None:
            pattern_length = next(length for length in range(min(3, seq_len), seq_len + 1) if rare_enough(length))
        if not 1 <= pattern_length <= seq_len:
            raise ConfigError(f"copying: pattern_length={pattern_length}: choose 1 to seq_len = {seq_len}")
        if not rare_enough(pattern_length):
            raise ConfigError(
                f"copying: pattern_length={pattern_length}: with vocab_size={vocab_size} nearly every sequence of "
                f"{seq_len} tokens could hold the pattern by chance; make it longer"
            )
        rng = np.random.default_rng(derive_seed(task_seed, "copying"))
        self.pattern_P = rng.integers(1, vocab_size, pattern_length, np.int32, endpoint=True)

    def input_space(self) -> int:
        return int(self.vocab_size**self.seq_len)

    def _random_sequences(self, count: int) -> NDArray[np.int32]:
        return self.rng.integers(1, self.vocab_size, (count, self.seq_len), np.int32, endpoint=True)

    def _holds_pattern(self, ids_NL: NDArray[np.int32]) -> NDArray[np.bool_]:
        num_places = self.seq_len - len(self.pattern_P) + 1
        matches_NW = np.ones((len(ids_NL), num_places), bool)
        for place, token in enumerate(self.pattern_P):
            matches_NW &= ids_NL[:, place : place + num_places] == token
        return np.asarray(matches_NW.any(1))

    def _generate_data(self) -> None:
        labels_N = self.rng.integers(2, size=self.num_samples)
        ids_NL = self._random_sequences(self.num_samples)
        redraw: NDArray[Any] = np.flatnonzero(labels_N == 0)
        while (redraw := redraw[self._holds_pattern(ids_NL[redraw])]).size:
            ids_NL[redraw] = self._random_sequences(len(redraw))
        positive = np.flatnonzero(labels_N)
        length = len(self.pattern_P)
        starts = self.rng.integers(self.seq_len - length, size=len(positive), endpoint=True)
        ids_NL[positive[:, None], starts[:, None] + np.arange(length)] = self.pattern_P
        self.samples = ArraySamples(ids_NL, labels_N)
        self.labels_list = [0, 1]


def solve(tokens: Sequence[int], pattern: Sequence[int]) -> int:
    """1 if the pattern occurs, tried at every place, else 0."""
    places = range(len(tokens) - len(pattern) + 1)
    return int(any(list(tokens[place : place + len(pattern)]) == list(pattern) for place in places))
