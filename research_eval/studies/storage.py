"""Optuna's database: how it is opened, locked and waited for."""

from __future__ import annotations

import functools
import logging
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy import orm
from sqlalchemy.engine import Connection, make_url

from research_eval.errors import ConfigError
from research_eval.store.connection import NO_PREPARED_STATEMENTS, ServerConnections, database_url
from research_eval.store.migrate import foreign_table
from research_eval.studies.ledger import file_lock, locked_transaction
from research_eval.studies.trial_rows import read_trials

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60  # a trial without a heartbeat for so long is stale: its worker counts as dead
SQLITE_SECONDS = 60  # longest wait for another process that writes into a SQLite file
OUTAGE_SECONDS = 300.0  # longest wait for a server that does not answer


@contextmanager
def experimental() -> Iterator[None]:
    """Hide the warnings of Optuna's experimental parts: its version is pinned, and tests cover these parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def storage_url(storage: str) -> str:
    """The URL of a study storage: a path, sqlite:///path or postgresql://... Raises ConfigError."""
    try:
        return database_url(storage)
    except ConfigError as error:
        raise ConfigError(f"--storage: {error}") from error


class StudyStorage(RDBStorage):
    """Optuna's storage at a URL; it is created if it does not exist. Raises ConfigError.

    A SQLite file is in WAL mode, in which readers do not block writers. On a server the storage uses the connections
    that the results store of this process uses too, and it waits for a server that is away for some minutes.
    """

    def __init__(self, url: str) -> None:
        self._shared: ServerConnections | None = None
        address = make_url(url)
        is_file = address.drivername == "sqlite"
        try:
            if is_file:
                _check_ours(url)
                arguments: dict[str, Any] = {"connect_args": {"timeout": SQLITE_SECONDS}}
            else:
                # These connections only create the tables.
                arguments = {"poolclass": sa.NullPool, "connect_args": NO_PREPARED_STATEMENTS}
            with experimental():
                super().__init__(url, arguments, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS)
        except (sa.exc.SQLAlchemyError, RuntimeError) as error:
            raise ConfigError(f"--storage: {str(getattr(error, 'orig', error)).strip()}") from error
        self.engine.dispose()  # Optuna has made connections already; new ones are as we want them
        if is_file:
            sa.event.listen(self.engine, "connect", _set_up_sqlite)
        else:
            self._shared = ServerConnections.lend(url)
            self.engine = self._shared.engine
            self.scoped_session = orm.scoped_session(orm.sessionmaker(bind=self.engine))

    def close(self) -> None:
        """Give back the connections."""
        self.remove_session()
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.give_back()
        elif self.engine.dialect.name == "sqlite":
            self.engine.dispose()

    def _get_trials(
        self, study_id: int, states: Any, included_trial_ids: set[int], trial_id_greater_than: int
    ) -> list[FrozenTrial]:
        """What Optuna's cache of a study lacks: the trials after an id, and those of these ids. Raises KeyError.

        Optuna's own method does the same, and takes several times as long.
        """

        def read() -> list[FrozenTrial]:
            with self.engine.connect() as connection:
                return read_trials(connection, study_id, trial_id_greater_than, included_trial_ids)

        trials = while_away(read)
        if not trials:
            self.get_study_name_from_id(study_id)
        return [trial for trial in trials if states is None or trial.state in states]

    @contextmanager
    def locked(self, study_name: str) -> Iterator[Connection]:
        """A transaction that holds the lock of a study."""
        with locked_transaction(self.engine, study_name) as connection:
            yield connection


def _patient(name: str) -> Any:
    """The method of Optuna's storage with this name, which is called again while the server does not answer."""
    method = getattr(RDBStorage, name)

    @functools.wraps(method)
    def patient(self: StudyStorage, *arguments: Any, **named: Any) -> Any:
        return while_away(lambda: method(self, *arguments, **named))

    return patient


def while_away(action: Callable[[], Any]) -> Any:
    """The result of the action, which is repeated while the server of the storage does not answer.

    Raises what the action raised last, after OUTAGE_SECONDS. A busy SQLite file is not repeated: SQLite has waited.
    """
    begun, pause = time.monotonic(), 0.5
    while True:
        try:
            return action()
        except (optuna.exceptions.StorageInternalError, sa.exc.SQLAlchemyError, ConfigError) as error:
            if not _is_away(error) or time.monotonic() - begun > OUTAGE_SECONDS:
                raise
            log.warning("the database of the study does not answer: it is asked again in %.1f s", pause)
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def _is_away(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a server cannot be reached now."""
    while error is not None:
        if isinstance(error, sa.exc.OperationalError) and not isinstance(error.orig, sqlite3.Error):
            return True
        error = error.__cause__ or error.__context__
    return False


for _name in (
    *("get_trial", "set_trial_user_attr", "set_trial_system_attr", "set_trial_param"),
    *("set_trial_intermediate_value", "set_trial_state_values", "set_study_user_attr", "get_study_user_attrs"),
):
    setattr(StudyStorage, _name, _patient(_name))


def _check_ours(url: str) -> None:
    """Raise ConfigError if the file is the database of another program."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        foreign = foreign_table(connection)
    if foreign is not None:
        raise ConfigError(
            f"--storage: {make_url(url).database} belongs to another program (it has a table {foreign!r}); it was left "
            "alone. Give another name."
        )


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    """Set up a new connection.

    With synchronous=NORMAL a power failure may cost the last writes, but it never damages the file.
    """
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


@contextmanager
def lock_of_study(url: str, study_name: str) -> Iterator[None]:
    """Hold the lock of a study, also one that does not exist yet."""
    address = make_url(url)
    if address.drivername == "sqlite":
        with file_lock(address):
            yield
        return
    shared = ServerConnections.lend(url)
    try:
        with locked_transaction(shared.engine, study_name):
            yield
    finally:
        shared.give_back()


def study_names(url: str) -> list[str]:
    """The studies in a storage, which has to exist. Raises ConfigError."""
    address = make_url(url)
    if address.drivername == "sqlite" and not Path(address.database or "").is_file():
        raise ConfigError(f"--storage: there is no file {address.database}")
    with closing(StudyStorage(url)) as storage:
        return sorted(optuna.get_all_study_names(storage))


def study_attributes(url: str, study_name: str) -> dict[str, Any]:
    """What commands have stored with a study. Raises ConfigError."""
    with closing(StudyStorage(url)) as storage:
        return storage.get_study_user_attrs(storage.get_study_id_from_name(study_name))
