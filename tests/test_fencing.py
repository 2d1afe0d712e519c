"""A process that was taken for dead and wakes up: what another one has done of its run or trial stays as it is."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from optuna.trial import TrialState
from support import history, small_config
from test_study import TINY, fall_silent, study_options_of

from research_eval.db_utils import DB_FILE, HistoryRow, Store
from research_eval.errors import Superseded
from research_eval.experiment import Journal, run
from research_eval.store.pending import RunWriter, merge_pending
from research_eval.store.values import normal_metrics
from research_eval.studies import workers
from research_eval.studies.queue import TrialQueue
from research_eval.studies.trials import LEFT, Outcome, train_trial
from research_eval.studies.workers import work


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("space.json").write_text(json.dumps(TINY))


@pytest.fixture
def store() -> Iterator[Store]:
    """A store with a run that the first process has begun."""
    with Store() as opened:
        opened.start_experiment(
            experiment_id="run", run_type="json", experiment_name="a", model_type="dense", dataset_name="parity",
            dataset_type="synthetic", epochs=1, batch_size=1, seed=0, config={}, environment={},
        )  # fmt: skip
        yield opened


POINT = [HistoryRow(1, 1.0, "val_f1", 0.25)]
LATE: list[Any] = [
    ("history", POINT),
    ("truncate", 0),
    ("metrics", normal_metrics({"x": 2.0})),
    ("status", ["failed", "late"]),
]


@pytest.mark.parametrize("late", LATE, ids=lambda write: write[0])
@pytest.mark.parametrize("waits", [False, True], ids=["direct", "from the file"])
def test_writes_of_an_earlier_attempt_are_refused(store: Store, late: Any, waits: bool) -> None:
    first = RunWriter(store, "run", 1)
    second = RunWriter(store, "run", store.take_over("run"))
    second.write(("history", [HistoryRow(1, 1.0, "val_f1", 0.5)]))
    second.end(("metrics", normal_metrics({"x": 1.0})))
    with pytest.raises(Superseded, match="run run is finished: its results stay as they are"):
        (first.end if waits else first.write)(late)
    assert (store.metrics("run"), store.experiment("run")["status"]) == ({"x": 1.0}, "finished")
    assert history(Path(), "run") == [(1, "val_f1", 0.5)]
    assert merge_pending(store) == 0
    assert not list(Path("runs").glob(".pending/*")), "what is superseded waits for nothing"


def test_an_attempt_that_is_overtaken_while_both_work(store: Store) -> None:
    first, second = RunWriter(store, "run", 1), RunWriter(store, "run", store.take_over("run"))
    with pytest.raises(Superseded, match="run run is continued by another process"):
        first.write(("history", POINT))
    second.write(("history", POINT))
    assert store.take_over("run") == 3
    with pytest.raises(Superseded):
        second.write(("history", POINT))


def test_no_status_replaces_finished(store: Store) -> None:
    store.finish_experiment("run", {"x": 1.0})
    for status in ("failed", "running", "interrupted"):
        with pytest.raises(Superseded):
            store.set_status("run", status)
    with pytest.raises(Superseded):
        store.take_over("run")
    store.set_status("run", "finished")
    assert store.experiment("run")["attempt"] == 1


def test_results_that_wait_are_dropped_if_another_process_has_finished_the_run(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """The file of a process that died, in the form of an earlier version and in the present one."""
    store.finish_experiment("run", {"x": 1.0})
    folder = Path("runs", ".pending")
    for line in (["status", ["failed", "late"]], ["status", ["failed", "late"], 1]):
        folder.mkdir(parents=True)
        (folder / "run.jsonl").write_text(json.dumps(line) + "\n")
        with caplog.at_level(logging.WARNING):
            merge_pending(store)
        assert "its results stay as they are" in caplog.text
        assert store.experiment("run")["status"] == "finished"
        assert not folder.exists()


# ----------------------------------------------------------------------------------------------------------- trials


def awake_after(monkeypatch: pytest.MonkeyPatch, others: Any) -> list[int]:
    """The first process stands still after its first evaluation, while `others` works; returns where it went on."""
    epoch_end, woken = Journal.epoch_end, []

    def slept(self: Journal, step: int, *rest: Any) -> None:
        epoch_end(self, step, *rest)
        if not woken:
            woken.append(step)
            others()

    monkeypatch.setattr(Journal, "epoch_end", slept)
    return woken


@pytest.mark.parametrize("folder", ["another", "the same"])
def test_a_trial_of_a_frozen_worker_is_finished_once(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of runs may be shared: then the frozen process still holds the lock, and the other one waits."""
    storage, db = f"sqlite:///{tmp_path}/optuna.db", str(tmp_path / DB_FILE)
    options = study_options_of("--storage", storage, "--db", db, "--model_types", "lstm", n_trials=2, epochs=3)
    frozen, other = TrialQueue(options), TrialQueue(options)
    before: list[Any] = []

    def work_of_the_other() -> None:
        (tmp_path / "another").mkdir()
        fall_silent(storage)
        with contextlib.chdir(tmp_path / "another" if folder == "another" else tmp_path):
            if folder == "another":
                assert work(other, "other") == 0
            else:  # it leaves the trial to the frozen worker, and does the next one
                claimed = other.claim("other")
                assert claimed is not None
                assert train_trial(claimed, options).status == LEFT
                other.release("other", died=False)
                following = other.claim("other", {claimed.trial_id})
                assert following is not None and following != claimed
                other.finish(following, train_trial(following, options))
        with Store(db) as store:
            before.extend([store.records(list(store.statuses()))])

    woken = awake_after(monkeypatch, work_of_the_other)
    assert work(frozen, "frozen") == 0
    assert woken, "nothing froze"
    trials = load_from(storage)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    with Store(db) as store:
        assert set(store.statuses().values()) == {"finished"}
        assert len(store.statuses()) == 2
        if folder == "another":
            assert str(store.records(list(store.statuses()))) == str(before[0]), "it wrote after waking"


