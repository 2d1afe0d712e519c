"""What the scores of a comparison say: which arm is better, which ones are equal, and what is open.

An arm is a model with its sizes and its settings. All arms have scores for the same seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from research_eval.analysis.statistics import Interval, PairedDifference, equivalence, holm, paired_difference

LEVEL = 0.05  # of a claim, over all pairs together
MARGIN = 0.01  # scores that differ by less count as equal
# What the choice among noisy trials may cost an arm, as a share of the noise of one trial. With 0.35, at most 5 % of
# comparisons of equal arms make a claim, however much the rate and the settings matter (tests/test_comparing.py).
COST_OF_CHOICE = 0.35


@dataclass(frozen=True)
class Verdict:
    """Two arms, the differences "first minus second" of their test scores over the seeds, and what follows.

    `adjusted_p` is Holm's over all pairs of the comparison. `equal_p` is that of a difference outside the margin.
    """

    first: str
    second: str
    difference: PairedDifference
    equal_p: float | None
    adjusted_p: float | None = None
    text: str = "open"


def verdicts(
    scores: Mapping[str, Sequence[float]],
    *,
    sign: int = 1,
    margin: float = MARGIN,
    confidence: float = 1 - LEVEL,
    bounds: Interval | None = None,
    noise: Mapping[str, float] | None = None,
) -> list[Verdict]:
    """Compare every two arms. `sign` is 1 if larger scores are better, else -1.

    All seeds of an arm have the settings that its tuning has chosen, so the seeds do not show how far that choice was
    luck. `noise` is the standard deviation of the score of one trial of each arm; what it may have cost widens the
    tests and the intervals.

    A claim that an arm is better needs an adjusted p-value below `LEVEL`. Then the chance of any false claim is at most
    `LEVEL`, however many arms there are.
    """
    found = []
    costs = {name: (COST_OF_CHOICE * (noise or {}).get(name, 0.0)) ** 2 for name in scores}
    for first, second in combinations(scores, 2):
        if not all(map(math.isfinite, (*scores[first], *scores[second]))):
            found.append(Verdict(first, second, PairedDifference(0, None, note="a seed did not finish"), None))
            continue
        pair, extra = (scores[first], scores[second]), costs[first] + costs[second]
        difference = paired_difference(*pair, confidence, bounds, extra)
        found.append(Verdict(first, second, difference, equivalence(*pair, margin, extra)))
    adjusted = iter(holm([one.difference.p_value for one in found if one.difference.p_value is not None]))
    found = [replace(one, adjusted_p=None if one.difference.p_value is None else next(adjusted)) for one in found]
    return [replace(one, text=_text(one, sign, margin)) for one in found]


def _text(one: Verdict, sign: int, margin: float) -> str:
    """The claim in words; "open" if the seeds do not decide it."""
    mean = one.difference.mean
    if mean is None or one.adjusted_p is None:
        return one.difference.note or "open"
    if one.adjusted_p < LEVEL:
        return f"{one.first if sign * mean > 0 else one.second} is better"
    if one.equal_p is not None and one.equal_p < LEVEL:
        return f"equal within {margin:g}"
    return "open"
