"""Letters, and the same letters twice (Chomsky-hierarchy set; Deletang et al., 2023)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, joined, letters


@LINE_TASKS.register("duplicate_string")
class DuplicateString(LineTask):
    """`aab>aabaab`."""

    alphabet = "ab"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        questions_NL = letters(rng, self.alphabet, sizes_N)
        return questions_NL, joined(questions_NL, questions_NL)

    @staticmethod
    def solve(question: str) -> str:
        return question + question
