"""What a user is told of the data before the training, and the scores of simple models beside those of a run."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from research_eval import main
from research_eval.datasets.label_facts import majority_scores
from research_eval.datasets.providers import load_splits
from research_eval.datasets.text import TextDataset, baselines
from research_eval.datasets.text.facts import text_facts
from research_eval.datasets.text.splits import Rows, subset
from research_eval.datasets.text.subsets import rows_per_class
from research_eval.db_utils import DB_FILE, Store
from research_eval.errors import ConfigError
from research_eval.store.data_facts import baselines_of, facts_lines, facts_of, facts_table
from tests.support import command, small_settings


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GOE_CACHE", "GOE_DB", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def write(name: str, rows: list[tuple[str, str]]) -> None:
    path = Path("data") / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("headline", "topic"), *rows])


def distinct(count: int, label: str, start: int = 0) -> list[tuple[str, str]]:
    """Rows with texts that occur nowhere else."""
    return [(f"{label} said number {row}", label) for row in range(start, start + count)]


PARAMS: dict[str, Any] = {"data_dir": "data", "text_field": "headline", "label_field": "topic", "min_frequency": 1}


def facts(**params: Any) -> dict[str, Any]:
    """The fingerprint of the set in `data`."""
    return load_splits("real_world", "news", PARAMS | params, 0).fingerprint


def write_config(**params: Any) -> None:
    data = {"dataset_type": "real_world", "dataset_name": "news", "dataset_params": PARAMS | params}
    Path("c.json").write_text(json.dumps(small_settings(**data, epochs=1)))


def table(known: dict[str, Any]) -> dict[str, list[str]]:
    """Row name -> the cells of train, validation and test."""
    return {name.strip(): cells for name, *cells in facts_table(known)[1]}


# ------------------------------------------------------------------------------------------------------ the facts


def test_rows_by_class_and_split_are_counted() -> None:
    """Imbalanced classes, one that training lacks, and one that validation lacks."""
    write("train", distinct(1200, "sport") + distinct(30, "world") + distinct(2, "tech"))
    write("validation", distinct(8, "sport", 5000) + distinct(2, "arts", 5000))
    write("test", distinct(3, "world", 5000) + distinct(1, "sport", 9000))
    Path("data/dataset_info.json").write_text(json.dumps({"label_names": ["arts", "sport", "tech", "world"]}))
    known = facts()
    assert (known["num_classes"], known["classes_without_training_row"]) == (4, 1)
    found = table(known)
    assert found["rows"] == ["1,232", "10", "4"]
    assert (found["sport"], found["world"]) == (["1,200", "8", "1"], ["30", "0", "3"])
    assert (found["tech"], found["arts"]) == (["2", "0", "0"], ["0", "2", "0"])
    assert found["majority class"] == ["97.4 %", "80.0 %", "25.0 %"]
    assert list(found)[1:5] == ["sport", "world", "tech", "arts"]  # the largest first


def test_of_many_classes_the_largest_and_the_smallest_are_shown() -> None:
    write("train", [row for size in range(1, 131) for row in distinct(size + 1, f"c{size:03}")])
    write("validation", distinct(2, "c001", 1000))
    known = facts()
    assert known["num_classes"] == 130 and len(known["class_rows"]["train"]) == 20
    names = [name.strip() for name, *_ in facts_table(known)[1]]
    assert names[1:10] == ["c130", "c129", "c128", "c127", "c126", "... 122 more classes", "c003", "c002", "c001"]


def test_duplicates_are_counted_without_case_and_layout() -> None:
    write("train", [("A cat", "a"), ("a  CAT ", "a"), ("a dog", "b"), ("a\nbird", "b"), ("", "a"), ("  ", "b")])
    write("validation", [("a Dog", "b"), ("a bird", "a"), ("fish", "a"), ("fish", "a")])
    write("test", [("fish", "b"), ("a cat", "a"), ("cow", "a")])
    known = facts()
    assert known["blank_texts"] == {"train": 2, "validation": 0, "test": 0}
    assert known["repeated_texts"] == {"train": 2, "validation": 1, "test": 0}
    assert known["shared_texts"] == {"validation": {"train": 2}, "test": {"train": 1, "validation": 1}}
    assert known["texts_with_two_labels"] == 2 + 2 + 3  # the blank ones, the bird, the fish
    assert known["train_validation_duplicates"] == 2


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["a", "A", " a", "b", "a b", "A  B", ""]), st.integers(0, 2)),
        min_size=3,
    )
)
def test_the_counts_are_those_of_a_slow_search(rows: list[tuple[int, str, int]]) -> None:
    names = ("train", "validation", "test")
    parts = {name: [(text, label) for split, text, label in rows if split == place] for place, name in enumerate(names)}
    labels = {name: np.array([label for _, label in part], int) for name, part in parts.items()}
    found = text_facts({name: Rows([text for text, _ in part], labels[name]) for name, part in parts.items()})

    def same(one: str, other: str) -> bool:
        return one.lower().split() == other.lower().split()

    for name, part in parts.items():
        earlier_in_split = sum(any(same(text, other) for other, _ in part[:row]) for row, (text, _) in enumerate(part))
        assert found["repeated_texts"][name] == earlier_in_split
        assert found["blank_texts"][name] == sum(not text.strip() for text, _ in part)
    for later, earlier in (("validation", "train"), ("test", "train"), ("test", "validation")):
        shared = sum(any(same(text, other) for other, _ in parts[earlier]) for text, _ in parts[later])
        assert found["shared_texts"][later][earlier] == shared
    two = sum(any(same(text, other) and label != another for _, other, another in rows) for _, text, label in rows)
    assert found["texts_with_two_labels"] == two


@pytest.mark.parametrize(("count", "loud"), [(2, False), (3, True)])
def test_more_than_one_percent_is_loud(count: int, loud: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Of 200 rows: two are one percent, three are more."""
    unique = distinct(300, "a") + distinct(300, "b")
    write("train", unique)
    write("validation", distinct(200 - count, "a", 1000) + unique[:count])
    facts()
    shared = f"{count} of 200 rows of validation have a text that is in train too"
    assert (shared in caplog.text) == loud
    caplog.clear()
    write("validation", distinct(200 - count, "a", 1000) + distinct(1, "a", 1000) * count)
    facts()
    assert (f"{count} of 200 rows of validation repeat a text" in caplog.text) == loud
    caplog.clear()
    write("validation", distinct(200 - count, "a", 1000) + [(" ", "a")] * count)
    facts()
    assert (f"{count} of 200 rows of validation have a blank text" in caplog.text) == loud


