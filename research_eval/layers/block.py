"""Pre-LN Transformer block for one or many experts (GoE equations: docs/GOE.md).

B batch (sorted by expert)  L length  D width  H heads  C channels of a head  N experts
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from research_eval.errors import ConfigError
from research_eval.layers.dispatch import Dispatch
from research_eval.layers.kernels import varlen
from research_eval.layers.kernels.plain import each_expert
from research_eval.layers.overwrite import gelu, plus, times_sigmoid
from research_eval.layers.packing import Layout
from research_eval.layers.settings import EncoderSettings, PositionalEncoding
from research_eval.layers.settings import feed_forward_width as feed_forward_width
from research_eval.layers.stacked import Dropout, StackedLayerNorm, StackedLinear, weight_count


def rotated(x_BHLC: torch.Tensor) -> torch.Tensor:
    """Rotate channels i and i + C/2 by the angle position * 10000^(-2i/C) (RoPE, Su et al., 2021).

    The product of a rotated query and a rotated key depends only on the distance between their positions.
    """
    length, channels = x_BHLC.shape[-2:]
    rates = 10_000.0 ** (-torch.arange(0, channels, 2, device=x_BHLC.device) / channels)
    angles = torch.arange(length, device=x_BHLC.device).unsqueeze(1) * rates
    cosine, sine = angles.cos(), angles.sin()
    first, second = x_BHLC.chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.to(x_BHLC.dtype)


def with_distances(mask_B11L: torch.Tensor | None, num_heads: int, like_BHLC: torch.Tensor) -> torch.Tensor:
    """The bias on the attention scores, [B or 1, H, L, L]: -slope_h |i - j|, and -inf at masked keys.

    The slopes are 2^(-8/H), 2^(-16/H), ..., 1/256 (ALiBi, Press et al., 2022). Attention here looks in both directions,
    so the bias is symmetric.
    """
    device = like_BHLC.device
    positions_L = torch.arange(like_BHLC.shape[-2], device=device)
    slopes_H11 = 2.0 ** (-8 / num_heads * torch.arange(1, num_heads + 1, device=device))[:, None, None]
    bias_1HLL = -slopes_H11 * (positions_L[:, None] - positions_L).abs().unsqueeze(0).unsqueeze(0)
    if mask_B11L is not None:
        bias_1HLL = bias_1HLL.masked_fill(~mask_B11L, float("-inf"))
    return bias_1HLL.to(like_BHLC.dtype)


class Attention(nn.Module):
    """y = LN(h); A = MHA(y, y, y); returns A, or sigmoid(W_g [y; A] + b_g) * A if `gated`.

    This class implements the positional encodings "rope" and "alibi". The embedding adds the others to h. Raises
    ConfigError if `num_heads` does not divide the width.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_experts: int = 1,
        gated: bool = False,
        positional_encoding: PositionalEncoding = "none",
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ConfigError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")
        if positional_encoding == "rope" and embed_dim // num_heads % 2:
            raise ConfigError(
                f"positional_encoding='rope' turns pairs of channels: embed_dim={embed_dim} over num_heads={num_heads} "
                f"gives {embed_dim // num_heads} per head, which has to be even"
            )
        self.num_heads = num_heads
        self.positional_encoding = positional_encoding
        self.norm = StackedLayerNorm(num_experts, embed_dim)
        # One product over y computes Q, K, V and, if gated, also the half of the gate that reads y.
        self.input = StackedLinear(num_experts, embed_dim, (4 if gated else 3) * embed_dim)
        self.input.joined_maps = 4 if gated else 3  # an optimiser that works on whole matrices takes them apart
        self.output = StackedLinear(num_experts, embed_dim, embed_dim)
        self.gate = StackedLinear(num_experts, embed_dim, embed_dim) if gated else None

    def forward(self, h: torch.Tensor, layout: Layout, dispatch: Dispatch) -> torch.Tensor:
        """Rows [S, D], or a grid [R, L, D], in the order of the experts -> the same shape."""
        width = h.shape[-1]
        projected = each_expert(self._projected, h, dispatch=dispatch, width=self.input.weight.shape[1])
        # `split` and not slices: the backward pass of a slice fills an array as large as the whole.
        qkv, *rest = (projected,) if self.gate is None else projected.split([3 * width, width], -1)
        attended = self._attended_rows(qkv, layout)
        return each_expert(self._gated, attended, *rest, dispatch=dispatch, width=projected.shape[-1])

    def _projected(self, h: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """Queries, keys and values side by side; if the attention is gated, also the half of the gate that reads y."""
        return self.input.of_normed(self.norm, h, dispatch)

    def _gated(self, *rows_and_dispatch: Any) -> torch.Tensor:
        """The output projection, multiplied by the gate if there is one.

        The arguments are the attended rows, then the gate's half from `_projected` if there is one, then the dispatch.
        """
        attended, *from_input, dispatch = rows_and_dispatch
        attended = self.output(attended, dispatch)
        if self.gate is None:
            return attended
        return times_sigmoid(attended, from_input[0], self.gate(attended, dispatch), self.gate)

    def _attended_rows(self, qkv: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Queries, keys and values of rows [S, 3 D], or of a grid -> attended values of the same rows."""
        channels = qkv.shape[-1] // (3 * self.num_heads)
        needs_places = self.positional_encoding in ("rope", "alibi")
        if layout.starts is None or needs_places or not varlen.can_attend(qkv, channels):
            grids = zip(layout.grids_of(qkv), layout.grids, strict=True)
            return layout.rows_of([self._attended(grid_qkv, grid.mask) for grid_qkv, grid in grids])
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, channels)).unbind(1)
        return varlen.attend(query, key, value, layout.starts, layout.grids[0].length).flatten(1)

    def _attended(self, qkv_BLE: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Queries, keys and values side by side [B, L, 3 D] -> attended values [B, L, D]."""
        batch, length, _ = qkv_BLE.shape
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in qkv_BLE.chunk(3, dim=-1)
        )
        if self.positional_encoding == "rope":
            query, key = rotated(query), rotated(key)
        elif self.positional_encoding == "alibi":
            mask = with_distances(mask, self.num_heads, query)
        return _attend(query, key, value, mask).transpose(1, 2).reshape(batch, length, -1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scaled dot-product attention over [B, H, L, C].

    `mask` is boolean (True: the key is visible) or a float bias on the scores. It broadcasts to [B, H, L, L].
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # The CPU's backward of attention is about 7 times slower in bf16 than in fp32.
        with torch.autocast("cpu", enabled=False):
            mask = mask.float() if mask is not None and mask.is_floating_point() else mask
            attended = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask)
        return attended.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, mask)


