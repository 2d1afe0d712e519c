"""Data files as streams of UTF-8: decompressed, decoded, and limited in size, because every file may be hostile."""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from research_eval.errors import ConfigError
from research_eval.system.phases import report
from research_eval.system.untrusted import check_regular_file

CHUNK_BYTES = 1 << 20
MAX_SPLIT_BYTES = 2**31  # of one file, decompressed
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ARCHIVES = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
# Longer marks first: that of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def check_size(path: Path, num_bytes: int) -> None:
    """Raise ConfigError for more than MAX_SPLIT_BYTES."""
    if num_bytes > MAX_SPLIT_BYTES:
        raise ConfigError(f"{path}: holds more than {MAX_SPLIT_BYTES / 2**30:.0f} GiB. Give a part of it.")


def compression(path: Path) -> bytes | None:
    """GZIP, ZSTD or None, as the file begins; its name may say something else. Raises ConfigError for an archive."""
    check_regular_file(path)
    with path.open("rb") as file:
        head = file.read(8)
    for mark, name in ARCHIVES.items():
        if head.startswith(mark):
            raise ConfigError(f"{path}: is a {name} archive. Unpack it, and give the file that is in it.")
    return next((mark for mark in (GZIP, ZSTD) if head.startswith(mark)), None)


@contextmanager
def decompressed(path: Path) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed if it is compressed. Reading raises ConfigError as soon as it is too much."""
    kind = compression(path)
    if kind is None:
        check_size(path, path.stat().st_size)
    with path.open("rb") as file:
        stream: Any = file
        if kind == GZIP:
            stream = gzip.GzipFile(fileobj=file)
        elif kind == ZSTD:
            stream = pa.CompressedInputStream(file, "zstd")
        yield io.BufferedReader(_Chunks(_limited(path, stream)), CHUNK_BYTES)


@contextmanager
def text_of(path: Path, encoding: str | None = None) -> Iterator[IO[bytes]]:
    """The content of a text file in UTF-8 without a byte-order mark.

    Without an `encoding`, it follows from the file's byte-order mark, or else is UTF-8. Reading raises ConfigError for
    a file that is too large, and for bytes that do not belong to the encoding.
    """
    with decompressed(path) as file:
        found = encoding or _encoding(path, file.peek(4))  # type: ignore[attr-defined]
        yield io.BufferedReader(_Chunks(_utf8(path, file, found, encoding is not None)), CHUNK_BYTES)


def _encoding(path: Path, head: bytes) -> str:
    """The encoding that the beginning of a file shows. Raises ConfigError for UTF-16 without a mark."""
    found = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")
    for start, name in ((0, "utf-16-be"), (1, "utf-16-le")):  # ASCII in UTF-16: every other byte is zero
        if found == "utf-8" and len(head) >= 4 and not any(head[start:100:2]) and all(head[1 - start : 100 : 2]):
            raise ConfigError(f'{path}: looks like UTF-16. Set dataset_params: "encoding": "{name}"')
    return found


def _limited(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    """The content in chunks, up to the limit of size."""
    num_bytes = 0
    try:
        while chunk := stream.read(CHUNK_BYTES):
            num_bytes += len(chunk)
            check_size(path, num_bytes)
            yield chunk
    except (EOFError, OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path}: cannot be read: {error}. The file is incomplete or damaged: copy or download it again."
        ) from error


def _utf8(path: Path, stream: IO[bytes], encoding: str, is_given: bool) -> Iterator[bytes]:
    """The content in chunks of UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)()
    num_lines, is_first = 1, True
    while True:
        chunk = stream.read(CHUNK_BYTES)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeError as error:
            raise ConfigError(_advice(path, error, encoding, is_given, num_lines)) from error
        if is_first:
            text = text.removeprefix("\ufeff")
        num_lines += text.count("\n")
        report(f"{path.name}, line {num_lines - 1:,}")
        try:
            yield text.encode()
        except UnicodeEncodeError as error:  # an encoding such as utf-7 can spell half a surrogate pair
            raise ConfigError(_advice(path, error, encoding, is_given, num_lines)) from error
        is_first = is_first and not text
        if not chunk:
            return


def _advice(path: Path, error: UnicodeError, encoding: str, is_given: bool, num_lines: int) -> str:
    """What to do about bytes that do not belong to the encoding."""
    where, byte = f"{path}:{num_lines}", ""
    if isinstance(error, UnicodeDecodeError):
        before = error.object[: error.start].count(b"\n")
        where, byte = f"{path}:{num_lines + before}", f" (byte 0x{error.object[error.start]:02x})"
    if is_given:
        other = "latin-1" if encoding.lower().replace("_", "-") in ("cp1252", "windows-1252") else "utf-8"
        return f'{where}: not {encoding}{byte}. Set dataset_params.encoding to another one, such as "{other}"'
    return (
        f'{where}: not UTF-8{byte}. Save it as UTF-8, or name its encoding in dataset_params, such as "encoding": '
        '"cp1252" (Western Europe, Excel), "cp1251" (Russian), "gb18030" (Chinese), "shift_jis" (Japanese)'
    )


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a stream."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer with the rest of a chunk; 0 at the end."""
        while not self._rest:
            try:
                self._rest = memoryview(next(self._chunks))
            except StopIteration:
                return 0
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size
