"""Attention over earlier tokens only, with rotary positions and normalised queries and keys.

B batch  n new tokens  L tokens so far  S = B n rows  D width  H heads  K = D / H  N experts
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.layers.causal.context import Context
from research_eval.layers.causal.products import ExpertMatrix
from research_eval.layers.causal.settings import CausalNorm, CausalSettings
from research_eval.layers.dispatch import Dispatch
from research_eval.layers.overwrite import gelu


def normed(x: Tensor, kind: CausalNorm = "layer") -> Tensor:
    """Normalise the last dimension, without weights. On a CPU torch has a fused layer norm, but no fused RMS norm."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:])
    return F.rms_norm(x, x.shape[-1:])


def full_precision(x: Tensor) -> Tensor:
    """The tensor in float32, unless it is float64: rounding to bf16 changes routes and probabilities."""
    return x if x.dtype == torch.float64 else x.float()


class Rotation(nn.Module):
    """Rotary positions (Su et al., 2021): channels i and i + K/2 turn by the angle position * 10000^(-2i/K).

    The table is made once for `length` positions, and again for more.
    """

    table_LK: Tensor

    def __init__(self, head_width: int, length: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.register_buffer("table_LK", _angles(length, head_width), persistent=False)

    def forward(self, x_BHnK: Tensor, context: Context) -> Tensor:
        """Turn queries or keys to the positions of the new tokens."""
        end = context.offset + x_BHnK.shape[2]
        if end > len(self.table_LK):
            self.table_LK = _angles(2 * end, self.head_width).to(self.table_LK)
        if context.positions is None:
            table = self.table_LK[context.offset : end]
        else:
            table = self.table_LK[context.positions].unsqueeze(1)
        cosine, sine = table.to(x_BHnK.dtype).chunk(2, -1)
        first, second = x_BHnK.chunk(2, -1)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def _angles(length: int, width: int) -> Tensor:
    """The cosines of all positions beside the sines, [L, K]."""
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(length, dtype=torch.float32).unsqueeze(1) * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


class Attention(nn.Module):
    """A = softmax(q k / sqrt(K)) v over the earlier tokens, without the projections, which may belong to experts."""

    def __init__(self, settings: CausalSettings, length: int) -> None:
        super().__init__()
        self.num_heads = settings.num_heads
        self.qk_norm = settings.qk_norm
        self.norm: CausalNorm = settings.norm
        is_rotary = settings.positional_encoding == "rope"
        self.rotation = Rotation(settings.embed_dim // settings.num_heads, length) if is_rotary else None

    def keys(self, k_SD: Tensor, context: Context) -> Tensor:
        """Keys of the new tokens, normalised and turned, [B, H, n, K]. Queries have the same form."""
        heads = self.heads(k_SD, context)
        if self.qk_norm:
            heads = normed(heads, self.norm)
        return heads if self.rotation is None else self.rotation(heads, context)

    def heads(self, x_SD: Tensor, context: Context) -> Tensor:
        """Rows [S, D] -> [B, H, n, K]."""
        return x_SD.view(-1, context.num_new, self.num_heads, x_SD.shape[-1] // self.num_heads).transpose(1, 2)

    def forward(self, q_SD: Tensor, k_SD: Tensor, v_SD: Tensor, context: Context, step: str) -> Tensor:
        """Attended values [S, D]. `step` names the entries of the cache."""
        query = self.keys(q_SD, context)
        key, value = self.keys(k_SD, context), self.heads(v_SD, context)
        if context.cache is not None:
            key, value = context.cache.extended(f"{step}.k", key), context.cache.extended(f"{step}.v", value)
        return self.attended(query, key, value, context)

    def attended(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """Scaled dot-product attention [B, H, n, K] over [B, H, L, K] -> rows [S, D].

        On a CPU the backward pass of attention is slow in bf16, so it computes in float32.
        """
        dtype = query.dtype
        with torch.autocast(query.device.type, enabled=False):
            if query.device.type == "cpu" and dtype == torch.bfloat16:
                query, key, value = query.float(), key.float(), value.float()
            out = F.scaled_dot_product_attention(query, key, value, context.mask, is_causal=context.is_causal)
        return out.to(dtype).transpose(1, 2).flatten(2).flatten(0, 1)


class Projections(nn.Module):
    """The maps around the attention that stand in `names` ("q", "k", "v", "o"), for one or many experts."""

    def __init__(self, settings: CausalSettings, names: str, num_experts: int = 1) -> None:
        super().__init__()
        width = settings.embed_dim
        for name in names:
            zero = name == "o" and settings.zero_init
            self.add_module(name, ExpertMatrix(num_experts, width, width, zero))

    def maps(self) -> dict[str, ExpertMatrix]:
        """The maps by name."""
        return {name: child for name, child in self.named_children() if isinstance(child, ExpertMatrix)}


class CausalFeedForward(nn.Module):
    """W_2 act(W_1 x), or with "swiglu" W_2 (silu(W_g x) * W_1 x), for one or many experts.

    The inner width is `inner`, or `settings.feed_forward_width` if `inner` is None.
    """

    def __init__(self, settings: CausalSettings, num_experts: int = 1, inner: int | None = None) -> None:
        super().__init__()
        self.activation = settings.activation
        inner = inner or settings.feed_forward_width
        self.expand = ExpertMatrix(num_experts, settings.embed_dim, inner)
        self.gate = ExpertMatrix(num_experts, settings.embed_dim, inner) if self.activation == "swiglu" else None
        self.contract = ExpertMatrix(num_experts, inner, settings.embed_dim, settings.zero_init)

    def forward(self, x_RD: Tensor, dispatch: Dispatch) -> Tensor:
        """Rows [R, D] sorted by expert -> the same shape."""
        inner = self.expand(x_RD, dispatch)
        if self.gate is not None:
            inner = F.silu(self.gate(x_RD, dispatch)) * inner
        elif self.activation == "relu2":
            inner = F.relu(inner).square()
        else:
            inner = gelu(inner, self.expand)
        out: Tensor = self.contract(inner, dispatch)
        return out

    def matrices(self) -> list[ExpertMatrix]:
        """The maps of the part."""
        return [part for part in (self.expand, self.gate, self.contract) if part is not None]


class CausalBlock(nn.Module):
    """The maps of one step that no router chooses: around the attention, and a feed-forward part."""

    def __init__(self, settings: CausalSettings) -> None:
        super().__init__()
        self.attention = Projections(settings, "qkvo")
        self.feed_forward = CausalFeedForward(settings)
