"""Kinds of data sets: the two of our own, and one that a user adds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from research_eval.datasets import providers
from research_eval.datasets.kinds import DATASET_KINDS, DatasetKind, dataset_kind, dataset_type_of
from research_eval.datasets.parity import ParityDataset
from research_eval.datasets.providers import load_splits
from research_eval.datasets.text import TextDataset
from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS


class Halves(DatasetKind):
    """Splits that the synthetic kind makes, under names of its own."""

    def names(self) -> Iterable[str]:
        return ["left", "right"]

    def constructor(self, dataset_name: str) -> type:
        return ParityDataset

    def splits(self, dataset_name: str, dataset_params: dict[str, Any], seed: int) -> DataSplits:
        return DATASET_KINDS["synthetic"]().splits("parity", dataset_params, seed)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASET_KINDS, "halves", Halves)


def test_our_own_kinds_come_first(halves: None) -> None:
    assert list(DATASET_KINDS) == ["synthetic", "real_world", "language_modeling", "halves"]


@pytest.mark.parametrize("wrong", ["synthetik", "halfs", ""])
def test_an_unknown_type_is_explained(wrong: str, halves: None) -> None:
    near = {"synthetik": " Did you mean 'synthetic'?", "halfs": " Did you mean 'halves'?"}.get(wrong, "")
    with pytest.raises(ConfigError) as caught:
        load_splits(wrong, "parity", {}, seed=0)
    known = "'synthetic' or 'real_world' or 'language_modeling' or 'halves'"
    assert str(caught.value) == f"dataset_type: expected {known}, got {wrong!r}.{near}"


@pytest.mark.parametrize(
    ("dataset_type", "name", "params", "complaint"),
    [
        ("synthetic", "party", {}, " Did you mean 'parity'?"),
        ("synthetic", "party", {"data_dir": "x"}, " Did you mean 'parity'?"),
        ("real_world", "parity", {}, " Known: {}. A set of your own needs dataset_params.data_dir or sources."),
        ("halves", "lefd", {}, " Did you mean 'left'?"),
    ],
)
def test_an_unknown_name_is_explained(
    dataset_type: str, name: str, params: dict[str, Any], complaint: str, halves: None
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_splits(dataset_type, name, params, seed=0)
    known = ", ".join(sorted(providers.REAL_WORLD_DATASETS))
    assert str(caught.value) == f"dataset_name: unknown {name!r}.{complaint.format(known)}"


def test_the_name_alone_tells_the_type(halves: None) -> None:
    names = ["parity", "ag_news", "right", "reviews"]
    assert [dataset_type_of(name) for name in names] == ["synthetic", "real_world", "halves", "real_world"]


def test_a_new_kind_makes_its_own_splits(halves: None) -> None:
    splits = load_splits("halves", "left", {"num_samples": 20}, seed=3)
    expected = load_splits("synthetic", "parity", {"num_samples": 20}, seed=3)
    assert splits.fingerprint == expected.fingerprint
    kind = dataset_kind("halves")
    assert kind.task("left") == "classification" and kind.automaton("left", {}) is None and not kind.generated


@pytest.mark.parametrize("name", SYNTHETIC_DATASETS)
def test_every_synthetic_task_is_built_from_its_defaults(name: str) -> None:
    kind = dataset_kind("synthetic")
    assert isinstance(kind.build(name, {}), kind.constructor(name))
    assert kind.task(name) == "classification" and kind.too_large(name, {}) == {}


def test_sizes_of_our_tasks_are_limited() -> None:
    arguments = {"num_samples": 10**6, "seq_len": 10**6, "task_seed": 10**6, "num_tables": 10**6, "table_size": 10**5}
    assert dataset_kind("synthetic").too_large("tables", arguments) == {
        "num_tables": "expected at most 100,000, got 1,000,000"
    }


def test_only_regular_tasks_have_an_automaton() -> None:
    kind = dataset_kind("synthetic")
    assert kind.automaton("parity", {"seq_len": 4}) is not None
    assert kind.automaton("majority", {}) is None and dataset_kind("real_world").automaton("imdb", {}) is None


def test_text_parameters_that_do_not_fit_are_found_before_anything_is_read() -> None:
    kind = dataset_kind("real_world")
    assert isinstance(kind.build("mine", {"data_dir": "nowhere"}), TextDataset)
    with pytest.raises(ConfigError, match="are both given"):
        kind.build("mine", {"data_dir": "x", "sources": ["y", "z"]})
