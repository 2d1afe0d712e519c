"""The loss of a batch as a function of model and batch, and one optimiser step on this loss."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from research_eval.datasets.token_data import IGNORED, Batch
from research_eval.models.base_model import EvaluableModel
from research_eval.tasks.base import Task
from research_eval.training.runtime import Runtime

Values = dict[str, Tensor]  # the report of a step, as scalars on the device


class Meter:
    """Collects the reports of steps on the device. The host reads nothing before `read`, so no step waits."""

    def __init__(self, seconds: float = 0.0, tokens: int = 0) -> None:
        self.seconds, self.tokens = seconds, tokens  # of all steps that were read, those of earlier sessions included
        self.reset()

    def reset(self) -> None:
        """Discard the collected values and restart the clock."""
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._samples: dict[str, list[int]] = defaultdict(list)
        self._total = self._tokens = 0
        self._is_text = False
        self._started = time.perf_counter()

    def add(self, values: Values, batch: Batch) -> None:
        """Add means over the samples of a batch."""
        samples = len(batch.labels)
        self._total += samples
        self._tokens += batch.num_tokens or 0
        self._is_text = batch.labels.ndim > 1
        for name, value in values.items():
            self._values[name].append(value.detach())
            self._samples[name].append(samples)

    def read(self) -> dict[str, float]:
        """Means since the last read, weighted by samples, and samples per second. Resets the meter.

        For running text also tokens per second.
        """
        values = {}
        for name, means in self._values.items():
            known = torch.stack(means).cpu().double()
            values[name] = float(known @ torch.tensor(self._samples[name], dtype=torch.float64)) / self._total
        if self._total:
            seconds = time.perf_counter() - self._started
            values["samples_per_second"] = self._total / seconds
            if self._is_text:
                values["tokens_per_second"] = self._tokens / seconds
            self.seconds, self.tokens = self.seconds + seconds, self.tokens + self._tokens
        self.reset()
        return values


class TrainingLoss(nn.Module):
    """The loss of one batch, and the values for the log.

    It depends only on the model and the batch. It is a module, so that a wrapper can synchronise gradients.
    """

    def __init__(self, model: EvaluableModel, task: Task, aux_loss_coeff: float, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.aux_loss_coeff = aux_loss_coeff
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> tuple[Tensor, Values]:
        """The loss, a scalar: the task loss plus `aux_loss_coeff` times the weighted auxiliary terms.

        The values for the log have every auxiliary term twice: raw, and with its weight in the loss.
        """
        outcome = self.model.run(batch)
        task, terms = self.model.losses(outcome, batch.labels, self.task, self.label_smoothing)
        loss = task
        if terms:  # without any, the loss stays the same tensor
            loss = task + self.aux_loss_coeff * sum(term.weight * term.raw for term in terms.values())
        values = {"train_loss": loss, "train_task_loss": task}
        values |= self.task.train_scores(outcome.outputs.detach(), batch.labels)
        for name, term in terms.items():
            values |= {f"{name}_raw": term.raw, f"{name}_weighted": self.aux_loss_coeff * term.weight * term.raw}
        return loss, values


def take_step(
    loss_of: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    grad_clip_norm: float | None,
    runtime: Runtime,
    meter: Meter,
) -> None:
    """Forward, backward and update, on the mean loss over all samples of the micro-batches, or over all their tokens.

    `grad_clip_norm` limits the norm of all gradients together; None leaves them. The gradients of the micro-batches add
    up, so the update is that of one large batch.
    """
    sizes = [_num_targets(batch) for batch in batches] if len(batches) > 1 else [1]
    for batch, size in zip(batches, sizes, strict=True):
        with runtime.autocast():
            loss, values = loss_of(batch)
            meter.add(values, batch)
            if len(batches) > 1:  # weight by size: the last micro-batch may be smaller
                loss = loss * (size / max(sum(sizes), 1))
        loss.backward()
    if grad_clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(loss_of.parameters(), grad_clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _num_targets(batch: Batch) -> int:
    """How many targets the mean loss of a batch is taken over."""
    return len(batch.labels) if batch.labels.ndim == 1 else int((batch.labels != IGNORED).sum())
