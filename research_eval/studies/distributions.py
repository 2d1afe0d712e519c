"""What can be done with a distribution of Optuna without a sampler: test a value, draw at random, list a grid.

`Pick` is the way in which a search space asks for values: `pick(name, distribution)` returns one. A sampler answers it,
or a known config, or a random generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

GRID_POINTS = 3  # of an interval without a step

Pick = Callable[[str, BaseDistribution], Any]


class Infeasible(Exception):
    """The values chosen so far leave none for another parameter."""


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a sampler could draw the value. Unlike in Python, 1, 1.0 and true are different choices."""
    if isinstance(distribution, CategoricalDistribution):
        return any(type(value) is type(choice) and value == choice for choice in distribution.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if isinstance(distribution, IntDistribution) and value != int(value):
        return False
    # A value that is a sum of steps may differ from an exact multiple by rounding.
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return bool(distribution.low <= value <= distribution.high and abs(steps - round(steps)) < 1e-8)


def known_values(params: Mapping[str, Any]) -> Pick:
    """A `Pick` that answers with known values."""
    return lambda name, _distribution: params[name]


def random_pick(rng: np.random.Generator) -> Pick:
    """A `Pick` that draws at random: uniformly, on a log scale if the distribution has one."""

    def pick(_name: str, distribution: BaseDistribution) -> Any:
        if isinstance(distribution, CategoricalDistribution):
            return distribution.choices[rng.integers(len(distribution.choices))]
        assert isinstance(distribution, IntDistribution | FloatDistribution)
        low, high, step = distribution.low, distribution.high, distribution.step
        if distribution.log:
            value = math.exp(rng.uniform(math.log(low), math.log(high)))
            return round(value) if isinstance(distribution, IntDistribution) else min(max(value, low), high)
        if step:
            return low + step * int(rng.integers(round((high - low) / step), endpoint=True))
        return float(rng.uniform(low, high))

    return pick


def grid_values(distribution: BaseDistribution) -> list[Any]:
    """All values of a finite distribution; of any other one `GRID_POINTS` values at equal distances, ends included.

    On a log scale the distances of the logarithms are equal.
    """
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.step and not distribution.log:
        count = round((high - low) / distribution.step) + 1
        return list(dict.fromkeys(min(low + index * distribution.step, high) for index in range(count)))
    shares = [index / (GRID_POINTS - 1) for index in range(GRID_POINTS)]
    if distribution.log:
        points = [low * (high / low) ** share for share in shares[:-1]] + [high]
    else:
        points = [low + (high - low) * share for share in shares[:-1]] + [high]
    if isinstance(distribution, IntDistribution):
        points = [round(point) for point in points]
    return list(dict.fromkeys(points))
