"""Text of the commands that print runs: numbers, aligned columns, tables on a terminal.

Names and values may come from a foreign database, so that everything printed here passes `printable` first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from research_eval.system.best_effort import print_product
from research_eval.wording import aligned, printable, shortened

if TYPE_CHECKING:
    from research_eval.store.changes import Change, MetricDifference

log = logging.getLogger(__name__)

MAX_WIDTH = 100  # characters of a value on one line
STATUS_COLOURS = {"finished": "green", "failed": "red", "diverged": "red", "running": "cyan", "interrupted": "yellow"}
# Columns that a narrow terminal does without, the least useful first.
HIDDEN_FIRST = ("type", "started", "seed", "seconds", "param_count", "name")


def number(value: float) -> str:
    """A number that is easy to read.

    >>> number(1234567.0), number(0.98765432), number(1e-7)
    ('1,234,567', '0.987654', '1e-07')
    """
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"


def exact(value: Any) -> str:
    """Every digit of a number, for comparing; the beginning of any other value."""
    return repr(value) if isinstance(value, float) else short(value, MAX_WIDTH // 3)


def short(value: Any, width: int = MAX_WIDTH) -> str:
    """A value on one line of at most `width` characters; a list that is cut begins with the number of its entries.

    >>> short("a"), short([1, 2]), short(list(range(50)), 30)
    ('a', '[1, 2]', '50 entries: [0, 1, 2, 3, 4,...')
    """
    from research_eval.store.values import strict_json

    text = value if isinstance(value, str) else strict_json(value)
    if isinstance(value, list) and len(text) > width:
        text = f"{len(value)} entries: {text}"
    text = printable(text)
    return shortened(text, width, "...")


def counted(count: int, noun: str) -> str:
    """`1 run`, `1,200 runs`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def pairs(values: dict[str, Any]) -> list[str]:
    """A line for each name with its value; the values are aligned."""
    names = [printable(name) for name in values]
    width = max(map(len, names), default=0)
    return [f"  {name:<{width}}  {printable(str(value))}" for name, value in zip(names, values.values(), strict=True)]


def print_table(header: list[str], rows: list[list[str]], numbers: set[int]) -> None:
    """Print a table: with colours and columns that fit on a terminal, as plain aligned text into a file or pipe.

    `numbers` has the indices of columns with numbers. The first column has the ids of runs, the second their statuses.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        print_product("\n".join(aligned(header, rows, numbers)) + "\n")
        return
    hidden = _hidden(header, rows, console.width)
    if hidden:
        log.info(
            "columns hidden (terminal too narrow): %s; --json has everything",
            ", ".join(header[index] for index in hidden),
        )
    shown = [index for index in range(len(header)) if index not in hidden]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index in shown:
        table.add_column(
            Text(header[index]),
            justify="right" if index in numbers else "left",
            no_wrap=True,
            min_width=max(len(row[index]) for row in rows) if index == 0 else None,
        )
    for row in rows:
        cells = [Text(printable(cell)) for cell in row]
        cells[1].stylize(STATUS_COLOURS.get(row[1], ""))
        table.add_row(*(cells[index] for index in shown))
    console.print(table)
    print_product("")  # has it arrived?


def _hidden(header: list[str], rows: list[list[str]], width: int) -> list[int]:
    """The indices of columns to hide, so that a line fits into `width`. Ids are never hidden or cut."""
    from rich.cells import cell_len

    widths = {
        index: max(cell_len(printable(row[index])) for row in [header, *rows]) + 2 for index in range(len(header))
    }
    hidden: list[int] = []
    for name in HIDDEN_FIRST:
        if sum(widths.values()) - 2 > width and name in header:
            hidden.append(header.index(name))
            del widths[hidden[-1]]
    return hidden


def changes_lines(found: Sequence[Change], left: str, right: str) -> list[str]:
    """A line for each difference between two configs or environments. `left` and `right` are the titles."""
    return aligned(["  ", left, right], [[f"  {name}", short(one), short(other)] for name, one, other in found])


def differences_lines(found: Sequence[MetricDifference], left: str, right: str) -> list[str]:
    """A line for each metric that differs, and one line for all metrics that only one side has."""
    from research_eval.store.changes import MISSING

    rows = [
        [f"  {name}", exact(one), exact(other), f"{gap:.3g}" if gap < math.inf else "-"]
        for name, one, other, gap in found
        if MISSING not in (one, other)
    ]
    only_left = [pair.name for pair in found if pair.right == MISSING]
    only_right = [pair.name for pair in found if pair.left == MISSING]
    return aligned(["  ", left, right, "difference"], rows) + [
        f"  only {side}: {', '.join(map(printable, names))}"
        for side, names in ((left, only_left), (right, only_right))
        if names
    ]
