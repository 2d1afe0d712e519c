"""One trial of a study: choose its settings, train a run for each seed, and take the mean of their metrics.

A worker may die at any moment, and another one then continues the trial. Therefore each decision is stored before its
consequences begin: the settings before the first run, and the id of a run before the run starts. A run that exists
already continues from its checkpoint, and one that is finished only returns its metrics.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from research_eval.config.check import stored_config
from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.kinds import dataset_kind
from research_eval.errors import ConfigError, RunIsBusy, Superseded
from research_eval.experiment import TrialRun, run
from research_eval.runs.folder import new_id
from research_eval.store.store import Store
from research_eval.studies.adapter import StoredTrial, given_values
from research_eval.studies.options import BatchOptions, StudyOptions
from research_eval.studies.proposals import choose_config
from research_eval.studies.pruning import PruningCallback
from research_eval.studies.storage import while_away
from research_eval.studies.study_data import check_data
from research_eval.system.best_effort import attempted
from research_eval.system.untrusted import stored_object
from research_eval.training.checkpoint import delete_checkpoint
from research_eval.training.checkpointer import CHECKPOINT_FILE
from research_eval.training.state import Pruned

log = logging.getLogger(__name__)

CONFIG = "config"  # the value of a trial of a batch: the number of its config
LEFT = "left"  # a trial that this worker does not end, because another process is at it


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. A finished trial has `values`, one per objective; any other one has a reason."""

    status: str
    values: tuple[float, ...] | None = None
    reason: str | None = None
    exit_code: int = 0


def train_trial(trial: StoredTrial, options: StudyOptions) -> Outcome:
    """Choose the settings of a trial, or take the config that it was given, and train every seed.

    A trial that was interrupted keeps its settings and continues from its checkpoint.
    """
    try:
        if isinstance(options, BatchOptions):
            config = options.config(given_values(trial.frozen())[CONFIG])
        else:
            config = choose_config(trial, options)
    except ConfigError as problem:
        return Outcome("failed", reason=str(problem))
    except Pruned as problem:
        return Outcome("pruned", reason=str(problem))
    return train_config(trial, options, config)


def train_config(trial: StoredTrial, options: StudyOptions, config: ExperimentConfig) -> Outcome:
    """Train the config with every seed; the values are the means over the seeds.

    Any exception becomes the reason of a failed outcome, so that one bad trial does not end the study; but a trial that
    belongs to another worker meanwhile, or whose run is at work, is "left".
    """
    try:
        trial.set_attribute("model_type", config.model_type)
        results = []
        for index in range(options.budget.seeds_per_trial):
            # A run that cannot open the results store, because its server is away, begins again.
            outcome, metrics = while_away(functools.partial(_train_seed, trial, options, config, index))
            if outcome is not None:
                return outcome
            missing = [name for name in options.objectives if name not in metrics]
            if missing:
                return Outcome("failed", reason=f"the run has no metric {missing[0]!r}")
            results.append(metrics)
        values = tuple(statistics.fmean(metrics[name] for metrics in results) for name in options.objectives)
        if not all(map(math.isfinite, values)):
            return Outcome("failed", reason=f"{', '.join(options.objectives)} = {values}: not finite")
    except (Superseded, RunIsBusy) as problem:
        return Outcome(LEFT, reason=str(problem))
    except Exception as problem:
        log.debug("trial failed", exc_info=True)
        return Outcome("failed", reason=f"{type(problem).__name__}: {problem}")
    return Outcome("finished", values)


def _train_seed(
    trial: StoredTrial, options: StudyOptions, config: ExperimentConfig, index: int
) -> tuple[Outcome | None, dict[str, Any]]:
    """Train the run with the `index`-th seed. Returns its metrics, or an outcome if the run did not finish."""
    ids: list[str] = trial.attributes.get("experiment_ids", [])
    if len(ids) <= index:
        ids = [*ids, new_id()]
        trial.set_attribute("experiment_ids", ids)
    seeded = config.model_copy(update={"seed": config.seed + index})
    with Store(options.db) as store:
        known = store.find_id(ids[index])
    if known is not None:  # a run that was begun continues with its own settings of threads and device
        seeded = stored_config(stored_object(known["full_config_json"]), source=f"run {ids[index]}")
    callback = PruningCallback(trial, options, seeded, judges=index == 0)
    is_batch = isinstance(options, BatchOptions)
    trial_run = TrialRun(
        options.study_name,
        trial.number,
        ids[index],
        callback.epoch_end,
        run_type="json" if is_batch else "optuna_trial",
    )
    if not (is_batch and dataset_kind(seeded.dataset_type).generated):  # the seeds of a batch generate other data
        trial_run = replace(trial_run, check_data=functools.partial(check_data, trial.study, seeded))
    result = run(seeded, db=options.db, quiet=True, parent_id=ids[0] if index else None, trial=trial_run)
    if result.status != "interrupted" and not is_batch:
        with attempted(log, f"run {result.experiment_id}: its checkpoint stays"):
            # The checkpoints of hundreds of trials would fill the disk.
            delete_checkpoint(result.folder / CHECKPOINT_FILE)
    if result.status == "finished":
        return None, result.metrics
    return Outcome(result.status, reason=result.error, exit_code=result.exit_code), {}
