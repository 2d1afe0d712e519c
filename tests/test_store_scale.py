"""The benchmark of the store, made small: what it fills in is what runs would have written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from support import ROOT

from research_eval.db_utils import RunFilter, Store
from research_eval.store.find import find_runs


def test_the_benchmark_fills_a_store_and_measures_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("store_scale", ROOT / "benchmarks" / "store_scale.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "store_scale", benchmark)
    spec.loader.exec_module(benchmark)
    flags = "--runs 40 --points 7 --inserts 2 --repeats 1 --databases sqlite --folder kept --output figures.json"
    assert benchmark.main(flags.split()) == 0
    figures = json.loads(Path("figures.json").read_text())["sqlite"]
    assert figures["list_seconds"].keys() == benchmark.LISTINGS.keys() and figures["megabytes"]["total"] > 0
    with Store("kept/scale.db", read_only=True) as store:
        ids = list(store.statuses())
        assert len(ids) == 42
        assert {len(store.history(experiment_id)) for experiment_id in ids} == {7}
        finished = store.find_runs(RunFilter(status="finished"))
        assert all(len(store.metrics(row["experiment_id"])) > 10 for row in finished) and len(finished) > 20
        best = find_runs(store, RunFilter(), sort="final_val_f1", limit=5, metrics=["final_val_f1"])
        scores = [row["metrics"]["final_val_f1"] for row in best]
        assert scores == sorted(scores, reverse=True)


def plan(store: Store, **options: object) -> list[str]:
    """How SQLite goes about the first query of a list."""
    seen: list[tuple[str, object]] = []

    @sa.event.listens_for(store._engine, "before_cursor_execute")
    def note(_c: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        seen.append((statement, parameters))

    store.find_runs(limit=20, **options)  # type: ignore[arg-type]
    statement, parameters = next(pair for pair in seen if pair[0].startswith("SELECT"))
    with store._engine.connect() as connection:
        rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()  # type: ignore[arg-type]
    return [str(row[-1]) for row in rows]


@pytest.mark.parametrize(
    ("options", "index"),
    [
        ({"sort": "timestamp", "descending": True}, "COVERING INDEX ix_experiments_listing"),
        ({"sort": "experiment_name"}, "COVERING INDEX ix_experiments_listing"),
        ({"sort": "final_val_f1", "descending": True}, "INDEX ix_metrics_number"),
        ({"wanted": RunFilter(where=(("f1", ">", 0.5),))}, "INDEX ix_metrics_experiment_id_metric_name"),
    ],
)
def test_lists_are_read_from_an_index(options: dict[str, object], index: str, tmp_path: Path) -> None:
    with Store(str(tmp_path / "r.db")) as store:
        found = plan(store, **options)
    assert any(index in line for line in found), found
    assert not any(line.startswith("SCAN experiments") and "COVERING" not in line for line in found), found
