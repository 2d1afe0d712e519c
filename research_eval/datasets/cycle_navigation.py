"""Cycle navigation: where on a cycle do the steps stay (1), forward (2) and back (3) end? (Deletang et al., 2023.)

>>> solve([3, 3, 1, 2], num_places=5)
4
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from research_eval.datasets.regular import RegularDataset
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.routing.automaton import Automaton


@SYNTHETIC_DATASETS.register("cycle_navigation")
class CycleNavigationDataset(RegularDataset):
    """Walk from place 0; the label is the last place."""

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=1)] = 40,
        min_length: Annotated[int, Field(ge=1)] = 1,
        num_places: Annotated[int, Field(ge=2)] = 5,
    ) -> None:
        super().__init__(num_samples, seq_len, min_length, vocab_size=3)
        self.num_places = num_places

    def automaton(self) -> Automaton:
        places_S = np.arange(self.num_places)
        steps_ST = places_S[:, None] + np.array([0, 1, -1])
        return Automaton(0, steps_ST % self.num_places, places_S, ("stay", "forward", "back"))


def solve(tokens: Sequence[int], num_places: int) -> int:
    """Forward steps less backward steps, wound around the cycle."""
    distance = list(tokens).count(2) - list(tokens).count(3)
    while distance < 0:
        distance += num_places
    return distance % num_places
