"""The synthetic tasks against their slow solutions, the splits, and datasets as users write them."""

from __future__ import annotations

import doctest
import importlib
import json
import random
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research_eval.datasets import addition, copying, hop, modular_addition, parity, synthetic, tables
from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset
from research_eval.datasets.synthetic import synthetic_splits
from research_eval.datasets.token_data import Batches, DataSplits, TokenData
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS

TASKS = ["parity", "addition", "copying", "modular_addition", "tables", "hop"]
SPLITS = ["train", "validation", "test"]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def build(name: str, **params: Any) -> Any:
    return SYNTHETIC_DATASETS[name](**params)


def answers(dataset: Any, data: TokenData) -> list[int]:
    """What `solve` says about each sample, with the ids that occur in `data` only."""
    solve = {
        "ParityDataset": lambda ids: parity.solve(ids, dataset.num_classes),
        "AdditionDataset": lambda ids: addition.solve(ids, dataset.base),
        "CopyingDataset": lambda ids: copying.solve(ids, dataset.pattern_P.tolist()),
        "ModularAdditionDataset": lambda ids: modular_addition.solve(ids, dataset.modulus),
        "TablesDataset": lambda ids: tables.solve(ids, dataset.contents_TRC.tolist()),
        "HopDataset": lambda ids: hop.solve(ids, dataset.num_symbols, dataset.max_hops),
    }[type(dataset).__name__]
    return [solve(data.sample(index)) for index in range(len(data))]


@pytest.mark.parametrize("name", TASKS)
def test_ten_thousand_samples_agree_with_the_slow_solution(name: str) -> None:
    data = synthetic_splits(name, {"num_samples": 12_500}, 0).train
    assert len(data) == 10_000
    assert data.labels.tolist() == answers(build(name), data)


def inputs(data: TokenData) -> list[tuple[int, ...]]:
    return [tuple(data.sample(index)) for index in range(len(data))]


def sequences(splits: DataSplits) -> list[list[tuple[int, ...]]]:
    assert splits.test is not None
    return [inputs(splits.train), inputs(splits.validation), inputs(splits.test)]


