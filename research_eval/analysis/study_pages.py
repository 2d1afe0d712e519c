"""Interactive pages of a study as HTML files. They need no network: plotly's script lies beside them.

plotly interprets HTML tags in the text that it draws, so that these functions escape all text of users.

A page shows one or more figures. A figure is a dictionary with the keys "data" and "layout" of plotly's JSON format.
The functions `history`, `importance` and `pareto` return the figures of their pages. `parallel_coordinates` returns SVG
(`study_lines`): plotly would draw it with WebGL, which takes seconds without a graphics card.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from research_eval.analysis.figures import GRID, INK, PALE
from research_eval.analysis.study_axes import Scale, scale_of
from research_eval.analysis.study_charts import (
    IMPORTANCE_LEGEND,
    MANY,
    BarList,
    StudyCharts,
    bar_limit,
    best_so_far,
    front_line,
    importance_rows,
    parallel_coordinates_of,
    rises_to_the_right,
)
from research_eval.analysis.study_importance import values_of
from research_eval.analysis.study_lines import SCRIPT as CHOOSING
from research_eval.analysis.study_lines import STYLE, lines_svg
from research_eval.analysis.study_texts import described, model_label, objective_label
from research_eval.analysis.study_trials import TrialRecord
from research_eval.analysis.tables import metric_text
from research_eval.files import write_atomically

SCRIPT = "plotly.min.js"
FONT = {"family": "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif", "size": 13, "color": INK}
MARKS = {  # status of a trial without a value: the look of its point
    "pruned": {"symbol": "circle", "color": PALE, "size": 6, "opacity": 0.55},
    "diverged": {"symbol": "cross-thin-open", "color": INK, "size": 8},
    "failed": {"symbol": "x-thin-open", "color": INK, "size": 8},
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
{script}<style>
body {{ font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; color: #222; margin: 0 auto;
  max-width: 1300px; padding: 20px 24px; }}
h1 {{ font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 22px 0 0; overflow-wrap: anywhere; }}
p {{ margin: 4px 0 12px; color: #666; }}
nav a {{ margin-right: 14px; color: #0072B2; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{below}</p>
<nav>{links}</nav>
{body}
</body>
</html>
"""

Figure = dict[str, Any]
Section = tuple[str, Figure]  # a heading, perhaps empty, and what is drawn under it


def write_pages(charts: StudyCharts, folder: Path, names: Sequence[str]) -> list[Path]:
    """Write a page for each picture of `study_plots` that `names` lists; the pages share one copy of plotly's script.

    Return the paths of the pages.
    """
    from plotly.offline import get_plotlyjs

    # The script has some megabytes. It is written only if it changed, and every page loads this one copy.
    script = get_plotlyjs().encode()
    if not (folder / SCRIPT).is_file() or (folder / SCRIPT).read_bytes() != script:
        write_atomically(folder / SCRIPT, script)
    links = " ".join(f'<a href="{name}.html">{PAGES[name][0]}</a>' for name in names)
    written = []
    for name in names:
        what, below, draw = PAGES[name]
        page = PAGE.format(
            title=html.escape(charts.heading(what)),
            below=html.escape(below(charts)),
            script="" if name == "parallel_coordinates" else f'<script src="{SCRIPT}"></script>\n',
            links=links,
            body="\n".join(_part(number, part) for number, part in enumerate(draw(charts))),
        )
        write_atomically(folder / f"{name}.html", page.encode())
        written.append(folder / f"{name}.html")
    return written


def _part(number: int, part: Section | str) -> str:
    """A part of a page: HTML as it is, or the HTML of a figure under its heading."""
    from plotly.io import to_html

    if isinstance(part, str):
        return part
    heading, figure = part

    common = {"font": FONT, "paper_bgcolor": "white", "plot_bgcolor": "white", "hoverlabel": {"align": "left"}}
    buttons = ["zoom2d", "pan2d", "resetScale2d", "toImage"] if figure["data"][0]["type"] == "scatter" else ["toImage"]
    drawn = to_html(
        {"data": figure["data"], "layout": figure["layout"] | common},
        config={"displaylogo": False, "responsive": True, "typesetMath": False, "modeBarButtons": [buttons]},
        include_plotlyjs=False,
        full_html=False,
        div_id=f"figure-{number}",
    )
    return (f"<h2>{html.escape(heading)}</h2>\n" if heading else "") + drawn


# --------------------------------------------------------------------------------------------------- the four pages


def history(charts: StudyCharts) -> list[Section]:
    """A figure per objective."""
    return [("", _history(charts, index)) for index in range(len(charts.objectives))]


