"""The interface of a task kind: the head's size, the loss, the scores, and which score selects the best weights.

B batch  O outputs per sample  N samples of a split
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from research_eval.datasets.token_data import DataSplits
from research_eval.registry import TASKS
from research_eval.store.metrics import gain_sign


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: the mean loss, the task's scores by name, and values per sample.

    `rows_N` is each sample's place in the split, in the order of evaluation. The model's records have the same order.
    A task may leave out the arrays: `evaluate` fills them in, except `correct_N`.
    """

    loss: float
    scores: Mapping[str, float] = field(default_factory=dict)  # "acc" -> 0.9; stored as val_acc, test_acc, ...
    details: Mapping[str, list[Any]] = field(default_factory=dict)  # lists, for example one number per class
    rows_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    losses_N: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    correct_N: NDArray[np.bool_] | None = None  # True at right answers; None if answers are not right or wrong
    targets_N: NDArray[Any] | None = None  # labels, or numbers to be predicted
    answers_N: NDArray[Any] | None = None  # what `Task.answers` keeps of the outputs: for classification, the classes

    @property
    def accuracy(self) -> float:
        """Share of right answers; NaN for a task whose answers are not right or wrong."""
        return float("nan") if self.correct_N is None else float(self.correct_N.mean()) if len(self.correct_N) else 0.0

    def metric(self, name: str) -> float:
        """The loss or a score, by its name without `val_`."""
        return self.loss if name == "loss" else self.scores[name]


class Task(ABC):
    """A task kind. The methods of an object are functions of their arguments and of the data that `of` received."""

    name: ClassVar[str]
    selected_by: ClassVar[str]  # name of the score (without `val_`) that selects the best weights

    @classmethod
    def of(cls, data: DataSplits) -> Task:
        """The task for these data. A task that needs facts about them, such as the bytes of a token, overrides this."""
        return cls()

    @abstractmethod
    def num_outputs(self, data: DataSplits) -> int:
        """Outputs of the model's head per sample. The model's constructor receives it as `num_classes`."""

    @abstractmethod
    def loss_per_sample(self, outputs_BO: Tensor, targets_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The loss of each sample, [B]."""

    def loss(self, outputs_BO: Tensor, targets_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The mean loss of a batch, a scalar."""
        return self.loss_per_sample(outputs_BO, targets_B, label_smoothing).mean()

    def answers(self, outputs_BO: Tensor) -> Tensor:
        """The part of the outputs that `evaluation` needs; its first dimension is B.

        It is stored for every sample of a split, so it should be small.
        """
        return outputs_BO

    def train_scores(self, outputs_BO: Tensor, targets_B: Tensor) -> dict[str, Tensor]:
        """Mean scores of a training batch by name, for example "train_acc", as scalars on the device."""
        return {}

    @abstractmethod
    def evaluation(
        self,
        answers_N: Tensor,
        targets_N: Tensor,
        losses_N: Tensor,
        rows_N: NDArray[np.int64],
        num_outputs: int,
    ) -> Evaluation:
        """Score one split. All tensors are in the memory of the host."""

    def costs(self, costs: Mapping[str, Any], data: DataSplits, tokens_per_second: float) -> dict[str, float]:
        """Costs in the unit of the task, from those per sample and from the speed of the training steps."""
        return {}

    def probabilities(self, outputs_BO: Tensor) -> Tensor | None:
        """Class probabilities [B, O]; None for a task whose outputs are numbers."""
        return None

    def targets_for_report(self, targets_N: NDArray[Any]) -> NDArray[np.int64] | None:
        """Class numbers for the comparison with paths; None for a task without classes."""
        return None


def task_of(name: str | None, data: DataSplits) -> Task:
    """The task of this name; without a name, the task of the data. Raises ConfigError for an unknown name."""
    task: Task = TASKS.get_or_explain(name or data.task).of(data)
    return task


def is_better(name: str, value: float, best: float | None) -> bool:
    """Whether a metric is better than the best so far; None means that there is none yet.

    `name` is that of a score or "loss"; the direction follows from it (store/metrics.py).
    """
    return best is None or gain_sign(f"val_{name}") * (value - best) > 0


def mean_loss(losses_N: Tensor) -> float:
    """The mean in double precision, so that it does not depend on the batch size."""
    return float(losses_N.to(torch.float64).mean())
