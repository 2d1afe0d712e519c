"""What is done with stored runs: find them, compare them, export them, merge two stores, run one again."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from research_eval.db_utils import (
    COMPARISONS,
    STATUSES,
    RunFilter,
    RunRecord,
    Store,
    StoreUnavailable,
    canonical_json,
    csv_lines,
    csv_text,
    database_url,
    experiments_table,
    strict_json,
)
from research_eval.errors import ConfigError
from research_eval.metrics import check_selectable, direction, is_measured
from research_eval.spool import merge_pending

if TYPE_CHECKING:
    from research_eval.experiment import Result

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
MISSING = "(absent)"
RUNS_PER_BATCH = 200
HISTORY_COLUMNS = ["experiment_id", "name", "step", "epoch", "value"]
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


# --- Finding ----------------------------------------------------------------------------------------------------------


def parse_condition(text: str) -> tuple[str, str, float]:
    """Metric, operator and number of a condition such as "final_val_f1>=0.9". Raises ConfigError."""
    match = re.fullmatch(r"\s*([^<>=!]*[^<>=!\s])\s*(>=|<=|==|!=|>|<)\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*", text)
    try:
        if match:
            return match[1], match[2], float(match[3])
    except ValueError:
        pass
    raise ConfigError(
        f"--where: expected a metric, one of {' '.join(COMPARISONS)} and a number, such as 'final_val_f1>=0.9', "
        f"got {text!r}"
    )


def parse_since(text: str) -> datetime:
    """A date or a time, in UTC where it names no other zone. Raises ConfigError."""
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

    Metrics are sorted best first, columns upwards. Raises ConfigError for what the store does not know, and for a
    choice by a score of the test split.
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
    """Raise ConfigError for a status or a metric that does not exist, and for a choice by a test score."""
    if wanted.status is not None and wanted.status not in STATUSES:
        raise ConfigError(f"--status: unknown {wanted.status!r}. {_hint(wanted.status, STATUSES)}")
    for name, _, _ in wanted.where:
        check_metric(store, name, "--where", chooses=True)


def check_metric(store: Store, name: str, option: str, also: Sequence[str] = (), chooses: bool = False) -> None:
    """Raise ConfigError for a metric that no run has, and where it `chooses` runs for one of the test split.

    A store without any metrics accepts every name.
    """
    if chooses and name.startswith("test_"):  # of other names the store itself says whether they exist
        check_selectable(name, option)
    if store.has_metric(name):
        return
    known = [summary.name for summary in store.metric_summaries()]
    if known:
        what = "column and no metric" if also else "metric"
        raise ConfigError(f"{option}: no {what} {name!r} in {store.location}. {_hint(name, [*also, *known])}")


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."


def find_run(store: Store, name: str) -> dict[str, Any]:
    """The run of this id or unique beginning of one; "latest" is the one that started last. Raises ConfigError."""
    if name == LATEST:
        newest = store.find_runs(sort="timestamp", descending=True, limit=1)
        if not newest:
            raise ConfigError(f"no runs in {store.location}")
        name = newest[0]["experiment_id"]
    return store.experiment(name)


# --- Comparing --------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A setting by its dotted path; MISSING where one side lacks it."""

    name: str
    left: Any
    right: Any


class MetricDifference(NamedTuple):
    """The largest absolute difference of any entry; infinite where there is none to be had, as for other shapes."""

    name: str
    left: Any
    right: Any
    difference: float


