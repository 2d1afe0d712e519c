"""One product per expert: apply a function to the rows of each expert, then join the results.

R rows sorted by expert
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from research_eval.layers.dispatch import Dispatch

# Output numbers per expert; with fewer, one call for all experts is faster. A call costs more with gradients.
MIN_CHAIN = 80_000
MIN_CHAIN_WITHOUT_GRADIENTS = 40_000
MIN_WHOLE_CHAIN_WITHOUT_GRADIENTS = 16_000  # of a chain through whole blocks


def each_expert(function: Callable[..., Tensor], *rows: Tensor, dispatch: Dispatch, width: int) -> Tensor:
    """`function(*rows, dispatch)` on all rows at once, or on the rows of one expert after the other, joined.

    On a CPU the steps of one expert stay in the cache, and the results are joined once at the end. If the experts have
    few rows, longer steps over all experts are faster. `width` is the largest width inside the function.
    """
    if one_by_one(rows[0], dispatch, width):
        return by_slices(function, *rows, dispatch=dispatch)
    return function(*rows, dispatch)


def one_by_one(rows: Tensor, dispatch: Dispatch, width: int, whole: bool = False) -> bool:
    """Whether the rows of one expert after the other go through a chain of steps; `width` is the largest one inside.

    A `whole` chain is one of whole blocks.
    """
    if dispatch.even or dispatch.expert is not None or dispatch.kernels_for(rows) == "grouped":
        return False
    without_gradients = MIN_WHOLE_CHAIN_WITHOUT_GRADIENTS if whole else MIN_CHAIN_WITHOUT_GRADIENTS
    fewest = MIN_CHAIN if torch.is_grad_enabled() else min(MIN_CHAIN, without_gradients)
    return dispatch.sizes is None or rows.shape[:-1].numel() * width >= fewest * len(dispatch.sizes)


def by_slices(function: Callable[..., Tensor], *rows: Tensor, dispatch: Dispatch) -> Tensor:
    """Apply the function to the rows of each expert that has any, and join the results."""
    sizes = dispatch.counts()
    slices = zip(*(part.split(sizes) for part in rows), strict=True)
    parts = [
        function(*slice_, Dispatch([size], expert=expert, kernels=dispatch.kernels))
        for expert, (size, slice_) in enumerate(zip(sizes, slices, strict=True))
        if size
    ]
    if not parts:  # an empty batch: any expert gives the right shape
        return function(*rows, Dispatch([0], expert=0, kernels=dispatch.kernels))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
