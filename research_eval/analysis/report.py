"""One HTML page about the results on a dataset. It contains everything that it shows and needs no network.

Python prepares the numbers and texts, the template `report.html.j2` arranges them, and plotly draws in the browser.
The page consists of cards with the best score of each model type, the summary table, score against cost, learning
curves, the paired comparison, pictures of routing, the best configs, and the commands to run them again.
"""

from __future__ import annotations

import html
import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_eval.analysis.baselines import Baseline
from research_eval.analysis.comparison import Comparison, comparison_table
from research_eval.analysis.data import TaskData
from research_eval.analysis.figures import label
from research_eval.analysis.points import COST_LABELS, Curve, Point, Score, Standing, is_wide, panels, points_of, styles
from research_eval.analysis.report_routes import routing_parts, written_texts
from research_eval.analysis.runs import (
    OPERATIONAL,
    Group,
    Results,
    described,
    differences,
    flat,
    with_enough_seeds,
)
from research_eval.analysis.statistics import mean_interval
from research_eval.analysis.summary import (
    COSTS,
    NO_DATA,
    SHOWN_COSTS,
    Options,
    Row,
    rate_texts,
    spread_text,
)
from research_eval.analysis.summary import summary_table as summary_table_of
from research_eval.analysis.tables import Table, bounds_of, interval_text, metric_text, one_line, short_number
from research_eval.files import file_stem
from research_eval.store.data_facts import FACTS, facts_notes, facts_table
from research_eval.store.metrics import gain_sign
from research_eval.system.untrusted import stored_object

if TYPE_CHECKING:
    from research_eval.store.store import Store

MAX_POINTS = 3000  # per task; a browser draws more of them slowly
MAX_LISTED = 50  # configs in the table
MAX_SETTINGS = 24  # hyperparameters with a column of their own
MAX_NAMED = 12  # hyperparameters in the text of a point
LINE_LENGTH = 160  # characters of a line in that text


