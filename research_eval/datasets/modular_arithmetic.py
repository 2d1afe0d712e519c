"""Modular arithmetic without brackets: numbers below `modulus` joined by +, - and *, which binds more tightly
(Deletang et al., 2023). The number n is id n + 1; then come the ids of +, - and *.

1 + 2 * 4 modulo 5:

>>> solve([2, 6, 3, 8, 5], modulus=5)
4

A prefix is known by (sum of the finished terms, running product, what comes next): after a number 5 * 5 states for
modulus 5, after * as many, and after + or - only the sum counts, 5 states each, one of which is the start.

N samples  L length  S states  T tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from research_eval.datasets.regular import RegularDataset
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.routing.automaton import NONE, Automaton


@SYNTHETIC_DATASETS.register("modular_arithmetic")
class ModularArithmeticDataset(RegularDataset):
    """The value of an expression. Expressions have an odd length; a drawn even length is lowered by one."""

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=1)] = 40,
        min_length: Annotated[int, Field(ge=1)] = 1,
        modulus: Annotated[int, Field(ge=2)] = 5,
    ) -> None:
        super().__init__(num_samples, seq_len, min_length, vocab_size=modulus + 3)
        self.modulus = modulus

    def draw_inputs(self) -> NDArray[np.int64]:
        lengths_N = self.draw_lengths()
        lengths_N -= lengths_N % 2 == 0
        ids_NL = self.draw_tokens(lengths_N, self.modulus)
        operators_NL = self.rng.integers(self.modulus + 1, self.modulus + 3, ids_NL[:, 1::2].shape, endpoint=True)
        ids_NL[:, 1::2] = np.where(ids_NL[:, 1::2] > 0, operators_NL, 0)
        return ids_NL

    def automaton(self) -> Automaton:
        m = self.modulus
        total_MM, product_MM = np.divmod(np.arange(m * m).reshape(m, m), m)
        number_MM = total_MM * m + product_MM  # after a number: finished terms and running product
        times_MM = m * m + number_MM  # after *
        plus_M = 2 * m * m + np.arange(m)
        minus_M = plus_M + m
        transitions_ST = np.full((2 * m * m + 2 * m, m + 3), NONE)
        answers_S = np.full(len(transitions_ST), NONE)
        answers_S[number_MM] = (total_MM + product_MM) % m
        transitions_ST[number_MM, m] = plus_M[answers_S[number_MM]]
        transitions_ST[number_MM, m + 1] = minus_M[answers_S[number_MM]]
        transitions_ST[number_MM, m + 2] = times_MM
        for n in range(m):
            transitions_ST[plus_M, n] = number_MM[np.arange(m), n]
            transitions_ST[minus_M, n] = number_MM[np.arange(m), -n % m]
            transitions_ST[times_MM, n] = number_MM[total_MM, product_MM * n % m]
        names = (*map(str, range(m)), "+", "-", "*")
        return Automaton(int(plus_M[0]), transitions_ST, answers_S, names)


def solve(tokens: Sequence[int], modulus: int) -> int:
    """The value of the expression, computed by Python."""
    signs = {modulus + 1: "+", modulus + 2: "-", modulus + 3: "*"}
    terms: list[int] = []
    for place in range(0, len(tokens), 2):
        number, sign = tokens[place] - 1, signs[tokens[place - 1]] if place else "+"
        if sign == "*":
            terms[-1] *= number
        else:
            terms.append(number if sign == "+" else -number)
    return sum(terms) % modulus
