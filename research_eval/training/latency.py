"""How long a model takes for a batch: repeated passes over the same batches, and how far to trust the result.

R repetitions  K batches of a repetition
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from research_eval.datasets.token_data import Batch, Batches
from research_eval.models.base_model import EvaluableModel
from research_eval.system.load import LoadMeter
from research_eval.training.runtime import Runtime

BATCHES = 5
FEWEST, MOST = 5, 30  # repetitions after a run
SECONDS = 0.2  # after a run, no repetition beyond the fewest begins later


@dataclass(frozen=True)
class Timed:
    """A model, the batches that it is timed on, and the clock, in seconds; the wall clock by default."""

    model: EvaluableModel
    batches: list[Batch]
    runtime: Runtime
    clock: Callable[[], float] | None = None

    @torch.no_grad()
    def repetition(self) -> list[float]:
        """The seconds of one forward pass over each batch, in evaluation mode."""
        self.model.eval().stop_recording()
        seconds, clock = [], self.clock or time.perf_counter
        for batch in self.batches:
            self.runtime.synchronize()  # the clock must not count work of the batch before
            start = clock()
            with self.runtime.autocast():
                self.model.run(batch)
            self.runtime.synchronize()
            seconds.append(clock() - start)
        self.model.start_recording()
        return seconds

    @property
    def num_samples(self) -> int:
        """The samples of a repetition."""
        return sum(len(batch.labels) for batch in self.batches)


def timed_batches(batches: Batches, count: int = BATCHES) -> list[Batch]:
    """Up to `count` whole batches, spread evenly from the shortest to the longest samples; each once."""
    order = [rows for rows in batches.order(0) if len(rows) == batches.batch_size] or batches.order(0)
    places = np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)
    return [batches.take(order[place]) for place in places]


def measure_latency(
    model: EvaluableModel,
    batches: Batches,
    runtime: Runtime,
    repeats: int = MOST,
    meter: LoadMeter | None = None,
) -> dict[str, float]:
    """The metrics of the latency, by their names in the store.

    All repetitions pass over the same batches, which cover all lengths; one more before them is a warm-up. A slow model
    has fewer than `repeats` repetitions. A `meter` that started earlier sees more of the load of the machine.
    """
    meter = meter or LoadMeter()
    timed = Timed(model, timed_batches(batches), runtime)
    timed.repetition()
    start = time.perf_counter()
    seconds: list[list[float]] = []
    while len(seconds) < repeats and (len(seconds) < FEWEST or time.perf_counter() - start < SECONDS):
        seconds.append(timed.repetition())
    seconds_RK = np.array(seconds)
    return {
        **latency_metrics("inference_latency", seconds_RK),
        "inference_latency_ms_batch_p95": 1000 * float(np.percentile(seconds_RK, 95)),
        "inference_latency_load": meter.share(computes=runtime.device.type == "cpu"),
        "inference_samples_per_second": timed.num_samples / float(np.median(seconds_RK.sum(1))),
    }


def latency_metrics(prefix: str, seconds_RK: NDArray[np.float64]) -> dict[str, float]:
    """The median over the repetitions of the mean milliseconds per batch, its spread, and the number of repetitions.

    The spread is the distance of the quartiles of the repetitions, relative to their median.
    """
    low, median, high = np.percentile(1000 * seconds_RK.mean(1), [25, 50, 75])
    return {
        f"{prefix}_ms_batch": float(median),
        f"{prefix}_spread": float((high - low) / median),
        f"{prefix}_repetitions": float(len(seconds_RK)),
    }
