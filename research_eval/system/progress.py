"""The progress of a run on the screen: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from research_eval.system.best_effort import attempted
from research_eval.system.phases import SECONDS_BETWEEN_LINES, error_stream, give_back_screen, take_screen
from research_eval.wording import printable

log = logging.getLogger(__name__)


class Display(Protocol):
    """Shows a training while it runs. `Progress` and `RelayedProgress` implement it."""

    def start(self, step: int, total: int, evaluations: int) -> None:
        """The training starts, or continues after `step` of `total` steps. It has so many evaluations in all."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show a logged step, with the means since the last one."""

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Show an evaluation, with its loss and scores."""

    def warn(self, text: str) -> None:
        """Show a warning, at any time."""


def step_text(values: Mapping[str, float]) -> str:
    """Loss, accuracy (if the task has one) and speed in one line; the speed in tokens for running text.

    >>> step_text({"train_loss": 0.5, "train_acc": 0.75, "samples_per_second": 1200.0, "learning_rate": 0.1})
    'loss 0.5000  acc 0.750  1,200 samples/s'
    """
    accuracy = f"  acc {values['train_acc']:.3f}" if "train_acc" in values else ""
    unit = "tokens" if "tokens_per_second" in values else "samples"
    return f"loss {values['train_loss']:.4f}{accuracy}  {values[f'{unit}_per_second']:,.0f} {unit}/s"


def counted_unit(epochs: int, evaluations: int) -> tuple[str, int]:
    """What the evaluations of a training are called, and how many there are: epochs, unless they come at other times.

    >>> counted_unit(3, 3), counted_unit(1, 8)
    (('epoch', 3), ('evaluation', 8))
    """
    return ("epoch", epochs) if evaluations == epochs else ("evaluation", evaluations)


def epoch_text(epoch: int, epochs: int, values: Mapping[str, float], unit: str = "epoch") -> str:
    """An evaluation in one line.

    >>> epoch_text(1, 3, {"val_loss": 0.5, "val_acc": 1.0})
    'epoch 1/3  val_loss 0.5000  val_acc 1.0000'
    """
    return f"{unit} {epoch}/{epochs}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def _bar(console: Console, *columns: ProgressColumn) -> Bar:
    """A progress bar. What is printed meanwhile appears above it, unless it goes to a file, where it has to arrive."""
    return Bar(*columns, console=console, redirect_stdout=sys.stdout is not None and sys.stdout.isatty())


class _Counts(ProgressColumn):
    """Finished and all steps, with the latest values; before the training, which has no steps yet, what runs."""

    def render(self, task: Task) -> Text:
        counts = "" if task.total is None else f"{task.completed:.0f}/{task.total:.0f} "
        return Text(f"{counts}{task.fields['values']}")


def _training_bar(console: Console) -> Bar:
    """A progress bar for steps: name, bar, counts with the latest values, and the remaining time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Counts(),
        TimeRemainingColumn(),
    )
    return _bar(console, *columns)


def _console() -> Console:
    return Console(file=error_stream(), stderr=True)


class _Bars:
    """Progress bars of one or more trainings, while a `with` block lasts; none without a terminal, or if quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._console = _console()
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        """Start the bars if standard error is a terminal."""
        if self._console.is_terminal and not self._quiet:
            self._bar = _training_bar(self._console)
            self._bar.__enter__()
            take_screen(self._console)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the bars, also after an exception, so that the terminal's cursor comes back."""
        if self._bar is not None:
            give_back_screen(self._console)
            with attempted(log, "the progress bar"):
                self._bar.__exit__(kind, error, trace)


