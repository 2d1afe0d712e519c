"""One product per expert: apply a function to the rows of each expert, then join the results.

R rows sorted by expert
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from research_eval.layers.dispatch import Dispatch

MIN_CHAIN = 80_000  # output numbers per expert; with fewer, one call for all experts is faster


def each_expert(function: Callable[..., Tensor], *rows: Tensor, dispatch: Dispatch, width: int) -> Tensor:
    """`function(*rows, dispatch)` on all rows at once, or on the rows of one expert after the other, joined.

    On a CPU the steps of one expert stay in the cache, and the results are joined once at the end. If the experts have
    few rows, longer steps over all experts are faster. `width` is the largest width inside the function.
    """
    numbers = rows[0].shape[:-1].numel() * width
    few = dispatch.sizes is not None and numbers < MIN_CHAIN * len(dispatch.sizes)
    if few or dispatch.expert is not None or dispatch.kernels_for(rows[0]) == "grouped":
        return function(*rows, dispatch)
    return by_slices(function, *rows, dispatch=dispatch)


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
