"""Copies of a SQLite database, made before it is migrated or repaired."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

from research_eval.files import sync_folder
from research_eval.store.locks import locked

MAX_BACKUPS_PER_SECOND = 1000  # so many names are tried if several backups fall into the same second


def back_up(path: Path) -> Path:
    """A copy of a SQLite database beside it, under a dated name that was free. Raises OSError."""
    with locked(path):
        return copy_database(path)


def copy_database(path: Path) -> Path:
    """`back_up` for a caller that holds the lock.

    Other processes may read and write meanwhile: SQLite's online backup copies the state of one moment. Raises OSError
    if the disk is too full or the database cannot be read.
    """
    if shutil.disk_usage(path.parent).free < 1.1 * path.stat().st_size:
        raise OSError(errno.ENOSPC, "no room for a backup beside it", str(path))
    backup = _free_name(path)
    temporary = path.with_name(f"{backup.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # left by a crash
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as source,
            contextlib.closing(sqlite3.connect(temporary)) as target,
        ):
            source.backup(target)
        shutil.copymode(path, temporary)
        temporary.replace(backup)
        sync_folder(path.parent)
    except sqlite3.Error as error:
        raise OSError(errno.EIO, f"cannot be backed up: {error}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return backup


def _free_name(path: Path) -> Path:
    """`results.backup-20260102-030405.db`, with a number if that file exists already."""
    stem = f"{path.stem}.backup-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    endings = ("", *(f"-{number}" for number in range(2, MAX_BACKUPS_PER_SECOND)))
    names = (path.with_name(f"{stem}{ending}{path.suffix}") for ending in endings)
    return next(name for name in names if not name.exists())
