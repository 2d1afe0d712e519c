"""What a run has stored of its data, for people: rows, classes, duplicates, lengths, baselines.

The facts are the object `data` of `env_details_json`. They may come from an older program or a foreign database, so
every function leaves out what it does not find in the expected form.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from research_eval.store.metrics import score_of_epoch
from research_eval.system.untrusted import stored_object
from research_eval.wording import aligned, printable, shortened

SPLITS = ("train", "validation", "test")
MANY_CLASSES = 12  # in a table; of more, the largest and the smallest are shown
LARGEST, SMALLEST = 5, 3
NAME_LENGTH = 40  # characters of a class name
BASELINES = {
    "majority": "majority class",
    "tfidf_logreg": "TF-IDF + logistic regression",
    "tfidf_char_logreg": "TF-IDF with characters + logistic regression",
    "ngram": "Kneser-Ney n-grams",
}

SHORT_NAMES = {
    "majority": "majority class",
    "tfidf_logreg": "TF-IDF",
    "tfidf_char_logreg": "TF-IDF with characters",
    "ngram": "n-grams",
}
FACTS = (  # keys that the table and the notes show
    *("rows", "class_rows", "num_classes", "classes_without_training_row", "read_from", "baselines", "blank_texts"),
    *("repeated_texts", "shared_texts", "texts_with_two_labels", "token_lengths", "truncated_share", "unknown_share"),
    *("tokens", "characters", "bytes", "documents", "distinct_ids", "shared_windows"),
)
# Running text has these facts in place of rows and classes.
TEXT_SIZES = {
    "tokens": "tokens",
    "characters": "characters",
    "bytes": "bytes",
    "documents": "documents",
    "distinct_ids": "different tokens",
}

Baselines = dict[str, dict[str, float]]  # baseline -> score ("val_f1", "test_acc", ...) -> value


def facts_of(env_details_json: str | None) -> dict[str, Any]:
    """The facts in the environment record of a run; empty if it has none."""
    return _object(stored_object(env_details_json).get("data"))


def baselines_of(facts: Mapping[str, Any]) -> Baselines:
    """The scores of the constant answer, of n-grams and, if it was fitted, of the linear model."""
    found = _object(facts.get("baselines"))
    return {name: scores for name in BASELINES if (scores := _numbers(found.get(name)))}


def baseline_score(scores: Mapping[str, float], metric: str) -> float | None:
    """The score of a baseline that compares with a metric of runs: `val_f1` for `final_val_f1`, for example."""
    return scores.get(score_of_epoch(metric) or metric)


def facts_table(facts: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The facts that each split has: header and rows. The first column has the names, the others numbers as text."""
    sizes, tokens = _numbers(facts.get("rows")), _numbers(facts.get("tokens"))
    splits = [name for name in SPLITS if name in (tokens or sizes)]

    def row(name: str, values: Mapping[str, float], form: Callable[[float], str] = _count) -> list[list[str]]:
        cells = [form(values[split]) if math.isfinite(values.get(split, math.nan)) else "-" for split in splits]
        return [[name, *cells]] if values else []

    if tokens:
        rows = [line for key, name in TEXT_SIZES.items() for line in row(name, _numbers(facts.get(key)))]
        rows += row("unknown tokens", _numbers(facts.get("unknown_share")), _percent)
        rows += row("text in train too", _numbers(facts.get("shared_windows")), _percent)
        return ["", *splits], rows
    rows = row("rows", sizes)
    rows += [line for name, values in _shown_classes(facts, splits) for line in row(f"  {name}", values)]
    rows += row("majority class", _majority_shares(facts, sizes), _percent)
    rows += row("blank texts", _numbers(facts.get("blank_texts")))
    rows += row("text in an earlier row", _numbers(facts.get("repeated_texts")))
    shared = {name: _numbers(values) for name, values in _object(facts.get("shared_texts")).items()}
    for earlier in splits[:-1]:
        rows += row(
            f"text in {earlier} too", {name: found[earlier] for name, found in shared.items() if earlier in found}
        )
    lengths = {name: _numbers(values) for name, values in _object(facts.get("token_lengths")).items()}
    titles = {"median": "tokens, median", "p95": "tokens, 95th percentile", "max": "tokens, longest"}
    if all(found.get("median") == found.get("max") for found in lengths.values()):
        titles = {"max": "tokens"}
    for key, title in titles.items():
        rows += row(title, {name: found[key] for name, found in lengths.items() if key in found})
    rows += row("cut to max_length", _numbers(facts.get("truncated_share")), _percent)
    rows += row("unknown tokens", _numbers(facts.get("unknown_share")), _percent)
    return ["", *splits], rows if splits else []


