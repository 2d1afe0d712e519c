"""Move tokens to the experts that the router chose for them, and bring the results back to the tokens.

S tokens  K experts per token  R = S K assignments  N experts  D width
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from research_eval.layers.kernels.autograd import applied


class Assignments(NamedTuple):
    """Pairs of token and expert, sorted by expert: the first `sizes[0]` belong to expert 0, and so on.

    Pairs of the same expert keep the order of their tokens, so results do not depend on the sorting algorithm.
    """

    order_R: Tensor  # sorted place -> place in the flattened choices [S, K]
    place_SK: Tensor  # the inverse: choice -> sorted place
    sizes_N: Tensor  # assignments of each expert

    @classmethod
    def of(cls, chosen_SK: Tensor, num_experts: int) -> Assignments:
        """Sort the chosen experts of each token. The host reads nothing back from the device."""
        expert_R, order_R = chosen_SK.flatten().sort(stable=True)
        numbers_R = torch.arange(len(order_R), device=order_R.device)
        place_SK = torch.empty_like(order_R).index_copy_(0, order_R, numbers_R).view_as(chosen_SK)
        ends_N = torch.searchsorted(expert_R, torch.arange(num_experts, device=order_R.device), right=True)
        return cls(order_R, place_SK, ends_N.diff(prepend=ends_N.new_zeros(1)))

    def rows(self, x_SD: Tensor) -> Tensor:
        """The token of each assignment, [R, D]."""
        rows_RD: Tensor = applied(_Rows, x_SD, *self)
        return rows_RD

    def combined(self, y_RD: Tensor, weights_SK: Tensor) -> Tensor:
        """Per token the sum of its K rows, each times its weight, [S, D]."""
        sums_SD: Tensor = applied(_Combined, y_RD, weights_SK.to(y_RD.dtype), *self)
        return sums_SD


class _Rows(torch.autograd.Function):
    """Gather in the forward pass; in the backward pass sum the K gradients of each token in a fixed order.

    Autograd's own gradient of `index_select` scatters instead. On a GPU the order of its additions varies.
    """

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, order_R: Tensor, place_SK: Tensor, _: Tensor) -> Tensor:
        ctx.save_for_backward(place_SK)
        return x_SD.index_select(0, order_R // place_SK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return _sums(gradient_RD, *ctx.saved_tensors), None, None, None


class _Combined(torch.autograd.Function):
    """Weighted sum of each token's K rows, with gradients to the rows and to the weights."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_SK: Tensor, order_R: Tensor, place_SK: Tensor, _: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, weights_SK, order_R, place_SK)
        return _sums(y_RD, place_SK, weights_SK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_RD, weights_SK, order_R, place_SK = ctx.saved_tensors
        rows_RD = gradient_SD.index_select(0, order_R // place_SK.shape[1])
        to_weights_R = (rows_RD * y_RD).sum(1)
        to_y_RD = rows_RD.mul_(weights_SK.flatten().index_select(0, order_R).unsqueeze(1))
        return to_y_RD, to_weights_R.index_select(0, place_SK.flatten()).view_as(place_SK), None, None, None


def _sums(y_RD: Tensor, place_SK: Tensor, weights_SK: Tensor | None = None) -> Tensor:
    """Add up the rows of y that belong to each token, in the order of the token's choices, [S, D].

    The order is fixed, so the result does not depend on the number of threads.
    """
    if y_RD.device.type == "cpu":  # avoids an array of all rows, [S, K, D]
        return F.embedding_bag(place_SK, y_RD, mode="sum", per_sample_weights=weights_SK)
    rows_SKD = y_RD.index_select(0, place_SK.flatten()).view(*place_SK.shape, -1)
    return (rows_SKD if weights_SK is None else rows_SKD * weights_SK.unsqueeze(-1)).sum(1)
