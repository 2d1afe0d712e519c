"""Axes of a study's pictures: where values lie on them, and ticks with round numbers.

An `Axis` is one of the upright axes of parallel coordinates; a `Scale` is an ordinary axis of a scatter plot.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from research_eval.analysis.points import is_wide
from research_eval.analysis.study_texts import value_text
from research_eval.analysis.tables import is_score, short_number

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

ABSENT = object()  # in the place of a value: the trial does not have the parameter
MISSING = 0.12  # share of an axis, at its lower end, for trials that do not have the parameter
DISCRETE = 8  # an integer range with fewer steps has a tick for each number
ROOM = 0.07  # share of the range that a scale adds at each end
MOST_TICKS = 6


def on_log_scale(values: Sequence[float], objective: str) -> bool:
    """Whether an axis is logarithmic: for costs that differ by more than a factor of ten, never for scores."""
    representable = min(values) > 1e-100 and max(values) < 1e100  # with room around them
    return representable and is_wide(values) and not is_score(objective)


# ------------------------------------------------------------------------------------------------------- upright axes


@dataclass(frozen=True)
class Axis:
    """One of many upright axes.

    `positions` says where each trial crosses it, from 0 at the bottom to 1 at the top; `ticks` are pairs of a position
    and its text. `is_discrete` is true if many trials share one position.
    """

    label: str
    positions: list[float]
    ticks: list[tuple[float, str]]
    is_discrete: bool


def parameter_axis(label: str, values: Sequence[Any], distribution: BaseDistribution) -> Axis:
    """The axis of a parameter. Trials without the parameter (`ABSENT`) cross it at the bottom, below all values."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        axis = _choice_axis(label, values, distribution.choices)
    else:
        low, high, log = distribution.low, distribution.high, distribution.log  # type: ignore[attr-defined]
        numbers = [math.nan if value is ABSENT else float(value) for value in values]
        few = isinstance(distribution, IntDistribution) and not log and high - low < DISCRETE
        ticks = [float(number) for number in range(low, high + 1)] if few else round_numbers(low, high, log)
        axis = _numeric_axis(label, numbers, (low, high), ticks, log, is_discrete=few)
    if not any(map(math.isnan, axis.positions)):
        return axis
    return Axis(
        label,
        [0.0 if math.isnan(at) else MISSING + (1 - MISSING) * at for at in axis.positions],
        [(0.0, "not used"), *((MISSING + (1 - MISSING) * at, text) for at, text in axis.ticks)],
        axis.is_discrete,
    )


def value_axis(objective: str, values: Sequence[float], everywhere: Sequence[float]) -> Axis:
    """The axis of an objective. It reaches from the lowest to the highest value of `everywhere`."""
    log, ends = on_log_scale(everywhere, objective), (min(everywhere), max(everywhere))
    return _numeric_axis(objective, values, ends, round_numbers(*ends, log), log, is_discrete=False)


def _choice_axis(label: str, values: Sequence[Any], choices: Sequence[Any]) -> Axis:
    """Choices at equal distances, in their order; NaN is the position of an absent value."""
    last = max(len(choices) - 1, 1)
    place = {_key(choice): index / last for index, choice in enumerate(choices)}
    return Axis(
        label,
        [math.nan if value is ABSENT else place[_key(value)] for value in values],
        [(index / last, value_text(choice)) for index, choice in enumerate(choices)],
        is_discrete=True,
    )


def _key(value: Any) -> str:
    """A key that tells choices apart which Python takes for equal, such as 1 and true."""
    return json.dumps(value, default=str)


def _numeric_axis(
    label: str, values: Sequence[float], ends: tuple[float, float], ticks: Sequence[float], log: bool, is_discrete: bool
) -> Axis:
    """An axis between two ends; NaN stays NaN, and equal ends put all values in the middle."""
    low, high = (math.log(end) for end in ends) if log else ends

    def place(value: float) -> float:
        if low == high:
            return 0.5
        return ((math.log(value) if log else value) - low) / (high - low)

    return Axis(
        label,
        [place(value) for value in values],
        list(zip(map(place, ticks), tick_texts(ticks), strict=True)),
        is_discrete,
    )


# -------------------------------------------------------------------------------------------------------------- ticks


def round_numbers(low: float, high: float, log: bool) -> list[float]:
    """A few numbers between the ends that are easy to read.

    On a log scale these are powers of ten, with 3 or with 2 and 5 times them if there are fewer than three powers; a
    short log scale gets the numbers of a linear one.
    """
    from research_eval.system.drawing import MaxNLocator

    if low == high:
        return [low]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) if log else range(0)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / MOST_TICKS)]
    if len(found) == 2:
        return found
    margin = (high - low) * 1e-9  # keeps a tick that rounding has moved past an end
    found = list(map(float, MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)))
    return [value for value in found if low - margin <= value <= high + margin]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Round numbers with as many digits as tell them apart.

    >>> tick_texts([0.998, 0.9985, 0.999]), tick_texts([0, 2500, 5000]), tick_texts([100_000, 100_250])
    (['0.998', '0.9985', '0.999'], ['0', '2.5k', '5k'], ['100k', '100.25k'])
    """
    ticks = [0.0 if abs(tick) < 1e-300 else tick for tick in ticks]
    for digits in range(3, 16):
        if all(math.isclose(float(f"{tick:.{digits}g}"), tick, rel_tol=1e-9) for tick in ticks):
            break
    return [short_number(tick, digits) for tick in ticks]


# ------------------------------------------------------------------------------------------------------ plain scales


@dataclass(frozen=True)
class Scale:
    """What an ordinary axis shows: an interval with room around the values, and ticks with their texts."""

    low: float
    high: float
    log: bool
    ticks: list[float]
    texts: list[str]

    def shows(self, value: float | None) -> bool:
        """Whether the value exists and lies on the axis."""
        return value is not None and self.low <= value <= self.high


def scale_of(values: Sequence[float], objective: str) -> Scale:
    """The scale of an objective, for an axis that shows all these values."""
    low, high = min(values), max(values)
    log = on_log_scale(values, objective)
    if log:
        room = (high / low) ** ROOM
        low, high = low / room, high * room
    else:
        # Equal values leave no range to take a share of: take a tenth of the value, or of 1.
        room = ROOM * (high - low) or abs(high) * 0.1 or 0.1
        low, high = low - room, high + room
    ticks = round_numbers(low, high, log)
    return Scale(low, high, log, ticks, tick_texts(ticks))
