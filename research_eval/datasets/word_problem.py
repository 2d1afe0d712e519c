"""Word problems of permutation groups: which permutation is the product of those that the tokens stand for?

`s3`: three objects, a token for each of the 6 permutations. `s5`: five objects and three tokens (the identity, a swap
and a 5-cycle), which generate all 120 permutations. The label is the number of the product among the permutations in
lexicographic order; the first token is applied first.

Swap the first two of three objects, then rotate all:

>>> solve([3, 4], GROUPS["s3"])
5

N samples  L length  S states  T tokens
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from research_eval.datasets.regular import RegularDataset
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.routing.automaton import Automaton

Permutation = tuple[int, ...]
GROUPS: dict[str, list[Permutation]] = {  # the generators
    "s3": list(itertools.permutations(range(3))),
    "s5": [(0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (1, 2, 3, 4, 0)],
}


class WordProblemDataset(RegularDataset):
    """The running product of a sequence of permutations."""

    group: ClassVar[str]

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=1)] = 40,
        min_length: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        super().__init__(num_samples, seq_len, min_length, vocab_size=len(GROUPS[self.group]))

    def automaton(self) -> Automaton:
        generators = GROUPS[self.group]
        elements = list(itertools.permutations(range(len(generators[0]))))
        number = {element: place for place, element in enumerate(elements)}
        products = [[number[_then(element, generator)] for generator in generators] for element in elements]
        names = ["".join(str(image + 1) for image in generator) for generator in generators]
        return Automaton(0, np.array(products), np.arange(len(elements)), names)


@SYNTHETIC_DATASETS.register("s3")
class S3Dataset(WordProblemDataset):
    """Six permutations of three objects."""

    group = "s3"


@SYNTHETIC_DATASETS.register("s5")
class S5Dataset(WordProblemDataset):
    """All 120 permutations of five objects."""

    group = "s5"


def _then(first: Permutation, second: Permutation) -> Permutation:
    """Both, one after the other: object i goes to first[i], and from there to second[first[i]]."""
    return tuple(second[image] for image in first)


def solve(tokens: Sequence[int], generators: list[Permutation]) -> int:
    """Move the objects one token at a time, then count the permutations that come before the result."""
    places = list(range(len(generators[0])))  # of each object
    for token in tokens:
        places = [generators[token - 1][place] for place in places]
    return sum(other < tuple(places) for other in itertools.permutations(range(len(places))))
