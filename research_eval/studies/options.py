"""What the user asks of a study, checked. `cli.tune` makes the options from the flags."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field, replace
from typing import Any

from research_eval.config.check import stored_config
from research_eval.config.sections import ExperimentConfig
from research_eval.store.metrics import DEFAULT_METRIC, FLOPS_VERSION, Direction, direction
from research_eval.store.values import canonical_json
from research_eval.studies.launchers import LaunchOptions
from research_eval.studies.space import SearchSpace


@dataclass(frozen=True)
class Method:
    """How settings are chosen and which trials are stopped early: the names of sampler and pruner.

    With `warm_start` the sampler learns from past runs of the results store before the first trial.
    """

    sampler: str = "tpe"
    pruner: str = "median"
    warm_start: bool = False


@dataclass(frozen=True)
class Budget:
    """The limits of a study and of its models. `deadline` is a time in seconds, as `time.time()` returns it.

    `more_trials` is a number of trials beyond those that the study has; `n_trials` then follows from it.
    """

    n_trials: int
    seeds_per_trial: int = 1
    deadline: float | None = None
    max_params: int | None = None
    max_flops: float | None = None  # of one forward pass, per sample
    more_trials: int | None = None


@dataclass(frozen=True)
class StudyOptions:
    """Everything that a worker has to know about a study."""

    study_name: str
    storage: str  # the URL of Optuna's database
    space: SearchSpace
    budget: Budget
    method: Method = Method()
    objectives: tuple[str, ...] = (DEFAULT_METRIC,)
    n_jobs: int = 1
    seed: int = 0
    db: str | None = None  # the results store
    launch: LaunchOptions = field(default_factory=LaunchOptions)
    flags: dict[str, Any] = field(default_factory=dict)  # what makes these options again, for workers elsewhere

    @property
    def directions(self) -> list[Direction]:
        """Whether each objective is maximised or minimised."""
        return [direction(name) for name in self.objectives]

    @property
    def is_time_up(self) -> bool:
        """Whether the deadline has passed."""
        return self.budget.deadline is not None and time.time() >= self.budget.deadline

    def with_budget(self, **changes: Any) -> StudyOptions:
        """The same options with other limits."""
        return replace(self, budget=replace(self.budget, **changes))

    def settings(self) -> dict[str, Any]:
        """The options that make trials comparable. A study keeps to them for all its life."""
        base = {key: value for key, value in self.space.base.items() if key != "training_params"}
        return {
            **base,
            "objectives": list(self.objectives),
            "search_space": self.space.describe(),
            "fixed": self.space.fixed,
            "seed": self.seed,
            "seeds_per_trial": self.budget.seeds_per_trial,
            "max_params": self.budget.max_params,
            "max_flops": self.budget.max_flops,
            **({"flops_version": FLOPS_VERSION} if "train_flops" in self.objectives else {}),
        }


@dataclass(frozen=True)
class BatchOptions(StudyOptions):
    """Runs that are given and not drawn, as a study: each trial has one of the `configs`, and none is pruned."""

    configs: tuple[dict[str, Any], ...] = ()

    def config(self, number: int) -> ExperimentConfig:
        """One of the configs. Raises ConfigError if this version of the program cannot read it."""
        return stored_config(self.configs[number], source=f"config {number} of {self.study_name}")

    def settings(self) -> dict[str, Any]:
        return {"configs_sha256": configs_sha256(self.configs)}


def configs_sha256(configs: tuple[dict[str, Any], ...]) -> str:
    """The hash of the configs of a batch."""
    return hashlib.sha256(canonical_json(list(configs)).encode()).hexdigest()
