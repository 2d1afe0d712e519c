"""Many runs, such as all seeds of a config: on a CPU in a pool of processes, one per run, as many as there are cores.

Every run is a whole experiment of its own: it writes to the same store under its own id, as it would alone. The parent
process only starts the runs, passes signals on, shows their progress and collects their endings.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NamedTuple

import torch

import research_eval
from research_eval.config.sections import ExperimentConfig
from research_eval.errors import ConfigError
from research_eval.experiment import run
from research_eval.registry import EXTENSION_PREFIX, LANGUAGE_MODELS, MODELS_MAP, SYNTHETIC_DATASETS
from research_eval.runs.continuation import check_continuations
from research_eval.runs.journal import Result
from research_eval.store.connection import database_url
from research_eval.store.csv_file import csv_accepts_rows
from research_eval.store.store import Store
from research_eval.studies.launchers import Elsewhere
from research_eval.studies.processes import process_context
from research_eval.system.best_effort import best_effort_output
from research_eval.system.environment import usable_cores
from research_eval.system.phases import phase, phases_to
from research_eval.system.progress import PooledProgress, RelayedProgress
from research_eval.training.runtime import choose_device

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # between two looks at the signals that have arrived
SIGNALS = (signal.SIGINT, signal.SIGTERM)

REGISTRIES = {"models": MODELS_MAP, "language_models": LANGUAGE_MODELS, "datasets": SYNTHETIC_DATASETS}

Ending = Result | Exception
# The exceptions that commands treat in their own way, and what all others become on their way to the parent.
ERRORS: dict[str, type[Exception]] = {
    "ConfigError": ConfigError,
    "OSError": OSError,
    "MemoryError": MemoryError,
    "RuntimeError": RuntimeError,
}


def run_all(
    configs: Sequence[ExperimentConfig],
    *,
    db: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    workers: Elsewhere | int | None = None,
) -> Iterator[tuple[ExperimentConfig, Result]]:
    """Run all configs, which differ in their seeds only. Yields each with its result, in their order.

    `workers` is the number of processes, instead of one per core, or says where workers of a launcher train the runs.

    If the CSV file cannot be continued, there is one warning for all runs.

    If a run raises, the others continue, and at the end the first exception is raised again. SIGINT and SIGTERM make
    all runs write a checkpoint and end as interrupted; runs that have not begun never begin. Raises KeyboardInterrupt,
    with the signal's number, if a signal kept runs from beginning and stopped none.
    """
    failure, is_interrupted = None, False
    for config, ending in endings_of(configs, db=db, resume=resume, quiet=quiet, workers=workers):
        if isinstance(ending, Exception):
            failure = failure or ending
            continue
        is_interrupted = is_interrupted or ending.exit_code > 128
        yield config, ending
    if failure is not None and not is_interrupted:
        raise failure


def endings_of(
    configs: Sequence[ExperimentConfig],
    names: Sequence[str] = (),
    *,
    db: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    show_data: bool = True,
    workers: Elsewhere | int | None = None,
) -> Iterator[tuple[ExperimentConfig, Ending]]:
    """As `run_all`, but a run that raises has its exception as its ending, and the configs may differ in anything.

    Messages call the runs by their `names`; without them by their seeds. `show_data` logs what the first run knows of
    its data.
    """
    if isinstance(workers, Elsewhere):
        from research_eval.studies.batch import endings_elsewhere  # with Optuna, which takes a second to import

        return endings_elsewhere(configs, db=db, resume=resume, quiet=quiet, place=workers)
    if resume and len(configs) > 1:  # one run finds it out itself
        check_continuations(configs, db)
    names, size = names or [f"seed {config.seed}" for config in configs], pool_size(configs, workers)
    if size > 1:
        return _Pool(configs, names, size, _Options(db, resume, quiet, show_data)).endings()
    return _in_turn(configs, names, _Options(db, resume, quiet, show_data))


class _Options(NamedTuple):
    """Options of all runs."""

    db: str | None
    resume: bool
    quiet: bool
    show_data: bool


def pool_size(configs: Sequence[ExperimentConfig], wanted: int | None = None) -> int:
    """How many runs work at a time: as many as `wanted`, else one per core, or per `num_threads` cores.

    One alone on a GPU, or if only this process knows the model or the dataset (a class of a notebook, for example).
    """
    options = configs[0].training_params
    if choose_device(options.device).type != "cpu" or not all(map(_can_be_sent, _foreign_classes(configs))):
        return 1
    return max(1, min(len(configs), wanted or usable_cores() // (options.num_threads or 1)))


def _in_turn(
    configs: Sequence[ExperimentConfig], names: Sequence[str], options: _Options
) -> Iterator[tuple[ExperimentConfig, Ending]]:
    """One run after the other in this process."""
    to_csv = len(configs) == 1 or csv_accepts_rows()  # one run finds it out itself
    for config, name in zip(configs, names, strict=True):
        show_data = options.show_data and config is configs[0]
        try:
            ending: Ending = run(
                config,
                db=options.db,
                resume=options.resume,
                quiet=options.quiet,
                to_csv=to_csv,
                show_data=show_data,
            )
        except Exception as problem:
            if len(configs) > 1:
                traceback.clear_frames(problem.__traceback__)  # they hold the model, and with it the GPU's memory
                log.error("%s: %s", name, _in_one_line(problem))
            ending = problem
        yield config, ending
        if isinstance(ending, Result) and ending.exit_code > 128:
            return


def _in_one_line(problem: Exception) -> str:
    name = "failed" if isinstance(problem, ChildProcessError) else type(problem).__name__
    text = problem.strerror if isinstance(problem, ChildProcessError) else problem
    return f"{name}: {text}".split("\n")[0]


# ------------------------------------------------------------------------------------------------ the parent process


@dataclass
class _Job:
    """One run. `messages` is open as long as the run's process can send."""

    number: int
    config: ExperimentConfig
    name: str  # in messages
    process: BaseProcess | None = None
    messages: Connection | None = None
    has_begun: bool = False
    ending: Ending | None = None  # None at the end: a signal came before its training
    is_over: bool = False


