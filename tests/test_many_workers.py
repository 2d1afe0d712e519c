"""Many workers on one PostgreSQL server: no trial is lost, none is done twice, and nobody takes many connections.

The workers are processes that train nothing, so that what they do with the database is most of their time. With
GOE_REPETITIONS=20 there are more repetitions, more trials and a longer outage.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState
from support import stop_at_once
from test_study import TINY, study_options_of

from research_eval.db_utils import DB_FILE, Store
from research_eval.runs.folder import new_id
from research_eval.store.connection import ServerConnections, StoreUnavailable, database_url
from research_eval.studies import adapter, storage, workers
from research_eval.studies.adapter import StoredTrial
from research_eval.studies.options import StudyOptions
from research_eval.studies.queue import TrialQueue
from research_eval.studies.storage import StudyStorage, while_away
from research_eval.studies.trials import Outcome
from research_eval.studies.workers import new_worker_name, work

FORK = multiprocessing.get_context("fork")  # a forked worker has the program, and what a test has changed of it
REPETITIONS = int(os.environ.get("GOE_REPETITIONS", "2"))
MANY, OUTAGE_SECONDS = (64, 1.0) if REPETITIONS <= 2 else (200, 20.0)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("space.json").write_text(json.dumps(TINY))


def pretend_to_train(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Trials take this long, and leave one row in the results store. The score follows from the number of the trial."""

    def train(trial: StoredTrial, options: StudyOptions) -> Outcome:
        trial.set_attribute("trained_by", [*trial.attributes.get("trained_by", []), os.getpid()])
        # The writer of a run keeps such a row in a file.
        with suppress(StoreUnavailable), while_away(lambda: Store(options.db)) as store:
            store.start_experiment(
                experiment_id=new_id(), run_type="tune", experiment_name=str(trial.number), model_type="lstm",
                dataset_name="parity", dataset_type="synthetic", epochs=1, batch_size=1, seed=0, config={},
                environment={},
            )  # fmt: skip
        trial.report(1, trial.number / 7)
        time.sleep(seconds)
        return Outcome("finished", (trial.number / 7,))

    monkeypatch.setattr(workers, "train_trial", train)


def options_on(url: str, n_trials: int) -> StudyOptions:
    more = ("--storage", url, "--db", url, "--model_types", "lstm", "--sampler", "random")
    return study_options_of(*more, n_trials=n_trials, epochs=1)


def worker_process(options: StudyOptions) -> None:
    os.setpgid(0, 0)
    raise SystemExit(work(TrialQueue(options), new_worker_name()))


