"""`goe runs`, `goe export`, `goe merge` and `goe replay` against slow, obvious versions and closed cases."""

from __future__ import annotations

import csv
import fnmatch
import itertools
import json
import math
import operator
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import ChainMap
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Ended, command, environment, run_in, small_config
from test_db_utils import db  # noqa: F401 - a fixture

from research_eval.db_utils import STATUSES, HistoryRow, RunFilter, RunRecord, Store, canonical_json, metrics_table
from research_eval.errors import ConfigError
from research_eval.experiment import Result
from research_eval.main import cli
from research_eval.store import merge as merging
from research_eval.store.changes import difference, flatten, metric_differences
from research_eval.store.export import export
from research_eval.store.find import find_runs, parse_condition, parse_time
from research_eval.store.merge import merge
from research_eval.store.values import tags_text
from research_eval.studies.replay import Replay
from research_eval.wording import printable

START = datetime(2026, 3, 1, tzinfo=UTC)
EXAMPLES = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)


def goe(*arguments: str | Path) -> Ended:
    return command(cli, *arguments)


def row(experiment_id: str, **changes: Any) -> dict[str, Any]:
    """The row of a finished run; one that is said to be running was alive just now."""
    return {
        "experiment_id": experiment_id,
        "run_type": "json",
        "timestamp": START,
        "experiment_name": "a name",
        "model_type": "dense",
        "dataset_name": "parity",
        "dataset_type": "synthetic",
        "epochs": 3,
        "batch_size": 32,
        "full_config_json": "{}",
        "env_details_json": "{}",
        "status": "finished",
        "seed": 0,
        "error": None,
        "heartbeat": datetime.now(UTC) if changes.get("status") == "running" else START,
        "parent_id": None,
        "data_sha256": None,
        "archived_at": None,
        "deleted_at": None,
        "tags": None,
        "note": None,
        "attempt": None,
    } | changes


def record(experiment_id: str, metrics: dict[str, Any] | None = None, **changes: Any) -> RunRecord:
    return RunRecord(row(experiment_id, **changes), metrics or {}, [])


def fill(name: str, *records: RunRecord) -> str:
    """A store that holds exactly these runs."""
    with Store(name) as store:
        with store._write() as connection:
            for table in ("metrics", "history_points", "history_runs", "experiments"):
                connection.exec_driver_sql(f"DELETE FROM {table}")
        store.merge_records({one.experiment["experiment_id"]: one for one in records}, lambda ours, theirs: False)
    return name


def contents(name: str) -> str:
    """All that a store holds; text, in which NaN equals NaN."""
    with Store(name, read_only=True) as store:
        ids = sorted(run["experiment_id"] for run in store.experiments())
        found = store.records(ids)
    return "\n".join(repr(found[experiment_id]) for experiment_id in ids)


def listed(*arguments: str) -> list[dict[str, Any]]:
    ended = goe("runs", "--json", *arguments)
    assert ended.code == 0, ended.err
    return [json.loads(line) for line in ended.out.splitlines()]


# ------------------------------------------------------------------------------------------------------ listing

METRIC_NAMES = ["final_val_f1", "final_val_loss", 'it\'s "odd" %']
numbers = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.5, math.inf, -math.inf, math.nan]) | st.floats(-10, 10)
metric_sets = st.dictionaries(st.sampled_from(METRIC_NAMES), numbers | st.just([0.5, 1.0]) | st.just("text"))
moments = st.integers(0, 5).map(lambda hours: START + timedelta(hours=hours))
rows_of_runs = st.fixed_dictionaries(
    {
        "run_type": st.sampled_from(["json", "optuna_trial"]),
        "timestamp": moments | st.none(),
        "experiment_name": st.sampled_from(["one", "two", "Two", "ü", "%"]) | st.none(),
        "model_type": st.sampled_from(["dense", "moe"]),
        "dataset_name": st.sampled_from(["parity", "addition"]),
        "status": st.sampled_from(STATUSES),
        "seed": st.integers(0, 3) | st.none(),
        "archived_at": st.sampled_from([None, None, START]),
        "deleted_at": st.sampled_from([None, None, START]),
        "tags": st.sets(st.sampled_from(["a", "ab", "A", "b-1"]), max_size=2).map(tags_text),
        "full_config_json": st.sampled_from(
            [
                '{"epochs": 3, "model_params": {"embed_dim": 64, "gated": true}}',
                '{"epochs": 1, "model_params": {"embed_dim": 8, "positions": "rope", "drop": 0.5}}',
                '{"model_params": {"gated": 1, "positions": null}}',
                "no JSON",
            ]
        ),
    }
)
stores = st.lists(st.tuples(rows_of_runs, metric_sets), min_size=2, max_size=8).map(
    lambda runs: [record(f"run-{number}", metrics, **columns) for number, (columns, metrics) in enumerate(runs)]
)
conditions = st.tuples(
    st.sampled_from(METRIC_NAMES),
    st.sampled_from([">=", "<=", "==", "!=", ">", "<"]),
    st.sampled_from([0.25, 0.5, -2.0]),
)
single_filters = st.one_of(
    st.just({"dataset_name": "parity"}),
    st.just({"model_type": "moe"}),
    st.just({"status": "finished"}),
    st.fixed_dictionaries({"experiment_name": st.sampled_from(["two", "%", "nobody's"])}),
    st.just({"run_type": "json"}),
    st.fixed_dictionaries({"study": st.sampled_from(["two", "ü"])}),
    st.fixed_dictionaries({"since": moments}),
    st.fixed_dictionaries({"where": st.lists(conditions, max_size=2).map(tuple)}),
)
config_conditions = st.tuples(
    st.sampled_from(["epochs", "model_params.embed_dim", "model_params.gated", "model_params.positions", "a.b"]),
    st.sampled_from(["==", "!="]),
    st.sampled_from([3.0, 64.0, 1.0, True, "rope", None]),
) | st.tuples(st.sampled_from(["epochs", "model_params.gated"]), st.sampled_from([">", "<="]), st.just(1.0))
single_filters |= st.one_of(
    st.fixed_dictionaries({"until": moments}),
    st.fixed_dictionaries({"name": st.sampled_from(["*", "t*", "t?o", "[tT]wo", "%", "_", "one"])}),
    st.fixed_dictionaries({"tags": st.sets(st.sampled_from(["a", "ab", "b-1"]), max_size=2).map(tuple)}),
    st.fixed_dictionaries({"config": st.lists(config_conditions, max_size=2).map(tuple)}),
    st.fixed_dictionaries({"ids": st.sets(st.sampled_from(["run-0", "run-1", "nobody's"])).map(tuple)}),
)
simple_filters = st.lists(single_filters, max_size=2).map(lambda found: RunFilter(**dict(ChainMap(*found))))
filters = st.builds(
    lambda wanted, view, left_out: replace(
        wanted, view=view, exclude=tuple(replace(one, view="all") for one in left_out)
    ),
    simple_filters,
    st.sampled_from(["active", "active", "archived", "deleted", "kept", "hidden", "all"]),
    st.lists(simple_filters, max_size=2),
)
VIEWS = {
    "active": lambda archived, deleted: not archived and not deleted,
    "archived": lambda archived, deleted: archived and not deleted,
    "deleted": lambda archived, deleted: deleted,
    "kept": lambda archived, deleted: not deleted,
    "hidden": lambda archived, deleted: archived or deleted,
    "all": lambda archived, deleted: True,
}
SIGNS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt}


