"""Arithmetic modulo 5 with brackets, and equations with one unknown (Deletang et al., 2023).

N expressions  L characters  M expressions with brackets  V values of the unknown
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, column, joined

MODULUS = 5
SIGNS = np.frombuffer(b"+-*", np.uint8)
ZERO, UNKNOWN = ord("0"), ord("x")
SHORTEST = 5  # characters of an expression with brackets


def expressions(rng: np.random.Generator, lengths_N: NDArray[np.int64]) -> Codes:
    """Bracketed expressions of about these many characters, [N, L].

    A length is 1, 2 (a negative digit) or at least 5. Both parts of all expressions with brackets are drawn together:
    one call for each level of the nesting.
    """
    digits_N1 = (ZERO + rng.integers(MODULUS, size=(len(lengths_N), 1))).astype(np.uint8)
    minus_N1 = np.where(lengths_N > 1, ord("-"), 0)[:, None].astype(np.uint8)
    single_NL = joined(minus_N1, digits_N1)
    nested_M = np.flatnonzero(lengths_N >= SHORTEST)
    if not len(nested_M):
        return single_NL
    inside_M = lengths_N[nested_M] - 3
    left_M = rng.integers(1, inside_M)
    left_ML, right_ML = np.split(expressions(rng, np.concatenate([left_M, inside_M - left_M])), 2)
    sign_M1 = SIGNS[rng.integers(len(SIGNS), size=(len(nested_M), 1))]
    ends = (column(bracket, len(nested_M)) for bracket in "()")
    whole_ML = joined(next(ends), left_ML, sign_M1, right_ML, next(ends))
    codes_NL = np.zeros((len(lengths_N), whole_ML.shape[1]), np.uint8)
    codes_NL[:, : single_NL.shape[1]] = single_NL
    codes_NL[nested_M] = 0
    codes_NL[nested_M, : whole_ML.shape[1]] = whole_ML
    return codes_NL


def values(codes_NL: Codes, unknown_V: NDArray[np.int64]) -> NDArray[np.int64]:
    """The values modulo 5 of expressions for each value of the unknown, [N, V]."""
    rows_N = np.arange(len(codes_NL))
    depth = int((codes_NL == ord("(")).sum(1).max(initial=0)) + 2
    stack_DNV = np.zeros((depth, len(codes_NL), len(unknown_V)), np.int64)
    signs_DN = np.zeros((depth, len(codes_NL)), np.uint8)
    height_N, num_signs_N = np.zeros(len(codes_NL), np.int64), np.zeros(len(codes_NL), np.int64)
    is_start_N, is_negative_N = np.ones(len(codes_NL), bool), np.zeros(len(codes_NL), bool)
    for code_N in codes_NL.T:
        is_number_N = (code_N >= ZERO) & (code_N < ZERO + MODULUS) | (code_N == UNKNOWN)
        is_sign_N = np.isin(code_N, SIGNS)
        is_minus_N = is_sign_N & is_start_N
        pushes = rows_N[is_number_N]
        number_NV = np.where(code_N[pushes, None] == UNKNOWN, unknown_V, code_N[pushes, None].astype(np.int64) - ZERO)
        stack_DNV[height_N[pushes], pushes] = np.where(is_negative_N[pushes, None], -number_NV, number_NV)
        height_N[pushes] += 1
        binary = rows_N[is_sign_N & ~is_start_N]
        signs_DN[num_signs_N[binary], binary] = code_N[binary]
        num_signs_N[binary] += 1
        closes = rows_N[code_N == ord(")")]
        num_signs_N[closes] -= 1
        height_N[closes] -= 1
        sign_C1 = signs_DN[num_signs_N[closes], closes][:, None]
        first_CV, second_CV = (stack_DNV[height_N[closes] - one, closes] for one in (1, 0))
        added_CV = first_CV + np.where(sign_C1 == ord("-"), -second_CV, second_CV)
        result_CV = np.where(sign_C1 == ord("*"), first_CV * second_CV, added_CV)
        stack_DNV[height_N[closes] - 1, closes] = result_CV % MODULUS
        is_negative_N = is_minus_N
        is_start_N = (code_N == ord("(")) | (is_sign_N & ~is_minus_N)
    return stack_DNV[0] % MODULUS


def _digit(value_N: NDArray[np.int64]) -> Codes:
    """Values as texts of one character."""
    return (ZERO + value_N).astype(np.uint8)[:, None]


@LINE_TASKS.register("modular_arithmetic_brackets")
class ModularArithmeticBrackets(LineTask):
    """`((1+3)*-2)>2`. Other than in the published set, single digits and negative digits are expressions too."""

    alphabet = "01234+-*()"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        codes_NL = expressions(rng, sizes_N)
        return codes_NL, _digit(values(codes_NL, np.zeros(1, np.int64))[:, 0])

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
        questions_NL, answers_N1 = self._candidates(rng, sizes_N)
        while len(again := np.flatnonzero(answers_N1[:, 0] == 0)):
            found_AL, answers_N1[again] = self._candidates(rng, sizes_N[again])
            missing = found_AL.shape[1] - questions_NL.shape[1]
            questions_NL = np.pad(questions_NL, ((0, 0), (0, max(missing, 0))))
            questions_NL[again] = 0
            questions_NL[again, : found_AL.shape[1]] = found_AL
        return questions_NL, answers_N1

    @staticmethod
    def _candidates(rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        """Equations and their answers, 0 for an equation with several solutions."""
        codes_NL, rows_N = expressions(rng, sizes_N), np.arange(len(sizes_N))
        is_digit_NL = (codes_NL >= ZERO) & (codes_NL < ZERO + MODULUS)
        places_N = np.where(is_digit_NL, rng.random(codes_NL.shape), -1.0).argmax(1)
        answers_N1 = codes_NL[rows_N, places_N][:, None].copy()
        codes_NL[rows_N, places_N] = UNKNOWN
        results_NV = values(codes_NL, np.arange(MODULUS))
        result_N1 = results_NV[rows_N, answers_N1[:, 0] - ZERO][:, None]
        answers_N1[(results_NV == result_N1).sum(1) > 1] = 0
        return joined(codes_NL, column("=", len(sizes_N)), _digit(result_N1[:, 0])), answers_N1

    @staticmethod
    def solve(question: str) -> str:
        left, right = question.split("=")
        digits = map(str, range(MODULUS))
        (found,) = (one for one in digits if evaluated(left.replace("x", one), 0)[0] % MODULUS == int(right))
        return found
