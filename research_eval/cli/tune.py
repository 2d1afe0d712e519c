"""`goe tune`: the flags of a study, and the options that they make.

    goe tune --dataset_name parity --model_types dense,goe --n_trials 50 --n_jobs 2

A flag of the data fixes the value, which is then not searched. A search space file (--search_space) can fix or narrow
everything else. All flags are checked together before any work begins.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from research_eval.cli.common import DEFAULT_HELP, add_flag, names_of
from research_eval.cli.launching import LAUNCH_FLAGS, add_launch_flags, at_least, default_storage, launch_options
from research_eval.cli.run import add_common_arguments, parse_sets
from research_eval.errors import ConfigError
from research_eval.files import MAX_NAME
from research_eval.store.metrics import check_selectable, check_spelling
from research_eval.system.best_effort import print_product
from research_eval.system.environment import usable_cores
from research_eval.system.phases import import_torch, phase
from research_eval.system.world import refuse_many_processes
from research_eval.wording import hint

if TYPE_CHECKING:
    from research_eval.studies.options import StudyOptions

DESCRIPTION = "a study: many experiments whose settings a sampler chooses"
SAMPLERS = ("tpe", "random", "gp", "nsga2", "cmaes", "grid")
PRUNERS = ("median", "hyperband", "none")
# What a study does not remember of its flags: where it lies, how long this command works, and what it prints.
NOT_STORED = ("storage", "db", "n_trials", "more_trials", "n_jobs", "timeout", "dry_run", "quiet", *LAUNCH_FLAGS)
# Model types of a study that does not name any: the four that the project compares.
DEFAULT_TYPES = ("dense", "moe", "goe", "goe_original")
DEFAULTS = {"n_trials": 100, "n_jobs": 1, "seeds_per_trial": 1, "epochs": 10, "batch_size": 32}  # at least 1 each
# Flag -> the type of data that it is for, and the parameter of the data that it fixes.
DATA_FLAGS = {
    "syn_num_samples": ("synthetic", "num_samples"),
    "syn_seq_len": ("synthetic", "seq_len"),
    "syn_vocab_size": ("synthetic", "vocab_size"),
    "rw_max_length": ("real_world", "max_length"),
    "rw_train_samples": ("real_world", "train_samples"),
    "rw_val_samples": ("real_world", "val_samples"),
    "data_dir": ("real_world", "data_dir"),
}
# Keys of the config that a study takes from a flag of another name, and keys that a flag may fix.
STUDY_FLAGS = {
    **{name: name for name in ("epochs", "seed", "dataset_name", "dataset_type")},
    "experiment_name": "study_name",
    "model_type": "model_types",
}
FIXED_BY = {
    "batch_size": "batch_size",
    "training_params.device": "device",
    "training_params.precision": "precision",
    **{f"dataset_params.{parameter}": flag for flag, (_, parameter) in DATA_FLAGS.items()},
}
STUDY_ONLY = (  # flags that one experiment does not have
    *("study_name", "n_trials", "more_trials", "dataset_type", "dataset_name", "model_types", "sampler"),
    "pruner",
    *("objectives", "max_params", "max_flops", "n_jobs", "timeout", "seeds_per_trial", "search_space", "warm_start"),
    *(name for name in DATA_FLAGS if name != "data_dir"),
)


def add_study_arguments(parser: argparse._ActionsContainer, required: bool = False) -> None:
    """Add the flags that only a study has."""
    add_flag(parser, "dataset_name", metavar="D", required=required, help="such as parity, addition or ag_news")
    add_flag(parser, "dataset_type", metavar="T", help="such as synthetic or real_world; default: what the name says")
    add_flag(parser, "study_name", metavar="S", help="default: type and name of the data set")
    add_flag(
        parser, "n_trials", type=int, metavar="N", help="trials of the whole study, over all workers (default 100)"
    )
    add_flag(parser, "more_trials", type=int, metavar="N", help="N trials beyond those that the study has")
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
        help=f"what to optimise ({DEFAULT_HELP}); several give a Pareto study. Also param_count, "
        "active_param_count, train_flops, inference_latency_ms_batch",
    )
    add_flag(parser, "max_params", type=int, metavar="N", help="no model with more parameters is trained")
    add_flag(
        parser, "max_flops", type=float, metavar="N", help="no model with more forward FLOPs per sample is trained"
    )
    add_flag(parser, "n_jobs", type=int, metavar="N", help="worker processes (default 1; -1: one per core)")
    add_launch_flags(parser)
    add_flag(parser, "timeout", type=float, metavar="SECONDS", help="stop after this time; the same command continues")
    add_flag(parser, "seeds_per_trial", type=int, metavar="N", help="runs per trial, whose mean counts (default 1)")
    add_flag(parser, "search_space", metavar="FILE", help="JSON that narrows or fixes what is searched")
    add_flag(parser, "warm_start", action="store_true", help="learn from the finished runs of the results first")
    for name, (dataset_type, parameter) in DATA_FLAGS.items():
        if name != "data_dir":
            add_flag(parser, name, type=int, metavar="N", help=f"{parameter} of {dataset_type} data; not searched then")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe tune`."""
    add_study_arguments(parser, required=True)
    add_common_arguments(parser)


