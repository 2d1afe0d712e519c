"""The simple Graph-of-Experts: a GRU reads the path so far and picks the next expert; the path length is fixed.

B batch  L length  D width  N experts  G router state  T steps of the whole path
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from research_eval.annotations import Aka, Choice, Count, Divides, Natural, Positive, Range, Share, Steps, Weight, When
from research_eval.layers.block import block_flops, feed_forward_width
from research_eval.layers.experts import ExpertPool
from research_eval.layers.routing import PathRecord, balance_loss, entropy, members
from research_eval.layers.stacked import one_pass
from research_eval.layers.text import ClassificationHead, Pool, PositionalEncoding, TokenEmbedding, masked_mean
from research_eval.models.base_model import AuxiliaryLoss, EvaluableModel, keep_mask, routed_parameters
from research_eval.registry import MODELS_MAP


class GRURouter(nn.Module):
    """z = W_o GRU(pool(h_t), g_t) / tau with g_0 = tanh(W pool(h_0))."""

    def __init__(self, embed_dim: int, hidden_dim: int, num_experts: int, tau: float) -> None:
        super().__init__()
        self.start = nn.Linear(embed_dim, hidden_dim)
        self.cell = nn.GRUCell(embed_dim, hidden_dim)
        self.policy = nn.Linear(hidden_dim, num_experts)
        self.tau = tau

    def forward(self, pooled_BD: Tensor, state_BG: Tensor | None) -> tuple[Tensor, Tensor]:
        """Probabilities [B, N] and the next state."""
        state_BG = torch.tanh(self.start(pooled_BD)) if state_BG is None else state_BG
        state_BG = self.cell(pooled_BD, state_BG)
        return (self.policy(state_BG) / self.tau).softmax(-1), state_BG


@MODELS_MAP.register("goe")
class GoEClassifier(EvaluableModel):
    """`num_layers` GRU routers, one after the other, each sending samples through `max_path_len` experts of one pool.

    The chosen expert's change is scaled by its probability, in training and evaluation alike, so that the task loss
    reaches the router.
    """

    model_type = "goe"

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        embed_dim: Annotated[Count, Choice(32, 64, 128)] = 64,
        num_layers: Annotated[Count, Aka("num_goe_layers"), Range(1, 2)] = 1,
        num_total_experts: Annotated[Count, Aka("num_total_experts_pool"), Choice(2, 4, 8)] = 4,
        max_path_len: Annotated[Steps, Range(1, 4)] = 3,
        router_hidden_dim: Count | None = None,
        gumbel_tau: Annotated[Positive, Range(0.3, 3.0, log=True)] = 1.0,
        num_heads: Annotated[Count, Choice(1, 2, 4, 8), Divides("embed_dim")] = 4,
        dim_feedforward: Count | None = None,
        dim_feedforward_factor: Annotated[Positive | None, Choice(1.0, 2.0, 4.0), When("dim_feedforward", None)] = None,
        dropout: Annotated[Share, Range(0.0, 0.3)] = 0.1,
        balance_loss_coef: Annotated[Weight, Range(1e-3, 0.3, log=True)] = 0.05,
        positional_encoding: PositionalEncoding = "sin",
        pool: Pool = "mean",
        bigram_buckets: Natural = 0,
        token_dropout: Share = 0.0,
        embedding_scale: Positive = 1.0,
    ) -> None:
        super().__init__()
        width = feed_forward_width(embed_dim, dim_feedforward, dim_feedforward_factor, default=2)
        self.padding_idx = padding_idx
        self.embed_dim = embed_dim
        self.max_path_len = max_path_len
        self.balance_loss_coef = balance_loss_coef
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
        self.router = nn.ModuleList(
            GRURouter(embed_dim, router_hidden_dim or embed_dim, num_total_experts, gumbel_tau)
            for _ in range(num_layers)
        )
        self.experts = ExpertPool(
            num_total_experts, 1, embed_dim, num_heads, width, dropout, positional_encoding=positional_encoding
        )
        self.head = ClassificationHead(embed_dim, num_classes, dropout, pool)
        self.record = PathRecord(num_total_experts, num_layers * max_path_len)
        self._balance: list[Tensor] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        with one_pass(self.experts):
            return self._walk(input_ids, keep_mask(input_ids, attention_mask, self.padding_idx))

    def _walk(self, input_ids: Tensor, keep_BL: Tensor) -> Tensor:
        h_BLD = self.embedding(input_ids, keep_BL)
        packing = self.experts.packing(keep_BL, self.num_tokens())
        self._balance, path, entropies = [], [], []
        for router in self.router:
            state_BG = None
            for _ in range(self.max_path_len):
                probabilities_BN, state_BG = router(masked_mean(h_BLD, keep_BL), state_BG)
                coefficient_B, choice_B = probabilities_BN.max(-1)
                h_BLD = self.experts.step(h_BLD, packing, choice_B, coefficient_B, all_run=True).h_BLD
                load_N = members(choice_B, self.experts.num_experts).sum(0) / len(choice_B)
                self._balance.append(balance_loss(load_N, probabilities_BN))
                path.append(choice_B)
                entropies.append(entropy(probabilities_BN.detach()))
        if not self.training:
            self.record.add(torch.stack(path, 1), torch.stack(entropies, 1))
        return self.head(h_BLD, keep_BL)

    def auxiliary_losses(self) -> dict[str, AuxiliaryLoss]:
        if not self._balance:
            return {}
        return {"balance_loss": AuxiliaryLoss(torch.stack(self._balance).mean(), self.balance_loss_coef)}

    def start_recording(self) -> None:
        self.record.clear()

    def recorded_paths(self) -> NDArray[np.int64]:
        return self.record.paths()

    def get_model_specific_metrics(self) -> dict[str, Any]:
        return self.record.metrics()

    def get_active_parameter_count(self) -> int:
        experts = sum(parameter.numel() for parameter in routed_parameters(self, "experts"))
        idle = max(0, self.experts.num_experts - self.record.num_steps)
        return self.get_parameter_count() - experts * idle // self.experts.num_experts

    def get_flops_per_sample(self, length: int) -> float:
        weights = self.head.linear.weight.numel()
        for router in (module for module in self.modules() if isinstance(module, GRURouter)):
            starting = router.start.weight.numel()
            total = sum(parameter.numel() for parameter in router.parameters() if parameter.ndim > 1)
            weights += starting + self.max_path_len * (total - starting)
        return self.record.num_steps * block_flops(self.experts, self.embed_dim, length) + 2.0 * weights
