"""Keeps all experts in use: the bias on the choice, the running load, and the regularisers of the router.

T steps  N experts  R rows of the buffers (one per step, or one for all steps)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from research_eval.annotations import Range, Share, Weight
from research_eval.layers.collective import batch_sum
from research_eval.layers.losses import AuxiliaryLoss
from research_eval.layers.path.walk import Walk
from research_eval.layers.routing import (
    balance_of,
    balanced_bias,
    entropy,
    mean_entropy_loss,
    mean_of_rows,
    members,
    z_loss,
)

LOAD_DECAY = 0.5  # decay of the running load; a longer memory reacts too late to a collapse


@dataclass(frozen=True)
class BalanceSettings:
    """Weights of the balancing. Over `balance_decay` of the training it falls to zero; 0: it stays."""

    balance_bias_rate: Weight = 1e-3
    balance_decay: Share = 0.0
    diversity_loss_coef: Annotated[Weight, Range(1e-3, 0.1, log=True)] = 0.01
    z_loss_coef: Weight = 1e-3
    router_entropy_coef: Weight = 0.0


class Balance(nn.Module):
    """Counts the samples of each expert in training, moves the bias against the load, and computes the regularisers."""

    bias: Tensor
    load: Tensor
    counts: Tensor

    def __init__(self, settings: BalanceSettings, num_experts: int, num_rows: int, moves_bias: bool) -> None:
        super().__init__()
        self.settings = settings
        self._rate = settings.balance_bias_rate if moves_bias else 0.0
        self.register_buffer("bias", torch.zeros(num_rows, num_experts))
        self.register_buffer("load", torch.full((num_rows, num_experts), 1 / num_experts))
        self.register_buffer("counts", torch.zeros(num_rows, num_experts), persistent=False)

    def bias_at(self, step: int) -> Tensor:
        """The bias of one step on the router's choice, [N]."""
        return self.bias[step if len(self.bias) > 1 else 0]

    @torch.no_grad()
    def count(self, path_BT: Tensor) -> None:
        """Add the paths [B, T] of a training batch to the counts of this optimiser step and to the running load."""
        taken_BTN = members(path_BT, self.counts.shape[1])
        counts_RN = taken_BTN.sum(0) if len(self.counts) > 1 else taken_BTN.sum((0, 1)).unsqueeze(0)
        counts_RN = batch_sum(counts_RN)
        self.counts += counts_RN
        total_R1 = counts_RN.sum(1, keepdim=True)
        share_RN = torch.where(total_R1 > 0, counts_RN / total_R1.clamp_min(1), self.load)
        self.load.lerp_(share_RN, 1 - LOAD_DECAY)

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        """Move the bias against the counts since the last optimiser step, then reset the counts."""
        rate = self._rate * self._share_left(done)
        if rate:
            self.bias.copy_(balanced_bias(self.bias, self.counts, rate))
        self.counts.zero_()

    def scheduled_options(self) -> tuple[str, ...]:
        """The options whose effect follows the finished share of the training."""
        names = ("balance_decay", "router_entropy_coef")
        return tuple(name for name in names if getattr(self.settings, name))

    def _share_left(self, done: float) -> float:
        """The factor of the balancing after the share `done` of the training, from 1 to 0."""
        decay = self.settings.balance_decay
        return max(0.0, 1 - done / decay) if decay else 1.0

    def losses(self, walk: Walk, done: float) -> dict[str, AuxiliaryLoss]:
        """Diversity of the experts in use, size of the logits, and entropy of the decisions.

        Empty if no sample made a decision.
        """
        if not walk.logits:
            return {}
        settings = self.settings
        logits_RA = torch.cat(walk.logits)
        probabilities_RN = logits_RA[:, :-1].softmax(-1)
        # Every step until the end of the walk has decisions, so entry t of the list belongs to row t of the load.
        steps = [len(logits) for logits in walk.logits] if len(self.load) > 1 else [len(logits_RA)]
        mean_TN = torch.stack([mean_of_rows(part_RN) for part_RN in probabilities_RN.split(steps)])
        diversity = (balance_of(self.load[: len(steps)], mean_TN) + mean_entropy_loss(mean_TN)).mean()
        negative_entropy = -mean_of_rows(entropy(logits_RA.softmax(-1)))
        annealed = settings.router_entropy_coef * (1 - 0.9 * done)  # falls to a tenth
        return {
            "diversity_loss": AuxiliaryLoss(diversity, settings.diversity_loss_coef * self._share_left(done)),
            "z_loss": AuxiliaryLoss(z_loss(logits_RA), settings.z_loss_coef),
            "router_entropy_loss": AuxiliaryLoss(negative_entropy, annealed),
        }
