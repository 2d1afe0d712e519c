"""`goe init-db` and the script `init_db.py`: create or migrate the results database.

Every command that writes results does so too; this one is for setting up a database before the first run.
"""

from __future__ import annotations

import argparse

from research_eval.cli.common import DB_HELP, add_flag, guarded, parse_or_suggest

DESCRIPTION = "create or migrate the results database"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe init-db`."""
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)


def init_db_command(arguments: argparse.Namespace) -> int:
    """Create or migrate the database, add the results that wait on disk, and print where it is."""
    from research_eval.store.pending import merge_pending
    from research_eval.store.store import Store  # after parsing, so that --help stays quick

    with Store(arguments.db) as store:
        merge_pending(store)
        print(f"results database: {store.location} (schema version {store.schema_version})")
    return 0


def main(argv: list[str] | None, description: str | None) -> int:
    """The script `init_db.py`."""
    parser = argparse.ArgumentParser(prog="init_db.py", description=description, allow_abbrev=False)
    add_arguments(parser)
    return guarded(init_db_command, parse_or_suggest(parser, argv))
