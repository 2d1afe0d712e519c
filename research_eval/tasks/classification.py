"""The task with one class per sample.

B batch  C classes  N samples
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from research_eval.datasets.token_data import DataSplits
from research_eval.layers.losses import cross_entropy
from research_eval.registry import TASKS
from research_eval.tasks.base import Evaluation, Task, mean_loss


@TASKS.register("classification")
class Classification(Task):
    """Cross-entropy, accuracy and macro-F1. The best macro-F1 on validation selects the weights.

    Class 0 is a class like all others.
    """

    name = "classification"
    selected_by = "f1"

    def num_outputs(self, data: DataSplits) -> int:
        return data.num_classes

    def loss_per_sample(self, outputs_BO: Tensor, targets_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(outputs_BO, targets_B, label_smoothing=label_smoothing, reduction="none")

    def loss(self, outputs_BO: Tensor, targets_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return cross_entropy(outputs_BO, targets_B, label_smoothing)

    def answers(self, outputs_BO: Tensor) -> Tensor:
        """The most probable class of each sample, [B]."""
        return outputs_BO.argmax(-1)

    def train_scores(self, outputs_BO: Tensor, targets_B: Tensor) -> dict[str, Tensor]:
        return {"train_acc": (outputs_BO.argmax(-1) == targets_B).float().mean()}

    def evaluation(
        self,
        answers_N: Tensor,
        targets_N: Tensor,
        losses_N: Tensor,
        rows_N: NDArray[np.int64],
        num_outputs: int,
    ) -> Evaluation:
        guess_N, truth_N = answers_N.numpy(), targets_N.numpy()
        correct_N = guess_N == truth_N
        rows = per_class(truth_N, guess_N, num_outputs)
        details = {name: [row[name] for row in rows] for name in ("precision", "recall", "f1", "support")}
        return Evaluation(
            mean_loss(losses_N),
            {"acc": float(correct_N.sum() / max(len(correct_N), 1)), "f1": macro_f1(rows)},
            {f"{name}_per_class": values for name, values in details.items()},
            rows_N,
            losses_N.numpy(),
            correct_N,
        )

    def probabilities(self, outputs_BO: Tensor) -> Tensor:
        return outputs_BO.softmax(-1)

    def targets_for_report(self, targets_N: NDArray[Any]) -> NDArray[np.int64]:
        return targets_N


def per_class(truth_N: NDArray[np.int64], guess_N: NDArray[np.int64], num_classes: int) -> list[dict[str, float]]:
    """Precision, recall, F1, support and number of predictions of every class; 0 if a denominator is 0.

    Memory and time grow with N + C, because there is no confusion matrix.
    """
    hits = np.bincount(truth_N[truth_N == guess_N], minlength=num_classes)
    truth, predicted = np.bincount(truth_N, minlength=num_classes), np.bincount(guess_N, minlength=num_classes)
    return [
        {
            "precision": float(hit / max(guess, 1)),
            "recall": float(hit / max(real, 1)),
            "f1": float(2 * hit / max(real + guess, 1)),
            "support": int(real),
            "predicted": int(guess),
        }
        for hit, real, guess in zip(hits, truth, predicted, strict=True)
    ]


def macro_f1(rows: list[dict[str, float]]) -> float:
    """Mean F1 over the classes that occur in the truth or in the predictions (scikit-learn's default labels)."""
    return float(np.mean([row["f1"] for row in rows if row["support"] + row["predicted"]] or [0.0]))
