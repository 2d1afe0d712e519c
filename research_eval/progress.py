"""What a person sees while a run trains: a bar on a terminal, plain log lines otherwise."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Loss, accuracy, samples per second and time left. Quiet: nothing at all."""

    def __init__(self, epochs: int, quiet: bool = False) -> None:
        self._epochs = epochs
        self._quiet = quiet
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
        if self._bar is not None:
            self._bar.console.print(f"[yellow]{escape(text)}[/yellow]", highlight=False)
        else:
            log.warning(text)
