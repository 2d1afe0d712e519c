"""What all pictures share: figures that are saved as files, colours, markers, labels that fit.

The modules that draw with matplotlib (`routing_plots`, `expert_graph`, `result_plots`, `study_plots`) import these
helpers, so that equal things look equal in every picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research_eval.analysis.tables import one_line
from research_eval.files import write_atomically
from research_eval.wording import shortened

INK, PALE = "#222222", "#8A8A8A"  # text and important lines; frames and minor marks
GRID = "#E6E6E6"
# plotly's name of a marker -> matplotlib's. The styles of model types (`points.styles`) use plotly's names.
MATPLOTLIB_MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "diamond": "D",
    "triangle-down": "v",
    "cross": "P",
    "x": "X",
}
DISTINCT_COLOURS = 10  # colours of matplotlib's palette "tab10"


@contextmanager
def figure_for(
    path: Path, width: float, height: float, beside: Sequence[str] = (), **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes; save the figure to `path` when the block ends without an exception.

    `width` and `height` are in inches. `beside` lists suffixes such as ".svg"; the figure is also saved under `path`
    with each of them. `options` go to `Figure.subplots`. The drawing needs no display, and equal data give an equal
    file.
    """
    from research_eval.system.drawing import encoded, new_figure

    figure, axes = new_figure(width, height, **options)
    yield figure, axes
    for file in (path, *(path.with_suffix(suffix) for suffix in beside)):
        write_atomically(file, encoded(figure, file.suffix[1:], path.stem))


def expert_colours(num_experts: int) -> list[Any]:
    """One colour per expert: a palette of clearly different colours for up to ten, a continuous scale for more."""
    from research_eval.system.drawing import colormaps

    if num_experts <= DISTINCT_COLOURS:
        return [colormaps["tab10"](expert) for expert in range(num_experts)]
    # The ends of the scale "turbo" are nearly black, so that they are left out.
    return [colormaps["turbo"](0.06 + 0.88 * expert / (num_experts - 1)) for expert in range(num_experts)]


def label(text: str, length: int) -> str:
    """A user's text for a picture: one line of at most `length` characters."""
    return shortened(one_line(text), length)


def draw_grid(panel: Any) -> None:
    """Give a panel a pale grid and a pale frame on the left and at the bottom."""
    panel.grid(visible=True, color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(PALE)
    panel.tick_params(color=PALE, labelsize=9)


def show_as_written(legend: Any) -> None:
    """Turn off mathematics in a legend: a dollar sign in a name is a dollar sign."""
    for text in legend.get_texts():
        text.set_parse_math(False)