def report_html(
    store: Store,
    results: Results,
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    curves: Mapping[str, Mapping[str, Sequence[Curve]]],
    score: Score,
    options: Options,
    data: Mapping[str, TaskData] = NO_DATA,
) -> str:
    """The text of the page. `curves`: task -> series -> a curve for each of the best configs.

    The pictures show `score`; tables and cards show the metric of the options, by which the configs were chosen.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # keep the order of keys; jinja2 sorts them by default
    environment.filters["one_line"] = one_line
    looks = styles(results.model_types)
    listed = _listed(results, options)
    return environment.get_template("report.html.j2").render(
        results=results,
        options=options,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        looks=looks,
        cards=[_card(results, row, score, options) for row in rows],
        summary=summary_table_of(results, rows, options),
        comparison=comparison_table(results, comparisons, options) if comparisons else None,
        listed=listed,
        known=_known(results, data),
        routing=routing_parts(store, results, rows, options),
        written=written_texts(results, rows, options),
        recipes=[_recipe(store, results, row) for row in rows],
        command=_command(results, options),
        plotly=get_plotlyjs(),
        data=_figures(results, curves, score, options),
    )


# ------------------------------------------------------------------------------------------------------- the figures


def _figures(
    results: Results, curves: Mapping[str, Mapping[str, Sequence[Curve]]], score: Score, options: Options
) -> dict[str, Any]:
    """What the script of the page draws, for each task. plotly interprets HTML tags, so that all text is escaped."""
    return {
        "tasks": [
            {
                "label": html.escape(results.tasks[task]),
                "scatter": _scatter(results, task, score, options),
                "baselines": [vars(one) for one in score.baselines.get(task, ())],
                "curves": {
                    series: [_curve(curve) for curve in curves.get(task, {}).get(series, ())] for series in score.curves
                },
            }
            for task in panels(results)
        ],
        "costs": COST_LABELS,
        "series": {series: html.escape(label) for series, label in score.curves.items()},
        "score": html.escape(score.axis),
        "standings": {one.name.lower(): one.value for one in Standing},
        "confidence": f"{100 * options.confidence:g} %",
        "looks": {
            html.escape(name): {"colour": look.colour, "marker": look.marker}
            for name, look in styles(results.model_types).items()
        },
    }


def _scatter(results: Results, task: str, score: Score, options: Options) -> dict[str, Any]:
    """The points of a task for every cost. The texts under the mouse (`hover`) are the same for all costs.

    Of very many configs only the best are kept, and those on the Pareto front of some cost.
    """
    groups = results.of_task(task)
    numbers = {id(group): number for number, group in enumerate(groups)}
    by_cost = {cost: points_of(results, task, cost, score, options.confidence) for cost in COST_LABELS}
    best = sorted(groups, key=lambda group: -_goodness(group, score))[:MAX_POINTS]
    # Groups are compared by identity: equal groups do not exist, and comparing their runs would be slow.
    kept = {id(group) for group in best}
    kept |= {id(point.group) for points in by_cost.values() for point in points if point.on_front}
    shown = [group for group in groups if id(group) in kept]
    hover = dict(zip((numbers[id(group)] for group in shown), _hovers(shown, score, options), strict=True))
    return {
        "hidden": len(groups) - len(shown),
        "hover": hover,
        "costs": {
            cost: {
                "wide": is_wide([point.cost for point in points]),
                "points": [_point(point, numbers[id(point.group)]) for point in points if id(point.group) in kept],
            }
            for cost, points in by_cost.items()
        },
    }


def _goodness(group: Group, score: Score) -> float:
    """Larger for better groups; a group without a score is worse than all others."""
    mean = group.mean(score.metric)
    return -math.inf if mean is None else score.sign * mean


def _point(point: Point, number: int) -> dict[str, Any]:
    """A point for the script; `number` finds its text in `hover`."""
    low, high = point.interval or (None, None)
    return {
        "n": number,
        "model": html.escape(point.group.model_type),
        "x": point.cost,
        "y": point.score,
        "low": low,
        "high": high,
        "standing": point.standing.name.lower(),
    }


def _hovers(groups: Sequence[Group], score: Score, options: Options) -> list[str]:
    """The text of each point under the mouse: scores, costs, hyperparameters and the run."""
    texts = []
    for group, values in zip(groups, hyperparameters(groups), strict=True):
        scores = group.values(score.metric)
        mean = metric_text(group.mean(score.metric), score.metric)
        interval = mean_interval(scores, options.confidence, bounds_of(score.metric))
        spread = interval_text(interval, score.metric)
        costs = (
            f"{COSTS[cost]} {short_number(group.mean(cost))}" for cost in COST_LABELS if group.mean(cost) is not None
        )
        named = [described({name: value}) for name, value in list(values.items())[:MAX_NAMED]]
        lines = [
            f"{group.model_type}: {group.name}",
            f"{score.name} {mean} {spread}".rstrip() + f", {len(scores)} seeds",
            ", ".join(costs),
            *(", ".join(named[start : start + 3]) for start in range(0, len(named), 3)),
            f"run {group.runs[0].experiment_id}",
        ]
        texts.append("<br>".join(html.escape(label(line, LINE_LENGTH)) for line in lines if line))
    return texts


def hyperparameters(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """For each group the settings in which the groups of its model type and task differ.

    The seed, the name and settings that do not change what is computed are left out.
    """
    together: dict[tuple[str, str], list[int]] = {}
    for number, group in enumerate(groups):
        together.setdefault((group.task, group.model_type), []).append(number)
    found: list[dict[str, Any]] = [{} for _ in groups]
    ignored = {"seed", "experiment_name", *(f"training_params.{name}" for name in OPERATIONAL)}
    for members in together.values():
        varied = differences([flat(groups[number].config) for number in members])
        for number, values in zip(members, varied, strict=True):
            found[number] = {_last(name): _rounded(value) for name, value in values.items() if name not in ignored}
    return found


def _last(name: str) -> str:
    """`lr` of `optimizer_params.lr`."""
    section, _, rest = name.partition(".")
    return rest if section.endswith("_params") and rest else name


def _rounded(value: Any) -> Any:
    """A float with four digits; any other value as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _curve(curve: Curve) -> dict[str, Any]:
    """A curve for the script. At epochs without an interval the band has no width."""
    return {
        "model": html.escape(curve.group.model_type),
        "x": curve.epochs,
        "mean": curve.mean,
        "low": [mean if one is None else one.low for mean, one in zip(curve.mean, curve.intervals, strict=True)],
        "high": [mean if one is None else one.high for mean, one in zip(curve.mean, curve.intervals, strict=True)],
        "banded": any(curve.intervals),
        "seeds": [{"x": epochs, "y": values} for epochs, values in curve.seeds],
    }


# ----------------------------------------------------------------------------------------------------- the other parts


@dataclass(frozen=True)
class Cell:
    """A cell of the sortable table: the text that it shows, and the value that sorts it."""

    text: str
    value: float | str


def _card(results: Results, row: Row, score: Score, options: Options) -> dict[str, Any]:
    """The score of a model type in large letters, with a few facts; facts without a value are left out."""
    solved, rate = rate_texts(row.score) if row.score.has_telling_rate else ("", "")
    facts = {
        f"{100 * options.confidence:g} % interval": spread_text(row.score, options.metric),
        "seeds": str(len(row.score.values)),
        f"solved (≥ {options.solved_at:g})": f"{solved} {rate}".strip(),
        options.test_metric: metric_text(row.test.mean, options.test_metric),
        **{one.name: metric_text(one.value, score.metric) for one in _baselines(row.group.task, score, options)},
        "parameters": short_number(row.costs["param_count"]),
        "trials spent": f"{row.trials:,}",
    }
    return {
        "model": row.group.model_type,
        "task": results.tasks[row.group.task],
        "score": metric_text(row.score.mean, options.metric),
        "facts": {name: text for name, text in facts.items() if text},
    }


