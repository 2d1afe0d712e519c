"""Pictures of results as PNG and SVG files: score against cost with the Pareto front, and learning curves.

Each task has a panel of its own, because scores of different tasks do not compare.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research_eval.analysis.figures import INK, MATPLOTLIB_MARKERS, PALE, draw_grid, figure_for, label, show_as_written
from research_eval.analysis.points import (
    COST_LABELS,
    Curve,
    Point,
    Score,
    Style,
    is_wide,
    panels,
    points_of,
    styles,
)
from research_eval.analysis.runs import Results
from research_eval.analysis.tables import is_score, short_number

COLUMNS = 3  # panels beside each other
FEW = 60  # with more points than this, only those on the front have bars: the other bars would hide points
MANY = 2000  # with more points than this, an SVG file holds them as one bitmap, which is smaller
NAME_LENGTH, TASK_LENGTH, TITLE_LENGTH = 40, 60, 90  # characters
MARKED_EPOCHS = 40  # a curve with more epochs has no markers


def draw_cost_plot(results: Results, cost: str, score: Score, confidence: float, path: Path) -> bool:
    """Draw the mean score of every config against a cost, in `path` (a PNG file) and in an SVG file beside it.

    Return False, and write nothing, if no run has both figures.
    """
    found = {task: points_of(results, task, cost, score, confidence) for task in panels(results)}
    found = {task: points for task, points in found.items() if points}
    if not found:
        return False
    looks = styles(results.model_types)
    with _panels(path, len(found), 5.6, 4.4) as (figure, axes):
        for panel, (task, points) in zip(axes, found.items(), strict=True):
            _draw_points(panel, points, score, looks)
            _title(panel, results.tasks[task])
            panel.set_xlabel(COST_LABELS[cost])
            _name_axis(panel, score.axis)
        _heading(figure, f"{results.dataset_name}: {score.label} against {COST_LABELS[cost]}", results, len(found))
        _point_legend(figure, [point for points in found.values() for point in points], looks, confidence)
    return True


def _draw_points(panel: Any, points: Sequence[Point], score: Score, looks: Mapping[str, Style]) -> None:
    """The points of one task, those on the front above the others, with bars for intervals and the front as a line."""
    crowded, many = len(points) > FEW, len(points) > MANY
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
            _draw_bars(panel, chosen, look.colour, min(1.0, 1.8 * alpha))
    _axes(panel, costs, [point.score for point in points], is_share=is_score(score.metric))
    # A step line: at each cost it shows the best score for that cost. It ends at the right edge of the panel.
    front_points = sorted((point for point in points if point.on_front), key=lambda point: (point.cost, point.score))
    right = panel.get_xlim()[1]
    x = [point.cost for point in front_points] + [right]
    y = [point.score for point in front_points] + [front_points[-1].score]
    panel.step(x, y, where="post", color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)


def _draw_bars(panel: Any, points: Sequence[Point], colour: str, alpha: float) -> None:
    """The intervals of the points that have one, as vertical bars."""
    barred = [(point, point.interval) for point in points if point.interval is not None]
    panel.errorbar(
        [point.cost for point, _ in barred],
        [point.score for point, _ in barred],
        [
            [point.score - interval.low for point, interval in barred],
            [interval.high - point.score for point, interval in barred],
        ],
        fmt="none",
        ecolor=colour,
        elinewidth=1.3,
        capsize=2.5,
        alpha=alpha,
        zorder=3,
    )


def _draw_cloud(panel: Any, points: Sequence[Point], looks: Mapping[str, Style], many: bool) -> None:
    """Many dominated points, drawn in random order so that no model type covers another one."""
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


def _axes(panel: Any, costs: Sequence[float], scores: Sequence[float], is_share: bool) -> None:
    """Set readable ticks and limits with room around the points.

    The axis of a share, such as F1, ends near 0 and 1; the axis of any other score has no known ends.
    """
    from research_eval.system.drawing import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    # matplotlib's own ticks on a log scale may be a single power of ten, which says too little.
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
    low, high = panel.get_ylim()  # these contain the bars
    spread = max(scores) - min(scores)
    if is_share:
        room = max(0.02, 0.06 * spread)
        panel.set_ylim(max(min(low, min(scores) - room), -0.02), min(max(high, max(scores) + room), 1.0 + room / 2))
    else:
        room = 0.06 * spread or 0.05 * abs(scores[0]) or 0.05
        panel.set_ylim(min(low, min(scores) - room), max(high, max(scores) + room))
    draw_grid(panel)


def _point_legend(figure: Any, points: Sequence[Point], looks: Mapping[str, Style], confidence: float) -> None:
    """One entry per model type with its numbers of configs and runs, then the front and the bars."""
    from research_eval.system.drawing import Line2D

    handles = []
    for name in sorted({point.group.model_type for point in points}):
        own = [point.group for point in points if point.group.model_type == name]
        configs, runs = _count(len(own), "config"), _count(sum(len(group.runs) for group in own), "run")
        text = f"{label(name, NAME_LENGTH)}: N = {configs}, {runs}"
        marker = MATPLOTLIB_MARKERS[looks[name].marker]
        handles.append(Line2D([], [], linestyle="", marker=marker, color=looks[name].colour, label=text))
    all_compete = all(point.competes for point in points)
    front = "Pareto front (the others are pale)" if all_compete else "Pareto front, enough seeds only"
    handles.append(Line2D([], [], color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label=front))
    if any(point.interval for point in points):
        text = f"bar: {100 * confidence:g} % interval over seeds"
        handles.append(Line2D([], [], color=PALE, marker="|", markersize=9, linewidth=1.3, label=text))
    _legend(figure, handles)


def _legend(figure: Any, handles: Sequence[Any]) -> None:
    """A legend below the panels."""
    columns = min(len(handles), 2 if figure.get_figwidth() < 8 else 4)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    show_as_written(legend)


def _count(number: int, word: str) -> str:
    """`1 run`, `1,200 runs`."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def _title(panel: Any, task: str) -> None:
    """The name of the task; it is empty if there is only one."""
    if task:
        panel.set_title(label(task, TASK_LENGTH), fontsize=10, parse_math=False)


