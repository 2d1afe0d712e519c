"""Which validation metric chooses the best weights, and which one early stopping watches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError
from research_eval.tasks.base import Task
from research_eval.wording import did_you_mean

PROBED = 4  # samples that a task scores to tell the names of its scores


@dataclass(frozen=True)
class Selection:
    """The names of metrics: a score of the task, or "loss"."""

    weights: str
    stopping: str

    @classmethod
    def of(cls, task: Task, select_by: str | None, early_stopping_metric: str | None) -> Selection:
        """The metrics that a config names; None stands for the task's own score, and for that of the weights."""
        weights = select_by or task.selected_by
        return cls(weights, early_stopping_metric or weights)


def check_metric(name: str | None, key: str, task: Task, data: DataSplits) -> None:
    """Raise ConfigError unless the task has this validation metric; None passes. `key` says where it was given."""
    if name is None:
        return
    known = metric_names(task, data)
    if name not in known:
        near = did_you_mean(name, known)
        raise ConfigError(f"training_params.{key}: unknown metric {name!r}.{near} Known: {', '.join(known)}.")


def metric_names(task: Task, data: DataSplits) -> list[str]:
    """The metrics that an evaluation gives. The task scores outputs of zero for a few samples, so it need not say."""
    targets_B = torch.from_numpy(data.validation.labels[:PROBED])
    outputs_BO = torch.zeros(len(targets_B), task.num_outputs(data))
    losses_B = task.loss_per_sample(outputs_BO, targets_B)
    rows_B = np.arange(len(targets_B))
    scored = task.evaluation(task.answers(outputs_BO), targets_B, losses_B, rows_B, outputs_BO.shape[1])
    return ["loss", *scored.scores]
