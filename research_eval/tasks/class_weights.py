"""Weights of the classes in the training loss.

B batch  C classes  N training samples  O outputs per sample
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError
from research_eval.tasks.base import Evaluation, Task
from research_eval.wording import shortened

ClassWeights = Literal["balanced"] | Sequence[float]
SHOWN_NAMES = 80  # characters of class names in a message


def class_weights(given: ClassWeights | None, data: DataSplits) -> NDArray[np.float32] | None:
    """The factor of each class in the training loss [C], with a mean of 1 over the training samples.

    "balanced" is N / (K n) for a class with n of the N samples, where K classes have samples, as in scikit-learn. A
    list is divided by its mean over the samples. None if nothing is given, or if all classes with samples weigh the
    same. Raises ConfigError for data without classes and for a list that does not fit them.
    """
    if given is None:
        return None
    key = "training_params.class_weights"
    if not data.label_names or data.train.labels.dtype.kind != "i":
        raise ConfigError(f"{key}: the data have no classes. Set it to null.")
    if given != "balanced" and len(given) != data.num_classes:
        names = shortened(", ".join(data.label_names), SHOWN_NAMES)
        raise ConfigError(f"{key}: expected {data.num_classes} numbers, one per class ({names}), got {len(given)}")
    counts_C = np.bincount(data.train.labels, minlength=data.num_classes)
    present_C = counts_C > 0
    weights_C = 1 / np.maximum(counts_C, 1) if given == "balanced" else np.array(given, float)
    if len(np.unique(weights_C[present_C])) == 1:
        return None  # the loss stays the same to the last digit
    scaled_C = weights_C * counts_C.sum() / (weights_C * counts_C).sum()
    return np.where(present_C, scaled_C, 0.0).astype(np.float32)


class WeightedTask(Task):
    """A task whose training loss multiplies the loss of each sample by the weight of its class.

    The mean of a batch divides by its samples and not by their weights, so that several small batches of a step add up
    to the large one. Evaluation uses the task itself.
    """

    name = "weighted"
    selected_by = ""  # the task itself selects

    def __init__(self, task: Task, weights_C: Tensor) -> None:
        self._task = task
        self._weights_C = weights_C

    def num_outputs(self, data: DataSplits) -> int:
        return self._task.num_outputs(data)

    def loss_per_sample(self, outputs_BO: Tensor, targets_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
        losses_B = self._task.loss_per_sample(outputs_BO, targets_B, label_smoothing)
        return losses_B * self._weights_C.index_select(0, targets_B)

    def train_scores(self, outputs_BO: Tensor, targets_B: Tensor) -> dict[str, Tensor]:
        return self._task.train_scores(outputs_BO, targets_B)

    def evaluation(
        self, answers_N: Tensor, targets_N: Tensor, losses_N: Tensor, rows_N: NDArray[Any], num_outputs: int
    ) -> Evaluation:
        return self._task.evaluation(answers_N, targets_N, losses_N, rows_N, num_outputs)


def weighted(task: Task, given: ClassWeights | None, data: DataSplits, device: torch.device) -> Task:
    """The task for the training loss: with the weights that a config gives, else the task itself."""
    weights_C = class_weights(given, data)
    return task if weights_C is None else WeightedTask(task, torch.from_numpy(weights_C).to(device))
