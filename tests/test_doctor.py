"""The doctor finds what is wrong, says so on one line, and repairs without losing anything."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import alembic.command
import alembic.config
import filelock
import pytest
import sqlalchemy as sa
import torch
from support import Ended, command, python, run_in, small_config, stop_at

from research_eval.db_utils import DB_FILE, HistoryRow, Store, back_up, database_url
from research_eval.errors import ConfigError
from research_eval.files import SLICES_FOLDER
from research_eval.main import cli
from research_eval.store import backup, machine_checks
from research_eval.store.migrate import MIGRATIONS
from research_eval.store.pending import PENDING_FOLDER
from research_eval.training.checkpoint import save_slices, save_tensors, slice_name

POINTS = [HistoryRow(step, step / 2, name, step / 3) for step in range(4) for name in ("loss", "é")]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> Iterator[None]:
    with contextlib.chdir(tmp_path):
        yield


def goe_doctor(*arguments: str) -> Ended:
    return command(cli, "doctor", *arguments)


def level(ended: Ended, check: str) -> str:
    """That of the only line of a check."""
    (line,) = [line for line in ended.out.splitlines() if line[10:].startswith(f"{check}: ")]
    return line.split()[0]


def start(store: Store, experiment_id: str) -> Path:
    """A run that is filed as running, with a folder that nobody holds."""
    store.start_experiment(
        experiment_id=experiment_id,
        run_type="json",
        experiment_name="a name",
        model_type="dense",
        dataset_name="parity",
        dataset_type="synthetic",
        epochs=1,
        batch_size=1,
        seed=0,
        config={},
        environment={},
    )
    folder = Path("runs", experiment_id)
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    save_tensors(folder / "model.safetensors", {"a": torch.ones(3)}, {"step": 1})
    return folder


@pytest.fixture
def healthy() -> Path:
    """A finished run, and its folder."""
    with Store() as store:
        folder = start(store, "run-1")
        store.add_history("run-1", POINTS)
        store.finish_experiment("run-1", {"f1": 0.5, "list": [1.0, 2.0]})
    return folder


def raw(query: str, db: str | Path = DB_FILE) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        return connection.execute(query).fetchall()


def contents(db: str | Path = DB_FILE) -> str:
    """All that is in a database, in text."""
    with contextlib.closing(sqlite3.connect(db)) as connection:
        return "\n".join(connection.iterdump())


def backups() -> list[Path]:
    return sorted(Path().glob("*.backup-*"))


def test_a_healthy_folder(healthy: Path) -> None:
    before = contents()
    for repair in ((), ("--repair",)):
        ended = goe_doctor(*repair)
        assert ended.code == 0 and not ended.err
        assert {line.split()[0] for line in ended.out.splitlines()} == {"ok"}
        assert len(ended.out.splitlines()) == 14
    assert contents() == before and not backups()
    assert goe_doctor("--db", "missing.db").code == 0
    assert not Path("missing.db").exists()


def test_it_works_in_an_empty_folder_without_torch_and_leaves_nothing(tmp_path: Path) -> None:
    code = "import sys; from research_eval.main import cli; cli(['doctor', '--repair']); print('torch' in sys.modules)"
    ended = python("-c", code, folder=tmp_path, fresh=True)
    assert ended.out.splitlines()[-1] == "False" and "warning   database: none at" in ended.out
    assert list(tmp_path.iterdir()) == []


def test_a_dead_run_is_filed_as_interrupted_and_one_at_work_is_left_alone(healthy: Path) -> None:
    with Store() as store:
        start(store, "dead")
        alive = start(store, "alive")
    before = contents()
    with filelock.FileLock(alive / ".lock"):
        found = goe_doctor()
        assert found.code == 0 and level(found, "dead runs") == "warning"
        assert "dead runs: dead filed as running" in found.out and contents() == before
        repaired = goe_doctor("--repair")
    assert repaired.code == 0 and "repaired  dead runs: dead filed as interrupted" in repaired.out
    assert raw("SELECT experiment_id, status FROM experiments ORDER BY 1") == [
        ("alive", "running"),
        ("dead", "interrupted"),
        ("run-1", "finished"),
    ]
    (backup,) = backups()
    assert contents(backup) == before and backup.name in repaired.out
    with Store(read_only=True) as store:
        assert store.history("run-1") == POINTS and store.metrics("run-1") == {"f1": 0.5, "list": [1.0, 2.0]}
    with filelock.FileLock(alive / ".lock"):
        assert level(goe_doctor(), "dead runs") == "ok"


def test_a_run_that_is_resumed_in_the_last_moment_is_left_alone(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store() as store:
        folder = start(store, "dead")
    monkeypatch.setattr(Store, "dead_runs", lambda _: ["dead", "run-1"])
    with filelock.FileLock(folder / ".lock"):
        goe_doctor("--repair")
    assert raw("SELECT experiment_id, status FROM experiments ORDER BY 1") == [
        ("dead", "running"),
        ("run-1", "finished"),
    ]


def test_temporary_files_of_dead_writers_are_removed(healthy: Path) -> None:
    with Store() as store:
        alive = start(store, "alive")
    (healthy / "routing").mkdir()
    left = [healthy / "model.safetensors.1.tmp", healthy / "routing" / "epoch.parquet.2.tmp"]
    others = [alive / "model.safetensors.3.tmp", Path("mine.tmp"), healthy / "tmp", healthy / "x.tmp"]
    for path in [*left, *others[:-1]]:
        path.write_text("x")
    others[-1].symlink_to(Path("mine.tmp").absolute())
    with filelock.FileLock(alive / ".lock"):
        assert level(goe_doctor(), "temporary files") == "warning"
        assert "temporary files: 2 removed" in goe_doctor("--repair").out
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_results_that_wait_are_entered(healthy: Path) -> None:
    with Store() as store:
        start(store, "cut")
    lines = [["history", [[1, 0.5, "loss", 0.25]]], ["metrics", {"f1": 0.75}]]
    PENDING_FOLDER.mkdir()
    path = PENDING_FOLDER / "cut.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert level(goe_doctor(), "waiting results") == "warning" and path.exists()
    assert "repaired  waiting results: 1 of 1" in goe_doctor("--repair").out
    with Store(read_only=True) as store:
        assert (store.experiment("cut")["status"], store.metrics("cut")) == ("finished", {"f1": 0.75})
        assert store.history("cut") == [HistoryRow(1, 0.5, "loss", 0.25)]
    assert not path.exists() and len(backups()) == 1


def test_results_of_another_database_go_on_waiting(healthy: Path) -> None:
    PENDING_FOLDER.mkdir()
    (PENDING_FOLDER / "stranger.jsonl").write_text('["metrics", {}]\n')
    ended = goe_doctor("--repair")
    assert level(ended, "waiting results") == "warning" and "stranger are of another database" in ended.out
    assert (PENDING_FOLDER / "stranger.jsonl").exists()


@pytest.mark.parametrize("how", ["byte", "cut", "nothing of ours"])
def test_a_damaged_checkpoint_is_named_and_kept(healthy: Path, how: str) -> None:
    path = healthy / "model.safetensors"
    content = path.read_bytes()
    damaged = {"byte": content[:-1] + b"!", "cut": content[:-1], "nothing of ours": b"text"}[how]
    path.write_bytes(damaged)
    ended = goe_doctor("--repair")
    assert ended.code == 1 and level(ended, "checkpoints") == "problem" and str(path) in ended.out
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("how", ["whole", "damaged", "lost"])
def test_slices_of_several_processes_are_checked(healthy: Path, how: str) -> None:
    path = healthy / "checkpoint.safetensors"
    names = [slice_name(1, number, 2) for number in range(2)]
    (healthy / SLICES_FOLDER).mkdir()
    for number, name in enumerate(names):
        save_slices(path, name, {"w": (torch.ones(3, 2), [0, 3 * number, 6])})
    save_tensors(path, {}, {"slices": names})
    second = healthy / SLICES_FOLDER / names[1]
    if how == "damaged":
        second.write_bytes(second.read_bytes()[:-1] + b"!")
    elif how == "lost":
        second.unlink()
    ended = goe_doctor()
    assert (ended.code, level(ended, "checkpoints")) == ((0, "ok") if how == "whole" else (1, "problem"))
    wanted = {"whole": "4 files", "damaged": f"damaged: {second}", "lost": f"{path} lacks {names[1]}"}[how]
    assert wanted in ended.out


def test_rows_without_folders_and_folders_without_rows(healthy: Path) -> None:
    stranger = Path("runs", "stranger")
    healthy.rename(stranger)
    ended = goe_doctor("--repair")
    assert (ended.code, level(ended, "folders")) == (0, "warning") and "stranger in runs/ have no row" in ended.out
    shutil.rmtree(stranger)
    ended = goe_doctor("--repair")
    assert (ended.code, level(ended, "folders")) == (0, "warning") and "1 of 1 runs have no folder" in ended.out


# --- The database -----------------------------------------------------------------------------------------------------


def make_old(db: str, version: str = "0002") -> None:
    """A database as an earlier program left it, with a finished run."""
    engine = sa.create_engine(database_url(db))
    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, version)
        connection.exec_driver_sql(
            "INSERT INTO experiments (experiment_id, dataset_name, status) VALUES ('a', 'parity', 'finished'), "
            "('b', 'parity', 'finished')"
        )
        history = (
            "INSERT INTO history (experiment_id, name, step, epoch, value) VALUES (:id, :name, :step, :epoch, :value)"
        )
        for experiment_id in "ab":
            values = [{"id": experiment_id, **point._asdict()} for point in POINTS]
            connection.execute(sa.text(history), values)
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def old(request: pytest.FixtureRequest) -> str:
    db = DB_FILE
    if request.param == "postgresql":
        server = request.getfixturevalue("postgresql_server")
        name = f"doctor{os.urandom(4).hex()}"
        engine = sa.create_engine(database_url(server.get_uri()), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        engine.dispose()
        db = server.get_uri(database=name)
    make_old(db)
    return db


def test_an_old_schema_is_a_problem_until_it_is_migrated(old: str) -> None:
    ended = goe_doctor("--db", old)
    assert (ended.code, level(ended, "schema")) == (1, "problem") and "version 0002" in ended.out
    ended = goe_doctor("--db", old, "--repair")
    assert ended.code == 0 and "repaired  schema: migrated from version 0002 to" in ended.out
    with Store(old, read_only=True) as store:
        assert store.history("a") == POINTS == store.history("b")
        assert store.history("a", "é") == [point for point in POINTS if point.name == "é"]
    assert level(goe_doctor("--db", old), "schema") == "ok"
    assert bool(backups()) == (old == DB_FILE)
    if old != DB_FILE:
        assert "backup: none: use pg_dump" in ended.out


def test_every_migration_makes_a_backup_first_and_a_new_database_needs_none() -> None:
    make_old(DB_FILE)
    before = contents()
    Store().close()
    (backup,) = backups()
    assert contents(backup) == before and raw("PRAGMA integrity_check", backup) == [("ok",)]
    assert raw("SELECT version_num FROM goe_schema_version", backup) == [("0002",)]
    Store().close()
    Store("new.db").close()
    assert backups() == [backup]


def test_without_room_for_the_backup_nothing_is_migrated(monkeypatch: pytest.MonkeyPatch) -> None:
    make_old(DB_FILE)
    before = contents()
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1))
        with pytest.raises(OSError, match="no room for a backup"):
            Store()
        ended = goe_doctor("--repair")
    assert ended.code == 1 and "the repair failed" in ended.out
    assert contents() == before and not backups()


def test_a_backup_overwrites_nothing_and_is_of_one_moment(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    before = contents()
    monkeypatch.setattr(backup, "datetime", Clock)
    path = Path(DB_FILE).absolute()
    first = back_up(path)
    with Store() as store:
        store.update_environment("run-1", {"later": True})
    second = back_up(path)
    assert first.name == "experiment_results.backup-20260102-030405.db" and second.name.endswith("030405-2.db")
    assert contents(first) == before != contents(second) == contents()
    assert sorted(name.name for name in Path().iterdir() if ".tmp" in name.name) == []


def test_a_damaged_database_is_left_as_it_is(healthy: Path) -> None:
    raw("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(Path(DB_FILE).read_bytes())
    content[3 * 4096 : 3 * 4096 + 200] = b"\x55" * 200
    Path(DB_FILE).write_bytes(content)
    ended = goe_doctor("--repair")
    assert ended.code == 1 and "Traceback" not in ended.err
    assert any(line.startswith("problem") for line in ended.out.splitlines())
    assert Path(DB_FILE).read_bytes() == content and not backups()


def test_rows_of_deleted_runs_are_found(healthy: Path) -> None:
    raw("DELETE FROM experiments")
    ended = goe_doctor("--repair")
    assert (ended.code, level(ended, "integrity")) == (1, "problem") and "rows belong to no run" in ended.out
    assert raw("SELECT count(*) FROM metrics") == [(2,)] and not backups()


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE goe_schema_version SET version_num = '9999'", "newer than"),
        ("DROP TABLE metrics", "no run|damaged"),
    ],
)
def test_a_database_that_is_not_ours_to_write_is_a_problem(healthy: Path, statement: str, said: str) -> None:
    raw(statement)
    before = contents()
    ended = goe_doctor("--repair")
    assert ended.code == 1 and contents() == before
    assert any(part in ended.out for part in said.split("|")), ended.out


def test_files_of_other_programs_and_servers_that_are_not_there() -> None:
    Path("text.db").write_text("no database")
    raw("CREATE TABLE songs (title TEXT)", "songs.db")
    for db in ("text.db", "songs.db", "postgresql://nobody@127.0.0.1:1/none", "nowhere/x.db", "mysql://x/y"):
        ended = goe_doctor("--repair", "--db", db)
        assert (ended.code, level(ended, "database")) == (1, "problem"), ended.out
        assert "Traceback" not in ended.err
    assert Path("text.db").read_text() == "no database" and not backups()


# --- The environment --------------------------------------------------------------------------------------------------


def test_missing_and_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_checks.packages().level == "ok"
    monkeypatch.setattr(machine_checks, "direct_requirements", lambda: ["numpy>=99", "no-such-thing>=1", "pytest"])
    found = machine_checks.packages()
    assert (
        found.level == "problem" and "numpy>=99 is needed" in found.text and "no-such-thing>=1 is missing" in found.text
    )


@pytest.mark.parametrize(("free", "expected"), [(10**12, "ok"), (5 * 10**8, "warning"), (10**7, "problem")])
def test_disk_space(free: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    assert machine_checks.disk_space().level == expected


def test_permissions(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_checks.permissions().level == "ok"
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "runs")
    found = machine_checks.permissions()
    assert found.level == "problem" and found.text.startswith("runs cannot be written")


def test_threads_and_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine_checks.threads().level == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert machine_checks.threads().level == "warning"
    devices = [tmp_path / "nvidia0"]
    monkeypatch.setattr(Path, "glob", lambda _, pattern: iter(devices if pattern == "nvidia[0-9]*" else []))
    version = "2.13.0+cpu"
    monkeypatch.setattr(machine_checks.importlib.metadata, "version", lambda _: version)
    assert machine_checks.gpu().level == "warning" and "cannot use them" in machine_checks.gpu().text
    version = "2.13.0"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine_checks.gpu().level == "ok"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "hidden by" in machine_checks.gpu().text
    devices.clear()
    assert machine_checks.gpu().level == "ok"


# --- Data -------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_same_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(epochs=1, training_params={"checkpoint_every": 2})
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run_in(tmp_path, config).status == "interrupted"
    (text,) = [text for (text,) in raw("SELECT env_details_json FROM experiments")]
    environment = json.loads(str(text))
    environment["data"]["sha256"]["train"] = "0" * 64
    with Store() as store:
        (experiment_id,) = store.statuses()
        store.update_environment(experiment_id, environment)
    before = sorted(Path("runs", experiment_id).rglob("*"))
    with pytest.raises(ConfigError, match="its train split is not what it was begun on"):
        run_in(tmp_path, config, resume=True)
    assert sorted(Path("runs", experiment_id).rglob("*")) == before
    with Store() as store:
        assert store.statuses() == {experiment_id: "interrupted"}
        store.update_environment(experiment_id, json.loads(str(text)))
    assert run_in(tmp_path, config, resume=True).status == "finished"
