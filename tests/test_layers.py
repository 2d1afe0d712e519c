"""The parts of the models against slow and independent spellings of the same thing.

B batch  R rows sorted by expert  L length  D width  H heads  N experts  K experts per token  S tokens
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import executed_with
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from research_eval.annotations import AttentionRows, Kernels
from research_eval.datasets.token_data import Batches, TokenData
from research_eval.errors import ConfigError
from research_eval.layers.block import Attention, Block
from research_eval.layers.dispatch import Dispatch
from research_eval.layers.even import Even
from research_eval.layers.experts import ExpertPool
from research_eval.layers.losses import cross_entropy
from research_eval.layers.packing import Layout, Packing, attention_mask_for
from research_eval.layers.path.router import Router
from research_eval.layers.settings import feed_forward_width
from research_eval.layers.stacked import Dropout, StackedLayerNorm, StackedLinear, one_pass, weight_count
from research_eval.layers.text import ClassificationHead, TokenEmbedding, masked_max, masked_mean
from research_eval.models.moe import RoutedFeedForward
from research_eval.registry import MODELS_MAP
from research_eval.schema import context_arguments
from research_eval.tasks.classification import Classification
from research_eval.training.evaluate import measure_flops
from research_eval.training.runtime import Runtime

seeds = st.integers(0, 2**16)
group_sizes = st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any)


def scramble(module: nn.Module) -> None:
    """Biases, scales and tags start at round values, which would hide a parameter that is never read."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def dispatch_of(sizes: list[int]) -> Dispatch:
    return Dispatch(sizes)


