"""Even pairs: is the number of neighbours that differ even? (Deletang et al., 2023, Neural Networks and the Chomsky
Hierarchy.) It is if and only if the first token equals the last.

>>> solve([1, 2, 2, 1])
1

"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from research_eval.datasets.regular import RegularDataset
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.routing.automaton import Automaton


@SYNTHETIC_DATASETS.register("even_pairs")
class EvenPairsDataset(RegularDataset):
    """Two tokens; the label is 1 for an even number of changes."""

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=1)] = 40,
        min_length: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        super().__init__(num_samples, seq_len, min_length, vocab_size=2)

    def automaton(self) -> Automaton:
        # State 0 is the start; 1 + 2 * first + last after that.
        after_start = [1 + 2 * first + first for first in range(2)]
        rest = [[1 + 2 * first + last for last in range(2)] for first in range(2) for _ in range(2)]
        return Automaton(0, np.array([after_start, *rest]), np.array([1, 1, 0, 0, 1]), ("a", "b"))


def solve(tokens: Sequence[int]) -> int:
    """Count the changes."""
    changes = sum(one != other for one, other in itertools.pairwise(tokens))
    return int(changes % 2 == 0)
