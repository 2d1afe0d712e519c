"""Intervals, rates and tests for small numbers of runs. The functions take sequences of numbers and return numbers.

If a number does not exist (too few runs, no spread), the result is None, never a zero width or a p-value of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, stdev, variance
from typing import NamedTuple

CONFIDENCE = 0.95
FEWEST = 3  # a t-interval of two values is valid, but too wide to be of use
_ROUNDING = 1e-12  # relative: differences of equal scores may differ in their last digits


class Interval(NamedTuple):
    """Both ends of an interval."""

    low: float
    high: float


SHARE = Interval(0.0, 1.0)  # the bounds of accuracy and F1


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


def mean_interval(
    values: Sequence[float], confidence: float = CONFIDENCE, bounds: Interval | None = None
) -> Interval | None:
    """The interval of the mean; None for fewer than `FEWEST` values, or for values without spread.

    Without `bounds` it is Student's t-interval. With `bounds` that hold all values it is Wilson's, which lies within
    them: the mean counts as a rate of as many trials as would give it this standard error (their "effective" number,
    Korn and Graubard, 1998), with Student's quantile in place of the normal one. docs/LOG.md has the coverage of both.

    >>> [round(bound, 3) for bound in mean_interval([0.96, 0.99, 1.0], bounds=SHARE)]
    [0.832, 0.999]
    """
    if not _is_within(values, bounds):
        bounds = None  # such as an accuracy in percent
    scale = None if bounds is None else bounds.high - bounds.low
    if len(values) < FEWEST or no_spread(values, scale):
        return None
    mean, half = fmean(values), half_width(values, confidence)
    if bounds is None or scale is None:
        return Interval(mean - half, mean + half)
    rate = (mean - bounds.low) / scale  # neither 0 nor 1, because the values have a spread
    low, high = _wilson(rate, (half / scale) ** 2 / (rate * (1 - rate)))
    return Interval(bounds.low + scale * low, bounds.low + scale * high)


def _is_within(values: Sequence[float], bounds: Interval | None) -> bool:
    """Whether there are bounds, and they hold all values."""
    return bounds is not None and all(bounds.low <= value <= bounds.high for value in values)


def wilson_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a rate (Wilson, 1927): sensible at 0 and 1, and for a handful of trials.

    >>> [round(bound, 4) for bound in wilson_interval(5, 5)]
    [0.5655, 1.0]
    """
    return _wilson(successes / trials, _z(confidence) ** 2 / trials)


def share_interval(rate: float, variance: float, trials: int, confidence: float = CONFIDENCE) -> Interval | None:
    """Wilson's interval of a rate whose estimate has this variance, with the normal quantile; for many trials.

    With the variance of a binomial rate, p (1 - p) / trials, it is `wilson_interval`. At 0 and 1 nothing varies, and
    the number of trials counts. None if nothing varies in between.

    >>> share_interval(0.9, 0.9 * 0.1 / 50, 50) == wilson_interval(45, 50)
    True
    """
    spread = rate * (1 - rate)
    if spread > 0 and variance <= 0:
        return None
    return _wilson(rate, _z(confidence) ** 2 * (variance / spread if spread > 0 else 1 / trials))


