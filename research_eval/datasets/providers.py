"""Name -> data. A name in `SYNTHETIC_DATASETS` or `REAL_WORLD_DATASETS` is all that a new dataset needs."""

from __future__ import annotations

from typing import Any

import torch

from research_eval.datasets.text import TEXT_FIELDS, TextDataset, TextSource
from research_eval.datasets.token_data import Batches, DataSplits
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.wording import hint, largest_of

__all__ = [
    "REAL_WORLD_DATASETS",
    "SYNTHETIC_DATASETS",
    "TEXT_FIELDS",
    "TextSource",
    "get_real_world_data_loaders",
    "get_synthetic_data_loaders",
    "load_splits",
]

# Names that may come from the hub; with a `data_dir` any name will do.
REAL_WORLD_DATASETS: list[str] = list(TEXT_FIELDS)


def load_splits(dataset_type: str, dataset_name: str, dataset_params: dict[str, Any], seed: int) -> DataSplits:
    """The splits of any dataset. Raises ConfigError for unknown names and unusable data."""
    if dataset_type == "synthetic":
        from research_eval.datasets.synthetic import synthetic_splits

        try:
            return synthetic_splits(dataset_name, dataset_params, seed)
        except MemoryError as error:
            text = f"{dataset_name} with {largest_of(dataset_params)} needs more memory than there is"
            raise ConfigError(f"dataset_params: {text} ({error}). Lower one of them.") from error
    if dataset_type != "real_world":
        raise ConfigError(f"dataset_type: expected 'synthetic' or 'real_world', got {dataset_type!r}")
    own_files = dataset_params.get("data_dir") or dataset_params.get("sources")
    if dataset_name not in REAL_WORLD_DATASETS and not own_files:
        near = hint(dataset_name, REAL_WORLD_DATASETS)
        raise ConfigError(
            f"dataset_name: unknown {dataset_name!r}.{near} A set of your own needs dataset_params.data_dir or "
            "sources, one from the hub an entry in REAL_WORLD_DATASETS."
        )
    return TextDataset(dataset_name=dataset_name, **dataset_params).splits(seed)


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
    train = Batches(splits.train, batch_size, device, seed)
    return train, Batches(splits.validation, batch_size, device), splits
