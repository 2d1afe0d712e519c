"""What a person sees while a run trains: a bar on a terminal, plain log lines otherwise."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Loss, accuracy, samples per second and time left. Quiet: nothing but warnings, where it `warns`."""

    def __init__(self, epochs: int, quiet: bool = False, warns: bool = True) -> None:
        self._epochs = epochs
        self._quiet = quiet
        self._warns = warns
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._total = 1
        self._first = (0, 0.0)
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[values]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=self._console)
            self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)

    def start(self, step: int, total: int) -> None:
        self._total = total
        self._first = (step, time.perf_counter())
        self._last_line = time.perf_counter()
        if self._bar is not None:
            self._task = self._bar.add_task("training", total=total, completed=step, values="")

    def step(self, step: int, values: dict[str, float]) -> None:
        """After a logged step: `train_loss`, `train_acc` and `samples_per_second`."""
        text = (
            f"loss {values['train_loss']:.4f}  acc {values['train_acc']:.3f}  "
            f"{values['samples_per_second']:,.0f} samples/s"
        )
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=text)
        elif not self._quiet and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._first[1]) / max(step - self._first[0], 1) * (self._total - step)
            log.info("step %d/%d  %s  %.0f s left", step, self._total, text, left)

    def epoch(self, epoch: int, values: dict[str, float]) -> None:
        """After an evaluation: `val_loss`, `val_acc`, `val_f1`."""
        if self._quiet:
            return
        line = (
            f"epoch {epoch}/{self._epochs}  val_loss {values['val_loss']:.4f}  "
            f"val_acc {values['val_acc']:.4f}  val_f1 {values['val_f1']:.4f}"
        )
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            log.info(line)

    def warn(self, text: str) -> None:
        """At any time, and not silenced by `quiet`."""
        if not self._warns:
            return
        if self._bar is not None:
            self._bar.console.print(f"[yellow]{escape(text)}[/yellow]", highlight=False)
        else:
            log.warning(text)


class Trial(Protocol):
    """What is shown of a study's trial."""

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
    """A line per finished trial, with the number done, the best so far and the time left. Quiet: nothing at all."""

    def __init__(self, n_trials: int, objectives: Sequence[str], largest_is_best: bool, quiet: bool = False) -> None:
        self._n_trials = n_trials
        self._objectives = objectives
        self._largest_is_best = largest_is_best
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._shown: set[int] | None = None
        self._known = 0
        self._started = time.perf_counter()
        self._others: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} trials {task.fields[best]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=self._console)
            self._bar.__enter__()
            self._task = self._bar.add_task("study", total=self._n_trials, best="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)

    def also(self, call: Callable[[], None]) -> None:
        """Call it after every trial that has finished."""
        self._others.append(call)

    def update(self, trials: Sequence[Trial]) -> None:
        """With all trials of the study as they stand."""
        done = [trial for trial in trials if trial.warm_start is None and trial.status not in ("running", "waiting")]
        if self._shown is None:
            self._shown, self._known = {trial.number for trial in done}, len(done)
            if done and not self._quiet:
                log.info("the study goes on: %d of %d trials are done", len(done), self._n_trials)
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
