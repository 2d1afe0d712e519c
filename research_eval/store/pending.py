"""Pending writes: results on disk that the database has not got yet, in `runs/.pending/<experiment_id>.jsonl`.

The last writes of a run go into this file before they go into the database and the CSV file (a write-ahead log), so
that both get them even if the process dies in between. If the database does not answer, the writes stay in the file.
The next command that opens the database for writing stores them. A line is one write: `[kind, value, attempt]` as JSON.
The writes of an attempt that another process has superseded are dropped.
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
from typing import Any, Literal

import filelock

from research_eval.errors import ConfigError, Superseded
from research_eval.files import LOCK_FILE, RUNS_FOLDER, run_folder, sync_folder
from research_eval.store.connection import StoreUnavailable
from research_eval.store.csv_file import append_if_possible
from research_eval.store.records import HistoryRow
from research_eval.store.store import Store
from research_eval.store.values import NormalMetrics
from research_eval.system.best_effort import attempted
from research_eval.system.untrusted import read_limited

log = logging.getLogger(__name__)

PENDING_FOLDER = RUNS_FOLDER / ".pending"
DELAYS = (0.1, 0.3, 1.0, 3.0)  # seconds between attempts, before a write goes to the disk instead
MAX_BYTES = 10**9
RETRY_SECONDS = 30.0  # between two attempts to store the pending writes of a run at work

Write = (
    tuple[Literal["history"], Sequence[HistoryRow]]
    | tuple[Literal["truncate"], int]  # the last step whose points stay
    | tuple[Literal["metrics"], NormalMetrics]
    | tuple[Literal["status"], list[str | None]]  # status and error
    | tuple[Literal["csv"], dict[str, Any]]
)


class RunWriter:
    """Writes the results of one run in their order: into the store or, while that does not answer, into the file.

    The caller holds the lock of the run's folder, so nothing else writes to this file. If another process has taken
    the run over (`attempt`, from `Store.take_over`), every write raises Superseded.
    """

    def __init__(self, store: Store, experiment_id: str, attempt: int | None = None) -> None:
        self._store = store
        self._id, self._attempt = experiment_id, attempt
        self._path = PENDING_FOLDER / f"{experiment_id}.jsonl"
        self._has_pending = self._path.exists()
        self._next_attempt = 0.0

    def write(self, write: Write) -> None:
        """One write of a run at work. Raises OSError if neither the database nor the disk accepts it."""
        if self._has_pending:  # later writes must not overtake those in the file
            _append(self._path, [write], self._attempt)
            if time.monotonic() >= self._next_attempt:
                self._try_again()
            return
        try:
            with_retries(lambda: _apply(self._store, self._id, write, self._attempt))
        except StoreUnavailable as error:
            _append(self._path, [write], self._attempt)
            self._postpone()
            log.warning(
                "%s: %s. Training continues; its results wait in %s", error.filename, error.strerror, self._path
            )

    def _postpone(self) -> None:
        self._has_pending = True
        self._next_attempt = time.monotonic() + RETRY_SECONDS

    def _try_again(self) -> None:
        try:
            _apply_file(self._store, self._id, self._path)
        except StoreUnavailable:
            self._postpone()
        else:
            self._has_pending = False
            log.warning("the database answers again: what waited in %s is stored", self._path)

    def end(self, *writes: Write) -> None:
        """The last writes of a run: first to the disk, so that a crash loses none of them and stores none by half."""
        try:
            _append(self._path, writes, self._attempt, durable=True)
        except OSError:
            if self._has_pending:
                raise
            for write in writes:  # the disk is full, but the database may be on another one
                with_retries(lambda write=write: _apply(self._store, self._id, write, self._attempt))  # type: ignore[misc]
            return
        try:
            with_retries(lambda: _apply_file(self._store, self._id, self._path, again=self._has_pending))
        except StoreUnavailable as error:
            log.warning(
                "%s: %s. The results of run %s wait in %s; the next command that writes to this database stores them",
                error.filename,
                error.strerror,
                self._id,
                self._path,
            )


def with_retries(action: Callable[[], Any]) -> Any:
    """The result of the action, repeated after DELAYS while the database does not answer.

    Raises StoreUnavailable if the last attempt fails too.
    """
    for delay in DELAYS:
        try:
            return action()
        except StoreUnavailable:
            time.sleep(delay)
    return action()


def pending_files() -> list[Path]:
    """The files of runs whose results have not reached the database."""
    try:
        return sorted(PENDING_FOLDER.glob("*.jsonl"))
    except FileNotFoundError:  # another process has just stored the last file and removed the folder
        return []


def merge_pending(store: Store) -> int:
    """Store the pending writes of runs whose process has ended, with a log line each; return the number of runs.

    A file that does not hold writes of a run is reported and left unchanged.
    """
    merged = 0
    for path in pending_files():
        try:
            folder = run_folder(path.stem)
            if store.find_id(path.stem) is None:
                continue  # a run of another database
            folder.mkdir(exist_ok=True)
            with filelock.FileLock(folder / LOCK_FILE, timeout=0):
                if path.exists():  # otherwise another process has just stored it
                    _apply_file(store, path.stem, path, again=True)
                    merged += 1
                    log.info("run %s: its results waited in %s and are stored now", path.stem, path)
        except Superseded as problem:
            log.warning("%s: %s", path, problem)
        except filelock.Timeout:
            continue  # the run is at work and stores its pending writes itself
        except StoreUnavailable as error:
            log.warning("%s: %s. The results in %s still wait", error.filename, error.strerror, path)
        except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            log.warning("%s: not results of a run (%s); it was left alone", path, error)
    return merged


def _apply(store: Store, experiment_id: str, write: Write, attempt: int | None, again: bool = False) -> None:
    """Execute one write of an attempt.

    Each kind may be executed twice without harm; `again` makes that true of the CSV file too.
    """
    kind: str
    value: Any
    kind, value = write
    if kind == "history":
        store.add_history(experiment_id, [HistoryRow(*row) for row in value], attempt)
    elif kind == "truncate":
        store.truncate_history(experiment_id, value, attempt)
    elif kind == "metrics":
        store.finish_normalised(experiment_id, value, attempt)
    elif kind == "status":
        status, error = value
        store.set_status(experiment_id, status, error, attempt)
    elif kind == "csv":
        append_if_possible(value, unless_known=("experiment_id", "status") if again else ())
    else:
        raise ConfigError(f"unknown entry {kind!r}")


def _apply_file(store: Store, experiment_id: str, path: Path, again: bool = False) -> None:
    """Execute all writes in the file, then delete it. A file that stays is executed again later, which does no harm.

    Once a write of an attempt is superseded, its later ones are dropped. Raises Superseded at the end, if the last
    writes were.
    """
    dropped: dict[int | None, Superseded] = {}
    attempt: int | None = None
    for line in read_limited(path, MAX_BYTES, "what a run leaves").splitlines():
        try:
            kind, value, *rest = json.loads(line)
        except json.JSONDecodeError:
            continue  # a crash has cut the line off, so its write was never confirmed to the run
        attempt = rest[0] if rest else None
        if attempt not in dropped:
            try:
                _apply(store, experiment_id, (kind, value), attempt, again)
            except Superseded as problem:
                dropped[attempt] = problem
    with attempted(log, f"{path}: everything in it is stored, but it cannot be deleted"):
        _delete(path)
    if attempt in dropped:
        raise dropped[attempt]


def _append(path: Path, writes: Sequence[Write], attempt: int | None, durable: bool = False) -> None:
    """Add a line per write; if the disk is full, the file is cut to its old length."""
    lines = "".join(json.dumps([kind, value, attempt]) + "\n" for kind, value in writes).encode()
    descriptor = _open_to_append(path)
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


def _open_to_append(path: Path) -> int:
    """A file descriptor; the folder is created again as often as other processes remove it when it is empty."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue


def _delete(path: Path) -> None:
    """Delete the file, and the folder if it is empty now."""
    path.unlink()
    with contextlib.suppress(OSError):  # other runs have files there
        path.parent.rmdir()
