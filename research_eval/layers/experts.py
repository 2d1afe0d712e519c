"""A pool of Transformer and scan experts, and one step of a path through it.

B batch  R running samples, sorted by expert  L length  D width  N experts
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import nn

from research_eval.errors import ConfigError
from research_eval.layers.block import Block, attention_mask_for
from research_eval.layers.scan import ScanExpert, ScanSettings
from research_eval.layers.stacked import Dispatch
from research_eval.layers.text import PositionalEncoding, masked_mean


class Step(NamedTuple):
    """The states after one step, and what the executed experts added (in the order of the sorted rows)."""

    h_BLD: torch.Tensor
    delta_RD: torch.Tensor  # pooled E_a(h) - h
    experts_R: torch.Tensor
    edge_entropy: torch.Tensor | None = None  # of the scan experts executed in training: mean entropy of their edges


class ExpertPool(nn.Module):
    """E_e(h) = z = blocks_e(h), or with `adaptive_gate` g z + (1 - g) h + tag_e with g = sigmoid(w_e pool(z) + b_e).

    The last `num_scan_experts` of the experts are scan experts, z = ScanExpert_e(h).
    """

    def __init__(
        self,
        num_experts: int,
        num_layers: int,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        gated: bool = False,
        adaptive_gate: bool = False,
        positional_encoding: PositionalEncoding = "none",
        num_scan_experts: int = 0,
        scan: ScanSettings | None = None,
    ) -> None:
        super().__init__()
        if num_scan_experts > num_experts:
            raise ConfigError(f"{num_scan_experts} scan experts are more than the {num_experts} experts of the pool")
        self.num_experts = num_experts
        self.num_attention_experts = num_experts - num_scan_experts
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, num_heads, dim_feedforward, dropout, self.num_attention_experts, gated, positional_encoding
            )
            for _ in range(num_layers if self.num_attention_experts else 0)
        )
        self.gate = AdaptiveGate(num_experts, embed_dim) if adaptive_gate else None
        self.scans = nn.ModuleList(ScanExpert(embed_dim, scan or ScanSettings()) for _ in range(num_scan_experts))

    def forward(self, h_RLD: torch.Tensor, keep_RL: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """States of rows sorted by expert -> E_e(h)."""
        z_RLD = self._split(h_RLD, keep_RL, dispatch) if self.scans else self._attend(h_RLD, keep_RL, dispatch)
        if self.gate is None:
            return z_RLD
        return self.gate(h_RLD, z_RLD, keep_RL, dispatch)

    def _attend(self, h_RLD: torch.Tensor, keep_RL: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        mask_R11L = attention_mask_for(keep_RL)
        for block in self.blocks:
            h_RLD = block(h_RLD, mask_R11L, dispatch)
        return h_RLD

    def _split(self, h_RLD: torch.Tensor, keep_RL: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """The rows of the attention experts come first; an idle scan expert is not part of the computation."""
        sizes = dispatch.sizes[: self.num_attention_experts]
        cut = sum(sizes)
        experts_R = None if dispatch.experts_R is None or len(sizes) == 1 else dispatch.experts_R[:cut]
        parts = [self._attend(h_RLD[:cut], keep_RL[:cut], Dispatch(sizes, experts_R))] if cut else []
        scan_sizes = dispatch.sizes[self.num_attention_experts :]
        groups = zip(self.scans, h_RLD[cut:].split(scan_sizes), keep_RL[cut:].split(scan_sizes), strict=True)
        parts += [scan(rows_RLD, rows_RL) for scan, rows_RLD, rows_RL in groups if len(rows_RLD)]
        return torch.cat(parts)

    def _edge_entropy(self, sizes: list[int]) -> torch.Tensor | None:
        """Of the executed scan experts alone, so that no other one gets a gradient; None outside training."""
        if not self.training:
            return None
        executed = zip(self.scans, sizes[self.num_attention_experts :], strict=True)
        entropies = [cast(ScanExpert, scan).graph.row_entropy() for scan, size in executed if size]
        return torch.stack(entropies).mean() if entropies else None

    def step(
        self, h_BLD: torch.Tensor, keep_BL: torch.Tensor, choice_B: torch.Tensor, coefficient_B: torch.Tensor
    ) -> Step:
        """h + c (E_a(h) - h) for running samples; `choice` = N leaves a sample as it is and costs nothing.

        One stable sort per step: stopped samples come last and leave the batch, each expert sees one slice.
        """
        order_B = choice_B.argsort(stable=True)
        sizes = choice_B.bincount(minlength=self.num_experts + 1).tolist()
        running = len(choice_B) - sizes.pop()
        rows_R = order_B[:running]
        experts_R = choice_B[rows_R]
        if not running:
            return Step(h_BLD, h_BLD.new_zeros(0, h_BLD.shape[-1]), experts_R)
        before_RLD, keep_RL = h_BLD[rows_R], keep_BL[rows_R]
        dispatch = Dispatch(sizes, experts_R) if self.num_experts > 1 else Dispatch.single(running)
        delta_RLD = self(before_RLD, keep_RL, dispatch) - before_RLD
        after_BLD = before_RLD + coefficient_B[rows_R, None, None] * delta_RLD
        if running < len(choice_B):
            after_BLD = torch.cat([after_BLD, h_BLD[order_B[running:]].to(after_BLD.dtype)])
        delta_RD = masked_mean(delta_RLD, keep_RL)
        return Step(after_BLD[order_B.argsort()], delta_RD, experts_R, self._edge_entropy(sizes))


class AdaptiveGate(nn.Module):
    """Lets an expert keep part of its input, and marks its output with a tag of its own."""

    def __init__(self, num_experts: int, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, embed_dim).uniform_(-(embed_dim**-0.5), embed_dim**-0.5))
        self.bias = nn.Parameter(torch.full((num_experts,), 2.0))  # mostly open at the start
        self.tag = nn.Parameter(torch.randn(num_experts, embed_dim) * 0.02)

    def forward(
        self, h_RLD: torch.Tensor, z_RLD: torch.Tensor, keep_RL: torch.Tensor, dispatch: Dispatch
    ) -> torch.Tensor:
        experts_R = (
            keep_RL.new_zeros(len(h_RLD), dtype=torch.long) if dispatch.experts_R is None else dispatch.experts_R
        )
        score_R = (self.weight[experts_R] * masked_mean(z_RLD, keep_RL)).sum(-1) + self.bias[experts_R]
        gate_R11 = torch.sigmoid(score_R)[:, None, None]
        return torch.lerp(h_RLD, z_RLD.to(h_RLD.dtype), gate_R11.to(h_RLD.dtype)) + self.tag[experts_R].unsqueeze(1)
