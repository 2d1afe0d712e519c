"""A synthetic task's train, validation and test splits.

N samples  L longest sample
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from research_eval.annotations import grouped_arguments, options_of
from research_eval.datasets.base_dataset import SequenceBaseDataset, class_numbers, global_generators_seeded
from research_eval.datasets.token_data import DataSplits, TokenData
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.seeding import derive_seed

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SMALL_SPACE = 1000  # inputs per sample; above it, fewer than 0.1 % of independent draws coincide by chance
ROUNDS = 64  # attempts to draw new inputs; very rare inputs may be missed
# Of the training split, and a fifth of that of the others: they tell generators apart. Another number, or another way
# to draw them, gives all generated data another hash, and then new runs do not join the groups of stored ones.
PROBE_SAMPLES = 2048
SAME_DATA = 16  # equal samples in a row that cannot be chance


class Drawn(NamedTuple):
    """Samples of one split or more."""

    ids: NDArray[np.integer[Any]]  # [N, L], padded on the right with 0
    labels: NDArray[Any]  # [N], label values, or the numbers to be predicted
    keys: NDArray[np.uint64]  # [N], equal for equal inputs
    paths: NDArray[np.integer[Any]] | None = None  # [N, T]
    groups: NDArray[np.integer[Any]] | None = None  # [N]

    def take(self, rows: NDArray[np.integer[Any]]) -> Drawn:
        """The samples with these numbers."""
        paths = None if self.paths is None else self.paths[rows]
        groups = None if self.groups is None else self.groups[rows]
        return Drawn(self.ids[rows], self.labels[rows], self.keys[rows], paths, groups)

    def token_data(self, classes: list[Any]) -> TokenData:
        """The samples as a split. With `classes` a label becomes its index there; otherwise it stays unchanged."""
        targets_N = class_numbers(self.labels, classes) if classes else self.labels
        return TokenData.from_padded(self.ids, targets_N, self.paths, self.groups)


def synthetic_splits(dataset_name: str, dataset_params: dict[str, Any], seed: int) -> DataSplits:
    """Four fifths of `num_samples` for training, one fifth for validation and as many again for the test.

    If the task knows its `input_space` and that is small, inputs are drawn without replacement: no two splits share
    one. If there are fewer inputs than samples, samples repeat within a split only. Otherwise each split is drawn
    from its own seed, and the fingerprint says how many validation inputs also occur in train. Each of the task's
    `further_tests` is as large as the test split.
    """
    dataset = _build(dataset_name, dataset_params, seed)
    num_validation = max(1, dataset.num_samples // 5)
    sizes = [dataset.num_samples - num_validation, num_validation, num_validation]
    if sizes[0] < 1:
        raise ConfigError(f"{dataset_name}: num_samples={dataset.num_samples}: expected at least 2, one of each split")
    space = dataset.input_space()
    values: set[Any] = set()  # of all splits: a dataset may list only the labels that it has drawn
    if space is not None and space <= SMALL_SPACE * sum(sizes):
        drawn, sampling = _without_replacement(dataset_name, dataset, sizes, space, seed, values)
    else:
        drawn, sampling = _independent(dataset_name, dataset, sizes, seed, values), "independent draws"
    further = {
        name: _draw(dataset, num_validation, _seed(seed, len(SPLITS), ROUNDS, number), values, name)
        for number, name in enumerate(dataset.further_tests)
    }
    classes = sorted(values)
    train, validation, test = (part.token_data(classes) for part in drawn)
    further_tests = {name: part.token_data(classes) for name, part in further.items()}
    splits = {**dict(zip(SPLITS, (train, validation, test), strict=True)), **further_tests}
    duplicates = int(np.isin(drawn[1].keys, drawn[0].keys).sum())
    return DataSplits(
        train,
        validation,
        test,
        vocab_size=dataset.vocab_size + 1,
        num_classes=len(classes) if dataset.has_classes else 1,
        label_names=[str(value) for value in classes],
        max_length=max(dataset.seq_len, *(int(split.lengths.max()) for split in splits.values())),
        fingerprint={
            "dataset": dataset_name,
            "version": dataset.VERSION,
            "params": dict(dataset_params),
            "seed": seed,
            "sampling": sampling,
            "sha256": {name: split.sha256() for name, split in splits.items()},
            "data_sha256": _probe_sha256(dataset_name, dataset_params),
            "distinct_inputs": dict(zip(SPLITS, (len(np.unique(part.keys)) for part in drawn), strict=True)),
            "train_validation_duplicates": duplicates,
            "train_validation_duplicate_share": duplicates / len(validation),
        },
        further_tests=further_tests,
        task=dataset.task,
    )


def _seed(seed: int, *indices: int) -> int:
    """32 bits, so that a user's dataset may pass `self.seed` to `np.random.seed`."""
    return derive_seed(seed, "data", *indices) % 2**32


