"""Flags that choose runs of the results store, for `goe runs` and `goe export`.

A run has to satisfy all flags that are given. Conditions on metrics are written as `--where 'final_val_f1>=0.9'`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from research_eval.cli.common import add_flag

if TYPE_CHECKING:
    from research_eval.store.records import RunFilter

FILTERS = {
    "dataset_name": "runs on this dataset",
    "model_type": "runs of this model",
    "status": "running, finished, failed, interrupted, pruned or diverged",
    "experiment_name": "runs of exactly this name",
    "run_type": "json or optuna_trial",
    "study": "trials of this study",
}
RUN_HELP = "A run is named by its id, the beginning of one, or latest."


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Add the flags, as a group of their own in the help text."""
    group = parser.add_argument_group("which runs")
    for name, text in FILTERS.items():
        add_flag(group, name, help=text)
    add_flag(group, "since", metavar="DATE", help="started at this time or later (UTC), such as 2026-05-31")
    add_flag(group, "where", action="append", metavar="CONDITION", help="such as 'final_val_f1>=0.9'; may be repeated")


def filter_of(arguments: argparse.Namespace) -> RunFilter:
    """The filter that these flags describe. Raises ConfigError."""
    from research_eval.store.find import parse_condition, parse_since
    from research_eval.store.records import RunFilter

    return RunFilter(
        **{name: getattr(arguments, name) for name in FILTERS},
        since=None if arguments.since is None else parse_since(arguments.since),
        where=tuple(map(parse_condition, arguments.where or ())),
    )