def normal_interval(mean: float, variance: float, trials: int, confidence: float = CONFIDENCE) -> Interval | None:
    """The interval of a mean whose estimate has this variance, for many trials; None if nothing varies."""
    half = _z(confidence) * math.sqrt(variance)
    return Interval(mean - half, mean + half) if half > 0 and trials > 1 else None


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """The interval of the median between two of the sorted values, for any continuous distribution.

    The median lies below the k-th value or above the k-th last one with a binomial probability; k is the largest for
    which it is small enough. None if there are too few values: for 95 %, fewer than six.

    >>> median_interval([5, 1, 4, 2, 6, 3]), median_interval([5, 1, 4, 2, 3])
    (Interval(low=1, high=6), None)
    """
    ordered, outside, rank = sorted(values), 0.5 ** len(values), 0
    while 2 * outside <= 1 - confidence and rank < len(values) / 2:
        rank += 1
        outside += math.comb(len(values), rank) / 2 ** len(values)  # of whole numbers: floats end at 2**1024
    return Interval(ordered[rank - 1], ordered[-rank]) if rank else None


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test: samples that only one of two models answers correctly.

    If both models are equally good, each of them is the right one with probability 1/2.

    >>> round(mcnemar(1, 9), 6)
    0.021484
    """
    from scipy.special import bdtr

    fewer = min(only_first, only_second)
    return min(1.0, 2 * float(bdtr(fewer, only_first + only_second, 0.5)))


def _wilson(rate: float, weight: float) -> Interval:
    """Wilson's interval of a rate; `weight` is the squared quantile over the number of trials.

    Its ends solve (p - rate)^2 = weight p (1 - p). In this form rounding moves neither of them out of 0 and 1.
    """
    width = weight / 2 + math.sqrt(weight * rate * (1 - rate) + weight * weight / 4)
    return Interval(rate * rate / (rate + width), 1 - (1 - rate) ** 2 / (1 - rate + width))


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
    first: Sequence[float],
    second: Sequence[float],
    confidence: float = CONFIDENCE,
    bounds: Interval | None = None,
    extra_variance: float = 0.0,
) -> PairedDifference:
    """Compare two sequences whose values form pairs, such as the scores of two configs with equal seeds.

    With `bounds` that hold all scores, the t-interval is cut where no difference of such scores can be.
    `extra_variance` is added to the variance of the mean difference. It is that of an error which all pairs have in
    common, so that their spread does not show it; for example an unlucky choice of settings.
    """
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
    widened = math.sqrt(1 + extra_variance * pairs / variance(differences))
    interval = mean_interval(differences, confidence)
    if interval is not None and extra_variance:
        interval = Interval(*(mean + widened * (end - mean) for end in interval))
    if interval is not None and bounds is not None and _is_within((*first, *second), bounds):
        width = bounds.high - bounds.low
        interval = Interval(max(interval.low, -width), min(interval.high, width))
    return PairedDifference(
        pairs,
        mean,
        interval,
        effect * _hedges(freedom),
        2 * _t_tail(abs(effect) * math.sqrt(pairs) / widened, freedom),
    )


def equivalence(
    first: Sequence[float], second: Sequence[float], margin: float, extra_variance: float = 0.0
) -> float | None:
    """The p-value of "the mean difference of the pairs is at least `margin`": the larger one of two one-sided t-tests.

    A small value says that the two are equal within the margin (TOST, Schuirmann, 1987). None for fewer than `FEWEST`
    pairs, or for pairs without spread. `extra_variance` is as in `paired_difference`.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if len(differences) < FEWEST or no_spread(differences, max(map(abs, (*first, *second)))):
        return None
    error = math.sqrt(variance(differences) / len(differences) + extra_variance)
    return _upper_tail((margin - abs(fmean(differences))) / error, len(differences) - 1)


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


def _z(confidence: float) -> float:
    """The factor of the standard error for a two-sided interval of many values."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _hedges(freedom: int) -> float:
    """The exact factor J that removes the bias of Cohen's d in small samples (Hedges, 1981)."""
    return math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) * math.sqrt(2 / freedom)


@lru_cache(maxsize=1024)
def _t_quantile(confidence: float, freedom: int) -> float:
    """The factor of the standard error for a two-sided interval."""
    from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

    return float(stdtrit(freedom, (1 + confidence) / 2))


def _upper_tail(t: float, freedom: int) -> float:
    """The probability that Student's t is larger than `t`, which may have any sign."""
    return _t_tail(t, freedom) if t >= 0 else 1 - _t_tail(-t, freedom)


def _t_tail(t: float, freedom: int) -> float:
    """The probability that Student's t is larger than `t`, which is positive."""
    from scipy.special import stdtr

    return float(stdtr(freedom, -t))