def json_object(text: str | None) -> dict[str, Any]:
    """A stored JSON object; what is none, as in a foreign database, is kept as the text it is."""
    try:
        value = json.loads(text or "{}")
        flatten(value)  # whatever follows goes as deep
    except (ValueError, RecursionError):
        return {"text": text}
    return value if isinstance(value, dict) else {"text": text}


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value; lists are values.

    >>> flatten({"a": {"b": 1, "c": [2]}})
    {'a.b': 1, 'a.c': [2]}
    """
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    return {
        name: leaf for key in value for name, leaf in flatten(value[key], f"{path}.{key}" if path else str(key)).items()
    }


def changes(left: dict[str, Any], right: dict[str, Any]) -> list[Change]:
    """The settings that differ, by name."""
    flat_left, flat_right = flatten(left), flatten(right)
    pairs = [
        Change(name, flat_left.get(name, MISSING), flat_right.get(name, MISSING))
        for name in sorted(flat_left.keys() | flat_right.keys())
    ]
    return [pair for pair in pairs if canonical_json(pair.left) != canonical_json(pair.right)]


def environment_changes(left: dict[str, Any], right: dict[str, Any]) -> list[Change]:
    """What differs in the environments of two runs: first the data, which explains all the rest."""
    found = changes(*({name: value for name, value in side.items() if name != "study"} for side in (left, right)))
    return sorted(found, key=lambda change: not _is_data(change))


def data_changed(found: list[Change]) -> bool:
    """Whether the data were other data: their content hashes are known and differ."""
    return any(change.name.startswith("data.sha256") and MISSING not in (change.left, change.right) for change in found)


def _is_data(change: Change) -> bool:
    return change.name.split(".")[0] == "data"


def difference(left: Any, right: Any) -> float:
    """The largest absolute difference; 0 for equal values (NaN equals NaN), infinite for what cannot be subtracted.

    >>> difference([1.0, [2.0]], [1.5, [2.0]]), difference([1.0], [1.0, 2.0]), difference(math.nan, math.nan)
    (0.5, inf, 0.0)
    """
    if left == right:
        return 0.0
    if isinstance(left, int | float) and isinstance(right, int | float):
        if math.isnan(left) and math.isnan(right):
            return 0.0
        gap = abs(left - right)
        return math.inf if math.isnan(gap) else float(gap)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        return max(map(difference, left, right), default=0.0)
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return max((difference(left[key], right[key]) for key in left), default=0.0)
    return math.inf


def metric_differences(left: dict[str, Any], right: dict[str, Any]) -> list[MetricDifference]:
    """The metrics that differ, in the order of `left`; one that only one side has is MISSING on the other."""
    pairs = [
        MetricDifference(name, one, other, difference(one, other))
        for name in dict.fromkeys([*left, *right])
        for one, other in [(left.get(name, MISSING), right.get(name, MISSING))]
    ]
    return [pair for pair in pairs if pair.difference > 0]


# --- Exporting --------------------------------------------------------------------------------------------------------


def export(store: Store, path: Path, wanted: RunFilter, *, history: bool = False, force: bool = False) -> int:
    """Write the runs, or the points of their time series, to a .csv or .parquet file; return the number of rows.

    A run is a row: the columns of `experiments`, then every metric. Raises ConfigError, also for a file that is there.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"{path}: expected a name that ends in .csv or .parquet")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{path}: not a file in an existing folder. Create the folder or give another name.")
    if path.exists() and not force:
        raise ConfigError(f"{path}: exists. Give another name, or --force to replace it.")
    check_filter(store, wanted)
    try:
        with _new_file(path) as temporary:
            write = _export_history if history else _export_runs
            return write(store, temporary, wanted, path.suffix == ".parquet")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that becomes it at the end, if all goes well."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _export_runs(store: Store, path: Path, wanted: RunFilter, parquet: bool) -> int:
    rows = store.find_runs(wanted, with_json=True)
    metrics = store.metrics_of([row["experiment_id"] for row in rows])
    for values in metrics.values():
        values.update({name: strict_json(value) for name, value in values.items() if not isinstance(value, float)})
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    for name in sorted({name for values in metrics.values() for name in values}):
        label = name
        while label in columns:  # a model may call a metric as a column is called
            label += " (metric)"
        columns[label] = [metrics[row["experiment_id"]].get(name) for row in rows]
    if parquet:
        _write_parquet(path, columns)
    else:
        cells = [[_time_as_text(value) for value in row] for row in zip(*columns.values(), strict=True)]
        path.write_text(csv_text(list(columns), cells), encoding="utf-8", newline="")
    return len(rows)


