"""Studies: many experiments whose settings a sampler chooses. A trial is `experiment.run` with sampled values.

The study's Optuna storage is the queue: every worker, here or in another process, claims the next trial under one lock,
so that the number of trials is exact. A trial whose worker died goes on, under its number and from its checkpoint.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import filelock
import numpy as np
import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url

from research_eval.analysis.study_trials import TrialRecord, best_of, own_trials, trial_records
from research_eval.db_utils import RunFilter, Store, canonical_json, database_url, foreign_table
from research_eval.errors import ConfigError
from research_eval.schema import config_from_dict
from research_eval.search_space import Infeasible, known_values, random_pick
from research_eval.seeding import derive_seed
from research_eval.study_results import StudyFiles, write_csv_of, write_results
from research_eval.system.progress import StudyProgress
from research_eval.system.untrusted import stored_object
from research_eval.trials import (
    MAX_DRAFTS,
    Outcome,
    StudyOptions,
    experimental,
    make_pruner,
    over_budget,
    splits_of,
    train_config,
    train_trial,
)

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60  # without a heartbeat a trial's worker counts as dead
MAX_ATTEMPTS = 3  # at one trial, by workers that died
POLL_SECONDS = 0.5
CSV_SECONDS = 5.0
CHECKPOINT_SECONDS = 3.0
STOP_SECONDS = 30.0  # for workers to write their checkpoints
NEW_STATE = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}  # everything else is FAIL


# -------------------------------------------------------------------------------------------------------- storage


def storage_url(storage: str) -> str:
    """The URL of a study storage: a path, sqlite:///path or postgresql://... Raises ConfigError."""
    try:
        return database_url(storage)
    except ConfigError as error:
        raise ConfigError(f"--storage: {error}") from error


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """The storage, created where it is not there. SQLite in WAL mode: readers do not block writers."""
    is_file = make_url(url).drivername == "sqlite"
    try:
        if is_file:
            _check_ours(url)
        with experimental():
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if is_file else {"pool_pre_ping": True},
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
            )
        if is_file:
            sa.event.listen(storage.engine, "connect", _set_up_sqlite)
            storage.engine.dispose()  # connections made before
    except (sa.exc.SQLAlchemyError, RuntimeError) as error:
        raise ConfigError(f"--storage: {str(getattr(error, 'orig', error)).strip()}") from error
    return storage


def _check_ours(url: str) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        foreign = foreign_table(connection)
    if foreign is not None:
        raise ConfigError(
            f"--storage: {make_url(url).database} belongs to another program (it has a table {foreign!r}); it was left "
            "alone. Give another name."
        )


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


@contextmanager
def study_lock(url: str, study_name: str) -> Iterator[None]:
    """Held by one process at a time, on whatever machine it runs."""
    address = make_url(url)
    if address.drivername == "sqlite":
        with filelock.FileLock(f"{address.database}.study.lock", timeout=120):
            yield
        return
    engine = sa.create_engine(url, poolclass=sa.NullPool)  # closed with the block
    with engine.begin() as connection:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(zlib.crc32(study_name.encode()))))
        yield