def test_texts_with_two_labels_are_loud(caplog: pytest.LogCaptureFixture) -> None:
    write("train", distinct(90, "a") + distinct(90, "b") + [("same", "a"), ("SAME", "b")])
    write("validation", distinct(10, "a", 1000))
    facts()
    assert "2 of 192 rows have a text that another row has with another label" in caplog.text


def test_lengths_are_those_before_the_cut() -> None:
    write("train", [(" ".join(["word"] * length), "ab"[length % 2]) for length in range(1, 101)])
    write("validation", [("word " * 7, "a"), ("word " * 50, "b")])
    known = facts(max_length=20)
    assert known["token_lengths"]["train"] == {"median": 50, "p95": 95, "max": 100}
    assert known["token_lengths"]["validation"]["max"] == 50
    assert known["truncated_share"] == {"train": 0.8, "validation": 0.5}
    assert facts(max_length=20, truncation="head_tail")["token_lengths"] == known["token_lengths"]
    assert table(known)["cut to max_length"] == ["80.0 %", "50.0 %"]


@pytest.mark.parametrize("present", ["word", "wordpiece"])
def test_the_tokenizer_that_is_named_does_better(present: str, caplog: pytest.LogCaptureFixture) -> None:
    """Syllables that form ever new words; and for wordpiece a letter in each word that occurs nowhere else."""
    syllables = ["ka", "no", "ti", "mu", "re", "so"]
    rng = np.random.default_rng(0)

    def word(row: int) -> str:
        return "".join(rng.choice(syllables, 7)) + (chr(0x1200 + row) if present == "wordpiece" else "")

    write("train", [(f"the {word(row)}", "ab"[row % 2]) for row in range(60)])
    write("validation", [(f"the {word(row)}", "ab"[row % 2]) for row in range(60, 200)])
    before = facts(tokenizer=present, min_frequency=2)["unknown_share"]
    (warning,) = [record.getMessage() for record in caplog.records if "unknown to the tokenizer" in record.getMessage()]
    option = json.loads("{" + warning.split("tokens. ")[1].split(" leaves")[0] + "}")
    after = facts(**{"tokenizer": present, "min_frequency": 2, **option})["unknown_share"]
    assert option == {"tokenizer": "bpe"} and after["validation"] < before["validation"] / 2


