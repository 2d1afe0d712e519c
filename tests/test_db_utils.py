"""The store must keep what it was given, on SQLite and on PostgreSQL, for many writers at once."""

import codecs
import csv
import json
import math
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import alembic.autogenerate
import alembic.migration
import alembic.script
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import pythons_at_once, results, run_in, small_config

from research_eval import db_utils, init_db
from research_eval.db_utils import HistoryRow, Store, append_csv, database_url
from research_eval.errors import ConfigError
from research_eval.store import connection, values
from research_eval.store.csv_file import _cell
from research_eval.store.migrate import MIGRATIONS

ROOT = Path(__file__).resolve().parent.parent
SPEC_TABLES = """
CREATE TABLE experiments (experiment_id TEXT PRIMARY KEY, run_type TEXT, timestamp DATETIME, experiment_name TEXT,
    model_type TEXT, dataset_name TEXT, dataset_type TEXT, epochs INTEGER, batch_size INTEGER, full_config_json TEXT,
    env_details_json TEXT);
CREATE TABLE metrics (metric_id INTEGER PRIMARY KEY AUTOINCREMENT, experiment_id TEXT, metric_name TEXT,
    metric_value REAL, FOREIGN KEY (experiment_id) REFERENCES experiments (experiment_id));
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request, tmp_path):
    """The name of a database that does not exist yet (SQLite) or is empty (PostgreSQL)."""
    return str(tmp_path / "results.db") if request.param == "sqlite" else request.getfixturevalue("server_url")


def start(store, experiment_id="run-1", **changes):
    values = {
        "run_type": "json",
        "experiment_name": "a name",
        "model_type": "dense",
        "dataset_name": "parity",
        "dataset_type": "synthetic",
        "epochs": 3,
        "batch_size": 32,
        "seed": 2**63 - 1,
        "config": {"epochs": 3, "model_type": "dense"},
        "environment": {"python_version": "3.11"},
    }
    store.start_experiment(experiment_id=experiment_id, **values | changes)


def raw(db, query):
    """What a plain SQL client sees."""
    engine = sa.create_engine(database_url(db))
    with engine.connect() as connection:
        rows = [tuple(row) for row in connection.exec_driver_sql(query)]
    engine.dispose()
    return rows


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- Runs, metrics and history, on both databases ---------------------------------------------------------------------


def test_a_run_from_start_to_finish(db):
    before = datetime.now(UTC)
    with Store(db) as store:
        start(store, parent_id="study")
        running = store.experiment("run-1")
        assert before <= running["timestamp"] <= datetime.now(UTC)
        assert running["heartbeat"] == running["timestamp"]
        assert {name: running[name] for name in ("status", "seed", "error", "parent_id", "epochs", "batch_size")} == {
            "status": "running",
            "seed": 2**63 - 1,
            "error": None,
            "parent_id": "study",
            "epochs": 3,
            "batch_size": 32,
        }
        store.update_environment("run-1", {"git_commit": "abc"})
        store.set_status("run-1", "failed", error="out of memory")
        assert store.experiment("run-1")["error"] == "out of memory"
        store.set_status("run-1", "running")
        assert store.experiment("run-1")["error"] is None
        store.finish_experiment("run-1", {"final_val_f1": 0.5, "expert_usage": [0.25, 0.75]})
    with Store(db, read_only=True) as store:
        done = store.experiment("run-1")
        assert done["status"] == "finished"
        assert done["heartbeat"] > running["heartbeat"]
        assert json.loads(done["env_details_json"]) == {"git_commit": "abc"}
        assert store.metrics("run-1") == {"final_val_f1": 0.5, "expert_usage": [0.25, 0.75]}
        assert store.experiments() == [done]


def test_finishing_again_replaces_the_metrics_of_that_run_only(db):
    with Store(db) as store:
        start(store, "a")
        start(store, "b")
        store.finish_experiment("a", {"x": 1.0, "y": 2.0})
        store.finish_experiment("b", {"x": 3.0})
        store.finish_experiment("a", {"x": 4.0})
        assert (store.metrics("a"), store.metrics("b")) == ({"x": 4.0}, {"x": 3.0})


def test_a_metric_that_cannot_be_stored_changes_nothing(db):
    with Store(db) as store:
        start(store)
        store.finish_experiment("run-1", {"x": 1.0})
        with pytest.raises(ConfigError, match="metric 'routes': object is not"):
            store.finish_experiment("run-1", {"x": 2.0, "routes": [object()]})
        assert store.metrics("run-1") == {"x": 1.0}
        assert store.experiment("run-1")["status"] == "finished"


def test_metrics_are_normalised_once_on_their_way_from_a_run_to_the_store(tmp_path, monkeypatch):
    """Every metric once: not again for the file of pending writes, and not again by the store."""
    count = Counter()
    normal_metric = values._normal_metric

    def counted(name, value):
        count[name] += 1
        return normal_metric(name, value)

    monkeypatch.setattr(values, "_normal_metric", counted)
    result = run_in(tmp_path, small_config(epochs=1))
    with results(tmp_path) as store:
        assert dict.fromkeys(store.metrics(result.experiment_id), 1) == count


def same(left, right):
    """Equality under which NaN equals NaN."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


