"""Graph-of-Experts: a router builds, per sample, a path through a pool of expert Transformers and decides when to stop.

This file is the walk. Each mechanism is a file in `layers/path/`, with its options, buffers, schedule and losses:
policy (what decides), choice (how an action is chosen), halting (when a path ends), balance (keeping experts in use),
value (learning from the reward) and terms (optional losses). Equations and their evidence: docs/GOE.md.

B batch  L length  D width  C classes  N experts  A = N + 1 actions (the last one stops)  T steps
F functions of a task with known paths
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from research_eval.datasets.token_data import Batch
from research_eval.layers.block import block_flops
from research_eval.layers.experts import ExpertPool, PoolSettings
from research_eval.layers.intervention import NOTHING
from research_eval.layers.losses import AuxiliaryLoss
from research_eval.layers.packing import Packing
from research_eval.layers.path.balance import Balance, BalanceSettings
from research_eval.layers.path.choice import ChoiceSettings
from research_eval.layers.path.halting import HaltingSettings
from research_eval.layers.path.older_names import accept_older_names
from research_eval.layers.path.policy import CONTROLS, GivenPaths, PolicySettings, policy_of, without
from research_eval.layers.path.report import PathReport
from research_eval.layers.path.terms import TermSettings, path_heads, term_losses
from research_eval.layers.path.value import ValueEstimate, ValueSettings
from research_eval.layers.path.walk import Choice, PathSettings, Walk
from research_eval.layers.routing import members
from research_eval.layers.settings import EncoderSettings
from research_eval.layers.stacked import one_pass
from research_eval.layers.text import ClassificationHead, TokenEmbedding, masked_mean
from research_eval.models.base_model import Outcome, ScheduledModel, joined_on_host, routed_parameters
from research_eval.registry import MODELS_MAP
from research_eval.routing.record import EvaluationRecorder
from research_eval.tasks.base import Task


@MODELS_MAP.register("goe_original")
class GoEOriginalClassifier(ScheduledModel):
    """One path per sample: h <- h + c (E_a(h) - h) for the chosen expert a, T times or until it stops.

    `router_mode` selects how a is chosen and how the task loss reaches the router (layers/path/choice.py). A `route`
    other than "learned" needs no router (layers/path/policy.py). `halt` selects when a path ends
    (layers/path/halting.py). `router_per_step` gives every step its own router and its own balance.
    Scan experts come last in the pool (docs/scan.md) and need `pool` "last". The details of an outcome are the `Walk`.
    """

    model_type = "goe_original"
    records_all = True
    tuned_options = (("optimizer_params.router_lr_mult", (0.2,)), ("model_params.dropout", (0.0, 0.3)))
    control_options = CONTROLS
    OPTION_ORDER = (  # order in JSON, and of the draws in sampled studies
        *("embed_dim", "num_total_experts", "expert_layers", "max_path_len", "min_path_len", "max_visits"),
        *("router_hidden_dim", "router_mode", "router_input", "router_per_step", "router_init", "route", "route_token"),
        *("gate_scale", "exploration", "halt", "exit_threshold", "gumbel_tau", "gumbel_tau_min"),
        *("balance_bias_rate", "balance_decay", "diversity_loss_coef", "z_loss_coef", "router_entropy_coef"),
        *("contrastive_loss_coef", "path_heads_coef", "path_penalty_coef", "ponder_kl_coef", "halt_warmup"),
        *("q_loss_coef", "q_logit_scale", "discount", "discount_final", "tie_experts", "num_scan_experts"),
        *("scan_nodes", "scan_walkers", "scan_edge_sets", "edge_entropy_coef"),
    )

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        experts: PoolSettings,
        path: PathSettings,
        policy: PolicySettings,
        choice: ChoiceSettings,
        halting: HaltingSettings,
        balance: BalanceSettings,
        value: ValueSettings,
        terms: TermSettings,
        encoder: EncoderSettings,
    ) -> None:
        super().__init__()
        self.padding_idx = padding_idx
        self.embed_dim = encoder.embed_dim
        self.num_experts = experts.num_total_experts
        self.path = path
        self.choice = choice.mode()
        self.halting = halting.rule(path)
        self.term_settings = terms
        self.embedding = TokenEmbedding.of(vocab_size, padding_idx, encoder)
        self.given = GivenPaths(policy, path, self.num_experts)
        self.policy = policy_of(policy, path, self.num_experts, vocab_size, encoder, self.choice, self.halting)
        self.value = ValueEstimate(
            value,
            self.choice,
            encoder.embed_dim,
            policy.router_hidden_dim or encoder.embed_dim,
            self.num_experts,
            path.max_path_len,
            has_router=self.policy.router is not None,
        )
        self.experts = ExpertPool.of(experts, encoder, gated=True, adaptive_gate=True)
        self.head = ClassificationHead(encoder.embed_dim, num_classes, encoder.dropout, encoder.pool)
        self.path_heads = path_heads(terms, encoder.embed_dim, path.max_path_len)
        rows = path.max_path_len if policy.router_per_step else 1  # a balance per router
        self.balance = Balance(balance, self.num_experts, rows, moves_bias=self.choice.uses_balance_bias)
        self.report = PathReport(EvaluationRecorder(self.num_experts, path.max_path_len, joined_on_host))
        self.register_load_state_dict_pre_hook(accept_older_names)  # type: ignore[no-untyped-call]

    def route(self, batch: Batch, all_exits: bool = False) -> Outcome:
        """One pass; with `all_exits` every sample takes the full path, and the outputs of every step are kept."""
        with one_pass(*self.experts.stacks):
            return self._walk(batch, all_exits)

    def _walk(self, batch: Batch, all_exits: bool) -> Outcome:
        ids_BL, packing = batch.input_ids, self.experts.packing(batch.attention_mask, batch.num_tokens)
        given_BT = self.given.of(batch.paths, self.intervention.path, ids_BL)
        h_BLD = self.embedding(ids_BL, batch.attention_mask)
        keep_BL = batch.attention_mask if packing.padded else None
        everyone_runs = given_BT is None and self._nothing_ends_a_path()
        walk = Walk.begin(h_BLD, self.num_experts, self.path.max_path_len, self.training, everyone_runs)
        keep_decisions = self.value.action_values is not None or self.halting.sampled  # only losses read them
        may_stop = self.training and self.halting.sampled
        if not self.training:
            self.report.begin_batch(len(h_BLD))
        for step in range(self.path.max_path_len):
            now = self.intervention.at(step)
            view = self.policy(h_BLD, keep_BL, ids_BL, walk, given_BT, step, self.value)
            view = without(view, now, self.num_experts)
            decided_B = walk.running_B
            if step >= self.path.min_path_len:
                head = partial(self.head, h_BLD, keep_BL)
                walk.keep_running(self.halting.continuing(view, head, walk, all_exits))
            bias_N = self.balance.bias_at(step)
            choice = self.choice(view, self.num_experts, bias_N, self.done(), self.training, may_stop).after(now)
            walk.decide(view.router, choice, keep_decisions)
            if not self.training:
                self.report.push(step, view.router, choice, walk, decided_B)
            if walk.is_over():  # for every sample of the batch
                break
            h_BLD = self._execute(h_BLD, packing, choice, walk)
            walk.advance(choice, step)
        if self.training:
            self.balance.count(walk.path_BT)  # read by `after_step`
        outputs_BC: Tensor = self.head(h_BLD, keep_BL)
        walk.exits.append(outputs_BC)  # full depth is the last exit
        if self.path_heads is not None:
            walk.pooled_BD = masked_mean(h_BLD.detach(), keep_BL)  # the heads do not change the states
        return Outcome(outputs_BC, walk)

    def _nothing_ends_a_path(self) -> bool:
        """Whether it is certain before the walk that no halting rule and no visit limit ends a path early."""
        visits_suffice = self.policy.router is None or self.path.max_path_len <= self.num_experts * self.path.max_visits
        may_halt = self.halting.has_exits or self.halting.decided_by_router
        return visits_suffice and not may_halt and self.intervention is NOTHING

    def _execute(self, h_BLD: Tensor, packing: Packing, choice: Choice, walk: Walk) -> Tensor:
        """The states after the step; samples that do not run keep theirs."""
        pooled = bool(self.term_settings.contrastive_loss_coef)
        if self.choice.executes_all and self.training and self.policy.router is not None:
            return self._execute_all(h_BLD, packing, choice, walk, pooled)
        action_B, strength_B = walk.executed(choice.action_B), choice.coefficient_B
        step = self.experts.step(h_BLD, packing, action_B, strength_B, walk.everyone_runs, pooled)
        walk.steps.append(step)
        return step.h_BLD

    def _execute_all(self, h_BLD: Tensor, packing: Packing, choice: Choice, walk: Walk, pooled: bool) -> Tensor:
        """h + sum_i y_i (E_i(h) - h). y is one-hot in value and has the gradient of the probabilities."""
        chosen_BN = members(choice.action_B, self.num_experts).long()
        weights_BN = chosen_BN + choice.probabilities_BN - choice.probabilities_BN.detach()
        after_BLD = h_BLD
        for expert, weight_B in enumerate(weights_BN.unbind(1)):
            action_B = walk.executed(torch.full_like(choice.action_B, expert))
            step = self.experts.step(h_BLD, packing, action_B, weight_B, pooled=pooled)
            walk.steps.append(step)
            after_BLD = after_BLD + (step.h_BLD - h_BLD)
        return after_BLD

    def task_loss_of(self, outcome: Outcome, labels_B: Tensor, task: Task, label_smoothing: float = 0.0) -> Tensor:
        """The task loss of the outputs, or of all exits with the weights of the halting rule."""
        walk: Walk = outcome.details
        if walk.training and self.value.action_values is not None:
            self.value.note_reward(walk, task.loss_per_sample(outcome.outputs.detach().float(), labels_B))
        return self.halting.task_loss(
            walk,
            outcome.outputs,
            self.done(),
            mean=lambda outputs: task.loss(outputs, labels_B, label_smoothing),
            per_sample=lambda outputs: task.loss_per_sample(outputs, labels_B, label_smoothing),
        )

    def terms_of(self, outcome: Outcome) -> dict[str, AuxiliaryLoss]:
        """The auxiliary terms of all mechanisms."""
        walk: Walk = outcome.details
        done, rewarded = self.done(), self.choice.learns_from_reward
        losses = self.balance.losses(walk, done) | term_losses(self.term_settings, self.path_heads, walk, done)
        losses |= self.halting.losses(walk, done, price_is_in_reward=rewarded)
        price = self.halting.step_price() if rewarded else 0.0  # otherwise it is a term of `halting`
        return losses | self.value.losses(walk, done, price, stops_by_action=self.halting.sampled)

    def scheduled_options(self) -> tuple[str, ...]:
        parts = (self.choice, self.halting, self.balance, self.value)
        edges = ["edge_entropy_coef"] if self.term_settings.edge_entropy_coef and self.experts.scans else []
        return (*(name for part in parts for name in part.scheduled_options()), *edges)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        self.balance.after_step(self.done())

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Let the halting rule adapt to these batches, with full paths."""
        if self.halting.calibrates():
            self.eval()
            self.halting.calibrate(batches, lambda batch: self.route(batch, all_exits=True).details.exits)

    def follow(self, mapping_TF: Tensor | None) -> bool:
        self.given.mapping_TF = mapping_TF  # None: free again
        return True

    def start_recording(self) -> None:
        self.report.clear()

    def recorder(self) -> EvaluationRecorder:
        return self.report.recorder

    def get_model_specific_metrics(self) -> dict[str, Any]:
        metrics = self.report.metrics(has_router=self.policy.router is not None)
        return metrics | self.halting.metrics() if metrics else {}

    def get_active_parameter_count(self) -> int:
        experts = sum(parameter.numel() for parameter in routed_parameters(self, "experts"))
        idle = max(0, self.num_experts - self.path.max_path_len)  # a step uses one expert
        return self.get_parameter_count() - experts * idle // self.num_experts

    def get_flops_per_sample(self, length: int) -> float:
        """FLOPs of the longest possible path."""
        router, path = self.policy.router, self.path
        steps = path.max_path_len if router is None else min(path.max_path_len, self.num_experts * path.max_visits)
        decisions = min(path.max_path_len, steps + 1)  # the visit limit ends a path at one more decision
        one_expert = block_flops(self.experts, self.embed_dim, length)
        one_expert += (len(self.experts.blocks) - 1) * 4.0 * length**2 * self.embed_dim
        one_expert += 2.0 * length * self.embed_dim  # the score of its adaptive gate
        weights = (0 if router is None else router.num_weights()) + self.value.num_weights()
        exits = 1 + max(0, decisions - path.min_path_len) * self.halting.scores_exits
        return steps * one_expert + decisions * 2.0 * weights + exits * 2.0 * self.head.linear.weight.numel()
