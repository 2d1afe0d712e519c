"""Files that are whole or not there, and names that are safe to be files."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import string
from pathlib import Path

import filelock

from research_eval.errors import ConfigError

MAX_STEM = 100
MAX_NAME = 200  # characters of a run, a study or a data set
RUNS_FOLDER = Path("runs")
LOCK_FILE = ".lock"
ID_LETTERS = frozenset(string.ascii_letters + string.digits + "-_")


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write, fsync, rename: a reader sees the old file or the new one, never half of one.

    The old one stays under the name `previous`, where one is given: at every moment one of the two is there and whole.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # left by a crash, or a link that somebody put there
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # a full disk says so without a name, or with that of the temporary file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, as fsync does with the content of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def run_folder(experiment_id: str) -> Path:
    """The folder of a run. Raises ConfigError for an id that is no plain name, as a foreign database may hold."""
    if not experiment_id or not set(experiment_id) <= ID_LETTERS:
        raise ConfigError(f"experiment id {experiment_id!r}: expected letters, digits, - and _ only")
    return RUNS_FOLDER / experiment_id


def is_at_work(experiment_id: str) -> bool | None:
    """Whether a process holds the run's folder; None where the folder is not below this working directory.

    The operating system gives a lock back when its process dies, however it dies and whatever the clock says.
    """
    if not experiment_id or not set(experiment_id) <= ID_LETTERS:
        return None
    lock = run_folder(experiment_id) / LOCK_FILE
    try:
        if not lock.is_file():
            return None
        with filelock.FileLock(lock, timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # not ours to lock, as on a read-only disk
        return None


def file_stem(name: str) -> str:
    """A user's name as part of a file name: itself where it is letters, digits, `-`, `_` and inner dots.

    Other characters become `_`, and a hash of the name keeps two such names apart.

    >>> file_stem("my-study_1.5"), file_stem("../etc/passwd")
    ('my-study_1.5', '_._etc_passwd_7fef78f5')
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    plain = re.sub(r"^[.-]", "_", plain)[:MAX_STEM]
    if plain == name:
        return name
    return f"{plain}_{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"
