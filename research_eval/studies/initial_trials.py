"""What a study contains before its workers start: the points of a grid, and past runs that teach the sampler.

Both functions may be called again when a study continues: they add only what the study does not have yet.
"""

from __future__ import annotations

import itertools
import json
import logging
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from research_eval.config.check import config_from_dict, stored_config
from research_eval.errors import ConfigError
from research_eval.seeding import derive_seed
from research_eval.store.records import RunFilter
from research_eval.store.store import Store
from research_eval.store.values import canonical_json
from research_eval.studies.adapter import given_values
from research_eval.studies.distributions import known_values
from research_eval.studies.options import StudyOptions
from research_eval.studies.original_trials import config_of
from research_eval.studies.proposals import over_budget
from research_eval.studies.queue import TrialQueue
from research_eval.studies.study_data import present_sha256

log = logging.getLogger(__name__)

MAX_POINTS = 200_000  # of a grid; the points are listed in memory
# Two runs that differ only in these keys of the config are equally good examples for a sampler.
NOT_COMPARED = ("seed", "experiment_name", "training_params")


def add_trials(queue: TrialQueue) -> None:
    """Add `more_trials` waiting trials, whose values a sampler will draw; the budget becomes the number of all trials.

    They are in the queue before the lock is released, so that two commands that add trials do not count them twice.
    """
    options = queue.options
    with queue.lock():
        for _ in range(options.budget.more_trials or 0):
            queue.study.enqueue_trial({})
        queue.options = options.with_budget(n_trials=len(queue.own_trials()))


def enqueue_grid(queue: TrialQueue) -> None:
    """Fill the queue up to its budget with points of the grid.

    A grid that is larger than the budget is sampled at random, always with the same points for the same seed. For a
    grid that is smaller, the budget becomes the number of its points.
    """
    options = queue.options
    with queue.lock():
        trials = queue.own_trials()
        if options.budget.more_trials is not None:
            queue.options = options = options.with_budget(n_trials=len(trials) + options.budget.more_trials)
        missing = options.budget.n_trials - len(trials)
        known = {_point(given_values(trial)) for trial in trials}
        points = list(itertools.islice(options.space.grid(), MAX_POINTS))
        is_sampled = len(points) > options.budget.n_trials
        order = np.random.default_rng(derive_seed(options.seed, "grid")).permutation(len(points)).tolist()
        num_entered = 0
        for index in order if is_sampled else range(len(points)):
            if num_entered >= missing:
                break
            if _point(points[index]) not in known and _may_be_trained(points[index], options):
                queue.study.enqueue_trial(points[index])
                num_entered += 1
    if num_entered < missing:
        total = len(trials) + num_entered
        log.info("the grid has %d points, and %d trials were asked for", total, options.budget.n_trials)
        queue.options = options.with_budget(n_trials=total)
    elif is_sampled:
        log.info("the grid has %s points, of which %d are drawn", f"{len(points):,}", options.budget.n_trials)


def _point(params: dict[str, Any]) -> str:
    """Equal texts for equal points."""
    return json.dumps(params, sort_keys=True)


def _may_be_trained(point: dict[str, Any], options: StudyOptions) -> bool:
    """Whether the point makes a config that is valid and within the budgets."""
    try:
        config = config_from_dict(options.space.sample(known_values(point)), source="grid")
        return over_budget(config, options) is None
    except ConfigError:
        return False


def add_past_runs(queue: TrialQueue) -> None:
    """Teach the sampler the finished runs of the results store that a trial of this study could have been."""
    options, base = queue.options, queue.options.space.base
    with queue.lock():
        known = {trial.user_attrs.get("warm_start") for trial in queue.stored.trials()}
        known |= {run for trial in queue.own_trials() for run in trial.user_attrs.get("experiment_ids", [])}
        num_added = 0
        with Store(options.db) as store:
            rows = store.find_runs(RunFilter(base["dataset_name"], status="finished"), with_json=True)
            rows = [row for row in rows if row["experiment_id"] not in known]
            metrics = store.metrics_of([row["experiment_id"] for row in rows], options.objectives)
        present: dict[str, str | None] = {}
        num_left_out = 0
        for row in rows:
            config = _relocated(row, base)
            past = _as_trial(config, metrics[row["experiment_id"]], options)
            if past is not None and _has_other_data(row, config, present):
                num_left_out += 1
            elif past is not None:
                past.set_user_attr("warm_start", row["experiment_id"])
                queue.study.add_trial(past)
                num_added += 1
    if num_left_out:
        log.warning("%d past runs are left out: the content of their data is not the present one", num_left_out)
    log.info("%d past runs fit the search space and teach the sampler", num_added)


def _relocated(row: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The config of a run, with the data where the study has them if the hash of their content is known."""
    config = config_of(row)
    params, place = config.get("dataset_params"), base.get("dataset_params", {}).get("data_dir")
    if row["data_sha256"] is not None and place is not None and isinstance(params, dict) and params.get("data_dir"):
        return {**config, "dataset_params": {**params, "data_dir": place}}
    return config


def _has_other_data(row: dict[str, Any], stored: dict[str, Any], present: dict[str, str | None]) -> bool:
    """Whether the data of a run are known not to be the present ones; `present` remembers their hashes."""
    config = stored_config(stored, source=f"run {row['experiment_id']}")
    params = canonical_json(config.dataset_params)
    if params not in present:
        try:
            present[params] = present_sha256(config)
        except ConfigError:  # a trial with these parameters will say so
            present[params] = None
    return None not in (row["data_sha256"], present[params]) and row["data_sha256"] != present[params]


def _as_trial(config: dict[str, Any], metrics: dict[str, Any], options: StudyOptions) -> FrozenTrial | None:
    """A past run as a finished trial; None if no trial of this study could have had its config."""
    values = [value for name in options.objectives if isinstance(value := metrics.get(name), float)]
    if len(values) < len(options.objectives) or not np.isfinite(values).all():
        return None
    try:
        located = options.space.locate(config)
        if located is None:
            return None
        params, distributions = located
        wanted = config_from_dict(options.space.sample(known_values(params)), source="trial").to_dict()
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError):  # another program stored this config
        return None
    # The space has compared the searched values; the fixed ones, such as the number of epochs, have to agree too.
    ignored = dict.fromkeys(NOT_COMPARED)
    if {**wanted, **ignored} != {**config, **ignored}:
        return None
    return optuna.trial.create_trial(params=params, distributions=distributions, values=values)