def is_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isnan(value)


def slowly_found(
    runs: list[RunRecord], wanted: RunFilter, sort: str, upwards: bool, limit: int | None, offset: int = 0
) -> list[dict[str, Any]]:
    """What `find_runs` has to find, without SQL."""

    def fits_config(run: RunRecord, path: str, sign: str, value: Any) -> bool:
        text = run.experiment["full_config_json"]
        flat = flatten(json.loads(text)) if text.startswith("{") else {}
        if path not in flat:
            return False
        equal = flat[path] == value and isinstance(flat[path], bool) == isinstance(value, bool)
        if sign in ("==", "!="):
            return equal == (sign == "==")
        return type(flat[path]) in (int, float) and SIGNS[sign](flat[path], value)

    def fits(run: RunRecord, wanted: RunFilter = wanted) -> bool:
        columns = run.experiment
        asked = {
            name: getattr(wanted, name)
            for name in ("dataset_name", "model_type", "status", "experiment_name", "run_type")
            if getattr(wanted, name) is not None
        }
        if wanted.study is not None and (columns["run_type"], columns["experiment_name"]) != (
            "optuna_trial",
            wanted.study,
        ):
            return False
        if wanted.since is not None and (columns["timestamp"] is None or columns["timestamp"] < wanted.since):
            return False
        if wanted.until is not None and (columns["timestamp"] is None or columns["timestamp"] >= wanted.until):
            return False
        name, pattern = columns["experiment_name"], wanted.name
        if pattern is not None and (name is None or not fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))):
            return False
        if not set(wanted.tags) <= set(json.loads(columns["tags"] or "[]")):
            return False
        if wanted.ids is not None and columns["experiment_id"] not in wanted.ids:
            return False
        if not VIEWS[wanted.view](columns["archived_at"], columns["deleted_at"]):
            return False
        if not all(fits_config(run, *comparison) for comparison in wanted.config):
            return False
        if any(fits(run, one) for one in wanted.exclude):
            return False
        return all(columns[name] == value for name, value in asked.items()) and all(
            is_number(run.metrics.get(name)) and SIGNS[sign](run.metrics[name], limit)
            for name, sign, limit in wanted.where
        )

    def key(run: RunRecord) -> Any:
        value = run.experiment[sort] if sort in run.experiment else run.metrics.get(sort)
        return value if sort in run.experiment or is_number(value) else None

    found = sorted((run for run in runs if fits(run)), key=lambda run: run.experiment["experiment_id"])
    with_key = sorted((run for run in found if key(run) is not None), key=key)
    if not upwards:  # equal ones keep the order of their ids
        with_key = [
            run for _, group in reversed([(k, list(g)) for k, g in itertools.groupby(with_key, key)]) for run in group
        ]
    ordered = [*with_key, *(run for run in found if key(run) is None)]
    return [run.experiment for run in ordered][offset:][:limit]


@settings(EXAMPLES, max_examples=40)
@given(
    runs=stores,
    wanted=filters,
    sort=st.sampled_from(["timestamp", "experiment_name", "seed", "experiment_id", *METRIC_NAMES]),
    descending=st.booleans(),
    limit=st.none() | st.integers(1, 4),
    offset=st.integers(0, 3),
)
def test_runs_are_found_as_a_loop_would_find_them(db, runs, wanted, sort, descending, limit, offset):  # noqa: F811
    fill(db, *runs)
    with Store(db, read_only=True) as store:
        asked = {"sort": sort, "descending": descending, "limit": limit, "offset": offset}
        found = store.find_runs(wanted, **asked, with_json=True)
        assert found == slowly_found(runs, wanted, sort, not descending, limit, offset)
        assert store.count_runs(wanted) == len(slowly_found(runs, wanted, sort, True, None))
        ids = [run["experiment_id"] for run in found]
        assert repr(store.metrics_of(ids)) == repr({key: store.metrics(key) for key in ids})
        assert {name for name in METRIC_NAMES if store.has_metric(name)} == {
            name for run in runs for name in run.metrics
        }


