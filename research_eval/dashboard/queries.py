"""What the pages ask the results store, as plain values for JSON. Nothing here writes."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from research_eval.analysis.runs import flat, load_results
from research_eval.analysis.statistics import mean_interval, wilson_interval
from research_eval.analysis.tables import bounds_of
from research_eval.errors import ConfigError
from research_eval.files import run_folder
from research_eval.routing.trace_files import ROUTING_FOLDER
from research_eval.store.find import by_conditions, check_metric, default_metric_of, find_runs
from research_eval.store.metrics import gain_sign
from research_eval.store.records import STATUSES, RunFilter, RunRow
from research_eval.store.store import Store
from research_eval.store.values import tags_of
from research_eval.system.untrusted import stored_object

PAGE_ROWS, MOST_ROWS = 100, 500
SHOWN_COSTS = ("param_count", "training_duration_seconds")
HISTORY_SECONDS = 0.5  # between two reads of a run's series, however many browsers ask
MOST_SELECTED, MOST_COLUMNS = 20, 20


class NotThere(LookupError):
    """There is no such run or study."""


@dataclass(frozen=True)
class Wanted:
    """The runs that a page shows: filters, order and window. Raises ConfigError for nonsense."""

    name: str = ""
    model: str = ""
    data: str = ""
    status: str = ""
    study: str = ""
    where: str = ""
    sort: str = ""
    descending: bool = False
    offset: int = 0
    limit: int = PAGE_ROWS
    columns: tuple[str, ...] = ()  # metrics to show; none stands for the usual ones

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Wanted:
        """From the parameters of a URL."""
        texts = {key: query[key] for key in ("model", "data", "status", "study", "where", "sort") if key in query}
        return cls(
            query.get("q", ""),
            descending=query.get("dir") == "desc",
            offset=whole_number(query, "offset", 0, 0, 10**9),
            limit=whole_number(query, "limit", PAGE_ROWS, 1, MOST_ROWS),
            columns=tuple(dict.fromkeys(filter(None, query.get("columns", "").split(",")))),
            **texts,
        )

    def filter(self, store: Store) -> RunFilter:
        """The filter of the store."""
        found = by_conditions(store, [self.where], "where") if self.where else RunFilter()
        if self.status and self.status not in STATUSES:
            raise ConfigError(f"status: expected one of {', '.join(STATUSES)}, got {self.status!r}")
        name = f"*{self.name}*" if self.name and not set(self.name) & set("*?") else self.name
        return RunFilter(
            dataset_name=self.data or None,
            model_type=self.model or None,
            status=self.status or None,
            study=self.study or None,
            name=name or None,
            where=found.where,
            config=found.config,
        )


def whole_number(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    """A whole number from a URL. Raises ConfigError."""
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and least <= int(text[:12]) <= most and len(text) <= 12):
        raise ConfigError(f"{name}: expected a whole number from {least} to {most}, got {text[:40]!r}")
    return int(text)


def runs_page(store: Store, wanted: Wanted) -> dict[str, Any]:
    """A window of the table of runs, with the number of all rows."""
    chosen = wanted.filter(store)
    metric = default_metric_of(store, wanted.data or None)
    if len(wanted.columns) > MOST_COLUMNS:
        raise ConfigError(f"columns: expected at most {MOST_COLUMNS} metrics, got {len(wanted.columns)}")
    for name in wanted.columns:
        check_metric(store, name, "columns", chooses=True)  # a click on a column sorts by it
    names = wanted.columns or tuple(dict.fromkeys([metric, *SHOWN_COSTS]))
    rows = find_runs(
        store,
        chosen,
        sort=wanted.sort or None,
        reverse=wanted.descending,
        limit=wanted.limit,
        metrics=list(names),
        offset=wanted.offset,
    )
    return {
        "total": store.count_runs(chosen),
        "offset": wanted.offset,
        "metric": metric,
        "names": list(names),
        "rows": [_row(row) for row in rows],
    }


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": row["experiment_id"],
        "name": row["experiment_name"] or "",
        "model": row["model_type"] or "",
        "data": row["dataset_name"] or "",
        "status": row["status"],
        "seed": row["seed"],
        "started": _time(row["timestamp"]),
        "tags": tags_of(row["tags"]),
        "metrics": {name: finite(value) for name, value in row["metrics"].items()},
    }


def choices(store: Store) -> dict[str, Any]:
    """What the filters offer."""
    return {"models": store.model_types(), "data": store.dataset_names(), "statuses": list(STATUSES)}


def column_names(store: Store) -> dict[str, Any]:
    """The metrics that the table of runs can show: numbers, and no scores of the test split, which choose nothing."""
    found = [one.name for one in store.metric_summaries() if one.low is not None]
    return {"metrics": [name for name in found if not name.startswith("test_")]}


def groups(store: Store, wanted: Wanted) -> dict[str, Any]:
    """The runs of one data set, grouped over their seeds: all of them, and each group with its interval."""
    names = store.dataset_names()
    data = wanted.data or (names[0] if names else "")
    metric = default_metric_of(store, data or None)
    found = load_results(store, data, [metric, "param_count"], wanted.filter(store)) if data else None
    rows: list[dict[str, Any]] = []
    for group in found.groups if found else ():
        by_seed = group.by_seed()
        scores = group.scores(metric)
        values = list(scores.values())
        interval = mean_interval(values, bounds=bounds_of(metric)) if len(values) > 2 else None
        solved = sum(value >= 0.99 for value in values)
        wilson = wilson_interval(solved, len(values)) if values else None
        rows.append(
            {
                "name": group.name,
                "model": group.model_type,
                "task": found.tasks.get(group.task, "") if found else "",
                "n": len(group.runs),
                "lost": group.lost,
                "mean": finite(group.mean(metric)),
                "low": None if interval is None else interval.low,
                "high": None if interval is None else interval.high,
                "solved": [solved, None if wilson is None else [wilson.low, wilson.high]],
                "params": finite(group.cost("param_count")),
                "runs": [_member(seed, run, metric) for seed, run in by_seed.items()],
            }
        )
    sign = gain_sign(metric)
    rows.sort(key=lambda row: (row["mean"] is None, -sign * (row["mean"] or 0.0)))
    left_out = found.left_out_text() if found else ""
    return {"data": data, "metric": metric, "groups": rows, "left_out": left_out}


def _member(seed: int | str, run: RunRow, metric: str) -> dict[str, Any]:
    return {"seed": seed, "id": run.experiment_id, "value": finite(run.metrics.get(metric))}


def run_facts(store: Store, experiment_id: str) -> dict[str, Any]:
    """All facts of a run. Raises NotThere for an unknown one."""
    row = store.find_id(experiment_id)
    if row is None:
        raise NotThere(experiment_id)
    metrics = store.metrics(experiment_id)
    environment = stored_object(row["env_details_json"])
    record = {key: value for key, value in environment.items() if key != "data"}
    return {
        **_row({**row, "metrics": {}}),
        "error": row["error"],
        "note": row["note"],
        "parent": row["parent_id"],
        "written": _time(row["heartbeat"]),
        "epochs": row["epochs"],
        "study": (environment.get("study") or {}).get("name") if isinstance(environment.get("study"), dict) else None,
        "config": flat(stored_object(row["full_config_json"])),
        "environment": flat(record),
        "metrics": {name: finite(value) for name, value in metrics.items() if isinstance(value, float)},
        "alarms": [one for one in metrics.get("alarms", []) if isinstance(one, dict)],
        "traced": traced_epochs(experiment_id),
    }


def traced_epochs(experiment_id: str) -> list[int]:
    """The numbers of the epochs whose routing was traced."""
    folder = run_folder(experiment_id) / ROUTING_FOLDER
    if folder.is_symlink() or folder.parent.is_symlink() or not folder.is_dir():
        return []
    stems = sorted(path.stem.removeprefix("epoch_") for path in folder.glob("epoch_*.parquet"))
    return [int(stem) for stem in stems if stem.isdecimal()]


def compared(store: Store, ids: list[str]) -> dict[str, Any]:
    """Some runs side by side: the keys of their configs that differ, and their metrics."""
    runs = [run_facts(store, one) for one in ids[:MOST_SELECTED]]
    keys = dict.fromkeys(key for run in runs for key in run["config"])
    different = [key for key in keys if len({str(run["config"].get(key, "")) for run in runs}) > 1]
    names = dict.fromkeys(name for run in runs for name in run["metrics"])
    return {
        "runs": [{key: run[key] for key in ("id", "name", "model", "data", "status", "seed")} for run in runs],
        "differences": [[key, *(run["config"].get(key) for run in runs)] for key in different],
        "metrics": [[name, *(run["metrics"].get(name) for run in runs)] for name in names],
    }


# --------------------------------------------------------------------------------------------------- live curves


@dataclass
class Series:
    """What is known of the series of a run; `start` changes when they begin anew, as after a resume."""

    rows: list[tuple[int, float, str, float]] = field(default_factory=list)
    status: str = ""
    attempt: int = 0
    start: int = 0
    read_at: float = -math.inf


class Histories:
    """The series of runs, read at most twice a second each, and only behind the last known step."""

    def __init__(self, store: Callable[[], Store]) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: dict[str, Series] = {}

    def behind(self, experiment_id: str, since: int) -> dict[str, Any]:
        """The points behind a step. Raises NotThere for an unknown run.

        A reader whose `start` is another one than before begins again.
        """
        with self._lock:
            series = self._known.setdefault(experiment_id, Series())
            if time.monotonic() - series.read_at >= HISTORY_SECONDS:
                try:
                    self._read(experiment_id, series)
                except NotThere:
                    del self._known[experiment_id]
                    raise
            found: dict[str, list[list[float]]] = {}
            for step, epoch, name, value in series.rows:
                if step > since:
                    found.setdefault(name, []).append([step, epoch, value])
            last = max((row[0] for row in series.rows), default=-1)
            return {"status": series.status, "start": series.start, "since": last, "series": found}

    def _read(self, experiment_id: str, series: Series) -> None:
        store = self._store()
        row = store.find_id(experiment_id)
        if row is None:
            raise NotThere(experiment_id)
        attempt = row["attempt"] or 0
        if attempt != series.attempt:  # a resumed run writes some steps again
            series.rows, series.attempt, series.start = [], attempt, series.start + 1
        last = max((one[0] for one in series.rows), default=-1)
        for one in store.history(experiment_id, after_step=last):
            if math.isfinite(one.value):
                series.rows.append((one.step, one.epoch, one.name, one.value))
        series.status, series.read_at = row["status"], time.monotonic()


def finite(value: Any) -> float | None:
    """A number that JSON can hold; None for any other value."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _time(value: datetime | None) -> str | None:
    return None if value is None else value.strftime("%Y-%m-%d %H:%M:%S")


@functools.lru_cache(maxsize=1)
def static_folder() -> Path:
    """Where the files of the pages lie."""
    return Path(__file__).parent / "static"
