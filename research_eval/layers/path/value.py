"""The value of a decision: action values that bias the router, and the losses that learn from the reward.

B batch  A actions  T decisions of a path  R decisions in all
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.annotations import Share, Weight
from research_eval.layers.collective import batch_mean
from research_eval.layers.losses import AuxiliaryLoss
from research_eval.layers.path.choice import ChoiceMode
from research_eval.layers.path.returns import RewardNormalizer, path_returns
from research_eval.layers.path.router import ActionValues
from research_eval.layers.path.walk import Decision, Walk
from research_eval.layers.routing import mean_of_rows

TRACE_DECAY = 0.8  # lambda of the returns for Q; REINFORCE uses 1


@dataclass(frozen=True)
class ValueSettings:
    """Options of the values. None means the default of the router's mode.

    The discount moves from `discount` to `discount_final` during the training.
    """

    q_loss_coef: Weight | None = None
    q_logit_scale: Weight | None = None
    discount: Share = 0.9
    discount_final: Share = 0.99


class ValueEstimate(nn.Module):
    """Q and V of the router's summary, the running statistics of the reward, and their losses."""

    def __init__(
        self,
        settings: ValueSettings,
        mode: ChoiceMode,
        embed_dim: int,
        hidden_dim: int,
        num_experts: int,
        max_path_len: int,
        *,
        has_router: bool,
    ) -> None:
        super().__init__()
        self._settings = settings
        self._mode = mode
        self.q_loss_coef = mode.q_loss_coef if settings.q_loss_coef is None else settings.q_loss_coef
        self.q_logit_scale = mode.q_logit_scale if settings.q_logit_scale is None else settings.q_logit_scale
        self.action_values: ActionValues | None = None  # only if a loss or a router uses them
        if has_router and (self.q_loss_coef or self.q_logit_scale):
            self.action_values = ActionValues(embed_dim, hidden_dim, num_experts, max_path_len, mode.static_values)
        self.reward = RewardNormalizer()

    def estimate(self, summary_BS: Tensor, step: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Q [B, A], V [B] and the bonus for the router's logits [B, A]; None for each that the mode does not use."""
        if self.action_values is None:
            return None, None, None
        values_BA, state_value_B = self.action_values(summary_BS, step)
        return values_BA, state_value_B, self.q_logit_scale * values_BA.detach() if self.q_logit_scale else None

    def scheduled_options(self) -> tuple[str, ...]:
        """The options whose effect follows the finished share of the training."""
        is_used = self.action_values is not None and self._settings.discount != self._settings.discount_final
        return ("discount_final",) if is_used else ()

    def num_weights(self) -> int:
        """Weights that one estimate multiplies."""
        if self.action_values is None:
            return 0
        linear = (module for module in self.action_values.modules() if isinstance(module, nn.Linear))
        return sum(module.weight.numel() for module in linear)

    def note_reward(self, walk: Walk, losses_B: Tensor) -> None:
        """Store each sample's reward: its negative task loss, normalised by running statistics."""
        walk.reward_B = self.reward(-losses_B)

    def losses(self, walk: Walk, done: float, step_price: float, stops_by_action: bool) -> dict[str, AuxiliaryLoss]:
        """Action values by TD(lambda), or the policy gradient with V as its baseline; empty without a reward.

        Each executed expert costs `step_price`. Unless `stops_by_action`, no sample stops in training. The value of
        stopping is then never learned, so the targets ignore it.
        """
        if not walk.decisions or walk.reward_B is None:
            return {}
        decisions = walk.decisions
        decided_TB = torch.stack([decision.decided_B for decision in decisions])
        action_TB = torch.stack([decision.action_B for decision in decisions])
        values_TBA = torch.stack([d.view.values_BA for d in decisions if d.view.values_BA is not None])
        masked_TBA = torch.stack([decision.view.masked_BA for decision in decisions])
        if not stops_by_action:
            masked_TBA[..., -1] = True
        settings = self._settings
        returns_R = path_returns(
            decided_TB,
            decided_TB & (action_TB < walk.num_experts),
            values_TBA.detach().masked_fill(masked_TBA, float("-inf")).amax(-1),
            walk.reward_B,
            step_price,
            settings.discount + (settings.discount_final - settings.discount) * done,
            1.0 if self._mode.uses_policy_gradient else TRACE_DECAY,
        )[decided_TB]
        if self._mode.uses_policy_gradient:
            return self._policy_gradient(decisions, decided_TB, action_TB, returns_R, stops_by_action)
        predicted_R = values_TBA.gather(-1, action_TB.unsqueeze(-1)).squeeze(-1)[decided_TB]
        q_loss = batch_mean(F.huber_loss(predicted_R, returns_R), len(returns_R))
        return {"q_loss": AuxiliaryLoss(q_loss, self.q_loss_coef)}

    def _policy_gradient(
        self,
        decisions: list[Decision],
        decided_TB: Tensor,
        action_TB: Tensor,
        returns_R: Tensor,
        stops_by_action: bool,
    ) -> dict[str, AuxiliaryLoss]:
        """-log p(a) (G - V) and half of (V - G)^2, both as means over the decisions (Williams, 1992)."""
        state_values = [d.view.state_value_B for d in decisions if d.view.state_value_B is not None]
        baseline_R = torch.stack(state_values)[decided_TB]
        own_TBA = torch.stack([decision.view.own_BA for decision in decisions])
        competing_TBA = own_TBA if stops_by_action else own_TBA[..., :-1]
        log_probability_TB = competing_TBA.log_softmax(-1).gather(-1, action_TB.unsqueeze(-1)).squeeze(-1)
        policy_loss = -mean_of_rows(log_probability_TB[decided_TB] * (returns_R - baseline_R).detach())
        return {
            "policy_loss": AuxiliaryLoss(policy_loss, self.q_loss_coef),
            "value_loss": AuxiliaryLoss(mean_of_rows((baseline_R - returns_R).square()), 0.5 * self.q_loss_coef),
        }
