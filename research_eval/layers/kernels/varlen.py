"""Attention over rows without padding, one sample behind the other, on a CUDA device in 16 bits.

S rows of all samples  R samples  H heads  C channels of a head
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CHANNELS = 256  # of a head, for the kernel


def can_attend(qkv: Tensor, channels: int) -> bool:
    """Whether the kernel takes such rows: it has no form for 32 bits and none for a CPU."""
    is_short = qkv.dtype in (torch.bfloat16, torch.float16)
    return qkv.is_cuda and is_short and channels % 8 == 0 and channels <= MAX_CHANNELS


def attend(query_SHC: Tensor, key_SHC: Tensor, value_SHC: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Each row attends to the rows of its sample, [S, H, C].

    Sample r has the rows `starts[r]` to `starts[r + 1]` (int32, on the device). No sample is longer than `longest`, so
    the host never waits for a length.
    """
    from torch.nn.attention.varlen import varlen_attn  # with it comes torch's compiler, which takes over a second

    attended = varlen_attn(query_SHC, key_SHC, value_SHC, starts, starts, longest, longest)
    assert isinstance(attended, Tensor), "a pair only where the kernel is asked for more"
    return attended
