"""`goe run`: one experiment from a JSON config, or one per seed.

    goe run --json_config_path examples/configs/quickstart.json --seeds 0-4

Flags such as --epochs replace values of the file; a log line says so for each of them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from research_eval.cli.common import DB_HELP, add_flag
from research_eval.cli.launching import add_launch_flags, workers_of
from research_eval.errors import ConfigError
from research_eval.registry import NEXT_TOKEN
from research_eval.store.data_facts import SHORT_NAMES, baseline_score
from research_eval.store.metrics import DEFAULT_METRIC, with_remark
from research_eval.system.best_effort import attempted, print_product
from research_eval.system.phases import import_torch, phase
from research_eval.system.untrusted import parse_json
from research_eval.system.world import rank_and_size, refuse_many_processes
from research_eval.wording import nearest

if TYPE_CHECKING:
    from research_eval.config.sections import ExperimentConfig
    from research_eval.experiment import Result

log = logging.getLogger(__name__)

DESCRIPTION = "run one experiment from a JSON config"
MAX_SEEDS = 10_000
# Flag -> the key of the config whose value it replaces.
OVERRIDES = {
    "epochs": "epochs",
    "batch_size": "batch_size",
    "seed": "seed",
    "device": "training_params.device",
    "precision": "training_params.precision",
    "data_dir": "dataset_params.data_dir",
}
NEAR_KEY = 0.75  # similarity of an unknown flag and the key that the message names
RUN_ONLY = ("seeds", "resume", "baselines")  # flags that a study does not have
SECTION_KEY = re.compile(r"--((?:dataset|model|optimizer|scheduler|training)_params\.\w+)(=.*)?", re.DOTALL)
CLASS_SCORES = {  # metric -> format, for tasks with classes
    "final_val_f1": "{:.4f}",
    "final_val_acc": "{:.4f}",
    "final_val_loss": "{:.4f}",
    "test_f1": "{:.4f}",
}
SHOWN_METRICS = {
    "param_count": "{:,.0f}",
    "active_param_count": "{:,.0f}",
    "inference_flops_per_sample": "{:,.0f}",
    "inference_latency_ms_batch": "{:.2f}",
    "training_duration_seconds": "{:.1f}",
    "mean_path_length": "{:.2f}",
}
SHOWN_PATHS = 5
SECONDS_FOR_THE_FIRST = 10.0  # of several processes, to say what is wrong


def add_common_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags that experiments and studies share."""
    add_flag(parser, "epochs", type=int, help="passes over the training split (default: the file's; in a study 10)")
    add_flag(parser, "batch_size", type=int, help="samples per batch (default: the file's; in a study 32)")
    add_flag(parser, "data_dir", metavar="PATH", help="a local copy of the data set: a folder, or one file")
    add_flag(parser, "seed", type=int, help="replaces the file's seed; in a study the seed of all trials (default 0)")
    add_flag(parser, "device", help="auto, cpu, cuda, cuda:N or mps")
    add_flag(parser, "precision", choices=["fp32", "tf32", "bf16"], help="tf32: for CUDA; bf16: mixed precision")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)
    add_flag(
        parser,
        "set",
        action="append",
        metavar="KEY=VALUE",
        help="replaces any value of the file, such as optimizer_params.lr=1e-3; may be given again. A study fixes it",
    )
    add_flag(parser, "dry_run", action="store_true", help="check and describe, do not train")
    add_flag(parser, "quiet", action="store_true", help="print the final result only")