numbers = st.floats(min_value=-1e15, max_value=1e15) | st.sampled_from([math.nan, math.inf, -math.inf])
metric_values = (
    st.floats() | st.lists(numbers | st.lists(numbers, max_size=3), max_size=4) | st.text("ab'\"[%", max_size=5)
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metrics=st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0")), metric_values, max_size=5)
)
@example(metrics={"nan": math.nan, "inf": math.inf, "minus": -math.inf, "list": [math.nan, [math.inf]], "text": "NaN!"})
def test_metrics_survive(db, metrics):
    with Store(db) as store:
        run = f"run-{len(store.experiments())}"
        start(store, run)
        store.finish_experiment(run, metrics)
        found = store.metrics(run)
    assert list(found) == list(metrics)
    assert all(same(found[name], value) for name, value in metrics.items()), found


def test_arrays_and_scalars_of_numpy_become_plain_numbers(db):
    with Store(db) as store:
        start(store)
        store.finish_experiment(
            "run-1",
            {
                "f": np.float32(0.5),
                "i": np.int64(3),
                "a_2": np.array([1.0, math.inf]),
                "l": [np.int64(1)],
                "none": None,
            },
        )
        found = store.metrics("run-1")
    assert math.isnan(found.pop("none"))
    assert found == {"f": 0.5, "i": 3.0, "a_2": [1.0, math.inf], "l": [1]}
    assert isinstance(found["i"], float)


def test_sql_users_see_numbers_and_json_and_can_rank(db):
    with Store(db) as store:
        for run, value in {"a": 9.0, "b": 10.0, "c": math.nan, "d": 1e-3}.items():
            start(store, run)
            store.finish_experiment(run, {"f1": value})
        start(store, "e")
        store.finish_experiment("e", {"usage": [1.5, math.nan]})
    ranked = (
        "SELECT experiment_id FROM metrics WHERE metric_name = 'f1' AND metric_value IS NOT NULL ORDER BY metric_value"
    )
    assert [run for (run,) in raw(db, ranked)] == ["d", "a", "b"]
    assert raw(db, "SELECT experiment_id FROM metrics WHERE metric_value IS NULL") == [("c",)]
    [(usage,)] = raw(db, "SELECT metric_value FROM metrics WHERE metric_name = 'usage'")
    assert (json.loads(usage) if isinstance(usage, str) else usage) == [1.5, "NaN"]
    if "://" not in db:
        kinds = raw(db, "SELECT metric_name, typeof(metric_value) FROM metrics WHERE experiment_id IN ('a', 'c', 'e')")
        assert kinds == [("f1", "real"), ("f1", "null"), ("usage", "text")]


def test_history_is_ordered_and_survives_being_written_twice_and_truncated(db):
    points = [HistoryRow(step, step / 10, name, step + 0.5) for step in (0, 10, 20) for name in ("loss", "lr")]
    with Store(db) as store:
        start(store)
        started = store.experiment("run-1")["heartbeat"]
        store.add_history("run-1", points[::-1])
        assert store.experiment("run-1")["heartbeat"] > started
        assert store.history("run-1") == points
        store.truncate_history("run-1", after_step=10)
        assert store.history("run-1") == points[:4]
        store.add_history("run-1", [HistoryRow(10, 1.0, "loss", -1.0), HistoryRow(20, 2.0, "loss", math.inf)])
        assert [row.value for row in store.history("run-1", "loss")] == [0.5, -1.0, math.inf]
        store.add_history("run-1", [HistoryRow(30, 3.0, "loss", np.float32(math.nan))])
        assert math.isnan(store.history("run-1", "loss")[-1].value)
        store.add_history("run-1", [])
        assert store.history("other") == []