@settings(EXAMPLES, max_examples=30)
@given(
    written=st.lists(st.lists(st.sampled_from([0.25, 0.5, 1.0, math.nan]), max_size=3), min_size=2, max_size=6),
    descending=st.booleans(),
    limit=st.integers(1, 3),
)
def test_windows_of_runs_by_a_metric_that_a_run_may_have_twice(db, written, descending, limit):  # noqa: F811
    """As in an adopted database: the last one that was written counts."""
    runs = [record(f"run-{number}", {"f1": values[-1]} if values else {}) for number, values in enumerate(written)]
    fill(db, *runs)
    with Store(db) as store, store._write() as connection:
        connection.execute(metrics_table.delete())
        for number, values in enumerate(written):
            for value in values:
                row = {"experiment_id": f"run-{number}", "metric_name": "f1", "metric_value": value}
                connection.execute(metrics_table.insert(), row)
    with Store(db, read_only=True) as store:
        windows = [
            store.find_runs(sort="f1", descending=descending, limit=limit, offset=offset, with_json=True)
            for offset in range(0, len(runs), limit)
        ]
        assert list(itertools.chain(*windows)) == slowly_found(runs, RunFilter(), "f1", not descending, None)
        for sign in (">=", "=="):
            wanted = RunFilter(where=(("f1", sign, 0.5),))
            assert store.count_runs(wanted) == len(slowly_found(runs, wanted, "f1", True, None))


def test_the_best_come_first_and_runs_without_the_metric_last():
    scores = {"a": (0.5, 2.0), "b": (0.9, 1.0), "c": (math.nan, 3.0)}
    runs = [record(key, {"final_val_f1": f1, "final_val_loss": loss}) for key, (f1, loss) in scores.items()]
    fill("r.db", *runs, record("d"))
    with Store("r.db", read_only=True) as store:

        def ids(**options: Any) -> str:
            return "".join(run["experiment_id"] for run in find_runs(store, RunFilter(), **options))

        assert ids(sort="final_val_f1") == "bacd"
        assert ids(sort="final_val_f1", reverse=True) == "abcd"
        assert ids(sort="final_val_loss") == "bacd"
        assert ids(sort="id", reverse=True) == "dcba"
        assert ids(sort="final_val_f1", limit=1) == "b"
    assert [run["experiment_id"] for run in listed("--db", "r.db", "--sort", "final_val_loss", "--reverse")] == list(
        "cabd"
    )


def test_a_name_that_an_adopted_database_has_twice_counts_once():
    fill("r.db", record("a", {"f1": 0.1}))
    raw_write("r.db", "INSERT INTO metrics (experiment_id, metric_name, metric_value) VALUES ('a', 'f1', 0.9)")
    with Store("r.db", read_only=True) as store:
        assert [run["metrics"] for run in find_runs(store, RunFilter(where=(("f1", ">", 0.5),)), metrics=["f1"])] == [
            {"f1": 0.9}
        ]


def raw_write(name: str, query: str, *values: Any) -> None:
    connection = sqlite3.connect(name)
    with connection:
        connection.execute(query, values)
    connection.close()


def test_the_list_for_a_person():
    scores = {"final_val_f1": 0.98765, "param_count": 49534.0, "training_duration_seconds": 65.2}
    fill(
        "experiment_results.db",
        record("01-aa", scores),
        record("02-bb", timestamp=START + timedelta(days=1), status="failed", seed=None),
    )
    ended = goe("runs")
    assert ended.out.splitlines() == [
        "id     status    type  name    model  dataset  seed  final_val_f1  param_count  seconds  started",
        "02-bb  failed    json  a name  dense  parity      -             -            -        -  2026-03-02 00:00:00",
        "01-aa  finished  json  a name  dense  parity      0        0.9877       49,534     65.2  2026-03-01 00:00:00",
    ]
    assert (ended.code, ended.err) == (0, "")
    chosen = goe("runs", "--metrics", "param_count", "--sort", "final_val_f1", "--limit", "1")
    assert chosen.out.splitlines()[0].split()[-4:] == ["seed", "param_count", "final_val_f1", "started"]
    assert chosen.out.count("\n") == 2 and chosen.err == "1 of 2 runs; --limit 0 lists all\n"


def test_json_lines_have_what_the_store_has():
    fill("r.db", record("a", {"final_val_f1": math.nan, "lists": [1.0, math.inf]}, experiment_name="x"))
    (found,) = listed("--db", "r.db", "--metrics", "final_val_f1,lists")
    columns = {name: value for name, value in row("a", experiment_name="x").items() if not name.endswith("_json")}
    times = {"timestamp": "2026-03-01T00:00:00+00:00", "heartbeat": "2026-03-01T00:00:00+00:00"}
    assert found == {**columns, **times, "tags": [], "metrics": {"final_val_f1": "NaN", "lists": [1.0, "Infinity"]}}


def test_filters_on_the_command_line():
    fill(
        "experiment_results.db",
        record("a", {"f1": 0.5}, experiment_name="s", run_type="optuna_trial", status="pruned"),
        record("b", {"f1": 0.9}, experiment_name="s"),
        record("c", timestamp=START + timedelta(days=2), model_type="moe", dataset_name="addition"),
    )

    def ids(*flags: str) -> str:
        return "".join(sorted(run["experiment_id"] for run in listed(*flags)))

    assert ids() == "abc"
    assert ids("--study", "s") == "a"
    assert ids("--experiment-name", "s", "--run-type", "json") == "b"
    assert ids("--status", "pruned") == "a"
    assert ids("--model_type", "moe") == ids("--dataset_name", "addition") == ids("--since", "2026-03-02") == "c"
    assert ids("--where", "f1>=0.5", "--where", "f1 < 9e-1") == "a"
    assert ids("--limit", "2") != ids("--limit", "0") == "abc"
    nothing = goe("runs", "--study", "t")
    assert (nothing.code, nothing.out) == (0, "") and "no runs in" in nothing.err


def test_a_run_that_is_silent_for_long_is_interrupted_and_one_from_the_future_too():
    now = datetime.now(UTC)
    silent, alive = now - timedelta(minutes=16), now - timedelta(minutes=14)
    fill(
        "experiment_results.db",
        record("a", status="running", heartbeat=silent),
        record("b", status="running", heartbeat=alive),
        record("c", status="failed", heartbeat=silent),
        record("d", status="running", heartbeat=now + timedelta(minutes=16)),
        record("e", status="interrupted", heartbeat=silent),
    )
    ended = goe("runs", "--sort", "id")
    statuses = ["interrupted", "running", "failed", "interrupted", "interrupted"]
    assert [line.split()[1] for line in ended.out.splitlines()[1:]] == statuses
    assert "ended without saying why" in goe("runs", "show", "a").out
    assert "ended without" not in goe("runs", "show", "b").out
    assert {run["experiment_id"] for run in listed("--status", "running")} == {"b"}
    assert {run["experiment_id"] for run in listed("--status", "interrupted")} == {"a", "d", "e"}
    with Store("experiment_results.db", read_only=True) as store:
        assert [run.status for run in store.runs("parity")] == statuses
        assert store.count_runs(RunFilter(status="interrupted")) == 3


