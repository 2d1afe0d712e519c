"""Letters, first those at odd places and then those at even ones (Chomsky-hierarchy set; Deletang et al., 2023)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, letters, ordered


@LINE_TASKS.register("odds_first")
class OddsFirst(LineTask):
    """`aaabaa>aaaaba`: places count from 1."""

    alphabet = "ab"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        questions_NL = letters(rng, self.alphabet, sizes_N)
        return questions_NL, ordered(questions_NL, (np.arange(questions_NL.shape[1]) % 2)[None])

    @staticmethod
    def solve(question: str) -> str:
        return question[::2] + question[1::2]
