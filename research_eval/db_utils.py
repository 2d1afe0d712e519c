"""The results store: one row per run, its metrics, its time series; and the CSV beside it.

SQLite (a path) is the default, PostgreSQL (a URL) the store of a cluster. What the columns hold on both:

- Times are UTC. They are naive in SQL and come back as aware `datetime` objects.
- `metric_value` is REAL on SQLite and JSONB on PostgreSQL. A number is a number (read as `float`); everything else is
  JSON: text on SQLite, a JSON value on PostgreSQL. NaN and None ("not measured") are SQL NULL, so that AVG, MAX and
  ORDER BY keep working, and are read as NaN. An infinity is SQLite's infinity, or the JSON string "Infinity" on
  PostgreSQL. Inside lists, which have to be valid JSON, non-finite numbers are the strings "NaN", "Infinity" and
  "-Infinity"; reading turns them into numbers again.
- `history.value` is NULL for NaN. `history` is a view: its points are stored under the numbers of a run and of a name.
- `full_config_json` is canonical (`canonical_json`), so equal configs are equal text.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import errno
import io
import json
import logging
import math
import operator
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import filelock
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Dialect, make_url

from research_eval.errors import ConfigError
from research_eval.files import is_at_work, sync_folder
from research_eval.system.untrusted import check_regular_file, user_path

log = logging.getLogger(__name__)

DB_FILE = "experiment_results.db"
DB_VARIABLE = "GOE_DB"
SCHEMA_VERSION = "0003"  # the newest file in migrations/versions
VERSION_TABLE = "goe_schema_version"  # own name: Optuna keeps its `alembic_version` in the same database
STATUSES = ("running", "finished", "failed", "interrupted", "pruned", "diverged")

SILENCE = timedelta(minutes=15)  # a run writes after every few dozen steps
GONE = "its process ended without saying why"

_LOCK_SECONDS = 60.0
_BUSY_SECONDS = 30.0
_IDS_PER_QUERY = 500
_POINTS_PER_QUERY = 1000
_ADVISORY_LOCK_KEY = 0x676F65  # "goe"
_OPTUNA_TABLES = r"alembic_version|version_info|studies|study_\w+|trials|trial_\w+"
_SQLITE_MAGIC = b"SQLite format 3\0"
_SPELLINGS = "Give a path, sqlite:///path or postgresql://user@host/name"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class StoreUnavailable(OSError):
    """The database cannot write now: its server, the network, a lock or a disk. It may later."""


class HistoryRow(NamedTuple):
    """One point of a time series; `step` counts optimiser steps, `epoch` may be fractional."""

    step: int
    epoch: float
    name: str
    value: float


class RunRow(NamedTuple):
    """A run as the analysis reads it, thousands at once; of its metrics only those asked for that are numbers."""

    experiment_id: str
    experiment_name: str
    model_type: str
    status: str
    seed: int | None  # None in a database that an earlier program made
    config_json: str
    metrics: dict[str, float]


class MetricSummary(NamedTuple):
    """A metric over many runs; `low` and `high` are None where no value is a number, as with lists."""

    name: str
    num_runs: int
    low: float | None
    high: float | None


class RunRecord(NamedTuple):
    """All that the store holds of a run: its row, its metrics in their order, its history by step and name."""

    experiment: dict[str, Any]
    metrics: dict[str, Any]
    history: list[HistoryRow]


@dataclass(frozen=True)
class RunFilter:
    """Which runs; None asks for nothing. `where` compares metrics that are numbers: (name, operator, number)."""

    dataset_name: str | None = None
    model_type: str | None = None
    status: str | None = None
    experiment_name: str | None = None
    run_type: str | None = None
    study: str | None = None
    since: datetime | None = None
    where: tuple[tuple[str, str, float], ...] = ()


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


# --- Values ---------------------------------------------------------------------------------------------------------


@runtime_checkable
class _Array(Protocol):
    """NumPy and torch scalars and arrays."""

    def tolist(self) -> Any: ...


_PLAIN_TYPES = frozenset({float, str, int, bool, list, tuple, dict, type(None)})


def _plain(value: Any) -> Any:
    if type(value) in _PLAIN_TYPES:  # much faster than asking the protocol
        return value
    return value.tolist() if isinstance(value, _Array) else value


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values: sorted keys, ASCII."""
    return json.dumps(value, sort_keys=True, default=_plain)


def _to_strict_json(value: Any) -> Any:
    """Lists and dicts of plain values, non-finite numbers as strings. TypeError for what JSON cannot hold."""
    value = _plain(value)
    if isinstance(value, dict):
        return {str(key): _to_strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_strict_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} is not a number, text, list or dict")


