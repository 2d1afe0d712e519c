"""A pool of Transformer and scan experts, and one step of a path through it.

B batch  R running samples, sorted by expert  L length  D width  N experts
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from research_eval.errors import ConfigError
from research_eval.layers.block import Block
from research_eval.layers.kernels import Dispatch, RowDot, applied, by_slices, for_rows, kernels_for
from research_eval.layers.packing import Layout, Packing, Samples
from research_eval.layers.routing import members
from research_eval.layers.scan import ScanExpert, ScanSettings
from research_eval.layers.stacked import Stacked, by_rows
from research_eval.layers.text import PositionalEncoding


class Step(NamedTuple):
    """The states after one step, and what the executed experts added (in the order of the sorted rows)."""

    h_BLD: torch.Tensor
    experts_R: torch.Tensor
    delta_RD: torch.Tensor | None = None  # pooled E_a(h) - h, where it was asked for
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
        """States of samples sorted by expert -> E_e(h)."""
        samples = Packing(keep_RL, packed=False).samples()
        return h_RLD + self._change(h_RLD, samples, dispatch)

    def _change(self, h: torch.Tensor, samples: Samples, dispatch: Dispatch) -> torch.Tensor:
        """E_e(h) - h for the rows of samples that are sorted by expert."""
        z = self._split(h, samples.keep_RL, dispatch) if self.scans else self._attend(h, samples.layout, dispatch)
        return z - h if self.gate is None else self.gate(h, z, samples, dispatch)

    def _attend(self, h: torch.Tensor, layout: Layout, dispatch: Dispatch) -> torch.Tensor:
        for block in self.blocks:
            h = block(h, layout, dispatch)
        return h

    def _split(self, h_RLD: torch.Tensor, keep_RL: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """The rows of the attention experts come first; an idle scan expert is not part of the computation."""
        sizes, scan_sizes = (
            dispatch.counts()[: self.num_attention_experts],
            dispatch.counts()[self.num_attention_experts :],
        )
        cut = sum(sizes)
        parts = [self._attend(h_RLD[:cut], Layout.whole(keep_RL[:cut]), Dispatch(sizes))] if cut else []
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

    def packing(self, keep_BL: torch.Tensor, num_tokens: int | None = None) -> Packing:
        """How `step` sees a batch: without its padding, unless scan experts walk over it."""
        return Packing(keep_BL, num_tokens, packed=False if self.scans else None)

    def step(
        self,
        h_BLD: torch.Tensor,
        packing: Packing,
        choice_B: torch.Tensor,
        coefficient_B: torch.Tensor,
        all_run: bool = False,
        pooled: bool = False,
    ) -> Step:
        """h + c (E_a(h) - h) for running samples; `choice` = N leaves a sample as it is and costs nothing.

        One stable sort per step: stopped samples come last and leave the batch, each expert sees one slice. `all_run`
        promises that nobody has stopped, so that no number has to be read back from the device.
        """
        order_B = choice_B.argsort(stable=True)
        member_BN = members(choice_B, self.num_experts)
        rows_R = order_B if all_run else order_B[: int(member_BN.sum())]
        if not len(rows_R):
            return Step(h_BLD, rows_R, h_BLD.new_zeros(0, h_BLD.shape[-1]) if pooled else None)
        samples = packing.samples(rows_R)
        dispatch = Dispatch.of((member_BN * samples.num_rows(packing.lengths_B).unsqueeze(1)).sum(0))
        before = samples.take(h_BLD)
        change = self._change(before, samples, dispatch)
        after_BLD = samples.add_to(h_BLD, samples.spread(coefficient_B[rows_R]) * change)
        return Step(
            after_BLD,
            choice_B[rows_R],
            samples.mean(change) if pooled else None,
            self._edge_entropy(dispatch.counts()) if self.scans else None,
        )


class AdaptiveGate(Stacked):
    """Lets an expert keep part of its input, and marks its output with a tag of its own."""

    def __init__(self, num_experts: int, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, embed_dim).uniform_(-(embed_dim**-0.5), embed_dim**-0.5))
        self.bias = nn.Parameter(torch.full((num_experts,), 2.0))  # mostly open at the start
        self.tag = nn.Parameter(torch.randn(num_experts, embed_dim) * 0.02)

    def forward(self, h: torch.Tensor, z: torch.Tensor, samples: Samples, dispatch: Dispatch) -> torch.Tensor:
        """E_e(h) - h = g (z - h) + tag."""
        # The mean over tokens of w z is w times their mean, and cheaper.
        score = samples.mean(self._scored(z, dispatch))
        gate = samples.spread(torch.sigmoid(score.squeeze(1))).to(h.dtype)
        return self._tagged(gate, z.to(h.dtype) - h, dispatch)

    def _scored(self, z: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        if dispatch.expert is not None:
            weight_D, bias, _ = self.of_expert(dispatch.expert)
            return F.linear(z, weight_D.unsqueeze(0), bias.unsqueeze(0))
        bias = for_rows(self.bias.unsqueeze(1), z, dispatch)
        if by_rows(z):
            score: torch.Tensor = applied(RowDot, z, dispatch.experts_of(z), self.weight)
            return score + bias
        if kernels_for(z.device) != "grouped":
            return by_slices(self._scored, z, dispatch=dispatch)
        weight = for_rows(self.weight, z, dispatch).expand_as(z)
        return (z.unsqueeze(-2) @ weight.unsqueeze(-1)).squeeze(-1) + bias

    def _tagged(self, gate: torch.Tensor, gap: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        if dispatch.expert is not None:
            return torch.addcmul(self.of_expert(dispatch.expert)[2], gate, gap)
        if not (by_rows(gap) or kernels_for(gap.device) == "grouped"):
            return by_slices(self._tagged, gate, gap, dispatch=dispatch)
        return torch.addcmul(for_rows(self.tag, gap, dispatch), gate, gap)
