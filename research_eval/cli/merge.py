"""`goe merge`: copy the runs of another results database into this one.

    goe merge other_machine.db

A run that this database has already is skipped, or updated if the other database has a later state of it.
"""

from __future__ import annotations

import argparse

from research_eval.cli.common import add_flag
from research_eval.cli.text import counted
from research_eval.wording import printable

DESCRIPTION = "copy the runs of another database into this one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe merge`."""
    text = "the database whose runs are copied; it is only read (one of the public original is adopted first)"
    parser.add_argument("other", metavar="OTHER_DB", help=text)
    add_flag(parser, "db", metavar="URL_OR_PATH", help="where they go (default: $GOE_DB, else experiment_results.db)")


def merge_command(arguments: argparse.Namespace) -> int:
    """Copy the runs and print what happened. Exit code 1 if an id is another run in each database."""
    from research_eval.store.merge import merge

    report = merge(arguments.other, arguments.db)
    print(
        f"{counted(report.copied, 'run')} copied, {report.updated:,} brought up to date, "
        f"{report.skipped:,} skipped (here already), {len(report.conflicts):,} in conflict"
    )
    if report.deleted:
        print(f"{counted(report.deleted, 'run')} in the trash of {arguments.other} left out")
    for experiment_id in report.conflicts:
        print(f"  conflict: {printable(experiment_id)} is another run here; both were left as they are")
    if report.copied or report.updated:
        print("The files in runs/ (weights, pictures, traces) are not in the database: copy those folders yourself.")
    return 1 if report.conflicts else 0
