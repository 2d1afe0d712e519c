"""Arrays on disk under the hash of their inputs: a tokenizer, and the tokens of a split.

N samples
"""

from __future__ import annotations

import hashlib
import logging
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from tokenizers import Tokenizer

from research_eval.errors import ConfigError

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


class Damaged(ValueError):
    """A cache file holds something other than what this program stores in it."""


def check_tokenizer(arrays: Arrays) -> None:
    """Raise Damaged if the arrays do not hold a tokenizer."""
    try:
        Tokenizer.from_str(arrays["tokenizer_json"].tobytes().decode())
    except Exception as error:  # the library raises nothing narrower
        raise Damaged(str(error)) from error


def check_tokens(arrays: Arrays, num_samples: int, vocab_size: int) -> None:
    """Raise Damaged if the arrays are not `num_samples` (N) encoded texts with ids below `vocab_size`."""
    tokens, offsets, full_lengths = arrays["tokens"], arrays["offsets"], arrays["full_lengths"]
    if not (
        tokens.dtype == np.int32
        and offsets.dtype == np.int64
        and offsets.shape == (num_samples + 1,)
        and tokens.shape == (offsets[-1],)
        and offsets[0] == 0
        and (np.diff(offsets) > 0).all()
        and full_lengths.dtype == np.int32
        and full_lengths.shape == (num_samples,)
        and (full_lengths >= np.diff(offsets)).all()
        and tokens.min() > 0
        and tokens.max() < vocab_size
    ):
        raise Damaged("these are not the tokens")


def cached_arrays(path: Path, build: Callable[[], Arrays], check: Callable[[Arrays], object] = len) -> Arrays:
    """The arrays stored at `path`; if there are none, build and store them. The file name is the key.

    `check` raises for arrays that are not right; they are then built again. Raises ConfigError if the folder cannot be
    written.
    """
    if path.is_file():
        try:
            # Never with pickle: a person who can write to the cache could otherwise run code here.
            with path.open("rb") as file, NpzFile(file, allow_pickle=False) as archive:
                stored = {name: archive[name] for name in archive.files}
            check(stored)
            return stored
        except (OSError, ValueError, TypeError, LookupError, EOFError, MemoryError, zipfile.BadZipFile) as error:
            log.warning("%s is damaged (%s) and is built again", path, error)
    arrays = build()
    # Several processes may build the same entry: each writes a file of its own and renames it when it is complete.
    temporary = path.with_name(f".{uuid.uuid4().hex}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.savez(temporary, allow_pickle=False, **arrays)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    return arrays


def unwritable(folder: Path, error: OSError) -> ConfigError:
    """The error for a cache folder that cannot be written."""
    return ConfigError(f"{folder}: cannot write the cache ({error}). Set cache_dir or GOE_CACHE.")


def digest(*parts: str | NDArray[Any]) -> str:
    """Hash of the parts; all but arrays are short strings, separated by a line break."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part.encode() + b"\n" if isinstance(part, str) else part.tobytes())
    return hasher.hexdigest()


def digest_texts(texts: list[str]) -> str:
    """Hash of the texts in their order."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))  # without them ["ab"] would equal ["a", "b"]
    return digest(lengths, "".join(texts))
