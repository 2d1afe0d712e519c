"""How far a step of `goe_original` is from the limit that its own matrix products set.

P is the time of a replay of exactly the matrix products of a step: of the executed paths, over real tokens. PA is the
same with the attention kernels. Both run in turn with the step itself and with the naive loop, on the same paths (the
learning rate is 0), so the speed of the machine's products cancels. The cost of a call does not: name the machine.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import naive_goe
import numpy as np
import torch
from peers import GOE, GOE_TINY, GoEShape, goe_name, training
from timing import Contestant, Row, Settings, argument_parser, measure, report
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from research_eval.config.jsonc import load_json
from research_eval.datasets.token_data import Batch
from research_eval.experiment import run
from research_eval.layers import even, experts
from research_eval.layers.dispatch import Execution, set_execution
from research_eval.main import cli
from research_eval.models.base_model import logits_of
from research_eval.models.goe_original import GoEOriginalClassifier
from research_eval.runs.predict import BATCH_SIZE, TrainedModel
from research_eval.schema import config_from_dict

ROOT = Path(__file__).resolve().parent.parent
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv")
WARM_UP, PROFILED = 3, 5  # steps
ATTENTION = "_scaled_dot_product"  # begins the names of the kernels, forward and backward
QUICKSTART: GoEShape = (32, 64, 4, 2, 3, 64)  # of examples/configs/quickstart.json, which has one layer and two heads
EVEN: list[GoEShape] = [  # from few spare rows to many
    *((32, 64, 8, 3, 8, 32), (32, 64, 4, 3, 8, 32), QUICKSTART, (64, 128, 4, 2, 3, 64)),
    *((32, 64, 4, 2, 16, 32), (64, 128, 4, 3, 8, 64), (64, 256, 4, 6, 32, 32)),
]
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recorded(TorchDispatchMode):
    """The products and attention kernels of a step with what they were given, in their order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Call] = []
        self.attention: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._overloadpacket.__name__
        if name in PRODUCTS:
            self.products.append((func, args, kwargs or {}))
        elif name.startswith(ATTENTION):
            self.attention.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def replay(*kinds: list[Call]) -> Contestant:
    def calls() -> None:
        with torch.no_grad():
            for kind in kinds:
                for func, args, keywords in kind:
                    func(*args, **keywords)

    return calls


def model_of(shape: GoEShape) -> GoEOriginalClassifier:
    width, inner, experts, steps, _, _ = shape
    small = {"num_heads": 2, "expert_layers": 1} if shape == QUICKSTART else {}
    return naive_goe.goe_original(width, inner, experts, steps, **small)


def batch_of(shape: GoEShape, padded: bool) -> Batch:
    ids_BL, keep_BL = naive_goe.padded_batch(shape[5], shape[4], padded)
    return Batch(ids_BL, keep_BL, torch.arange(len(ids_BL)) % 4, None, None, int(keep_BL.sum()))


def step_of(module: Any, batch: Batch, train: bool) -> Contestant:
    """A step of our model, or of the loop."""
    is_ours = isinstance(module, GoEOriginalClassifier)

    def forward() -> Tensor:
        logits: Tensor = logits_of(module, batch) if is_ours else module(batch.input_ids, batch.attention_mask)
        return logits

    def loss() -> Tensor:
        if not is_ours:
            return F.cross_entropy(forward(), batch.labels) + module.auxiliary_loss
        return module.task_loss(forward(), batch.labels) + (module.get_auxiliary_loss() or 0.0)

    if train:
        return training(module, loss, contextlib.nullcontext, 0.0)
    module.eval()
    if is_ours:
        module.stop_recording()

    def step() -> None:
        with torch.no_grad():
            forward()

    return step


def row_of(shape: GoEShape, padded: bool, train: bool, settings: Settings, seconds: float) -> Row:
    batch, ours = batch_of(shape, padded), model_of(shape)
    # The recorded step has one product per expert, so padding that another way of execution adds is no part of P.
    exact = model_of(shape)
    set_execution(exact, Execution("slices"))
    step = step_of(exact, batch, train)
    step()
    with Recorded() as recorded:
        step()
    contestants = {
        "P": replay(recorded.products),
        "PA": replay(recorded.products, recorded.attention),
        "ours": step_of(ours, batch, train),
        "loop": step_of(naive_goe.NaiveGoE(ours), batch, train),
    }
    rounds = measure(contestants, seconds, settings)
    row: Row = {
        "shape": "quickstart" if shape == QUICKSTART else goe_name(shape),
        "data": "50 % padding" if padded else "full",
        "what": "train" if train else "infer",
    }
    row |= {f"{one}/{of}": rounds.ratio(one, of) for one in ("loop", "ours") for of in ("P", "PA")}
    row |= {"ours, x loop": rounds.faster("ours", "loop")}
    return (
        row | {f"{name}, ms": 1000 * rounds.median(name) for name in contestants} | {"rounds": len(rounds.seconds["P"])}
    )


def floors(settings: Settings) -> dict[str, list[Row]]:
    """Training on full and padded batches, and inference on full ones, beside the replays."""
    shapes = GOE_TINY if settings.tiny else GOE
    tasks = [(shape, padded, True) for padded in (False, True) for shape in shapes]
    tasks += [(shape, False, False) for shape in shapes]
    if not settings.tiny:
        tasks += [(QUICKSTART, False, True), (QUICKSTART, False, False)]
    for padded in (False, True):
        batch = batch_of(shapes[-1], padded)
        naive_goe.check(model_of(shapes[-1]), batch.input_ids, batch.attention_mask, batch.labels)
    rows = [row_of(*task, settings, settings.share(len(tasks) - number)) for number, task in enumerate(tasks)]
    return {"A step of goe_original beside its products (P), with attention (PA), and a loop over experts": rows}


