"""One trial of a study: settings within the budgets, runs for its seeds, and giving up on what will not win."""

from __future__ import annotations

import functools
import json
import logging
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from research_eval.datasets.providers import load_splits
from research_eval.datasets.token_data import Batches, DataSplits
from research_eval.db_utils import Store, canonical_json
from research_eval.errors import ConfigError
from research_eval.experiment import TrialRun, new_id, prepare, run
from research_eval.metrics import DEFAULT_METRIC, Direction, direction
from research_eval.schema import ExperimentConfig, config_from_dict
from research_eval.search_space import Infeasible, SearchSpace, contains
from research_eval.seeding import derive_seed
from research_eval.system.untrusted import stored_object
from research_eval.training.checkpoint import delete_checkpoint
from research_eval.training.evaluate import measure_flops, measure_latency
from research_eval.training.fit import CHECKPOINT_FILE, Pruned

log = logging.getLogger(__name__)

MAX_DRAFTS = 300  # draws in search of a config within the budgets; the last third is drawn without the sampler
STARTUP_TRIALS = 5  # complete trials before any is pruned
DOMINATED_BY = 3  # finished trials that have to be better in everything before one of several objectives is given up
CURVES = {  # objective: the score of an epoch that foretells it
    "final_val_f1": "val_f1",
    "best_val_f1_across_epochs": "val_f1",
    "final_val_acc": "val_acc",
    "final_val_loss": "val_loss",
}
COSTS = ("param_count", "active_param_count", "inference_flops_per_sample", "train_flops", "inference_latency_ms_batch")


