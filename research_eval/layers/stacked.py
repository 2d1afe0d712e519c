"""Linear maps and norms of many experts in one parameter each, applied to rows sorted by expert.

R rows (samples [R, L, D] or tokens [R, D])  N experts  I in  O out  D width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from research_eval.layers.dispatch import Dispatch
from research_eval.layers.kernels.autograd import applied
from research_eval.layers.kernels.cpu import Apart, SlicedLinear, sliced_linear, taken_apart
from research_eval.layers.kernels.grouped import grouped_linear, rows_of_expert
from research_eval.layers.kernels.plain import by_slices

T = TypeVar("T")


class Stacked(nn.Module):
    """Holds each weight of many experts in one parameter whose first dimension is the expert."""

    def __init__(self) -> None:
        super().__init__()
        self._in_pass = False
        self._kept: dict[str, Any] = {}

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """Return `make()`; inside `one_pass`, compute it once and return the same object again."""
        if not self._in_pass:
            return make()
        if name not in self._kept:
            self._kept[name] = make()
        made: T = self._kept[name]
        return made

    def of_expert(self, expert: int) -> Sequence[torch.Tensor]:
        """The weights of one expert."""
        # The backward pass of a view is free; that of an index fills a gradient of the whole stack.
        if not self._in_pass and len((weights := self._weights())[0]) == 1:
            return [weight.squeeze(0) for weight in weights]
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return self.kept("views", self.views)[expert]
        return self.kept("slices", lambda: list(zip(*(part.unbind() for part in self._weights()), strict=True)))[expert]

    def views(self) -> Apart:
        """The weights of every expert, without a gradient.

        They are views, made once, and stay right as long as the stack keeps its place in memory.
        """
        weights = self._weights()
        place = tuple((part.untyped_storage()._cdata, part.data_ptr()) for part in weights)
        known = _VIEWS.get(self)
        if known is None or known[0] != place:
            known = _VIEWS[self] = (place, taken_apart(*weights))
        return known[1]

    def _weights(self) -> list[torch.Tensor]:
        return [weight for weight in self._parameters.values() if weight is not None]


# By stack, and not in it: a copy of a model would copy every view.
_VIEWS: WeakKeyDictionary[Stacked, tuple[Any, Apart]] = WeakKeyDictionary()


@contextmanager
def one_pass(*stacks: Stacked) -> Iterator[None]:
    """Inside the block, split the stacks into their experts once, however often the experts are used.

    The gradients of the experts are then joined into those of the stacks once per pass and not once per use. The saving
    grows with the number of idle experts.
    """
    for stack in stacks:
        stack.__dict__["_in_pass"] = True  # `nn.Module.__setattr__` takes ten times as long
    try:
        yield
    finally:
        for stack in stacks:
            stack.__dict__["_in_pass"] = False
            stack._kept.clear()


def by_rows(x: torch.Tensor, dispatch: Dispatch) -> bool:
    """Whether one node of the graph computes all experts: with the CPU kernels, outside autocast."""
    return dispatch.kernels_for(x) == "slices" and not torch.is_autocast_enabled(x.device.type)


class StackedLinear(Stacked):
    """Row r -> `weight[e_r] @ x_r + bias[e_r]`, with e_r the row's expert. It may join several maps of equal width.

    An idle expert costs nothing and receives zero gradient.
    """

    joined_maps = 1

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features))

    def forward(self, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """x [R, ..., I] sorted by expert -> [R, ..., O]."""
        if dispatch.even:
            turned = self.kept("turned", lambda: _turned(self.bias, self.weight))
            return torch.baddbmm(turned[0], x, turned[1])
        if dispatch.expert is not None:
            weight_OI, bias_O = self.of_expert(dispatch.expert)
            return F.linear(x, weight_OI, bias_O)
        # The grouped product of a GPU needs rows that are multiples of 16 bytes: 8 numbers in bf16.
        if dispatch.kernels_for(x) == "grouped" and self.weight.shape[1] % 8 == 0 == self.weight.shape[2] % 8:
            return grouped_linear(x, self.weight, self.bias, dispatch)
        if not by_rows(x, dispatch):
            return by_slices(self.forward, x, dispatch=dispatch)
        return self._sliced(x, dispatch, self.weight, self.bias, "")

    def of_normed(self, norm: StackedLayerNorm, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """The map of norm(x).

        W (scale y + shift) + b = (W scale) y + (W shift + b). With the joined weights, made once per pass, no row needs
        the scale and shift of its expert. Where the experts have few rows, or rows of one expert come alone, the norm
        itself is cheaper. In evaluation the form does not depend on how many other samples there are.
        """
        joins = self.training and self._in_pass and dispatch.expert is None and by_rows(x, dispatch)
        if not joins or x.shape[:-1].numel() < self.bias.numel() / 4:
            normed: torch.Tensor = norm(x, dispatch)
            return self.forward(normed, dispatch)
        weight, bias = self.kept("joined", lambda: _joined(self.weight, self.bias, norm.scale, norm.shift))
        y = normalized(x)
        if dispatch.even:
            turned = self.kept("joined and turned", lambda: _turned(bias, weight))
            return torch.baddbmm(turned[0], y, turned[1])
        return self._sliced(y, dispatch, weight, bias, "joined ")

    def _sliced(
        self, x: torch.Tensor, dispatch: Dispatch, weight: torch.Tensor, bias: torch.Tensor, name: str
    ) -> torch.Tensor:
        """The map with these weights, in one node of the graph for all experts."""
        tokens = x.shape[1:-1].numel()
        sizes = [size * tokens for size in dispatch.counts()]
        rows = x.reshape(-1, x.shape[-1])
        apart = self.views() if weight is self.weight else self.kept("joined apart", lambda: taken_apart(weight, bias))
        if not torch.is_grad_enabled():
            return sliced_linear(rows, sizes, apart).view(*x.shape[:-1], -1)
        experts = dispatch.experts_of(x, tokens)
        weights = self._kept.get(f"{name}chain", (weight, bias))  # as the use before has returned them in this pass
        out, *after = applied(SlicedLinear, rows, sizes, experts, apart, *weights)
        if self._in_pass:
            self._kept[f"{name}chain"] = after
        return out.view(*x.shape[:-1], out.shape[-1])


def _turned(bias_NO: torch.Tensor, weight_NOI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bias [N, 1, O] and weight [N, I, O] for a batched product."""
    return bias_NO.unsqueeze(1), weight_NOI.transpose(1, 2)


