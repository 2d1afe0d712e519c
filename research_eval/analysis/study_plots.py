"""Pictures of a study as PNG files: history, importances, parallel coordinates, Pareto front.

The same pictures exist as web pages (`study_pages`). Both draw what `study_charts` has computed.

T trials  A axes  X points along a line
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from research_eval.analysis.figures import (
    INK,
    MATPLOTLIB_MARKERS,
    PALE,
    draw_grid,
    figure_for,
    set_heading,
    show_as_written,
)
from research_eval.analysis.study_axes import Scale, scale_of
from research_eval.analysis.study_charts import (
    COLOURS,
    IMPORTANCE_LEGEND,
    MANY,
    BarList,
    ParallelCoordinates,
    StudyCharts,
    bar_limit,
    best_so_far,
    front_line,
    importance_rows,
    parallel_coordinates_of,
    rises_to_the_right,
)
from research_eval.analysis.study_importance import values_of
from research_eval.analysis.study_pages import write_pages
from research_eval.analysis.study_texts import model_label, objective_label
from research_eval.analysis.tables import metric_text
from research_eval.system.best_effort import reason_of

log = logging.getLogger(__name__)

BOLD = 20  # at most so many lines of a panel are bold, because the eye can follow no more
MARKS = {  # status of a trial without a value: marker and colour
    "pruned": (".", PALE),
    "diverged": ("+", INK),
    "failed": ("x", INK),
}


def draw_study(charts: StudyCharts, folder: Path) -> list[Path]:
    """All pictures, PNG and HTML, in `folder`; a warning names those that cannot be drawn.

    Returns the paths. The charts needs a finished trial. Raises OSError if there can be no such folder.
    """
    folder.mkdir(exist_ok=True)
    pictures: dict[str, Callable[[StudyCharts, Path], None]] = {
        "history": draw_history,
        "importance": draw_importance,
        "parallel_coordinates": draw_parallel_coordinates,
    }
    if len(charts.objectives) > 1:
        pictures["pareto"] = draw_pareto

    def drawn(name: str) -> list[Path]:
        path = folder / f"{name}.png"
        pictures[name](charts, path)
        return [path]

    parts = {f"{name}.png": partial(drawn, name) for name in pictures}
    parts["the web pages"] = partial(write_pages, charts, folder, list(pictures))
    written, problems = [], []
    for name, part in parts.items():
        try:
            written += part()
        except Exception as problem:  # the study is stored, and the other pictures can be drawn
            problems.append(f"{name} ({reason_of(problem)})")
    if problems:
        log.warning("%s: not drawn: %s", folder, ", ".join(problems))
    return written


# ---------------------------------------------------------------------------------------------------------- history


def draw_history(charts: StudyCharts, path: Path) -> None:
    """Draw the value of every trial and the best value so far, in one panel per objective."""
    # sharex: one trial stands at the same place in all panels.
    rows = len(charts.objectives)
    with figure_for(path, 9, 3.1 * rows + 1.1, nrows=rows, sharex=True, squeeze=False) as (figure, axes):
        for index, panel in enumerate(axes[:, 0]):
            scale = scale_of(values_of(charts.finished, index), charts.objectives[index])
            _apply(panel, "y", scale)
            _draw_finished(panel, charts, index)
            _draw_others(panel, charts, index, scale)
            _draw_best(panel, charts, index)
            panel.set_ylabel(objective_label(charts.objectives[index]).replace(" (", "\n("), parse_math=False)
        axes[-1, 0].set_xlabel("trial")
        axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
        set_heading(figure, charts.heading("Optimisation history"), charts.counts())
        _legend(figure, [*_model_handles(charts), *_mark_handles(charts)])


def _size(charts: StudyCharts) -> int:
    """The area of a point in square points; points of large studies are small."""
    return 34 if len(charts.own) <= MANY else 9


def _draw_finished(panel: Any, charts: StudyCharts, index: int) -> None:
    """Draw the finished trials of each model type with its colour and marker."""
    for name, records in charts.by_type.items():
        panel.scatter(
            [record.number for record in records],
            values_of(records, index),
            s=_size(charts),
            marker=MATPLOTLIB_MARKERS[charts.styles[name].marker],
            color=charts.styles[name].colour,
            alpha=0.85 if len(charts.own) <= MANY else 0.6,
            linewidths=0,
            zorder=3,
        )


def _draw_others(panel: Any, charts: StudyCharts, index: int, scale: Scale) -> None:
    """Draw the other trials. One without a value, or with a value beyond the axis, lies at the bottom of the panel."""
    for status, (marker, colour) in MARKS.items():
        records = [record for record in charts.own if record.status == status]
        values = [record.value(charts.objectives, index) for record in records]
        for shown in (True, False):
            chosen = [number for number, value in enumerate(values) if scale.shows(value) == shown]
            panel.scatter(
                [records[number].number for number in chosen],
                [values[number] if shown else 0.025 for number in chosen],
                s=_size(charts),
                marker=marker,
                color=colour,
                linewidths=0 if status == "pruned" else 1.1 if len(charts.own) <= MANY else 0.7,
                transform=panel.transData if shown else panel.get_xaxis_transform(),
                zorder=2,
            )


def _draw_best(panel: Any, charts: StudyCharts, index: int) -> None:
    """Draw the best value so far as a step line, with a ring around the best trial."""
    objective, numbers = charts.objectives[index], [record.number for record in charts.finished]
    steps = best_so_far(numbers, values_of(charts.finished, index), objective)
    number, best = steps[-1]
    last = max(record.number for record in charts.own)
    x, y = [at for at, _ in steps] + [last], [value for _, value in steps] + [best]
    panel.step(x, y, where="post", color=INK, linewidth=1.2, zorder=4)
    panel.scatter([number], [best], s=110, facecolors="none", edgecolors=INK, linewidths=1.2, zorder=5)
    panel.set_title(f"best {metric_text(best, objective)} in trial {number}", fontsize=9, color=INK, loc="right")


def _mark_handles(charts: StudyCharts) -> list[Any]:
    """The entries of the legend for the statuses that occur, and for the line of the best value."""
    from research_eval.system.drawing import Line2D

    there = {record.status for record in charts.own}
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=status)
        for status, (marker, colour) in MARKS.items()
        if status in there
    ]
    return [*handles, Line2D([], [], color=INK, linewidth=1.2, label="best so far")]


# ------------------------------------------------------------------------------------------------------- importance


def draw_importance(charts: StudyCharts, path: Path) -> None:
    """Draw the share of the model type in the variance, then the importances of each type's parameters."""
    rows = importance_rows(charts)
    columns = max(map(len, rows))
    heights = [max([1.5] + [len(bar_list.bars) + 0.3 for bar_list in row]) for row in rows]
    grid = {"height_ratios": heights}
    # In inches: 0.2 per bar, and room for the titles of each row.
    size = (
        max(6.5, 5.4 * columns),
        0.2 * sum(heights) + (0.5 if len(charts.objectives) == 1 else 0.65) * len(rows) + 0.8,
    )
    with figure_for(path, *size, nrows=len(rows), ncols=columns, squeeze=False, gridspec_kw=grid) as (figure, axes):
        for panels, row, height in zip(axes, rows, heights, strict=True):
            for panel, bar_list in zip(panels, row, strict=False):
                _draw_bars(panel, bar_list, bar_limit(rows), height)
            for panel in panels[len(row) :]:
                panel.axis("off")
        objective = f" for {charts.objectives[0]}" if len(charts.objectives) == 1 else ""
        set_heading(figure, charts.heading(f"What mattered{objective}"), charts.counts())
        figure.supxlabel(IMPORTANCE_LEGEND, fontsize=8, wrap=True)


