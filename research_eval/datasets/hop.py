"""Hop: follow a mapping, given in context, for 1..max_hops steps. A test of depth.

A mapping sends each of n symbols to a random symbol. A sample has one token per symbol, shuffled, which stands for
(symbol, image), and at its end the query token, which stands for (start, number of hops). Ids, symbols from 0:

    (symbol, image)  1 + symbol * n + image                     n * n ids
    (start, hops)    1 + n * n + start * max_hops + hops - 1    n * max_hops ids

The label is the symbol reached. Two symbols, 0 -> 1 and 1 -> 1; two hops from 0:

>>> solve([4, 2, 6], num_symbols=2, max_hops=2)
1

N samples  S symbols
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset, enough_ids, exact_length
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS


@SYNTHETIC_DATASETS.register("hop")
class HopDataset(SequenceBaseDataset):
    """Follow a mapping. `seq_len` is num_symbols + 1, `vocab_size` at least num_symbols * (num_symbols + max_hops)."""

    VERSION = 1

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=3)] | None = None,
        vocab_size: Annotated[int, Field(ge=6)] | None = None,
        num_symbols: Annotated[int, Field(ge=2)] = 6,
        max_hops: Annotated[int, Field(ge=1)] = 3,
    ) -> None:
        if num_symbols < 2 or max_hops < 1:
            raise ConfigError(f"hop: num_symbols={num_symbols}, max_hops={max_hops}: expected at least 2 and 1")
        reason = f"num_symbols={num_symbols} with max_hops={max_hops}"
        super().__init__(
            num_samples,
            exact_length("hop", seq_len, num_symbols + 1, f"num_symbols={num_symbols}"),
            enough_ids("hop", vocab_size, num_symbols * (num_symbols + max_hops), reason),
        )
        self.num_symbols = num_symbols
        self.max_hops = max_hops

    def input_space(self) -> int:
        mappings, orders = self.num_symbols**self.num_symbols, math.factorial(self.num_symbols)
        return int(mappings * orders * self.num_symbols * self.max_hops)

    def _generate_data(self) -> None:
        num, symbols = self.num_samples, self.num_symbols
        image_NS = self.rng.integers(symbols, size=(num, symbols))
        start_N = self.rng.integers(symbols, size=num)
        hops_N = self.rng.integers(1, self.max_hops, size=num, endpoint=True)
        pairs_NS = self.rng.permuted(1 + np.arange(symbols) * symbols + image_NS, axis=1)
        query_N = 1 + symbols**2 + start_N * self.max_hops + hops_N - 1
        reached_N = start_N
        for hop in range(self.max_hops):
            reached_N = np.where(hop < hops_N, image_NS[np.arange(num), reached_N], reached_N)
        self.samples = ArraySamples(np.concatenate([pairs_NS, query_N[:, None]], axis=1), reached_N, groups_N=hops_N)
        self.labels_list = list(range(symbols))


def solve(tokens: Sequence[int], num_symbols: int, max_hops: int) -> int:
    """Read the mapping from the pair tokens and walk it."""
    image = dict(divmod(token - 1, num_symbols) for token in tokens[:-1])
    symbol, more_hops = divmod(tokens[-1] - 1 - num_symbols**2, max_hops)
    for _ in range(more_hops + 1):
        symbol = image[symbol]
    return symbol
