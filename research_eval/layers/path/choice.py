"""How the model chooses an action, and how the task loss reaches the router: one class per `router_mode`.

A new mode is a class in a file of its own: `@CHOICES.register("name")` makes it a value of `router_mode`.

B batch  N experts  A = N + 1 actions (the last one stops)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from research_eval.annotations import Positive, Range, Share, When
from research_eval.errors import ConfigError
from research_eval.layers.collective import drawn
from research_eval.layers.path.walk import Choice, RouterView, View
from research_eval.layers.routing import members
from research_eval.registry import CHOICES, Registered

TAU_SHARE = 0.7  # share of the training over which gumbel_tau falls to gumbel_tau_min


@dataclass(frozen=True)
class ChoiceSettings:
    """The mode, and the options of single modes. Raises ConfigError if the temperature rises."""

    router_mode: Annotated[str, Registered(CHOICES)] = "gate"
    gate_scale: Annotated[Positive, Range(1.0, 3.0), When("router_mode", "gate")] = 2.0
    exploration: Share = 0.0
    gumbel_tau: Annotated[Positive, Range(0.3, 3.0, log=True), When("router_mode", "st", "st_dense")] = 1.0
    gumbel_tau_min: Positive = 0.3

    def __post_init__(self) -> None:
        if self.gumbel_tau_min > self.gumbel_tau:
            raise ConfigError(f"gumbel_tau_min={self.gumbel_tau_min} is more than gumbel_tau={self.gumbel_tau}")

    def mode(self) -> ChoiceMode:
        """The object that chooses."""
        mode: ChoiceMode = CHOICES.get_or_explain(self.router_mode)(self)
        return mode


class ChoiceMode(ABC):
    """Chooses an action for each sample from the router's view. The flags below describe a mode to other mechanisms."""

    learns_from_reward = False  # training draws the action from the policy, which learns from the reward
    uses_policy_gradient = False  # REINFORCE; otherwise a mode that learns from the reward learns Q-values
    executes_all = False  # training executes all experts, so that each passes a gradient to the router
    uses_balance_bias = False  # the choice adds the balance bias, which is therefore updated
    normalizes_logits = False  # the router has a layer norm over the actions
    static_values = False  # one Q-value per action, independent of the state
    q_loss_coef = 0.0  # default of the option of this name
    q_logit_scale = 0.0  # default of the option of this name

    def __init__(self, settings: ChoiceSettings) -> None:
        self.settings = settings

    @abstractmethod
    def choose(self, view: RouterView, bias_N: Tensor, done: float, training: bool, may_stop: bool) -> Choice:
        """Choose an action for every sample. Action N stops; it is chosen only if `may_stop`.

        `done` is the finished share of the training, from 0 to 1. `bias_N` is the balance bias of the step.
        """

    def scheduled_options(self) -> tuple[str, ...]:
        """The options whose effect follows `done`; of a mode that does not say, the mode itself."""
        return ("router_mode",)

    def strength(self, chosen_B: Tensor) -> Tensor:
        """The coefficient c in evaluation of an expert with this probability, [B] -> [B]."""
        return torch.ones_like(chosen_B)

    def __call__(
        self, view: View, num_experts: int, bias_N: Tensor, done: float, training: bool, may_stop: bool
    ) -> Choice:
        """The choice of a step: the given action if there is one, otherwise that of the mode.

        A given action has the coefficient of the router's own choice, so that nothing but the path differs. If both are
        the same expert, the step is exactly the router's own.
        """
        if view.router is None:
            assert view.given_B is not None
            return _fixed(view.given_B, num_experts)
        own = self.choose(view.router, bias_N, done, training, may_stop)
        return own if view.given_B is None else own._replace(action_B=view.given_B)


def _fixed(action_B: Tensor, num_experts: int) -> Choice:
    """A choice without a router, with c = 1 and all probability on the given action."""
    ones_BN = members(action_B, num_experts).long()
    return Choice(action_B, torch.ones(len(action_B), device=action_B.device), ones_BN)


