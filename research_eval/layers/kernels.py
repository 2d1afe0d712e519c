"""How many experts are applied to the rows of a batch at once, and the switch between the ways.

R rows sorted by expert  I in  O out  N experts  D width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from research_eval.annotations import Kernels

PER_DEVICE: dict[str, Kernels] = {"cpu": "slices", "cuda": "grouped"}  # of "auto"; "plain" elsewhere
MIN_CHAIN = 80_000  # numbers that come out per expert
EPSILON = 1e-5  # of layer normalisation, as torch has it

_asked: Kernels = "auto"


@dataclass(frozen=True, eq=False)
class Dispatch:
    """Which expert each row of a sorted batch goes to: the first `sizes[0]` rows to expert 0, and so on.

    Where `sizes` is None the numbers stay on the device, in `ends_N`, and nobody waits for them. With `expert` all rows
    go to that one.
    """

    sizes: list[int] | None
    ends_N: Tensor | None = None  # int32, the row behind the last one of each expert
    expert: int | None = None
    _experts: dict[int, Tensor] = field(default_factory=dict, repr=False)

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

    def experts_of(self, x: Tensor, tokens: int = 1) -> Tensor:
        """The expert of each row of x, or with so many tokens in a row of each token, [R tokens]."""
        if tokens not in self._experts:
            places = torch.arange(len(x) * tokens, device=x.device, dtype=torch.int32)
            self._experts[tokens] = torch.searchsorted(self.ends(x.device) * tokens, places, right=True)
        return self._experts[tokens]


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


def each_expert(function: Callable[..., Tensor], *rows: Tensor, dispatch: Dispatch, width: int) -> Tensor:
    """`function(*rows, dispatch)` of all rows at once, or of those of each expert that has any, joined.

    On a CPU a chain of steps per expert stays in the cache, and what comes out is joined once and not after every step;
    where experts make few numbers, fewer and longer steps are faster. `width` is the largest one on the way.
    """
    numbers = rows[0].shape[:-1].numel() * width
    few = dispatch.sizes is not None and numbers < MIN_CHAIN * len(dispatch.sizes)
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


class _Forgetful:
    """What a forward pass gets for its context where no gradient is wanted."""

    def save_for_backward(self, *_: Any) -> None:
        pass


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Its output. Where no gradient is wanted, without a node of the graph: that costs as much as a small operation."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_Forgetful(), *arguments)


class Uses:
    """A stack of weights [N, O, I] and biases [N, O] during one pass, and their gradient.

    Every use in the pass adds its part where that of the others is. Autograd would keep one array per use and expert,
    and copy those of all experts into the stack's.
    """

    def __init__(self, weight_NOI: Tensor, bias_NO: Tensor) -> None:
        self.weights = [weight_OI.t() for weight_OI in weight_NOI.detach()]
        self.biases = bias_NO.detach().unbind()
        self._gradients: tuple[Tensor, Tensor] | None = None
        self._used: set[int] = set()
        self._pass = -1

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of weights and biases, to be added to. The weights' are filled where an expert has been used."""
        number = torch._C._current_graph_task_id()
        if self._gradients is None or self._pass != number:  # what another pass has not collected is not wanted
            weight_IO, bias_O = self.weights[0], self.biases[0]
            weights = bias_O.new_empty(len(self.biases), *weight_IO.shape[::-1])
            self._gradients = weights, bias_O.new_zeros(len(self.biases), len(bias_O))
            self._used, self._pass = set(), number
        return self._gradients

    def first(self, expert: int) -> bool:
        """Whether nothing has been added for this expert yet."""
        if expert in self._used:
            return False
        self._used.add(expert)
        return True

    def collected(self) -> tuple[Tensor, Tensor]:
        """The gradients of the whole pass."""
        weights_NOI, biases_NO = self.gradients()
        for expert in set(range(len(biases_NO))) - self._used:
            weights_NOI[expert].zero_()
        self._gradients = None
        return weights_NOI, biases_NO


class Collected(torch.autograd.Function):
    """A token that all uses of a stack depend on, so that its gradient is asked for when they are done."""

    @staticmethod
    def forward(ctx: Any, uses: Uses, weight_NOI: Tensor, bias_NO: Tensor) -> Tensor:
        ctx.uses = uses
        return weight_NOI.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, *ctx.uses.collected()


