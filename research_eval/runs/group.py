"""One run that all processes of torchrun train together: the first one stores it, the others compute their rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from research_eval.config.sections import ExperimentConfig, ParallelParams
from research_eval.errors import ConfigError
from research_eval.models.base_model import EvaluableModel
from research_eval.runs.prepare import prepare
from research_eval.system.world import rank_and_size
from research_eval.tasks.base import Evaluation
from research_eval.training.fit import fit
from research_eval.training.parallel import Parallel
from research_eval.training.processes import Processes
from research_eval.training.slices import MUON_NEEDS_WHOLE
from research_eval.training.state import Diverged, Interrupted, TrainingState

TRAIN, END = b"train", b"end"  # what the first process tells the others


class Silent:
    """The observer of a process that reports nothing."""

    def start(self, state: TrainingState, steps_per_evaluation: int, total_steps: int) -> None: ...
    def train_values(self, step: int, values: dict[str, float]) -> None: ...
    def epoch_end(
        self, step: int, evaluation: Evaluation, model_metrics: dict[str, Any], scored: EvaluableModel
    ) -> None: ...


class _Leading(Processes):
    """The group as its first process sees it: the others wait until it says that the training begins."""

    has_begun = False

    def begin(self, *arguments: Any) -> TrainingState:
        self.has_begun = True
        self.tell(TRAIN)
        return super().begin(*arguments)


def lead(config: ExperimentConfig, run: Callable[[Parallel], Any]) -> Any:
    """What `run` returns, which trains the config with the group that it is given."""
    _check(config)
    group = _Leading(*_group_options(config))
    try:
        return run(group)
    finally:
        if not group.has_begun:  # a finished run, say, or a problem before the training
            group.tell(END)
        group.close()


def follow(config: ExperimentConfig) -> None:
    """Train with the first process, and return when the training ends, in whatever way."""
    _check(config)
    group = Processes(*_group_options(config))
    try:
        runtime, data, model = prepare(config)
        if group.tell(b"") == TRAIN:
            with tempfile.TemporaryDirectory() as folder:
                fit(model, data, config, runtime, Path(folder), Silent(), group)
    except (Diverged, Interrupted):
        pass  # the first process says so; torchrun would kill it if this one ended with an error before
    finally:
        group.close()


def _group_options(config: ExperimentConfig) -> tuple[int, str, ParallelParams]:
    """The arguments of a group. A moving average needs whole weights, so "auto" leaves them whole."""
    layout = config.training_params.parallel
    if config.training_params.ema_decay:
        layout = layout.model_copy(update={"data": "ddp"})
    return config.seed, config.training_params.device, layout


def _check(config: ExperimentConfig) -> None:
    """Raise ConfigError for options that are not known to work in several processes."""
    options = config.training_params
    if options.compile:
        raise ConfigError("training_params.compile: is not tried with several processes. Set it to false.")
    layout = options.parallel
    if options.ema_decay and (layout.data == "fsdp" or layout.experts > 1):
        raise ConfigError(
            "training_params.ema_decay: a moving average needs whole weights: set parallel.data to ddp and "
            "parallel.experts to 1, or leave it out"
        )
    size = rank_and_size()[1]
    if size % layout.experts:
        raise ConfigError(f"training_params.parallel.experts: {layout.experts} does not divide the {size} processes")
    if layout.data == "fsdp" and config.optimizer_params.name == "muon":
        raise ConfigError(MUON_NEEDS_WHOLE)
    if options.dispatcher != "local" and layout.experts > 1:
        raise ConfigError("training_params.dispatcher: parallel.experts has a dispatcher of its own. Leave one out.")
    if options.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"training_params.device: several processes need auto, cpu or cuda, got {options.device!r}: each takes a "
            "GPU of its own"
        )
