"""What all pictures share: figures that are saved as files, colours, markers, labels that fit.

The modules that draw with matplotlib (`routing_plots`, `expert_graph`, `result_plots`, `study_plots`) import these
helpers, so that equal things look equal in every picture.
"""

from __future__ import annotations

import textwrap
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
# The colours of Okabe and Ito, which people with any kind of colour vision can tell apart. Instead of their yellow,
# which is hard to see on white, there is wine.
_DISTINCT = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#882255", "#777777")
INCHES_PER_POINT = 0.0077  # width of a character per point of its size, on average


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
    """One colour per expert: clearly different colours for up to eight, the continuous scale "viridis" for more.

    Both also work for people who see few colours. The yellow end of the scale is left out.
    """
    from research_eval.system.drawing import colormaps, to_rgba

    if num_experts <= len(_DISTINCT):
        return [to_rgba(colour) for colour in _DISTINCT[:num_experts]]
    return [colormaps["viridis"](0.9 * expert / (num_experts - 1)) for expert in range(num_experts)]


def ink_on(colour: Any) -> str:
    """Black or white: which of them is legible on this colour."""
    red, green, blue = colour[:3]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def label(text: str, length: int) -> str:
    """A user's text for a picture: one line of at most `length` characters."""
    return shortened(one_line(text), length)


def set_heading(figure: Any, *lines: str, size: float = 11.5) -> None:
    """Write lines above the panels, wrapped to the width of the figure: no title is cut off."""
    columns = max(12, int(figure.get_figwidth() / (INCHES_PER_POINT * size)))
    # matplotlib's own wrapping would read the text as mathematics.
    wrapped = [part for line in lines for part in textwrap.wrap(one_line(line), columns)]
    figure.suptitle("\n".join(wrapped), fontsize=size, parse_math=False)


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


def stage(is_layer: bool, number: int) -> str:
    """`layer 2` of a model that routes in every layer, `step 2` of a path."""
    return f"{'layer' if is_layer else 'step'} {number}"


def routes_in_layers(metrics: dict[str, Any]) -> bool:
    """Whether a model routes tokens in its layers. Models with paths have a mean path length."""
    return "mean_path_length" not in metrics
