"""The flags of a study, and what they ask for."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from research_eval.commands import add_flag, names_of
from research_eval.errors import ConfigError
from research_eval.files import MAX_NAME
from research_eval.metrics import DEFAULT_METRIC, check_selectable, check_spelling

if TYPE_CHECKING:
    from research_eval.trials import StudyOptions

SAMPLERS = ("tpe", "random", "gp", "nsga2", "cmaes", "grid")
PRUNERS = ("median", "hyperband", "none")
DEFAULT_STORAGE = "sqlite:///optuna_studies.db"
DEFAULT_TYPES = ("dense", "moe", "goe", "goe_original")
# Flags of the data, the type they are for, and the parameter that they fix.
DATA_FLAGS = {
    "syn_num_samples": ("synthetic", "num_samples"),
    "syn_seq_len": ("synthetic", "seq_len"),
    "syn_vocab_size": ("synthetic", "vocab_size"),
    "rw_max_length": ("real_world", "max_length"),
    "rw_train_samples": ("real_world", "train_samples"),
    "rw_val_samples": ("real_world", "val_samples"),
    "data_dir": ("real_world", "data_dir"),
}
STUDY_ONLY = (
    *("study_name", "storage", "n_trials", "dataset_type", "dataset_name", "model_types", "sampler", "pruner"),
    *("objectives", "max_params", "max_flops", "n_jobs", "timeout", "seeds_per_trial", "search_space", "warm_start"),
    *(name for name in DATA_FLAGS if name != "data_dir"),
)


def add_study_arguments(parser: argparse._ActionsContainer, required: bool = False) -> None:
    """The flags of a study alone."""
    add_flag(parser, "dataset_name", metavar="D", required=required, help="such as parity, addition or ag_news")
    add_flag(parser, "dataset_type", choices=["synthetic", "real_world"], help="default: what the name says")
    add_flag(parser, "study_name", metavar="S", help="default: type and name of the data set")
    add_flag(parser, "storage", metavar="URL", help=f"Optuna's database (default: {DEFAULT_STORAGE})")
    add_flag(
        parser, "n_trials", type=int, metavar="N", help="trials of the whole study, over all workers (default 100)"
    )
    add_flag(parser, "model_types", nargs="+", metavar="M", help=f"default: {','.join(DEFAULT_TYPES)}")
    add_flag(parser, "sampler", choices=SAMPLERS, help="default: tpe")
    add_flag(
        parser,
        "pruner",
        choices=PRUNERS,
        help="median (default), hyperband or none; with several objectives both prune what is dominated",
    )
    add_flag(
        parser,
        "objectives",
        nargs="+",
        metavar="METRIC",
        help=f"what to optimise (default {DEFAULT_METRIC}); several give a Pareto study. Also param_count, "
        "active_param_count, train_flops, inference_latency_ms_batch",
    )
    add_flag(parser, "max_params", type=int, metavar="N", help="no model with more parameters is trained")
    add_flag(parser, "max_flops", type=float, metavar="N", help="nor one with more forward FLOPs per sample")
    add_flag(parser, "n_jobs", type=int, metavar="N", help="worker processes (default 1)")
    add_flag(parser, "timeout", type=float, metavar="SECONDS", help="stop then; the same command goes on")
    add_flag(parser, "seeds_per_trial", type=int, metavar="N", help="runs per trial, whose mean counts (default 1)")
    add_flag(parser, "search_space", metavar="FILE", help="JSON that narrows or fixes what is searched")
    add_flag(parser, "warm_start", action="store_true", help="learn from the finished runs of the results first")
    for name, (dataset_type, parameter) in DATA_FLAGS.items():
        if name != "data_dir":
            add_flag(parser, name, type=int, metavar="N", help=f"{parameter} of {dataset_type} data; not searched then")


def study_options(arguments: argparse.Namespace) -> StudyOptions:
    """Check all flags together. Raises ConfigError."""
    from research_eval.hpo import storage_url
    from research_eval.search_space import build_space, read_search_space
    from research_eval.trials import StudyOptions

    def given(name: str, default: Any = None) -> Any:
        value = getattr(arguments, name, None)
        return default if value is None else value

    objectives = tuple(names_of(_words(given("objectives", [DEFAULT_METRIC]))))
    for name in objectives:
        check_selectable(name, "--objectives")
        check_spelling(name, "--objectives")
    if not objectives:
        raise ConfigError("--objectives: give at least one metric")
    sampler = given("sampler", "tpe")
    if sampler == "cmaes" and len(objectives) > 1:
        raise ConfigError("--sampler: cmaes takes one objective. Use tpe, gp or nsga2 for several.")
    numbers = {"n_trials": 100, "n_jobs": 1, "seeds_per_trial": 1, "epochs": 10, "batch_size": 32}
    whole = {name: _at_least(name, given(name, default), 1) for name, default in numbers.items()}
    base = _base(arguments, whole)
    narrowing = read_search_space(given("search_space")) if given("search_space") is not None else {}
    if "batch_size" in narrowing and given("batch_size") is None:
        del base["batch_size"]
    training = narrowing.get("training_params", {})
    if isinstance(training, dict) and "num_threads" not in training:
        # Small models gain nothing from more, and trials keep their numbers however many workers there are.
        base["training_params"]["num_threads"] = 1
    types = names_of(_words(given("model_types", list(DEFAULT_TYPES))))
    if not types:
        raise ConfigError("--model_types: give at least one")
    timeout, max_flops = given("timeout"), given("max_flops")
    for name, value in {"timeout": timeout, "max_flops": max_flops}.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{name}: expected a number above 0, got {value}")
    return StudyOptions(
        study_name=base["experiment_name"],
        storage=storage_url(given("storage", DEFAULT_STORAGE)),
        space=build_space(types, base, narrowing),
        n_trials=whole["n_trials"],
        objectives=objectives,
        sampler=sampler,
        pruner=given("pruner", "median"),
        n_jobs=whole["n_jobs"],
        max_params=None if given("max_params") is None else _at_least("max_params", given("max_params"), 1),
        max_flops=max_flops,
        seeds_per_trial=whole["seeds_per_trial"],
        seed=base["seed"],
        db=given("db"),
        warm_start=bool(given("warm_start", False)),
    )


def _base(arguments: argparse.Namespace, whole: dict[str, int]) -> dict[str, Any]:
    """The config with what the flags fix."""
    from research_eval.registry import SYNTHETIC_DATASETS

    dataset_name = getattr(arguments, "dataset_name", None)
    if dataset_name is None:
        raise ConfigError("--dataset_name: a study needs a data set")
    dataset_type = getattr(arguments, "dataset_type", None)
    if dataset_type is None:
        dataset_type = "synthetic" if dataset_name in SYNTHETIC_DATASETS else "real_world"
    params = {}
    for flag, (needed, parameter) in DATA_FLAGS.items():
        value = getattr(arguments, flag, None)
        if value is not None and needed != dataset_type:
            raise ConfigError(f"--{flag}: is for {needed} data, and {dataset_name} is {dataset_type}")
        if value is not None:
            params[parameter] = value if flag == "data_dir" else _at_least(flag, value, 1)
    if dataset_type == "real_world" and "data_dir" not in params:
        from research_eval.datasets.providers import REAL_WORLD_DATASETS
        from research_eval.wording import hint

        if dataset_name not in REAL_WORLD_DATASETS:
            near = hint(dataset_name, [*REAL_WORLD_DATASETS, *SYNTHETIC_DATASETS])
            raise ConfigError(f"--dataset_name: unknown {dataset_name!r}.{near} A set of your own needs --data_dir.")
    training = {name: getattr(arguments, name, None) for name in ("device", "precision")}
    study_name = getattr(arguments, "study_name", None)
    if study_name is None:
        study_name = f"{dataset_type}_{dataset_name}"
    if not study_name.strip():
        raise ConfigError("--study_name: is empty")
    if len(study_name) > MAX_NAME:
        raise ConfigError(f"--study_name: expected at most {MAX_NAME} characters, got {len(study_name)}")
    seed = getattr(arguments, "seed", None) or 0
    return {
        "experiment_name": study_name,
        "dataset_type": dataset_type,
        "dataset_name": dataset_name,
        "epochs": whole["epochs"],
        "batch_size": whole["batch_size"],
        "seed": _at_least("seed", seed, 0),
        "dataset_params": params,
        "training_params": {name: value for name, value in training.items() if value is not None},
    }


def _words(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _at_least(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"--{name}: expected a whole number of at least {least}, got {json.dumps(value, default=str)}"
        )
    return value


def tune_command(arguments: argparse.Namespace) -> int:
    """Run the study, or describe what it would search."""
    options = study_options(arguments)
    if arguments.dry_run:
        print(options.space.describe())
        return 0
    from research_eval.hpo import tune

    return tune(options, arguments.timeout, arguments.quiet)
