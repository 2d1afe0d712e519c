"""What the pictures of results show, whoever draws them: points with their Pareto front, learning curves, colours.

The files of `result_plots` and the HTML page draw the same of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from research_eval.analysis.runs import Group, Results
from research_eval.analysis.statistics import Interval, mean_interval, pareto_front
from research_eval.metrics import DEFAULT_METRIC

if TYPE_CHECKING:
    from research_eval.db_utils import Store

SCORE = DEFAULT_METRIC
SCORE_LABEL = "macro-F1 on validation"
COST_LABELS = {
    "param_count": "trainable parameters",
    "inference_latency_ms_batch": "inference latency in ms per batch",
    "inference_flops_per_sample": "inference FLOPs per sample",
}
CURVES = {"val_f1": SCORE_LABEL, "val_loss": "loss on validation"}
MAX_PANELS = 6  # tasks that fit a picture; those with the most runs are shown

# Okabe and Ito's colours for all kinds of colour vision, without the yellow that white paper swallows.
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555")
_KNOWN = ("dense", "moe", "goe", "goe_original", "goe_scan", "looped", "lstm")
_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")


@dataclass(frozen=True)
class Style:
    """How a model type looks in every picture."""

    colour: str
    marker: str  # a name of plotly's


@dataclass(frozen=True)
class Point:
    """One config: its mean cost and mean score over seeds."""

    group: Group
    cost: float
    score: float
    interval: Interval | None
    on_front: bool


@dataclass(frozen=True)
class Curve:
    """A series of a config over the epochs: the mean of its seeds where all have a point, and each seed."""

    group: Group
    epochs: list[float]
    mean: list[float]
    intervals: list[Interval | None]
    seeds: list[tuple[list[float], list[float]]]


def styles(model_types: Iterable[str]) -> dict[str, Style]:
    """The models of the project always look the same; others share what is left, with other markers."""
    others = sorted(set(model_types) - set(_KNOWN))
    found = {name: Style(*pair) for name, pair in zip(_KNOWN, zip(_PALETTE, _MARKERS, strict=True), strict=True)}
    for number, name in enumerate(others):
        marker = _MARKERS[(len(_MARKERS) - 2 - number) % len(_MARKERS)]
        found[name] = Style(_PALETTE[(len(_PALETTE) - 1 - number) % len(_PALETTE)], marker)
    return found


def panels(results: Results) -> list[str]:
    """The tasks to draw, in their order: all, or those with the most runs."""
    runs = {
        task: sum(count.total() for (one, _), count in results.spent.items() if one == task) for task in results.tasks
    }
    largest = sorted(runs, key=lambda task: -runs[task])[:MAX_PANELS]
    return [task for task in results.tasks if task in largest]


def points_of(results: Results, task: str, cost: str, confidence: float) -> list[Point]:
    """All configs of a task that have both figures, and which of them are on the Pareto front."""
    found = []
    for group in results.of_task(task):
        score, price = group.mean(SCORE), group.mean(cost)
        if score is not None and price is not None:
            found.append((group, price, score, mean_interval(group.values(SCORE), confidence)))
    front = set(pareto_front([price for _, price, _, _ in found], [score for _, _, score, _ in found]))
    return [Point(*one, number in front) for number, one in enumerate(found)]


def is_wide(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows more: a range of more than a factor of 10, and nothing at or below 0."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 10


def curve_of(store: Store, group: Group, series: str, confidence: float) -> Curve | None:
    """None where the store has no such points."""
    seeds: list[dict[float, float]] = []
    for run in group.runs:
        rows = store.history(run.experiment_id, series)
        points = {row.epoch: row.value for row in rows if math.isfinite(row.value)}
        if points:
            seeds.append(points)
    if not seeds:
        return None
    epochs = sorted(set.intersection(*map(set, seeds)))
    values = [[points[epoch] for points in seeds] for epoch in epochs]
    return Curve(
        group,
        epochs,
        [fmean(column) for column in values],
        [mean_interval(column, confidence) for column in values],
        [(list(points), list(points.values())) for points in seeds],
    )
