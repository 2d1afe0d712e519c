"""Several text sets as one: classes, sources, subsets, and what is said when a source cannot be used."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from research_eval.datasets.providers import load_splits
from research_eval.datasets.text import TextDataset
from research_eval.datasets.token_data import Batches, DataSplits, TokenData
from research_eval.errors import ConfigError


def rows_of(word: str, count: int, num_classes: int) -> list[tuple[str, int]]:
    return [(f"{word} kind{row % num_classes} {word}{row}", row % num_classes) for row in range(count)]


def write(path: Path, rows: list[tuple[str, Any]], text_field: str = "text", label_field: str = "label") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        columns = {text_field: [row[0] for row in rows], label_field: [row[1] for row in rows]}
        parquet.write_table(pa.table(columns), path)
    else:
        path.write_text("".join(json.dumps({text_field: text, label_field: label}) + "\n" for text, label in rows))


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """News with a test split and no validation split, and reviews with both, other column names and named classes."""
    monkeypatch.setenv("GOE_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "news" / "train.parquet", rows_of("news", 60, 3))
    write(tmp_path / "news" / "test.parquet", rows_of("late", 9, 3))
    named = [(text, ["bad", "good"][label]) for text, label in rows_of("film", 40, 2)]
    write(tmp_path / "sst2" / "train.jsonl", named, "sentence")
    write(tmp_path / "sst2" / "dev.jsonl", named[:8], "sentence")
    write(tmp_path / "sst2" / "test.jsonl", named[:6], "sentence")
    return [str(tmp_path / "news"), str(tmp_path / "sst2")]


def load(sources: list[str], **params: Any) -> DataSplits:
    return TextDataset(dataset_name="mix", sources=sources, **{"min_frequency": 1, **params}).splits()


def texts_of(splits: DataSplits, data: TokenData) -> list[str]:
    assert splits.tokenizer is not None
    return [" ".join(map(splits.tokenizer.id_to_token, data.sample(row))) for row in range(len(data))]


def test_every_source_keeps_its_classes_and_its_rows(sources: list[str]) -> None:
    splits = load(sources)
    assert splits.label_names == ["news/0", "news/1", "news/2", "sst2/bad", "sst2/good"]
    assert splits.num_classes == 5
    assert splits.test is not None
    for data, sizes in ((splits.train, [54, 40]), (splits.validation, [6, 8]), (splits.test, [9, 6])):
        assert data.groups is not None
        assert np.bincount(data.groups).tolist() == sizes
        assert data.paths is None
        for text, label, source in zip(texts_of(splits, data), data.labels, data.groups, strict=True):
            word, kind, _ = text.split()
            assert source == (word == "film")
            assert label == int(kind.removeprefix("kind")) + 3 * source
    assert splits.fingerprint["source"] == f"sources {', '.join(sources)}"


def test_a_source_in_a_mix_has_the_rows_that_it_has_alone(sources: list[str]) -> None:
    """Its held-out rows and its subsets do not depend on the others."""
    mixed = load(sources, train_samples=20, val_samples=4)
    for number, source in enumerate(sources):
        fields = {"text_field": "sentence"} if number else {}
        alone = TextDataset(
            dataset_name="x", data_dir=source, train_samples=20, val_samples=4, min_frequency=1, **fields
        ).splits()
        for name in ("train", "validation"):
            part = getattr(mixed, name)
            texts = [text for text, group in zip(texts_of(mixed, part), part.groups, strict=True) if group == number]
            assert texts == texts_of(alone, getattr(alone, name))
    assert Counter(mixed.train.groups) == {0: 20, 1: 20}  # balanced


def test_the_source_is_the_path_where_that_is_asked_for(sources: list[str]) -> None:
    splits = load(sources, path_length=3)
    for data in (splits.train, splits.validation):
        assert np.array_equal(data.paths, np.stack([data.groups] * 3, axis=1))
    batches = Batches(splits.train, 16, seed=0)
    batch = batches.take(batches.order(0)[0])
    assert batch.paths is not None
    assert torch_equal(batch.paths[:, 0], batch.labels >= 3)


def torch_equal(first: Any, second: Any) -> bool:
    return bool((first == second.long()).all())


def test_a_test_split_needs_one_in_every_source(sources: list[str]) -> None:
    (Path(sources[0]) / "test.parquet").unlink()
    splits = load(sources)
    assert splits.test is None
    assert len(splits.validation) == 14


def test_files_can_be_mixed_and_order_gives_the_numbers(sources: list[str], tmp_path: Path) -> None:
    write(tmp_path / "questions.jsonl", rows_of("why", 20, 2))
    splits = load_splits(
        "real_world", "any", {"sources": [str(tmp_path / "questions.jsonl"), sources[0]], "min_frequency": 1}, seed=0
    )
    assert splits.label_names == ["questions/0", "questions/1", "news/0", "news/1", "news/2"]
    assert np.bincount(splits.train.groups).tolist() == [18, 54]
    assert splits.test is None


def test_errors_name_the_source(sources: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file or folder '.*missing'"):
        load([*sources, str(tmp_path / "missing")])
    write(tmp_path / "single" / "train.jsonl", [("one", 0), ("two", 0), ("three", 0)])
    with pytest.raises(ConfigError, match="single: the training rows have one class only"):
        load([*sources, str(tmp_path / "single")])
    write(tmp_path / "tiny" / "train.jsonl", [("one", 0), ("two", 1)])
    with pytest.raises(ConfigError, match="tiny: no validation split, and every class has one row only"):
        load([*sources, str(tmp_path / "tiny")])
    write(tmp_path / "other" / "train.jsonl", rows_of("x", 9, 2), text_field="words")
    with pytest.raises(ConfigError, match=r"other/train.jsonl: no column 'text'; found words, label"):
        load([*sources, str(tmp_path / "other")])


def test_a_subset_larger_than_its_source_names_it(sources: list[str], caplog: pytest.LogCaptureFixture) -> None:
    load(sources, train_samples=50)
    assert f"{sources[1]}: train: 50 samples are wanted and 40 are there" in caplog.text
    assert f"{sources[0]}: train" not in caplog.text


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"data_dir": "somewhere"}, "data_dir='somewhere' and sources=.* are both given"),
        ({"sources": None, "path_length": 2}, "path_length=2 gives the paths of a mix: name its sources"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(params: dict[str, Any], message: str, sources: list[str]) -> None:
    with pytest.raises(ConfigError, match=message):
        TextDataset(dataset_name="mix", **{"sources": sources, **params})


def test_two_sources_of_one_name_are_refused(sources: list[str], tmp_path: Path) -> None:
    write(tmp_path / "again" / "news" / "train.jsonl", rows_of("x", 9, 2))
    with pytest.raises(ConfigError, match="have the same name"):
        load([*sources, str(tmp_path / "again" / "news")])
