"""The rows of a split, and how rows are held out, drawn and mixed.

All draws use one fixed seed, not that of the run: runs with different seeds are compared on the same rows.

N samples
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from research_eval.errors import ConfigError
from research_eval.seeding import derive_seed

log = logging.getLogger(__name__)

SPLIT_SEED = 0
HELD_OUT_SHARE = 0.1  # of train, if a set has no validation split


class RawRows(NamedTuple):
    """One split as its files have it: `labels` is an Arrow column of int64 or strings."""

    where: str  # the file, for messages
    texts: list[str]
    labels: Any
    class_names: list[str] | None  # in the metadata of the file


class Rows(NamedTuple):
    """One split: N texts and their class numbers [N]."""

    texts: list[str]
    labels: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> Rows:
        """The rows with these numbers."""
        return Rows([self.texts[row] for row in rows], self.labels[rows])


def held_out(train: Rows, path: Path) -> tuple[Rows, Rows]:
    """Train and validation rows made from `train`: validation gets a tenth of every class.

    A class with two rows or more gives at least one. Raises ConfigError if no class has two.
    """
    rng = np.random.default_rng(derive_seed(SPLIT_SEED, "validation split"))
    chosen = np.zeros(len(train.texts), bool)
    for label in np.unique(train.labels):
        rows = rng.permutation(np.flatnonzero(train.labels == label))
        if len(rows) > 1:
            chosen[rows[: max(1, round(len(rows) * HELD_OUT_SHARE))]] = True
    if not chosen.any():
        raise ConfigError(f"{path}: no validation split, and every class has one row only: add rows or a split")
    return train.take(np.flatnonzero(~chosen)), train.take(np.flatnonzero(chosen))


def subset(rows: Rows, size: int | None, name: str, path: Path) -> Rows:
    """`size` random rows (files are often sorted by label); all rows if `size` is None or too large."""
    if size is None or size == len(rows.texts):
        return rows
    if size > len(rows.texts):
        log.warning("%s: %s: %d samples are wanted and %d are there: all are used", path, name, size, len(rows.texts))
        return rows
    rng = np.random.default_rng(derive_seed(SPLIT_SEED, f"{name} subset"))
    return rows.take(rng.permutation(len(rows.texts))[:size])


def mixed(
    parts: Mapping[str, tuple[dict[str, Rows], list[str]]],
) -> tuple[dict[str, Rows], list[str], dict[str, NDArray[np.int64]]]:
    """Several sources as one set: rows by split, the classes of all sources, and each row's source number by split.

    A class is called "source/class". Only splits that all sources have are kept.
    """
    label_names = [f"{source}/{label}" for source, (_, labels) in parts.items() for label in labels]
    first_labels = np.cumsum([0, *(len(labels) for _, labels in parts.values())])
    rows, groups = {}, {}
    for name in ("train", "validation", "test"):
        lacking = [source for source, (splits, _) in parts.items() if name not in splits]
        if lacking:
            log.info("no %s split: %s has none", name, ", ".join(lacking))
            continue
        found = [splits[name] for splits, _ in parts.values()]
        labels = [part.labels + first for part, first in zip(found, first_labels[:-1], strict=True)]
        rows[name] = Rows(list(chain.from_iterable(part.texts for part in found)), np.concatenate(labels))
        groups[name] = np.repeat(np.arange(len(found)), [len(part.texts) for part in found])
    return rows, label_names, groups


def folded(text: str) -> str:
    """The text without case and layout: two texts that fold alike count as duplicates."""
    return " ".join(text.lower().split())