def add_run_arguments(parser: argparse._ActionsContainer, required: bool = True) -> None:
    """Add the flags of one experiment."""
    add_flag(parser, "json_config_path", metavar="FILE", required=required, help="the experiment (JSON with comments)")
    add_flag(parser, "seeds", metavar="A-B", help="one run per seed, such as 0-4 or 0,2,5")
    add_flag(
        parser,
        "baselines",
        action="store_true",
        help="first fit TF-IDF + logistic regression to the same texts; all later runs show its scores beside theirs",
    )
    add_flag(
        parser,
        "resume",
        action="store_true",
        help="continue the newest run of the same config; with more --epochs a finished one too",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe run`."""
    add_run_arguments(parser)
    add_common_arguments(parser)
    add_launch_flags(parser)


def with_keys_as_sets(argv: Sequence[str]) -> list[str]:
    """The words of a command line, with `--optimizer_params.lr 1e-3` as `--set optimizer_params.lr=1e-3`."""
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        match = SECTION_KEY.fullmatch(word)
        if match is None:
            words.append(word)
        else:
            value = match[2] if match[2] is not None else "=" + next(rest, "")
            words.append(f"--set={match[1]}{value}")
    return words


def key_for(flag: str, flags: Sequence[str] = ()) -> str | None:
    """For the message about an unknown flag: how to give the key of the config that has its name.

    A key with a similar name counts too, unless one of the known `flags` is more similar.
    """
    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    keys = _keys_of_configs()
    found = name if name in keys else nearest(name, [*keys, *flags], NEAR_KEY)
    if found not in keys or (found != name and found in flags):
        return None
    what = "It is a key of the config" if found == name else f"The config has a key {found!r}"
    return f" {what}: write it into the file, or give --set {keys[found]}=VALUE."


def _keys_of_configs() -> dict[str, str]:
    """Name -> dotted key, for the top level, all models and all data; of equal names the first."""
    from research_eval.config.sections import ExperimentConfig, OptimizerParams, SchedulerParams, TrainingParams
    from research_eval.config.signatures import MODEL_PROVIDED, signature_model, spellings_of
    from research_eval.datasets.kinds import DATASET_KINDS
    from research_eval.registry import LANGUAGE_MODELS, MODELS_MAP

    spellings: list[tuple[str, Iterable[str]]] = [
        ("optimizer_params.", OptimizerParams.model_fields),
        ("scheduler_params.", SchedulerParams.model_fields),
        ("training_params.", TrainingParams.model_fields),
        ("", ExperimentConfig.model_fields),
    ]
    with contextlib.suppress(ConfigError):  # a bad extension: its own command says so
        spellings += [
            ("model_params.", spellings_of(signature_model(cls, MODEL_PROVIDED)))
            for models in (MODELS_MAP, LANGUAGE_MODELS)
            for cls in models.values()
        ]
        for kind in (make() for make in DATASET_KINDS.values()):
            models = [signature_model(kind.constructor(name), kind.provided) for name in kind.names()]
            spellings += [("dataset_params.", spellings_of(model)) for model in models]
    return {name: f"{section}{name}" for section, names in reversed(spellings) for name in names}


def with_sets(
    overrides: Mapping[str, Any], words: Sequence[str] | None, taken: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of flags with those of --set, and what messages call the latter.

    Raises ConfigError if another flag gives the same key; `taken` are further keys of such flags.
    """
    sets = parse_sets(words or ())
    for key in sets:
        if key in overrides or key in taken:
            raise ConfigError(f"--set: {key} is given by another flag too: drop one")
    return {**overrides, **sets}, {key: f"--set {key}" for key in sets}


def parse_sets(words: Sequence[str]) -> dict[str, Any]:
    """The values of --set by their keys. A value is JSON, or else text. Raises ConfigError."""
    found: dict[str, Any] = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not all(key.split(".")) or key.count(".") > 1:
            raise ConfigError(f"--set: expected KEY=VALUE such as optimizer_params.lr=1e-3, got {word!r}")
        if key in found:
            raise ConfigError(f"--set: {key} is given twice")
        found[key] = _value_of(text)
    return found


def _value_of(text: str) -> Any:
    try:
        return parse_json(text.encode(), "--set")
    except ConfigError:  # not JSON: text without its quotes
        return text


def parse_seeds(text: str) -> list[int]:
    """The seeds of a range such as "0-4" or a list such as "0,2,5", each once. Raises ConfigError."""
    try:
        seeds: list[int] = []
        for part in text.split(","):
            first, dash, last = part.partition("-")
            seeds += range(int(first), int(last if dash else first) + 1)[: MAX_SEEDS + 1]
    except ValueError:
        seeds = []
    if not 0 < len(seeds) <= MAX_SEEDS:
        raise ConfigError(f"--seeds: expected a range such as 0-4 or a list such as 0,2,5, got {text!r}")
    return list(dict.fromkeys(seeds))


def run_command(arguments: argparse.Namespace) -> int:
    """Run the experiment with every seed and print a summary of each run.

    Exit code 0; 1 for a run that failed or diverged; 128 + the number of a signal that stopped a run. Of several
    processes that train together, the first one speaks for all.
    """
    rank, _ = rank_and_size()
    if rank == 0:
        return _run(arguments)
    logging.getLogger("research_eval").setLevel(logging.ERROR)
    try:
        return _run(arguments)
    except ConfigError as error:
        time.sleep(SECONDS_FOR_THE_FIRST)  # if the first process has the same problem, torchrun ends this one meanwhile
        raise ConfigError(f"process {rank}: {error}") from error


def _run(arguments: argparse.Namespace) -> int:
    """What `run_command` does in one process."""
    from research_eval.config.check import check_early, load_config

    overrides = {
        key: getattr(arguments, name) for name, key in OVERRIDES.items() if getattr(arguments, name) is not None
    }
    if arguments.seeds is not None and arguments.seed is not None:
        raise ConfigError("--seed and --seeds: give one of them")
    overrides, origins = with_sets(overrides, arguments.set, ["seed"] if arguments.seeds is not None else [])
    seeds = [None] if arguments.seeds is None else parse_seeds(arguments.seeds)
    check_early(arguments.json_config_path, overrides, needs_data=not arguments.resume)
    workers = workers_of(arguments)
    import_torch()
    with phase("checking the config"):
        configs = [
            load_config(arguments.json_config_path, overrides | ({} if seed is None else {"seed": seed}), origins)
            for seed in seeds
        ]
    for key, value in overrides.items():
        log.info("%s = %r from the command line replaces the file's value", key, value)
    if arguments.baselines:
        from research_eval.datasets.kinds import dataset_kind

        dataset_kind(configs[0].dataset_type).fit_baselines(configs[0].dataset_name, configs[0].dataset_params)
    if arguments.dry_run:
        from research_eval.runs.dry_run import describe

        print_product(f"{describe(configs[0])}\n")
        return 0
    rank, num_processes = rank_and_size()
    if num_processes > 1:
        if len(configs) > 1:
            refuse_many_processes("--seeds")
        return _run_together(configs[0], arguments, is_first=rank == 0)
    with phase("importing the program"):
        from research_eval.studies.seeds import run_all

    # The results come one by one. After a stopped run there are none for the seeds that follow it.
    exit_code = 0
    results = run_all(configs, db=arguments.db, resume=arguments.resume, quiet=arguments.quiet, workers=workers)
    for config, result in results:
        exit_code = max(exit_code, result.exit_code)
        with attempted(log, f"run {result.experiment_id}: {result.status}, but its summary is not printed"):
            print(summary(config, result))
    return exit_code


def _run_together(config: ExperimentConfig, arguments: argparse.Namespace, is_first: bool) -> int:
    """Run the experiment in all processes of torchrun; the first one stores it and prints its summary."""
    with phase("importing the program"):
        from research_eval.experiment import run
        from research_eval.runs.group import follow, lead

    if not is_first:
        follow(config)
        return 0
    result = lead(
        config,
        lambda group: run(config, db=arguments.db, resume=arguments.resume, quiet=arguments.quiet, parallel=group),
    )
    with attempted(log, f"run {result.experiment_id}: {result.status}, but its summary is not printed"):
        print(summary(config, result))
    return result.exit_code


def score_formats(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The scores of a run to show, with their formats. Without F1: all scores of its task on validation and on test."""
    if DEFAULT_METRIC in metrics:
        return CLASS_SCORES
    final = [
        name for name, value in metrics.items() if name.startswith("final_val_") and isinstance(value, int | float)
    ]
    scores = [name.removeprefix("final_val_") for name in final if name != "final_val_loss"]
    on_validation = dict.fromkeys((f"final_val_{score}" for score in scores), "{:.4g}")
    on_test = dict.fromkeys((f"test_{score}" for score in scores), "{:.4g}")
    return {**on_validation, "final_val_loss": "{:.4f}", **on_test}


def _beside(result: Result, metric: str, form: str, width: int) -> str:
    """The scores of the baselines in this metric, to be printed after a value of `width` characters."""
    found = {name: baseline_score(scores, metric) for name, scores in result.baselines.items()}
    texts = [f"{SHORT_NAMES[name]} {form.format(value)}" for name, value in found.items() if value is not None]
    return f"{' ' * max(1, 9 - width)}({', '.join(texts)})" if texts else ""


def summary(config: ExperimentConfig, result: Result) -> str:
    """The lines that a run prints at its end."""
    lines = [
        f"{config.experiment_name} ({config.model_type} on {config.dataset_name}, seed {config.seed}): {result.status}"
    ]
    if result.error:
        lines.append(f"  {result.error}")
    # A model without routes has no path length, and a run without a test split no test score.
    for name, form in {**score_formats(result.metrics), **SHOWN_METRICS}.items():
        if name in result.metrics:
            text = with_remark(form.format(result.metrics[name]), name, result.metrics)
            lines.append(f"  {name:<28} {text}{_beside(result, name, form, len(text))}")
    paths = [] if config.task_name == NEXT_TOKEN else result.metrics.get("common_paths", [])  # of blocks: no news
    for path, count in paths[:SHOWN_PATHS]:
        lines.append(f"  {count:6d} samples took {' -> '.join(['start', *map(str, path), 'stop'])}")
    lines.append(f"  run {result.experiment_id} in {result.folder}")
    return "\n".join(lines)
