"""Graph-of-Experts: a router builds, per sample, a path through a pool of expert Transformers and decides when to stop.

Equations and their evidence: docs/GOE.md.

B batch  L length  D width  C classes  N experts  A = N + 1 actions (the last one stops)  T steps  X exits
R running decisions  F functions of a task whose right path is known
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.annotations import Aka, Choice, Count, Divides, Natural, Positive, Range, Share, Steps, Weight, When
from research_eval.datasets.token_data import Batch
from research_eval.errors import ConfigError
from research_eval.layers.block import block_flops, feed_forward_width
from research_eval.layers.experts import ExpertPool, Step
from research_eval.layers.halting import calibrated_threshold, exit_probabilities, expected_length, geometric_prior_kl
from research_eval.layers.packing import Packing
from research_eval.layers.returns import RewardNormalizer, path_returns
from research_eval.layers.router import LOGIT_LIMIT, ActionValues, Router, TokenFeatures, fixed_route
from research_eval.layers.routing import (
    STOPPED,
    PathRecord,
    balance_loss,
    balanced_bias,
    contrastive_loss,
    entropy,
    mean_entropy_loss,
    members,
    z_loss,
)
from research_eval.layers.scan import ScanSettings
from research_eval.layers.stacked import one_pass
from research_eval.layers.text import (
    ClassificationHead,
    Pool,
    PositionalEncoding,
    TokenEmbedding,
    masked_max,
    masked_mean,
)
from research_eval.models.base_model import AuxiliaryLoss, EvaluableModel, keep_mask, logits_of, routed_parameters
from research_eval.registry import MODELS_MAP

MASKED = -1e9  # finite, so that entropy and its gradient stay finite
LOAD_DECAY = 0.5  # of the running share of decisions per expert; a longer memory answers a collapse too late
TAU_SHARE = 0.7  # share of the training over which gumbel_tau falls to gumbel_tau_min
TRACE_DECAY = 0.8  # lambda of the returns that Q learns; REINFORCE takes 1
SAMPLED = ("reinforce", "q")  # modes that draw the action from the policy in training
VALUE_COEFS = {"q": 0.1, "reinforce": 0.1, "published": 0.01}  # defaults of q_loss_coef; 0 in other modes
LOGIT_SCALES = {"q": 3.0, "published": 1.0}  # defaults of q_logit_scale; 0 in other modes

RouterMode = Literal["gate", "st", "st_dense", "reinforce", "q", "published"]
Route = Literal["learned", "token", "hash", "random", "oracle"]
RouterInput = Literal["features", "cursor", "state"]
Halt = Literal["off", "confidence", "ponder", "action"]


class _View(NamedTuple):
    """What the router sees and says at one step."""

    full_BN: Tensor  # experts visited often enough
    masked_BA: Tensor  # actions not permitted
    logits_BA: Tensor
    own_BA: Tensor  # the same, with a gradient to the router only
    values_BA: Tensor | None  # Q(s, a), with a gradient to the action values only
    state_value_B: Tensor | None


class _Choice(NamedTuple):
    action_B: Tensor  # N: stop
    coefficient_B: Tensor  # c of the expert's change
    probabilities_BN: Tensor


class _Decision(NamedTuple):
    decided_B: Tensor
    action_B: Tensor
    view: _View


class _Trace:
    """What one forward pass leaves behind for the losses."""

    def __init__(self) -> None:
        self.logits_RA: list[Tensor] = []  # running decisions of each step, with a gradient to the router only
        self.steps: list[Step] = []
        self.exits_BC: list[Tensor] = []  # class scores after min_path_len..T steps
        self.stop_B: list[Tensor] = []  # p_stop of the decision taken at each of these states but the last
        self.decisions: list[_Decision] = []
        self.pooled_BD: Tensor | None = None  # final states, constant
        self.path_BT: Tensor | None = None
        self.reward_B: Tensor | None = None


@MODELS_MAP.register("goe_original")
class GoEOriginalClassifier(EvaluableModel):
    """One path per sample: h <- h + c (E_a(h) - h) for the chosen expert a, T times or until it stops.

    `router_mode` says how a is chosen and how the task loss reaches the router. "gate": the likeliest expert, c =
    `gate_scale` times its probability. "st": the winner after Gumbel noise at temperature `gumbel_tau` (in training),
    c = 1 with the gradient of the probability. "st_dense": the same, with the gradient through all experts, which are
    all executed. "reinforce" and "q": drawn from the policy, c = 1, learned from the reward (the negative task loss).
    "published": as "st" with c = 1 and no gradient at all, kept as an ablation.

    The router reads `router_input` "features": fixed random features of the tokens, so that only its own learning
    moves a route; "cursor": those of one token, step t reads token t, for inputs that begin with instructions; "state":
    the pooled states h_t. Default: "features", but "state" where it decides about stopping. `router_per_step` gives
    every step weights (and a balance) of its own, `router_init` is the spread of the first logits. Over the first
    `exploration` of the training the share of samples that go to any expert falls from 1 to 0 ("gate" only).

    `route` other than "learned" does without a router: "token", "hash", "random" (see `fixed_route`), or "oracle", the
    right path where the task knows it. `max_visits` does not bind these.

    The last `num_scan_experts` of the experts walk along the sequence (docs/scan.md); let `pool` be "last" with them.

    `halt` "off": always `max_path_len` steps, unless every expert has been visited `max_visits` times. "confidence":
    all exits are trained; evaluation leaves at the first whose largest class probability exceeds a threshold,
    calibrated on the validation split unless `exit_threshold` is given. "ponder": training weighs the loss of every
    exit with its probability (PonderNet, Banino et al., 2021), evaluation stops once p_stop > 1/2. "action": stopping
    is sampled in training. `path_penalty_coef` is the price of one expected step in the last two.
    """

    model_type = "goe_original"
    balance_bias: Tensor
    load: Tensor
    counts: Tensor
    progress: Tensor
    threshold: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        embed_dim: Annotated[Count, Choice(32, 64, 128)] = 64,
        num_total_experts: Annotated[Count, Choice(2, 4, 8)] = 4,
        expert_layers: Annotated[Count, Range(1, 2)] = 1,
        max_path_len: Annotated[Steps, Range(1, 4, upto=("num_total_experts", "max_visits"))] = 3,
        min_path_len: Natural = 1,
        max_visits: Annotated[Count, Aka("max_visits_per_expert"), Range(1, 3)] = 2,
        router_hidden_dim: Count | None = None,
        router_mode: RouterMode = "gate",
        router_input: RouterInput | None = None,
        router_per_step: bool = True,
        router_init: Weight = 4.0,
        route: Route = "learned",
        route_token: Natural = 0,
        gate_scale: Annotated[Positive, Range(1.0, 3.0), When("router_mode", "gate")] = 2.0,
        exploration: Share = 0.0,
        halt: Halt = "off",
        exit_threshold: Share | None = None,
        gumbel_tau: Annotated[Positive, Range(0.3, 3.0, log=True), When("router_mode", "st", "st_dense")] = 1.0,
        gumbel_tau_min: Positive = 0.3,
        balance_bias_rate: Weight = 1e-3,
        balance_decay: Share = 0.0,
        diversity_loss_coef: Annotated[Weight, Range(1e-3, 0.1, log=True)] = 0.01,
        z_loss_coef: Weight = 1e-3,
        router_entropy_coef: Weight = 0.0,
        contrastive_loss_coef: Weight = 0.0,
        path_heads_coef: Weight = 0.0,
        path_penalty_coef: Annotated[Weight, Range(1e-4, 0.1, log=True), When("halt", "ponder", "action")] = 0.0,
        ponder_kl_coef: Weight = 0.01,
        halt_warmup: Share = 0.5,
        q_loss_coef: Weight | None = None,
        q_logit_scale: Weight | None = None,
        discount: Share = 0.9,
        discount_final: Share = 0.99,
        tie_experts: bool = False,
        num_scan_experts: Natural = 0,
        scan_nodes: Count = 16,
        scan_walkers: Count = 4,
        scan_edge_sets: Count = 8,
        edge_entropy_coef: Weight = 0.01,
        num_heads: Annotated[Count, Choice(1, 2, 4, 8), Divides("embed_dim")] = 4,
        dim_feedforward: Count | None = None,
        dim_feedforward_factor: Annotated[Positive | None, Choice(1.0, 2.0, 4.0), When("dim_feedforward", None)] = None,
        dropout: Annotated[Share, Range(0.0, 0.3)] = 0.1,
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
        if route != "learned" and halt in ("ponder", "action"):
            raise ConfigError(f'halt={halt!r} is decided by the router, but route={route!r} has none: use "confidence"')
        if tie_experts and num_scan_experts:
            raise ConfigError(f"tie_experts needs experts of one kind, not num_scan_experts={num_scan_experts}")
        if exit_threshold is not None and halt != "confidence":
            raise ConfigError(f'exit_threshold={exit_threshold} needs halt="confidence", not {halt!r}')
        width = feed_forward_width(embed_dim, dim_feedforward, dim_feedforward_factor, default=2)
        hidden_dim = router_hidden_dim or embed_dim
        self.padding_idx = padding_idx
        self.embed_dim = embed_dim
        self.num_experts = num_total_experts
        self.max_path_len = max_path_len
        self.min_path_len = min_path_len
        self.max_visits = max_visits
        self.router_mode = router_mode
        self.route = route
        self.route_token = route_token
        self.gate_scale = gate_scale
        self.exploration = exploration
        self.halt = halt
        self.exit_threshold = exit_threshold
        self.gumbel_tau = gumbel_tau
        self.gumbel_tau_min = gumbel_tau_min
        self.balance_bias_rate = balance_bias_rate
        self.balance_decay = balance_decay
        self.diversity_loss_coef = diversity_loss_coef
        self.z_loss_coef = z_loss_coef
        self.router_entropy_coef = router_entropy_coef
        self.contrastive_loss_coef = contrastive_loss_coef
        self.path_heads_coef = path_heads_coef
        self.path_penalty_coef = path_penalty_coef
        self.ponder_kl_coef = ponder_kl_coef
        self.halt_warmup = halt_warmup
        self.q_loss_coef = VALUE_COEFS.get(router_mode, 0.0) if q_loss_coef is None else q_loss_coef
        self.q_logit_scale = LOGIT_SCALES.get(router_mode, 0.0) if q_logit_scale is None else q_logit_scale
        self.edge_entropy_coef = edge_entropy_coef
        self.discount = discount
        self.discount_final = discount_final
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
        published = router_mode == "published"
        stops = halt in ("ponder", "action")
        reads = router_input or ("state" if stops else "features")
        self.router: Router | None = None
        self.features: TokenFeatures | None = None
        self.action_values: ActionValues | None = None
        self.reward = RewardNormalizer()
        if route == "learned":
            self.router = Router(
                embed_dim,
                hidden_dim,
                num_total_experts,
                max_path_len,
                router_init,
                router_per_step,
                standardize=reads != "state",
                normalize=published,
            )
            if reads != "state":
                self.features = TokenFeatures(vocab_size, embed_dim, positional_encoding == "sin", reads == "cursor")
            if self.q_loss_coef or self.q_logit_scale:
                self.action_values = ActionValues(embed_dim, hidden_dim, num_total_experts, max_path_len, published)
        self.experts = ExpertPool(
            num_total_experts,
            expert_layers,
            embed_dim,
            num_heads,
            width,
            dropout,
            gated=True,
            adaptive_gate=True,
            positional_encoding=positional_encoding,
            num_scan_experts=num_scan_experts,
            scan=ScanSettings(scan_nodes, scan_walkers, scan_edge_sets),
        )
        if tie_experts:
            self._tie_experts()
        self.head = ClassificationHead(embed_dim, num_classes, dropout, pool)
        self.path_heads = nn.Linear(embed_dim, max_path_len + 2) if path_heads_coef else None
        # One row per step where each step has a router of its own, else one row for all.
        rows = max_path_len if router_per_step else 1
        self.register_buffer("balance_bias", torch.zeros(rows, num_total_experts))
        self.register_buffer("load", torch.full((rows, num_total_experts), 1 / num_total_experts))
        self.register_buffer("counts", torch.zeros(rows, num_total_experts), persistent=False)
        self.register_buffer("progress", torch.zeros(()))
        self._known_progress: float | None = None
        self.register_load_state_dict_post_hook(GoEOriginalClassifier._forget_progress)  # type: ignore[no-untyped-call]
        self.register_buffer("threshold", torch.tensor(1.0 if exit_threshold is None else exit_threshold))
        self.record = PathRecord(num_total_experts, max_path_len)
        self.full_depth_accuracy: float | None = None
        self._at_limit = torch.zeros(2, dtype=torch.long)
        self._all_exits = False
        self._mapping_TF: Tensor | None = None
        self._known_path_BT: Tensor | None = None
        self._trace = _Trace()

    def _tie_experts(self) -> None:
        """One expert in all places: equal at the start, and every gradient is the mean over the places."""
        for parameter in self.experts.parameters():
            with torch.no_grad():
                parameter.copy_(parameter[:1].expand_as(parameter))
            parameter.register_hook(lambda gradient: gradient.mean(0, keepdim=True).expand_as(gradient))

    def follow(self, mapping_TF: Tensor | None) -> bool:
        self._mapping_TF = mapping_TF
        self._known_path_BT = None
        return True

    def prepare(self, batch: Batch) -> None:
        super().prepare(batch)
        self._known_path_BT = None
        if self.route != "oracle" and self._mapping_TF is None:
            return
        if batch.paths is None:
            raise ConfigError('route "oracle" needs a task that knows the right path of its samples, planted_paths say')
        if batch.paths.shape[1] > self.max_path_len:
            raise ConfigError(f"max_path_len={self.max_path_len}: the task's paths have {batch.paths.shape[1]} steps")
        known_BT = batch.paths
        if self._mapping_TF is not None:
            steps_T = torch.arange(known_BT.shape[1], device=known_BT.device)
            known_BT = self._mapping_TF[steps_T, known_BT.clamp_min(0)].masked_fill(known_BT < 0, STOPPED)
        if int(known_BT.max()) >= self.num_experts:
            raise ConfigError(
                f"num_total_experts={self.num_experts}: the task's paths have an expert {int(known_BT.max())}"
            )
        self._known_path_BT = F.pad(known_BT, (0, self.max_path_len - known_BT.shape[1]), value=STOPPED)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        with one_pass(self.experts):
            return self._walk(input_ids, keep_mask(input_ids, attention_mask, self.padding_idx))

    def _walk(self, input_ids: Tensor, keep_BL: Tensor) -> Tensor:
        h_BLD = self.embedding(input_ids, keep_BL)
        packing, all_run = self.experts.packing(keep_BL, self.num_tokens()), self._nobody_stops()
        trace = self._trace = _Trace()
        visits_BN = h_BLD.new_zeros(len(h_BLD), self.num_experts)
        running_B = keep_BL.new_ones(len(h_BLD), dtype=torch.bool)
        path_BT = torch.full((len(h_BLD), self.max_path_len), STOPPED, device=h_BLD.device)
        entropy_BT = h_BLD.new_zeros(len(h_BLD), self.max_path_len)
        policy_BTA = h_BLD.new_zeros(len(h_BLD), self.max_path_len, self.num_experts + 1)
        values_BTA = None if self.action_values is None else torch.zeros_like(policy_BTA)
        for step in range(self.max_path_len):
            features_BS = None if self.features is None else self.features(input_ids, keep_BL, step)
            view = self._look(h_BLD, keep_BL, features_BS, visits_BN, None if all_run else running_B, step)
            if step >= self.min_path_len:
                running_B = running_B & self._goes_on(h_BLD, keep_BL, view)
            choice = self._fixed_choice(input_ids * keep_BL, step) if view is None else self._choose(view, step)
            if view is not None:
                running_B = running_B & ~view.full_BN.all(1)
                if self.training:
                    self._note_decision(view, choice.action_B, running_B, all_run)
            running_B = running_B & (choice.action_B < self.num_experts)
            if not all_run and not bool(running_B.any()):
                break
            h_BLD = self._execute(h_BLD, packing, choice, running_B, all_run)
            visits_BN = visits_BN + members(choice.action_B, self.num_experts) * running_B.unsqueeze(1)
            path_BT[:, step] = choice.action_B.masked_fill(~running_B, STOPPED)
            if view is not None:
                entropy_BT[:, step] = entropy(choice.probabilities_BN.detach()) * running_B
            if view is not None and not self.training:
                policy_BTA[:, step] = view.logits_BA.softmax(-1) * running_B.unsqueeze(1)
                if values_BTA is not None and view.values_BA is not None:
                    values_BTA[:, step] = view.values_BA * running_B.unsqueeze(1)
                self._at_limit += self._count_at_limit(view.logits_BA[running_B])
        if self.training:
            self._count(path_BT)
        else:
            self.record.add(path_BT, entropy_BT, None if self.router is None else policy_BTA, values_BTA)
        logits_BC: Tensor = self.head(h_BLD, keep_BL)
        trace.exits_BC.append(logits_BC)
        if self.path_heads is not None:
            trace.pooled_BD, trace.path_BT = masked_mean(h_BLD.detach(), keep_BL), path_BT
        return logits_BC

    def _look(
        self,
        h_BLD: Tensor,
        keep_BL: Tensor,
        features_BS: Tensor | None,
        visits_BN: Tensor,
        running_B: Tensor | None,
        step: int,
    ) -> _View | None:
        """What the router sees and says; None for a fixed route."""
        if self.router is None:
            return None
        summary_BS = features_BS
        if summary_BS is None:
            summary_BS = torch.cat([masked_mean(h_BLD, keep_BL), masked_max(h_BLD, keep_BL)], dim=-1)
        summary_BS = self.router.standardized(summary_BS, running_B, step)
        full_BN = visits_BN >= self.max_visits
        if self._known_path_BT is not None:
            full_BN = torch.zeros_like(full_BN)  # a given path is followed to its end
        values_BA, state_value_B, bonus_BA = None, None, None
        if self.action_values is not None:
            values_BA, state_value_B = self.action_values(summary_BS, step)
            bonus_BA = self.q_logit_scale * values_BA.detach() if self.q_logit_scale else None
        may_stop_B1 = full_BN.all(1, keepdim=True)  # nothing else is left
        if self.halt in ("ponder", "action") and step >= self.min_path_len:
            may_stop_B1 = torch.ones_like(may_stop_B1)
        masked_BA = torch.cat([full_BN, ~may_stop_B1], dim=-1)
        visit_share_BN = visits_BN / self.max_visits
        logits_BA = self.router(summary_BS, visit_share_BN, step, bonus_BA).masked_fill(masked_BA, MASKED)
        own_BA = logits_BA
        if self.training:
            # The regularisers shape the router alone: for them the states are constants.
            own_BA = self.router(summary_BS.detach(), visit_share_BN, step, bonus_BA).masked_fill(masked_BA, MASKED)
        return _View(full_BN, masked_BA, logits_BA, own_BA, values_BA, state_value_B)

    def _goes_on(self, h_BLD: Tensor, keep_BL: Tensor, view: _View | None) -> Tensor:
        """The samples that do not end here, [B]; in training soft exits end nothing, and are kept for the loss."""
        everyone_B = keep_BL.new_ones(len(keep_BL))
        if self.halt in ("confidence", "ponder") and (self.training or self._all_exits):
            self._trace.exits_BC.append(self.head(h_BLD, keep_BL))
        elif self.halt == "confidence":
            return self.head(h_BLD, keep_BL).softmax(-1).amax(-1) <= self.threshold
        if view is not None and self.halt in ("ponder", "action"):
            stop_B = view.logits_BA.softmax(-1)[:, -1]
            if not self.training:
                return everyone_B if self._known_path_BT is not None else stop_B <= 0.5
            self._trace.stop_B.append(stop_B)
        return everyone_B

    def _choose(self, view: _View, step: int) -> _Choice:
        """Action (N: stop, which only "action" halting samples), coefficient c and probabilities of the experts."""
        if self._known_path_BT is not None:
            # With the coefficient of the router's own choice, so that nothing but the path differs.
            probabilities_BN = view.logits_BA[:, :-1].softmax(-1)
            own = self._scaled(probabilities_BN.argmax(-1), probabilities_BN)
            coefficient_B = own.coefficient_B if self.router_mode == "gate" else torch.ones_like(own.coefficient_B)
            return _Choice(self._known_actions(step), coefficient_B, probabilities_BN)
        may_stop = self.training and self.halt == "action"
        if self.router_mode == "gate":
            probabilities_BN = view.logits_BA[:, :-1].softmax(-1)
            bias_N = self.balance_bias[self._row(step)]
            scores_BN = (probabilities_BN.detach() + bias_N).masked_fill(view.full_BN, float("-inf"))
            choice = self._scaled(self._explored(scores_BN), probabilities_BN)
            if may_stop:
                stop_B = view.logits_BA.softmax(-1)[:, -1]
                stops_B = torch.rand_like(stop_B) < stop_B
                choice = choice._replace(action_B=choice.action_B.masked_fill(stops_B, self.num_experts))
            return choice
        scores_BA = view.logits_BA if may_stop else view.logits_BA[:, :-1]
        noise_BA = -torch.empty_like(scores_BA).exponential_().log() if self.training else 0.0
        tau = 1.0 if self.router_mode in SAMPLED else self._tau()
        probabilities_BA = ((scores_BA + noise_BA) / tau).softmax(-1)
        chosen_B, action_B = probabilities_BA.max(-1)
        probabilities_BN = probabilities_BA[:, : self.num_experts]
        if self.router_mode in ("st", "st_dense"):
            return _Choice(action_B, 1 + chosen_B - chosen_B.detach(), probabilities_BN)
        return _Choice(action_B, torch.ones_like(chosen_B), probabilities_BN)

    def _explored(self, scores_BN: Tensor) -> Tensor:
        """The best expert, or early in the training any that is permitted."""
        best_B = scores_BN.argmax(-1)
        share = self._done()
        if not self.training or share >= self.exploration:
            return best_B
        any_B = torch.rand_like(scores_BN).masked_fill(scores_BN.isinf(), -1.0).argmax(-1)
        return torch.where(torch.rand_like(scores_BN[:, 0]) < 1 - share / self.exploration, any_B, best_B)

    def _scaled(self, action_B: Tensor, probabilities_BN: Tensor) -> _Choice:
        chosen_B = probabilities_BN.gather(-1, action_B.unsqueeze(-1)).squeeze(-1)
        return _Choice(action_B, self.gate_scale * chosen_B, probabilities_BN)

    def _fixed_choice(self, ids_BL: Tensor, step: int) -> _Choice:
        """The fixed route's expert, with c = 1. `ids` are 0 where padded."""
        if self.route == "oracle":
            action_B = self._known_actions(step)
        else:
            assert self.route != "learned"
            action_B = fixed_route(self.route, ids_BL, self.route_token, step, self.num_experts, fresh=self.training)
        ones_BN = members(action_B, self.num_experts).long()
        return _Choice(action_B, torch.ones(len(ids_BL), device=ids_BL.device), ones_BN)

    def _known_actions(self, step: int) -> Tensor:
        if self._known_path_BT is None:
            raise ConfigError('route "oracle" needs to be told the right paths: call prepare(batch) before forward')
        known_B = self._known_path_BT[:, step]
        return known_B.masked_fill(known_B == STOPPED, self.num_experts)

    def _nobody_stops(self) -> bool:
        """Known beforehand, so that no decision has to be read back: paths without halting that visits do not end."""
        visits_suffice = self.max_path_len <= self.num_experts * self.max_visits or self.router is None
        return self.halt == "off" and self._known_path_BT is None and self.route != "oracle" and visits_suffice

    def _execute(self, h_BLD: Tensor, packing: Packing, choice: _Choice, running_B: Tensor, all_run: bool) -> Tensor:
        """The states after the step; those of samples that do not run stay."""
        if self.router_mode == "st_dense" and self.training and self.router is not None:
            return self._execute_all(h_BLD, packing, choice, running_B)
        executed_B = choice.action_B.masked_fill(~running_B, self.num_experts)
        outcome = self.experts.step(
            h_BLD, packing, executed_B, choice.coefficient_B, all_run, pooled=bool(self.contrastive_loss_coef)
        )
        self._trace.steps.append(outcome)
        return outcome.h_BLD

    def _execute_all(self, h_BLD: Tensor, packing: Packing, choice: _Choice, running_B: Tensor) -> Tensor:
        """h + sum_i y_i (E_i(h) - h) with y the choice in value and its probabilities in gradient."""
        chosen_BN = members(choice.action_B, self.num_experts).long()
        weights_BN = chosen_BN + choice.probabilities_BN - choice.probabilities_BN.detach()
        after_BLD = h_BLD
        for expert, weight_B in enumerate(weights_BN.unbind(1)):
            action_B = torch.full_like(choice.action_B, expert).masked_fill(~running_B, self.num_experts)
            outcome = self.experts.step(h_BLD, packing, action_B, weight_B, pooled=bool(self.contrastive_loss_coef))
            self._trace.steps.append(outcome)
            after_BLD = after_BLD + (outcome.h_BLD - h_BLD)
        return after_BLD

    def _note_decision(self, view: _View, action_B: Tensor, decided_B: Tensor, all_run: bool) -> None:
        trace = self._trace
        own_RA = view.own_BA if all_run else view.own_BA[decided_B]
        if len(own_RA):
            trace.logits_RA.append(own_RA)
        if view.values_BA is not None or self.halt == "action":
            trace.decisions.append(_Decision(decided_B, action_B, view))

    def _count_at_limit(self, logits_RA: Tensor) -> Tensor:
        """Logits at the clamp, and logits in all; masked ones do not count."""
        unmasked_RA = logits_RA > MASKED
        at_limit_RA = unmasked_RA & (logits_RA.abs() >= LOGIT_LIMIT)
        return torch.stack([at_limit_RA.sum(), unmasked_RA.sum()]).cpu()

    def _tau(self) -> float:
        share = min(self._done() / TAU_SHARE, 1.0)
        return self.gumbel_tau * (self.gumbel_tau_min / self.gumbel_tau) ** share

    def _warming_up(self) -> bool:
        return self._done() < self.halt_warmup

    @torch.no_grad()
    def _count(self, path_BT: Tensor) -> None:
        taken_BTN = members(path_BT, self.num_experts)
        counts_RN = taken_BTN.sum(0) if len(self.counts) > 1 else taken_BTN.sum((0, 1)).unsqueeze(0)
        self.counts += counts_RN
        total_R1 = counts_RN.sum(1, keepdim=True)
        share_RN = torch.where(total_R1 > 0, counts_RN / total_R1.clamp_min(1), self.load)
        self.load.lerp_(share_RN, 1 - LOAD_DECAY)

    def _row(self, step: int) -> int:
        """The row of `balance_bias` and `load` that a step belongs to."""
        return step if len(self.load) > 1 else 0

    def _done(self) -> float:
        """The share of the training that is done, without asking the device at every step."""
        if self._known_progress is None:
            self._known_progress = float(self.progress)
        return self._known_progress

    def _forget_progress(self, *_: Any) -> None:
        self._known_progress = None

    def train(self, mode: bool = True) -> Self:
        if not mode:  # a moving average of models is given the buffer of another
            self._forget_progress()
        return super().train(mode)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        self.progress.fill_(progress)
        self._known_progress = float(np.float32(progress))  # as a checkpoint keeps it
        rate = self.balance_bias_rate * self._balance_share()
        if self.router_mode == "gate" and rate:
            for bias_N, counts_N in zip(self.balance_bias, self.counts, strict=True):
                bias_N.copy_(balanced_bias(bias_N, counts_N, rate))
        self.counts.zero_()

    def _balance_share(self) -> float:
        """What is left of the balancing: it may fall to nothing over the first `balance_decay` of the training."""
        return max(0.0, 1 - self._done() / self.balance_decay) if self.balance_decay else 1.0

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Find the exit threshold on these batches, at full depth."""
        if self.halt != "confidence" or self.exit_threshold is not None:
            return
        self.eval()
        self._all_exits = True
        confidences, corrects = [], []
        for batch in batches:
            logits_of(self, batch)
            exits = self._trace.exits_BC
            # Where all paths of a batch end early, the last exit stands for those behind it.
            missing = self.max_path_len - self.min_path_len + 1 - len(exits)
            exits_XBC = torch.stack(exits + exits[-1:] * missing).float()
            confidences.append(exits_XBC.softmax(-1).amax(-1))
            corrects.append(exits_XBC.argmax(-1) == batch.labels)
        self._all_exits = False
        correct_XN = torch.cat(corrects, 1)
        self.threshold.fill_(calibrated_threshold(torch.cat(confidences, 1), correct_XN))
        self.full_depth_accuracy = float(correct_XN[-1].double().mean())

    def task_loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy; "confidence": mean over the exits; "ponder", once warmed up: weighed by their probability."""
        trace = self._trace
        if self.training and self.action_values is not None:
            trace.reward_B = self.reward(-F.cross_entropy(logits.detach().float(), labels, reduction="none"))
        pondering = self.halt == "ponder" and bool(trace.stop_B) and not self._warming_up()
        if not self.training or (self.halt != "confidence" and not pondering):
            return super().task_loss(logits, labels, label_smoothing)
        losses_XB = torch.stack(
            [F.cross_entropy(e, labels, label_smoothing=label_smoothing, reduction="none") for e in trace.exits_BC]
        )
        if self.halt == "confidence":
            return losses_XB.mean()
        return (exit_probabilities(torch.stack(trace.stop_B)) * losses_XB).sum(0).mean()

    def auxiliary_losses(self) -> dict[str, AuxiliaryLoss]:
        trace = self._trace
        losses = self._router_losses() if trace.logits_RA else {}
        if self.contrastive_loss_coef and trace.steps:
            delta_RD = torch.cat([step.delta_RD for step in trace.steps if step.delta_RD is not None])
            experts_R = torch.cat([step.experts_R for step in trace.steps])
            contrast = contrastive_loss(delta_RD, experts_R, self.num_experts)
            losses["contrastive_loss"] = AuxiliaryLoss(contrast, self.contrastive_loss_coef)
        edges = [step.edge_entropy for step in trace.steps if step.edge_entropy is not None]
        if edges:
            weight = self.edge_entropy_coef * self._done()
            losses["edge_entropy_loss"] = AuxiliaryLoss(torch.stack(edges).mean(), weight)
        if self.path_heads is not None and trace.pooled_BD is not None and trace.path_BT is not None:
            losses["path_heads_loss"] = AuxiliaryLoss(
                self._path_heads_loss(self.path_heads(trace.pooled_BD), trace.path_BT), self.path_heads_coef
            )
        if self.training and self.halt in ("ponder", "action") and trace.stop_B:
            losses |= self._halting_losses()
        if trace.decisions and trace.reward_B is not None:
            losses |= self._value_losses(trace.decisions, trace.reward_B)
        return losses

    def _router_losses(self) -> dict[str, AuxiliaryLoss]:
        logits_RA = torch.cat(self._trace.logits_RA)
        probabilities = [logits[:, :-1].softmax(-1) for logits in self._trace.logits_RA]
        if len(self.load) == 1:
            probabilities = [torch.cat(probabilities)]
        # Every step decides for some sample as long as the path goes on, so that list and rows agree.
        diversity = torch.stack(
            [
                balance_loss(load_N, p_RN) + mean_entropy_loss(p_RN)
                for load_N, p_RN in zip(self.load, probabilities, strict=False)
            ]
        ).mean()
        negative_entropy = -entropy(logits_RA.softmax(-1)).mean()
        annealed = self.router_entropy_coef * (1 - 0.9 * self._done())
        return {
            "diversity_loss": AuxiliaryLoss(diversity, self.diversity_loss_coef * self._balance_share()),
            "z_loss": AuxiliaryLoss(z_loss(logits_RA), self.z_loss_coef),
            "router_entropy_loss": AuxiliaryLoss(negative_entropy, annealed),
        }

    def _path_heads_loss(self, predicted_BX: Tensor, path_BT: Tensor) -> Tensor:
        """Cross-entropy of the path's length, 0..T, and squared error of its number of different experts."""
        lengths_B = (path_BT != STOPPED).sum(1)
        different_B = members(path_BT, self.num_experts).any(1).sum(1)
        error = F.mse_loss(predicted_BX[:, -1], different_B.to(predicted_BX.dtype))
        return F.cross_entropy(predicted_BX[:, :-1], lengths_B) + error

    def _halting_losses(self) -> dict[str, AuxiliaryLoss]:
        if self.halt == "action":
            length = self._expected_steps()
            # In the modes that learn from a reward, the price of a step is part of that reward.
            paid = 0.0 if self.router_mode in SAMPLED else self.path_penalty_coef
            return {"path_penalty": AuxiliaryLoss(length, paid)}
        pi_XB = exit_probabilities(torch.stack(self._trace.stop_B))
        on = 0.0 if self._warming_up() else 1.0
        kl = geometric_prior_kl(pi_XB, 1 / (self.max_path_len / 2 + 1))
        length = expected_length(pi_XB, self.min_path_len)
        return {
            "ponder_kl": AuxiliaryLoss(kl, on * self.ponder_kl_coef),
            "path_penalty": AuxiliaryLoss(length, on * self.path_penalty_coef),
        }

    def _expected_steps(self) -> Tensor:
        """E[length] = sum_t prod_{k<=t} (1 - p_stop,k), as far as the sampled paths went."""
        decided_TB = torch.stack([decision.decided_B for decision in self._trace.decisions])
        stop_TB = torch.stack([decision.view.own_BA.softmax(-1)[:, -1] for decision in self._trace.decisions])
        return ((1 - stop_TB * decided_TB).cumprod(0) * decided_TB).sum(0).mean()

    def _value_losses(self, decisions: list[_Decision], reward_B: Tensor) -> dict[str, AuxiliaryLoss]:
        """Action values by TD(lambda), or in "reinforce" the policy gradient with V as its baseline."""
        decided_TB = torch.stack([decision.decided_B for decision in decisions])
        action_TB = torch.stack([decision.action_B for decision in decisions])
        values_TBA = torch.stack(
            [decision.view.values_BA for decision in decisions if decision.view.values_BA is not None]
        )
        masked_TBA = torch.stack([decision.view.masked_BA for decision in decisions])
        if self.halt != "action":
            masked_TBA[..., -1] = True  # nobody stops in training: that value is never learned
        reinforced = self.router_mode == "reinforce"
        returns_TB = path_returns(
            decided_TB,
            decided_TB & (action_TB < self.num_experts),
            values_TBA.detach().masked_fill(masked_TBA, float("-inf")).amax(-1),
            reward_B,
            self.path_penalty_coef if self.router_mode in SAMPLED and self.halt != "ponder" else 0.0,
            self.discount + (self.discount_final - self.discount) * self._done(),
            1.0 if reinforced else TRACE_DECAY,
        )[decided_TB]
        taken_TB1 = action_TB.unsqueeze(-1)
        if not reinforced:
            predicted_R = values_TBA.gather(-1, taken_TB1).squeeze(-1)[decided_TB]
            return {"q_loss": AuxiliaryLoss(F.huber_loss(predicted_R, returns_TB), self.q_loss_coef)}
        baseline_R = torch.stack([d.view.state_value_B for d in decisions if d.view.state_value_B is not None])[
            decided_TB
        ]
        own_TBA = torch.stack([decision.view.own_BA for decision in decisions])
        competing_TBA = own_TBA if self.halt == "action" else own_TBA[..., :-1]
        log_probability_R = competing_TBA.log_softmax(-1).gather(-1, taken_TB1).squeeze(-1)[decided_TB]
        policy_loss = -(log_probability_R * (returns_TB - baseline_R).detach()).mean()
        return {
            "policy_loss": AuxiliaryLoss(policy_loss, self.q_loss_coef),
            "value_loss": AuxiliaryLoss((baseline_R - returns_TB).square().mean(), 0.5 * self.q_loss_coef),
        }

    def start_recording(self) -> None:
        self.record.clear()
        self._at_limit = torch.zeros(2, dtype=torch.long)

    def recorded_paths(self) -> NDArray[np.int64]:
        return self.record.paths()

    def recorded_probabilities(self) -> NDArray[np.float32] | None:
        return self.record.probabilities()

    def recorded_values(self) -> NDArray[np.float32] | None:
        return self.record.values()

    def get_model_specific_metrics(self) -> dict[str, Any]:
        metrics = self.record.metrics()
        if not metrics:
            return {}
        if self.router is None:
            metrics = {name: value for name, value in metrics.items() if name not in ("router_entropy", "step_entropy")}
        else:
            at_limit, total = self._at_limit.tolist()
            metrics["logits_at_limit_share"] = at_limit / max(total, 1)
        if self.halt == "confidence":
            metrics["exit_threshold"] = float(self.threshold)
            if self.full_depth_accuracy is not None:
                metrics["full_depth_val_acc"] = self.full_depth_accuracy
        return metrics

    def get_active_parameter_count(self) -> int:
        experts = sum(parameter.numel() for parameter in routed_parameters(self, "experts"))
        return self.get_parameter_count() - experts * max(0, self.num_experts - self.max_path_len) // self.num_experts

    def get_flops_per_sample(self, length: int) -> float:
        """For a path that goes on as long as it may."""
        limited = self.num_experts * self.max_visits if self.router is not None else self.max_path_len
        steps = min(self.max_path_len, limited)
        decisions = min(self.max_path_len, steps + 1)  # where visits end the path, one more finds nothing left to visit
        one_expert = block_flops(self.experts, self.embed_dim, length)
        one_expert += (len(self.experts.blocks) - 1) * 4.0 * length**2 * self.embed_dim
        one_expert += 2.0 * length * self.embed_dim  # the score of its adaptive gate
        weights = 0 if self.router is None else self.router.num_weights()
        if self.action_values is not None:
            weights += sum(m.weight.numel() for m in self.action_values.modules() if isinstance(m, nn.Linear))
        router = 2.0 * weights
        exits = 1 + max(0, decisions - self.min_path_len) * (self.halt == "confidence")
        return steps * one_expert + decisions * router + exits * 2.0 * self.head.linear.weight.numel()
