"""Saves a training so that it continues exactly, and keeps its best weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from research_eval.errors import ConfigError
from research_eval.files import MODEL_FILE as MODEL_FILE
from research_eval.models.base_model import EvaluableModel
from research_eval.training.checkpoint import (
    checkpoint_exists,
    drop_slices,
    flatten_optimizer,
    generator_states,
    load_checkpoint,
    load_weights,
    previous_checkpoint,
    restore_generators,
    restore_optimizer,
    save_checkpoint,
    save_tensors,
)
from research_eval.training.state import TrainingState, state_from

CHECKPOINT_FILE = "checkpoint.safetensors"


class Checkpointer:
    """Reads and writes the checkpoint and the best weights of one run, as files in its folder.

    It keeps references to the objects of the training, and reads their current state at every save.
    """

    def __init__(
        self,
        folder: Path,
        model: EvaluableModel,
        average: AveragedModel | None,
        optimizer: torch.optim.Optimizer,
        schedule: LambdaLR,
    ) -> None:
        self.path = folder / CHECKPOINT_FILE
        self._best = folder / MODEL_FILE
        self._model, self._average = model, average
        self._optimizer, self._schedule = optimizer, schedule
        self.in_slices: Collection[str] = ()  # names of the tensors that other files hold

    def save(
        self, state: TrainingState, moments: dict[str, torch.Tensor] | None = None, slices: Sequence[str] = ()
    ) -> None:
        """Write weights, weight average, optimiser moments, generator states and the training state.

        The names in the file begin with "model/", "average/", "optimizer/" or "generator/". `moments` are those of the
        whole optimiser, if this process has only a part of it. `slices` are the files in which several processes have
        written a part of the tensors; this one holds the others.
        """
        moments = flatten_optimizer(self._optimizer) if moments is None else moments
        generators, generator_values = generator_states()
        tensors = {f"model/{name}": tensor for name, tensor in self._model.state_dict().items()}
        if self._average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self._average.state_dict().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in moments.items()}
        tensors |= {f"generator/{name}": tensor for name, tensor in generators.items()}
        values: dict[str, Any] = {"state": asdict(state), "generators": generator_values}
        if slices:
            tensors = {name: tensor for name, tensor in tensors.items() if name not in self.in_slices}
            values["slices"] = list(slices)
        save_checkpoint(self.path, tensors, values)
        drop_slices(self.path)

    def save_best(self, scored: EvaluableModel, step: int, score: tuple[str, float]) -> None:
        """Write the weights with the best score so far.

        `scored` is the model that was evaluated, so these are averaged weights if the run keeps an average. `score` is
        the name of the score and its value.
        """
        name, value = score
        save_tensors(self._best, scored.state_dict(), {"step": step, f"val_{name}": value})

    def restore(self, total_steps: int) -> TrainingState:
        """Load the checkpoint and return its state; without a checkpoint, return the state of a new training.

        Weights, moments, generators and the schedule are restored in place. Raises ConfigError for a damaged checkpoint
        or one of another run.
        """
        if not checkpoint_exists(self.path):
            return TrainingState()
        tensors, values = load_checkpoint(self.path)

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        load_weights(self._model, part("model/"), self.path)
        if self._average is not None:
            load_weights(self._average, part("average/"), self.path)
        try:
            restore_optimizer(self._optimizer, part("optimizer/"))
            state = state_from(values["state"])
            restore_generators(part("generator/"), values["generators"])
        except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, OverflowError) as error:
            raise ConfigError(
                f"{self.path}: not a checkpoint of this run: {error}. Run the experiment again."
            ) from error
        if state.step > total_steps:  # a longer training wrote it
            raise ConfigError(f"{self.path}: is at step {state.step} of {total_steps}. Run the experiment again.")
        self._set_learning_rate(state.step)
        return state

    def _set_learning_rate(self, step: int) -> None:
        """Move the schedule to a step. LambdaLR is a pure function of the step, so the checkpoint need not hold it."""
        schedule, groups = self._schedule, self._optimizer.param_groups
        schedule.last_epoch = step  # LambdaLR calls its steps epochs
        for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * factor(step)
        schedule._last_lr = [group["lr"] for group in groups]


def drop_previous(folder: Path) -> None:
    """Delete the checkpoint before the last one; a finished run does not need it."""
    previous_checkpoint(folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    drop_slices(folder / CHECKPOINT_FILE)