def _history(charts: StudyCharts, index: int) -> Figure:
    """The trials by number, and the best value so far as a step line."""
    objective = charts.objectives[index]
    scale = scale_of(values_of(charts.finished, index), objective)
    drawn = []
    for name, records in charts.by_type.items():
        points = _points(charts, records, f"{model_label(name)}: {len(records):,}", _look(charts, name))
        drawn.append(points | {"x": [record.number for record in records], "y": values_of(records, index)})
    for status, look in MARKS.items():
        records = [record for record in charts.own if record.status == status]
        values = [record.value(charts.objectives, index) for record in records]
        places = [value if scale.shows(value) else _floor(scale) for value in values]
        if records:
            points = _points(charts, records, f"{status}: {len(records):,}", look)
            drawn.append(points | {"x": [record.number for record in records], "y": places})
    # The line of the best value ends at the last trial, whatever became of that trial.
    steps = best_so_far([record.number for record in charts.finished], values_of(charts.finished, index), objective)
    number, best = steps[-1]
    last = max(record.number for record in charts.own)
    x, y = [at for at, _ in steps] + [last], [value for _, value in steps] + [best]
    drawn.append(_line(x, y, f"best so far: {metric_text(best, objective)} in trial {number}", "hv", "solid"))
    layout = _layout(460, {"title": {"text": "trial"}, "gridcolor": GRID, "zeroline": False}, _axis(scale, objective))
    return {"data": drawn, "layout": layout}


def _floor(scale: Scale) -> float:
    """The height at which trials without a value lie: just above the lower end of the axis."""
    if scale.log:
        return scale.low * (scale.high / scale.low) ** 0.025
    return scale.low + 0.025 * (scale.high - scale.low)


def importance(charts: StudyCharts) -> list[Section]:
    """A figure per row of lists."""
    rows = importance_rows(charts)
    return [("", _bars(row, max(map(len, rows)), bar_limit(rows))) for row in rows]


def _bars(row: Sequence[BarList], columns: int, limit: float) -> Figure:
    """One figure with lists of bars side by side; `columns` is the number of lists in the longest row."""
    drawn: list[Figure] = []
    most = max([1] + [len(bar_list.bars) for bar_list in row])
    layout: Figure = {"height": 24 * most + 78, "margin": {"l": 8, "r": 8, "t": 58, "b": 12}, "showlegend": False}
    layout |= {"annotations": [], "barmode": "overlay"}
    for number, bar_list in enumerate(row):
        # plotly counts the axes of a figure as xaxis, xaxis2, xaxis3 and so on.
        suffix = "" if number == 0 else str(number + 1)
        left, right = number / columns, (number + 1) / columns
        start = left + 0.34 * (right - left)  # a third of the width is for the names of the parameters
        plain = {"fixedrange": True, "zeroline": False, "showgrid": False}
        layout[f"xaxis{suffix}"] = plain | {"domain": [start, right - 0.01], "range": [0, limit], "visible": False}
        layout[f"yaxis{suffix}"] = plain | {"anchor": f"x{suffix}", "ticksuffix": " ", "showline": True}
        layout[f"yaxis{suffix}"] |= {"range": [most - 0.4, -0.6], "linecolor": PALE, "visible": bool(bar_list.bars)}
        axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        drawn += [one | axes for one in _bars_of(bar_list, limit)]
        layout["annotations"].append(_text(_title(bar_list), left, 1, 14))
        layout["annotations"][-1] |= {"yshift": 8}
        if bar_list.note:
            layout["annotations"].append(_text(html.escape(bar_list.note), left, 0, 0))
    return {"data": drawn, "layout": layout}


def _title(bar_list: BarList) -> str:
    """The title of a list of bars, with its subtitle on a second line."""
    return f"<b>{html.escape(bar_list.title)}</b>" + (
        f"<br>{html.escape(bar_list.subtitle)}" if bar_list.subtitle else ""
    )


def _bars_of(bar_list: BarList, limit: float) -> list[Figure]:
    """The bars of one list, and the marks of the largest shares of shuffled values."""
    labels = [html.escape(f"{label}  {bar.share:.0%}") for label, bar in bar_list.bars.items()]
    said = [
        f"{label}: {bar.share:.1%}" + (f", shuffled up to {bar.chance:.1%}" if bar.chance is not None else "")
        for label, bar in bar_list.bars.items()
    ]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [bar.share for bar in bar_list.bars.values()],
        "y": labels,
        "marker": {
            "color": bar_list.colour,
            "opacity": [1.0 if bar.is_clear else 0.3 for bar in bar_list.bars.values()],
        },
        "hoverinfo": "text",
        "hovertext": list(map(html.escape, said)),
    }
    chances = [(label, bar.chance) for label, bar in zip(labels, bar_list.bars.values(), strict=True)]
    shown = [(label, chance) for label, chance in chances if chance is not None and chance < limit]
    marks = {
        "type": "scatter",
        "mode": "markers",
        "x": [chance for _, chance in shown],
        "y": [label for label, _ in shown],
        "marker": {"symbol": "line-ns-open", "color": INK, "size": 15},
        "hoverinfo": "skip",
    }
    return [bars, marks]


def parallel_coordinates(charts: StudyCharts) -> list[str]:
    """The HTML of a picture per model type."""
    parts = [STYLE]
    for name in charts.by_type:
        lines = parallel_coordinates_of(charts, name)
        parts += [f"<h2>{html.escape(lines.title)}</h2>", lines_svg(charts, lines)]
    return [*parts, CHOOSING]


