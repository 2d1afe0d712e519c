"""A whole study: check it, fill its queue, let workers train the trials, write the files.

`tune` is the command `goe tune`; `objective` is one trial for a study that the caller runs with Optuna.

A study can be stopped at any time, by a signal or by its deadline, and the same command continues it. Several commands
may work on one study at the same time, on one or on several machines: the queue coordinates them.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
import optuna

from research_eval.analysis.study_trials import own_trials
from research_eval.config.check import config_from_dict
from research_eval.config.sections import ExperimentConfig
from research_eval.errors import ConfigError
from research_eval.seeding import derive_seed
from research_eval.store.connection import database_url
from research_eval.store.store import Store
from research_eval.store.values import canonical_json
from research_eval.studies import adapter, workers
from research_eval.studies.adapter import StoredTrial, trial_records
from research_eval.studies.distributions import Infeasible, random_pick
from research_eval.studies.initial_trials import add_past_runs, add_trials, enqueue_grid
from research_eval.studies.launchers import launch, places, wait_for_end
from research_eval.studies.options import BatchOptions, StudyOptions
from research_eval.studies.proposals import MAX_PROPOSALS, over_budget, splits_of
from research_eval.studies.queue import TrialQueue
from research_eval.studies.results import StudyFiles, summary, write_csv_of, write_results
from research_eval.studies.study_data import check_present_data, show_present_data
from research_eval.studies.trials import train_config
from research_eval.studies.workers import WorkerPool, new_worker_name, quiet_runs, work
from research_eval.system.best_effort import attempted
from research_eval.system.progress import StudyProgress

log = logging.getLogger(__name__)

CSV_SECONDS = 5.0  # between two versions of the CSV file of a study
POLL_ELSEWHERE_SECONDS = 1.0  # between two looks at workers on other machines
CHECKPOINT_SECONDS = 3.0  # for workers to exit by themselves after Ctrl-C


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM has arrived. A run that it cuts off counts as interrupted."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped`. A run handles them itself while it trains."""

    def receive(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    try:
        previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may change the handlers
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def tune(options: StudyOptions, timeout: float | None = None, quiet: bool = False) -> int:
    """Run a study, or continue it, until it has all its trials. Print the best trial and write the files of the study.

    `timeout` is in seconds. Returns exit code 0; 1 if no trial was finished; 128 + the number of a signal that stopped
    the study. Raises ConfigError.
    """
    with _checked_queue(options, timeout) as (queue, config):
        show_present_data(config)
        with quiet_runs():
            return _run_study(queue, quiet)


@contextmanager
def _checked_queue(options: StudyOptions, timeout: float | None) -> Iterator[tuple[TrialQueue, ExperimentConfig]]:
    """The queue of a study that can be trained on the present data, and a config of its space.

    `timeout` is in seconds. Raises ConfigError.
    """
    if timeout is not None:
        options = options.with_budget(deadline=time.time() + timeout)
    is_batch = isinstance(options, BatchOptions)
    config = options.config(0) if isinstance(options, BatchOptions) else check_feasible(options)
    with Store(options.db):  # a trial would wait for minutes for a server that was never there
        pass
    queue = TrialQueue(options)
    try:
        if not is_batch:
            check_present_data(queue, config)
        yield queue, config
    finally:
        queue.close()


def _run_study(queue: TrialQueue, quiet: bool) -> int:
    """Fill the queue, train the trials, write the files, and print the last lines. Returns the exit code."""
    if queue.options.method.warm_start:
        add_past_runs(queue)
    if queue.options.method.sampler == "grid":
        enqueue_grid(queue)
    elif queue.options.budget.more_trials is not None:
        add_trials(queue)
    options = queue.options  # with another budget after a small grid, and with more trials
    queue.open_to_workers()
    trials = queue.own_trials()
    if len(trials) >= options.budget.n_trials and all(trial.state.is_finished() for trial in trials):
        log.warning(
            "study %s: all of its %d trials are done, and no more are asked for. Add some with --more_trials N",
            *(options.study_name, len(trials)),
        )
    files = files_of(options)
    exit_code = 0
    try:
        with signals_raise(), study_progress(options, quiet) as progress:
            progress.update(trial_records(queue.study))
            progress.also(CsvWriter(queue, files).write_sometimes)
            exit_code = _train(queue, progress)
    except Stopped as stopped:
        exit_code = 128 + stopped.number
    written = write_results(queue.study, options.objectives, files, options.db)
    records = own_trials(trial_records(queue.study))
    with attempted(log, f"study {options.study_name}: its summary is not printed"):
        print(summary(options, records, written, exit_code))
    if exit_code:
        return exit_code
    return 0 if any(record.status == "finished" for record in records) or options.is_time_up else 1


def work_alone(
    options: StudyOptions,
    timeout: float | None,
    max_trials: int | None,
    quiet: bool = False,
    slot: str | None = None,
) -> int:
    """Train trials of a study that another command has begun and looks after: it fills the queue and writes the files.

    Returns exit code 0, or 128 + the number of a signal. Raises ConfigError.
    """
    try:
        with (
            _checked_queue(options, timeout) as (queue, _),
            quiet_runs(),
            signals_raise(),
            study_progress(queue.options, quiet) as progress,
        ):
            progress.update(trial_records(queue.study))
            return _run_here(queue, progress, max_trials, slot)
    except Stopped as stopped:
        return 128 + stopped.number


def study_progress(options: StudyOptions, quiet: bool) -> StudyProgress:
    """A line per finished trial on stderr, and a bar on a terminal."""
    largest_is_best = options.directions[0] == "maximize"
    return StudyProgress(options.budget.n_trials, options.objectives, largest_is_best, quiet)


def files_of(options: StudyOptions) -> StudyFiles:
    """The names of the files that the study writes."""
    base = options.space.base
    return StudyFiles.of(options.study_name, base["dataset_type"], base["dataset_name"])


def _train(queue: TrialQueue, progress: StudyProgress) -> int:
    """Train in this process, in some of this machine, or elsewhere. Returns the exit code."""
    if queue.options.launch.name != "local":
        return supervise_elsewhere(queue, progress)
    return _run_here(queue, progress) if queue.options.n_jobs == 1 else _supervise(queue, progress)


def _run_here(
    queue: TrialQueue, progress: StudyProgress, max_trials: int | None = None, slot: str | None = None
) -> int:
    """Run one worker in this process, for so many trials at most.

    At the deadline a signal stops its run, which writes a checkpoint.
    """
    worker = new_worker_name(slot)
    deadline = queue.options.budget.deadline
    alarm = threading.Timer(max(0.0, (deadline or 0) - time.time()), os.kill, (os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    if deadline is not None:
        alarm.start()
    try:
        code = work(queue, worker, progress, max_trials)
    except Stopped:
        queue.release(worker, died=False)
        if not queue.options.is_time_up:
            raise
        return 0
    finally:
        alarm.cancel()
    return 0 if queue.options.is_time_up else code


def _supervise(queue: TrialQueue, progress: StudyProgress) -> int:
    """Run several workers, each in a process of its own, and look after them."""
    pool = WorkerPool(queue)
    try:
        while pool.keep_running() and not queue.options.is_time_up:
            progress.update(trial_records(queue.study))
            time.sleep(workers.POLL_SECONDS)
        progress.update(trial_records(queue.study))
    except Stopped:
        # Ctrl-C has reached the workers too, and a second signal would end them before their checkpoints are written.
        pool.wait(CHECKPOINT_SECONDS)
        raise
    finally:
        pool.stop()
    return 0


def supervise_elsewhere(queue: TrialQueue, progress: StudyProgress) -> int:
    """Let a launcher start workers on other machines, and watch the study.

    Workers of an earlier call that still train count as ours. Raises ConfigError if all workers are gone too early.
    """
    options = queue.options
    missing = max(0, min(options.launch.workers, queue.num_left()) - queue.num_at_work())
    log.info("%d workers are at work, %d are started", queue.num_at_work(), missing)
    where = places(options.storage, database_url(options.db))
    launcher = launch(options.launch, options.study_name, where, missing)
    try:
        while queue.num_left() and not options.is_time_up:
            progress.update(trial_records(queue.study))
            if not launcher.num_alive() and not queue.num_at_work():
                raise ConfigError(
                    f"--launcher {options.launch.name}: all workers have ended, and {queue.num_left()} trials are "
                    f"left. What the workers said is in {launcher.output}"
                )
            time.sleep(POLL_ELSEWHERE_SECONDS)
        progress.update(trial_records(queue.study))
        if not options.is_time_up:
            wait_for_end(launcher, CHECKPOINT_SECONDS)
    finally:
        launcher.stop()
    return 0


class CsvWriter:
    """Keeps the CSV file of a study up to date, but writes it only every few seconds."""

    def __init__(self, queue: TrialQueue, files: StudyFiles) -> None:
        self._queue, self._files, self._written, self._has_failed = queue, files, 0.0, False

    def write_sometimes(self) -> None:
        """Write the file if the last version is older than `CSV_SECONDS`.

        A file that cannot be written is tried again at the end of the study alone: it must not disturb the trials.
        """
        if not self._has_failed and time.monotonic() - self._written >= CSV_SECONDS:
            self._has_failed = True
            with attempted(log, "the CSV file of the study is not kept up to date"):
                write_csv_of(self._queue.study, self._queue.options.objectives, self._files)
                self._has_failed = False
            self._written = time.monotonic()


def check_feasible(options: StudyOptions) -> ExperimentConfig:
    """A config of the space that may be trained, always the same one for the same options.

    Raises ConfigError before any work if the data cannot be read, or if there is no such config.
    """
    splits_of.cache_clear()  # the files may have changed since an earlier study of this process
    rng = np.random.default_rng(derive_seed(options.seed, "probe"))
    reason = ""
    for number in range(MAX_PROPOSALS):
        try:
            config = config_from_dict(options.space.sample(random_pick(rng)), source="the study")
        except (Infeasible, ConfigError) as problem:
            reason = str(problem)
            continue
        if number == 0:
            splits_of(config.dataset_type, config.dataset_name, canonical_json(config.dataset_params), config.seed)
        found = over_budget(config, options)
        if found is None:
            return config
        reason = found
    raise ConfigError(f"no config of the search space may be trained, in {MAX_PROPOSALS} draws: {reason}")


def objective(trial: optuna.Trial, options: StudyOptions) -> float | tuple[float, ...]:
    """One trial of a study that the caller runs with `optuna.Study.optimize`.

    Raises optuna.TrialPruned, RuntimeError for a run that failed or diverged, KeyboardInterrupt for an interrupted one.
    """
    try:
        drawn = options.space.sample(lambda name, distribution: adapter.suggest(trial, name, distribution))
        config = config_from_dict(drawn, source="trial")
    except (Infeasible, ConfigError) as problem:
        raise optuna.TrialPruned(f"infeasible: {problem}") from problem
    reason = over_budget(config, options)
    if reason is not None:
        raise optuna.TrialPruned(f"infeasible: {reason}")
    outcome = train_config(StoredTrial.of(trial), options, config)
    if outcome.values is not None:
        return outcome.values if len(outcome.values) > 1 else outcome.values[0]
    if outcome.status == "pruned":
        raise optuna.TrialPruned(outcome.reason)
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    raise RuntimeError(outcome.reason)
