"""`goe compare`: models of equal cost, tuned equally, on test rows that no choice has seen.

goe compare reviews.csv --models dense,moe,goe_original --seeds 3 --tuning 4
goe compare examples/configs/quickstart.json --models dense,goe_original --axis flops
goe compare --verify comparisons/reviews/certificate.json
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_eval.cli.common import DB_HELP, add_flag
from research_eval.cli.launching import add_launch_flags, workers_of
from research_eval.cli.match import AXES_HELP, model_names
from research_eval.cli.run import with_sets
from research_eval.errors import ConfigError
from research_eval.files import file_stem
from research_eval.system.best_effort import print_product
from research_eval.system.phases import import_torch, phase
from research_eval.system.untrusted import user_path
from research_eval.system.world import refuse_many_processes
from research_eval.wording import hint

if TYPE_CHECKING:
    from research_eval.comparing.certificate import Checked
    from research_eval.config.sections import ExperimentConfig

DESCRIPTION = "compare models of equal cost, tuned equally, with tests"
FOLDER = "comparisons"
BASE: dict[str, Any] = {  # of a comparison without a config file
    "model_type": "dense",
    "epochs": 4,
    "batch_size": 32,
    "optimizer_params": {"lr": 2e-3},
    "training_params": {"num_threads": 1},
}
TEXTS: dict[str, Any] = {  # in addition where the data are texts: from examples/configs/trec_dense.json, a small set
    "model_params": {"token_dropout": 0.3, "embedding_scale": 0.2, "bigram_buckets": 20_000},
    "scheduler_params": {"name": "cosine_warmup", "warmup_factor": 0.1},
    "training_params": BASE["training_params"] | {"label_smoothing": 0.1},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe compare`."""
    parser.add_argument(
        "task", nargs="?", metavar="TASK_OR_DATA", help="a config (.json), a file or folder of texts, or a task's name"
    )
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="model types, such as dense,moe,goe_original")
    parser.add_argument("--axis", default="flops", metavar="AXIS", help=AXES_HELP)
    parser.add_argument(
        "--tol", type=float, default=0.02, help="largest difference of costs, as a share (default 0.02)"
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="reported runs of each model (default 5)")
    parser.add_argument("--tuning", type=int, default=8, metavar="N", help="trials of each model (default 8)")
    add_flag(parser, "tuning_seeds", type=int, default=1, metavar="N", help="runs of each trial (default 1)")
    add_flag(
        parser,
        "confirm",
        type=int,
        default=2,
        metavar="N",
        help="further runs of the best trial of each model, after the rates and after the other settings (default 2)",
    )
    add_flag(
        parser,
        "max_lengthened",
        type=int,
        default=1,
        metavar="N",
        help="double the training of all models up to N times while a model is still learning at its end (default 1)",
    )
    add_flag(
        parser,
        "controls",
        action="store_true",
        help="also the null arms that models declare, such as the same model with a router that never learns",
    )
    add_flag(parser, "margin", type=float, default=0.01, help="scores that differ by less count as equal (0.01)")
    add_flag(parser, "solved_at", type=float, default=0.99, metavar="SCORE", help="a seed with it has solved the task")
    parser.add_argument("--name", help="names the comparison and its folder (default: the name of the data)")
    parser.add_argument("--out", metavar="DIR", help=f"folder for the results (default: {FOLDER}/NAME)")
    add_flag(parser, "epochs", type=int, help="passes over the training split (default: the file's, else 4)")
    add_flag(parser, "batch_size", type=int, help="samples per batch (default: the file's, else 32)")
    add_flag(parser, "data_dir", metavar="PATH", help="a local copy of the data set: a folder, or one file")
    add_flag(parser, "device", help="auto, cpu, cuda, cuda:N or mps")
    add_flag(parser, "set", action="append", metavar="KEY=VALUE", help="replaces any value of the config")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)
    add_launch_flags(parser)
    parser.add_argument(
        "--verify", metavar="CERTIFICATE", help="train a random cell of an earlier comparison again and check its score"
    )
    parser.add_argument("--cells", type=int, default=1, metavar="N", help="how many cells --verify trains (default 1)")
    add_flag(parser, "quiet", action="store_true", help="print the tables only")