@contextmanager
def working(options: StudyOptions, count: int) -> Iterator[list[Any]]:
    """So many workers in processes of their own."""
    TrialQueue(options).close()  # the study and the tables exist before they begin
    Store(options.db).close()
    processes = [FORK.Process(target=worker_process, args=(options,)) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def ended(processes: list[Any], seconds: float = 120.0) -> list[int | None]:
    """The exit codes of the workers, after they had this time at most."""
    limit = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
    return [process.exitcode for process in processes]


def trials_at(url: str) -> list[FrozenTrial]:
    with closing(StudyStorage(database_url(url))) as opened:
        (study,) = opened.get_all_studies()
        return sorted(opened.get_all_trials(study._study_id), key=lambda trial: trial.number)


def assert_whole(url: str, n_trials: int) -> list[FrozenTrial]:
    """Every trial is complete, with the score that its number gives."""
    trials = trials_at(url)
    assert [trial.number for trial in trials] == list(range(n_trials))
    assert Counter(trial.state for trial in trials) == {TrialState.COMPLETE: n_trials}
    assert [trial.value for trial in trials] == [number / 7 for number in range(n_trials)]
    return trials


def connections(url: str) -> dict[str, int]:
    """How many connections each client has to the database, without the one that asks."""
    engine = sa.create_engine(database_url(url), poolclass=sa.NullPool)
    query = "SELECT application_name, count(*) FROM pg_stat_activity WHERE datname = current_database() GROUP BY 1"
    with engine.connect() as connection:
        found = dict(connection.exec_driver_sql(query).all())
    return {name: count for name, count in found.items() if name.startswith("worker")}


def named_by_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process tells the server who it is."""
    lend = ServerConnections.lend.__func__  # type: ignore[attr-defined]

    def named(cls: type[ServerConnections], url: str) -> ServerConnections:
        shared: ServerConnections = lend(cls, url)
        if shared._users == 1:

            @sa.event.listens_for(shared.engine, "connect")
            def say(connection: Any, _: Any) -> None:
                connection.execute(f"SET application_name = 'worker {os.getpid()}'")
                connection.commit()

        return shared

    monkeypatch.setattr(ServerConnections, "lend", classmethod(named))


def test_eight_workers_lose_nothing_and_hold_two_connections_each(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_to_train(monkeypatch, 0.02)
    named_by_process(monkeypatch)
    monkeypatch.setattr(storage, "HEARTBEAT_SECONDS", 0.05)  # beside the other calls
    most: Counter[str] = Counter()
    with working(options_on(server_url, MANY), 8) as processes:
        while any(process.is_alive() for process in processes):
            for name, count in connections(server_url).items():
                most[name] = max(most[name], count)
            time.sleep(0.1)
        assert ended(processes) == [0] * 8
    trials = assert_whole(server_url, MANY)
    assert all(len(trial.user_attrs["trained_by"]) == 1 for trial in trials)
    assert len({trial.user_attrs["trained_by"][0] for trial in trials}) == 8
    with Store(server_url) as store:
        assert sorted(int(row["experiment_name"]) for row in store.find_runs()) == list(range(MANY))
    assert len(most) == 8 and max(most.values()) <= 2, most


@pytest.fixture(name="pooled_url")
def _pooled_url(server_url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database behind PgBouncer, in transaction mode with four connections to the server."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    direct = sa.make_url(server_url)
    with tempfile.TemporaryDirectory(prefix="pgb") as name:  # a short path: a socket lies in it
        folder = Path(name)
        folder.chmod(0o777)  # PgBouncer gives up the rights of root
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={direct.query['host']} user={direct.username}\n"
            f"[pgbouncer]\nlisten_port = 6543\nunix_socket_dir = {folder}\nauth_type = any\npool_mode = transaction\n"
            "default_pool_size = 4\n"
        )
        user = ["-u", Path(str(direct.query["host"])).owner()] if os.getuid() == 0 else []
        with subprocess.Popen([program, "-q", *user, folder / "pgbouncer.ini"], stderr=subprocess.DEVNULL) as pooler:
            wait_for((folder / ".s.PGSQL.6543").exists)
            yield direct.set(port=6543, query={"host": name}).render_as_string(hide_password=False)
            pooler.terminate()


def test_workers_that_share_a_pooler_lose_nothing(pooled_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each transaction may have another session of the server, so nothing may be left in a session."""
    pretend_to_train(monkeypatch, 0.02)
    monkeypatch.setattr(storage, "HEARTBEAT_SECONDS", 0.05)
    with working(options_on(pooled_url, MANY), 8) as processes:
        assert ended(processes) == [0] * 8
    assert_whole(pooled_url, MANY)
    with Store(pooled_url) as store:
        assert sorted(int(row["experiment_name"]) for row in store.find_runs()) == list(range(MANY))


@pytest.mark.parametrize("repetition", range(REPETITIONS))
def test_a_worker_that_is_killed_costs_one_more_attempt(
    server_url: str, monkeypatch: pytest.MonkeyPatch, repetition: int
) -> None:
    pretend_to_train(monkeypatch, 0.1)
    monkeypatch.setattr(storage, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(storage, "GRACE_SECONDS", 4.0)
    with working(options_on(server_url, 20), 4) as processes:
        wait_for(lambda: num_done(server_url) >= 3)
        time.sleep(random.Random(repetition).uniform(0.0, 0.1))
        for process in processes[:2]:
            os.killpg(process.pid, signal.SIGKILL)
        codes = ended(processes)
    assert codes == [-signal.SIGKILL] * 2 + [0] * 2
    trials = assert_whole(server_url, 20)
    again = [trial for trial in trials if trial.user_attrs["attempts"] > 1]
    assert len(again) <= 2 and all(trial.user_attrs["attempts"] == 2 for trial in again)
    assert all(len(trial.user_attrs["trained_by"]) <= trial.user_attrs["attempts"] for trial in trials)


def test_a_server_that_is_started_again_loses_nothing(
    postgresql_server: Any, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_to_train(monkeypatch, 0.05)
    monkeypatch.setattr(storage, "HEARTBEAT_SECONDS", 0.5)
    options = options_on(server_url, 40)
    with working(options, 4) as processes:
        wait_for(lambda: num_done(server_url) >= 5)
        stop_at_once(postgresql_server)
        time.sleep(OUTAGE_SECONDS)
        assert all(process.is_alive() for process in processes)
        postgresql_server.ensure_postgres_running()
        assert ended(processes) == [0] * 4
    assert_whole(server_url, 40)


def test_a_worker_that_cannot_reach_the_server_stops_its_run(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(adapter, "LOST_SECONDS", 0.3)
    queue = TrialQueue(options_on(server_url, 1))
    trial = queue.claim("first")
    assert trial is not None

    def refused(_: Any) -> None:
        raise optuna.exceptions.StorageInternalError("no answer")

    lost = threading.Event()
    with queue.heartbeat(trial, lost.set):
        time.sleep(0.6)
        assert not lost.is_set()
        monkeypatch.setattr(queue.stored, "beat", refused)
        assert lost.wait(5.0)
    queue.close()


def test_a_claim_whose_answer_was_lost_is_not_a_second_trial(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server commits, and the connection breaks before it says so."""
    queue = TrialQueue(options_on(server_url, 5))
    ledger, broken = queue.stored.ledger, []

    @contextmanager
    def breaking() -> Iterator[Any]:
        with ledger() as opened:
            yield opened
        if not broken:
            broken.append(True)
            raise sa.exc.OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))

    monkeypatch.setattr(queue.stored, "ledger", breaking)
    trial = queue.claim("first")
    assert broken and trial is not None and trial.number == 0
    assert len(queue.own_trials()) == 1
    queue.close()


def test_only_a_server_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    calls: list[int] = []

    def fails(*errors: BaseException) -> Callable[[], int]:
        def action() -> int:
            calls.append(len(calls))
            if len(calls) > len(errors):
                return 7
            try:
                try:
                    raise errors[len(calls) - 1]
                except sa.exc.SQLAlchemyError:  # Optuna tries another query in the same transaction
                    raise sa.exc.PendingRollbackError("roll back first")  # noqa: B904
            except sa.exc.SQLAlchemyError as error:
                raise optuna.exceptions.StorageInternalError("no") from error

        return action

    away = sa.exc.OperationalError("SELECT", {}, Exception("server closed the connection"))
    assert while_away(fails(away, away)) == 7
    for error in (
        sa.exc.OperationalError("SELECT", {}, sqlite3.OperationalError("database is locked")),
        sa.exc.IntegrityError("INSERT", {}, Exception("doubled")),
    ):
        calls.clear()
        with pytest.raises(optuna.exceptions.StorageInternalError):
            while_away(fails(error))
        assert calls == [0]


def test_connections_are_shared_and_closed(server_url: str) -> None:
    options = options_on(server_url, 1)
    with Store(server_url) as first, Store(server_url, read_only=True) as second:
        queue = TrialQueue(options)
        assert first._engine.pool is queue.stored._storage.engine.pool
        assert second.find_runs() == []
        with pytest.raises(sa.exc.DBAPIError, match="read-only"), second._engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM experiments")
        queue.close()
        assert first.find_runs() == []
    assert not ServerConnections._lent
    assert not Path(DB_FILE).exists()


def num_done(url: str) -> int:
    """How many trials have ended. It reads the tables themselves: Optuna would create those that are not there yet."""
    engine = sa.create_engine(database_url(url), poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            query = "SELECT count(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED', 'FAIL')"
            return int(connection.exec_driver_sql(query).scalar_one())
    except sa.exc.DBAPIError:
        return 0


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.2)
