"""What runs before the first result: importing, reading, tokenising, building, each shown while it lasts.

    with phase("tokenising"):
        for done, part in enumerate(parts):
            report(f"{done / len(parts):.0%}")

A phase appears when it has lasted for SECONDS_BEFORE_SHOWN. On a terminal it is one line that is updated in place and
vanishes at the end; elsewhere it is a log line. It appears only if log lines of level INFO do, so a quiet command shows
none. In a process of a pool, `phases_to` sends them to the process that has the screen.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, TextIO, cast

from research_eval.system.best_effort import BestEffortStream
from research_eval.wording import printable, shortened

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)

SECONDS_BEFORE_SHOWN = 0.5
SECONDS_BETWEEN_LINES = 10.0  # of log lines about one piece of work, if there is no terminal
SECONDS_BETWEEN_DRAWINGS = 0.1
ERASE_LINE = "\r\x1b[2K"


def error_stream() -> IO[str] | None:
    """Standard error as it is now. A terminal that is gone must not end a training, also if no command is around it."""
    return None if sys.stderr is None else cast(IO[str], BestEffortStream(sys.stderr))


def _terminal() -> TextIO | None:
    """Standard error, if it is a terminal whose cursor can be moved."""
    stream = error_stream()
    moves = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    return cast(TextIO, stream) if moves else None


class _Phase:
    """A piece of work: its name, how far it is, whether it has lasted long enough, and when it was last shown."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.progress = ""
        self.is_shown = False
        self.last_shown = 0.0

    def __str__(self) -> str:
        return printable(f"{self.name}: {self.progress}" if self.progress else self.name)


class _Screen:
    """Shows the innermost of the running phases. A timer's thread and the working thread call it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._running: list[_Phase] = []
        self._terminal: TextIO | None = None  # with the line of a phase
        self._bars: list[Console] = []  # progress bars, which have the terminal for themselves
        self.relay: Callable[[str], None] | None = None  # to the process that has the screen
        self._filters: list[tuple[logging.Handler, Callable[[logging.LogRecord], bool]]] = []

    def take(self, console: Console) -> None:
        """A progress bar begins to use the terminal: phases are lines above it until `give_back`."""
        self._bars.append(console)

    def give_back(self, console: Console) -> None:
        """The progress bar of `take` is over."""
        self._bars.remove(console)

    @contextmanager
    def running(self, phase: _Phase) -> Iterator[None]:
        """Show the phase if the block takes long enough."""
        timer = threading.Timer(SECONDS_BEFORE_SHOWN, self._show, [phase])
        timer.daemon = True
        with self._lock:
            self._running.append(phase)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                self._running.remove(phase)
                drawn = self._terminal is not None
                if phase.is_shown:
                    self._clear()
                if drawn and self._running and self._running[-1].is_shown:
                    self._running[-1].last_shown = 0.0
                    self._update(self._running[-1])

    def report(self, progress: str) -> None:
        """Set how far the innermost phase is."""
        with self._lock:
            if self._running:
                self._running[-1].progress = progress
                if self._running[-1].is_shown:
                    self._update(self._running[-1])

    def _show(self, phase: _Phase) -> None:
        """The timer calls this: the phase has lasted long enough."""
        with self._lock:
            if phase in self._running:
                phase.is_shown = True
                if phase is self._running[-1]:
                    self._update(phase)

    def _update(self, phase: _Phase) -> None:
        """Draw the line on a terminal again; elsewhere write a line if the last one is old enough."""
        now = time.perf_counter()
        if self._terminal is None and self.relay is None and not self._bars:
            self._terminal = _terminal()
            if self._terminal is not None:
                self._keep_log_lines_above(self._terminal)
        pause = SECONDS_BETWEEN_LINES if self._terminal is None else SECONDS_BETWEEN_DRAWINGS
        if phase.last_shown and now - phase.last_shown < pause:
            return
        phase.last_shown = now
        if self._terminal is not None:
            width = shutil.get_terminal_size().columns - 1
            self._terminal.write(f"{ERASE_LINE}{shortened(f'{phase} ...', width)}")
            self._terminal.flush()
        elif self.relay is not None:
            self.relay(str(phase))
        elif self._bars:
            self._bars[-1].print(f"{phase} ...", markup=False, highlight=False)
        else:
            log.info("%s ...", str(phase))  # as text: the phase changes, and a handler may be slow

    def _keep_log_lines_above(self, terminal: TextIO) -> None:
        """Let log lines to a terminal replace the line of the phase; its next report draws it again below them."""

        def erase(record: logging.LogRecord) -> bool:
            terminal.write(ERASE_LINE)
            return True

        for handler in logging.getLogger().handlers:
            stream: TextIO | None = getattr(handler, "stream", None)
            if stream is not None and stream.isatty():
                handler.addFilter(erase)
                self._filters.append((handler, erase))

    def _clear(self) -> None:
        """Remove what is shown in place."""
        if self._terminal is not None:
            self._terminal.write(ERASE_LINE)
            self._terminal.flush()
            self._terminal = None
        for handler, erase in self._filters:
            handler.removeFilter(erase)
        self._filters.clear()
        if self.relay is not None:
            self.relay("")


_screen = _Screen()
take_screen = _screen.take
give_back_screen = _screen.give_back


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Show `name` while the block runs, if that takes long. Phases may be nested: the innermost one is shown."""
    if not log.isEnabledFor(logging.INFO):
        yield
        return
    with _screen.running(_Phase(name)):
        yield


def report(progress: str) -> None:
    """Say how far the running phase is, such as "40 %"; without a phase nothing happens. It may be called often."""
    _screen.report(progress)


@contextmanager
def phases_to(relay: Callable[[str], None]) -> Iterator[None]:
    """Within the block `relay` receives the text of each phase that would be shown, and "" at the end of it."""
    _screen.relay = relay
    try:
        yield
    finally:
        _screen.relay = None


def import_torch() -> None:
    """Import torch, which takes seconds on a busy machine, as a phase."""
    with phase("importing torch"):
        import torch  # noqa: F401
