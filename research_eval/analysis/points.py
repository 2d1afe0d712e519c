"""What the pictures of results show: points with their Pareto front, learning curves, colours.

The files of `result_plots` and the HTML page of `report` both draw from these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING

from research_eval.analysis.baselines import Baseline, baselines_of
from research_eval.analysis.runs import Group, Results, with_enough_seeds
from research_eval.analysis.statistics import FEWEST, Interval, mean_interval, no_spread, pareto_front
from research_eval.analysis.tables import bounds_of
from research_eval.store.metrics import DEFAULT_METRIC, gain_sign, score_of_epoch

if TYPE_CHECKING:
    from research_eval.store.store import Store

COST_LABELS = {
    "param_count": "trainable parameters",
    "inference_latency_ms_batch": "inference latency in ms per batch",
    "inference_flops_per_sample": "inference FLOPs per sample",
}
LOSS_CURVE = {"val_loss": "loss on validation"}
MAX_PANELS = 6  # tasks in a picture; those with the most runs are shown

# The colours of Okabe and Ito, which people with any kind of colour vision can tell apart. Their yellow is left out,
# because it is hard to see on white.
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555")
_KNOWN = ("dense", "moe", "goe", "goe_original", "goe_scan", "looped", "lstm")
_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")


@dataclass(frozen=True)
class Style:
    """Colour and marker of a model type, the same in every picture."""

    colour: str
    marker: str  # the name of a marker in plotly


@dataclass(frozen=True)
class Score:
    """The metric that the pictures show as quality, with its names for readers.

    `curves` are the series over the epochs beside it: the name of each in the store, and its label. `baselines` are
    scores that need no model, for each task.
    """

    metric: str
    name: str  # in the middle of a text, such as `F1` or `rmse`
    label: str
    curves: dict[str, str]
    baselines: dict[str, list[Baseline]] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Results, chosen: str) -> Score:
        """F1 if any run has it, whatever metric is `chosen`: so all pictures of a classification compare. Else that."""
        metric = DEFAULT_METRIC if any(group.values(DEFAULT_METRIC) for group in results.groups) else chosen
        series = score_of_epoch(metric)
        if series is None:
            return cls(metric, metric, metric, LOSS_CURVE)
        score = series.removeprefix("val_")
        name = "F1" if score == "f1" else score
        curve = f"{'macro-F1' if score == 'f1' else score} on validation"
        label = curve if metric.startswith("final_") else f"best {curve}"
        return cls(metric, name, label, {series: curve, **LOSS_CURVE})

    def with_baselines(self, store: Store, results: Results) -> Score:
        """The same with the baselines of the tasks."""
        return replace(self, baselines=baselines_of(store, results, self.metric))

    @property
    def sign(self) -> int:
        """The product of sign and value is larger for better values."""
        return gain_sign(self.metric)

    @property
    def axis(self) -> str:
        """The label of an axis: `macro-F1 on validation (final_val_f1)`."""
        return self.label if self.label == self.metric else f"{self.label} ({self.metric})"


class Standing(Enum):
    """How a config stands against those that cost no more. The values are texts for a legend."""

    FRONT = "on the Pareto front"
    LEVEL = "interval overlaps that of a better one"
    WORSE = "clearly worse, and not cheaper"
    OPEN = "too few seeds for an interval"


@dataclass(frozen=True)
class Point:
    """One config: its mean cost and mean score over seeds."""

    group: Group
    cost: float
    score: float
    interval: Interval | None
    competes: bool  # whether it has enough seeds to be on the front
    standing: Standing

    @property
    def on_front(self) -> bool:
        """Whether no competing config is better at the same or a lower cost."""
        return self.standing is Standing.FRONT


@dataclass(frozen=True)
class Curve:
    """A series of a config over the epochs: the mean over its seeds, and each seed.

    `epochs`, `mean` and `intervals` have the epochs at which all seeds have a value. `seeds` has the epochs and values
    of each seed.
    """

    group: Group
    epochs: list[float]
    mean: list[float]
    intervals: list[Interval | None]
    seeds: list[tuple[list[float], list[float]]]


def styles(model_types: Iterable[str]) -> dict[str, Style]:
    """A style for each model type. The models of the project always look the same.

    Other types share the remaining combinations of colour and marker, counted from the end of both lists.
    """
    others = sorted(set(model_types) - set(_KNOWN))
    found = {name: Style(*pair) for name, pair in zip(_KNOWN, zip(_PALETTE, _MARKERS, strict=True), strict=True)}
    for number, name in enumerate(others):
        marker = _MARKERS[(len(_MARKERS) - 2 - number) % len(_MARKERS)]
        found[name] = Style(_PALETTE[(len(_PALETTE) - 1 - number) % len(_PALETTE)], marker)
    return found


def panels(results: Results) -> list[str]:
    """The tasks to draw, in their order: all of them, or the `MAX_PANELS` with the most runs."""
    runs = {
        task: sum(count.total() for (one, _), count in results.spent.items() if one == task) for task in results.tasks
    }
    largest = sorted(runs, key=lambda task: -runs[task])[:MAX_PANELS]
    return [task for task in results.tasks if task in largest]


def points_of(results: Results, task: str, cost: str, score: Score, confidence: float) -> list[Point]:
    """All configs of a task that have both a score and this cost, each with its standing.

    The front is chosen like a best config: a config with too few seeds is neither on it nor above it. A config is
    clearly worse if its interval lies below the interval of a competing config that costs no more.
    """
    found = []
    for group in results.of_task(task):
        value, price = group.mean(score.metric), group.cost(cost)
        if value is not None and price is not None:
            interval = mean_interval(group.values(score.metric), confidence, bounds_of(score.metric))
            found.append((group, price, value, interval))
    # Groups are compared by identity: equal groups do not exist, and comparing their runs would be slow.
    able = set(map(id, with_enough_seeds([group for group, *_ in found], score.metric)))
    rivals = [number for number, (group, *_) in enumerate(found) if id(group) in able]
    costs, gains = [found[number][1] for number in rivals], [score.sign * found[number][2] for number in rivals]
    front = {rivals[place] for place in pareto_front(costs, gains)}
    ranges = [_range(group.values(score.metric), interval, score.sign) for group, *_, interval in found]
    worse = _clearly_worse([price for _, price, *_ in found], ranges, set(rivals))

    def standing(number: int) -> Standing:
        if number in front:
            return Standing.FRONT
        if ranges[number] is None:
            return Standing.OPEN
        return Standing.WORSE if number in worse else Standing.LEVEL

    return [Point(*one, id(one[0]) in able, standing(number)) for number, one in enumerate(found)]


def _range(values: Sequence[float], interval: Interval | None, sign: int) -> tuple[float, float] | None:
    """Between which values a mean lies, larger is better; equal seeds leave no doubt. None if that is not known."""
    if interval is None:
        return (sign * values[0], sign * values[0]) if len(values) >= FEWEST and no_spread(values) else None
    low, high = sorted((sign * interval.low, sign * interval.high))
    return low, high


def _clearly_worse(costs: Sequence[float], ranges: Sequence[tuple[float, float] | None], rivals: set[int]) -> set[int]:
    """The configs whose range lies wholly below that of a rival with the same or a lower cost."""
    found, best, waiting = set(), -math.inf, sorted(range(len(costs)), key=lambda number: costs[number])
    for _, same in groupby(waiting, key=lambda number: costs[number]):
        numbers = list(same)
        lows = [one[0] for number in numbers if number in rivals and (one := ranges[number]) is not None]
        best = max([best, *lows])
        found |= {number for number in numbers if (one := ranges[number]) is not None and one[1] < best}
    return found


def is_wide(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows more: a range of more than a factor of 10, and nothing at or below 0."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 10


def curve_of(store: Store, group: Group, series: str, confidence: float) -> Curve | None:
    """The curve of a group; None if the store has no points of this series."""
    seeds: list[dict[float, float]] = []
    for run in group.runs:
        rows = store.history(run.experiment_id, series)
        points = {row.epoch: row.value for row in rows if math.isfinite(row.value)}
        if points:
            seeds.append(points)
    if not seeds:
        return None
    # Early stopping ends the curves at different epochs; a mean over fewer seeds would jump there.
    epochs = sorted(set.intersection(*map(set, seeds)))
    values = [[points[epoch] for points in seeds] for epoch in epochs]
    return Curve(
        group,
        epochs,
        [fmean(column) for column in values],
        [mean_interval(column, confidence, bounds_of(series)) for column in values],
        [(list(points), list(points.values())) for points in seeds],
    )
