"""Encoded streams and facts on disk, under the hash of what they were made of.

A stream is one .npy file of int32 that is mapped into memory: the S tokens, the starts of the D documents (int64, each
as two int32), and the SHA-256 of both (8 int32). A file is complete or absent, and one that is damaged is made again.

S tokens  D documents
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.text.cache import Damaged, unwritable
from research_eval.errors import ConfigError
from research_eval.system.untrusted import parse_json, read_limited

log = logging.getLogger(__name__)

Stream = tuple[NDArray[np.int32], NDArray[np.int64]]  # tokens [S], starts of the documents [D]

HASH_INTS = 8  # int32 that hold a SHA-256
MAX_FACTS_BYTES = 1_000_000


def cached_stream(path: Path, build: Callable[[], Stream], num_documents: int, vocab_size: int) -> Stream:
    """The stream stored at `path`, mapped into memory; if there is none, build and store it. The name is the key.

    `num_documents` is D, which the file does not say. Raises ConfigError if the folder cannot be written.
    """
    if path.is_file():
        try:
            return _mapped(path, num_documents, vocab_size)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            log.warning("%s is damaged (%s) and is encoded again", path, error)
    tokens, starts = build()
    pairs = starts.astype("<i8").view("<i4")
    content = np.concatenate([tokens.astype("<i4", copy=False), pairs])
    content = np.concatenate([content, np.frombuffer(hashlib.sha256(content.data).digest(), "<i4")])
    _write(path, lambda file: np.save(file, content, allow_pickle=False))
    return _mapped(path, num_documents, vocab_size)


def _mapped(path: Path, num_documents: int, vocab_size: int) -> Stream:
    """The stream in a file. Raises Damaged for any other content, and what reading raises."""
    content = np.lib.format.open_memmap(path, mode="r")  # refuses objects, which would be pickled
    num_tokens = content.size - HASH_INTS - 2 * num_documents
    if content.dtype != np.dtype("<i4") or content.ndim != 1 or num_tokens < 0:
        raise Damaged("this is no stream")
    if hashlib.sha256(content[:-HASH_INTS].data).digest() != content[-HASH_INTS:].tobytes():
        raise Damaged("its content has changed")
    tokens = content[:num_tokens]
    starts = np.array(content[num_tokens:-HASH_INTS]).view("<i8").astype(np.int64, copy=False)
    if num_tokens and not 0 < int(tokens.min()) <= int(tokens.max()) < vocab_size:  # a file of another program
        raise Damaged("an id is outside the vocabulary")
    return tokens, starts


def cached_facts(path: Path, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON object stored at `path` beside its hash; if there is none, build and store it. The name is the key.

    Raises ConfigError if the folder cannot be written.
    """
    if path.is_file():
        try:
            found = parse_json(read_limited(path, MAX_FACTS_BYTES, "a file of facts"), str(path))
            if isinstance(found, dict) and found.get("sha256") == _sha256(found.get("facts")):
                return dict(found["facts"])
            log.warning("%s is damaged (its content has changed) and is made again", path)
        except ConfigError as problem:
            log.warning("%s is damaged (%s) and is made again", path, problem)
    facts = build()
    _write(path, lambda file: file.write(json.dumps({"sha256": _sha256(facts), "facts": facts}).encode()))
    return facts


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Create the file under another name first: several processes may write the same entry."""
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                write(file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path.parent, error) from error
