"""The words of `goe runs` that change what is said about runs: archive, delete, restore, tag, note.

goe runs tag latest paper
goe runs delete --name 'pilot*' --yes

The runs are named by ids, or chosen by the filters of the list.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from research_eval.cli.common import add_flag
from research_eval.cli.filters import filter_of, given_filters
from research_eval.cli.text import counted
from research_eval.errors import ConfigError
from research_eval.wording import printable

if TYPE_CHECKING:
    from research_eval.store.store import Store

    Rows = list[dict[str, Any]]

VERBS = {
    "archive": "archive ID...",
    "delete": "delete ID...",
    "restore": "restore ID...",
    "tag": "tag ID... TAG[,TAG]",
    "note": "note ID... TEXT",
}
FLAGS = {"yes": "delete", "purge": "delete", "remove": "tag"}  # flag -> its word
MAX_NOTE = 2000  # characters
SHOWN = 10  # runs in a question


def add_curation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, as a group of their own in the help text."""
    group = parser.add_argument_group("archive, delete, restore, tag, note")
    add_flag(group, "yes", action="store_true", help="delete without a question")
    purge = "delete runs that are in the trash for good; without ID and filters, all of them"
    add_flag(group, "purge", action="store_true", help=purge)
    add_flag(group, "remove", action="store_true", help="take the tags away from the runs")


def curate(arguments: argparse.Namespace, verb: str, words: Sequence[str]) -> int:
    """Do what the word says with the runs that the other words or the filters choose.

    All runs are looked up before the first one is changed. Exit code 1 if the user declines. Raises ConfigError.
    """
    from research_eval.store.pending import merge_pending
    from research_eval.store.store import Store

    for flag, own in FLAGS.items():
        if getattr(arguments, flag) and verb != own:
            raise ConfigError(f"--{flag}: belongs to `goe runs {own}`, not to `{verb}`: leave it out")
    *runs, value = words if verb in ("tag", "note") and words else [*words, ""]
    tags = _tags(value) if verb == "tag" and words else []
    if verb == "note" and len(value) > MAX_NOTE:
        raise ConfigError(f"goe runs note: expected a text of at most {MAX_NOTE:,} characters, got {len(value):,}")
    with Store(arguments.db, read_only=True) as store:  # it creates no database where there is none
        if tags:
            _check_no_run(store, value)
        rows = _chosen(store, arguments, verb, runs)
        if verb == "delete" and rows and not _may_delete(rows, arguments):
            print("nothing was deleted")
            return 1
    if not rows:
        print("no runs: nothing to do")
        return 0
    with Store(arguments.db) as store:
        merge_pending(store)
        now = [row for row in (store.find_id(row["experiment_id"]) for row in rows) if row is not None]
        print(_DO[verb](store, now, value if verb == "note" else tags, arguments))
    return 0


def _tags(text: str) -> list[str]:
    """The tags in `A,B`. Raises ConfigError."""
    from research_eval.store.find import parse_tag

    return [parse_tag(part.strip(), "goe runs tag") for part in text.split(",")]


def _check_no_run(store: Store, tag: str) -> None:
    """Raise ConfigError if the last word names a run: then the user has forgotten the tag."""
    from research_eval.store.find import find_run

    try:
        found = find_run(store, tag)["experiment_id"]
    except ConfigError:
        return
    raise ConfigError(f"goe runs tag: the last word has to be a tag, and {tag!r} is run {found}")


def _chosen(store: Store, arguments: argparse.Namespace, verb: str, runs: Sequence[str]) -> Rows:
    """The rows of the runs that are named, or that the filters choose. Raises ConfigError."""
    from dataclasses import replace

    from research_eval.store.find import find_run
    from research_eval.store.records import ACTIVE, DELETED, HIDDEN, KEPT

    view = HIDDEN if verb == "restore" else DELETED if arguments.purge else KEPT
    given = given_filters(arguments)
    if runs and given:
        raise ConfigError(f"--{given[0]}: `goe runs {verb}` takes runs or filters, not both")
    if runs:
        rows = [find_run(store, name, view) for name in runs]
        return list({row["experiment_id"]: row for row in rows}.values())
    if not given and not arguments.purge:
        raise ConfigError(f"goe runs: expected `{VERBS[verb]}`, or filters such as --name in place of ID")
    wanted = filter_of(arguments, store, exact=True)
    if view != KEPT and wanted.view == ACTIVE:
        wanted = replace(wanted, view=view)
    if view == KEPT and wanted.view in (DELETED, HIDDEN):
        raise ConfigError(f"--deleted: `goe runs {verb}` has no effect on deleted runs: restore them first")
    if view == DELETED and wanted.view != DELETED:
        raise ConfigError("--archived: --purge has an effect on deleted runs only: delete them first")
    return store.find_runs(wanted)


