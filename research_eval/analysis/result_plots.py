"""Pictures of results as files, PNG and SVG: score against cost with its Pareto front, and learning curves."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research_eval.analysis.points import (
    COST_LABELS,
    CURVES,
    SCORE,
    SCORE_LABEL,
    Curve,
    Point,
    Style,
    is_wide,
    panels,
    points_of,
    styles,
)
from research_eval.analysis.routing_plots import figure_for, shortened
from research_eval.analysis.runs import Results
from research_eval.analysis.tables import printable, short_number

COLUMNS = 3  # panels beside each other
FEW = 60  # with more points, bars of dominated ones would hide the rest
MANY = 2000  # with more points, a vector file would be larger than a picture of them
INK, PALE = "#222222", "#8A8A8A"
MATPLOTLIB_MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "diamond": "D",
    "triangle-down": "v",
    "cross": "P",
    "x": "X",
}


def draw_cost_plot(results: Results, cost: str, confidence: float, path: Path) -> bool:
    """`path` is the PNG; an SVG comes beside it. False, and no file, where no run has both figures."""
    found = {task: points_of(results, task, cost, confidence) for task in panels(results)}
    found = {task: points for task, points in found.items() if points}
    if not found:
        return False
    looks = styles(results.model_types)
    with _panels(path, len(found), 5.6, 4.4) as (figure, axes):
        for panel, (task, points) in zip(axes, found.items(), strict=True):
            _draw_points(panel, points, looks)
            _title(panel, results.tasks[task])
            panel.set_xlabel(COST_LABELS[cost])
            panel.set_ylabel(f"{SCORE_LABEL} ({SCORE})")
        _heading(figure, f"{results.dataset_name}: {SCORE_LABEL} against {COST_LABELS[cost]}", results, len(found))
        _point_legend(figure, [point for points in found.values() for point in points], looks, confidence)
    return True


def _draw_points(panel: Any, points: Sequence[Point], looks: Mapping[str, Style]) -> None:
    crowded, many = len(points) > FEW, len(points) > MANY  # then only the front has bars
    costs = [point.cost for point in points]
    if crowded:
        _draw_cloud(panel, [point for point in points if not point.on_front], looks, many)
    for front in (True,) if crowded else (False, True):
        for name in sorted({point.group.model_type for point in points}):
            chosen = [point for point in points if point.group.model_type == name and point.on_front == front]
            if not chosen:
                continue
            look, alpha = looks[name], 1.0 if front else 0.3
            x, y = [point.cost for point in chosen], [point.score for point in chosen]
            panel.scatter(
                x,
                y,
                s=58 if front else 34,
                marker=MATPLOTLIB_MARKERS[look.marker],
                color=look.colour,
                alpha=alpha,
                edgecolors=INK if front else "none",
                linewidths=0.8 if front else 0,
                zorder=4 if front else 2,
            )
            barred = [point for point in chosen if point.interval is not None]
            low = [point.score - point.interval.low for point in barred if point.interval]
            high = [point.interval.high - point.score for point in barred if point.interval]
            panel.errorbar(
                [point.cost for point in barred],
                [point.score for point in barred],
                [low, high],
                fmt="none",
                ecolor=look.colour,
                elinewidth=1.3,
                capsize=2.5,
                alpha=min(1.0, 1.8 * alpha),
                zorder=3,
            )
    _axes(panel, costs, [point.score for point in points])
    front_points = sorted((point for point in points if point.on_front), key=lambda point: (point.cost, point.score))
    right = panel.get_xlim()[1]
    x = [point.cost for point in front_points] + [right]
    y = [point.score for point in front_points] + [front_points[-1].score]
    panel.step(x, y, where="post", color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)


def _draw_cloud(panel: Any, points: Sequence[Point], looks: Mapping[str, Style], many: bool) -> None:
    """Many dominated points, mixed so that no model type covers another."""
    mixed = list(points)
    random.Random(0).shuffle(mixed)  # noqa: S311 - not a secret
    panel.scatter(
        [point.cost for point in mixed],
        [point.score for point in mixed],
        s=5 if many else 13,
        c=[looks[point.group.model_type].colour for point in mixed],
        alpha=0.25 if many else 0.35,
        linewidths=0,
        zorder=2,
        rasterized=many,
    )


def _axes(panel: Any, costs: Sequence[float], scores: Sequence[float]) -> None:
    """Ticks that can be read, room around the points, and no F1 above 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if is_wide(costs):
        panel.set_xscale("log")
        panel.set_xlim(min(costs) / 1.35, max(costs) * 1.35)
        steps = (1.0,) if max(costs) / min(costs) > 2000 else (1.0, 2.0, 5.0)
        panel.xaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        margin = (max(costs) - min(costs)) * 0.08 or max(abs(costs[0]) * 0.2, 1e-6)
        panel.set_xlim(min(costs) - margin, max(costs) + margin)
        panel.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    low, high = panel.get_ylim()
    room = max(0.02, 0.06 * (max(scores) - min(scores)))
    panel.set_ylim(max(min(low, min(scores) - room), -0.02), min(max(high, max(scores) + room), 1.0 + room / 2))
    _grid(panel)


