"""Runs of the project's public original, as configs of this program.

The original stored `trial.params` for a trial: flat names such as `moe_num_layers` and `lr`. For a run from JSON it
stored the config as the user had written it. The database keeps both as they are; these functions translate them
whenever a config is needed. A parameter that this program does not have is left out, and a message names it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from research_eval.config.check import stored_config
from research_eval.config.sections import OptimizerParams, SchedulerParams, TrainingParams
from research_eval.config.signatures import MODEL_PROVIDED, dataset_model, signature_model, spellings_of
from research_eval.datasets.kinds import task_name
from research_eval.errors import ConfigError
from research_eval.registry import models_for
from research_eval.store.records import RunFilter, RunRow
from research_eval.store.store import Store
from research_eval.store.values import canonical_json
from research_eval.studies.space import SECTIONS
from research_eval.system.untrusted import stored_object

log = logging.getLogger(__name__)

TOP_LEVEL = ("experiment_name", "model_type", "dataset_type", "dataset_name", "epochs", "batch_size")
# The flat names that no rule explains. Any other name is `syn_` or `rw_` and a parameter of the data, the model type
# and a parameter of the model (`moe_num_layers`), or the parameter itself (`embed_dim`, `lr`).
NAMES = {
    "dt_num_layers": ("model_params", "num_layers"),
    "moe_top_k": ("model_params", "top_k_experts"),
    "optimizer": ("optimizer_params", "name"),
    "optimizer_name": ("optimizer_params", "name"),
    "scheduler": ("scheduler_params", "name"),
    "scheduler_name": ("scheduler_params", "name"),
}
DATA_PREFIXES = (("syn_", "dataset_params"), ("rw_", "dataset_params"))
FLAT_ORDER = ("model_params", "optimizer_params", "scheduler_params", "training_params", "dataset_params")
CLIPS = "use_grad_clip"  # false: no clipping
HEADS = (8, 4, 2, 1)  # the original took the largest that divides the width, if the drawn number did not


def is_adopted(row: Mapping[str, Any]) -> bool:
    """Whether an earlier program stored this run; this one stores a seed with each."""
    return row["seed"] is None


def config_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The stored config of a run, with all columns; translated and complete if an earlier program stored it.

    A translation that is no valid config is returned as it was stored, so that its reader says what is wrong.
    """
    stored = stored_object(row["full_config_json"])
    if not is_adopted(row):
        return stored
    try:
        config, left_out = translated(row)
        complete = stored_config(config, source=f"run {row['experiment_id']}").to_dict()
    except ConfigError:
        return stored
    say_what_is_left_out({row["experiment_id"]: left_out})
    return complete


def with_translations(store: Store, dataset_name: str, rows: Sequence[RunRow]) -> list[RunRow]:
    """The runs on a dataset, those of an earlier program with translated configs."""
    adopted = {row.experiment_id for row in rows if row.seed is None}
    if not adopted:
        return list(rows)
    configs, left_out = {}, {}
    for row in store.find_runs(RunFilter(dataset_name=dataset_name), with_json=True):
        if row["experiment_id"] in adopted:
            try:
                config, left_out[row["experiment_id"]] = translated(row)
                configs[row["experiment_id"]] = canonical_json(config)
            except ConfigError as error:  # a model or a dataset that this program does not have
                log.debug("run %s: %s", row["experiment_id"], error)
    say_what_is_left_out(left_out)
    return [row._replace(config_json=configs.get(row.experiment_id, row.config_json)) for row in rows]


def say_what_is_left_out(left_out: Mapping[str, Sequence[str]]) -> None:
    """Name the parameters (by run) that this program does not have."""
    names = dict.fromkeys(name for some in left_out.values() for name in some)
    if names:
        runs = [run for run, some in left_out.items() if some]
        log.warning(
            "%d run(s) of an earlier program, such as %s, have parameters that this one does not have; they are left "
            "out: %s",
            *(len(runs), runs[0], ", ".join(names)),
        )


def translated(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config that a row of an earlier program stands for, and the names of the parameters that were left out.

    The config is not checked. What the row does not say, such as the number of samples of a trial, has the default of
    this program. Raises ConfigError for a model or a dataset that this program does not have.
    """
    stored = stored_object(row["full_config_json"])
    config: dict[str, Any] = {name: row[name] for name in TOP_LEVEL if row[name] is not None}
    sections = _spellings(config)
    left_out: list[str] = []
    for place, name, value in _entries(stored):
        section, key = _found(place, name, config["model_type"], sections)
        if name in (*TOP_LEVEL, "seed", "task") and not place:
            config.setdefault(name, value)
        elif section is None:
            left_out.append(f"{place}.{name}" if place else name)
        else:
            config.setdefault(section, {}).setdefault(key, value)
    if stored.get(CLIPS) is False:
        config.setdefault("optimizer_params", {})["grad_clip_norm"] = None
    model = config.get("model_params", {})
    width, heads = model.get("embed_dim"), model.get("num_heads")
    if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads:
        model["num_heads"] = next(number for number in HEADS if width % number == 0)
    return config, left_out


def _spellings(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Section -> accepted spelling -> canonical name, for the model and the dataset of a config."""
    if not {"model_type", "dataset_type", "dataset_name"} <= set(config):
        raise ConfigError("the row names no model or no dataset")
    models: dict[str, type[BaseModel]] = {
        "dataset_params": dataset_model(config["dataset_type"], config["dataset_name"]),
        "model_params": signature_model(
            models_for(task_name(config)).get_or_explain(config["model_type"]), MODEL_PROVIDED
        ),
        "optimizer_params": OptimizerParams,
        "scheduler_params": SchedulerParams,
        "training_params": TrainingParams,
    }
    return {section: spellings_of(model) for section, model in models.items()}


def _entries(stored: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Section ("" for a flat name), name and value of everything in a stored config."""
    found = []
    for name, value in stored.items():
        if name in SECTIONS and isinstance(value, dict):
            found += [(name, key, inner) for key, inner in value.items()]
        elif name not in (CLIPS, "$schema"):
            found.append(("", name, value))
    return found


def _found(place: str, name: str, model_type: str, sections: Mapping[str, Mapping[str, str]]) -> tuple[str | None, str]:
    """Section and canonical key of a stored name; None as the section if this program has no such parameter."""
    places = [(place or section, name) for section in FLAT_ORDER]
    if name in NAMES:
        places = [NAMES[name]]
    for prefix, section in (*DATA_PREFIXES, (f"{model_type}_", "model_params")):
        if name.startswith(prefix) and place in ("", section):
            places.insert(0, (section, name.removeprefix(prefix)))
    for section, key in places:
        if key in sections[section]:
            return section, sections[section][key]
    return None, name
