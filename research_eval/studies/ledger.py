"""Claims: short transactions on the tables of Optuna, under the lock of a study.

Optuna has no call that claims a trial: its own calls for this take nineteen queries, while all other workers wait. Only
`adapter` and its helpers know Optuna's tables and private attributes.
"""

from __future__ import annotations

import json
import random
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import filelock
import sqlalchemy as sa
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy.engine import URL, Connection

LOCK_SECONDS = 120  # longest wait for another process that holds the lock of a study in a SQLite file
TURN_MILLISECONDS = 50  # how long a transaction on a server waits for the lock
LOCK_NOT_AVAILABLE = "55P03"  # of PostgreSQL: it waited as long as lock_timeout says

_trials, _beats = models.TrialModel.__table__, models.TrialHeartbeatModel.__table__
_attributes = models.TrialUserAttributeModel.__table__


@contextmanager
def locked_transaction(engine: sa.Engine, study_name: str) -> Iterator[Connection]:
    """A transaction of a process that holds the lock of a study. One process at a time does, on any machine.

    On a server the transaction itself holds the lock, and a process that dies releases it. A process that waits for it
    gives its connection back from time to time: behind a pooler the one that holds the lock may need this connection.
    """
    if engine.dialect.name == "sqlite":
        with file_lock(engine.url), engine.begin() as connection:
            yield connection
        return
    while True:
        with engine.connect() as connection:
            transaction = connection.begin()
            if _has_lock(connection, zlib.crc32(study_name.encode())):
                with transaction:
                    yield connection
                return
        time.sleep(random.uniform(0.05, 0.5))  # noqa: S311 - the others shall not come at the same moment


def file_lock(url: URL) -> filelock.BaseFileLock:
    """The lock of the studies in a SQLite file."""
    return filelock.FileLock(f"{url.database}.study.lock", timeout=LOCK_SECONDS)


def _has_lock(connection: Connection, key: int) -> bool:
    """Whether the transaction holds the lock, after some waiting. If not, it can do nothing more."""
    wait = f"SET LOCAL lock_timeout = {TURN_MILLISECONDS}; SELECT pg_advisory_xact_lock({key})"
    try:
        connection.exec_driver_sql(f"{wait}; SET LOCAL lock_timeout TO DEFAULT")
    except sa.exc.OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
            raise
        return False
    return True


@dataclass(frozen=True)
class Claim:
    """A running trial: its worker (None: nobody at the moment), and how many workers have begun it."""

    trial_id: int
    worker: str | None
    attempts: int
    is_stale: bool  # its worker has sent no heartbeat for a while


class Ledger:
    """What workers claim in a study, in one transaction. The caller holds the lock of the study."""

    def __init__(self, connection: Connection, study_id: int, grace_seconds: float) -> None:
        self._connection, self._study_id = connection, study_id
        self._grace = timedelta(seconds=grace_seconds)
        # The time of the server, whose clock all workers share. now() would be the time before the wait for the lock.
        self._now: sa.ColumnElement[datetime] = sa.type_coerce(sa.func.current_timestamp(), sa.DateTime())
        if connection.dialect.name == "postgresql":
            self._now = sa.cast(sa.func.clock_timestamp(), sa.DateTime())

    def running(self) -> list[Claim]:
        """The running trials, by number."""
        worker, attempts = _attributes.alias(), _attributes.alias()
        query = (
            sa.select(
                _trials.c.trial_id,
                worker.c.value_json,
                attempts.c.value_json,
                _beats.c.heartbeat,
                self._now,
            )
            .outerjoin_from(_trials, _beats, _beats.c.trial_id == _trials.c.trial_id)
            .outerjoin(worker, (worker.c.trial_id == _trials.c.trial_id) & (worker.c.key == "worker"))
            .outerjoin(attempts, (attempts.c.trial_id == _trials.c.trial_id) & (attempts.c.key == "attempts"))
            .where(_trials.c.study_id == self._study_id, _trials.c.state == TrialState.RUNNING)
            .order_by(_trials.c.number)
        )
        return [
            Claim(
                trial_id,
                None if name is None else json.loads(name),
                1 if begun is None else json.loads(begun),
                beat is not None and now - beat > self._grace,
            )
            for trial_id, name, begun, beat, now in self._connection.execute(query)
        ]

    def counted(self) -> tuple[int, int | None]:
        """How many trials the budget counts (all but past runs that teach the sampler), and the first waiting one."""
        past = _attributes.alias()
        query = (
            sa.select(
                sa.func.count(),
                sa.func.min(sa.case((_trials.c.state == TrialState.WAITING, _trials.c.trial_id))),
            )
            .select_from(_trials)
            .outerjoin(past, (past.c.trial_id == _trials.c.trial_id) & (past.c.key == "warm_start"))
            .where(_trials.c.study_id == self._study_id, past.c.trial_id.is_(None))
        )
        count, waiting = self._connection.execute(query).one()
        return count, waiting

    def create(self) -> int:
        """A new running trial."""
        number = sa.select(sa.func.count()).select_from(_trials).where(_trials.c.study_id == self._study_id)
        values = {
            "study_id": self._study_id,
            "number": number.scalar_subquery(),
            "state": TrialState.RUNNING,
            "datetime_start": _utc_now(),
        }
        created = sa.insert(_trials).values(values).returning(_trials.c.trial_id)
        trial_id: int = self._connection.execute(created).scalar_one()
        return trial_id

    def start(self, trial_id: int) -> None:
        """Turn a waiting trial into a running one."""
        changed = {"state": TrialState.RUNNING, "datetime_start": _utc_now()}
        self._connection.execute(sa.update(_trials).where(_trials.c.trial_id == trial_id).values(changed))

    def assign(self, trial_id: int, worker: str | None, attempts: int) -> None:
        """Enter the worker of a running trial, with a heartbeat if there is one."""
        self._set_attributes(trial_id, {"attempts": attempts, "worker": worker})
        if worker is None:
            return
        beat = {"heartbeat": self._now}
        found = self._connection.execute(sa.update(_beats).where(_beats.c.trial_id == trial_id).values(beat))
        if not found.rowcount:
            self._connection.execute(sa.insert(_beats).values(trial_id=trial_id, **beat))

    def _set_attributes(self, trial_id: int, values: dict[str, Any]) -> None:
        named = (_attributes.c.trial_id == trial_id) & _attributes.c.key.in_(list(values))
        self._connection.execute(sa.delete(_attributes).where(named))
        rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in values.items()]
        self._connection.execute(sa.insert(_attributes).values(rows))


def _utc_now() -> datetime:
    """The time as Optuna stores it: UTC, without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)