@st.composite
def tasks(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A task and parameters that work."""
    name = draw(st.sampled_from(TASKS))
    params: dict[str, Any] = {"num_samples": draw(st.integers(2, 60))}
    if name == "parity":
        params |= {"seq_len": draw(st.integers(2, 20)), "vocab_size": draw(st.integers(2, 9))}
        params["num_classes"] = draw(st.integers(2, params["seq_len"] + 1))
    elif name == "addition":
        params |= {"seq_len": draw(st.integers(4, 24)), "vocab_size": draw(st.integers(4, 14))}
        params["base"] = draw(st.none() | st.integers(2, params["vocab_size"] - 2))
    elif name == "copying":
        params |= {"seq_len": draw(st.integers(2, 20)), "vocab_size": draw(st.integers(2, 9))}
        params["task_seed"] = draw(st.integers(0, 5))
    elif name == "modular_addition":
        params |= {"modulus": draw(st.integers(8, 40)), "num_terms": draw(st.integers(2, 4))}
    elif name == "tables":
        params |= {"num_tables": draw(st.integers(1, 9)), "table_size": draw(st.integers(2, 9))}
    else:
        params |= {"num_symbols": draw(st.integers(2, 7)), "max_hops": draw(st.integers(1, 5))}
    return name, params


@pytest.mark.parametrize("name", TASKS)
def test_the_documented_sample_is_right(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"research_eval.datasets.{name}")) == (0, doctest_count(name))


def doctest_count(name: str) -> int:
    return 2 if name == "copying" else 1


@quick
@given(tasks(), st.integers(0, 2**32 - 1))
def test_generators_agree_with_the_slow_solution(task: tuple[str, dict[str, Any]], seed: int) -> None:
    name, params = task
    dataset = build(name, **params)
    splits = synthetic_splits(name, params, seed)
    num_validation = max(1, params["num_samples"] // 5)
    assert splits.test is not None
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [
        params["num_samples"] - num_validation,
        num_validation,
        num_validation,
    ]
    assert splits.vocab_size == dataset.vocab_size + 1
    assert splits.num_classes == len(splits.label_names) == len(dataset.labels_list)
    for data in (splits.train, splits.validation, splits.test):
        assert data.labels.tolist() == answers(dataset, data)
        assert data.tokens.min() >= 1
        assert data.tokens.max() < splits.vocab_size
        assert 1 <= data.lengths.min() <= data.lengths.max() <= splits.max_length == dataset.seq_len


@quick
@given(tasks(), st.integers(0, 1000))
def test_small_input_spaces_are_shared_out_without_overlap(task: tuple[str, dict[str, Any]], seed: int) -> None:
    name, params = task
    splits = synthetic_splits(name, params, seed)
    train, validation, test = (set(part) for part in sequences(splits))
    fingerprint = splits.fingerprint
    assert fingerprint["distinct_inputs"] == {"train": len(train), "validation": len(validation), "test": len(test)}
    assert fingerprint["train_validation_duplicates"] == sum(one in train for one in inputs(splits.validation))
    space = build(name, **params).input_space()
    total = params["num_samples"] + max(1, params["num_samples"] // 5)
    if name == "tables":
        assert space is None
        assert fingerprint["sampling"] == "independent draws"
    elif space <= synthetic.SMALL_SPACE * total:
        assert not train & validation
        assert not (train | validation) & test
        if fingerprint["sampling"] == "without replacement":
            assert len(train) + len(validation) + len(test) == total
        else:
            assert len(train) + len(validation) + len(test) < total
    else:
        assert fingerprint["sampling"] == "independent draws"


def enumerated_inputs(name: str, params: dict[str, Any]) -> set[tuple[int, ...]]:
    """Every input that many draws find."""
    dataset = build(name, num_samples=40_000 if name != "modular_addition" else 2, **params)
    dataset.generate(0, 40_000)
    return set(inputs(dataset.to_token_data()))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("parity", {"seq_len": 4, "vocab_size": 3}),
        ("addition", {"seq_len": 5, "vocab_size": 5}),
        ("addition", {"seq_len": 4, "vocab_size": 6}),
        ("addition", {"seq_len": 8, "vocab_size": 4}),
        ("copying", {"seq_len": 5, "vocab_size": 2}),
        ("modular_addition", {"modulus": 7}),
        ("modular_addition", {"modulus": 4, "num_terms": 3}),
        ("hop", {"num_symbols": 3, "max_hops": 2}),
    ],
)
def test_input_space_counts_the_inputs(name: str, params: dict[str, Any]) -> None:
    found = enumerated_inputs(name, params)
    assert len(found) == build(name, num_samples=2, **params).input_space()
    # All of them are found and dealt out, each to one split, when there are just enough samples for that.
    num_samples = next(n for n in range(2, len(found) + 1) if n + max(1, n // 5) >= len(found))
    parts = [set(part) for part in sequences(synthetic_splits(name, {**params, "num_samples": num_samples}, seed=1))]
    assert set.union(*parts) == found
    assert sum(map(len, parts)) == len(found)


def test_samples_repeat_within_a_split_where_inputs_run_out() -> None:
    splits = synthetic_splits("parity", {"num_samples": 2000, "seq_len": 6, "vocab_size": 3}, seed=0)
    train, validation, test = (set(part) for part in sequences(splits))
    assert len(splits.train) == 1600
    assert len(train | validation | test) == 3**6 == len(train) + len(validation) + len(test)
    assert len(validation) == pytest.approx(3**6 / 6, abs=1)


def test_repeats_keep_the_distribution_of_the_task() -> None:
    """One of ten tokens is about half of all. Where each input counted the same it would be a tenth."""
    splits = synthetic_splits("parity", {"num_samples": 50_000, "seq_len": 3, "vocab_size": 10}, seed=0)
    assert splits.fingerprint["sampling"] == "distinct inputs, repeated within a split"
    assert 0.35 < np.mean(splits.train.tokens == 1) < 0.6  # one split only gets the likeliest input


def test_likely_inputs_are_shared_out_too() -> None:
    """Without replacement likely inputs are drawn early; they must not all land in train."""
    splits = synthetic_splits("parity", {"num_samples": 3000, "seq_len": 6, "vocab_size": 4}, seed=0)
    assert splits.fingerprint["sampling"] == "without replacement"
    train, validation = (np.mean(data.tokens == 1) for data in (splits.train, splits.validation))
    assert train == pytest.approx(validation, abs=5 * np.sqrt(0.25 / 3600))


@pytest.mark.parametrize(
    ("name", "params"),
    [("parity", {"num_samples": 10, "seq_len": 1}), ("copying", {"num_samples": 10, "seq_len": 1, "vocab_size": 2})],
)
def test_a_split_without_an_input_is_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="only 2 different inputs"):
        synthetic_splits(name, params, seed=0)


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides_the_data(name: str) -> None:
    first, again, other = (synthetic_splits(name, {"num_samples": 500}, seed) for seed in (3, 3, 4))
    assert first.fingerprint == again.fingerprint
    assert sequences(first) == sequences(again)
    for split in SPLITS:
        assert first.fingerprint["sha256"][split] != other.fingerprint["sha256"][split]
    assert len(set(first.fingerprint["sha256"].values())) == 3
    assert json.loads(json.dumps(first.fingerprint)) == first.fingerprint
    assert first.fingerprint["version"] == SYNTHETIC_DATASETS[name].VERSION  # type: ignore[attr-defined]


def test_the_hash_covers_labels_and_boundaries() -> None:
    data = TokenData(np.array([1, 2, 3], np.int32), np.array([0, 1, 3]), np.array([0, 1]))
    relabelled = TokenData(data.tokens, data.offsets, data.labels[::-1])
    recut = TokenData(data.tokens, np.array([0, 2, 3]), data.labels)
    assert len({one.sha256() for one in (data, relabelled, recut)}) == 3


@pytest.mark.parametrize("name", ["tables", "copying"])
def test_the_task_stays_while_the_samples_change(name: str) -> None:
    """What `task_seed` fixes is the same in every split and for every data seed: one answer key fits all."""
    dataset, other = build(name), build(name, task_seed=1)
    for seed in (0, 1):
        splits = synthetic_splits(name, {"num_samples": 200}, seed)
        for data in (splits.train, splits.validation, splits.test):
            assert data is not None
            assert answers(dataset, data) == data.labels.tolist() != answers(other, data)


def frequencies(name: str, **params: Any) -> np.ndarray[Any, Any]:
    labels = synthetic_splits(name, {"num_samples": 20_000, **params}, seed=0).train.labels
    return np.bincount(labels) / len(labels)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("parity", {"vocab_size": 2}),
        ("parity", {"vocab_size": 7}),
        ("copying", {}),
        ("copying", {"vocab_size": 2, "seq_len": 24}),
        ("modular_addition", {"modulus": 16, "num_terms": 4}),
        ("hop", {}),
    ],
)
def test_classes_are_balanced(name: str, params: dict[str, Any]) -> None:
    shares = frequencies(name, **params)
    spread = 5 * np.sqrt(1 / len(shares) / 16_000)  # five standard errors
    assert np.abs(shares - 1 / len(shares)).max() < spread


def test_parity_tokens_are_half_ones_and_the_rest_even() -> None:
    dataset = parity.ParityDataset(num_samples=20_000, seq_len=8, vocab_size=5)
    shares = np.bincount(dataset.to_token_data().tokens, minlength=6) / 160_000
    assert shares == pytest.approx([0, 0.5, *[0.125] * 4], abs=0.008)


def test_addition_shows_every_number_of_known_digits() -> None:
    dataset = addition.AdditionDataset(num_samples=5000, seq_len=14)
    data = dataset.to_token_data()
    assert dataset.num_digits == 4
    assert set(data.lengths.tolist()) == {10, 11, 12, 13, 14}  # a + b = and 0..4 digits
    last = data.lengths == 14
    assert set(data.labels[last].tolist()) == {0, 1}  # the carry out
    assert np.bincount(data.labels[~last]).min() > 300


def test_hop_reads_the_query_last_and_reaches_every_depth() -> None:
    data = hop.HopDataset(num_samples=2000).to_token_data()
    rows = np.array(inputs(data))
    assert (rows[:, :-1] <= 36).all()
    assert set(rows[:, -1]) == set(range(37, 37 + 18))
    assert len({tuple((row[:-1] - 1) // 6) for row in rows}) > 500  # pairs come in every order


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("parity", {"vocab_size": 1}, "vocab_size=1"),
        ("parity", {"seq_len": 3, "num_classes": 5}, "num_classes=5: choose 2 to seq_len"),
        ("addition", {"base": 10, "vocab_size": 11}, "vocab_size=11 is too small.*needs at least 12"),
        ("addition", {"vocab_size": 3}, "needs at least 4"),
        ("addition", {"base": 1}, "base=1"),
        ("addition", {"seq_len": 3}, "seq_len=3 is too short"),
        ("copying", {"pattern_length": 17}, "pattern_length=17: choose 1 to"),
        ("copying", {"pattern_length": 3, "vocab_size": 2}, "make it longer"),
        ("modular_addition", {"seq_len": 16}, "seq_len=16 does not fit.*makes it 4. Leave seq_len out"),
        ("modular_addition", {"modulus": 10, "vocab_size": 11, "num_samples": 50}, "vocab_size=11 .* at least 12"),
        ("modular_addition", {"modulus": 10, "num_samples": 101}, "only 100 different inputs"),
        ("tables", {"seq_len": 4}, "makes it 3"),
        ("tables", {"vocab_size": 39}, "at least 40"),
        ("hop", {"seq_len": 8}, "makes it 7"),
        ("hop", {"vocab_size": 53}, "at least 54"),
        ("hop", {"num_symbols": 1}, "num_symbols=1"),
        ("parity", {"num_samples": 0}, "num_samples=0: expected an integer"),
        ("parity", {"num_samples": 1}, "num_samples=1: expected at least 2"),
        ("parity", {"seq_length": 8}, "dataset_params of parity: .*'seq_length'"),
        ("parlty", {}, "Did you mean 'parity'"),
    ],
)
def test_what_cannot_work_is_refused(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        synthetic_splits(name, params, seed=0)


def test_derived_sizes_may_be_given_and_ids_may_be_spare() -> None:
    splits = synthetic_splits("hop", {"num_samples": 50, "seq_len": 7, "vocab_size": 60}, seed=0)
    assert (splits.vocab_size, splits.max_length) == (61, 7)


# ---------------------------------------------------------------------------------------- datasets as users write them


class Lazy(SequenceBaseDataset):
    """As the guide shows it: a list of dicts, attributes after the base constructor, no seed."""

    def __init__(self, num_samples: int, seq_len: int, vocab_size: int, step: int = 1) -> None:
        super().__init__(num_samples, seq_len, vocab_size)
        self.step = step

    def _generate_data(self) -> None:
        self.samples = []
        for _ in range(self.num_samples):
            ids = self.rng.integers(1, self.vocab_size + 1, self.seq_len).tolist()
            self.samples.append({"input_ids": ids, "label": sum(ids) * self.step % 2})
        self.labels_list = [0, 1]


class Eager(SequenceBaseDataset):
    """Generates in the constructor, appends to what the base class prepared, sets attributes first."""

    def __init__(self, num_samples: int, seq_len: int, vocab_size: int, seed: int) -> None:
        self.names = ["even", "odd"]
        super().__init__(num_samples, seq_len, vocab_size, seed)
        self._generate_data()

    def _generate_data(self) -> None:
        for _ in range(self.num_samples):
            ids = torch.from_numpy(self.rng.integers(1, self.vocab_size + 1, self.rng.integers(6, self.seq_len + 1)))
            label = self.names[int(ids.sum()) % 2]
            self.samples.append({"input_ids": ids, "label": label})
            self.labels_list.append(label)  # one per sample


class GlobalRandom(Lazy):
    def _generate_data(self) -> None:
        self.samples = [
            {"input_ids": [random.randint(1, self.vocab_size) for _ in range(self.seq_len)], "label": 0}
            for _ in range(self.num_samples)
        ]
        self.labels_list = range(2)


class GlobalNumpyAndTorch(Lazy):
    def _generate_data(self) -> None:
        shape = (self.num_samples, self.seq_len)
        ids = np.random.randint(1, self.vocab_size + 1, shape)
        self.samples = ArraySamples(ids, torch.randint(2, (self.num_samples,)))
        self.labels_list = torch.arange(2)


class OwnGenerator(Lazy):
    def __init__(self, num_samples: int, seq_len: int, vocab_size: int) -> None:
        super().__init__(num_samples, seq_len, vocab_size)
        self.rng = random.Random(7)  # type: ignore[assignment]

    def _generate_data(self) -> None:
        rows = [[self.rng.randint(1, self.vocab_size) for _ in range(self.seq_len)] for _ in range(self.num_samples)]  # type: ignore[attr-defined]
        self.samples = [{"input_ids": tuple(row), "label": np.int64(row[0] % 2)} for row in rows]
        self.labels_list = np.array([0, 1])


class OwnStream(Lazy):
    """A generator that the base class knows nothing of; the constructor of the splits is called once."""

    def __init__(self, num_samples: int, seq_len: int, vocab_size: int) -> None:
        super().__init__(num_samples, seq_len, vocab_size)
        self.stream = random.Random(7)

    def _generate_data(self) -> None:
        rows = [[self.stream.randint(1, self.vocab_size) for _ in range(self.seq_len)] for _ in range(self.num_samples)]
        self.samples = [{"input_ids": row, "label": row[0] % 2} for row in rows]
        self.labels_list = [0, 1]


class ReseedsNumpy(Lazy):
    def _generate_data(self) -> None:
        np.random.seed(self.seed)
        ids = np.random.randint(1, self.vocab_size + 1, (self.num_samples, self.seq_len))
        self.samples = ArraySamples(ids, ids[:, 0] % 2)
        self.labels_list = [0, 1]


STYLES = [Lazy, Eager, GlobalRandom, GlobalNumpyAndTorch, OwnGenerator, OwnStream, ReseedsNumpy]
SIZES = {"num_samples": 100, "seq_len": 12, "vocab_size": 9}


@pytest.mark.parametrize("style", STYLES)
def test_datasets_of_users_split_and_repeat(style: type[SequenceBaseDataset], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYNTHETIC_DATASETS, "mine", style)
    random.seed(1)
    first = synthetic_splits("mine", SIZES, seed=5)
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    again, other = synthetic_splits("mine", SIZES, seed=5), synthetic_splits("mine", SIZES, seed=6)
    assert sequences(first) == sequences(again)
    assert first.fingerprint == again.fingerprint
    assert style is OwnStream or sequences(first) != sequences(other)
    assert [len(part) for part in sequences(first)] == [80, 20, 20]
    assert first.fingerprint["train_validation_duplicates"] == 0
    assert (first.num_classes, first.vocab_size) == (2, 10)
    assert first.label_names == (["even", "odd"] if style is Eager else ["0", "1"])
    assert sum(len(batch.labels) for batch in Batches(first.validation, 8)) == 20


@pytest.mark.parametrize("style", STYLES)
def test_datasets_of_users_work_by_themselves(style: Any) -> None:
    dataset = style(**SIZES, **({"seed": 3} if style is Eager else {}))
    assert len(dataset.samples) == len(dataset) == len(dataset.to_token_data()) == 100
    item = dataset[99]
    assert item["input_ids"].dtype == torch.int64
    assert item["label"] in (0, 1)
    data = dataset.to_token_data()
    for index in (0, 99):
        assert [int(one) for one in dataset.samples[index]["input_ids"]] == data.sample(index)
        assert dataset[index]["input_ids"].tolist()[: len(data.sample(index))] == data.sample(index)
        assert dataset[index]["label"] == data.labels[index]
    assert len(list(dataset)) == 100
    loader = torch.utils.data.DataLoader(dataset, batch_size=32)
    assert [len(batch["label"]) for batch in loader] == [32, 32, 32, 4]


def test_nothing_is_generated_before_it_is_needed() -> None:
    class Fails(Lazy):
        def _generate_data(self) -> None:
            raise RuntimeError("now")

    dataset = Fails(**SIZES)
    for use in (len, lambda it: it[0], lambda it: it.samples, lambda it: it.labels_list, lambda it: it.to_token_data()):
        with pytest.raises(RuntimeError, match="now"):
            use(dataset)


def test_a_builtin_task_reads_like_a_list_of_samples() -> None:
    dataset = parity.ParityDataset(num_samples=10, seq_len=5)
    sample = dataset.samples[3]
    assert len(sample["input_ids"]) == 5
    assert sample["label"] == parity.solve(sample["input_ids"].tolist()) == dataset[3]["label"]
    assert len(dataset.samples[2:6]) == 4
    assert dataset.samples[2:6][1]["input_ids"].tolist() == sample["input_ids"].tolist()


def test_global_generators_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYNTHETIC_DATASETS, "mine", GlobalNumpyAndTorch)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = random.random(), np.random.random(), torch.rand(1).item()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    synthetic_splits("mine", SIZES, seed=5)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected


def test_what_the_constructor_draws_is_shared_by_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keyed(Lazy):
        def __init__(self, num_samples: int, seq_len: int, vocab_size: int) -> None:
            super().__init__(num_samples, seq_len, vocab_size)
            self.key = random.randint(1, vocab_size)

        def _generate_data(self) -> None:
            ids = self.rng.integers(1, self.vocab_size + 1, (self.num_samples, self.seq_len))
            self.samples = ArraySamples(np.insert(ids, 0, self.key, axis=1), ids[:, 0] % 2)
            self.labels_list = [0, 1]

    monkeypatch.setitem(SYNTHETIC_DATASETS, "mine", Keyed)
    splits = [synthetic_splits("mine", SIZES, seed) for seed in range(6)]
    keys = [{sample[0] for part in sequences(one) for sample in part} for one in splits]
    assert all(len(key) == 1 for key in keys)
    assert len(set.union(*keys)) > 1
    random.seed(99)
    assert [synthetic_splits("mine", SIZES, seed).fingerprint for seed in range(6)] == [
        one.fingerprint for one in splits
    ]
    assert splits[0].max_length == 13  # longer than seq_len, and so said


def test_a_count_of_its_own_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sorted(Lazy):
        def _generate_data(self) -> None:
            ids = self.rng.integers(1, self.vocab_size + 1, (1000, self.seq_len))
            self.samples = ArraySamples(ids, np.arange(1000) // 500)
            self.labels_list = [0, 1]

    monkeypatch.setitem(SYNTHETIC_DATASETS, "mine", Sorted)
    splits = synthetic_splits("mine", {**SIZES, "num_samples": 500}, seed=0)
    assert len(splits.validation) == 100
    assert 30 < splits.validation.labels.sum() < 70


def test_the_same_data_in_two_splits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(Lazy):
        def _generate_data(self) -> None:
            ids = np.random.default_rng(42).integers(1, 10, (self.num_samples, self.seq_len))
            self.samples = ArraySamples(ids, ids[:, 0] % 2)
            self.labels_list = [0, 1]

    monkeypatch.setitem(SYNTHETIC_DATASETS, "mine", Stuck)
    with pytest.raises(ConfigError, match=r"mine: validation repeats the training samples.*Stuck.*Draw from self.rng"):
        synthetic_splits("mine", SIZES, seed=0)


def test_classes_are_numbered_alike_in_all_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rare(Lazy):
        def _generate_data(self) -> None:
            labels = ["b", "c"] * (self.num_samples // 2)
            if self.num_samples > 50:
                labels[0] = "a"  # in train only
            ids = self.rng.integers(1, 10, (self.num_samples, self.seq_len))
            self.samples = [{"input_ids": row, "label": label} for row, label in zip(ids, labels, strict=True)]
            self.labels_list = labels

    monkeypatch.setitem(SYNTHETIC_DATASETS, "mine", Rare)
    splits = synthetic_splits("mine", SIZES, seed=0)
    assert splits.label_names == ["a", "b", "c"]
    assert Counter(splits.train.labels.tolist()) == {0: 1, 1: 39, 2: 40}
    assert Counter(splits.validation.labels.tolist()) == {1: 10, 2: 10}


def test_a_user_may_declare_the_input_space(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(Lazy):
        def input_space(self) -> int:
            return 9**2

        def _generate_data(self) -> None:  # one to three tokens shown, of which the third never differs
            for _ in range(self.num_samples):
                ids = self.rng.integers(1, 10, 2).tolist()
                self.samples.append({"input_ids": [*ids, 1], "label": ids[0] % 2})
            self.labels_list = [1, 0]

    monkeypatch.setitem(SYNTHETIC_DATASETS, "mine", Small)
    splits = synthetic_splits("mine", {"num_samples": 68, "seq_len": 3, "vocab_size": 9}, seed=0)
    parts = sequences(splits)
    assert len(set(parts[0] + parts[1] + parts[2])) == 81
    for data in (splits.train, splits.validation):
        assert data.labels.tolist() == [ids[0] % 2 for ids in inputs(data)]


def test_duplicates_are_found_across_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ragged(Lazy):
        def _generate_data(self) -> None:
            self.samples.append({"input_ids": self.rng.integers(1, 10, 10 + self.num_samples % 7), "label": 0})
            for number in range(1, self.num_samples):
                self.samples.append({"input_ids": [1 + number % 9, 0, 0], "label": 0})
            self.labels_list = [0]

    monkeypatch.setitem(SYNTHETIC_DATASETS, "mine", Ragged)
    fingerprint = synthetic_splits("mine", {**SIZES, "seq_len": 17}, seed=0).fingerprint
    assert fingerprint["train_validation_duplicates"] == 19
    assert fingerprint["train_validation_duplicate_share"] == 19 / 20


GOOD = {"input_ids": [1, 2, 3], "label": 0}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"input_ids": [1, 0, 2], "label": 0}, "id 0 before its end"),
        ({"input_ids": [0, 1, 2], "label": 0}, "id 0 before its end"),
        ({"input_ids": [1, -2, 3], "label": 0}, "negative id"),
        ({"input_ids": [1, 10, 3], "label": 0}, "above vocab_size=9"),
        ({"input_ids": [2**64 - 1], "label": 0}, "above vocab_size=9"),
        ({"input_ids": [1, 2**70], "label": 0}, "flat sequence of integers"),
        ({"input_ids": [1, 2.5], "label": 0}, "flat sequence of integers"),
        ({"input_ids": [True, False], "label": 0}, "flat sequence of integers"),
        ({"input_ids": "abc", "label": 0}, "flat sequence of integers"),
        ({"input_ids": [[1, 2]], "label": 0}, "flat sequence of integers"),
        ({"input_ids": [[1, 2], [3]], "label": 0}, "no flat sequence"),
        ({"input_ids": [], "label": 0}, "has no tokens"),
        ({"input_ids": [0, 0], "label": 0}, "has no tokens"),
        ({"input_ids": [1], "label": 2}, r"label 2 is not in labels_list \[0, 1\]"),
        ({"input_ids": [1], "label": None}, "label None is not in"),
        ({"input_ids": [1], "label": [0]}, r"label \[0\] is not in"),
        ({"input_ids": [1]}, "keys 'input_ids' and 'label'"),
        ({"ids": [1], "label": 0}, "keys 'input_ids' and 'label'"),
        (([1], 0), "expected a dict"),
    ],
)
def test_a_bad_sample_is_named(bad: Any, message: str) -> None:
    class Mine(Lazy):
        def _generate_data(self) -> None:
            self.samples = [GOOD, GOOD, bad, GOOD, bad]
            self.labels_list = [0, 1]

    with pytest.raises(ConfigError, match="^Mine: sample 2: .*" + message):
        Mine(5, 3, 9).to_token_data()


@pytest.mark.parametrize(
    ("samples", "labels", "message"),
    [
        ([], [0, 1], "gave no samples"),
        ([GOOD], [], "labels_list is empty"),
        ([GOOD], [0, "one"], "labels_list: .*one type"),
        ([GOOD], [[0], [1]], "labels_list: .*one type"),
        (ArraySamples([1, 2, 3], [0, 0, 0]), [0], r"ids \[N, L\]"),
        (ArraySamples([[1.0]], [0]), [0], "integer ids"),
        (ArraySamples([[1], [2]], [0]), [0], r"labels \[N\]"),
        (ArraySamples([[1], [12]], [0, 0]), [0], "sample 1: has an id above"),
        (ArraySamples([[1], [2]], [0, 3]), [0], "sample 1: label 3"),
    ],
)
def test_bad_collections_are_refused(samples: Any, labels: Any, message: str) -> None:
    class Mine(Lazy):
        def _generate_data(self) -> None:
            self.samples = samples
            self.labels_list = labels

    with pytest.raises(ConfigError, match=f"^Mine: .*{message}"):
        Mine(5, 3, 9).to_token_data()


def test_a_class_outside_the_family_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYNTHETIC_DATASETS, "mine", dict)
    with pytest.raises(ConfigError, match="mine: dict must inherit from SequenceBaseDataset"):
        synthetic_splits("mine", {}, seed=0)


def test_labels_that_are_not_0_to_c_are_renumbered_in_order() -> None:
    class Mine(Lazy):
        def _generate_data(self) -> None:
            self.samples = [{"input_ids": [1], "label": label} for label in (30, 10, 20)]
            self.labels_list = [30, 10, 10, 20]

    assert Mine(3, 1, 1).to_token_data().labels.tolist() == [2, 0, 1]


class Known(SequenceBaseDataset):
    """Two tokens: the path takes their parity, the group is the first; the split decides the tokens."""

    further_tests = ("long", "rare")
    tokens: ClassVar = {"train": (1, 5), "validation": (1, 5), "test": (1, 5), "long": (5, 7), "rare": (7, 9)}

    def __init__(self, *, num_samples: int = 50) -> None:
        super().__init__(num_samples, 2, 9)

    def _generate_data(self) -> None:
        ids_N2 = self.rng.integers(*self.tokens[self.split], size=(self.num_samples, 2))
        self.samples = ArraySamples(ids_N2, ids_N2.sum(1) % 2, ids_N2 % 2, ids_N2[:, 0])
        self.labels_list = [0, 1]


def test_further_tests_paths_and_groups_reach_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYNTHETIC_DATASETS, "known", Known)
    splits = synthetic_splits("known", {}, seed=0)
    assert {name: (part.tokens.min(), part.tokens.max()) for name, part in splits.further_tests.items()} == {
        "long": (5, 6),
        "rare": (7, 8),
    }
    assert splits.train.tokens.max() <= 4
    for part in (splits.train, splits.validation, splits.test, *splits.further_tests.values()):
        assert part is not None and part.paths is not None and part.groups is not None
        tokens_N2 = part.tokens.reshape(-1, 2)
        np.testing.assert_array_equal(part.paths, tokens_N2 % 2)
        np.testing.assert_array_equal(part.groups, tokens_N2[:, 0])
    assert set(splits.fingerprint["sha256"]) == {"train", "validation", "test", "long", "rare"}


# ------------------------------------------------------------------------------------------- labels that are no classes


class Mean(SequenceBaseDataset):
    """The mean of three tokens. As a list of dicts, or as whole arrays."""

    task = "regression"

    def __init__(self, *, num_samples: int = 50, vocab_size: int = 300, whole: bool = False) -> None:
        super().__init__(num_samples, 3, vocab_size)
        self.whole = whole

    def _generate_data(self) -> None:
        ids_N3 = self.rng.integers(1, self.vocab_size, (self.num_samples, 3), endpoint=True)
        means_N = ids_N3.mean(1)
        rows = ({"input_ids": ids, "label": mean} for ids, mean in zip(ids_N3, means_N, strict=True))
        self.samples = ArraySamples(ids_N3, means_N) if self.whole else list(rows)


class FewMeans(Mean):
    """With so few inputs the splits share them out."""

    def input_space(self) -> int:
        return int(self.vocab_size**3)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("cls", "vocab_size"), [(Mean, 300), (FewMeans, 3)])
def test_numbers_to_be_predicted_stay_as_they_are(
    cls: type[Mean], vocab_size: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SYNTHETIC_DATASETS, "mean", cls)
    splits = synthetic_splits("mean", {"vocab_size": vocab_size, "whole": whole}, seed=0)
    assert (splits.task, splits.num_classes, splits.label_names) == ("regression", 1, [])
    assert (splits.fingerprint["sampling"] == "independent draws") == (cls is Mean)
    for part in (splits.train, splits.validation, splits.test):
        assert part is not None and part.labels.dtype == np.float32
        np.testing.assert_array_equal(part.labels, part.tokens.reshape(-1, 3).mean(1).astype(np.float32))
    batch = next(iter(Batches(splits.train, 4)))
    torch.testing.assert_close(batch.labels, batch.input_ids.float().mean(1), rtol=0, atol=1e-6)
    dataset = cls(vocab_size=vocab_size, whole=whole)
    assert dataset[0]["label"] == dataset[0]["input_ids"].double().mean().item()
    assert dataset.class_values() == []


@pytest.mark.parametrize("label", [float("nan"), float("inf"), True, "1.5", None])
def test_numbers_to_be_predicted_are_finite(label: Any) -> None:
    class Wrong(Mean):
        def _generate_data(self) -> None:
            self.samples = [{"input_ids": [1], "label": value} for value in (0.5, label)]

    with pytest.raises(ConfigError, match=r"Wrong: sample 1: label .* is no finite number, which task 'regression'"):
        Wrong().to_token_data()


def test_all_tasks_of_our_own_are_classification() -> None:
    assert {cls.task for cls in SYNTHETIC_DATASETS.values()} == {"classification"}
    splits = synthetic_splits("parity", {"num_samples": 10}, seed=0)
    assert splits.task == "classification" and splits.train.labels.dtype == np.int64
