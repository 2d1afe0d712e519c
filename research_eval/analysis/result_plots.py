"""Pictures of results as PNG and SVG files: score against cost with the Pareto front, and learning curves.

Each task has a panel of its own, because scores of different tasks do not compare.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research_eval.analysis.baselines import Baseline
from research_eval.analysis.figures import (
    INK,
    MATPLOTLIB_MARKERS,
    PALE,
    draw_grid,
    figure_for,
    label,
    set_heading,
    show_as_written,
)
from research_eval.analysis.points import (
    COST_LABELS,
    Curve,
    Point,
    Score,
    Standing,
    Style,
    panels,
    points_of,
    styles,
)
from research_eval.analysis.runs import Results
from research_eval.analysis.study_axes import round_numbers, scale_of, tick_texts
from research_eval.analysis.tables import is_score

COLUMNS = 3  # panels beside each other
FEW = 60  # with more points than this, only those on the front have bars: the other bars would hide points
MANY = 2000  # with more points than this, an SVG file holds them as one bitmap, which is smaller
NAME_LENGTH, TASK_LENGTH, TITLE_LENGTH = 40, 60, 120  # characters
MOST_CHARACTERS = 34  # of the ticks along an axis, before they are turned
STANDING_WORDS = {Standing.LEVEL: "full", Standing.WORSE: "pale", Standing.OPEN: "hollow"}  # how its points look
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
    with _panels(path, len(found), 6.6, 5.0) as (figure, axes):
        for panel, (task, points) in zip(axes, found.items(), strict=True):
            _draw_points(panel, points, score, looks)
            far = _draw_baselines(panel, score.baselines.get(task, ()))
            panel.set_xlabel("\n".join([COST_LABELS[cost], *far]))
            _title(panel, results.tasks[task])
            _name_axis(panel, score.axis)
        _heading(figure, f"{results.dataset_name}: {score.label} against {COST_LABELS[cost]}", results, len(found))
        _point_legend(figure, [point for points in found.values() for point in points], looks, confidence)
    return True


# The look of a point by its standing: opacity, size, filled, outlined.
LOOKS = {
    Standing.FRONT: (1.0, 62, True, True),
    Standing.LEVEL: (0.9, 38, True, False),
    Standing.WORSE: (0.28, 34, True, False),
    Standing.OPEN: (0.75, 34, False, False),
}


def _draw_points(panel: Any, points: Sequence[Point], score: Score, looks: Mapping[str, Style]) -> None:
    """The points of one task, those on the front above the others, with bars for intervals and the front as a line."""
    crowded, many = len(points) > FEW, len(points) > MANY
    if crowded:
        _draw_cloud(panel, [point for point in points if not point.on_front], looks, many)
    for standing in [Standing.FRONT] if crowded else list(LOOKS)[::-1]:
        alpha, size, is_filled, is_outlined = LOOKS[standing]
        for name in sorted({point.group.model_type for point in points}):
            chosen = [point for point in points if point.group.model_type == name and point.standing is standing]
            if not chosen:
                continue
            colour = looks[name].colour
            panel.scatter(
                [point.cost for point in chosen],
                [point.score for point in chosen],
                s=size,
                marker=MATPLOTLIB_MARKERS[looks[name].marker],
                facecolors=colour if is_filled else "none",
                edgecolors=INK if is_outlined else "none" if is_filled else colour,
                linewidths=0.9 if is_outlined else 0 if is_filled else 1.2,
                alpha=alpha,
                zorder=4 if is_outlined else 2,
                label=standing.name,
            )
            _draw_bars(panel, chosen, colour, min(1.0, 1.6 * alpha))
    _axes(panel, points, score)
    # A step line: at each cost it shows the best score for that cost. It ends at the right edge of the panel.
    front_points = sorted((point for point in points if point.on_front), key=lambda point: (point.cost, point.score))
    right = panel.get_xlim()[1]
    x = [point.cost for point in front_points] + [right]
    y = [point.score for point in front_points] + [front_points[-1].score]
    panel.step(x, y, where="post", color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)


BASELINE_COLOUR = "#666666"
BASELINE_DASHES = ((0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (8, 2)))


def _draw_baselines(panel: Any, baselines: Sequence[Baseline]) -> list[str]:
    """Lines for scores that need no model, with their names. Returns a sentence for each one without a line.

    A line far from the points would squeeze them: it is left out.
    """
    low, high = panel.get_ylim()
    near = [one for one in baselines if max(high, one.value) - min(low, one.value) <= 2 * (high - low)]
    room = 0.06 * (high - low)
    panel.set_ylim(min([low, *(one.value - room for one in near)]), max([high, *(one.value + room for one in near)]))
    _set_ticks(panel, "y")
    for number, one in enumerate(near):
        dashes = BASELINE_DASHES[number % len(BASELINE_DASHES)]
        text = f"{one.name} {one.value:.3f}"
        panel.axhline(one.value, color=BASELINE_COLOUR, linewidth=1.2, linestyle=dashes, zorder=1, label=text)
        place = {"xycoords": ("axes fraction", "data"), "xytext": (-4, 2), "textcoords": "offset points"}
        panel.annotate(text, (1, one.value), fontsize=8, color=BASELINE_COLOUR, ha="right", va="bottom", **place)
    far = [one for one in baselines if one not in near]
    return [f"{one.name} {one.value:.3f}: {'below' if one.value < low else 'above'} the axis" for one in far]


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


def _axes(panel: Any, points: Sequence[Point], score: Score) -> None:
    """Set readable ticks and limits with room around the points.

    The axis of a share, such as F1, ends near 0 and 1; the axis of any other score has no known ends.
    """
    scale = scale_of([point.cost for point in points], "cost")
    if scale.log:
        panel.set_xscale("log")
    panel.set_xlim(scale.low, scale.high)
    _set_ticks(panel, "x")
    low, high = panel.get_ylim()  # these contain the bars
    scores = [point.score for point in points]
    spread = max(scores) - min(scores)
    if is_score(score.metric):
        room = max(0.02, 0.06 * spread)
        panel.set_ylim(max(min(low, min(scores) - room), -0.02), min(max(high, max(scores) + room), 1.0 + room / 2))
    else:
        room = 0.06 * spread or 0.05 * abs(scores[0]) or 0.05
        panel.set_ylim(min(low, min(scores) - room), max(high, max(scores) + room))
    _set_ticks(panel, "y")
    draw_grid(panel)


def _set_ticks(panel: Any, which: str) -> None:
    """Ticks at round numbers with as many digits as tell them apart. `which` is "x" or "y"."""
    from research_eval.system.drawing import NullLocator

    axis = panel.xaxis if which == "x" else panel.yaxis
    low, high = axis.get_view_interval()
    ticks = round_numbers(low, high, axis.get_scale() == "log")
    texts = tick_texts(ticks)
    axis.set_ticks(ticks, labels=texts)
    axis.set_minor_locator(NullLocator())
    # Long numbers side by side would run into each other.
    axis.set_tick_params(labelrotation=25 if which == "x" and sum(map(len, texts)) > MOST_CHARACTERS else 0)


def _point_legend(figure: Any, points: Sequence[Point], looks: Mapping[str, Style], confidence: float) -> None:
    """One entry per model type with its numbers of configs and runs, then the front, the standings and the bars."""
    from research_eval.system.drawing import Line2D

    handles = []
    for name in sorted({point.group.model_type for point in points}):
        own = [point.group for point in points if point.group.model_type == name]
        configs, runs = _count(len(own), "config"), _count(sum(len(group.runs) for group in own), "run")
        text = f"{label(name, NAME_LENGTH)}: N = {configs}, {runs}"
        marker = MATPLOTLIB_MARKERS[looks[name].marker]
        handles.append(Line2D([], [], linestyle="", marker=marker, color=looks[name].colour, label=text))
    all_compete = all(point.competes for point in points)
    front = "Pareto front (outlined)" if all_compete else "Pareto front (outlined), enough seeds only"
    handles.append(Line2D([], [], color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label=front))
    there = {point.standing for point in points}
    for standing in (Standing.LEVEL, Standing.WORSE, Standing.OPEN) if len(points) <= FEW else ():
        if standing in there:
            alpha, _, is_filled, _ = LOOKS[standing]
            fill: dict[str, Any] = {
                "markerfacecolor": INK if is_filled else "none",
                "markeredgewidth": 0 if is_filled else 1.2,
            }
            text = f"{STANDING_WORDS[standing]}: {standing.value}"
            handles.append(
                Line2D([], [], linestyle="", marker="o", markersize=6, color=INK, alpha=alpha, label=text, **fill)
            )
    if any(point.interval for point in points):
        text = f"bar: {100 * confidence:g} % interval over seeds"
        handles.append(Line2D([], [], color=PALE, marker="|", markersize=9, linewidth=1.3, label=text))
    _legend(figure, handles)


def _legend(figure: Any, handles: Sequence[Any]) -> None:
    """A legend below the panels, with as many columns as its texts leave room for."""
    inches = max(0.066 * len(handle.get_label()) + 0.5 for handle in handles)
    columns = max(1, min(len(handles), 4, int(figure.get_figwidth() / inches)))
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
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
    set_heading(figure, label(text, TITLE_LENGTH) + more)


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
                if series != "val_loss":
                    _draw_baselines(panel, score.baselines.get(task, ()))
        _heading(figure, f"{results.dataset_name}: learning curves of the best configs", results, len(rows))
        _curve_legend(
            figure, [curve for _, of_task in rows for one in of_task.values() for curve in one], looks, confidence
        )
    return True


def _draw_curve(panel: Any, curve: Curve, look: Style) -> None:
    """A thick line for the mean, with a band for its interval; without intervals a thin line per seed."""
    marker = MATPLOTLIB_MARKERS[look.marker] if len(curve.epochs) <= MARKED_EPOCHS else None
    panel.plot(curve.epochs, curve.mean, color=look.colour, linewidth=2, marker=marker, markersize=5, zorder=3)
    if any(curve.intervals):
        low = [mean if one is None else one.low for mean, one in zip(curve.mean, curve.intervals, strict=True)]
        high = [mean if one is None else one.high for mean, one in zip(curve.mean, curve.intervals, strict=True)]
        panel.fill_between(curve.epochs, low, high, color=look.colour, alpha=0.12, linewidth=0)
        for edge in (low, high):
            panel.plot(curve.epochs, edge, color=look.colour, linewidth=0.6, alpha=0.5)
        return
    for epochs, values in curve.seeds if len(curve.seeds) > 1 else ():
        panel.plot(epochs, values, color=look.colour, linewidth=0.8, alpha=0.5)


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
    if any(len(curve.seeds) > 1 and not any(curve.intervals) for curve in curves):
        handles.append(Line2D([], [], color=PALE, linewidth=0.8, label="one seed"))
    if any(any(curve.intervals) for curve in curves):
        text = f"band: {100 * confidence:g} % interval"
        handles.append(Line2D([], [], color=PALE, linewidth=7, alpha=0.3, label=text))
    _legend(figure, handles)