class Desk:
    """The study as a worker sees it: what is to be done, what is claimed, what is done.

    Raises ConfigError for a study that was begun with other settings.
    """

    def __init__(self, options: StudyOptions) -> None:
        self.options = options
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self._lock():
            self.storage = open_storage(options.storage)
            self.study = optuna.create_study(
                study_name=options.study_name,
                storage=self.storage,
                directions=options.directions,
                pruner=make_pruner(options),
                load_if_exists=True,
            )
            self.study_id = self.storage.get_study_id_from_name(options.study_name)
            self._check_settings()

    def close(self) -> None:
        """Give back the connections to the storage."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    def _lock(self) -> Any:
        return study_lock(self.options.storage, self.options.study_name)

    def _check_settings(self) -> None:
        wanted, known = settings_of(self.options), self.study.user_attrs.get("settings")
        if known is None and self.study.get_trials(deepcopy=False):
            raise ConfigError(
                f"--study_name: {self.options.study_name!r} in this storage was made by another program: choose another"
            )
        if known is None:
            self.study.set_user_attr("settings", wanted)
            return
        changed = [name for name in wanted if wanted[name] != known.get(name)]
        if changed:
            lines = [f"  {name}: {_short(known.get(name))} -> {_short(wanted[name])}" for name in changed]
            raise ConfigError(
                f"--study_name: study {self.options.study_name!r} was begun with other settings. Give the same ones "
                "to go on with it, or another name to begin a new one:\n" + "\n".join(lines)
            )

    def own_trials(self) -> list[FrozenTrial]:
        """The trials that the budget counts: not the past runs that teach the sampler."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if "warm_start" not in trial.user_attrs]

    def claim(self, worker: str) -> int | None:
        """The id of a trial that is `worker`'s from now on; None where all are taken."""
        with self._lock():
            trials = self.own_trials()
            stale = set(self.storage._get_stale_trial_ids(self.study_id))
            for trial in trials:
                # Under the lock: a running trial without a worker has been let go, or its worker died on taking it.
                if trial.state == TrialState.RUNNING and (
                    trial._trial_id in stale or not trial.user_attrs.get("worker")
                ):
                    attempts = trial.user_attrs.get("attempts", 1) + (trial._trial_id in stale)
                    if attempts > MAX_ATTEMPTS:
                        self.finish(trial._trial_id, Outcome("failed", reason=f"its worker died {MAX_ATTEMPTS} times"))
                        continue
                    return self._take(trial._trial_id, worker, attempts)
            for trial in trials:
                if trial.state == TrialState.WAITING:
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
                    return self._take(trial._trial_id, worker, 1)
            if len(trials) < self.options.n_trials:
                return self._take(self.storage.create_new_trial(self.study_id), worker, 1)
        return None

    def _take(self, trial_id: int, worker: str, attempts: int) -> int:
        self.storage.record_heartbeat(trial_id)
        self.storage.set_trial_user_attr(trial_id, "attempts", attempts)
        self.storage.set_trial_user_attr(trial_id, "worker", worker)
        return trial_id

    def release(self, worker: str, died: bool) -> None:
        """Let others go on with the trials of a worker that has stopped."""
        with self._lock():
            for trial in self.own_trials():
                if trial.state == TrialState.RUNNING and trial.user_attrs.get("worker") == worker:
                    attempts = trial.user_attrs.get("attempts", 1) + died
                    self.storage.set_trial_user_attr(trial._trial_id, "attempts", attempts)
                    self.storage.set_trial_user_attr(trial._trial_id, "worker", None)

    def finish(self, trial_id: int, outcome: Outcome) -> None:
        """Enter how a trial ended. Whoever else had taken it for dead and finished it before has the last word."""
        if self.storage.get_trial(trial_id).state.is_finished():
            return
        self.storage.set_trial_user_attr(trial_id, "status", outcome.status)
        if outcome.reason:
            self.storage.set_trial_user_attr(trial_id, "reason", outcome.reason)
        number = self.storage.get_trial(trial_id).number
        values = None if outcome.values is None else list(outcome.values)
        state = NEW_STATE.get(outcome.status, TrialState.FAIL)
        self.study.tell(number, values=values, state=state, skip_if_finished=True)

    def waits_for_others(self) -> bool:
        """Whether a trial is still at work elsewhere."""
        return any(trial.state == TrialState.RUNNING for trial in self.own_trials())

    @contextmanager
    def heartbeat(self, trial_id: int) -> Iterator[None]:
        """Sign that the trial is at work, every few seconds."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(HEARTBEAT_SECONDS):
                try:
                    self.storage.record_heartbeat(trial_id)
                except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError):
                    log.debug("no heartbeat", exc_info=True)  # the next one may come through

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def settings_of(options: StudyOptions) -> dict[str, Any]:
    """What makes trials comparable; a study keeps to it."""
    base = {key: value for key, value in options.space.base.items() if key != "training_params"}
    return {
        **base,
        "objectives": list(options.objectives),
        "search_space": options.space.describe(),
        "fixed": options.space.fixed,
        "seed": options.seed,
        "seeds_per_trial": options.seeds_per_trial,
        "max_params": options.max_params,
        "max_flops": options.max_flops,
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


# -------------------------------------------------------------------------------------------------------- workers


def work(desk: Desk, worker: str, progress: StudyProgress | None = None) -> int:
    """Train trials until all are done or the time is up. Exit code 0, or 128 + signal where one stopped the work."""
    options, parent = desk.options, os.getppid()
    while not _time_is_up(options) and os.getppid() == parent:
        trial_id = desk.claim(worker)
        if trial_id is None:
            if not desk.waits_for_others():
                return 0
            time.sleep(POLL_SECONDS)
            continue
        with desk.heartbeat(trial_id):
            outcome = train_trial(desk.study, desk.storage, trial_id, options)
        if outcome.status == "interrupted":
            desk.release(worker, died=False)
            return outcome.exit_code
        desk.finish(trial_id, outcome)
        if progress is not None:
            progress.update(trial_records(desk.study))
    return 0


def _time_is_up(options: StudyOptions) -> bool:
    return options.deadline is not None and time.time() >= options.deadline


def _worker_process(options: StudyOptions, worker: str) -> None:
    """A process of its own."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between two runs; during a run it is a request to stop
    with _quiet_runs():
        raise SystemExit(work(Desk(options), worker))