def test_writing_to_a_run_that_is_not_there_is_an_error(db):
    with Store(db) as store:
        for write in (
            lambda: store.add_history("x", [HistoryRow(0, 0.0, "loss", 1.0)]),
            lambda: store.truncate_history("x", 0),
            lambda: store.finish_experiment("x", {"a": 1.0}),
            lambda: store.set_status("x", "failed"),
            lambda: store.update_environment("x", {}),
        ):
            with pytest.raises(ConfigError, match="no experiment 'x'"):
                write()
        start(store)
        with pytest.raises(ConfigError, match="unknown 'done'"):
            store.set_status("run-1", "done")
        with pytest.raises(sa.exc.IntegrityError):
            start(store)


def test_a_unique_prefix_names_a_run(db):
    with Store(db) as store:
        for run in ("ab", "abc1", "abd_", "x%"):
            start(store, run)
        assert [store.experiment(name)["experiment_id"] for name in ("ab", "abc", "abd", "x")] == [
            "ab",
            "abc1",
            "abd_",
            "x%",
        ]
        with pytest.raises(ConfigError, match=r"'a' is one of 3 .*: ab, abc1, abd_"):
            store.experiment("a")
        with pytest.raises(ConfigError, match="Did you mean 'abc1'"):
            store.experiment("abc2")
        for unknown in ("%", "_", "AB", ""):
            with pytest.raises(ConfigError, match="no experiment"):
                store.experiment(unknown)


def test_find_experiment_takes_the_newest_run_of_an_equal_config(db):
    with Store(db) as store:
        start(store, "old", config={"a": 1, "b": {"d": 0.1, "c": "ü"}})
        start(store, "new", config={"b": {"c": "ü", "d": 0.1}, "a": 1})
        start(store, "trial", config={"a": 1, "b": {"d": 0.1, "c": "ü"}}, run_type="optuna_trial")
        start(store, "other", config={"a": 1, "b": {"d": 0.2, "c": "ü"}})
        config = {"b": {"d": 0.1, "c": "ü"}, "a": 1}
        found = store.find_experiment(config)
        assert found is not None
        assert found["experiment_id"] == "new"
        assert json.loads(found["full_config_json"]) == config
        start(store, "replay", config=config, parent_id="new")
        assert store.find_experiment(config)["experiment_id"] == found["experiment_id"]
        assert store.find_experiment({"a": 1}) is None


def test_names_that_look_like_sql_are_only_text(db):
    nasty = "x'); DROP TABLE metrics; --"
    with Store(db) as store:
        start(store, nasty, experiment_name=nasty, dataset_name='"; DELETE FROM experiments', config={nasty: "%s ? :a"})
        store.finish_experiment(nasty, {nasty: [nasty]})
        store.add_history(nasty, [HistoryRow(0, 0.0, nasty, 1.0)])
        assert store.experiment(nasty)["experiment_name"] == nasty
        assert store.experiment(nasty)["dataset_name"] == '"; DELETE FROM experiments'
        assert store.find_experiment({nasty: "%s ? :a"}) is not None
        assert store.metrics(nasty) == {nasty: [nasty]}
        assert store.history(nasty, nasty) == [HistoryRow(0, 0.0, nasty, 1.0)]


WRITER = """
import sys
from research_eval.db_utils import (HistoryRow, Store)
from test_db_utils import start
database, process = sys.argv[1:]
with Store(database) as store:
    for number in range(15):
        run = f"{process}-{number}"
        start(store, run)
        store.add_history(run, [HistoryRow(step, 0.0, "loss", float(step)) for step in range(5)])
        store.finish_experiment(run, {"value": float(number), "process": float(process)})
"""


