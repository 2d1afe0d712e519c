"""Defaults that follow from other entries of the config, such as its length of training or its kind of data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from research_eval.annotations import Option, options_of
from research_eval.datasets.kinds import DATASET_KINDS, task_name
from research_eval.registry import models_for

MODEL = "model_params"


def add_defaults(data: dict[str, Any]) -> None:
    """Add to an unchecked config what follows from its other entries; an entry of the wrong type stays as it is."""
    options = data.get("training_params")
    other_length = isinstance(options, dict) and any(options.get(name) for name in ("max_steps", "max_tokens"))
    if other_length:
        data.setdefault("epochs", 1)  # not counted
    for section, values in _of_the_kind(data).items():
        _fill(data, section, values)


def add_former_defaults(data: dict[str, Any]) -> None:
    """Add to the config of a past run the options of the model that it lacks and for which its kind has a default.

    The run is older than such an option. It has the default of the constructor, which changes nothing.
    """
    options = _model_options(data)
    _fill(data, MODEL, {name: options[name].default for name in defaults_of_kind(data, MODEL)})


def stored_forms(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A complete config, then its form of a run that is older than the options that `add_former_defaults` adds."""
    options = _model_options(config)
    former = {name for name in defaults_of_kind(config, MODEL) if config[MODEL].get(name) == options[name].default}
    older = {**config, MODEL: {name: value for name, value in config[MODEL].items() if name not in former}}
    return [dict(config), older] if former else [dict(config)]


def defaults_of_kind(data: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """What a section of an unchecked config has by default for its kind of data."""
    return _of_the_kind(data).get(section, {})


def _of_the_kind(data: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Section -> the defaults of the kind of data; of the options of models only those that this model has."""
    dataset_type = data.get("dataset_type")
    if not isinstance(dataset_type, str) or dataset_type not in DATASET_KINDS:
        return {}
    found = dict(DATASET_KINDS[dataset_type].config_defaults)
    if MODEL in found:
        options = _model_options(data)
        found[MODEL] = {name: value for name, value in found[MODEL].items() if name in options}
    return found


def _model_options(data: Mapping[str, Any]) -> dict[str, Option]:
    model_type, models = data.get("model_type"), models_for(task_name(data))
    return options_of(models[model_type]) if isinstance(model_type, str) and model_type in models else {}


def _fill(data: dict[str, Any], section: str, values: Mapping[str, Any]) -> None:
    """Add the values that the section lacks, unless it has another `name`."""
    given = data.get(section, {})
    if isinstance(given, dict) and given.get("name", values.get("name")) == values.get("name"):
        data[section] = {**values, **given}
