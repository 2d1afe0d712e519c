"""Scores and FLOPs of a model.

B batch  O outputs per sample  N samples of a split
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from research_eval.datasets.token_data import Batch, Batches
from research_eval.layers.collective import Named, are_shared, in_shares
from research_eval.layers.dispatch import no_spare_rows
from research_eval.models.base_model import EvaluableModel
from research_eval.routing.record import EvaluationRecorder, RoutingRecord
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
    never waits between batches. If processes share the work, each of them has the whole result.
    """
    task = task or Classification()
    model.eval()
    model.start_recording()
    recorder = model.recorder() if are_shared() else None

    def scored(batch: Batch) -> Named:
        with runtime.autocast():
            outputs_BO = model.run(batch).outputs.float()
        rows_B = np.arange(len(batch.labels)) if batch.rows is None else batch.rows
        return {
            "losses": task.loss_per_sample(outputs_BO, batch.labels),
            "answers": task.answers(outputs_BO),
            "targets": batch.labels,
            "rows": torch.from_numpy(rows_B),
        }

    def scored_with_records(batch: Batch) -> Named:
        assert recorder is not None
        with recorder.postponed() as calls:
            return {**scored(batch), **_named(calls)}

    parts: list[Named] = []
    for part in in_shares(batches, scored if recorder is None else scored_with_records):
        if recorder is not None:
            _record(recorder, part)
        parts.append({name: part[name] for name in ("losses", "answers", "targets", "rows")})
    losses_N, answers_N, targets_N, found_N = (torch.cat([part[name] for part in parts]).cpu() for name in parts[0])
    rows_N = found_N.numpy()
    evaluation = task.evaluation(answers_N, targets_N, losses_N, rows_N, num_outputs)
    found: dict[str, Any] = {"rows_N": rows_N, "losses_N": losses_N.numpy(), "targets_N": targets_N.numpy()}
    found["answers_N"] = answers_N.numpy()
    known = {name: getattr(evaluation, name) for name in found}
    missing = {name: found[name] for name, value in known.items() if value is None or not len(value)}
    return replace(evaluation, **missing)


def _named(calls: list[int | RoutingRecord]) -> Named:
    """Postponed calls of a recorder as tensors with names: `3 experts_DK` is a field of call 3."""
    named: Named = {}
    for number, call in enumerate(calls):
        if isinstance(call, int):
            named[f"{number} begin"] = torch.tensor(call)
            continue
        for field in fields(RoutingRecord):
            value = getattr(call, field.name)
            # Of decisions about tokens, only sums are kept of what follows: sending it would be slow.
            if value is not None and not (call.token_D is not None and field.name in ("probabilities_DA", "values_DA")):
                named[f"{number} {field.name}"] = torch.as_tensor(value)
    return named


def _record(recorder: EvaluationRecorder, named: Named) -> None:
    """Do the postponed calls of a recorder, here or in another process."""
    calls: dict[int, dict[str, Any]] = {}
    for name, value in named.items():
        number, _, field = name.partition(" ")
        if field:
            calls.setdefault(int(number), {})[field] = value
    for _, call in sorted(calls.items()):
        if "begin" in call:
            recorder.begin_batch(int(call["begin"]))
        else:
            recorder.push(RoutingRecord(**call | {"step": int(call["step"])}))


def measure_flops(
    model: EvaluableModel, batches: Batches, runtime: Runtime, repeats: int = 3, task: Task | None = None
) -> tuple[float, float]:
    """Executed FLOPs per sample: (forward in evaluation mode, forward and backward in training mode).

    They are counted on batches from the shortest to the longest and averaged over the samples. In a split of fewer
    batches, one that stands for several is counted once. Rows that experts compute only because it is faster do not
    count. Parameters, buffers and generators are the same afterwards.
    """
    forward, training = _executed_flops(model, batches, runtime, repeats, task, (False, True))
    return forward, training


def measure_forward_flops(
    model: EvaluableModel, batches: Batches, runtime: Runtime, repeats: int = 3, task: Task | None = None
) -> float:
    """The first number of `measure_flops`, without the work for the second one."""
    (forward,) = _executed_flops(model, batches, runtime, repeats, task, (False,))
    return forward


def _executed_flops(
    model: EvaluableModel, batches: Batches, runtime: Runtime, repeats: int, task: Task | None, modes: tuple[bool, ...]
) -> list[float]:
    """The FLOPs per sample of each mode: False for evaluation, True for training."""
    task = task or Classification()
    order = batches.order(0)
    places, times = np.unique(np.linspace(0, len(order) - 1, repeats).astype(int), return_counts=True)
    chosen = [(batches.take(order[place]), int(count)) for place, count in zip(places, times, strict=True)]
    samples = sum(count * len(batch.labels) for batch, count in chosen)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), no_spare_rows(model, runtime.device):
        for training in modes:
            model.train(training)
            total = 0
            for batch, count in chosen:
                with FlopCounter() as counter, torch.set_grad_enabled(training):
                    with runtime.autocast():
                        task_loss, terms = model.losses(model.run(batch), batch.labels, task)
                        loss = sum((term.weight * term.raw for term in terms.values()), start=task_loss)
                    if training:
                        loss.backward()
                total += count * counter.total
            found.append(total / samples)
    model.zero_grad(set_to_none=True)
    # Undo the traces of training mode: running statistics, counts and records.
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.eval()
    model.start_recording()
    return found
