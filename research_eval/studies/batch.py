"""Given runs, such as all seeds of a config, on other machines: a study that draws nothing.

The configs lie in the study, and each of its trials has the number of one. So runs have the queue, the claims and the
heartbeats of a study, and `goe worker` trains them. The name of a batch follows from its configs: the same command
continues it, from any machine, and does nothing if all runs are done.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from research_eval.config.sections import ExperimentConfig
from research_eval.errors import ConfigError
from research_eval.files import run_folder
from research_eval.registry import TASKS
from research_eval.runs.entry import RunEntry
from research_eval.runs.journal import Result, csv_row
from research_eval.store.csv_file import append_if_possible
from research_eval.store.data_facts import facts_of
from research_eval.store.store import Store
from research_eval.studies.adapter import given_values, trial_records
from research_eval.studies.launchers import Elsewhere
from research_eval.studies.options import BatchOptions, Budget, Method, configs_sha256
from research_eval.studies.queue import TrialQueue
from research_eval.studies.space import SearchSpace
from research_eval.studies.trials import CONFIG
from research_eval.studies.tune import Stopped, signals_raise, study_progress, supervise_elsewhere
from research_eval.studies.workers import quiet_runs

log = logging.getLogger(__name__)

CONFIGS = "configs"  # in the flags of a study: those of a batch
DIGITS = 12  # of the hash that is its name


def batch_options(configs: Sequence[dict[str, Any]], n_trials: int, db: str | None, place: Elsewhere) -> BatchOptions:
    """The batch of these complete configs, which have one task."""
    given = tuple(configs)
    name = f"batch:{configs_sha256(given)[:DIGITS]}"
    first = ExperimentConfig.model_validate(given[0])
    score = first.training_params.select_by or TASKS[first.task_name].selected_by
    return BatchOptions(
        study_name=name,
        storage=place.storage,
        space=SearchSpace(given[0], {}, {}),
        budget=Budget(n_trials),
        method=Method("random", "none"),
        objectives=(f"final_val_{score.removeprefix('val_')}",),
        db=db,
        launch=place.launch,
        flags={CONFIGS: list(given)},
        configs=given,
    )


def endings_elsewhere(
    configs: Sequence[ExperimentConfig], *, db: str | None, resume: bool, quiet: bool, place: Elsewhere
) -> Iterator[tuple[ExperimentConfig, Result | Exception]]:
    """Train all configs by workers of a launcher. Yields each with how it ended, in their order, when all have ended.

    With `resume`, a config with a finished run in the store is not trained. Raises KeyboardInterrupt, with the
    signal's number, after a signal: the workers then write checkpoints.
    """
    known = _finished(configs, db) if resume else {}
    queue = TrialQueue(batch_options([config.to_dict() for config in configs], 0, db, place))
    try:
        _enqueue(queue, [number for number in range(len(configs)) if number not in known], db)
        queue.open_to_workers()
        log.info("%s: %d of %d runs are left", queue.options.study_name, queue.num_left(), len(configs))
        with quiet_runs(), signals_raise(), study_progress(queue.options, quiet) as progress:
            progress.update(trial_records(queue.study))
            if queue.num_left():
                supervise_elsewhere(queue, progress)
        ended = {given_values(trial)[CONFIG]: trial for trial in queue.own_trials()}
    except Stopped as stopped:
        raise KeyboardInterrupt(stopped.number) from None
    finally:
        queue.close()
    for number, config in enumerate(configs):
        ending = known.get(number) or _ending(ended[number], db)
        if isinstance(ending, Result) and ending.status == "finished":
            append_if_possible(csv_row(config, ending), unless_known=("experiment_id", "status"))
        yield config, ending


def _finished(configs: Sequence[ExperimentConfig], db: str | None) -> dict[int, Result]:
    """The results that the store has already, by the number of the config."""
    with Store(db) as store:
        found = {
            number: RunEntry(store, config, resume=True).result_if_finished(to_csv=False)
            for number, config in enumerate(configs)
        }
    return {number: result for number, result in found.items() if result is not None}


def _enqueue(queue: TrialQueue, wanted: Collection[int], db: str | None) -> None:
    """Add a trial for each wanted config that has none, or whose trials have all failed or lost their results."""
    with queue.lock(), Store(db) as store:
        trials = queue.own_trials()
        has_one = {given_values(trial)[CONFIG] for trial in trials if not _is_lost(trial, store)}
        missing = [number for number in wanted if number not in has_one]
        for number in missing:
            queue.study.enqueue_trial({CONFIG: number})
    queue.options = queue.options.with_budget(n_trials=len(trials) + len(missing))


def _is_lost(trial: FrozenTrial, store: Store) -> bool:
    """Whether a trial has failed, or has ended and its run is not in the database any more."""
    if trial.state == TrialState.COMPLETE:
        ids = trial.user_attrs.get("experiment_ids", [])
        return not ids or store.find_id(ids[-1]) is None
    return trial.state == TrialState.FAIL


def _ending(trial: FrozenTrial, db: str | None) -> Result | Exception:
    """How the run of a trial ended, by what the store says of it."""
    ids, reason = trial.user_attrs.get("experiment_ids", []), trial.user_attrs.get("reason")
    with Store(db) as store:
        row = store.find_id(ids[-1]) if ids else None
        if row is None:
            return ConfigError(f"trial {trial.number}: {reason}")
        name, status = row["experiment_id"], row["status"]
        folder = run_folder(name) or Path()
        if status == "finished":
            return Result.finished(name, store.metrics(name), folder, facts_of(row["env_details_json"]))
        if status == "diverged":
            return Result(name, status, {}, folder, error=reason, exit_code=1)
    return RuntimeError(f"run {name}: {reason}")
