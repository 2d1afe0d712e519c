"""Tables of text for a terminal, as Markdown and as LaTeX; and numbers as a reader wants them.

Text in a table may come from a foreign database, so that every output escapes it in its own way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from research_eval.analysis.statistics import SHARE, Interval
from research_eval.wording import printable

UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"
_SCORE = re.compile(r"(^|_)(f1|acc|accuracy|exact_match)(_|$)")
# A hyphen before a number, or between two blanks; not the one of an exponent, a date or a name.
_MINUS = re.compile(r"(?<![\w.-])-(?=\.?\d)(?!\d+-)|(?<= )-(?= )")
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"}
_LATEX |= {"[": "{[}", "]": "{]}"}  # after a line break LaTeX reads a bracket as an option
_LATEX |= {"≥": r"$\geq$", UNPRINTABLE: "?"}


@dataclass(frozen=True)
class Table:
    """Cells of plain text. Columns whose names are in `left` are aligned to the left, as text; the others hold numbers.

    `notes` are sentences below the table. LaTeX prints the cells of `bold` (row, column) in bold. The methods escape
    all text for their format.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()
    notes: Sequence[str] = field(default=())
    bold: AbstractSet[tuple[int, int]] = frozenset()

    def text(self) -> str:
        """Aligned columns, for a terminal."""
        lines = [[one_line(cell) for cell in line] for line in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(
                cell.ljust(width) if name in self.left else cell.rjust(width)
                for cell, width, name in zip(line, widths, self.columns, strict=True)
            ).rstrip()
            for line in lines
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        head, foot = [one_line(self.title), rule, aligned[0], rule], [rule, *map(one_line, self.notes)]
        return "\n".join(head + aligned[1:] + foot)

    def markdown(self) -> str:
        """A heading, a table and its notes."""
        lines = [f"## {_markdown(self.title)}", "", f"| {' | '.join(map(_markdown, self.columns))} |"]
        lines.append("|" + "".join(" :--- |" if name in self.left else " ---: |" for name in self.columns))
        lines += [f"| {' | '.join(map(_markdown, row))} |" for row in self.rows]
        lines += [""] + [f"- {_markdown(note)}" for note in self.notes]
        return "\n".join(lines).rstrip() + "\n"

    def latex(self) -> str:
        """A table environment. The document has to load the package booktabs.

        A minus sign is a real one, not a hyphen.
        """
        notes = [rf"  \par\smallskip\footnotesize {_latex(note)}" for note in self.notes]
        lines = [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_latex(self.title)}}}",
            rf"  \begin{{tabular}}{{{''.join('l' if name in self.left else 'r' for name in self.columns)}}}",
            r"    \toprule",
            rf"    {' & '.join(map(_latex, self.columns))} \\",
            r"    \midrule",
            *(rf"    {' & '.join(self._latex_cells(number))} \\" for number in range(len(self.rows))),
            r"    \bottomrule",
            r"  \end{tabular}",
            *notes,
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def _latex_cells(self, row: int) -> list[str]:
        """The cells of a row for LaTeX. Bold is the number, and not the interval after it."""
        cells = [_MINUS.sub("$-$", _latex(cell)) for cell in self.rows[row]]
        for place in range(len(cells)):
            if (row, place) in self.bold:
                number, blank, interval = cells[place].partition(" ")
                cells[place] = rf"\textbf{{{number}}}{blank}{interval}"
        return cells


def one_line(text: str) -> str:
    """The text on one line; each control character becomes one replacement character.

    Messages show escapes instead (`wording.printable`). A cell or a label keeps its width this way, and Markdown and
    LaTeX do not have to escape the backslashes of an escape.
    """
    return printable(text, UNPRINTABLE)


def _markdown(text: str) -> str:
    """The text with backslashes before all characters that Markdown interprets."""
    text = re.sub(r"([\\`*\[\]<>|~$#])", r"\\\1", one_line(text))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # an underscore inside a word is never a mark


def _latex(text: str) -> str:
    """The text with commands in place of all characters that LaTeX interprets."""
    return "".join(_LATEX.get(character, character) for character in one_line(text))


# --------------------------------------------------------------------------------------------------------- numbers


def is_score(metric: str) -> bool:
    """Whether the metric is a share of right answers, so that 1 means that a run has solved its task.

    >>> is_score("final_val_f1"), is_score("final_val_loss")
    (True, False)
    """
    return bool(_SCORE.search(metric))


def bounds_of(metric: str) -> Interval | None:
    """Between which values a metric lies; None if it has no bounds, or none that are known."""
    return SHARE if is_score(metric) else None


def short_number(value: float | None, digits: int = 3) -> str:
    """Three digits, or so many, and a letter for thousands, millions and so on; empty for None and NaN.

    >>> [short_number(value) for value in (12, 9_999, 1_234_567, 0.01234, None)]
    ['12', '10k', '1.23M', '0.0123', '']
    """
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value) or abs(value) >= 1e18:
        return f"{value:.{digits}g}"
    value = float(f"{value:.{digits}g}")
    for power, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def metric_text(value: float | None, metric: str) -> str:
    """A score with four decimals, any other value short; empty for None."""
    if value is None:
        return ""
    return f"{value:.4f}" if is_score(metric) else short_number(value)


def interval_text(interval: Interval | None, metric: str) -> str:
    """`[0.9012, 0.9345]`; empty for None."""
    return "" if interval is None else f"[{metric_text(interval.low, metric)}, {metric_text(interval.high, metric)}]"