class _Pool:
    """Processes for one run each, at most `size` at a time."""

    def __init__(
        self,
        configs: Sequence[ExperimentConfig],
        names: Sequence[str],
        size: int,
        options: _Options,
    ) -> None:
        self._size, self._quiet, self._show_data = size, options.quiet, options.show_data
        named = zip(configs, names, strict=True)
        self._jobs = [_Job(number, config, name) for number, (config, name) in enumerate(named)]
        self._signals: list[int] = []  # in the order of their arrival
        self._num_forwarded = 0
        location = database_url(options.db)
        with Store(location):  # one process makes the tables, and a store that cannot be opened is one message
            pass
        shared = location, options.resume, csv_accepts_rows(), dict(os.environ), _foreign_classes(configs)
        self._shared = _Shared(*shared)
        self._context = process_context(__name__)

    def endings(self) -> Iterator[tuple[ExperimentConfig, Ending]]:
        """How each run ended, in their order; nothing for runs that a signal kept from training."""
        names, epochs = [job.name for job in self._jobs], self._jobs[0].config.epochs
        num_shown = 0
        with PooledProgress(names, epochs, self._quiet) as progress, self._signals_collected():
            try:
                while num_shown < len(self._jobs):
                    self._forward_signals()
                    self._start_waiting()
                    self._receive(progress)
                    while num_shown < len(self._jobs) and self._jobs[num_shown].is_over:
                        job = self._jobs[num_shown]
                        num_shown += 1
                        if job.ending is not None:
                            yield job.config, job.ending
            finally:
                self._stop_all()
        endings = [job.ending for job in self._jobs]
        if None in endings and not any(isinstance(ending, Result) and ending.exit_code > 128 for ending in endings):
            raise KeyboardInterrupt(self._signals[0])

    @contextmanager
    def _signals_collected(self) -> Iterator[None]:
        """Within the block SIGINT and SIGTERM wait in a list, if this is the main thread."""

        def collect(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        is_main = threading.current_thread() is threading.main_thread()
        previous = {number: signal.signal(number, collect) for number in SIGNALS} if is_main else {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _forward_signals(self) -> None:
        """Pass new signals on to the runs, which answer between two steps; stop processes that have not begun."""
        for number in self._signals[self._num_forwarded :]:
            self._num_forwarded += 1
            for job in self._jobs:
                _send_signal(job.process, number if job.has_begun else signal.SIGTERM)

    def _start_waiting(self) -> None:
        """Start processes as long as there is room; after a signal the waiting runs are over."""
        num_at_work = sum(job.process is not None and not job.is_over for job in self._jobs)
        for job in self._jobs:
            if job.process is not None or job.is_over:
                continue
            if self._signals:
                job.is_over = True
            elif num_at_work < self._size:
                num_at_work += 1
                messages, sender = self._context.Pipe(duplex=False)
                arguments = sender, job.config, job.name, self._shared, self._show_data and job.number == 0
                process = self._context.Process(target=_work, args=arguments)
                with phase("starting processes"):  # the first one waits until the server has imported torch
                    process.start()
                sender.close()  # the process has its own: when it ends, `messages` ends
                job.process, job.messages = process, messages

    def _receive(self, progress: PooledProgress) -> None:
        """Take a message of each process that has sent one; wait a moment if none has."""
        jobs = {job.messages: job for job in self._jobs if job.messages is not None}
        for messages in wait(list(jobs), POLL_SECONDS):
            assert isinstance(messages, Connection)
            job = jobs[messages]
            try:
                kind, content = messages.recv()
            except (EOFError, OSError):  # OSError: killed in the middle of a message
                self._end(job)
                if isinstance(job.ending, Exception):
                    progress.show(job.number, "log", (logging.ERROR, _in_one_line(job.ending)))
                continue
            job.has_begun = True
            if kind == "ended":
                job.ending = _unpacked(*content)
            else:
                progress.show(job.number, kind, content)

    def _end(self, job: _Job) -> None:
        """Note that the process of a run is gone; without an ending the run has failed, unless a signal stopped it."""
        assert job.process is not None
        assert job.messages is not None
        job.process.join()
        job.messages.close()
        job.messages, job.is_over = None, True
        if job.ending is None and not self._signals:
            job.ending = ChildProcessError(0, _how_it_ended(job.process.exitcode), job.name)

    def _stop_all(self) -> None:
        """End processes that still work, after an exception here; the runs write their checkpoints."""
        for job in self._jobs:
            if job.messages is not None:
                job.messages.close()  # a process that waits until we have read something continues
            _send_signal(job.process, signal.SIGTERM)
        for job in self._jobs:
            if job.process is not None:
                job.process.join()


def _send_signal(process: BaseProcess | None, number: int) -> None:
    if process is not None and process.pid is not None and process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _how_it_ended(exitcode: int | None) -> str:
    """What a user can do about a process that ended without telling how its run ended."""
    if exitcode == 0:
        return 'its process never began: put the call of main() in your script below `if __name__ == "__main__":`'
    how = f"with exit code {exitcode}"
    if exitcode is not None and exitcode < 0:
        how = f"by {signal.Signals(-exitcode).name}"
        if exitcode == -signal.SIGKILL:
            how += ", perhaps because the memory was full"
    return f"its process ended {how}. The same command with --resume continues the run."


# ------------------------------------------------------------------------- what a new process does not know by itself


@dataclass(frozen=True)
class _Shared:
    """What all processes of a pool receive beside their config."""

    db: str
    resume: bool
    to_csv: bool
    environment: Mapping[str, str]  # the server that starts them keeps the one of its own start
    classes: list[tuple[str, str, type]]  # key in REGISTRIES, name, class


def _foreign_classes(configs: Sequence[ExperimentConfig]) -> list[tuple[str, str, type]]:
    """The classes that the caller has entered itself: neither from the package nor from GOE_EXTENSIONS."""
    models, datasets = ({getattr(config, key): None for config in configs} for key in ("model_type", "dataset_name"))
    names = {"models": models, "language_models": models, "datasets": datasets}
    found = [(key, name, REGISTRIES[key].get(name)) for key in names for name in names[key]]
    own = (f"{research_eval.__name__}.", EXTENSION_PREFIX)
    return [(key, name, cls) for key, name, cls in found if cls is not None and not cls.__module__.startswith(own)]


def _can_be_sent(entry: tuple[str, str, type]) -> bool:
    """Whether another process can import the class: it is not local, and not typed into a notebook or a shell."""
    cls, main = entry[2], sys.modules["__main__"]
    has_source = cls.__module__ != "__main__" or hasattr(main, "__file__") or getattr(main, "__spec__", None)
    return "<locals>" not in cls.__qualname__ and bool(has_source)


# ------------------------------------------------------------------------------------------------- a worker process


def _work(sender: Connection, config: ExperimentConfig, name: str, shared: _Shared, show_data: bool) -> None:
    """The body of a process: one run. The parent receives its progress, its log and its ending."""
    sending = threading.Lock()  # the thread that shows phases sends too

    def send(message: tuple[str, Any]) -> None:
        with sending, contextlib.suppress(OSError):  # the parent is gone: `_end_with_parent` says so to the run
            sender.send(message)

    # KeyboardInterrupt: before its training, so that there is nothing to tell.
    with best_effort_output(), contextlib.suppress(KeyboardInterrupt):
        os.setsid()  # Ctrl-C on a terminal reaches the parent alone, which passes it on once
        for number in SIGNALS:
            signal.signal(number, _interrupt)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        send(("begun", None))
        os.environ.clear()
        os.environ.update(shared.environment)
        _enter(shared.classes)
        torch.set_num_threads(config.training_params.num_threads or 1)
        relay = RelayedProgress(send)
        logger = logging.getLogger(research_eval.__name__)
        logger.setLevel(logging.INFO)
        logger.addHandler(_Relay(relay))
        try:
            with phases_to(relay.phase):
                ending: Ending = run(
                    config,
                    db=shared.db,
                    resume=shared.resume,
                    progress=relay,
                    to_csv=shared.to_csv,
                    show_data=show_data,
                )
        except Exception as problem:
            problem.add_note(f"In the process of {name}:\n{traceback.format_exc()}")
            ending = problem
        send(("ended", _packed(ending)))
    sender.close()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Outside the training loop, which has its own way, a signal ends a run at once."""
    raise KeyboardInterrupt(number)


def _end_with_parent() -> None:
    """Stop this process as by SIGTERM when its parent is gone, so that nothing trains unseen."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _enter(classes: Sequence[tuple[str, str, type]]) -> None:
    for key, name, cls in classes:
        if REGISTRIES[key].get(name) is not cls:
            REGISTRIES[key][name] = cls


def _packed(ending: Ending) -> tuple[str, Any]:
    """The ending as plain data: a result as its fields, an exception as the name of a known class and its arguments."""
    if isinstance(ending, Result):
        return "Result", asdict(ending)
    notes = getattr(ending, "__notes__", [])
    if isinstance(ending, OSError) and ending.strerror is not None:
        return "OSError", ((ending.errno, ending.strerror, ending.filename), notes)
    if type(ending).__module__.startswith("sqlalchemy"):
        return "OSError", ((0, str(getattr(ending, "orig", None) or ending), "database"), notes)
    kind = next((name for name, known in ERRORS.items() if isinstance(ending, known)), "RuntimeError")
    text = str(ending) if type(ending).__name__ == kind else f"{type(ending).__name__}: {ending}"
    return kind, ((text,), notes)


def _unpacked(kind: str, content: Any) -> Ending:
    """The opposite of `_packed`; an exception of any other class arrives as a RuntimeError with its text."""
    if kind == "Result":
        return Result(**content)
    arguments, notes = content
    problem = ERRORS[kind](*arguments)
    for note in notes:
        problem.add_note(note)
    return problem


class _Relay(logging.Handler):
    """Sends log lines to the parent."""

    def __init__(self, relay: RelayedProgress) -> None:
        super().__init__()
        self._relay = relay

    def emit(self, record: logging.LogRecord) -> None:
        self._relay.log(record.levelno, self.format(record))