class Progress(_Bars):
    """A bar on a terminal, log lines elsewhere.

    If `quiet`, it shows nothing but warnings. If not `warns`, it drops the warnings.
    """

    def __init__(self, epochs: int, quiet: bool = False, warns: bool = True) -> None:
        super().__init__(quiet)
        self._unit, self._epochs = "epoch", epochs
        self._warns = warns
        self._task = TaskID(0)
        self._total = 1
        self._first = (0, 0.0)  # step and time at the start of this process
        self._last_line = 0.0

    def start(self, step: int, total: int, evaluations: int) -> None:
        self._total = total
        self._unit, self._epochs = counted_unit(self._epochs, evaluations)
        self._first = (step, time.perf_counter())
        self._last_line = time.perf_counter()
        if self._bar is not None:
            self._task = self._bar.add_task("training", total=total, completed=step, values="")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Update the bar, or write a log line if the last one is at least SECONDS_BETWEEN_LINES old.

        The remaining time follows from the steps of this process alone: a resumed training has earlier steps.
        """
        text = step_text(values)
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=text)
        elif not self._quiet and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._first[1]) / max(step - self._first[0], 1) * (self._total - step)
            log.info("step %d/%d  %s  %.0f s left", step, self._total, text, left)

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        if self._quiet:
            return
        line = epoch_text(epoch, self._epochs, values, self._unit)
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            log.info(line)

    def warn(self, text: str) -> None:
        """Show a warning, at any time. `quiet` does not suppress it."""
        if not self._warns:
            return
        if self._bar is not None:
            self._bar.console.print(f"[yellow]{escape(text)}[/yellow]", highlight=False)
        else:
            log.warning(text)


class RelayedProgress:
    """Sends the progress of a training to another process, as (name of the method, arguments)."""

    def __init__(self, send: Callable[[tuple[str, Any]], None]) -> None:
        self._send = send

    def start(self, step: int, total: int, evaluations: int) -> None:
        self._send(("start", (step, total, evaluations)))

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._send(("step", (step, dict(values))))

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        self._send(("epoch", (epoch, dict(values))))

    def warn(self, text: str) -> None:
        self._send(("warn", (text,)))

    def phase(self, text: str) -> None:
        """Send what runs before the training, or "" when that has ended."""
        self._send(("phase", (text,)))

    def log(self, level: int, text: str) -> None:
        """Send a log line."""
        self._send(("log", (level, text)))


class PooledProgress(_Bars):
    """The progress of several trainings at the same time: one bar each on a terminal, otherwise lines with names."""

    def __init__(self, names: Sequence[str], epochs: int, quiet: bool = False) -> None:
        super().__init__(quiet)
        self._names = names
        self._unit, self._epochs = "epoch", epochs
        self._tasks: dict[int, TaskID] = {}
        self._totals: dict[int, int] = {}
        self._last_lines: dict[int, float] = {}  # of steps, by training
        self._warnings: set[str] = set()  # in the logs of all trainings

    def show(self, number: int, kind: str, content: Any) -> None:
        """What training `number` has relayed."""
        if kind == "phase":
            self._phase(number, *content)
        elif kind == "start":
            self._start(number, *content)
        elif kind == "step":
            self._step(number, *content)
        elif kind == "epoch":
            self._line(number, logging.INFO, epoch_text(content[0], self._epochs, content[1], self._unit))
        elif kind == "warn":
            self._line(number, logging.WARNING, content[0])
        elif kind == "log":
            level, text = content
            # What one run says of the data, the others say too.
            if level != logging.WARNING or text not in self._warnings:
                self._line(number, level, text)
            if level == logging.WARNING:
                self._warnings.add(text)

    def _phase(self, number: int, text: str) -> None:
        """What runs before the training: a line of the log, or beside a bar that has not begun."""
        if self._bar is None:
            if text:
                self._line(number, logging.INFO, f"{text} ...")
        elif number in self._tasks:
            self._bar.update(self._tasks[number], values=text)
        else:
            self._tasks[number] = self._bar.add_task(self._names[number], total=None, values=text)

    def _start(self, number: int, step: int, total: int, evaluations: int) -> None:
        self._unit, self._epochs = counted_unit(self._epochs, evaluations)
        self._totals[number] = total
        self._last_lines[number] = time.perf_counter()
        if self._bar is not None:
            self._phase(number, "")
            self._bar.update(self._tasks[number], total=total, completed=step)

    def _step(self, number: int, step: int, values: Mapping[str, float]) -> None:
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._tasks[number], completed=step, values=step_text(values))
        elif now - self._last_lines[number] >= SECONDS_BETWEEN_LINES:
            self._last_lines[number] = now
            self._line(number, logging.INFO, f"step {step}/{self._totals[number]}  {step_text(values)}")

    def _line(self, number: int, level: int, text: str) -> None:
        """A line of the log, or above the bars. A bar is there only if the progress is not quiet."""
        if self._bar is None:
            if level >= logging.WARNING or not self._quiet:
                log.log(level, "%s: %s", self._names[number], text)
        else:
            lines = [printable(line) for line in f"{self._names[number]}: {text}".split("\n")]
            self._bar.console.print(Text("\n".join(lines)))


class Trial(Protocol):
    """The facts of a study's trial that are shown."""

    @property
    def number(self) -> int: ...
    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def values(self) -> tuple[float, ...] | None: ...
    @property
    def model_type(self) -> str | None: ...
    @property
    def warm_start(self) -> str | None: ...