HOSTILE = "\x1b[2J[red]x\nnext\tline\u202e=1+1"


def test_names_from_a_foreign_database_do_not_steer_the_terminal(monkeypatch):
    metrics = {HOSTILE: 1.0, "list": [HOSTILE]}
    changes = {"experiment_name": HOSTILE, "error": HOSTILE, "parent_id": HOSTILE, "model_type": HOSTILE}
    config = {HOSTILE: HOSTILE}
    fill("experiment_results.db", record(f"../{HOSTILE}", metrics, **changes, full_config_json=canonical_json(config)))
    fill("other.db", record("b", {HOSTILE: 2.0}, full_config_json="[" * 100_000, env_details_json="no JSON"))
    assert goe("merge", "other.db").code == 0
    for arguments in (["runs"], ["runs", "show", ".."], ["runs", "show", "b"], ["runs", "diff", "..", "b"]):
        ended = goe(*arguments)
        assert ended.code == 0, ended.err
        assert "\\x1b[2J" in ended.out and "\x1b" not in ended.out and "\u202e" not in ended.out
        assert not any(line.startswith(("next", "line")) for line in ended.out.splitlines())
    assert "  folder        runs/_._" in goe("runs", "show", "..").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    on_terminal = goe("runs").out
    assert "[red]x" in on_terminal and "\x1b[2J" not in on_terminal


@given(st.text())
def test_printable_text_is_one_line_and_plain_text_is_itself(text):
    shown = printable(text)
    assert shown.isprintable() and len((shown + "x").splitlines()) == 1
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_gets_whole_ids_at_any_width(width, monkeypatch):
    ids = [f"20260301-00000{number}-0123abcd" for number in range(3)]
    fill("experiment_results.db", *(record(key, {"final_val_f1": 0.5}, status="failed") for key in ids))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    ended = goe("runs", "--sort", "id")
    assert [line.split()[0] for line in ended.out.splitlines()[1:]] == ids
    assert ("started" in ended.out) == (width == 200)
    assert ("columns hidden (terminal too narrow): type" in ended.err) == (width < 200)


def test_a_reader_that_has_gone_is_no_error():
    fill("experiment_results.db", record("a"))
    code = "from research_eval.main import cli; raise SystemExit(cli())"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, "runs"],
            env=environment(),
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "text", ["f1", "f1>", ">1", "f1=", "f1=>1", "f1>1e", "f1>x", "f1>nan", "f1>1>2", "", "a>1.2.3"]
)
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(ConfigError, match="--where: expected a metric"):
        parse_condition(text)


@given(
    name=st.text("abc_ '%", min_size=1).filter(str.strip), sign=st.sampled_from(list(SIGNS)), limit=st.floats(-1e9, 1e9)
)
def test_conditions_are_read_as_they_were_written(name, sign, limit):
    assert parse_condition(f"{name} {sign} {limit!r}") == (name.strip(), sign, limit)


def test_a_date_is_utc_unless_it_says_otherwise():
    assert parse_time("2026-03-01") == parse_time("2026-03-01T01:00+01:00") == START
    for text in ("yesterday", "2026-13-01", "0001-01-01T00:00+23:00"):
        with pytest.raises(ConfigError, match="--since: expected a date"):
            parse_time(text)


# ------------------------------------------------------------------------------------------------ showing, diffing


def test_show_tells_everything():
    config = {"model_params": {"embed_dim": 8}, "epochs": 3}
    changes = {
        "full_config_json": canonical_json(config),
        "env_details_json": '{"device": "cpu", "versions": {"torch": "2"}}',
    }
    fill(
        "experiment_results.db",
        record("ab1", {"f1": 0.5, "usage": list(range(100))}, **changes, parent_id="gone", error="out of\nmemory"),
        record("ab2", parent_id="ab1", timestamp=START + timedelta(days=1)),
    )
    assert goe("runs", "show", "ab1").out.splitlines() == [
        "run ab1",
        "  status        finished",
        "  error         out of\\nmemory",
        "  name          a name",
        "  type          json",
        "  model         dense",
        "  dataset       parity (synthetic)",
        "  seed          0",
        "  started       2026-03-01 00:00:00 UTC",
        "  last written  2026-03-01 00:00:00 UTC",
        "  parent        gone",
        "  children      ab2",
        "  folder        runs/ab1",
        "config",
        *(f"  {line}" for line in json.dumps(config, indent=2, sort_keys=True).splitlines()),
        "environment",
        "  device          cpu",
        "  versions.torch  2",
        "metrics",
        "  f1  0.5",
        "lists",
        f"  usage  {'100 entries: ' + str(list(range(100)))[:84]}...",
    ]
    assert goe("runs", "show", "latest").out.startswith("run ab2\n")


def test_diff_shows_what_differs_and_nothing_else():
    def of(embed_dim: int, torch: str, **more: Any) -> dict[str, str]:
        config = {"model_params": {"embed_dim": embed_dim, "dropout": 0.1}, "epochs": 3, **more}
        return {
            "full_config_json": canonical_json(config),
            "env_details_json": canonical_json(
                {"versions": {"torch": torch}, "device": "cpu", "study": {"trial": embed_dim}}
            ),
        }

    fill(
        "experiment_results.db",
        record("a", {"f1": 0.5, "same": math.nan, "list": [1.0, 2.0], "gone": 1.0}, **of(8, "2.12")),
        record(
            "b",
            {"f1": 0.75, "same": math.nan, "list": [1.0, 4.0], "new": 1.0},
            **of(16, "2.13", seed=1),
            status="failed",
        ),
    )
    assert goe("runs", "diff", "a", "b").out.splitlines() == [
        "A a (finished)",
        "B b (failed)",
        "config",
        "                          A         B",
        "  model_params.embed_dim  8         16",
        "  seed                    (absent)  1",
        "metrics",
        "        A           B           difference",
        "  f1    0.5         0.75        0.25",
        "  list  [1.0, 2.0]  [1.0, 4.0]  2",
        "  only A: gone",
        "  only B: new",
        "environment",
        "                  A     B",
        "  versions.torch  2.12  2.13",
    ]
    assert goe("runs", "diff", "a", "a").out.splitlines()[2:] == [
        "config: no difference",
        "metrics: no difference",
        "environment: no difference",
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
)


