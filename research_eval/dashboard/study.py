"""What the page of a study draws. The figures are those of `analysis`, computed from the stored runs of the study.

The results store has the runs of a study, but not its search space: Optuna's database may be elsewhere. So the range of
a parameter is that of the values that the runs had.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from research_eval.analysis.points import is_wide
from research_eval.analysis.runs import OPERATIONAL, flat
from research_eval.analysis.study_axes import DISCRETE, Scale, scale_of
from research_eval.analysis.study_charts import (
    IMPORTANCE_LEGEND,
    SHARED,
    BarList,
    ParallelCoordinates,
    StudyCharts,
    bar_limit,
    best_so_far,
    front_line,
    importance_rows,
    parallel_coordinates_of,
)
from research_eval.analysis.study_importance import values_of
from research_eval.analysis.study_texts import model_type_of, objective_label
from research_eval.analysis.study_trials import TrialRecord, TrialRuns, TrialSettings
from research_eval.dashboard.queries import NotThere, finite
from research_eval.errors import ConfigError
from research_eval.store.find import check_metric, default_metric_of
from research_eval.store.metrics import gain_sign
from research_eval.store.records import RunFilter
from research_eval.store.store import Store
from research_eval.system.untrusted import stored_object

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

COST = "param_count"  # the metric of the x axis that a page begins with
SHADES = 5  # of lines, from the worst trials to the best
LISTED = 500  # trials in the table
KEPT = 8  # importances are computed again only for studies that have changed
STATES = {"pruned": "PRUNED", "running": "RUNNING"}  # Optuna's words; a trial without all its values is FAIL
SEED_KEYS = ("seed", "experiment_name")  # of a config: they differ within a trial


@dataclass(frozen=True)
class StudyRun:
    """A stored run of a study: its trial, its facts, and the values that can differ between trials."""

    experiment_id: str
    trial: int
    seed: Any
    status: str
    model_type: str
    reason: str | None
    config: dict[str, Any]
    metrics: dict[str, Any]


class Studies:
    """Answers for the page of a study. Keeps what takes long, the importances of the parameters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[Any, ...], dict[str, Any]] = OrderedDict()

    def view(self, store: Store, name: str, x: str = "", y: str = "") -> dict[str, Any]:
        """The figures of a study: `y` is what its trials are judged by, `x` a second metric, such as a cost.

        Empty names stand for the usual ones. Raises NotThere for an unknown study and ConfigError for a metric that the
        runs do not have, or that is a score of the test split.
        """
        rows = _rows(store, name)
        data = rows[0]["dataset_name"]
        offered = _offered(store, rows)
        y = y or default_metric_of(store, data)
        x = x or next((one for one in (COST, *offered) if one in offered and one != y), "")
        runs = _runs(store, rows, {"y": y, "x": x} if x else {"y": y})
        if x == y:
            raise ConfigError(f"x: {x!r} is also y; give two different metrics")
        records = _records(runs, (y,))
        charts = StudyCharts(name, data, (y,), tuple(records))
        both = StudyCharts(name, data, (y, x), tuple(_records(runs, (y, x)))) if x else None
        return {
            "name": name,
            "data": data,
            "x": x,
            "y": y,
            "labels": {one: objective_label(one) for one in (x, y) if one},
            "offered": offered,
            "counts": charts.counts(),
            "models": {one: charts.styles[one].colour for one in sorted({model_type_of(record) for record in records})},
            "runs": {record.number: [record.experiment_ids[0], model_type_of(record)] for record in records},
            "history": _history(charts, y),
            "pareto": _pareto(both, x, y) if both and both.finished else None,
            "trials": _table(records, runs, (y, x), gain_sign(y)),
        }

    def parameters(self, store: Store, name: str, y: str = "") -> dict[str, Any]:
        """Importances and parallel coordinates, for which a thousand trials take seconds. Raises as `view` does."""
        rows = _rows(store, name)
        data = rows[0]["dataset_name"]
        y = y or default_metric_of(store, data)
        charts = StudyCharts(name, data, (y,), tuple(_records(_runs(store, rows, {"y": y}), (y,))))
        key = (name, y, tuple((record.number, record.status, record.values) for record in charts.records))
        with self._lock:
            if key not in self._known:
                self._known[key] = {"importance": _importance(charts), "parallel": _parallel(charts)}
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
            return self._known[key]


