"""`goe benchmark`: one comparison on many tasks, with a ledger, so that a stopped one continues.

goe benchmark smoke
goe benchmark my_suite.json --out results/my_suite
goe benchmark smoke --verify
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_eval.cli.common import DB_HELP, add_flag
from research_eval.cli.compare import print_checked
from research_eval.cli.launching import add_launch_flags, workers_of
from research_eval.cli.match import model_names
from research_eval.errors import ConfigError
from research_eval.files import file_stem, write_atomically
from research_eval.system.best_effort import print_product
from research_eval.system.phases import import_torch, phase
from research_eval.system.untrusted import user_path
from research_eval.system.world import refuse_many_processes

if TYPE_CHECKING:
    from research_eval.comparing.protocol import Place, Plan
    from research_eval.comparing.suite import Suite, Task
    from research_eval.config.sections import ExperimentConfig

log = logging.getLogger(__name__)

DESCRIPTION = "compare models on all tasks of a suite"
FOLDER = "benchmarks"
CERTIFICATE = "certificate.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe benchmark`."""
    parser.add_argument("name", metavar="NAME", help="a suite of the program, such as smoke, or a suite file")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="models to compare, in place of the suite's own")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks of the suite")
    parser.add_argument("--out", metavar="DIR", help=f"folder for the results (default: {FOLDER}/NAME)")
    add_flag(parser, "data_dir", metavar="PATH", help="folder with the data sets of tasks that need files")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)
    add_launch_flags(parser)
    add_flag(
        parser,
        "allow_drift",
        action="store_true",
        help="keep results of another code, config or data than there is now",
    )
    parser.add_argument("--verify", action="store_true", help="train a random cell again and check its score")
    parser.add_argument("--cells", type=int, default=1, metavar="N", help="how many cells --verify trains (default 1)")
    add_flag(parser, "quiet", action="store_true", help="print the tables only")


def benchmark_command(arguments: argparse.Namespace) -> int:
    """Do the tasks that are not done, then print and write the tables. Exit code 1 if a task failed."""
    refuse_many_processes("a suite")
    workers = workers_of(arguments)
    import_torch()
    with phase("importing the program"):
        from research_eval.comparing.certificate import read_certificate
        from research_eval.comparing.protocol import Place
        from research_eval.comparing.suite import (
            Ledger,
            aggregate_table,
            carry_out,
            code_sha256,
            read_suite,
            task_table,
        )
        from research_eval.comparing.whole import check_out
    suite = read_suite(arguments.name)
    if arguments.models is not None:
        suite = suite.model_copy(update={"models": model_names(arguments.models)})
    tasks = _chosen(suite, arguments.tasks)
    out = user_path(arguments.out or f"{FOLDER}/{file_stem(suite.name)}", "--out")
    folders = {name: out / file_stem(name) for name in tasks}
    if arguments.verify:
        return _verify(folders, arguments)
    with phase("checking the suite"):
        configs = {name: _config(task, arguments.data_dir) for name, task in tasks.items()}
        for config in configs.values():
            _plan(suite, config)
        check_out(out)
    ledger = Ledger(out)
    for name, folder in folders.items():
        if ledger.is_done(name) and not (folder / CERTIFICATE).is_file():
            log.warning("%s: its certificate is gone, so it is done again", name)
            ledger.forget(name)
    code = code_sha256()

    def fingerprint(name: str) -> dict[str, str]:
        return {"code": code, **_fingerprint(suite, tasks[name], configs[name])}

    def work(name: str) -> None:
        _compare(suite, configs[name], folders[name], Place(arguments.db, workers))

    failed = carry_out(list(tasks), ledger, fingerprint, work, arguments.allow_drift)
    certificates = {
        name: read_certificate(folder / CERTIFICATE)
        for name, folder in folders.items()
        if (folder / CERTIFICATE).is_file() and name not in failed
    }
    if certificates:
        families = {name: tasks[name].family for name in certificates}
        tables = [task_table(certificates), aggregate_table("All tasks", certificates, families)]
        _write(out, suite, tables)
        print_product("\n\n".join(table.text() for table in tables) + f"\n{out / 'report.html'}\n")
    return 1 if failed else 0