@given(json_values, json_values)
def test_the_difference_is_zero_for_equal_values_alone_and_symmetric(left, right):
    assert difference(left, left) == 0
    assert difference(left, right) == difference(right, left) >= 0
    if difference(left, right) == 0:
        assert json.dumps(left) == json.dumps(right) or left == right


def test_differences_by_hand():
    assert difference([[1.0, 2.0], [3.0]], [[1.0, 2.5], [2.0]]) == 1.0
    assert difference({"a": 1}, {"a": 3}) == 2
    assert difference(math.inf, math.inf) == 0
    for left, right in (
        (1.0, math.nan),
        ([1.0], [1.0, 2.0]),
        ("a", "b"),
        (1.0, "1.0"),
        ({"a": 1}, {"b": 1}),
        ([1.0], 1.0),
    ):
        assert difference(left, right) == math.inf


# ------------------------------------------------------------------------------------------------------ exporting

cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4) | st.sampled_from(
    ["=1+1", "-x", '"\n']
)
floats = st.floats().map(lambda value: value + 0.0)  # SQLite keeps no sign of zero
export_metrics = st.dictionaries(
    st.sampled_from(["f1", "=cmd", "seed", "mixed"]), floats | st.lists(st.floats(allow_nan=False), max_size=2)
)
exported = st.lists(
    st.tuples(cells, st.none() | st.integers(-(2**63), 2**63 - 1), export_metrics, st.lists(floats, max_size=3)),
    max_size=4,
).map(
    lambda runs: [
        RunRecord(
            row(f"run-{number}", experiment_name=name, seed=seed, timestamp=START + timedelta(microseconds=number)),
            metrics,
            [HistoryRow(step, step / 3, name or "loss", value) for step, value in enumerate(points)],
        )
        for number, (name, seed, metrics, points) in enumerate(runs)
    ]
)


