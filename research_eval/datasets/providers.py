"""Name -> data. A name in `SYNTHETIC_DATASETS` or `REAL_WORLD_DATASETS` is all that a new dataset needs.

`kinds.py` says what the two types of data sets are; a third type is a new class in `DATASET_KINDS`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from tokenizers import Tokenizer

from research_eval.datasets.kinds import dataset_kind
from research_eval.datasets.label_facts import label_facts
from research_eval.datasets.text import TEXT_FIELDS, TextSource, source
from research_eval.datasets.token_data import Batches, DataSplits
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.system.phases import phase

__all__ = [
    "REAL_WORLD_DATASETS",
    "SYNTHETIC_DATASETS",
    "TEXT_FIELDS",
    "TextSource",
    "get_real_world_data_loaders",
    "get_synthetic_data_loaders",
    "load_splits",
]

# Names that may come from the hub. With a `data_dir` every name is accepted.
REAL_WORLD_DATASETS: list[str] = list(TEXT_FIELDS)
source.real_world_names = lambda: REAL_WORLD_DATASETS


def load_splits(
    dataset_type: str, dataset_name: str, dataset_params: dict[str, Any], seed: int, tokenizer: Tokenizer | None = None
) -> DataSplits:
    """The splits of any dataset. Raises ConfigError for unknown types and names, and for unusable data.

    A `tokenizer` of an earlier run takes the place of the one that a kind would train.

    The fingerprint gets what labels and lengths say (`label_facts`). If it has hashes of the splits but no
    `data_sha256`, that follows from them. Generated splits change with the seed, so for them the kind itself has to
    give a hash that does not.
    """
    kind = dataset_kind(dataset_type)
    kind.check_name(dataset_name, dataset_params)
    with phase("generating the data" if kind.generated else "preparing the data"):
        if tokenizer is None:
            splits = kind.splits(dataset_name, dataset_params, seed)
        else:
            splits = kind.splits_with(dataset_name, dataset_params, seed, tokenizer)
    hashes = splits.fingerprint.get("sha256")
    if hashes and not kind.generated:
        whole = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()  # as in migration 0004
        splits.fingerprint.setdefault("data_sha256", whole)
    facts = label_facts(splits)
    baselines = facts.pop("baselines", {}) | splits.fingerprint.get("baselines", {})
    splits.fingerprint.update(facts | splits.fingerprint | ({"baselines": baselines} if baselines else {}))
    return splits


def get_synthetic_data_loaders(
    dataset_name: str,
    dataset_params: dict[str, Any],
    batch_size: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Batches, Batches, DataSplits]:
    """Shuffled training batches, validation batches in a fixed order, and the splits they come from."""
    return _loaders(load_splits("synthetic", dataset_name, dataset_params, seed), batch_size, seed, device)


def get_real_world_data_loaders(
    dataset_name: str,
    dataset_params: dict[str, Any],
    batch_size: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Batches, Batches, DataSplits]:
    """Shuffled training batches, validation batches in a fixed order, and the splits they come from."""
    return _loaders(load_splits("real_world", dataset_name, dataset_params, seed), batch_size, seed, device)


def _loaders(
    splits: DataSplits, batch_size: int, seed: int, device: torch.device | str
) -> tuple[Batches, Batches, DataSplits]:
    """Train in a new order every epoch, drawn from `seed`; validation always in the same order."""
    train = splits.train.batches(batch_size, device, seed)
    return train, splits.validation.batches(batch_size, device), splits