@contextmanager
def _quiet_runs() -> Iterator[None]:
    """Of hundreds of runs only errors are of interest; how they end is in the line of their trial."""
    loggers = [logging.getLogger(f"research_eval.{name}") for name in ("experiment", "training", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Crew:
    """The worker processes of this command. One that dies is replaced, and its trial goes on in the new one."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._context = multiprocessing.get_context("spawn")
        self._members: dict[str, BaseProcess] = {}
        self._deaths = 0  # since a trial was finished
        self._done = -1
        for _ in range(desk.options.n_jobs):
            self._start()

    def _start(self) -> None:
        worker = secrets.token_hex(8)
        process = self._context.Process(target=_worker_process, args=(self._desk.options, worker))
        process.start()
        self._members[worker] = process

    def at_work(self) -> bool:
        """Look after the workers; False when all have gone home. Raises ConfigError where they only die."""
        done = sum(trial.state.is_finished() for trial in self._desk.own_trials())
        if done != self._done:
            self._done, self._deaths = done, 0
        for worker, process in list(self._members.items()):
            if process.is_alive():
                continue
            process.join()
            del self._members[worker]
            self._desk.release(worker, died=True)
            if process.exitcode and not _time_is_up(self._desk.options):
                self._deaths += 1
                if self._deaths > MAX_ATTEMPTS * self._desk.options.n_jobs:
                    raise ConfigError(
                        f"--n_jobs: {self._deaths} workers died in a row (exit code {process.exitcode}); what they "
                        "said is above. --n_jobs 1 works in this process."
                    )
                log.warning("worker %d died (exit code %d): another one takes its trial", process.pid, process.exitcode)
                self._start()
        return bool(self._members)

    def wait(self, seconds: float) -> None:
        """Until all have ended, or the time is over."""
        limit = time.time() + seconds
        for process in self._members.values():
            process.join(max(0.0, limit - time.time()))

    def stop(self) -> None:
        """Ask for checkpoints, and wait; whoever does not answer is killed."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._members.values():
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, number)
            self.wait(STOP_SECONDS)
        for worker in self._members:
            self._desk.release(worker, died=False)
        self._members.clear()


# ---------------------------------------------------------------------------------------------------------- studies


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM has arrived; a run that is cut off by it counts as interrupted."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Between two runs SIGINT and SIGTERM end the study; during a run they end that first."""

    def receive(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    try:
        previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def tune(options: StudyOptions, timeout: float | None = None, quiet: bool = False) -> int:
    """Run a study, or go on with it, until it has `n_trials`. Prints the best and writes the files of the study.

    Exit code 0; 1 where no trial was finished; 128 + signal where one stopped it. Raises ConfigError.
    """
    if timeout is not None:
        options = replace(options, deadline=time.time() + timeout)
    check_feasible(options)
    desk = Desk(options)
    try:
        with _quiet_runs():
            return _run_study(desk, quiet)
    finally:
        desk.close()


def _run_study(desk: Desk, quiet: bool) -> int:
    options = desk.options
    if options.warm_start:
        add_past_runs(desk)
    if options.sampler == "grid":
        enqueue_grid(desk)
        options = desk.options
    files = files_of(options)
    exit_code = 0
    try:
        with _signals_raise(), _progress(options, quiet) as progress:
            progress.update(trial_records(desk.study))
            exit_code = _run_here(desk, progress, files) if options.n_jobs == 1 else _supervise(desk, progress, files)
    except Stopped as stopped:
        exit_code = 128 + stopped.number
    written = write_results(desk.study, options.objectives, files, options.db)
    records = own_trials(trial_records(desk.study))
    print(summary(options, records, written, exit_code))
    if exit_code:
        return exit_code
    return 0 if any(record.status == "finished" for record in records) or _time_is_up(options) else 1


def _progress(options: StudyOptions, quiet: bool) -> StudyProgress:
    largest_is_best = options.directions[0] == "maximize"
    return StudyProgress(options.n_trials, options.objectives, largest_is_best, quiet)


def objective(trial: optuna.Trial, options: StudyOptions) -> float | tuple[float, ...]:
    """One trial for a study that somebody else runs with `optuna.Study.optimize`.

    Raises optuna.TrialPruned, and RuntimeError for a run that failed or diverged.
    """

    def pick(name: str, distribution: BaseDistribution) -> Any:
        if isinstance(distribution, CategoricalDistribution):
            return trial.suggest_categorical(name, distribution.choices)
        assert isinstance(distribution, IntDistribution | FloatDistribution)
        low, high, step, log_scale = distribution.low, distribution.high, distribution.step, distribution.log
        if isinstance(distribution, IntDistribution):
            return trial.suggest_int(name, int(low), int(high), step=int(step or 1), log=log_scale)
        return trial.suggest_float(name, low, high, step=step, log=log_scale)

    try:
        config = config_from_dict(options.space.sample(pick), source="trial")
    except (Infeasible, ConfigError) as problem:
        raise optuna.TrialPruned(f"infeasible: {problem}") from problem
    reason = over_budget(config, options)
    if reason is not None:
        raise optuna.TrialPruned(f"infeasible: {reason}")
    outcome = train_config(trial.study, trial.storage, trial._trial_id, options, config)
    if outcome.values is not None:
        return outcome.values if len(outcome.values) > 1 else outcome.values[0]
    if outcome.status == "pruned":
        raise optuna.TrialPruned(outcome.reason)
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    raise RuntimeError(outcome.reason)


def files_of(options: StudyOptions) -> StudyFiles:
    base = options.space.base
    return StudyFiles.of(options.study_name, base["dataset_type"], base["dataset_name"])


def _run_here(desk: Desk, progress: StudyProgress, files: StudyFiles) -> int:
    """One worker, in this process. At the deadline a signal ends its run, with a checkpoint."""
    worker = secrets.token_hex(8)
    deadline = desk.options.deadline
    alarm = threading.Timer(max(0.0, (deadline or 0) - time.time()), os.kill, (os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    writer = CsvWriter(desk, files)
    progress.also(writer.write_sometimes)
    if deadline is not None:
        alarm.start()
    try:
        code = work(desk, worker, progress)
    except Stopped:
        desk.release(worker, died=False)
        if not _time_is_up(desk.options):
            raise
        return 0
    finally:
        alarm.cancel()
    return 0 if _time_is_up(desk.options) else code


def _supervise(desk: Desk, progress: StudyProgress, files: StudyFiles) -> int:
    """Several workers, each in a process of its own."""
    writer = CsvWriter(desk, files)
    progress.also(writer.write_sometimes)
    crew = Crew(desk)
    try:
        while crew.at_work() and not _time_is_up(desk.options):
            progress.update(trial_records(desk.study))
            time.sleep(POLL_SECONDS)
        progress.update(trial_records(desk.study))
    except Stopped:
        crew.wait(CHECKPOINT_SECONDS)  # Ctrl-C has reached them too, and a second signal would not wait
        raise
    finally:
        crew.stop()
    return 0


class CsvWriter:
    """Keeps the CSV file of a study up to date without writing it all the time."""

    def __init__(self, desk: Desk, files: StudyFiles) -> None:
        self._desk, self._files, self._written = desk, files, 0.0

    def write_sometimes(self) -> None:
        if time.monotonic() - self._written >= CSV_SECONDS:
            write_csv_of(self._desk.study, self._desk.options.objectives, self._files)
            self._written = time.monotonic()


def check_feasible(options: StudyOptions) -> None:
    """Raise ConfigError before any work where the data cannot be read or no config of the space may be trained."""
    rng = np.random.default_rng(derive_seed(options.seed, "probe"))
    reason = ""
    for number in range(MAX_DRAFTS):
        try:
            config = config_from_dict(options.space.sample(random_pick(rng)), source="the study")
        except (Infeasible, ConfigError) as problem:
            reason = str(problem)
            continue
        if number == 0:
            splits_of(config.dataset_type, config.dataset_name, canonical_json(config.dataset_params), config.seed)
        found = over_budget(config, options)
        if found is None:
            return
        reason = found
    raise ConfigError(f"no config of the search space may be trained, in {MAX_DRAFTS} draws: {reason}")


def enqueue_grid(desk: Desk) -> None:
    """Fill the study up to its budget with points of the grid, spread over it where it has more."""
    options = desk.options
    with desk._lock():
        trials = desk.own_trials()
        missing = options.n_trials - len(trials)
        known = {_point(trial.params or trial.system_attrs.get("fixed_params", {})) for trial in trials}
        points = list(itertools.islice(options.space.grid(), 200_000))
        order = np.random.default_rng(derive_seed(options.seed, "grid")).permutation(len(points)).tolist()
        entered = 0
        for index in order if len(points) > options.n_trials else range(len(points)):
            if entered >= missing:
                break
            if _point(points[index]) in known:
                continue
            config = options.space.sample(known_values(points[index]))
            try:
                if over_budget(config_from_dict(config, source="grid"), options) is not None:
                    continue
            except ConfigError:
                continue
            desk.study.enqueue_trial(points[index])
            entered += 1
    if entered < missing:
        log.info("the grid has %d points: fewer than --n_trials %d", len(trials) + entered, options.n_trials)
        desk.options = replace(options, n_trials=len(trials) + entered)
    elif len(points) > options.n_trials:
        log.info("the grid has %s points, of which %d are drawn", f"{len(points):,}", options.n_trials)


def _point(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def add_past_runs(desk: Desk) -> None:
    """Teach the sampler the finished runs of the results store that a trial of this study could have been."""
    options, base = desk.options, desk.options.space.base
    with desk._lock():
        known = {trial.user_attrs.get("warm_start") for trial in desk.study.get_trials(deepcopy=False)}
        known |= {run for trial in desk.own_trials() for run in trial.user_attrs.get("experiment_ids", [])}
        added = 0
        with Store(options.db) as store:
            rows = store.find_runs(RunFilter(base["dataset_name"], status="finished"), with_json=True)
            rows = [row for row in rows if row["experiment_id"] not in known]
            metrics = store.metrics_of([row["experiment_id"] for row in rows], options.objectives)
        for row in rows:
            past = _as_trial(row["full_config_json"], metrics[row["experiment_id"]], options)
            if past is not None:
                past.set_user_attr("warm_start", row["experiment_id"])
                desk.study.add_trial(past)
                added += 1
    log.info("%d past runs fit the search space and teach the sampler", added)


def _as_trial(config_json: str, metrics: dict[str, Any], options: StudyOptions) -> FrozenTrial | None:
    """A past run as a complete trial; None where a trial of the study could not have been it."""
    values = [value for name in options.objectives if isinstance(value := metrics.get(name), float)]
    if len(values) < len(options.objectives) or not np.isfinite(values).all():
        return None
    try:
        config = stored_object(config_json)
        located = options.space.locate(config)
        if located is None:
            return None
        params, distributions = located
        wanted = config_from_dict(options.space.sample(known_values(params)), source="trial").to_dict()
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError):  # a config of another program
        return None
    ignored = {"seed", "experiment_name", "training_params"}
    if {**wanted, **dict.fromkeys(ignored)} != {**config, **dict.fromkeys(ignored)}:
        return None
    return optuna.trial.create_trial(params=params, distributions=distributions, values=values)


def summary(options: StudyOptions, records: list[TrialRecord], written: list[Path], exit_code: int) -> str:
    """The lines a study ends with."""
    counts = {
        status: sum(record.status == status for record in records)
        for status in dict.fromkeys(
            ("finished", "pruned", "diverged", "failed", *(record.status for record in records))
        )
    }
    shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    lines = [f"study {options.study_name}: {len(records)} of {options.n_trials} trials ({shown or 'none'})"]
    best = best_of(records, options.objectives)
    if best is not None and best.values is not None:
        name = options.objectives[0]
        lines.append(f"  best {name} {best.values[0]:.6g}: trial {best.number}, run {best.experiment_ids[0]}")
        lines += [f"    {key} = {value}" for key, value in best.params.items()]
    epochs, whole = sum(record.epochs for record in records), options.space.base["epochs"] * options.seeds_per_trial
    if counts.get("pruned"):
        lines.append(f"  pruning: {epochs} epochs were trained, of {whole * len(records)}")
    reasons = [
        f"  trial {record.number} {record.status}: {record.reason}"
        for record in records
        if record.status in ("failed", "diverged")
    ]
    lines += reasons[:5] + ([f"  ... and {len(reasons) - 5} more"] if len(reasons) > 5 else [])
    if len(records) < options.n_trials or exit_code:
        lines.append("  the same command goes on with the rest")
    return "\n".join([*lines, *(f"  {path}" for path in written)])
