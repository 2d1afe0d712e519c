"""Flags that choose runs of the results store, for every command that reads many runs.

A run has to satisfy all flags that are given. Conditions are written as `--where 'final_val_f1>=0.9'` for a metric, or
`--where model_params.embed_dim=64` for a key of the config.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from research_eval.cli.common import add_flag

if TYPE_CHECKING:
    from research_eval.store.records import RunFilter
    from research_eval.store.store import Store

EXACT = {  # filters of lists only: `goe analyze` and `goe suggest` have flags of their own for the first two
    "dataset_name": "runs on this dataset",
    "model_type": "runs of this model",
    "status": "running, finished, failed, interrupted, pruned or diverged",
    "experiment_name": "runs of exactly this name",
    "run_type": "json or optuna_trial",
}
COMMON = ("name", "study", "since", "until", "where", "tag", "exclude")
VIEWS = ("archived", "deleted")
LIST_FILTERS = (*EXACT, *COMMON, *VIEWS)
RUN_HELP = "A run is named by its id, the beginning of one, or latest."


def add_filters(parser: argparse.ArgumentParser, exact: bool = False) -> None:
    """Add the flags, as a group of their own in the help text; with `exact` also those of lists."""
    group = parser.add_argument_group("which runs")
    for name, text in EXACT.items() if exact else ():
        add_flag(group, name, help=text)
    add_flag(group, "name", metavar="PATTERN", help="runs whose name fits, such as 'pilot*'; * and ? are wildcards")
    add_flag(group, "study", help="trials of this study")
    add_flag(group, "since", metavar="TIME", help="started at this time (UTC) or later, such as 2026-05-31, or 7d ago")
    add_flag(group, "until", metavar="TIME", help="started before this time")
    condition = "a metric or a key of the config, such as 'final_val_f1>=0.9' or model_params.embed_dim=64"
    add_flag(group, "where", action="append", metavar="CONDITION", help=f"{condition}; may be repeated")
    add_flag(group, "tag", action="append", metavar="TAG", help="runs with this tag; may be repeated")
    left_out = "leave out a run (its id), tag=TAG, name=PATTERN or a CONDITION; may be repeated"
    add_flag(group, "exclude", action="append", metavar="WHICH", help=left_out)
    if exact:
        add_flag(group, "archived", action="store_true", help="archived runs instead of the others")
        add_flag(group, "deleted", action="store_true", help="deleted runs instead of the others")


def given_filters(arguments: argparse.Namespace) -> list[str]:
    """The names of the filters that the user has given."""
    return [name for name in LIST_FILTERS if getattr(arguments, name, None) not in (None, False)]


def in_words(arguments: argparse.Namespace) -> str:
    """The given filters of COMMON as they stand on a command line; empty without any.

    >>> in_words(argparse.Namespace(tag=["paper"], name="a b*"))
    "--name 'a b*' --tag paper"
    """
    words: list[str] = []
    for name in COMMON:
        value: str | Sequence[str] | None = getattr(arguments, name, None)
        for one in [value] if isinstance(value, str) else value or ():
            words += [f"--{name}", one]
    return shlex.join(words)


def filter_of(arguments: argparse.Namespace, store: Store, exact: bool = False) -> RunFilter:
    """The filter that the flags of `add_filters` describe.

    Raises ConfigError, also for names that the store does not know.
    """
    from dataclasses import replace

    from research_eval.store.find import by_conditions, check_filter, excluded, parse_tag, parse_time
    from research_eval.store.records import ACTIVE, ARCHIVED, DELETED, HIDDEN

    views = {(False, False): ACTIVE, (True, False): ARCHIVED, (False, True): DELETED, (True, True): HIDDEN}
    archived, deleted = (bool(getattr(arguments, name, False)) for name in VIEWS)
    wanted = replace(
        by_conditions(store, arguments.where or ()),
        **{name: getattr(arguments, name) for name in EXACT if exact},
        name=arguments.name,
        study=arguments.study,
        since=None if arguments.since is None else parse_time(arguments.since, "--since"),
        until=None if arguments.until is None else parse_time(arguments.until, "--until"),
        tags=tuple(parse_tag(tag) for tag in arguments.tag or ()),
        exclude=tuple(excluded(store, text) for text in arguments.exclude or ()),
        view=views[archived, deleted],
    )
    check_filter(store, wanted)
    return wanted
