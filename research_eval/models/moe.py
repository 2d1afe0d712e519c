"""Token-choice mixture of experts (Shazeer et al., 2017; Fedus et al., 2021), dropless.

B batch  L length  D width  S real tokens  N experts  K experts per token  R = S * K assignments
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from research_eval.annotations import Aka, Choice, Count, Divides, Natural, Positive, Range, Share, Weight, When
from research_eval.errors import ConfigError
from research_eval.layers.assignments import Assignments
from research_eval.layers.block import Attention, FeedForward, block_flops, feed_forward_width
from research_eval.layers.kernels import Dispatch
from research_eval.layers.packing import Layout
from research_eval.layers.routing import balance_loss, balanced_bias, entropy, load_metrics, z_loss
from research_eval.layers.stacked import Dropout, StackedLayerNorm, one_pass, weight_count
from research_eval.layers.text import ClassificationHead, Pool, PositionalEncoding, TokenEmbedding
from research_eval.models.base_model import AuxiliaryLoss, EvaluableModel, keep_mask, routed_parameters
from research_eval.registry import MODELS_MAP


class RoutedFeedForward(nn.Module):
    """Sum over the chosen K of w_i FFN_i(x); w are the softmax scores, renormalised over the chosen unless K = 1."""

    balance_bias: Tensor
    counts: Tensor

    def __init__(self, embed_dim: int, dim_feedforward: int, dropout: float, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.num_experts = num_experts
        self.router = nn.Linear(embed_dim, num_experts, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.experts = FeedForward(embed_dim, dim_feedforward, dropout, num_experts)
        self.register_buffer("balance_bias", torch.zeros(num_experts))
        self.register_buffer("counts", torch.zeros(num_experts), persistent=False)
        self.logits_SN = torch.empty(0, num_experts)
        self.chosen_SK = torch.empty(0, top_k, dtype=torch.long)
        self.sizes_N = torch.zeros(num_experts, dtype=torch.long)

    def forward(self, x_SD: Tensor) -> Tensor:
        """Real tokens only: padding is neither dispatched nor counted."""
        with torch.autocast(x_SD.device.type, enabled=False):
            self.logits_SN = self.router(x_SD.float())
            scores_SN = self.logits_SN.softmax(-1)
        self.chosen_SK = (scores_SN.detach() + self.balance_bias).topk(self.top_k, dim=-1).indices
        weights_SK = scores_SN.gather(-1, self.chosen_SK)
        if self.top_k > 1:  # for one expert the renormalised weight is 1 and the router would get no gradient
            weights_SK = weights_SK / weights_SK.sum(-1, keepdim=True)
        assignments = Assignments.of(self.chosen_SK, self.num_experts)
        self.sizes_N = assignments.sizes_N
        if self.training:
            self.counts += self.sizes_N
        with one_pass(self.experts):
            outputs_RD = self.experts(assignments.rows(x_SD), Dispatch.of(self.sizes_N))
        return assignments.combined(outputs_RD, weights_SK)

    def load(self) -> Tensor:
        """Share of the last forward's assignments per expert, [N]."""
        return self.sizes_N / max(self.chosen_SK.numel(), 1)