def study_options(arguments: argparse.Namespace) -> StudyOptions:
    """Check all flags together; `arguments` may lack flags, as in a call of `research_eval.main.objective`.

    Raises ConfigError.
    """

    def given(name: str, default: Any = None) -> Any:
        """The value of a flag; the default if the flag is missing or None."""
        value = getattr(arguments, name, None)
        return default if value is None else value

    whole = {name: at_least(name, given(name, default), 1) for name, default in DEFAULTS.items() if name != "n_jobs"}
    more_trials = given("more_trials")
    if more_trials is not None and given("n_trials") is not None:
        raise ConfigError("--n_trials counts all trials of a study, and --more_trials those to be added: give one")
    launch = launch_options(arguments)
    whole["n_jobs"] = _num_workers(given("n_jobs", launch.workers if launch.name == "local" else 1))
    from research_eval.config.check import check_data_paths

    check_data_paths("dataset_params.data_dir", given("data_dir"))
    import_torch()  # after what can be checked without it
    with phase("importing the program"):
        from research_eval.studies.options import Budget, Method, StudyOptions
        from research_eval.studies.space import build_space, read_search_space
        from research_eval.studies.storage import storage_url
    base = _base(arguments, whole)
    found = given("search_space", {})
    narrowing = dict(found) if isinstance(found, dict) else read_search_space(found)  # a worker has the content
    flags = _flags(arguments, narrowing)
    sets = _narrowing_of(arguments)
    for name, values in sets.items():  # a value of --set replaces that of the file
        known = narrowing.get(name)
        narrowing[name] = {**known, **values} if isinstance(known, dict) and isinstance(values, dict) else values
    # The batch size has a default, but a search space that names it asks for a search.
    if "batch_size" in narrowing and given("batch_size") is None:
        del base["batch_size"]
    training = narrowing.get("training_params", {})
    if isinstance(training, dict) and "num_threads" not in training:
        # Small models gain nothing from more threads, and the numbers of a trial depend on how many there are: with
        # one thread they are the same for any number of workers.
        base["training_params"]["num_threads"] = 1
    types = names_of(_words(given("model_types", list(DEFAULT_TYPES))))
    if not types:
        raise ConfigError("--model_types: give at least one")
    if sets:
        try:
            build_space(types, base, sets)  # alone, so that messages name the flag
        except ConfigError as error:
            raise ConfigError(str(error).replace("--search_space:", "--set:")) from error
    space = build_space(types, base, narrowing)
    objectives = _objectives(given("objectives"), _selected_by(space.base))
    sampler = given("sampler", "tpe")
    if sampler == "cmaes" and len(objectives) > 1:
        raise ConfigError("--sampler: cmaes takes one objective. Use tpe, gp or nsga2 for several.")
    max_params, max_flops = given("max_params"), given("max_flops")
    for name, value in {"timeout": given("timeout"), "max_flops": max_flops}.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{name}: expected a number above 0, got {value}")
    from research_eval.store.connection import database_url

    storage = storage_url(given("storage", default_storage()))
    launch.check(storage, database_url(given("db")))
    return StudyOptions(
        study_name=base["experiment_name"],
        storage=storage,
        launch=launch,
        space=space,
        budget=Budget(
            n_trials=whole["n_trials"],
            seeds_per_trial=whole["seeds_per_trial"],
            max_params=None if max_params is None else at_least("max_params", max_params, 1),
            max_flops=max_flops,
            more_trials=None if more_trials is None else at_least("more_trials", more_trials, 1),
        ),
        method=Method(sampler, given("pruner", "median"), bool(given("warm_start", False))),
        objectives=objectives,
        n_jobs=whole["n_jobs"],
        seed=base["seed"],
        db=given("db"),
        flags=flags,
    )


