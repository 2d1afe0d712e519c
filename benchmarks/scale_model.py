"""What a step of one training on many GPUs sends and takes: a model of the links, and its check on this machine.

The table is arithmetic (docs/scale.md): bytes per GPU and step, and seconds from the speed of the links. `--check`
counts the bytes of real steps in two processes, fits the links of this machine, and compares predicted with measured
times.

W processes  E processes that hold the experts together  P parameters  N experts  T steps of a path  B samples per GPU
R rounds
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import RESULTS
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from research_eval.config.sections import ParallelParams
from research_eval.runs.prepare import prepare
from research_eval.schema import config_from_dict
from research_eval.system.environment import environment_record
from research_eval.tasks.base import task_of
from research_eval.training.evaluate import evaluate
from research_eval.training.optimizers import build_optimizer
from research_eval.training.parallel import OneProcess
from research_eval.training.processes import Processes
from research_eval.training.runtime import Runtime, choose_device
from research_eval.training.slices import cut
from research_eval.training.step import Meter, TrainingLoss, take_step

GPUS = (8, 64, 256, 1024)
OVERLAP = 0.7  # share of the exchange of gradients that hides behind the computation
IMBALANCE = 1.15  # the busiest process of an expert-parallel group
GIB = 2**30
STATE_BYTES = 16  # per parameter: weight, gradient and two moments in fp32


@dataclass(frozen=True)
class Machine:
    """A GPU and its links: H100 SXM, NVLink inside a node of eight, 400 Gb/s InfiniBand per GPU between nodes."""

    flops: float = 989e12 * 0.35  # bf16, and the share of it that training reaches
    inside: float = 450e9  # bytes per second and direction
    between: float = 50e9
    per_node: int = 8
    start_inside: float = 5e-6  # seconds before the first byte
    start_between: float = 15e-6

    def link(self, size: int) -> tuple[float, float]:
        """Bytes per second and start-up of the slowest link in a group of processes."""
        return (self.inside, self.start_inside) if size <= self.per_node else (self.between, self.start_between)


@dataclass(frozen=True)
class Shape:
    """A Graph-of-Experts with gated experts."""

    name: str
    width: int
    length: int
    experts: int
    steps: int
    samples: int  # per GPU
    inner: int = 4  # times the width
    vocabulary: int = 32_000

    @property
    def expert(self) -> int:
        """Parameters of an expert: q, k, v and the gate's two halves, the output, two maps of the feed-forward part."""
        return (6 + 2 * self.inner) * self.width**2

    @property
    def shared(self) -> int:
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        return self.experts * self.expert + self.shared

    def compute(self, machine: Machine) -> float:
        """Seconds of the forward and backward pass on one GPU."""
        per_sample = self.steps * (2 * self.length * self.expert + 4 * self.length**2 * self.width)
        return 3 * self.samples * per_sample / machine.flops


SHAPES = (
    Shape("d1024 L1024 N64 T8", 1024, 1024, 64, 8, 8),
    Shape("d2048 L2048 N128 T16", 2048, 2048, 128, 16, 4),
    Shape("d512 L512 N16 T4", 512, 512, 16, 4, 32),
)


def ring(size: int, num_bytes: float, passes: int, machine: Machine) -> tuple[float, float]:
    """Seconds and bytes per GPU of a reduce-scatter or an all-gather (one pass), or of both (two)."""
    if size == 1:
        return 0.0, 0.0
    speed, start = machine.link(size)
    sent = passes * num_bytes * (size - 1) / size
    return sent / speed + passes * math.log2(size) * start, sent


def travel(size: int, num_bytes: float, machine: Machine) -> tuple[float, float]:
    """Seconds and bytes per GPU of an all-to-all in a group of processes, each with so many bytes for all of them."""
    if size == 1:
        return 0.0, 0.0
    near = min(size, machine.per_node)
    inside, between = num_bytes * (near - 1) / size, num_bytes * (size - near) / size
    _, start = machine.link(size)
    return max(inside / machine.inside, between / machine.between) + math.log2(size) * start, inside + between


