"""Sums and products of binary numbers, the lowest bit first (Chomsky-hierarchy set; Deletang et al., 2023)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.digits import Digits, drawn_digits, product, total, written
from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, column, joined


class BinaryTask(LineTask):
    """Two numbers of together `size` bits (two at least), each without zeros beyond its highest bit."""

    alphabet = "01+*"
    sign: str

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        total_N = np.maximum(sizes_N, 2)
        first_N = rng.integers(1, total_N)
        bits = [_number(rng, lengths_N) for lengths_N in (first_N, total_N - first_N)]
        first_NL, second_NL = (written(bits_PN, highest_first=False) for bits_PN in bits)
        question_NL = joined(first_NL, column(self.sign, len(sizes_N)), second_NL)
        return question_NL, written(self.result(*bits), highest_first=False)

    def result(self, first_PN: Digits, second_PN: Digits) -> Digits:
        """The bits of the answer."""
        raise NotImplementedError


def _number(rng: np.random.Generator, lengths_N: NDArray[np.int64]) -> Digits:
    """Numbers with so many bits; the highest one is 1, unless it is the only one."""
    bits_PN = drawn_digits(rng, 2, lengths_N)
    many_N = lengths_N > 1
    bits_PN[lengths_N[many_N] - 1, np.flatnonzero(many_N)] = 1
    return bits_PN


@LINE_TASKS.register("binary_addition")
class BinaryAddition(BinaryTask):
    """`11+01>101` (3 + 2 = 5)."""

    sign = "+"

    def result(self, first_PN: Digits, second_PN: Digits) -> Digits:
        return total(first_PN, second_PN, 2)

    @staticmethod
    def solve(question: str) -> str:
        first, second = question.split("+")
        return _text(_value(first) + _value(second))


@LINE_TASKS.register("binary_multiplication")
class BinaryMultiplication(BinaryTask):
    """`11*01>011` (3 times 2 is 6)."""

    sign = "*"

    def result(self, first_PN: Digits, second_PN: Digits) -> Digits:
        return product(first_PN, second_PN, 2)

    @staticmethod
    def solve(question: str) -> str:
        first, second = question.split("*")
        return _text(_value(first) * _value(second))


def _value(text: str) -> int:
    """The number of a text with the lowest bit first."""
    return int(text[::-1], 2)


def _text(number: int) -> str:
    """A number as text with the lowest bit first."""
    return f"{number:b}"[::-1]
