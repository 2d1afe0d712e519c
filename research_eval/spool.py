"""Results that wait on disk for the database: a line of JSON per write, in `runs/.pending/<experiment_id>.jsonl`.

What ends a run is written here before it goes into the database and the CSV file, so that both get it whatever happens
in between; and what a database that does not answer cannot take is kept here. The next command that opens the store for
writing enters what was left behind.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import filelock

from research_eval.db_utils import HistoryRow, Store, StoreUnavailable, append_csv, normal_metrics
from research_eval.errors import ConfigError
from research_eval.files import LOCK_FILE, RUNS_FOLDER, run_folder, sync_folder
from research_eval.system.untrusted import read_limited

log = logging.getLogger(__name__)

CSV_FILE = "json_experiment_results.csv"
PENDING_FOLDER = RUNS_FOLDER / ".pending"
DELAYS = (0.1, 0.3, 1.0, 3.0)  # seconds between attempts, before a write goes to the disk instead
MAX_BYTES = 10**9
RETRY_SECONDS = 30.0  # between two attempts to get rid of what waits

Write = tuple[str, Any]  # what is written, and with which value: see `_apply`


class Ledger:
    """The writes of one run, in their order: into the store or, while that is not to be had, into a file."""

    def __init__(self, store: Store, experiment_id: str) -> None:
        self._store = store
        self._id = experiment_id
        self._path = PENDING_FOLDER / f"{experiment_id}.jsonl"
        self._waits = self._path.exists()
        self._next_attempt = 0.0

    def write(self, kind: str, value: Any) -> None:
        """One write of a run at work. Raises OSError where neither the database nor the disk takes it."""
        if self._waits:
            _append(self._path, [(kind, value)])
            if time.monotonic() >= self._next_attempt:
                self._try_again()
            return
        try:
            patiently(lambda: _apply(self._store, self._id, (kind, value)))
        except StoreUnavailable as error:
            _append(self._path, [(kind, value)])
            self._postpone()
            log.warning("%s: %s. Training goes on; its results wait in %s", error.filename, error.strerror, self._path)

    def _postpone(self) -> None:
        self._waits = True
        self._next_attempt = time.monotonic() + RETRY_SECONDS

    def _try_again(self) -> None:
        try:
            _enter(self._store, self._id, self._path)
        except StoreUnavailable:
            self._postpone()
        else:
            self._waits = False
            log.warning("the database answers again: what waited in %s is stored", self._path)

    def end(self, *writes: Write) -> None:
        """The last writes of a run: on the disk first, so that all of them are done or none is forgotten."""
        try:
            _append(self._path, writes, durable=True)
        except OSError:
            if self._waits:
                raise
            for write in writes:  # the disk is full: the database may lie elsewhere
                patiently(lambda write=write: _apply(self._store, self._id, write))  # type: ignore[misc]
            return
        try:
            patiently(lambda: _enter(self._store, self._id, self._path, again=self._waits))
        except StoreUnavailable as error:
            log.warning(
                "%s: %s. The results of run %s wait in %s; the next command that writes to this database stores them",
                error.filename,
                error.strerror,
                self._id,
                self._path,
            )


def patiently(action: Callable[[], Any]) -> Any:
    """The action, some times where the database does not answer at once. Raises StoreUnavailable in the end."""
    for delay in DELAYS:
        try:
            return action()
        except StoreUnavailable:
            time.sleep(delay)
    return action()


def waiting() -> list[Path]:
    """The files of runs whose results have not reached the database."""
    try:
        return sorted(PENDING_FOLDER.glob("*.jsonl"))
    except FileNotFoundError:  # the last one has just been entered, and the folder removed
        return []


def merge_pending(store: Store) -> int:
    """Enter what runs have left behind whose process is gone, and say so; return how many they were."""
    merged = 0
    for path in waiting():
        try:
            folder = run_folder(path.stem)
            if store.find_id(path.stem) is None:
                continue  # of another database
            folder.mkdir(exist_ok=True)
            with filelock.FileLock(folder / LOCK_FILE, timeout=0):
                if path.exists():  # nobody was faster
                    _enter(store, path.stem, path, again=True)
                    merged += 1
                    log.info("run %s: its results waited in %s and are stored now", path.stem, path)
        except filelock.Timeout:
            continue  # it is at work, and looks after this itself
        except StoreUnavailable as error:
            log.warning("%s: %s. The results in %s go on waiting", error.filename, error.strerror, path)
        except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            log.warning("%s: not results of a run (%s); it was left alone", path, error)
    return merged


def _apply(store: Store, experiment_id: str, write: Write, again: bool = False) -> None:
    """One write; doing it again changes nothing."""
    kind, value = write
    if kind == "history":
        store.add_history(experiment_id, [HistoryRow(*row) for row in value])
    elif kind == "truncate":
        store.truncate_history(experiment_id, after_step=value)
    elif kind == "metrics":
        store.finish_experiment(experiment_id, value)
    elif kind == "status":
        store.set_status(experiment_id, *value)
    elif kind == "csv":
        append_csv(CSV_FILE, value, unless_known=("experiment_id", "status") if again else ())
    else:
        raise ConfigError(f"unknown entry {kind!r}")


def _append(path: Path, writes: Sequence[Write], durable: bool = False) -> None:
    """Add lines; a full disk leaves the file as it was."""
    lines = "".join(json.dumps([kind, _plain(kind, value)]) + "\n" for kind, value in writes).encode()
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            break
        except FileNotFoundError:
            continue  # somebody has just emptied the folder, and removed it
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            lines = b"\n" + lines  # a crash has cut the last line off
        try:
            if os.write(descriptor, lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if durable:
                os.fsync(descriptor)
                sync_folder(path.parent)
        except OSError:
            os.ftruncate(descriptor, size)
            if not size:
                _delete(path)
            raise
    finally:
        os.close(descriptor)


def _plain(kind: str, value: Any) -> Any:
    return normal_metrics(value) if kind == "metrics" else value


def _enter(store: Store, experiment_id: str, path: Path, again: bool = False) -> None:
    """All that waits in the file, which is deleted in the end."""
    for line in read_limited(path, MAX_BYTES, "what a run leaves").splitlines():
        try:
            kind, value = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a crash: what it was part of was never said to be done
        _apply(store, experiment_id, (kind, value), again)
    _delete(path)


def _delete(path: Path) -> None:
    path.unlink()
    with contextlib.suppress(OSError):  # where others wait
        path.parent.rmdir()
