"""A pool of Transformer and scan experts, and one step of a path through it.

B batch  R running samples, sorted by expert  L length  D width  N experts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple, cast

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from research_eval.annotations import Choice, Count, Natural, Range, Younger
from research_eval.errors import ConfigError
from research_eval.layers.block import Block
from research_eval.layers.collective import batch_sum, of_parameters
from research_eval.layers.dispatch import Dispatch, Dispatcher, Executing, kernels_on
from research_eval.layers.even import Even, pays
from research_eval.layers.kernels.autograd import applied
from research_eval.layers.kernels.cpu import RowDot
from research_eval.layers.kernels.grouped import for_rows
from research_eval.layers.kernels.plain import by_slices, one_by_one
from research_eval.layers.packing import Layout, Packing, Samples
from research_eval.layers.routing import members
from research_eval.layers.scan import ScanExpert, ScanSettings
from research_eval.layers.settings import EncoderSettings, PositionalEncoding
from research_eval.layers.stacked import Stacked, StackedLinear, by_rows


@dataclass(frozen=True)
class PoolSettings:
    """Options of a pool: how many experts, how deep they are, and how many are scan experts (docs/scan.md).

    Raises ConfigError if tied experts are of two kinds.
    """

    num_total_experts: Annotated[Count, Choice(2, 4, 8)] = 4
    expert_layers: Annotated[Count, Range(1, 2)] = 1
    tie_experts: bool = False
    expert_sharing: Annotated[float, Field(ge=0, le=1), Younger()] = 0.0
    num_scan_experts: Natural = 0
    scan_nodes: Count = 16
    scan_walkers: Count = 4
    scan_edge_sets: Count = 8

    def __post_init__(self) -> None:
        if self.tie_experts and self.num_scan_experts:
            raise ConfigError(f"tie_experts needs experts of one kind, not num_scan_experts={self.num_scan_experts}")


class Step(NamedTuple):
    """The states after one step, and the changes by the executed experts (in the order of the sorted rows)."""

    h_BLD: torch.Tensor
    experts_R: torch.Tensor  # the executed expert of each running sample
    delta_RD: torch.Tensor | None = None  # mean of E_a(h) - h over the tokens, if the caller asks for it
    edge_entropy: torch.Tensor | None = None  # mean over the scan experts executed in training


class ExpertPool(Executing):
    """E_e(h) = z = blocks_e(h), or with `adaptive_gate` g z + (1 - g) h + tag_e with g = sigmoid(w_e pool(z) + b_e).

    The last `num_scan_experts` experts are scan experts, z = ScanExpert_e(h). Raises ConfigError if there are more of
    them than experts.
    """

    gradient_share = 0.0  # of the mean over all experts, in the gradient of each

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
        maps = [layer.weight[0].numel() for layer in self.modules() if isinstance(layer, StackedLinear)]
        self._average_map = sum(maps) / max(len(maps), 1)
        self._dropout = dropout
        self._width = max(dim_feedforward, 4 * embed_dim)  # the largest one inside an expert
        self.stacks = [layer for layer in self.modules() if isinstance(layer, Stacked)]

    @classmethod
    def of(cls, settings: PoolSettings, encoder: EncoderSettings, gated: bool, adaptive_gate: bool) -> ExpertPool:
        """A pool with the width, heads and dropout of an encoder. The feed-forward width is 2 D by default."""
        pool = cls(
            settings.num_total_experts,
            settings.expert_layers,
            encoder.embed_dim,
            encoder.num_heads,
            encoder.feed_forward_width(default=2),
            encoder.dropout,
            gated=gated,
            adaptive_gate=adaptive_gate,
            positional_encoding=encoder.positional_encoding,
            num_scan_experts=settings.num_scan_experts,
            scan=ScanSettings(settings.scan_nodes, settings.scan_walkers, settings.scan_edge_sets),
        )
        if settings.tie_experts:
            _start_alike(pool)
        pool.gradient_share = share = 1.0 if settings.tie_experts else settings.expert_sharing
        for parameter in pool.sharing():
            parameter.register_hook(lambda gradient: torch.lerp(gradient, _mean_of_experts(gradient), share))
        return pool

    def sharing(self) -> list[nn.Parameter]:
        """The stacks of which each expert's gradient has a share of the mean over all experts.

        Each expert then learns from the samples of the others too, which helps where samples are few. With a share of
        1, experts that start alike stay alike. Scan experts have no stack, and keep their own gradients.
        """
        if not self.gradient_share:
            return []
        return [*self.blocks.parameters(), *(self.gate.parameters() if self.gate is not None else ())]

    def forward(self, h_RLD: torch.Tensor, keep_RL: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """States [R, L, D] of samples sorted by expert -> E_e(h), the same shape."""
        samples = Packing(keep_RL, packed=False).samples()
        return h_RLD + self._change(h_RLD, samples, dispatch)

    def _change(self, h: torch.Tensor, samples: Samples | Even, dispatch: Dispatch) -> torch.Tensor:
        """E_e(h) - h for the rows of samples that are sorted by expert.

        Where experts compute one by one and no sample has padding, each goes through all of its steps before the next
        one starts: its rows stay in the cache, and are joined once.
        """
        if isinstance(samples, Samples) and self._one_by_one(h, samples, dispatch):
            sizes = dispatch.counts()
            parts = zip(h.split(sizes), samples.of_experts(sizes), strict=True)
            changes = [
                self._change(part, own, Dispatch([len(part)], expert=expert, kernels=dispatch.kernels))
                for expert, (part, own) in enumerate(parts)
                if len(part)
            ]
            return changes[0] if len(changes) == 1 else torch.cat(changes)
        if isinstance(samples, Samples) and self.scans:
            z = self._split(h, samples.keep_RL, dispatch)
        else:
            z = self._attend(h, samples.layout, dispatch)
        return z - h if self.gate is None else self.gate(h, z, samples, dispatch)

    def _one_by_one(self, h: torch.Tensor, samples: Samples, dispatch: Dispatch) -> bool:
        """Whether each expert goes through all of its steps before the next one starts."""
        keeps_draws = not (self.training and self._dropout)  # dropout draws for all experts, step by step
        is_simple = samples.is_full and not self.scans and keeps_draws and not self._is_compiled()
        return is_simple and one_by_one(h, dispatch, self._width, whole=True)

    def _attend(self, h: torch.Tensor, layout: Layout, dispatch: Dispatch) -> torch.Tensor:
        """Apply the Transformer blocks to rows sorted by expert."""
        for block in self.blocks:
            h = block(h, layout, dispatch)
        return h

    def _split(self, h_RLD: torch.Tensor, keep_RL: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """Apply attention experts to the first rows and scan experts to the rest, as the sorting places them.

        A scan expert without rows is not executed, so its parameters receive no gradient.
        """
        sizes, scan_sizes = (
            dispatch.counts()[: self.num_attention_experts],
            dispatch.counts()[self.num_attention_experts :],
        )
        cut = sum(sizes)
        plan = Dispatch(sizes, kernels=dispatch.kernels)
        parts = [self._attend(h_RLD[:cut], Layout.whole(keep_RL[:cut]), plan)] if cut else []
        groups = zip(self.scans, h_RLD[cut:].split(scan_sizes), keep_RL[cut:].split(scan_sizes), strict=True)
        parts += [scan(rows_RLD, rows_RL) for scan, rows_RLD, rows_RL in groups if len(rows_RLD)]
        return torch.cat(parts)

    def _edge_entropy(self, choice_B: torch.Tensor) -> torch.Tensor | None:
        """Mean edge entropy of the scan experts that any row of the batch executes; None outside training.

        Idle scan experts do not count, so they receive no gradient.
        """
        if not self.training or not self.scans:
            return None
        member_BN = members(choice_B, self.num_experts)
        executed = zip(self.scans, batch_sum(member_BN.sum(0))[self.num_attention_experts :].tolist(), strict=True)
        entropies = [cast(ScanExpert, scan).graph.row_entropy() for scan, size in executed if size]
        return of_parameters(torch.stack(entropies).mean()) if entropies else None

    def packing(self, keep_BL: torch.Tensor, num_tokens: int | None = None) -> Packing:
        """How `step` reads a batch: without padding, unless the pool has scan experts, which need whole sequences."""
        return Packing.of(keep_BL, num_tokens, self.execution, packed=False if self.scans else None)

    def _may_be_even(self, h_BLD: torch.Tensor) -> bool:
        """Whether one batched product per map may compute all experts: in training on a CPU, without dropout.

        Dropout draws a number per row, so that spare rows would change all later draws. In evaluation the numbers of a
        sample do not depend on the paths of the others, but for the rounding of products on CPUs without AVX-512.
        """
        if not self.training or self._dropout:
            return False
        is_own = self.execution.kernels == "auto" and type(self.execution.dispatcher) is Dispatcher
        on_cpu = kernels_on(h_BLD.device, "auto") == "slices" and not torch.is_autocast_enabled("cpu")
        return is_own and on_cpu and self.num_experts > 1 and not self.scans and not self._is_compiled()

    def _is_compiled(self) -> bool:
        """Whether torch has compiled the blocks: another form of their input would compile them again."""
        return any(block._compiled_call_impl is not None for block in self.blocks)

    def step(
        self,
        h_BLD: torch.Tensor,
        packing: Packing,
        choice_B: torch.Tensor,
        coefficient_B: torch.Tensor,
        all_run: bool = False,
        pooled: bool = False,
    ) -> Step:
        """h + c (E_a(h) - h) for running samples; a sample with `choice` = N keeps its state and costs nothing.

        One stable sort per step puts stopped samples last, and each expert reads one slice. With `all_run` the caller
        promises that no sample has stopped. The host then reads no count back from the device.
        """
        sizes = None  # samples of each expert; a GPU would have to be waited for
        if h_BLD.device.type == "cpu" and kernels_on(h_BLD.device, self.execution.kernels) != "grouped":
            *sizes, stopped = torch.bincount(choice_B, minlength=self.num_experts + 1).tolist()
            may_be_even = not (stopped or pooled) and self._may_be_even(h_BLD)
            if may_be_even and pays(sizes, h_BLD.shape[1], packing.num_tokens, self._average_map):
                even = Even.of(choice_B, sizes, packing.keep_BL, packing.padded)
                rows = even.take(h_BLD)
                plan = Dispatch([rows.shape[1]] * self.num_experts, kernels=self.execution.kernels, even=True)
                change = self._change(rows, even, plan)
                return Step(even.add_to(h_BLD, change, coefficient_B), choice_B)
        rows_R = choice_B.argsort(stable=True)
        if not all_run:
            rows_R = rows_R[: int((choice_B < self.num_experts).sum()) if sizes is None else sum(sizes)]
        edge_entropy = self._edge_entropy(choice_B)
        dispatcher = self.execution.dispatcher
        if not len(rows_R) and not dispatcher.is_shared:
            return Step(h_BLD, rows_R, h_BLD.new_zeros(0, h_BLD.shape[-1]) if pooled else None, edge_entropy)
        samples = packing.samples(rows_R)
        if sizes is None or samples.places is not None:  # rows are tokens
            tokens_B = samples.num_rows(packing.lengths_B)
            counts_N = (members(choice_B, self.num_experts) * tokens_B.unsqueeze(1)).sum(0)
            dispatch = Dispatch.of(counts_N, self.execution.kernels)
        else:
            dispatch = Dispatch(sizes, kernels=self.execution.kernels)
        rows, plan, held = dispatcher.dispatch(samples.take(h_BLD), dispatch, samples)
        change = dispatcher.combine(self._change(rows, held, plan), plan)
        after_BLD = samples.add_to(h_BLD, change, coefficient_B[rows_R])
        return Step(
            after_BLD,
            choice_B[rows_R],
            samples.mean(change) if pooled else None,
            edge_entropy,
        )


class AdaptiveGate(Stacked):
    """Lets an expert keep part of its input, and adds a learnt tag of the expert to its output."""

    def __init__(self, num_experts: int, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, embed_dim).uniform_(-(embed_dim**-0.5), embed_dim**-0.5))
        self.bias = nn.Parameter(torch.full((num_experts,), 2.0))  # sigmoid(2) = 0.88: the gate starts mostly open
        self.tag = nn.Parameter(torch.randn(num_experts, embed_dim) * 0.02)

    def forward(self, h: torch.Tensor, z: torch.Tensor, samples: Samples | Even, dispatch: Dispatch) -> torch.Tensor:
        """E_e(h) - h = g (z - h) + tag."""
        # mean(w z) over the tokens equals w mean(z), but needs no array of pooled states.
        score = samples.mean(self._scored(z, dispatch))
        gate = samples.spread(torch.sigmoid(score.squeeze(1))).to(h.dtype)
        return self._tagged(gate, z.to(h.dtype) - h, dispatch)

    def _scored(self, z: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """The score w_e z + b_e of every token, [..., 1]."""
        if dispatch.even:
            return torch.baddbmm(self.bias.view(-1, 1, 1), z, self.weight.unsqueeze(2))
        if dispatch.expert is not None:
            weight_D, bias, _ = self.of_expert(dispatch.expert)
            return F.linear(z, weight_D.unsqueeze(0), bias.unsqueeze(0))
        bias = for_rows(self.bias.unsqueeze(1), z, dispatch)
        if by_rows(z, dispatch):
            score: torch.Tensor = applied(RowDot, z, dispatch.experts_of(z), self.weight)
            return score + bias
        if dispatch.kernels_for(z) != "grouped":
            return by_slices(self._scored, z, dispatch=dispatch)
        weight = for_rows(self.weight, z, dispatch).expand_as(z)
        return (z.unsqueeze(-2) @ weight.unsqueeze(-1)).squeeze(-1) + bias

    def _tagged(self, gate: torch.Tensor, gap: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """g (z - h) + tag_e for every row."""
        if dispatch.even:
            return torch.addcmul(self.tag.unsqueeze(1), gate, gap)
        if dispatch.expert is not None:
            return torch.addcmul(self.of_expert(dispatch.expert)[2], gate, gap)
        if not (by_rows(gap, dispatch) or dispatch.kernels_for(gap) == "grouped"):
            return by_slices(self._tagged, gate, gap, dispatch=dispatch)
        return torch.addcmul(for_rows(self.tag, gap, dispatch), gate, gap)


def _start_alike(pool: ExpertPool) -> None:
    """Give all experts of a pool the weights of the first one."""
    for parameter in pool.parameters():
        with torch.no_grad():
            parameter.copy_(parameter[:1].expand_as(parameter))


def _mean_of_experts(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.mean(0, keepdim=True).expand_as(gradient)
