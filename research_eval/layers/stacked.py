"""Linear maps and norms of many experts in one parameter each, applied to rows sorted by expert.

R rows (samples [R, L, D] or tokens [R, D])  N experts  I in  O out  D width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from research_eval.layers.kernels import (
    Collected,
    Dispatch,
    RowNorm,
    SlicedLinear,
    Uses,
    applied,
    by_slices,
    for_rows,
    grouped_linear,
    kernels_for,
)

T = TypeVar("T")


class Stacked(nn.Module):
    """Weights of many experts in one parameter each, expert first."""

    def __init__(self) -> None:
        super().__init__()
        self._in_pass = False
        self._kept: dict[str, Any] = {}

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, within `one_pass` made once."""
        if not self._in_pass:
            return make()
        if name not in self._kept:
            self._kept[name] = make()
        made: T = self._kept[name]
        return made

    def of_expert(self, expert: int) -> list[torch.Tensor]:
        """The weights of one expert."""
        weights = [weight for weight in self._parameters.values() if weight is not None]
        # A view of the only expert costs nothing backward; an index fills a gradient of the whole stack.
        if not self._in_pass and len(weights[0]) == 1:
            return [weight.squeeze(0) for weight in weights]
        return [slices[expert] for slices in self.kept("slices", lambda: [weight.unbind() for weight in weights])]


@contextmanager
def one_pass(module: nn.Module) -> Iterator[None]:
    """Inside, the stacks below `module` are taken apart once, however often their experts are used.

    The gradients of the experts are then joined into those of the stacks once per pass and not once per use, which
    would cost the more the more experts are idle.
    """
    stacks = [child for child in module.modules() if isinstance(child, Stacked)]
    for stack in stacks:
        stack._in_pass = True
    try:
        yield
    finally:
        for stack in stacks:
            stack._in_pass = False
            stack._kept.clear()


def by_rows(x: torch.Tensor) -> bool:
    """Whether all experts are applied in one node of the graph: by the kernels of a CPU, outside autocast."""
    return kernels_for(x.device) == "slices" and not torch.is_autocast_enabled(x.device.type)


class StackedLinear(Stacked):
    """Row r gives `weight[e_r] @ x_r + bias[e_r]`. An idle expert costs nothing and gets zero gradient."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features))

    def forward(self, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """x [R, ..., I] sorted by expert -> [R, ..., O]."""
        if dispatch.expert is not None:
            weight_OI, bias_O = self.of_expert(dispatch.expert)
            return F.linear(x, weight_OI, bias_O)
        # The grouped product of a GPU wants rows of 16 bytes; in bf16 that is 8 numbers.
        if kernels_for(x.device) == "grouped" and self.weight.shape[1] % 8 == 0 == self.weight.shape[2] % 8:
            return grouped_linear(x, self.weight, self.bias, dispatch)
        if not by_rows(x):
            return by_slices(self.forward, x, dispatch=dispatch)
        tokens = x.shape[1:-1].numel()
        sizes = [size * tokens for size in dispatch.counts()]
        rows, experts = x.reshape(-1, x.shape[-1]), dispatch.experts_of(x, tokens)
        uses, token = self.kept("uses", self._uses)
        out: torch.Tensor = applied(SlicedLinear, rows, sizes, experts, uses, token)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _uses(self) -> tuple[Uses, torch.Tensor]:
        uses = Uses(self.weight, self.bias)
        return uses, Collected.apply(uses, self.weight, self.bias)  # type: ignore[no-untyped-call]


class StackedLayerNorm(Stacked):
    """Layer normalisation whose scale and shift belong to the row's expert."""

    def __init__(self, num_experts: int, embed_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_experts, embed_dim))
        self.shift = nn.Parameter(torch.zeros(num_experts, embed_dim))

    def forward(self, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """x [R, ..., D] sorted by expert -> the same shape."""
        width = x.shape[-1:]
        if dispatch.expert is not None:
            scale_D, shift_D = self.of_expert(dispatch.expert)
            return F.layer_norm(x, width, scale_D, shift_D)
        if kernels_for(x.device) == "grouped":
            scale, shift = (for_rows(weight, x, dispatch) for weight in (self.scale, self.shift))
            return torch.addcmul(shift, F.layer_norm(x, width), scale)
        if not by_rows(x):
            return by_slices(self.forward, x, dispatch=dispatch)
        rows, experts = x.reshape(-1, x.shape[-1]), dispatch.experts_of(x, x.shape[1:-1].numel())
        out: torch.Tensor = applied(RowNorm, rows, experts, self.scale, self.shift)
        return out.view(x.shape)


class Dropout(nn.Module):
    """Inverted dropout. On the CPU its mask comes from the bytes of 64-bit draws: p is rounded to 1/256, not the mean.

    Standard dropout is the dearest elementwise operation there (about 20 additions); this one costs about a third.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self._keep = max(1, round((1 - p) * 256))  # of 256 byte values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.masked(x, [None]) if x.device.type == "cpu" else F.dropout(x, self.p, self.training)

    def masked(self, x: torch.Tensor, generators: Sequence[torch.Generator | None]) -> torch.Tensor:
        """On the CPU; equal parts of x from one generator each."""
        if not self.training or self._keep == 256:
            return x
        size = x.numel() // len(generators)
        words = torch.empty(len(generators), (size + 7) // 8, dtype=torch.int64)
        for row, generator in zip(words, generators, strict=True):
            row.random_(-(2**63), None, generator=generator)
        mask = (words.view(torch.uint8)[:, :size] < self._keep).view(x.shape)
        return x * (mask * (256 / self._keep)).to(x.dtype)


def weight_count(module: nn.Module) -> int:
    """Weights that one row is multiplied with in the stacked linear maps of `module`."""
    layers = (layer for layer in module.modules() if isinstance(layer, StackedLinear))
    return sum(layer.weight[0].numel() for layer in layers)