KINDS = {  # of operations, by the beginning of their names
    "products": PRODUCTS,
    "attention": (ATTENTION,),
    "activation": ("gelu",),
    "norms": ("native_layer_norm",),
    "copies": ("copy_", "cat", "index", "scatter", "gather", "fill_", "clone", "new_zeros"),
    "arithmetic": ("mul", "add", "div", "sub", "sum", "mean", "softmax", "_softmax", "log", "sigmoid"),
    "optimizer": ("_fused_adamw",),
}


def kind_of(name: str) -> str:
    """The kind of an event of the profiler; the rest has no arithmetic: views, new memory, autograd, Python."""
    own = name.removeprefix("aten::")
    return next((kind for kind, starts in KINDS.items() if name != own and own.startswith(starts)), "calls")


def shares(settings: Settings) -> dict[str, list[Row]]:
    """What share of the CPU time of a training step each kind of operation has. Recording makes calls dearer."""
    rows: list[Row] = []
    for shape in GOE_TINY if settings.tiny else GOE:
        for padded in (False, True):
            step = step_of(model_of(shape), batch_of(shape, padded), True)
            for _ in range(WARM_UP):
                step()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
                for _ in range(PROFILED):
                    step()
            seconds: Counter[str] = Counter()
            for event in recorded.key_averages():
                seconds[kind_of(event.key)] += event.self_cpu_time_total
            row: Row = {"shape": goe_name(shape), "data": "50 % padding" if padded else "full"}
            row |= {f"{kind}, %": round(100 * seconds[kind] / seconds.total()) for kind in (*KINDS, "calls")}
            rows.append(row | {"events": sum(event.count for event in recorded.key_averages()) // PROFILED})
    return {"Where the time of a training step goes": rows}


def spare_rows(settings: Settings) -> dict[str, list[Row]]:
    """What one batched product for all experts gains in training over a product per expert.

    The limit in `layers/even.py` is in the same unit: multiplications in vain per product that is saved.
    """
    shapes, rows = EVEN[:1] if settings.tiny else EVEN, []
    for number, shape in enumerate(shapes):
        model, batch = model_of(shape), batch_of(shape, False)
        seen: list[tuple[list[int], int, int, float]] = []

        def batched(*sizes: Any, seen: list[Any] = seen) -> bool:
            seen.append(sizes)
            return True

        contestants = {
            "batched": with_rule(step_of(model, batch, True), batched),
            "per expert": with_rule(step_of(model, batch, True), lambda *_: False),
        }
        rounds = measure(contestants, settings.share(len(shapes) - number), settings)
        steps = seen[: shape[3]]
        vain = statistics.mean(even.in_vain(*sizes) for sizes in steps)
        gain = rounds.faster("batched", "per expert")
        rows.append({"shape": goe_name(shape), "in vain": round(vain), "limit": even.MAX_VAIN, "x per expert": gain})
    return {"One batched product per map over one product per expert": rows}


def with_rule(step: Contestant, rule: Callable[..., bool]) -> Contestant:
    """The step with another answer to the question whether a batched product pays."""

    def called() -> None:
        with mock.patch.object(experts, "pays", rule):
            step()

    return called


def predicting(settings: Settings) -> dict[str, list[Row]]:
    """Samples per second of `load(...).predict` and of `goe predict`, beside the naive loop over the same batches.

    The loop computes probabilities only. The others also check their input and describe every sample.
    """
    config = load_json(ROOT / "examples/configs/quickstart.json")
    config["epochs"], config["training_params"] = 1, {"num_threads": settings.threads, "device": settings.device}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        result = run(config_from_dict(config), db="results.db", quiet=True)
        trained = TrainedModel(Path(result.folder))
        model = trained.model
        assert isinstance(model, GoEOriginalClassifier)
        naive = naive_goe.NaiveGoE(model).eval()
        ids_NL = np.random.default_rng(0).integers(1, 9, (256 if settings.tiny else 8192, 3))
        lines = Path("lines.txt")
        lines.write_text("\n".join(" ".join(map(str, row)) for row in ids_NL) + "\n")
        inputs, ids = list(ids_NL), torch.from_numpy(ids_NL)

        def loop() -> None:
            with torch.no_grad():
                for part_BL in ids.split(BATCH_SIZE):
                    naive(part_BL, torch.ones_like(part_BL, dtype=torch.bool)).softmax(-1)

        def command() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                cli(["predict", "--run", result.experiment_id, "--db", "results.db", "--file", str(lines)])

        contestants = {"naive loop": loop, "load(...).predict": lambda: trained.predict(inputs), "goe predict": command}
        rounds = measure(contestants, settings.share(1), settings)
    rows: list[Row] = [
        {
            "what": name,
            "samples per second": len(inputs) / rounds.median(name),
            "x naive loop": rounds.faster(name, "naive loop"),
        }
        for name in contestants
    ]
    return {"Prediction with the quickstart's model": rows}


def main() -> None:
    settings = Settings(**vars(argument_parser(__doc__).parse_args()))
    tables: dict[str, list[Row]] = {}
    for question in (floors, shares, spare_rows, predicting):
        tables |= question(replace(settings))  # each with the whole time
    report("floors", settings, tables, name="floors")


if __name__ == "__main__":
    main()
