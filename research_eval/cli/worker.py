"""`goe worker`: train trials of a study, or runs of a batch, that another command has begun; on any machine.

    goe worker --study parity_study --storage postgresql://... --db postgresql://...

The flags of the study lie in its storage, so that a worker needs none of them.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import threading
from typing import TYPE_CHECKING

from research_eval.cli import tune
from research_eval.cli.common import DB_HELP
from research_eval.cli.launching import DEFAULT_STORAGE, default_storage
from research_eval.errors import ConfigError
from research_eval.system.phases import import_torch, phase

if TYPE_CHECKING:
    from research_eval.studies.options import StudyOptions

DESCRIPTION = "train trials of a study that `goe tune` has begun, also on another machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe worker`."""
    parser.add_argument("--study", required=True, metavar="NAME", help="name of the study (--study_name of goe tune)")
    parser.add_argument(
        "--storage", metavar="URL", help=f"its database (default: $GOE_STORAGE, else {DEFAULT_STORAGE})"
    )
    parser.add_argument("--db", metavar="URL_OR_PATH", help=DB_HELP)
    parser.add_argument("--max_trials", type=int, metavar="K", help="stop after so many trials")
    parser.add_argument("--max_seconds", type=float, metavar="S", help="stop after this time, with a checkpoint")
    parser.add_argument("--slot", metavar="TEXT", help="a name for this worker, which the study shows with its trials")
    parser.add_argument(
        "--end_with_stdin", action="store_true", help="stop, with a checkpoint, when the standard input ends"
    )
    parser.add_argument("--quiet", action="store_true", help="show warnings and errors only")


def worker_command(arguments: argparse.Namespace) -> int:
    """Work until the study has all its trials, or one of the limits is reached."""
    seconds = arguments.max_seconds
    if arguments.max_trials is not None and arguments.max_trials < 1:
        raise ConfigError(f"--max_trials: expected at least 1, got {arguments.max_trials}")
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"--max_seconds: expected a number above 0, got {seconds}")
    import_torch()  # after what can be checked without it
    with phase("importing the program"):
        from research_eval.studies.batch import CONFIGS, batch_options
        from research_eval.studies.launchers import Elsewhere, LaunchOptions
        from research_eval.studies.queue import stored_flags
        from research_eval.studies.storage import storage_url
        from research_eval.studies.tune import work_alone

    storage = storage_url(arguments.storage or default_storage())
    flags, n_trials = stored_flags(storage, arguments.study)
    if CONFIGS in flags:
        options: StudyOptions = batch_options(
            flags[CONFIGS], n_trials, arguments.db, Elsewhere(storage, LaunchOptions())
        )
    else:
        given = {**flags, "storage": storage, "db": arguments.db, "n_trials": n_trials}
        options = tune.study_options(argparse.Namespace(**given))
    if arguments.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    return work_alone(options, seconds, arguments.max_trials, arguments.quiet, arguments.slot)


def _end_with_stdin() -> None:
    """Wait until the standard input ends, then stop this process with SIGTERM.

    The input is a pipe from the process that started this one. It ends with that process, even if that was killed.
    """
    while os.read(0, 1024):  # `sys.stdin` would hold a lock that the end of this program needs
        pass
    os.kill(os.getpid(), signal.SIGTERM)