def costs(shape: Shape, size: int, group: int, machine: Machine, number: int = 2) -> dict[str, float]:
    """Seconds, gigabytes per GPU, and GiB of states, of every layout. `number` is the bytes of a number on the wire."""
    compute, whole = shape.compute(machine), shape.parameters * number
    hidden = {"ddp": ring(size, whole, 2, machine), "fsdp": ring(size, whole, 2, machine)}
    found = {"compute_ms": 1e3 * compute}
    for name, (seconds, sent) in hidden.items():
        found[f"{name}_ms"] = 1e3 * (max(compute, OVERLAP * seconds) + (1 - OVERLAP) * seconds)
        found[f"{name}_gb"] = sent / 1e9
    rows = shape.samples * shape.length * shape.width * number
    once, once_sent = travel(group, rows, machine)
    seconds, sent = ring(size, shape.shared * number, 2, machine)
    more, more_sent = ring(size // group, shape.experts * shape.expert / group * number, 2, machine)
    work = IMBALANCE * compute + 4 * shape.steps * once
    found["experts_ms"] = 1e3 * (work + max(0.0, seconds + more - OVERLAP * compute))
    found["experts_gb"] = (4 * shape.steps * once_sent + sent + more_sent) / 1e9
    held = shape.parameters * 2 * number  # weights and gradients, joined for the time of a step
    found["ddp_gib"] = STATE_BYTES * shape.parameters / GIB
    found["fsdp_gib"] = (STATE_BYTES * shape.parameters / size + held) / GIB
    found["experts_gib"] = STATE_BYTES * (shape.shared + shape.experts / group * shape.expert) / GIB
    return found


def table(machine: Machine) -> str:
    """The model's figures as Markdown."""
    lines = [
        "| model, samples per GPU | GPUs (E) | compute | ddp | fsdp | experts | GiB of states: ddp / fsdp / experts |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        for size in GPUS:
            group = min(size, shape.experts, 64 if shape.experts > 64 and size > machine.per_node else machine.per_node)
            one = costs(shape, size, group, machine)
            cells = [f"{one[f'{name}_ms']:.0f} ms, {one[f'{name}_gb']:.1f} GB" for name in ("ddp", "fsdp", "experts")]
            memory = " / ".join(f"{one[f'{name}_gib']:.1f}" for name in ("ddp", "fsdp", "experts"))
            first = f"{shape.name} ({shape.parameters / 1e9:.2f} B), {shape.samples}"
            lines.append(
                f"| {first} | {size} ({group}) | {one['compute_ms']:.0f} ms | {' | '.join(cells)} | {memory} |"
            )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- the check


class Wire(TorchDispatchMode):
    """Counts the bytes that a process gives to exchanges, by the kind of exchange. Rows of experts are floats."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given: dict[str, int] = {}
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            self.calls += 1
            kind = name.removeprefix("c10d::").split(".")[0].strip("_")
            tensors = args[1] if kind.startswith(("alltoall", "reduce_scatter")) else args[0]
            first = tensors[0] if isinstance(tensors, list | tuple) else tensors
            if isinstance(first, torch.Tensor) and first.is_floating_point():
                self.given[kind] = self.given.get(kind, 0) + first.nbytes
        return func(*args, **(kwargs or {}))


def config(model: str, batch: int, width: int) -> dict[str, Any]:
    params: dict[str, Any] = {"embed_dim": width, "num_heads": 4, "dropout": 0.0}
    params |= {"num_experts": 8} if model == "moe" else {"num_total_experts": 8}
    return {
        "model_type": model,
        "dataset_type": "synthetic",
        "dataset_name": "majority",
        "epochs": 1,
        "batch_size": batch,
        "dataset_params": {"num_samples": 20 * batch, "seq_len": 64},
        "model_params": params,
        "training_params": {"device": "cpu", "num_threads": 1},
    }


def stepper(settings: dict[str, Any], group: Processes | None, layout: ParallelParams) -> Callable[[int], Any]:
    """A function that takes one training step, and returns the number of real tokens of the own rows."""
    checked = config_from_dict(settings)
    runtime, data, model = prepare(checked)
    task = task_of(checked.task, data)
    loss_of = TrainingLoss(model, task, 1.0, 0.0)
    optimizer = build_optimizer(model, checked.optimizer_params)
    train = data.train.batches(checked.batch_size, runtime.device, 0)
    order = train.order(0)
    meter = Meter(parallel=group)
    if group is not None:
        group._slices = cut(loss_of, optimizer, layout, choose_device("cpu"))
    model.train()

    def step(number: int) -> Any:
        rows = order[number % (len(order) - 1)]
        batch = train.take(rows if group is None else group.own(rows))
        take_step(loss_of, [batch], optimizer, 1.0, Runtime("cpu"), meter, group, [len(rows)], number)
        return batch.num_tokens, model

    return step


def in_processes(size: int, work: Callable[[Processes], Any], layout: ParallelParams) -> list[Any]:
    """What `work` returns in each of so many forked processes."""
    with tempfile.TemporaryDirectory() as folder:

        def body(rank: int) -> None:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
            torch.set_num_threads(1)
            group = Processes(0, "cpu", layout, f"file://{folder}/meeting")
            Path(folder, f"{rank}.json").write_text(json.dumps(work(group)))
            group.close()

        members = [multiprocessing.get_context("fork").Process(target=body, args=(rank,)) for rank in range(size)]
        for member in members:
            member.start()
        for member in members:
            member.join()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]


def counted(model: str, layout: dict[str, Any], batch: int, width: int, size: int = 2) -> dict[str, Any]:
    """Bytes that a process gives in one step, beside the formula."""
    options = ParallelParams.model_validate(layout)

    def work(group: Processes) -> Any:
        step = stepper(config(model, batch, width), group, options)
        step(0)
        with Wire() as wire:
            tokens, trained = step(1)
        slices = group._slices
        total = sum(math.prod(one.shape) for one in trained.parameters())
        own = sum(one.own.numel() for one in slices.pieces if one.own is one.inside) if slices is not None else 0
        uses = 2 * trained.top_k_experts if model == "moe" else trained.recorder().num_steps
        return {"given": wire.given, "parameters": total - own, "rows": tokens * uses * width * 4, "calls": wire.calls}

    found = in_processes(size, work, options)
    one = found[0]
    result = {"model": model, "layout": layout, "given": one["given"], "calls": one["calls"]}
    rows = sum(each["rows"] for each in found)
    given = sum(each["given"].get("alltoall_base", 0) for each in found)
    if layout.get("experts", 1) > 1:
        result["rows"] = {"counted": given, "formula": 4 * rows, "ratio": given / (4 * rows)}
    kind, factor = ("reduce_scatter_base", 1.0) if layout.get("data") == "fsdp" else ("allreduce", 1.0)
    gradients = one["given"].get(kind, 0)
    expected = factor * one["parameters"] * 4
    result["gradients"] = {"counted": gradients, "formula": expected, "ratio": gradients / expected}
    return result


def links(size: int = 2) -> dict[str, float]:
    """Start-up and bytes per second of gloo on this machine, from sums of 1 kB to 64 MB."""

    def work(group: Processes) -> Any:
        sizes, seconds = [], []
        for power in range(10, 27, 2):
            flat = torch.zeros(2**power // 4)
            repeats = max(3, min(200, 2**24 // 2**power))
            for _ in range(2):
                distributed.all_reduce(flat)
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                distributed.all_reduce(flat)
                times.append(time.perf_counter() - start)
            sizes.append(2**power)
            seconds.append(statistics.median(times))
        return sizes, seconds

    sizes, seconds = in_processes(size, work, ParallelParams())[0]
    weights = 1 / np.array(seconds)  # relative errors count
    design = np.stack([np.ones(len(sizes)), 2 * (size - 1) / size * np.array(sizes)], 1)
    start, per_byte = np.linalg.lstsq(design * weights[:, None], np.array(seconds) * weights, rcond=None)[0]
    return {"start_seconds": float(max(start, 0.0)), "bytes_per_second": float(1 / per_byte)}


def step_seconds(batch: int, width: int, size: int, steps: int, apart: bool = False) -> float:
    """The median of a step of `goe`, whose whole batch is shared by so many processes.

    If they work `apart`, each has a model and a batch of its own and exchanges nothing: what the cores cost each other.
    """

    def timed(step: Callable[[int], Any]) -> float:
        for number in range(3):
            step(number)
        times = []
        for number in range(3, 3 + steps):
            start = time.perf_counter()
            step(number)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    settings = config("goe", batch, width)
    if size == 1:
        return timed(stepper(settings, None, ParallelParams()))

    def work(group: Processes) -> float:
        return timed(stepper(settings, None if apart else group, ParallelParams()))

    return max(in_processes(size, work, ParallelParams()))


def evaluation_seconds(batch: int, width: int, size: int, repetitions: int = 5) -> float:
    """The median of an evaluation of `goe` on the validation split, which so many processes share."""
    checked = config_from_dict(config("goe", batch, width))
    runtime, data, model = prepare(checked)
    task = task_of(checked.task, data)
    batches = data.validation.batches(batch, runtime.device)

    def timed(share: Callable[[Callable[[], Any]], Any]) -> float:
        times = []
        for _ in range(1 + repetitions):  # the first one is a warm-up
            start = time.perf_counter()
            share(lambda: evaluate(model, batches, task.num_outputs(data), runtime, task))
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    if size == 1:
        return timed(OneProcess().shared)
    return max(in_processes(size, lambda group: timed(group.shared), ParallelParams()))


def check(batch: int, width: int, steps: int, rounds: int) -> dict[str, Any]:
    """Bytes beside the formulas, and times beside the model, on this machine."""
    layouts: list[dict[str, Any]] = [{}, {"data": "fsdp"}, {"experts": 2}, {"data": "fsdp", "experts": 2}]
    found: dict[str, Any] = {"bytes": [counted(model, one, 32, 64) for model in ("moe", "goe") for one in layouts]}
    link = links()
    given = counted("goe", {}, batch, width)
    sent = given["gradients"]["formula"] * 2 * (2 - 1) / 2
    exchange = given["calls"] * link["start_seconds"] + sent / link["bytes_per_second"]
    times = []
    for _ in range(rounds):
        sizes = ((batch // 2, 1), (batch, 1), (batch, 2))
        half, whole, shared = (step_seconds(samples, width, size, steps) for samples, size in sizes)
        apart = step_seconds(batch // 2, width, 2, steps, apart=True)
        times.append({"one, half the batch": half, "one": whole, "two": shared, "two apart": apart})
        for name, size in (("one evaluates", 1), ("two evaluate", 2)):
            times[-1][name] = evaluation_seconds(batch, width, size)
    found |= {"links": link, "exchanges": given["calls"], "rounds": times}
    alone_R, shared_R, apart_R = (
        np.array([one[name] for one in times]) for name in ("one, half the batch", "two", "two apart")
    )
    ratios = {
        "predicted / measured": (alone_R + exchange) / shared_R,
        "predicted from two apart / measured": (apart_R + exchange) / shared_R,
        "weak-scaling efficiency": alone_R / shared_R,
        "the same against two apart": apart_R / shared_R,
        "evaluation, one / two": np.array([one["one evaluates"] / one["two evaluate"] for one in times]),
    }
    found |= {name: values.round(3).tolist() for name, values in ratios.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="count bytes and seconds of real steps on this machine")
    parser.add_argument("--batch", type=int, default=64, help="samples of a timed step (default 64)")
    parser.add_argument("--width", type=int, default=128, help="width of the timed model (default 128)")
    parser.add_argument("--steps", type=int, default=30, help="timed steps per round (default 30)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    arguments = parser.parse_args()
    print(table(Machine()))
    if arguments.check:
        found = check(arguments.batch, arguments.width, arguments.steps, arguments.rounds)
        found["environment"] = environment_record("cpu")
        print(json.dumps({key: value for key, value in found.items() if key != "environment"}, indent=1))
        (RESULTS / "scale_model.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
