"""`goe dashboard` and `goe atlas`: the pages that show runs while they train, and what the experts do.

goe dashboard --open
goe atlas --run latest --out atlas.html
"""

from __future__ import annotations

import argparse
import sys
import webbrowser

from research_eval.cli.common import DB_HELP, add_flag
from research_eval.errors import ConfigError
from research_eval.files import use_runs_folder
from research_eval.system.best_effort import print_product
from research_eval.system.untrusted import user_path

DESCRIPTION = "a local page: runs while they train, groups over seeds, studies, and what the experts do"
ATLAS_DESCRIPTION = "one file that shows the paths of a run: experts, classes, tokens, samples"
PORT = 8123


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe dashboard`."""
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)
    parser.add_argument("--runs", metavar="FOLDER", help="the folder of the runs (default: $GOE_RUNS, else runs)")
    parser.add_argument("--port", type=int, default=PORT, help=f"port of the page (default {PORT}; 0 takes a free one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; another than this needs a token")
    add_flag(parser, "allow_probes", action="store_true", help="let other machines ask for evaluations, too")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    add_flag(parser, "quiet", action="store_true", help="print the address only")


def dashboard_command(arguments: argparse.Namespace) -> int:
    """Serve the pages until Ctrl-C."""
    if not 0 <= arguments.port < 65536:
        raise ConfigError(f"--port: expected a number from 0 to 65535, got {arguments.port}")
    if arguments.runs is not None:
        folder = user_path(arguments.runs, "--runs")
        if not folder.is_dir():
            raise ConfigError(f"--runs: {folder} is no folder")
        use_runs_folder(folder)
    from research_eval.dashboard.server import Options, serve

    def ready(address: str) -> None:
        print_product(f"{address}\n")
        sys.stdout.flush()
        if not arguments.quiet:
            print("Ctrl-C ends it.", file=sys.stderr)
        if arguments.open:
            webbrowser.open(address)

    serve(Options(arguments.db, arguments.host, arguments.port, arguments.allow_probes), ready)
    return 0


def add_atlas_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe atlas`."""
    parser.add_argument("--run", metavar="RUN", help="a run with a routing trace: its id, or latest")
    parser.add_argument("--trace", metavar="FOLDER", help="a trace of another model, as goe trace writes it")
    parser.add_argument("--out", default="atlas.html", metavar="FILE", help="the file (default: atlas.html)")
    parser.add_argument("--epoch", type=int, metavar="N", help="the epoch that the file opens with, and keeps alone")
    parser.add_argument("--ablate", action="store_true", help="also what happens without each expert (takes a while)")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)
    add_flag(parser, "quiet", action="store_true", help="print the name of the file only")


def atlas_command(arguments: argparse.Namespace) -> int:
    """Write the file and print its name."""
    if (arguments.run is None) == (arguments.trace is None):
        raise ConfigError("goe atlas: give --run for a run of this program, or --trace for a trace of another model")
    from research_eval.dashboard.export import write_atlas
    from research_eval.dashboard.foreign import write_trace_atlas
    from research_eval.runs.inputs import output_file
    from research_eval.store.find import find_run
    from research_eval.store.store import Store

    out = output_file(arguments.out, [])
    if arguments.trace is not None:
        write_trace_atlas(out, user_path(arguments.trace, "--trace"))
        print_product(f"{out}\n")
        return 0
    with Store(arguments.db, read_only=True) as store:
        experiment_id = find_run(store, arguments.run)["experiment_id"]
    write_atlas(out, experiment_id, arguments.epoch, arguments.db if arguments.ablate else None, arguments.ablate)
    print_product(f"{out}\n")
    return 0
