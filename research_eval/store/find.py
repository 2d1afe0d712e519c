"""Finding runs: conditions as a user writes them, checked lists of runs, and runs by short names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from research_eval.errors import ConfigError
from research_eval.store.changes import flatten
from research_eval.store.metrics import DEFAULT_METRIC, check_selectable, default_metric, direction
from research_eval.store.records import ACTIVE, ALL, COMPARISONS, KEPT, STATUSES, RunFilter
from research_eval.store.store import Store
from research_eval.store.tables import experiments_table
from research_eval.system.untrusted import stored_object
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
EXACT = ("dataset_name", "model_type", "status", "experiment_name", "run_type", "study")  # filters by an exact value
MAX_TAG = 50  # characters
COLUMNS: list[str] = [column.name for column in experiments_table.columns]
TIMES = ("timestamp", "heartbeat", "archived_at", "deleted_at")
LATEST = "latest"
NEAR = 0.78  # similarity of a misspelt name; "moe" and "goe" are two names
CONFIGS_FOR_HINTS = 50  # the newest runs, whose config keys a message may suggest
_AGO = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def parse_condition(text: str, option: str = "--where") -> tuple[str, str, Any]:
    """Name, operator and value of a condition on a metric or on a key of the config. Raises ConfigError.

    `=` is `==`. Its value, and that of `!=`, may be any JSON or a plain word. The other operators compare numbers.

    >>> parse_condition("final_val_f1 >= 0.9"), parse_condition("model_params.positions=rope")
    (('final_val_f1', '>=', 0.9), ('model_params.positions', '==', 'rope'))
    """
    match = re.fullmatch(r"\s*([^<>=!]*[^<>=!\s])\s*(>=|<=|==|!=|>|<|=)\s*([^<>=!\s][^<>=!]*?)\s*", text)
    if match:
        name, sign, value = match[1], "==" if match[2] == "=" else match[2], _value_of(match[3])
        if sign in ("==", "!=") or isinstance(value, float):
            return name, sign, value
    raise ConfigError(
        f"{option}: expected a metric or a key of the config, one of = {' '.join(COMPARISONS)} and a number (after = "
        f"and != also a word), such as 'final_val_f1>=0.9' or 'model_params.embed_dim=64', got {text!r}"
    )


def _value_of(text: str) -> Any:
    """The value in a condition: a number, other JSON (true, null, a list, a text in quotes), or the text itself."""
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
        return float(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, float) else value  # NaN is no JSON


def parse_time(text: str, option: str = "--since") -> datetime:
    """A date, a time, or a time ago such as `7d`; in UTC if it names no other zone. Raises ConfigError."""
    try:
        if match := re.fullmatch(r"(\d{1,6})([hdw])", text, re.ASCII):
            return datetime.now(UTC) - int(match[1]) * _AGO[match[2]]
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"{option}: expected a date such as 2026-05-31 or 2026-05-31T18:30, or a time ago such as 12h, 7d or 2w, "
            f"got {text!r}"
        ) from error


def parse_tag(text: str, option: str = "--tag") -> str:
    """A tag: letters, digits and `-_.:/+`, so that it needs no quotes in a shell or in JSON. Raises ConfigError."""
    if not re.fullmatch(rf"[A-Za-z0-9_.:/+][A-Za-z0-9_.:/+-]{{0,{MAX_TAG - 1}}}", text):
        raise ConfigError(f"{option}: expected at most {MAX_TAG} letters, digits and _.:/+-, got {text!r}")
    return text


def by_conditions(store: Store, texts: Sequence[str], option: str = "--where") -> RunFilter:
    """The filter that these conditions describe. A name that is a metric of any run means that, else a config key.

    Raises ConfigError for a name that is neither.
    """
    where, config = [], []
    for name, sign, value in (parse_condition(text, option) for text in texts):
        if store.has_metric(name) or not store.has_config_key(name):
            check_metric(store, name, option, chooses=True, configs=True)
            if not isinstance(value, float):
                raise ConfigError(f"{option}: {name!r} is a metric, which is compared with a number, got {value!r}")
            where.append((name, sign, value))
        else:
            config.append((name, sign, value))
    return RunFilter(where=tuple(where), config=tuple(config))


def excluded(store: Store, text: str) -> RunFilter:
    """The runs that `--exclude` leaves out: one run, those with KEY=VALUE for a filter, or those of a condition.

    Raises ConfigError.
    """
    option = "--exclude"
    key, _, value = (part.strip() for part in text.partition("="))
    if not re.search("[<>=]", text):
        found = RunFilter(ids=(find_run(store, text)["experiment_id"],))
    elif key == "tag":
        found = RunFilter(tags=(parse_tag(value, f"{option} tag"),))
    elif key in EXACT or key == "name":
        field: dict[str, Any] = {key: value}
        found = RunFilter(**field)
        check_filter(store, found, f"{option} {key}")
    else:
        found = by_conditions(store, [text], option)
    return replace(found, view=ALL)


def find_runs(
    store: Store,
    wanted: RunFilter,
    *,
    sort: str | None = None,
    reverse: bool = False,
    limit: int | None = None,
    metrics: Sequence[str] = (),
    offset: int = 0,
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
    rows = store.find_runs(wanted, sort=key, descending=descending != reverse, limit=limit, offset=offset)
    values = store.metrics_of([row["experiment_id"] for row in rows], metrics)
    return [{**row, "metrics": values[row["experiment_id"]]} for row in rows]


def check_filter(store: Store, wanted: RunFilter, option: str = "--status") -> None:
    """Raise ConfigError for a status or a metric that does not exist, and for a choice by a test score."""
    if wanted.status is not None and wanted.status not in STATUSES:
        raise ConfigError(f"{option}: unknown {wanted.status!r}.{hint(wanted.status, STATUSES)}")
    for name, _, _ in wanted.where:
        check_metric(store, name, "--where", chooses=True)
    for option, known in (("dataset_name", store.dataset_names), ("model_type", store.model_types)):
        value = getattr(wanted, option)
        if value is not None and value not in (names := known()) and (near := did_you_mean(value, names, NEAR)):
            raise ConfigError(f"--{option}: no run has {value!r} in {store.location}.{near}")


def check_metric(
    store: Store, name: str, option: str, also: Sequence[str] = (), chooses: bool = False, configs: bool = False
) -> None:
    """Raise ConfigError for a metric that no run has and, if it `chooses` runs, for one of the test split.

    `also` are column names that the option accepts too, and with `configs` it accepts keys of the config. A store
    without any metrics accepts every name.
    """
    if chooses and name.startswith("test_"):
        check_selectable(name, option)
    if store.has_metric(name):
        return
    known = [summary.name for summary in store.metric_summaries()]
    if known:
        what = "column and no metric" if also else "metric"
        text = f"{option}: no {what} {name!r} in {store.location}"
        near = did_you_mean(name, {*known, *_config_keys(store)}) if configs else ""
        raise ConfigError(f"{text}{', and no such key in a config' * configs}.{near or hint(name, [*also, *known])}")


def _config_keys(store: Store) -> set[str]:
    """The dotted paths in the configs of the newest runs."""
    rows = store.find_runs(sort="timestamp", descending=True, limit=CONFIGS_FOR_HINTS, with_json=True)
    return {path for row in rows for path in flatten(stored_object(row["full_config_json"]))}


def default_metric_of(store: Store, dataset_name: str | None = None) -> str:
    """The metric that chooses among all runs, or among the runs on a dataset, if the user names none."""
    if store.has_metric(DEFAULT_METRIC, dataset_name, ACTIVE):  # first, because it is quick in a store of many runs
        return DEFAULT_METRIC
    return default_metric(store.metric_names(dataset_name))


def find_run(store: Store, name: str, view: str = KEPT) -> dict[str, Any]:
    """The run of a view with this id or unique beginning of one. Raises ConfigError.

    "latest" is the run that started last and is not hidden, or the last one of another view.
    """
    if name == LATEST:
        among = RunFilter(view=ACTIVE if view == KEPT else view)
        newest = store.find_runs(among, sort="timestamp", descending=True, limit=1)
        if not newest:
            raise ConfigError(f"no {'runs' if view == KEPT else f'{view} runs'} in {store.location}")
        name = newest[0]["experiment_id"]
    return store.experiment(name, view)