# -------------------------------------------------------------------------------------------------- trials from runs


def _rows(store: Store, name: str) -> list[dict[str, Any]]:
    rows = store.find_runs(RunFilter(study=name), sort="timestamp", with_json=True)
    if not rows:
        raise NotThere(name)
    return rows


def _runs(store: Store, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]) -> list[StudyRun]:
    """The runs with these metrics, which are named by the parameters of a URL. Raises ConfigError for a wrong one."""
    for option, metric in metrics.items():
        check_metric(store, metric, option, chooses=True)
    values = store.metrics_of([row["experiment_id"] for row in rows], list(metrics.values()))
    return [_run(row, values[row["experiment_id"]]) for row in rows]


def _offered(store: Store, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that a reader can choose: the numbers of a finished run of each model type, without test scores."""
    newest = {row["model_type"]: row["experiment_id"] for row in rows if row["status"] == "finished"}
    found = store.metrics_of(list(newest.values()))
    names = {name for one in found.values() for name, value in one.items() if isinstance(value, float)}
    return sorted(name for name in names if not name.startswith("test_"))


def _run(row: Mapping[str, Any], metrics: dict[str, Any]) -> StudyRun:
    study = stored_object(row["env_details_json"]).get("study")
    trial = study.get("trial") if isinstance(study, dict) else None
    config = flat(stored_object(row["full_config_json"]))
    ignored = {*SEED_KEYS, *(f"training_params.{key}" for key in OPERATIONAL)}
    return StudyRun(
        row["experiment_id"],
        trial if isinstance(trial, int) else -1,
        config.get("seed"),
        row["status"],
        row["model_type"],
        row["error"],
        {key: _plain(value) for key, value in config.items() if key not in ignored},
        metrics,
    )


def _plain(value: Any) -> Any:
    """A value that a choice of Optuna can have."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _records(runs: Sequence[StudyRun], objectives: tuple[str, ...]) -> list[TrialRecord]:
    """A record for each trial. Its values are means over its seeds, as the study itself has computed them.

    A trial that was begun again counts with the newest run of each seed.
    """
    trials: dict[int, dict[str, StudyRun]] = {}
    for run in runs:  # oldest first
        trials.setdefault(run.trial, {})[str(run.seed)] = run
    settings = _settings(runs)
    found = []
    for number, by_seed in sorted(trials.items()):
        members = list(by_seed.values())
        status = next((run.status for run in members if run.status != "finished"), "finished")
        means = [_mean([run.metrics.get(name) for run in members]) for name in objectives]
        values = tuple(mean for mean in means if mean is not None)
        is_complete = status == "finished" and len(values) == len(objectives)
        found.append(
            TrialRecord(
                number=number,
                state="COMPLETE" if is_complete else STATES.get(status, "FAIL"),
                status=status,
                reason=members[-1].reason,
                values=values if is_complete else None,
                last={},
                model_type=members[-1].model_type,
                settings=settings[members[-1].experiment_id],
                runs=TrialRuns([run.experiment_id for run in members], 0, 1),
                warm_start=None,
                started=None,
                completed=None,
            )
        )
    return found


def _mean(values: Sequence[Any]) -> float | None:
    numbers = [value for value in map(finite, values) if value is not None]
    return fmean(numbers) if numbers and len(numbers) == len(values) else None


def _settings(runs: Sequence[StudyRun]) -> dict[str, TrialSettings]:
    """For each run the values that differ within its model type, with the range that they have there."""
    found: dict[str, TrialSettings] = {}
    for model_type in dict.fromkeys(run.model_type for run in runs):
        own = [run for run in runs if run.model_type == model_type]
        tried: dict[str, list[Any]] = {}
        for run in own:
            for key, value in run.config.items():
                tried.setdefault(key, []).append(value)
        varied = {key: values for key, values in tried.items() if len({json.dumps(one) for one in values}) > 1}
        space = {key: distribution_of(values) for key, values in varied.items()}
        for run in own:
            params = {key: run.config[key] for key in varied if key in run.config}
            found[run.experiment_id] = TrialSettings(params, params, {key: space[key] for key in params})
    return found


def distribution_of(values: Sequence[Any]) -> BaseDistribution:
    """The range that these values suggest: few whole numbers and all texts are choices, other numbers are intervals."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    whole = all(isinstance(value, int) for value in numbers)
    if len(numbers) < len(values) or not all(map(math.isfinite, numbers)):
        return CategoricalDistribution(list({json.dumps(value): value for value in values}.values()))
    if whole and len(set(numbers)) <= DISCRETE:
        return CategoricalDistribution(sorted(set(numbers)))
    low, high, log = min(numbers), max(numbers), is_wide(numbers)
    return IntDistribution(int(low), int(high), log=log) if whole else FloatDistribution(low, high, log=log)


# --------------------------------------------------------------------------------------------------- figures as JSON


def _scale(scale: Scale) -> dict[str, Any]:
    return {name: getattr(scale, name) for name in ("low", "high", "log", "ticks", "texts")}


def _history(charts: StudyCharts, y: str) -> dict[str, Any] | None:
    """The value of each finished trial, and the best so far."""
    if not charts.finished:
        return None
    numbers, values = [record.number for record in charts.finished], values_of(charts.finished, 0)
    return {
        "points": [[record.number, value] for record, value in zip(charts.finished, values, strict=True)],
        "best": best_so_far(numbers, values, y),
        "scale": _scale(scale_of(values, y)),
    }


def _importance(charts: StudyCharts) -> dict[str, Any]:
    rows = importance_rows(charts)
    return {
        "legend": IMPORTANCE_LEGEND,
        "limit": bar_limit(rows),
        "rows": [[_bars(one) for one in row] for row in rows],
    }


def _bars(one: BarList) -> dict[str, Any]:
    bars = [[label, found.share, found.chance, found.is_clear] for label, found in one.bars.items()]
    colour = "" if one.colour == SHARED else one.colour  # the page has a colour for each theme
    return {"title": one.title, "subtitle": one.subtitle, "note": one.note, "colour": colour, "bars": bars}


def _parallel(charts: StudyCharts) -> list[dict[str, Any]]:
    return [_axes(parallel_coordinates_of(charts, name)) for name in charts.by_type]


def _axes(found: ParallelCoordinates) -> dict[str, Any]:
    return {
        "title": found.title,
        "axes": [
            {"label": axis.label, "ticks": axis.ticks, "places": [round(at, 4) for at in found.places(axis)]}
            for axis in found.axes
        ],
        "trials": [record.number for record in found.records],
        "shades": [min(SHADES - 1, int(SHADES * good)) for good in found.goodness],
    }


def _pareto(charts: StudyCharts, x: str, y: str) -> dict[str, Any]:
    ys, xs = values_of(charts.finished, 0), values_of(charts.finished, 1)
    scale = scale_of(xs, x)
    return {
        "points": [[record.number, *pair] for record, *pair in zip(charts.finished, xs, ys, strict=True)],
        "front": sorted(charts.front),
        "line": front_line(charts, scale),
        "rises": gain_sign(x) < 0,
        "x": _scale(scale),
        "y": _scale(scale_of(ys, y)),
        "counts": charts.front_counts(),
    }


def _table(
    records: Sequence[TrialRecord], runs: Sequence[StudyRun], objectives: tuple[str, str], sign: int
) -> dict[str, Any]:
    """The trials, the best first, with the values in which they differ."""
    by_id = {run.experiment_id: run for run in runs}
    names = list(dict.fromkeys(key for record in records for key in record.plain_params if key != "model_type"))

    def row(record: TrialRecord) -> dict[str, Any]:
        members = [by_id[one] for one in record.experiment_ids]
        return {
            "trial": record.number if record.number >= 0 else None,
            "runs": [[run.experiment_id, run.seed] for run in members],
            "model": model_type_of(record),
            "status": record.status,
            "values": [_mean([run.metrics.get(name) for run in members]) if name else None for name in objectives],
            "params": [record.plain_params.get(name) for name in names],
        }

    rows = [row(record) for record in records]
    rows.sort(key=lambda one: (one["values"][0] is None, -sign * (one["values"][0] or 0.0), one["runs"][0][0]))
    return {"params": names, "total": len(rows), "rows": rows[:LISTED]}
