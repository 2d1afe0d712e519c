"""Where the database is, and how this program connects to it: a SQLite file (a path) or PostgreSQL (a URL)."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, make_url

from research_eval.errors import ConfigError
from research_eval.system.untrusted import check_regular_file, user_path

DB_FILE = "experiment_results.db"
DB_VARIABLE = "GOE_DB"
MOST_CONNECTIONS = 4  # of a process to one server; a worker never needs more than two at once
# A pooler between this program and a server gives every transaction another session, in which statements that were
# prepared before do not exist.
NO_PREPARED_STATEMENTS: dict[str, Any] = {"prepare_threshold": None}
BUSY_SECONDS = 30.0  # how long a writer of a SQLite file waits for another one

_SQLITE_MAGIC = b"SQLite format 3\0"
_SPELLINGS = "Give a path, sqlite:///path or postgresql://user@host/name"


class StoreUnavailable(OSError):
    """The database cannot write now: its server, the network, a lock or a disk. It may later."""


def _own_default() -> str:
    return DB_FILE


# Users assign to `research_eval.db_utils.DB_FILE`, and this package cannot read that variable, because it imports
# nothing above itself. So `db_utils` puts a function here that reads its variable, and `database_url` calls it at each
# use. A program that never imports `db_utils` cannot have assigned to it.
default_file: Callable[[], str] = _own_default


def database_url(db: str | None = None) -> str:
    """The URL (password included) of `db`, else of $GOE_DB, else of `db_utils.DB_FILE` in the working directory.

    Raises ConfigError for a bad URL, a missing folder, a directory or a file that is not SQLite.
    """
    where = db if db is not None else os.environ.get(DB_VARIABLE) or default_file()
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
    """The absolute path of a SQLite file that exists or can be created. Raises ConfigError for anything else."""
    if not name.strip():
        raise ConfigError(f"database: the name is empty. {_SPELLINGS}.")
    if name.startswith("file:"):
        raise ConfigError(f"database: {name!r} is no path. {_SPELLINGS}.")
    path = user_path(name).absolute()
    if path.is_dir():
        raise ConfigError(f"database: {path} is a directory. Give a file in it, such as {path / default_file()}.")
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


def sqlite_engine(path: Path, read_only: bool) -> sa.Engine:
    """Connections to a SQLite file. They begin transactions themselves, see `writer_of`."""
    query = {"uri": "true", "mode": "ro"} if read_only else {}
    if read_only and not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
        query["immutable"] = "1"  # a WAL file on a read-only medium: SQLite could not make its shared-memory file
    database = path.as_uri() if read_only else str(path)
    engine = sa.create_engine(
        URL.create("sqlite", database=database, query=query), connect_args={"timeout": BUSY_SECONDS}
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


class ServerConnections:
    """The connections of this process to one server: all that use the same URL share them, and give them back.

    So a worker has one or two, whatever it does. A server that disappeared is noticed within a minute.
    """

    _lent: ClassVar[dict[tuple[int, str], ServerConnections]] = {}  # by process, because a fork cannot use them
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, url: str) -> None:
        self._users = 0
        # Minutes may pass between two writes of a run: `pool_pre_ping` asks first whether the connection still lives.
        # Without the timeouts libpq would wait for hours for a server that disappeared without closing the connection.
        given = make_url(url).query
        timeouts = {"connect_timeout": 10, "keepalives_idle": 30, "tcp_user_timeout": 60_000}
        arguments: dict[str, Any] = {name: value for name, value in timeouts.items() if name not in given}
        arguments |= NO_PREPARED_STATEMENTS
        self.engine = sa.create_engine(
            url, pool_pre_ping=True, pool_size=1, max_overflow=MOST_CONNECTIONS - 1, connect_args=arguments
        )

    @classmethod
    def lend(cls, url: str) -> ServerConnections:
        """The connections to this URL; `give_back` has to follow."""
        with cls._lock:
            shared = cls._lent.get((os.getpid(), url)) or cls(url)
            cls._lent[os.getpid(), url] = shared
            shared._users += 1
            return shared

    def give_back(self) -> None:
        """Close the connections if nothing else uses them."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for key in [key for key, shared in self._lent.items() if shared is self]:
                    del self._lent[key]
                self.engine.dispose()


def writer_of(engine: sa.Engine) -> sa.Engine:
    """The same connections for transactions that write.

    On SQLite they take the write lock at their beginning. A transaction that first reads and takes the lock later can
    fail half-way, because another process has written in between.
    """
    return engine.execution_options(sqlite_begin="IMMEDIATE")
