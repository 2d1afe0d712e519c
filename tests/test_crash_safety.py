"""Nothing is lost: not by kill -9 at any point, not by a disk that fails, not by a database that is away."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
import torch
from support import command, history, repeatable, results, run_in, small_config, write_config

from research_eval import db_utils
from research_eval.db_utils import DB_FILE, HistoryRow, RunFilter, Store, append_csv
from research_eval.experiment import Journal, Result, claimed_folder
from research_eval.main import cli, main
from research_eval.schema import ExperimentConfig
from research_eval.store import connection, pending
from research_eval.store.csv_file import CSV_FILE
from research_eval.store.pending import PENDING_FOLDER
from research_eval.training.checkpoint import checkpoint_exists, delete_checkpoint, load_checkpoint, save_checkpoint
from research_eval.training.fit import CHECKPOINT_FILE

CHANGES: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 40,  # two steps per epoch
    "model_params": {"num_layers": 1, "dropout": 0.2},
    "training_params": {"checkpoint_every": 1, "log_every": 1, "test": True},
}
CONFIG = small_config(**CHANGES)
SYSTEM_CALLS = ("fsync", "replace", "write")
KINDS = (*SYSTEM_CALLS, "statement", "commit")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["research_eval.experiment", "torch._dynamo", "alembic.command", "pytest"])


# ------------------------------------------------------------------------------------------- faults and their effects


def count_calls(at: Callable[[str, int], None]) -> contextlib.ExitStack:
    """Call `at` with the kind and the number of every call that puts something on the disk, before it is made."""
    numbers = {kind: itertools.count(1) for kind in KINDS}
    undo = contextlib.ExitStack()

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            at(name, next(numbers[name]))
            return original(*arguments, **options)

        setattr(os, name, counted)
        undo.callback(setattr, os, name, original)

    def statement(*_: Any) -> None:
        at("statement", next(numbers["statement"]))

    def commit(*_: Any) -> None:
        at("commit", next(numbers["commit"]))

    for name in SYSTEM_CALLS:
        wrap(name)
    for event, listener in (("after_cursor_execute", statement), ("commit", commit)):
        sa.event.listen(sa.Engine, event, listener)
        undo.callback(sa.event.remove, sa.Engine, event, listener)
    return undo


class Whole(NamedTuple):
    """An uninterrupted run, and how many calls of every kind it made."""

    folder: Path
    result: Result
    calls: dict[str, int]

    def points(self, kind: str, number: int) -> list[int]:
        """The first and the last call of a kind, and some between."""
        last = self.calls[kind]
        middle = random.Random(kind).sample(range(2, last), min(number, max(last - 2, 0)))
        return sorted({1, last, *middle})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    calls = dict.fromkeys(KINDS, 0)
    with count_calls(lambda kind, number: calls.update({kind: number})):
        result = run_in(folder, CONFIG)
    return Whole(folder, result, calls)


def finishes_exactly(folder: Path, whole: Whole, config: ExperimentConfig = CONFIG) -> None:
    """`--resume` ends with the numbers of the uninterrupted run; each of its results is there once."""
    with contextlib.closing(sqlite3.connect(folder / DB_FILE)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    if (folder / "runs").exists():
        with contextlib.chdir(folder), results(folder) as store:
            assert {row["status"] for row in store.experiments()} <= {"interrupted", "failed", "finished"}
    resumed = run_in(folder, config, resume=True)
    assert resumed.status == "finished"
    assert repeatable(stored(folder, resumed)) == repeatable(stored(whole.folder, whole.result))
    assert history(folder, resumed.experiment_id) == history(whole.folder, whole.result.experiment_id)
    with results(folder) as store:
        assert [row["status"] for row in store.experiments()] == ["finished"]
    assert [line["experiment_id"] for line in csv_lines(folder) if line["status"] == "finished"] == [
        resumed.experiment_id
    ]
    assert not (folder / PENDING_FOLDER).exists()
    assert not list(folder.rglob("*.tmp"))


def stored(folder: Path, result: Result) -> dict[str, Any]:
    with results(folder) as store:
        return store.metrics(result.experiment_id)


def csv_lines(folder: Path) -> list[dict[str, str]]:
    with (folder / CSV_FILE).open(newline="") as file:
        lines = list(csv.reader(file))
    assert {len(line) for line in lines} == {len(lines[0])}
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def in_child(target: Callable[..., None], *arguments: Any) -> int:
    """The exit code of a new process; minus the signal that ended it."""
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail("the child hangs")
    assert process.exitcode is not None
    return process.exitcode


def run_and_die(folder: Path, kind: str, number: int) -> None:
    """In a child: the run, and kill -9 at that call."""

    def die(*call: Any) -> None:
        if call == (kind, number):
            os.kill(os.getpid(), signal.SIGKILL)

    count_calls(die)
    run_in(folder, CONFIG)


# ------------------------------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_anywhere_goes_on_exactly(kind: str, whole: Whole, tmp_path: Path) -> None:
    """Inside the writing of checkpoints, weights and journal, inside transactions, and at their commits."""
    for number in whole.points(kind, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert in_child(run_and_die, folder, kind, number) == -signal.SIGKILL, number
        if (folder / DB_FILE).exists():
            finishes_exactly(folder, whole)


def test_a_run_may_be_killed_again_and_again(whole: Whole, tmp_path: Path) -> None:
    """Every attempt writes a checkpoint more."""
    for _ in range(3):
        assert in_child(resume_and_die, tmp_path, 3) == -signal.SIGKILL
    finishes_exactly(tmp_path, whole)


def resume_and_die(folder: Path, number: int) -> None:
    """In a child: go on with the run, and kill -9 before a file gets its name."""
    undo = count_calls(lambda kind, at: os.kill(os.getpid(), signal.SIGKILL) if (kind, at) == ("commit", 4) else None)
    with undo:
        run_in(folder, CONFIG, resume=True)


# ---------------------------------------------------------------------------------------------------- checkpoints


def values_at(path: Path) -> int:
    tensors, values = load_checkpoint(path)
    assert tensors["weights"].tolist() == [values["step"]] * 1000
    return int(values["step"])


def save_step(path: Path, step: int) -> None:
    save_checkpoint(path, {"weights": torch.full((1000,), step)}, {"step": step})


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    changed = {"cut": content[:-100], "empty": b"", "a bit": content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]}
    path.write_bytes(changed[kind])


@pytest.mark.parametrize("kind", ["cut", "empty", "a bit", "missing"])
def test_the_checkpoint_before_takes_the_place_of_a_damaged_one(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / CHECKPOINT_FILE
    assert not checkpoint_exists(path)
    for step in (1, 2, 3):
        save_step(path, step)
        assert values_at(path) == step
    if kind == "missing":  # killed between the two renames
        path.unlink()
    else:
        damage(path, kind)
    assert checkpoint_exists(path)
    assert values_at(path) == 2
    assert ("Going on from the one before" in caplog.text) is (kind != "missing")
    save_step(path, 4)
    assert values_at(path) == 4
    damage(path, "cut")
    assert values_at(path) == 2, "a damaged one has pushed a whole one out"
    delete_checkpoint(path)
    assert not checkpoint_exists(path) and not list(tmp_path.iterdir())


def test_a_write_that_fails_anywhere_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT_FILE
    save_step(path, 1)
    save_step(path, 2)
    seen = set()
    for kind, number in itertools.product(("fsync", "replace"), (1, 2)):

        def fail(*call: Any, wanted: tuple[str, int] = (kind, number)) -> None:
            if call == wanted:
                raise OSError(errno.ENOSPC, "no space left")

        with count_calls(fail), pytest.raises(OSError, match="no space left"):
            save_step(path, 3)
        seen.add(values_at(path))
        assert not list(tmp_path.glob("*.tmp"))
        save_step(path, 2)
    assert seen == {2, 3}, "only the last sync of the folder comes after the rename"


def test_a_run_goes_on_from_the_checkpoint_before(whole: Whole, tmp_path: Path) -> None:
    assert in_child(run_and_die, tmp_path, "commit", whole.calls["commit"] - 4) == -signal.SIGKILL
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.name != PENDING_FOLDER.name)
    newest = load_checkpoint(folder / CHECKPOINT_FILE)[1]["state"]["step"]
    damage(folder / CHECKPOINT_FILE, "a bit")
    assert load_checkpoint(folder / CHECKPOINT_FILE)[1]["state"]["step"] == newest - 1
    finishes_exactly(tmp_path, whole)


# ------------------------------------------------------------------------------------------------ disks that fail


@pytest.mark.parametrize("kind", SYSTEM_CALLS)
def test_a_disk_that_fails_anywhere_costs_nothing(kind: str, whole: Whole, tmp_path: Path) -> None:
    for number in whole.points(kind, 2):
        folder = tmp_path / str(number)
        folder.mkdir()

        def fail(*call: Any, wanted: tuple[str, int] = (kind, number)) -> None:
            if call == wanted:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

        with contextlib.suppress(OSError), count_calls(fail):
            run_in(folder, CONFIG)
        finishes_exactly(folder, whole)


def test_a_full_disk_is_one_message_and_exit_code_1(whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path
    path = write_config(folder, **CHANGES)
    assert in_child(run_on_a_small_disk, folder, path) == 0
    text = (folder / "message").read_text()
    assert text.startswith("1 ") and "Traceback" not in text
    assert f"{CHECKPOINT_FILE}: File too large" in text
    finishes_exactly(tmp_path, whole)


def run_on_a_small_disk(folder: Path, path: Path) -> None:
    """In a child: no file may grow beyond some kB, once the run has begun."""
    report = Journal.train_values

    def reporting(self: Journal, step: int, values: dict[str, float]) -> None:
        report(self, step, values)
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    Journal.train_values = reporting  # type: ignore[method-assign]
    pending.DELAYS = ()
    with contextlib.chdir(folder):
        ended = command(main, "--json_config_path", path, "--db", DB_FILE, "--quiet")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (folder / "message").write_text(f"{ended.code} {ended.err}")


def test_a_csv_line_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    append_csv(path, {"id": "a", "f1": 0.5})
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    for row in ({"id": "b", "f1": 0.25}, {"id": "b", "new": 1}):
        with count_calls(full), pytest.raises(OSError, match="no space left"):
            append_csv(path, row)
        assert path.read_bytes() == before
        assert sorted(file.name for file in tmp_path.iterdir()) == ["runs.csv", "runs.csv.lock"]
    append_csv(path, {"id": "a", "f1": 0.25}, unless_known=("id",))
    assert path.read_bytes() == before
    append_csv(path, {"id": "a", "f1": 0.25}, unless_known=("id", "f1"))
    append_csv(path, {"id": "a", "new": 0.25}, unless_known=("id", "new"))
    assert path.read_text().split() == ["id,f1,new", "a,0.5,", "a,0.25,", "a,,0.25"]


def run_without_rights(folder: Path, path: Path) -> None:
    """In a child: the command, by somebody who may not write here."""
    os.chdir(folder)
    with (folder / "message").open("w") as report:
        if os.getuid() == 0:
            os.setuid(65534)
        ended = command(main, "--json_config_path", path, "--quiet")
        report.write(f"{ended.code} {ended.err}")


@pytest.mark.parametrize("has_results", [False, True])
def test_a_folder_that_cannot_be_written_is_one_message(has_results: bool) -> None:
    with tempfile.TemporaryDirectory() as name:  # not below a folder that only its owner may enter
        folder = Path(name)
        path = write_config(folder)
        if has_results:
            Store(str(folder / DB_FILE)).close()
        (folder / "message").touch()
        before = {file: file.read_bytes() for file in folder.iterdir() if file.name != "message"}
        folder.chmod(0o555)
        assert in_child(run_without_rights, folder, path) == 0
        text = (folder / "message").read_text()
        assert text[:2] in ("1 ", "2 ") and "Traceback" not in text and name in text and len(text.splitlines()) == 1
        assert {file: file.read_bytes() for file in folder.iterdir() if file.name != "message"} == before


# -------------------------------------------------------------------------------------------- a database that is away


class Outage:
    """Somebody holds the database from one step on to another, both as seen by training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, first: int, last: int | None) -> None:
        monkeypatch.setattr(connection, "BUSY_SECONDS", 0.01)
        monkeypatch.setattr(pending, "DELAYS", (0.0, 0.0))
        monkeypatch.setattr(pending, "RETRY_SECONDS", 0.0)
        self._file = folder / DB_FILE
        self._holder: sqlite3.Connection | None = None
        report = Journal.train_values

        def reporting(journal: Journal, step: int, values: dict[str, float]) -> None:
            if step == first:
                self._holder = sqlite3.connect(self._file, isolation_level=None)
                self._holder.execute("BEGIN IMMEDIATE")
            if step == last:
                self.end()
            report(journal, step, values)

        monkeypatch.setattr(Journal, "train_values", reporting)

    def end(self) -> None:
        if self._holder is not None:
            self._holder.close()
        self._holder = None


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "research_eval")


