"""The version of a database's tables: reading it, refusing tables that are not ours, and migrating older ones.

The numbered steps are in `migrations/versions`. A released step is never edited: databases exist that have run it.
`location` is the name of the database in messages, without a password.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from research_eval.errors import ConfigError
from research_eval.store.backup import copy_database
from research_eval.store.connection import sqlite_engine, writer_of
from research_eval.store.locks import locked
from research_eval.store.tables import (
    NUM_OLD_COLUMNS,
    SCHEMA_VERSION,
    VERSION_TABLE,
    experiments_table,
    history_names,
    history_points,
    history_runs,
    history_view,
    metadata,
    metrics_table,
    version_table,
)

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"

_ADVISORY_LOCK_KEY = 0x676F65  # "goe": any number that all processes of this program use, and no other program
_OPTUNA_TABLES = r"alembic_version|version_info|studies|study_\w+|trials|trial_\w+"


def schema_version(connection: Connection, location: str) -> str | None:
    """The version of the database; None if it has no version table. Raises ConfigError for an unknown version."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    version: Any = connection.scalar(sa.select(version_table.c.version_num))
    if version is not None and not (isinstance(version, str) and re.fullmatch(r"\d{4}", version)):
        raise ConfigError(f"database {location}: schema version {str(version)[:40]!r} is none of ours.")
    if version is not None and version > SCHEMA_VERSION:
        raise ConfigError(
            f"database {location}: schema version {version} is newer than {SCHEMA_VERSION}, the newest that "
            "this program knows. Update the program or give another database."
        )
    return version


def foreign_table(connection: Connection) -> str | None:
    """The name of a table that is neither ours nor Optuna's, if the database has no table of ours; else None.

    A database with such a table belongs to another program. A study may keep Optuna's tables beside ours, and it may
    have created them first.
    """
    tables = set(sa.inspect(connection).get_table_names())
    if tables & {VERSION_TABLE, "experiments", "metrics"}:
        return None
    return min((name for name in tables if not re.fullmatch(_OPTUNA_TABLES, name)), default=None)


def check_tables(connection: Connection, version: str | None, location: str) -> None:
    """Raise ConfigError for a database of another program, and for a damaged one that has lost tables or columns."""
    inspector = sa.inspect(connection)
    if version is None:
        _check_ownership(inspector, foreign_table(connection), location)
    elif version != SCHEMA_VERSION:  # an older version has other columns: its migration checks them
        for table in (experiments_table, metrics_table):
            if not inspector.has_table(table.name):
                raise ConfigError(
                    f"database {location}: damaged: it has no table {table.name!r}. Restore a backup or give "
                    "another database."
                )
    else:
        for table in metadata.sorted_tables:
            known = inspector.get_columns(table.name) if inspector.has_table(table.name) else []
            missing = {column.name for column in table.columns} - {column["name"] for column in known}
            if missing:
                lost = f"its table {table.name!r} has no {', '.join(sorted(missing))}"
                raise ConfigError(f"database {location}: damaged: {lost}. Restore a backup or give another database.")


def _check_ownership(inspector: sa.Inspector, foreign: str | None, location: str) -> None:
    """A database without a version: empty, or with the two documented tables that an earlier program made."""
    if foreign is not None:
        raise ConfigError(
            f"database {location}: belongs to another program (it has a table {foreign!r}); it was left "
            "alone. Give another name."
        )
    for table, num_columns in ((experiments_table, NUM_OLD_COLUMNS), (metrics_table, len(metrics_table.c))):
        if inspector.has_table(table.name):
            there = {column["name"] for column in inspector.get_columns(table.name)}
            without = [name for name in table.columns.keys()[:num_columns] if name not in there]
            if without:
                raise ConfigError(
                    f"database {location}: its table {table.name!r} belongs to another program (it has no "
                    f"{', '.join(without)}); it was left alone. Give another database."
                )
    for name in (history_view.name, *(table.name for table in (history_runs, history_names, history_points))):
        if inspector.has_table(name):
            raise ConfigError(
                f"database {location}: its table {name!r} belongs to another program; it was left alone. "
                "Give another database."
            )


