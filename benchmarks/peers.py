"""How fast models train and infer beside named peers of equal size, as interleaved ratios.

A training step is forward, loss, backward and fused AdamW on all sides, an inference a forward pass without gradients.
"x" columns say how many times faster ours is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

import naive_goe
import peer_models
import torch
from peer_models import Shape
from timing import (
    NOT_MEASURED,
    Contestant,
    Rounds,
    Row,
    Settings,
    ask,
    installed,
    measure,
    with_gpu_row,
)
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.annotations import Precision
from research_eval.datasets.token_data import Batch
from research_eval.models.base_model import EvaluableModel, logits_of
from research_eval.models.goe_original import GoEOriginalClassifier
from research_eval.models.moe import RoutedFeedForward

DENSE = [Shape(256, 4, 128, 8, 8000), Shape(128, 4, 64, 32, 1000), Shape(64, 2, 32, 64, 100)]
DENSE_GPU = [Shape(512, 8, 256, 64, 32000), Shape(1024, 8, 512, 32, 32000)]
DENSE_TINY = [Shape(16, 1, 4, 2, 10)]
MOE = [(64, 256, 4, 2, 1024), (128, 512, 8, 2, 2048), (256, 512, 16, 2, 2048), (128, 64, 64, 8, 2048)]
MOE_GPU = [(1024, 4096, 8, 2, 16384), (1024, 512, 64, 8, 16384)]
MOE_TINY = [(16, 32, 4, 2, 8)]
MOE_LM = (Shape(128, 2, 64, 32, 1000, 8, 2), 512)
MOE_LM_GPU = (Shape(1024, 8, 512, 16, 32000, 8, 2), 4096)
MOE_LM_TINY = (Shape(16, 1, 4, 2, 10, 4, 2), 48)
# width, inner width, experts, steps, length, batch
GOE = [(256, 1024, 4, 4, 128, 16), (128, 512, 8, 6, 64, 32), (64, 128, 16, 6, 32, 64), (64, 256, 4, 6, 32, 32)]
GOE_GPU = [(512, 2048, 16, 6, 128, 256)]
GOE_TINY = [(16, 32, 4, 2, 6, 4)]
BOTH: dict[str, Precision] = {"bf16": "bf16", "fp32": "fp32"}
ROOFLINE = [(64, 64, 64), (1024, 64, 64), (1024, 64, 256), (2048, 128, 512), (2048, 256, 256), (8192, 256, 1024)]
ROOFLINE_GPU = [(8192, 1024, 4096), (16384, 4096, 4096)]
Build = Callable[[], Contestant]
Autocast = Callable[[], AbstractContextManager[object]]
T = TypeVar("T")


def choice(settings: Settings, cpu: T, gpu: T, tiny: T) -> T:
    return tiny if settings.tiny else cpu if settings.device == "cpu" else gpu


def ratios(
    settings: Settings, contestants: Mapping[str, Build], rows_left: int, ours: str = "ours"
) -> tuple[Row, Rounds | None]:
    """Times faster than each peer and milliseconds of ours; peers whose package is missing are not measured."""
    peers = [name for name in contestants if name != ours]
    columns = [f"x {name}" for name in peers] + [f"{ours}, ms"]
    if not settings.available:
        return dict.fromkeys(columns, NOT_MEASURED), None
    built = {name: build() for name, build in contestants.items() if name in (ours, "matmul") or _has(name)}
    rounds = measure(built, settings.share(rows_left), settings)
    row: Row = {f"x {name}": rounds.faster(ours, name) if name in built else NOT_MEASURED for name in peers}
    return row | {f"{ours}, ms": 1000 * rounds.median(ours)}, rounds


def _has(name: str) -> bool:
    return installed("transformers") or name.split()[0] not in ("GPT-2", "BERT", "Mixtral", "OLMoE", "transformers")


def training(
    module: nn.Module, loss: Callable[[], Tensor], autocast: Autocast, rate: float | None = 1e-4
) -> Contestant:
    """One step: forward, loss, backward, and fused AdamW unless there is no rate."""
    optimizer = torch.optim.AdamW(module.train().parameters(), lr=rate or 0.0, fused=True)

    def step() -> None:
        with autocast():
            value = loss()
        value.backward()
        if rate is not None:
            optimizer.step()
        optimizer.zero_grad()

    return step


def inference(module: nn.Module, forward: Callable[[], Tensor], autocast: Autocast) -> Contestant:
    module.eval()
    for one in module.modules():
        if isinstance(one, EvaluableModel):
            one.stop_recording()  # as after `load`: a peer records nothing either

    def step() -> None:
        with torch.inference_mode(), autocast():
            forward()

    return step


def language_model(
    build: Callable[[], nn.Module], shape: Shape, train: bool, settings: Settings, precision: Precision | None = None
) -> Build:
    """Cross-entropy of the token at every position."""

    def built() -> Contestant:
        torch.manual_seed(0)
        runtime = settings.runtime(precision)
        module = settings.placed(build())
        ids_BL = shape.ids(settings.device)

        def loss() -> Tensor:
            return F.cross_entropy(module(ids_BL).flatten(0, 1), ids_BL.flatten())

        if train:
            return training(module, loss, runtime.autocast)
        return inference(module, lambda: module(ids_BL), runtime.autocast)

    return built


def dense(settings: Settings, dropout: float = 0.0) -> dict[str, list[Row]]:
    makers: dict[str, Callable[[Shape, float], nn.Module]] = {
        "ours": peer_models.ours,
        "GPT-2 (erf-GELU, causal)": peer_models.gpt2,
        "BERT": peer_models.bert,
        "nn.TransformerEncoderLayer": peer_models.Encoder,
    }
    tasks = [
        (shape, train)
        for shape in choice(settings, DENSE, DENSE_GPU, DENSE_TINY)
        for train in ((True,) if dropout else (True, False))
    ]
    rows = []
    for number, (shape, train) in enumerate(tasks):
        contestants = {
            name: language_model(functools.partial(make, shape, dropout), shape, train, settings)
            for name, make in makers.items()
        }
        row, _ = ratios(settings, contestants, len(tasks) - number)
        rows.append({"shape": str(shape), "what": "train" if train else "infer", **row})
    return {f"Dense language model, dropout {dropout}": with_gpu_row(rows, settings)}


def dense_dropout(settings: Settings) -> dict[str, list[Row]]:
    return dense(settings, 0.1)


def bf16(settings: Settings) -> dict[str, list[Row]]:
    rows = []
    shapes = choice(settings, DENSE, DENSE_GPU, DENSE_TINY)
    goe_shape = choice(settings, GOE, GOE_GPU, GOE_TINY)[0]
    left = 2 * len(shapes) + 2
    if settings.available and not settings.tiny and (rate := bf16_rate(settings)) < 1:
        reason = f"{NOT_MEASURED}: this machine multiplies at {rate:.2f} of the speed of fp32 in bf16"
        return {"bf16 autocast (ours) over fp32": [{"model": "dense, goe_original", "x fp32": reason}]}
    for shape in shapes:
        for train in (True, False):
            contestants = {
                name: language_model(functools.partial(peer_models.ours, shape), shape, train, settings, precision)
                for name, precision in BOTH.items()
            }
            row, _ = ratios(settings, contestants, left, ours="bf16")
            left -= 1
            rows.append({"model": "dense", "shape": str(shape), "what": "train" if train else "infer", **row})
    for train in (True, False):
        contestants = {
            "bf16": goe_contestant(goe_shape, False, train, 0.0, settings, None, "bf16"),
            "fp32": goe_contestant(goe_shape, False, train, 0.0, settings, None, "fp32"),
            "naive loop fp32": goe_contestant(goe_shape, False, train, 0.0, settings, "matmul", "fp32"),
        }
        row, _ = ratios(settings, contestants, left, ours="bf16")
        left -= 1
        rows.append(
            {"model": "goe_original", "shape": goe_name(goe_shape), "what": "train" if train else "infer", **row}
        )
    for row in rows:
        row["x naive loop fp32"] = row.pop("x naive loop fp32", "")
    return {"bf16 autocast (ours) over fp32": with_gpu_row(rows, settings)}


def bf16_rate(settings: Settings) -> float:
    """Speed of a product in bf16 over that in fp32."""
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    products = {name: _product(1024, 256, 256, dtype, False, settings) for name, dtype in dtypes.items()}
    return measure(products, 1.0, settings).faster("bf16", "fp32").median


def moe_layer(shape: tuple[int, int, int, int, int], kind: str, train: bool, settings: Settings) -> Build:
    """Forward and backward, or an inference, of one routed layer."""
    width, inner, experts, top_k, tokens = shape

    def built() -> Contestant:
        torch.manual_seed(0)
        runtime = settings.runtime()
        layer = RoutedFeedForward(width, inner, 0.0, experts, top_k)
        module: nn.Module = layer
        if kind.startswith("transformers"):
            module = peer_models.gelu_experts(layer, kind.split()[1])
        elif kind != "ours":
            module = peer_models.swiglu_experts(layer)
        module = settings.placed(module)
        x_SD = torch.randn(tokens, width, device=runtime.device, requires_grad=train)
        gradient_SD = torch.randn_like(x_SD)
        x = x_SD if kind == "ours" else x_SD.unsqueeze(0)

        def outputs() -> Tensor:
            out = module(x)
            outputs_SD: Tensor = out[0] if isinstance(out, tuple) else out  # ours gives its routing too
            return outputs_SD

        def forward_backward() -> None:
            with runtime.autocast():
                out = outputs()
            out.backward(gradient_SD.view_as(out).to(out.dtype))
            module.zero_grad()
            x_SD.grad = None

        module.train(train)
        return forward_backward if train else inference(module, outputs, runtime.autocast)

    return built


def same_layers(shape: tuple[int, int, int, int, int]) -> None:
    """AssertionError where transformers' experts of the same weights do not compute what ours do."""
    width, inner, experts, top_k, _ = shape
    layer = RoutedFeedForward(width, inner, 0.0, experts, top_k).eval()
    x_SD = torch.randn(64, width)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name:  # zero at the start
                parameter.normal_()
        for implementation in ("grouped_mm", "eager"):
            peer = peer_models.gelu_experts(layer, implementation)
            torch.testing.assert_close(layer(x_SD)[0], peer(x_SD.unsqueeze(0))[0], rtol=1e-4, atol=1e-5)


