"""What `goe predict` reads, in order and one to one: lines of text, or the text column of a table.

A file of text has one text per line. Only a line feed ends a line, alone or after a carriage return, so that no other
character of a text makes two texts of one. A blank line is an input like any other. The module imports no torch, so
that a missing file is reported at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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


def check_files(paths: Sequence[str]) -> None:
    """Raise ConfigError for a file that cannot be read, before any slow work."""
    if paths.count(STDIN) > 1:
        raise ConfigError(f"--file: {STDIN} is standard input, which can be read once")
    for path in paths:
        if path != STDIN:
            try:
                check_regular_file(user_path(path, "--file"))
                user_path(path).open("rb").close()
            except (ConfigError, OSError) as error:
                raise ConfigError(f"--file: cannot read {path} as text: {error}") from error


def read_texts(path: str) -> list[str]:
    """The lines of a UTF-8 file, one text each, blank ones included; "-" is standard input.

    A line ends with a line feed or with carriage return and line feed. A byte-order mark at the start is dropped.
    Raises ConfigError for a file that is missing, too large or not text.
    """
    check_files([path])
    try:
        if path == STDIN:
            content = _limited(sys.stdin.buffer, "standard input") if sys.stdin is not None else b""
        else:
            with user_path(path).open("rb") as file:
                content = _limited(file, path)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file: cannot read {path} as text: {error}. Save it as UTF-8 text.") from error
    lines = text.split("\n")
    if lines[-1] == "":  # the last line feed ends the last line
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _limited(file: IO[bytes], name: str) -> bytes:
    """The whole content. Raises ConfigError if it is too large."""
    content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"--file: {name} is larger than {MAX_FILE_BYTES:,} bytes: split it")
    return content
