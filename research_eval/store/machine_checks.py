"""Checks of `goe doctor` that concern the machine: packages, threads, GPU, disk space, permissions.

Each check takes the name of the database, as the user gave it, and returns one finding. None of them changes anything
or imports torch, so the command answers at once and works in a broken installation too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

from packaging.requirements import Requirement
from sqlalchemy.engine import make_url

from research_eval.errors import ConfigError
from research_eval.files import RUNS_FOLDER
from research_eval.store.connection import database_url
from research_eval.store.csv_file import CSV_FILE
from research_eval.store.findings import OK, PROBLEM, WARNING, Finding, first_of
from research_eval.system.environment import direct_requirements, usable_cores

LITTLE_SPACE, NO_SPACE = 10**9, 10**8  # bytes


def packages(_db: str | None = None) -> Finding:
    """Whether every direct dependency is installed in a version that the project accepts."""
    wrong = []
    requirements = [Requirement(text) for text in direct_requirements()]
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} is needed, {version} is here")
    if wrong:
        return Finding(PROBLEM, "packages", f"{first_of(wrong)}. Run `pip install -r requirements.txt`.")
    return Finding(OK, "packages", f"{len(requirements)} as required, Python {platform.python_version()}")


def threads(_db: str | None = None) -> Finding:
    """Whether OMP_NUM_THREADS asks for more threads than this process has cores.

    Threads that share a core wait for each other in every operation. A container may allow fewer cores than the
    machine has, so the allowed ones are counted.
    """
    usable = usable_cores()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > usable:
        text = f"OMP_NUM_THREADS is {asked}, and {usable} cores may be used: training will be slow. Make it smaller."
        return Finding(WARNING, "threads", text)
    return Finding(OK, "threads", f"{usable} cores may be used" + (f", {asked} threads asked for" if asked else ""))


def gpu(_db: str | None = None) -> Finding:
    """Whether the build of torch fits the devices. Both are read from files: importing torch takes seconds."""
    try:
        build = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Finding(PROBLEM, "gpu", "torch is missing. Run `pip install -r requirements.txt`.")
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if not devices:
        return Finding(OK, "gpu", f"no NVIDIA device; torch {build}")
    if build.endswith("+cpu"):
        return Finding(WARNING, "gpu", f"{len(devices)} NVIDIA devices, but torch {build} cannot use them")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding(WARNING, "gpu", f"{len(devices)} NVIDIA devices, hidden by CUDA_VISIBLE_DEVICES: unset it")
    return Finding(OK, "gpu", f"{len(devices)} NVIDIA devices, torch {build}")


def disk_space(db: str | None = None) -> Finding:
    """Free space in the working directory and in the folder of the database; the smaller one counts."""
    free = {folder: shutil.disk_usage(folder).free for folder in _folders(db)}
    folder = min(free, key=lambda name: free[name])
    text = f"{free[folder] / 1e9:,.1f} GB free in {folder}"
    if free[folder] < NO_SPACE:
        return Finding(PROBLEM, "disk space", f"{text}: make room, or runs will fail")
    if free[folder] < LITTLE_SPACE:
        return Finding(WARNING, "disk space", f"{text}: a few checkpoints fill it")
    return Finding(OK, "disk space", text)


def permissions(db: str | None = None) -> Finding:
    """Whether database, runs and the CSV file can be written."""
    file = sqlite_file(db)
    places = [*_folders(db), RUNS_FOLDER, Path(CSV_FILE), *([] if file is None else [file])]
    closed = [str(place) for place in places if place.exists() and not os.access(place, os.W_OK)]
    if closed:
        return Finding(PROBLEM, "permissions", f"{first_of(closed)} cannot be written: change the permissions")
    return Finding(OK, "permissions", "all folders can be written")


def _folders(db: str | None) -> list[Path]:
    file = sqlite_file(db)
    return [Path.cwd(), *([] if file is None else [file.parent])]


def sqlite_file(db: str | None) -> Path | None:
    """The file of the database; None for PostgreSQL, and if `db` is no name of a database."""
    with contextlib.suppress(ConfigError):
        url = make_url(database_url(db))
        if url.drivername == "sqlite" and url.database:
            return Path(url.database)
    return None
