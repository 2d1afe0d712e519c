"""The store against dictionaries: whatever is done in whatever order, both hold the same."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from research_eval.db_utils import COMPARISONS, STATUSES, HistoryRow, RunFilter, Store, database_url, metadata
from research_eval.errors import ConfigError, Superseded
from research_eval.store.merge import merge

NAMES = ["f1", "loss", "é'\"%"]
IDS = [f"run-{number}" for number in range(6)]
DATASETS = ["parity", "addition"]
sides = st.sampled_from("ab")
ids = st.sampled_from(IDS)
# SQLite keeps no sign of zero: https://sqlite.org/floatingpoint.html
numbers = (st.floats(-5, 5) | st.sampled_from([math.nan, math.inf, -math.inf, 0.5, 1.0])).map(lambda value: value + 0.0)
metrics = st.dictionaries(st.sampled_from(NAMES), numbers | st.lists(st.floats(0, 1), max_size=2) | st.just("text"))
points = st.lists(
    st.builds(HistoryRow, st.integers(0, 5), st.floats(0, 3), st.sampled_from(NAMES), numbers), max_size=5
)


@dataclass
class Run:
    """What the store should hold of a run; `life` counts its writes."""

    dataset: str
    seed: int
    status: str = "running"
    error: str | None = None
    life: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    history: dict[tuple[int, str], tuple[float, float]] = field(default_factory=dict)

    def state(self) -> str:
        """As text, in which NaN equals NaN."""
        rows = [(step, epoch, name, value) for (step, name), (epoch, value) in sorted(self.history.items())]
        return repr((self.dataset, self.seed, self.status, self.error, self.metrics, rows))


class StoreMachine(RuleBasedStateMachine):
    """Two stores, of which one is merged into the other now and then."""

    new_database: Any  # () -> the name of one that is empty

    @initialize()
    def begin(self) -> None:
        self.names = {side: self.new_database() for side in "ab"}
        self.stores = {side: Store(name) for side, name in self.names.items()}
        self.model: dict[str, dict[str, Run]] = {"a": {}, "b": {}}
        self.time = 0

    def teardown(self) -> None:
        for store in getattr(self, "stores", {}).values():
            store.close()

    def touch(self, side: str, key: str) -> Run | None:
        """The run as it is written now; None, and the store has to complain, where there is none."""
        self.time += 1
        run = self.model[side].get(key)
        if run is not None:
            run.life = self.time
        return run

    @contextlib.contextmanager
    def complains(self, run: Run | None) -> Iterator[None]:
        if run is not None:
            yield
            return
        with pytest.raises(ConfigError, match="no experiment"):
            yield

    @rule(side=sides, key=ids, dataset=st.sampled_from(DATASETS), seed=st.integers(0, 2))
    def start(self, side: str, key: str, dataset: str, seed: int) -> None:
        known = key in self.model[side]
        with pytest.raises(sa.exc.IntegrityError) if known else contextlib.nullcontext():
            self.stores[side].start_experiment(
                experiment_id=key,
                run_type="json",
                experiment_name="a name",
                model_type="dense",
                dataset_name=dataset,
                dataset_type="synthetic",
                epochs=1,
                batch_size=1,
                seed=seed,
                config={"seed": seed},
                environment={},
            )
        if not known:
            self.time += 1
            self.model[side][key] = Run(dataset, seed, life=self.time)

    @rule(side=sides, key=ids, rows=points)
    def add_history(self, side: str, key: str, rows: list[HistoryRow]) -> None:
        run = self.touch(side, key)
        with self.complains(run):
            self.stores[side].add_history(key, rows)
        if run is not None:
            run.history |= {(row.step, row.name): (row.epoch, row.value) for row in rows}

    @rule(side=sides, key=ids, step=st.integers(-1, 5))
    def truncate(self, side: str, key: str, step: int) -> None:
        run = self.touch(side, key)
        with self.complains(run):
            self.stores[side].truncate_history(key, after_step=step)
        if run is not None:
            run.history = {point: value for point, value in run.history.items() if point[0] <= step}

    @rule(side=sides, key=ids, found=metrics)
    def finish(self, side: str, key: str, found: dict[str, Any]) -> None:
        run = self.touch(side, key)
        with self.complains(run):
            self.stores[side].finish_experiment(key, found)
        if run is not None:
            run.status, run.error, run.metrics = "finished", None, found

    @rule(side=sides, key=ids, status=st.sampled_from(STATUSES), error=st.none() | st.just("out of memory"))
    def set_status(self, side: str, key: str, status: str, error: str | None) -> None:
        known = self.model[side].get(key)
        if known is not None and known.status == "finished" != status:
            with pytest.raises(Superseded):
                self.stores[side].set_status(key, status, error)
            return
        run = self.touch(side, key)
        with self.complains(run):
            self.stores[side].set_status(key, status, error)
        if run is not None:
            run.status, run.error = status, error

    @rule(side=sides)
    def reopen(self, side: str) -> None:
        self.stores[side].close()
        self.stores[side] = Store(self.names[side])

    @precondition(lambda self: any(self.model.values()))
    @rule(side=sides)
    def merge(self, side: str) -> None:
        """Into `side`: the later state of a run wins, finished before unfinished."""
        other = "b" if side == "a" else "a"
        report = merge(self.names[other], self.names[side])
        conflicts = []
        for key, theirs in self.model[other].items():
            ours = self.model[side].get(key)
            ends = (ours is not None and ours.status == "finished", theirs.status == "finished")
            if ours is None or (ends[1] and not ends[0]) or (ends == (False, False) and theirs.life > ours.life):
                self.model[side][key] = Run(**{**vars(theirs), "history": dict(theirs.history)})
            elif ends == (True, True) and (ours.state(), ours.life) != (theirs.state(), theirs.life):
                conflicts.append(key)
        assert set(report.conflicts) <= set(conflicts)

    @rule(
        side=sides,
        dataset=st.none() | st.sampled_from(DATASETS),
        status=st.none() | st.sampled_from(STATUSES),
        where=st.none() | st.tuples(st.sampled_from(NAMES), st.sampled_from(list(COMPARISONS)), st.floats(-5, 5)),
        sort=st.sampled_from(["experiment_id", "seed", "dataset_name", *NAMES]),
        descending=st.booleans(),
        limit=st.none() | st.integers(1, 4),
    )
    def find(
        self, side: str, sort: str, descending: bool, limit: int | None, where: Any, **columns: str | None
    ) -> None:
        wanted = RunFilter(columns["dataset"], status=columns["status"], where=(where,) if where else ())
        found = self.stores[side].find_runs(wanted, sort=sort, descending=descending, limit=limit)

        def number(run: Run, name: str) -> float | None:
            value = run.metrics.get(name)
            return value if isinstance(value, float) and not math.isnan(value) else None

        fitting = {}
        for key, run in sorted(self.model[side].items()):
            fits = all(value in (None, getattr(run, name)) for name, value in columns.items())
            if fits and where:
                value = number(run, where[0])
                fits = value is not None and bool(COMPARISONS[where[1]](value, where[2]))
            if fits:
                own = {"experiment_id": key, "seed": run.seed, "dataset_name": run.dataset}
                fitting[key] = own[sort] if sort in own else number(run, sort)
        some = sorted((key for key in fitting if fitting[key] is not None), key=fitting.__getitem__, reverse=descending)
        if descending:  # equal ones are in the order of their ids all the same
            some = sorted(sorted(some), key=fitting.__getitem__, reverse=True)
        expected = [*some, *(key for key in fitting if fitting[key] is None)][:limit]
        assert [row["experiment_id"] for row in found] == expected
        if limit is None:
            assert self.stores[side].count_runs(wanted) == len(expected)

    @invariant()
    def both_hold_the_same(self) -> None:
        if not hasattr(self, "stores"):
            return
        for side, store in self.stores.items():
            records = store.records(IDS)
            assert records.keys() == self.model[side].keys()
            for key, record in records.items():
                row = record.experiment
                history = {(point.step, point.name): (point.epoch, point.value) for point in record.history}
                assert len(history) == len(record.history)
                held = Run(row["dataset_name"], row["seed"], row["status"], row["error"], 0, record.metrics, history)
                assert held.state() == self.model[side][key].state()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_store_holds_what_dictionaries_hold(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # no folders of runs: a run that has just written is at work
    counter = itertools.count()
    with contextlib.ExitStack() as stack:
        if kind == "sqlite":
            Store("empty.db").close()

            def new_database() -> str:
                return shutil.copy("empty.db", f"{next(counter)}.db")
        else:
            server = request.getfixturevalue("postgresql_server")
            engines = []
            for number in range(2):
                admin = sa.create_engine(database_url(server.get_uri()), isolation_level="AUTOCOMMIT")
                with admin.connect() as connection:
                    connection.exec_driver_sql(f"CREATE DATABASE machine{number}")
                admin.dispose()
                uri = server.get_uri(database=f"machine{number}")
                Store(uri).close()
                engines.append((uri, sa.create_engine(database_url(uri))))
                stack.callback(engines[-1][1].dispose)

            def new_database() -> str:
                uri, engine = engines[next(counter) % 2]
                with engine.begin() as connection:
                    connection.exec_driver_sql(f"TRUNCATE {', '.join(metadata.tables)}")
                return uri

        machine = type("Machine", (StoreMachine,), {"new_database": staticmethod(new_database)})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=25 if kind == "sqlite" else 5,
                stateful_step_count=20,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
