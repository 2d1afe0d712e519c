"""The policies that decide a path: a learned router, a fixed route, or given paths.

B batch  L length  D width  N experts  A = N + 1 actions  S = 2 D width of a summary  T steps
F functions of a task with known paths
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.annotations import Count, Natural, Weight
from research_eval.errors import ConfigError
from research_eval.layers.intervention import Intervention
from research_eval.layers.path.choice import ChoiceMode
from research_eval.layers.path.halting import Halting
from research_eval.layers.path.router import AllSteps, Router, TokenFeatures, fixed_route
from research_eval.layers.path.value import ValueEstimate
from research_eval.layers.path.walk import MASKED, PathSettings, RouterView, View, Walk
from research_eval.layers.settings import EncoderSettings
from research_eval.layers.text import masked_max, masked_mean
from research_eval.routing.record import STOPPED

Route = Literal["learned", "token", "hash", "random", "oracle"]
RouterInput = Literal["features", "cursor", "state"]


CONTROLS = (  # routes that a learned one has to beat
    ("frozen router", (("optimizer_params.router_lr_mult", 0.0),)),
    ("random routes", (("model_params.route", "random"),)),
    ("hash of the input", (("model_params.route", "hash"),)),
)


@dataclass(frozen=True)
class PolicySettings:
    """Options of the router, or of the route that replaces it."""

    router_hidden_dim: Count | None = None
    router_input: RouterInput | None = None
    router_per_step: bool = True
    router_init: Weight = 4.0
    route: Route = "learned"
    route_token: Natural = 0


class GivenPaths:
    """The paths that samples have to take: the task's right paths (route "oracle"), or those of `follow`."""

    def __init__(self, settings: PolicySettings, path: PathSettings, num_experts: int) -> None:
        self._always = settings.route == "oracle"
        self._max_path_len = path.max_path_len
        self._num_experts = num_experts
        self.mapping_TF: Tensor | None = None  # function f at step t -> expert

    def of(self, right_BT: Tensor | None, forced: tuple[int, ...] | None, ids_BL: Tensor) -> Tensor | None:
        """The given paths [B, T], STOPPED after their end, from the task's right paths, if it knows them.

        A path that an intervention has `forced` is that of every sample. None if the route is free. Raises ConfigError
        for paths that the model cannot follow.
        """
        if forced:
            steps = [*forced, *[STOPPED] * (self._max_path_len - len(forced))]
            return torch.tensor(steps, device=ids_BL.device).expand(len(ids_BL), -1)
        if not self._always and self.mapping_TF is None:
            return None
        if right_BT is None:
            raise ConfigError('route "oracle" needs a task that knows the right path of its samples, planted_paths say')
        if right_BT.shape[1] > self._max_path_len:
            raise ConfigError(f"max_path_len={self._max_path_len}: the task's paths have {right_BT.shape[1]} steps")
        known_BT = right_BT
        if self.mapping_TF is not None:
            steps_T = torch.arange(known_BT.shape[1], device=known_BT.device)
            known_BT = self.mapping_TF[steps_T, known_BT.clamp_min(0)].masked_fill(known_BT < 0, STOPPED)
        if int(known_BT.max()) >= self._num_experts:
            raise ConfigError(
                f"num_total_experts={self._num_experts}: the task's paths have an expert {int(known_BT.max())}"
            )
        return F.pad(known_BT, (0, self._max_path_len - known_BT.shape[1]), value=STOPPED)