def moe(settings: Settings) -> dict[str, list[Row]]:
    shapes = choice(settings, MOE, MOE_GPU, MOE_TINY)
    if installed("transformers"):
        same_layers(shapes[0])
    tasks = [(shape, train) for shape in shapes for train in (True, False)]
    rows = []
    for number, (shape, train) in enumerate(tasks):
        kinds = ("ours", "transformers grouped_mm", "transformers eager", "Mixtral grouped_mm")
        row, _ = ratios(
            settings, {kind: moe_layer(shape, kind, train, settings) for kind in kinds}, len(tasks) - number
        )
        name = "d{} f{} E{} k{} T{}".format(*shape)
        rows.append({"shape": name, "what": "fwd+bwd" if train else "infer", **row})
    title = (
        "Routed feed-forward layer. transformers computes the same (its router and dispatch, our GELU experts); "
        "Mixtral's own experts are SwiGLU with two thirds of the inner width"
    )
    return {title: with_gpu_row(rows, settings)}


def moe_lm(settings: Settings) -> dict[str, list[Row]]:
    shape, inner = choice(settings, MOE_LM, MOE_LM_GPU, MOE_LM_TINY)
    makers = {
        "ours": lambda: peer_models.ours_moe(shape, inner),
        "Mixtral grouped_mm": lambda: peer_models.mixture("Mixtral", shape, inner),
        "OLMoE grouped_mm": lambda: peer_models.mixture("Olmoe", shape, inner),
    }
    rows = []
    for train in (True, False):
        contestants = {name: language_model(make, shape, train, settings) for name, make in makers.items()}
        row, _ = ratios(settings, contestants, 2 if train else 1)
        rows.append({"shape": f"{shape} f{inner}", "what": "train" if train else "infer", **row})
    title = (
        "MoE language model, no auxiliary loss. "
        "The peers are causal, with RMSNorm, RoPE and SwiGLU of two thirds of the inner width"
    )
    return {title: with_gpu_row(rows, settings)}