def _known(results: Results, data: Mapping[str, TaskData]) -> list[Table]:
    """What is known of the data of each task; nothing for a task whose runs have stored no facts."""
    tables = []
    for task, known in data.items():
        columns, rows = facts_table(known.facts)
        if rows:
            rows = [[row[0].replace("  ", "\u2003", 1), *row[1:]] for row in rows]  # HTML drops blanks
            tables.append(Table(results.tasks[task], columns, rows, left=("",), notes=facts_notes(known.facts)))
    return tables


def _baselines(task: str, score: Score, options: Options) -> Sequence[Baseline]:
    """The baselines of a task, if they are in the metric of the cards."""
    return score.baselines.get(task, ()) if score.metric == options.metric else ()


def _listed(results: Results, options: Options) -> dict[str, Any]:
    """The best configs of all model types, as a table that the reader can sort."""
    sign = gain_sign(options.metric)
    scored = [(mean, group) for group in results.groups if (mean := group.mean(options.metric)) is not None]
    able = set(map(id, with_enough_seeds(results.groups, options.metric)))  # the others follow
    scored.sort(key=lambda one: (id(one[1]) not in able, -sign * one[0]))
    tasks = len(results.tasks) > 1
    groups = [group for _, group in scored[:MAX_LISTED]]
    settings = hyperparameters(groups)
    counts = Counter(name for values in settings for name in values)
    names = sorted(counts, key=lambda name: (-counts[name], name))[:MAX_SETTINGS]
    columns = ["model", *["task"] * tasks, options.metric, "interval", "seeds", *names]
    columns += [*(COSTS[cost] for cost in SHOWN_COSTS), "experiment"]
    left = {"model", "task", "experiment", *(name for name in names if not _is_numeric(settings, name))}
    rows = []
    for group in groups:
        values = {_last(name): _rounded(value) for name, value in flat(group.config).items()}
        mean, values_of_seeds = group.mean(options.metric), group.values(options.metric)
        interval = mean_interval(values_of_seeds, options.confidence, bounds_of(options.metric))
        cells = [Cell(group.model_type, group.model_type)]
        cells += [Cell(results.tasks[group.task], results.tasks[group.task])] * tasks
        cells += [Cell(metric_text(mean, options.metric), _sortable(mean))]
        cells += [Cell(interval_text(interval, options.metric), _sortable(interval and interval.low))]
        cells += [Cell(str(len(values_of_seeds)), len(values_of_seeds))]
        cells += [_setting(values[name]) if name in values else Cell("", -math.inf) for name in names]
        cells += [Cell(short_number(group.mean(cost)), _sortable(group.mean(cost))) for cost in SHOWN_COSTS]
        rows.append([*cells, Cell(group.name, group.name)])
    hidden = len(counts) - len(names)
    return {"columns": columns, "left": left, "rows": rows, "total": len(scored), "hidden": hidden}


def _is_numeric(settings: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether a hyperparameter has only numbers as its values."""
    values = [one[name] for one in settings if name in one]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _setting(value: Any) -> Cell:
    """The cell of a hyperparameter's value."""
    text = value if isinstance(value, str) else json.dumps(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return Cell(label(text, LINE_LENGTH), float(value) if is_number else text)


def _sortable(value: float | None) -> float:
    """A missing value sorts below all others."""
    return -math.inf if value is None else value


def _recipe(store: Store, results: Results, row: Row) -> dict[str, Any]:
    """For the section "Run it again": the config of a row, the command, and the environment of its first run."""
    stored = store.experiment(row.group.runs[0].experiment_id)
    seeds = ",".join(str(run.seed) for run in row.group.runs if run.seed is not None)
    file = f"best_{file_stem(row.group.model_type)}.json"
    command = f"python research_eval/main.py --json_config_path {file}" + (f" --seeds {seeds}" if seeds else "")
    environment = stored_object(stored["env_details_json"])
    return {
        "model": row.group.model_type,
        "task": results.tasks[row.group.task],
        "name": row.group.name,
        "file": file,
        "command": command,
        "config": json.dumps(row.group.config, indent=2) if row.group.config else row.group.runs[0].config_json,
        "runs": [run.experiment_id for run in row.group.runs],
        "environment": flat({**environment, "data": _not_shown(environment.get("data"))}),
    }


def _not_shown(data: Any) -> Any:
    """What the section about the data does not show."""
    return {name: value for name, value in data.items() if name not in FACTS} if isinstance(data, dict) else data


def _command(results: Results, options: Options) -> str:
    """The command that makes this page again."""
    words = ["python", "research_eval/analyze_results.py", "--dataset_name", results.dataset_name]
    words += ["--model_types", ",".join(results.model_types), "--metric_to_optimize", options.metric]
    words += ["--confidence", f"{options.confidence:g}", "--solved_at", f"{options.solved_at:g}", "--run_report"]
    return shlex.join(words)
