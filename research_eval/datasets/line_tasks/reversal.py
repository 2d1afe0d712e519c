"""Letters, and the same letters in reverse order."""

from __future__ import annotations

import string

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, letters, ordered


@LINE_TASKS.register("reversal")
class Reversal(LineTask):
    """`abc>cba`."""

    alphabet = string.ascii_lowercase

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        questions_NL = letters(rng, self.alphabet, sizes_N)
        return questions_NL, ordered(questions_NL, -np.arange(questions_NL.shape[1])[None])

    @staticmethod
    def solve(question: str) -> str:
        return "".join(reversed(question))

    def num_questions(self, size: int) -> float:
        return float(sum(float(len(self.alphabet)) ** length for length in range(1, size + 1)))


@LINE_TASKS.register("reverse_string")
class ReverseString(Reversal):
    """The same with two letters, as in the Chomsky-hierarchy set (Deletang et al., 2023)."""

    alphabet = "ab"
