"""Addition, digit by digit: `a + b =` and the sum's digits known so far; the label is the next one.

Digit d is id d + 1, `+` is id base + 1 and `=` is id base + 2. The operands have k = max(1, (seq_len - 2) // 3) digits,
leading zeros included, the most significant one first. The sum has k + 1 digits in the opposite order, the
least significant one first, because this is the order of computation. 0 to k of them are known. With
seq_len = 4 there is no room, so none is known. The longest sample has 3k + 2 tokens.

12 + 39 = 51, with the 1 already known:

>>> solve([2, 3, 11, 4, 10, 12, 2], base=10)
5

N samples  D digits  L length
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset, enough_ids
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS


@SYNTHETIC_DATASETS.register("addition")
class AdditionDataset(SequenceBaseDataset):
    """Predict the next digit of a sum. `base` is 10 if vocab_size allows it, else vocab_size - 2."""

    VERSION = 1

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=4)] = 14,
        vocab_size: Annotated[int, Field(ge=4)] = 12,
        base: Annotated[int, Field(ge=2)] | None = None,
    ) -> None:
        if base is None:
            base = min(10, max(2, vocab_size - 2))
        enough_ids("addition", vocab_size, base + 2, f"base={base} with '+' and '='")
        super().__init__(num_samples, seq_len, vocab_size)
        if base < 2:
            raise ConfigError(f"addition: base={base}: expected at least 2")
        if seq_len < 4:
            raise ConfigError(f"addition: seq_len={seq_len} is too short; 'a + b =' alone takes 4 tokens")
        self.base = base
        self.num_digits = max(1, (seq_len - 2) // 3)
        self.max_known = min(self.num_digits, seq_len - 2 * self.num_digits - 2)

    def input_space(self) -> int:
        return int(self.base ** (2 * self.num_digits) * (self.max_known + 1))

    def _generate_data(self) -> None:
        num, digits, base = self.num_samples, self.num_digits, self.base
        a_ND, b_ND = self.rng.integers(base, size=(2, num, digits), dtype=np.int32)  # least significant digit first
        sum_ND = np.zeros((num, digits + 1), np.int32)
        np.add(a_ND, b_ND, out=sum_ND[:, :digits])
        for place in range(digits):
            carry_N = sum_ND[:, place] >= base
            sum_ND[:, place] -= base * carry_N
            sum_ND[:, place + 1] += carry_N
        known_N = self.rng.integers(self.max_known, size=num, endpoint=True)
        ids_NL = np.empty((num, 2 * digits + 2 + self.max_known), np.int32)
        plus, equals = digits, 2 * digits + 1
        ids_NL[:, :plus] = a_ND[:, ::-1]
        ids_NL[:, plus + 1 : equals] = b_ND[:, ::-1]
        ids_NL[:, equals + 1 :] = sum_ND[:, : self.max_known]
        ids_NL += 1
        ids_NL[:, [plus, equals]] = base + 1, base + 2
        ids_NL[:, equals + 1 :] *= np.arange(self.max_known, dtype=np.int32) < known_N[:, None]
        self.samples = ArraySamples(ids_NL, sum_ND[np.arange(num), known_N])
        self.labels_list = list(range(base))


def solve(tokens: Sequence[int], base: int) -> int:
    """The next digit of the sum, with Python's integers."""
    plus, equals = tokens.index(base + 1), tokens.index(base + 2)
    a, b = (
        sum((token - 1) * base**power for power, token in enumerate(reversed(digits)))
        for digits in (tokens[:plus], tokens[plus + 1 : equals])
    )
    place = len(tokens) - equals - 1
    return int((a + b) // base**place % base)
