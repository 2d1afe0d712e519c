"""Graph-of-Experts: a router builds, per sample, a path through a pool of expert Transformers and decides when to stop.

Equations and their evidence: docs/GOE.md.

B batch  L length  D width  C classes  N experts  A = N + 1 actions (the last one stops)  T steps  X exits
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.errors import ConfigError
from research_eval.layers.block import block_flops, feed_forward_width
from research_eval.layers.experts import ExpertPool, Step
from research_eval.layers.routing import (
    STOPPED,
    PathRecord,
    balance_loss,
    balanced_bias,
    entropy,
    mean_entropy_loss,
    z_loss,
)
from research_eval.layers.text import (
    ClassificationHead,
    Pool,
    PositionalEncoding,
    TokenEmbedding,
    masked_max,
    masked_mean,
)
from research_eval.models.base_model import AuxiliaryLoss, EvaluableModel, keep_mask, routed_parameters
from research_eval.registry import MODELS_MAP
from research_eval.schema import Aka, Count, Natural, Positive, Share, Weight

MASKED = -1e9  # finite, so that entropy and its gradient stay finite
LOGIT_LIMIT = 10.0
LOAD_DECAY = 0.98  # of the running share of decisions per expert
TAU_SHARE = 0.7  # share of the training over which gumbel_tau falls to gumbel_tau_min


class Router(nn.Module):
    """l = W_pi GELU(W_s [mean(h); max(h)] + e_t + W_v visits / max_visits), clamped to +-10."""

    def __init__(self, embed_dim: int, hidden_dim: int, num_experts: int, num_steps: int) -> None:
        super().__init__()
        self.summary = nn.Linear(2 * embed_dim, hidden_dim)
        self.visits = nn.Linear(num_experts, hidden_dim, bias=False)
        self.step_bias = nn.Parameter(torch.randn(num_steps, hidden_dim) * 0.02)
        self.policy = nn.Linear(hidden_dim, num_experts + 1)
        nn.init.zeros_(self.policy.weight)
        with torch.no_grad():
            self.policy.bias.zero_()[-1] = -2.0

    def forward(self, summary: Tensor, visit_share_BN: Tensor, step: int) -> Tensor:
        """Pooled states [B, 2 D] -> logits [B, A]."""
        with torch.autocast(summary.device.type, enabled=False):
            hidden = F.gelu(self.summary(summary.float()) + self.step_bias[step] + self.visits(visit_share_BN.float()))
            return self.policy(hidden).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


class _Trace:
    """What one forward pass leaves behind for the losses."""

    def __init__(self) -> None:
        self.logits_RA: list[Tensor] = []  # unmasked actions of running decisions, with a gradient to the router only
        self.experts_RN: list[Tensor] = []  # their probabilities over experts
        self.steps: list[Step] = []
        self.exits_BC: list[Tensor] = []  # class scores after min_path_len..T steps
        self.stop_B: list[Tensor] = []  # p_stop of the decision taken at each of these states but the last


@MODELS_MAP.register("goe_original")
class GoEOriginalClassifier(EvaluableModel):
    """One path per sample: h <- h + c (E_a(h) - h) for the chosen expert a, T times or until it stops.

    `router_mode` "gate": a is the likeliest expert and c = `gate_scale` times its probability, so that the task loss
    reaches the router. "st": Gumbel noise in training, c = 1 with the gradient of the probability (straight-through).
    `halt` "off": always `max_path_len` steps, unless every expert has been visited `max_visits` times. "ponder":
    training weighs the loss of every exit with its probability (PonderNet, Banino et al., 2021), evaluation stops once
    p_stop > 1/2; `path_penalty_coef` is then the price of one expected step.
    """

    model_type = "goe_original"
    balance_bias: Tensor
    load: Tensor
    counts: Tensor
    progress: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        embed_dim: Count = 64,
        num_total_experts: Count = 4,
        expert_layers: Count = 1,
        max_path_len: Count = 3,
        min_path_len: Natural = 1,
        max_visits: Annotated[Count, Aka("max_visits_per_expert")] = 2,
        router_hidden_dim: Count | None = None,
        router_mode: Literal["gate", "st"] = "gate",
        gate_scale: Positive = 2.0,
        halt: Literal["off", "ponder"] = "off",
        gumbel_tau: Positive = 1.0,
        gumbel_tau_min: Positive = 0.3,
        balance_bias_rate: Weight = 1e-3,
        diversity_loss_coef: Weight = 0.01,
        z_loss_coef: Weight = 1e-3,
        router_entropy_coef: Weight = 0.0,
        contrastive_loss_coef: Weight = 0.0,
        path_penalty_coef: Weight = 0.0,
        ponder_kl_coef: Weight = 0.01,
        halt_warmup: Share = 0.5,
        num_heads: Count = 4,
        dim_feedforward: Count | None = None,
        dim_feedforward_factor: Positive | None = None,
        dropout: Share = 0.1,
        positional_encoding: PositionalEncoding = "sin",
        pool: Pool = "mean",
        bigram_buckets: Natural = 0,
        token_dropout: Share = 0.0,
        embedding_scale: Positive = 1.0,
    ) -> None:
        super().__init__()
        if min_path_len > max_path_len:
            raise ConfigError(f"min_path_len={min_path_len} is more than max_path_len={max_path_len}")
        if gumbel_tau_min > gumbel_tau:
            raise ConfigError(f"gumbel_tau_min={gumbel_tau_min} is more than gumbel_tau={gumbel_tau}")
        width = feed_forward_width(embed_dim, dim_feedforward, dim_feedforward_factor, default=2)
        self.padding_idx = padding_idx
        self.embed_dim = embed_dim
        self.num_experts = num_total_experts
        self.max_path_len = max_path_len
        self.min_path_len = min_path_len
        self.max_visits = max_visits
        self.router_mode = router_mode
        self.gate_scale = gate_scale
        self.halt = halt
        self.gumbel_tau = gumbel_tau
        self.gumbel_tau_min = gumbel_tau_min
        self.balance_bias_rate = balance_bias_rate
        self.diversity_loss_coef = diversity_loss_coef
        self.z_loss_coef = z_loss_coef
        self.router_entropy_coef = router_entropy_coef
        self.contrastive_loss_coef = contrastive_loss_coef
        self.path_penalty_coef = path_penalty_coef
        self.ponder_kl_coef = ponder_kl_coef
        self.halt_warmup = halt_warmup
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
        self.router = Router(embed_dim, router_hidden_dim or embed_dim, num_total_experts, max_path_len)
        self.experts = ExpertPool(
            num_total_experts, expert_layers, embed_dim, num_heads, width, dropout, gated=True, adaptive_gate=True
        )
        self.head = ClassificationHead(embed_dim, num_classes, dropout, pool)
        self.register_buffer("balance_bias", torch.zeros(num_total_experts))
        self.register_buffer("load", torch.full((num_total_experts,), 1 / num_total_experts))
        self.register_buffer("counts", torch.zeros(num_total_experts), persistent=False)
        self.register_buffer("progress", torch.zeros(()))
        self.record = PathRecord(num_total_experts, max_path_len)
        self._trace = _Trace()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        keep_BL = keep_mask(input_ids, attention_mask, self.padding_idx)
        h_BLD = self.embedding(input_ids, keep_BL)
        trace = self._trace = _Trace()
        visits_BN = h_BLD.new_zeros(len(h_BLD), self.num_experts)
        running_B = keep_BL.new_ones(len(h_BLD), dtype=torch.bool)
        path_BT = torch.full((len(h_BLD), self.max_path_len), STOPPED, device=h_BLD.device)
        entropy_BT = h_BLD.new_zeros(len(h_BLD), self.max_path_len)
        for step in range(self.max_path_len):
            summary = torch.cat([masked_mean(h_BLD, keep_BL), masked_max(h_BLD, keep_BL)], dim=-1)
            full_BN = visits_BN >= self.max_visits
            logits_BA = self._logits(summary, visits_BN, full_BN, step)
            if self.halt == "ponder" and step >= self.min_path_len:
                stop_B = logits_BA.softmax(-1)[:, -1]
                if self.training:
                    trace.exits_BC.append(self.head(h_BLD, keep_BL))
                    trace.stop_B.append(stop_B)
                else:
                    running_B = running_B & (stop_B <= 0.5)
            running_B = running_B & ~full_BN.all(1)
            if not bool(running_B.any()):
                break
            if self.training:
                # The regularisers shape the router alone: for them the states are constants.
                own_RA = self._logits(summary.detach(), visits_BN, full_BN, step)[running_B]
                trace.logits_RA.append(own_RA)
                trace.experts_RN.append(own_RA[:, :-1].softmax(-1))
            action_B, coefficient_B, probabilities_BN = self._choose(logits_BA[:, :-1], full_BN)
            choice_B = action_B.masked_fill(~running_B, self.num_experts)
            outcome = self.experts.step(h_BLD, keep_BL, choice_B, coefficient_B)
            trace.steps.append(outcome)
            h_BLD = outcome.h_BLD
            visits_BN = visits_BN + F.one_hot(choice_B, self.num_experts + 1)[:, :-1]
            path_BT[:, step] = action_B.masked_fill(~running_B, STOPPED)
            entropy_BT[:, step] = entropy(probabilities_BN.detach()) * running_B
        if self.training:
            self._count(path_BT)
        else:
            self.record.add(path_BT, entropy_BT)
        logits_BC: Tensor = self.head(h_BLD, keep_BL)
        trace.exits_BC.append(logits_BC)
        return logits_BC

    def _logits(self, summary: Tensor, visits_BN: Tensor, full_BN: Tensor, step: int) -> Tensor:
        """Router logits [B, A]; experts visited often enough are masked, and so is stopping where it is not allowed."""
        logits_BA = self.router(summary, visits_BN / self.max_visits, step)
        may_stop_B1 = full_BN.all(1, keepdim=True)  # nothing else is left
        if self.halt == "ponder" and step >= self.min_path_len:
            may_stop_B1 = torch.ones_like(may_stop_B1)
        return logits_BA.masked_fill(torch.cat([full_BN, ~may_stop_B1], dim=-1), MASKED)

    def _choose(self, logits_BN: Tensor, full_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Action [B], coefficient c [B] of the expert's change, probabilities over experts [B, N]."""
        if self.router_mode == "st":
            noise_BN = -torch.empty_like(logits_BN).exponential_().log() if self.training else 0.0
            probabilities_BN = ((logits_BN + noise_BN) / self._tau()).softmax(-1)
            chosen_B, action_B = probabilities_BN.max(-1)
            return action_B, 1 + chosen_B - chosen_B.detach(), probabilities_BN
        probabilities_BN = logits_BN.softmax(-1)
        scores_BN = (probabilities_BN.detach() + self.balance_bias).masked_fill(full_BN, float("-inf"))
        action_B = scores_BN.argmax(-1)
        chosen_B = probabilities_BN.gather(-1, action_B.unsqueeze(-1)).squeeze(-1)
        return action_B, self.gate_scale * chosen_B, probabilities_BN

    def _tau(self) -> float:
        share = min(float(self.progress) / TAU_SHARE, 1.0)
        return self.gumbel_tau * (self.gumbel_tau_min / self.gumbel_tau) ** share

    def _warming_up(self) -> bool:
        return float(self.progress) < self.halt_warmup

    @torch.no_grad()
    def _count(self, path_BT: Tensor) -> None:
        counts_N = (path_BT + 1).flatten().bincount(minlength=self.num_experts + 1)[1:]
        self.counts += counts_N
        self.load.lerp_(counts_N / counts_N.sum().clamp_min(1), 1 - LOAD_DECAY)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        self.progress.fill_(progress)
        if self.router_mode == "gate" and self.balance_bias_rate:
            self.balance_bias.copy_(balanced_bias(self.balance_bias, self.counts, self.balance_bias_rate))
        self.counts.zero_()

    def task_loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy; with "ponder" after its warm-up the mean over all exits, weighed by their probabilities."""
        if not self.training or not self._trace.stop_B or self._warming_up():
            return super().task_loss(logits, labels, label_smoothing)
        losses_XB = torch.stack(
            [
                F.cross_entropy(e, labels, label_smoothing=label_smoothing, reduction="none")
                for e in self._trace.exits_BC
            ]
        )
        return (self._exit_probabilities() * losses_XB).sum(0).mean()

    def _exit_probabilities(self) -> Tensor:
        """pi_t = p_stop,t prod_{k<t} (1 - p_stop,k); the last exit takes the remainder, [X, B]."""
        stop_XB = torch.stack(self._trace.stop_B)
        survive_XB = (1 - stop_XB).cumprod(0)
        reached_XB = torch.cat([torch.ones_like(survive_XB[:1]), survive_XB])
        return reached_XB * torch.cat([stop_XB, torch.ones_like(stop_XB[:1])])

    def auxiliary_losses(self) -> dict[str, AuxiliaryLoss]:
        trace = self._trace
        if not trace.logits_RA:
            return {}
        logits_RA, experts_RN = torch.cat(trace.logits_RA), torch.cat(trace.experts_RN)
        diversity = balance_loss(self.load, experts_RN) + mean_entropy_loss(experts_RN)
        negative_entropy = -entropy(logits_RA.softmax(-1)).mean()
        losses = {
            "diversity_loss": AuxiliaryLoss(diversity, self.diversity_loss_coef),
            "z_loss": AuxiliaryLoss(z_loss(logits_RA), self.z_loss_coef),
            "router_entropy_loss": AuxiliaryLoss(
                negative_entropy, self.router_entropy_coef * (1 - 0.9 * float(self.progress))
            ),
        }
        if self.contrastive_loss_coef:
            losses["contrastive_loss"] = AuxiliaryLoss(self._contrastive_loss(), self.contrastive_loss_coef)
        if trace.stop_B:
            on = 0.0 if self._warming_up() else 1.0
            kl, length = self._halting_losses()
            losses["ponder_kl"] = AuxiliaryLoss(kl, on * self.ponder_kl_coef)
            losses["path_penalty"] = AuxiliaryLoss(length, on * self.path_penalty_coef)
        return losses

    def _contrastive_loss(self) -> Tensor:
        """Mean of cos^2 between the mean changes of two experts, over the pairs of experts in use."""
        delta_RD = torch.cat([step.delta_RD for step in self._trace.steps])
        member_RN = F.one_hot(torch.cat([step.experts_R for step in self._trace.steps]), self.num_experts)
        counts_N = member_RN.sum(0)
        means_ND = (member_RN.T.to(delta_RD.dtype) @ delta_RD)[counts_N > 0] / counts_N[counts_N > 0, None]
        directions_ND = F.normalize(means_ND, dim=-1)
        pairs = torch.triu_indices(len(directions_ND), len(directions_ND), offset=1, device=delta_RD.device)
        if not pairs.shape[1]:
            return delta_RD.sum() * 0.0
        return (directions_ND[pairs[0]] * directions_ND[pairs[1]]).sum(-1).square().mean()

    def _halting_losses(self) -> tuple[Tensor, Tensor]:
        """KL of the exit distribution to a truncated geometric prior of rate 1 / (T/2 + 1), and E[path length]."""
        pi_XB = self._exit_probabilities()
        exits = torch.arange(len(pi_XB), device=pi_XB.device, dtype=pi_XB.dtype)
        rate = 1 / (self.max_path_len / 2 + 1)
        prior_X = (rate * (1 - rate) ** exits) / (rate * (1 - rate) ** exits).sum()
        kl = -(entropy(pi_XB.T) + (pi_XB.T * prior_X.log()).sum(-1)).mean()
        return kl, ((exits + self.min_path_len).unsqueeze(1) * pi_XB).sum(0).mean()

    def start_recording(self) -> None:
        self.record.clear()

    def recorded_paths(self) -> NDArray[np.int64]:
        return self.record.paths()

    def get_model_specific_metrics(self) -> dict[str, Any]:
        return self.record.metrics()

    def get_active_parameter_count(self) -> int:
        experts = sum(parameter.numel() for parameter in routed_parameters(self, "experts"))
        return self.get_parameter_count() - experts * max(0, self.num_experts - self.max_path_len) // self.num_experts

    def get_flops_per_sample(self, length: int) -> float:
        """For a path that goes on as long as it may."""
        steps = min(self.max_path_len, self.num_experts * self.max_visits)
        decisions = min(self.max_path_len, steps + 1)  # where visits end the path, one more finds nothing left to visit
        one_expert = block_flops(self.experts, self.embed_dim, length)
        one_expert += (len(self.experts.blocks) - 1) * 4.0 * length**2 * self.embed_dim
        router = 2.0 * sum(m.weight.numel() for m in self.router.modules() if isinstance(m, nn.Linear))
        return steps * one_expert + decisions * router + 2.0 * self.head.linear.weight.numel()
