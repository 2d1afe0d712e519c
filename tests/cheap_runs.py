"""Makes the end of a run cheap: its picture and its latency take longer than everything else in a small run."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from research_eval.analysis import expert_graph
from research_eval.training import latency
from research_eval.training.length import Length

DRAW_EXPERT_GRAPH = expert_graph.draw_expert_graph
PIXEL = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAsTjnIgAAAABJRU5ErkJggg==")


def make_runs_cheap(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """A blank picture of the graph of experts, and the fewest repetitions of the latency."""
    set_attribute(expert_graph, "draw_expert_graph", blank_graph)
    set_attribute(latency, "SECONDS", 0.0)


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


def blank_graph(metrics: dict[str, Any], path: Path, title: str) -> None:
    """As `draw_expert_graph`, with one grey point."""
    path.write_bytes(PIXEL)
