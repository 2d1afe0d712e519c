"""`goe doctor`: checks of the results, the files of the runs and the machine, and repairs of what is safe.

A check returns one finding. A finding that can be repaired without losing anything carries its repair; the database is
backed up before the first one. Nothing that holds results is ever deleted.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import filelock

from research_eval.errors import ConfigError
from research_eval.files import LOCK_FILE, RUNS_FOLDER, SLICES_FOLDER, is_at_work, run_folder
from research_eval.store.backup import back_up
from research_eval.store.connection import database_url
from research_eval.store.findings import OK, PROBLEM, REPAIRED, WARNING, Finding, first_of
from research_eval.store.machine_checks import disk_space, gpu, packages, permissions, sqlite_file, threads
from research_eval.store.pending import merge_pending, pending_files
from research_eval.store.records import DELETED, RunFilter
from research_eval.store.store import Store
from research_eval.store.tables import SCHEMA_VERSION
from research_eval.store.trash import TRASH_FOLDER, size_of, trashed_folders
from research_eval.system.checksum import has_intact_checksum, read_values


def examine(db: str | None = None, repair: bool = False) -> Iterator[Finding]:
    """The findings one after the other; with `repair`, those that can be repaired are repaired first."""
    for check in (packages, threads, gpu, disk_space, permissions):
        yield check(db)
    checks = StoreChecks(db)
    for finding in checks.findings():
        if repair and finding.repair is not None:
            yield from checks.repaired(finding, finding.repair)
        else:
            yield finding


class StoreChecks:
    """The checks of a database and of the runs in this working directory. Each public method is one check.

    A check opens the database for itself and closes it again: a repair between two checks may replace what is in it.
    """

    def __init__(self, db: str | None) -> None:
        self._db = db
        self._file = sqlite_file(db)
        self._is_backed_up = False

    def findings(self) -> Iterator[Finding]:
        """One finding per check; the checks that read the database end with the first one that finds it unusable."""
        database = self.database()
        yield database
        if database.level == OK:
            integrity = self.integrity()
            yield integrity
            if integrity.level == OK:
                schema = self.schema()
                yield schema
                if self._version() == SCHEMA_VERSION:  # asked again: the schema may be repaired by now
                    yield self.pending()
                    yield self.dead_runs()
                    yield self.folders()
                    yield self.trash()
        yield self.temporaries()
        yield self.checkpoints()

    def repaired(self, finding: Finding, repair: Callable[[], str]) -> Iterator[Finding]:
        """Repair after a backup; a repair that fails leaves the finding as a problem."""
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
        """Whether there is a database of ours that answers."""
        try:
            database_url(self._db)
            if self._file is not None and not self._file.exists():
                return Finding(WARNING, "database", f"none at {self._file}: the first run creates it")
            with contextlib.closing(self._unchecked()) as store:
                return Finding(OK, "database", store.location)
        except ConfigError as error:
            return Finding(PROBLEM, "database", str(error))

    def _unchecked(self) -> Store:
        """The store, whatever its schema version. Raises ConfigError if the database has no tables of ours."""
        return Store(self._db, read_only=True, any_version=True)

    def _version(self) -> str | None:
        with self._unchecked() as store:
            return store.schema_version

    def integrity(self) -> Finding:
        """SQLite's own check of every page, and whether metrics and points belong to runs.

        There is no repair: to repair pages is to guess, and it would overwrite what a better tool could still read.
        """
        if self._file is None:
            return Finding(OK, "integrity", "left to the PostgreSQL server")
        try:
            with contextlib.closing(sqlite3.connect(f"{self._file.as_uri()}?mode=ro", uri=True)) as connection:
                found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(5)")]
                orphans = sum(1 for _ in connection.execute("PRAGMA foreign_key_check"))
        except sqlite3.Error as error:
            found, orphans = [str(error)], 0
        if found != ["ok"]:
            text = f"damaged: {first_of(' '.join(line.split()) for line in found)}. Nothing is repaired in it."
            return Finding(PROBLEM, "integrity", f"{text} Restore {self._backups()}.")
        if orphans:
            text = f"{orphans:,} rows belong to no run: another program has deleted runs. Restore {self._backups()}."
            return Finding(PROBLEM, "integrity", text)
        return Finding(OK, "integrity", "every page, every reference")

    def _backups(self) -> str:
        """What the user can restore, as words of a message."""
        assert self._file is not None
        names = sorted(path.name for path in self._file.parent.glob(f"{self._file.stem}.backup-*{self._file.suffix}"))
        return f"a backup (the newest: {names[-1]})" if names else "a copy of your own, or save what `.recover` finds"

    def schema(self) -> Finding:
        """Whether it is the version that this program writes; the repair migrates it.

        A database without a version has the two documented tables that an earlier program made.
        """
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
        """Pending writes of runs that are not at work; the repair stores them.

        They may belong to another database: the file names the run, and the run must be in this one.
        """
        names = [path.stem for path in pending_files() if not is_at_work(path.stem)]
        if not names:
            return Finding(OK, "waiting results", "none")
        with Store(self._db, read_only=True) as store:
            known = store.statuses()
        ours = [name for name in names if name in known]
        if not ours:
            text = f"those of {first_of(names)} are of another database. Run `goe doctor --db` with that one."
            return Finding(WARNING, "waiting results", text)

        def merge() -> str:
            with Store(self._db) as store:
                return f"{merge_pending(store)} of {len(ours)} runs' entered into the database"

        text = f"those of {first_of(ours)} are not in the database yet. Any run enters them, and so does --repair."
        return Finding(WARNING, "waiting results", text, merge)

    def dead_runs(self) -> Finding:
        """Runs that are stored as running although their process has ended; the repair stores what is read anyway.

        A run may be resumed between check and repair. The lock of its folder then keeps the repair away.
        """
        with Store(self._db, read_only=True) as store:
            dead = store.dead_runs()
        if not dead:
            return Finding(OK, "dead runs", "none")

        def interrupt() -> str:
            with Store(self._db) as store:
                done = [name for name in dead if _if_idle(name, partial(store.mark_interrupted, name))]
            return f"{first_of(done)} filed as interrupted; `--resume` continues"

        text = f"{first_of(dead)} filed as running, and no process is at work. "
        return Finding(
            WARNING, "dead runs", f"{text}`--resume` continues them; --repair files them as interrupted.", interrupt
        )

    def folders(self) -> Finding:
        """Rows without a folder and folders without a row.

        There is no repair: a folder without a row holds weights that may be all that is left of a run.
        """
        with Store(self._db, read_only=True) as store:
            known, deleted = store.statuses(), set(_deleted(store))
        found = {path.name for path in _run_folders()}
        without_row = sorted(found - known.keys())
        with_folder = known.keys() - deleted
        without_folder = len(with_folder - found)
        if without_row:
            text = f"{first_of(without_row)} in {RUNS_FOLDER}/ have no row: their results are in another database, "
            return Finding(WARNING, "folders", f"{text}or lost. Nothing is deleted.")
        if without_folder:
            text = (
                f"{without_folder:,} of {len(with_folder):,} runs have no folder in {RUNS_FOLDER}/, as after a merge."
            )
            return Finding(WARNING, "folders", f"{text} They cannot be resumed or used by `goe predict` here.")
        return Finding(OK, "folders", f"each of {len(with_folder):,} runs has its own")

    def trash(self) -> Finding:
        """How many runs are deleted, and how much room their folders take."""
        with Store(self._db, read_only=True) as store:
            deleted = _deleted(store)
        folders = trashed_folders()
        if not deleted and not folders:
            return Finding(OK, "trash", "empty")
        runs = f"{len(deleted):,} deleted run{'s' * (len(deleted) != 1)}"
        text = f"{runs}, {size_of(folders) / 1e6:,.1f} MB in {TRASH_FOLDER}/"
        others = sum(folder.name not in deleted for folder in folders)
        if others:
            text += f", {others:,} of its folders of another database"
        return Finding(OK, "trash", f"{text}. `goe runs delete --purge` empties it.")

    def temporaries(self) -> Finding:
        """Files that a crash left half-written; the temporary files of a run at work are in use."""
        left = [path for folder in _run_folders() if not is_at_work(folder.name) for path in _temporaries(folder)]
        if not left:
            return Finding(OK, "temporary files", "none left behind")

        def remove() -> str:
            num_files = 0
            for path in left:
                with contextlib.suppress(FileNotFoundError):
                    num_files += _if_idle(path.relative_to(RUNS_FOLDER).parts[0], partial(_unlink, path))
            return f"{num_files} removed"

        text = f"{first_of(map(str, left))} left by a crash; --repair removes"
        return Finding(WARNING, "temporary files", text, remove)

    def checkpoints(self) -> Finding:
        """The checksum in every safetensors file; files of earlier versions have none. No slice may be missing."""
        damaged, lacking, without, num_files, num_bytes = [], [], 0, 0, 0
        for path in (path for folder in _run_folders() for path in _tensor_files(folder)):
            try:
                size, intact, lost = path.stat().st_size, has_intact_checksum(path), _lost_slices(path)
            except FileNotFoundError:
                continue  # a run at work has just replaced it
            except (OSError, ValueError):
                size, intact, lost = 0, False, []
            num_files, num_bytes, without = num_files + 1, num_bytes + size, without + (intact is None)
            if intact is False:
                damaged.append(str(path))
            elif lost and not is_at_work(path.parent.name):  # a run at work replaces the file and its slices in turn
                lacking.append(f"{path} lacks {first_of(lost)}")
        wrong = [
            f"{len(names)} of {num_files} {what}: {first_of(names)}"
            for names, what in ((damaged, "damaged"), (lacking, "without a slice"))
            if names
        ]
        if wrong:
            text = f"{'; '.join(wrong)}. Move them away; `--resume` takes the"
            return Finding(PROBLEM, "checkpoints", f"{text} checkpoint before, or run the experiment again.")
        older = f", {without} of an earlier version have none" if without else ""
        return Finding(OK, "checkpoints", f"{num_files} files, {num_bytes / 1e6:,.1f} MB, checksums fit{older}")


def _deleted(store: Store) -> list[str]:
    """The ids of the deleted runs."""
    return [row["experiment_id"] for row in store.find_runs(RunFilter(view=DELETED))]


def _run_folders() -> list[Path]:
    """The folders of runs in the working directory; links are not followed."""
    if RUNS_FOLDER.is_symlink() or not RUNS_FOLDER.is_dir():
        return []
    folders = (path for path in RUNS_FOLDER.iterdir() if not path.name.startswith("."))
    return sorted(path for path in folders if path.is_dir() and not path.is_symlink())


def _tensor_files(folder: Path) -> list[Path]:
    """The checkpoints and models of a run, and the slices of checkpoints; links are not followed."""
    places = [place for place in (folder, folder / SLICES_FOLDER) if not place.is_symlink()]
    files = (path for place in places for path in sorted(place.glob("*.safetensors")))
    return [path for path in files if path.is_file() and not path.is_symlink()]


def _lost_slices(path: Path) -> list[str]:
    """The slices that a checkpoint names and that are not there."""
    names = read_values(path).get("slices")
    there = {file.name for file in _tensor_files(path.parent)}
    return sorted({str(name) for name in names} - there) if isinstance(names, list) else []


def _temporaries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.tmp") if path.is_file() and not path.is_symlink())


def _unlink(path: Path) -> bool:
    path.unlink()
    return True


def _if_idle(name: str, action: Callable[[], bool]) -> bool:
    """The result of the action, executed under the lock of the run's folder; False if a process works in the folder.

    The lock keeps a process from resuming the run meanwhile. A run without a folder here needs none.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ConfigError):  # an id that is no name of a folder
            if (folder := run_folder(name)).is_dir():
                try:
                    stack.enter_context(filelock.FileLock(folder / LOCK_FILE, timeout=0))
                except filelock.Timeout:
                    return False
        return action()
