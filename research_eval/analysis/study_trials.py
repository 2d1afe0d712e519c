"""The trials of a study as its files and pictures need them; `studies.adapter` makes them from Optuna's trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from research_eval.store.metrics import gain_sign

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class TrialSettings:
    """The values that a trial was given.

    `sampled` has them under the names of Optuna's storage, which may contain the choices that were left (see
    `studies.names`). `plain` and `distributions` use the plain name of each parameter, which is the same in all trials.
    """

    sampled: dict[str, Any]
    plain: dict[str, Any]
    distributions: dict[str, BaseDistribution] = field(repr=False)


@dataclass(frozen=True)
class TrialRuns:
    """The experiments of a trial, one per seed: their ids, the epochs that they trained, and how often it was begun."""

    experiment_ids: list[str]
    epochs: int
    attempts: int


@dataclass(frozen=True)
class TrialRecord:
    """A trial as files and pictures show it."""

    number: int
    state: str  # the name of Optuna's state
    status: str  # finished, pruned, diverged, failed, running or waiting
    reason: str | None
    values: tuple[float, ...] | None  # one per objective; of a pruned trial the last one reported, if there is one
    last: dict[str, float] = field(repr=False)  # objective -> last score of a pruned trial
    model_type: str | None
    settings: TrialSettings
    runs: TrialRuns
    warm_start: str | None  # the id of the past run that this trial stands for
    started: datetime | None
    completed: datetime | None

    @property
    def params(self) -> dict[str, Any]:
        """The sampled values under their stored names."""
        return self.settings.sampled

    @property
    def plain_params(self) -> dict[str, Any]:
        """The sampled values under plain names."""
        return self.settings.plain

    @property
    def plain_distributions(self) -> dict[str, BaseDistribution]:
        """The distributions of the sampled values under plain names."""
        return self.settings.distributions

    @property
    def experiment_ids(self) -> list[str]:
        """The ids of the experiments, one per seed."""
        return self.runs.experiment_ids

    @property
    def epochs(self) -> int:
        """The epochs that all seeds trained together."""
        return self.runs.epochs

    @property
    def attempts(self) -> int:
        """How many workers have begun the trial."""
        return self.runs.attempts

    def value(self, objectives: Sequence[str], index: int) -> float | None:
        """The last known value of the `index`-th objective; None if there is none, or if it is not finite."""
        found = self.last.get(objectives[index]) if self.values is None else self.values[index]
        return found if found is not None and math.isfinite(found) else None


def own_trials(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that the study made, without the past runs that teach its sampler."""
    return [record for record in records if record.warm_start is None]


def finished_trials(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that the study made and that have a value for every objective."""
    return [record for record in own_trials(records) if record.state == "COMPLETE" and record.values is not None]


def best_of(records: Sequence[TrialRecord], objectives: Sequence[str]) -> TrialRecord | None:
    """The finished trial that is best in the first objective; the next objective, then the number decides a tie."""

    def key(record: TrialRecord) -> list[float]:
        return [*_costs(record, objectives), record.number]

    return min(finished_trials(records), key=key, default=None)


def pareto_front(records: Sequence[TrialRecord], objectives: Sequence[str]) -> list[TrialRecord]:
    """The finished trials that no other trial dominates.

    A trial dominates another one if it is at least as good in every objective and better in at least one.
    """
    finished = finished_trials(records)
    costs = np.array([_costs(record, objectives) for record in finished])
    return [
        record
        for record, own in zip(finished, costs, strict=True)
        if not ((costs <= own).all(1) & (costs < own).any(1)).any()
    ]


def _costs(record: TrialRecord, objectives: Sequence[str]) -> list[float]:
    """The values with signs that make smaller ones better."""
    return [-gain_sign(name) * value for value, name in zip(record.values or (), objectives, strict=True)]
