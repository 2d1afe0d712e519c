"""One pass along the path: which samples still run, which experts they visited, and the records for losses and reports.

B batch  D width  N experts  A = N + 1 actions (the last one stops)  T steps  R running decisions  C classes
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from research_eval.annotations import Aka, Count, Natural, Range, Steps
from research_eval.errors import ConfigError
from research_eval.layers.collective import batch_any
from research_eval.layers.experts import Step
from research_eval.layers.intervention import Intervention
from research_eval.layers.path.router import AllSteps
from research_eval.layers.routing import members
from research_eval.routing.record import STOPPED

MASKED = -1e9  # logit of a forbidden action; finite, so that entropy and its gradient stay finite


@dataclass(frozen=True)
class PathSettings:
    """How long a path may be, and how often it may visit one expert.

    Raises ConfigError if the shortest path is longer than the longest.
    """

    max_path_len: Annotated[Steps, Range(1, 4, upto=("num_total_experts", "max_visits"))] = 3
    min_path_len: Natural = 1
    max_visits: Annotated[Count, Aka("max_visits_per_expert"), Range(1, 3)] = 2

    def __post_init__(self) -> None:
        if self.min_path_len > self.max_path_len:
            raise ConfigError(f"min_path_len={self.min_path_len} is more than max_path_len={self.max_path_len}")


class RouterView(NamedTuple):
    """The output of the learned router for every sample at one step."""

    full_BN: Tensor  # True at experts with `max_visits` visits by the sample
    masked_BA: Tensor  # True at forbidden actions
    logits_BA: Tensor
    own_BA: Tensor  # the same logits, with a gradient to the router only
    values_BA: Tensor | None  # Q(s, a), with a gradient to the action values only
    state_value_B: Tensor | None


class View(NamedTuple):
    """The information for one step: the router's view, a given action, or both if a learned route is forced."""

    router: RouterView | None
    given_B: Tensor | None = None  # the given action of each sample; N: stop


class Choice(NamedTuple):
    """The action of every sample (N: stop), and c, the factor of the expert's change."""

    action_B: Tensor
    coefficient_B: Tensor
    probabilities_BN: Tensor

    def after(self, now: Intervention) -> Choice:
        """The choice with swapped experts, and without the work of those that are left out."""
        if not now.swap and not now.skip:
            return self
        action_B, coefficient_B = replace(now, path=None).changed(self.action_B, self.coefficient_B)
        return self._replace(action_B=action_B, coefficient_B=coefficient_B)


class Decision(NamedTuple):
    """A step's decisions, in the form that the losses on values and path lengths need."""

    decided_B: Tensor  # True at samples that were still running
    action_B: Tensor
    view: RouterView


@dataclass
class Walk:
    """The state of a batch on its path, and the record of the whole pass.

    `everyone_runs` is True if no mechanism can end a path early. The host then reads no count back from the device.
    """

    visits_BN: Tensor
    running_B: Tensor
    path_BT: Tensor  # the expert at each step, STOPPED after the end
    training: bool
    everyone_runs: bool
    router_steps: AllSteps | None = None  # what the router knows of all steps, if its input is the same at each
    logits: list[Tensor] = field(default_factory=list)  # [R, A] per step, with a gradient to the router only
    decisions: list[Decision] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    exits: list[Tensor] = field(default_factory=list)  # outputs [B, C] after min_path_len..T steps
    stop: list[Tensor] = field(default_factory=list)  # p_stop [B] of the decision at each of these states but the last
    reward_B: Tensor | None = None
    pooled_BD: Tensor | None = None  # mean of the final states, without gradient

    @classmethod
    def begin(cls, h_BLD: Tensor, num_experts: int, max_path_len: int, training: bool, everyone_runs: bool) -> Walk:
        """The start: all samples run and have visited no expert."""
        return cls(
            h_BLD.new_zeros(len(h_BLD), num_experts),
            torch.ones(len(h_BLD), dtype=torch.bool, device=h_BLD.device),
            torch.full((len(h_BLD), max_path_len), STOPPED, device=h_BLD.device),
            training,
            everyone_runs,
        )

    @property
    def num_experts(self) -> int:
        return self.visits_BN.shape[1]

    def keep_running(self, goes_on_B: Tensor | None) -> None:
        """End the paths of all other samples; None ends no path."""
        if goes_on_B is not None:
            self.running_B = self.running_B & goes_on_B

    def decide(self, view: RouterView | None, choice: Choice, keep_decision: bool) -> None:
        """Record the choice, and end the paths of samples that choose to stop or have no expert left."""
        if view is not None:
            if not self.everyone_runs:
                self.running_B = self.running_B & ~view.full_BN.all(1)
            if self.training:
                own_RA = view.own_BA if self.everyone_runs else view.own_BA[self.running_B]
                if self.everyone_runs or batch_any(len(own_RA) > 0):
                    self.logits.append(own_RA)
                if keep_decision:
                    self.decisions.append(Decision(self.running_B, choice.action_B, view))
        if not self.everyone_runs:
            self.running_B = self.running_B & (choice.action_B < self.num_experts)

    def is_over(self) -> bool:
        """Whether no sample runs any more."""
        return not self.everyone_runs and not batch_any(bool(self.running_B.any()))

    def executed(self, action_B: Tensor) -> Tensor:
        """The action of running samples; N for all others, which the experts leave unchanged."""
        return action_B if self.everyone_runs else action_B.masked_fill(~self.running_B, self.num_experts)

    def advance(self, choice: Choice, step: int) -> None:
        """Add the choices of running samples to their visits and paths."""
        taken_BN, action_B = members(choice.action_B, self.num_experts), choice.action_B
        if not self.everyone_runs:
            taken_BN = taken_BN & self.running_B.unsqueeze(1)
            action_B = action_B.masked_fill(~self.running_B, STOPPED)
        self.visits_BN = self.visits_BN + taken_BN
        self.path_BT[:, step] = action_B
