"""Runs the commands of a documentation page one after the other in one process, which need not import the libraries.

`Commands` starts that process; `client` is the text of a program that hands its command line, folder, environment and
standard streams to it and ends with the exit code that comes back.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from forking import copy_that_runs, forget_own_modules, run_python

STREAMS = 3
STEPS = 6  # of a training
LIBRARIES = ("torch", "scipy.stats", "matplotlib.pyplot", "optuna", "plotly", "datasets", "sqlalchemy", "pydantic")
CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    server.connect(sys.argv[1])
    request = {"command": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    sys.exit(int(server.recv(16) or 70))
"""


@contextlib.contextmanager
def commands(address: Path, environment: dict[str, str], *options: str) -> Iterator[None]:
    """A copy of this process that serves at this address while the context lasts.

    Options: "changes" if the source changes meanwhile.
    """
    for library in LIBRARIES:
        importlib.import_module(library)
    ready, told = os.pipe()
    server = copy_that_runs(lambda: serve(address, told, options), address.parent, environment, 1, 2)
    os.close(told)
    try:
        assert os.read(ready, 1), "the server did not start"
        yield
    finally:
        os.close(ready)
        os.killpg(server, signal.SIGKILL)
        os.waitpid(server, 0)


def serve(address: Path, told: int, options: Sequence[str]) -> int:
    """Run what clients ask for, until the process is killed.

    It has one core, so that several seeds run one after the other, without processes that import torch again.
    """
    os.setsid()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % len(cores)]})
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(address))
        listener.listen()
        os.write(told, b"r")
        while True:
            connection, _ = listener.accept()
            with connection:
                message, streams, _, _ = socket.recv_fds(connection, 1 << 20, STREAMS)
                with _streams(streams), _surroundings(json.loads(message)) as command:
                    code = _run(command, "changes" in options)
                connection.send(str(code).encode())


def _run(command: list[str], changes: bool) -> int:
    """The exit code of a command: `goe ...`, or what stands behind `python`.

    If the page changes the source between commands, each one imports it anew, but not the libraries.
    """
    try:
        if changes:
            forget_own_modules()
        _make_runs_cheap()
        if command[0] != "goe":
            return run_python(command)
        from research_eval.main import cli

        sys.argv = command
        return cli(command[1:])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1


def _make_runs_cheap() -> None:
    """Runs end sooner, in the modules that are imported by now."""
    if "cheap_runs" in sys.modules:
        return
    sys.path.append(str(Path(__file__).parent))
    cheap_runs = importlib.import_module("cheap_runs")
    cheap_runs.make_runs_cheap(setattr)
    cheap_runs.make_runs_short(setattr, STEPS)


@contextlib.contextmanager
def _streams(descriptors: list[int]) -> Iterator[None]:
    """The client's standard streams are this process's ones."""
    saved = [os.dup(number) for number in range(STREAMS)]
    before = sys.stdin, sys.stdout, sys.stderr
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before
        for number, descriptor in enumerate(saved):
            os.dup2(descriptor, number)
            os.close(descriptor)


@contextlib.contextmanager
def _surroundings(request: dict[str, Any]) -> Iterator[list[str]]:
    """The client's folder and environment; what the command changes of them and of `sys` is undone."""
    folder, environment, arguments, path = Path.cwd(), dict(os.environ), sys.argv, list(sys.path)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    try:
        yield request["command"]
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv, sys.path[:] = arguments, path
        # They have the client's streams, and the next command has others.
        forkserver._forkserver._stop()
        resource_tracker._resource_tracker._stop()
