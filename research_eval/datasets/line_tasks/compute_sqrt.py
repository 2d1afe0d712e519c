"""The whole part of the square root of a binary number (Chomsky-hierarchy set; Deletang et al., 2023).

N numbers  P places of a root, the lowest one first  L characters
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.digits import ZERO, written
from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, codes_of, letters, texts_of

EXACT_BITS = 52  # a float64 holds these numbers, and rounds no root up to the next whole number


@LINE_TASKS.register("compute_sqrt")
class ComputeSqrt(LineTask):
    """`1010>11` (10 has the root 3). The highest bit comes first, and it is 1."""

    alphabet = "01"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        questions_NL = letters(rng, self.alphabet, sizes_N)
        questions_NL[:, 0] = ord("1")
        long_N = sizes_N > EXACT_BITS
        roots = [_short_roots(questions_NL[~long_N]), _long_roots(questions_NL[long_N])]
        answers_NL = np.zeros((len(sizes_N), max(found.shape[1] for found in roots)), np.uint8)
        for rows_N, found_NL in zip((~long_N, long_N), roots, strict=True):
            answers_NL[rows_N, : found_NL.shape[1]] = found_NL
        return questions_NL, answers_NL

    @staticmethod
    def solve(question: str) -> str:
        number, low, high = int(question, 2), 0, int(question, 2) + 1
        while high - low > 1:  # low * low <= number < high * high
            middle = (low + high) // 2
            low, high = (middle, high) if middle * middle <= number else (low, middle)
        return f"{low:b}"

    def num_questions(self, size: int) -> float:
        return 2.0**size - 1


def _short_roots(numbers_NL: Codes) -> Codes:
    """The roots of binary numbers of at most `EXACT_BITS` bits."""
    values_N = np.zeros(len(numbers_NL), np.int64)
    for codes_N in numbers_NL[:, :EXACT_BITS].T:
        values_N = np.where(codes_N > 0, 2 * values_N + (codes_N == ZERO + 1), values_N)
    roots_N = np.sqrt(values_N.astype(np.float64)).astype(np.int64)
    places_P = np.arange(EXACT_BITS // 2)
    return written(((roots_N >> places_P[:, None]) & 1).astype(np.int32), highest_first=True)


def _long_roots(numbers_NL: Codes) -> Codes:
    """The roots of binary numbers of any length: Python's whole numbers have any, and their root is one call."""
    return codes_of([f"{math.isqrt(int(text, 2)):b}" for text in texts_of(numbers_NL)])
