"""What may fail without costing the user anything: printing, pictures, files beside the results.

The rule: once a result is stored, a problem of these is one warning, and the work goes on.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from research_eval.wording import printable


def reason_of(problem: Exception) -> str:
    """A problem in one line for a warning, without the number of the operating system."""
    if isinstance(problem, OSError) and problem.strerror:
        text = f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    else:
        text = str(problem) or type(problem).__name__
    return printable(text.split("\n")[0])


@contextmanager
def attempted(log: logging.Logger, what: str) -> Iterator[None]:
    """An exception in the block becomes one warning, which begins with `what`; the program goes on after the block."""
    try:
        yield
    except Exception as problem:
        log.warning("%s: %s", what, reason_of(problem))
        log.debug("the cause", exc_info=True)


class OutputLost(Exception):
    """Standard output accepts nothing any more, and the command has no other product. The problem has been reported."""

    def __init__(self, problem: OSError | ValueError) -> None:
        super().__init__(str(problem))
        # A reader such as `head` leaves when it has enough, which is no failure.
        self.exit_code = 0 if is_gone(problem) else 1


def is_gone(problem: BaseException) -> bool:
    """Whether nobody reads any more, as after `| head -1`."""
    return isinstance(problem, OSError) and problem.errno == errno.EPIPE


class BestEffortStream:
    """A text stream whose writes never raise. After the first failure it is silent, and `lost` has the problem.

    Escapes replace characters that the encoding of the stream lacks. Everything else is that of the wrapped stream.
    """

    def __init__(self, stream: TextIO, warn_on: TextIO | None = None) -> None:
        self._stream = stream
        self._warn_on = warn_on
        self.lost: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        if self.lost is None:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError as error:
                    self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            except (OSError, ValueError) as problem:  # ValueError: somebody has closed the stream
                self._lose(problem)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as problem:
                self._lose(problem)

    def _lose(self, problem: OSError | ValueError) -> None:
        self.lost = problem
        # What is left in buffers goes nowhere; otherwise Python would complain at its exit, with exit code 120. A file
        # that the caller has put in the place of the stream is the caller's.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if self._stream.fileno() in (1, 2):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        if self._warn_on is not None and not is_gone(problem):
            print(f"standard output: {reason_of(problem)}. Nothing more is printed.", file=self._warn_on)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _nowhere(number: int) -> TextIO:
    """A stream for a process that was started without this one (`>&-`).

    It also takes the number of the missing file: otherwise the next file that is opened, such as a database, gets it,
    and what a library prints would land there.
    """
    stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - stays open as long as the process
    with contextlib.suppress(OSError):
        if stream.fileno() == number:
            os.set_inheritable(number, True)
        else:
            try:
                os.fstat(number)
            except OSError:
                os.dup2(stream.fileno(), number)
    return stream


@contextmanager
def best_effort_output() -> Iterator[None]:
    """Within the block nothing that is printed raises, on standard output or on standard error.

    A full disk under standard output is reported once on standard error; a reader who is gone is not.
    """
    # A process may have been started without them; then it keeps those that lead nowhere.
    before = (
        sys.stdout if sys.stdout is not None else _nowhere(1),
        sys.stderr if sys.stderr is not None else _nowhere(2),
    )
    errors = BestEffortStream(before[1])
    output = BestEffortStream(before[0], cast(TextIO, errors))
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    try:
        yield
    finally:
        output.flush()
        errors.flush()
        if sys.stdout is cast(TextIO, output):
            sys.stdout = before[0]
        if sys.stderr is cast(TextIO, errors):
            sys.stderr = before[1]


def print_product(text: str) -> None:
    """Write to standard output what the user has asked for. Raises OutputLost if that does not arrive.

    Only within `best_effort_output`; there a plain `print` is for what may get lost.
    """
    sys.stdout.write(text)
    sys.stdout.flush()
    problem = getattr(sys.stdout, "lost", None)
    if problem is not None:
        raise OutputLost(problem)