def _draw_bars(panel: Any, bar_list: BarList, limit: float, height: float) -> None:
    """Draw one list of bars. A short line marks the largest share of the shuffled values; unclear bars are pale."""
    title = f"{bar_list.title}\n{bar_list.subtitle}" if bar_list.subtitle else bar_list.title
    panel.set_title(title, fontsize=9.5, loc="left", parse_math=False)
    if not bar_list.bars:
        panel.text(0, 0.8, bar_list.note, transform=panel.transAxes, va="top", color="0.35", fontsize=9)
        panel.axis("off")
        return
    for place, bar in enumerate(bar_list.bars.values()):
        panel.barh(place, bar.share, height=0.72, color=bar_list.colour, alpha=1.0 if bar.is_clear else 0.3)
        if bar.chance is not None and bar.chance < limit:
            panel.vlines(bar.chance, place - 0.36, place + 0.36, color=INK, linewidth=1)
    labels = [f"{label}  {bar.share:.0%}" for label, bar in bar_list.bars.items()]
    panel.set_yticks(range(len(labels)), labels, parse_math=False, fontsize=8.5)
    panel.set(xlim=(0, limit), ylim=(height - 0.6, -0.6), xticks=[])
    panel.set_xlabel(bar_list.note, fontsize=8.5, color="0.35", loc="left")
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.spines["left"].set_color(PALE)
    panel.tick_params(length=0)