class FeedForward(nn.Module):
    """W_2 Drop(GELU(W_1 x)). The exact (erf) GELU is four times faster on a CPU than the tanh approximation."""

    def __init__(self, embed_dim: int, dim_feedforward: int, dropout: float, num_experts: int = 1) -> None:
        super().__init__()
        self.expand = StackedLinear(num_experts, embed_dim, dim_feedforward)
        self.contract = StackedLinear(num_experts, dim_feedforward, embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """Rows [R, ..., D] sorted by expert -> the same shape."""
        return each_expert(self._of_expert, x, dispatch=dispatch, width=self.expand.weight.shape[1])

    def _of_expert(self, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return self._contracted(self.expand(x, dispatch), dispatch)

    def of_normed(self, norm: StackedLayerNorm, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """The layer of norm(x), for rows in one chain of steps."""
        return self._contracted(self.expand.of_normed(norm, x, dispatch), dispatch)

    def _contracted(self, expanded: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        image: torch.Tensor = self.contract(self.dropout(gelu(expanded, self.expand)), dispatch)
        return image


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
        positional_encoding: PositionalEncoding = "none",
    ) -> None:
        super().__init__()
        self.attention = Attention(embed_dim, num_heads, num_experts, gated, positional_encoding)
        self.norm = StackedLayerNorm(num_experts, embed_dim)
        self.feed_forward = FeedForward(embed_dim, dim_feedforward, dropout, num_experts)
        self.dropout = Dropout(dropout)

    def forward(self, h: torch.Tensor, layout: Layout, dispatch: Dispatch) -> torch.Tensor:
        """Rows [S, D], or a grid [R, L, D], in the order of the experts -> the same shape."""
        attended = self.dropout(self.attention(h, layout, dispatch))
        h = plus(h, attended, self.attention, self.attention.output, self.dropout)
        width = self.feed_forward.expand.weight.shape[1]
        update = self.dropout(each_expert(self._fed_forward, h, dispatch=dispatch, width=width))
        return plus(h, update, self.feed_forward.contract, self.dropout)

    def _fed_forward(self, h: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return self.feed_forward.of_normed(self.norm, h, dispatch)


def encoder_blocks(encoder: EncoderSettings, num_layers: int) -> nn.ModuleList:
    """The blocks of an encoder without experts. The feed-forward width is 2 D by default."""
    width = encoder.feed_forward_width(default=2)
    return nn.ModuleList(
        Block(
            encoder.embed_dim,
            encoder.num_heads,
            width,
            encoder.dropout,
            positional_encoding=encoder.positional_encoding,
        )
        for _ in range(num_layers)
    )


def compile_blocks(model: nn.Module) -> None:
    """Compile each block, or the parts of a block. A model without any of them is compiled as a whole.

    Blocks of the same shape share their compiled code. The first step therefore comes several times sooner than after
    compiling the whole model.
    """
    regions = list(_regions(model))
    for region in regions or [model]:
        region.compile(dynamic=True)


def _regions(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks or parts of blocks below a module."""
    for child in module.children():
        if isinstance(child, Block | Attention | FeedForward):
            yield child
        else:
            yield from _regions(child)


def block_flops(block: nn.Module, embed_dim: int, length: int) -> float:
    """Forward FLOPs of one sample through a block.

    Each weight costs two operations per token; the attention itself costs 4 L^2 D.
    """
    return 2.0 * length * weight_count(block) + 4.0 * length**2 * embed_dim