class SlicedLinear(torch.autograd.Function):
    """`weight @ row + bias` for x [R, I] sorted by expert, into one output [R, O].

    `sizes` are the rows of each expert, `expert_R` is that of each row. A node of the graph per expert would cost more
    than its product where experts see few rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], expert_R: Tensor, uses: Uses, token: Tensor) -> Tensor:
        ctx.save_for_backward(x, expert_R)
        ctx.sizes, ctx.uses = sizes, uses
        out = x.new_empty(len(x), len(uses.biases[0]))
        slices = zip(uses.biases, x.split(sizes), uses.weights, out.split(sizes), strict=True)
        for bias, part, weight, target in slices:
            if len(part):
                torch.addmm(bias, part, weight, out=target)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, expert_R = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = torch.empty_like(x)
        parts = gradient.split(ctx.sizes)
        for part, weight, target in zip(parts, ctx.uses.weights, to_x.split(ctx.sizes), strict=True):
            if len(part):
                torch.mm(part, weight.t(), out=target)
        if ctx.needs_input_grad[4]:
            weights, biases = ctx.uses.gradients()
            for expert, (part, rows) in enumerate(zip(parts, x.split(ctx.sizes), strict=True)):
                if len(part):
                    weights[expert].addmm_(part.t(), rows, beta=not ctx.uses.first(expert))
            biases.index_add_(0, expert_R, gradient)
        return to_x, None, None, None, None


class RowNorm(torch.autograd.Function):
    """Layer normalisation of x [R, D], each row with the scale and shift [N, D] of its expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_R: Tensor, scale_ND: Tensor, shift_ND: Tensor) -> Tensor:
        one, zero = x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])  # without them it takes twice as long
        normed, mean, rate = torch.native_layer_norm(x, x.shape[1:], one, zero, EPSILON)
        ctx.save_for_backward(x, mean, rate, expert_R, scale_ND)
        return torch.addcmul(shift_ND.index_select(0, expert_R), normed, scale_ND.index_select(0, expert_R))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x, mean, rate, expert_R, scale_ND = ctx.saved_tensors
        to_shift = torch.zeros_like(scale_ND).index_add_(0, expert_R, gradient)
        to_scale = torch.zeros_like(scale_ND).index_add_(0, expert_R, (x - mean).mul_(rate).mul_(gradient))
        to_normed = gradient * scale_ND.index_select(0, expert_R)
        to_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            to_normed, x, x.shape[1:], mean, rate, None, None, [True, False, False]
        )
        return to_x, None, to_scale, to_shift


class RowDot(torch.autograd.Function):
    """The product of each row of x [R, ..., D] with the weight [N, D] of its expert, [R, ..., 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_R: Tensor, weight_ND: Tensor) -> Tensor:
        ctx.save_for_backward(x, expert_R, weight_ND)
        rows = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        out = torch.bmm(rows, weight_ND.index_select(0, expert_R).unsqueeze(2))  # which a counter of FLOPs sees
        return out.view(*x.shape[:-1], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        x, expert_R, weight_ND = ctx.saved_tensors
        weights = weight_ND.index_select(0, expert_R).view(len(x), *[1] * (x.ndim - 2), -1)
        per_row = (gradient * x).flatten(1, -2).sum(1) if x.ndim > 2 else gradient * x
        return gradient * weights, None, torch.zeros_like(weight_ND).index_add_(0, expert_R, per_row)


def grouped_linear(x: Tensor, weight_NOI: Tensor, bias_NO: Tensor, dispatch: Dispatch) -> Tensor:
    """Row r of x [R, ..., I] gives `weight[e_r] @ x_r + bias[e_r]`, [R, ..., O], in one product."""
    tokens = x.shape[1:-1].numel()
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        rows, weight_NOI = rows.to(dtype), weight_NOI.to(dtype)
    out = F.grouped_mm(rows, weight_NOI.transpose(1, 2), offs=dispatch.ends(x.device) * tokens)
    return (out + bias_NO[dispatch.experts_of(x, tokens)].to(out.dtype)).view(*x.shape[:-1], -1)


def for_rows(weight_ND: Tensor, x: Tensor, dispatch: Dispatch) -> Tensor:
    """The weight of each row's expert, [R, D] or [R, 1, D] as x [R, ..., D] needs it."""
    experts_R = dispatch.experts_of(x)
    # The gradient of `index_select` is quick, but on a GPU the order of its sums is not fixed.
    rows = weight_ND.index_select(0, experts_R) if x.device.type == "cpu" else weight_ND[experts_R]
    return rows.view(len(x), *[1] * (x.ndim - 2), -1)
