"""The base class of the synthetic tasks: lazy generation, and checks of what was generated.

N samples  L longest sample  T steps of the right path
"""

from __future__ import annotations

import functools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from research_eval.annotations import accept_flat_options
from research_eval.datasets.token_data import CLASSIFICATION, TokenData
from research_eval.errors import ConfigError
from research_eval.system.environment import check_fits
from research_eval.wording import plain


@contextmanager
def global_generators_seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (CPU) for the block; afterwards restore their states.

    A user's `_generate_data` may draw from them. The data then depends on its seed alone, and it changes none of the
    run's own draws.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def enough_ids(task: str, vocab_size: int | None, needed: int, reason: str) -> int:
    """`vocab_size`, or the smallest possible one if it is None. Raises ConfigError if it is smaller than `needed`."""
    if vocab_size is None:
        return needed
    if vocab_size < needed:
        raise ConfigError(f"{task}: vocab_size={vocab_size} is too small; {reason} needs at least {needed}")
    return vocab_size


def exact_length(task: str, seq_len: int | None, needed: int, reason: str) -> int:
    """The only length that the task's samples can have. Raises ConfigError if `seq_len` is given and differs."""
    if seq_len not in (None, needed):
        raise ConfigError(f"{task}: seq_len={seq_len} does not fit; {reason} makes it {needed}. Leave seq_len out")
    return needed


BYTES_PER_TOKEN = 3 * 8  # while samples are made: the ids and what is computed from them


class ArraySamples(Sequence[dict[str, Any]]):
    """All samples as whole arrays: the fast way to fill `samples`. Reads like a list of dicts.

    `ids_NL` holds ids from 1 and is padded on the right with 0; `labels_N` holds values of `labels_list`, or the
    numbers to be predicted. A task that knows the right path of a sample through its sub-functions gives it in
    `paths_NT`, -1 after its end; `groups_N` tells the samples' difficulty or family.
    """

    def __init__(
        self,
        ids_NL: ArrayLike,
        labels_N: ArrayLike,
        paths_NT: ArrayLike | None = None,
        groups_N: ArrayLike | None = None,
    ) -> None:
        self.ids_NL = np.asarray(ids_NL)
        self.labels_N = np.asarray(labels_N)
        self.paths_NT = None if paths_NT is None else np.asarray(paths_NT)
        self.groups_N = None if groups_N is None else np.asarray(groups_N)

    def __len__(self) -> int:
        return len(self.ids_NL)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            paths_NT = None if self.paths_NT is None else self.paths_NT[index]
            groups_N = None if self.groups_N is None else self.groups_N[index]
            return ArraySamples(self.ids_NL[index], self.labels_N[index], paths_NT, groups_N)
        return {"input_ids": self.ids_NL[index], "label": plain(self.labels_N[index])}


class Table(NamedTuple):
    """Checked samples."""

    ids: NDArray[np.integer[Any]]  # [N, L], padded on the right with 0
    labels: NDArray[Any]  # [N], values of labels_list (objects), or the numbers to be predicted
    targets: NDArray[Any]  # [N], class numbers of the labels, or the numbers to be predicted
    paths: NDArray[np.integer[Any]] | None = None  # [N, T]
    groups: NDArray[np.integer[Any]] | None = None  # [N]