def _build(dataset_name: str, dataset_params: dict[str, Any], seed: int) -> SequenceBaseDataset:
    """One object for all splits: anything that its constructor draws, such as a pattern, is the same in all of them."""
    cls = SYNTHETIC_DATASETS.get_or_explain(dataset_name)
    if not issubclass(cls, SequenceBaseDataset):
        raise ConfigError(f"{dataset_name}: {cls.__qualname__} must inherit from SequenceBaseDataset")
    arguments = dict(dataset_params)
    if "seed" in options_of(cls):
        arguments.setdefault("seed", _seed(seed))
    signature = inspect.signature(cls)
    try:
        arguments = grouped_arguments(cls, arguments)
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"dataset_params of {dataset_name}: {error}; it takes {signature}") from error
    with global_generators_seeded(_seed(seed)):
        return cls(**arguments)


def _draw(dataset: SequenceBaseDataset, num_samples: int, seed: int, values: set[Any], split: str = "train") -> Drawn:
    """New samples. Adds their label values to `values`."""
    dataset.generate(seed, num_samples, split)
    table = dataset.table()
    values.update(dataset.class_values())
    return Drawn(table.ids, table.labels, _keys(table.ids), table.paths, table.groups)


def _independent(
    dataset_name: str, dataset: SequenceBaseDataset, sizes: list[int], seed: int, values: set[Any]
) -> list[Drawn]:
    """Each split from its own seed."""
    drawn = []
    for split, size in enumerate(sizes):
        part = _draw(dataset, size, _seed(seed, split), values, SPLITS[split])
        if len(part.keys) > size:  # a generator with a count of its own, maybe sorted by class
            part = part.take(np.random.default_rng(_seed(seed, split)).choice(len(part.keys), size, replace=False))
        drawn.append(part)
    train, validation = drawn[0].keys, drawn[1].keys
    if len(validation) >= SAME_DATA and np.array_equal(train[: len(validation)], validation):
        raise ConfigError(
            f"{dataset_name}: validation repeats the training samples: _generate_data of {type(dataset).__name__} "
            "gives the same for every seed. Draw from self.rng"
        )
    return drawn


