"""Is anything lost? Runs that are killed, and many processes that write into one store, counted.

`kills`: runs with checkpoints are killed (-9) at random moments, all in one folder with one database, and resumed.
`writers`: processes run short experiments side by side, all into one SQLite file and one CSV file, while it is read.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import multiprocessing
import os
import random
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import chdir, closing
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from research_eval.db_utils import DB_FILE, Store
from research_eval.experiment import run
from research_eval.schema import ExperimentConfig, config_from_dict
from research_eval.store.csv_file import CSV_FILE
from research_eval.store.metrics import is_measured
from research_eval.store.pending import PENDING_FOLDER
from research_eval.training.checkpoint import checkpoint_exists
from research_eval.training.fit import CHECKPOINT_FILE

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["research_eval.experiment", "torch._dynamo", "alembic.command"])
SEEDS = 5  # uninterrupted runs to compare with
LOCKED = "database is locked"


def config_of(name: str, seed: int, epochs: int) -> ExperimentConfig:
    return config_from_dict(
        {
            "experiment_name": name,
            "model_type": "dense",
            "dataset_type": "synthetic",
            "dataset_name": "parity",
            "epochs": epochs,
            "batch_size": 16,
            "seed": seed,
            "dataset_params": {"num_samples": 100, "seq_len": 6},
            "model_params": {"embed_dim": 8, "num_heads": 2, "num_layers": 1, "dropout": 0.2},
            "training_params": {"device": "cpu", "num_threads": 1, "log_every": 1, "checkpoint_every": 2},
        }
    )


def repeatable(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not is_measured(name)}


def series(store: Store, experiment_id: str) -> list[tuple[int, str, float]]:
    return [(row.step, row.name, row.value) for row in store.history(experiment_id) if "second" not in row.name]


def csv_rows() -> tuple[list[dict[str, str]], int]:
    """The rows of the CSV file, and how many of them have not as many cells as the header."""
    with Path(CSV_FILE).open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    return [dict(zip(header, line, strict=False)) for line in lines], sum(len(line) != len(header) for line in lines)


def database_is_whole() -> bool:
    with closing(sqlite3.connect(DB_FILE)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# ---------------------------------------------------------------------------------------------------------- kills


def victim(name: str, seed: int, epochs: int, begun: Event) -> None:
    config = config_of(name, seed, epochs)
    begun.set()
    run(config, db=DB_FILE, quiet=True)


def kill_one(name: str, seed: int, epochs: int, delay: float) -> bool:
    """Whether the run was still at work after so many seconds, when it was killed."""
    begun = FORKS.Event()
    process = FORKS.Process(target=victim, args=(name, seed, epochs, begun))
    process.start()
    begun.wait()
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def state_of(name: str) -> str:
    """What there is of a run that was killed."""
    with Store(DB_FILE) as store:
        found = [row for row in store.experiments() if row["experiment_name"] == name]
    if not found:
        return "no row yet"
    if found[0]["status"] == "finished":
        return "stored as finished"
    folder = Path("runs") / found[0]["experiment_id"]
    if list(folder.glob("*.tmp")):
        return "inside a write to its folder"
    return "with a checkpoint" if checkpoint_exists(folder / CHECKPOINT_FILE) else "without a checkpoint"


def kills(arguments: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(arguments.seed)  # noqa: S311
    expected, durations = [], []
    for seed in range(SEEDS):
        begun = time.perf_counter()
        result = run(config_of("whole", seed, arguments.epochs), db="whole.db", quiet=True)
        durations.append(time.perf_counter() - begun)
        with Store("whole.db", read_only=True) as store:
            expected.append((repeatable(store.metrics(result.experiment_id)), series(store, result.experiment_id)))
    longest = sorted(durations)[SEEDS // 2] * 1.2
    Path(CSV_FILE).unlink()
    states: Counter[str] = Counter()
    corrupt = lost = inexact = attempts = 0
    finished: dict[str, dict[str, Any]] = {}
    for number in range(arguments.kills):
        seed, name = number % SEEDS, f"run {number}"
        while True:
            attempts += 1
            attempt = f"{name}, attempt {attempts}"
            if kill_one(attempt, seed, arguments.epochs, chance.uniform(0, longest)):
                break
            with Store(DB_FILE, read_only=True) as store:  # it was faster: an experiment that must not be lost
                finished |= {row["experiment_id"]: store.metrics(row["experiment_id"]) for row in store.experiments()}
        corrupt += Path(DB_FILE).exists() and not database_is_whole()
        states[state_of(attempt)] += 1
        result = run(config_of(attempt, seed, arguments.epochs), db=DB_FILE, resume=True, quiet=True)
        with Store(DB_FILE, read_only=True) as store:
            metrics = store.metrics(result.experiment_id)
            inexact += (repeatable(metrics), series(store, result.experiment_id)) != expected[seed]
            finished[result.experiment_id] = metrics
    with Store(DB_FILE, read_only=True) as store:
        rows = {row["experiment_id"]: row["status"] for row in store.experiments()}
        lost = sum(
            rows.get(key) != "finished" or repr(store.metrics(key)) != repr(metrics)
            for key, metrics in finished.items()
        )
    lines, malformed = csv_rows()
    in_csv = Counter(line["experiment_id"] for line in lines if line["status"] == "finished")
    return {
        "kills": arguments.kills,
        "corrupt databases": corrupt + (not database_is_whole()),
        "finished experiments": len(finished),
        "lost finished experiments": lost,
        "exact resumes": arguments.kills - inexact,
        "rows in the database": len(rows),
        "finished, but not once in the CSV file": sum(in_csv[key] != 1 for key in finished),
        "malformed lines in the CSV file": malformed,
        "results still waiting": len(list(PENDING_FOLDER.glob("*"))),
        "seconds of an uninterrupted run": round(sorted(durations)[SEEDS // 2], 2),
        "killed": dict(states.most_common()),
    }


# -------------------------------------------------------------------------------------------------------- writers


class LockedLines(logging.Handler):
    """Counts log lines about a locked database, which a run survives."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += LOCKED in record.getMessage()


