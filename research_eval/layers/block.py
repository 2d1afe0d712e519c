"""Pre-LN Transformer block for one or many experts (GoE equations: docs/GOE.md).

B batch (sorted by expert)  L length  D width  H heads  N experts
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from research_eval.errors import ConfigError
from research_eval.layers.stacked import Dispatch, Dropout, StackedLayerNorm, StackedLinear, weight_count


def attention_mask_for(keep_BL: torch.Tensor) -> torch.Tensor | None:
    """The key mask [B, 1, 1, L] for attention, or None when nothing is padded.

    A sample without any token may look at its first position, so that no softmax runs over an empty set.
    """
    if bool(keep_BL.all()):
        return None
    allowed_BL = keep_BL.clone()
    allowed_BL[:, 0] |= ~keep_BL.any(1)
    return allowed_BL[:, None, None, :]


class Attention(nn.Module):
    """y = LN(h); A = MHA(y, y, y); returns A, or sigmoid(W_g [y; A] + b_g) * A when `gated`."""

    def __init__(self, embed_dim: int, num_heads: int, num_experts: int = 1, gated: bool = False) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ConfigError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")
        self.num_heads = num_heads
        self.norm = StackedLayerNorm(num_experts, embed_dim)
        # One product over y gives Q, K, V and, when gated, the half of the gate that reads y.
        self.input = StackedLinear(num_experts, embed_dim, (4 if gated else 3) * embed_dim)
        self.output = StackedLinear(num_experts, embed_dim, embed_dim)
        self.gate = StackedLinear(num_experts, embed_dim, embed_dim) if gated else None

    def forward(self, h_BLD: torch.Tensor, mask_B11L: torch.Tensor | None, dispatch: Dispatch) -> torch.Tensor:
        batch, length, width = h_BLD.shape
        projected = self.input(self.norm(h_BLD, dispatch), dispatch)
        query, key, value = (
            part.view(batch, length, self.num_heads, -1).transpose(1, 2)
            for part in projected[..., : 3 * width].split(width, dim=-1)
        )
        attended_BLD = _attend(query, key, value, mask_B11L).transpose(1, 2).reshape(batch, length, width)
        attended_BLD = self.output(attended_BLD, dispatch)
        if self.gate is None:
            return attended_BLD
        return attended_BLD * torch.sigmoid(projected[..., 3 * width :] + self.gate(attended_BLD, dispatch))


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask_B11L: torch.Tensor | None
) -> torch.Tensor:
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # The CPU's backward of attention is about 7 times slower in bf16 than in fp32.
        with torch.autocast("cpu", enabled=False):
            attended = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask_B11L)
        return attended.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, mask_B11L)


class FeedForward(nn.Module):
    """W_2 Drop(GELU(W_1 x)) with the exact (erf) GELU: four times faster on a CPU than its tanh form."""

    def __init__(self, embed_dim: int, dim_feedforward: int, dropout: float, num_experts: int = 1) -> None:
        super().__init__()
        self.expand = StackedLinear(num_experts, embed_dim, dim_feedforward)
        self.contract = StackedLinear(num_experts, dim_feedforward, embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return self.contract(self.dropout(F.gelu(self.expand(x, dispatch))), dispatch)


class Block(nn.Module):
    """h + Drop(Attention(h)), then h + Drop(FeedForward(LN(h)))."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        num_experts: int = 1,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.attention = Attention(embed_dim, num_heads, num_experts, gated)
        self.norm = StackedLayerNorm(num_experts, embed_dim)
        self.feed_forward = FeedForward(embed_dim, dim_feedforward, dropout, num_experts)
        self.dropout = Dropout(dropout)

    def forward(self, h_BLD: torch.Tensor, mask_B11L: torch.Tensor | None, dispatch: Dispatch) -> torch.Tensor:
        h_BLD = h_BLD + self.dropout(self.attention(h_BLD, mask_B11L, dispatch))
        return h_BLD + self.dropout(self.feed_forward(self.norm(h_BLD, dispatch), dispatch))


def block_flops(block: nn.Module, embed_dim: int, length: int) -> float:
    """Forward FLOPs of one sample through a block: two per weight and token, and 4 L^2 D for the attention itself."""
    return 2.0 * length * weight_count(block) + 4.0 * length**2 * embed_dim


def feed_forward_width(embed_dim: int, dim_feedforward: int | None, factor: float | None, default: float) -> int:
    """The inner width from either of its two spellings; `default` times the width when neither is given."""
    if dim_feedforward is not None and factor is not None:
        raise ConfigError(
            f"dim_feedforward={dim_feedforward} and dim_feedforward_factor={factor} name the same width: give one"
        )
    return dim_feedforward if dim_feedforward is not None else max(1, round(embed_dim * (factor or default)))