def expected_rows(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """A dictionary per run: its columns, then every metric of any run under a name of its own."""
    names = sorted({name for run in runs for name in run.metrics})
    labels = {name: "seed (metric)" if name == "seed" else name for name in names}
    return [{**run.experiment, **{labels[name]: run.metrics.get(name) for name in names}} for run in runs]


@EXAMPLES
@given(runs=exported)
def test_a_csv_export_reads_back_equal(tmp_path, runs):
    fill("r.db", *runs)
    with Store("r.db", read_only=True) as store:
        assert export(store, tmp_path / "runs.csv", RunFilter(), force=True) == len(runs)
        num_points = export(store, tmp_path / "history.csv", RunFilter(), history=True, force=True)

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return (
                json.dumps(value)
                .replace("-Infinity", '"-Infinity"')
                .replace(" Infinity", ' "Infinity"')
                .replace("[Infinity", '["Infinity"')
            )
        if isinstance(value, datetime):
            return value.isoformat()
        text = "" if value is None else str(value)
        return f"'{text}" if isinstance(value, str) and text[:1] in {*"=+-@\t\r"} - {""} else text

    with (tmp_path / "runs.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file, strict=True))
    assert found == [{cell(name): cell(value) for name, value in one.items()} for one in expected_rows(runs)]
    points = [(run.experiment["experiment_id"], point) for run in runs for point in run.history]
    with (tmp_path / "history.csv").open(newline="", encoding="utf-8") as file:
        read = [tuple(line.values()) for line in csv.DictReader(file, strict=True)]
    assert read == [
        (key, cell(point.name), str(point.step), str(point.epoch), str(point.value)) for key, point in points
    ]
    assert num_points == len(points)


@EXAMPLES
@given(runs=exported)
def test_a_parquet_export_reads_back_equal_and_typed(tmp_path, runs):
    fill("r.db", *runs)
    with Store("r.db", read_only=True) as store:
        assert export(store, tmp_path / "runs.parquet", RunFilter(), force=True) == len(runs)
        export(store, tmp_path / "history.parquet", RunFilter(), history=True, force=True)
    table = pq.read_table(tmp_path / "runs.parquet")
    expected = expected_rows(runs)
    for name in table.column_names[len(row("")) :]:
        values = [one[name] for one in expected]
        if any(isinstance(value, list) for value in values):  # JSON text, as strict as a parser may be
            for one in expected:
                if one[name] is not None:
                    one[name] = json.loads(json.dumps(one[name]), parse_constant=str)
            found = [
                None if text is None else json.loads(text, parse_constant=pytest.fail)
                for text in table[name].to_pylist()
            ]
            assert found == [one.pop(name) for one in expected]
            table = table.drop_columns([name])
        else:
            assert str(table.schema.field(name).type) == "double"
    found = [
        {name: value.astimezone(UTC) if isinstance(value, datetime) else value for name, value in line.items()}
        for line in table.to_pylist()
    ]
    assert repr(found) == repr(expected)
    types = {name: str(table.schema.field(name).type) for name in ("timestamp", "heartbeat", "epochs", "seed", "error")}
    assert types == {
        "timestamp": "timestamp[us, tz=UTC]",
        "heartbeat": "timestamp[us, tz=UTC]",
        "epochs": "int64",
        "seed": "int64",
        "error": "string",
    }
    history = pq.read_table(tmp_path / "history.parquet")
    assert [str(field.type) for field in history.schema] == ["string", "string", "int64", "double", "double"]
    points = [(run.experiment["experiment_id"], point) for run in runs for point in run.history]
    assert repr([tuple(line.values()) for line in history.to_pylist()]) == repr(
        [(key, point.name, point.step, point.epoch, point.value) for key, point in points]
    )


def test_an_export_takes_the_filters_of_the_list_and_never_replaces_unasked(monkeypatch):
    fill("experiment_results.db", record("a", {"f1": 0.1}), record("b", {"f1": 0.9}))
    ended = goe("export", "out.csv", "--where", "f1>0.5")
    assert (ended.code, ended.out) == (0, "1 run in out.csv\n")
    first = Path("out.csv").read_bytes()
    assert b"\r\nb," in first and b"\r\na," not in first
    again = goe("export", "out.csv")
    assert again.code == 2 and "--force" in again.err and Path("out.csv").read_bytes() == first
    assert goe("export", "out.csv", "--force").code == 0 and Path("out.csv").read_bytes() != first

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = Path("out.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        failed = goe("export", "out.csv", "--force")
    assert failed.code == 2 and "No space left" in failed.err
    assert Path("out.csv").read_bytes() == before and not list(Path().glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------- merging


def test_what_is_written_in_one_and_merged_into_the_other_is_there(db, tmp_path):  # noqa: F811
    """From SQLite to the other database and back, with everything that is hard to store."""
    metrics = {
        "f1": 0.1 + 0.2,
        "nan": math.nan,
        "inf": math.inf,
        "list": [1.5, math.nan, [-math.inf, 3]],
        "text": "x'%\n",
    }
    history = [
        HistoryRow(step, step / 7, name, value) for step in (0, 5) for name, value in (("a", 0.1), ("b", math.nan))
    ]
    known = RunRecord(
        row("r", timestamp=START + timedelta(microseconds=1), seed=2**63 - 1, parent_id="p", error="ü"),
        metrics,
        history,
    )
    first, last = str(tmp_path / "first.db"), str(tmp_path / "last.db")
    fill(first, known, record("s", status="failed"))
    before = Path(first).read_bytes()
    report = merge(first, db)
    assert (report.copied, report.updated, report.skipped, report.conflicts) == (2, 0, 0, [])
    assert contents(db) == contents(first) and Path(first).read_bytes() == before
    for source, target in ((db, last), (first, db), (last, db), (db, first)):
        assert merge(source, target).conflicts == []
        assert contents(target) == contents(first)
    assert (merge(db, last).copied, merge(db, last).skipped) == (0, 2)
    with Store(db) as store:  # the numbers that PostgreSQL counts with go on behind what was copied
        store.finish_experiment("s", {"x": 1.0})
        assert store.metrics("s") == {"x": 1.0}


Version = tuple[str, int, float]  # status, hour of the last sign of life, score
VERSIONS: list[Version | None] = [
    None,
    *itertools.product(["running", "failed", "finished"], [0, 1], [0.25, math.nan]),
]
PAIRS = {f"{number:03}": pair for number, pair in enumerate(itertools.product(VERSIONS, repeat=2))}


def side(runs: dict[str, Version | None]) -> list[RunRecord]:
    return [
        RunRecord(
            row(key, status=version[0], heartbeat=START + timedelta(hours=version[1])),
            {"f1": version[2]},
            [HistoryRow(1, 0.5, "loss", version[2])],
        )
        for key, version in runs.items()
        if version is not None
    ]


def verdict(ours: Version | None, theirs: Version | None) -> str:
    if theirs is None:
        return "not there"
    if ours is None:
        return "copied"
    our_rank, their_rank = ((one[0] == "finished", 0 if one[0] == "finished" else one[1]) for one in (ours, theirs))
    if repr(ours) == repr(theirs) or our_rank > their_rank:
        return "skipped"
    return "updated" if our_rank < their_rank else "conflict"


@pytest.mark.parametrize("batch", [7, 200])
def test_merging_follows_the_rules_and_changes_nothing_the_second_time(batch, monkeypatch):
    """For every pair of states of a run, missing ones too."""
    monkeypatch.setattr(merging, "RUNS_PER_BATCH", batch)
    said = {key: verdict(*pair) for key, pair in PAIRS.items()}
    taken = {key: pair[said[key] in ("copied", "updated")] for key, pair in PAIRS.items()}
    conflicts = [key for key, word in said.items() if word == "conflict"]
    words = list(said.values())
    fill("ours.db", *side({key: pair[0] for key, pair in PAIRS.items()}))
    fill("theirs.db", *side({key: pair[1] for key, pair in PAIRS.items()}))
    fill("expected.db", *side(taken))
    untouched = contents("theirs.db")

    report = merge("theirs.db", "ours.db")
    assert (report.copied, report.updated, report.skipped) == tuple(map(words.count, ("copied", "updated", "skipped")))
    assert report.conflicts == conflicts != []
    assert contents("ours.db") == contents("expected.db") and contents("theirs.db") == untouched
    again = merge("theirs.db", "ours.db")
    assert (again.copied, again.updated, again.conflicts) == (0, 0, conflicts)
    assert contents("ours.db") == contents("expected.db")

    assert merge("ours.db", "theirs.db").conflicts == conflicts
    peaceful = [key for key in PAIRS if key not in conflicts]
    with Store("ours.db", read_only=True) as ours, Store("theirs.db", read_only=True) as theirs:
        left, right = ours.records(peaceful), theirs.records(peaceful)
        assert [repr(left.get(key)) for key in peaceful] == [repr(right.get(key)) for key in peaceful]


def test_a_merge_that_is_cut_off_is_repeated(monkeypatch):
    fill("theirs.db", *(record(f"run-{number}", {"f1": float(number)}) for number in range(5)))
    fill("ours.db")
    monkeypatch.setattr(merging, "RUNS_PER_BATCH", 2)
    enter = Store.merge_records
    calls = iter(range(10))

    def cut(self: Store, *arguments: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return enter(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "merge_records", cut)
        assert goe("merge", "theirs.db", "--db", "ours.db").code == 130
    with Store("ours.db", read_only=True) as store:
        assert len(store.experiments()) == 2
    assert goe("merge", "theirs.db", "--db", "ours.db").out.startswith("3 runs copied, 0 brought up to date, 2 skipped")
    assert contents("ours.db") == contents("theirs.db")


def test_a_batch_is_entered_whole_or_not_at_all(monkeypatch):
    fill("ours.db", record("a", {"f1": 1.0}, status="running"))
    fill("theirs.db", record("a", {"f1": 2.0}), record("b", {"f1": 3.0}))
    refuse = "WHEN NEW.experiment_id = 'b' BEGIN SELECT RAISE(ABORT, 'no room for b'); END"
    raw_write("ours.db", f"CREATE TRIGGER refuse BEFORE INSERT ON metrics {refuse}")
    before = contents("ours.db")
    ended = goe("merge", "theirs.db", "--db", "ours.db")
    assert ended.code == 2 and "stopped after 0 runs" in ended.err and "Traceback" not in ended.err
    assert contents("ours.db") == before


def test_a_conflict_is_listed_and_ends_with_1():
    fill("ours.db", record("same"), record("a", {"f1": 0.5}))
    fill("theirs.db", record("same"), record("a", {"f1": 0.6}), record("new"))
    ended = goe("merge", "theirs.db", "--db", "ours.db")
    assert ended.code == 1
    assert ended.out.splitlines() == [
        "1 run copied, 0 brought up to date, 1 skipped (here already), 1 in conflict",
        "  conflict: a is another run here; both were left as they are",
        "The files in runs/ (weights, pictures, traces) are not in the database: copy those folders yourself.",
    ]
    with Store("ours.db", read_only=True) as store:
        assert store.metrics("a") == {"f1": 0.5}


def test_the_same_store_under_two_names_is_refused():
    fill("r.db", record("a"))
    Path("link.db").symlink_to("r.db")
    for other in ("r.db", "./r.db", "link.db", f"sqlite:///{Path.cwd()}/r.db"):
        ended = goe("merge", other, "--db", "r.db")
        assert ended.code == 2 and "merge: both names are" in ended.err
    missing = goe("merge", "missing.db", "--db", "new.db")
    assert missing.code == 2 and "no results at" in missing.err and not Path("new.db").exists()


# ------------------------------------------------------------------------------------------------------- replay


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run of a routed model."""
    folder = tmp_path_factory.mktemp("trained")
    run_in(folder, small_config(model_type="goe_original", epochs=1))
    return folder


@pytest.fixture
def original(trained: Path, tmp_path: Path) -> str:
    """The id of that run, in a copy of the folder's results."""
    shutil.copy(trained / "experiment_results.db", tmp_path)
    with Store(read_only=True) as store:
        return store.experiments()[0]["experiment_id"]


def test_a_replay_on_the_same_machine_is_identical(original):
    ended = goe("replay", original, "--quiet", "--tolerance", "0")
    assert (ended.code, ended.err) == (0, "")
    with Store(read_only=True) as store:
        first, second = store.experiments()
        clocks = {
            name for name in store.metrics(original) if any(word in name for word in ("latency", "second", "memory"))
        }
        num_metrics = len(store.metrics(original))
    assert second["parent_id"] == original and second["full_config_json"] == first["full_config_json"]
    assert ended.out.splitlines() == [
        f"replay {second['experiment_id']} of {original}: finished",
        f"identical: {num_metrics - len(clocks)} metrics compared, {len(clocks)} measured by a clock left out",
        "environment: no difference",
    ]
    assert f"  children      {second['experiment_id']}\n" in goe("runs", "show", original).out


def test_a_metric_that_was_tampered_with_is_found_and_so_is_another_environment(original):
    """Both in one replay: each line is there for its reason."""
    with Store() as store:
        stored = store.experiment(original)
        metrics = store.metrics(original)
        kept = json.loads(stored["env_details_json"])
        kept["versions"]["torch"] = "1.0"
        kept["data"]["sha256"]["train"] = "0" * 64
        store.update_environment(original, kept)
        loads = [metrics["val_f1_per_class"][0] + 0.125, *metrics["val_f1_per_class"][1:]]
        tampered = metrics | {"final_val_f1": metrics["final_val_f1"] + 0.25, "val_f1_per_class": loads, "gone": 1.0}
        tampered["inference_latency_ms_batch"] += 1000.0
        del tampered["final_val_loss"]
        store.finish_experiment(original, tampered)
    ended = goe("replay", original[:-1], "--quiet")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[1] == "The data are not those of the original: that alone explains other metrics."
    assert lines[2].startswith("largest difference: 0.25 in final_val_f1 (")
    assert [line.split()[0] for line in lines[4:6]] == ["val_f1_per_class", "final_val_f1"] or [
        line.split()[0] for line in lines[4:6]
    ] == ["final_val_f1", "val_f1_per_class"]
    f1 = next(line for line in lines if line.startswith("  final_val_f1"))
    assert f1.split()[1:] == [repr(tampered["final_val_f1"]), repr(metrics["final_val_f1"]), "0.25"]
    assert lines[6:9] == ["  only original: gone", "  only replay: final_val_loss", "environment"]
    assert [line.split()[0] for line in lines[10:]] == ["data.sha256.train", "versions.torch"]
    assert lines[11].split()[1] == "1.0"


def test_the_tolerance_decides_the_exit_code(original):
    with Store() as store:
        metrics = store.metrics(original)
        store.finish_experiment(original, metrics | {"final_val_f1": metrics["final_val_f1"] - 0.25})
    assert goe("replay", "latest", "--quiet", "--tolerance", "0.2").code == 1


def test_what_exceeds_a_tolerance():
    result = Result("b", "finished", {}, Path("runs/b"))

    def replay(left: dict[str, Any], right: dict[str, Any]) -> Replay:
        return Replay("a", result, metric_differences(left, right), [])

    assert replay({"x": 1.0}, {"x": 1.25}).exceeds(0.2) and not replay({"x": 1.0}, {"x": 1.25}).exceeds(0.25)
    assert replay({"x": 1.0}, {}).exceeds(1e9), "what is gone cannot be vouched for"
    assert not replay({}, {"x": 1.0}).exceeds(0), "a newer program may measure more"
    assert replay({"x": [1.0]}, {"x": [1.0, 2.0]}).exceeds(1e9)
    assert not replay({"x": math.nan}, {"x": math.nan}).exceeds(0)
    largest = replay({"x": 1.0, "y": [0.0, 5.0], "z": 1.0}, {"x": 2.0, "y": [0.0, 7.0], "new": 9.0}).largest
    assert largest == ("y", [0.0, 5.0], [0.0, 7.0], 2.0)


def test_a_replay_that_does_not_finish_ends_with_1(original):
    config = small_config(optimizer_params={"name": "sgd", "lr": 1e38, "grad_clip_norm": None}).to_dict()
    raw_write("experiment_results.db", "UPDATE experiments SET full_config_json = ?", canonical_json(config))
    ended = goe("replay", original, "--quiet")
    assert ended.code == 1
    assert "diverged\n  the loss is nan" in ended.out and "identical" not in ended.out


def test_a_replay_of_another_status_is_refused():
    fill("experiment_results.db", *(record(status, {"f1": 1.0}, status=status) for status in STATUSES), record("none"))
    for status in (*STATUSES, "none"):
        ended = goe("replay", status)
        assert ended.code == 2
        expected = {"none": "is finished, but without metrics", "finished": "run finished:1"}.get(
            status, f"is {status}"
        )
        assert expected in ended.err or status == "finished"
        assert "Traceback" not in ended.err
    with Store(read_only=True) as store:
        assert len(store.experiments()) == len(STATUSES) + 1
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["runs", "shwo", "a"], "expected nothing, `show ID`, `diff ID ID` or one of archive, delete"),
        (["runs", "show"], "got 'show'"),
        (["runs", "show", "a", "a"], "got 'show a a'"),
        (["runs", "show", "zzz"], "no experiment 'zzz'"),
        (["runs", "diff", "a"], "got 'diff a'"),
        (["runs", "diff", "a", "a", "--limt"], "Did you mean '--limit'?"),
        (["runs", "diff", "a", "zzz"], "no experiment 'zzz'"),
        (["runs", "--limit", "0", "show", "a"], "--limit: chooses runs for the list, not for `show`"),
        (["runs", "--status", "failed", "diff", "a", "a"], "--status: chooses runs for the list"),
        (["runs", "--status", "finshed"], "--status: unknown 'finshed'. Did you mean 'finished'?"),
        (["runs", "--sort", "sead"], "no column and no metric 'sead' in"),
        (["runs", "--sort", "test_f1"], "--sort: 'test_f1' is a score of the test split"),
        (["runs", "--where", "test_f1>0.5"], "--where: 'test_f1' is a score of the test split"),
        (["runs", "--where", "nothing>0.5"], "--where: no metric 'nothing' in"),
        (["runs", "--where", "f1"], "--where: expected a metric"),
        (["runs", "--metrics", "final_val_f1,nothing"], "--metrics: no metric 'nothing' in"),
        (["runs", "--since", "soon"], "--since: expected a date"),
        (["runs", "--limit", "-1"], "--limit: expected"),
        (["runs", "--limt", "1"], "Did you mean '--limit'?"),
        (["runs", "--db", "missing.db"], "no results at"),
        (["export"], "the following arguments are required: FILE"),
        (["export", "out.txt"], "out.txt: expected a name that ends in .csv or .parquet"),
        (["export", "nowhere/out.csv"], "not a file in an existing folder"),
        (["export", "out.csv", "--where", "nothing>1"], "--where: no metric 'nothing' in"),
        (["export", "out.csv", "--status", "done"], "--status: unknown 'done'"),
        (["export", "out.csv", "--db", "missing.db"], "no results at"),
        (["merge"], "the following arguments are required: OTHER_DB"),
        (["merge", "missing.db"], "no results at"),
        (["merge", "experiment_results.db"], "both names are"),
        (["merge", "notes.txt"], "is not a SQLite file"),
        (["replay"], "the following arguments are required: ID"),
        (["replay", "zzz"], "no experiment 'zzz'"),
        (["replay", "a", "--tolerance", "-1"], "--tolerance: expected a number that is not negative"),
        (["replay", "a", "--tolerance", "nan"], "--tolerance: expected a number that is not negative"),
        (["replay", "a"], "run a"),
        (["replay", "a", "--device", "gpu"], "expected auto, cpu, cuda, cuda:N or mps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_with_2_and_change_nothing(arguments, complaint):
    config = small_config().to_dict() | ({} if "--device" in arguments else {"epochs": "many"})
    scores = {"final_val_f1": 0.5, "test_f1": 0.5}
    fill("experiment_results.db", record("a", scores, full_config_json=canonical_json(config)))
    Path("notes.txt").write_text("no database")
    before, names = contents("experiment_results.db"), sorted(Path().iterdir())
    ended = goe(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert complaint in ended.err and "Traceback" not in ended.err
    assert contents("experiment_results.db") == before and sorted(Path().iterdir()) == names


def test_an_empty_store_is_no_mistake():
    Store().close()
    for arguments in (["runs"], ["runs", "--sort", "final_val_f1"], ["export", "out.csv"], ["export", "out.parquet"]):
        assert goe(*arguments).code == 0
    assert "no runs in" in goe("runs").err
    latest = goe("runs", "show", "latest")
    assert latest.code == 2 and "no runs in" in latest.err


def test_a_metric_that_resembles_another_is_a_metric():
    fill("experiment_results.db", record("a", {"inference_latency_ms_batch_p95": 1.0}))
    flags = ["--sort", "inference_latency_ms_batch_p95", "--where", "inference_latency_ms_batch_p95<2"]
    assert [run["experiment_id"] for run in listed(*flags)] == ["a"]


def test_the_test_scores_may_be_shown():
    fill("experiment_results.db", record("a", {"test_f1": 0.25}))
    assert "0.2500" in goe("runs", "--metrics", "test_f1").out
