"""Exporting runs, or the points of their time series, to a CSV or Parquet file.

The file gets its name only when it is complete. CSV cells are those of `csv_file`. Parquet columns have the types of
the database, and a metric is a column of floats unless some run has a list there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from research_eval.errors import ConfigError
from research_eval.store.csv_file import csv_lines, csv_text
from research_eval.store.find import COLUMNS, TIMES, check_filter
from research_eval.store.records import RunFilter
from research_eval.store.store import Store
from research_eval.store.tables import experiments_table
from research_eval.store.values import strict_json

RUNS_PER_BATCH = 200
HISTORY_COLUMNS = ["experiment_id", "name", "step", "epoch", "value"]

Point = tuple[str, str, int, float, float]  # the values of HISTORY_COLUMNS


def export(store: Store, path: Path, wanted: RunFilter, *, history: bool = False, force: bool = False) -> int:
    """Write the runs, or the points of their time series, to a .csv or .parquet file; return the number of rows.

    A run is a row: the columns of `experiments`, then every metric. Raises ConfigError, also for a file that exists
    already, unless `force`.
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
    """A temporary file beside `path`; it replaces `path` at the end, unless the block raises."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _export_runs(store: Store, path: Path, wanted: RunFilter, parquet: bool) -> int:
    columns = _run_columns(store, wanted)
    if parquet:
        _write_parquet(path, columns)
    else:
        cells = [[_time_as_text(value) for value in row] for row in zip(*columns.values(), strict=True)]
        path.write_text(csv_text(list(columns), cells), encoding="utf-8", newline="")
    return len(columns[COLUMNS[0]])


def _run_columns(store: Store, wanted: RunFilter) -> dict[str, list[Any]]:
    """Column -> a value per run; metrics that are no numbers are JSON text.

    The columns of the table come first, in its order, then all metrics by name. A run without a metric has None.
    """
    rows = store.find_runs(wanted, with_json=True)
    metrics = store.metrics_of([row["experiment_id"] for row in rows])
    for values in metrics.values():
        values.update({name: strict_json(value) for name, value in values.items() if not isinstance(value, float)})
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    for name in sorted({name for values in metrics.values() for name in values}):
        label = name
        while label in columns:  # a model may give a metric the name of a column
            label += " (metric)"
        columns[label] = [metrics[row["experiment_id"]].get(name) for row in rows]
    return columns


def _time_as_text(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    """Typed columns. Raises ConfigError for a value of another type, which an adopted SQLite file may hold."""
    import pyarrow as pa  # here and below, because a CSV file needs no pyarrow
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
        else:  # the metric is a list in some runs
            kind = pa.string()
            values = [strict_json(value) if isinstance(value, float) else value for value in values]
        try:
            arrays[name] = pa.array(values, kind)
        except pa.ArrowException as error:
            raise ConfigError(f"column {name}: not all of it is {kind}: {error}. Export to .csv.") from error
    pq.write_table(pa.table(arrays), path)


def _export_history(store: Store, path: Path, wanted: RunFilter, parquet: bool) -> int:
    """Write a batch of runs after the other, because the points of all runs may need more than the memory."""
    ids = [row["experiment_id"] for row in store.find_runs(wanted)]
    batches = (
        [
            (experiment_id, point.name, point.step, point.epoch, point.value)
            for experiment_id, record in store.records(ids[start : start + RUNS_PER_BATCH]).items()
            for point in record.history
        ]
        for start in range(0, len(ids), RUNS_PER_BATCH)
    )
    return (_history_to_parquet if parquet else _history_to_csv)(path, batches)


def _history_to_csv(path: Path, batches: Iterable[list[Point]]) -> int:
    num_points = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(csv_lines([HISTORY_COLUMNS]))
        for points in batches:
            file.write(csv_lines(points))
            num_points += len(points)
    return num_points


def _history_to_parquet(path: Path, batches: Iterable[list[Point]]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    num_points = 0
    kinds = [pa.string(), pa.string(), pa.int64(), pa.float64(), pa.float64()]
    schema = pa.schema(zip(HISTORY_COLUMNS, kinds, strict=True))
    with pq.ParquetWriter(path, schema) as writer:
        for points in batches:
            rows = [dict(zip(HISTORY_COLUMNS, point, strict=True)) for point in points]
            writer.write_table(pa.Table.from_pylist(rows, schema))
            num_points += len(points)
    return num_points
