"""What watching the routing and tracing it cost, as interleaved ratios of whole trainings.

"bare" is the same training with nothing but the model's own metrics after each epoch; "watched" adds what every run
has (reports and alarms), "traced" adds `trace_routing`: specialisation, a pass in training mode and the files. The
share that reports take within one training is steadier than the ratio of two trainings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from research_eval.db_utils import Store
from research_eval.experiment import prepare
from research_eval.models.base_model import EvaluableModel
from research_eval.runs.journal import Journal, start_row
from research_eval.schema import ExperimentConfig, config_from_dict
from research_eval.system.progress import Progress
from research_eval.training.evaluate import Evaluation
from research_eval.training.fit import fit
from research_eval.training.routing_watch import RoutingWatch

WAYS = ("bare", "watched", "traced")


def shape(samples: int, traced: bool) -> ExperimentConfig:
    """The quickstart's task and model; a fifth of the samples are for validation."""
    return config_from_dict(
        {
            "model_type": "goe_original",
            "dataset_type": "synthetic",
            "dataset_name": "tables",
            "epochs": 2,
            "batch_size": 64,
            "dataset_params": {"num_samples": samples},
            "model_params": {"embed_dim": 32, "num_heads": 2, "max_path_len": 2},
            "training_params": {"num_threads": 1, "trace_routing": traced},
        }
    )


@contextmanager
def stopwatch(bare: bool) -> Iterator[list[float]]:
    """CPU seconds of each report at the end of an epoch; `bare` ones hold the model's own metrics alone."""
    seconds: list[float] = []
    original = RoutingWatch.epoch_end

    def report(
        watch: RoutingWatch, epoch: int, model: EvaluableModel, evaluation: Evaluation, reports: Any
    ) -> dict[str, Any]:
        start = time.process_time()
        metrics = model.get_model_specific_metrics() if bare else original(watch, epoch, model, evaluation, reports)
        seconds.append(time.process_time() - start)
        return metrics

    with mock.patch.object(RoutingWatch, "epoch_end", report):
        yield seconds


def training(way: str, samples: int, folder: Path) -> tuple[float, float]:
    """CPU seconds of the training loop, so that other programs on the machine do not count, and of its reports."""
    config = shape(samples, way == "traced")
    runtime, data, model = prepare(config)
    with Store(str(folder / "results.db")) as store, stopwatch(way == "bare") as reports:
        start_row(store, name := f"{way}-{time.time_ns()}", config, {})
        (folder / name).mkdir()
        start = time.process_time()
        fit(model, data, config, runtime, folder / name, Journal(store, name, Progress(config.epochs, quiet=True)))
        return time.process_time() - start, sum(reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=6000, help="of the task; an epoch trains on four fifths")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one that is not counted")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/trace_cost.json"))
    arguments = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.repeats + 1):  # who goes first rotates
            order = WAYS[number % 3 :] + WAYS[: number % 3]
            rounds.append({way: training(way, arguments.samples, Path(folder)) for way in order})
    del rounds[0]
    rows = []
    print(f"{'way':<10}{'CPU s':>8}{'ratio to bare (median)':>24}{'min':>8}{'max':>8}{'reports, share of the run':>27}")
    for way in WAYS:
        ratios = [each[way][0] / each["bare"][0] for each in rounds]
        seconds, ratio = statistics.median(each[way][0] for each in rounds), statistics.median(ratios)
        share = statistics.median(each[way][1] / each[way][0] for each in rounds)
        rows.append({"way": way, "cpu_seconds": seconds, "ratio": ratio, "ratios": ratios, "share_of_reports": share})
        print(f"{way:<10}{seconds:>8.2f}{ratio:>24.3f}{min(ratios):>8.3f}{max(ratios):>8.3f}{share:>27.4f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"samples": arguments.samples, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
