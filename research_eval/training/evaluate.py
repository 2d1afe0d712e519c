"""Scores and FLOPs of a model.

B batch  O outputs per sample  N samples of a split
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from research_eval.datasets.token_data import Batch, Batches
from research_eval.layers.dispatch import no_spare_rows
from research_eval.models.base_model import EvaluableModel
from research_eval.tasks.base import Evaluation as Evaluation
from research_eval.tasks.base import Task
from research_eval.tasks.classification import Classification
from research_eval.training.flops import FlopCounter
from research_eval.training.runtime import Runtime


@torch.no_grad()
def evaluate(
    model: EvaluableModel, batches: Iterable[Batch], num_outputs: int, runtime: Runtime, task: Task | None = None
) -> Evaluation:
    """Score every sample once, in evaluation mode. The model's records afterwards are those of this evaluation.

    Without a task it is a classification. The host reads the results from the device once, at the end, so the device
    never waits between batches.
    """
    task = task or Classification()
    model.eval()
    model.start_recording()
    rows, targets, answers, losses = [], [], [], []
    for batch in batches:
        with runtime.autocast():
            outputs_BO = model.run(batch).outputs.float()
        losses.append(task.loss_per_sample(outputs_BO, batch.labels))
        answers.append(task.answers(outputs_BO))
        targets.append(batch.labels)
        rows.append(np.arange(len(batch.labels)) if batch.rows is None else batch.rows)
    answers_N, targets_N, losses_N = (torch.cat(parts).cpu() for parts in (answers, targets, losses))
    rows_N = np.concatenate(rows)
    evaluation = task.evaluation(answers_N, targets_N, losses_N, rows_N, num_outputs)
    found: dict[str, Any] = {"rows_N": rows_N, "losses_N": losses_N.numpy(), "targets_N": targets_N.numpy()}
    found["answers_N"] = answers_N.numpy()
    known = {name: getattr(evaluation, name) for name in found}
    missing = {name: found[name] for name, value in known.items() if value is None or not len(value)}
    return replace(evaluation, **missing)


def measure_flops(
    model: EvaluableModel, batches: Batches, runtime: Runtime, repeats: int = 3, task: Task | None = None
) -> tuple[float, float]:
    """Executed FLOPs per sample: (forward in evaluation mode, forward and backward in training mode).

    They are counted on batches from the shortest to the longest and averaged over the samples. Rows that experts
    compute only because it is faster do not count. Parameters, buffers and generators are the same afterwards.
    """
    task = task or Classification()
    order = batches.order(0)
    chosen = [batches.take(order[index]) for index in np.linspace(0, len(order) - 1, repeats).astype(int)]
    samples = sum(len(batch.labels) for batch in chosen)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    totals = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), no_spare_rows(model, runtime.device):
        for training in (False, True):
            model.train(training)
            with FlopCounter() as counter, torch.set_grad_enabled(training):
                for batch in chosen:
                    with runtime.autocast():
                        task_loss, terms = model.losses(model.run(batch), batch.labels, task)
                        loss = sum((term.weight * term.raw for term in terms.values()), start=task_loss)
                    if training:
                        loss.backward()
            totals.append(counter.total / samples)
    model.zero_grad(set_to_none=True)
    # Undo the traces of training mode: running statistics, counts and records.
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.eval()
    model.start_recording()
    return totals[0], totals[1]
