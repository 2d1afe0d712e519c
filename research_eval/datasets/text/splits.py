"""The rows of a split, and how rows are held out, drawn and mixed.

All draws use one fixed seed, not that of the run: runs with different seeds are compared on the same rows.

N samples
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from research_eval.annotations import Younger
from research_eval.datasets.text.subsets import stratified
from research_eval.errors import ConfigError
from research_eval.seeding import derive_seed

log = logging.getLogger(__name__)

SPLIT_SEED = 0
HELD_OUT_SHARE = 0.1  # of train, if a set has no validation split

Size = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]  # a number of rows, or a share of them


@dataclass(frozen=True)
class HeldOutSettings:
    """How many rows of train become a split that the set lacks; the fields are options of `dataset_params`.

    A share counts the rows of train before any are held out. Without `val_size`, validation is a tenth of what is left
    after the test rows are taken; without `test_size` there is no test split. Raises ConfigError for shares that leave
    no training rows.
    """

    val_size: Annotated[Size | None, Younger()] = None
    test_size: Annotated[Size | None, Younger()] = None

    def __post_init__(self) -> None:
        shares = [size for size in (self.val_size, self.test_size) if isinstance(size, float)]
        if sum(shares) >= 1:
            raise ConfigError(f"val_size={self.val_size} and test_size={self.test_size} leave no rows for training")


NOTHING_HELD_OUT = HeldOutSettings()


class RawRows(NamedTuple):
    """One split as its files have it: `labels` is an Arrow column of int64 or strings."""

    where: str  # the file, for messages
    texts: list[str]
    labels: Any
    class_names: list[str] | None  # in the metadata of the file
    origin: str = ""  # files and columns, for people


class Rows(NamedTuple):
    """One split: N texts, their class numbers [N], and where they come from."""

    texts: list[str]
    labels: NDArray[np.int64]
    origin: str = ""

    def take(self, rows: NDArray[np.int64]) -> Rows:
        """The rows with these numbers."""
        return Rows([self.texts[row] for row in rows], self.labels[rows], self.origin)


def with_missing_splits(rows: dict[str, Rows], wanted: HeldOutSettings, path: Path, strict: bool) -> dict[str, Rows]:
    """The splits, with validation and, if it is wanted, test rows made from train if the set has none.

    The test rows are drawn first, so they stay the same if `val_size` changes. Raises ConfigError for more rows than
    there are and, if `strict`, for the size of a split that the set has.
    """
    rows = dict(rows)
    total = len(rows["train"].texts)
    for name, option, size in (("test", "test_size", wanted.test_size), ("validation", "val_size", wanted.val_size)):
        where = f"{path}: dataset_params.{option}={size}"
        if name in rows and size is not None and strict:
            raise ConfigError(
                f"{where}: the set has a {name} split of {len(rows[name].texts)} rows. Leave {option} out, or remove "
                f"the {name} split"
            )
        if name in rows or (name == "test" and size is None):
            continue
        share_or_rows = HELD_OUT_SHARE if size is None else size
        if isinstance(size, float):
            share_or_rows = size * total / len(rows["train"].texts)  # a share of what is left
        rows["train"], held = held_out(
            rows["train"], share_or_rows, name, f"{path}: no {name} split" if size is None else where
        )
        rows[name] = held._replace(origin=f"{len(held.texts) / total:.0%} of the training file, each class its share")
    return rows


def held_out(train: Rows, size: float, name: str, where: str) -> tuple[Rows, Rows]:
    """The rows that stay in train, and those of the split `name`; every class gives its share.

    `size` is a share below 1 or a whole number of rows. A class with two rows or more gives at least one, if there are
    enough to give, and keeps at least one. Raises ConfigError, beginning with `where`, if that is not possible.
    """
    rng = np.random.default_rng(derive_seed(SPLIT_SEED, f"{name} split"))
    chosen = np.zeros(len(train.texts), bool)
    turns = np.full(len(train.texts), np.inf)  # if `size` is a number of rows, the first turns are held out
    for label in np.unique(train.labels):
        rows = rng.permutation(np.flatnonzero(train.labels == label))
        if len(rows) > 1:
            chosen[rows[: min(max(1, round(len(rows) * size)), len(rows) - 1)]] = True
            turns[rows] = (np.arange(len(rows)) + 0.5) / len(rows)  # so the first n turns have the shares of all rows
            turns[rows[0]], turns[rows[-1]] = 0, np.inf
    if not chosen.any():
        raise ConfigError(f"{where}, and every class has one row only: add rows or a split")
    if isinstance(size, int):
        most = int(np.isfinite(turns).sum())
        if size > most:
            raise ConfigError(f"{where}: {most} rows can be held out, because each class keeps one. Lower it")
        chosen = np.zeros(len(train.texts), bool)
        chosen[np.argsort(turns, kind="stable")[:size]] = True
    return train.take(np.flatnonzero(~chosen)), train.take(np.flatnonzero(chosen))


def subset(rows: Rows, size: int | None, name: str, path: Path, stratify: bool = False) -> Rows:
    """`size` random rows (files are often sorted by label); all rows if `size` is None or too large.

    With `stratify` the rows are drawn class by class.
    """
    if size is None or size == len(rows.texts):
        return rows
    if size > len(rows.texts):
        log.warning("%s: %s: %d samples are wanted and %d are there: all are used", path, name, size, len(rows.texts))
        return rows
    rng = np.random.default_rng(derive_seed(SPLIT_SEED, f"{name} subset"))
    order = rng.permutation(len(rows.texts))
    return rows.take(stratified(rows.labels, order, size) if stratify else order[:size])


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
        texts = list(chain.from_iterable(part.texts for part in found))
        rows[name] = Rows(texts, np.concatenate(labels), "; ".join(dict.fromkeys(part.origin for part in found)))
        groups[name] = np.repeat(np.arange(len(found)), [len(part.texts) for part in found])
    return rows, label_names, groups


def folded(text: str) -> str:
    """The text without case and layout: two texts that fold alike count as duplicates."""
    return " ".join(text.lower().split())
