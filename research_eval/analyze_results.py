"""Tables, plots and a report of the stored results of one dataset."""

from __future__ import annotations

if not __package__:  # run as a file: put the repository root where this folder was
    import sys
    from pathlib import Path

    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(p for p in sys.path if Path(p).resolve() != _here)]

from research_eval.cli import analyze


def main(argv: list[str] | None = None) -> int:
    """`python research_eval/analyze_results.py --dataset_name D ...`."""
    return analyze.main(argv, __doc__)


if __name__ == "__main__":
    raise SystemExit(main())
