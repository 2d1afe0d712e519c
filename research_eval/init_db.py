"""Create or migrate the results database; running it twice changes nothing."""

from __future__ import annotations

if not __package__:  # run as a file: put the repository root where this folder was
    import sys
    from pathlib import Path

    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(p for p in sys.path if Path(p).resolve() != _here)]

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with a message where the user has to change something."""
    parser = argparse.ArgumentParser(prog="init_db.py", description=__doc__)
    parser.add_argument(
        "--db",
        metavar="URL_OR_PATH",
        help="the database (default: $GOE_DB, else experiment_results.db in the working directory)",
    )
    arguments = parser.parse_args(argv)

    from research_eval.db_utils import Store  # after parsing: --help has to be quick
    from research_eval.errors import ConfigError

    try:
        with Store(arguments.db) as store:
            print(f"results database: {store.location} (schema version {store.schema_version})")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
