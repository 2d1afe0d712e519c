"""One grouped product for all experts. The host needs no loop and never waits for the device.

R rows sorted by expert  I in  O out  N experts  D width
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from research_eval.layers.dispatch import Dispatch


def grouped_linear(x: Tensor, weight_NOI: Tensor, bias_NO: Tensor, dispatch: Dispatch) -> Tensor:
    """Row r of x [R, ..., I] -> `weight[e_r] @ x_r + bias[e_r]`, [R, ..., O], in one product."""
    tokens = x.shape[1:-1].numel()
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        rows, weight_NOI = rows.to(dtype), weight_NOI.to(dtype)
    out = F.grouped_mm(rows, weight_NOI.transpose(1, 2), offs=dispatch.ends(x.device) * tokens)
    return (out + bias_NO[dispatch.experts_of(x, tokens)].to(out.dtype)).view(*x.shape[:-1], -1)


def rows_of_expert(weight_ND: Tensor, experts_R: Tensor) -> Tensor:
    """The weight of each row's expert, [R, D]."""
    # The backward pass of `index_select` is fast, but on a GPU the order of its additions varies.
    return weight_ND.index_select(0, experts_R) if weight_ND.device.type == "cpu" else weight_ND[experts_R]


def for_rows(weight_ND: Tensor, x: Tensor, dispatch: Dispatch) -> Tensor:
    """The weight of each row's expert, [R, D] or [R, 1, D], in the form that broadcasts with x [R, ..., D]."""
    return rows_of_expert(weight_ND, dispatch.experts_of(x)).view(len(x), *[1] * (x.ndim - 2), -1)
