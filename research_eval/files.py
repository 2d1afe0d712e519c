"""Files that are either complete or absent, and names that are safe as file names."""

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
RUNS_FOLDER = Path(os.environ.get("GOE_RUNS") or "runs")
LOCK_FILE = ".lock"
SLICES_FOLDER = "checkpoint.slices"  # of a run that several processes write, beside the checkpoint that names its files
CONFIG_FILE = "config.json"  # of a run, complete
SAMPLES_FILE = "samples.jsonl"  # of a run: what a language model wrote during its training
MODEL_FILE = "model.safetensors"  # of a run: the weights with the best score on validation
ID_LETTERS = frozenset(string.ascii_letters + string.digits + "-_")


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write, fsync, rename: a reader sees the old file or the new one, never a part of one.

    If `previous` is given, the old file moves there. At every moment at least one of the two is complete.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # left by a crash, or a foreign link
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
            error.filename = str(path)  # the error may name no file or the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, as fsync does with the content of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def use_runs_folder(folder: Path) -> None:
    """Look for the folders of runs below `folder`, in this process and in those that it starts."""
    global RUNS_FOLDER
    RUNS_FOLDER = folder
    os.environ["GOE_RUNS"] = str(folder.absolute())


def run_folder(experiment_id: str) -> Path:
    """The folder of a run. Raises ConfigError for an unsafe id, which a foreign database may contain."""
    if not experiment_id or not set(experiment_id) <= ID_LETTERS:
        raise ConfigError(f"experiment id {experiment_id!r}: expected letters, digits, - and _ only")
    return RUNS_FOLDER / experiment_id


def is_at_work(experiment_id: str) -> bool | None:
    """Whether a process holds the run's folder; None if the folder is not below this working directory.

    The operating system releases a lock when its process dies, whatever the cause.
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
    except OSError:  # locking is not possible, for example on a read-only disk
        return None


def file_stem(name: str) -> str:
    """A user's name as part of a file name: unchanged if it has only letters, digits, `-`, `_` and inner dots.

    Other characters become `_`. A hash of the name is then added, so that two such names stay different.

    >>> file_stem("my-study_1.5"), file_stem("../etc/passwd")
    ('my-study_1.5', '_._etc_passwd_7fef78f5')
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    plain = re.sub(r"^[.-]", "_", plain)[:MAX_STEM]
    if plain == name:
        return name
    return f"{plain}_{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"
