"""Equal tuning for all arms: the same number of trials for each, on validation data and on seeds of their own.

The first trials try learning rates on a common grid. If the best rate of one arm is at an end of the grid, the grid
grows for all arms. The other trials start from the best rate and change one setting at a time: those that the model
declares (`tuned_options`), then rates between those that were tried. What is best after the rates, and again after the
other settings, is trained with further seeds, so that a trial that was only lucky loses its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from research_eval.config.check import config_from_dict
from research_eval.config.sections import ExperimentConfig
from research_eval.registry import models_for

RATE = "optimizer_params.lr"
SPAN = 16.0  # the largest rate of the first grid, as a multiple of the smallest one
MAX_WIDENED = 2  # rates that are added beyond the ends of the grid
FEWEST_TRIALS = 3

Changes = Mapping[str, Any]  # dotted key of the config -> value


@dataclass(frozen=True)
class Trial:
    """Settings of an arm and how they did: `value` is larger for better ones, -inf for a run that did not finish.

    Value and score are means over the runs.
    """

    changes: Changes
    value: float
    score: float | None
    experiment_ids: Sequence[str] = ()
    is_learning: bool = False  # still at the end of the training

    def joined(self, other: Trial) -> Trial:
        """Both trials of the same settings as one."""
        counts = [len(self.experiment_ids), len(other.experiment_ids)]
        scores = [self.score, other.score]
        known = [score for score in scores if score is not None]
        score = float(np.average(known, weights=counts)) if len(known) == len(scores) else None
        value = -math.inf if score is None else float(np.average([self.value, other.value], weights=counts))
        ids = (*self.experiment_ids, *other.experiment_ids)
        return Trial(self.changes, value, score, ids, self.is_learning or other.is_learning)


@dataclass
class Arm:
    """One of the compared models: a matched config, and the trials of its tuning."""

    name: str
    config: ExperimentConfig
    fixed: Changes = field(default_factory=dict)  # what makes it a control; the tuning does not change it
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial:
        """The best trial; of equal ones the earliest."""
        return max(self.trials, key=lambda trial: trial.value)

    def add(self, trial: Trial) -> None:
        """Keep a trial; that of known settings joins the one before."""
        for place, known in enumerate(self.trials):
            if known.changes == trial.changes:
                self.trials[place] = known.joined(trial)
                return
        self.trials.append(trial)

    def runs_of(self, changes: Changes) -> int:
        """How many runs the settings have had."""
        return sum(len(trial.experiment_ids) for trial in self.trials if trial.changes == changes)

    @property
    def rates(self) -> list[float]:
        """The learning rates that were tried, in order."""
        return sorted({trial.changes[RATE] for trial in self.trials})

    @property
    def edge(self) -> int:
        """-1 if the best rate is the smallest that was tried, 1 if it is the largest one, else 0."""
        rate = self.best.changes[RATE]
        return (rate == self.rates[-1]) - (rate == self.rates[0])

    def configured(self, changes: Changes | None = None) -> ExperimentConfig:
        """The config with other settings; by default with those of the best trial."""
        return changed(self.config, self.best.changes if changes is None else changes)


Evaluate = Callable[[Sequence[tuple[Arm, Changes]]], None]  # trains each with its next seeds, and adds the trials


def tune(
    arms: Sequence[Arm], num_trials: int, evaluate: Evaluate, may_lengthen: bool = False, num_confirmed: int = 0
) -> int | None:
    """Give every arm `num_trials` trials, and one more for each rate that is added. Returns how many were added.

    After the rates, and again after the other settings, what is best in each arm is trained `num_confirmed` times more,
    one run after the other: if the mean falls behind another trial, that one has the next run.

    None says that the best of the first rates is still learning in some arm, so that all arms need a longer training;
    only if the caller `may_lengthen` it. The other trials are then not made.
    """
    num_settings = num_trials // 3 if num_trials > FEWEST_TRIALS else 0
    rates = rates_around(arms[0].config.optimizer_params.lr, num_trials - num_settings)
    evaluate([(arm, {RATE: rate}) for rate in rates for arm in arms])
    if may_lengthen and any(arm.best.is_learning for arm in arms):
        return None
    added = 0
    while added < MAX_WIDENED and (edges := {arm.edge for arm in arms} - {0}):
        step = rates[1] / rates[0]
        # One rate at a time: the end at which more arms are.
        edge = max(sorted(edges), key=lambda end: sum(arm.edge == end for arm in arms))
        tried = arms[0].rates
        rate = _rounded(tried[-1] * step if edge > 0 else tried[0] / step)
        evaluate([(arm, {RATE: rate}) for arm in arms])
        added += 1
    for _ in range(num_confirmed):
        evaluate([(arm, arm.best.changes) for arm in arms])
    for number in range(num_settings):
        evaluate([(arm, next_changes(arm, number)) for arm in arms])
    for _ in range(num_confirmed if num_settings else 0):
        evaluate([(arm, arm.best.changes) for arm in arms])
    return added


def rates_around(rate: float, count: int) -> list[float]:
    """`count` rates around a rate, evenly spaced on a logarithmic scale.

    >>> rates_around(2e-3, 3)
    [0.0005, 0.002, 0.008]
    """
    return [_rounded(rate * SPAN ** (number / (count - 1) - 0.5)) for number in range(count)]


def next_changes(arm: Arm, number: int) -> dict[str, Any]:
    """What a trial after the first rates tries: the next alternative of the model, or a rate between two known ones."""
    best = dict(arm.best.changes)
    others = alternatives(arm)
    if number < len(others):
        key, value = others[number]
        return {**best, key: value}
    rates, place = arm.rates, arm.rates.index(best[RATE])
    neighbours = [rates[near] for near in (place + 1, place - 1) if 0 <= near < len(rates)]
    neighbour = neighbours[(number - len(others)) % len(neighbours)]
    return {**best, RATE: _rounded(math.sqrt(best[RATE] * neighbour))}


def alternatives(arm: Arm) -> list[tuple[str, Any]]:
    """The declared settings of the model that its config does not have: the first value of each, then the second."""
    cls = models_for(arm.config.task_name).get_or_explain(arm.config.model_type)
    declared: Sequence[tuple[str, Sequence[Any]]] = getattr(cls, "tuned_options", ())
    config = arm.config.to_dict()
    pairs = [
        (rank, key, value)
        for key, values in declared
        for rank, value in enumerate(values)
        if key not in arm.fixed and config[key.partition(".")[0]].get(key.partition(".")[2]) != value
    ]
    return [(key, value) for _, key, value in sorted(pairs, key=lambda one: one[0])]


def changed(config: ExperimentConfig, changes: Changes) -> ExperimentConfig:
    """The checked config with other values under dotted keys. Raises ConfigError."""
    values = config.to_dict()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return config_from_dict(values, source=config.experiment_name)


def lengthened(config: ExperimentConfig, factor: int) -> ExperimentConfig:
    """The config with a longer training, in whatever its length is given."""
    options = config.training_params
    given = {f"training_params.{name}": getattr(options, name) for name in ("max_steps", "max_tokens")}
    given = {key: value for key, value in given.items() if value is not None} or {"epochs": config.epochs}
    return changed(config, {key: value * factor for key, value in given.items()})


def _rounded(rate: float) -> float:
    """Two significant digits, so that tables and configs can be read."""
    return float(f"{rate:.2g}")
