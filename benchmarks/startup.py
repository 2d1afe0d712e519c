"""How long it takes until something happens: imports, help texts, and the first training step of the quickstart.

Each is a process of its own, from its start to its end (or to the end of the first optimiser step), in turn.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import Row, Settings, argument_parser, report

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "examples" / "configs" / "quickstart.json"
# Ends the process behind the first optimiser step; the package itself is as it is.
UNTIL_FIRST_STEP = """
import os
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *arguments: os._exit(77))
from research_eval.main import main
main(["--json_config_path", "quickstart.json"])
"""
PYTHON = sys.executable
COMMANDS: dict[str, tuple[list[str], int]] = {
    "python -c pass": ([PYTHON, "-c", "pass"], 0),
    "import torch": ([PYTHON, "-c", "import torch"], 0),
    "import research_eval": ([PYTHON, "-c", "import research_eval"], 0),
    "python research_eval/main.py --help": ([PYTHON, str(ROOT / "research_eval" / "main.py"), "--help"], 0),
    "python -m research_eval.main --help": ([PYTHON, "-m", "research_eval.main", "--help"], 0),
    "python -m research_eval.main --dry_run": (
        [PYTHON, "-m", "research_eval.main", "--json_config_path", "quickstart.json", "--dry_run"],
        0,
    ),
    "quickstart, to the end of the first step": ([PYTHON, "-c", UNTIL_FIRST_STEP], 77),
}


def run(command: list[str], expected: int, settings: Settings) -> tuple[float, float]:
    """Wall and CPU seconds of one process in a new folder."""
    threads = {"OMP_NUM_THREADS": str(settings.threads)}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(QUICKSTART, folder)
        before, start = os.times(), time.perf_counter()
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **threads, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        wall, after = time.perf_counter() - start, os.times()
    if done.returncode != expected:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def main() -> None:
    settings = Settings(**vars(argument_parser(__doc__).parse_args()))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    end = time.perf_counter() + settings.seconds
    for command, expected in COMMANDS.values():
        if not settings.tiny:
            run(command, expected, settings)  # fills the file cache and writes byte code
    while not all(taken.values()) or (not settings.tiny and time.perf_counter() < end):
        for name, (command, expected) in COMMANDS.items():
            taken[name].append(run(command, expected, settings))
    rows: list[Row] = []
    for name, times in taken.items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        smallest = min(wall for wall, _ in times)
        rows.append({"what": name, "wall s": wall, "smallest wall s": smallest, "CPU s": cpu, "runs": len(times)})
    report("startup", settings, {"From the start of the process": rows})


if __name__ == "__main__":
    main()
