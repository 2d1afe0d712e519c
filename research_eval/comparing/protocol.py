"""The protocol of a comparison: match, tune equally, train fresh seeds, score the test split once.

Every training is a run of the results store. A comparison that was stopped continues with what is not there yet,
because a finished run of the same config is not repeated.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from research_eval.annotations import options_of
from research_eval.comparing.match import Match, match
from research_eval.comparing.tuning import RATE, Arm, Changes, Trial, changed, lengthened, tune
from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.kinds import dataset_kind
from research_eval.datasets.providers import load_splits
from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError
from research_eval.registry import models_for
from research_eval.routing.alarms import STILL_LEARNING
from research_eval.runs.journal import Result
from research_eval.store.data_facts import Baselines
from research_eval.store.metrics import gain_sign
from research_eval.studies.launchers import Elsewhere
from research_eval.studies.seeds import endings_of
from research_eval.system.phases import phase
from research_eval.tasks.base import task_of

log = logging.getLogger(__name__)

TAKEN = 0.2  # of the rows, for a test split and for validation where the data have none
FIRST_TUNING_SEED = 1000  # those of the reported runs begin at 0
MODEL = "model_params."
INSTANCE = "task_seed"  # of generated data that are one instance of many, such as random tables


@dataclass(frozen=True)
class Plan:
    """What a comparison does; the models are compared by the score that the task selects by."""

    models: Sequence[str]
    axis: str = "flops"
    tol: float = 0.02
    num_seeds: int = 5
    num_trials: int = 8
    tuning_seeds: int = 1
    max_lengthened: int = 1
    controls: bool = False
    num_confirmed: int = 2  # further runs of the best trial of each arm, after the rates and after the other settings

    def __post_init__(self) -> None:
        for flag, given, least in (
            ("--seeds", self.num_seeds, 1),
            ("--tuning", self.num_trials, 3),
            ("--tuning_seeds", self.tuning_seeds, 1),
            ("--confirm", self.num_confirmed, 0),
            ("--max_lengthened", self.max_lengthened, 0),
        ):
            if given < least:
                raise ConfigError(f"{flag}: expected at least {least}, got {given}")
        if self.num_seeds > FIRST_TUNING_SEED:
            raise ConfigError(f"--seeds: expected at most {FIRST_TUNING_SEED}, got {self.num_seeds}")
        if not 0 < self.tol < 1:
            raise ConfigError(f"--tol: expected a share between 0 and 1, got {self.tol:g}")
        if len(set(self.models)) < 2:
            raise ConfigError("--models: a comparison needs at least two models")


@dataclass
class Outcome:
    """What a comparison has found. `results` has the reported runs of each arm, one for each seed."""

    plan: Plan
    base: ExperimentConfig
    arms: list[Arm]
    matches: dict[str, Match]
    metric: str  # of tuning
    test_metric: str
    results: dict[str, list[Result]] = field(default_factory=dict)
    num_added: int = 0  # rates beyond the first grid
    num_lengthened: int = 0

    @property
    def sign(self) -> int:
        """1 if larger scores are better, else -1."""
        return gain_sign(self.test_metric)

    def scores(self, arm: Arm) -> list[float]:
        """The test score of each seed; NaN for a run that did not finish."""
        return [float(found.metrics.get(self.test_metric, math.nan)) for found in self.results[arm.name]]

    def noise(self, arm: Arm) -> float:
        """How much the score of one trial of the tuning varies by chance.

        It is the standard deviation of the validation score over the reported seeds, divided by the root of the number
        of tuning seeds.
        """
        values = [found.metrics.get(self.metric, math.nan) for found in self.results[arm.name]]
        finite = [value for value in values if math.isfinite(value)]
        return stdev(finite) / math.sqrt(self.plan.tuning_seeds) if len(finite) > 1 else 0.0

    def baselines(self) -> Baselines:
        """The scores of simple models on the same data."""
        return next((found.baselines for runs in self.results.values() for found in runs if found.baselines), {})


@dataclass(frozen=True)
class Place:
    """Where runs are stored, and how many processes, or which workers of a launcher, train them."""

    db: str | None = None
    workers: Elsewhere | int | None = None


HERE = Place()


def compare(base: ExperimentConfig, plan: Plan, data: DataSplits, place: Place = HERE) -> Outcome:
    """Carry out the plan. The base gives data and training; its model has the size that the others are matched to.

    Raises ConfigError for what the user has to change, and KeyboardInterrupt after a signal: the same call continues.
    """
    task = task_of(base.task, data)
    score = base.training_params.select_by or task.selected_by
    score = score.removeprefix("val_")
    arms, matches = [], {}
    for name, model_type, fixed in _wanted(base, plan):
        params = {key.removeprefix(MODEL): value for key, value in fixed.items() if key.startswith(MODEL)}
        with phase(f"matching {name}"):
            found = match(base, model_type, plan.axis, plan.tol, data, params)
        matches[name] = found
        config = changed(found.config, {**fixed, "training_params.test": False})
        arms.append(Arm(name, _named(config, base, name), fixed))
        if not found.is_matched:
            log.warning("%s is not matched: it costs %.3f times the base", name, found.ratio)
    outcome = Outcome(plan, base, arms, matches, f"final_val_{score}", f"test_{score}")
    _tune(outcome, place)
    _report_seeds(outcome, place)
    return outcome


def _wanted(base: ExperimentConfig, plan: Plan) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, model type and fixed values of each arm: the models of the plan, each with its controls if wanted."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    for model_type in dict.fromkeys(plan.models):
        cls = models_for(base.task_name).get_or_explain(model_type)
        found.append((model_type, model_type, {}))
        controls = getattr(cls, "control_options", ()) if plan.controls else ()
        found += [(f"{model_type}, {name}", model_type, dict(values)) for name, values in controls]
    return found


def _tune(outcome: Outcome, place: Place) -> None:
    """Tune all arms; once more with twice the training for all if the best trial of one is still learning."""
    plan = outcome.plan
    duration = {arm.name: 0.0 for arm in outcome.arms}  # seconds of its last training

    def evaluate(wanted: Sequence[tuple[Arm, Changes]]) -> None:
        # The longest training begins first, so that no process waits long for the last one.
        wanted = sorted(wanted, key=lambda one: -duration[one[0].name])
        seeds = [
            range(known, known + 1) if (known := arm.runs_of(changes)) else range(plan.tuning_seeds)
            for arm, changes in wanted
        ]
        configs = [
            _seeded(
                changed(arm.config, {**changes, "experiment_name": _trial_name(arm, changes)}), FIRST_TUNING_SEED + seed
            )
            for (arm, changes), own in zip(wanted, seeds, strict=True)
            for seed in own
        ]
        names = [
            f"{arm.name} {_short(changes)}" for (arm, changes), own in zip(wanted, seeds, strict=True) for _ in own
        ]
        results = iter(_trained(configs, names, outcome.metric, place))
        for (arm, changes), own in zip(wanted, seeds, strict=True):
            runs = [next(results) for _ in own]
            duration[arm.name] = runs[-1].metrics.get("training_duration_seconds", 0.0)
            arm.add(_trial(changes, runs, outcome.metric))

    while True:
        may_lengthen = outcome.num_lengthened < plan.max_lengthened
        added = tune(outcome.arms, plan.num_trials, evaluate, may_lengthen, plan.num_confirmed)
        if added is not None:
            outcome.num_added = added
            break
        outcome.num_lengthened += 1
        names = ", ".join(arm.name for arm in outcome.arms if arm.best.is_learning)
        log.warning("still learning at the end: %s. All arms are tuned with twice the training.", names)
        for arm in outcome.arms:
            arm.config, arm.trials = _named(lengthened(arm.config, 2), outcome.base, arm.name), []
    for arm in outcome.arms:
        if arm.edge:
            log.warning("%s: its best learning rate %g is at an end of the grid", arm.name, arm.best.changes[RATE])
        if arm.best.is_learning:
            log.warning("%s is still learning at the end: give more --epochs", arm.name)
        if arm.best.value == -math.inf:
            raise ConfigError(f"{arm.name}: no trial of its tuning has finished. The log and `goe runs` say why.")


def _named(config: ExperimentConfig, base: ExperimentConfig, arm: str) -> ExperimentConfig:
    """The config with a name that says arm and length, so that no run continues one of another length."""
    options = config.training_params
    length = options.max_steps or options.max_tokens or config.epochs
    return changed(config, {"experiment_name": f"{base.experiment_name}_{arm}_{length}"})


def _trial(changes: Changes, results: Sequence[Result], metric: str) -> Trial:
    """The trial of one setting: the mean over its seeds."""
    scores = [found.metrics.get(metric, math.nan) for found in results]
    mean = fmean(scores)
    is_learning = any(STILL_LEARNING in str(found.metrics.get("alarms")) for found in results)
    ids = [found.experiment_id for found in results]
    finite = math.isfinite(mean)
    return Trial(changes, gain_sign(metric) * mean if finite else -math.inf, mean if finite else None, ids, is_learning)


def _report_seeds(outcome: Outcome, place: Place) -> None:
    """Train every arm with fresh seeds and its best settings, and score the test split."""
    seeds = range(outcome.plan.num_seeds)
    configs = [cell_config(arm.configured(), seed) for seed in seeds for arm in outcome.arms]
    names = [f"{arm.name} seed {seed}" for seed in seeds for arm in outcome.arms]
    results = _trained(configs, names, outcome.test_metric, place)
    for number, arm in enumerate(outcome.arms):
        outcome.results[arm.name] = results[number :: len(outcome.arms)]


def cell_config(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    """The config of a reported run: with this seed, and with the test split scored."""
    return changed(_seeded(config, seed), {"training_params.test": True})


def _seeded(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    """The config with a seed; where the data are one instance of many, also with another instance."""
    instance = {f"dataset_params.{INSTANCE}": seed} if INSTANCE in config.dataset_params else {}
    return changed(config, {"seed": seed, **instance})


def _trained(configs: Sequence[ExperimentConfig], names: Sequence[str], metric: str, place: Place) -> list[Result]:
    """The results of all configs; those of an earlier call are read from the store. A diverged run has no metrics.

    If a run raises or its process is killed, the others continue, and at the end the first exception is raised: a run
    that ended by an accident says nothing about its settings.
    """
    found: list[Result] = []
    failure: Exception | None = None
    endings = endings_of(configs, names, db=place.db, resume=True, quiet=True, show_data=False, workers=place.workers)
    for (_, ending), name in zip(endings, names, strict=False):
        if isinstance(ending, Exception):
            failure = failure or ending
            continue
        if ending.exit_code > 128:
            raise KeyboardInterrupt(ending.exit_code - 128)
        found.append(ending)
        score = ending.metrics.get(metric)
        shown = ending.status if score is None else f"{metric} {score:.4f}"
        log.info("%d of %d  %s: %s", len(found), len(configs), name, shown)
    if failure is not None:
        raise failure
    if len(found) < len(configs):
        raise KeyboardInterrupt
    return found


def _trial_name(arm: Arm, changes: Changes) -> str:
    """A name of its own for each trial, so that no run seems to be another one with a changed config."""
    return f"{arm.config.experiment_name} ({_short(changes)})"


def _short(changes: Mapping[str, Any]) -> str:
    """The last words of the keys with their values."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in changes.items())


def with_test_split(config: ExperimentConfig) -> ExperimentConfig:
    """The config if its data have a test split with labels; else one that takes a fifth of the rows for it.

    A single file then gives a fifth of its rows for validation too, because a choice among many trials needs rows.
    """
    data = load_splits(config.dataset_type, config.dataset_name, config.dataset_params, config.seed)
    if data.test is not None:
        return config
    if "test_size" not in options_of_data(config):
        raise ConfigError(f"{config.dataset_name} has no test split with labels, which a comparison needs")
    with_test = changed(config, {"dataset_params.test_size": TAKEN})
    if config.dataset_params.get("val_size") is not None:
        return with_test
    with_both = changed(with_test, {"dataset_params.val_size": TAKEN})
    try:
        load_splits(config.dataset_type, config.dataset_name, with_both.dataset_params, config.seed)
    except ConfigError:  # the data have validation rows of their own
        return with_test
    return with_both


def options_of_data(config: ExperimentConfig) -> set[str]:
    """The names of the options that the data of a config have."""
    return set(options_of(dataset_kind(config.dataset_type).constructor(config.dataset_name)))