def _from_strict_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_strict_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_strict_json(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def strict_json(value: Any) -> str:
    """JSON text that every parser accepts: non-finite numbers are the strings "NaN", "Infinity" and "-Infinity"."""
    return json.dumps(_to_strict_json(value))


def _normal_metric(name: str, value: Any) -> Any:
    """A float, or what JSON can hold."""
    value = _plain(value)
    if value is None:
        return math.nan
    if isinstance(value, (int, float)):
        return float(value)
    try:
        return _to_strict_json(value)
    except TypeError as error:
        raise ConfigError(f"metric {name!r}: {error}. Return numbers or lists of numbers.") from error


def normal_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics as they are stored. Raises ConfigError for what JSON cannot hold."""
    return {name: _normal_metric(name, value) for name, value in metrics.items()}


class _RealOrText(sa.REAL[Any]):
    """A REAL column as SQLite has it: what is not a number is kept as it is."""

    def bind_processor(self, _dialect: Dialect) -> None:
        return None

    def result_processor(self, _dialect: Dialect, _coltype: object) -> None:
        return None


class _MetricValue(sa.types.TypeDecorator[Any]):
    """See the module docstring. Binds what `_normal_metric` returns."""

    impl = sa.REAL
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.JSONB(none_as_null=True))
        return dialect.type_descriptor(_RealOrText())

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        in_json_column = dialect.name == "postgresql"
        if isinstance(value, float):
            if math.isnan(value):
                return None
            return json.dumps(value) if in_json_column and math.isinf(value) else value
        return value if in_json_column else json.dumps(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        if value is None:
            return math.nan
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str) and dialect.name != "postgresql":
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return value  # text in an adopted database, written by another program
        if isinstance(value, bytes):
            return _as_text(value)
        return _from_strict_json(value)


class _NanAsNull(sa.types.TypeDecorator[float]):
    """A double whose NaN is NULL on every database, as SQLite has it anyway."""

    impl = sa.Double
    cache_ok = True

    def process_bind_param(self, value: float | None, _dialect: Dialect) -> float | None:
        return None if value is None or math.isnan(value) else value

    def process_result_value(self, value: float | None, _dialect: Dialect) -> float:
        return math.nan if value is None else value


class _Text(sa.Text):
    """Text; SQLite gives whatever another program put there, which is shown as text."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return _as_text if dialect.name == "sqlite" else super().result_processor(dialect, coltype)


def _as_text(value: Any) -> str | None:
    if type(value) is str or value is None:
        return value
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


class _SqliteTime(sqlite.DATETIME):
    """A time; what is none, as another program may have written, is not known."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        parse: Any = super().result_processor(dialect, coltype)

        def process(value: Any) -> datetime | None:
            try:
                parsed: datetime | None = parse(value)
            except (ValueError, TypeError, OverflowError):
                return None
            return parsed

        return process


class _UtcDateTime(sa.types.TypeDecorator[datetime]):
    """Naive UTC in SQL, aware in Python."""

    impl = sa.DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        own = _SqliteTime() if dialect.name == "sqlite" else sa.DateTime()  # type: ignore[no-untyped-call]
        return dialect.type_descriptor(own)

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# --- Tables: what the migrations add up to ---------------------------------------------------------------------------

metadata = sa.MetaData()

experiments_table = sa.Table(
    "experiments",
    metadata,
    sa.Column("experiment_id", _Text(), primary_key=True),
    sa.Column("run_type", _Text()),
    sa.Column("timestamp", _UtcDateTime),
    sa.Column("experiment_name", _Text()),
    sa.Column("model_type", _Text()),
    sa.Column("dataset_name", _Text()),
    sa.Column("dataset_type", _Text()),
    sa.Column("epochs", sa.Integer),
    sa.Column("batch_size", sa.Integer),
    sa.Column("full_config_json", _Text()),
    sa.Column("env_details_json", _Text()),
    sa.Column("status", _Text()),
    sa.Column("seed", sa.BigInteger),
    sa.Column("error", _Text()),
    sa.Column("heartbeat", _UtcDateTime),
    sa.Column("parent_id", _Text()),
    sa.Index("ix_experiments_dataset_name_model_type", "dataset_name", "model_type"),
    sa.Index(
        "ix_experiments_listing",
        *("timestamp", "experiment_id", "status", "model_type", "dataset_name", "experiment_name", "run_type", "seed"),
    ),
)

metrics_table = sa.Table(
    "metrics",
    metadata,
    sa.Column("metric_id", sa.Integer, primary_key=True),
    sa.Column("experiment_id", _Text(), sa.ForeignKey("experiments.experiment_id"), nullable=False),
    sa.Column("metric_name", _Text(), nullable=False),
    sa.Column("metric_value", _MetricValue),
    sa.Index("ix_metrics_experiment_id_metric_name", "experiment_id", "metric_name"),
    sqlite_autoincrement=True,
)

history_runs = sa.Table(
    "history_runs",
    metadata,
    sa.Column("run_id", sa.Integer, primary_key=True),
    sa.Column("experiment_id", _Text(), sa.ForeignKey("experiments.experiment_id"), nullable=False, unique=True),
)

history_names = sa.Table(
    "history_names",
    metadata,
    sa.Column("name_id", sa.Integer, primary_key=True),
    sa.Column("name", _Text(), nullable=False, unique=True),
)

history_points = sa.Table(
    "history_points",
    metadata,
    sa.Column("run_id", sa.Integer, sa.ForeignKey("history_runs.run_id"), primary_key=True, autoincrement=False),
    sa.Column("name_id", sa.Integer, sa.ForeignKey("history_names.name_id"), primary_key=True, autoincrement=False),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Double, nullable=False),
    sa.Column("value", _NanAsNull),
    sqlite_with_rowid=False,
)

history_view = sa.table(
    "history",
    sa.column("experiment_id", _Text()),
    sa.column("name", _Text()),
    sa.column("step", sa.BigInteger),
    sa.column("epoch", sa.Double),
    sa.column("value", _NanAsNull),
)

NUM_OLD_COLUMNS = 11  # that `experiments` had from the beginning
JSON_COLUMNS = ("full_config_json", "env_details_json")  # long; left out of lists of runs

# Without parameters, as `v0003_scale` has them.
_SQLITE_NUMBER = "CASE WHEN typeof(metric_value) IN ('real', 'integer') THEN metric_value END"
_POSTGRESQL_NUMBER = (
    "CASE WHEN jsonb_typeof(metric_value) = 'number' OR metric_value #>> '{}' IN ('Infinity', '-Infinity') "
    "THEN CAST(metric_value #>> '{}' AS double precision) END"
)

_version_table = sa.table(VERSION_TABLE, sa.column("version_num", sa.String))


# --- Where the store is -----------------------------------------------------------------------------------------------


def database_url(db: str | None = None) -> str:
    """The URL (password included) of `db`, else of $GOE_DB, else of DB_FILE in the working directory.

    Raises ConfigError for a bad URL, a missing folder, a directory or a file that is not SQLite.
    """
    where = db if db is not None else os.environ.get(DB_VARIABLE) or DB_FILE
    if "://" not in where and not re.match(r"(sqlite|postgres(ql)?)(\+\w+)?:", where):
        return URL.create("sqlite", database=_checked_file(where)).render_as_string(hide_password=False)
    try:
        url = make_url(where)
    except (sa.exc.ArgumentError, ValueError) as error:  # the message leaves the URL out: it may hold a password
        raise ConfigError(f"database: not a URL. {_SPELLINGS}.") from error
    if url.drivername in ("postgresql", "postgresql+psycopg", "postgres"):
        return url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ConfigError(f"database: {url.drivername!r} is not supported. {_SPELLINGS}.")
    if url.query:
        raise ConfigError(f"database: {', '.join(url.query)}: a SQLite file takes no options. {_SPELLINGS}.")
    if url.host or not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise ConfigError(
            f"database: {where!r} names no file. {_SPELLINGS} (three slashes, four before a root folder)."
        )
    return url.set(drivername="sqlite", database=_checked_file(url.database)).render_as_string(hide_password=False)


def _checked_file(name: str) -> str:
    """The absolute path of a SQLite file, or of one that can be made."""
    if not name.strip():
        raise ConfigError(f"database: the name is empty. {_SPELLINGS}.")
    if name.startswith("file:"):
        raise ConfigError(f"database: {name!r} is no path. {_SPELLINGS}.")
    path = user_path(name).absolute()
    if path.is_dir():
        raise ConfigError(f"database: {path} is a directory. Give a file in it, such as {path / DB_FILE}.")
    if not path.parent.is_dir():
        raise ConfigError(f"database: the folder {path.parent} does not exist. Create it first.")
    if path.is_symlink() or path.exists():
        try:
            check_regular_file(path)
        except ConfigError as error:
            raise ConfigError(f"database: {error}") from error
        try:
            with path.open("rb") as file:
                start = file.read(len(_SQLITE_MAGIC))
        except OSError as error:
            raise ConfigError(f"database: {path} cannot be read: {error.strerror}.") from error
        if start not in (b"", _SQLITE_MAGIC):
            raise ConfigError(f"database: {path} is not a SQLite file; it was left alone. Give another name.")
    return str(path)


def _sqlite_engine(path: Path, read_only: bool) -> sa.Engine:
    query = {"uri": "true", "mode": "ro"} if read_only else {}
    if read_only and not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
        query["immutable"] = "1"  # a WAL file on a read-only medium: SQLite could not make its shared-memory file
    database = path.as_uri() if read_only else str(path)
    engine = sa.create_engine(
        URL.create("sqlite", database=database, query=query), connect_args={"timeout": _BUSY_SECONDS}
    )

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver's own BEGIN would come too late, and never before DDL
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA trusted_schema=OFF")  # a foreign file may bring views and triggers
        connection.execute("PRAGMA cell_size_check=ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN " + connection.get_execution_options().get("sqlite_begin", "DEFERRED"))

    return engine


def _postgresql_engine(url: URL, read_only: bool) -> sa.Engine:
    # Minutes may pass between two writes of a run: ask whether the connection still lives. A server that is gone
    # without a word is given up after a time; libpq would wait for hours.
    patience = {"connect_timeout": 10, "keepalives_idle": 30, "tcp_user_timeout": 60_000}
    return sa.create_engine(
        url,
        pool_pre_ping=True,
        connect_args={name: value for name, value in patience.items() if name not in make_url(url).query},
        execution_options={"postgresql_readonly": read_only},
    )


def foreign_table(connection: Connection) -> str | None:
    """A table that is neither ours nor Optuna's, in a database that has none of ours."""
    tables = set(sa.inspect(connection).get_table_names())
    if tables & {VERSION_TABLE, "experiments", "metrics"}:
        return None
    return min((name for name in tables if not re.fullmatch(_OPTUNA_TABLES, name)), default=None)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file beside `path`."""
    lock = filelock.FileLock(path.with_name(f"{path.name}.lock"), timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ConfigError(f"{path}: another process has held {lock.lock_file} for {_LOCK_SECONDS:.0f} s.") from error
    try:
        yield
    finally:
        lock.release()


def back_up(path: Path) -> Path:
    """A copy of a SQLite database beside it, under a dated name that was free. Raises OSError."""
    with _locked(path):
        return copy_database(path)


def copy_database(path: Path) -> Path:
    """`back_up` for who holds the lock. Others may go on reading and writing: the copy is of one moment."""
    if shutil.disk_usage(path.parent).free < 1.1 * path.stat().st_size:
        raise OSError(errno.ENOSPC, "no room for a backup beside it", str(path))
    stem = f"{path.stem}.backup-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    endings = ("", *(f"-{number}" for number in range(2, 1000)))
    names = (path.with_name(f"{stem}{ending}{path.suffix}") for ending in endings)
    backup = next(name for name in names if not name.exists())
    temporary = path.with_name(f"{backup.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # left by a crash
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as source,
            contextlib.closing(sqlite3.connect(temporary)) as target,
        ):
            source.backup(target)
        shutil.copymode(path, temporary)
        temporary.replace(backup)
        sync_folder(path.parent)
    except sqlite3.Error as error:
        raise OSError(errno.EIO, f"cannot be backed up: {error}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return backup


# --- The store --------------------------------------------------------------------------------------------------------


class Store:
    """The results database. Every method is one short transaction, so any number of processes may write.

    Opening creates or migrates the database; with `read_only` it must be there and is never written (SQLite may still
    put its empty -wal and -shm files beside it). With `any_version` besides, an older one is opened as it is: only its
    `schema_version` may be asked for.
    """

    def __init__(self, db: str | None = None, read_only: bool = False, any_version: bool = False) -> None:
        url = make_url(database_url(db))
        self.read_only = read_only
        self._any_version = any_version
        self._file = Path(url.database) if url.drivername == "sqlite" and url.database else None
        self.location = str(self._file or url.render_as_string(hide_password=True))
        if self._file is None:
            self._engine = _postgresql_engine(url, read_only)
        elif read_only and not self._file.exists():
            raise self._no_results()
        else:
            self._engine = _sqlite_engine(self._file, read_only)
        self._writer = self._engine.execution_options(sqlite_begin="IMMEDIATE")
        try:
            self._open()
        except sa.exc.DatabaseError as error:
            self.close()
            raise ConfigError(f"database {self.location}: {str(error.orig).strip()}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Opening and migrating

    @property
    def schema_version(self) -> str | None:
        """The version of the database as it is; None without our tables."""
        with self._engine.connect() as connection:
            return self._version(connection)

    def _version(self, connection: Connection) -> str | None:
        if not sa.inspect(connection).has_table(VERSION_TABLE):
            return None
        version: Any = connection.scalar(sa.select(_version_table.c.version_num))
        if version is not None and not (isinstance(version, str) and re.fullmatch(r"\d{4}", version)):
            raise ConfigError(f"database {self.location}: schema version {str(version)[:40]!r} is none of ours.")
        if version is not None and version > SCHEMA_VERSION:
            raise ConfigError(
                f"database {self.location}: schema version {version} is newer than {SCHEMA_VERSION}, the newest that "
                "this program knows. Update the program or give another database."
            )
        return version

    def _no_results(self) -> ConfigError:
        return ConfigError(f"no results at {self.location}: run `python research_eval/init_db.py` first")

    def _open(self) -> None:
        with self._engine.connect() as connection:
            version = self._version(connection)
            if self._file is not None:
                self._check_tables(connection, version)
            needs_wal = self._file is not None and connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal"
        if not self.read_only:
            if version != SCHEMA_VERSION or needs_wal:
                self._migrate()
        elif version is None and not (self._any_version and self._has_tables()):
            raise self._no_results()
        elif version != SCHEMA_VERSION and not self._any_version:
            raise ConfigError(
                f"database {self.location}: schema version {version} is older than {SCHEMA_VERSION}: "
                f"run `python research_eval/init_db.py --db {self.location}` first"
            )

    def _has_tables(self) -> bool:
        return sa.inspect(self._engine).has_table(experiments_table.name)

    def _check_tables(self, connection: Connection, version: str | None) -> None:
        """Raise ConfigError for a file of another program, and for one that has lost a part."""
        inspector = sa.inspect(connection)
        if version is None:
            foreign = foreign_table(connection)
            if foreign is not None:
                raise ConfigError(
                    f"database {self.location}: belongs to another program (it has a table {foreign!r}); it was left "
                    "alone. Give another name."
                )
            for table, num_columns in ((experiments_table, NUM_OLD_COLUMNS), (metrics_table, len(metrics_table.c))):
                if inspector.has_table(table.name):
                    there = {column["name"] for column in inspector.get_columns(table.name)}
                    without = [name for name in table.columns.keys()[:num_columns] if name not in there]
                    if without:
                        raise ConfigError(
                            f"database: its table {table.name!r} belongs to another program (it has no "
                            f"{', '.join(without)}). Give another database."
                        )
        elif version != SCHEMA_VERSION:
            for table in (experiments_table, metrics_table):
                if not inspector.has_table(table.name):
                    raise ConfigError(
                        f"database {self.location}: damaged: it has no table {table.name!r}. Restore a backup or give "
                        "another database."
                    )
        else:
            for table in metadata.sorted_tables:
                known = inspector.get_columns(table.name) if inspector.has_table(table.name) else []
                missing = {column.name for column in table.columns} - {column["name"] for column in known}
                if missing:
                    lost = f"its table {table.name!r} has no {', '.join(sorted(missing))}"
                    raise ConfigError(
                        f"database {self.location}: damaged: {lost}. Restore a backup or give another database."
                    )

    def _migrate(self) -> None:
        """Bring the tables up to date in one transaction, one process at a time."""
        with self._writer.connect() as connection:
            if self._file is None:
                with connection.begin():
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK_KEY)))
                    version = self._version(connection)
                    if version is not None and version != SCHEMA_VERSION:
                        log.info("%s: migrating from schema version %s; backups are pg_dump's", self.location, version)
                    self._upgrade(connection)
                return
            with _locked(self._file):
                driver = connection.connection.driver_connection  # these two have no effect inside a transaction
                assert driver is not None
                driver.execute("PRAGMA journal_mode=WAL")
                self._back_up_before_migration(self._file)
                driver.execute("PRAGMA foreign_keys=OFF")  # Alembic alters a table by copying and dropping it
                with connection.begin():
                    self._upgrade(connection)
                driver.execute("PRAGMA foreign_keys=ON")

    def _back_up_before_migration(self, file: Path) -> None:
        """Where there are tables of ours that will change. The lock is held."""
        with self._engine.connect() as connection:
            version = self._version(connection)
            if version == SCHEMA_VERSION or not sa.inspect(connection).has_table("experiments"):
                return
        backup = copy_database(file)
        log.info("%s: migrating from schema version %s; the database as it was: %s", file, version, backup)

    def _upgrade(self, connection: Connection) -> None:
        if self._version(connection) == SCHEMA_VERSION:
            return  # another process was faster
        import alembic.command
        import alembic.config

        config = alembic.config.Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, SCHEMA_VERSION)

    # Writing

    @contextmanager
    def _write(self, durable: bool = False) -> Iterator[Connection]:
        """A transaction. A durable one is on the disk at its end, not with the next checkpoint of the WAL.

        Raises StoreUnavailable where it may succeed later.
        """
        assert not self.read_only, "this store was opened read-only"
        try:
            with self._writer.connect() as connection:
                if self._file is not None:
                    driver = connection.connection.driver_connection
                    assert driver is not None
                    driver.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                with connection.begin():
                    yield connection
        except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
            raise StoreUnavailable(errno.EIO, str(error.orig).strip(), f"database {self.location}") from error

    def start_experiment(
        self,
        *,
        experiment_id: str,
        run_type: str,
        experiment_name: str,
        model_type: str,
        dataset_name: str,
        dataset_type: str,
        epochs: int,
        batch_size: int,
        seed: int,
        config: dict[str, Any],
        environment: dict[str, Any],
        parent_id: str | None = None,
    ) -> None:
        """File a new run as running, from now."""
        now = datetime.now(UTC)
        row = {
            "experiment_id": experiment_id,
            "run_type": run_type,
            "timestamp": now,
            "experiment_name": experiment_name,
            "model_type": model_type,
            "dataset_name": dataset_name,
            "dataset_type": dataset_type,
            "epochs": epochs,
            "batch_size": batch_size,
            "full_config_json": canonical_json(config),
            "env_details_json": canonical_json(environment),
            "status": "running",
            "seed": seed,
            "heartbeat": now,
            "parent_id": parent_id,
        }
        with self._write() as connection:
            connection.execute(experiments_table.insert(), row)

    def _update(self, connection: Connection, experiment_id: str, **columns: Any) -> None:
        """Set columns and the heartbeat; ConfigError where there is no such run."""
        updated = connection.execute(
            experiments_table.update()
            .where(experiments_table.c.experiment_id == experiment_id)
            .values(heartbeat=datetime.now(UTC), **columns)
        )
        if updated.rowcount != 1:
            raise ConfigError(f"no experiment {experiment_id!r} in {self.location}")

    def update_environment(self, experiment_id: str, environment: dict[str, Any]) -> None:
        """Replace the environment record."""
        with self._write() as connection:
            self._update(connection, experiment_id, env_details_json=canonical_json(environment))

    def set_status(self, experiment_id: str, status: str, error: str | None = None) -> None:
        """Set status and error together (no error clears the old one)."""
        if status not in STATUSES:
            raise ConfigError(f"status: unknown {status!r}. Known: {', '.join(STATUSES)}.")
        with self._write(durable=True) as connection:
            self._update(connection, experiment_id, status=status, error=error)

    def add_history(self, experiment_id: str, rows: Sequence[HistoryRow]) -> None:
        """Add points and refresh the heartbeat; a point written twice keeps its last value."""
        with self._write() as connection:
            self._update(connection, experiment_id)  # which also makes a second writer of this run wait
            self._put_points(connection, self._numbered(connection, {experiment_id: rows}))

    def _put_points(self, connection: Connection, points: list[dict[str, Any]]) -> None:
        """Insert or replace rows of `history_points`."""
        columns = history_points.c
        points = list({(point["run_id"], point["name_id"], point["step"]): point for point in points}.values())
        if self._file is not None and points:
            insert = sqlite.insert(history_points)
            new = {name: insert.excluded[name] for name in ("epoch", "value")}
            upsert = insert.on_conflict_do_update(index_elements=list(history_points.primary_key), set_=new)
            connection.execute(upsert, points)
            return
        key = (columns.run_id, columns.step, columns.name_id)
        for start in range(0, len(points), _POINTS_PER_QUERY):  # no unique index on PostgreSQL, see `v0003_scale`
            some = points[start : start + _POINTS_PER_QUERY]
            keys = {tuple(point[column.name] for column in key) for point in some}
            runs, steps, _ = map(set, zip(*keys, strict=True))
            near = sa.select(*key).where(columns.run_id.in_(runs), columns.step.in_(steps))
            if replaced := keys & set(map(tuple, connection.execute(near))):
                connection.execute(history_points.delete().where(sa.tuple_(*key).in_(list(replaced))))
            connection.execute(history_points.insert(), some)

    def _numbered(self, connection: Connection, history: dict[str, Sequence[HistoryRow]]) -> list[dict[str, Any]]:
        """Id -> points as rows of `history_points`; numbers are given to runs and names that have none."""
        runs = self._numbers(connection, history_runs, {key for key, points in history.items() if points})
        names = self._numbers(
            connection, history_names, {point.name for points in history.values() for point in points}
        )
        return [
            {
                "run_id": runs[experiment_id],
                "name_id": names[point.name],
                "step": int(point.step),
                "epoch": float(point.epoch),
                "value": float(point.value),
            }
            for experiment_id, points in history.items()
            for point in points
        ]

    def _numbers(self, connection: Connection, table: sa.Table, texts: set[str]) -> dict[str, int]:
        """Text -> its number in `history_runs` or `history_names`."""
        number, text = table.columns
        query = sa.select(text, number).where(text.in_(sorted(texts)))
        found: dict[str, int] = dict(connection.execute(query).all()) if texts else {}
        missing = sorted(texts - found.keys())  # in one order, or two writers could wait for each other
        if missing:
            insert = (sqlite.insert if self._file else postgresql.insert)(table).on_conflict_do_nothing()
            connection.execute(insert, [{text.name: key} for key in missing])
            found |= dict(connection.execute(query).all())
        return found

    def truncate_history(self, experiment_id: str, after_step: int) -> None:
        """Forget the points later than `after_step`, which a resumed run will write again."""
        with self._write() as connection:
            self._update(connection, experiment_id)
            run_id = sa.select(history_runs.c.run_id).where(history_runs.c.experiment_id == experiment_id)
            connection.execute(
                history_points.delete().where(
                    history_points.c.run_id == run_id.scalar_subquery(), history_points.c.step > after_step
                )
            )

    def finish_experiment(self, experiment_id: str, metrics: dict[str, Any]) -> None:
        """Replace the run's metrics and file it as finished. ConfigError for a metric that JSON cannot hold."""
        rows = [
            {"experiment_id": experiment_id, "metric_name": name, "metric_value": _normal_metric(name, value)}
            for name, value in metrics.items()
        ]
        with self._write(durable=True) as connection:
            self._update(connection, experiment_id, status="finished", error=None)
            connection.execute(metrics_table.delete().where(metrics_table.c.experiment_id == experiment_id))
            if rows:
                connection.execute(metrics_table.insert(), rows)

    # Reading

    def _rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        with self._engine.connect() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        for row in rows:
            if row.get("status") == "running" and is_gone(row["experiment_id"], row["heartbeat"]):
                row.update(status="interrupted", error=row["error"] or GONE)
        return rows

    def gone(self) -> list[str]:
        """The ids of runs that are filed as running and are not at work."""
        columns = experiments_table.c
        query = sa.select(columns.experiment_id, columns.heartbeat).where(columns.status == "running")
        with self._engine.connect() as connection:
            return [
                experiment_id
                for experiment_id, heartbeat in connection.execute(query)
                if is_gone(experiment_id, heartbeat)
            ]

    def statuses(self) -> dict[str, str]:
        """Id -> status of every run; of those whose process is gone "running" still."""
        columns = experiments_table.c
        with self._engine.connect() as connection:
            query = sa.select(columns.experiment_id, columns.status).order_by(columns.experiment_id)
            return dict(connection.execute(query).all())

    def file_as_interrupted(self, experiment_id: str) -> bool:
        """File a run whose process is gone as what it is read as; False where it has ended otherwise by now."""
        with self._write(durable=True) as connection:
            updated = connection.execute(
                experiments_table.update()
                .where(experiments_table.c.experiment_id == experiment_id, experiments_table.c.status == "running")
                .values(status="interrupted", error=GONE)
            )
        return updated.rowcount == 1

    def experiments(self) -> list[dict[str, Any]]:
        """Every run, oldest first; keys are the columns of the table."""
        return self._rows(sa.select(experiments_table).order_by(experiments_table.c.timestamp))

    def experiment(self, experiment_id: str) -> dict[str, Any]:
        """The run with this id or, where it is the only one, whose id starts so."""
        column = experiments_table.c.experiment_id
        starts_so = sa.func.substr(column, 1, len(experiment_id)) == experiment_id  # LIKE has wildcards and folds case
        found = self._rows(sa.select(experiments_table).where(starts_so).order_by(column)) if experiment_id else []
        for row in found:
            if row["experiment_id"] == experiment_id or len(found) == 1:
                return row
        if found:
            shown = ", ".join(row["experiment_id"] for row in found[:5]) + (", ..." if len(found) > 5 else "")
            raise ConfigError(f"experiment {experiment_id!r} is one of {len(found)} in {self.location}: {shown}")
        known = [row["experiment_id"] for row in self._rows(sa.select(column).order_by(experiments_table.c.timestamp))]
        near = difflib.get_close_matches(experiment_id, known, n=1)
        hint = (
            f"Did you mean {near[0]!r}?"
            if near
            else f"The newest are {', '.join(known[:-6:-1]) or 'none: it is empty'}."
        )
        raise ConfigError(f"no experiment {experiment_id!r} in {self.location}. {hint}")

    def find_id(self, experiment_id: str) -> dict[str, Any] | None:
        """The run with exactly this id."""
        found = self._rows(sa.select(experiments_table).where(experiments_table.c.experiment_id == experiment_id))
        return found[0] if found else None

    def find_experiment(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """The newest run of exactly this config, trials of studies and replays of other runs aside."""
        columns = experiments_table.c
        found = self._rows(
            sa.select(experiments_table)
            .where(
                columns.run_type == "json",
                columns.parent_id.is_(None),
                columns.full_config_json == canonical_json(config),
            )
            .order_by(columns.timestamp.desc())
            .limit(1)
        )
        return found[0] if found else None

    def metrics(self, experiment_id: str) -> dict[str, Any]:
        """Name -> float, or the list (or dict, or text) that was stored; in the order they were stored."""
        query = (
            sa.select(metrics_table)
            .where(metrics_table.c.experiment_id == experiment_id)
            .order_by(metrics_table.c.metric_id)
        )
        return {row["metric_name"]: row["metric_value"] for row in self._rows(query)}

    def history(self, experiment_id: str, name: str | None = None) -> list[HistoryRow]:
        """The points of one series, or of all, by step and then name."""
        columns = history_view.c
        query = sa.select(columns.step, columns.epoch, columns.name, columns.value).where(
            columns.experiment_id == experiment_id
        )
        if name is not None:
            query = query.where(columns.name == name)
        with self._engine.connect() as connection:
            return [HistoryRow(*row) for row in connection.execute(query.order_by(columns.step, columns.name))]

    # Reading many runs

    def _number(self) -> sa.ColumnElement[float | None]:
        """`metric_value` where it is a number, else NULL; written as the index `ix_metrics_number` has it."""
        return sa.literal_column(_SQLITE_NUMBER if self._file else _POSTGRESQL_NUMBER, sa.Double)

    def dataset_names(self) -> list[str]:
        """The datasets of all runs, by name."""
        column = experiments_table.c.dataset_name
        with self._engine.connect() as connection:
            names = connection.scalars(sa.select(column).where(column.is_not(None)).distinct())
            return sorted(names)

    def runs(self, dataset_name: str, metrics: Sequence[str] = ()) -> list[RunRow]:
        """The runs on a dataset, whatever became of them, oldest first, with their values of these metrics."""
        columns = experiments_table.c
        values = [
            sa.select(self._number())
            .where(metrics_table.c.experiment_id == columns.experiment_id, metrics_table.c.metric_name == name)
            .limit(1)
            .scalar_subquery()
            .label(f"metric_{number}")
            for number, name in enumerate(metrics)
        ]
        when = sa.type_coerce(columns.timestamp, sa.Text)  # as the driver gives it: it is only compared
        query = sa.select(
            when,
            columns.experiment_id,
            sa.func.coalesce(columns.experiment_name, ""),
            sa.func.coalesce(columns.model_type, ""),
            columns.status,
            columns.seed,
            sa.func.coalesce(columns.full_config_json, ""),
            columns.heartbeat,
            *values,
        ).where(columns.dataset_name == dataset_name)
        with self._engine.connect() as connection:
            found = list(connection.execute(query))
        found.sort(key=lambda row: (row[0] is not None, row[0], row[1]))  # a database would move the configs about
        runs = []
        for row in found:
            numbers = {name: value for name, value in zip(metrics, row[8:], strict=True) if value is not None}
            run = RunRow._make((*row[1:7], numbers))
            gone = run.status == "running" and is_gone(run.experiment_id, row[7])
            runs.append(run._replace(status="interrupted") if gone else run)
        return runs

    def metric_summaries(self, dataset_name: str | None = None) -> list[MetricSummary]:
        """Every metric of all runs, or of the runs on a dataset, by name."""
        name, number = metrics_table.c.metric_name, self._number()
        query = sa.select(name, sa.func.count(), sa.func.min(number), sa.func.max(number)).group_by(name)
        if dataset_name is not None:
            query = query.join(experiments_table).where(experiments_table.c.dataset_name == dataset_name)
        with self._engine.connect() as connection:
            return [MetricSummary(*row) for row in connection.execute(query.order_by(name))]

    def find_runs(
        self,
        wanted: RunFilter = RunFilter(),
        *,
        sort: str = "timestamp",
        descending: bool = False,
        limit: int | None = None,
        with_json: bool = False,
    ) -> list[dict[str, Any]]:
        """The runs that `wanted` describes, by a column or a metric; runs without a number there come last.

        Equal ones are in the order of their ids. Config and environment are left out unless `with_json`.
        """
        table, ids = experiments_table, experiments_table.c.experiment_id
        key: sa.ColumnElement[Any] = table.columns[sort] if sort in table.columns else self._metric(sort)
        if isinstance(key.type, sa.Text):
            key = sa.collate(key, "BINARY" if self._file else "C")  # the order of Python, on every database
        conditions = self._conditions(wanted)
        order = [sa.nulls_last(key.desc() if descending else key), ids]
        query = sa.select(*[column for column in table.columns if with_json or column.name not in JSON_COLUMNS])
        if limit is None or limit > _IDS_PER_QUERY:
            return self._rows(query.where(*conditions).order_by(*order).limit(limit))
        # First which ones, from an index alone: a row with its JSON is long, and a metric of every run is slow.
        if sort in table.columns:
            with self._engine.connect() as connection:
                first = list(connection.scalars(sa.select(ids).where(*conditions).order_by(*order).limit(limit)))
        else:
            first = self._first_by_metric(sort, conditions, descending, limit)
        rows = {row["experiment_id"]: row for row in self._rows(query.where(ids.in_(first)))}
        return [rows[experiment_id] for experiment_id in first if experiment_id in rows]

    def _first_by_metric(
        self, name: str, conditions: Sequence[sa.ColumnElement[bool]], descending: bool, limit: int
    ) -> list[str]:
        """Ids by the number of a metric, then those without one."""
        ids, number, same = experiments_table.c.experiment_id, self._number(), metrics_table.alias()
        last = sa.select(sa.func.max(same.c.metric_id)).where(
            same.c.experiment_id == metrics_table.c.experiment_id, same.c.metric_name == metrics_table.c.metric_name
        )
        with_number = (
            sa.select(ids)
            .join(metrics_table)
            .where(metrics_table.c.metric_name == name, number.is_not(None), *conditions)
            .where(metrics_table.c.metric_id == last.scalar_subquery())
            .order_by(number.desc() if descending else number, ids)
            .limit(limit)
        )
        with self._engine.connect() as connection:
            first = list(connection.scalars(with_number))
            if len(first) < limit:
                rest = sa.select(ids).where(ids.not_in(first), *conditions).order_by(ids)
                first += connection.scalars(rest.limit(limit - len(first)))
        return first

    def count_runs(self, wanted: RunFilter = RunFilter()) -> int:
        with self._engine.connect() as connection:
            query = sa.select(sa.func.count()).select_from(experiments_table).where(*self._conditions(wanted))
            return int(connection.scalar(query) or 0)

    def _conditions(self, wanted: RunFilter) -> list[sa.ColumnElement[bool]]:
        columns = experiments_table.c
        names = ("dataset_name", "model_type", "experiment_name", "run_type")
        conditions = [columns[name] == getattr(wanted, name) for name in names if getattr(wanted, name) is not None]
        if wanted.status == "running":
            conditions += [columns.status == "running", columns.experiment_id.not_in(self.gone())]
        elif wanted.status == "interrupted":
            conditions.append((columns.status == "interrupted") | columns.experiment_id.in_(self.gone()))
        elif wanted.status is not None:
            conditions.append(columns.status == wanted.status)
        if wanted.study is not None:
            conditions += [columns.run_type == "optuna_trial", columns.experiment_name == wanted.study]
        if wanted.since is not None:
            conditions.append(columns.timestamp >= wanted.since)
        for name, sign, number in wanted.where:
            if self._file is not None:
                conditions.append(COMPARISONS[sign](self._metric(name), number))
            else:
                conditions.append(self._is_fitting(name, sign, number))
        return conditions

    def _is_fitting(self, name: str, sign: str, number: float) -> sa.ColumnElement[bool]:
        """Whether a run's metric fits; where few do, they are named, as an index has them.

        For PostgreSQL, which takes ten times as long as SQLite to look a metric up for every run.
        """
        later = metrics_table.alias()
        is_last = ~sa.exists().where(
            later.c.experiment_id == metrics_table.c.experiment_id,
            later.c.metric_name == name,
            later.c.metric_id > metrics_table.c.metric_id,
        )
        query = sa.select(metrics_table.c.experiment_id).where(
            metrics_table.c.metric_name == name, COMPARISONS[sign](self._number(), number)
        )
        with self._engine.connect() as connection:
            some = list(connection.scalars(query.limit(_IDS_PER_QUERY + 1)))
        ids = experiments_table.c.experiment_id
        fits = ids.in_(query.where(is_last).correlate(None))
        return fits if len(some) > _IDS_PER_QUERY else fits & ids.in_(some)

    def _metric(self, name: str) -> sa.ScalarSelect[float | None]:
        """In a query of runs: the metric of this name, NULL where it is missing, NaN or no number."""
        return (
            sa.select(self._number())
            .where(
                metrics_table.c.experiment_id == experiments_table.c.experiment_id, metrics_table.c.metric_name == name
            )
            .order_by(metrics_table.c.metric_id.desc())  # an adopted database may have a name twice: the last counts
            .limit(1)
            .correlate(experiments_table)
            .scalar_subquery()
        )

    def metrics_of(
        self, experiment_ids: Sequence[str], names: Sequence[str] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Id -> `metrics` of that run, or those of the given names; in few queries."""
        found: dict[str, dict[str, Any]] = {experiment_id: {} for experiment_id in experiment_ids}
        table = metrics_table.c
        for start in range(0, len(experiment_ids), _IDS_PER_QUERY):
            query = sa.select(table.experiment_id, table.metric_name, table.metric_value).where(
                table.experiment_id.in_(experiment_ids[start : start + _IDS_PER_QUERY])
            )
            if names is not None:
                query = query.where(table.metric_name.in_(names))
            with self._engine.connect() as connection:
                for experiment_id, name, value in connection.execute(query.order_by(table.metric_id)):
                    found[experiment_id][name] = value
        return found

    def has_metric(self, name: str) -> bool:
        """Whether any run has a metric of this name."""
        with self._engine.connect() as connection:
            return bool(connection.scalar(sa.select(sa.exists().where(metrics_table.c.metric_name == name))))

    def children(self, experiment_id: str) -> list[str]:
        """The ids of the runs whose parent this is, oldest first."""
        table = experiments_table.c
        query = sa.select(table.experiment_id).where(table.parent_id == experiment_id)
        with self._engine.connect() as connection:
            return list(connection.scalars(query.order_by(table.timestamp, table.experiment_id)))

    # Merging

    def records(self, experiment_ids: Sequence[str]) -> dict[str, RunRecord]:
        """Id -> all of the run, for those ids that are here."""
        with self._engine.connect() as connection:
            return self._records(connection, experiment_ids)

    def _records(self, connection: Connection, experiment_ids: Sequence[str]) -> dict[str, RunRecord]:
        experiments, metrics, history = experiments_table, metrics_table, history_view
        rows = connection.execute(sa.select(experiments).where(experiments.c.experiment_id.in_(experiment_ids)))
        found = {row["experiment_id"]: RunRecord(dict(row), {}, []) for row in rows.mappings()}
        values = (
            sa.select(metrics.c.experiment_id, metrics.c.metric_name, metrics.c.metric_value)
            .where(metrics.c.experiment_id.in_(found))
            .order_by(metrics.c.metric_id)
        )
        for experiment_id, name, value in connection.execute(values):
            found[experiment_id].metrics[name] = value
        points = (
            sa.select(history.c.experiment_id, history.c.step, history.c.epoch, history.c.name, history.c.value)
            .where(history.c.experiment_id.in_(found))
            .order_by(history.c.step, history.c.name)
        )
        for experiment_id, *point in connection.execute(points):
            found[experiment_id].history.append(HistoryRow(*point))
        return found

    def merge_records(
        self, records: dict[str, RunRecord], replaces: Callable[[RunRecord, RunRecord], bool]
    ) -> dict[str, RunRecord]:
        """Enter runs of another store in one transaction; return what was here before of these ids.

        A run that is here too is replaced where `replaces(ours, theirs)`, and left alone otherwise.
        """
        with self._write() as connection:
            ours = self._records(connection, list(records))
            replaced = [key for key in ours if replaces(ours[key], records[key])]
            runs = sa.select(history_runs.c.run_id).where(history_runs.c.experiment_id.in_(replaced))
            connection.execute(history_points.delete().where(history_points.c.run_id.in_(runs)))
            for table in (metrics_table, history_runs, experiments_table):  # rows that refer to a run go before it
                connection.execute(table.delete().where(table.c.experiment_id.in_(replaced)))
            entered = {key: records[key] for key in records if key not in ours or key in replaced}
            metrics = [
                {"experiment_id": key, "metric_name": name, "metric_value": _normal_metric(name, value)}
                for key, record in entered.items()
                for name, value in record.metrics.items()
            ]
            experiments = [record.experiment for record in entered.values()]
            for table, rows in ((experiments_table, experiments), (metrics_table, metrics)):
                if rows:
                    connection.execute(table.insert(), rows)
            points = self._numbered(connection, {key: record.history for key, record in entered.items()})
            self._put_points(connection, points)
        return ours


def is_gone(experiment_id: str, heartbeat: datetime | None) -> bool:
    """Whether a run that is filed as running is not at work: nobody holds its folder.

    Of a folder that is elsewhere the heartbeat tells: it is old, or far ahead of a clock that was set back.
    """
    at_work = is_at_work(experiment_id)
    if at_work is not None:
        return not at_work
    return heartbeat is None or abs(datetime.now(UTC) - heartbeat) > SILENCE


# --- CSV --------------------------------------------------------------------------------------------------------------


def append_csv(path: str | Path, row: dict[str, Any], unless_known: Sequence[str] = ()) -> None:
    """Append one row; a column that the header lacks is added to it, and old rows get an empty cell.

    Text that a spreadsheet would run as a formula gets a leading apostrophe. Several processes may append. Nothing is
    done where a row has the same cells in all the columns `unless_known`.
    """
    path = Path(path).resolve()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{path}: not a file in an existing folder. Create the folder or give another name.")
    cells = {str(_cell(name)): _cell(value) for name, value in row.items()}
    csv.field_size_limit(2**31 - 1)  # a cell may be a long list
    with _locked(path):
        try:
            header = next(_csv_rows(path), [])
            if unless_known and _is_known(path, header, {name: str(cells[name]) for name in unless_known}):
                return
            columns = [*header, *(name for name in cells if name not in header)]
            new_line = [cells.get(name, "") for name in columns]
            if columns == header:
                _append_line(path, new_line)
            else:
                old_lines = [[*line, *[""] * (len(columns) - len(line))] for line in _csv_rows(path)][1:]
                _replace_csv(path, [columns, *old_lines, new_line])
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: not UTF-8 text; it was left alone. Move it away or give another name."
            ) from error


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A whole file, header first; cells as `append_csv` writes them."""
    return csv_lines([columns, *rows])


def csv_lines(rows: Sequence[Sequence[Any]]) -> str:
    """Lines without a header, to go on with a file."""
    text = io.StringIO()
    csv.writer(text).writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(_to_strict_json(value))
    text = str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _csv_rows(path: Path) -> Iterator[list[str]]:
    """The lines of a file, none where it is missing. Tolerates the byte-order mark that a spreadsheet writes."""
    if path.exists():
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from csv.reader(file)


def _is_known(path: Path, header: list[str], wanted: dict[str, str]) -> bool:
    if not set(wanted) <= set(header):
        return False
    return any(wanted.items() <= dict(zip(header, line, strict=False)).items() for line in _csv_rows(path))


def _append_line(path: Path, line: list[Any]) -> None:
    """The line as a whole: what a full disk has taken of it is cut off again."""
    text = io.StringIO()
    csv.writer(text).writerow(line)
    with path.open("rb+", buffering=0) as file:
        size = file.seek(-1, os.SEEK_END) + 1
        last_line_is_whole = file.read(1) in (b"\n", b"\r")
        content = (b"" if last_line_is_whole else b"\r\n") + text.getvalue().encode()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _replace_csv(path: Path, lines: list[list[Any]]) -> None:
    """All of it or nothing: a crash leaves the old file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
