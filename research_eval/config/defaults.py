"""Defaults of a config that follow from other entries: the length of the training, and those of the kind of data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from research_eval.datasets.kinds import DATASET_KINDS


def add_defaults(data: dict[str, Any]) -> None:
    """Add what follows from the other entries of an unchecked config; entries of the wrong type stay as they are."""
    options = data.get("training_params")
    other_length = isinstance(options, dict) and any(options.get(name) for name in ("max_steps", "max_tokens"))
    if other_length:
        data.setdefault("epochs", 1)  # not counted
    dataset_type = data.get("dataset_type")
    if isinstance(dataset_type, str) and dataset_type in DATASET_KINDS:
        for section, values in DATASET_KINDS[dataset_type].config_defaults.items():
            _fill(data, section, values)


def _fill(data: dict[str, Any], section: str, values: Mapping[str, Any]) -> None:
    """Add the values that the section lacks, unless it has another `name`."""
    given = data.get(section, {})
    if isinstance(given, dict) and given.get("name", values.get("name")) == values.get("name"):
        data[section] = {**values, **given}
