"""Parity: how many tokens are the token 1, modulo `num_classes`?

Each position holds id 1 with probability 1/2, otherwise one of the ids 2..vocab_size. With `min_length` the samples
have different lengths, and additional test splits hold longer ones.

>>> solve([1, 2, 1, 1])
1

N samples  L length
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from research_eval.datasets.base_dataset import ArraySamples
from research_eval.datasets.regular import RegularDataset
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.routing.automaton import Automaton


@SYNTHETIC_DATASETS.register("parity")
class ParityDataset(RegularDataset):
    """Count the ones, modulo `num_classes`."""

    VERSION = 1

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=1)] = 16,
        vocab_size: Annotated[int, Field(ge=2)] = 2,
        num_classes: Annotated[int, Field(ge=2)] = 2,
        min_length: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        super().__init__(num_samples, seq_len, seq_len if min_length is None else min_length, vocab_size)
        self.fixed_length = min_length is None
        if self.fixed_length:
            self.further_tests = ()
        if vocab_size < 2:
            raise ConfigError(f"parity: vocab_size={vocab_size}: the token that is counted needs at least one other")
        if not 2 <= num_classes <= seq_len + 1:
            raise ConfigError(f"parity: num_classes={num_classes}: choose 2 to seq_len + 1 = {seq_len + 1}")
        self.num_classes = num_classes

    def input_space(self) -> int | None:
        return int(self.vocab_size**self.seq_len) if self.fixed_length else None

    def automaton(self) -> Automaton:
        counts_S = np.arange(self.num_classes)
        transitions_ST = np.tile(counts_S[:, None], self.vocab_size)
        transitions_ST[:, 0] = (counts_S + 1) % self.num_classes
        return Automaton(0, transitions_ST, counts_S)

    def _generate_data(self) -> None:
        lengths_N = np.full(self.num_samples, self.seq_len) if self.fixed_length else self.draw_lengths()
        # Half of the integers from 3 - vocab_size to vocab_size are at most 1.
        shape = (self.num_samples, int(lengths_N.max()))
        ids_NL = np.maximum(self.rng.integers(3 - self.vocab_size, self.vocab_size, shape, np.int32, endpoint=True), 1)
        ids_NL *= np.arange(shape[1]) < lengths_N[:, None]
        self.samples = ArraySamples(ids_NL, (ids_NL == 1).sum(1) % self.num_classes)
        self.labels_list = list(range(self.num_classes))


def solve(tokens: Sequence[int], num_classes: int = 2) -> int:
    """The number of ones modulo `num_classes`, one token at a time."""
    state = 0
    for token in tokens:
        if token == 1:
            state = (state + 1) % num_classes
    return state