class MoEBlock(nn.Module):
    """A pre-LN block whose feed-forward part is routed per token."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        num_experts: int,
        top_k: int,
        positional_encoding: PositionalEncoding = "none",
    ) -> None:
        super().__init__()
        self.attention = Attention(embed_dim, num_heads, positional_encoding=positional_encoding)
        self.norm = StackedLayerNorm(1, embed_dim)
        self.feed_forward = RoutedFeedForward(embed_dim, dim_feedforward, dropout, num_experts, top_k)
        self.dropout = Dropout(dropout)

    def forward(self, h: Tensor, layout: Layout) -> Tensor:
        """Rows of real tokens [S, D], or a grid [B, L, D] without padding -> the same shape."""
        everyone = Dispatch.single(len(h))
        h = h + self.dropout(self.attention(h, layout, everyone))
        return h + self.dropout(self.feed_forward(self.norm(h, everyone).flatten(0, -2)).view_as(h))


@MODELS_MAP.register("moe")
class MoETransformerClassifier(EvaluableModel):
    """The dense encoder with routed feed-forward layers. `dim_feedforward` is the width of one expert."""

    model_type = "moe"

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        embed_dim: Annotated[Count, Choice(32, 64, 128)] = 64,
        num_layers: Annotated[Count, Range(1, 4)] = 2,
        num_heads: Annotated[Count, Choice(1, 2, 4, 8), Divides("embed_dim")] = 4,
        num_experts: Annotated[Count, Aka("num_experts_per_layer"), Choice(2, 4, 8)] = 4,
        top_k_experts: Annotated[Count, Range(1, 4, upto=("num_experts",))] = 2,
        dim_feedforward: Count | None = None,
        dim_feedforward_factor: Annotated[Positive | None, Choice(1.0, 2.0, 4.0), When("dim_feedforward", None)] = None,
        dropout: Annotated[Share, Range(0.0, 0.3)] = 0.1,
        balance_loss_coef: Annotated[Weight, Range(1e-3, 0.1, log=True)] = 0.01,
        z_loss_coef: Weight = 1e-3,
        balance_bias_rate: Weight = 0.0,
        positional_encoding: PositionalEncoding = "sin",
        pool: Pool = "mean",
        bigram_buckets: Natural = 0,
        token_dropout: Share = 0.0,
        embedding_scale: Positive = 1.0,
    ) -> None:
        super().__init__()
        if top_k_experts > num_experts:
            raise ConfigError(f"top_k_experts={top_k_experts} is more than num_experts={num_experts}")
        width = feed_forward_width(embed_dim, dim_feedforward, dim_feedforward_factor, default=2)
        self.padding_idx = padding_idx
        self.embed_dim = embed_dim
        self.top_k_experts = top_k_experts
        self.num_experts = num_experts
        self.balance_loss_coef = balance_loss_coef
        self.z_loss_coef = z_loss_coef
        self.balance_bias_rate = balance_bias_rate
        self.embedding = TokenEmbedding(
            vocab_size,
            embed_dim,
            padding_idx,
            dropout,
            positional_encoding,
            bigram_buckets,
            token_dropout,
            embedding_scale,
        )
        self.layers = nn.ModuleList(
            MoEBlock(embed_dim, num_heads, width, dropout, num_experts, top_k_experts, positional_encoding)
            for _ in range(num_layers)
        )
        self.head = ClassificationHead(embed_dim, num_classes, dropout, pool)
        self.start_recording()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        keep_BL = keep_mask(input_ids, attention_mask, self.padding_idx)
        samples = self.packed(keep_BL, always=True)  # padding is neither dispatched nor counted
        h = samples.take(self.embedding(input_ids, keep_BL))
        for layer in self.layers:
            h = layer(h, samples.layout)
        if not self.training:
            self._record()
        return self.head(samples.grid(h), keep_BL)

    def _routed(self) -> list[RoutedFeedForward]:
        return [module for module in self.modules() if isinstance(module, RoutedFeedForward)]

    def auxiliary_losses(self) -> dict[str, AuxiliaryLoss]:
        """Mean over the layers; never pooled over them, which would hide a collapsed layer."""
        layers = [layer for layer in self._routed() if len(layer.logits_SN)]
        if not layers:
            return {}
        balance = torch.stack([balance_loss(layer.load(), layer.logits_SN.softmax(-1)) for layer in layers]).mean()
        z = torch.stack([z_loss(layer.logits_SN) for layer in layers]).mean()
        return {
            "balance_loss": AuxiliaryLoss(balance, self.balance_loss_coef),
            "z_loss": AuxiliaryLoss(z, self.z_loss_coef),
        }

    def after_step(self, progress: float) -> None:
        for layer in self._routed():
            if self.balance_bias_rate:
                layer.balance_bias.copy_(balanced_bias(layer.balance_bias, layer.counts, self.balance_bias_rate))
            layer.counts.zero_()

    def start_recording(self) -> None:
        self._counts_TN = torch.zeros(len(self.layers), self.num_experts)
        self._entropy = torch.zeros(())
        self._decisions = 0

    def _record(self) -> None:
        for number, layer in enumerate(self._routed()):
            self._counts_TN[number] += layer.sizes_N.cpu()
            self._entropy += entropy(layer.logits_SN.detach().softmax(-1)).sum().cpu()
            self._decisions += len(layer.logits_SN)

    def get_model_specific_metrics(self) -> dict[str, Any]:
        if not self._decisions:
            return {}
        mean_entropy = float(self._entropy) / self._decisions
        return {
            **load_metrics(self._counts_TN.long().numpy()),
            "router_entropy": float(mean_entropy / np.log(max(self.num_experts, 2))),
        }

    def get_active_parameter_count(self) -> int:
        experts = sum(parameter.numel() for parameter in routed_parameters(self, "experts"))
        return self.get_parameter_count() - experts * (self.num_experts - self.top_k_experts) // self.num_experts

    def get_flops_per_sample(self, length: int) -> float:
        total = 2.0 * self.head.linear.weight.numel()
        for layer, routed in zip(self.layers, self._routed(), strict=True):
            one_expert = block_flops(layer, self.embed_dim, length)  # attention and a single feed-forward expert
            other_weights = (self.top_k_experts - 1) * weight_count(routed) + routed.router.weight.numel()
            total += one_expert + 2.0 * length * other_weights
        return total
