"""The search for the sizes with which a model costs what another one costs. Nothing here knows what a cost is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Sizes = dict[str, Any]  # options of a model
Cost = Callable[[Sizes], float | None]  # None: there is no such model

MAX_MODELS = 60  # coarse sizes that are tried, each with all fine sizes
LARGEST = 2.0**16


class Fine(NamedTuple):
    """The option that is searched whole number by whole number. The cost must not fall when it grows."""

    name: str
    low: int
    high: int


class Coarse(NamedTuple):
    """An option with few values, the best one first."""

    name: str
    values: Sequence[int]


class Found(NamedTuple):
    """The nearest sizes, and what they cost."""

    sizes: Sizes
    cost: float

    def error(self, target: float) -> float:
        """The distance to the target, as a share of it."""
        return abs(self.cost / target - 1)


def nearest(cost: Cost, fine: Callable[[Sizes], Fine], coarse: Sequence[Coarse], target: float, tol: float) -> Found:
    """The first sizes within `tol` of the target, or the nearest ones if there are none.

    The coarse sizes are tried from the first values on; `fine` says what is searched beside them. Raises ValueError if
    no model could be built.
    """
    best: Found | None = None
    for sizes in itertools.islice(_by_distance(coarse), MAX_MODELS):
        one = _bisected(cost, sizes, fine(sizes), target)
        if one is not None and (best is None or one.error(target) < best.error(target)):
            best = one
        if best is not None and best.error(target) <= tol:
            break
    if best is None:
        raise ValueError("no model of these sizes can be built")
    return best


def _by_distance(coarse: Sequence[Coarse]) -> Iterator[Sizes]:
    """All combinations of the values, those that are near the first ones first."""
    numbered = [list(enumerate(one.values)) for one in coarse]
    for chosen in sorted(itertools.product(*numbered), key=lambda pairs: sum(rank for rank, _ in pairs)):
        yield {one.name: value for one, (_, value) in zip(coarse, chosen, strict=True)}


def _bisected(cost: Cost, sizes: Sizes, fine: Fine, target: float) -> Found | None:
    """The value of the fine size whose cost is nearest to the target; None if there are no such models.

    A cost is about a straight line between two sizes. So every other step looks where that line meets the target, which
    takes three steps mostly, and the steps between halve what is left, so that no cost takes many.
    """
    low, high = fine.low, fine.high
    found = {value: cost({**sizes, fine.name: value}) for value in (low, high)}
    for step in itertools.count():
        at_low, at_high = found[low], found[high]
        if high - low <= 1 or (at_low is not None and target <= at_low) or (at_high is not None and at_high <= target):
            break
        middle = (low + high) // 2
        if step % 2 == 0 and at_low is not None and at_high is not None:
            share = (target - at_low) / (at_high - at_low)
            middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        found[middle] = its_cost = cost({**sizes, fine.name: middle})
        if its_cost is None:
            return None
        low, high = (middle, high) if its_cost < target else (low, middle)
    known = [Found({**sizes, fine.name: value}, its_cost) for value, its_cost in found.items() if its_cost is not None]
    return min(known, key=lambda one: one.error(target), default=None)


def around(value: int, step: int, reach: float) -> list[int]:
    """The multiples of `step` from value / reach to value x reach, the nearest to the value first."""
    first, last = math.ceil(value / reach / step), math.floor(value * reach / step)
    multiples = [step * number for number in range(max(first, 1), min(last, int(LARGEST)) + 1)]
    return sorted({*multiples, value}, key=lambda other: (abs(math.log(other / value)), other))
