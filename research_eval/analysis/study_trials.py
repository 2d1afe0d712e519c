"""The trials of a study as its files and pictures have them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from research_eval.metrics import direction
from research_eval.search_space import MODEL_TYPE, SECTIONS

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STATUSES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


@dataclass(frozen=True)
class TrialRecord:
    """A trial as the files and pictures have it.

    `params` are named as they were sampled: one whose choices other values had narrowed carries them in its name (see
    `plain_name`). `values` are those of the objectives; of a pruned trial the last one reported, where there is one.
    `last` has the last scores of a pruned trial by objective. `warm_start` is the run that a past run was.
    """

    number: int
    state: str  # Optuna's
    status: str  # one of the values of STATUSES, or diverged
    reason: str | None
    values: tuple[float, ...] | None
    params: dict[str, Any]
    model_type: str | None
    experiment_ids: list[str]
    epochs: int
    attempts: int
    warm_start: str | None
    started: datetime | None
    completed: datetime | None
    distributions: dict[str, BaseDistribution] = field(repr=False)
    last: dict[str, float] = field(repr=False)

    @property
    def plain_params(self) -> dict[str, Any]:
        """The values under one name for every parameter."""
        return {plain_name(name): value for name, value in self.params.items()}

    def value(self, objectives: Sequence[str], index: int) -> float | None:
        """What is known of an objective at the end of the trial; None where it is nothing, or not finite."""
        found = self.last.get(objectives[index]) if self.values is None else self.values[index]
        return found if found is not None and math.isfinite(found) else None


def plain_name(name: str) -> str:
    """The name of a parameter without the choices that were left of it.

    >>> plain_name("dense.num_heads of 1, 2"), plain_name("optimizer_params.lr")
    ('dense.num_heads', 'optimizer_params.lr')
    """
    return name.partition(" of ")[0]


def trial_records(study: optuna.Study) -> list[TrialRecord]:
    """All trials by number, past runs that teach the sampler among them."""
    return [_record(trial) for trial in sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)]


def _record(trial: FrozenTrial) -> TrialRecord:
    attributes, state = trial.user_attrs, trial.state.name
    diverged = state == "FAIL" and attributes.get("status") == "diverged"
    return TrialRecord(
        number=trial.number,
        state=state,
        status="diverged" if diverged else STATUSES[state],
        reason=attributes.get("reason"),
        values=None if trial.values is None else tuple(trial.values),
        params=trial.params,
        model_type=attributes.get("model_type") or _model_type(trial.params),
        experiment_ids=list(attributes.get("experiment_ids", [])),
        epochs=attributes.get("epochs", 0),
        attempts=attributes.get("attempts", 0),
        warm_start=attributes.get("warm_start"),
        started=trial.datetime_start,
        completed=trial.datetime_complete,
        distributions=trial.distributions,
        last=_last_scores(attributes) if state == "PRUNED" else {},
    )


def _model_type(params: Mapping[str, Any]) -> str | None:
    """As sampled or, in a study of one type, as its parameters are called."""
    own = [name.partition(".")[0] for name in params if "." in name]
    return params.get(MODEL_TYPE) or next((name for name in own if name not in SECTIONS), None)


def _last_scores(attributes: Mapping[str, Any]) -> dict[str, float]:
    """Optuna keeps no intermediate values of several objectives: they are in the attributes."""
    curves: dict[str, dict[str, float]] = attributes.get("curves", {})
    scores = {name: curve[max(curve, key=int)] for name, curve in curves.items() if curve}
    return {**attributes.get("costs", {}), **scores}


def own_trials(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Without the past runs."""
    return [record for record in records if record.warm_start is None]


def finished_trials(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The study's own that have all their values."""
    return [record for record in own_trials(records) if record.state == "COMPLETE" and record.values is not None]


def best_of(records: Sequence[TrialRecord], objectives: Sequence[str]) -> TrialRecord | None:
    """The finished trial that is best in the first objective; of equal ones in the next; else the earliest."""

    def key(record: TrialRecord) -> list[float]:
        return [*_costs(record, objectives), record.number]

    return min(finished_trials(records), key=key, default=None)


def pareto_front(records: Sequence[TrialRecord], objectives: Sequence[str]) -> list[TrialRecord]:
    """The finished trials than which no other is as good in every objective, and better in one."""
    finished = finished_trials(records)
    costs = np.array([_costs(record, objectives) for record in finished])
    return [
        record
        for record, own in zip(finished, costs, strict=True)
        if not ((costs <= own).all(1) & (costs < own).any(1)).any()
    ]


def _costs(record: TrialRecord, objectives: Sequence[str]) -> list[float]:
    """The values, less is better."""
    pairs = zip(record.values or (), objectives, strict=True)
    return [value if direction(name) == "minimize" else -value for value, name in pairs]
