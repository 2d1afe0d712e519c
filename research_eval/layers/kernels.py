"""How many experts are applied to the rows of a batch at once, and the switch between the ways.

R rows sorted by expert  I in  O out  N experts  D width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from research_eval.schema import Kernels

PER_DEVICE: dict[str, Kernels] = {"cpu": "slices", "cuda": "grouped"}  # of "auto"; "plain" elsewhere
MIN_CHAIN = 10_000  # numbers per expert
EPSILON = 1e-5  # of layer normalisation, as torch has it

_asked: Kernels = "auto"


class Dispatch(NamedTuple):
    """Which expert each row of a sorted batch goes to: the first `sizes[0]` rows to expert 0, and so on.

    Where `sizes` is None the numbers stay on the device, in `ends_N`, and nobody waits for them. With `expert` all rows
    go to that one.
    """

    sizes: list[int] | None
    ends_N: Tensor | None = None  # int32, the row behind the last one of each expert
    expert: int | None = None

    @classmethod
    def single(cls, num_rows: int) -> Dispatch:
        """Every row to the only expert."""
        return cls([num_rows], expert=0)

    @classmethod
    def of(cls, counts_N: Tensor) -> Dispatch:
        """From the number of rows of each expert. Only the grouped kernels leave them where they are."""
        if kernels_for(counts_N.device) == "grouped":
            return cls(None, counts_N.cumsum(0).int())
        return cls(counts_N.tolist())

    def counts(self) -> list[int]:
        """Rows of each expert."""
        if self.sizes is not None:
            return self.sizes
        assert self.ends_N is not None
        ends = self.ends_N.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def ends(self, device: torch.device) -> Tensor:
        """`ends_N`, from `sizes` where it is not there."""
        if self.ends_N is not None:
            return self.ends_N
        return torch.tensor(self.sizes, device=device).cumsum(0).int()

    def experts_of(self, rows: Tensor) -> Tensor:
        """The expert of each of these rows, [R]."""
        places = torch.arange(len(rows), device=rows.device, dtype=torch.int32)
        return torch.searchsorted(self.ends(rows.device), places, right=True)


def set_kernels(name: Kernels) -> None:
    """Choose for the whole process.

    "plain": one product per expert, padding included; what the others are compared with. "slices": the same without the
    padding, the fastest on a CPU. "grouped": without padding, all experts in one product, without a loop and without
    waiting for the device. "auto": what suits the device.
    """
    global _asked
    _asked = name


@contextmanager
def use_kernels(name: Kernels) -> Iterator[None]:
    """The same inside the block."""
    before = _asked
    set_kernels(name)
    try:
        yield
    finally:
        set_kernels(before)


def kernels_for(device: torch.device) -> Kernels:
    """What is used on a device; "plain" while a graph is being compiled."""
    if torch.compiler.is_compiling():
        return "plain"
    return PER_DEVICE.get(device.type, "plain") if _asked == "auto" else _asked


def each_expert(function: Callable[..., Tensor], *rows: Tensor, dispatch: Dispatch) -> Tensor:
    """`function(*rows, dispatch)` of all rows at once, or of those of each expert that has any, joined.

    On a CPU a chain of steps per expert stays in the cache, and what comes out is joined once and not after every step;
    where experts see few numbers, fewer and longer steps are faster.
    """
    few = dispatch.sizes is not None and rows[0].numel() < MIN_CHAIN * len(dispatch.sizes)
    if few or dispatch.expert is not None or kernels_for(rows[0].device) == "grouped":
        return function(*rows, dispatch)
    return by_slices(function, *rows, dispatch=dispatch)


def by_slices(function: Callable[..., Tensor], *rows: Tensor, dispatch: Dispatch) -> Tensor:
    """The rows of each expert alone, joined."""
    sizes = dispatch.counts()
    slices = zip(*(part.split(sizes) for part in rows), strict=True)
    parts = [
        function(*slice_, Dispatch([size], expert=expert))
        for expert, (size, slice_) in enumerate(zip(sizes, slices, strict=True))
        if size
    ]
    if not parts:
        return function(*rows, Dispatch([0], expert=0))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class SlicedLinear(torch.autograd.Function):
    """`weight @ row + bias` for x [R, I] sorted by expert, into one output [R, O].

    `sizes` are the rows of each expert; the weights [O, I] of all of them come before their biases [O]. A node of the
    graph per expert would cost more than its product where experts see few rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], *parameters: Tensor) -> Tensor:
        weights, biases = parameters[: len(sizes)], parameters[len(sizes) :]
        out = x.new_empty(len(x), len(biases[0]))
        for part, weight, bias, target in zip(x.split(sizes), weights, biases, out.split(sizes), strict=True):
            torch.addmm(bias, part, weight.t(), out=target)
        ctx.save_for_backward(x, *weights)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        to_x = torch.empty_like(x)
        parts = gradient.split(ctx.sizes)
        for part, weight, target in zip(parts, weights, to_x.split(ctx.sizes), strict=True):
            torch.mm(part, weight, out=target)
        to_weights = [part.t() @ rows for part, rows in zip(parts, x.split(ctx.sizes), strict=True)]
        return to_x, None, *to_weights, *(part.sum(0) for part in parts)


class SlicedNorm(torch.autograd.Function):
    """The same for layer normalisation: the scales [D] of all experts come before their shifts [D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], *parameters: Tensor) -> Tensor:
        scales, shifts = parameters[: len(sizes)], parameters[len(sizes) :]
        normed, mean, rate = torch.native_layer_norm(x, x.shape[1:], None, None, EPSILON)
        out = torch.empty_like(x)
        for part, scale, shift, target in zip(normed.split(sizes), scales, shifts, out.split(sizes), strict=True):
            torch.addcmul(shift, part, scale, out=target)
        ctx.save_for_backward(x, mean, rate, *scales)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rate, *scales = ctx.saved_tensors
        slices = zip(*(part.split(ctx.sizes) for part in (gradient, x, mean, rate)), scales, strict=True)
        experts = [
            torch.ops.aten.native_layer_norm_backward(part, rows, x.shape[1:], mean, rate, scale, scale, [True] * 3)
            for part, rows, mean, rate, scale in slices
        ]
        to_x, to_scales, to_shifts = zip(*experts, strict=True)
        return torch.cat(to_x), None, *to_scales, *to_shifts


def grouped_linear(x: Tensor, weight_NOI: Tensor, bias_NO: Tensor, dispatch: Dispatch) -> Tensor:
    """Row r of x [R, ..., I] gives `weight[e_r] @ x_r + bias[e_r]`, [R, ..., O], in one product."""
    tokens = x.shape[1:-1].numel()
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        rows, weight_NOI = rows.to(dtype), weight_NOI.to(dtype)
    dispatch = Dispatch(None, dispatch.ends(x.device) * tokens)
    out = F.grouped_mm(rows, weight_NOI.transpose(1, 2), offs=dispatch.ends_N)
    return (out + bias_NO[dispatch.experts_of(rows)].to(out.dtype)).view(*x.shape[:-1], -1)


def for_rows(weight_ND: Tensor, x: Tensor, dispatch: Dispatch) -> Tensor:
    """The weight of each row's expert, [R, D] or [R, 1, D] as x [R, ..., D] needs it."""
    return weight_ND[(dispatch.experts_of(x), *[None] * (x.ndim - 2))]
