"""Input from outside the program: files of limited size, JSON of limited depth, text that cannot control a terminal."""

from __future__ import annotations

import json
import math
import os
import stat
import unicodedata
from pathlib import Path
from typing import Any

from research_eval.errors import ConfigError
from research_eval.wording import printable as printable
from research_eval.wording import shortened

MAX_LINE = 2000  # characters of one line of a message
MAX_LINES = 100
MAX_JSON_DEPTH = 100


def check_regular_file(path: str | Path) -> os.stat_result:
    """Raise ConfigError unless the path is a regular file. Reading a pipe or a device may never end."""
    try:
        found = os.stat(path)  # noqa: PTH116 - also accepts text that cannot be a Path
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null byte in the path
        raise ConfigError(f"{str(path)!r}: cannot be read: {error}") from error
    if stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path}: cannot be read: Is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: cannot be read: is no regular file")
    return found


def read_limited(path: str | Path, max_bytes: int, what: str) -> bytes:
    """The content of a regular file of at most `max_bytes`. Raises ConfigError.

    `what` names the expected kind of file in the message.
    """
    check_regular_file(path)
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - also accepts text that cannot be a Path
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise ConfigError(f"{path}: larger than {max_bytes // 1000} kB: this is not {what}")
    return content


def user_path(text: str, what: str = "") -> Path:
    """A path from a user, with ~ expanded to a home folder. Raises ConfigError; `what` begins the message."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{what}{': ' * bool(what)}{text}: there is no such home folder") from error


def in_folder(folder: Path, name: str) -> Path:
    """A file in a run's folder. Raises ConfigError for a symbolic link, which may lead out of the folder."""
    path = folder / name
    if folder.is_symlink() or path.is_symlink():
        link = folder if folder.is_symlink() else path
        raise ConfigError(f"{link}: is a symbolic link, which is not followed. Put the files themselves there.")
    return path


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse strict JSON: no NaN, no infinities, no duplicate keys, limited depth. Raises ConfigError.

    `source` begins the message.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError("a number is too large")
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{source}: not JSON: {problem}") from error
    if depth_of(value) > MAX_JSON_DEPTH:
        raise ConfigError(f"{source}: nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def depth_of(value: Any) -> int:
    """Number of nested levels of lists and dictionaries.

    >>> depth_of(1), depth_of([{"a": []}])
    (0, 3)
    """
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, list | dict)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def stored_object(text: str | None) -> dict[str, Any]:
    """A JSON object from the store; empty if another program stored something else there."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) and depth_of(value) <= MAX_JSON_DEPTH else {}


def steers(character: str) -> bool:
    """Whether a terminal, a log or a page interprets the character instead of showing it."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS


# Controls of the writing direction, which can make text look like other text.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def message(error: object) -> str:
    """An error's text for a terminal: every line printable, with limits on their length and number."""
    lines = [printable(line) for line in str(error).split("\n")]
    lines = [shortened(line, MAX_LINE, "...") for line in lines]
    return "\n".join(
        lines if len(lines) <= MAX_LINES else [*lines[:MAX_LINES], f"... and {len(lines) - MAX_LINES} more"]
    )
