"""`goe replay`: run a finished run again, from its stored config, and print what differs.

goe replay latest --tolerance 0
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from research_eval.cli.common import DB_HELP, add_flag
from research_eval.cli.filters import RUN_HELP
from research_eval.cli.text import changes_lines, differences_lines
from research_eval.wording import printable

if TYPE_CHECKING:
    from research_eval.studies.replay import Replay


DESCRIPTION = "run a run again and tell what differs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe replay`."""
    parser.add_argument("run", metavar="ID", help=f"a finished run. {RUN_HELP}")
    add_flag(parser, "tolerance", type=_tolerance, metavar="T", help="exit with 1 if a metric differs by more than T")
    add_flag(parser, "device", help="auto, cpu, cuda, cuda:N or mps instead of the run's own")
    add_flag(parser, "quiet", action="store_true", help="no progress, only the comparison")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)


def _tolerance(text: str) -> float:
    """A number of the command line that is not negative; NaN is refused too."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text!r}")
    return value


def replay_command(arguments: argparse.Namespace) -> int:
    """Run the run again and print the comparison.

    Exit code 1 if a metric differs by more than the tolerance; the exit code of the run if it did not finish.
    """
    from research_eval.studies.replay import replay

    done = replay(arguments.run, db=arguments.db, device=arguments.device, quiet=arguments.quiet)
    print(replay_report(done), end="")
    if done.result.status != "finished":
        return done.result.exit_code or 1
    return int(arguments.tolerance is not None and done.exceeds(arguments.tolerance))


def replay_report(done: Replay) -> str:
    """The comparison in words. Changed data come first, because they alone explain all other differences."""
    from research_eval.store.changes import data_changed

    lines = [f"replay {done.result.experiment_id} of {printable(done.original)}: {done.result.status}"]
    if done.result.error:
        lines.append(f"  {printable(done.result.error)}")
    if data_changed(done.environment):
        lines.append("The data are not those of the original: that alone explains other metrics.")
    if done.result.status == "finished":
        compared = f"{done.num_compared} metrics compared, {done.num_measured} measured by a clock left out"
        if done.largest is not None:
            lines.append(
                f"largest difference: {done.largest.difference:.3g} in {printable(done.largest.name)} ({compared})"
            )
        elif not done.differences:
            lines.append(f"identical: {compared}")
        lines += differences_lines(done.differences, "original", "replay")
    found = changes_lines(done.environment, "original", "replay")
    lines += ["environment", *found] if found else ["environment: no difference"]
    return "\n".join(lines) + "\n"