def _chosen(suite: Suite, names: list[str] | None) -> dict[str, Task]:
    """The tasks by name. Raises ConfigError for a name that the suite does not have."""
    known = {task.name: task for task in suite.tasks}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ConfigError(f"--tasks: {suite.name} has no task {unknown[0]!r}; there are {', '.join(known)}")
    return {name: task for name, task in known.items() if names is None or name in names}


def _config(task: Task, data_dir: str | None) -> ExperimentConfig:
    """The checked config of a task. Raises ConfigError."""
    from research_eval.config.check import config_from_dict

    config: dict[str, Any] = {"model_type": "dense", "experiment_name": task.name, **task.config}
    given = config.get("dataset_params", {})
    if data_dir is not None and config.get("dataset_type") != "synthetic" and isinstance(given, dict):
        config["dataset_params"] = {"data_dir": data_dir, **given}
    return config_from_dict(config, source=f"task {task.name}")


def _fingerprint(suite: Suite, task: Task, config: ExperimentConfig) -> dict[str, str]:
    """What the ledger compares: the config with the plan, and the content of the data."""
    from research_eval.comparing.suite import config_sha256
    from research_eval.datasets.providers import load_splits

    data = load_splits(config.dataset_type, config.dataset_name, config.dataset_params, config.seed)
    content = json.dumps(data.fingerprint.get("sha256"), sort_keys=True)
    return {"config": config_sha256(suite, task, config.to_dict()), "data": content}


def _compare(suite: Suite, config: ExperimentConfig, folder: Path, place: Place) -> None:
    """One task of the suite."""
    from research_eval.comparing.whole import Report, compare_and_report

    report = Report(folder, suite.margin, suite.solved_at)
    compare_and_report(config, _plan(suite, config), report, place)


def _plan(suite: Suite, config: ExperimentConfig) -> Plan:
    """What a task of the suite compares. Raises ConfigError for a model that is not known."""
    from research_eval.comparing.protocol import Plan
    from research_eval.registry import models_for

    known = models_for(config.task_name)
    for name in suite.models or ():
        known.get_or_explain(name)
    return Plan(
        suite.models or [name for name in sorted(known) if name not in suite.exclude],
        suite.axis,
        suite.tol,
        suite.seeds,
        suite.tuning,
        suite.tuning_seeds,
        suite.max_lengthened,
        suite.controls,
        suite.confirm,
    )


def _write(out: Path, suite: Suite, tables: list[Any]) -> None:
    """The tables of all tasks, for people."""
    from research_eval.comparing.report import page

    title = f"Suite {suite.name}"
    write_atomically(out / "table.md", ("\n\n".join(table.markdown() for table in tables) + "\n").encode())
    write_atomically(out / "table.tex", ("\n\n".join(table.latex() for table in tables) + "\n").encode())
    write_atomically(out / "report.html", page(title, tables).encode())


def _verify(folders: dict[str, Path], arguments: argparse.Namespace) -> int:
    """Train random cells of tasks that are done again. Exit code 1 if one does not hold."""
    from research_eval.comparing.certificate import verify

    if arguments.cells < 1:
        raise ConfigError(f"--cells: expected at least 1, got {arguments.cells}")
    done = [(name, folder / CERTIFICATE) for name, folder in folders.items() if (folder / CERTIFICATE).is_file()]
    if not done:
        raise ConfigError(f"--verify: no task of {arguments.name} is done. Run the suite first, or give its --out.")
    code = 0
    for _ in range(arguments.cells):
        name, path = random.choice(done)  # noqa: S311 - which cell, no secret
        code = max(code, print_checked(verify(path, 1, arguments.quiet), f"{name}, "))
    return code
