"""Letters, and the same letters in alphabetical order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, letters, ordered
from research_eval.datasets.line_tasks.reversal import Reversal


@LINE_TASKS.register("sorting")
class Sorting(Reversal):
    """`cab>abc`."""

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        questions_NL = letters(rng, self.alphabet, sizes_N)
        return questions_NL, ordered(questions_NL, questions_NL)

    @staticmethod
    def solve(question: str) -> str:
        return "".join(sorted(question))


@LINE_TASKS.register("bucket_sort")
class BucketSort(Sorting):
    """The same with five letters, as in the Chomsky-hierarchy set (Deletang et al., 2023)."""

    alphabet = "abcde"
