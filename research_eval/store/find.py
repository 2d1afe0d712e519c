"""Finding runs: conditions as a user writes them, checked lists of runs, and one run by a short name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from research_eval.errors import ConfigError
from research_eval.store.metrics import DEFAULT_METRIC, check_selectable, default_metric, direction
from research_eval.store.records import COMPARISONS, STATUSES, RunFilter
from research_eval.store.store import Store
from research_eval.store.tables import experiments_table
from research_eval.wording import did_you_mean, hint

SHORT_NAMES = {
    "id": "experiment_id",
    "type": "run_type",
    "name": "experiment_name",
    "model": "model_type",
    "dataset": "dataset_name",
    "seconds": "training_duration_seconds",
    "started": "timestamp",
}
COLUMNS: list[str] = [column.name for column in experiments_table.columns]
TIMES = ("timestamp", "heartbeat")
LATEST = "latest"
NEAR = 0.78  # similarity of a misspelt name; "moe" and "goe" are two names


def parse_condition(text: str) -> tuple[str, str, float]:
    """Metric, operator and number of a condition such as "final_val_f1>=0.9". Raises ConfigError.

    >>> parse_condition("final_val_f1 >= 0.9")
    ('final_val_f1', '>=', 0.9)
    """
    match = re.fullmatch(r"\s*([^<>=!]*[^<>=!\s])\s*(>=|<=|==|!=|>|<)\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*", text)
    try:
        if match:
            return match[1], match[2], float(match[3])
    except ValueError:  # a number with two points: the message below says what is expected
        pass
    raise ConfigError(
        f"--where: expected a metric, one of {' '.join(COMPARISONS)} and a number, such as 'final_val_f1>=0.9', "
        f"got {text!r}"
    )


def parse_since(text: str) -> datetime:
    """A date or a time, in UTC if it names no other zone. Raises ConfigError."""
    try:
        since = datetime.fromisoformat(text)
        return (since if since.tzinfo else since.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"--since: expected a date such as 2026-05-31 or 2026-05-31T18:30, got {text!r}") from error


def find_runs(
    store: Store,
    wanted: RunFilter,
    *,
    sort: str | None = None,
    reverse: bool = False,
    limit: int | None = None,
    metrics: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Rows with the values of `metrics` under "metrics": the newest first, or sorted by a column or a metric.

    Metrics are sorted best first, columns in ascending order. Raises ConfigError for names that the store does not know
    and for a choice by a score of the test split.
    """
    check_filter(store, wanted)
    key = SHORT_NAMES.get(sort, sort) if sort else "timestamp"
    if key in COLUMNS:
        descending = key in TIMES
    else:
        check_metric(store, key, "--sort", [*SHORT_NAMES, *COLUMNS], chooses=True)
        descending = direction(key) == "maximize"
    rows = store.find_runs(wanted, sort=key, descending=descending != reverse, limit=limit)
    values = store.metrics_of([row["experiment_id"] for row in rows], metrics)
    return [{**row, "metrics": values[row["experiment_id"]]} for row in rows]


def check_filter(store: Store, wanted: RunFilter) -> None:
    """Raise ConfigError for a status or a metric that does not exist, a misspelt name, and a choice by a test score."""
    if wanted.status is not None and wanted.status not in STATUSES:
        raise ConfigError(f"--status: unknown {wanted.status!r}.{hint(wanted.status, STATUSES)}")
    for name, _, _ in wanted.where:
        check_metric(store, name, "--where", chooses=True)
    for option, known in (("dataset_name", store.dataset_names), ("model_type", store.model_types)):
        value = getattr(wanted, option)
        if value is not None and value not in (names := known()) and (near := did_you_mean(value, names, NEAR)):
            raise ConfigError(f"--{option}: no run has {value!r} in {store.location}.{near}")


def check_metric(store: Store, name: str, option: str, also: Sequence[str] = (), chooses: bool = False) -> None:
    """Raise ConfigError for a metric that no run has and, if it `chooses` runs, for one of the test split.

    `also` are column names that the option accepts too. A store without any metrics accepts every name.
    """
    if chooses and name.startswith("test_"):
        check_selectable(name, option)
    if store.has_metric(name):
        return
    known = [summary.name for summary in store.metric_summaries()]
    if known:
        what = "column and no metric" if also else "metric"
        raise ConfigError(f"{option}: no {what} {name!r} in {store.location}.{hint(name, [*also, *known])}")


def default_metric_of(store: Store, dataset_name: str | None = None) -> str:
    """The metric that chooses among all runs, or among the runs on a dataset, if the user names none."""
    if store.has_metric(DEFAULT_METRIC, dataset_name):  # first, because it is quick in a store of many runs
        return DEFAULT_METRIC
    return default_metric(store.metric_names(dataset_name))


def find_run(store: Store, name: str) -> dict[str, Any]:
    """The run with this id or unique beginning of one; "latest" is the run that started last. Raises ConfigError."""
    if name == LATEST:
        newest = store.find_runs(sort="timestamp", descending=True, limit=1)
        if not newest:
            raise ConfigError(f"no runs in {store.location}")
        name = newest[0]["experiment_id"]
    return store.experiment(name)
