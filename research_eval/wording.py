"""How messages, tables and pictures say things: suggestions, short texts, plain numbers, text that is safe to print.

Every part of the project words these things the same way because it calls these functions. The module imports nothing
of the project.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Set
from typing import Any, Protocol, runtime_checkable

_PLAIN_TYPES = frozenset({float, str, int, bool, list, tuple, dict, type(None)})


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most similar to `name`; None if no name is similar enough.

    >>> nearest("num_expert", ["num_experts", "dropout"])
    'num_experts'
    """
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A question with the nearest known name, to be appended to a message; empty if no name is near.

    >>> did_you_mean("num_expert", ["num_experts"])
    " Did you mean 'num_experts'?"
    """
    near = nearest(name, known, cutoff)
    return "" if near is None else f" Did you mean {near!r}?"


def hint(name: str, known: Iterable[str]) -> str:
    """What the user can write instead of an unknown name: the nearest known name, or else all of them.

    >>> hint("den", ["dense", "moe"]), hint("x", ["moe", "dense"])
    (" Did you mean 'dense'?", ' Known: dense, moe.')
    """
    known = sorted(known)
    return did_you_mean(name, known) or (f" Known: {', '.join(known)}." if known else "")


def shortened(text: str, length: int, mark: str = "…") -> str:
    """The text, cut to `length` characters if it is longer; `mark` replaces what is missing.

    >>> shortened("abcdef", 4), shortened("abc", 4), shortened("abcdef", 5, "...")
    ('abc…', 'abc', 'ab...')
    """
    return text if len(text) <= length else text[: length - len(mark)] + mark


def printable(text: str, replacement: str | None = None) -> str:
    r"""The text on one line of a terminal: characters that would steer the terminal become their escapes.

    With a `replacement`, that text takes the place of each such character, so that the length does not change.

    >>> print(printable("two" + chr(10) + "lines"))
    two\nlines
    """
    return "".join(
        letter if letter.isprintable() else ascii(letter)[1:-1] if replacement is None else replacement
        for letter in text
    )


def aligned(header: list[str], rows: list[list[str]], right: Set[int] = frozenset()) -> list[str]:
    """The rows as lines with aligned columns. `right` has the indices of columns with numbers. No rows, no lines."""
    if not rows:
        return []
    from rich.cells import cell_len

    table = [header, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]

    def padded(cell: str, index: int) -> str:
        blanks = " " * (widths[index] - cell_len(cell))
        return blanks + cell if index in right else cell + blanks

    return ["  ".join(padded(cell, index) for index, cell in enumerate(row)).rstrip() for row in table]


def shown(value: Any, length: int = 80) -> str:
    """A value for a message: JSON on one line, shortened."""
    return shortened(printable(json.dumps(value, ensure_ascii=False, default=repr)), length, "...")


def largest_of(sizes: Mapping[str, Any]) -> str:
    """The three largest whole numbers: the settings that a message tells the user to lower.

    >>> largest_of({"embed_dim": 10**9, "gated": True, "num_layers": 2})
    'embed_dim=1000000000, num_layers=2'
    """
    whole = {name: value for name, value in sizes.items() if isinstance(value, int) and not isinstance(value, bool)}
    return ", ".join(f"{name}={whole[name]}" for name in sorted(whole, key=lambda name: -whole[name])[:3])


@runtime_checkable
class _Array(Protocol):
    """An array or tensor of any library, or one of its numbers."""

    def tolist(self) -> Any: ...


def plain(value: Any) -> Any:
    """Python's own numbers and lists in place of those of numpy and torch; everything else as it is."""
    if type(value) in _PLAIN_TYPES:  # asking the protocol is much slower
        return value
    return value.tolist() if isinstance(value, _Array) else value