def facts_notes(facts: Mapping[str, Any]) -> list[str]:
    """What does not fit into the table: files and columns, classes without rows, texts with two labels, baselines."""
    notes = [f"{name}: {text}" for name, text in _object(facts.get("read_from")).items() if isinstance(text, str)]
    counts = {
        "classes without a training row": facts.get("classes_without_training_row"),
        "rows whose text has another label elsewhere": facts.get("texts_with_two_labels"),
    }
    notes += [f"{name}: {value:,}" for name, value in counts.items() if isinstance(value, int) and value]
    for name, scores in baselines_of(facts).items():
        on = [
            f"{split} macro-F1 {scores[f'{prefix}_f1']:.4f}, accuracy {scores[f'{prefix}_acc']:.4f}"
            for split, prefix in (("validation", "val"), ("test", "test"))
            if {f"{prefix}_f1", f"{prefix}_acc"} <= set(scores)
        ]
        on += [
            f"{split} loss {scores[f'{prefix}_loss']:.4f}, bits per byte {scores[f'{prefix}_bits_per_byte']:.4f}"
            for split, prefix in (("validation", "val"), ("test", "test"))
            if {f"{prefix}_loss", f"{prefix}_bits_per_byte"} <= set(scores)
        ]
        notes.append(f"{BASELINES[name]}{_counted(scores, facts)}: {'; '.join(on)}")
    return notes


def _counted(scores: Mapping[str, float], facts: Mapping[str, Any]) -> str:
    """The order of n-grams, and of how many training tokens they are if not of all."""
    text = f" of order {scores['order']:.0f}" if "order" in scores else ""
    counted, tokens = scores.get("train_tokens"), _numbers(facts.get("tokens")).get("train")
    return text if counted is None or counted == tokens else f"{text} (first {_count(counted)} training tokens)"


def facts_lines(facts: Mapping[str, Any], width: int) -> list[str]:
    """Table and notes as lines of at most `width` columns, unless the table needs more."""
    header, rows = facts_table(facts)
    lines = aligned(header, rows, right=set(range(1, len(header))))
    for note in facts_notes(facts):
        lines += textwrap.wrap(printable(note), max(width, 20), subsequent_indent="  ")
    return lines


def _object(value: Any) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    return value if isinstance(value, dict) else {}


def _numbers(value: Any) -> dict[str, float]:
    """The entries of a JSON object that are finite numbers."""
    entries = _object(value).items()
    return {name: one for name, one in entries if type(one) in (int, float) and math.isfinite(one)}


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _shown_classes(facts: Mapping[str, Any], splits: list[str]) -> list[tuple[str, dict[str, float]]]:
    """Class -> rows by split, largest in training first; one entry stands for those that are left out."""
    rows = {split: _numbers(_object(facts.get("class_rows")).get(split)) for split in splits}
    names = sorted(rows.get("train", {}), key=lambda name: -rows["train"][name])
    shown = [(shortened(name, NAME_LENGTH), {split: rows[split].get(name, 0) for split in splits}) for name in names]
    total = facts.get("num_classes")
    total = total if type(total) is int else len(names)
    if total <= MANY_CLASSES:
        return shown
    left_out = dict.fromkeys(splits, math.nan)
    return [*shown[:LARGEST], (f"... {total - LARGEST - SMALLEST:,} more classes", left_out), *shown[-SMALLEST:]]


def _majority_shares(facts: Mapping[str, Any], sizes: Mapping[str, float]) -> dict[str, float]:
    """The share that the largest class of training has in each split."""
    rows = {split: _numbers(counts) for split, counts in _object(facts.get("class_rows")).items()}
    train = rows.get("train")
    if not train:
        return {}
    largest = max(train, key=lambda name: train[name])
    return {split: rows[split].get(largest, 0) / size for split, size in sizes.items() if split in rows and size}
