"""Modular addition: `a + b =` as four tokens (or `a + b + c =`, ...); the label is the sum modulo `modulus`.

The number n is id n + 1, `+` is id modulus + 1 and `=` is id modulus + 2. There are only modulus ** num_terms inputs,
so they are drawn without replacement and no two splits share one.

3 + 4 modulo 5:

>>> solve([4, 6, 5, 7], modulus=5)
2

N samples  T terms  L length
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset, enough_ids, exact_length
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS


@SYNTHETIC_DATASETS.register("modular_addition")
class ModularAdditionDataset(SequenceBaseDataset):
    """Add numbers modulo `modulus`. `seq_len` is 2 * num_terms, `vocab_size` at least modulus + 2."""

    VERSION = 1

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=4)] | None = None,
        vocab_size: Annotated[int, Field(ge=4)] | None = None,
        modulus: Annotated[int, Field(ge=2)] = 113,
        num_terms: Annotated[int, Field(ge=2)] = 2,
    ) -> None:
        if modulus < 2 or num_terms < 2:
            raise ConfigError(f"modular_addition: modulus={modulus}, num_terms={num_terms}: expected at least 2 each")
        super().__init__(
            num_samples,
            exact_length("modular_addition", seq_len, 2 * num_terms, f"num_terms={num_terms}"),
            enough_ids("modular_addition", vocab_size, modulus + 2, f"modulus={modulus} with '+' and '='"),
        )
        self.modulus = modulus
        self.num_terms = num_terms
        if num_samples > self.input_space():
            raise ConfigError(
                f"modular_addition: num_samples={num_samples}, but modulus={modulus} with num_terms={num_terms} has "
                f"only {self.input_space()} different inputs; ask for fewer, or raise modulus or num_terms"
            )

    def input_space(self) -> int:
        return int(self.modulus**self.num_terms)

    def _generate_data(self) -> None:
        terms_NT = self.rng.integers(self.modulus, size=(self.num_samples, self.num_terms))
        ids_NL = np.full((self.num_samples, self.seq_len), self.modulus + 1)
        ids_NL[:, ::2] = terms_NT + 1
        ids_NL[:, -1] = self.modulus + 2
        self.samples = ArraySamples(ids_NL, terms_NT.sum(1) % self.modulus)
        self.labels_list = list(range(self.modulus))


def solve(tokens: Sequence[int], modulus: int) -> int:
    """Count on, one step at a time."""
    result = 0
    for token in tokens:
        if token <= modulus:
            for _ in range(token - 1):
                result = 0 if result == modulus - 1 else result + 1
    return result
