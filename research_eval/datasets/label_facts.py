"""What the labels and lengths of any data set say: rows per class, and the scores of the constant answer.

N samples  C classes
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.token_data import DataSplits, TokenData

MOST_CLASSES = 100  # whose rows are stored; of more, the largest and the smallest
ENDS = 10  # so many of each


def label_facts(data: DataSplits) -> dict[str, Any]:
    """Facts for the fingerprint: rows, lengths, and for data with classes their rows and the majority's scores.

    `class_rows` lists classes from the one with the most training rows to the one with the fewest.
    """
    splits = splits_of(data)
    facts: dict[str, Any] = {
        "rows": {name: len(part) for name, part in splits.items()},
        "token_lengths": {name: length_facts(part.lengths) for name, part in splits.items()},
    }
    if not data.label_names or data.train.labels.dtype.kind != "i":
        return facts
    counts = {name: np.bincount(part.labels, minlength=data.num_classes) for name, part in splits.items()}
    order_C = np.argsort(-counts["train"], kind="stable")
    if len(order_C) > MOST_CLASSES:
        order_C = np.concatenate([order_C[:ENDS], order_C[-ENDS:]])
    rows = {
        name: {data.label_names[label]: int(count_C[label]) for label in order_C} for name, count_C in counts.items()
    }
    return facts | {
        "num_classes": data.num_classes,
        "classes_without_training_row": int((counts["train"] == 0).sum()),
        "class_rows": rows,
        "baselines": {"majority": majority_scores(counts)},
    }


def splits_of(data: DataSplits) -> dict[str, TokenData]:
    """Train, validation and, if there is one, test."""
    return {"train": data.train, "validation": data.validation} | ({} if data.test is None else {"test": data.test})


def length_facts(lengths_N: NDArray[np.integer[Any]]) -> dict[str, int]:
    """Median, 95th percentile and largest number of tokens."""
    median, p95 = np.percentile(lengths_N, [50, 95], method="inverted_cdf")
    return {"median": int(median), "p95": int(p95), "max": int(lengths_N.max())}


def majority_scores(counts: dict[str, NDArray[np.int64]]) -> dict[str, float]:
    """Accuracy and macro-F1 of always answering the largest class of training: `val_acc`, `val_f1`, `test_acc`, ...

    `counts` [C] are the rows of each class by split. Of N samples n have that class, so that its F1 is 2 n / (N + n).
    All other classes of the split have 0. Of equally large classes the first one is the answer.
    """
    answer = int(counts["train"].argmax())
    scores = {}
    for name, prefix in (("validation", "val"), ("test", "test")):
        if name in counts:
            total, hits = int(counts[name].sum()), int(counts[name][answer])
            num_classes = int((counts[name] > 0).sum()) + (hits == 0)  # the answer counts, as macro-F1 counts classes
            scores[f"{prefix}_f1"] = 2 * hits / (total + hits) / num_classes
            scores[f"{prefix}_acc"] = hits / total
    return scores
