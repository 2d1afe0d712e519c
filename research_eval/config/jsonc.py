"""JSON with comments and trailing commas: its values, and the line of each value.

The standard parser does the parsing. This module replaces comments and trailing commas by blanks first, so that the
parser meets every character at its place in the file, and explains in plain words what the parser refuses.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from research_eval.config.complaints import Location, Report
from research_eval.errors import ConfigError
from research_eval.system.untrusted import read_limited
from research_eval.wording import shown

MAX_BYTES = 1_000_000  # of a config file
MAX_DEPTH = 50  # of brackets, far below the depth at which Python's own recursion ends

# A string (perhaps not closed), a comment, one sign, or a run of anything else. The possessive `*+` keeps the search
# linear in the length of the text.
_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*+"?|//[^\r\n]*|/\*.*?(?:\*/|\Z)|[{}\[\]:,]|[^\s{}\[\]:,"/]+|/', re.DOTALL)

_SYNTAX = {  # the parser's words -> ours
    "Expecting value": "expected a value, found {found}",
    "Expecting property name": "expected a key in double quotes, found {found}",
    "Expecting ':'": "expected ':', found {found}",
    "Expecting ','": "expected ',' or a closing bracket, found {found}",
    "Extra data": "expected the end of the file, found {found}",
    "Unterminated string": "this string is not closed",
    "Invalid control character": "a line break or control character inside a string: close the string, or write \\n",
    "Invalid \\": "unknown escape in a string: write \\\\ for a backslash",
}


class JsonSource:
    """The text of a file and its tokens. Raises ConfigError with line and column for text that is no JSON."""

    def __init__(self, text: str, name: str) -> None:
        self.text = text.removeprefix("\ufeff")
        self.name = name
        tokens = list(_TOKEN.finditer(self.text))
        comments = [token for token in tokens if token[0].startswith(("//", "/*"))]
        parts = [token for token in tokens if not token[0].startswith(("//", "/*"))]
        trailing_commas = {
            comma
            for before, comma, after in zip(parts, parts[1:], parts[2:], strict=False)
            if comma[0] == "," and after[0] in "]}" and before[0] not in "[{:,"
        }
        self._blank = [*comments, *trailing_commas]  # the parser must not see these
        self._parts = [part for part in parts if part not in trailing_commas]

    def complaint(self, position: int, message: str) -> ConfigError:
        """An error at the character with this index."""
        line, column = self.text.count("\n", 0, position) + 1, position - self.text.rfind("\n", 0, position)
        return ConfigError(f"{self.name}:{line}:{column}: {message}")

    def values(self) -> Any:
        """The value that the text describes."""
        text = self._blanked()
        self._check_parts()
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise self._explained(error) from None

    def _blanked(self) -> str:
        """The text with spaces in place of comments and trailing commas; every other character keeps its place."""
        characters = list(self.text)
        for blank in self._blank:
            if blank[0].startswith("/*") and not re.fullmatch(r"/\*.*\*/", blank[0], re.DOTALL):
                raise self.complaint(blank.start(), "this comment is not closed")
            characters[blank.start() : blank.end()] = re.sub(r"\S", " ", blank[0])
        return "".join(characters)

    def _check_parts(self) -> None:
        """Refuse what Python's parser accepts although it is no JSON, or although no float holds it."""
        depth = 0
        for part in self._parts:
            depth += (part[0] in "{[") - (part[0] in "}]")
            if depth > MAX_DEPTH:
                raise self.complaint(part.start(), f"nested deeper than {MAX_DEPTH} levels")
            if re.fullmatch(r"-?(NaN|Infinity)", part[0]):
                raise self.complaint(part.start(), f"expected a value, found {part[0]!r}")
            if re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", part[0]) and math.isinf(float(part[0])):
                raise self.complaint(part.start(), "this number is too large")

    def _explained(self, error: json.JSONDecodeError) -> ConfigError:
        """The parser's error in our words."""
        near = _TOKEN.match(self.text, error.pos)
        found = repr(near[0][:20]) if near else "the end of the file"
        message = next((ours for theirs, ours in _SYNTAX.items() if error.msg.startswith(theirs)), error.msg)
        return self.complaint(error.pos, message.replace("{found}", found))

    def lines(self) -> tuple[dict[Location, int], list[tuple[Location, str]]]:
        """The line of every key and list item, and a message per duplicate key, of a text that `values` accepts.

        The walk keeps the path to the present place, one step per open bracket: in a list the index of the item, in
        an object the key, or None if the next string is a key.
        """
        lines: dict[Location, int] = {}
        duplicates = []
        path: list[Any] = []
        line, seen = 1, 0
        for part in self._parts:
            line, seen = line + self.text.count("\n", seen, part.start()), part.start()
            sign = part[0]
            if sign[0] == '"' and re.search("[\ud800-\udfff]", json.loads(sign)):
                raise self.complaint(part.start(), "this string holds half of a \\u pair")
            if sign == ",":
                path[-1] = path[-1] + 1 if isinstance(path[-1], int) else None
            elif sign in "}]":
                path.pop()
            elif path and path[-1] is None:
                path[-1] = json.loads(sign)
                key = tuple(path)
                if key in lines:
                    duplicates.append((key, f"duplicate key {key[-1]!r}, first on line {lines[key]}"))
                    # JSON takes the last copy, so the lines inside the first one no longer count.
                    lines = {known: number for known, number in lines.items() if known[: len(key)] != key}
                lines[key] = line
            elif sign != ":":
                lines.setdefault(tuple(path), line)
                if sign in "{[":
                    path.append(None if sign == "{" else 0)
        return lines, duplicates


def read_object(text: str, source: str) -> tuple[dict[str, Any], dict[Location, int], list[tuple[Location, str]]]:
    """The object in a text, the lines of its keys and its duplicate keys. Raises ConfigError for any other value."""
    reader = JsonSource(text, source)
    data = reader.values()
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected an object {{...}}, got {shown(data)}")
    return data, *reader.lines()


def read_text(path: str | Path) -> str:
    """The text of a small file. Raises ConfigError if it cannot be read, is too large or is not UTF-8."""
    content = read_limited(path, MAX_BYTES, "a config file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def load_json(path: str | Path) -> dict[str, Any]:
    """The object in a file of JSON with comments. Raises ConfigError for duplicate keys and for other values."""
    data, lines, duplicates = read_object(read_text(path), str(path))
    report = Report(str(path), lines)
    report.add_duplicates(duplicates)
    report.raise_if_any()
    return data
