"""Elementwise steps that write their result into an argument that nobody else reads, where no gradient needs it.

A new array of a megabyte costs a page fault for every 4 kB, which takes as long as the step itself.

`makers` are the modules that made the argument or passed it on. A forward hook of such a module may keep the argument.
So if one of them has a hook, the step makes a new array.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _may_overwrite(own: Tensor, others: tuple[Tensor, ...], makers: tuple[nn.Module, ...]) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if any(maker._forward_hooks or maker._forward_pre_hooks for maker in makers):
        return False
    return all(other.dtype == own.dtype and other.shape == own.shape for other in others)


def gelu(own: Tensor, *makers: nn.Module) -> Tensor:
    """GELU(own), exact (erf). May overwrite `own`."""
    if not _may_overwrite(own, (), makers):
        return F.gelu(own)
    activated: Tensor = torch.ops.aten.gelu_(own)
    return activated


def plus(x: Tensor, own: Tensor, *makers: nn.Module) -> Tensor:
    """x + own. May overwrite `own`."""
    return own.add_(x) if _may_overwrite(own, (x,), makers) else x + own


def times_sigmoid(x: Tensor, scores: Tensor, own: Tensor, *makers: nn.Module) -> Tensor:
    """x sigmoid(scores + own). May overwrite `own`."""
    if not _may_overwrite(own, (x, scores), makers):
        return x * torch.sigmoid(scores + own)
    return own.add_(scores).sigmoid_().mul_(x)
