"""Workers: they train trials of the queue until none is left. They run in this process or in processes of their own.

Signals: during a run, SIGINT and SIGTERM ask the run to write a checkpoint and to stop. Then the worker releases its
trial and exits with 128 + the number of the signal, so that the same command can continue the study later.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

from research_eval.errors import ConfigError
from research_eval.studies.adapter import LOST_SECONDS, trial_records
from research_eval.studies.options import StudyOptions
from research_eval.studies.processes import process_context
from research_eval.studies.queue import MAX_ATTEMPTS, TrialQueue
from research_eval.studies.trials import LEFT, train_trial
from research_eval.system.best_effort import best_effort_output
from research_eval.system.progress import StudyProgress

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # between two looks at the queue or at the workers
MOST_POLLS = 10  # so many times as long an idle worker waits at most
JITTER = random.SystemRandom()  # of pauses alone: no number of a study depends on it
STOP_SECONDS = 30.0  # for workers to write their checkpoints
SINGLE_RUN_LOGGERS = ("experiment", "runs", "training", "datasets", "system.phases")


def new_worker_name(slot: str | None = None) -> str:
    """A name that no other worker has, on any machine; it begins with that of the slot that a launcher gave."""
    return secrets.token_hex(8) if slot is None else f"{slot}-{secrets.token_hex(8)}"


def work(
    queue: TrialQueue,
    worker: str,
    progress: StudyProgress | None = None,
    max_trials: int | None = None,
    parent: int | None = None,
) -> int:
    """Train trials until all are done, the time is up, or this worker has ended `max_trials` of them.

    A worker also stops if its `parent`, the process with this number, is gone. Returns exit code 0, or 128 + the number
    of a signal that stopped a run.
    """
    options = queue.options
    left: set[int] = set()  # trials that another process is at: this worker looks at the other ones first
    told: set[int] = set()  # of these, what the log has said
    ended, pause = 0, POLL_SECONDS
    while not options.is_time_up and parent in (None, os.getppid()) and ended != max_trials:
        trial = queue.claim(worker, left)
        if trial is None:
            if not queue.has_running_trials():
                return 0
            left.clear()
            # The worker of a running trial may die, and then this one continues it. Many idle workers ask at other
            # times, and less and less often.
            time.sleep(pause * JITTER.uniform(0.5, 1.0))
            pause = min(2 * pause, MOST_POLLS * POLL_SECONDS)
            continue
        lost = threading.Event()
        with queue.heartbeat(trial, functools.partial(_stop_run, lost)):
            outcome = train_trial(trial, options)
        if outcome.status == "interrupted" and lost.is_set():
            queue.release(worker, died=False)
            continue
        if outcome.status == "interrupted":
            queue.release(worker, died=False)
            return outcome.exit_code
        if outcome.status == LEFT:
            if trial.trial_id not in told:
                log.warning("trial %d: %s. This worker asks again.", trial.number, outcome.reason)
            told.add(trial.trial_id)
            left.add(trial.trial_id)
            queue.release(worker, died=False)
            continue
        queue.finish(trial, outcome)
        ended, pause = ended + 1, POLL_SECONDS
        if progress is not None:
            progress.update(trial_records(queue.study))
    return 0


def _stop_run(lost: threading.Event) -> None:
    """Stop the run of this process with a checkpoint, because its heartbeats do not arrive."""
    lost.set()
    log.warning("the database of the study has not answered for %.0f s: this run stops", LOST_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _worker_process(options: StudyOptions, worker: str) -> None:
    """The body of a worker process."""
    # Ctrl-C reaches this process too. Between two runs it is ignored; a run turns it into a request to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with best_effort_output(), quiet_runs():
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        raise SystemExit(work(TrialQueue(options), worker, parent=os.getppid()))


@contextmanager
def quiet_runs() -> Iterator[None]:
    """Log only errors of single runs: a study makes hundreds of them, and reports one line per trial."""
    loggers = [logging.getLogger(f"research_eval.{name}") for name in SINGLE_RUN_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class WorkerPool:
    """The worker processes of this command. A process that dies is replaced, and its trial continues in the new one."""

    def __init__(self, queue: TrialQueue) -> None:
        self._queue = queue
        self._context = process_context(__name__)
        self._processes: dict[str, BaseProcess] = {}
        self._deaths = 0  # since a trial was finished
        self._num_done = -1
        for _ in range(queue.options.n_jobs):
            self._start()

    def _start(self) -> None:
        """Start a worker process. It opens the storage itself: connections cannot cross processes."""
        worker = new_worker_name()
        process = self._context.Process(target=_worker_process, args=(self._queue.options, worker))
        process.start()
        self._processes[worker] = process

    def keep_running(self) -> bool:
        """Replace crashed workers; return False once all have exited. Raises ConfigError if they keep crashing."""
        num_done = sum(trial.state.is_finished() for trial in self._queue.own_trials())
        if num_done != self._num_done:
            self._num_done, self._deaths = num_done, 0
        for worker, process in list(self._processes.items()):
            if process.is_alive():
                continue
            process.join()
            del self._processes[worker]
            self._queue.release(worker, died=True)
            if process.exitcode and not self._queue.options.is_time_up:
                self._replace(process)
        return bool(self._processes)

    def _replace(self, process: BaseProcess) -> None:
        """Start a worker in place of one that crashed. Raises ConfigError after too many crashes in a row."""
        self._deaths += 1
        if self._deaths > MAX_ATTEMPTS * self._queue.options.n_jobs:
            raise ConfigError(
                f"--n_jobs: {self._deaths} workers died in a row (exit code {process.exitcode}); what they "
                "said is above. --n_jobs 1 works in this process."
            )
        log.warning("worker %d died (exit code %d): another one takes its trial", process.pid, process.exitcode)
        self._start()

    def wait(self, seconds: float) -> None:
        """Wait until all workers have exited, at most for so many seconds."""
        limit = time.time() + seconds
        for process in self._processes.values():
            process.join(max(0.0, limit - time.time()))

    def stop(self) -> None:
        """Ask the workers to write checkpoints and exit; kill those that do not exit in time."""
        # The second signal is for workers that hang; their trials continue from the last periodic checkpoint.
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._processes.values():
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, number)
            self.wait(STOP_SECONDS)
        for worker in self._processes:
            self._queue.release(worker, died=False)
        self._processes.clear()
