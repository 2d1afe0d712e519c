"""Intervals cover what they say, and agree with scipy and with the definitions."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from research_eval.analysis.statistics import (
    FEWEST,
    SHARE,
    Interval,
    half_width,
    holm,
    mean_interval,
    no_spread,
    paired_difference,
    pareto_front,
    wilson_interval,
)

finite = st.floats(-1e6, 1e6, allow_nan=False)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_t_intervals_cover_the_mean_of_normal_data(seeds: int) -> None:
    samples = np.random.default_rng(seeds).normal(0.7, 0.05, (4000, seeds))
    intervals = [mean_interval(sample) for sample in samples.tolist()]
    covered = np.mean([one is not None and one.low <= 0.7 <= one.high for one in intervals])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("seeds", range(3, 21))
def test_wilson_intervals_cover_the_rate(seeds: int) -> None:
    """Exactly: the probability of the outcomes whose interval holds the rate, over rates of all sizes."""
    rates = np.linspace(0.005, 0.995, 199)
    low, high = np.array([wilson_interval(solved, seeds) for solved in range(seeds + 1)]).T
    holds = (low[:, None] <= rates) & (rates <= high[:, None])
    coverage = (stats.binom.pmf(np.arange(seeds + 1)[:, None], seeds, rates) * holds).sum(0)
    assert 0.92 <= coverage.mean() <= 0.98


@pytest.mark.parametrize(
    ("mean", "size", "least"),
    [(0.5, 20, 0.93), (0.9, 20, 0.93), (0.9, 100, 0.93), (0.99, 20, 0.79), (0.99, 100, 0.92)],
)
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_of_shares_stay_inside_and_cover_no_worse_than_students(
    mean: float, size: float, least: float, seeds: int
) -> None:
    """`size` is the sum of both parameters of the beta distribution. At 0.99 a few seeds hide its long tail."""
    samples = np.random.default_rng(seeds).beta(mean * size, (1 - mean) * size, (2000, seeds)).tolist()
    covered = {}
    for bounds in (None, SHARE):
        intervals = [mean_interval(sample, bounds=bounds) for sample in samples]
        covered[bounds] = np.mean([one is not None and one.low <= mean <= one.high for one in intervals])
        if bounds is not None:
            assert all(one is not None and 0 < one.low < one.high < 1 for one in intervals)
    assert covered[SHARE] >= max(least, covered[None] - 0.003), "but for chance"


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("values", [[0.9, 0.95, 1.0], [0.0, 0.0, 0.0, 0.1], [0.0, 1.0, 1.0]])
def test_the_interval_of_a_share_is_its_definition(values: list[float], confidence: float) -> None:
    """All means that a test with their own variance does not refuse: found here by bisection from the mean outwards."""
    mean, half = np.mean(values), stats.sem(values) * stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    trials = mean * (1 - mean) / half**2  # the effective number over the squared quantile
    found = mean_interval(values, confidence, SHARE)
    assert found is not None
    for end, place in zip((0.0, 1.0), found, strict=True):
        inside, outside = mean, end
        for _ in range(100):
            tried = (inside + outside) / 2
            is_inside = (tried - mean) ** 2 <= tried * (1 - tried) / trials
            inside, outside = (tried, outside) if is_inside else (inside, tried)
        assert place == pytest.approx(inside)
    mirrored = mean_interval([1 - value for value in values], confidence, SHARE)
    assert mirrored == pytest.approx((1 - found.high, 1 - found.low))
    percent = mean_interval([100 * value for value in values], confidence, Interval(0.0, 100.0))
    assert percent == pytest.approx((100 * found.low, 100 * found.high))


def test_bounds_matter_near_them_only() -> None:
    middle = [0.50, 0.51, 0.52]
    assert mean_interval(middle, bounds=SHARE) == pytest.approx(mean_interval(middle), abs=1e-3)
    percent = [93.0, 94.0, 95.0]
    assert mean_interval(percent, bounds=SHARE) == mean_interval(percent), "values outside: these are not the bounds"
    assert mean_interval([1.0] * 5, bounds=SHARE) is None
    assert mean_interval([0.9, 1.0], bounds=SHARE) is None
    assert mean_interval([0.0, 0.0, 5e-324], bounds=SHARE) is None, "rounding is no spread"
    assert mean_interval([0.0, 1.0, 1.0], 1 - 1e-12, SHARE) == pytest.approx((0, 1), abs=1e-9)


def test_one_and_nought_are_a_rate() -> None:
    """Of 0 and 1 the mean is a rate; the interval differs from Wilson's by Student's quantile and N - 1 alone."""
    values = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    confidence = 2 * stats.norm.cdf(stats.t.ppf(0.975, 7) * math.sqrt(8 / 7)) - 1
    assert mean_interval(values, bounds=SHARE) == pytest.approx(wilson_interval(6, 8, confidence))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("values", [[0.1, 0.2, 0.4], [3.0, 1.0, 2.0, 8.0, 5.0]])
def test_the_t_interval_is_that_of_scipy(values: list[float], confidence: float) -> None:
    expected = stats.t.interval(confidence, len(values) - 1, np.mean(values), stats.sem(values))
    assert mean_interval(values, confidence) == pytest.approx(expected)
    assert 2 * half_width(values, confidence) == pytest.approx(expected[1] - expected[0])


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_wilson_interval_is_that_of_scipy(confidence: float) -> None:
    for trials in (1, 2, 5, 30):
        for solved in range(trials + 1):
            expected = stats.binomtest(solved, trials).proportion_ci(confidence, "wilson")
            assert wilson_interval(solved, trials, confidence) == pytest.approx(
                (expected.low, expected.high), abs=1e-12
            )


def test_few_or_equal_values_have_no_interval() -> None:
    assert FEWEST == 3
    assert mean_interval([0.5, 0.9]) is None
    assert mean_interval([]) is None
    assert mean_interval([1.0] * 5) is None
    assert mean_interval([0.1 + 0.2, 0.3, 0.3]) is None, "rounding is no spread"
    assert mean_interval([0.3, 0.3, 0.3 + 1e-9]) is not None
    assert math.isnan(half_width([1.0]))
    assert no_spread([0.0, 0.0])
    assert not no_spread([0.0, 1e-9])


@given(st.lists(finite, max_size=8))
def test_an_interval_is_finite_and_holds_the_mean(values: list[float]) -> None:
    interval = mean_interval(values)
    if interval is not None:
        assert interval.low < np.mean(values) < interval.high
        assert all(map(math.isfinite, interval))


@given(st.lists(st.floats(0, 1), max_size=8))
def test_an_interval_of_shares_holds_the_mean_and_lies_between_0_and_1(values: list[float]) -> None:
    interval = mean_interval(values, bounds=SHARE)
    if interval is not None:
        assert 0 <= interval.low < np.mean(values) < interval.high <= 1


# ---------------------------------------------------------------------------------------------------------- paired


def test_paired_differences_are_those_of_scipy() -> None:
    first, second = [0.91, 0.88, 0.95, 0.9], [0.85, 0.86, 0.9, 0.91]
    found = paired_difference(first, second)
    expected = stats.ttest_rel(first, second)
    assert found.num_pairs == 4
    assert found.mean == pytest.approx(0.03)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    raw = np.mean(np.subtract(first, second)) / np.std(np.subtract(first, second), ddof=1)
    assert found.effect_size == pytest.approx(raw * math.gamma(1.5) / math.gamma(1.0) * math.sqrt(2 / 3))
    assert found.note == ""
    other_way = paired_difference(second, first)
    assert (other_way.mean, other_way.effect_size) == pytest.approx((-0.03, -found.effect_size))
    assert other_way.p_value == pytest.approx(found.p_value)


def test_differences_of_shares_are_cut_where_none_can_be() -> None:
    first, second = [1.0, 0.9, 1.0], [0.0, 0.5, 0.1]
    plain, cut = paired_difference(first, second), paired_difference(first, second, bounds=SHARE)
    assert plain.interval is not None
    assert cut.interval is not None
    assert plain.interval.high > 1
    assert cut.interval == (plain.interval.low, 1)
    assert (cut.mean, cut.p_value, cut.effect_size) == (plain.mean, plain.p_value, plain.effect_size)
    assert paired_difference(second, first, bounds=SHARE).interval == (-1, pytest.approx(-plain.interval.low))
    losses = [9.0, 1.0, 2.0], [0.5, 0.0, 8.0]
    assert paired_difference(*losses, bounds=SHARE) == paired_difference(*losses)


def test_pairing_takes_out_what_the_seeds_have_in_common() -> None:
    hard = [0.2, 0.5, 0.8, 0.95]
    found = paired_difference(
        [value + 0.02 + shift for value, shift in zip(hard, (0, 1e-3, 0, -1e-3), strict=True)], hard
    )
    assert found.p_value is not None
    assert found.p_value < 1e-3
    assert stats.ttest_ind(hard, [value + 0.02 for value in hard]).pvalue > 0.9


@pytest.mark.parametrize(
    ("first", "second", "mean", "words"),
    [
        ([], [], None, "no common seed"),
        ([0.5], [0.4], 0.1, "1 common seed: no interval"),
        ([0.5, 0.7], [0.4, 0.3], 0.25, "2 common seeds: no interval"),
        ([1.0] * 5, [1.0] * 5, 0.0, "every seed has the same difference"),
        ([0.3, 0.5, 0.9], [0.1, 0.3, 0.7], 0.2, "every seed has the same difference"),  # but for rounding
    ],
)
def test_what_does_not_exist_is_said_in_words(
    first: list[float], second: list[float], mean: float | None, words: str
) -> None:
    found = paired_difference(first, second)
    assert found.mean == (None if mean is None else pytest.approx(mean))
    assert (found.interval, found.effect_size, found.p_value) == (None, None, None)
    assert found.note.startswith(words)


def test_false_alarms_are_as_rare_as_promised_and_effect_sizes_have_no_bias() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.normal(0, 1, (3000, 2, 5))
    alarms = [(paired_difference(*pair).p_value or 1) < 0.05 for pair in pairs.tolist()]
    assert 0.04 <= np.mean(alarms) <= 0.06
    effects = [paired_difference(one, [0.0] * 5).effect_size for one in rng.normal(0.8, 1, (4000, 5)).tolist()]
    assert np.mean([effect or 0 for effect in effects]) == pytest.approx(0.8, abs=0.03)


@given(st.lists(st.floats(0, 1), max_size=7))
def test_holm_is_its_definition(p_values: list[float]) -> None:
    adjusted, count = holm(p_values), len(p_values)
    order = sorted(range(count), key=p_values.__getitem__)
    for place, index in enumerate(order):
        expected = max(min(1.0, (count - before) * p_values[order[before]]) for before in range(place + 1))
        assert adjusted[index] == expected


# ---------------------------------------------------------------------------------------------------------- Pareto


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=9))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    front = pareto_front([cost for cost, _ in points], [score for _, score in points])

    def dominated(one: tuple[int, int]) -> bool:
        return any(other != one and other[0] <= one[0] and other[1] >= one[1] for other in points)

    assert sorted(front) == [index for index, point in enumerate(points) if not dominated(point)]
    assert all(points[a] <= points[b] for a, b in pairwise(front))