@CHOICES.register("gate")
class Gate(ChoiceMode):
    """The most probable expert after the balance bias; c is `gate_scale` times its probability.

    Over the first `exploration` of the training, the share of samples with a uniformly random expert falls from 1 to 0.
    """

    uses_balance_bias = True

    def scheduled_options(self) -> tuple[str, ...]:
        return ("exploration",) if self.settings.exploration else ()

    def strength(self, chosen_B: Tensor) -> Tensor:
        return self.settings.gate_scale * chosen_B

    def choose(self, view: RouterView, bias_N: Tensor, done: float, training: bool, may_stop: bool) -> Choice:
        probabilities_BN = view.logits_BA[:, :-1].softmax(-1)
        scores_BN = (probabilities_BN.detach() + bias_N).masked_fill(view.full_BN, float("-inf"))
        action_B = self._explored(scores_BN, done) if training else scores_BN.argmax(-1)
        chosen_B = probabilities_BN.gather(-1, action_B.unsqueeze(-1)).squeeze(-1)
        if may_stop:
            stop_B = view.logits_BA.softmax(-1)[:, -1]
            action_B = action_B.masked_fill(drawn(stop_B, Tensor.uniform_) < stop_B, view.full_BN.shape[1])
        return Choice(action_B, self.strength(chosen_B), probabilities_BN)

    def _explored(self, scores_BN: Tensor, done: float) -> Tensor:
        """The best expert, or early in training a random permitted expert."""
        best_B = scores_BN.argmax(-1)
        if done >= self.settings.exploration:
            return best_B
        any_B = drawn(scores_BN, Tensor.uniform_).masked_fill(scores_BN.isinf(), -1.0).argmax(-1)
        explores_B = drawn(scores_BN[:, 0], Tensor.uniform_) < 1 - done / self.settings.exploration
        return torch.where(explores_B, any_B, best_B)


class NoisyChoice(ChoiceMode):
    """The largest logit after Gumbel noise in training, and without noise in evaluation."""

    def temperature(self, done: float) -> float:
        """`gumbel_tau` falls to `gumbel_tau_min` over the first `TAU_SHARE` of the training."""
        share = min(done / TAU_SHARE, 1.0)
        tau, smallest = self.settings.gumbel_tau, self.settings.gumbel_tau_min
        return tau * (smallest / tau) ** share

    def scheduled_options(self) -> tuple[str, ...]:
        return ("gumbel_tau_min",) if self.temperature(0.0) != self.temperature(1.0) else ()

    def coefficient(self, chosen_B: Tensor) -> Tensor:
        """c of the chosen action, whose probability is `chosen`."""
        return torch.ones_like(chosen_B)

    def choose(self, view: RouterView, bias_N: Tensor, done: float, training: bool, may_stop: bool) -> Choice:
        scores_BA = view.logits_BA if may_stop else view.logits_BA[:, :-1]
        noise_BA = -drawn(scores_BA, Tensor.exponential_).log() if training else 0.0
        probabilities_BA = ((scores_BA + noise_BA) / self.temperature(done)).softmax(-1)
        chosen_B, action_B = probabilities_BA.max(-1)
        return Choice(action_B, self.coefficient(chosen_B), probabilities_BA[:, : view.full_BN.shape[1]])


@CHOICES.register("st")
class StraightThrough(NoisyChoice):
    """c is 1 in value and has the gradient of the probability (Bengio et al., 2013; Jang et al., 2017)."""

    def coefficient(self, chosen_B: Tensor) -> Tensor:
        return 1 + chosen_B - chosen_B.detach()


@CHOICES.register("st_dense")
class DenseStraightThrough(StraightThrough):
    """As "st", but training executes all experts, so that the gradient flows through each of them."""

    executes_all = True


class Sampled(NoisyChoice):
    """Draws the action from the policy: Gumbel noise at temperature 1 is an exact draw. c is 1, without a gradient."""

    learns_from_reward = True
    q_loss_coef = 0.1

    def temperature(self, done: float) -> float:
        return 1.0


@CHOICES.register("reinforce")
class Reinforce(Sampled):
    """The policy gradient with the state's value as its baseline (REINFORCE, Williams, 1992)."""

    uses_policy_gradient = True


@CHOICES.register("q")
class ActionValueChoice(Sampled):
    """Adds action values, learned by TD(lambda), to the router's logits."""

    q_logit_scale = 3.0


@CHOICES.register("published")
class Published(NoisyChoice):
    """As "st" with c = 1 and no gradient from the task loss to the router; kept as an ablation."""

    normalizes_logits = True
    static_values = True
    q_loss_coef = 0.01
    q_logit_scale = 1.0
