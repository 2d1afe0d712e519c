"""Sums of decimal numbers with all their digits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.digits import drawn_digits, total, written
from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, column, joined


@LINE_TASKS.register("addition_text")
class AdditionText(LineTask):
    """`12+34=46`. A number has up to `size` digits; their number is drawn first."""

    alphabet = "0123456789+"
    separator = "="

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        first_PN, second_PN = (drawn_digits(rng, 10, rng.integers(1, sizes_N, endpoint=True)) for _ in "ab")
        numbers = [written(digits_PN, highest_first=True) for digits_PN in (first_PN, second_PN)]
        question_NL = joined(numbers[0], column("+", len(sizes_N)), numbers[1])
        return question_NL, written(total(first_PN, second_PN, 10), highest_first=True)

    @staticmethod
    def solve(question: str) -> str:
        digits, carry, first_second = [], 0, question.split("+")
        longest = max(map(len, first_second))
        first, second = (one.rjust(longest, "0") for one in first_second)
        for one, other in zip(reversed(first), reversed(second), strict=True):
            carry, digit = divmod(int(one) + int(other) + carry, 10)
            digits.append(str(digit))
        text = (str(carry) if carry else "") + "".join(reversed(digits))
        return text.lstrip("0") or "0"

    def num_questions(self, size: int) -> float:
        return 10.0 ** (2 * size)
