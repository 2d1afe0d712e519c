"""Signs of collapsed routing, and of a training that was too short, in the reports of a run's epochs.

docs/collapse.md explains each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]  # the metrics of one epoch

SCORE = "oriented_score"  # key of a report: the validation score that selects the weights; more is better
STILL_LEARNING = "still_learning"
LATE_GAIN = 0.02  # best score of the last quarter minus best score before it; for losses and errors relative
MIN_EPOCHS = 4  # a quarter of fewer epochs is less than one


@dataclass(frozen=True)
class Circumstances:
    """The facts about a run that decide which rules apply to it."""

    epochs: int
    halting: bool = False  # paths may end early
    learned_route: bool = True

    @classmethod
    def of(cls, epochs: int, model_params: Mapping[str, Any]) -> Circumstances:
        """Read the facts from the complete `model_params` of a config.

        A model without the options `halt` and `route` counts as one that learns its route and never halts early.
        """
        return cls(epochs, model_params.get("halt", "off") != "off", model_params.get("route", "learned") == "learned")


@dataclass(frozen=True)
class Alarm:
    """A condition that held in two consecutive epochs. `epoch` is the second one of the first such pair.

    "still_learning" compares the last quarter of the epochs with those before it. Its `epoch` is the last one.
    """

    name: str
    epoch: int
    value: float
    threshold: float
    advice: str
    link: str  # link to its explanation

    def __str__(self) -> str:
        return (
            f"{self.name} in epoch {self.epoch} ({self.value:.3g}, limit {self.threshold:g}): {self.advice} {self.link}"
        )


@dataclass(frozen=True)
class Rule:
    """A condition on the report of an epoch.

    It holds if `value` is at least (with `low`: at most) `threshold`, after the share `since` of the epochs.
    """

    name: str
    threshold: float
    advice: str
    value: Callable[[Report], float | None]  # None if the report lacks it
    low: bool = False
    since: float = 0.0
    applies: Callable[[Circumstances], bool] = lambda circumstances: True

    def broken(self, report: Report) -> bool:
        """Whether the report shows the sign of collapse; False if the report lacks the value."""
        value = self.value(report)
        return value is not None and (value <= self.threshold if self.low else value >= self.threshold)


def _routed(name: str) -> Callable[[Report], float | None]:
    """A reader of the metric `name`. It returns None if there is only one expert, so nothing to choose."""
    return lambda report: report.get(name) if _num_experts(report) > 1 else None


def _num_experts(report: Report) -> int:
    """Number of experts in the report; 0 for a model without experts."""
    return len(report["expert_load"][0]) if report.get("expert_load") else 0


def _imbalance(report: Report) -> float | None:
    """Coefficient of variation of the load, divided by its maximum, which occurs if one expert takes all samples."""
    experts = _num_experts(report)
    variation = report.get("expert_load_cv")
    return variation / math.sqrt(experts - 1) if variation is not None and experts > 1 else None


def _stuck_length(report: Report) -> float | None:
    """Share of the samples whose path has the most common length, if this is 0, 1 or the longest possible.

    0 for another most common length; None if the report has too few lengths to judge.
    """
    counts = report.get("path_length_histogram", [])
    if len(counts) < 3:
        return None
    commonest = max(range(len(counts)), key=counts.__getitem__)
    return counts[commonest] / max(sum(counts), 1) if commonest in (0, 1, len(counts) - 1) else 0.0


def _mode_gap(report: Report) -> float | None:
    """The part of the gap between training and evaluation mode that is larger than the noise of so few samples."""
    if "training_mode_gap" not in report:
        return None
    samples = min(sum(report.get("path_length_histogram", [])), 1000)  # the gap is measured on at most 1,000 samples
    return max(0.0, abs(report["training_mode_gap"]) - (1 / math.sqrt(samples) if samples else 0.0))


RULES = (
    Rule(
        "dead_experts",
        1,
        "Experts get no samples. Raise balance_bias_rate or the weight of the balance loss, or use fewer experts.",
        _routed("dead_experts"),
        since=0.5,
    ),
    Rule(
        "load_imbalance",
        0.6,
        "A few experts take nearly all samples. Lower router_lr_mult, and balance with balance_bias_rate.",
        _imbalance,
        since=0.5,
    ),
    Rule(
        "entropy_low",
        0.02,
        "The router is certain everywhere and cannot change its mind. Raise gumbel_tau, or lower router_lr_mult.",
        _routed("router_entropy"),
        low=True,
        applies=lambda circumstances: circumstances.learned_route,
    ),
    Rule(
        "entropy_high",
        0.98,
        "The router has not decided anything. Lower the balance and entropy weights, or raise router_lr_mult.",
        _routed("router_entropy"),
        since=0.5,
        applies=lambda circumstances: circumstances.learned_route,
    ),
    Rule(
        "path_length_stuck",
        0.99,
        "All paths have the same extreme length: stopping is not learned. Change path_penalty_coef or halt_warmup.",
        _stuck_length,
        since=0.75,
        applies=lambda circumstances: circumstances.halting,
    ),
    Rule(
        "logits_at_limit",
        0.5,
        "Router logits stand at their clamp, where the gradient is zero. Raise z_loss_coef, or lower router_lr_mult.",
        _routed("logits_at_limit_share"),
    ),
    Rule(
        "mode_gap",
        0.05,
        "Routing in training differs from routing in evaluation. Lower the noise at the end: gumbel_tau_min.",
        _mode_gap,
        since=0.5,
    ),
    Rule(
        "router_frozen",
        1e-6,
        "The router's weights are still the initial ones. Raise router_lr_mult, or choose a mode that trains it.",
        _routed("router_change"),
        low=True,
        applies=lambda circumstances: circumstances.learned_route,
    ),
    Rule(
        "experts_alike",
        0.95,
        "All experts compute nearly the same. Start them from different weights, and do not tie them.",
        _routed("expert_similarity"),
    ),
)


def find_alarms(reports: Sequence[Report], circumstances: Circumstances) -> list[Alarm]:
    """The alarms of the epochs so far, each at most once, in the order of their epochs.

    A sign of collapse has to hold in two consecutive epochs, because a single epoch may be a fluctuation. A run of one
    epoch therefore never has an alarm.
    """
    alarms = _still_learning(reports, circumstances)
    for rule in RULES:
        if not rule.applies(circumstances):
            continue
        for epoch in range(2, len(reports) + 1):
            last, this = reports[epoch - 2 : epoch]
            if epoch > rule.since * circumstances.epochs and rule.broken(last) and rule.broken(this):
                value = rule.value(this)
                assert value is not None
                alarms.append(Alarm(rule.name, epoch, float(value), rule.threshold, rule.advice, _link(rule.name)))
                break
    return sorted(alarms, key=lambda alarm: alarm.epoch)


def has_alarms(reports: Sequence[Report]) -> bool:
    """Whether any rule applies: the model has experts, or the run has enough epochs to judge its end."""
    return any("expert_load" in report for report in reports) or len(reports) >= MIN_EPOCHS


def _still_learning(reports: Sequence[Report], circumstances: Circumstances) -> list[Alarm]:
    """The alarm of a run that ends while its validation score rises: a quarter of the epochs made it clearly better.

    A run that early stopping ended has no such alarm.
    """
    scores = [report[SCORE] for report in reports if SCORE in report]
    if not MIN_EPOCHS <= len(scores) == circumstances.epochs:
        return []
    first = len(scores) - len(scores) // 4
    before = max(scores[:first])
    scale = 1.0 if before >= 0 else -before  # a score to maximise is a share; a loss or an error may have any size
    gain = (max(scores[first:]) - before) / scale
    if gain < LATE_GAIN:
        return []
    advice = (
        "The validation score still rose in the last quarter of the epochs, so a longer run may be better. "
        "Raise epochs or lr, and do the same for every model that it is compared with."
    )
    return [Alarm(STILL_LEARNING, len(scores), gain, LATE_GAIN, advice, _link(STILL_LEARNING))]


def _link(name: str) -> str:
    """Where the page explains an alarm."""
    return f"docs/collapse.md#{name}"
