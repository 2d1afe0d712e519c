"""`goe doctor`: whether the results, the files of the runs and the environment are sound, and repairs of what is safe.

A check gives one finding. What can be repaired without losing anything carries its repair; the database is backed up
before the first one. Nothing that holds results is ever deleted.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import filelock
from packaging.requirements import Requirement
from sqlalchemy.engine import make_url

from research_eval.db_utils import SCHEMA_VERSION, Store, back_up, database_url
from research_eval.errors import ConfigError
from research_eval.files import LOCK_FILE, RUNS_FOLDER, is_at_work, run_folder
from research_eval.spool import CSV_FILE, merge_pending, waiting
from research_eval.system.checksum import has_intact_checksum
from research_eval.system.environment import direct_requirements

log = logging.getLogger(__name__)

OK, WARNING, PROBLEM, REPAIRED = "ok", "warning", "problem", "repaired"
LITTLE_SPACE, NO_SPACE = 10**9, 10**8  # bytes
SHOWN = 3  # names on a line


@dataclass(frozen=True)
class Finding:
    """What a check has found, and what to do; `repair` says what it did."""

    level: str
    check: str
    text: str
    repair: Callable[[], str] | None = None

    def __str__(self) -> str:
        return f"{self.level:<8}  {self.check}: {self.text}"


def examine(db: str | None = None, repair: bool = False) -> Iterator[Finding]:
    """The findings, in turn; with `repair` those that could be repaired are."""
    for check in (packages, threads, gpu, disk_space):
        yield check(db)
    yield permissions(db)
    patient = Patient(db)
    for finding in patient.findings():
        if repair and finding.repair is not None:
            yield from patient.repaired(finding, finding.repair)
        else:
            yield finding


# --- Environment ------------------------------------------------------------------------------------------------------


def packages(_db: str | None = None) -> Finding:
    """Whether every direct dependency is there, in a version that was asked for."""
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
        return Finding(PROBLEM, "packages", f"{_some(wrong)}. Run `pip install -r requirements.txt`.")
    return Finding(OK, "packages", f"{len(requirements)} as required, Python {platform.python_version()}")


def threads(_db: str | None = None) -> Finding:
    """Whether OMP_NUM_THREADS asks for more than this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > usable:
        text = f"OMP_NUM_THREADS is {asked}, and {usable} cores may be used: training will be slow. Make it smaller."
        return Finding(WARNING, "threads", text)
    return Finding(OK, "threads", f"{usable} cores may be used" + (f", {asked} threads asked for" if asked else ""))


def gpu(_db: str | None = None) -> Finding:
    """What the files of the driver and of the torch package say; torch itself is not loaded."""
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
    """Room below the working directory and beside the database."""
    free = {folder: shutil.disk_usage(folder).free for folder in _folders(db)}
    folder = min(free, key=lambda name: free[name])
    text = f"{free[folder] / 1e9:,.1f} GB free in {folder}"
    if free[folder] < NO_SPACE:
        return Finding(PROBLEM, "disk space", f"{text}: make room, or runs will fail")
    if free[folder] < LITTLE_SPACE:
        return Finding(WARNING, "disk space", f"{text}: a few checkpoints fill it")
    return Finding(OK, "disk space", text)


def permissions(db: str | None = None) -> Finding:
    """Whether results, runs and the CSV file can be written."""
    file = _sqlite_file(db)
    places = [*_folders(db), RUNS_FOLDER, Path(CSV_FILE), *([] if file is None else [file])]
    closed = [str(place) for place in places if place.exists() and not os.access(place, os.W_OK)]
    if closed:
        return Finding(PROBLEM, "permissions", f"{_some(closed)} cannot be written: change the permissions")
    return Finding(OK, "permissions", "all folders can be written")


def _folders(db: str | None) -> list[Path]:
    file = _sqlite_file(db)
    return [Path.cwd(), *([] if file is None else [file.parent])]


def _sqlite_file(db: str | None) -> Path | None:
    """The file of the database; None for PostgreSQL, and where `db` is no name of a database."""
    with contextlib.suppress(ConfigError):
        url = make_url(database_url(db))
        if url.drivername == "sqlite" and url.database:
            return Path(url.database)
    return None


# --- Database and runs ------------------------------------------------------------------------------------------------


