"""Matrix products of many experts without biases, on rows sorted by expert.

R rows sorted by expert  I in  O out  N experts
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from research_eval.layers.dispatch import Dispatch
from research_eval.layers.kernels.autograd import applied

ROWS_OF_BF16 = 64  # oneDNN compiles a kernel for each number of rows; padded numbers are few


class ExpertMatrix(nn.Module):
    """Row r -> `weight[e_r] @ x_r`, with e_r the row's expert. The optimiser treats each expert's matrix by itself."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, zero: bool = False) -> None:
        super().__init__()
        weight_NOI = torch.zeros(num_experts, out_features, in_features)
        if not zero:
            bound = (3 / in_features) ** 0.5  # rows of unit variance stay so
            weight_NOI.uniform_(-bound, bound)
        self.weight = nn.Parameter(weight_NOI)

    def forward(self, x_RI: Tensor, dispatch: Dispatch) -> Tensor:
        """x [R, I] sorted by expert -> [R, O]."""
        weight_NOI: Tensor = self.weight
        if len(weight_NOI) == 1:
            return F.linear(x_RI, weight_NOI.squeeze(0))
        if len(x_RI) == 1 and dispatch.sizes is not None:  # one token is decoded: no loop over idle experts
            return F.linear(x_RI, weight_NOI[dispatch.sizes.index(1)])
        kernels, is_cast = dispatch.kernels_for(x_RI), torch.is_autocast_enabled(x_RI.device.type)
        if kernels == "grouped" and weight_NOI.shape[1] % 8 == 0 == weight_NOI.shape[2] % 8:
            if is_cast:
                dtype = torch.get_autocast_dtype(x_RI.device.type)
                x_RI, weight_NOI = x_RI.to(dtype), weight_NOI.to(dtype)
            return F.grouped_mm(x_RI, weight_NOI.transpose(1, 2), offs=dispatch.ends(x_RI.device))
        if kernels == "slices" and not is_cast:
            product: Tensor = applied(_SlicedProduct, x_RI, weight_NOI, dispatch.counts())
            return product
        return _one_by_one(x_RI, weight_NOI, dispatch.counts(), pads=is_cast and x_RI.device.type == "cpu")


def _one_by_one(x_RI: Tensor, weight_NOI: Tensor, sizes: list[int], pads: bool) -> Tensor:
    """A product per expert; with `pads`, of numbers of rows that are multiples of ROWS_OF_BF16."""
    parts = []
    for weight_OI, part in zip(weight_NOI.unbind(), x_RI.split(sizes), strict=True):
        if not len(part):
            continue
        missing = -len(part) % ROWS_OF_BF16 if pads else 0
        padded = F.pad(part, (0, 0, 0, missing)) if missing else part
        parts.append(F.linear(padded, weight_OI)[: len(part)])
    return torch.cat(parts) if parts else F.linear(x_RI, weight_NOI[0])


class _SlicedProduct(torch.autograd.Function):
    """All experts in one node of autograd's graph, into one output, for a CPU."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_NOI: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x_RI, weight_NOI)
        ctx.sizes = sizes
        out_RO = x_RI.new_empty(len(x_RI), weight_NOI.shape[1])
        for weight_OI, part, target in zip(
            weight_NOI.detach().unbind(), x_RI.split(sizes), out_RO.split(sizes), strict=True
        ):
            if len(part):
                torch.mm(part, weight_OI.t(), out=target)
        return out_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RO: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_RI, weight_NOI = ctx.saved_tensors
        gradient_RO = gradient_RO.contiguous()
        to_x_RI = torch.empty_like(x_RI)
        to_weight_NOI = torch.zeros_like(weight_NOI)
        splits = (rows.split(ctx.sizes) for rows in (gradient_RO, x_RI, to_x_RI))
        for weight_OI, total_OI, part, rows, target in zip(weight_NOI, to_weight_NOI, *splits, strict=True):
            if len(part):
                torch.mm(part, weight_OI, out=target)
                torch.mm(part.t(), rows, out=total_OI)
        return to_x_RI, to_weight_NOI, None
