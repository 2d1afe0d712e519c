"""The choice of a learning rate from a grid that grows until the best rate is inside."""

from __future__ import annotations

from collections.abc import Mapping


def best(scores: Mapping[float, float]) -> float:
    """The rate with the highest score, the lowest one if several have it."""
    return max(sorted(scores), key=scores.__getitem__)


def beyond(scores: Mapping[float, float]) -> float | None:
    """The next rate behind the end of the grid that is the best one; None if the best one is inside."""
    return {min(scores): min(scores) / 2, max(scores): max(scores) * 2}.get(best(scores))
