"""Peak memory of a training step beside the peers', each contestant in a process of its own.

Two measures. "tensors": the most bytes that torch held at once during a step beyond those before it, from its profiler.
It is exact and repeatable, so the ratios are of it, but it does not see what libraries take for themselves. "process":
the high-water mark of resident memory over the first step (which makes the optimiser's state) beyond the memory before
it; it sees all, and the allocator's habits too. On a GPU both are counted by torch: allocated and reserved.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import naive_goe
import peer_models
import peers
import torch
from peer_models import Shape
from timing import NOT_MEASURED, Contestant, Row, Settings, argument_parser, installed, report
from torch.nn import functional as F

from research_eval.layers.settings import EncoderSettings
from research_eval.models.dense import DenseTransformerClassifier

CLASSES = 30_000
LOSS = "loss"
PRELOAD = [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "bert", "mixtral", "olmoe")]
PACKAGES = dict.fromkeys(("GPT-2", "BERT", "Mixtral", "OLMoE"), "transformers")
Step = Callable[[Settings], Contestant]


def goe(number: int, padded: bool, attend: naive_goe.Attend | None) -> Step:
    def build(settings: Settings) -> Contestant:
        shape = peers.choice(settings, peers.GOE, peers.GOE_GPU, peers.GOE_TINY)
        return peers.goe_contestant(shape[min(number, len(shape) - 1)], padded, True, 0.0, settings, attend)()

    return build


def dense(make: Callable[[Shape], torch.nn.Module]) -> Step:
    def build(settings: Settings) -> Contestant:
        shape = peers.choice(settings, peers.DENSE, peers.DENSE_GPU, peers.DENSE_TINY)[0]
        return peers.language_model(lambda: make(shape), shape, True, settings)()

    return build


def moe(name: str | None) -> Step:
    def build(settings: Settings) -> Contestant:
        shape, inner = peers.choice(settings, peers.MOE_LM, peers.MOE_LM_GPU, peers.MOE_LM_TINY)

        def make() -> torch.nn.Module:
            return peer_models.ours_moe(shape, inner) if name is None else peer_models.mixture(name, shape, inner)

        return peers.language_model(make, shape, True, settings)()

    return build


def loss_alone(ours: bool) -> Step:
    """The classification loss of logits that are there, forward and backward."""

    def build(settings: Settings) -> Contestant:
        rows, classes = logits_shape(settings)
        encoder = EncoderSettings(embed_dim=8, num_heads=1)
        model = DenseTransformerClassifier(vocab_size=4, num_classes=2, encoder=encoder)
        logits_BC = torch.randn(rows, classes, device=settings.device, requires_grad=True)
        labels_B = torch.randint(classes, (rows,), device=settings.device)

        def step() -> None:
            loss = model.task_loss(logits_BC, labels_B) if ours else F.cross_entropy(logits_BC, labels_B)
            loss.backward()
            logits_BC.grad = None

        return step

    return build


def logits_shape(settings: Settings) -> tuple[int, int]:
    return (16, 100) if settings.tiny else (512, CLASSES)


def goe_contestants(number: int, padded: bool) -> dict[str, Step]:
    naive: dict[str, naive_goe.Attend] = {"naive loop": "matmul", "naive loop with SDPA": "sdpa"}
    return {"ours": goe(number, padded, None)} | {name: goe(number, padded, how) for name, how in naive.items()}


COMPARED: dict[str, dict[str, Step]] = {
    "goe_full": goe_contestants(0, padded=False),
    "goe_padded": goe_contestants(0, padded=True),
    "goe_16_experts": goe_contestants(2, padded=False),
    "dense": {
        "ours": dense(peer_models.ours),
        "GPT-2": dense(peer_models.gpt2),
        "BERT": dense(peer_models.bert),
        "nn.TransformerEncoderLayer": dense(lambda shape: peer_models.Encoder(shape, 0.0)),
    },
    "moe": {"ours": moe(None), "Mixtral": moe("Mixtral"), "OLMoE": moe("Olmoe")},
    LOSS: {"ours": loss_alone(True), "F.cross_entropy": loss_alone(False)},
}


def resident(name: str) -> int:
    """Bytes of VmRSS or VmHWM of this process; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def measured(step: Contestant, settings: Settings) -> dict[str, float]:
    """MiB of one step beyond what there was before it."""
    if settings.device != "cpu":
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        step()
        torch.cuda.synchronize()
        after = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"tensors": (after[0] - before[0]) / 2**20, "process": (after[1] - before[1]) / 2**20}
    before_step = resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what there is
    except OSError:
        before_step = 0
    step()
    process = (resident("VmHWM") - before_step) / 2**20 if before_step else float("nan")
    step()  # by now the optimiser's state is there
    return {"tensors": peak_of_tensors(step) / 2**20, "process": process}