def compare_command(arguments: argparse.Namespace) -> int:
    """Compare, print the tables and write the files; or check a certificate. Exit code 1 if the check fails."""
    refuse_many_processes("a comparison")
    if arguments.verify is not None:
        return _verify(arguments)
    if arguments.task is None or arguments.models is None:
        raise ConfigError("goe compare: give a config, data or a task, and --models such as dense,goe_original")
    overrides, origins = _overrides(arguments)
    workers = workers_of(arguments)
    import_torch()
    with phase("importing the program"):
        from research_eval.comparing.protocol import Place, Plan
        from research_eval.comparing.whole import Report, compare_and_report

    plan = Plan(
        model_names(arguments.models),
        arguments.axis,
        arguments.tol,
        arguments.seeds,
        arguments.tuning,
        arguments.tuning_seeds,
        arguments.max_lengthened,
        arguments.controls,
        arguments.confirm,
    )
    base = _base(arguments, overrides, origins)
    folder = user_path(arguments.out or f"{FOLDER}/{file_stem(base.experiment_name)}", "--out")
    report = Report(folder, arguments.margin, arguments.solved_at)
    tables, paths = compare_and_report(base, plan, report, Place(arguments.db, workers))
    print_product("\n\n".join(table.text() for table in tables) + "\n")
    if not arguments.quiet:
        print_product("".join(f"{path}\n" for path in paths))
    return 0


def _overrides(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of the flags by the keys of the config, and what messages call those of --set."""
    keys = {"epochs": "epochs", "batch_size": "batch_size", "data_dir": "dataset_params.data_dir"}
    keys |= {"device": "training_params.device", "name": "experiment_name"}
    given = {key: getattr(arguments, name) for name, key in keys.items() if getattr(arguments, name) is not None}
    return with_sets(given, arguments.set)


def _base(arguments: argparse.Namespace, overrides: Mapping[str, Any], origins: Mapping[str, str]) -> ExperimentConfig:
    """The config of the first model: from a file, or made for data or for a task. Raises ConfigError."""
    from research_eval.annotations import options_of
    from research_eval.config.check import load_config, parse_config
    from research_eval.datasets.kinds import DATASET_KINDS, dataset_type_of
    from research_eval.registry import MODELS_MAP

    text = str(arguments.task)
    if text.endswith((".json", ".jsonc")) and not _is_list(text):
        return load_config(text, overrides, origins)
    known = [name for kind in DATASET_KINDS.values() for name in kind().names()]
    if text in known:
        made: dict[str, Any] = {"dataset_type": dataset_type_of(text), "dataset_name": text}
    elif os.path.lexists(path := user_path(text, "TASK_OR_DATA")):
        name = path.resolve().name.split(".")[0] or "data"
        made = {"dataset_type": "real_world", "dataset_name": name, "dataset_params": {"data_dir": text}}
    else:
        raise ConfigError(
            f"TASK_OR_DATA: {text!r} is no file, no folder and no known task.{hint(text, known)} "
            "A config ends with .json."
        )
    model_type = model_names(arguments.models)[0]
    config = BASE | made | {"experiment_name": made["dataset_name"], "model_type": model_type}
    if made["dataset_type"] == "real_world":
        known_options = options_of(MODELS_MAP.get_or_explain(model_type))
        config |= TEXTS | {"model_params": {k: v for k, v in TEXTS["model_params"].items() if k in known_options}}
    return parse_config(json.dumps(config), f"the config for {text}", overrides, origins)


def _is_list(text: str) -> bool:
    """Whether a .json file holds rows, and not a config."""
    path = Path(text)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _verify(arguments: argparse.Namespace) -> int:
    """Check a certificate. Exit code 1 if a cell does not hold."""
    if arguments.task is not None or arguments.models is not None:
        raise ConfigError("--verify: the certificate says what was compared: leave TASK_OR_DATA and --models out")
    if arguments.cells < 1:
        raise ConfigError(f"--cells: expected at least 1, got {arguments.cells}")
    path = user_path(arguments.verify, "--verify")
    import_torch()
    with phase("importing the program"):
        from research_eval.comparing.certificate import verify
    return print_checked(verify(path, arguments.cells, arguments.quiet))


def print_checked(found: Sequence[Checked], place: str = "") -> int:
    """A line for each cell that was trained again. Returns the exit code."""
    for one in found:
        interval = "" if one.interval is None else f", interval [{one.interval[0]:.4f}, {one.interval[1]:.4f}]"
        score = "did not finish" if one.repeated is None else f"{one.repeated:.4f}"
        verdict = "the same" if one.is_same else "within the interval" if one.holds else "DOES NOT HOLD"
        if not one.has_same_data:
            verdict = "DOES NOT HOLD: the data are other ones"
        print_product(f"{place}{one.arm} seed {one.seed}: stored {one.stored:.4f}{interval}, now {score}: {verdict}\n")
    return 0 if all(one.holds for one in found) else 1
