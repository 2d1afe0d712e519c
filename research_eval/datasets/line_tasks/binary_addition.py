"""Sums and products of binary numbers, the lowest bit first (Chomsky-hierarchy set; Deletang et al., 2023)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, joined, letters

ZERO = ord("0")
Bits = NDArray[np.int64]  # [N, L], the lowest bit first


class BinaryTask(LineTask):
    """Two numbers of together `size` bits (two at least), each without zeros beyond its highest bit."""

    alphabet = "01+*"
    sign: str

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        total_N = np.maximum(sizes_N, 2)
        first_N = rng.integers(1, total_N)
        numbers = [_number(rng, lengths_N) for lengths_N in (first_N, total_N - first_N)]
        sign_N1 = np.full((len(sizes_N), 1), ord(self.sign), np.uint8)
        bits_NL = self.result(*(np.where(one > 0, one.astype(np.int64) - ZERO, 0) for one in numbers))
        return joined(numbers[0], sign_N1, numbers[1]), _written(bits_NL)

    def result(self, first_NL: Bits, second_NL: Bits) -> Bits:
        """The bits of the answer."""
        raise NotImplementedError


def _number(rng: np.random.Generator, lengths_N: NDArray[np.int64]) -> Codes:
    """Numbers with so many bits; the highest one is 1, unless it is the only one."""
    codes_NL = letters(rng, "01", lengths_N)
    many_N = lengths_N > 1
    codes_NL[many_N, lengths_N[many_N] - 1] = ord("1")
    return codes_NL


def carried(sums_NL: Bits) -> Bits:
    """Bits with all carries done, in as many places as they need."""
    sums_NL, place = np.pad(sums_NL, ((0, 0), (0, 1))), 0
    while place < sums_NL.shape[1]:
        carry_N, sums_NL[:, place] = sums_NL[:, place] // 2, sums_NL[:, place] % 2
        if carry_N.any():
            if place + 1 == sums_NL.shape[1]:
                sums_NL = np.pad(sums_NL, ((0, 0), (0, 1)))
            sums_NL[:, place + 1] += carry_N
        place += 1
    return sums_NL


def _written(bits_NL: Bits) -> Codes:
    """The bits as text without zeros beyond the highest 1, and at least one of them."""
    places_L = np.arange(bits_NL.shape[1])
    highest_N = np.where(bits_NL > 0, places_L, 0).max(1)
    return np.where(places_L <= highest_N[:, None], bits_NL + ZERO, 0).astype(np.uint8)


def value(text: str) -> int:
    """The number of a text with the lowest bit first."""
    return int(text[::-1], 2)


def written(number: int) -> str:
    """A number as text with the lowest bit first."""
    return f"{number:b}"[::-1]


@LINE_TASKS.register("binary_addition")
class BinaryAddition(BinaryTask):
    """`11+01>101` (3 + 2 = 5)."""

    sign = "+"

    def result(self, first_NL: Bits, second_NL: Bits) -> Bits:
        longest = max(first_NL.shape[1], second_NL.shape[1])
        padded = (np.pad(one, ((0, 0), (0, longest - one.shape[1]))) for one in (first_NL, second_NL))
        return carried(sum(padded, start=np.zeros((len(first_NL), longest), np.int64)))

    @staticmethod
    def solve(question: str) -> str:
        first, second = question.split("+")
        return written(value(first) + value(second))


@LINE_TASKS.register("binary_multiplication")
class BinaryMultiplication(BinaryTask):
    """`11*01>011` (3 times 2 is 6)."""

    sign = "*"

    def result(self, first_NL: Bits, second_NL: Bits) -> Bits:
        sums_NL = np.zeros((len(first_NL), first_NL.shape[1] + second_NL.shape[1]), np.int64)
        for place, bit_N in enumerate(second_NL.T):
            sums_NL[:, place : place + first_NL.shape[1]] += first_NL * bit_N[:, None]
        return carried(sums_NL)

    @staticmethod
    def solve(question: str) -> str:
        first, second = question.split("*")
        return written(value(first) * value(second))
