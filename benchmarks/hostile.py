"""Hostile inputs, all of them: tracebacks, exit codes, messages, and files that were touched.

python benchmarks/hostile.py                 # in this process; some also in processes of their own
python benchmarks/hostile.py --only names --processes 0
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"


def main() -> int:
    """Exit code 1 where a case is not answered as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this in it")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth case")
    parser.add_argument("--processes", type=int, default=60, metavar="N", help="so many also as processes (default 60)")
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    hostile = importlib.import_module("hostile")
    cases = [case for case in hostile.cases() if arguments.only in str(case)][:: arguments.every]
    started = time.monotonic()
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    bad = 0

    def judge(case: object, row: str, process: object = None) -> None:
        nonlocal bad
        verdict = sandbox.run(case, process)
        count = counts[row]
        count["inputs"] += 1
        count[{0: "accepted", 1: "exit 1", 2: "exit 2"}.get(verdict.ended.code, "other")] += 1
        for problem in verdict.problems:
            count["tracebacks"] += problem.startswith("traceback")
            count["escapes"] += problem.startswith(("changed", "made"))
        if verdict.problems:
            bad += 1
            count["wrong"] += 1
            print(f"{case}\n    " + "\n    ".join(verdict.problems), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        sandbox = hostile.Sandbox(Path(folder) / "sandbox")
        for case in cases:
            judge(case, case.category)
        if arguments.processes:
            for case in cases[:: max(1, len(cases) // arguments.processes)]:
                judge(case, "as processes", hostile.in_a_process)
    names = ["inputs", "exit 2", "exit 1", "accepted", "other", "tracebacks", "escapes", "wrong"]
    print(f"{'category':<14}" + "".join(f"{name:>12}" for name in names))
    for row, count in counts.items():
        print(f"{row:<14}" + "".join(f"{count[name]:>12,}" for name in names))
    total = sum(count["inputs"] for count in counts.values())
    print(f"{bad:,} of {total:,} are wrong; {time.monotonic() - started:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
