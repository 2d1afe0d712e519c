"""Comparing two runs: settings, environments and metrics that differ. Pure functions of stored values."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from research_eval.store.values import canonical_json

MISSING = "(absent)"


class Change(NamedTuple):
    """A setting by its dotted path; a side that lacks it has the value MISSING."""

    name: str
    left: Any
    right: Any


class MetricDifference(NamedTuple):
    """The largest absolute difference of any entry; infinite if the values cannot be subtracted (other shapes)."""

    name: str
    left: Any
    right: Any
    difference: float


def json_object(text: str | None) -> dict[str, Any]:
    """A stored JSON object; any other text, which a foreign database may hold, is kept under the key "text"."""
    try:
        value = json.loads(text or "{}")
        flatten(value)  # raises RecursionError here, and not in a caller, if the value is nested too deeply
    except (ValueError, RecursionError):
        return {"text": text}
    return value if isinstance(value, dict) else {"text": text}


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value; lists are values.

    >>> flatten({"a": {"b": 1, "c": [2]}})
    {'a.b': 1, 'a.c': [2]}
    """
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    return {
        name: leaf for key in value for name, leaf in flatten(value[key], f"{path}.{key}" if path else str(key)).items()
    }


def changes(left: dict[str, Any], right: dict[str, Any]) -> list[Change]:
    """The settings that differ, by name."""
    flat_left, flat_right = flatten(left), flatten(right)
    pairs = [
        Change(name, flat_left.get(name, MISSING), flat_right.get(name, MISSING))
        for name in sorted(flat_left.keys() | flat_right.keys())
    ]
    return [pair for pair in pairs if canonical_json(pair.left) != canonical_json(pair.right)]


def environment_changes(left: dict[str, Any], right: dict[str, Any]) -> list[Change]:
    """What differs in the environments of two runs: first the data, because other data explain everything else.

    The study of a trial is no part of its environment.
    """
    found = changes(*({name: value for name, value in side.items() if name != "study"} for side in (left, right)))
    return sorted(found, key=lambda change: change.name.split(".")[0] != "data")


def data_changed(found: list[Change]) -> bool:
    """Whether the two runs had other data: the content hashes of both are known and differ."""
    return any(change.name.startswith("data.sha256") and MISSING not in (change.left, change.right) for change in found)


def difference(left: Any, right: Any) -> float:
    """The largest absolute difference; 0 for equal values (NaN equals NaN), infinite if they cannot be subtracted.

    >>> difference([1.0, [2.0]], [1.5, [2.0]]), difference([1.0], [1.0, 2.0]), difference(math.nan, math.nan)
    (0.5, inf, 0.0)
    """
    if left == right:
        return 0.0
    if isinstance(left, int | float) and isinstance(right, int | float):
        if math.isnan(left) and math.isnan(right):
            return 0.0
        gap = abs(left - right)
        return math.inf if math.isnan(gap) else float(gap)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        return max(map(difference, left, right), default=0.0)
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return max((difference(left[key], right[key]) for key in left), default=0.0)
    return math.inf


def metric_differences(left: dict[str, Any], right: dict[str, Any]) -> list[MetricDifference]:
    """The metrics that differ, in the order of `left`; a side that lacks a metric has the value MISSING."""
    pairs = [
        MetricDifference(name, one, other, difference(one, other))
        for name in dict.fromkeys([*left, *right])
        for one, other in [(left.get(name, MISSING), right.get(name, MISSING))]
    ]
    return [pair for pair in pairs if pair.difference > 0]
