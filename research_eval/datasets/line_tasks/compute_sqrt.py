"""The whole part of the square root of a binary number (Chomsky-hierarchy set; Deletang et al., 2023)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, codes_of, letters, texts_of


@LINE_TASKS.register("compute_sqrt")
class ComputeSqrt(LineTask):
    """`1010>11` (10 has the root 3). The highest bit comes first, and it is 1."""

    alphabet = "01"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        questions_NL = letters(rng, self.alphabet, sizes_N)
        questions_NL[:, 0] = ord("1")
        # Python's whole numbers have any length, and their root is one call.
        return questions_NL, codes_of([f"{math.isqrt(int(text, 2)):b}" for text in texts_of(questions_NL)])

    @staticmethod
    def solve(question: str) -> str:
        number, low, high = int(question, 2), 0, int(question, 2) + 1
        while high - low > 1:  # low * low <= number < high * high
            middle = (low + high) // 2
            low, high = (middle, high) if middle * middle <= number else (low, middle)
        return f"{low:b}"

    def num_questions(self, size: int) -> float:
        return 2.0**size - 1
