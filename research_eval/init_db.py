"""Create or migrate the results database; running it twice changes nothing."""

from __future__ import annotations

if not __package__:  # run as a file: put the repository root where this folder was
    import sys
    from pathlib import Path

    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(p for p in sys.path if Path(p).resolve() != _here)]

from research_eval.cli import init_db


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with a message about what the user has to change."""
    return init_db.main(argv, __doc__)


if __name__ == "__main__":
    raise SystemExit(main())