def _without_replacement(
    dataset_name: str, dataset: SequenceBaseDataset, sizes: list[int], space: int, seed: int, values: set[Any]
) -> tuple[list[Drawn], str]:
    """The splits, made by distributing different inputs at random, and a description of how they were sampled."""
    total = sum(sizes)
    pool, counts_N = _distinct(dataset, min(total, space), seed, values)
    num_inputs = len(pool.keys)
    if num_inputs < len(SPLITS):
        raise ConfigError(
            f"{dataset_name}: found only {num_inputs} different inputs (there are {space}), but train, validation "
            "and test need one each; raise seq_len or vocab_size"
        )
    rng = np.random.default_rng(_seed(seed, len(SPLITS), ROUNDS))
    first_end, second_end = (int(end) * num_inputs // total for end in np.cumsum(sizes)[:-1])
    first_end = min(max(first_end, 1), num_inputs - 2)
    second_end = min(max(second_end, first_end + 1), num_inputs - 1)
    drawn = []
    for rows, size in zip(np.split(rng.permutation(num_inputs), [first_end, second_end]), sizes, strict=True):
        repeats = rng.choice(rows, size - len(rows), p=counts_N[rows] / counts_N[rows].sum())
        drawn.append(pool.take(np.append(rows, repeats)))
    return drawn, "without replacement" if num_inputs == total else "distinct inputs, repeated within a split"


def _distinct(dataset: SequenceBaseDataset, target: int, seed: int, values: set[Any]) -> tuple[Drawn, NDArray[Any]]:
    """Up to `target` different inputs, and how often each was drawn.

    Keeping the first copy of each draw gives a sample without replacement from the task's own distribution.
    """
    pool = Drawn(
        np.empty((0, 1), np.int8), np.empty(0, object if dataset.has_classes else np.int64), np.empty(0, np.uint64)
    )
    counts_N: NDArray[Any] = np.empty(0)
    for number in range(ROUNDS):
        fresh = _draw(dataset, max(target, 4096), _seed(seed, len(SPLITS), number), values)
        pool, counts_N = _joined(pool, fresh), np.append(counts_N, np.ones(len(fresh.keys)))
        _, first, inverse = np.unique(pool.keys, return_index=True, return_inverse=True)
        order = np.argsort(first)
        pool, counts_N = pool.take(first[order]), np.bincount(inverse, counts_N)[order]
        if len(order) >= target:
            break
    return pool.take(np.arange(min(target, len(pool.keys)))), counts_N


def _joined(first: Drawn, second: Drawn) -> Drawn:
    """The samples of both, padded to one length."""
    width = max(first.ids.shape[1], second.ids.shape[1])
    ids_NL = np.concatenate([np.pad(part.ids, [(0, 0), (0, width - part.ids.shape[1])]) for part in (first, second)])
    return Drawn(
        ids_NL,
        np.append(first.labels, second.labels),
        np.append(first.keys, second.keys),
        _stacked(first.paths, second.paths),
        _stacked(first.groups, second.groups),
    )


def _stacked(first: NDArray[Any] | None, second: NDArray[Any] | None) -> NDArray[Any] | None:
    """Both arrays one after the other; the second if there is no first (an empty pool has no paths)."""
    return second if first is None or second is None else np.concatenate([first, second])


def _keys(ids_NL: NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    """A 64-bit multilinear hash of each row. Padding adds nothing, so the width does not matter."""
    rng = np.random.default_rng(0)
    keys_N = np.zeros(len(ids_NL), np.uint64)
    for ids_N in ids_NL.T:
        keys_N += ids_N.astype(np.uint64) * (rng.integers(2**64, dtype=np.uint64) | np.uint64(1))
    return keys_N


def _probe_sha256(dataset_name: str, dataset_params: dict[str, Any]) -> str | None:
    """Hash of samples of every split from a fixed seed: the same for every seed of a run, another one after a change.

    None for a generator that does not repeat itself, or that cannot make as many samples as it is asked for.
    """
    values: set[Any] = set()

    def drawn(dataset: SequenceBaseDataset, number: int, name: str) -> Drawn:
        size = min(dataset.num_samples, PROBE_SAMPLES)
        return _draw(dataset, size if number == 0 else max(1, size // 5), _seed(0, number), values, name)

    try:
        dataset = _build(dataset_name, dataset_params, seed=0)
        parts = [drawn(dataset, number, name) for number, name in enumerate((*SPLITS, *dataset.further_tests))]
        again = drawn(_build(dataset_name, dataset_params, seed=0), 1, SPLITS[1])
        hashes = [part.token_data(sorted(values)).sha256() for part in (*parts, again)]
    except Exception:  # a user's generator may raise anything
        log.debug("no probe of %s", dataset_name, exc_info=True)
        return None
    return hashlib.sha256("".join(hashes[:-1]).encode()).hexdigest() if hashes[1] == hashes[-1] else None