def test_no_tokenizer_is_named_if_none_does_better(caplog: pytest.LogCaptureFixture) -> None:
    """Every sign occurs in one text only, so that nothing can be known of the validation texts."""
    write("train", [(chr(0x4E00 + row), "ab"[row % 2]) for row in range(100)])
    facts(tokenizer="bpe")
    assert "Other options of the tokenizer leave about as many." in caplog.text


# ------------------------------------------------------------------------------------------------- the baselines


@settings(max_examples=40)
@given(
    train=st.lists(st.integers(0, 3), min_size=1),
    scored=st.lists(st.integers(0, 3), min_size=1),
)
def test_the_majority_scores_are_those_of_the_constant_answer(train: list[int], scored: list[int]) -> None:
    counts = {"train": np.bincount(train, minlength=4), "validation": np.bincount(scored, minlength=4)}
    largest = min(label for label, count in Counter(train).items() if count == max(Counter(train).values()))
    guesses = [largest] * len(scored)
    found = majority_scores(counts)
    assert found["val_acc"] == pytest.approx(accuracy_score(scored, guesses))
    assert found["val_f1"] == pytest.approx(f1_score(scored, guesses, average="macro", zero_division=0))
    assert set(found) == {"val_acc", "val_f1"}


def test_generated_tasks_have_the_majority_too() -> None:
    splits = load_splits("synthetic", "parity", {"num_samples": 100, "seq_len": 6}, 0)
    largest = np.bincount(splits.train.labels).argmax()
    scores = splits.fingerprint["baselines"]["majority"]
    assert splits.test is not None
    assert scores["val_acc"] == (splits.validation.labels == largest).mean()
    assert scores["test_acc"] == (splits.test.labels == largest).mean()
    assert "tfidf_logreg" not in splits.fingerprint["baselines"]


def news() -> None:
    """Three topics that words tell apart, but not always."""
    rng = np.random.default_rng(1)
    topics = {"sport": "match goal team", "world": "vote border war", "tech": "chip cloud phone"}
    words = [word for text in topics.values() for word in text.split()]

    def made(count: int, start: int) -> list[tuple[str, str]]:
        rows = []
        for row in range(start, start + count):
            topic = list(topics)[row % 3]
            own = rng.choice(topics[topic].split(), 2)
            rows.append((" ".join([*own, *rng.choice(words, 2), f"id{row}"]), topic))
        return rows

    write("train", made(120, 0))
    write("validation", made(60, 1000))
    write("test", made(60, 2000))


def linear(rows: dict[str, Rows], name: str, with_characters: bool = False) -> float:
    """The macro-F1 of a linear model, written down as its documentation says."""
    vectorizers = [TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)]
    if with_characters:
        letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
        vectorizers.append(letters)
    features = scipy.sparse.hstack([one.fit_transform(rows["train"].texts) for one in vectorizers])
    model = LogisticRegression(C=10, max_iter=1000).fit(features, rows["train"].labels)
    guesses = model.predict(scipy.sparse.hstack([one.transform(rows[name].texts) for one in vectorizers]))
    return float(f1_score(rows[name].labels, guesses, average="macro"))


