"""Optional auxiliary loss terms that belong to no other mechanism.

B batch  D width  T steps  R executed samples
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.annotations import Weight
from research_eval.layers.collective import batch_mean
from research_eval.layers.losses import AuxiliaryLoss
from research_eval.layers.path.walk import Walk
from research_eval.layers.routing import contrastive_loss, members
from research_eval.routing.record import STOPPED


@dataclass(frozen=True)
class TermSettings:
    """Weights of the terms. Weight 0 removes a term and the layers that only this term needs."""

    contrastive_loss_coef: Weight = 0.0
    path_heads_coef: Weight = 0.0
    edge_entropy_coef: Weight = 0.01


def path_heads(settings: TermSettings, embed_dim: int, max_path_len: int) -> nn.Linear | None:
    """Predicts the path's length 0..T and its number of different experts from the pooled final state.

    None if the term has no weight.
    """
    return nn.Linear(embed_dim, max_path_len + 2) if settings.path_heads_coef else None


def term_losses(settings: TermSettings, heads: nn.Linear | None, walk: Walk, done: float) -> dict[str, AuxiliaryLoss]:
    """The terms of one pass, by name. The edge entropy grows with the finished share `done` of the training."""
    losses: dict[str, AuxiliaryLoss] = {}
    if settings.contrastive_loss_coef and walk.steps:
        delta_RD = torch.cat([step.delta_RD for step in walk.steps if step.delta_RD is not None])
        experts_R = torch.cat([step.experts_R for step in walk.steps])
        contrast = contrastive_loss(delta_RD, experts_R, walk.num_experts)
        losses["contrastive_loss"] = AuxiliaryLoss(contrast, settings.contrastive_loss_coef)
    edges = [step.edge_entropy for step in walk.steps if step.edge_entropy is not None]
    if edges:
        losses["edge_entropy_loss"] = AuxiliaryLoss(torch.stack(edges).mean(), settings.edge_entropy_coef * done)
    if heads is not None and walk.pooled_BD is not None:
        loss = _path_heads_loss(heads(walk.pooled_BD), walk)
        losses["path_heads_loss"] = AuxiliaryLoss(loss, settings.path_heads_coef)
    return losses


def _path_heads_loss(predicted_BX: Tensor, walk: Walk) -> Tensor:
    """Cross-entropy of the path's length, 0..T, and squared error of its number of different experts."""
    lengths_B = (walk.path_BT != STOPPED).sum(1)
    different_B = members(walk.path_BT, walk.num_experts).any(1).sum(1)
    error = F.mse_loss(predicted_BX[:, -1], different_B.to(predicted_BX.dtype))
    return batch_mean(F.cross_entropy(predicted_BX[:, :-1], lengths_B) + error, len(lengths_B))
