"""Numbers of any length as columns of digits, so that many are added or multiplied at once.

N numbers  P places, the lowest one first  L characters
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import Codes

Digits = NDArray[np.int32]  # [P, N]: a place is contiguous, as every loop goes over the places

ZERO = ord("0")


def drawn_digits(rng: np.random.Generator, base: int, places_N: NDArray[np.int64]) -> Digits:
    """Numbers that are drawn evenly from all below base^places."""
    longest = int(places_N.max())
    digits_PN = rng.integers(base, size=(longest, len(places_N)), dtype=np.int32)
    digits_PN[np.arange(longest)[:, None] >= places_N] = 0
    return digits_PN


def carried(sums_PN: Digits, base: int) -> Digits:
    """The digits of numbers whose places hold sums, in as many places as they need."""
    carry_N = np.zeros(sums_PN.shape[1], np.int32)
    places = []
    for sum_N in sums_PN:
        carry_N, digit_N = np.divmod(sum_N + carry_N, base)
        places.append(digit_N)
    while carry_N.any():
        carry_N, digit_N = np.divmod(carry_N, base)
        places.append(digit_N)
    return np.stack(places)


def total(first_PN: Digits, second_PN: Digits, base: int) -> Digits:
    """The sums of two numbers each."""
    longest = max(len(first_PN), len(second_PN))
    padded = (np.pad(one, ((0, longest - len(one)), (0, 0))) for one in (first_PN, second_PN))
    return carried(sum(padded, start=np.zeros((longest, first_PN.shape[1]), np.int32)), base)


def product(first_PN: Digits, second_PN: Digits, base: int) -> Digits:
    """The products of two numbers each."""
    sums_PN = np.zeros((len(first_PN) + len(second_PN), first_PN.shape[1]), np.int32)
    for place, digit_N in enumerate(second_PN):
        sums_PN[place : place + len(first_PN)] += first_PN * digit_N
    return carried(sums_PN, base)


def written(digits_PN: Digits, highest_first: bool) -> Codes:
    """The numbers as text, without zeros beyond the highest digit that is not one, and at least one digit, [N, L]."""
    places_P = np.arange(len(digits_PN), dtype=np.int32)
    lengths_N = 1 + np.where(digits_PN > 0, places_P[:, None], 0).max(0)
    codes_PN = (digits_PN + ZERO).astype(np.uint8)
    if highest_first:
        order_PN = np.maximum(lengths_N - 1 - places_P[:, None], 0)
        codes_PN = np.take_along_axis(codes_PN, order_PN, 0)
    codes_PN[places_P[:, None] >= lengths_N] = 0
    return np.ascontiguousarray(codes_PN[: int(lengths_N.max(initial=0))].T)
