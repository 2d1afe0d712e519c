"""Distributes a run's reports and its end to the store, the CSV file, the screen and an observer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from research_eval.config.sections import ExperimentConfig
from research_eval.errors import signal_of
from research_eval.models.base_model import EvaluableModel
from research_eval.store.data_facts import Baselines, baselines_of
from research_eval.store.metrics import FLOPS_VERSION
from research_eval.store.pending import RunWriter, Write
from research_eval.store.records import HistoryRow
from research_eval.store.store import Store
from research_eval.store.values import NormalMetrics
from research_eval.system.best_effort import attempted
from research_eval.system.progress import Display
from research_eval.tasks.base import Evaluation
from research_eval.training.checkpointer import drop_previous
from research_eval.training.state import Diverged, Interrupted, Pruned, TrainingState

log = logging.getLogger(__name__)

Watch = Callable[[int, dict[str, float]], None]  # (epoch, scores); may raise Pruned
Look = Callable[[int, EvaluableModel], None]  # (step, model after the evaluation)


@dataclass(frozen=True)
class Result:
    """The end of a run. `metrics` and `baselines`, the scores of simple models, are empty unless it is "finished".

    `exit_code` is the exit status of the program: 0 for success, 128 plus the signal's number after a signal, otherwise
    1.
    """

    experiment_id: str
    status: str
    metrics: dict[str, Any]
    folder: Path
    error: str | None = None
    exit_code: int = 0
    baselines: Baselines = field(default_factory=dict)

    @classmethod
    def finished(cls, experiment_id: str, metrics: dict[str, Any], folder: Path, facts: Mapping[str, Any]) -> Result:
        """The result of a finished run; `facts` is the fingerprint of its data."""
        return cls(experiment_id, "finished", metrics, folder, baselines=baselines_of(facts))


def start_row(
    store: Store,
    experiment_id: str,
    config: ExperimentConfig,
    environment: dict[str, Any],
    run_type: str = "json",
    parent_id: str | None = None,
) -> None:
    """Store a new run with the status "running"."""
    store.start_experiment(
        experiment_id=experiment_id,
        run_type=run_type,
        experiment_name=config.experiment_name,
        model_type=config.model_type,
        dataset_name=config.dataset_name,
        dataset_type=config.dataset_type,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        config=config.to_dict(),
        environment=environment,
        parent_id=parent_id,
    )


def csv_row(config: ExperimentConfig, result: Result) -> dict[str, Any]:
    """The row of a run in `json_experiment_results.csv`: the config's main fields and all scalar metrics.

    The time is that of the run's end, in UTC.
    """
    row = {
        "experiment_id": result.experiment_id,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "experiment_name": config.experiment_name,
        "model_type": config.model_type,
        "dataset_type": config.dataset_type,
        "dataset_name": config.dataset_name,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "status": result.status,
    }
    # Lists stay out of the table: they are in the store only.
    numbers = {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}
    # Lines of earlier versions of the program lack this number: their FLOPs were counted by other rules.
    counted = {"flops_version": FLOPS_VERSION} if "train_flops" in numbers else {}
    return row | numbers | counted


def ending_of(problem: BaseException, experiment_id: str, folder: Path) -> Result | None:
    """The result of a run that ended early in one of the known ways; None for any other exception."""
    if isinstance(problem, Diverged):
        return Result(experiment_id, "diverged", {}, folder, str(problem), 1)
    if isinstance(problem, Pruned):
        return Result(experiment_id, "pruned", {}, folder, str(problem))
    if isinstance(problem, Interrupted):
        return Result(experiment_id, "interrupted", {}, folder, str(problem), 128 + problem.signal)
    if isinstance(problem, KeyboardInterrupt):
        number = signal_of(problem)
        return Result(
            experiment_id, "interrupted", {}, folder, f"signal {number}" if problem.args else "keyboard", 128 + number
        )
    return None


class Journal:
    """Writes the reports of a training to the store, and forwards them to the screen and to the observer.

    It implements `Observer` of the training loop.
    """

    def __init__(
        self,
        store: Store,
        experiment_id: str,
        progress: Display,
        watch: Watch | None = None,
        to_csv: bool = True,
        look: Look = lambda *_: None,
        attempt: int | None = None,
    ) -> None:
        self.watch, self._look = watch, look
        self._to_csv = to_csv
        self._experiment_id = experiment_id
        self._writer = RunWriter(store, experiment_id, attempt)
        self._progress = progress
        self._period = 1  # until `start` reports the real number

    def start(self, state: TrainingState, steps_per_evaluation: int, total_steps: int) -> None:
        """Delete stored rows after the checkpoint, because the resumed training writes them again."""
        self._period = steps_per_evaluation
        self._writer.write(("truncate", state.step))
        self._progress.start(state.step, total_steps, math.ceil(total_steps / steps_per_evaluation))

    def train_values(self, step: int, values: dict[str, float]) -> None:
        """Store and show the means since the last report."""
        self._write(step, values)
        self._progress.step(step, values)

    def epoch_end(
        self, step: int, evaluation: Evaluation, model_metrics: dict[str, Any], scored: EvaluableModel
    ) -> None:
        """Store and show an evaluation and its alarms, then call the observer, which may raise Pruned."""
        values = {"val_loss": evaluation.loss, **{f"val_{name}": score for name, score in evaluation.scores.items()}}
        scalars = {name: float(value) for name, value in model_metrics.items() if isinstance(value, int | float)}
        self._write(step, {**scalars, **values})
        number = math.ceil(step / self._period)  # the last period may be shorter
        self._progress.epoch(number, values)
        for alarm in model_metrics.get("alarms", ()):
            self._progress.warn(str(alarm))
        self._look(step, scored)
        if self.watch is not None:
            self.watch(number, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        """Add values of one step to the history. Their epoch is a fraction within an epoch."""
        epoch = step / self._period
        rows = [HistoryRow(step, epoch, name, value) for name, value in values.items()]
        self._writer.write(("history", rows))

    def fail(self, config: ExperimentConfig, problem: BaseException, folder: Path) -> None:
        """Store the run as failed; the caller raises the exception again.

        A second problem during this write is only logged, because the first one is the cause. Raises Superseded if the
        run belongs to another process by now.
        """
        error = f"{type(problem).__name__}: {problem}"
        try:
            self.end(config, Result(self._experiment_id, "failed", {}, folder, error, 1))
        except OSError as another:  # the first problem is the cause
            log.warning("run %s: its failure could not be stored: %s", self._experiment_id, another)

    def end(self, config: ExperimentConfig, result: Result, stored: NormalMetrics | None = None) -> None:
        """Write the run's end to the store. With `to_csv` the CSV file gets a row, unless the run may continue.

        `stored` holds the normalised metrics of a finished run. Without it, only the status is stored.
        """
        writes: list[Write] = [("status", [result.status, result.error]) if stored is None else ("metrics", stored)]
        if self._to_csv and self.watch is None and result.status != "interrupted":
            writes.append(("csv", csv_row(config, result)))
        self._writer.end(*writes)
        if result.status == "finished":
            with attempted(log, f"run {self._experiment_id}: the checkpoint before the last one stays"):
                drop_previous(result.folder)
