"""What a set of texts holds that a user should know: blank texts, duplicates, texts with two labels.

N rows of a split  M rows of all splits
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from research_eval.datasets.text.splits import Rows, folded

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")  # a text that two splits have counts in the later one
LOUD = 0.01  # share of the rows; above it, there is a warning


def text_facts(rows: Mapping[str, Rows]) -> dict[str, Any]:
    """Counts of rows, for the fingerprint of the data. Texts that fold alike are the same text.

    `repeated_texts`: rows whose text occurs in an earlier row of the split. `shared_texts`: rows of a split whose text
    occurs in an earlier split. `texts_with_two_labels`: rows, of all splits, whose text has another label too.
    """
    names = [name for name in SPLITS if name in rows]
    numbers: dict[str, int] = {}  # folded text -> its number
    texts = {
        name: np.fromiter((numbers.setdefault(folded(text), len(numbers)) for text in rows[name].texts), np.int64)
        for name in names
    }
    distinct = {name: np.unique(texts_N) for name, texts_N in texts.items()}
    text_M = np.concatenate([texts[name] for name in names])
    label_M = np.concatenate([rows[name].labels for name in names])
    labels_of_text = np.bincount(np.unique(np.stack([text_M, label_M]), axis=1)[0])  # different ones
    blank = numbers.get("", -1)
    return {
        "blank_texts": {name: int((texts_N == blank).sum()) for name, texts_N in texts.items()},
        "repeated_texts": {name: len(texts_N) - len(distinct[name]) for name, texts_N in texts.items()},
        "shared_texts": {
            name: {earlier: int(np.isin(texts[name], distinct[earlier]).sum()) for earlier in names[:place]}
            for place, name in enumerate(names)
            if place
        },
        "texts_with_two_labels": int((labels_of_text[text_M] > 1).sum()),
    }


def warn_of(facts: Mapping[str, Any], rows: Mapping[str, int], dataset_name: str) -> None:
    """Log a warning for every count that is more than LOUD of its rows."""
    found = [(count, rows[name], f"rows of {name} have a blank text") for name, count in facts["blank_texts"].items()]
    found += [
        (count, rows[name], f"rows of {name} repeat a text of an earlier row")
        for name, count in facts["repeated_texts"].items()
    ]
    found += [
        (count, rows[name], f"rows of {name} have a text that is in {earlier} too, so their scores are too good")
        for name, shared in facts["shared_texts"].items()
        for earlier, count in shared.items()
    ]
    two = "rows have a text that another row has with another label, so no model can be right on all of them"
    found.append((facts["texts_with_two_labels"], sum(rows.values()), two))
    for count, total, what in found:
        if count > LOUD * total:
            log.warning(
                "%s: %s of %s %s (%.1f %%)", dataset_name, f"{count:,}", f"{total:,}", what, 100 * count / total
            )