def _may_delete(rows: Rows, arguments: argparse.Namespace) -> bool:
    """Whether the runs can be deleted, and the user agrees. Raises ConfigError, also if there is no terminal to ask."""
    from research_eval.store.trash import check_deletable, size_of_runs

    if not arguments.purge:
        check_deletable(rows)
    if arguments.yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError("goe runs delete: there is no terminal to ask on. Give --yes to delete without a question.")
    what = "Delete {} for good? This cannot be undone." if arguments.purge else "Move {} to the trash?"
    lines = [f"  {row['experiment_id']}  {row['status']}  {row['experiment_name'] or '-'}" for row in rows[:SHOWN]]
    lines += [f"  and {len(rows) - SHOWN:,} more"] * (len(rows) > SHOWN)
    question = what.format(f"{counted(len(rows), 'run')} ({size_of_runs(rows) / 1e6:,.1f} MB)")
    print("\n".join(map(printable, lines)), f"\n{question} [y/N] ", sep="", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# ---------------------------------------------------------------------------------------------------------- the words


def _archive(store: Store, rows: Rows, _value: Any, _arguments: argparse.Namespace) -> str:
    ids = [row["experiment_id"] for row in rows if row["archived_at"] is None]  # others keep their time
    store.curate(ids, archived_at=datetime.now(UTC))
    return f"{_named(row['experiment_id'] for row in rows)} archived"


def _delete(store: Store, rows: Rows, _value: Any, arguments: argparse.Namespace) -> str:
    from research_eval.store.trash import check_deletable, delete, purge

    if arguments.purge:
        purge(store, [row for row in rows if row["deleted_at"] is not None])
        return f"{_named(row['experiment_id'] for row in rows)} deleted for good"
    check_deletable(rows)  # again, because a run may have been resumed during the question
    moved = [delete(store, row) for row in rows]
    lines = [f"{_named(row['experiment_id'] for row in rows)} moved to the trash: `goe runs restore ID` undoes it"]
    if not all(moved):
        lines.append(f"  {moved.count(False):,} without a folder here: only hidden in the database")
    trials = [row for row in rows if row["run_type"] == "optuna_trial"]
    if trials:
        lines.append(f"  {len(trials):,} of a study: the study keeps the scores of these trials")
    return "\n".join(lines)


def _restore(store: Store, rows: Rows, _value: Any, _arguments: argparse.Namespace) -> str:
    from research_eval.store.trash import restore

    for row in rows:
        restore(store, row)
    return f"{_named(row['experiment_id'] for row in rows)} restored"


def _tag(store: Store, rows: Rows, tags: Any, arguments: argparse.Namespace) -> str:
    ids = [row["experiment_id"] for row in rows]
    store.change_tags(ids, **{"remove" if arguments.remove else "add": tags})
    return f"{_named(ids)} {'without' if arguments.remove else 'tagged'} {', '.join(tags)}"


def _note(store: Store, rows: Rows, text: Any, _arguments: argparse.Namespace) -> str:
    ids = [row["experiment_id"] for row in rows]
    store.curate(ids, note=text.strip() or None)
    return f"{_named(ids)} {'noted' if text.strip() else 'without a note'}"


_DO = {"archive": _archive, "delete": _delete, "restore": _restore, "tag": _tag, "note": _note}


def _named(ids: Iterable[str]) -> str:
    """`2 runs (a, b)`."""
    from research_eval.store.findings import first_of

    listed = list(ids)
    return f"{counted(len(listed), 'run')} ({printable(first_of(listed))})"