def test_four_processes_that_create_and_fill_a_store_at_once_lose_nothing(db, tmp_path):
    writers = [["-c", WRITER, db, str(process)] for process in range(4)]
    ended = pythons_at_once(writers, tmp_path, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    assert [(writer.code, writer.err) for writer in ended] == [(0, "")] * 4
    with Store(db, read_only=True) as store:
        expected = {f"{process}-{number}" for process in range(4) for number in range(15)}
        assert {row["experiment_id"] for row in store.experiments() if row["status"] == "finished"} == expected
        for run in expected:
            process, number = run.split("-")
            assert store.metrics(run) == {"value": float(number), "process": float(process)}
            assert len(store.history(run)) == 5


def test_many_runs_are_read_with_the_numbers_among_their_metrics(db):
    values = {"f1": 0.5, "zero": 0, "inf": math.inf, "nan": math.nan, "list": [1.0], "text": "3", "it's": 2.5}
    with Store(db) as store:
        start(store, "b", seed=1, config={"a": 1})
        start(store, "a", model_type="moe")
        start(store, "other", dataset_name="addition")
        store.finish_experiment("b", values)
        store.finish_experiment("other", {"f1": 0.9, "only": 1.0})
        first, second = store.runs("parity", [*values, "missing"])
        numbers = {name: value for name, value in values.items() if name in ("f1", "zero", "it's")}
        assert first == ("b", "a name", "dense", "finished", 1, '{"a": 1}', first.metrics, None)
        assert {name: value for name, value in first.metrics.items() if name != "inf"} == numbers
        assert (second.experiment_id, second.status, second.metrics) == ("a", "running", {}), "oldest first"
        assert store.runs("parity'") == []
        assert [run.metrics for run in store.runs("parity")] == [{}, {}]
        assert store.dataset_names() == ["addition", "parity"]
        summaries = {one.name: one[1:] for one in store.metric_summaries()}
        assert summaries["f1"] == (2, 0.5, 0.9)
        assert summaries["zero"] == (1, 0, 0)
        assert summaries["list"] == summaries["text"] == summaries["nan"] == (1, None, None)
        assert "only" not in {one.name for one in store.metric_summaries("parity")}


def test_a_whole_csv_file_has_the_cells_of_an_appended_one(tmp_path):
    row = {"=name": "=1+1", "number": -1.5, "none": None, "list": [1, math.nan], "text": 'a,"b"\n'}
    append_csv(tmp_path / "a.csv", row)
    assert db_utils.csv_text(list(row), [list(row.values())]).encode() == (tmp_path / "a.csv").read_bytes()


# --- Schema and migrations --------------------------------------------------------------------------------------------


INDEXES_THAT_DIFFER = {  # between the databases, or have an expression, which cannot be compared
    "ix_metrics_number",
    "ix_experiments_hidden",
    "ix_metrics_experiment_id",
    "ix_metrics_experiment_id_metric_name",
    "ix_history_points_run_id_step",
}


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
def test_the_migrations_add_up_to_the_tables(db):
    Store(db).close()
    engine = sa.create_engine(database_url(db))
    with engine.connect() as connection:
        context = alembic.migration.MigrationContext.configure(
            connection,
            opts={
                "version_table": db_utils.VERSION_TABLE,
                "compare_type": True,
                "include_name": lambda name, kind, _: kind != "index" or name not in INDEXES_THAT_DIFFER,
                "include_object": lambda _, name, *__: name not in INDEXES_THAT_DIFFER,
            },
        )
        assert alembic.autogenerate.compare_metadata(context, db_utils.metadata) == []
    engine.dispose()


def test_schema_version_is_the_newest_migration():
    assert alembic.script.ScriptDirectory(str(MIGRATIONS)).get_current_head() == db_utils.SCHEMA_VERSION


def test_sqlite_columns_and_types_are_the_documented_ones(tmp_path):
    db = str(tmp_path / "r.db")
    Store(db).close()
    documented = sqlite3.connect(":memory:")
    documented.executescript(SPEC_TABLES)
    for table in ("experiments", "metrics"):
        query = f"SELECT name, type, pk FROM pragma_table_info('{table}')"
        expected = documented.execute(query).fetchall()
        assert raw(db, query)[: len(expected)] == expected
        assert [row[2:5] for row in raw(db, f"PRAGMA foreign_key_list({table})")] == [
            row[2:5] for row in documented.execute(f"PRAGMA foreign_key_list({table})")
        ]
    documented.close()
    assert raw(db, "SELECT 1 FROM sqlite_master WHERE name = 'metrics' AND sql LIKE '%PRIMARY KEY AUTOINCREMENT%'")


def bare_database(path):
    """As the documented schema alone has it: no version table, no columns of ours, values as text and numbers."""
    with sqlite3.connect(path) as connection:
        connection.executescript(SPEC_TABLES)
        for run, time in (("done", "2024-05-01 10:00:00"), ("cut", "2024-05-02T11:00:00.5")):
            row = (run, "json", time, "n", "moe", "parity", "synthetic", 1, 2, "{}", "{}")
            connection.execute("INSERT INTO experiments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        for name, value in (("f1", 0.5), ("usage", "[0.25, 0.75]"), ("odd", "{'a': 1}")):
            connection.execute(
                "INSERT INTO metrics (experiment_id, metric_name, metric_value) VALUES ('done', ?, ?)", (name, value)
            )
    connection.close()


def test_a_database_with_only_the_documented_tables_is_adopted(tmp_path):
    path = tmp_path / "old.db"
    bare_database(path)
    with Store(str(path), read_only=True) as store:  # at once, also by a reader
        assert store.schema_version == db_utils.SCHEMA_VERSION
    with Store(str(path)) as store:
        assert {row["experiment_id"]: row["status"] for row in store.experiments()} == {
            "done": "finished",
            "cut": "interrupted",
        }
        assert store.experiment("cut")["timestamp"] == datetime(2024, 5, 2, 11, 0, 0, 500_000, tzinfo=UTC)
        assert store.metrics("done") == {"f1": 0.5, "usage": [0.25, 0.75], "odd": "{'a': 1}"}
        start(store, "new")
        store.add_history("new", [HistoryRow(0, 0.0, "loss", 1.0)])
        store.finish_experiment("done", {"f1": 0.75})
        assert store.metrics("done") == {"f1": 0.75}
    columns = {
        table: {row[1] for row in raw(str(path), f"PRAGMA table_info({table})")} for table in db_utils.metadata.tables
    }
    assert columns == {name: set(table.columns.keys()) for name, table in db_utils.metadata.tables.items()}


def test_a_version_one_database_is_upgraded_but_not_read(tmp_path):
    path = tmp_path / "one.db"
    bare_database(path)
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE {db_utils.VERSION_TABLE} (version_num VARCHAR(32) NOT NULL)")
        connection.execute(f"INSERT INTO {db_utils.VERSION_TABLE} VALUES ('0001')")
    connection.close()
    with pytest.raises(ConfigError, match=r"schema version 0001 is older than .*init_db\.py --db .*one\.db"):
        Store(str(path), read_only=True)
    with Store(str(path)) as store:
        assert store.schema_version == db_utils.SCHEMA_VERSION
        assert len(store.experiments()) == 2


def test_the_fourth_migration_fills_the_data_and_marks_old_counts(db):
    """Text gets the hash that new runs on the same data have; other data stay unknown."""
    hashes = {"train": "a", "validation": "b"}
    with Store(db) as store:
        text = {"dataset_type": "real_world", "dataset_name": "reviews"}
        start(store, "text", **text, environment={"data": {"sha256": hashes}}, model_type="moe")
        start(store, "bare", **text, environment={"data": "none"}, model_type="lstm")
        start(store, "made", environment={"data": {"sha256": hashes}})
        for name in ("text", "bare", "made"):
            store.finish_experiment(name, {"train_flops": 2.0, "final_val_f1": 0.5})
    engine = sa.create_engine(database_url(db))
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE experiments DROP COLUMN data_sha256")
        connection.exec_driver_sql(f"UPDATE {db_utils.VERSION_TABLE} SET version_num = '0003'")
    engine.dispose()
    with Store(db) as store:
        assert store.schema_version == db_utils.SCHEMA_VERSION
        assert store.find_id("text")["data_sha256"] == sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
        assert [store.find_id(name)["data_sha256"] for name in ("bare", "made")] == [None, None]
        assert store.metrics("text") == store.metrics("bare") == {"train_flops_v1": 2.0, "final_val_f1": 0.5}
        assert store.metrics("made") == {"train_flops": 2.0, "final_val_f1": 0.5}


def test_a_database_of_a_newer_program_is_refused(db):
    Store(db).close()
    engine = sa.create_engine(database_url(db))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {db_utils.VERSION_TABLE} SET version_num = '9999'")
    engine.dispose()
    for read_only in (False, True):
        with pytest.raises(ConfigError, match="schema version 9999 is newer than"):
            Store(db, read_only=read_only)


def test_tables_of_another_program_stay_as_they_are(db):
    """An Optuna study has its own `alembic_version` in the same database."""
    engine = sa.create_engine(database_url(db))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('v3.2.0.a')")
        connection.exec_driver_sql("CREATE TABLE studies (study_id INTEGER)")
    engine.dispose()
    with pytest.raises(ConfigError, match="no results at"):
        Store(db, read_only=True)
    with Store(db) as store:
        start(store)
    assert raw(db, "SELECT version_num FROM alembic_version") == [("v3.2.0.a",)]
    assert raw(db, "SELECT study_id FROM studies") == []


@pytest.mark.parametrize("table", ["experiments", "metrics", "history", "history_points"])
def test_a_table_of_the_same_name_but_another_meaning_is_refused_and_nothing_is_added(db, table):
    engine = sa.create_engine(database_url(db))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE {table} (experiment_id INTEGER, artifact_location TEXT)")
    with pytest.raises(ConfigError, match="belongs to another program") as refusal:
        Store(db)
    assert f"'{table}'" in str(refusal.value)
    assert sa.inspect(engine).get_table_names() == [table]
    engine.dispose()


def test_an_up_to_date_store_opens_without_alembic_and_never_imports_torch_or_optuna(tmp_path):
    db = str(tmp_path / "r.db")
    Store(db).close()
    code = (
        "import sys; from research_eval.db_utils import Store; Store(sys.argv[1]).close(); "
        "print([name for name in ('alembic', 'torch', 'optuna', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, db], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- Opening ----------------------------------------------------------------------------------------------------------


def test_read_only_never_writes(tmp_path):
    path = tmp_path / "r.db"
    with Store(str(path)) as store:
        start(store)
        store.finish_experiment("run-1", {"x": 1.0})
    before = path.read_bytes()
    with Store(str(path), read_only=True) as store:
        assert store.metrics("run-1") == {"x": 1.0}
        with pytest.raises(AssertionError, match="read-only"):
            store.set_status("run-1", "failed")
    assert path.read_bytes() == before


def test_the_database_itself_refuses_writes_of_a_read_only_store(db):
    with Store(db) as store:
        start(store)
    with (
        Store(db, read_only=True) as store,
        store._engine.connect() as connection,
        pytest.raises(sa.exc.DBAPIError, match=r"read-?only"),
    ):
        connection.execute(db_utils.experiments_table.delete())
    with Store(db, read_only=True) as store:
        assert len(store.experiments()) == 1


def test_a_store_on_a_read_only_medium_can_be_read(tmp_path, monkeypatch):
    db = str(tmp_path / "r.db")
    with Store(db) as store:
        start(store)
    assert names_in(tmp_path) == ["r.db", "r.db.lock"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with Store(db, read_only=True) as store:
        assert len(store.experiments()) == 1
        assert names_in(tmp_path) == ["r.db", "r.db.lock"]


def test_readers_are_not_blocked_by_a_writer(tmp_path):
    db = str(tmp_path / "r.db")
    with Store(db) as store, Store(db, read_only=True) as reader:
        start(store)
        with store._write() as connection:
            connection.execute(db_utils.experiments_table.delete())
            assert len(reader.experiments()) == 1
        assert reader.experiments() == []


def test_sqlite_is_set_up_for_many_writers(tmp_path):
    expected = {"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1, "busy_timeout": 30_000}
    for _ in ("new", "reopened"):
        with Store(str(tmp_path / "r.db")) as store, store._engine.connect() as connection:
            assert {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in expected} == expected


def test_where_the_store_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)
    assert database_url() == f"sqlite:///{tmp_path}/experiment_results.db"
    monkeypatch.setenv("GOE_DB", "other.db")
    assert database_url() == f"sqlite:///{tmp_path}/other.db"
    assert database_url("mine.db") == f"sqlite:///{tmp_path}/mine.db"
    assert database_url("sqlite:///mine.db") == f"sqlite:///{tmp_path}/mine.db"
    assert database_url(f"sqlite:///{tmp_path}/a.db") == f"sqlite:///{tmp_path}/a.db"
    for spelling in ("postgresql", "postgres", "postgresql+psycopg"):
        assert database_url(f"{spelling}://u:p%40@h:5/d") == "postgresql+psycopg://u:p%40@h:5/d"


def test_an_assignment_to_db_file_counts_everywhere(tmp_path, monkeypatch, capsys):
    """`research_eval.store` must not import db_utils, whose variable users assign to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(db_utils, "DB_FILE", "mine.db")
        assert database_url() == connection.database_url() == f"sqlite:///{tmp_path}/mine.db"
        assert init_db.main([]) == 0
        assert "mine.db" in capsys.readouterr().out and names_in(tmp_path) == ["mine.db", "mine.db.lock"]
        with pytest.raises(ConfigError, match=r"is a directory. Give a file in it, such as .*mine\.db"):
            Store(str(tmp_path))
    assert database_url().endswith("/experiment_results.db")


@pytest.mark.parametrize("name", ["a b.db", "50%20off.db", "what?.db", "c#4.db", "ü:@.db"])
def test_any_file_name_works(tmp_path, name):
    with Store(str(tmp_path / name)) as store:
        start(store)
    assert (tmp_path / name).stat().st_size > 0
    with Store(database_url(str(tmp_path / name)), read_only=True) as store:
        assert len(store.experiments()) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "name is empty"),
        ("folder", "is a directory"),
        ("missing/r.db", "folder .* does not exist"),
        ("notes.txt", "not a SQLite file"),
        ("sqlite:///notes.txt", "not a SQLite file"),
        ("sqlite://r.db", "names no file"),
        ("sqlite://", "names no file"),
        ("sqlite:r.db", "not a URL"),
        ("postgresql:/h/d", "not a URL"),
        ("postgresql://u:secret@h:port/d", "not a URL"),
        ("://", "not a URL"),
        ("mysql://h/d", "'mysql' is not supported"),
        ("postgresql+nonsense://h/d", "'postgresql.nonsense' is not supported"),
        ("postgresql://u:secret@127.0.0.1:1/d", "database postgresql.psycopg://u:.*@127"),
    ],
)
def test_a_bad_place_is_explained_and_left_alone(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("do not lose me")
    with pytest.raises(ConfigError, match=message) as caught:
        Store(name)
    assert "secret" not in str(caught.value)
    assert (tmp_path / "notes.txt").read_text() == "do not lose me"
    assert names_in(tmp_path) == ["folder", "notes.txt"]


def test_a_broken_sqlite_file_is_explained(tmp_path):
    (tmp_path / "r.db").write_bytes(b"SQLite format 3\0" + b"garbage" * 1000)
    with pytest.raises(ConfigError, match=r"database .*r\.db: "):
        Store(str(tmp_path / "r.db"))


def test_reading_a_missing_store_says_what_to_run(tmp_path):
    with pytest.raises(ConfigError, match=r"no results at .*r\.db: run `python research_eval/init_db\.py` first"):
        Store(str(tmp_path / "r.db"), read_only=True)
    assert list(tmp_path.iterdir()) == []


# --- init_db.py -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[str(ROOT / "research_eval" / "init_db.py")], ["-m", "research_eval.init_db"]])
def test_init_db_runs_anywhere_and_a_second_time_changes_nothing(tmp_path, command):
    environment = {name: value for name, value in os.environ.items() if name != "GOE_DB"}
    if command[0] == "-m":
        environment["PYTHONPATH"] = str(ROOT)
    path = tmp_path / "experiment_results.db"
    outputs, contents = [], []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout)
        contents.append(path.read_bytes())
    assert outputs == [f"results database: {path} (schema version {db_utils.SCHEMA_VERSION})\n"] * 2
    assert contents[0] == contents[1]


def test_init_db_explains_a_bad_place(tmp_path, capsys):
    assert init_db.main(["--db", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is a directory" in captured.err


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom research_eval.init_db import main\ntry:\n    main(['--help'])\n"
        "except SystemExit:\n    sys.exit('sqlalchemy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--db URL_OR_PATH" in done.stdout


# --- CSV --------------------------------------------------------------------------------------------------------------


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def test_a_new_column_never_breaks_old_rows(tmp_path):
    path = tmp_path / "runs.csv"
    append_csv(path, {"id": "a", "f1": 0.5})
    path.chmod(0o640)
    append_csv(path, {"f1": 0.25, "id": "b"})
    append_csv(path, {"id": "c", "usage": [0.5, math.nan], "none": None})
    append_csv(path, {"none": True})
    assert read_csv(path) == [
        {"id": "a", "f1": "0.5", "usage": "", "none": ""},
        {"id": "b", "f1": "0.25", "usage": "", "none": ""},
        {"id": "c", "f1": "", "usage": '[0.5, "NaN"]', "none": ""},
        {"id": "", "f1": "", "usage": "", "none": "True"},
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names_in(tmp_path) == ["runs.csv", "runs.csv.lock"]


@pytest.mark.parametrize("start_of_cell", ["=", "+", "-", "@", "\t", "\r"])
def test_text_is_never_a_formula_and_numbers_stay_numbers(tmp_path, start_of_cell):
    path = tmp_path / "runs.csv"
    text = f"{start_of_cell}cmd|' /C calc'!A0"
    append_csv(path, {"name": text, "loss": -1.5, "count": np.int64(-2), text: -math.inf})
    assert read_csv(path) == [{"name": f"'{text}", "loss": "-1.5", "count": "-2", f"'{text}": "-inf"}]
    append_csv(path, {text: 1})
    assert len(read_csv(path)[0]) == 4


any_text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6) | st.sampled_from(
    ["a\r\nb", "\r", "\n", '",']
)
csv_rows = st.lists(
    st.dictionaries(any_text, any_text | st.integers() | st.floats() | st.lists(any_text), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(rows=csv_rows)
def test_whatever_is_appended_is_read_back(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.csv"
        for row in rows:
            append_csv(path, row)
        found = read_csv(path)
    expected = [{str(_cell(name)): str(_cell(value)) for name, value in row.items()} for row in rows]
    names = {name for row in expected for name in row}
    assert found == [{name: row.get(name, "") for name in names} for row in expected]


def test_a_file_that_others_touched_is_continued(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_bytes("\ufeffid,f1\na,1".encode())  # a byte-order mark, bare line feeds, no end of the last line
    append_csv(path, {"id": "b", "f1": 2})
    assert [line.split(",") for line in path.read_text("utf-8-sig").split()] == [["id", "f1"], ["a", "1"], ["b", "2"]]
    append_csv(path, {"id": "c", "new": 3})
    assert path.read_bytes().startswith(codecs.BOM_UTF8), "spreadsheets need the mark"
    assert path.read_text("utf-8-sig").split() == ["id,f1,new", "a,1,", "b,2,", "c,,3"]


def test_a_failed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "runs.csv"
    append_csv(path, {"id": "a"})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        append_csv(path, {"id": "b", "new": 1})
    assert path.read_bytes() == before


def test_four_processes_that_append_lose_no_row(tmp_path):
    path = tmp_path / "runs.csv"
    code = (
        "import sys; from research_eval.db_utils import append_csv\n"
        "for n in range(10): append_csv(sys.argv[1], {'id': sys.argv[2], 'n': n, f'column{n}': n})"
    )
    ended = pythons_at_once([["-c", code, str(path), str(number)] for number in range(4)], ROOT)
    assert [appender.code for appender in ended] == [0] * 4
    found = read_csv(path)
    assert sorted((row["id"], row["n"]) for row in found) == sorted(
        (str(i), str(n)) for i in range(4) for n in range(10)
    )
    assert all(row[f"column{row['n']}"] == row["n"] for row in found)


def test_a_csv_that_cannot_be_continued_is_explained(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "runs.csv"):
        with pytest.raises(ConfigError, match="not a file in an existing folder"):
            append_csv(path, {"id": 1})
    (tmp_path / "runs.csv").write_bytes("id\nJos\u00e9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        append_csv(tmp_path / "runs.csv", {"new": 1})
