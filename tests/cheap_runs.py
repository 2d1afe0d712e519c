"""Makes the end of a run or study cheap: pictures and latency take longer than everything else in a small one."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from research_eval.analysis import expert_graph, study_plots
from research_eval.training import latency
from research_eval.training.length import Length

_OF_STUDIES = ("draw_history", "draw_importance", "draw_parallel_coordinates", "draw_pareto")
_REAL = [(expert_graph, "draw_expert_graph", expert_graph.draw_expert_graph)] + [
    (study_plots, name, getattr(study_plots, name)) for name in _OF_STUDIES
]
PIXEL = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAsTjnIgAAAABJRU5ErkJggg==")


def make_runs_cheap(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Blank pictures of the graph of experts and of studies, and the fewest repetitions of the latency."""
    set_attribute(expert_graph, "draw_expert_graph", blank_picture)
    for name in _OF_STUDIES:
        set_attribute(study_plots, name, blank_picture)
    set_attribute(latency, "SECONDS", 0.0)


def draw_pictures_again(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Undo the blank pictures of `make_runs_cheap`."""
    for module, name, draw in _REAL:
        set_attribute(module, name, draw)


def make_runs_short(set_attribute: Callable[[Any, str, Any], None], steps: int) -> None:
    """At most so many steps per training and so many evaluations as before."""
    length_of = Length.of

    def shorter(*config_and_data: Any) -> Length:
        whole = length_of(*config_and_data)
        if whole.total <= steps:
            return whole
        period = max(1, steps // whole.evaluations)
        return replace(whole, per_epoch=period, total=period * whole.evaluations, period=period)

    set_attribute(Length, "of", shorter)


def blank_picture(_: Any, path: Path, *title: str) -> None:
    """As the functions that draw the metrics of a run or the charts of a study, with one grey point."""
    path.write_bytes(PIXEL)
