"""A lock file, so that one process at a time changes a file that others use too.

The CSV file has no locking of its own. A SQLite file has, but its switch to WAL mode and its backup before a migration
are outside any transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from research_eval.errors import ConfigError

LOCK_SECONDS = 60.0  # a migration of a large database holds the lock for a while


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file beside `path`. Raises ConfigError if another process holds it for a minute."""
    lock = filelock.FileLock(path.with_name(f"{path.name}.lock"), timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ConfigError(f"{path}: another process has held {lock.lock_file} for {LOCK_SECONDS:.0f} s.") from error
    try:
        yield
    finally:
        lock.release()
