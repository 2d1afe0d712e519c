"""All experts of a batch in one node of autograd's graph, for a CPU.

If experts see few rows, a node per expert costs more than the expert's matrix product.

R rows sorted by expert  I in  O out  N experts  D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Apart = list[tuple[Tensor, ...]]  # for every expert its slice of each stack, such as weight [O, I] and bias [O]
MIN_ROWS = 160  # rows per expert; with fewer, `index_add_` sums the gradient of the biases faster


class SlicedLinear(torch.autograd.Function):
    """`weight[e_r] @ x_r + bias[e_r]` for x [R, I] sorted by expert, into one output [R, O].

    `sizes` are the rows of each expert; `expert_R` is the expert of each row. The function also returns the weights and
    biases. The next use of the same stack in the pass takes them as its input. The stack's gradient then passes from
    use to use, and each use adds its part in place. Otherwise autograd fills an array of the whole stack for every use.
    `apart` has the experts' weights one by one (see `taken_apart`): with many experts, taking the stack apart at every
    use costs a twentieth of a pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        sizes: list[int],
        expert_R: Tensor,
        apart: Apart,
        weight_NOI: Tensor,
        bias_NO: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, expert_R, weight_NOI)
        ctx.sizes, ctx.apart = sizes, apart
        ctx.set_materialize_grads(False)
        return sliced_linear(x, sizes, apart), weight_NOI.view_as(weight_NOI), bias_NO.view_as(bias_NO)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor | None, weights: Tensor | None, biases: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, Tensor | None, Tensor | None]:
        """`weights` and `biases` are the gradients that later uses have summed; None if there is no later use."""
        if gradient is None:  # the loss does not depend on this use
            return None, None, None, None, weights, biases
        x, expert_R, weight_NOI = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = torch.empty_like(x)
        parts = gradient.split_with_sizes(ctx.sizes)
        for part, (weight_OI, _), target in zip(parts, ctx.apart, to_x.split_with_sizes(ctx.sizes), strict=True):
            if len(part):
                torch.mm(part, weight_OI, out=target)
        if not ctx.needs_input_grad[4]:
            return to_x, None, None, None, None, None
        weights = torch.zeros_like(weight_NOI) if weights is None else weights
        biases = gradient.new_zeros(weight_NOI.shape[:2]) if biases is None else biases
        # Few sums of many rows are faster than one call that adds row by row.
        by_expert = len(x) >= MIN_ROWS * len(ctx.sizes)
        for total_OI, total_O, part, rows in zip(weights, biases, parts, x.split_with_sizes(ctx.sizes), strict=True):
            if len(part):
                total_OI.addmm_(part.t(), rows)
                if by_expert:
                    total_O.add_(part.sum(0))
        if not by_expert:
            biases.index_add_(0, expert_R, gradient)
        return to_x, None, None, None, weights, biases


def sliced_linear(x: Tensor, sizes: list[int], apart: Apart) -> Tensor:
    """The forward pass of `SlicedLinear`."""
    out = x.new_empty(len(x), len(apart[0][1]))
    for size, (weight_OI, bias_O), part, target in zip(
        sizes, apart, x.split_with_sizes(sizes), out.split_with_sizes(sizes), strict=True
    ):
        if size:
            torch.addmm(bias_O, part, weight_OI.t(), out=target)
    return out


def taken_apart(*stacks: Tensor) -> Apart:
    """The slices of every expert, without a gradient."""
    return list(zip(*(stack.detach().unbind() for stack in stacks), strict=True))


class RowDot(torch.autograd.Function):
    """The product of each row of x [R, ..., D] with the weight [N, D] of its expert, [R, ..., 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_R: Tensor, weight_ND: Tensor) -> Tensor:
        ctx.save_for_backward(x, expert_R, weight_ND)
        rows = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        out = torch.bmm(rows, weight_ND.index_select(0, expert_R).unsqueeze(2))  # so torch counts its FLOPs
        return out.view(*x.shape[:-1], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        x, expert_R, weight_ND = ctx.saved_tensors
        weights = weight_ND.index_select(0, expert_R).view(len(x), *[1] * (x.ndim - 2), -1)
        per_row = (gradient * x).flatten(1, -2).sum(1) if x.ndim > 2 else gradient * x
        return gradient * weights, None, torch.zeros_like(weight_ND).index_add_(0, expert_R, per_row)
