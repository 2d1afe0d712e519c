"""Linear maps and norms of many experts in one parameter each, applied to rows sorted by expert.

R rows (samples [R, L, D] or tokens [R, D])  N experts  I in  O out  D width
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Dispatch(NamedTuple):
    """Which expert each row of a sorted batch goes to: the first `sizes[0]` rows to expert 0, and so on."""

    sizes: list[int]
    experts_R: torch.Tensor | None  # expert of each row; None when there is only one expert

    @classmethod
    def single(cls, num_rows: int) -> Dispatch:
        """Every row to the only expert."""
        return cls([num_rows], None)


class StackedLinear(nn.Module):
    """Row r gives `weight[e_r] @ x_r + bias[e_r]`. An idle expert costs nothing and gets zero gradient."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features))

    def forward(self, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """x [R, ..., I] sorted by expert -> [R, ..., O]."""
        # `unbind` and not indexing: the backward of an index fills a gradient of the whole stack per expert.
        groups = zip(x.split(dispatch.sizes), self.weight.unbind(), self.bias.unbind(), strict=True)
        parts = [F.linear(rows, weight_OI, bias_O) for rows, weight_OI, bias_O in groups if len(rows)]
        if not parts:
            return x.new_zeros(*x.shape[:-1], self.bias.shape[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class StackedLayerNorm(nn.Module):
    """Layer normalisation whose scale and shift belong to the row's expert."""

    def __init__(self, num_experts: int, embed_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_experts, embed_dim))
        self.shift = nn.Parameter(torch.zeros(num_experts, embed_dim))

    def forward(self, x_RLD: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        width = x_RLD.shape[-1:]
        if dispatch.experts_R is None:
            return F.layer_norm(x_RLD, width, self.scale[0], self.shift[0])
        scale_R1D = self.scale[dispatch.experts_R].unsqueeze(1)
        shift_R1D = self.shift[dispatch.experts_R].unsqueeze(1)
        return torch.addcmul(shift_R1D, F.layer_norm(x_RLD, width), scale_R1D)


class Dropout(nn.Module):
    """Inverted dropout. On the CPU its mask comes from the bytes of 64-bit draws: p is rounded to 1/256, not the mean.

    Standard dropout is the dearest elementwise operation there (about 20 additions); this one costs about a third.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self._keep = max(1, round((1 - p) * 256))  # of 256 byte values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self._keep == 256:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        mask = (words.view(torch.uint8)[: x.numel()] < self._keep).view(x.shape)
        return x * (mask * (256 / self._keep)).to(x.dtype)


def weight_count(module: nn.Module) -> int:
    """Weights that one row is multiplied with in the stacked linear maps of `module`."""
    layers = (layer for layer in module.modules() if isinstance(layer, StackedLinear))
    return sum(layer.weight[0].numel() for layer in layers)
