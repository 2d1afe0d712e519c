"""`goe export`: the runs, or their time series, as a CSV or Parquet file.

goe export runs.csv --dataset_name parity
goe export history.parquet --history
"""

from __future__ import annotations

import argparse
from pathlib import Path

from research_eval.cli.common import DB_HELP, add_flag
from research_eval.cli.filters import add_filters, filter_of
from research_eval.cli.text import counted

DESCRIPTION = "runs or their time series as a CSV or Parquet file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe export`."""
    parser.add_argument("file", metavar="FILE", help="a name that ends in .csv or .parquet")
    add_filters(parser, exact=True)
    add_flag(parser, "history", action="store_true", help="the time series, a row per point, instead of the runs")
    add_flag(parser, "force", action="store_true", help="replace the file if it exists")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)


def export_command(arguments: argparse.Namespace) -> int:
    """Write the file and print how many rows it has."""
    from research_eval.store.export import export
    from research_eval.store.store import Store

    with Store(arguments.db, read_only=True) as store:
        wanted, path = filter_of(arguments, store, exact=True), Path(arguments.file)
        num_rows = export(store, path, wanted, history=arguments.history, force=arguments.force)
    print(f"{counted(num_rows, 'point' if arguments.history else 'run')} in {path}")
    return 0