class Patient:
    """A database and the runs of this working directory. What is not asked for again is read once."""

    def __init__(self, db: str | None) -> None:
        self._db = db
        self._file = _sqlite_file(db)
        self._is_backed_up = False

    def findings(self) -> Iterator[Finding]:
        """One per check; those that need the database end where it is not sound."""
        database = self.database()
        yield database
        if database.level == OK:
            integrity = self.integrity()
            yield integrity
            if integrity.level == OK:
                schema = self.schema()
                yield schema
                if self._version() == SCHEMA_VERSION:
                    yield self.pending()
                    yield self.dead_runs()
                    yield self.folders()
        yield self.temporaries()
        yield self.checkpoints()

    def repaired(self, finding: Finding, repair: Callable[[], str]) -> Iterator[Finding]:
        """Do it, after a backup; a repair that fails leaves the finding."""
        try:
            if not self._is_backed_up:
                yield self._back_up()
                self._is_backed_up = True
            yield Finding(REPAIRED, finding.check, repair())
        except (ConfigError, OSError) as error:
            yield Finding(PROBLEM, finding.check, f"{finding.text} (the repair failed: {error})")

    def _back_up(self) -> Finding:
        if self._file is not None and self._file.exists():
            return Finding(OK, "backup", f"the database as it was: {back_up(self._file)}")
        return Finding(WARNING, "backup", "none: use pg_dump" if self._file is None else "there is no database yet")

    # Database

    def database(self) -> Finding:
        """Whether there is one that is ours and that answers."""
        try:
            database_url(self._db)
            if self._file is not None and not self._file.exists():
                return Finding(WARNING, "database", f"none at {self._file}: the first run creates it")
            with contextlib.closing(self._unchecked()) as store:
                return Finding(OK, "database", store.location)
        except ConfigError as error:
            return Finding(PROBLEM, "database", str(error))

    def _unchecked(self) -> Store:
        """The store, whatever its schema version. Raises ConfigError where there is nothing of ours."""
        return Store(self._db, read_only=True, any_version=True)

    def _version(self) -> str | None:
        with self._unchecked() as store:
            return store.schema_version

    def integrity(self) -> Finding:
        """SQLite's own check of every page, and whether metrics and points belong to runs."""
        if self._file is None:
            return Finding(OK, "integrity", "left to the PostgreSQL server")
        try:
            with contextlib.closing(sqlite3.connect(f"{self._file.as_uri()}?mode=ro", uri=True)) as connection:
                found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(5)")]
                orphans = sum(1 for _ in connection.execute("PRAGMA foreign_key_check"))
        except sqlite3.Error as error:
            found, orphans = [str(error)], 0
        if found != ["ok"]:
            text = f"damaged: {_some(' '.join(line.split()) for line in found)}. Nothing is repaired in it."
            return Finding(PROBLEM, "integrity", f"{text} Restore {self._backups()}.")
        if orphans:
            text = f"{orphans:,} rows belong to no run: another program has deleted runs. Restore {self._backups()}."
            return Finding(PROBLEM, "integrity", text)
        return Finding(OK, "integrity", "every page, every reference")

    def _backups(self) -> str:
        assert self._file is not None
        names = sorted(path.name for path in self._file.parent.glob(f"{self._file.stem}.backup-*{self._file.suffix}"))
        return f"a backup (the newest: {names[-1]})" if names else "a copy of your own, or save what `.recover` finds"

    def schema(self) -> Finding:
        """Whether it is the one that this program writes."""
        version = self._version()
        if version == SCHEMA_VERSION:
            return Finding(OK, "schema", f"version {version}")

        def migrate() -> str:
            with Store(self._db) as store:
                return f"migrated from version {version} to {store.schema_version}"

        text = f"version {version or 'unknown'}, this program needs {SCHEMA_VERSION}. Run `goe init-db` or --repair."
        return Finding(PROBLEM, "schema", text, migrate)

    # Runs

    def pending(self) -> Finding:
        """Results that wait on the disk, of runs that are over."""
        names = [path.stem for path in waiting() if not is_at_work(path.stem)]
        if not names:
            return Finding(OK, "waiting results", "none")
        with Store(self._db, read_only=True) as store:
            known = store.statuses()
        ours = [name for name in names if name in known]
        if not ours:
            text = f"those of {_some(names)} are of another database. Run `goe doctor --db` with that one."
            return Finding(WARNING, "waiting results", text)

        def merge() -> str:
            with Store(self._db) as store:
                return f"{merge_pending(store)} of {len(ours)} runs' entered into the database"

        text = f"those of {_some(ours)} are not in the database yet. Any run enters them, and so does --repair."
        return Finding(WARNING, "waiting results", text, merge)

    def dead_runs(self) -> Finding:
        """Runs that are filed as running and whose process is gone."""
        with Store(self._db, read_only=True) as store:
            gone = store.gone()
        if not gone:
            return Finding(OK, "dead runs", "none")

        def interrupt() -> str:
            with Store(self._db) as store:
                done = [name for name in gone if _unless_at_work(name, partial(store.file_as_interrupted, name))]
            return f"{_some(done)} filed as interrupted; `--resume` goes on"

        text = f"{_some(gone)} filed as running, and no process is at work. `--resume` goes on; --repair files them so."
        return Finding(WARNING, "dead runs", text, interrupt)

    def folders(self) -> Finding:
        """Rows without a folder and folders without a row."""
        with Store(self._db, read_only=True) as store:
            known = store.statuses()
        found = {path.name for path in _run_folders()}
        without_row = sorted(found - known.keys())
        without_folder = len(known.keys() - found)
        if without_row:
            text = (
                f"{_some(without_row)} in {RUNS_FOLDER}/ have no row: their results are in another database, or lost."
            )
            return Finding(WARNING, "folders", f"{text} Nothing is deleted.")
        if without_folder:
            text = f"{without_folder:,} of {len(known):,} runs have no folder in {RUNS_FOLDER}/, as after a merge."
            return Finding(WARNING, "folders", f"{text} They cannot be resumed or used by `goe predict` here.")
        return Finding(OK, "folders", f"each of {len(known):,} runs has its own")

    def temporaries(self) -> Finding:
        """Files of writes that were cut off; those of runs at work are theirs."""
        left = [path for folder in _run_folders() if not is_at_work(folder.name) for path in _temporaries(folder)]
        if not left:
            return Finding(OK, "temporary files", "none left behind")

        def remove() -> str:
            num_files = 0
            for path in left:
                with contextlib.suppress(FileNotFoundError):
                    num_files += bool(_unless_at_work(path.relative_to(RUNS_FOLDER).parts[0], path.unlink, True))
            return f"{num_files} removed"

        return Finding(WARNING, "temporary files", f"{_some(map(str, left))} left by a crash; --repair removes", remove)

    def checkpoints(self) -> Finding:
        """The checksum in every safetensors file."""
        damaged, without, num_files, num_bytes = [], 0, 0, 0
        for folder in _run_folders():
            for path in sorted(folder.glob("*.safetensors")):
                if path.is_symlink() or not path.is_file():
                    continue
                num_files += 1
                try:
                    num_bytes += path.stat().st_size
                    intact = has_intact_checksum(path)
                except FileNotFoundError:
                    continue  # replaced by a run at work
                except (OSError, ValueError):
                    intact = False
                without += intact is None
                if intact is False:
                    damaged.append(str(path))
        if damaged:
            text = f"{len(damaged)} of {num_files} damaged: {_some(damaged)}. Move them away; `--resume` takes the"
            return Finding(PROBLEM, "checkpoints", f"{text} checkpoint before, or run the experiment again.")
        older = f", {without} of an earlier version have none" if without else ""
        return Finding(OK, "checkpoints", f"{num_files} files, {num_bytes / 1e6:,.1f} MB, checksums fit{older}")


def _run_folders() -> list[Path]:
    if RUNS_FOLDER.is_symlink() or not RUNS_FOLDER.is_dir():
        return []
    folders = (path for path in RUNS_FOLDER.iterdir() if not path.name.startswith("."))
    return sorted(path for path in folders if path.is_dir() and not path.is_symlink())


def _temporaries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.tmp") if path.is_file() and not path.is_symlink())


def _unless_at_work(name: str, action: Callable[[], bool | None], result: bool | None = None) -> bool | None:
    """The action while nobody else can begin to work in the run's folder; None where somebody does."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ConfigError):  # an id that is no name of a folder
            if (folder := run_folder(name)).is_dir():
                try:
                    stack.enter_context(filelock.FileLock(folder / LOCK_FILE, timeout=0))
                except filelock.Timeout:
                    return None
        done = action()
        return result if done is None else done


def _some(names: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    listed = list(names)
    more = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")
