"""Tables of text, written for a terminal, as Markdown and as LaTeX; and numbers as a reader wants them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from research_eval.analysis.statistics import Interval

_SCORE = re.compile(r"(^|_)(f1|acc|accuracy)(_|$)")
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"}
_LATEX |= {"[": "{[}", "]": "{]}"}  # behind a line break a bracket would be an option
_LATEX |= {"≥": r"$\geq$", "\N{REPLACEMENT CHARACTER}": "?"}


@dataclass(frozen=True)
class Table:
    """Cells of plain text; whoever writes them down escapes them. `columns` in `left` are text, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()
    notes: Sequence[str] = field(default=())

    def text(self) -> str:
        """Columns in line, for a terminal."""
        lines = [[printable(cell) for cell in line] for line in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(
                cell.ljust(width) if name in self.left else cell.rjust(width)
                for cell, width, name in zip(line, widths, self.columns, strict=True)
            ).rstrip()
            for line in lines
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        head, foot = [printable(self.title), rule, aligned[0], rule], [rule, *map(printable, self.notes)]
        return "\n".join(head + aligned[1:] + foot)

    def markdown(self) -> str:
        """A heading, a table, its notes."""
        lines = [f"## {_markdown(self.title)}", "", f"| {' | '.join(map(_markdown, self.columns))} |"]
        lines.append("|" + "".join(" :--- |" if name in self.left else " ---: |" for name in self.columns))
        lines += [f"| {' | '.join(map(_markdown, row))} |" for row in self.rows]
        lines += [""] + [f"- {_markdown(note)}" for note in self.notes]
        return "\n".join(lines).rstrip() + "\n"

    def latex(self) -> str:
        """A table environment; needs the package booktabs."""
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
            *(rf"    {' & '.join(map(_latex, row))} \\" for row in self.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            *notes,
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


def printable(text: str) -> str:
    """One line without control characters."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _markdown(text: str) -> str:
    text = re.sub(r"([\\`*\[\]<>|~$#])", r"\\\1", printable(text))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word an underscore is only that


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in printable(text))


# --------------------------------------------------------------------------------------------------------- numbers


def is_score(metric: str) -> bool:
    """Whether the metric is a share of right answers, 1 at best, so that a run can be said to have solved its task."""
    return bool(_SCORE.search(metric))


def short_number(value: float | None) -> str:
    """Three digits and a thousands' letter.

    >>> [short_number(value) for value in (12, 9_999, 1_234_567, 0.01234, None)]
    ['12', '10k', '1.23M', '0.0123', '']
    """
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value) or abs(value) >= 1e18:
        return f"{value:.3g}"
    value = float(f"{value:.3g}")
    for power, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g}{letter}"
    return f"{value:.3g}"


def metric_text(value: float | None, metric: str) -> str:
    """Scores with four decimals, other values short."""
    if value is None:
        return ""
    return f"{value:.4f}" if is_score(metric) else short_number(value)


def interval_text(interval: Interval | None, metric: str) -> str:
    return "" if interval is None else f"[{metric_text(interval.low, metric)}, {metric_text(interval.high, metric)}]"