class LearnedPolicy(nn.Module):
    """A router that reads states or token features and computes logits over the actions.

    `router_input` selects its input. "features": fixed random features of the tokens, so that only the router's own
    learning changes a route. "cursor": the features of one token, step t reads token t, for inputs that begin with
    instructions. "state": the pooled states h_t. The default is "features", or "state" if the router
    `decides_about_stopping`.
    """

    def __init__(
        self,
        settings: PolicySettings,
        path: PathSettings,
        num_experts: int,
        vocab_size: int,
        embed_dim: int,
        *,
        positions: bool,
        normalize: bool,
        decides_about_stopping: bool,
    ) -> None:
        super().__init__()
        reads = settings.router_input or ("state" if decides_about_stopping else "features")
        self._path = path
        self._decides_about_stopping = decides_about_stopping
        self.router = Router(
            embed_dim,
            settings.router_hidden_dim or embed_dim,
            num_experts,
            path.max_path_len,
            settings.router_init,
            settings.router_per_step,
            standardize=reads != "state",
            normalize=normalize,
        )
        self.features = (
            None if reads == "state" else TokenFeatures(vocab_size, embed_dim, positions, cursor=reads == "cursor")
        )

    def forward(
        self,
        h_BLD: Tensor,
        keep_BL: Tensor | None,
        ids_BL: Tensor,
        walk: Walk,
        given_BT: Tensor | None,
        step: int,
        value: ValueEstimate,
    ) -> View:
        """The router's view of one step, and the given action if the path is forced."""
        known = walk.router_steps
        if known is not None:
            summary_BS = known.summary[step]
        elif self.features is None:
            summary_BS = torch.cat([masked_mean(h_BLD, keep_BL), masked_max(h_BLD, keep_BL)], dim=-1)
        else:
            summary_BS = self.features(ids_BL, keep_BL, step)
            # The statistics of training are those of the samples that run, and may differ from step to step.
            if not self.features.cursor and (walk.everyone_runs or not walk.training):
                steps = self._path.max_path_len
                if given_BT is None:  # else `max_visits` does not end the path
                    steps = min(steps, walk.num_experts * self._path.max_visits + 1)
                known = walk.router_steps = self.router.of_all_steps(summary_BS, steps)
                summary_BS = known.summary[step]
        if known is None:
            running_B = None if walk.everyone_runs else walk.running_B
            summary_BS = self.router.standardized(summary_BS, running_B, step)
        full_BN = walk.visits_BN >= self._path.max_visits
        if given_BT is not None:
            full_BN = full_BN & ~full_BN.all(1, keepdim=True)  # `max_visits` does not end a given path
        view = self._view(summary_BS, known, walk.visits_BN, full_BN, step, value)
        return View(view, None if given_BT is None else action_of(given_BT, step, full_BN.shape[1]))

    def _view(
        self,
        summary_BS: Tensor,
        known: AllSteps | None,
        visits_BN: Tensor,
        full_BN: Tensor,
        step: int,
        value: ValueEstimate,
    ) -> RouterView:
        """The router's logits with forbidden actions masked, and the action values that enter them."""
        values_BA, state_value_B, bonus_BA = value.estimate(summary_BS, step)
        may_stop_B1 = full_BN.all(1, keepdim=True)  # no expert is left
        if self._decides_about_stopping and step >= self._path.min_path_len:
            may_stop_B1 = torch.ones_like(may_stop_B1)
        masked_BA = torch.cat([full_BN, ~may_stop_B1], dim=-1)
        visit_share_BN = visits_BN / self._path.max_visits

        def logits_of(summary_BS: Tensor) -> Tensor:
            return self.router(summary_BS, visit_share_BN, step, bonus_BA, known).masked_fill(masked_BA, MASKED)

        logits_BA = logits_of(summary_BS)
        # The regularisers train the router only, so they see the states as constants. Features are constants anyway.
        own_BA = logits_of(summary_BS.detach()) if self.training and summary_BS.requires_grad else logits_BA
        return RouterView(full_BN, masked_BA, logits_BA, own_BA, values_BA, state_value_B)


class FixedPolicy(nn.Module):
    """A route without a router: "token", "hash" or "random" (see `fixed_route`), or "oracle", the given path.

    `max_visits` does not limit these routes.
    """

    router = None
    features = None

    def __init__(self, settings: PolicySettings, num_experts: int) -> None:
        super().__init__()
        self._route = settings.route
        self._position = settings.route_token
        self._num_experts = num_experts

    def forward(
        self,
        h_BLD: Tensor,
        keep_BL: Tensor | None,
        ids_BL: Tensor,
        walk: Walk,
        given_BT: Tensor | None,
        step: int,
        value: ValueEstimate,
    ) -> View:
        """The given action, or the action of the fixed route, at one step."""
        if given_BT is not None:
            return View(None, action_of(given_BT, step, self._num_experts))
        assert self._route != "learned"
        assert self._route != "oracle"  # GivenPaths refuses a batch without paths
        ids_BL = ids_BL if keep_BL is None else ids_BL * keep_BL  # 0 where padded
        action_B = fixed_route(self._route, ids_BL, self._position, step, self._num_experts, fresh=self.training)
        return View(None, action_B)


def policy_of(
    settings: PolicySettings,
    path: PathSettings,
    num_experts: int,
    vocab_size: int,
    encoder: EncoderSettings,
    mode: ChoiceMode,
    halting: Halting,
) -> LearnedPolicy | FixedPolicy:
    """The learned policy, or a fixed one for any other route.

    Raises ConfigError if the halting rule needs a router and the route has none.
    """
    if settings.route == "learned":
        return LearnedPolicy(
            settings,
            path,
            num_experts,
            vocab_size,
            encoder.embed_dim,
            positions=encoder.positional_encoding == "sin",
            normalize=mode.normalizes_logits,
            decides_about_stopping=halting.decided_by_router,
        )
    if halting.decided_by_router:
        raise ConfigError(
            f"halt={halting.settings.halt!r} is decided by the router, but route={settings.route!r} has none: "
            'use "confidence"'
        )
    return FixedPolicy(settings, num_experts)


def without(view: View, now: Intervention, num_experts: int) -> View:
    """The view of a step in which an intervention forbids experts. Given actions stay as they are."""
    router = view.router
    if not now.forbid:
        return view
    if router is None:
        return view if view.given_B is None else view._replace(given_B=now.rerouted(view.given_B, num_experts))
    full_BN = router.full_BN | now.forbidden(num_experts, router.full_BN.device)
    may_stop_B1 = ~router.masked_BA[:, -1:] | full_BN.all(1, keepdim=True)
    masked_BA = torch.cat([full_BN, ~may_stop_B1], dim=-1)
    logits_BA = router.logits_BA.masked_fill(masked_BA, MASKED)
    return view._replace(router=router._replace(full_BN=full_BN, masked_BA=masked_BA, logits_BA=logits_BA))


def action_of(given_BT: Tensor, step: int, num_experts: int) -> Tensor:
    """The action of a given path at one step, [B]; N (stop) after its end."""
    given_B = given_BT[:, step]
    return given_B.masked_fill(given_B == STOPPED, num_experts)
