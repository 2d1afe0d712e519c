"""Deleting runs, so that nothing is lost: a deleted run is hidden, and its folder lies in `runs/.trash/`.

Both places are changed in an order that a crash may interrupt anywhere: the folder of a deleted run is found in
`runs/.trash/` or still in `runs/`, and `restore` and `purge` accept both.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from research_eval.errors import ConfigError
from research_eval.files import LOCK_FILE, RUNS_FOLDER, run_folder
from research_eval.store.pending import PENDING_FOLDER
from research_eval.store.store import Store

TRASH_FOLDER = RUNS_FOLDER / ".trash"

Row = dict[str, Any]  # of `experiments`


def check_deletable(rows: Sequence[Row]) -> None:
    """Raise ConfigError for a run that is at work, or whose last results have not reached the database yet."""
    for row in rows:
        name = row["experiment_id"]
        if row["status"] == "running":
            raise ConfigError(f"run {name} is running: stop it first. Nothing was deleted.")
        if _places(name) and (PENDING_FOLDER / f"{name}.jsonl").exists():
            raise ConfigError(
                f"run {name}: results of it still wait in {PENDING_FOLDER}: run `goe doctor`. Nothing was deleted."
            )


def delete(store: Store, row: Row) -> bool:
    """Hide a run and move its folder to the trash; whether there was a folder here.

    Raises ConfigError if a process works in the folder, and OSError if the folder cannot be moved; the run then stays.
    """
    name = row["experiment_id"]
    places = _places(name)
    with _idle(places, name):
        store.curate([name], deleted_at=datetime.now(UTC))
        if not places or not _exists(places[0]):
            return False
        try:
            _move(*places)
        except (OSError, ConfigError):
            store.curate([name], deleted_at=None)
            raise
    return True


def restore(store: Store, row: Row) -> None:
    """Undo the deletion of a run, or else its archiving. Raises ConfigError if its folder would replace another one."""
    name = row["experiment_id"]
    if row["deleted_at"] is None:
        store.curate([name], archived_at=None)
        return
    places = _places(name)
    if places and _exists(places[1]):
        _move(*reversed(places))
        with contextlib.suppress(OSError):  # other folders are in it
            TRASH_FOLDER.rmdir()
    store.curate([name], deleted_at=None)


def purge(store: Store, rows: Sequence[Row]) -> None:
    """Delete the rows and the folders of deleted runs for good."""
    store.purge([row["experiment_id"] for row in rows])
    for row in rows:
        for folder in _places(row["experiment_id"]):
            if folder.is_symlink():  # its target is not ours
                folder.unlink()
            elif folder.is_dir():
                shutil.rmtree(folder)
    with contextlib.suppress(OSError):
        TRASH_FOLDER.rmdir()


def trashed_folders() -> list[Path]:
    """The folders in the trash of this working directory."""
    return sorted(TRASH_FOLDER.iterdir()) if TRASH_FOLDER.is_dir() else []


def size_of(folders: Sequence[Path]) -> int:
    """Bytes of all files in the folders; links are not followed."""
    return sum(
        path.lstat().st_size
        for folder in folders
        if not folder.is_symlink()
        for path in folder.rglob("*")
        if path.is_file()
    )


def size_of_runs(rows: Sequence[Row]) -> int:
    """Bytes of the folders of these runs, in the trash or not."""
    folders = [folder for row in rows for folder in _places(row["experiment_id"])]
    return size_of([folder for folder in folders if folder.is_dir()])


def _places(experiment_id: str) -> tuple[Path, Path] | tuple[()]:
    """The folder of a run, and where it lies in the trash. Empty for an id that is no name of a folder."""
    try:
        folder = run_folder(experiment_id)
    except ConfigError:  # an id from a foreign database
        return ()
    return folder, TRASH_FOLDER / folder.name


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _move(source: Path, target: Path) -> None:
    """Rename a folder. Raises ConfigError if the target exists, which rename would replace if it is empty."""
    if _exists(target):
        raise ConfigError(f"{target}: exists already, and so does {source}. Move one of them away.")
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


@contextlib.contextmanager
def _idle(places: tuple[Path, Path] | tuple[()], experiment_id: str) -> Iterator[None]:
    """Hold the lock of a run's folder, so that no process resumes the run. Raises ConfigError if one is at work."""
    with contextlib.ExitStack() as stack:
        if places and (places[0] / LOCK_FILE).is_file():
            try:
                stack.enter_context(filelock.FileLock(places[0] / LOCK_FILE, timeout=0))
            except filelock.Timeout as error:
                raise ConfigError(f"run {experiment_id}: a process works in its folder: stop it first.") from error
        yield