def _time_as_text(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {int: pa.int64(), str: pa.string()}
    arrays = {}
    for name, values in columns.items():
        if name in TIMES:
            kind = pa.timestamp("us", tz="UTC")
        elif name in COLUMNS:
            kind = kinds[experiments_table.columns[name].type.python_type]
        elif all(value is None or isinstance(value, float) for value in values):
            kind = pa.float64()
        else:  # a list in some runs
            kind = pa.string()
            values = [strict_json(value) if isinstance(value, float) else value for value in values]
        try:
            arrays[name] = pa.array(values, kind)
        except pa.ArrowException as error:
            raise ConfigError(f"column {name}: not all of it is {kind}: {error}. Export to .csv.") from error
    pq.write_table(pa.table(arrays), path)


def _export_history(store: Store, path: Path, wanted: RunFilter, parquet: bool) -> int:
    ids = [row["experiment_id"] for row in store.find_runs(wanted)]
    batches = (
        [
            (experiment_id, point.name, point.step, point.epoch, point.value)
            for experiment_id, record in store.records(ids[start : start + RUNS_PER_BATCH]).items()
            for point in record.history
        ]
        for start in range(0, len(ids), RUNS_PER_BATCH)
    )
    num_points = 0
    if parquet:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = [pa.string(), pa.string(), pa.int64(), pa.float64(), pa.float64()]
        schema = pa.schema(zip(HISTORY_COLUMNS, kinds, strict=True))
        with pq.ParquetWriter(path, schema) as writer:
            for points in batches:
                rows = [dict(zip(HISTORY_COLUMNS, point, strict=True)) for point in points]
                writer.write_table(pa.Table.from_pylist(rows, schema))
                num_points += len(points)
        return num_points
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(csv_lines([HISTORY_COLUMNS]))
        for points in batches:
            file.write(csv_lines(points))
            num_points += len(points)
    return num_points


# --- Merging ----------------------------------------------------------------------------------------------------------


@dataclass
class MergeReport:
    """What became of the runs of the other store. `conflicts` are the ids that were left alone on both sides."""

    copied: int = 0
    updated: int = 0
    skipped: int = 0
    conflicts: list[str] = field(default_factory=list)


def merge(other: str, db: str | None = None) -> MergeReport:
    """Copy the runs of the store `other`, which is only read, into `db`.

    Runs are entered some hundred at a time, so that a merge that was cut off is simply repeated. Of a run that differs
    on both sides the later state wins (`is_later`); where there is none, ours stays and is reported as a conflict.
    """
    if _is_same_place(database_url(other), database_url(db)):
        raise ConfigError(
            f"merge: both names are {make_url(database_url(other)).render_as_string()}. Give another store."
        )
    report = MergeReport()
    with Store(other, read_only=True) as theirs, Store(db) as ours:
        merge_pending(ours)
        try:
            ids = [row["experiment_id"] for row in theirs.find_runs()]
            for start in range(0, len(ids), RUNS_PER_BATCH):
                records = theirs.records(ids[start : start + RUNS_PER_BATCH])
                _count(report, records, ours.merge_records(records, is_later))
        except (SQLAlchemyError, StoreUnavailable, ValueError, TypeError) as error:  # what the other cannot hold, say
            cause = getattr(error, "orig", None) or getattr(error, "strerror", None) or error
            raise ConfigError(
                f"merge of {theirs.location} into {ours.location} stopped after {report.copied + report.updated} runs, "
                f"which stay: {str(cause).strip()}"
            ) from error
    return report


def _is_same_place(one: str, other: str) -> bool:
    files = [make_url(url).database or "" for url in (one, other) if url.startswith("sqlite")]
    if len(files) == 2 and all(map(os.path.exists, files)):
        return Path(files[0]).samefile(files[1])
    return one == other


def is_later(ours: RunRecord, theirs: RunRecord) -> bool:
    """Whether theirs is the later state of the same run: finished where ours is not, or else alive for longer."""
    states = [(record.experiment["status"] == "finished", record.experiment["heartbeat"]) for record in (ours, theirs)]
    (our_end, our_life), (their_end, their_life) = states
    if our_end or their_end:
        return their_end and not our_end
    return (their_life or _LONG_AGO) > (our_life or _LONG_AGO)


def _count(report: MergeReport, theirs: dict[str, RunRecord], ours: dict[str, RunRecord]) -> None:
    for experiment_id, record in theirs.items():
        if experiment_id not in ours:
            report.copied += 1
        elif difference(ours[experiment_id], record) == 0 or is_later(record, ours[experiment_id]):
            report.skipped += 1
        elif is_later(ours[experiment_id], record):
            report.updated += 1
        else:
            report.conflicts.append(experiment_id)


# --- Running again ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """A run and its repetition. The comparisons are empty where the repetition did not finish."""

    original: str
    result: Result
    differences: list[MetricDifference]
    environment: list[Change]
    num_compared: int = 0
    num_measured: int = 0

    @property
    def largest(self) -> MetricDifference | None:
        """Of the metrics that both have, the one that differs most."""
        both = [pair for pair in self.differences if pair.left is not MISSING and pair.right is not MISSING]
        return max(both, key=lambda pair: pair.difference, default=None)

    def exceeds(self, tolerance: float) -> bool:
        """Whether a metric differs by more, or is gone. One that is new since then has nothing to differ from."""
        return any(pair.difference > tolerance for pair in self.differences if pair.left is not MISSING)


def replay(run_id: str, *, db: str | None = None, device: str | None = None, quiet: bool = False) -> Replay:
    """Run a finished run again, from its row alone, as its child. Raises ConfigError for one without metrics."""
    with Store(db, read_only=True) as store:
        row = find_run(store, run_id)
        metrics = store.metrics(row["experiment_id"])
    original = row["experiment_id"]
    if row["status"] != "finished" or not metrics:
        state = row["status"] if row["status"] != "finished" else "finished, but without metrics"
        raise ConfigError(f"run {original} is {state}: there is nothing to compare a replay with")

    from research_eval.experiment import run
    from research_eval.schema import config_from_dict

    config = config_from_dict(json_object(row["full_config_json"]), source=f"run {original}")
    if device is not None:
        settings = config.to_dict()
        settings["training_params"]["device"] = device
        config = config_from_dict(settings, source=f"run {original} with --device {device}")
    result = run(config, db=db, quiet=quiet, parent_id=original)
    with Store(db, read_only=True) as store:
        again = store.experiment(result.experiment_id)
        repeated = store.metrics(result.experiment_id)
    environment = environment_changes(json_object(row["env_details_json"]), json_object(again["env_details_json"]))
    if result.status != "finished":
        return Replay(original, result, [], environment)
    before, after = (
        {name: value for name, value in side.items() if not is_measured(name)} for side in (metrics, repeated)
    )
    return Replay(
        original,
        result,
        metric_differences(before, after),
        environment,
        num_compared=len(before.keys() & after.keys()),
        num_measured=len(metrics) - len(before),
    )