def peak_of_tensors(step: Contestant) -> int:
    """The most bytes in torch's hands during a step, beyond those before it."""
    # torch.profiler's own is a wrapper around it that imports for two seconds.
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        step()
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak: int = max(itertools.accumulate((event.nbytes() for event in events), initial=0))
    return peak


def in_own_process(compared: str, name: str, settings: Settings) -> dict[str, float] | None:
    """None for a peer whose package is missing."""
    if not settings.available or (PACKAGES.get(name) and not installed(PACKAGES[name])):
        return None
    # This process has only imported; a GPU that it has seen cannot be used in a fork.
    start = "fork" if settings.device == "cpu" else "spawn"
    with multiprocessing.get_context(start).Pool(1) as pool:
        return pool.apply(one_step, (compared, name, settings))


def one_step(compared: str, name: str, settings: Settings) -> dict[str, float]:
    settings.runtime()
    build = COMPARED[compared][name]
    build(replace(settings, tiny=True))()  # the pages of the libraries' code are not counted
    return measured(build(settings), settings)


def rows_of(compared: str, contestants: Mapping[str, Step], settings: Settings) -> list[Row]:
    found = {name: in_own_process(compared, name, settings) for name in contestants}
    ours = found["ours"]
    rows = []
    for name, each in found.items():
        row: Row = {"training step of": compared, "contestant": name}
        if each is None or ours is None:
            row |= dict.fromkeys(("tensors, MiB", "process, MiB", "ours over it"), NOT_MEASURED)
        else:
            row |= {
                "tensors, MiB": each["tensors"],
                "process, MiB": each["process"],
                "ours over it": ours["tensors"] / each["tensors"],
            }
        rows.append(row)
    return rows


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--compared", choices=COMPARED, action="append", help="may be given several times; default: all"
    )
    given = vars(parser.parse_args())
    asked = given.pop("compared") or list(COMPARED)
    settings = Settings(**given)
    os.environ["KINETO_LOG_LEVEL"] = "99"  # else the profiler tells when it begins
    if {"dense", "moe"} & set(asked) and installed("transformers"):
        for module in PRELOAD:
            importlib.import_module(module)
    tables = {
        "Peak memory of a training step": [row for name in asked for row in rows_of(name, COMPARED[name], settings)]
    }
    if LOSS in asked:
        batch, classes = logits_shape(settings)
        title = f"Loss of {batch} x {classes} logits, forward and backward, their gradient included"
        rows = next(iter(tables.values()))
        tables[title] = [in_copies(row, batch * classes) for row in rows if row["training step of"] == LOSS]
    report("memory", settings, tables)


def in_copies(row: Row, numbers: int) -> Row:
    tensors = row["tensors, MiB"]
    copies = NOT_MEASURED if isinstance(tensors, str) else tensors * 2**20 / (4 * numbers)
    return {"contestant": row["contestant"], "copies of the logits beside them": copies}


if __name__ == "__main__":
    main()
