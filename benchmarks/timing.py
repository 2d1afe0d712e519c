"""Contestants timed in turn in one process, and what is printed and kept of it.

Other programs on the machine slow all contestants alike, so a ratio within one round says more than two times do. With
one thread the clock is the process's CPU time, which other programs hardly touch; with two, or a GPU, the wall clock.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import torch
from torch import nn

from research_eval.annotations import AttentionRows, Kernels, Precision
from research_eval.layers.dispatch import Execution, set_execution
from research_eval.system.environment import environment_record
from research_eval.training.runtime import Runtime, choose_device

RESULTS = Path(__file__).resolve().parent / "results"
NOT_MEASURED = "not measured"
MIN_CALL = 0.02  # seconds that a contestant runs per round at least
MIN_ROUNDS = 3

Contestant = Callable[[], object]
M = TypeVar("M", bound=nn.Module)
Row = dict[str, Any]


class Ratio(NamedTuple):
    """How many times faster, over all rounds."""

    median: float
    smallest: float
    largest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.smallest:.2f}-{self.largest:.2f})"


class Rounds:
    """Seconds per call of each contestant in each round."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds = seconds

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def faster(self, name: str, peer: str) -> Ratio:
        """How many times faster `name` is than `peer`."""
        return self.ratio(peer, name)

    def ratio(self, name: str, other: str, factor: float = 1.0) -> Ratio:
        """Seconds of `name` over those of `other`, times a factor."""
        ratios = [factor * a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))


@dataclass
class Settings:
    """What the flags say, and the time that is left."""

    seconds: float = 45.0
    threads: int = 1
    device: str = "cpu"
    precision: Precision = "fp32"
    kernels: Kernels = "auto"
    attention: AttentionRows = "padded"
    keep_memory: bool = False
    tiny: bool = False
    output: Path = RESULTS

    def __post_init__(self) -> None:
        self._started = self.clock()

    @property
    def available(self) -> bool:
        """Whether this machine has the device."""
        return self.device == "cpu" or torch.cuda.is_available()

    def runtime(self, precision: Precision | None = None) -> Runtime:
        return Runtime(self.device, precision or self.precision, self.threads, self.keep_memory)

    def placed(self, module: M) -> M:
        """The module on the device; what it has of our experts is executed by the kernels of the flags."""
        set_execution(module, Execution(kernels=self.kernels, attention=self.attention))
        return module.to(choose_device(self.device))

    def share(self, rows_left: int) -> float:
        """An equal part of the seconds that are left, for the next of the rows that are left."""
        return max(0.0, self.seconds - (self.clock() - self._started)) / max(rows_left, 1)

    def clock(self) -> float:
        if self.device != "cpu" and self.available:
            torch.cuda.synchronize()
        return time.process_time() if self.threads == 1 and self.device == "cpu" else time.perf_counter()


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that make up `Settings`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="per question, roughly")
    parser.add_argument("--threads", type=int, default=1, choices=(1, 2))
    parser.add_argument("--device", default="cpu", help='"not measured" is all there is where the machine lacks it')
    parser.add_argument("--precision", default="fp32", choices=get_args(Precision), help="of all contestants")
    parser.add_argument("--kernels", default="auto", choices=get_args(Kernels), help="of our models")
    parser.add_argument("--attention", default="padded", choices=get_args(AttentionRows), help="of our classifiers")
    parser.add_argument("--keep_memory", action="store_true", help="as training_params has it, for all contestants")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files")
    return parser


Question = Callable[[Settings], Mapping[str, Sequence[Row]]]


def ask(description: str | None, questions: Sequence[Question]) -> None:
    """The `main` of a file with several questions: those chosen by their names, or all."""
    by_name = {question.__name__: question for question in questions}
    parser = argument_parser(description)
    parser.add_argument("--question", choices=by_name, action="append", help="may be given several times; default: all")
    given = vars(parser.parse_args())
    for name in given.pop("question") or by_name:
        settings = Settings(**given)
        report(name, settings, by_name[name](settings))


def measure(contestants: Mapping[str, Contestant], seconds: float, settings: Settings) -> Rounds:
    """Each runs once to warm up, then all in turn until the time is over, for three rounds at least.

    Who begins rotates.
    """
    begin, calls = settings.clock(), {}
    for name, contestant in contestants.items():
        needed = _seconds_of(contestant, settings)
        if needed < 1:  # the first call may have been slow
            needed = _seconds_of(contestant, settings)
        calls[name] = math.ceil(MIN_CALL / max(needed, MIN_CALL / 10_000))
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    names, number, spent = list(contestants), 0, 0.0
    while number < MIN_ROUNDS or spent < seconds:
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = settings.clock()
            for _ in range(calls[name]):
                contestants[name]()
            taken[name].append((settings.clock() - start) / calls[name])
        number, spent = number + 1, settings.clock() - begin
    return Rounds(taken)


def _seconds_of(contestant: Contestant, settings: Settings) -> float:
    start = settings.clock()
    contestant()
    return settings.clock() - start


def report(
    question: str, settings: Settings, tables: Mapping[str, Sequence[Row]], *, name: str = "", **more: Any
) -> None:
    """Print Markdown tables by their titles, and write all to `<question>_<device>_<threads>.json` or `<name>.json`."""
    for title, rows in tables.items():
        print(f"\n{title}\n")
        columns = list(rows[0])
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in rows:
            print(f"| {' | '.join(_text(row[column]) for column in columns)} |", flush=True)
    threads = f"{settings.threads} thread" + "s" * (settings.threads > 1)
    print(f"\n({question}: {settings.device}, {settings.precision}, {threads}; median, smallest and largest round)")
    kept = {
        "question": question,
        "settings": {name: value for name, value in asdict(settings).items() if name != "output"},
        "machine": machine(settings.device),
        "tables": {title: list(rows) for title, rows in tables.items()},
        **more,
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    path = settings.output / f"{name or f'{question}_{settings.device}_{settings.threads}'}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    record = environment_record(device)
    facts = {name: record[name] for name in ("cpu_model", "logical_cores", "gpu_name", "git_commit", "git_dirty")}
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers") if installed(name)}
    return {**facts, "cpu_capability": torch.backends.cpu.get_cpu_capability(), **packages}


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def with_gpu_row(rows: list[Row], settings: Settings) -> list[Row]:
    """What a run on the CPU says of a GPU, for the table in the documentation."""
    first, *others = rows[0]
    unknown = dict.fromkeys(others, NOT_MEASURED)
    return rows if settings.device != "cpu" else [*rows, {first: "on a GPU", **unknown}]


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
