"""matplotlib, imported in this one place. Import this module inside functions: matplotlib takes long.

The pictures are drawn without pyplot, so that they need no display and do not change how a notebook shows its own
figures. The backend that the environment names (MPLBACKEND) is for pyplot alone. It may be one that only the notebook
has, and importing matplotlib with it would fail.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DPI = 130


@contextmanager
def _without_a_backend() -> Iterator[None]:
    """Hide MPLBACKEND in the block; afterwards pyplot finds its backend as if nothing had been hidden."""
    name = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if name is not None:
            os.environ["MPLBACKEND"] = name
    if name:
        with contextlib.suppress(ValueError):  # an unknown name, about which importing matplotlib would complain
            matplotlib.rcParams["backend"] = name


with _without_a_backend():
    import matplotlib
    from matplotlib import colormaps as colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable as ScalarMappable
    from matplotlib.collections import LineCollection as LineCollection
    from matplotlib.colors import LinearSegmentedColormap as LinearSegmentedColormap
    from matplotlib.colors import ListedColormap as ListedColormap
    from matplotlib.colors import Normalize as Normalize
    from matplotlib.colors import to_rgba as to_rgba
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D as Line2D
    from matplotlib.patches import FancyArrowPatch as FancyArrowPatch
    from matplotlib.patches import Patch as Patch
    from matplotlib.ticker import FuncFormatter as FuncFormatter
    from matplotlib.ticker import LogLocator as LogLocator
    from matplotlib.ticker import MaxNLocator as MaxNLocator
    from matplotlib.ticker import NullFormatter as NullFormatter
    from matplotlib.ticker import NullLocator as NullLocator


def new_figure(width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes. The sizes are in inches; `options` go to `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**options)


def encoded(figure: Any, file_format: str, name: str) -> bytes:
    """The figure as the content of a file, such as "png" or "svg". Equal figures with equal names give equal bytes."""
    picture = io.BytesIO()
    # Without these two settings an SVG file holds the time of day and random identifiers.
    metadata = {"Date": None} if file_format == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(picture, format=file_format, dpi=DPI, metadata=metadata)
    return picture.getvalue()