GoEShape = tuple[int, int, int, int, int, int]


def goe_name(shape: GoEShape) -> str:
    return "d{} f{} N{} path {} s{} b{}".format(*shape)


def goe_model(shape: GoEShape, dropout: float) -> GoEOriginalClassifier:
    width, inner, experts, steps, _, _ = shape
    return naive_goe.goe_original(width, inner, experts, steps, dropout=dropout)


def idle_behind(model: GoEOriginalClassifier, busy: int) -> None:
    """No path leads to the experts behind so many."""
    model.balance.bias[:, busy:] = -1e6


def goe_contestant(
    shape: GoEShape,
    padded: bool,
    train: bool,
    dropout: float,
    settings: Settings,
    attend: naive_goe.Attend | None,
    precision: Precision | None = None,
    rate: float | None = 0.0,
    busy: int | None = None,
) -> Build:
    """Ours, or with `attend` the naive loop. The learning rate is 0, so that all keep the same paths.

    With `busy` the experts behind so many are idle.
    """

    def built() -> Contestant:
        runtime = settings.runtime(precision)
        model = goe_model(shape, dropout)
        if busy is not None:
            idle_behind(model, busy)
        naive = None if attend is None else naive_goe.NaiveGoE(model, attend).to(runtime.device)
        model = settings.placed(model)
        ids_BL, keep_BL = (x.to(runtime.device) for x in naive_goe.padded_batch(shape[5], shape[4], padded))
        labels_B = torch.arange(len(ids_BL), device=runtime.device) % 4
        batch = Batch(ids_BL, keep_BL, labels_B, None, None, int(keep_BL.sum()))

        def forward() -> Tensor:
            if naive is not None:
                logits: Tensor = naive(ids_BL, keep_BL)
                return logits
            return logits_of(model, batch)

        def loss() -> Tensor:
            logits = forward()
            if naive is not None:
                return F.cross_entropy(logits, labels_B) + naive.auxiliary_loss
            return model.task_loss(logits, labels_B) + (model.get_auxiliary_loss() or 0.0)

        module = model if naive is None else naive
        return training(module, loss, runtime.autocast, rate) if train else inference(module, forward, runtime.autocast)

    return built


