"""Tables: look up an entry in one of several random tables. A test of how fast a model learns by heart.

A sample is [table, row, column]. Tables are ids 1..num_tables, rows the next `table_size` ids, columns the
`table_size` after those; the label is the entry, 0..table_size - 1. The group of a sample is its table. The entries
come from `task_seed` and are the same in all splits. The splits share inputs on purpose (drawn with replacement): an
entry never shown cannot be known.

Row 0, column 1 of the second of two 2 x 2 tables:

>>> solve([2, 3, 6], contents=[[[0, 1], [1, 1]], [[0, 1], [0, 0]]])
1

N samples  T tables  R rows  C columns
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset, enough_ids, exact_length
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.seeding import derive_seed


@SYNTHETIC_DATASETS.register("tables")
class TablesDataset(SequenceBaseDataset):
    """Recall entries of random tables. `seq_len` is 3, `vocab_size` at least num_tables + 2 * table_size."""

    VERSION = 1

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=3)] | None = None,
        vocab_size: Annotated[int, Field(ge=5)] | None = None,
        num_tables: Annotated[int, Field(ge=1)] = 8,
        table_size: Annotated[int, Field(ge=2)] = 16,
        task_seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        if num_tables < 1 or table_size < 2:
            raise ConfigError(f"tables: num_tables={num_tables}, table_size={table_size}: expected at least 1 and 2")
        reason = f"num_tables={num_tables} with table_size={table_size}"
        super().__init__(
            num_samples,
            exact_length("tables", seq_len, 3, "[table, row, column]"),
            enough_ids("tables", vocab_size, num_tables + 2 * table_size, reason),
        )
        rng = np.random.default_rng(derive_seed(task_seed, "tables"))
        self.contents_TRC = rng.integers(table_size, size=(num_tables, table_size, table_size))

    def _generate_data(self) -> None:
        num_tables, size, _ = self.contents_TRC.shape
        table_N = self.rng.integers(num_tables, size=self.num_samples)
        row_N, column_N = self.rng.integers(size, size=(2, self.num_samples))
        ids_N3 = np.stack([table_N + 1, row_N + num_tables + 1, column_N + num_tables + size + 1], axis=1)
        self.samples = ArraySamples(ids_N3, self.contents_TRC[table_N, row_N, column_N], groups_N=table_N + 1)
        self.labels_list = list(range(size))


def solve(tokens: Sequence[int], contents: Sequence[Sequence[Sequence[int]]]) -> int:
    """The entry that the three tokens name."""
    num_tables, size = len(contents), len(contents[0])
    table, row, column = tokens
    return contents[table - 1][row - num_tables - 1][column - num_tables - size - 1]
