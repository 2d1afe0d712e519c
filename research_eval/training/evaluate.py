"""Scores, latency and FLOPs of a model.

B batch  C classes  N samples
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from research_eval.datasets.token_data import Batch, Batches
from research_eval.models.base_model import EvaluableModel, logits_of
from research_eval.training.runtime import Runtime


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, accuracy and macro-F1 of one split, its confusion matrix (rows: truth) and each sample.

    `rows_N` are the samples' places in the split, in the order of evaluation; the model's records have the same order.
    """

    loss: float
    confusion_CC: NDArray[np.int64]
    rows_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    correct_N: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    losses_N: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion_CC) / max(self.confusion_CC.sum(), 1))

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur in the truth or in the predictions (scikit-learn's default labels)."""
        return float(np.mean([row["f1"] for row in self.per_class() if row["support"] + row["predicted"]] or [0.0]))

    def per_class(self) -> list[dict[str, float]]:
        """Precision, recall, F1, support and predictions of every class; 0 where a ratio has no denominator."""
        hits, truth, predicted = np.diag(self.confusion_CC), self.confusion_CC.sum(1), self.confusion_CC.sum(0)
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


class Scoring(NamedTuple):
    """A model that is to be scored, in evaluation mode."""

    model: EvaluableModel
    batches: Batches
    num_classes: int
    runtime: Runtime


@torch.no_grad()
def evaluate(model: EvaluableModel, batches: Iterable[Batch], num_classes: int, runtime: Runtime) -> Evaluation:
    """Every sample once, in evaluation mode; the model's records are those of this evaluation."""
    model.eval()
    model.start_recording()
    rows, labels, guesses, losses = [], [], [], []
    for batch in batches:
        with runtime.autocast():
            logits_BC = logits_of(model, batch).float()
        losses.append(F.cross_entropy(logits_BC, batch.labels, reduction="none"))
        guesses.append(logits_BC.argmax(-1))
        labels.append(batch.labels)
        rows.append(rows_of(batch))
    truth_N, guess_N, losses_N = (torch.cat(parts).cpu() for parts in (labels, guesses, losses))
    return evaluation_of(truth_N, guess_N, losses_N, np.concatenate(rows), num_classes)


def rows_of(batch: Batch) -> NDArray[np.int64]:
    """Where the samples stand in their split."""
    return np.arange(len(batch.labels)) if batch.rows is None else batch.rows


def evaluation_of(
    truth_N: torch.Tensor, guess_N: torch.Tensor, losses_N: torch.Tensor, rows_N: NDArray[np.int64], num_classes: int
) -> Evaluation:
    """Of the samples of one split."""
    confusion = (truth_N * num_classes + guess_N).bincount(minlength=num_classes**2).view(num_classes, num_classes)
    return Evaluation(
        float(losses_N.double().mean()), confusion.numpy(), rows_N, (guess_N == truth_N).numpy(), losses_N.numpy()
    )


@torch.no_grad()
def measure_latency(model: EvaluableModel, batches: Batches, runtime: Runtime, repeats: int = 30) -> dict[str, float]:
    """Milliseconds per batch (median, 95th percentile) after a warm-up over batches of all lengths, and throughput."""
    model.eval()
    order = [rows for rows in batches.order(0) if len(rows) == batches.batch_size] or batches.order(0)
    chosen = [batches.take(order[index % len(order)]) for index in np.linspace(0, len(order) - 1, repeats).astype(int)]
    seconds = []
    for number, batch in enumerate([*chosen[:3], *chosen]):
        runtime.synchronize()
        start = time.perf_counter()
        with runtime.autocast():
            logits_of(model, batch)
        runtime.synchronize()
        if number >= 3:
            seconds.append(time.perf_counter() - start)
    model.start_recording()
    samples = sum(len(batch.labels) for batch in chosen)
    return {
        "inference_latency_ms_batch": 1000 * float(np.median(seconds)),
        "inference_latency_ms_batch_p95": 1000 * float(np.percentile(seconds, 95)),
        "inference_samples_per_second": samples / sum(seconds),
    }


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def flop_counter() -> FlopCounterMode:
    """Torch's counter of executed FLOPs, with the formulas for CPU attention that torch 2.13 lacks."""
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def measure_flops(model: EvaluableModel, batches: Batches, runtime: Runtime, repeats: int = 3) -> tuple[float, float]:
    """Executed FLOPs per sample: (forward in evaluation mode, forward and backward in training mode).

    Counted on batches from the short to the long end and averaged over their samples. Parameters, buffers and
    generators are left as they were.
    """
    order = batches.order(0)
    chosen = [batches.take(order[index]) for index in np.linspace(0, len(order) - 1, repeats).astype(int)]
    if model.stackable and all(batch.num_tokens == batch.input_ids.numel() for batch in chosen):
        chosen = list({batch.input_ids.shape: batch for batch in chosen}.values())  # without routes they cost the same
    samples = sum(len(batch.labels) for batch in chosen)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    totals = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for training in (False, True):
            model.train(training)
            with flop_counter() as counter, torch.set_grad_enabled(training):
                for batch in chosen:
                    with runtime.autocast():
                        logits = logits_of(model, batch)
                        loss = model.task_loss(logits, batch.labels) + (model.get_auxiliary_loss() or 0.0)
                    if training:
                        loss.backward()
            totals.append(counter.get_total_flops() / samples)
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.eval()
    model.start_recording()
    return totals[0], totals[1]