def goe_flops(shape: GoEShape, padded: bool) -> float:
    """Forward FLOPs of the executed paths over the real tokens."""
    model = goe_model(shape, 0.0)
    _, keep_BL = naive_goe.padded_batch(shape[5], shape[4], padded)
    return sum(model.get_flops_per_sample(int(length)) for length in keep_BL.sum(1))


def product(shape: GoEShape, settings: Settings) -> tuple[Build, float]:
    """A matrix product of the shape's feed-forward layer into a kept output, and its FLOPs."""
    width, inner, _, _, length, batch = shape

    def built() -> Contestant:
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        return _product(length * batch, width, inner, dtype, False, settings)

    return built, 2.0 * length * batch * width * inner


def goe(settings: Settings, train: bool = True, dropout: float = 0.0) -> dict[str, list[Row]]:
    shapes = choice(settings, GOE, GOE_GPU, GOE_TINY)
    if settings.available and not dropout:
        for padded in (False, True):
            batch = naive_goe.padded_batch(8, shapes[0][4], padded)
            naive_goe.check(goe_model(shapes[-1], 0.0), *batch, torch.arange(8) % 4)
    tasks = [(shape, padded) for shape in shapes for padded in (False, True)]
    rows = []
    for number, (shape, padded) in enumerate(tasks):
        matmul, flops = product(shape, settings)
        contestants = {
            "ours": goe_contestant(shape, padded, train, dropout, settings, None),
            "naive loop": goe_contestant(shape, padded, train, dropout, settings, "matmul"),
            "naive loop with SDPA": goe_contestant(shape, padded, train, dropout, settings, "sdpa"),
            "matmul": matmul,
        }
        row, rounds = ratios(settings, contestants, len(tasks) - number)
        del row["x matmul"]
        row["time over floor"] = NOT_MEASURED
        if rounds is not None:
            products = (3 if train else 1) * goe_flops(shape, padded) / flops
            row["time over floor"] = rounds.ratio("ours", "matmul", 1 / products)
        rows.append({"shape": goe_name(shape), "data": "50 % padding" if padded else "full", **row})
    what = f"training step, dropout {dropout}" if train else "inference"
    floor = "Floor: the products of the executed paths over real tokens, at the rate of one product into a kept output"
    return {f"goe_original, {what}. {floor}": with_gpu_row(rows, settings)}


def goe_infer(settings: Settings) -> dict[str, list[Row]]:
    return goe(settings, train=False)


def goe_dropout(settings: Settings) -> dict[str, list[Row]]:
    return goe(settings, dropout=0.1)


def roofline(settings: Settings) -> dict[str, list[Row]]:
    shapes = choice(settings, ROOFLINE, ROOFLINE_GPU, ROOFLINE[:1])
    rows = []
    for number, (m, k, n) in enumerate(shapes):
        row: Row = {"M x K x N": f"{m}x{k}x{n}"}
        columns = {"fp32, kept output": torch.float32, "fp32, fresh output": torch.float32, "bf16": torch.bfloat16}
        if settings.available:
            rounds = measure(
                {name: _product(m, k, n, dtype, "fresh" in name, settings) for name, dtype in columns.items()},
                settings.share(len(shapes) - number),
                settings,
            )
            row |= {f"{name}, GFLOP/s": 2e-9 * m * k * n / rounds.median(name) for name in columns}
            row["bf16 over fp32"] = rounds.faster("bf16", "fp32, kept output")
        else:
            row |= dict.fromkeys([*(f"{name}, GFLOP/s" for name in columns), "bf16 over fp32"], NOT_MEASURED)
        rows.append(row)
    return {"Matrix products": with_gpu_row(rows, settings)}


def _product(m: int, k: int, n: int, dtype: torch.dtype, fresh: bool, settings: Settings) -> Contestant:
    device = settings.runtime().device
    left, right = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return (lambda: torch.mm(left, right)) if fresh else (lambda: torch.mm(left, right, out=out))


def main() -> None:
    ask(__doc__, [roofline, dense, dense_dropout, bf16, moe, moe_lm, goe, goe_infer, goe_dropout])


if __name__ == "__main__":
    main()
