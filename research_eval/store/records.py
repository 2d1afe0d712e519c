"""What the store returns and is asked: rows of runs, points of time series, and the filter of a list of runs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

# The life of a run. It is inserted as "running". It ends as
#   finished      with metrics
#   failed        with an exception, whose text is in `error`
#   interrupted   by a signal; a run whose process ended without a word is read as interrupted too
#   pruned        by the study whose trial it is
#   diverged      with a loss that is not finite
# and `--resume` sets it to "running" again.
STATUSES = ("running", "finished", "failed", "interrupted", "pruned", "diverged")

# Which runs a list has, by whether they are archived or in the trash.
ACTIVE, ARCHIVED, DELETED = "active", "archived", "deleted"
KEPT = "kept"  # active or archived
HIDDEN = "hidden"  # archived or deleted
ALL = "all"

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


class HistoryRow(NamedTuple):
    """One point of a time series; `step` counts optimiser steps, `epoch` may be fractional."""

    step: int
    epoch: float
    name: str
    value: float


class RunRow(NamedTuple):
    """A run as the analysis reads it, thousands at once; `metrics` holds the requested metrics that are numbers."""

    experiment_id: str
    experiment_name: str
    model_type: str
    status: str
    seed: int | None  # None in a database that an earlier program made
    config_json: str
    metrics: dict[str, float]
    data_sha256: str | None = None  # None if it is unknown


class MetricSummary(NamedTuple):
    """A metric over many runs; `low` and `high` are None if no value is a number, as with lists."""

    name: str
    num_runs: int
    low: float | None
    high: float | None


class RunRecord(NamedTuple):
    """Everything that the store holds about a run, as it is copied from one store to another.

    The row of `experiments` by column, the metrics in their order, the history by step and name.
    """

    experiment: dict[str, Any]
    metrics: dict[str, Any]
    history: list[HistoryRow]


@dataclass(frozen=True)
class RunFilter:
    """Which runs; a field that is None restricts nothing. A run must meet all of it.

    `name` is a pattern for the name of the experiment: `*` stands for any characters, `?` for one. `tags` must all be
    on the run. `where` compares metrics that are numbers: (name, operator of COMPARISONS, number). `config` compares
    values of the config: (dotted path, operator, value). A run that one of `exclude` describes is left out. `ids` are
    complete ids. `view` is one of the constants above.
    """

    dataset_name: str | None = None
    model_type: str | None = None
    status: str | None = None
    experiment_name: str | None = None
    run_type: str | None = None
    study: str | None = None
    since: datetime | None = None
    where: tuple[tuple[str, str, float], ...] = ()
    until: datetime | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    config: tuple[tuple[str, str, Any], ...] = ()
    exclude: tuple[RunFilter, ...] = ()
    ids: tuple[str, ...] | None = None
    view: str = ACTIVE


ACTIVE_RUNS = RunFilter()