def _flags(arguments: argparse.Namespace, search_space: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a worker on another machine needs, with the content of the file of the search space."""
    given = {
        name: value
        for name, value in vars(arguments).items()
        if name not in NOT_STORED and isinstance(value, str | int | float | list) and value is not False
    }
    given.pop("search_space", None)
    return given | ({"search_space": dict(search_space)} if search_space else {})


def _narrowing_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of --set as a search space: a value fixes a key; a list or a range stands for choices, as in the file.

    Raises ConfigError for a key that a flag of the study gives.
    """
    narrowing: dict[str, Any] = {}
    for key, value in parse_sets(getattr(arguments, "set", None) or ()).items():
        if key in STUDY_FLAGS:
            raise ConfigError(f"--set: {key} of a study is given by --{STUDY_FLAGS[key]}")
        if getattr(arguments, FIXED_BY.get(key, ""), None) is not None:
            raise ConfigError(f"--set: {key} is given by another flag too: drop one")
        section, dot, name = key.rpartition(".")
        if dot:
            narrowing.setdefault(section, {})[name] = value
        else:
            narrowing[name] = value
    return narrowing


def key_of(flag: str) -> str | None:
    """The key of a config that a flag of studies stands for; None if there is none."""
    keys = {name: key for key, name in (FIXED_BY | STUDY_FLAGS).items()}
    return keys.get(flag)


def _selected_by(base: Mapping[str, Any]) -> str:
    """The metric that selects the weights: the one that the study fixes, else the score of the data's task."""
    from research_eval.config.sections import metric_of_validation
    from research_eval.datasets.kinds import dataset_kind
    from research_eval.registry import TASKS

    fixed = base.get("training_params", {}).get("select_by")
    if isinstance(fixed, str):
        return metric_of_validation(fixed)
    task = dataset_kind(base["dataset_type"]).task(base["dataset_name"])
    selected_by: str = TASKS.get_or_explain(task).selected_by
    return selected_by


def _objectives(words: Any, selected_by: str) -> tuple[str, ...]:
    """The metrics to optimise; without `words` the score that the task selects by.

    Raises ConfigError for test scores, and for names that look like spelling mistakes.
    """
    if words is None:
        return (f"final_val_{selected_by}",)
    objectives = tuple(names_of(_words(words)))
    for name in objectives:
        check_selectable(name, "--objectives")
        check_spelling(name, "--objectives", selected_by)
    if not objectives:
        raise ConfigError("--objectives: give at least one metric")
    return objectives


def _base(arguments: argparse.Namespace, whole: dict[str, int]) -> dict[str, Any]:
    """The config with the values that the flags fix. `whole` has the checked whole numbers. Raises ConfigError."""
    dataset_type, dataset_name, params = _dataset(arguments)
    training = {name: getattr(arguments, name, None) for name in ("device", "precision")}
    seed = getattr(arguments, "seed", None) or 0
    return {
        "experiment_name": _study_name(arguments, f"{dataset_type}_{dataset_name}"),
        "dataset_type": dataset_type,
        "dataset_name": dataset_name,
        "epochs": whole["epochs"],
        "batch_size": whole["batch_size"],
        "seed": at_least("seed", seed, 0),
        "dataset_params": params,
        "training_params": {name: value for name, value in training.items() if value is not None},
    }


def _dataset_params(arguments: argparse.Namespace, dataset_type: str, dataset_name: str) -> dict[str, Any]:
    """The parameters of the data that flags fix. Raises ConfigError for a flag of another kind of data."""
    params = {}
    for flag, (needed, parameter) in DATA_FLAGS.items():
        value = getattr(arguments, flag, None)
        if value is not None and needed != dataset_type:
            raise ConfigError(f"--{flag}: is for {needed} data, and {dataset_name} is {dataset_type}")
        if value is not None:
            params[parameter] = value if flag == "data_dir" else at_least(flag, value, 1)
    return params


def _dataset(arguments: argparse.Namespace) -> tuple[str, str, dict[str, Any]]:
    """Type and name of the data set, and the parameters that flags fix. Raises ConfigError for an unknown one.

    A name without a type is of the first kind that knows it, as `dataset_type_of` says.
    """
    from research_eval.datasets.kinds import DATASET_KINDS, dataset_kind, dataset_type_of

    name, given_type = getattr(arguments, "dataset_name", None), getattr(arguments, "dataset_type", None)
    if name is None:
        raise ConfigError("--dataset_name: a study needs a data set")
    dataset_type = dataset_type_of(name) if given_type is None else given_type
    kind = dataset_kind(dataset_type, "--dataset_type")
    params = _dataset_params(arguments, dataset_type, name)
    if not kind.accepts(name, params):
        kinds = [kind] if given_type is not None else [other() for other in DATASET_KINDS.values()]
        near = hint(name, [known for other in kinds for known in other.names()])
        own_files = " A set of your own needs --data_dir." if DATA_FLAGS["data_dir"][0] == dataset_type else ""
        raise ConfigError(f"--dataset_name: unknown {name!r}.{near}{own_files}")
    return dataset_type, name, params


def _study_name(arguments: argparse.Namespace, default: str) -> str:
    """The name of the study. Raises ConfigError for one that is empty or too long."""
    given = getattr(arguments, "study_name", None)
    name: str = default if given is None else given
    if not name.strip():
        raise ConfigError("--study_name: is empty")
    if len(name) > MAX_NAME:
        raise ConfigError(f"--study_name: expected at most {MAX_NAME} characters, got {len(name)}")
    return name


def _words(value: Any) -> list[str]:
    """The words of a flag. A call from Python may pass one text in place of a list."""
    return [value] if isinstance(value, str) else list(value)


def _num_workers(value: Any) -> int:
    """The number of workers; -1 means one per core that this process may use. Raises ConfigError."""
    if value == -1 and not isinstance(value, bool):
        return usable_cores()
    return at_least("n_jobs", value, 1)


def tune_command(arguments: argparse.Namespace) -> int:
    """Run the study; with --dry_run only print what it would search."""
    refuse_many_processes("a study")
    options = study_options(arguments)
    if arguments.dry_run:
        print_product(f"{options.space.describe()}\n")
        return 0
    with phase("importing the program"):
        from research_eval.studies.tune import tune

    return tune(options, arguments.timeout, arguments.quiet)