def test_a_worker_does_not_end_a_trial_that_another_one_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = f"sqlite:///{tmp_path}/optuna.db"
    options = study_options_of("--storage", storage, "--db", DB_FILE, "--model_types", "lstm", n_trials=1, epochs=3)
    queue = TrialQueue(options)
    trial = queue.claim("frozen")
    assert trial is not None

    def take_over() -> None:
        with Store() as store:
            (name,) = store.statuses()
            store.take_over(name)

    awake_after(monkeypatch, take_over)
    assert train_trial(trial, options).status == LEFT
    with Store() as store:
        assert list(store.statuses().values()) == ["running"]
    assert [one.state for one in load_from(storage)] == [TrialState.RUNNING]


def test_a_worker_asks_for_a_trial_of_another_one_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says only once that the other one has it."""
    queue = MagicMock()
    trial = SimpleNamespace(trial_id=7, number=0)
    queue.claim.side_effect = lambda _, left: None if left else trial
    pauses: list[float] = []
    queue.options.is_time_up = False
    monkeypatch.setattr(workers, "train_trial", lambda *_: Outcome(LEFT, reason="another process has it"))
    monkeypatch.setattr(workers.JITTER, "uniform", lambda *_: 1.0)
    said = MagicMock()
    monkeypatch.setattr(workers.log, "warning", said)

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        queue.options.is_time_up = len(pauses) == 6

    monkeypatch.setattr(workers.time, "sleep", sleep)
    assert work(queue, "mine") == 0
    assert pauses == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert said.call_count == 1


def load_from(storage: str) -> list[Any]:
    import optuna

    return optuna.load_study(study_name="s", storage=storage).trials


def test_a_resumed_run_that_another_process_finishes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(epochs=3, training_params={"checkpoint_every": 1})

    def finish() -> None:
        with Store() as store:
            (name,) = store.statuses()
            store.take_over(name)
            store.finish_experiment(name, {"final_val_f1": 0.5})

    awake_after(monkeypatch, finish)
    with pytest.raises(Superseded):
        run(config, quiet=True)
    with Store() as store:
        (name,) = store.statuses()
        assert (store.metrics(name), store.experiment(name)["status"]) == ({"final_val_f1": 0.5}, "finished")
