"""`goe doctor`: check database, runs, checkpoints and environment; repair what is safe.

goe doctor
goe doctor --repair
"""

from __future__ import annotations

import argparse

from research_eval.cli.common import DB_HELP, add_flag
from research_eval.wording import printable

DESCRIPTION = "check database, runs, checkpoints and environment; repair what is safe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe doctor`."""
    add_flag(parser, "repair", action="store_true", help="repair what is safe, after a backup of the database")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)


def doctor_command(arguments: argparse.Namespace) -> int:
    """Print a line for each check. Exit code 1 if a problem remains."""
    from research_eval.store.doctor import examine
    from research_eval.store.findings import PROBLEM

    exit_code = 0
    for finding in examine(arguments.db, arguments.repair):
        print(printable(str(finding)), flush=True)
        exit_code |= finding.level == PROBLEM
    return int(exit_code)
