"""Real text: reading, splitting, tokenising, caching, and what is said when data cannot be used."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv, parquet

from research_eval.datasets import providers
from research_eval.datasets.providers import get_real_world_data_loaders, load_splits
from research_eval.datasets.text import TextDataset, TextSource, cached_arrays, encode_texts, hub, train_tokenizer
from research_eval.datasets.text.cache import digest_texts
from research_eval.errors import ConfigError

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "runs", "sits", "sleeps", "today"]
KINDS = ["word", "wordpiece", "bpe"]


def made_up(count: int, start: int = 0) -> dict[str, list]:
    """Rows sorted by label, as in some published sets; no text occurs twice."""
    texts = [f"{WORDS[row % 10]} {WORDS[row // 10 % 10]} number{row}, the end." for row in range(start, start + count)]
    return {"text": texts, "label": [int(row >= count // 2) for row in range(count)]}


def write(path: Path, columns: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(columns), path)
    elif path.suffix == ".csv":
        csv.write_csv(pa.table(columns), path)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


def load(path: Path, **params):
    return TextDataset(dataset_name="mine", data_dir=str(path), **{"min_frequency": 1, **params}).splits()


def texts_of(splits, name: str) -> list[str]:
    data = getattr(splits, name)
    return [" ".join(map(splits.tokenizer.id_to_token, data.sample(row))) for row in range(len(data))]


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("validation_name", ["validation", "val", "dev", "valid"])
def test_every_format_gives_the_same_splits(folder, suffix, validation_name):
    tricky = {"text": ['a "quoted", comma', "two\nlines", "12", "2020-01-01"], "label": [0, 1, 1, 0]}
    write(folder / f"train{suffix}", tricky)
    write(folder / f"{validation_name}{suffix}", {"text": ["12 lines"], "label": [1]})
    write(folder / f"test{suffix}", {"text": ["comma", "lines"], "label": [0, 1]})
    splits = load(folder)
    assert texts_of(splits, "train") == ['a " quoted " , comma', "two lines", "12", "2020 - 01 - 01"]
    assert texts_of(splits, "validation") == ["12 lines"]
    assert texts_of(splits, "test") == ["comma", "lines"]
    assert splits.train.labels.tolist() == [0, 1, 1, 0] and splits.test.labels.tolist() == [0, 1]
    assert splits.label_names == ["0", "1"] and splits.num_classes == 2 and splits.max_length == 6


def test_line_breaks_in_a_large_csv_stay_in_their_row(folder, monkeypatch):
    monkeypatch.setattr("research_eval.datasets.text.tables.BLOCK_BYTES", 100)
    write(folder / "train.csv", {"text": ["one\n\ntwo\nthree\nfour"] * 20, "label": [0, 1] * 10})
    assert texts_of(load(folder), "train") == ["one two three four"] * 18


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["train.csv", "train.tsv"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_any_usual_delimiter_is_found(folder, caplog, delimiter, name, mark):
    caplog.set_level("INFO")
    header = delimiter.join(("id", '"note, with; all"', "text", "label"))
    cells = [(str(row), "x", f'"a, b; c | d {row}"', ["no", "yes"][row % 2]) for row in range(40)]
    folder.mkdir()
    lines = [mark + header, *(delimiter.join(line) for line in cells)]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    splits = load(folder)
    assert (len(splits.train), splits.label_names) == (36, ["no", "yes"])
    assert "a , b ; c | d" in texts_of(splits, "train")[0]
    is_usual = delimiter == ("\t" if name == "train.tsv" else ",")
    assert (f"its cells are separated by {delimiter!r}" in caplog.text) != is_usual


def test_a_folder_as_the_hub_gives_it(folder, tmp_path):
    inside = folder / "data"
    for shard, digits in enumerate(("a09b74b3ef9c3b56", "0123456789abcdef")):
        write(inside / f"train-{shard:05}-of-00002-{digits}.parquet", made_up(20, start=20 * shard))
    (folder / "README.md").write_text("# a card")
    assert load(folder).fingerprint["rows"] == {"train": 36, "validation": 4}
    write(folder / "train.csv", made_up(40))  # files of the folder itself come first
    assert load(folder).fingerprint["rows"] == {"train": 36, "validation": 4}
    (folder / "train.csv").unlink()
    (inside / "train-00000-of-00002-a09b74b3ef9c3b56.parquet").unlink()
    with pytest.raises(ConfigError, match=r"1 of 2 shards of train\.parquet are there"):
        load(folder)


def test_one_file_is_the_training_split(folder):
    write(folder / "reviews.jsonl", made_up(40))
    splits = load(folder / "reviews.jsonl")
    assert (len(splits.train), len(splits.validation), splits.test) == (36, 4, None)


def test_shards_are_joined_and_a_missing_one_is_named(folder):
    for shard in range(2):
        write(folder / f"train-{shard:05}-of-00002.parquet", made_up(20, start=20 * shard))
    assert load(folder).fingerprint["rows"] == {"train": 36, "validation": 4}
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ConfigError, match=r"1 of 2 shards of train\.parquet are there"):
        load(folder)


def test_fields_are_found_by_parameter_by_table_and_by_default(folder, monkeypatch):
    rows = made_up(20)
    write(folder / "train.csv", {"words": rows["text"], "kind": rows["label"]})
    monkeypatch.setitem(providers.TEXT_FIELDS, "known", TextSource("x", None, None, ("body", "words"), ("kind",)))
    by_parameter = load(folder, text_field="words", label_field="kind")
    by_table = TextDataset(dataset_name="known", data_dir=str(folder), min_frequency=1).splits()
    assert by_parameter.fingerprint == by_table.fingerprint
    with pytest.raises(ConfigError, match=r"train\.csv: no column 'text' .*; found words, kind\. Set .*text_field"):
        load(folder)
    with pytest.raises(ConfigError, match=r"no column 'label'.*label_field"):
        load(folder, text_field="words")


def test_string_labels_are_numbered_in_sorted_order_in_every_split(folder):
    write(folder / "train.csv", {"text": ["a b", "c d", "e f"], "label": ["sport", "arts", "sport"]})
    write(folder / "test.csv", {"text": ["a"], "label": ["sport"]})
    write(folder / "validation.csv", {"text": ["a"], "label": ["arts"]})
    splits = load(folder)
    assert splits.label_names == ["arts", "sport"]
    assert splits.train.labels.tolist() == [1, 0, 1]
    assert (splits.test.labels.tolist(), splits.validation.labels.tolist()) == ([1], [0])


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["1", "2", "3", "4"], ["1", "2", "3", "4"]),
        (["2021", "2019", "2020"], ["2019", "2020", "2021"]),
        (["007", "7", "10"], ["007", "7", "10"]),  # names, in the order of the numbers
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["0.0", "1.0", "0.0"], ["0", "1"]),
        (["1.0", "2.5", "1.0"], ["1.0", "2.5"]),  # not whole: left as they are
        (["0", "1.0", "1"], ["0", "1"]),
        (["2024-01-01", "2024-02-01"], ["2024-01-01", "2024-02-01"]),
        (["12:30", "13:00"], ["12:30", "13:00"]),
        (["true", "False", "true"], ["False", "true"]),
        (["1e3", "nan", "NA", "null"], ["1e3", "NA", "nan", "null"]),
        (["12345678901234567890", "5"], ["12345678901234567890", "5"]),  # an identifier, too long for a number
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_labels_are_named_as_in_the_file(folder, labels, names, suffix):
    """A class for every label that occurs, whatever else the label may look like."""
    many = labels * 20
    write(folder / f"train{suffix}", {"text": [f"w{row}" for row in range(len(many))], "label": many})
    splits = load(folder)
    assert splits.label_names == names and splits.num_classes == len(names)
    assert len(splits.train) + len(splits.validation) == len(many)


@pytest.mark.parametrize(
    ("train", "validation", "names"),
    [
        (["1.0", "2.5"], ["1.0"], ["1.0", "2.5"]),  # not all are whole, so all stay as they are
        (["0", "1"], ["0.0", "1.0"], ["0", "1"]),
        (["0.0", "1.0"], ["1"], ["0", "1"]),
    ],
)
def test_one_decision_about_fractions_holds_for_all_splits(folder, train, validation, names):
    write(folder / "train.csv", {"text": [f"w{row}" for row in range(20)], "label": train * 10})
    write(folder / "validation.csv", {"text": list("ab")[: len(validation)], "label": validation})
    assert load(folder).label_names == names


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_numbers_are_the_classes_that_occur(folder, suffix):
    write(folder / f"train{suffix}", {"text": [f"w{row}" for row in range(60)], "label": [3.0, 2021.0, 8.0] * 20})
    assert load(folder).label_names == ["3", "8", "2021"]
    write(folder / f"train{suffix}", {"text": [f"w{row}" for row in range(60)], "label": [3, 2021, 8] * 20})
    assert load(folder).label_names == ["3", "8", "2021"]


def test_a_text_that_looks_like_a_time_is_text(folder):
    dates = [f"{1990 + row}-01-0{1 + row % 9}" for row in range(40)]
    write(folder / "train.jsonl", {"text": dates, "label": ["2024-01-01T10:00:00", "2024-01-02T10:00:00"] * 20})
    splits = load(folder)
    assert splits.label_names == ["2024-01-01T10:00:00", "2024-01-02T10:00:00"]
    assert texts_of(splits, "train")[0].startswith("19")


def test_a_listed_class_may_be_given_by_its_number(folder):
    (folder).mkdir()
    (folder / "dataset_info.json").write_text('{"label_names": ["bad", "good"]}')
    for labels in (["0", "1"], ["bad", "good"], ["bad", "1"]):
        write(folder / "train.csv", {"text": [f"w{row}" for row in range(40)], "label": labels * 20})
        splits = load(folder)
        assert splits.label_names == ["bad", "good"]
        assert np.bincount(splits.train.labels).tolist() == [18, 18]
    (folder / "dataset_info.json").write_text('{"label_names": ["1", "2"]}')  # names that look like numbers
    write(folder / "train.csv", {"text": [f"w{row}" for row in range(40)], "label": ["1", "2"] * 20})
    assert np.bincount(load(folder).train.labels).tolist() == [18, 18]


def test_blank_labels_are_refused_with_their_lines(folder):
    folder.mkdir()
    (folder / "train.csv").write_text('text,label\na,x\n"b\nb",\nc,y\n\nd, \n')
    with pytest.raises(ConfigError, match=r"column 'label' has 2 blank labels \(lines 3, 7\)\. Fill them in"):
        load(folder)


def test_a_class_without_a_training_row_is_named(folder, caplog):
    write(folder / "train.csv", {"text": [f"w{row}" for row in range(40)], "label": [0, 1] * 20})
    write(folder / "validation.csv", {"text": ["a", "b", "c"], "label": [0, 1, 5]})
    assert load(folder).label_names == ["0", "1", "5"]
    assert "1 of 3 classes have no training row (5), and 1 rows of validation belong to them" in caplog.text
    caplog.clear()
    write(
        folder / "train.csv",
        {"text": [f"w{row}" for row in range(200)], "label": (["common"] * 18 + ["rare", "odd"]) * 10},
    )
    (folder / "validation.csv").unlink()
    load(folder, train_samples=3)
    assert "of 3 classes have no training row" in caplog.text
    caplog.clear()
    load(folder)
    assert "no training row" not in caplog.text


def test_many_unknown_tokens_are_a_warning_with_the_remedy(folder, caplog):
    texts = [f"common w{row} x{row} y{row}" for row in range(60)]
    write(folder / "train.csv", {"text": texts, "label": [0, 1] * 30})
    share = load(folder, min_frequency=2).fingerprint["unknown_share"]
    assert share == {"train": 0.75, "validation": 0.75}
    assert "unknown to the tokenizer (word, min_frequency 2) are 75% in train, 75% in validation" in caplog.text
    assert '"tokenizer": "bpe" leaves 0.0% of a sample unknown instead of 75.0%' in caplog.text
    caplog.clear()
    assert load(folder, tokenizer="bpe").fingerprint["unknown_share"]["train"] < 0.05
    assert "unknown" not in caplog.text


def test_categories_and_booleans_are_string_labels(folder):
    labels = pa.array(["b", "a", "b"]).dictionary_encode()
    write(folder / "train.parquet", {"text": pa.array(["x", "y", "z"]).cast(pa.large_string()), "label": labels})
    write(folder / "validation.parquet", {"text": ["x"], "label": ["a"]})
    assert load(folder).label_names == ["a", "b"]
    for name in ("train", "validation"):
        write(folder / f"{name}.parquet", {"text": ["x", "y"], "label": [True, False]})
    assert load(folder).label_names == ["false", "true"]


def test_class_names_come_from_the_schema_or_the_file_beside(folder):
    table = pa.table(made_up(20))
    features = {"label": {"names": ["bad", "good", "unused"], "_type": "ClassLabel"}}
    stored = json.dumps({"info": {"features": features}})
    folder.mkdir()
    parquet.write_table(table.replace_schema_metadata({"huggingface": stored}), folder / "train.parquet")
    splits = load(folder)
    assert splits.label_names == ["bad", "good", "unused"] and splits.num_classes == 3
    (folder / "dataset_info.json").write_text(json.dumps({"label_names": ["no", "yes"]}))
    assert load(folder).label_names == ["no", "yes"]
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    assert load(folder).label_names == ["bad", "good", "unused"]


# ------------------------------------------------------------------------------------------------ splits


def test_a_tenth_of_every_class_is_held_out_and_no_row_is_lost(folder):
    rows = made_up(200)
    rows["label"] = [0] * 150 + [1] * 40 + [2] * 9 + [3]
    write(folder / "train.parquet", rows)
    splits = load(folder)
    assert np.bincount(splits.validation.labels).tolist() == [15, 4, 1]
    assert np.bincount(splits.train.labels).tolist() == [135, 36, 8, 1]
    numbers = [{line.split()[2] for line in texts_of(load(folder, **params), "train")} for params in ({}, {})]
    assert numbers[0] == numbers[1]
    kept = {row.split()[2] for row in rows["text"]}
    held_out = kept - {f"{number}," for number in numbers[0]}
    assert len(numbers[0]) == 180 and len(held_out) == 20


def test_the_run_seed_changes_no_row(folder):
    write(folder / "train.parquet", made_up(60))
    dataset = TextDataset(dataset_name="mine", data_dir=str(folder), train_samples=30, val_samples=3)
    one, other = dataset.splits(1), dataset.splits(2)
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint["rows"] == {"train": 30, "validation": 3}
    np.testing.assert_array_equal(one.train.tokens, other.train.tokens)


def test_a_given_validation_split_leaves_train_and_test_alone(folder):
    for name, start in (("train", 0), ("val", 100), ("test", 200)):
        write(folder / f"{name}.csv", made_up(20, start))
    before = load(folder)
    assert before.fingerprint["rows"] == {"train": 20, "validation": 20, "test": 20}
    write(folder / "test.csv", made_up(10, 300))
    after = load(folder)
    for name in ("train", "validation"):
        assert after.fingerprint["sha256"][name] == before.fingerprint["sha256"][name]
    assert after.fingerprint["tokenizer_sha256"] == before.fingerprint["tokenizer_sha256"]
    assert after.fingerprint["sha256"]["test"] != before.fingerprint["sha256"]["test"]


def test_the_vocabulary_has_no_word_of_validation_or_test(folder):
    write(folder / "train.csv", {"text": ["one two", "three four"], "label": [0, 1]})
    write(folder / "validation.csv", {"text": ["five one"], "label": [0]})
    write(folder / "test.csv", {"text": ["six"], "label": [1]})
    splits = load(folder)
    assert set(splits.tokenizer.get_vocab()) == {"[PAD]", "[UNK]", "one", "two", "three", "four"}
    assert texts_of(splits, "validation") == ["[UNK] one"]


@pytest.mark.parametrize("test_rows", [{"text": ["a", "b"], "label": [-1, -1]}, {"text": ["a", "b"]}])
def test_a_test_split_without_labels_is_left_out(folder, test_rows):
    write(folder / "train.csv", made_up(20))
    write(folder / "test.csv", test_rows)
    assert load(folder).test is None


def test_subsets_of_a_sorted_file_hold_both_classes_and_a_larger_number_takes_all(folder, caplog):
    write(folder / "train.csv", made_up(400))
    write(folder / "val.csv", made_up(400, 1000))
    splits = load(folder, train_samples=40, val_samples=9999)
    assert len(splits.train) == 40 and len(splits.validation) == 400
    assert 8 < splits.train.labels.sum() < 32
    assert "validation: 9999 samples are wanted and 400 are there" in caplog.text


def test_duplicates_between_train_and_validation_are_counted_without_case_and_layout(folder):
    write(folder / "train.csv", {"text": ["A cat", "a dog", "a bird"], "label": [0, 1, 1]})
    write(folder / "validation.csv", {"text": ["a  CAT ", "a fish", "a bird"], "label": [0, 1, 1]})
    assert load(folder).fingerprint["train_validation_duplicates"] == 2


# ------------------------------------------------------------------------------------------------ tokenizer


def test_word_tokens_split_punctuation_lower_case_and_drop_html_breaks():
    tokenizer = train_tokenizer(["Don't stop.<br /><br/>Café!"], "word", 100, 1, lowercase=True)
    assert tokenizer.encode("don't STOP <br>CAFÉ").tokens == ["don", "'", "t", "stop", "café"]
    cased = train_tokenizer(["Don't stop"], "word", 100, 1, lowercase=False)
    assert cased.encode("Don don").tokens == ["Don", "[UNK]"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_trainings_give_the_same_tokenizer(kind):
    texts = [f"{first}{second} {second}{third}ing" for first in WORDS for second in WORDS for third in WORDS[:3]]
    results = {train_tokenizer(texts, kind, 200, 2, True).to_str() for _ in range(4)}
    assert len(results) == 1
    assert train_tokenizer(texts, kind, 200, 2, True).get_vocab_size() <= 200


@pytest.mark.parametrize("kind", KINDS)
@given(lines=st.lists(st.text() | st.sampled_from(["[PAD]", "[UNK] [PAD]", "<br />", "the cat"]), min_size=1))
def test_no_text_gives_padding_or_an_empty_sample(kind, lines):
    tokenizer = tokenizer_of(kind)
    encoded = encode_texts(tokenizer, lines, 5)
    lengths = np.diff(encoded.offsets)
    assert lengths.min() >= 1 and lengths.max() <= 5 and encoded.offsets[-1] == len(encoded.tokens)
    assert encoded.tokens.min() >= 1 and encoded.tokens.max() < tokenizer.get_vocab_size()
    for row, line in enumerate(lines):
        expected = tokenizer.encode(line).ids[:5] or [1]
        assert encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]].tolist() == expected


TOKENIZERS: dict = {}


def tokenizer_of(kind):
    if kind not in TOKENIZERS:
        TOKENIZERS[kind] = train_tokenizer(["the cat sat on the mat", "PAD UNK br [ ]"], kind, 100, 1, lowercase=True)
    return TOKENIZERS[kind]


def test_subwords_spell_unseen_words():
    for kind in ("wordpiece", "bpe"):
        encoding = tokenizer_of(kind).encode("cats")
        assert len(encoding.ids) > 1 and 1 not in encoding.ids


@pytest.mark.parametrize(("truncation", "kept"), [("head", "a b c d"), ("head_tail", "a f g h")])
def test_truncation_keeps_the_head_or_a_quarter_and_the_tail(folder, truncation, kept):
    write(folder / "train.csv", {"text": ["a b c d e f g h", "a b c d", ""], "label": [0, 1, 1]})
    write(folder / "validation.csv", {"text": ["a", "b"], "label": [0, 1]})
    splits = load(folder, max_length=4, truncation=truncation)
    assert texts_of(splits, "train") == [kept, "a b c d", "[UNK]"]
    assert splits.fingerprint["truncated_share"] == {"train": 0.333333, "validation": 0.0}
    assert splits.max_length == 4


def test_encoding_in_chunks_is_encoding_one_by_one(monkeypatch):
    lines = [" ".join(WORDS[: row % 7]) for row in range(50)]
    whole = encode_texts(tokenizer_of("bpe"), lines, 6, "head_tail")
    monkeypatch.setattr("research_eval.datasets.text.tokenizer.ENCODE_ROWS", 3)
    parts = encode_texts(tokenizer_of("bpe"), lines, 6, "head_tail")
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------------------------ cache


def test_a_second_load_trains_and_encodes_nothing(folder, monkeypatch):
    write(folder / "train.csv", made_up(50))
    first = load(folder)
    monkeypatch.setattr("research_eval.datasets.text.dataset.train_tokenizer", None)
    monkeypatch.setattr("research_eval.datasets.text.dataset.encode_texts", None)
    second = load(folder)
    for name in ("train", "validation"):
        for field in ("tokens", "offsets", "labels"):
            one, other = getattr(getattr(first, name), field), getattr(getattr(second, name), field)
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
    assert first.tokenizer.to_str() == second.tokenizer.to_str() and first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 4},
        {"max_length": 3, "truncation": "head_tail"},
        {"lowercase": False},
        {"tokenizer": "bpe"},
        {"tokenizer_vocab_size": 100},
        {"min_frequency": 2},
    ],
)
def test_every_setting_has_its_own_cache_entry(folder, cache, change):
    rows = made_up(150)
    rows["text"] = [line.capitalize() for line in rows["text"]]
    write(folder / "train.csv", rows)
    load(folder)
    load(folder, max_length=3)
    shared = load(folder, **change)
    apart = load(folder, cache_dir=str(cache / "other"), **change)
    np.testing.assert_array_equal(shared.train.tokens, apart.train.tokens)
    assert shared.fingerprint == apart.fingerprint


def test_changed_text_is_not_taken_from_the_cache(folder):
    write(folder / "train.csv", made_up(50))
    before = load(folder)
    write(folder / "train.csv", made_up(50, start=7))
    after = load(folder)
    assert after.tokenizer.token_to_id("number56") and before.tokenizer.token_to_id("number56") is None
    assert before.fingerprint["sha256"]["train"] != after.fingerprint["sha256"]["train"]


def test_changed_labels_are_not_taken_from_the_cache(folder):
    rows = made_up(50)
    write(folder / "train.csv", rows)
    write(folder / "validation.csv", made_up(4, 100))
    before = load(folder)
    write(folder / "train.csv", {**rows, "label": [1 - label for label in rows["label"]]})
    after = load(folder)
    np.testing.assert_array_equal(before.train.labels, 1 - after.train.labels)
    assert before.fingerprint["sha256"]["train"] != after.fingerprint["sha256"]["train"]


def test_texts_that_join_to_the_same_string_have_different_hashes():
    assert digest_texts(["ab", "c"]) != digest_texts(["a", "bc"])


def flip_a_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda content: content[: len(content) // 2], flip_a_byte])
def test_a_damaged_cache_file_is_built_again(folder, cache, caplog, damage):
    write(folder / "train.csv", made_up(50))
    first = load(folder)
    sound = {path: path.read_bytes() for path in cache.glob("*.npz")}
    assert len(sound) == 3
    for path, content in sound.items():
        path.write_bytes(damage(content))
    with caplog.at_level(logging.WARNING):
        second = load(folder)
    assert caplog.text.count("is damaged") == 3
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    assert set(cache.iterdir()) == set(sound), "a temporary file was left behind"
    caplog.clear()
    load(folder)
    assert not caplog.records


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_pickles_in_the_cache_are_not_loaded(tmp_path, caplog):
    path = tmp_path / "entry.npz"
    np.savez(path, tokens=np.array([Bomb()], dtype=object))
    assert cached_arrays(path, lambda: {"tokens": np.arange(3)})["tokens"].tolist() == [0, 1, 2]
    path.write_bytes(pickle.dumps(Bomb()))
    assert cached_arrays(path, lambda: {"tokens": np.arange(2)})["tokens"].tolist() == [0, 1]
    assert caplog.text.count("is damaged") == 2


def test_a_write_that_stops_half_way_leaves_nothing(tmp_path, monkeypatch):
    def half(path, **_):
        path.write_bytes(b"PK")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(ConfigError, match="disk full"):
        cached_arrays(tmp_path / "entry.npz", lambda: {"tokens": np.arange(3)})
    assert not list(tmp_path.iterdir())


def test_an_unusable_cache_folder_is_explained(folder, tmp_path):
    write(folder / "train.csv", made_up(20))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write the cache.*Set cache_dir or GOE_CACHE"):
        load(folder, cache_dir=str(tmp_path / "file" / "cache"))


# ------------------------------------------------------------------------------------------------ errors

GOOD = made_up(20)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [], "label": []}, "no rows"),
        ({"text": ["a", None], "label": [0, 1]}, r"'text' has 1 empty cells \(null\)"),
        ({"text": ["a", "b"], "label": [0, None]}, r"'label' has 1 empty cells \(null\)"),
        ({"text": [1, 2], "label": [0, 1]}, "column 'text' holds int64, not text"),
        ({"text": [b"a", b"b"], "label": [0, 1]}, "column 'text' holds binary, not text"),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, "column 'label' holds double"),
        ({"text": ["a", "b", "c"], "label": ["x", " ", "x"]}, r"'label' has 1 blank labels \(row 2\)"),
        ({"text": ["a", "b", "c"], "label": [1, 1, 1]}, "have one class only"),
        ({"text": ["a", "b"], "label": [0, 1]}, "every class has one row only"),
    ],
)
def test_unusable_rows_are_explained(folder, columns, message):
    write(folder / "train.parquet", columns)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_labels_that_no_class_has_are_explained(folder):
    write(folder / "train.csv", GOOD)
    (folder / "dataset_info.json").write_text('{"label_names": ["only"]}')
    with pytest.raises(ConfigError, match=r"train\.csv: label '1' is none of the 1 classes \(only\)"):
        load(folder)
    for content, message in [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"label_names": ["a", "a"]}', "list of different names"),
    ]:
        (folder / "dataset_info.json").write_text(content)
        with pytest.raises(ConfigError, match=rf"dataset_info\.json: .*{message}"):
            load(folder)


@pytest.mark.parametrize(
    ("train_labels", "other", "message"),
    [
        ([0, 1], "a", r"label 'a' is none of the 2 classes \(0, 1\)"),
        (["a", "b"], 0, r"label '0' is none of the 2 classes \(a, b\)"),
        (["a", "b"], "c", r"label 'c' is none of the 2 classes \(a, b\)"),
    ],
)
def test_labels_that_differ_between_splits_are_explained(folder, train_labels, other, message):
    write(folder / "train.csv", {"text": ["x", "y"], "label": train_labels})
    write(folder / "validation.csv", {"text": ["x"], "label": [other]})
    with pytest.raises(ConfigError, match=rf"validation\.csv: {message}"):
        load(folder)


def test_missing_and_unreadable_files_are_explained(folder, tmp_path):
    with pytest.raises(ConfigError, match="there is no file or folder"):
        load(tmp_path / "nowhere")
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"no train\.parquet, train\.csv, .*train\.ndjson; found nothing"):
        load(folder)
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"found notes\.txt"):
        load(folder)
    (folder / "notes.md").write_text("hello")
    with pytest.raises(ConfigError, match=r"has to end with \.parquet"):
        load(folder / "notes.md")
    for name, content in [
        ("train.parquet", b"no parquet"),
        ("train.csv", b"text,label\na,b,c\n"),
        ("train.csv", b"text,label\n\xff\xfe,0\n"),
        ("train.jsonl", b'{"text": "a", "label": 0}\n{"text": \n'),
        ("train.jsonl", b'{"text": "a", "label": 0}\n{"text": "b", "label": "x"}\n'),
        ("train.jsonl", b""),
    ]:
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{name}(:\d)?: (cannot be read|not UTF-8)"):
            load(folder)
        (folder / name).unlink()


def test_text_that_is_not_utf8_is_explained(folder):
    column = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    write(folder / "train.parquet", {"text": column, "label": [0]})
    with pytest.raises(ConfigError, match="UTF8"):
        load(folder)


def test_two_files_for_one_split_are_explained(folder):
    write(folder / "train.csv", GOOD)
    write(folder / "val.csv", GOOD)
    write(folder / "dev.csv", GOOD)
    with pytest.raises(ConfigError, match=r"dev\.csv and val\.csv are all the validation split"):
        load(folder)


def test_a_too_high_frequency_is_explained(folder):
    write(folder / "train.csv", GOOD)
    with pytest.raises(ConfigError, match=r"min_frequency=1000: no word is that frequent"):
        load(folder, min_frequency=1000)


# ------------------------------------------------------------------------------------------------ hub


@pytest.fixture
def no_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails: it would retry for half a minute


def refuse(*_):
    raise OSError("unreachable")


@pytest.mark.usefixtures("no_datasets_library")
def test_without_network_both_ways_out_are_named(monkeypatch):
    monkeypatch.setattr(hub.socket, "create_connection", refuse)
    with pytest.raises(ConfigError, match=r"stanfordnlp/imdb.* cannot be reached.*data_dir.*network access"):
        load_splits("real_world", "imdb", {}, seed=0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set.*data_dir.*network access"):
        load_splits("real_world", "imdb", {}, seed=0)


@pytest.mark.usefixtures("no_datasets_library")
def test_a_name_server_that_never_answers_is_not_waited_for(monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(hub, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(hub.socket, "create_connection", lambda *_: answered.wait(60) and refuse())
    with pytest.raises(ConfigError, match="cannot be reached"):
        load_splits("real_world", "imdb", {}, seed=0)
    answered.set()


@pytest.mark.parametrize(
    ("endpoint", "proxies", "address"),
    [
        (None, {}, ("huggingface.co", 443)),
        ("http://mirror.example:8080/hub", {}, ("mirror.example", 8080)),
        (None, {"https": "http://proxy.example:3128"}, ("proxy.example", 3128)),
        (None, {"https": "proxy.example:3128"}, ("proxy.example", 3128)),
    ],
)
def test_the_endpoint_or_its_proxy_is_asked(monkeypatch, endpoint, proxies, address):
    asked = []
    monkeypatch.setattr(hub, "getproxies", lambda: proxies)
    monkeypatch.setattr(hub, "proxy_bypass", lambda host: False)
    monkeypatch.setattr(hub.socket, "create_connection", lambda *given: asked.append(given[0]) or refuse())
    if endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert not hub.hub_answers() and asked == [address]


@pytest.fixture
def hub_set(tmp_path, monkeypatch):
    """A set that `datasets` loads as it would one from the hub: from a repository folder."""
    repository = tmp_path / "repository"
    write(repository / "train.jsonl", {"sentence": GOOD["text"], "mark": GOOD["label"]})
    write(repository / "test.jsonl", {"sentence": ["a", "b"], "mark": [-1, -1]})
    source = TextSource(str(repository), text_fields=("sentence",), label_fields=("mark",))
    monkeypatch.setitem(providers.TEXT_FIELDS, "hub_set", source)
    monkeypatch.setattr(providers, "REAL_WORLD_DATASETS", [*providers.REAL_WORLD_DATASETS, "hub_set"])
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    return repository


def test_a_hub_set_is_downloaded_once_and_then_read_from_the_cache(hub_set, cache, monkeypatch):
    first = load_splits("real_world", "hub_set", {"min_frequency": 1}, seed=0)
    assert (len(first.train), len(first.validation), first.test) == (18, 2, None)
    (copy,) = (cache / "hub").iterdir()
    assert {path.name for path in copy.iterdir()} == {"train.parquet", "test.parquet"}
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    second = load_splits("real_world", "hub_set", {"min_frequency": 1}, seed=0)
    assert first.fingerprint == second.fingerprint
    local = TextDataset(
        dataset_name="x", data_dir=str(hub_set), text_field="sentence", label_field="mark", min_frequency=1
    ).splits()
    assert local.fingerprint["sha256"] == first.fingerprint["sha256"]


def test_class_names_of_a_hub_set_survive_the_copy(hub_set, monkeypatch):
    import datasets

    features = datasets.Features({"sentence": datasets.Value("string"), "mark": datasets.ClassLabel(names=["n", "y"])})
    rows = datasets.Dataset.from_dict({"sentence": GOOD["text"], "mark": GOOD["label"]}, features=features)
    asked = []

    def load_dataset(*given, **options):
        asked.append((given, options["revision"]))
        return datasets.DatasetDict({"train": rows, "unsupervised": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = load_splits("real_world", "hub_set", {}, seed=0)
    assert splits.label_names == ["n", "y"] and asked == [((str(hub_set), None), None)]


def test_what_the_hub_refuses_is_explained(hub_set, cache):
    for file in hub_set.iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match=r"the hub gave no data.*data_dir"):
        load_splits("real_world", "hub_set", {}, seed=0)
    write(hub_set / "test.jsonl", {"sentence": ["a"], "mark": [0]})
    with pytest.raises(ConfigError, match="has no train split, only test"):
        load_splits("real_world", "hub_set", {}, seed=0)
    assert not (cache / "hub").exists()


# ------------------------------------------------------------------------------------------------ providers


def test_unknown_names_are_explained_and_a_data_dir_makes_any_name_known(folder):
    with pytest.raises(ConfigError, match=r"unknown 'agnews'\. Did you mean 'ag_news'\?"):
        load_splits("real_world", "agnews", {}, seed=0)
    with pytest.raises(ConfigError, match="expected 'synthetic' or 'real_world' or 'language_modeling', got 'other'"):
        load_splits("other", "agnews", {}, seed=0)
    write(folder / "train.csv", GOOD)
    assert len(load_splits("real_world", "agnews", {"data_dir": str(folder)}, seed=0).train) == 18


def test_batches_cover_both_splits(folder):
    write(folder / "train.csv", made_up(60))
    train, validation, splits = get_real_world_data_loaders("mine", {"data_dir": str(folder)}, 8, seed=3)
    assert len(splits.train) == 54 and len(splits.validation) == 6
    assert sorted(np.concatenate(train.order(0)).tolist()) == list(range(54))
    assert not np.array_equal(np.concatenate(train.order(0)), np.concatenate(train.order(1)))
    assert np.array_equal(np.concatenate(validation.order(0)), np.concatenate(validation.order(1)))
    batch = next(iter(validation))
    assert batch.input_ids.shape == batch.attention_mask.shape and batch.labels.shape == (6,)
    assert bool(batch.attention_mask.any(1).all())


def test_the_cache_lies_in_the_working_directory_unless_told(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("GOE_CACHE")
    monkeypatch.chdir(tmp_path)
    write(folder / "train.csv", GOOD)
    load(folder)
    assert {path.suffix for path in (tmp_path / ".goe_cache").iterdir()} == {".npz"}


@pytest.mark.parametrize("name", ["ag_news", "imdb", "sst2", "trec"])
def test_local_copies_of_the_known_sets_load(name):
    root = os.environ.get("GOE_DATA_DIR")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"GOE_DATA_DIR does not name a folder with {name}")
    params = {"data_dir": str(Path(root) / name), "train_samples": 500, "val_samples": 100}
    splits = load_splits("real_world", name, params, seed=0)
    assert len(splits.train) == 500 and len(splits.validation) == 100
    assert splits.num_classes == {"ag_news": 4, "imdb": 2, "sst2": 2, "trec": 6}[name]
