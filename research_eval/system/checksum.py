"""The checksum inside our safetensors files: SHA-256 of the whole file, in which the checksum itself counts as zeros.

It stands in the header's metadata, so a file and its checksum are one file: there is never one without the other.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

KEY = "sha256"  # in the metadata
ZEROS = "0" * 64
MAX_HEADER = 100_000_000  # bytes; also the limit of safetensors
_SIZE_BYTES = 8  # before the header: its length
_PIECE = 1 << 20


def seal(content: bytes) -> bytes:
    """The file with its checksum; its metadata have to hold KEY: ZEROS."""
    end = _SIZE_BYTES + int.from_bytes(content[:_SIZE_BYTES], "little")
    header, blank = content[:end], _entry(ZEROS)
    assert header.count(blank) == 1, "the metadata have no place for the checksum"
    return header.replace(blank, _entry(hashlib.sha256(content).hexdigest())) + content[end:]


def has_intact_checksum(path: Path) -> bool | None:
    """Whether the file is as it was written; None for one that an earlier version wrote, without a checksum.

    Raises OSError, and ValueError for what is no safetensors file.
    """
    with path.open("rb") as file:
        start = file.read(_SIZE_BYTES)
        length = int.from_bytes(start, "little")
        if not 0 < length <= MAX_HEADER:
            raise ValueError("no safetensors header")
        header = file.read(length)
        metadata = _metadata(header)
        if metadata.keys() <= {"values"}:
            return None
        checksum = metadata.get(KEY)
        # The bytes and not the parsed text: a header that was changed has to be noticed however it reads.
        digest = hashlib.sha256(start + header.replace(_entry(str(checksum)), _entry(ZEROS), 1))
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest() == checksum


def _metadata(header: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError("no safetensors header") from error
    return metadata if isinstance(metadata, dict) else {}


def _entry(checksum: str) -> bytes:
    return f'"{KEY}":"{checksum}"'.encode(errors="backslashreplace")  # no quote in a value looks so: it is escaped
