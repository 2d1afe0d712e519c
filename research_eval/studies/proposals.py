"""The settings of a trial: a sampler proposes them until they are valid and within the budgets of the study.

A budget cannot be expressed in a search space, because the size of a model follows from many parameters together. So
complete proposals are drawn and checked. Those that are refused never reach Optuna's storage, so that they cost no
trial. A trial for which no proposal is accepted is pruned.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from research_eval.config.check import config_from_dict
from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.providers import load_splits
from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError
from research_eval.experiment import prepare
from research_eval.seeding import derive_seed
from research_eval.store.values import canonical_json
from research_eval.studies.adapter import StoredTrial, given_values
from research_eval.studies.distributions import Infeasible, contains
from research_eval.studies.options import StudyOptions
from research_eval.studies.storage import experimental
from research_eval.tasks.base import task_of
from research_eval.training.evaluate import measure_flops, measure_forward_flops
from research_eval.training.latency import measure_latency
from research_eval.training.length import Length
from research_eval.training.state import Pruned

MAX_PROPOSALS = 300  # for one trial; the last third of them is random, without the sampler
# Metrics of a model that are known before it is trained.
COSTS = ("param_count", "active_param_count", "inference_flops_per_sample", "train_flops", "inference_latency_ms_batch")


def make_sampler(options: StudyOptions, number: int) -> optuna.samplers.BaseSampler:
    """The sampler for trial `number`. Its draws follow from the study's seed and from the trials before it.

    A sampler per trial makes the draws independent of the worker that trains the trial.
    """
    seed = derive_seed(options.seed, "study", number) % 2**32
    samplers = optuna.samplers
    with experimental():
        if options.method.sampler == "tpe":
            return samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
        if options.method.sampler == "gp":
            return samplers.GPSampler(seed=seed)
        if options.method.sampler == "nsga2":
            size = min(50, max(4, options.budget.n_trials // 5))
            return samplers.NSGAIISampler(population_size=size, seed=seed)
        if options.method.sampler == "cmaes":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return samplers.RandomSampler(seed=seed)  # also for values that a point of a grid does not have


class Proposal:
    """Values for a trial, as its sampler draws them. They are not stored yet. `fixed` values are used as they are."""

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
        """The value of one parameter, for `SearchSpace.sample`."""
        for known in (self._fixed, self._relative):
            if name in known and contains(distribution, known[name]):
                value = known[name]
                break
        else:
            value = self._sampler.sample_independent(self._study, self._trial, name, distribution)
        self.entries[name] = (value, distribution)
        return value


def choose_config(stored: StoredTrial, options: StudyOptions) -> ExperimentConfig:
    """Choose the config of a trial and store its values.

    Values that the trial has already stay. The others are drawn until the config is valid and within the budgets.
    Raises Pruned if no such config was found.
    """
    trial = stored.frozen()
    fixed = given_values(trial)
    sampler = make_sampler(options, trial.number)
    sampler.before_trial(stored.study, trial)
    reason = ""
    for attempt in range(MAX_PROPOSALS):
        if attempt == MAX_PROPOSALS * 2 // 3:
            sampler = optuna.samplers.RandomSampler(seed=derive_seed(options.seed, "redraw", trial.number) % 2**32)
        proposal = Proposal(stored.study, sampler, trial, fixed)
        try:
            config = config_from_dict(options.space.sample(proposal.pick), source="trial")
            reason = over_budget(config, options) or ""
        except (Infeasible, ConfigError) as problem:
            reason = str(problem)
        if not reason:
            stored.enter_values(proposal.entries)
            return config
        if set(proposal.entries) <= set(fixed):
            break  # nothing was drawn, so that another attempt would be the same
    raise Pruned(f"infeasible: {reason}")


def over_budget(config: ExperimentConfig, options: StudyOptions) -> str | None:
    """Why a config exceeds the budgets of the study; None if it does not.

    The costs are those of the freshly initialised model.
    """
    limits = options.budget
    if limits.max_params is None and limits.max_flops is None:
        return None
    counted = ("param_count",) if limits.max_flops is None else ("param_count", "inference_flops_per_sample")
    found = costs(config, counted)
    if limits.max_params is not None and found["param_count"] > limits.max_params:
        return f"{found['param_count']:,.0f} parameters are more than --max_params {limits.max_params:,}"
    if limits.max_flops is not None and found["inference_flops_per_sample"] > limits.max_flops:
        flops = found["inference_flops_per_sample"]
        return f"{flops:,.0f} FLOPs per sample are more than --max_flops {limits.max_flops:,.0f}"
    return None


def costs(config: ExperimentConfig, names: Sequence[str]) -> dict[str, float]:
    """The `COSTS` with these names, of the model before any training."""
    data = splits_of(config.dataset_type, config.dataset_name, canonical_json(config.dataset_params), config.seed)
    runtime, _, model = prepare(config, data)
    validation = data.validation.batches(config.training_params.eval_batch_size or config.batch_size, runtime.device)
    found: dict[str, float] = {"param_count": model.get_parameter_count()}
    task = task_of(config.task, data)
    if "train_flops" not in names and "inference_flops_per_sample" in names:
        found["inference_flops_per_sample"] = measure_forward_flops(model, validation, runtime, task=task)
    elif "train_flops" in names:
        found["inference_flops_per_sample"], training = measure_flops(model, validation, runtime, task=task)
        found["train_flops"] = training * data.train.samples_per_epoch * Length.of(config, data.train).passes
    if "inference_latency_ms_batch" in names:
        found |= measure_latency(model, validation, runtime)
    found["active_param_count"] = model.get_active_parameter_count()
    return {name: float(found[name]) for name in names}


@functools.lru_cache(maxsize=2)
def splits_of(dataset_type: str, dataset_name: str, params: str, seed: int) -> DataSplits:
    """The data of a config; `params` is canonical JSON. Cached, because most trials of a study use the same data."""
    return load_splits(dataset_type, dataset_name, json.loads(params), seed)