def writer(process: int, count: int) -> None:
    """In a process of its own: so many experiments, and a file that says what went wrong."""
    handler = LockedLines()
    logging.getLogger("research_eval").addHandler(handler)
    errors = []
    for number in range(count):
        try:
            run(config_of(f"{process}-{number}", number, epochs=1), db=DB_FILE, quiet=True)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    Path(f"writer{process}.json").write_text(json.dumps({"locked": handler.count, "errors": errors}))


def writers(arguments: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    members = [FORKS.Process(target=writer, args=(number, arguments.runs)) for number in range(arguments.processes)]
    for member in members:
        member.start()
    reads = []
    while any(member.is_alive() for member in members):
        if Path(DB_FILE).exists():
            start = time.perf_counter()
            try:
                with Store(DB_FILE, read_only=True) as store:
                    store.find_runs(sort="timestamp", descending=True, limit=20)
                reads.append(time.perf_counter() - start)
            except ValueError:  # no tables yet
                pass
        time.sleep(0.5)
    for member in members:
        member.join()
    seconds = time.perf_counter() - begun
    reports = [json.loads(Path(f"writer{number}.json").read_text()) for number in range(arguments.processes)]
    names = {f"{process}-{number}" for process in range(arguments.processes) for number in range(arguments.runs)}
    with Store(DB_FILE, read_only=True) as store:
        rows = [row for row in store.experiments() if row["status"] == "finished"]
        complete = sum(
            len(metrics) > 0 for metrics in store.metrics_of([row["experiment_id"] for row in rows]).values()
        )
    lines, malformed = csv_rows()
    return {
        "experiments": len(names),
        "finished rows in the database": len(rows),
        "of these with metrics": complete,
        "rows in the CSV file": len(lines),
        "every experiment once in both": sorted(row["experiment_name"] for row in rows)
        == sorted(line["experiment_name"] for line in lines)
        == sorted(names),
        "malformed lines in the CSV file": malformed,
        f'"{LOCKED}"': sum(report["locked"] + sum(LOCKED in text for text in report["errors"]) for report in reports),
        "other errors": [text for report in reports for text in report["errors"]],
        "database is whole": database_is_whole(),
        "results still waiting": len(list(PENDING_FOLDER.glob("*"))),
        "reads meanwhile": len(reads),
        "slowest read, seconds": round(max(reads, default=0.0), 3),
        "seconds": round(seconds, 1),
    }


QUESTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"kills": kills, "writers": writers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--question", choices=QUESTIONS, action="append", help="default: all")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=6, help="of a run that is killed; of 5 steps each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--runs", type=int, default=200, help="experiments of each process")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/reliability.json"))
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    logging.getLogger("research_eval").setLevel(logging.WARNING)
    for question in arguments.question or QUESTIONS:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            answers = QUESTIONS[question](arguments)
        print(f"{question} ({time.perf_counter() - begun:.0f} s)")
        for name, value in answers.items():
            print(f"  {name:<40} {value}")
        known = json.loads(output.read_text()) if output.exists() else {}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**known, question: answers}, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
