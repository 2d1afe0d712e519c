"""Flat storage of samples, and the batches drawn from it.

N samples  B batch  L length
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_eval.datasets.token_data import Batches, TokenData

quick = settings(max_examples=50, deadline=None)
rows_of_tokens = st.lists(st.lists(st.integers(1, 9), max_size=8), min_size=1, max_size=40).filter(any)
batch_sizes = st.integers(1, 12)
order_seeds = st.none() | st.integers(0, 5)


def token_data(rows: list[list[int]]) -> TokenData:
    offsets = np.cumsum([0, *map(len, rows)])
    return TokenData(np.array([token for row in rows for token in row], np.int32), offsets, np.arange(len(rows)))


def random_data(num_samples: int, longest: int, seed: int = 0) -> TokenData:
    rng = np.random.default_rng(seed)
    return token_data([rng.integers(1, 50, rng.integers(1, longest + 1)).tolist() for _ in range(num_samples)])


def as_lists(batches: list[Any]) -> list[Any]:
    return [[part.tolist() for part in batch[:3]] for batch in batches]


@quick
@given(rows_of_tokens)
def test_a_padded_array_is_stored_without_its_padding(rows: list[list[int]]) -> None:
    width = max(map(len, rows))
    ids_NL = np.array([row + [0] * (width - len(row)) for row in rows], np.int64)
    data = TokenData.from_padded(ids_NL, np.arange(len(rows), dtype=np.uint8))
    assert len(data) == len(rows) and data.lengths.tolist() == [len(row) for row in rows]
    assert [data.sample(index) for index in range(len(data))] == rows
    assert data.labels.tolist() == list(range(len(rows)))
    assert (data.tokens.dtype, data.offsets.dtype, data.labels.dtype) == (np.int32, np.int64, np.int64)
    whole = Batches(data, len(rows)).take(np.arange(len(rows)))
    np.testing.assert_array_equal(whole.input_ids.numpy(), ids_NL)


@quick
@given(rows_of_tokens, batch_sizes, order_seeds, st.integers(0, 3))
def test_every_sample_comes_once_per_epoch(
    rows: list[list[int]], batch_size: int, seed: int | None, epoch: int
) -> None:
    batches = Batches(token_data(rows), batch_size, seed=seed)
    order = batches.order(epoch)
    assert sorted(np.concatenate(order).tolist()) == list(range(len(rows)))
    assert len(order) == len(batches)
    sizes = sorted(len(part) for part in order)
    assert sizes[1:] == [batch_size] * (len(order) - 1) and 1 <= sizes[0] <= batch_size


@quick
@given(rows_of_tokens, batch_sizes, order_seeds)
def test_a_batch_is_as_long_as_its_longest_sample_and_padded_with_zeros(
    rows: list[list[int]], batch_size: int, seed: int | None
) -> None:
    batches = Batches(token_data(rows), batch_size, seed=seed)
    for numbers, batch in zip(batches.order(1), batches.epoch(1), strict=True):
        samples = [rows[number] for number in numbers]
        longest = max(1, *map(len, samples))
        assert batch.labels.tolist() == numbers.tolist()
        assert batch.input_ids.tolist() == [sample + [0] * (longest - len(sample)) for sample in samples]
        assert batch.attention_mask.tolist() == [[step < len(sample) for step in range(longest)] for sample in samples]
        assert batch.input_ids.dtype == torch.long and batch.attention_mask.dtype == torch.bool


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    data = random_data(100, 9)
    first = Batches(data, 8, seed=3)
    expected = as_lists([first.order(epoch) for epoch in range(3)])
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    again = Batches(data, 8, seed=3)
    assert as_lists([again.order(epoch) for epoch in (2, 1, 0)]) == expected[::-1]
    others = [*expected, *as_lists([Batches(data, 8, seed=4).order(epoch) for epoch in range(3)])]
    assert len({str(order) for order in others}) == 6


@quick
@given(st.integers(1, 60), batch_sizes, order_seeds, st.integers(0, 70))
def test_an_epoch_can_be_continued_at_any_batch(
    num_samples: int, batch_size: int, seed: int | None, start: int
) -> None:
    batches = Batches(random_data(num_samples, 5), batch_size, seed=seed)
    assert as_lists(list(batches.epoch(2, start))) == as_lists(list(batches.epoch(2))[start:])


def lengths_overlap(data: TokenData, order: list[Any]) -> bool:
    """Whether the range of lengths of some batch reaches into that of the next longer one."""
    ranges = sorted((data.lengths[rows].min(), data.lengths[rows].max()) for rows in order)
    return any(longest > next_shortest for (_, longest), (next_shortest, _) in itertools.pairwise(ranges))


def test_batches_share_lengths_and_come_in_random_order() -> None:
    data = random_data(40 * 16, 60)
    order = Batches(data, 16, seed=0).order(0)
    assert not lengths_overlap(data, order)
    shortest = [data.lengths[rows].min() for rows in order]
    assert shortest != sorted(shortest)


def test_a_bucket_is_a_random_part_of_a_large_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batches, "BUCKET", 5)
    data = random_data(20 * 16, 60)
    order = Batches(data, 16, seed=0).order(0)
    assert lengths_overlap(data, order)
    assert np.mean([np.ptp(data.lengths[rows]) for rows in order]) < 20  # of 59 without buckets


def test_the_order_of_evaluation_is_by_length_and_never_changes() -> None:
    data = random_data(50, 9)
    batches = Batches(data, 8)
    rows = np.concatenate(batches.order(0))
    expected = sorted(range(50), key=lambda number: (data.lengths[number], number))
    assert rows.tolist() == expected
    assert as_lists(batches.order(0)) == as_lists(batches.order(7))
    assert as_lists(list(batches)) == as_lists(list(batches.epoch(0)))


def test_a_sample_without_tokens_is_one_masked_position() -> None:
    batch = Batches(token_data([[5], []]), 4).take(np.array([1]))
    assert as_lists([batch]) == [[[[0]], [[False]], [1]]]


@quick
@given(st.integers(1, 60), batch_sizes)
def test_a_curriculum_admits_longer_samples_epoch_by_epoch(num_samples: int, batch_size: int) -> None:
    data = random_data(num_samples, 40)
    batches = Batches(data, batch_size, seed=3, curriculum_epochs=4)
    shortest, longest = int(data.lengths.min()), int(data.lengths.max())
    for epoch in range(6):
        rows = np.concatenate(batches.order(epoch))
        limit = shortest + (longest - shortest) * min(1.0, (epoch + 1) / 4)
        assert len(rows) == num_samples
        assert data.lengths[rows].max() <= limit
        assert set(rows) == set(np.flatnonzero(data.lengths <= limit))  # repeated, and none left out


def test_batches_carry_paths_and_places() -> None:
    data = random_data(9, 5)
    data = dataclasses.replace(data, paths=np.arange(18).reshape(9, 2))
    for batch in Batches(data, 4, seed=0):
        assert batch.paths is not None
        assert batch.rows is not None
        assert batch.paths.tolist() == [[2 * row, 2 * row + 1] for row in batch.rows.tolist()]
        assert batch.labels.tolist() == batch.rows.tolist()