class StudyProgress:
    """One line per finished trial, with the number of finished trials, the best value and the remaining time.

    If `quiet`, it shows nothing. `largest_is_best` refers to the first objective.
    """

    def __init__(self, n_trials: int, objectives: Sequence[str], largest_is_best: bool, quiet: bool = False) -> None:
        self._n_trials = n_trials
        self._objectives = objectives
        self._largest_is_best = largest_is_best
        self._quiet = quiet
        self._console = _console()
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._shown: set[int] | None = None  # numbers of the trials with a line; None before the first update
        self._known = 0  # finished trials of earlier processes, which say nothing about the speed
        self._started = time.perf_counter()
        self._others: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        """Start the bar if standard error is a terminal."""
        if self._console.is_terminal and not self._quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} trials {task.fields[best]}"),
                TimeRemainingColumn(),
            )
            self._bar = _bar(self._console, *columns)
            self._bar.__enter__()
            take_screen(self._console)
            self._task = self._bar.add_task("study", total=self._n_trials, best="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the bar, also after an exception."""
        if self._bar is not None:
            give_back_screen(self._console)
            with attempted(log, "the progress bar"):
                self._bar.__exit__(kind, error, trace)

    def also(self, call: Callable[[], None]) -> None:
        """Register a function to call after every update with newly finished trials."""
        self._others.append(call)

    def update(self, trials: Sequence[Trial]) -> None:
        """Show the trials that finished since the last call. `trials` are all trials of the study.

        Trials of an earlier process are counted at the first call, but not shown. Warm-start trials do not count.
        """
        done = [trial for trial in trials if trial.warm_start is None and trial.status not in ("running", "waiting")]
        if self._shown is None:
            self._shown, self._known = {trial.number for trial in done}, len(done)
            if done and not self._quiet:
                log.info("the study continues: %d of %d trials are done", len(done), self._n_trials)
        new = [trial for trial in done if trial.number not in self._shown]
        finished = [trial for trial in done if trial.status == "finished" and trial.values]
        sign = 1 if self._largest_is_best else -1
        best = max(finished, key=lambda trial: sign * (trial.values or (0.0,))[0], default=None)
        text = "" if best is None or not best.values else f"best {best.values[0]:.4f} (trial {best.number})"
        for trial in new:
            self._shown.add(trial.number)
            self._print(trial, len(done), text)
        if self._bar is not None:
            self._bar.update(self._task, completed=len(done), best=text)
        if new:
            for call in self._others:
                call()

    def _print(self, trial: Trial, done: int, best: str) -> None:
        """Write the line of one trial: its objectives, or the reason why it has none."""
        if self._quiet:
            return
        if trial.status == "finished" and trial.values:
            pairs = zip(self._objectives, trial.values, strict=True)
            what = "  ".join(f"{name} {value:.4f}" if value < 100 else f"{name} {value:,.0f}" for name, value in pairs)
        else:
            what = trial.reason or ""
        rate = (time.perf_counter() - self._started) / max(done - self._known, 1)
        line = (
            f"trial {trial.number} {trial.status}: {trial.model_type or ''}  {what}  "
            f"[{done}/{self._n_trials} done, {best}, {rate * max(self._n_trials - done, 0):.0f} s left]"
        )
        if self._bar is not None:
            self._bar.console.print(escape(line), highlight=False)
        else:
            log.info(line)
