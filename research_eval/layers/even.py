"""Samples with equally many places for every expert, so that one batched product per map computes all experts.

Every expert has as many places as the busiest one has samples. A place that stays empty holds a copy of the first
sample, and nothing reads its result.

N experts  C places of an expert  S = N C places  B batch  L length  D width  M = C L rows of an expert  F features
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from research_eval.layers.kernels.autograd import applied
from research_eval.layers.packing import Grid, Layout
from research_eval.layers.text import masked_mean

# What a batched product may compute in vain, per product that it saves: multiplications in padding places.
# `benchmarks/floors.py` measures where it starts to lose.
MAX_VAIN = 400_000


def pays(sizes: list[int], length: int, num_tokens: int, weights: float) -> bool:
    """Whether one batched product per map is faster than one product per expert.

    The answer depends on sizes alone, never on a clock, so a run repeats bit for bit.
    """
    return sum(size > 0 for size in sizes) > 1 and in_vain(sizes, length, num_tokens, weights) < MAX_VAIN


def in_vain(sizes: list[int], length: int, num_tokens: int, weights: float) -> float:
    """Multiplications in padding and in empty places per saved product, where one product of the batch is saved per
    busy expert but one.

    `sizes` are the samples of each expert, `length` that of the longest sample, and `weights` the size of an average
    map.
    """
    saved = max(sum(size > 0 for size in sizes) - 1, 1)
    return (max(sizes) * len(sizes) * length - num_tokens) * weights / saved


class Even(NamedTuple):
    """A whole batch in the places of its experts. It has the interface of `Samples`."""

    source_S: Tensor  # the sample in each place
    place_B: Tensor  # the place of each sample
    num_experts: int
    layout: Layout
    keep_RL: Tensor | None  # of the places, [S, L]; None: no sample has padding

    @classmethod
    def of(cls, choice_B: Tensor, sizes: list[int], keep_BL: Tensor, padded: bool) -> Even:
        """The places of samples that have chosen these experts; `sizes` counts the samples of each."""
        # With numpy: these arrays are small, and a call of torch costs several times as much.
        width, num_experts, chosen_B = max(sizes), len(sizes), choice_B.numpy()
        order_B = chosen_B.argsort(kind="stable")
        first_N = np.arange(num_experts) * width - (np.cumsum(sizes) - sizes)
        sorted_B = np.arange(len(chosen_B)) + first_N[chosen_B[order_B]]
        places_B, sources_S = np.empty_like(order_B), np.zeros(num_experts * width, np.int64)
        places_B[order_B], sources_S[sorted_B] = sorted_B, order_B
        place_B, source_S = torch.from_numpy(places_B), torch.from_numpy(sources_S)
        keep_SL = keep_BL.index_select(0, source_S) if padded else None
        mask = None if keep_SL is None else keep_SL[:, None, None, :]
        grid = Grid(len(source_S), keep_BL.shape[1], mask)
        return cls(source_S, place_B, num_experts, Layout([grid], groups=num_experts), keep_SL)

    def take(self, h_BLD: Tensor) -> Tensor:
        """The states in the places, [N, M, D]."""
        rows: Tensor = applied(_TakeEvenly, h_BLD, self.source_S, self.place_B, self.num_experts)
        return rows

    def add_to(self, h_BLD: Tensor, change: Tensor, factor_B: Tensor) -> Tensor:
        """The states after each sample's change [N, M, D], times its factor, is added."""
        after: Tensor = applied(_AddEvenly, h_BLD, change, factor_B, self.place_B)
        return after

    def mean(self, x: Tensor) -> Tensor:
        """Rows [N, M, F] -> the mean over the tokens of each place, [S, F]."""
        grid_SLF = x.view(len(self.source_S), -1, x.shape[-1])
        return masked_mean(grid_SLF, self.keep_RL)

    def spread(self, x_S: Tensor) -> Tensor:
        """Repeat one number per place for each of its rows, [N, M, 1]."""
        length = self.layout.grids[0].length
        return x_S.unsqueeze(1).expand(-1, length).reshape(self.num_experts, -1, 1)


class _TakeEvenly(torch.autograd.Function):
    """Gather samples into places. What flows back from an empty place is zero, so no sum is needed."""

    @staticmethod
    def forward(ctx: Any, h_BLD: Tensor, source_S: Tensor, place_B: Tensor, num_experts: int) -> Tensor:
        ctx.save_for_backward(place_B)
        ctx.shape = h_BLD.shape
        return h_BLD.index_select(0, source_S).view(num_experts, -1, h_BLD.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (place_B,) = ctx.saved_tensors
        return gradient.reshape(-1, *ctx.shape[1:]).index_select(0, place_B), None, None, None


class _AddEvenly(torch.autograd.Function):
    """Add what lies in the samples' places, times a factor per sample."""

    @staticmethod
    def forward(ctx: Any, h_BLD: Tensor, change: Tensor, factor_B: Tensor, place_B: Tensor) -> Tensor:
        own_BLD = change.view(-1, *h_BLD.shape[1:]).index_select(0, place_B)
        factor_B11 = factor_B.view(-1, 1, 1)
        ctx.save_for_backward(own_BLD, factor_B11, place_B)
        ctx.shape = change.shape
        return torch.addcmul(h_BLD, own_BLD, factor_B11)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        own_BLD, factor_B11, place_B = ctx.saved_tensors
        to_change = gradient_BLD.new_zeros(ctx.shape)
        to_change.view(-1, *own_BLD.shape[1:]).index_copy_(0, place_B, gradient_BLD * factor_B11)
        to_factor_B = (gradient_BLD * own_BLD).sum((1, 2)) if ctx.needs_input_grad[2] else None
        return gradient_BLD, to_change, to_factor_B, None
