"""Create or migrate the results database; running it twice changes nothing."""

from __future__ import annotations

if not __package__:  # run as a file: put the repository root where this folder was
    import sys
    from pathlib import Path

    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(p for p in sys.path if Path(p).resolve() != _here)]

import argparse

from research_eval.commands import DB_HELP, add_flag, guarded, parse_or_suggest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)


def init_db_command(arguments: argparse.Namespace) -> int:
    """Create or migrate, and say where."""
    from research_eval.db_utils import Store  # after parsing: --help has to be quick
    from research_eval.spool import merge_pending

    with Store(arguments.db) as store:
        merge_pending(store)
        print(f"results database: {store.location} (schema version {store.schema_version})")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with a message where the user has to change something."""
    parser = argparse.ArgumentParser(prog="init_db.py", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    return guarded(init_db_command, parse_or_suggest(parser, argv))


if __name__ == "__main__":
    raise SystemExit(main())
