"""A database that is open: its connections, its version, and a transaction that writes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection, make_url

from research_eval.errors import ConfigError
from research_eval.store.connection import (
    ServerConnections,
    StoreUnavailable,
    database_url,
    sqlite_engine,
    writer_of,
)
from research_eval.store.migrate import adopt_file, check_tables, migrate_file, migrate_server, schema_version
from research_eval.store.tables import SCHEMA_VERSION, experiments_table


class Database:
    """The lowest part of `Store`: opening and closing. `Queries` adds reading to it, and `Store` writing.

    Opening creates or migrates the database. With `read_only` it must exist and is never written (SQLite may still put
    its empty -wal and -shm files beside it), with one exception: a file that the public original of this project made
    is adopted, after a backup. With `any_version` in addition, an older database is opened unchanged: the caller may
    then read its `schema_version` only. Raises ConfigError for a database that cannot be opened.
    """

    def __init__(self, db: str | None = None, read_only: bool = False, any_version: bool = False) -> None:
        url = make_url(database_url(db))
        self.read_only = read_only
        self._any_version = any_version
        self._file = Path(url.database) if url.drivername == "sqlite" and url.database else None
        self._on_sqlite = self._file is not None
        self.location = str(self._file or url.render_as_string(hide_password=True))
        self._shared: ServerConnections | None = None
        if self._file is None:
            self._shared = ServerConnections.lend(url.render_as_string(hide_password=False))
            self._engine: sa.Engine = self._shared.engine.execution_options(postgresql_readonly=read_only)
        elif read_only and not self._file.exists():
            raise self._no_results()
        else:
            self._engine = sqlite_engine(self._file, read_only)
        self._writer = writer_of(self._engine)
        try:
            self._open()
        except sa.exc.DatabaseError as error:
            self.close()
            raise ConfigError(f"database {self.location}: {str(error.orig).strip()}") from error
        except BaseException:  # also Ctrl-C while a migration waits for its lock
            self.close()
            raise
        self._identity = self._identity_now()

    @property
    def is_current(self) -> bool:
        """Whether what was opened still lies at its place: not for a file that was moved away, or that replaces it."""
        return self._identity == self._identity_now()

    def _identity_now(self) -> tuple[int, int] | None:
        if self._file is None:
            return None
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def close(self) -> None:
        """Give all connections back; the object cannot be used afterwards."""
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.give_back()
        elif self._on_sqlite:
            self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def schema_version(self) -> str | None:
        """The version that the database has now; None without our tables."""
        with self._engine.connect() as connection:
            return schema_version(connection, self.location)

    def _no_results(self) -> ConfigError:
        return ConfigError(f"no results at {self.location}: run `python research_eval/init_db.py` first")

    def _open(self) -> None:
        """Check the tables, then migrate them (a writer) or refuse an older version (a reader).

        Only a SQLite file is checked: it may be any file that a user has named, or a damaged one. A reader never
        migrates, because it may have no right to write, and other programs may still use the old tables. It only adopts
        a file of the public original, whose users would otherwise read that there are no results.
        """
        with self._engine.connect() as connection:
            version = schema_version(connection, self.location)
            if self._on_sqlite:
                check_tables(connection, version, self.location)
            needs_wal = self._on_sqlite and connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal"
        if not self.read_only:
            if version != SCHEMA_VERSION or needs_wal:
                self._migrate()
        elif version is None and not (self._has_tables() and (self._on_sqlite or self._any_version)):
            raise self._no_results()
        elif version is None and self._file is not None and not self._any_version:
            self._engine.dispose()  # its connections have seen the old tables
            adopt_file(self._file)
        elif version != SCHEMA_VERSION and not self._any_version:
            raise ConfigError(
                f"database {self.location}: schema version {version} is older than {SCHEMA_VERSION}: "
                f"run `python research_eval/init_db.py --db {self.location}` first"
            )

    def _has_tables(self) -> bool:
        return sa.inspect(self._engine).has_table(experiments_table.name)

    def _migrate(self) -> None:
        if self._file is not None:
            migrate_file(self._engine, self._file)
        else:
            migrate_server(self._engine, self.location)

    @contextmanager
    def _write(self, durable: bool = False) -> Iterator[Connection]:
        """A transaction. A durable one is on the disk at its end, any other one with the next checkpoint of the WAL.

        Raises StoreUnavailable if it failed for a reason that may pass.
        """
        assert not self.read_only, "this store was opened read-only"
        try:
            with self._writer.connect() as connection:
                if self._on_sqlite:  # per transaction, because connections of the pool are used again
                    driver = connection.connection.driver_connection
                    assert driver is not None
                    driver.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                with connection.begin():
                    yield connection
        except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
            raise StoreUnavailable(errno.EIO, str(error.orig).strip(), f"database {self.location}") from error