def _name_axis(panel: Any, text: str) -> None:
    """Label the vertical axis. The name of a metric may come from a foreign database and contain any characters."""
    panel.set_ylabel(label(text, TITLE_LENGTH), parse_math=False)


def _heading(figure: Any, text: str, results: Results, shown: int) -> None:
    """The title of the whole picture. It says how many of the tasks the picture shows."""
    hidden = len(results.tasks) - shown
    more = f" ({shown} of {len(results.tasks)} tasks)" if hidden > 0 else ""
    figure.suptitle(label(text, TITLE_LENGTH) + more, fontsize=12, parse_math=False)


@contextmanager
def _panels(path: Path, number: int, width: float, height: float) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with `number` panels in rows of at most `COLUMNS`; the rest of the last row stays blank."""
    columns = min(number, COLUMNS)
    rows = -(-number // columns)
    size = (width * columns**0.9 + 0.6, height * rows + 0.7)
    with figure_for(path, *size, beside=(".svg",), nrows=rows, ncols=columns, squeeze=False) as (figure, axes):
        for blank in list(axes.flat)[number:]:
            blank.remove()
        yield figure, list(axes.flat)[:number]


# --------------------------------------------------------------------------------------------------------- curves


def draw_learning_curves(
    results: Results, curves: Mapping[str, Mapping[str, Sequence[Curve]]], score: Score, confidence: float, path: Path
) -> bool:
    """Draw a row of panels for each task. `curves`: task -> series -> curves.

    Return False, and write nothing, if there is no curve.
    """
    # A task without any stored series, such as one of an imported run, gets no row.
    rows = [(task, of_task) for task, of_task in curves.items() if any(of_task.values())]
    if not rows:
        return False
    looks = styles(results.model_types)
    columns = len(score.curves)
    size = (5.2 * columns + 0.6, 3.9 * len(rows) + 0.8)
    with figure_for(path, *size, beside=(".svg",), nrows=len(rows), ncols=columns, squeeze=False) as (figure, axes):
        for line, (task, of_task) in zip(axes, rows, strict=True):
            for panel, (series, name) in zip(line, score.curves.items(), strict=True):
                for curve in of_task.get(series, ()):
                    _draw_curve(panel, curve, looks[curve.group.model_type])
                panel.set_xlabel("epoch")
                _name_axis(panel, f"{name} ({series})")
                _title(panel, results.tasks[task])
                panel.xaxis.get_major_locator().set_params(integer=True)
                panel.margins(x=0.02)
                _limit(panel, of_task.get(series, ()))
                draw_grid(panel)
        _heading(figure, f"{results.dataset_name}: learning curves of the best configs", results, len(rows))
        _curve_legend(
            figure, [curve for _, of_task in rows for one in of_task.values() for curve in one], looks, confidence
        )
    return True


def _draw_curve(panel: Any, curve: Curve, look: Style) -> None:
    """A thin line per seed, a thick one for their mean, and a band for its interval."""
    for epochs, values in curve.seeds:
        panel.plot(epochs, values, color=look.colour, linewidth=0.7, alpha=0.35)
    marker = MATPLOTLIB_MARKERS[look.marker] if len(curve.epochs) <= MARKED_EPOCHS else None
    panel.plot(curve.epochs, curve.mean, color=look.colour, linewidth=2, marker=marker, markersize=4)
    low = [mean if one is None else one.low for mean, one in zip(curve.mean, curve.intervals, strict=True)]
    high = [mean if one is None else one.high for mean, one in zip(curve.mean, curve.intervals, strict=True)]
    if any(curve.intervals):
        panel.fill_between(curve.epochs, low, high, color=look.colour, alpha=0.13, linewidth=0)


def _limit(panel: Any, curves: Sequence[Curve]) -> None:
    """Fit the vertical axis to the curves. The bands around means of three seeds may be far wider."""
    values = [value for curve in curves for _, seed in curve.seeds for value in seed]
    if values:
        room = 0.08 * (max(values) - min(values)) or 0.05
        panel.set_ylim(min(values) - room, max(values) + room)


def _curve_legend(figure: Any, curves: Sequence[Curve], looks: Mapping[str, Style], confidence: float) -> None:
    """One entry per model type with its number of seeds, then the thin lines and the bands."""
    from research_eval.system.drawing import Line2D

    handles = []
    for name in sorted({curve.group.model_type for curve in curves}):
        counts = sorted({len(curve.seeds) for curve in curves if curve.group.model_type == name})
        numbers = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        marker = MATPLOTLIB_MARKERS[looks[name].marker]
        text = f"{label(name, NAME_LENGTH)}: N = {numbers} seed{'s' * (counts != [1])}"
        handles.append(Line2D([], [], color=looks[name].colour, marker=marker, linewidth=2, markersize=5, label=text))
    handles.append(Line2D([], [], color=PALE, linewidth=0.8, label="one seed"))
    if any(any(curve.intervals) for curve in curves):
        text = f"band: {100 * confidence:g} % interval"
        handles.append(Line2D([], [], color=PALE, linewidth=7, alpha=0.3, label=text))
    _legend(figure, handles)
