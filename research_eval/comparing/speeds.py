"""Whether one model is as fast as another, with an interval, and which FLOPs to try next if it is not."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import numpy as np

from research_eval.analysis.statistics import median_interval
from research_eval.training.latency import Timed

FEWEST, MOST = 8, 2048  # rounds in which both models are timed
PASSES = 4  # of each model in a round
SECONDS = 5.0  # no more rounds after this time
LONGER = 45.0  # the same for a model that seems as fast: its interval has to become narrow
CONFIDENCE = 0.99  # of the interval, which is looked at after 8, 16, 32, ... rounds
SLOPE = 0.7  # of log time over log FLOPs, as long as one model only has been timed
SLOPES = (0.05, 1.2)  # noise may give any slope to two models that lie close together
LARGEST_STEP = math.log(8)
MARGIN = 0.05  # of the way between two models, by which a guess keeps off both


class Speed(NamedTuple):
    """The time of a model as a multiple of another one's, with its interval, and the milliseconds of the other one."""

    ratio: float
    low: float
    high: float
    milliseconds: float

    def is_within(self, tol: float) -> bool:
        """Whether the whole interval is within the tolerance."""
        return 1 - tol <= self.low and self.high <= 1 + tol

    def is_narrow(self, tol: float) -> bool:
        """Whether the interval is so narrow that a model that is nearer would be called as fast."""
        return self.high - self.low <= tol

    def is_unknown(self, tol: float) -> bool:
        """Whether the model seems as fast, and the interval is so wide that no model could be called so."""
        return abs(self.ratio - 1) <= tol and self.high - self.low > 2 * tol

    def is_outside(self, tol: float) -> bool:
        """Whether no part of the interval is within the tolerance."""
        return self.high < 1 - tol or self.low > 1 + tol


def compare_speeds(first: Timed, second: Timed, tol: float) -> Speed:
    """Time both models in turn until it is certain whether the second one is as fast as the first one.

    In a round both go over the batches PASSES times: first, second, second, first, and so on. The fastest pass over a
    batch counts, because other programs can only slow a model down. The number of rounds is doubled until the interval
    of the median ratio is inside or outside of the tolerance, or narrow, or until the time is up; a model that seems as
    fast has more of it.
    """
    ratios: list[float] = []
    seconds: list[float] = []  # of the first model
    begun, wanted = time.monotonic(), FEWEST
    while True:
        while len(ratios) < wanted:
            passes: tuple[list[list[float]], ...] = [], []
            for number in range(2 * PASSES):
                place = (number + 1) // 2 % 2  # 0, 1, 1, 0, 0, 1, 1, ...
                passes[place].append((first, second)[place].repetition())
            one, two = (float(np.min(seconds_PK, 0).sum()) for seconds_PK in passes)
            ratios.append(two / one)
            seconds.append(one)
        interval = median_interval(ratios, CONFIDENCE)
        assert interval is not None, "there are enough rounds"
        speed = Speed(median(ratios), *interval, 1000 * median(seconds) / len(first.batches))
        is_late = time.monotonic() - begun > (LONGER if abs(speed.ratio - 1) <= tol else SECONDS)
        if speed.is_within(tol) or speed.is_outside(tol) or speed.is_narrow(tol) or wanted >= MOST or is_late:
            return speed
        wanted *= 2


@dataclass
class Bracket:
    """The search for the FLOPs with which a model is as fast as another one, from pairs of FLOPs and ratios of times.

    Time grows with FLOPs, by an unknown curve: flat where the calls cost most, steep where the arithmetic does.
    """

    start: float
    _points: list[tuple[float, float]] = field(default_factory=list)  # log FLOPs, log ratio

    def add(self, flops: float, ratio: float) -> None:
        """Enter what was measured."""
        self._points.append((math.log(flops), math.log(ratio)))

    def proposals(self) -> list[float]:
        """FLOPs to try next, the best guess first."""
        if not self._points:
            return [self.start]
        below = max((point for point in self._points if point[1] <= 0), default=None)
        above = min((point for point in self._points if point[1] > 0), default=None)
        if below is None or above is None:
            end = below or above
            assert end is not None, "a point is on one side"
            return [math.exp(self._beyond(end))]
        middle = (below[0] + above[0]) / 2
        if below[0] >= above[0]:  # noise, or a size that is bad for the machine
            return [math.exp(middle), math.exp(self._beyond(below)), math.exp(self._beyond(above))]
        share = -below[1] / (above[1] - below[1])
        guess = below[0] + min(max(share, MARGIN), 1 - MARGIN) * (above[0] - below[0])
        return [math.exp(guess), math.exp(middle)]

    def _beyond(self, end: tuple[float, float]) -> float:
        """The log FLOPs that the largest model that is too fast, or the smallest one that is too slow, points to."""
        slope, others = SLOPE, [point for point in self._points if point[0] != end[0]]
        if others:
            other = min(others, key=lambda point: abs(point[0] - end[0]))
            measured = (other[1] - end[1]) / (other[0] - end[0])
            slope = min(max(measured, SLOPES[0]), SLOPES[1]) if measured > 0 else SLOPE
        return end[0] + min(max(-end[1] / slope, -LARGEST_STEP), LARGEST_STEP)
