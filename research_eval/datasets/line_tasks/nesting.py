"""Nested structure: balanced brackets, and lists with operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, codes_of

PAIRS = {")": "(", "]": "["}


@LINE_TASKS.register("dyck")
class Dyck(LineTask):
    """`([])>1`: are brackets of two kinds balanced? In half of the questions one bracket is replaced by another.

    The size is the number of pairs.
    """

    alphabet = "()[]01"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        questions = []
        for size in sizes_N.tolist():
            text, opened, left = [], "", size
            while left or opened:
                if left and (not opened or rng.random() < 0.5):
                    kind = "(["[int(rng.integers(2))]
                    text.append(kind)
                    opened, left = opened + kind, left - 1
                else:
                    text.append({"(": ")", "[": "]"}[opened[-1]])
                    opened = opened[:-1]
            if rng.random() < 0.5:
                place = int(rng.integers(len(text)))
                text[place] = "()[]".replace(text[place], "")[int(rng.integers(3))]
            questions.append("".join(text))
        return codes_of(questions), codes_of([_balanced(question) for question in questions])

    @staticmethod
    def solve(question: str) -> str:
        while (shorter := question.replace("()", "").replace("[]", "")) != question:
            question = shorter
        return "0" if question else "1"

    def num_questions(self, size: int) -> float:
        """The balanced ones of this size: a Catalan number of shapes, with two kinds for each pair."""
        return float(math.comb(2 * size, size) // (size + 1) * 2**size)


def _balanced(text: str) -> str:
    opened: list[str] = []
    for character in text:
        if character not in PAIRS:
            opened.append(character)
        elif not opened or opened.pop() != PAIRS[character]:
            return "0"
    return "0" if opened else "1"


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
        pairs = [_list(rng, size) for size in sizes_N.tolist()]
        return codes_of([text for text, _ in pairs]), codes_of([str(value) for _, value in pairs])

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


def _list(rng: np.random.Generator, size: int) -> tuple[str, int]:
    """A list with about so many digits, and its value."""
    operator = "Mmsd"[int(rng.integers(4))]
    texts, values, left = [], [], max(size, 1)
    while left:
        taken = int(rng.integers(1, left + 1)) if left > 2 and rng.random() < 0.4 else 0
        if taken > 1 and taken < max(size, 1):
            text, value = _list(rng, taken)
        else:
            taken, value = 1, int(rng.integers(10))
            text = str(value)
        texts.append(text)
        values.append(value)
        left -= taken
    return f"[{operator}{''.join(texts)}]", OPERATORS[operator](values)
