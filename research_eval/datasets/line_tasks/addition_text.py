"""Sums of decimal numbers with all their digits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, codes_of


@LINE_TASKS.register("addition_text")
class AdditionText(LineTask):
    """`12+34=46`. A number has up to `size` digits; their number is drawn first."""

    alphabet = "0123456789+"
    separator = "="

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        # Beyond 18 digits a number has no int64: then it is put together from two draws.
        pairs = [[_number(rng, digits) for digits in rng.integers(1, sizes_N, endpoint=True).tolist()] for _ in "ab"]
        questions = [f"{first}+{second}" for first, second in zip(*pairs, strict=True)]
        return codes_of(questions), codes_of([str(first + second) for first, second in zip(*pairs, strict=True)])

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


def _number(rng: np.random.Generator, digits: int) -> int:
    """A number of at most so many digits."""
    if digits <= 18:
        return int(rng.integers(10**digits))
    return int(rng.integers(10**18)) * 10 ** (digits - 18) + _number(rng, digits - 18)
