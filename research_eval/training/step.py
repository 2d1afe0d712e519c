"""The loss of a batch as a function of model and batch, and one optimiser step on this loss."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from research_eval.datasets.token_data import IGNORED, Batch
from research_eval.layers.collective import part_of_mean
from research_eval.models.base_model import EvaluableModel
from research_eval.tasks.base import Task
from research_eval.training.parallel import OneProcess, Parallel
from research_eval.training.runtime import Runtime

Values = dict[str, Tensor]  # the report of a step, as scalars on the device


class Meter:
    """Collects the reports of steps on the device. The host reads nothing before `read`, so no step waits.

    With several processes, what is read is that of all their rows.
    """

    def __init__(self, seconds: float = 0.0, tokens: int = 0, parallel: Parallel | None = None) -> None:
        self.seconds, self.tokens = seconds, tokens  # of all steps that were read, those of earlier sessions included
        self._parallel = parallel or OneProcess()
        self.reset()

    def reset(self) -> None:
        """Discard the collected values and restart the clock."""
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._weights: dict[str, list[Tensor | float]] = defaultdict(list)
        self._targets: list[Tensor | float] = []
        self._samples = self._tokens = 0.0
        self._is_text = False
        self._started = time.perf_counter()

    def add(self, values: Values, batch: Batch, weight: float = 1.0) -> None:
        """Add means over the targets of a batch, whose rows count `weight` each."""
        self._samples += len(batch.labels) * weight
        self._tokens += (batch.num_tokens or 0) * weight
        targets = weight * (len(batch.labels) if batch.labels.ndim == 1 else (batch.labels != IGNORED).sum())
        self._targets.append(targets)
        self._is_text = batch.labels.ndim > 1
        for name, value in values.items():
            self._values[name].append(value.detach())
            self._weights[name].append(targets)

    def read(self) -> dict[str, float]:
        """Means since the last read, weighted by targets, and samples per second. Resets the meter.

        For running text also tokens per second.
        """
        sums = [self._samples, self._tokens, float(sum(self._targets))]
        for name, means in self._values.items():
            known = torch.stack(means).cpu().double()
            sums.append(float(known @ torch.tensor([float(one) for one in self._weights[name]], dtype=torch.float64)))
        samples, tokens, targets, *sums = self._parallel.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
        values = {name: value / targets for name, value in zip(self._values, sums, strict=True)}
        if samples:
            seconds = time.perf_counter() - self._started
            values["samples_per_second"] = samples / seconds
            if self._is_text:
                values["tokens_per_second"] = tokens / seconds
            self.seconds, self.tokens = self.seconds + seconds, self.tokens + round(tokens)
        self.reset()
        return values


class TrainingLoss(nn.Module):
    """The loss of one batch, and the values for the log.

    It depends only on the model and the batch.
    """

    def __init__(self, model: EvaluableModel, task: Task, aux_loss_coeff: float, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.aux_loss_coeff = aux_loss_coeff
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> tuple[Tensor, Values]:
        """The loss, a scalar: the task loss plus `aux_loss_coeff` times the weighted auxiliary terms.

        Of a batch that several processes hold, the loss has the own part of the task loss, so that the gradients add
        up. The values for the log have every auxiliary term twice: raw, and with its weight in the loss.
        """
        outcome = self.model.run(batch)
        task, terms = self.model.losses(outcome, batch.labels, self.task, self.label_smoothing)
        own = part_of_mean(task, lambda: num_targets(batch))
        loss, shown = own, task
        weighted = {name: self.aux_loss_coeff * term.weight * term.raw for name, term in terms.items()}
        if terms:  # without any, the loss stays the same tensor
            auxiliary = sum(weighted.values())
            loss = own + auxiliary
            shown = loss if own is task else task + auxiliary
        values = {"train_loss": shown, "train_task_loss": task}
        values |= self.task.train_scores(outcome.outputs.detach(), batch.labels)
        for name, term in terms.items():
            values |= {f"{name}_raw": term.raw, f"{name}_weighted": weighted[name]}
        return loss, values


def take_step(
    loss_of: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    grad_clip_norm: float | None,
    runtime: Runtime,
    meter: Meter,
    parallel: Parallel | None = None,
    sizes: Sequence[int] = (),
    step: int = 0,
) -> None:
    """Forward, backward and update, on the mean loss over all samples of the micro-batches, or over all their tokens.

    `grad_clip_norm` limits the norm of all gradients together; None leaves them. The gradients of the micro-batches add
    up, so the update is that of one large batch. `sizes` has the number of rows of each
    micro-batch in all processes together. `step` is the number of the step in the training.
    """
    parallel, sizes = parallel or OneProcess(), sizes or [len(batch.labels) for batch in batches]
    weights = [parallel.weight(size) for size in sizes]
    shares = [1.0]
    if len(batches) > 1:  # weighted by size: the last micro-batch may be smaller
        targets = [num_targets(batch) * weight for batch, weight in zip(batches, weights, strict=True)]
        whole = parallel.sum(torch.tensor(targets, dtype=torch.float64)).tolist()
        shares = [size / max(sum(whole), 1.0) for size in whole]
    for number, (batch, size, weight, share) in enumerate(zip(batches, sizes, weights, shares, strict=True)):
        with parallel.part(size, step, number), runtime.autocast():
            loss, values = loss_of(batch)
            meter.add(values, batch, weight)
            if len(batches) > 1:
                loss = loss * share
        parallel.backward(loss)
    parallel.sum_gradients(loss_of.parameters())
    if grad_clip_norm is not None:
        parallel.clip(loss_of.parameters(), grad_clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def num_targets(batch: Batch) -> int:
    """How many targets the mean loss of a batch is taken over."""
    return len(batch.labels) if batch.labels.ndim == 1 else int((batch.labels != IGNORED).sum())