def _joined(
    weight_NOI: torch.Tensor, bias_NO: torch.Tensor, scale_NI: torch.Tensor, shift_NI: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a map behind a norm, with the norm's scale and shift in them."""
    return weight_NOI * scale_NI.unsqueeze(1), bias_NO + (weight_NOI * shift_NI.unsqueeze(1)).sum(-1)


def normalized(x: torch.Tensor) -> torch.Tensor:
    """Layer normalisation without scale and shift. On a CPU, torch takes twice as long without ones and zeros."""
    width = x.shape[-1:]
    return F.layer_norm(x, width, x.new_ones(width), x.new_zeros(width))


class StackedLayerNorm(Stacked):
    """Layer normalisation whose scale and shift belong to the row's expert."""

    def __init__(self, num_experts: int, embed_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_experts, embed_dim))
        self.shift = nn.Parameter(torch.zeros(num_experts, embed_dim))

    def forward(self, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """x [R, ..., D] sorted by expert -> the same shape."""
        width = x.shape[-1:]
        if dispatch.even:
            return torch.addcmul(self.shift.unsqueeze(1), normalized(x), self.scale.unsqueeze(1))
        if dispatch.expert is not None:
            scale_D, shift_D = self.of_expert(dispatch.expert)
            return F.layer_norm(x, width, scale_D, shift_D)
        if not (by_rows(x, dispatch) or dispatch.kernels_for(x) == "grouped"):
            return by_slices(self.forward, x, dispatch=dispatch)
        # Flatten samples into tokens, so that the gradients are summed in one fixed order.
        rows, experts = x.reshape(-1, x.shape[-1]), dispatch.experts_of(x, x.shape[1:-1].numel())
        scale, shift = (rows_of_expert(weight, experts) for weight in (self.scale, self.shift))
        return torch.addcmul(shift, normalized(rows), scale).view(x.shape)


class Dropout(nn.Module):
    """Inverted dropout. On a CPU the mask comes from the bytes of 64-bit random numbers.

    The drop probability is therefore rounded to 1/256; the expected output stays exact. On a CPU, torch's dropout costs
    as much as about 20 additions, this one about a third of that.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self._keep = max(1, round((1 - p) * 256))  # kept values of a byte, of 256

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        if not self.training or self._keep == 256:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        mask = (words.view(torch.uint8)[: x.numel()] < self._keep).view(x.shape)
        return x * (mask * (256 / self._keep)).to(x.dtype)


def weight_count(module: nn.Module) -> int:
    """Weights of one expert in all stacked linear maps of `module`: the multiplications per row."""
    layers = (layer for layer in module.modules() if isinstance(layer, StackedLinear))
    return sum(layer.weight[0].numel() for layer in layers)