def test_the_linear_baseline_is_fitted_once_and_found_by_every_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The flag is not in the config: runs with it and without it are one experiment."""
    news()
    write_config()
    plain = command(main.main, "--json_config_path", "c.json")
    assert plain.code == 0 and "TF-IDF" not in plain.out
    first = command(main.main, "--json_config_path", "c.json", "--baselines", "--resume")
    assert "is finished: nothing to resume" in first.err and "TF-IDF" in first.out  # the same experiment
    monkeypatch.setattr(baselines, "linear_scores", None)  # from here on nothing may fit it again
    again = command(main.main, "--json_config_path", "c.json", "--baselines", "--set", "training_params.test=true")
    rows, _, _ = TextDataset(dataset_name="news", **PARAMS)._rows()
    value = f"{linear(rows, 'validation'):.4f}"
    with Store(DB_FILE, read_only=True) as store:
        newest = max(store.experiments(), key=lambda row: row["timestamp"])
        completed = store.experiment(min(row["experiment_id"] for row in store.experiments()))
    assert set(baselines_of(facts_of(completed["env_details_json"]))) == {
        *("majority", "tfidf_logreg", "tfidf_char_logreg")
    }
    majority, stored, letters = baselines_of(facts_of(newest["env_details_json"])).values()
    assert stored["val_f1"] == pytest.approx(linear(rows, "validation"))
    assert stored["test_f1"] == pytest.approx(linear(rows, "test"))
    assert letters["val_f1"] == pytest.approx(linear(rows, "validation", with_characters=True))
    assert letters["test_f1"] == pytest.approx(linear(rows, "test", with_characters=True))
    lines = {line.split()[0]: line for line in again.out.splitlines() if line.startswith("  ")}
    linear_text = f"TF-IDF {value}, TF-IDF with characters {letters['val_f1']:.4f}"
    assert lines["final_val_f1"].endswith(f"(majority class {majority['val_f1']:.4f}, {linear_text})")
    assert f"majority class {majority['val_acc']:.4f}" in lines["final_val_acc"]
    assert f"majority class {majority['test_f1']:.4f}" in lines["test_f1"]
    assert "(" not in lines["final_val_loss"]


def test_without_scikit_learn_there_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    news()
    write_config()
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    ended = command(main.main, "--json_config_path", "c.json", "--baselines")
    assert ended.code == 2
    assert ended.err.strip().endswith("needs scikit-learn: pip install scikit-learn")
    assert not Path(DB_FILE).exists()


def test_the_linear_baseline_needs_text() -> None:
    Path("c.json").write_text(json.dumps(small_settings()))
    ended = command(main.main, "--json_config_path", "c.json", "--baselines")
    assert ended.code == 2
    assert ended.err == "--baselines: TF-IDF is for text, and parity is something else. Leave the flag out.\n"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"val_f1": 7}', '{"val_f1": NaN}', '{"other": 0.5}', '{"val_f1": true}']
)
def test_damaged_scores_in_the_cache_are_not_believed(content: str) -> None:
    Path("scores.json").write_text(content)
    assert baselines.stored_scores(Path("scores.json")) == {}


def test_texts_without_words_have_no_tfidf() -> None:
    rows = Rows(["!", "?", "."], np.array([0, 1, 0]))
    with pytest.raises(ConfigError, match="no word of two letters"):
        baselines.linear_scores({"train": rows, "validation": rows})


# ------------------------------------------------------------------------------------------------------ on the screen


def test_the_block_comes_before_the_training_and_stays_with_the_run() -> None:
    news()
    write_config(max_length=3)
    shown = command(main.main, "--json_config_path", "c.json")
    before, _, _ = shown.err.partition("epoch 1/1")
    for line in (
        "data: news (data_dir data)",
        "  rows                          120          60    60",
        "    sport                        40          20    20",
        "  cut to max_length         100.0 %     100.0 % 100.0 %",
    ):
        assert " ".join(line.split()) in [" ".join(found.split()) for found in before.splitlines()]
    assert "train: train.csv: text from 'headline', label from 'topic'" in before
    quiet = command(main.main, "--json_config_path", "c.json", "--quiet")
    assert "rows" not in quiet.err and "data:" not in quiet.err
    described = command(main.main, "--json_config_path", "c.json", "--dry_run")
    kept = command(main.cli, "runs", "show", "latest")
    report = command(main.cli, "analyze", "--dataset_name", "news", "--run_report")
    assert report.code == 0
    page = Path("analysis_reports/news_report.html").read_text()
    for text in (described.out, kept.out, page):
        assert "cut to max_length" in text and "train.csv: text from" in text.replace("&#39;", "'")
    assert "data.class_rows" not in kept.out  # not a second time in the environment
    summary = command(main.cli, "analyze", "--dataset_name", "news").out
    assert any(line.split()[:3] == ["majority", "class", "0.1667"] for line in summary.splitlines())


def test_what_is_loud_is_said_in_quiet_too() -> None:
    write("train", distinct(50, "a") + distinct(50, "b") + distinct(10, "a"))
    write("validation", distinct(10, "a"))
    write_config()
    ended = command(main.main, "--json_config_path", "c.json", "--quiet")
    assert "10 of 110 rows of train repeat a text" in ended.err
    assert "10 of 10 rows of validation have a text that is in train too" in ended.err


def test_lines_fit_the_screen() -> None:
    write("train", distinct(20, "a very long name of a class that never ends at all, not here") + distinct(20, "b"))
    known = facts()
    assert max(map(len, facts_lines(known, 60))) <= 66 and "…" in "\n".join(facts_lines(known, 60))


@pytest.mark.parametrize(
    "stored", [None, "", "[]", '{"data": 3}', '{"data": {"rows": [1]}}', '{"data": {"baselines": 1}}']
)
def test_a_record_of_another_program_shows_nothing(stored: str | None) -> None:
    known = facts_of(stored)
    assert facts_lines(known, 80) == [] and baselines_of(known) == {}


KEYS = ["rows", "train", "class_rows", "shared_texts", "token_lengths", "median", "baselines", "majority"]
KEYS += ["num_classes", "read_from", "val_f1", "val_acc"]
LEAVES = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3)


@settings(max_examples=40)
@given(st.recursive(LEAVES, lambda inner: st.dictionaries(st.sampled_from(KEYS), inner)))
def test_no_stored_value_breaks_the_table(value: Any) -> None:
    known = value if isinstance(value, dict) else {}
    facts_lines(known, 80)
    baselines_of(known)


# ------------------------------------------------------------------------------------------------------ the subsets


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(sum), share=st.floats(0, 1))
def test_rows_are_shared_out_as_the_classes_are(counts: list[int], share: float) -> None:
    size = max(1, round(share * sum(counts)))
    found, exact = rows_per_class(np.array(counts), size), [size * count / sum(counts) for count in counts]
    assert found.sum() == size and all(0 <= one <= count for one, count in zip(found, counts, strict=True))
    if size >= np.count_nonzero(counts):
        assert all(one >= 1 for one, count in zip(found, counts, strict=True) if count)
        if all(one >= 1 for one, count in zip(exact, counts, strict=True) if count):
            assert all(abs(one - wanted) < 1 for one, wanted in zip(found, exact, strict=True))


def test_a_subset_by_class_keeps_every_class(caplog: pytest.LogCaptureFixture) -> None:
    """Rare classes of which random rows have none; the rows of a config without the option stay as they were."""
    write("train", distinct(90, "common") + distinct(90, "usual") + distinct(10, "rare") + distinct(10, "seldom"))
    assert facts(train_samples=8)["classes_without_training_row"] > 0
    assert 'Set "stratify": true to draw train_samples class by class' in caplog.text
    caplog.clear()
    known = facts(train_samples=8, stratify=True)
    assert known["class_rows"]["train"] == {"common": 3, "usual": 3, "rare": 1, "seldom": 1}
    assert "no training row" not in caplog.text
    facts(train_samples=2, stratify=True)  # fewer rows than classes
    assert "2 of 4 classes have no training row" in caplog.text


def test_rows_drawn_by_class_are_the_first_of_the_draw() -> None:
    """So they are random within a class, each at most once, and in random order."""
    labels = np.array([0] * 70 + [1] * 30)
    rows = Rows([str(row) for row in range(100)], labels)
    order = [int(text) for text in subset(rows, 99, "train", Path("x")).texts]
    drawn = [int(text) for text in subset(rows, 10, "train", Path("x"), stratify=True).texts]
    first = [row for row in order if labels[row] == 0][:7] + [row for row in order if labels[row] == 1][:3]
    assert sorted(drawn) == sorted(first) and drawn == [row for row in order if row in first]


def test_the_rows_of_a_subset_without_the_option_are_those_of_before() -> None:
    """The first rows of version 0.1's draw."""
    rows = Rows([str(row) for row in range(100)], np.arange(100) % 2)
    assert subset(rows, 5, "train", Path("x")).texts == ["57", "78", "66", "53", "62"]
