"""The flags that say where runs are trained: in processes of this machine, or by workers of a launcher."""

from __future__ import annotations

import argparse
import json
import math
import os
from typing import Any

from research_eval.cli.common import add_flag
from research_eval.errors import ConfigError
from research_eval.studies.launchers import LAUNCHERS, STORAGE_VARIABLE, Elsewhere, LauncherName, LaunchOptions
from research_eval.system.phases import import_torch
from research_eval.system.untrusted import parse_json, read_limited, user_path

DEFAULT_STORAGE = "sqlite:///optuna_studies.db"
LAUNCH_FLAGS = ("launcher", "workers", "worker_cpus", "worker_gpus", "launcher_options", "ray_insecure")
MAX_OPTIONS_BYTES = 10**6


def add_launch_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags that say where workers run, and where their queue lies."""
    add_flag(
        parser,
        "storage",
        metavar="URL",
        help=f"Optuna's database (default: ${STORAGE_VARIABLE}, else {DEFAULT_STORAGE})",
    )
    add_flag(parser, "launcher", choices=LAUNCHERS, help="where workers run: here (local), as Slurm jobs, or on Ray")
    add_flag(parser, "workers", type=int, metavar="N", help="workers of the launcher; of local it is --n_jobs")
    add_flag(parser, "worker_cpus", type=float, metavar="N", help="cores of one worker (default 1)")
    add_flag(parser, "worker_gpus", type=float, metavar="N", help="GPUs of one worker (default 0)")
    add_flag(
        parser,
        "launcher_options",
        metavar="FILE",
        help="JSON with options of the engine: parameters of submitit's AutoExecutor (and cluster), or of ray.init",
    )
    add_flag(parser, "ray_insecure", action="store_true", help="use a Ray cluster that takes programs from anyone")


def launch_options(arguments: argparse.Namespace) -> LaunchOptions:
    """Where workers run. Raises ConfigError."""
    name: LauncherName = getattr(arguments, "launcher", None) or "local"
    given = {flag: getattr(arguments, flag, None) for flag in LAUNCH_FLAGS}
    elsewhere = [flag for flag in LAUNCH_FLAGS[2:] if given[flag]]
    if name == "local" and elsewhere:
        raise ConfigError(f"--{elsewhere[0]}: is for --launcher submitit or ray")
    if given["workers"] is not None and getattr(arguments, "n_jobs", None) is not None:
        raise ConfigError("--n_jobs and --workers: give one of them")
    for flag in ("worker_cpus", "worker_gpus"):
        value = given[flag]
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"--{flag}: expected a number of at least 0, got {value}")
    options: Any = {}
    if given["launcher_options"] is not None:
        path = user_path(given["launcher_options"])
        options = parse_json(read_limited(path, MAX_OPTIONS_BYTES, "--launcher_options"), str(path))
        if not isinstance(options, dict):
            raise ConfigError(f"--launcher_options: {path} has to hold a JSON object")
    return LaunchOptions(
        name,
        at_least("workers", 1 if given["workers"] is None else given["workers"], 1),
        1 if given["worker_cpus"] is None else given["worker_cpus"],
        given["worker_gpus"] or 0,
        options,
        bool(given["ray_insecure"]),
    )


def workers_of(arguments: argparse.Namespace) -> Elsewhere | int | None:
    """Where the runs of a command are trained that is no study: so many processes of this machine, or a launcher.

    None leaves the number of processes to the program. Raises ConfigError.
    """
    launch = launch_options(arguments)
    if launch.name == "local":
        if arguments.storage is not None:
            raise ConfigError("--storage: is for --launcher submitit or ray")
        return None if arguments.workers is None else launch.workers
    import_torch()
    from research_eval.store.connection import database_url
    from research_eval.studies.storage import storage_url

    storage = storage_url(arguments.storage or default_storage())
    launch.check(storage, database_url(arguments.db))
    return Elsewhere(storage, launch)


def default_storage() -> str:
    """The storage of a command without --storage."""
    return os.environ.get(STORAGE_VARIABLE) or DEFAULT_STORAGE


def at_least(name: str, value: Any, least: int) -> int:
    """The value, if it is a whole number and not too small. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"--{name}: expected a whole number of at least {least}, got {json.dumps(value, default=str)}"
        )
    return value