def test_training_goes_on_while_the_database_is_away(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        Outage(patch, tmp_path, first=2, last=5)
        end = run_in(tmp_path, CONFIG)
    assert end.status == "finished"
    assert "database is locked. Training continues; its results wait in runs/.pending/" in caplog.text
    assert "the database answers again" in caplog.text
    finishes_exactly(tmp_path, whole)


def test_results_wait_for_a_database_that_stays_away(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        outage = Outage(patch, tmp_path, first=3, last=None)
        end = run_in(tmp_path, CONFIG)
        waiting = tmp_path / PENDING_FOLDER / f"{end.experiment_id}.jsonl"
        assert (end.status, end.exit_code) == ("finished", 0)
        assert f"The results of run {end.experiment_id} wait in" in caplog.text
        assert waiting.exists() and not (tmp_path / CSV_FILE).exists()
        other = small_config(epochs=1)
        with pytest.raises(OSError, match="database is locked"):
            run_in(tmp_path, other)
        assert waiting.exists()
        outage.end()
    with waiting.open("a") as file:
        file.write('["csv", {"experiment_id": "x", "sta')  # a line that a crash has cut off
    monkeypatch.chdir(tmp_path)
    ended = command(cli, "init-db", "--db", DB_FILE)
    assert ended.code == 0
    assert f"run {end.experiment_id}: its results waited" in ended.err
    assert csv_lines(tmp_path)[0]["experiment_id"] == end.experiment_id
    finishes_exactly(tmp_path, whole)


def test_a_short_outage_leaves_nothing_behind(tmp_path: Path) -> None:
    attempts = iter([db_utils.StoreUnavailable(errno.EIO, "gone", "database x")] * 2)

    def action() -> str:
        for problem in attempts:
            raise problem
        return "done"

    pauses: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", pauses.append)
        assert pending.with_retries(action) == "done"
    assert pauses == list(pending.DELAYS[:2]) and pauses[1] > pauses[0] > 0


@pytest.mark.parametrize(
    "content",
    [
        *("[1, 2", "[]", "7", '["x", 1]', "\xff", "[" * 5000, '["history", [[1]]]', '["metrics", [1]]'),
        *('["status", ["dead"]]', '["status", [["running"], {}]]', '["metrics", {"f1": {}}]\n["csv", 3]'),
    ],
)
def test_what_no_run_has_left_is_left_alone(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    PENDING_FOLDER.mkdir(parents=True)
    for name in ("known", "unknown", "no id!"):
        (PENDING_FOLDER / f"{name}.jsonl").write_bytes(content.encode("latin-1"))
    with Store(DB_FILE) as store:
        start(store, "known")
        merged = pending.merge_pending(store)
    assert (PENDING_FOLDER / "unknown.jsonl").exists() and (PENDING_FOLDER / "no id!.jsonl").exists()
    assert merged == (content == "[1, 2"), "a line that a crash has cut off is no line"
    assert ("known.jsonl: not results of a run" in caplog.text) is not bool(merged)


def start(store: Store, experiment_id: str) -> None:
    known = {"model_type": "dense", "dataset_name": "parity", "dataset_type": "synthetic", "experiment_name": "a"}
    store.start_experiment(
        **known, experiment_id=experiment_id, run_type="json", epochs=1, batch_size=1, seed=0, config={}, environment={}
    )


# ----------------------------------------------------------------------------------------- who is at work, and who not


@pytest.mark.parametrize("jump", [timedelta(0), timedelta(days=400), timedelta(days=-400)])
def test_a_held_folder_tells_whatever_the_clock_says(
    jump: timedelta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose process is gone is interrupted, in every list and for every question."""
    monkeypatch.chdir(tmp_path)
    lock = Path("runs/a/.lock")
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held, Store(DB_FILE) as store:
        start(store, "a")
        with store._write() as connection:
            connection.execute(db_utils.experiments_table.update().values(heartbeat=datetime.now(UTC) + jump))
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert statuses(store) == {"running"}
        assert [run["experiment_id"] for run in store.find_runs(RunFilter(status="running"))] == ["a"]
        fcntl.flock(held, fcntl.LOCK_UN)
        assert statuses(store) == {"interrupted"}
        assert store.find_runs(RunFilter(status="running")) == []
        assert store.count_runs(RunFilter(status="interrupted")) == 1
    assert json.loads(command(cli, "runs", "--json", "--db", DB_FILE).out)["status"] == "interrupted"


def statuses(store: Store) -> set[str | None]:
    rows = [*store.experiments(), store.experiment("a"), store.find_id("a"), *store.find_runs()]
    return {row["status"] for row in rows if row is not None} | {run.status for run in store.runs("parity")}


def test_who_asks_does_not_keep_a_run_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking holds the lock for a moment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    held = FORKS.Event()
    process = FORKS.Process(target=hold_for_a_moment, args=(tmp_path, held))
    process.start()
    assert held.wait(60)
    with claimed_folder("a") as folder:
        assert folder.exists()
    process.join()


def hold_for_a_moment(folder: Path, held: Any) -> None:
    """In a child."""
    (folder / "runs" / "a").mkdir()
    with (folder / "runs" / "a" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held.set()
        time.sleep(0.1)


def test_readers_and_writers_do_not_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BUSY_SECONDS", 0.0)
    with Store(str(tmp_path / DB_FILE)) as store:
        start(store, "a")
        with contextlib.closing(sqlite3.connect(tmp_path / DB_FILE, isolation_level=None, timeout=0)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT status FROM experiments").fetchall() == [("running",)]
            store.add_history("a", [HistoryRow(1, 1.0, "loss", 0.5)])
            store.finish_experiment("a", {"f1": 1.0})
            assert reader.execute("SELECT status FROM experiments").fetchall() == [("running",)]
            reader.execute("COMMIT")
            assert reader.execute("SELECT status FROM experiments").fetchall() == [("finished",)]
