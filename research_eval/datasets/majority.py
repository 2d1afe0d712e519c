"""Majority, which no finite automaton decides, alone and mixed with parity, which attention alone does not solve.

`majority`: are there more tokens 1 than tokens 2?

>>> solve([1, 2, 1])
1

`parity_majority`: the first token names the question about the rest: 3 the parity of the tokens 1, 4 their majority.
The family of a sample (0 parity, 1 majority) is its group.

>>> solve_mixed([3, 1, 2, 1])
0

N samples  L length
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from research_eval.datasets.base_dataset import ArraySamples
from research_eval.datasets.regular import LengthDataset
from research_eval.registry import SYNTHETIC_DATASETS

PARITY, MAJORITY = 3, 4  # the first token of a mixed sample


@SYNTHETIC_DATASETS.register("majority")
class MajorityDataset(LengthDataset):
    """More ones than twos?"""

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=1)] = 40,
        min_length: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        super().__init__(num_samples, seq_len, min_length, vocab_size=2)

    def _generate_data(self) -> None:
        ids_NL = self.draw_tokens(self.draw_lengths(), 2)
        self.samples = ArraySamples(ids_NL, ((ids_NL == 1).sum(1) > (ids_NL == 2).sum(1)).astype(int))
        self.labels_list = [0, 1]


@SYNTHETIC_DATASETS.register("parity_majority")
class ParityMajorityDataset(LengthDataset):
    """Two questions about the same kind of sample. Lengths count the first token, so there are two at least."""

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=2)] = 40,
        min_length: Annotated[int, Field(ge=2)] = 2,
    ) -> None:
        super().__init__(num_samples, seq_len, min_length, vocab_size=4)

    def _generate_data(self) -> None:
        ids_NL = self.draw_tokens(self.draw_lengths(), 2)
        families_N = self.rng.integers(0, 1, self.num_samples, endpoint=True)
        ids_NL[:, 0] = PARITY + families_N
        ones_N, twos_N = (ids_NL == 1).sum(1), (ids_NL == 2).sum(1)
        labels_N = np.where(families_N == 0, ones_N % 2, ones_N > twos_N)
        self.samples = ArraySamples(ids_NL, labels_N, groups_N=families_N)
        self.labels_list = [0, 1]


def solve(tokens: Sequence[int]) -> int:
    """Strike out a pair of different tokens until only one kind is left."""
    rest = list(tokens)
    while 1 in rest and 2 in rest:
        rest.remove(1)
        rest.remove(2)
    return int(1 in rest)


def solve_mixed(tokens: Sequence[int]) -> int:
    """Toggle at every 1, or strike out."""
    question, *rest = tokens
    if question == MAJORITY:
        return solve(rest)
    odd = False
    for token in rest:
        odd ^= token == 1
    return int(odd)