def migrate_file(engine: sa.Engine, file: Path) -> None:
    """Bring a SQLite file up to date, after a backup, in one transaction; one process at a time."""
    with writer_of(engine).connect() as connection, locked(file):
        driver = connection.connection.driver_connection  # the pragmas have no effect inside a transaction
        assert driver is not None
        driver.execute("PRAGMA journal_mode=WAL")
        _back_up_old_tables(engine, file)
        driver.execute("PRAGMA foreign_keys=OFF")  # Alembic alters a table by copying and dropping it
        with connection.begin():
            _upgrade(connection, str(file))
        driver.execute("PRAGMA foreign_keys=ON")


def adopt_file(file: Path) -> None:
    """Bring a database of the public original up to date for a reader. Raises ConfigError if it cannot be written."""
    engine = sqlite_engine(file, read_only=False)
    try:
        migrate_file(engine, file)
    except (OSError, sa.exc.OperationalError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "orig", None) or error
        raise ConfigError(
            f"database {file}: an earlier program made it. It has to be brought up to date before it is read, but that "
            f"failed: {reason}. Nothing was changed. Copy it into a folder that you may write to, and give the copy."
        ) from error
    finally:
        engine.dispose()


def _back_up_old_tables(engine: sa.Engine, file: Path) -> None:
    """Copy the file if it has tables of ours that the migration will change. The caller holds the lock."""
    with engine.connect() as connection:
        version = schema_version(connection, str(file))
        if version == SCHEMA_VERSION or not sa.inspect(connection).has_table("experiments"):
            return
    backup = copy_database(file)
    if version is None:
        log.info("%s: adopting the tables of an earlier program; the database as it was: %s", file, backup)
        return
    log.info("%s: migrating from schema version %s; the database as it was: %s", file, version, backup)


def migrate_server(engine: sa.Engine, location: str) -> None:
    """Bring a PostgreSQL database up to date in one transaction; one process at a time. It makes no backup."""
    with writer_of(engine).connect() as connection, connection.begin():
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK_KEY)))
        version = schema_version(connection, location)
        if version is not None and version != SCHEMA_VERSION:
            log.info("%s: migrating from schema version %s; backups are pg_dump's", location, version)
        _upgrade(connection, location)


def _upgrade(connection: Connection, location: str) -> None:
    """Run the missing migrations, unless another process has run them while this one waited for the lock."""
    version = schema_version(connection, location)
    if version == SCHEMA_VERSION:
        return
    if version is None and connection.dialect.name == "sqlite":
        _number_metrics(connection)
    import alembic.command  # here, because a database that is up to date opens without it
    import alembic.config

    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, SCHEMA_VERSION)


def _number_metrics(connection: Connection) -> None:
    """Give `metric_value` of an adopted table the type REAL, so that numbers in it are numbers.

    A column of the type TEXT holds numbers as text. SQLite turns them into numbers on their way into a REAL column, and
    leaves any other text as it is. Further columns and indexes stay.
    """
    inspector = sa.inspect(connection)
    if not inspector.has_table(metrics_table.name):
        return
    types = {column["name"]: column["type"] for column in inspector.get_columns(metrics_table.name)}
    if isinstance(types["metric_value"], sa.Float):  # REAL, FLOAT and DOUBLE
        return
    table = sa.Table(metrics_table.name, sa.MetaData(), autoload_with=connection)
    table.c.metric_value.type = sa.REAL()
    table.dialect_options["sqlite"]["autoincrement"] = True
    indexes = list(table.indexes)
    table.indexes.clear()
    old = f"{metrics_table.name}_adopted"
    connection.execute(sa.text(f"ALTER TABLE {metrics_table.name} RENAME TO {old}"))
    connection.execute(sa.schema.CreateTable(table))
    names = table.columns.keys()
    values = sa.select(*sa.table(old, *map(sa.column, names)).columns)
    connection.execute(sa.table(table.name, *map(sa.column, names)).insert().from_select(names, values))
    connection.execute(sa.text(f"DROP TABLE {old}"))
    for index in indexes:
        index.create(connection)