@dataclass(frozen=True)
class StudyOptions:
    """What a study is asked to do."""

    study_name: str
    storage: str
    space: SearchSpace
    n_trials: int
    objectives: tuple[str, ...] = (DEFAULT_METRIC,)
    sampler: str = "tpe"
    pruner: str = "median"
    n_jobs: int = 1
    deadline: float | None = None
    max_params: int | None = None
    max_flops: float | None = None
    seeds_per_trial: int = 1
    seed: int = 0
    db: str | None = None
    warm_start: bool = False

    @property
    def directions(self) -> list[Direction]:
        return [direction(name) for name in self.objectives]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: `values` where it is finished, a reason where it is not."""

    status: str
    values: tuple[float, ...] | None = None
    reason: str | None = None
    exit_code: int = 0


# ------------------------------------------------------------------------------------------------------- settings


@contextmanager
def experimental() -> Iterator[None]:
    """Parts of Optuna that announce themselves as experimental; the version is pinned and tests use all of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def make_sampler(options: StudyOptions, number: int) -> optuna.samplers.BaseSampler:
    """The sampler for trial `number`: its draws follow from the study's seed and the trials before it."""
    seed = derive_seed(options.seed, "study", number) % 2**32
    samplers = optuna.samplers
    with experimental():
        if options.sampler == "tpe":
            return samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
        if options.sampler == "gp":
            return samplers.GPSampler(seed=seed)
        if options.sampler == "nsga2":
            return samplers.NSGAIISampler(population_size=min(50, max(4, options.n_trials // 5)), seed=seed)
        if options.sampler == "cmaes":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return samplers.RandomSampler(seed=seed)  # of a grid, for what is drawn beside it


def make_pruner(options: StudyOptions) -> optuna.pruners.BasePruner:
    """Optuna's pruner for one objective; for several it has none (see `dominated`)."""
    epochs = options.space.base["epochs"]
    if len(options.objectives) > 1 or options.pruner == "none":
        return optuna.pruners.NopPruner()
    if options.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3)
    return optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=epochs // 10)


class Draft:
    """Values for a trial as its sampler gives them, not entered yet. `fixed` values are taken as they are."""

    def __init__(
        self,
        study: optuna.Study,
        sampler: optuna.samplers.BaseSampler,
        trial: FrozenTrial,
        fixed: Mapping[str, Any],
    ) -> None:
        self._study, self._sampler, self._trial, self._fixed = study, sampler, trial, fixed
        space = sampler.infer_relative_search_space(study, trial)
        self._relative = sampler.sample_relative(study, trial, space)
        self.entries: dict[str, tuple[Any, BaseDistribution]] = {}

    def pick(self, name: str, distribution: BaseDistribution) -> Any:
        """A value, as `SearchSpace.sample` asks for it."""
        for known in (self._fixed, self._relative):
            if name in known and contains(distribution, known[name]):
                value = known[name]
                break
        else:
            value = self._sampler.sample_independent(self._study, self._trial, name, distribution)
        self.entries[name] = (value, distribution)
        return value


def choose_config(
    study: optuna.Study, storage: optuna.storages.BaseStorage, trial_id: int, options: StudyOptions
) -> ExperimentConfig:
    """The config of a trial: what it has been given already, and for the rest draws until the budgets are kept.

    Its values are entered into the storage. Raises Pruned where no config was found.
    """
    trial = storage.get_trial(trial_id)
    fixed = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    sampler = make_sampler(options, trial.number)
    sampler.before_trial(study, trial)
    reason = ""
    for attempt in range(MAX_DRAFTS):
        if attempt == MAX_DRAFTS * 2 // 3:
            sampler = optuna.samplers.RandomSampler(seed=derive_seed(options.seed, "redraw", trial.number) % 2**32)
        draft = Draft(study, sampler, trial, fixed)
        try:
            config = config_from_dict(options.space.sample(draft.pick), source="trial")
            reason = over_budget(config, options) or ""
        except (Infeasible, ConfigError) as problem:
            reason = str(problem)
        if not reason:
            for name, (value, distribution) in draft.entries.items():
                if name not in trial.params:
                    storage.set_trial_param(trial_id, name, distribution.to_internal_repr(value), distribution)
            return config
        if set(draft.entries) <= set(fixed):
            break
    raise Pruned(f"infeasible: {reason}")


def over_budget(config: ExperimentConfig, options: StudyOptions) -> str | None:
    """Why a config may not be trained, None if it may. Costs are those of the freshly initialised model."""
    if options.max_params is None and options.max_flops is None:
        return None
    found = costs(config, ("param_count",) if options.max_flops is None else COSTS[:3])
    if options.max_params is not None and found["param_count"] > options.max_params:
        return f"{found['param_count']:,.0f} parameters are more than --max_params {options.max_params:,}"
    if options.max_flops is not None and found["inference_flops_per_sample"] > options.max_flops:
        flops = found["inference_flops_per_sample"]
        return f"{flops:,.0f} FLOPs per sample are more than --max_flops {options.max_flops:,.0f}"
    return None


def costs(config: ExperimentConfig, names: Sequence[str]) -> dict[str, float]:
    """Those of the `COSTS` that are asked for, before any training."""
    data = splits_of(config.dataset_type, config.dataset_name, canonical_json(config.dataset_params), config.seed)
    runtime, _, model = prepare(config, data)
    validation = Batches(data.validation, config.training_params.eval_batch_size or config.batch_size, runtime.device)
    found: dict[str, float] = {"param_count": model.get_parameter_count()}
    if set(names) & {"inference_flops_per_sample", "train_flops"}:
        forward, training = measure_flops(model, validation, runtime)
        found["inference_flops_per_sample"] = forward
        found["train_flops"] = training * len(data.train) * config.epochs
    if "inference_latency_ms_batch" in names:
        found |= measure_latency(model, validation, runtime)
    found["active_param_count"] = model.get_active_parameter_count()
    return {name: float(found[name]) for name in names}


@functools.lru_cache(maxsize=2)
def splits_of(dataset_type: str, dataset_name: str, params: str, seed: int) -> DataSplits:
    """The data of a config, kept for the next trial."""
    return load_splits(dataset_type, dataset_name, json.loads(params), seed)


# ------------------------------------------------------------------------------------------------------- training


def train_trial(
    study: optuna.Study, storage: optuna.storages.BaseStorage, trial_id: int, options: StudyOptions
) -> Outcome:
    """Choose the settings, train every seed, and say how it ended; a trial that was cut off goes on where it was."""
    try:
        config = choose_config(study, storage, trial_id, options)
    except Pruned as problem:
        return Outcome("pruned", reason=str(problem))
    return train_config(study, storage, trial_id, options, config)


def train_config(
    study: optuna.Study,
    storage: optuna.storages.BaseStorage,
    trial_id: int,
    options: StudyOptions,
    config: ExperimentConfig,
) -> Outcome:
    """The trial's values: means over its seeds. Whatever goes wrong is the reason of the outcome."""
    try:
        storage.set_trial_user_attr(trial_id, "model_type", config.model_type)
        results = []
        for index in range(options.seeds_per_trial):
            outcome, metrics = _train_seed(study, storage, trial_id, options, config, index)
            if outcome is not None:
                return outcome
            missing = [name for name in options.objectives if name not in metrics]
            if missing:
                return Outcome("failed", reason=f"the run has no metric {missing[0]!r}")
            results.append(metrics)
        values = tuple(statistics.fmean(metrics[name] for metrics in results) for name in options.objectives)
        if not all(map(math.isfinite, values)):
            return Outcome("failed", reason=f"{', '.join(options.objectives)} = {values}: not finite")
    except Exception as problem:
        log.debug("trial failed", exc_info=True)
        return Outcome("failed", reason=f"{type(problem).__name__}: {problem}")
    return Outcome("finished", values)


def _train_seed(
    study: optuna.Study,
    storage: optuna.storages.BaseStorage,
    trial_id: int,
    options: StudyOptions,
    config: ExperimentConfig,
    index: int,
) -> tuple[Outcome | None, dict[str, Any]]:
    """The metrics of the run with the `index`-th seed; an outcome where it did not finish."""
    trial = storage.get_trial(trial_id)
    ids: list[str] = trial.user_attrs.get("experiment_ids", [])
    if len(ids) <= index:
        ids = [*ids, new_id()]
        storage.set_trial_user_attr(trial_id, "experiment_ids", ids)
    seeded = config.model_copy(update={"seed": config.seed + index})
    with Store(options.db) as store:
        known = store.find_id(ids[index])
    if known is not None:  # begun with other settings of threads or device, perhaps
        seeded = config_from_dict(stored_object(known["full_config_json"]), source=f"run {ids[index]}")
    watcher = Watcher(study, storage, trial_id, options, seeded, judges=index == 0)
    result = run(
        seeded,
        db=options.db,
        quiet=True,
        parent_id=ids[0] if index else None,
        trial=TrialRun(options.study_name, trial.number, ids[index], watcher.epoch_end),
    )
    if result.status != "interrupted":
        delete_checkpoint(result.folder / CHECKPOINT_FILE)  # hundreds of trials would fill the disk
    if result.status == "finished":
        return None, result.metrics
    return Outcome(result.status, reason=result.error, exit_code=result.exit_code), {}


class Watcher:
    """Reports the epochs of a trial's first seed, and prunes."""

    def __init__(
        self,
        study: optuna.Study,
        storage: optuna.storages.BaseStorage,
        trial_id: int,
        options: StudyOptions,
        config: ExperimentConfig,
        judges: bool,
    ) -> None:
        self._study, self._storage, self._trial_id = study, storage, trial_id
        self._options, self._epochs, self._judges = options, config.epochs, judges
        self._costs: dict[str, float] = {}
        several = len(options.objectives) > 1 and options.pruner != "none"
        if several and judges:
            self._costs = costs(config, [name for name in options.objectives if name in COSTS])
            storage.set_trial_user_attr(trial_id, "costs", self._costs)

    def epoch_end(self, epoch: int, scores: dict[str, float]) -> None:
        """Raises Pruned for a trial that is not worth another epoch."""
        self._storage.set_trial_user_attr(self._trial_id, "epochs", self._epochs_before() + epoch)
        if not self._judges:
            return
        if len(self._options.objectives) == 1:
            self._report(epoch, scores)
        else:
            self._compare(epoch, scores)

    def _epochs_before(self) -> int:
        """Of the seeds trained before this one."""
        ids = self._storage.get_trial(self._trial_id).user_attrs["experiment_ids"]
        return self._epochs * (len(ids) - 1)

    def _report(self, epoch: int, scores: dict[str, float]) -> None:
        score = CURVES.get(self._options.objectives[0])
        if score is None:
            return
        if epoch not in self._storage.get_trial(self._trial_id).intermediate_values:
            self._storage.set_trial_intermediate_value(self._trial_id, epoch, scores[score])
        trial = self._storage.get_trial(self._trial_id)
        if epoch < self._epochs and self._study.pruner.prune(self._study, trial):
            raise Pruned(f"{self._options.pruner} pruner after epoch {epoch}: {score} {scores[score]:.4f}")

    def _compare(self, epoch: int, scores: dict[str, float]) -> None:
        curves = self._storage.get_trial(self._trial_id).user_attrs.get("curves", {})
        for name in self._options.objectives:
            if name in CURVES:
                curve = dict(curves.get(name, {}))
                curve[str(epoch)] = scores[CURVES[name]]
                curves = {**curves, name: curve}
        self._storage.set_trial_user_attr(self._trial_id, "curves", curves)
        if self._options.pruner == "none" or epoch == self._epochs:
            return
        own = standing(self._options.objectives, curves, self._costs, epoch)
        others = [
            standing(self._options.objectives, trial.user_attrs["curves"], trial.user_attrs.get("costs", {}), epoch)
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if "curves" in trial.user_attrs
        ]
        if len(others) >= STARTUP_TRIALS and dominated(own, others):
            raise Pruned(f"after epoch {epoch} {DOMINATED_BY} finished trials were better in every objective")


def standing(
    objectives: Sequence[str], curves: Mapping[str, Mapping[str, float]], known: Mapping[str, float], epoch: int
) -> dict[str, float]:
    """What is known of a trial's objectives after an epoch, larger is better: best scores so far, costs."""
    found = {}
    for name in objectives:
        sign = 1.0 if direction(name) == "maximize" else -1.0
        until = [sign * value for at, value in curves.get(name, {}).items() if int(at) <= epoch]
        if until:
            found[name] = max(until)
        elif name in known:
            found[name] = sign * known[name]
    return found


def dominated(own: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> bool:
    """Whether `DOMINATED_BY` others are nowhere worse and better in a score that training moves.

    Optuna prunes in studies of one objective only; this is the rule for several.
    """
    moving = [name for name in own if name in CURVES]
    better = sum(
        all(other.get(name, -math.inf) >= value for name, value in own.items())
        and any(other.get(name, -math.inf) > own[name] for name in moving)
        for other in others
    )
    return better >= DOMINATED_BY
