"""What commands read of texts: all of a file, or its lines, in order and one to one.

A file of text has one text per line. Only a line feed ends a line, alone or after a carriage return, so that no other
character of a text makes two texts of one. A blank line is an input like any other. The module imports no torch, so
that a missing file is reported at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from research_eval.errors import ConfigError
from research_eval.system.untrusted import check_regular_file, user_path

STDIN = "-"
MAX_FILE_BYTES = 100_000_000  # of a file of texts


class Input(NamedTuple):
    """One text, the file that it comes from ("" if it comes from none), and its number there, from 1."""

    file: str
    number: int
    text: str

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"{self.file}:{self.number}" if self.file else "text"


def check_files(paths: Sequence[str], flag: str = "--file") -> None:
    """Raise ConfigError for a file that cannot be read, before any slow work. `flag` names the files in messages."""
    if paths.count(STDIN) > 1:
        raise ConfigError(f"{flag}: {STDIN} is standard input, which can be read once")
    for path in paths:
        if path != STDIN:
            try:
                check_regular_file(user_path(path, flag))
                user_path(path).open("rb").close()
            except (ConfigError, OSError) as error:
                raise ConfigError(f"{flag}: cannot read {path} as text: {error}") from error


def read_text(path: str, flag: str = "--file") -> str:
    """The content of a UTF-8 file without a byte-order mark; "-" is standard input.

    Raises ConfigError for a file that is missing, too large or not text.
    """
    check_files([path], flag)
    try:
        if path == STDIN:
            content = _limited(sys.stdin.buffer, "standard input", flag) if sys.stdin is not None else b""
        else:
            with user_path(path).open("rb") as file:
                content = _limited(file, path, flag)
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag}: cannot read {path} as text: {error}. Save it as UTF-8 text.") from error


def read_texts(path: str, flag: str = "--file") -> list[str]:
    """The lines of a file, one text each, blank ones included. Raises ConfigError as `read_text`.

    A line ends with a line feed or with carriage return and line feed.
    """
    lines = read_text(path, flag).split("\n")
    if lines[-1] == "":  # the last line feed ends the last line
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _limited(file: IO[bytes], name: str, flag: str) -> bytes:
    """The whole content. Raises ConfigError if it is too large."""
    content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{flag}: {name} is larger than {MAX_FILE_BYTES:,} bytes: split it")
    return content


def output_file(text: str, files: Sequence[str]) -> Path:
    """The path of --out. Raises ConfigError if no file can be there, or if it is one of the files that are read."""
    path = user_path(text, "--out")
    if not text or path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            f"--out: {text!r} is not a file in an existing folder. Create the folder or give another name."
        )
    if path.exists():
        check_regular_file(path)
        if any(user_path(file).exists() and path.samefile(user_path(file)) for file in files):
            raise ConfigError(f"--out: {text} is a file that is read. Give another name.")
    return path