# --------------------------------------------------------------------------------------------- parallel coordinates


def draw_parallel_coordinates(charts: StudyCharts, path: Path) -> None:
    """Draw each finished trial as a line through its settings to its values, in one panel per model type."""
    found = [parallel_coordinates_of(charts, name) for name in charts.by_type]
    width = max(6.5, 2.0 + 0.95 * max(len(lines.axes) for lines in found))
    with figure_for(path, width, 3.2 * len(found) + 0.8, nrows=len(found), squeeze=False) as (figure, panels):
        for panel, lines in zip(panels[:, 0], found, strict=True):
            panel.set_title(lines.title, fontsize=10, loc="left", parse_math=False, pad=44)
            _draw_lines(panel, lines)
            _draw_axes(panel, lines)
        _colour_bar(figure, panels, charts, found[0])
        set_heading(figure, charts.heading("Settings and values"), charts.counts())


def _draw_lines(panel: Any, lines: ParallelCoordinates) -> None:
    """Draw the bad trials first and faint, the best ones last and bold."""
    from research_eval.system.drawing import LineCollection

    at_TA = np.array([lines.places(axis) for axis in lines.axes]).T
    # Between two axes a line follows a smooth curve: lines that meet on an axis stay distinguishable after it.
    share = np.linspace(0, 1, 24)
    eased = share * share * (3 - 2 * share)  # crosses every axis at a right angle
    x = (np.arange(len(lines.axes) - 1)[:, None] + share).ravel()
    y_TX = at_TA[:, :-1, None] + (at_TA[:, 1:] - at_TA[:, :-1])[:, :, None] * eased
    good = np.array(lines.goodness)
    order = np.argsort(good, kind="stable")
    best = np.isin(np.arange(len(good)), order[-max(1, min(BOLD, len(good) // 10)) :])
    colours = _colour_map()(good)
    # The fourth number of a colour is its opacity. The more lines there are, the fainter they have to be.
    colours[:, 3] = np.where(best, 0.9, max(0.22, min(0.6, 40 / len(good))))
    collection = LineCollection(
        [np.column_stack([x, y_TX[trial].ravel()]) for trial in order],
        colors=colours[order],
        linewidths=np.where(best, 1.6, 0.9)[order],
    )
    panel.add_collection(collection)


def _draw_axes(panel: Any, lines: ParallelCoordinates) -> None:
    """Draw the upright axes with their names and ticks."""
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
    for place, axis in enumerate(lines.axes):
        panel.axvline(place, color=INK, linewidth=0.9, zorder=3)
        panel.text(place, 1.09, axis.label, fontsize=8.5, rotation=18, rotation_mode="anchor", parse_math=False)
        for at, text in axis.ticks:
            panel.plot([place - 0.02, place + 0.02], [at, at], color=INK, linewidth=0.9, zorder=3)
            panel.text(place + 0.04, at, text, va="center", fontsize=7, parse_math=False, zorder=4, bbox=box)
    panel.set(xlim=(-0.15, len(lines.axes) - 0.55), ylim=(-0.06, 1.06))
    panel.axis("off")


def _colour_map() -> Any:
    """The colours of trials: one end of the scale is for the worst trial, the other one for the best."""
    from research_eval.system.drawing import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("goodness", COLOURS)


def _colour_bar(figure: Any, panels: Any, charts: StudyCharts, lines: ParallelCoordinates) -> None:
    """Explain the colours of the lines: values of the first objective."""
    from research_eval.system.drawing import ScalarMappable

    bar = figure.colorbar(ScalarMappable(cmap=_colour_map()), ax=panels, fraction=0.02, pad=0.02, aspect=40)
    bar.set_ticks([at for at, _ in lines.legend], labels=[text for _, text in lines.legend], fontsize=8)
    bar.set_label(objective_label(charts.objectives[0]), parse_math=False)
    bar.outline.set_visible(False)


# ------------------------------------------------------------------------------------------------------ Pareto front


def draw_pareto(charts: StudyCharts, path: Path) -> None:
    """Draw the first objective against each of the others."""
    others = range(1, len(charts.objectives))
    size = (5.6 * len(others) + 1.0, 5.2)
    with figure_for(path, *size, ncols=len(others), squeeze=False) as (figure, axes):
        for panel, index in zip(axes[0], others, strict=True):
            _draw_front(panel, charts, index)
        set_heading(figure, charts.heading("Pareto front"), charts.front_counts())
        _legend(figure, _model_handles(charts))


def _draw_front(panel: Any, charts: StudyCharts, index: int) -> None:
    """Draw one panel: the points, those of the front above the others, and for two objectives the front as a line."""
    for name, records in charts.by_type.items():
        for on_front in (False, True):
            chosen = [record for record in records if (record.number in charts.front) == on_front]
            panel.scatter(
                values_of(chosen, index),
                values_of(chosen, 0),
                s=62 if on_front else _size(charts),
                marker=MATPLOTLIB_MARKERS[charts.styles[name].marker],
                color=charts.styles[name].colour,
                alpha=1.0 if on_front else 0.25,
                edgecolors=INK if on_front else "none",
                linewidths=0.8 if on_front else 0,
                zorder=4 if on_front else 2,
            )
    scale = scale_of(values_of(charts.finished, index), charts.objectives[index])
    _apply(panel, "x", scale)
    _apply(panel, "y", scale_of(values_of(charts.finished, 0), charts.objectives[0]))
    if len(charts.objectives) == 2:
        x, y = zip(*front_line(charts, scale), strict=True)
        where = "post" if rises_to_the_right(charts) else "pre"
        panel.step(x, y, where=where, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
    _number_front(panel, charts, index)
    panel.set_xlabel(objective_label(charts.objectives[index]), parse_math=False)
    panel.set_ylabel(objective_label(charts.objectives[0]), parse_math=False)


def _number_front(panel: Any, charts: StudyCharts, index: int) -> None:
    """Write the numbers of the trials beside the points of the front, if they do not overlap."""
    # Places are in units of the panel; two numbers closer than this would overlap.
    taken: list[Any] = []
    for record in charts.finished:
        point = (*values_of([record], index), *values_of([record], 0))
        place = panel.transAxes.inverted().transform(panel.transData.transform(point))
        if record.number in charts.front and not any((abs(place - other) < (0.08, 0.04)).all() for other in taken):
            panel.annotate(str(record.number), point, (6, -9), textcoords="offset points", fontsize=7.5, zorder=5)
            taken.append(place)


# ----------------------------------------------------------------------------------------------------- common parts


def _apply(panel: Any, which: str, scale: Scale) -> None:
    """Set limits, ticks and grid of one axis. `which` is "x" or "y"."""
    from research_eval.system.drawing import NullLocator

    axis = panel.xaxis if which == "x" else panel.yaxis
    if scale.log:
        panel.set(**{f"{which}scale": "log"})
    panel.set(**{f"{which}lim": (scale.low, scale.high)})
    axis.set_ticks(scale.ticks, labels=scale.texts)
    axis.set_minor_locator(NullLocator())
    draw_grid(panel)


def _model_handles(charts: StudyCharts) -> list[Any]:
    """The entries of the legend for the model types, with their numbers of finished trials."""
    from research_eval.system.drawing import Line2D

    return [
        Line2D(
            [],
            [],
            linestyle="",
            marker=MATPLOTLIB_MARKERS[charts.styles[name].marker],
            color=charts.styles[name].colour,
            markeredgewidth=0,
            label=f"{model_label(name)}: {len(records):,}",
        )
        for name, records in charts.by_type.items()
    ]


def _legend(figure: Any, handles: Sequence[Any]) -> None:
    """A legend below the panels, with as many columns as the width of the figure allows."""
    inches = [0.075 * len(handle.get_label()) + 0.5 for handle in handles]
    columns = max(1, min(len(handles), int(figure.get_figwidth() / max(inches))))
    if sum(inches) < figure.get_figwidth():
        columns = len(handles)
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, columnspacing=1.4
    )
    show_as_written(legend)
