"""Arithmetic modulo 5 with brackets, and equations with one unknown (Deletang et al., 2023)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, codes_of

MODULUS = 5
SIGNS = "+-*"


def expression(rng: np.random.Generator, length: int) -> tuple[str, int]:
    """A bracketed expression of about this many characters, and its value modulo 5.

    Its length is 1, 2 (a negative digit) or at least 5.
    """
    if length < 5:
        digit = int(rng.integers(MODULUS))
        return (str(digit), digit) if length < 2 else (f"-{digit}", -digit % MODULUS)
    left_length = int(rng.integers(1, length - 3))
    left, first = expression(rng, left_length)
    right, second = expression(rng, length - 3 - left_length)
    sign = SIGNS[int(rng.integers(3))]
    value = {"+": first + second, "-": first - second, "*": first * second}[sign]
    return f"({left}{sign}{right})", value % MODULUS


@LINE_TASKS.register("modular_arithmetic_brackets")
class ModularArithmeticBrackets(LineTask):
    """`((1+3)*-2)>2`. Other than in the published set, single digits and negative digits are expressions too."""

    alphabet = "01234+-*()"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        pairs = [expression(rng, size) for size in sizes_N.tolist()]
        return codes_of([text for text, _ in pairs]), codes_of([str(value) for _, value in pairs])

    @staticmethod
    def solve(question: str) -> str:
        return str(evaluated(question, 0)[0] % MODULUS)


def evaluated(text: str, place: int) -> tuple[int, int]:
    """The value of the expression that begins at a place, and the place behind it."""
    if text[place] == "-":
        value, end = evaluated(text, place + 1)
        return -value, end
    if text[place] != "(":
        return int(text[place]), place + 1
    first, place = evaluated(text, place + 1)
    sign = text[place]
    second, place = evaluated(text, place + 1)
    return {"+": first + second, "-": first - second, "*": first * second}[sign], place + 1


@LINE_TASKS.register("solve_equation")
class SolveEquation(LineTask):
    """`((x+3)*2)=4>4`: one digit of an expression is unknown. Only equations with one solution are asked."""

    alphabet = f"{ModularArithmeticBrackets.alphabet}x="

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        questions, answers = [], []
        for size in sizes_N.tolist():
            while True:
                text, value = expression(rng, size)
                places = [place for place, character in enumerate(text) if character.isdigit()]
                place = places[int(rng.integers(len(places)))]
                question = f"{text[:place]}x{text[place + 1 :]}={value}"
                if len(solutions(question)) == 1:
                    break
            questions.append(question)
            answers.append(text[place])
        return codes_of(questions), codes_of(answers)

    @staticmethod
    def solve(question: str) -> str:
        (found,) = solutions(question)
        return found


def solutions(question: str) -> list[str]:
    """The digits that make an equation true."""
    left, right = question.split("=")
    digits = map(str, range(MODULUS))
    return [digit for digit in digits if evaluated(left.replace("x", digit), 0)[0] % MODULUS == int(right)]