def pareto(charts: StudyCharts) -> list[Section]:
    """The first objective against each of the others."""
    return [("", _pareto(charts, index)) for index in range(1, len(charts.objectives))]


def _pareto(charts: StudyCharts, index: int) -> Figure:
    """The points of both kinds share one entry of the legend: an invisible point carries it."""
    drawn = []
    for name, records in charts.by_type.items():
        for on_front in (False, True):
            chosen = [record for record in records if (record.number in charts.front) == on_front]
            points = _points(charts, chosen, f"{model_label(name)}: {len(records):,}", _look(charts, name))
            points["marker"] |= {"size": 11, "opacity": 1, "line": {"color": INK, "width": 1}} if on_front else {}
            points["marker"]["opacity"] = 1 if on_front else 0.28
            points |= {"x": values_of(chosen, index), "y": values_of(chosen, 0)}
            drawn.append(points | {"legendgroup": html.escape(name), "showlegend": False})
        legend = {"type": "scatter", "mode": "markers", "x": [None], "y": [None], "name": drawn[-1]["name"]}
        drawn.append(legend | {"marker": _look(charts, name), "legendgroup": html.escape(name)})
    across = scale_of(values_of(charts.finished, index), charts.objectives[index])
    up = scale_of(values_of(charts.finished, 0), charts.objectives[0])
    if len(charts.objectives) == 2:
        x, y = zip(*front_line(charts, across), strict=True)
        drawn.append(_line(x, y, "Pareto front", "hv" if rises_to_the_right(charts) else "vh", "dash"))
    layout = _layout(620, _axis(across, charts.objectives[index]), _axis(up, charts.objectives[0]))
    return {"data": drawn, "layout": layout}


# Name of the file: title, a function for the text below it, a function for the figures.
PAGES: dict[str, tuple[str, Callable[[StudyCharts], str], Callable[[StudyCharts], Sequence[Section | str]]]] = {
    "history": ("Optimisation history", StudyCharts.counts, history),
    "importance": ("What mattered", lambda _: IMPORTANCE_LEGEND, importance),
    "parallel_coordinates": (
        "Settings and values",
        lambda charts: (
            f"{charts.counts()}. A line is a finished trial: point at it to read its settings. Drag along an axis "
            "to choose trials, click the axis to have all again."
        ),
        parallel_coordinates,
    ),
    "pareto": ("Pareto front", StudyCharts.front_counts, pareto),
}


# ----------------------------------------------------------------------------------------------------- common parts


def _look(charts: StudyCharts, model_type: str) -> Figure:
    """Marker, colour and size of a model type's points."""
    size = 9 if len(charts.own) <= MANY else 5
    style = charts.styles[model_type]
    return {"symbol": style.marker, "color": style.colour, "size": size, "opacity": 0.85}


def _points(charts: StudyCharts, records: Sequence[TrialRecord], name: str, look: Figure) -> Figure:
    """The points of these trials, with texts under the mouse; the caller adds their coordinates."""
    texts = ["<br>".join(map(html.escape, described(record, charts.objectives))) for record in records]
    common = {"type": "scatter", "mode": "markers", "hoverinfo": "text", "hovertext": texts}
    return common | {"name": html.escape(name), "marker": dict(look)}


def _line(x: Sequence[float], y: Sequence[float], name: str, shape: str, dash: str) -> Figure:
    """A line without texts under the mouse. `shape` and `dash` are words of plotly."""
    line = {"shape": shape, "color": INK, "width": 1.5, "dash": dash}
    places = {"x": list(x), "y": list(y)}
    return {"type": "scatter", "mode": "lines", "name": name, "line": line, "hoverinfo": "skip"} | places


def _text(text: str, x: float, y: float, size: int) -> Figure:
    """A line of text at the left of a list of bars: above it (y 1) or in it (y 0). Size 0 is small and grey."""
    place = {"x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": "left", "align": "left", "showarrow": False}
    return place | {
        "text": text,
        "yanchor": "bottom",
        "font": {"size": size or 12, "color": INK if size else "#666666"},
    }


def _layout(height: int, across: Figure, up: Figure) -> Figure:
    """The layout of a scatter plot with the legend above it."""
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "itemsizing": "constant"}
    margin = {"l": 90, "r": 20, "t": 60, "b": 60}
    return {"height": height, "margin": margin, "xaxis": across, "yaxis": up, "legend": legend}


def _axis(scale: Scale, objective: str) -> Figure:
    """The axis of an objective. plotly expects the ends of a logarithmic axis as powers of ten."""
    ends = [math.log10(end) for end in (scale.low, scale.high)] if scale.log else [scale.low, scale.high]
    return {
        "title": {"text": html.escape(objective_label(objective))},
        "type": "log" if scale.log else "linear",
        "range": ends,
        "tickvals": scale.ticks,
        "ticktext": scale.texts,
        "gridcolor": GRID,
        "zeroline": False,
    }
