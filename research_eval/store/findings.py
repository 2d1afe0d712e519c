"""What a check of `goe doctor` reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

OK, WARNING, PROBLEM, REPAIRED = "ok", "warning", "problem", "repaired"
MAX_NAMES = 3  # on a line


@dataclass(frozen=True)
class Finding:
    """What a check has found, and what to do about it.

    `repair` exists if it can be repaired without losing anything; it returns a text that says what it did.
    """

    level: str
    check: str
    text: str
    repair: Callable[[], str] | None = None

    def __str__(self) -> str:
        return f"{self.level:<8}  {self.check}: {self.text}"


def first_of(names: Iterable[str]) -> str:
    """The first names, and how many more there are.

    >>> first_of(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    listed = list(names)
    more = len(listed) - MAX_NAMES
    return ", ".join(listed[:MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")
