"""A Python process that is a copy of this one: the libraries are there, the program itself is imported anew."""

from __future__ import annotations

import importlib
import logging
import os
import runpy
import signal
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

OWN = ("research_eval", "goe_extension_", "tests.", "cheap_runs")  # of this project and of its users


def output_of_a_copy(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    """What `python words...` would do in this folder: exit code, standard output and standard error."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = copy_that_runs(lambda: run_python(words), folder, environment, out.fileno(), err.fileno())
        _, status = os.waitpid(pid, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return os.waitstatus_to_exitcode(status), texts[0], texts[1]


def copy_that_runs(program: Callable[[], int], folder: Path, environment: dict[str, str], out: int, err: int) -> int:
    """The id of a copy of this process that runs `program` in this folder and ends with the exit code that it returns.

    It ends without the end of an interpreter, which would touch all memory.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid != 0:
        return pid
    code = 1
    try:
        _prepare(folder, environment, out, err)
        code = program()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or 120
        os._exit(code)


def _prepare(folder: Path, environment: dict[str, str], out: int, err: int) -> None:
    """Streams, folder, environment, signals, logging and modules as a new process has them."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, out, err)):
        os.dup2(descriptor, number)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0)
    logging.getLogger().handlers.clear()
    warnings.resetwarnings()
    for one in (forkserver._forkserver, resource_tracker._resource_tracker):
        one.__init__()  # type: ignore[misc]
    forget_own_modules()
    own = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    installed = [part for part in sys.path if part.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [*own, *installed]
    importlib.invalidate_caches()


def forget_own_modules() -> None:
    """They are imported anew where they are needed."""
    for name in [name for name in sys.modules if name.startswith(OWN)]:
        del sys.modules[name]


def run_python(words: list[str]) -> int:
    """The exit code of `python words...`."""
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.path.insert(0, "")
            main = types.ModuleType("__main__")
            sys.modules["__main__"] = main
            exec(compile(words[1], "<string>", "exec"), main.__dict__)
        elif words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            main = types.ModuleType("__main__")
            main.__file__ = str(Path(words[0]).resolve())
            sys.modules["__main__"] = main
            exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main.__dict__)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
