"""Files that are whole or not there, and names that are safe to be files."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

MAX_STEM = 100


def write_atomically(path: Path, content: bytes) -> None:
    """Write, fsync, rename: a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
