"""The checksum inside our safetensors files: SHA-256 of the whole file, computed with zeros in its own place.

It is part of the header's metadata, so a file and its checksum can never be separated.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

KEY = "sha256"  # its key in the metadata
ZEROS = "0" * 64
MAX_HEADER = 100_000_000  # bytes; also the limit of safetensors
_SIZE_BYTES = 8  # the file begins with the header's length, little-endian
_PIECE = 1 << 20  # bytes read at a time


def seal(content: bytes) -> bytes:
    """Fill the checksum into a file's content. The metadata have to hold the entry KEY: ZEROS.

    The checksum has as many characters as ZEROS, so the header keeps its length.
    """
    end = _SIZE_BYTES + int.from_bytes(content[:_SIZE_BYTES], "little")
    header, blank = content[:end], _entry(ZEROS)
    assert header.count(blank) == 1, "the metadata have no place for the checksum"
    return header.replace(blank, _entry(hashlib.sha256(content).hexdigest())) + content[end:]


def has_intact_checksum(path: Path) -> bool | None:
    """Whether the file is as it was written; None for a file of an earlier version, without a checksum.

    Raises OSError if it cannot be read, and ValueError if it is no safetensors file.
    """
    with path.open("rb") as file:
        start, header = _read_start(file)
        metadata = _metadata(header)
        if metadata.keys() <= {"values"}:
            return None
        checksum = metadata.get(KEY)
        # Hash the bytes and not the parsed text, so that every change of the header is noticed.
        digest = hashlib.sha256(start + header.replace(_entry(str(checksum)), _entry(ZEROS), 1))
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest() == checksum


def read_values(path: Path) -> dict[str, Any]:
    """The plain values in the header of a checkpoint; empty if there are none.

    Raises OSError if the file cannot be read, and ValueError if it is no safetensors file.
    """
    with path.open("rb") as file:
        metadata = _metadata(_read_start(file)[1])
    try:
        values = json.loads(metadata.get("values", "{}"))
    except (TypeError, RecursionError) as error:
        raise ValueError("no values in the header") from error
    return values if isinstance(values, dict) else {}


def _read_start(file: BinaryIO) -> tuple[bytes, bytes]:
    """The bytes of the header's length, and the header. Raises ValueError for a length that no header has."""
    start = file.read(_SIZE_BYTES)
    length = int.from_bytes(start, "little")
    if not 0 < length <= MAX_HEADER:
        raise ValueError("no safetensors header")
    return start, file.read(length)


def _metadata(header: bytes) -> dict[str, Any]:
    """The metadata of a safetensors header; empty if there are none. Raises ValueError for broken JSON."""
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError("no safetensors header") from error
    return metadata if isinstance(metadata, dict) else {}


def _entry(checksum: str) -> bytes:
    """The checksum's entry as bytes of the header."""
    return f'"{KEY}":"{checksum}"'.encode(errors="backslashreplace")  # unique: JSON escapes quotes in values