def experts_of(sizes: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def keep_of(lengths: list[int], width: int) -> torch.Tensor:
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def assert_same_map(
    module: nn.Module,
    fast: Callable[[torch.Tensor], torch.Tensor],
    slow: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
) -> None:
    """Equal outputs, and equal gradients of a random functional of them in the input and in every parameter."""
    x.requires_grad_()
    outputs = [fast(x), slow(x)]
    assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(outputs[0])
    inputs = [x, *module.parameters()]
    gradients = [torch.autograd.grad((y * direction).sum(), inputs, allow_unused=True) for y in outputs]
    for first, second, tensor in zip(*gradients, inputs, strict=True):
        zero = torch.zeros_like(tensor)
        assert_close(zero if first is None else first, zero if second is None else second, rtol=1e-5, atol=1e-5)


def alone(pool: nn.Module, expert: int) -> dict[str, torch.Tensor]:
    """The parameters of one expert, for a pool that has no other."""
    return {name: parameter[expert : expert + 1] for name, parameter in pool.named_parameters()}


# ------------------------------------------------------------------------------------- fast dispatch = the plain loop


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    kernels=st.sampled_from(["auto", "slices", "grouped"]),
    name=st.sampled_from(["dense", "looped", "moe", "goe", "goe_original"]),
    encoding=st.sampled_from(["sin", "rope", "alibi"]),
    pool=st.sampled_from(["mean", "max", "first", "last"]),
    width=st.sampled_from([8, 24]),
    num_experts=st.integers(1, 5),
    padding=st.sampled_from(["none", "right", "anywhere", "much"]),
    chained=st.booleans(),
)
def test_fast_and_plain_kernels_agree(
    seed: int,
    kernels: Kernels,
    name: str,
    encoding: str,
    pool: str,
    width: int,
    num_experts: int,
    padding: str,
    chained: bool,
) -> None:
    """Outputs and all gradients of whole models in fp32, wherever the padding is."""
    torch.manual_seed(seed)
    batch, length = int(torch.randint(1, 24, ())), int(torch.randint(1, 9, ()))
    ids_BL = torch.randint(1, 11, (batch, length))
    keep_BL = torch.ones(batch, length, dtype=torch.bool)
    if padding == "right":
        keep_BL = keep_of(torch.randint(1, length + 1, (batch,)).tolist(), length)
    elif padding == "much":
        keep_BL = keep_of((torch.randint(0, length + 1, (batch,)) // 2).tolist(), length)
    elif padding == "anywhere":
        keep_BL = torch.rand(batch, length) < 0.6
        pool = "mean" if pool == "last" else pool  # the last token is only defined for padding on the right
        keep_BL[:, 0] |= pool == "first"
    counts = {"num_experts": num_experts, "num_total_experts": num_experts, "max_path_len": 3}
    sizes = {"vocab_size": 11, "num_classes": 3, "embed_dim": width, "num_heads": 2, "dropout": 0.0}
    more = {"top_k_experts": min(2, num_experts), "positional_encoding": encoding, "pool": pool, "max_visits": 3}
    model = MODELS_MAP[name](**context_arguments(MODELS_MAP[name], counts | sizes | more))
    scramble(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("research_eval.layers.kernels.plain.MIN_CHAIN", 0 if chained else 20_000)
        patch.setattr("research_eval.layers.even.MAX_VAIN", math.inf)  # "auto" then takes one product for all experts
        assert_same_numbers(model, ids_BL, keep_BL, kernels)


def assert_same_numbers(
    model: nn.Module,
    ids_BL: torch.Tensor,
    keep_BL: torch.Tensor,
    kernels: Kernels,
    attention: AttentionRows = "padded",
) -> None:
    """The model gives the same outputs and gradients as with the plain kernels."""
    results = []
    for execution in (("plain", "padded"), (kernels, attention)):
        twin = copy.deepcopy(model)
        with executed_with(twin, *execution):
            logits_BC = twin(ids_BL, attention_mask=keep_BL)
            (logits_BC.square().sum() + twin.get_auxiliary_loss()).backward()
        results.append([logits_BC, *(p.grad for p in twin.parameters() if p.grad is not None and p.grad.any())])
    scale = max(1.0, *(float(value.detach().abs().max()) for value in results[0]))
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("encoding", ["sin", "rope", "alibi"])
@pytest.mark.parametrize("anywhere", [False, True])
@pytest.mark.parametrize("name", ["dense", "looped", "moe", "goe", "goe_original"])
def test_attention_over_rows_gives_the_numbers_of_padded_grids(
    name: str, anywhere: bool, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the samples are sorted by expert; encodings that need places keep the grids."""
    torch.manual_seed(0)
    keep_BL = keep_of(torch.randint(0, 9, (20,)).tolist(), 8)
    if anywhere:
        keep_BL = torch.rand(20, 8) < 0.6
    sizes = {"vocab_size": 11, "num_classes": 3, "embed_dim": 16, "num_heads": 2, "dropout": 0.0, "num_experts": 4}
    more = {"num_total_experts": 4, "max_path_len": 3, "positional_encoding": encoding}
    model = MODELS_MAP[name](**context_arguments(MODELS_MAP[name], sizes | more))
    scramble(model)
    attended = slow_varlen(monkeypatch)
    assert_same_numbers(model, torch.randint(1, 11, keep_BL.shape), keep_BL, "grouped", "varlen")
    assert bool(attended) == (encoding == "sin"), "and it is that attention that was executed"


def slow_varlen(patch: pytest.MonkeyPatch, reads: bool = True) -> list[int]:
    """Put a slow form of the kernel for rows without padding in its place; from now on, the rows of each call.

    Rows of other samples are masked. Unless it `reads`, nothing is read back from the device.
    """
    calls: list[int] = []

    def kernel(query: Any, key: Any, value: Any, starts: Any, same: Any, longest: int, same_longest: int) -> Any:
        assert starts is same and starts.dtype == torch.int32 and longest == same_longest
        assert not reads or (starts[0] == 0 and starts[-1] == len(query) and int(starts.diff().max()) <= longest)
        sample_S = torch.searchsorted(starts[1:], torch.arange(len(query), dtype=torch.int32), right=True)
        calls.append(len(query))
        parts = (part.transpose(0, 1) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(*parts, sample_S.unsqueeze(1) == sample_S)
        return attended.transpose(0, 1)

    patch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    patch.setattr("research_eval.layers.kernels.varlen.can_attend", lambda qkv, channels: True)
    return calls


def spare_rows(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of places of every batched step from now on, of which any number may be spare."""
    made: list[int] = []
    of = Even.of

    def noted(*arguments: Any) -> Even:
        even = of(*arguments)
        made.append(len(even.source_S))
        return even

    monkeypatch.setattr(Even, "of", noted)
    monkeypatch.setattr("research_eval.layers.even.MAX_VAIN", math.inf)
    return made


@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.1, True), (0.0, False)])
def test_spare_rows_change_no_draw_and_no_evaluation(
    dropout: float, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small experts have them in training without dropout only."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "num_classes": 3, "embed_dim": 16, "num_heads": 2, "dropout": dropout}
    model = MODELS_MAP["goe_original"](**context_arguments(MODELS_MAP["goe_original"], sizes)).train(training)
    made = spare_rows(model, monkeypatch)
    model(torch.randint(1, 11, (32, 5)))
    assert bool(made) == (training and not dropout)
    assert all(number > 32 for number in made)


def test_spare_rows_do_not_count_as_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 11, "num_classes": 3, "embed_dim": 16, "num_heads": 2, "dropout": 0.0}
    model = MODELS_MAP["goe_original"](**context_arguments(MODELS_MAP["goe_original"], sizes))
    made = spare_rows(model, monkeypatch)
    rows_NL = np.random.default_rng(0).integers(1, 11, (24, 5))
    batches = Batches(TokenData.from_padded(rows_NL, np.zeros(24, np.int64)), 8)
    measure_flops(model, batches, Runtime("cpu"))
    assert not made
    model.train().run(batches.take(np.arange(8)))
    assert made, "it has them when it trains"


@pytest.mark.parametrize("copies", [1, 3])
def test_a_router_with_one_input_for_all_steps_computes_them_together(copies: int) -> None:
    """The logits, the statistics and the gradients are those of a call per step."""
    torch.manual_seed(0)
    router = Router(4, 8, 3, 3, 1.0, per_step=copies > 1, standardize=True)
    routers = [router, copy.deepcopy(router)]
    for _ in range(2):
        summary_BS, visits_TBN = torch.randn(6, 8), torch.rand(3, 6, 3)
        known = routers[0].of_all_steps(summary_BS, 3)
        together = [routers[0](known.summary[t], visits_TBN[t], t, known=known) for t in range(3)]
        apart = [routers[1](routers[1].standardized(summary_BS, None, t), visits_TBN[t], t) for t in range(3)]
        direction = torch.randn(3, 6, 4)
        for logits in (together, apart):
            (torch.stack(logits) * direction).sum().backward()
        assert_close(together, apart, rtol=1e-5, atol=1e-6)
    for one, other in zip(routers[0].parameters(), routers[1].parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)
    for one, other in zip(routers[0].buffers(), routers[1].buffers(), strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, smoothing=st.sampled_from([0.0, 0.1, 1.0]), batch=st.integers(1, 5), classes=st.integers(2, 9))
def test_the_loss_of_many_classes_is_torchs(seed: int, smoothing: float, batch: int, classes: int) -> None:
    torch.manual_seed(seed)
    labels_B = torch.randint(classes, (batch,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("research_eval.layers.losses.MANY_CLASSES", 0)
        patch.setattr("research_eval.layers.losses.CHUNK", 12)
        assert_same_map(
            nn.Identity(),
            lambda x: cross_entropy(x, labels_B, smoothing),
            lambda x: F.cross_entropy(x, labels_B, label_smoothing=smoothing),
            20 * torch.randn(batch, classes).double(),
        )


def test_the_loss_of_many_classes_keeps_no_copy_of_the_scores() -> None:
    logits_BC = torch.randn(8, 5000, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        loss = cross_entropy(logits_BC, torch.arange(8))
    assert sorted(sizes) == [8, 8, logits_BC.numel()], "the scores themselves, and a number per sample"
    loss.backward()
    assert_close(logits_BC.grad.sum(-1), torch.zeros(8), atol=1e-6, rtol=0)  # type: ignore[union-attr]


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        waits = ("_local_scalar_dense", "aten.nonzero.", "masked_select", "aten.equal", "bincount", "is_nonzero")
        indices = args[1] if name.startswith(("aten.index.", "aten.index_put")) else []
        masks = [part for part in indices if part is not None and part.dtype == torch.bool]
        assert not masks and not any(word in name for word in waits), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("padded", "attention"), [(False, "padded"), (True, "padded"), (True, "varlen")])
@pytest.mark.parametrize("name", ["dense", "moe", "goe", "goe_original"])
def test_a_training_step_reads_nothing_back(
    name: str, padded: bool, attention: AttentionRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward with the kernels of a GPU, for a batch whose tokens were counted when it was made."""
    sizes = {"vocab_size": 11, "num_classes": 3, "embed_dim": 16, "num_heads": 2, "dropout": 0.1}
    model = MODELS_MAP[name](**context_arguments(MODELS_MAP[name], sizes)).train()
    lengths = [5, 3, 1, 5] if padded else [5, 5, 5, 5]
    tokens = np.random.default_rng(0).integers(1, 11, sum(lengths)).astype(np.int32)
    offsets = np.array([0, *np.cumsum(lengths)])
    batch = Batches(TokenData(tokens, offsets, np.array([0, 1, 2, 0])), 4).take(np.arange(4))
    attended = slow_varlen(monkeypatch, reads=False)
    with executed_with(model, "grouped", attention):
        for number in range(2):  # the first pass may fill caches
            with NoWaiting() if number else contextlib.nullcontext():
                task, terms = model.losses(model.run(batch), batch.labels, Classification())
                sum((term.weight * term.raw for term in terms.values()), start=task).backward()
                model.after_step(0.5)
    assert bool(attended) == (attention == "varlen")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a CUDA device")
@pytest.mark.parametrize("name", ["dense", "goe_original"])
def test_rows_without_padding_give_the_numbers_of_padded_ones_on_a_gpu(name: str) -> None:
    sizes = {"vocab_size": 11, "num_classes": 3, "embed_dim": 32, "num_heads": 2, "dropout": 0.0}
    model = MODELS_MAP[name](**context_arguments(MODELS_MAP[name], sizes)).cuda().eval()
    keep_BL = keep_of([9, 3, 1, 7], 9).cuda()
    ids_BL = torch.randint(1, 11, keep_BL.shape, device="cuda")
    found = []
    for attention in get_args(AttentionRows):
        with executed_with(model, "grouped", attention), torch.autocast("cuda", torch.bfloat16):
            found.append(model(ids_BL, attention_mask=keep_BL).float())
    assert_close(*found, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", ["dense", "moe", "goe", "goe_original"])
def test_what_a_hook_has_seen_is_not_overwritten(name: str) -> None:
    """Without gradients, some steps write into the output of the module before them. With a hook there, they do not."""
    sizes = {"vocab_size": 11, "num_classes": 3, "embed_dim": 16, "num_heads": 2}
    model = MODELS_MAP[name](**context_arguments(MODELS_MAP[name], sizes)).eval()
    scramble(model)
    tokens = np.random.default_rng(0).integers(1, 11, 20).astype(np.int32)
    batch = Batches(TokenData(tokens, np.arange(0, 25, 5), np.array([0, 1, 2, 0])), 4).take(np.arange(4))
    with torch.no_grad():
        alone = model.run(batch).outputs
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(_module: nn.Module, given: Any, made: Any) -> None:
        tensors = [one for one in (*given, *(made if isinstance(made, tuple) else (made,))) if torch.is_tensor(one)]
        seen.extend((one, one.clone()) for one in tensors)

    for module in model.modules():
        module.register_forward_hook(look)
    with torch.no_grad():
        watched = model.run(batch).outputs
    assert len(seen) > 10
    assert all(kept.equal(copied) for kept, copied in seen)
    assert watched.equal(alone)
    assert_close(model.run(batch).outputs, alone, rtol=1e-5, atol=1e-5)  # with gradients nothing is overwritten


def test_a_stacked_map_has_the_weights_that_it_is_given() -> None:
    layer, x, dispatch = StackedLinear(2, 3, 4), torch.randn(5, 3), dispatch_of([2, 3])

    def is_right(layer: StackedLinear) -> bool:
        with torch.no_grad():
            right = torch.cat([F.linear(rows, *w) for rows, w in zip(x.split([2, 3]), weights_of(layer), strict=True)])
            one_by_one = [layer(rows, Dispatch([len(rows)], expert=n)) for n, rows in enumerate(x.split([2, 3]))]
            found = (layer(x, dispatch), torch.cat(one_by_one))
            return all(torch.allclose(each, right, atol=1e-6) for each in found)

    def weights_of(layer: StackedLinear) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(layer.weight, layer.bias, strict=True))

    assert is_right(layer)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert is_right(layer) and is_right(copied)
    layer.weight.data = torch.randn(2, 4, 3)  # another place in memory
    assert is_right(layer)
    layer.bias = nn.Parameter(torch.randn(2, 4))
    assert is_right(layer)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, sizes=group_sizes, inputs=st.integers(1, 5), outputs=st.integers(1, 5), tokens=st.booleans())
def test_stacked_linear_is_one_linear_map_per_row(
    seed: int, sizes: list[int], inputs: int, outputs: int, tokens: bool
) -> None:
    torch.manual_seed(seed)
    layer, dispatch = StackedLinear(len(sizes), inputs, outputs).double(), dispatch_of(sizes)
    scramble(layer)

    def slow(x: torch.Tensor) -> torch.Tensor:
        pairs = zip(x, experts_of(sizes), strict=True)
        return torch.stack([F.linear(row, layer.weight[expert], layer.bias[expert]) for row, expert in pairs])

    shape = (sum(sizes), 3, inputs) if tokens else (sum(sizes), inputs)
    assert_same_map(layer, lambda x: layer(x, dispatch), slow, torch.randn(shape).double())


@settings(deadline=None, max_examples=15)
@given(seed=seeds, sizes=group_sizes, width=st.integers(2, 6))
def test_stacked_layer_norm_is_one_norm_per_row(seed: int, sizes: list[int], width: int) -> None:
    torch.manual_seed(seed)
    layer, dispatch = StackedLayerNorm(len(sizes), width).double(), dispatch_of(sizes)
    scramble(layer)

    def slow(x: torch.Tensor) -> torch.Tensor:
        pairs = zip(x, experts_of(sizes), strict=True)
        return torch.stack([F.layer_norm(row, (width,), layer.scale[e], layer.shift[e]) for row, e in pairs])

    x = torch.randn(sum(sizes), 3, width).double()
    assert_same_map(layer, lambda x: layer(x, dispatch), slow, x)
    if len(sizes) == 1:
        assert_same_map(layer, lambda x: layer(x, Dispatch.single(len(x))), slow, x)


def test_the_gradients_of_a_pass_are_those_of_all_its_uses_and_of_no_other_pass() -> None:
    """Also where only a part of them is asked for first, and where a pass goes backward twice."""
    layer, sizes = StackedLinear(3, 4, 4).double(), [2, 0, 3]  # the second is idle
    scramble(layer)
    x = torch.randn(5, 4).double().requires_grad_()
    with one_pass(layer):
        fast = layer(layer(x, dispatch_of(sizes)).sin(), dispatch_of(sizes)).square().sum()
    slow = x
    for function in (torch.sin, torch.square):
        rows = [layer.weight[e] @ row + layer.bias[e] for row, e in zip(slow, experts_of(sizes), strict=True)]
        slow = function(torch.stack(rows))
    expected = torch.autograd.grad(slow.sum(), [x, layer.weight, layer.bias])
    assert_close(torch.autograd.grad(fast, x, retain_graph=True)[0], expected[0])
    for _ in range(2):
        assert_close(torch.autograd.grad(fast, [x, layer.weight, layer.bias], retain_graph=True), expected)


def test_frozen_experts_pass_gradients_on() -> None:
    layer = StackedLinear(2, 3, 3).requires_grad_(False)
    x = torch.randn(4, 3, requires_grad=True)
    layer(x, dispatch_of([1, 3])).sum().backward()
    assert_close(x.grad, layer.weight.sum(1)[experts_of([1, 3])])
    assert layer.weight.grad is None


def test_no_rows_at_all_pass_a_stacked_map() -> None:
    assert StackedLinear(3, 4, 5)(torch.zeros(0, 2, 4), dispatch_of([0, 0, 0])).shape == (0, 2, 5)


@settings(deadline=None, max_examples=25)
@given(
    seed=seeds,
    num_steps=st.integers(1, 3),
    num_experts=st.integers(1, 4),
    num_layers=st.integers(1, 2),
    gated=st.booleans(),
    adaptive_gate=st.booleans(),
    data=st.data(),
)
def test_a_path_through_the_pool_is_every_sample_alone(
    seed: int, num_steps: int, num_experts: int, num_layers: int, gated: bool, adaptive_gate: bool, data: st.DataObject
) -> None:
    """Each sample goes without its padding and without its batch mates through a pool of its own expert."""
    steps = st.lists(st.integers(0, num_experts), min_size=num_steps, max_size=num_steps)
    paths = data.draw(st.lists(steps, min_size=1, max_size=6), "paths, the last expert does nothing")
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=len(paths), max_size=len(paths)), "lengths")
    torch.manual_seed(seed)
    pool = ExpertPool(num_experts, num_layers, 8, 2, 12, 0.0, gated, adaptive_gate).double()
    scramble(pool)
    single = ExpertPool(1, num_layers, 8, 2, 12, 0.0, gated, adaptive_gate)
    keep_BL = keep_of(lengths, 5)
    choice_BT, coefficient_BT = torch.tensor(paths), torch.rand(len(paths), num_steps).double() * 2

    def fast(h_BLD: torch.Tensor) -> torch.Tensor:
        for choice_B, coefficient_B in zip(choice_BT.unbind(1), coefficient_BT.unbind(1), strict=True):
            h_BLD = pool.step(h_BLD, Packing(keep_BL), choice_B, coefficient_B).h_BLD
        return h_BLD * keep_BL.unsqueeze(-1)

    def slow(h_BLD: torch.Tensor) -> torch.Tensor:
        rows = []
        for h_LD, path, length, coefficients in zip(h_BLD, paths, lengths, coefficient_BT, strict=True):
            h_1LD, everything = h_LD[None, :length], torch.ones(1, length, dtype=torch.bool)
            for expert, coefficient in zip(path, coefficients, strict=True):
                if expert < num_experts:
                    image = functional_call(single, alone(pool, expert), (h_1LD, everything, Dispatch.single(1)))
                    h_1LD = h_1LD + coefficient * (image - h_1LD)
            rows.append(F.pad(h_1LD[0], (0, 0, 0, 5 - length)))
        return torch.stack(rows)

    assert_same_map(pool, fast, slow, torch.randn(len(paths), 5, 8).double())


def test_a_step_reports_what_each_running_sample_was_given() -> None:
    pool = ExpertPool(3, 1, 8, 2, 12, 0.0)
    h_BLD, keep_BL, choice_B = torch.randn(5, 4, 8), keep_of([4, 2, 3, 1, 4], 4), torch.tensor([2, 3, 0, 2, 0])
    step = pool.step(h_BLD, Packing(keep_BL), choice_B, torch.ones(5), pooled=True)
    rows = [2, 4, 0, 3]  # sorted by expert, then by place; sample 1 stopped
    assert step.experts_R.tolist() == [0, 0, 2, 2]
    assert step.delta_RD is not None
    assert_close(step.delta_RD, masked_mean(step.h_BLD - h_BLD, keep_BL)[rows], rtol=1e-5, atol=1e-6)
    assert torch.equal(step.h_BLD[1], h_BLD[1])


@settings(deadline=None, max_examples=25)
@given(seed=seeds, num_experts=st.integers(1, 5), tokens=st.integers(1, 7), data=st.data())
def test_routed_feed_forward_is_a_loop_over_tokens(
    seed: int, num_experts: int, tokens: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts), "experts per token")
    torch.manual_seed(seed)
    routed = RoutedFeedForward(4, 6, 0.0, num_experts, top_k)
    scramble(routed)
    routed.balance_bias.copy_(torch.randn(num_experts) * 0.1)

    def slow(x_SD: torch.Tensor) -> torch.Tensor:
        rows = []
        for x_D in x_SD:
            scores_N = (routed.router.weight @ x_D).softmax(0)
            ranked = sorted(range(num_experts), key=lambda e: -float(scores_N.detach()[e] + routed.balance_bias[e]))
            chosen = ranked[:top_k]
            total = sum(scores_N[e] for e in chosen) if top_k > 1 else 1.0
            expand, contract = routed.experts.expand, routed.experts.contract
            images = []
            for e in chosen:
                hidden = F.gelu(expand.weight[e] @ x_D + expand.bias[e])
                images.append(scores_N[e] / total * (contract.weight[e] @ hidden + contract.bias[e]))
            rows.append(torch.stack(images).sum(0))
        return torch.stack(rows)

    x_SD = torch.randn(tokens, 4)
    assert_same_map(routed, lambda x_SD: routed(x_SD)[0], slow, x_SD)
    assert_close(routed(x_SD)[1].load().sum(), torch.tensor(1.0))


# -------------------------------------------------------------------------------------------------------- the blocks


def naive_attention(layer: Attention, expert: int, h_LD: torch.Tensor) -> torch.Tensor:
    """Head by head and query by query; the gate reads [y; A] through one matrix."""
    width = h_LD.shape[-1]
    y_LD = F.layer_norm(h_LD, (width,)) * layer.norm.scale[expert] + layer.norm.shift[expert]
    weights, biases = layer.input.weight[expert].split(width), layer.input.bias[expert].split(width)
    query_LD, key_LD, value_LD = (y_LD @ w.T + b for w, b in zip(weights[:3], biases[:3], strict=True))
    rows = []
    for query_D in query_LD:
        heads = []
        for part in torch.arange(width).chunk(layer.num_heads):
            attention_L = (key_LD[:, part] @ query_D[part] / math.sqrt(len(part))).softmax(0)
            heads.append(attention_L @ value_LD[:, part])
        rows.append(torch.cat(heads))
    attended_LD = torch.stack(rows) @ layer.output.weight[expert].T + layer.output.bias[expert]
    if layer.gate is None:
        return attended_LD
    joint = torch.cat([weights[3], layer.gate.weight[expert]], dim=1)
    gate_LD = torch.sigmoid(torch.cat([y_LD, attended_LD], dim=1) @ joint.T + biases[3] + layer.gate.bias[expert])
    return gate_LD * attended_LD


@pytest.mark.parametrize("gated", [False, True])
def test_attention_is_the_formula(gated: bool) -> None:
    layer = Attention(8, 4, num_experts=2, gated=gated)
    scramble(layer)
    lengths, dispatch = [3, 5, 1], dispatch_of([2, 1])
    h_BLD = torch.randn(3, 5, 8)
    fast = layer(h_BLD, Layout.whole(keep_of(lengths, 5)), dispatch)
    for h_LD, result_LD, length, expert in zip(h_BLD, fast, lengths, [0, 0, 1], strict=True):
        assert_close(result_LD[:length], naive_attention(layer, expert, h_LD[:length]), rtol=1e-5, atol=1e-5)


def test_the_dense_block_is_a_transformer_encoder_layer() -> None:
    block = Block(8, 2, 20, dropout=0.0)
    scramble(block)
    peer = nn.TransformerEncoderLayer(8, 2, 20, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    attention, feed_forward = block.attention, block.feed_forward
    pairs: Iterator[tuple[torch.Tensor, torch.Tensor]] = zip(
        (
            *(peer.norm1.weight, peer.norm1.bias, peer.norm2.weight, peer.norm2.bias),
            *(peer.self_attn.in_proj_weight, peer.self_attn.in_proj_bias),
            *(peer.self_attn.out_proj.weight, peer.self_attn.out_proj.bias),
            *(peer.linear1.weight, peer.linear1.bias, peer.linear2.weight, peer.linear2.bias),
        ),
        (
            *(attention.norm.scale, attention.norm.shift, block.norm.scale, block.norm.shift),
            *(attention.input.weight, attention.input.bias, attention.output.weight, attention.output.bias),
            *(feed_forward.expand.weight, feed_forward.expand.bias),
            *(feed_forward.contract.weight, feed_forward.contract.bias),
        ),
        strict=True,
    )
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours[0])
    h_BLD, keep_BL = torch.randn(3, 6, 8), keep_of([6, 4, 1], 6)
    ours = block(h_BLD, Layout.whole(keep_BL), Dispatch.single(3))
    assert_close(ours[keep_BL], peer(h_BLD, src_key_padding_mask=~keep_BL)[keep_BL], rtol=1e-5, atol=1e-5)
    assert weight_count(block) == 4 * 8 * 8 + 2 * 8 * 20


def test_an_expert_keeps_part_of_its_input_and_adds_its_tag() -> None:
    """E_e(h) = g z + (1 - g) h + tag_e, g = sigmoid(w_e . mean z + b_e)."""
    pool = ExpertPool(2, 2, 8, 2, 12, 0.0, gated=True, adaptive_gate=True)
    assert_close(pool.gate.bias, torch.full((2,), 2.0))
    scramble(pool)
    h_BLD, keep_BL = torch.randn(2, 5, 8), keep_of([5, 3], 5)
    result_BLD = pool(h_BLD, keep_BL, dispatch_of([0, 2]))
    z_BLD = h_BLD
    for block in pool.blocks:
        z_BLD = block(z_BLD, Layout.whole(keep_BL), dispatch_of([0, 2]))
    for h_LD, z_LD, result_LD, length in zip(h_BLD, z_BLD, result_BLD, [5, 3], strict=True):
        g = torch.sigmoid(pool.gate.weight[1] @ z_LD[:length].mean(0) + pool.gate.bias[1])
        assert_close(result_LD, g * z_LD + (1 - g) * h_LD + pool.gate.tag[1], rtol=1e-5, atol=1e-5)


def test_the_attention_mask_lets_an_empty_sample_see_its_first_place() -> None:
    assert attention_mask_for(torch.ones(2, 3, dtype=torch.bool)) is None
    mask = attention_mask_for(keep_of([2, 0], 3))
    assert mask.tolist() == [[[[True, True, False]]], [[[True, False, False]]]]


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(ConfigError, match=r"num_heads=3 does not divide embed_dim=8"):
        Attention(8, 3)


def test_the_feed_forward_width_has_two_spellings_and_takes_one() -> None:
    assert feed_forward_width(8, 20, None, default=2) == 20
    assert feed_forward_width(8, None, 1.5, default=2) == 12
    assert feed_forward_width(8, None, None, default=2) == 16
    assert feed_forward_width(8, None, 0.01, default=2) == 1
    with pytest.raises(ConfigError, match=r"dim_feedforward=20 and dim_feedforward_factor=1\.5"):
        feed_forward_width(8, 20, 1.5, default=2)


# ----------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    x = torch.ones(50_000, 8, requires_grad=True)
    y = Dropout(p)(x)
    share = 1 - round((1 - p) * 256) / 256
    assert abs(share - p) <= 1 / 512
    deviation = math.sqrt(share * (1 - share) / 50_000)
    zeros = (y == 0).float()
    assert_close(zeros.mean(0), torch.full((8,), share), rtol=0, atol=5 * deviation)  # each byte of a 64-bit draw
    assert_close(y.detach().mean(), torch.tensor(1.0), rtol=0, atol=5 * deviation / math.sqrt(8) / (1 - share))
    together = (zeros[:, :-1] * zeros[:, 1:]).mean()
    assert_close(together, torch.tensor(share**2), rtol=0, atol=5 * deviation)  # neighbours are independent
    y.sum().backward()
    assert_close(x.grad, (y != 0) / (1 - share), rtol=1e-6, atol=0)


def test_dropout_in_evaluation_is_the_identity() -> None:
    x = torch.randn(3, 5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert not torch.equal(Dropout(0.5)(x), Dropout(0.5)(x))


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (0, 4)])
def test_dropout_takes_any_shape_and_precision(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.bfloat16)
    y = Dropout(0.5)(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert set(y.flatten().tolist()) <= {0.0, 2.0}


# ---------------------------------------------------------------------------------------------------- from and to text


@pytest.mark.parametrize("width", [6, 7])
def test_the_embedding_is_the_formula(width: int) -> None:
    """LN(sqrt(D) Emb[x] + PE), PE(pos, 2i) = sin(pos / 10000^(2i/D)) and cos at 2i + 1."""
    embedding = TokenEmbedding(11, width, 0, dropout=0.0)
    ids_BL = torch.randint(1, 11, (2, 9))
    place, column = np.arange(9)[:, None], np.arange(width)[None, :]
    angle = place / 10_000 ** (2 * (column // 2) / width)
    table_LD = torch.from_numpy(np.where(column % 2 == 0, np.sin(angle), np.cos(angle))).float()
    expected = F.layer_norm(math.sqrt(width) * embedding.token.weight[ids_BL] + table_LD, (width,))
    assert_close(embedding(ids_BL, ids_BL != 0), expected, rtol=1e-5, atol=1e-5)


def test_the_position_table_grows_with_the_input() -> None:
    used, fresh = TokenEmbedding(5, 4, 0, 0.0), TokenEmbedding(5, 4, 0, 0.0)
    fresh.load_state_dict(used.state_dict())
    for length in (3, 50, 20):
        ids_BL = torch.ones(1, length, dtype=torch.long)
        assert torch.equal(used(ids_BL, ids_BL != 0), fresh(ids_BL, ids_BL != 0))
        fresh._positions_LD = torch.empty(0, 4)


def test_the_padding_row_is_zero_and_stays_so() -> None:
    embedding = TokenEmbedding(7, 4, 3, dropout=0.0)
    assert not embedding.token.weight[3].any()
    ids_BL = torch.tensor([[1, 2, 3, 3]])
    embedding(ids_BL, ids_BL != 3).square().sum().backward()
    assert not embedding.token.weight.grad[3].any()


def test_rows_start_with_the_asked_spread() -> None:
    for scale in (1.0, 0.1):
        embedding = TokenEmbedding(2000, 16, 0, 0.0, bigram_buckets=2000, embedding_scale=scale)
        for table in (embedding.token, embedding.bigram):
            assert_close(table.weight.detach()[1:].std(), torch.tensor(scale / 4), rtol=0.03, atol=0)


def test_bigrams_tell_word_order() -> None:
    embedding = TokenEmbedding(50, 4, 0, 0.0, positional_encoding="none", bigram_buckets=997)
    ids_BL = torch.tensor([[5, 6, 7], [6, 5, 7], [5, 6, 9]])
    h_BLD = embedding(ids_BL, ids_BL != 0)
    assert torch.equal(h_BLD[0, :2], h_BLD[2, :2])  # what follows does not matter
    assert not torch.allclose(h_BLD[0, 2], h_BLD[1, 2])  # 7 after 6, 7 after 5
    assert not torch.allclose(h_BLD[0, 0], h_BLD[1, 1])  # 5 at the start, 5 after 6
    plain = TokenEmbedding(50, 4, 0, 0.0, positional_encoding="none")
    states_BLD = plain(ids_BL, ids_BL != 0)
    assert torch.equal(states_BLD[0, [1, 0, 2]], states_BLD[1])


def test_bigrams_spread_over_the_buckets() -> None:
    embedding = TokenEmbedding(201, 1, 0, 0.0, "none", bigram_buckets=1000)
    looked_up: list[torch.Tensor] = []
    embedding.bigram.register_forward_pre_hook(lambda _, inputs: looked_up.extend(inputs))
    ids_BL = torch.cartesian_prod(torch.arange(1, 201), torch.arange(1, 201))
    embedding(ids_BL, ids_BL != 0)
    counts = looked_up[0][:, 1].bincount(minlength=1000)
    assert 10 < counts.min() <= counts.max() < 80  # 40 on average


def test_token_dropout_blanks_whole_tokens_and_only_in_training() -> None:
    embedding = TokenEmbedding(50, 4, 0, 0.0, positional_encoding="none", bigram_buckets=10, token_dropout=0.25)
    ids_BL = torch.randint(1, 50, (40, 100))
    blank_BL = (embedding(ids_BL, ids_BL != 0) == 0).all(-1)
    assert_close(blank_BL.float().mean(), torch.tensor(0.25), rtol=0, atol=0.04)
    plain = TokenEmbedding(50, 4, 0, 0.0, positional_encoding="none", bigram_buckets=10)
    plain.load_state_dict(embedding.state_dict())
    assert torch.equal(embedding.eval()(ids_BL, ids_BL != 0), plain(ids_BL, ids_BL != 0))


@settings(deadline=None, max_examples=20)
@given(seed=seeds, lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_pooling_is_a_loop_over_real_tokens(seed: int, lengths: list[int]) -> None:
    torch.manual_seed(seed)
    h_BLD, keep_BL = torch.randn(len(lengths), 5, 3) - 1, keep_of(lengths, 5)
    rows = [[h_BLD[b, i] for i in range(length)] for b, length in enumerate(lengths)]
    zero = torch.zeros(3)
    means = torch.stack([sum(row, zero) / len(row) if row else zero for row in rows])
    largest = torch.stack([torch.stack(row).amax(0) if row else zero for row in rows])
    assert_close(masked_mean(h_BLD, keep_BL), means, rtol=1e-5, atol=1e-6)
    assert_close(masked_max(h_BLD, keep_BL), largest, rtol=0, atol=0)
    last = torch.stack([h_BLD[b, max(length - 1, 0)] for b, length in enumerate(lengths)])
    for pool, expected in {"mean": None, "max": None, "first": h_BLD[:, 0], "last": last}.items():
        head = ClassificationHead(3, 2, 0.0, pool)
        normed = F.layer_norm(h_BLD, (3,))
        if pool == "mean":
            pooled = masked_mean(normed, keep_BL)
        elif pool == "max":
            pooled = masked_max(normed, keep_BL)
        else:
            pooled = F.layer_norm(expected, (3,))
        assert_close(head(h_BLD, keep_BL), head.linear(pooled), rtol=1e-5, atol=1e-6)


def test_pooling_over_nothing_has_a_finite_gradient() -> None:
    h_BLD = torch.randn(2, 3, 4, requires_grad=True)
    keep_BL = keep_of([0, 2], 3)
    (masked_mean(h_BLD, keep_BL) + masked_max(h_BLD, keep_BL)).sum().backward()
    assert not h_BLD.grad[0].any()
    assert h_BLD.grad[1].isfinite().all()
