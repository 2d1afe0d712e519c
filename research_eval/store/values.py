"""Values as JSON text: configs as text that is equal for equal configs, metrics as JSON that every parser reads."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any, NewType

from research_eval.errors import ConfigError
from research_eval.wording import plain

# Metrics as `normal_metrics` returns them. What stores metrics asks for this type, so the type checker refuses metrics
# that are not normalised, and nothing normalises them a second time to be safe.
NormalMetrics = NewType("NormalMetrics", dict[str, Any])

# Standard JSON has no numbers for these. PostgreSQL and most parsers refuse the words that Python would write.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values: sorted keys, ASCII.

    >>> canonical_json({"b": 1, "a": 0.5})
    '{"a": 0.5, "b": 1}'
    """
    return json.dumps(value, sort_keys=True, default=plain)


def strict_json(value: Any) -> str:
    """JSON text that every parser accepts: non-finite numbers are the strings "NaN", "Infinity" and "-Infinity".

    >>> strict_json([0.5, float("nan")])
    '[0.5, "NaN"]'
    """
    return json.dumps(to_strict_json(value))


def to_strict_json(value: Any) -> Any:
    """Lists and dicts of plain values, non-finite numbers as strings. Raises TypeError for what JSON cannot hold."""
    value = plain(value)
    if isinstance(value, dict):
        return {str(key): to_strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_strict_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} is not a number, text, list or dict")


def from_strict_json(value: Any) -> Any:
    """The inverse of `to_strict_json`: the three strings become numbers again."""
    if isinstance(value, dict):
        return {key: from_strict_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_strict_json(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def normal_metrics(metrics: dict[str, Any]) -> NormalMetrics:
    """Metrics in the form in which they are stored. Raises ConfigError for a value that JSON cannot hold."""
    return NormalMetrics({name: _normal_metric(name, value) for name, value in metrics.items()})


def _normal_metric(name: str, value: Any) -> Any:
    """A float if the value is a number or None (NaN: not measured), otherwise lists, dicts or text for strict JSON."""
    value = plain(value)
    if value is None:
        return math.nan
    if isinstance(value, (int, float)):
        return float(value)
    try:
        return to_strict_json(value)
    except TypeError as error:
        raise ConfigError(f"metric {name!r}: {error}. Return numbers or lists of numbers.") from error


def tags_text(tags: Collection[str]) -> str | None:
    """The tags of a run as they are stored: a sorted JSON list, None without tags.

    >>> tags_text({"paper", "baseline"}), tags_text([])
    ('["baseline", "paper"]', None)
    """
    return canonical_json(sorted(set(tags))) if tags else None


def tags_of(text: Any) -> list[str]:
    """The inverse of `tags_text`; an adopted database may hold any text, which is no tag."""
    try:
        found = json.loads(text or "[]")
    except (ValueError, TypeError, RecursionError):
        return []
    return [tag for tag in found if isinstance(tag, str)] if isinstance(found, list) else []
