"""Launchers keep copies of `goe worker` alive on other machines: as jobs of Slurm (submitit) or in a Ray cluster.

A launcher ships no objects and returns no results. A worker needs the name of its study alone; where the study and the
results lie stands in its environment, because a URL may hold a password. What is done stands in the study.

This module imports neither torch nor an engine, because the flags of `goe tune` come from it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from research_eval.errors import ConfigError
from research_eval.files import RUNS_FOLDER

LauncherName = Literal["local", "submitit", "ray"]
LAUNCHERS: tuple[LauncherName, ...] = ("local", "submitit", "ray")
STORAGE_VARIABLE = "GOE_STORAGE"
CHECKPOINT_SECONDS = 60.0  # for a worker that was told to stop
SUBMITIT_FOLDER = RUNS_FOLDER / ".submitit"
ONE_HOST = ("local", "debug")  # clusters of submitit that are this machine
PROGRAM = "from research_eval.main import cli; raise SystemExit(cli())"


@dataclass(frozen=True)
class LaunchOptions:
    """How many workers there are, where, and what each needs. `options` is for the engine, as its manual names them."""

    name: LauncherName = "local"
    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    options: dict[str, Any] = field(default_factory=dict)
    insecure: bool = False  # a Ray cluster without tokens

    def check(self, storage: str, db: str) -> None:
        """Raise ConfigError for parts of cores or GPUs on Slurm, and for databases that other machines cannot reach."""
        if self.name == "submitit":
            for flag, value in {"--worker_cpus": self.cpus, "--worker_gpus": self.gpus}.items():
                if value != round(value) or (flag == "--worker_cpus" and value < 1):
                    raise ConfigError(f"{flag}: Slurm gives whole cores (1 or more) and whole GPUs, got {value:g}")
        if self.name == "local" or (self.name == "submitit" and self.options.get("cluster") in ONE_HOST):
            return
        for flag, url in {"--storage": storage, "--db": db}.items():
            if url.startswith("sqlite"):
                raise ConfigError(
                    f"{flag}: --launcher {self.name} needs a server, postgresql://..., for --storage and --db: SQLite "
                    "does not work over a network file system"
                )


@dataclass(frozen=True)
class Elsewhere:
    """Where runs are trained that this process does not train itself: the storage of their queue, and the workers."""

    storage: str
    launch: LaunchOptions


class Launcher(Protocol):
    """Workers that an engine keeps alive. `output` says where a user finds what they printed."""

    output: str

    def num_alive(self) -> int:
        """How many workers work or wait for their machine."""

    def stop(self) -> None:
        """Tell the workers to write checkpoints and to end."""


def worker_command(study: str, slot: str) -> list[str]:
    """The command line of a worker that ends with the process that has started it."""
    return [sys.executable, "-c", PROGRAM, "worker", "--study", study, "--slot", slot, "--end_with_stdin"]


def places(storage: str, db: str) -> dict[str, str]:
    """The environment variables that tell a worker where the study and the results lie."""
    from research_eval.store.connection import DB_VARIABLE

    return {STORAGE_VARIABLE: storage, DB_VARIABLE: db}


def launch(options: LaunchOptions, study: str, environment: Mapping[str, str], num_workers: int) -> Launcher:
    """Start so many workers of a study. Raises ConfigError for an engine that is not there or not configured."""
    start: Callable[..., Launcher] = SubmititLauncher if options.name == "submitit" else RayLauncher
    return start(options, study, environment, num_workers)


def _imported(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"--launcher {name}: needs a package: pip install 'graph-of-experts[{extra}]'") from error


class Child:
    """A worker process of this machine that ends with this process."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        # Its standard input is a pipe that nobody writes to: it ends when this process does, however that happens.
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            command, env={**os.environ, **environment}, stdin=subprocess.PIPE
        )

    def wait(self) -> int:
        """The exit code of the worker.

        It looks from time to time: a signal handler that calls `stop` meanwhile has to see the end, too, and Popen's
        own wait would hold a lock.
        """
        while (code := self._process.poll()) is None:
            time.sleep(0.2)
        return code

    def stop(self) -> None:
        """Let the worker write a checkpoint and end; kill it if that takes too long."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(CHECKPOINT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()


# ------------------------------------------------------------------------------------------------------------ submitit


class Slot:
    """One job of submitit: a worker of a study. The job holds nothing but two texts."""

    def __init__(self, study: str, slot: str) -> None:
        self.study, self.slot = study, slot
        self._child: Child | None = None

    def __call__(self) -> int:
        """Work until the study is done. Returns the exit code of the worker."""
        self._child = Child(worker_command(self.study, self.slot), {})
        return self._child.wait()

    def checkpoint(self) -> Any:
        """What submitit submits again when the time of the job is up or its machine is taken away."""
        if self._child is not None:
            self._child.stop()
        return importlib.import_module("submitit").helpers.DelayedSubmission(Slot(self.study, self.slot))


class SubmititLauncher:
    """Workers as an array of jobs."""

    output = str(SUBMITIT_FOLDER)

    def __init__(self, options: LaunchOptions, study: str, environment: Mapping[str, str], num_workers: int) -> None:
        submitit = _imported("submitit", "slurm")
        given = dict(options.options)
        SUBMITIT_FOLDER.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            executor = submitit.AutoExecutor(folder=SUBMITIT_FOLDER, cluster=given.pop("cluster", None))
            settings: dict[str, Any] = {"name": "goe-worker", "cpus_per_task": int(options.cpus)}
            if options.gpus:
                settings["gpus_per_node"] = int(options.gpus)
            executor.update_parameters(**settings | given)
            self._jobs: list[Any] = []
            if num_workers:  # submitit takes no empty array
                with _environment(environment), executor.batch():
                    self._jobs = [executor.submit(Slot(study, str(number))) for number in range(num_workers)]
        except (NameError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ConfigError(f"--launcher_options: {error}") from error  # also what Slurm says of a job

    def num_alive(self) -> int:
        return sum(not job.done() for job in self._jobs)

    def stop(self) -> None:
        for job in self._jobs:
            if not job.done():
                job.cancel(check=False)


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that jobs inherit when they are submitted."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# ----------------------------------------------------------------------------------------------------------------- Ray


class RayLauncher:
    """Workers as actors of a cluster, which starts an actor again elsewhere when its node is lost."""

    output = "the logs of Ray (`ray logs`)"

    def __init__(self, options: LaunchOptions, study: str, environment: Mapping[str, str], num_workers: int) -> None:
        ray = self._ray = _imported("ray", "ray")
        if os.environ.get("RAY_AUTH_MODE") != "token" and not options.insecure:
            raise ConfigError(
                "--launcher ray: this cluster may take programs from anyone who reaches its ports (CVE-2023-48022, "
                "CVE-2025-62593). Start it and this command with RAY_AUTH_MODE=token, or say --ray_insecure if its "
                "network is closed"
            )
        given = {"address": os.environ.get("RAY_ADDRESS", "auto"), "log_to_driver": False, **options.options}
        try:
            ray.init(**given)
        except (ConnectionError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"--launcher ray: {error}") from error
        needs = {"num_cpus": options.cpus, "num_gpus": options.gpus, "scheduling_strategy": "SPREAD"}
        # The engine starts a lost actor again, and calls its method again: the worker claims what is left to do.
        actor = ray.remote(max_restarts=-1, max_task_retries=-1, max_concurrency=2, **needs)(RaySlot)
        self._actors = [actor.remote() for _ in range(num_workers)]
        self._calls = [
            one.work.remote(worker_command(study, str(number)), {**environment, "PYTHONPATH": _python_path()})
            for number, one in enumerate(self._actors)
        ]

    def num_alive(self) -> int:
        return len(self._waiting(0))

    def _waiting(self, seconds: float) -> list[Any]:
        """The calls that have not ended after this time. Ray waits for one call at least."""
        if not self._calls:
            return []
        _, waiting = self._ray.wait(self._calls, num_returns=len(self._calls), timeout=seconds)
        return list(waiting)

    def stop(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):  # whatever a lost actor raises: there is nothing to stop then
                actor.stop.remote()
        self._waiting(CHECKPOINT_SECONDS)
        self._ray.shutdown()


class RaySlot:
    """An actor: a worker process of its node."""

    def __init__(self) -> None:
        self._child: Child | None = None

    def work(self, command: list[str], environment: dict[str, str]) -> int:
        """Work until the study is done. Returns the exit code of the worker."""
        self._child = Child(command, environment)
        return self._child.wait()

    def stop(self) -> None:
        """End the worker with a checkpoint."""
        if self._child is not None:
            self._child.stop()


def _python_path() -> str:
    """Where a worker finds this program if it is not installed there."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def wait_for_end(launcher: Launcher, seconds: float) -> None:
    """Wait until no worker is alive, at most for so many seconds."""
    limit = time.monotonic() + seconds
    while launcher.num_alive() and time.monotonic() < limit:
        time.sleep(0.2)