def _grid(panel: Any) -> None:
    panel.grid(visible=True, color="#E6E6E6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(PALE)
    panel.tick_params(color=PALE, labelsize=9)


def _point_legend(figure: Any, points: Sequence[Point], looks: Mapping[str, Style], confidence: float) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for name in sorted({point.group.model_type for point in points}):
        own = [point.group for point in points if point.group.model_type == name]
        label = f"{_short(name)}: N = {_count(len(own), 'config')}, {_count(sum(len(g.runs) for g in own), 'run')}"
        marker = MATPLOTLIB_MARKERS[looks[name].marker]
        handles.append(Line2D([], [], linestyle="", marker=marker, color=looks[name].colour, label=label))
    front = "Pareto front (the others are pale)"
    handles.append(Line2D([], [], color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label=front))
    if any(point.interval for point in points):
        label = f"bar: {100 * confidence:g} % t-interval over seeds"
        handles.append(Line2D([], [], color=PALE, marker="|", markersize=9, linewidth=1.3, label=label))
    _legend(figure, handles)


def _legend(figure: Any, handles: Sequence[Any]) -> None:
    columns = min(len(handles), 2 if figure.get_figwidth() < 8 else 4)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _short(text: str, length: int = 40) -> str:
    return shortened(printable(text), length)


def _title(panel: Any, label: str) -> None:
    if label:
        panel.set_title(_short(label, 60), fontsize=10, parse_math=False)


def _heading(figure: Any, text: str, results: Results, shown: int) -> None:
    hidden = len(results.tasks) - shown
    more = f" ({shown} of {len(results.tasks)} tasks)" if hidden > 0 else ""
    figure.suptitle(_short(text, 90) + more, fontsize=12, parse_math=False)


@contextmanager
def _panels(path: Path, number: int, width: float, height: float) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with that many panels, side by side; what is left of the last row is blank."""
    columns = min(number, COLUMNS)
    rows = -(-number // columns)
    size = (width * columns**0.9 + 0.6, height * rows + 0.7)
    with figure_for(path, *size, beside=(".svg",), nrows=rows, ncols=columns, squeeze=False) as (figure, axes):
        for blank in list(axes.flat)[number:]:
            blank.remove()
        yield figure, list(axes.flat)[:number]


# --------------------------------------------------------------------------------------------------------- curves


def draw_learning_curves(
    results: Results, curves: Mapping[str, Mapping[str, Sequence[Curve]]], confidence: float, path: Path
) -> bool:
    """Task -> series -> curves, a row of panels for each task. False, and no file, where there is no curve."""
    rows = [(task, of_task) for task, of_task in curves.items() if any(of_task.values())]
    if not rows:
        return False
    looks = styles(results.model_types)
    size = (5.2 * len(CURVES) + 0.6, 3.9 * len(rows) + 0.8)
    with figure_for(path, *size, beside=(".svg",), nrows=len(rows), ncols=len(CURVES), squeeze=False) as (figure, axes):
        for line, (task, of_task) in zip(axes, rows, strict=True):
            for panel, (series, label) in zip(line, CURVES.items(), strict=True):
                for curve in of_task.get(series, ()):
                    _draw_curve(panel, curve, looks[curve.group.model_type])
                panel.set(xlabel="epoch", ylabel=f"{label} ({series})")
                _title(panel, results.tasks[task])
                panel.xaxis.get_major_locator().set_params(integer=True)
                panel.margins(x=0.02)
                _limit(panel, of_task.get(series, ()))
                _grid(panel)
        _heading(figure, f"{results.dataset_name}: learning curves of the best configs", results, len(rows))
        _curve_legend(
            figure, [curve for _, of_task in rows for one in of_task.values() for curve in one], looks, confidence
        )
    return True


def _draw_curve(panel: Any, curve: Curve, look: Style) -> None:
    for epochs, values in curve.seeds:
        panel.plot(epochs, values, color=look.colour, linewidth=0.7, alpha=0.35)
    marker = MATPLOTLIB_MARKERS[look.marker] if len(curve.epochs) <= 40 else None
    panel.plot(curve.epochs, curve.mean, color=look.colour, linewidth=2, marker=marker, markersize=4)
    low = [mean if one is None else one.low for mean, one in zip(curve.mean, curve.intervals, strict=True)]
    high = [mean if one is None else one.high for mean, one in zip(curve.mean, curve.intervals, strict=True)]
    if any(curve.intervals):
        panel.fill_between(curve.epochs, low, high, color=look.colour, alpha=0.13, linewidth=0)


def _limit(panel: Any, curves: Sequence[Curve]) -> None:
    """The curves decide what is shown, not the bands around three of them."""
    values = [value for curve in curves for _, seed in curve.seeds for value in seed]
    if values:
        room = 0.08 * (max(values) - min(values)) or 0.05
        panel.set_ylim(min(values) - room, max(values) + room)


def _curve_legend(figure: Any, curves: Sequence[Curve], looks: Mapping[str, Style], confidence: float) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for name in sorted({curve.group.model_type for curve in curves}):
        counts = sorted({len(curve.seeds) for curve in curves if curve.group.model_type == name})
        numbers = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        marker = MATPLOTLIB_MARKERS[looks[name].marker]
        label = f"{_short(name)}: N = {numbers} seed{'s' * (counts != [1])}"
        handles.append(Line2D([], [], color=looks[name].colour, marker=marker, linewidth=2, markersize=5, label=label))
    handles.append(Line2D([], [], color=PALE, linewidth=0.8, label="one seed"))
    if any(any(curve.intervals) for curve in curves):
        label = f"band: {100 * confidence:g} % t-interval"
        handles.append(Line2D([], [], color=PALE, linewidth=7, alpha=0.3, label=label))
    _legend(figure, handles)
