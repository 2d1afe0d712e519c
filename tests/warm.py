"""A `python` that starts at once: a server that has imported the libraries forks a process for each command.

The pages of the documentation have more than a hundred commands, and each would import torch for two seconds. The
server imports libraries only, and never the program: a command imports the program of its own PYTHONPATH.

    python warm.py SOCKET              the server
    python -I -S warm.py SOCKET run …  a command: `run` is followed by the words after `python`

Standard streams, folder and environment are those of the command. It passes signals on, and ends with the exit code.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

LIBRARIES = (
    *("torch", "torch._dynamo", "numpy", "pydantic", "rich", "sqlalchemy", "alembic", "optuna", "jinja2"),
    *("matplotlib", "pyarrow", "tokenizers", "scipy.special", "plotly"),
)
POLL_SECONDS = 0.02


# --------------------------------------------------------------------------------------------------------- the command


def ask(path: str, words: list[str]) -> int:
    """Let the server run the words; returns the exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = json.dumps({"words": words, "folder": str(Path.cwd()), "environment": dict(os.environ)}).encode()
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        process = int(server.recv(64))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(process, number))
        code = int(server.recv(64) or b"1")
    if code < 0:  # a signal ended it
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


# ---------------------------------------------------------------------------------------------------------- the server


def serve(path: str) -> None:
    """Answer commands for ever. Returns only in the process of a command."""
    import importlib

    for name in LIBRARIES:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(16)
    Path(f"{path}.new").rename(path)  # who waits for the path may connect at once
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that watch commands
    while True:
        command, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return watch(command)
        command.close()


def watch(command: socket.socket) -> None:
    """Start the process of a command, tell how it ends, and kill it if the command is gone."""
    head, streams, _, _ = socket.recv_fds(command, 8, 3)
    size, content = int.from_bytes(head, "big"), b""
    while len(content) < size:
        content += command.recv(size - len(content))
    request = json.loads(content)
    process = os.fork()
    if process == 0:
        command.close()
        return become(request, streams)
    command.sendall(str(process).encode())
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            command.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        if select.select([command], [], [], POLL_SECONDS)[0]:  # it says nothing: it is gone
            os.kill(process, signal.SIGKILL)
            os._exit(0)


def become(request: dict, streams: list[int]) -> None:
    """Be the command, in place of a new interpreter. Returns when it has ended; its exit code is that of SystemExit."""
    import runpy
    import types

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    words = request["words"]
    ours = str(Path(__file__).resolve().parent)
    given = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    first = str(Path(words[0]).resolve().parent) if words and words[0][0] != "-" else ""
    sys.path[:] = [first, *given, *(place for place in sys.path if place != ours)]
    if words and words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words and words[0][0] != "-":
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    else:
        text = words[1] if words[:1] == ["-c"] else sys.stdin.read()
        sys.argv = [(words or [""])[0], *words[2 if words[:1] == ["-c"] else 1 :]]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(text, "<string>", "exec"), module.__dict__)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(ask(sys.argv[1], sys.argv[3:]))
    serve(sys.argv[1])