class SequenceBaseDataset(ABC):
    """A task that generates token sequences with one label each.

    A subclass writes `_generate_data`, which sets `self.samples` (a list of dicts with `input_ids` and `label`, or
    `ArraySamples`) and `self.labels_list` (all label values there are). It draws from `self.rng`. Nothing is generated
    before the samples are first used, so attributes may be set before or after `super().__init__`.

    If `task` is not "classification", labels are finite numbers that stay unchanged, and `labels_list` is not needed.
    """

    task: str = CLASSIFICATION
    """The task of models on this data, by its name in the registry of tasks."""

    VERSION: int = 1  # goes up when the same seed gives other data
    further_tests: Sequence[str] = ()
    """Names of test splits beside "test", for example of longer samples. Only possible if `input_space` is None."""
    split: str = "train"
    """The split that `_generate_data` makes now: train, validation, test or one of `further_tests`."""
    rng: np.random.Generator
    _generated = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Settings groups of a constructor also accept their options as flat keywords."""
        super().__init_subclass__(**keywords)
        accept_flat_options(cls)
        if "_generate_data" in vars(cls):  # a constructor may call it too: then the first use need not
            cls._generate_data = _noting_that_it_ran(cls._generate_data)  # type: ignore[method-assign, assignment]

    def __init__(self, num_samples: int, seq_len: int, vocab_size: int, seed: int = 0) -> None:
        for name, value in {"num_samples": num_samples, "seq_len": seq_len, "vocab_size": vocab_size}.items():
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ConfigError(f"{type(self).__name__}: {name}={value!r}: expected an integer of at least 1")
        check_fits(
            float(num_samples) * seq_len * BYTES_PER_TOKEN,
            f"dataset_params: num_samples={num_samples} of seq_len={seq_len} tokens",
        )
        self.num_samples = int(num_samples)
        self.seq_len = int(seq_len)
        self.vocab_size = int(vocab_size)
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self._generated = False
        self._samples: Sequence[Mapping[str, Any]] = []
        self._table: Table | None = None
        self.__dict__.setdefault("_labels_list", [])  # a subclass may have set it already

    @abstractmethod
    def _generate_data(self) -> None:
        """Set `self.samples` to `self.num_samples` samples, and `self.labels_list`."""

    def input_space(self) -> int | None:
        """The number of different inputs; None if it is not known or if splits may share inputs."""
        return None

    def generate(self, seed: int, num_samples: int | None = None, split: str = "train") -> None:
        """Replace the samples by new ones, `num_samples` of them (default: as many as before).

        The same seed gives the same samples.
        """
        self.split = split
        self.seed = seed
        if isinstance(self.rng, random.Random | np.random.RandomState):  # a subclass may prefer these
            self.rng.seed(seed)
        else:
            self.rng = np.random.default_rng(seed)
        self.num_samples = num_samples or self.num_samples
        self.samples = []
        with global_generators_seeded(seed):
            self._generate_data()

    @property
    def has_classes(self) -> bool:
        """Whether labels are classes, listed in `labels_list`."""
        return self.task == CLASSIFICATION

    def _generate_once(self) -> None:
        if not self._generated:
            self.generate(self.seed)

    @property
    def samples(self) -> Any:
        """The samples, a sequence of dicts with `input_ids` and `label`."""
        self._generate_once()
        return self._samples

    @samples.setter
    def samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        self._samples = samples
        self._table = None

    @property
    def labels_list(self) -> Any:
        """All label values there are. One per sample is accepted: repeats are ignored."""
        self._generate_once()
        return self._labels_list

    @labels_list.setter
    def labels_list(self, labels: Any) -> None:
        self._labels_list = labels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids` [L] int64, padded on the right with 0 to the longest sample, and `label`, the class number.

        The label is the number to be predicted if the task has no classes.
        """
        table = self.table()
        ids_L = torch.from_numpy(table.ids[index].astype(np.int64))
        return {"input_ids": ids_L, "label": table.targets[index].item()}

    def class_values(self) -> list[Any]:
        """The different label values, sorted: the position of a value is its class number. Empty without classes."""
        if not self.has_classes:
            return []
        try:
            values = sorted({plain(value) for value in self.labels_list})
        except TypeError as error:
            raise ConfigError(f"{type(self).__name__}: labels_list: {error}; give values of one type") from error
        if not values:
            raise ConfigError(f"{type(self).__name__}: labels_list is empty; list all label values in _generate_data")
        return values

    def to_token_data(self) -> TokenData:
        """The samples as one split, with class numbers for labels (if the task has classes)."""
        table = self.table()
        return TokenData.from_padded(table.ids, table.targets, table.paths, table.groups)

    def table(self) -> Table:
        """The checked samples. Raises ConfigError that names the first sample which breaks a rule."""
        samples = self.samples  # generates at the first use, which empties the table
        if self._table is None:
            if len(samples) == 0:
                raise ConfigError(f"{type(self).__name__}: _generate_data gave no samples")
            ids_NL, labels = self._whole_arrays(samples) if isinstance(samples, ArraySamples) else self._padded(samples)
            self._check_ids(ids_NL)
            labels_N, targets_N = self._checked_labels(labels)
            whole = samples if isinstance(samples, ArraySamples) else None
            self._table = Table(
                ids_NL,
                labels_N,
                targets_N,
                paths=None if whole is None else whole.paths_NT,
                groups=None if whole is None else whole.groups_N,
            )
        return self._table

    def _error(self, number: int, problem: str) -> ConfigError:
        return ConfigError(f"{type(self).__name__}: sample {number}: {problem}")

    def _whole_arrays(self, samples: ArraySamples) -> tuple[NDArray[np.integer[Any]], list[Any]]:
        ids_NL, labels_N = samples.ids_NL, samples.labels_N
        if ids_NL.ndim != 2 or ids_NL.dtype.kind not in "iu" or labels_N.shape != (len(ids_NL),):
            raise ConfigError(
                f"{type(self).__name__}: ArraySamples takes integer ids [N, L] and labels [N], "
                f"got {ids_NL.dtype} {ids_NL.shape} and {labels_N.shape}"
            )
        return ids_NL, labels_N.tolist()

    def _padded(self, samples: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.integer[Any]], list[Any]]:
        rows, labels = [], []
        for number, sample in enumerate(samples):
            if not isinstance(sample, Mapping) or not {"input_ids", "label"} <= sample.keys():
                raise self._error(number, f"expected a dict with keys 'input_ids' and 'label', got {sample!r}")
            try:
                row = np.asarray(sample["input_ids"])
            except ValueError as error:
                raise self._error(number, f"input_ids is no flat sequence: {error}") from error
            if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
                raise self._error(number, f"input_ids must be a flat sequence of integers, got {sample['input_ids']!r}")
            if row.size and row.max() > self.vocab_size:  # before the cast, which could overflow
                raise self._error(number, f"id {row.max()} is above vocab_size={self.vocab_size}")
            rows.append(row)
            labels.append(plain(sample["label"]))
        ids_NL = np.zeros((len(rows), max(1, *map(len, rows))), np.int64)
        for ids_L, row in zip(ids_NL, rows, strict=True):
            ids_L[: len(row)] = row
        return ids_NL, labels

    def _check_ids(self, ids_NL: NDArray[np.integer[Any]]) -> None:
        empty_NL = ids_NL == 0
        gap_NL = empty_NL[:, :-1] & ~empty_NL[:, 1:]
        problems = [
            (ids_NL.min(1, initial=0) < 0, "has a negative id; ids start at 1"),
            (ids_NL.max(1, initial=0) > self.vocab_size, f"has an id above vocab_size={self.vocab_size}"),
            (empty_NL.all(1), "has no tokens"),
            (gap_NL.any(1), "has id 0 before its end; 0 is padding and may only follow the last token"),
        ]
        for wrong_N, problem in problems:
            if wrong_N.any():
                raise self._error(int(wrong_N.argmax()), problem)

    def _checked_labels(self, labels: list[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The labels [N] and the targets [N] that they stand for. Raises ConfigError that names the first wrong one."""
        if not self.has_classes:
            self._check_numbers(labels)
            numbers_N = np.asarray(labels)
            return numbers_N, numbers_N
        values = self.class_values()
        self._check_labels(labels, values)
        labels_N = np.fromiter(labels, object, len(labels))
        return labels_N, class_numbers(labels_N, values)

    def _check_labels(self, labels: list[Any], values: list[Any]) -> None:
        known = set(values)
        for number, label in enumerate(labels):
            if not isinstance(label, str | int | float) or label not in known:
                raise self._error(number, f"label {label!r} is not in labels_list {values[:20]}")

    def _check_numbers(self, labels: list[Any]) -> None:
        for number, label in enumerate(labels):
            if isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label):
                raise self._error(number, f"label {label!r} is no finite number, which task {self.task!r} needs")


def class_numbers(labels_N: NDArray[np.object_], values: list[Any]) -> NDArray[np.int64]:
    """The place of each label in `values`."""
    number = {value: place for place, value in enumerate(values)}
    return np.fromiter((number[label] for label in labels_N), np.int64, len(labels_N))


def _noting_that_it_ran(generate_data: Callable[[Any], None]) -> Callable[[Any], None]:
    """The method, which afterwards also marks the object as generated."""

    @functools.wraps(generate_data)
    def noting(self: SequenceBaseDataset) -> None:
        self._generated = True  # first: the body may read `self.samples` to append to it
        try:
            generate_data(self)
        except BaseException:
            self._generated = False
            raise

    return noting
