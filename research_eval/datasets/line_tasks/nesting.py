"""Nested structure: balanced brackets, and lists with operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, column

BRACKETS = np.frombuffer(b"()[]", np.uint8)
ZERO = ord("0")


@LINE_TASKS.register("dyck")
class Dyck(LineTask):
    """`([])>1`: are brackets of two kinds balanced? In half of the questions one bracket is replaced by another.

    The size is the number of pairs.
    """

    alphabet = "()[]01"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        num_texts, rows_N = len(sizes_N), np.arange(len(sizes_N))
        codes_NL = np.zeros((num_texts, 2 * int(sizes_N.max())), np.uint8)
        open_LN = np.zeros((int(sizes_N.max()) + 1, num_texts), np.uint8)  # the kinds of the open brackets, a stack
        left_N, height_N = sizes_N.copy(), np.zeros(num_texts, np.int64)
        for place in range(codes_NL.shape[1]):
            opens_N = (left_N > 0) & ((height_N == 0) | (rng.random(num_texts) < 0.5))
            closes_N = ~opens_N & (height_N > 0)
            opens, closes = rows_N[opens_N], rows_N[closes_N]
            kind = rng.integers(2, size=len(opens), dtype=np.uint8)
            open_LN[height_N[opens], opens] = kind
            codes_NL[opens, place] = BRACKETS[2 * kind]
            height_N += opens_N.astype(np.int64) - closes_N
            left_N -= opens_N
            codes_NL[closes, place] = BRACKETS[2 * open_LN[height_N[closes], closes] + 1]
        # A single other bracket leaves one kind with more opening or more closing ones: it is never balanced.
        wrong = rows_N[rng.random(num_texts) < 0.5]
        places = rng.integers(2 * sizes_N[wrong])
        number = (codes_NL[wrong, places][:, None] == BRACKETS).argmax(1)
        codes_NL[wrong, places] = BRACKETS[(number + rng.integers(1, len(BRACKETS), size=len(wrong))) % len(BRACKETS)]
        answers_N1 = column("1", num_texts)
        answers_N1[wrong] = ord("0")
        return codes_NL, answers_N1

    @staticmethod
    def solve(question: str) -> str:
        while (shorter := question.replace("()", "").replace("[]", "")) != question:
            question = shorter
        return "0" if question else "1"

    def num_questions(self, size: int) -> float:
        """The balanced ones of this size: a Catalan number of shapes, with two kinds for each pair."""
        return float(math.comb(2 * size, size) // (size + 1) * 2**size)


OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "M": max,
    "m": min,
    "s": lambda values: sum(values) % 10,
    "d": lambda values: sorted(values)[len(values) // 2],
}


@LINE_TASKS.register("listops")
class ListOps(LineTask):
    """`[M29[m47]0]>9`: largest (M), smallest (m), median (d) and sum modulo 10 (s) of digits (Nangia and Bowman, 2018).

    The size is about the number of digits. A list of an even length has the upper one of two medians.
    """

    alphabet = "0123456789[]Mmsd"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        codes_NL, values_N = _lists(rng, sizes_N)
        return codes_NL, (ZERO + values_N).astype(np.uint8)[:, None]

    @staticmethod
    def solve(question: str) -> str:
        waiting: list[list[str]] = [[]]
        for character in question:
            if character == "[":
                waiting.append([])
            elif character == "]":
                operator, *digits = waiting.pop()
                waiting[-1].append(str(OPERATORS[operator](list(map(int, digits)))))
            else:
                waiting[-1].append(character)
        return waiting[0][0]

    def num_questions(self, size: int) -> float:
        """Those with one list of this size."""
        return float(len(OPERATORS) * 10**size)


def _lists(rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, NDArray[np.int64]]:
    """Lists with about so many digits, and their values. The lists inside all of them are drawn together."""
    num_lists = len(sizes_N)
    left_N = np.maximum(sizes_N, 1)
    inner_NK = []  # the size of the list at each place; 1 for a digit, 0 after the end
    while left_N.any():
        taken_N = 1 + (rng.random(num_lists) * left_N).astype(np.int64)
        is_list_N = (left_N > 2) & (rng.random(num_lists) < 0.4) & (taken_N > 1) & (taken_N < sizes_N)
        taken_N = np.where(is_list_N, taken_N, 1) * (left_N > 0)
        inner_NK.append(taken_N)
        left_N = left_N - taken_N
    sizes_NK = np.stack(inner_NK, 1)
    values_NK = rng.integers(10, size=sizes_NK.shape)
    widths_NK = (sizes_NK > 0).astype(np.int64)
    places = np.nonzero(sizes_NK > 1)
    inside_ML = np.zeros((0, 0), np.uint8)
    if len(places[0]):
        inside_ML, values_NK[places] = _lists(rng, sizes_NK[places])
        widths_NK[places] = (inside_ML > 0).sum(1)
    starts_NK = 2 + widths_NK.cumsum(1) - widths_NK
    operator_N = rng.integers(len(OPERATORS), size=num_lists)
    ends_N = 2 + widths_NK.sum(1)
    codes_NL = np.zeros((num_lists, int(ends_N.max()) + 1), np.uint8)
    rows_N = np.arange(num_lists)
    codes_NL[:, 0], codes_NL[:, 1] = ord("["), np.frombuffer("".join(OPERATORS).encode(), np.uint8)[operator_N]
    codes_NL[rows_N, ends_N] = ord("]")
    digits = np.nonzero(sizes_NK == 1)
    codes_NL[digits[0], starts_NK[digits]] = ZERO + values_NK[digits]
    row, character = np.nonzero(inside_ML)
    codes_NL[places[0][row], starts_NK[places][row] + character] = inside_ML[row, character]
    return codes_NL, _values(operator_N, values_NK, sizes_NK > 0)


def _values(
    operator_N: NDArray[np.int64], values_NK: NDArray[np.int64], is_item_NK: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """What each operator makes of its items."""
    counts_N = is_item_NK.sum(1)
    sorted_NK = np.sort(np.where(is_item_NK, values_NK, 10), 1)
    rows_N = np.arange(len(counts_N))
    found = {
        "M": sorted_NK[rows_N, counts_N - 1],
        "m": sorted_NK[:, 0],
        "s": (values_NK * is_item_NK).sum(1) % 10,
        "d": sorted_NK[rows_N, counts_N // 2],
    }
    return np.choose(operator_N, [found[name] for name in OPERATORS])
