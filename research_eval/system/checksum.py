"""The checksum inside our safetensors files: SHA-256 of the whole file, computed with zeros in its own place.

It is part of the header's metadata, so a file and its checksum can never be separated.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

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
        start = file.read(_SIZE_BYTES)
        length = int.from_bytes(start, "little")
        if not 0 < length <= MAX_HEADER:
            raise ValueError("no safetensors header")
        header = file.read(length)
        metadata = _metadata(header)
        if metadata.keys() <= {"values"}:
            return None
        checksum = metadata.get(KEY)
        # Hash the bytes and not the parsed text, so that every change of the header is noticed.
        digest = hashlib.sha256(start + header.replace(_entry(str(checksum)), _entry(ZEROS), 1))
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest() == checksum


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
