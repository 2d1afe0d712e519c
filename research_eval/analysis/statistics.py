"""Intervals, rates and tests for small numbers of runs. The functions take sequences of numbers and return numbers.

If a number does not exist (too few runs, no spread), the result is None, never a zero width or a p-value of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

CONFIDENCE = 0.95
FEWEST = 3  # a t-interval of two values is valid, but too wide to be of use
_ROUNDING = 1e-12  # relative: differences of equal scores may differ in their last digits


class Interval(NamedTuple):
    """Both ends of an interval."""

    low: float
    high: float


def no_spread(values: Sequence[float], scale: float | None = None) -> bool:
    """Whether all values are the same up to rounding.

    `scale` is the size of the numbers that the values were computed from (default: of the values themselves).
    """
    size = max(map(abs, values)) if scale is None else scale
    return max(values) - min(values) <= _ROUNDING * size


def half_width(values: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """Half the width of Student's t-interval of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return _t_quantile(confidence, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Student's t-interval of the mean; None for fewer than `FEWEST` values, or for values without spread."""
    if len(values) < FEWEST or no_spread(values):
        return None
    mean, half = fmean(values), half_width(values, confidence)
    return Interval(mean - half, mean + half)


def wilson_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a rate (Wilson, 1927): sensible at 0 and 1, and for a handful of trials.

    >>> [round(bound, 4) for bound in wilson_interval(5, 5)]
    [0.5655, 1.0]
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, weight = successes / trials, z * z / trials
    centre = (rate + weight / 2) / (1 + weight)
    half = z * math.sqrt(rate * (1 - rate) / trials + weight / trials / 4) / (1 + weight)
    low = 0.0 if successes == 0 else centre - half  # exactly 0, because rounding would leave a tiny number
    return Interval(low, 1.0 if successes == trials else centre + half)


@dataclass(frozen=True)
class PairedDifference:
    """First minus second over the pairs. A number that does not exist is None, and `note` says why."""

    num_pairs: int
    mean: float | None
    interval: Interval | None = None
    effect_size: float | None = None  # Cohen's d of the differences, without its bias in small samples (Hedges' g)
    p_value: float | None = None  # of the paired t-test, two-sided
    note: str = ""


def paired_difference(
    first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE
) -> PairedDifference:
    """Compare two sequences whose values form pairs, such as the scores of two configs with equal seeds."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    pairs = len(differences)
    if not pairs:
        return PairedDifference(0, None, note="no common seed")
    mean = fmean(differences)
    if pairs < FEWEST:
        return PairedDifference(pairs, mean, note=f"{pairs} common seed{'s'[: pairs - 1]}: no interval, no test")
    if no_spread(differences, max(map(abs, (*first, *second)))):
        return PairedDifference(pairs, mean, note="every seed has the same difference: no interval, no test")
    freedom = pairs - 1
    effect = mean / stdev(differences)
    return PairedDifference(
        pairs,
        mean,
        mean_interval(differences, confidence),
        effect * _hedges(freedom),
        2 * _t_tail(abs(effect) * math.sqrt(pairs), freedom),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm, 1979): the chance of any false positive stays below the level.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Indices of the points that no other point dominates, cheapest first.

    A point dominates another one if it is at least as cheap and as good, and better in at least one of the two.

    >>> pareto_front([3, 1, 2, 2], [0.9, 0.5, 0.4, 0.8])
    [1, 3, 0]
    """
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], -scores[index])):
        last = front[-1] if front else None
        equal = last is not None and (costs[last], scores[last]) == (costs[index], scores[index])
        if last is None or scores[index] > scores[last] or equal:
            front.append(index)
    return front


def _hedges(freedom: int) -> float:
    """The exact factor J that removes the bias of Cohen's d in small samples (Hedges, 1981)."""
    return math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) * math.sqrt(2 / freedom)


@lru_cache(maxsize=1024)
def _t_quantile(confidence: float, freedom: int) -> float:
    """The factor of the standard error for a two-sided interval."""
    from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

    return float(stdtrit(freedom, (1 + confidence) / 2))


def _t_tail(t: float, freedom: int) -> float:
    """The probability that Student's t is larger than `t`, which is positive."""
    from scipy.special import stdtr

    return float(stdtr(freedom, -t))
