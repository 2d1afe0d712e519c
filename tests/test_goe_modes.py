"""The routing modes, routes and halting rules of `goe_original`.

The pitfalls of docs/GOE.md and where each is tested; "models" is test_models.py. The pool of
experts alone is tested in test_layers.py:

 1, 2  test_the_task_loss_teaches_the_router_in_three_modes
    3  test_padding_changes_nothing (models)
    4  test_empty_and_one_token_samples_are_finite (models)
    5  test_a_sample_does_not_notice_its_batch (models), test_a_path_through_the_pool_is_every_sample_alone
 6, 7  test_visits_are_limited_and_then_the_path_ends
    8  test_a_masked_action_changes_no_other
    9  test_a_path_ends_where_stopping_is_likelier_than_not
   10  test_a_priced_path_does_not_collapse
   11  test_evaluation_repeats_and_leaves_no_trace (models), test_an_evaluated_loss_moves_no_statistics
   12  test_a_collapsed_router_recovers (models)
   13  test_every_term_shapes_its_own_part
   14  test_the_price_of_a_step_reaches_the_policy
   15  test_action_values_learn_returns_by_pencil, test_returns.py
   16  test_finished_samples_play_no_part, test_only_decisions_count, test_a_stopped_sample_no_longer_counts (models)
   17  test_returns.py
18, 19  concern causal models; a classifier has none
   20  test_every_term_shapes_its_own_part
   21  test_an_idle_expert_only_decays, test_idle_experts_have_no_gradient_and_no_influence (models)
   22  test_a_cold_router_has_finite_gradients, test_the_share_of_limited_logits_is_counted
   23  test_any_length_works (models)
   24  test_the_shortest_path_is_kept
   25  test_the_next_step_after_a_checkpoint_is_the_same
   26  test_a_sure_router_goes_the_same_way_in_training

A = N + 1 actions  B batch  C classes  D width  F functions  L length  N experts  T steps of a path
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from support import (
    Build,
    below,
    evaluated,
    exactly,
    gradients,
    history,
    loss_of,
    repeatable,
    run_in,
    set_policy,
    small_config,
    stop_at,
    stop_biases,
    wake,
)
from torch.nn import functional as F
from torch.testing import assert_close

from research_eval import experiment
from research_eval.datasets.hop import HopDataset
from research_eval.datasets.token_data import Batch, Batches
from research_eval.errors import ConfigError
from research_eval.layers.dispatch import Dispatch, Execution, set_execution
from research_eval.layers.packing import Samples
from research_eval.layers.path.halting import ConfidenceExit, Halt
from research_eval.layers.path.policy import Route
from research_eval.layers.path.router import LOGIT_LIMIT, fixed_route
from research_eval.layers.path.walk import MASKED, Decision, RouterView, Walk
from research_eval.layers.routing import entropy
from research_eval.layers.text import sinusoids
from research_eval.models.base_model import AuxiliaryLoss, EvaluableModel, Outcome, logits_of
from research_eval.models.goe_original import GoEOriginalClassifier
from research_eval.registry import CHOICES
from research_eval.runs import scores
from research_eval.schema import OptimizerParams
from research_eval.training.optimizers import build_optimizer

MODES, HALTS, ROUTES = tuple(CHOICES), get_args(Halt), get_args(Route)
FIXED = [route for route in ROUTES if route != "learned"]
EXPLICIT = ("gate", "st", "st_dense")  # modes in which the task loss reaches the router

every_mode = pytest.mark.parametrize("mode", MODES)
every_halt = pytest.mark.parametrize("halt", HALTS)
stopping = pytest.mark.parametrize("halt", ["ponder", "action"])


def build(build_model: Build, mode: str, halt: str = "off", **arguments: Any) -> GoEOriginalClassifier:
    """Halting counts from the first step on."""
    model = build_model("goe_original", router_mode=mode, halt=halt, halt_warmup=0.0, **arguments)
    assert isinstance(model, GoEOriginalClassifier)
    return model


def train_forward(
    model: EvaluableModel, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> tuple[torch.Tensor, dict[str, AuxiliaryLoss]]:
    """Task loss and auxiliary terms of a pass in training mode, with the same draws each time."""
    torch.manual_seed(3)
    task = model.train().task_loss(model(ids_BL), labels_B)
    return task, model.auxiliary_losses()


def batch_of(ids_BL: torch.Tensor, labels_B: torch.Tensor, paths_BT: torch.Tensor | None = None) -> Batch:
    return Batch(ids_BL, ids_BL != 0, labels_B, paths_BT)


def threshold_of(model: EvaluableModel) -> torch.Tensor:
    """That of the rule "confidence"."""
    assert isinstance(model, GoEOriginalClassifier)
    assert isinstance(model.halting, ConfidenceExit)
    return model.halting.threshold


def value_losses(
    model: GoEOriginalClassifier, decisions: list[Decision], reward_B: torch.Tensor
) -> dict[str, AuxiliaryLoss]:
    """The terms of a pass of which only the decisions and the rewards are known."""
    walk = Walk.begin(torch.zeros(len(reward_B), 1, 1), model.num_experts, 3, training=True, everyone_runs=False)
    walk.decisions, walk.reward_B = decisions, reward_B
    return model.terms_of(Outcome(torch.empty(0), walk))


def executed_rows(model: GoEOriginalClassifier, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of samples each time the pool runs, without the spare rows of small experts."""
    set_execution(model, Execution("slices"))
    rows: list[int] = []
    change = model.experts._change

    def counted(h: torch.Tensor, samples: Samples, dispatch: Dispatch) -> torch.Tensor:
        rows.append(len(samples.keep_RL))
        return change(h, samples, dispatch)

    monkeypatch.setattr(model.experts, "_change", counted)
    return rows


# -------------------------------------------------------------------------------------------- the equations, one by one


def slow_logits(
    model: GoEOriginalClassifier, ids_BL: torch.Tensor, training: bool
) -> tuple[torch.Tensor, list[list[int]], torch.Tensor]:
    """A loop over samples and experts, from the equations. The noise is drawn as the model draws it."""
    router, values, features = model.policy.router, model.value.action_values, model.policy.features
    assert router is not None
    summary_weight_THS = router.summary.weight.view(model.path.max_path_len, -1, 2 * model.embed_dim)
    policy_weight_TAH = router.policy.weight.view(model.path.max_path_len, model.num_experts + 1, -1)
    summary_bias_TH, policy_bias_TA = (
        bias.view(model.path.max_path_len, -1) for bias in (router.summary.bias, router.policy.bias)
    )
    num_experts, rows, paths, policies = model.num_experts, [], [], []
    noise_TBN = torch.zeros(model.path.max_path_len, len(ids_BL), num_experts)
    if training and model.choice.settings.router_mode != "gate":
        for noise_BN in noise_TBN:
            noise_BN.copy_(-torch.empty_like(noise_BN).exponential_().log())
    for row, sample_L in enumerate(ids_BL):
        kept_1L = sample_L[sample_L != 0].unsqueeze(0)
        everything = torch.ones_like(kept_1L, dtype=torch.bool)
        h_LD, visits_N, path = model.embedding(kept_1L, everything)[0], torch.zeros(num_experts), []
        for step in range(model.path.max_path_len):
            read_LD = h_LD
            if features is not None and features.cursor:
                token = kept_1L[0, step] if step < kept_1L.shape[1] else None
                read_LD = torch.zeros(1, model.embed_dim) if token is None else features.table_VD[token].unsqueeze(0)
            elif features is not None:
                positions_LD = sinusoids(len(h_LD), model.embed_dim)
                read_LD = F.layer_norm(features.table_VD[kept_1L[0]] + positions_LD, (model.embed_dim,))
            summary = torch.cat([read_LD.mean(0), read_LD.amax(0)])
            if router.statistics is not None:
                deviation = router.statistics.variance_TS[step].sqrt() + 1e-3
                summary = (summary - router.statistics.mean_TS[step]) / deviation
            hidden = summary_weight_THS[step] @ summary + summary_bias_TH[step] + router.step_bias[step]
            hidden = F.gelu(hidden + router.visits.weight @ (visits_N / model.path.max_visits))
            logits_A = policy_weight_TAH[step] @ hidden + policy_bias_TA[step]
            if model.choice.settings.router_mode == "published":
                logits_A = logits_A + values.value_bias[:-1].detach()
                logits_A = F.layer_norm(logits_A, logits_A.shape, router.norm.weight, router.norm.bias, 1e-2)
            elif model.choice.settings.router_mode == "q":
                seen = F.gelu(values.summary.weight @ summary.detach() + values.summary.bias + values.step_bias[step])
                logits_A = logits_A + 3 * (values.output.weight @ seen + values.output.bias)[:-1].detach()
            logits_N = logits_A.clamp(-10, 10)[:-1]
            logits_N = torch.where(visits_N < model.path.max_visits, logits_N, torch.tensor(-1e9))
            policies.append(F.pad(logits_N.softmax(0), (0, 1)))
            tau = 1.0 if model.choice.settings.router_mode in ("gate", "reinforce", "q") else 0.7
            y_N = ((logits_N + noise_TBN[step, row]) / tau).softmax(0)
            chosen = int(y_N.argmax())
            hard_N = F.one_hot(torch.tensor(chosen), num_experts).float()
            coefficient_N = {
                "gate": 2 * y_N * hard_N,
                "st": hard_N * (1 + y_N - y_N.detach()),
                "st_dense": hard_N + y_N - y_N.detach() if training else hard_N * (1 + y_N - y_N.detach()),
            }.get(model.choice.settings.router_mode, hard_N)
            change_LD = torch.zeros_like(h_LD)
            for expert in range(num_experts):
                dispatch = Dispatch([int(e == expert) for e in range(num_experts)])
                image_LD = model.experts(h_LD.unsqueeze(0), everything, dispatch)[0]
                change_LD = change_LD + coefficient_N[expert] * (image_LD - h_LD)
            h_LD, visits_N = h_LD + change_LD, visits_N + hard_N
            path.append(chosen)
        rows.append(model.head(h_LD.unsqueeze(0), everything)[0])
        paths.append(path)
    return torch.stack(rows), paths, torch.stack(policies).view(len(rows), -1, num_experts + 1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("reads", ["state", "features", "cursor"])
@every_mode
def test_every_mode_is_its_equation(
    mode: str, reads: str, training: bool, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Logits, paths, probabilities, and the gradient of every parameter."""
    limits = {"num_total_experts": 3, "max_path_len": 2, "max_visits": 1}
    model = build(build_model, mode, router_input=reads, gumbel_tau=0.7, **limits)
    wake(model).train()(torch.randint(1, 13, (30, 6)))
    model.train(training)
    if mode == "published":
        torch.nn.init.normal_(model.value.action_values.value_bias)
    ids_BL, labels_B = ids_BL[:4], labels_B[:4]
    torch.manual_seed(4)
    fast_BC = model(ids_BL)
    torch.manual_seed(4)
    slow_BC, paths, policy_BTA = slow_logits(model, ids_BL, training)
    assert reads != "features" or len({tuple(path) for path in paths}) > 1
    assert_close(fast_BC, slow_BC, rtol=1e-5, atol=1e-5)
    if not training:
        assert model.recorded_paths().tolist() == paths
        assert_close(model.recorder().probabilities(), policy_BTA.detach().numpy(), rtol=1e-4, atol=1e-6)
    fast = gradients(F.cross_entropy(fast_BC, labels_B), model)
    slow = gradients(F.cross_entropy(slow_BC, labels_B), model)
    assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert any(gradient.any() for key, gradient in fast.items() if below(key, "router")) == (mode in EXPLICIT)


@every_halt
@every_mode
def test_experts_that_are_not_chosen_have_no_weight_and_no_gradient(
    mode: str, halt: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Exactly none, in training too, although "st_dense" executes them all."""
    model = wake(build(build_model, mode, halt, num_total_experts=12))
    loss_of(model.train(), ids_BL[4:], labels_B[4:])
    torch.manual_seed(5)
    model.balance.counts.zero_()
    logits_BC = model(ids_BL[4:])
    loss = model.task_loss(logits_BC, labels_B[4:]) + model.get_auxiliary_loss()
    idle_N = model.balance.counts.sum(0) == 0
    assert idle_N.any()
    for key, gradient in gradients(loss, model).items():
        if below(key, "experts"):
            assert not gradient[idle_N].any(), key
            assert gradient[~idle_N].any(), key
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if below(key, "experts"):
                parameter[idle_N] = 3.0
    torch.manual_seed(5)
    model.balance.counts.zero_()
    assert_close(model(ids_BL[4:]), logits_BC, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- who learns from what


@pytest.mark.parametrize("scale", [1.0, 2.0])
@every_halt
@every_mode
def test_the_task_loss_teaches_the_router_in_three_modes(
    mode: str, halt: str, scale: float, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Pitfalls 1 and 2: exactly nothing in the other modes, but for pondering, whose exits are the router's.

    The values of actions never learn from it. A scale of 1 would give nothing if the chosen probability were divided by
    the sum over the chosen.
    """
    model = wake(build(build_model, mode, halt, gate_scale=scale))
    found = gradients(train_forward(model, ids_BL, labels_B)[0], model)
    for key in ("policy.router.policy.weight", "policy.router.summary.weight"):
        assert bool(found[key].any()) == (mode in EXPLICIT or halt == "ponder"), key
    assert not any(gradient.any() for key, gradient in found.items() if below(key, "action_values"))
    assert found["embedding.token.weight"].any()


SHAPES = {
    "diversity_loss": "router",
    "z_loss": "router",
    "router_entropy_loss": "router",
    "policy_loss": "router",
    "q_loss": "action_values",
    "value_loss": "action_values",
    "path_heads_loss": "path_heads",
}


@every_halt
@every_mode
def test_every_term_shapes_its_own_part(
    mode: str, halt: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Pitfalls 13 and 20: balance, entropies, policy and values leave experts and embedding exactly alone."""
    model = wake(build(build_model, mode, halt, path_heads_coef=0.1, router_entropy_coef=0.1, path_penalty_coef=0.1))
    model.balance.load.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    _, terms = train_forward(model, ids_BL, labels_B)
    expected = {"diversity_loss", "z_loss", "router_entropy_loss", "path_heads_loss"}
    expected |= {"q": {"q_loss"}, "published": {"q_loss"}, "reinforce": {"policy_loss", "value_loss"}}.get(mode, set())
    expected |= {"ponder": {"ponder_kl", "path_penalty"}, "action": {"path_penalty"}}.get(halt, set())
    assert set(terms) == expected
    for name, term in terms.items():
        assert term.raw.isfinite(), name
        if name in SHAPES:
            for key, gradient in gradients(term.raw, model).items():
                mine = below(key, SHAPES[name])
                assert mine or not gradient.any(), (name, key)
                assert not mine or gradient.any(), (name, key)


@stopping
@every_mode
def test_the_price_of_a_step_reaches_the_policy(
    mode: str, halt: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Pitfall 14: and makes stopping likelier. It is asked once: modes with a reward have it there."""
    model = wake(build(build_model, mode, halt, path_penalty_coef=0.1))
    _, terms = train_forward(model, ids_BL, labels_B)
    found = gradients(terms["path_penalty"].raw, model)
    assert found["policy.router.policy.weight"].any()
    assert found["policy.router.policy.bias"].view(model.policy.router.num_copies, -1)[:, -1].sum() < 0
    in_reward = halt == "action" and mode in ("reinforce", "q")
    assert terms["path_penalty"].weight == (0.0 if in_reward else 0.1)


def test_the_expected_length_of_sampled_paths_by_pencil(
    build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """T = 3, the first step is certain: 1 + 1/2 + 1/4 as far as the sampled path went."""
    model = build(build_model, "gate", "action", max_visits=3, path_heads_coef=0.1)
    set_policy(model, [0.125] * 4 + [0.5])
    _, terms = train_forward(model, ids_BL, labels_B)
    went_B = (model.outcome.details.path_BT >= 0).sum(1)
    assert len(went_B.unique()) > 1
    expected = [sum(0.5**step for step in range(min(int(went) + 1, 3))) for went in went_B]
    assert_close(terms["path_penalty"].raw, torch.tensor(expected).mean())


def test_a_path_without_experts_left_is_sure_to_end(
    build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Two experts, one visit each. Before the second step 1/4 against 1/2: p_stop = 2/3; before the third it is 1."""
    limits = {"num_total_experts": 2, "max_visits": 1, "max_path_len": 4}
    model = build(build_model, "gate", "ponder", **limits)
    set_policy(model, [0.25, 0.25, 0.5])
    _, terms = train_forward(model, ids_BL, labels_B)
    assert_close(terms["path_penalty"].raw, torch.tensor(2 / 3 * 1 + 1 / 3 * 2))


def test_the_length_of_a_sampled_path_is_geometric(build_model: Build, ids_BL: torch.Tensor) -> None:
    """p_stop = 0.4 in every mode, asked before the second and the third step."""
    for mode in MODES:
        model = build(build_model, mode, "action", max_visits=3, path_heads_coef=0.1)
        set_policy(model, [0.15] * 4 + [0.4])
        model.train()(ids_BL[:, :2].repeat(100, 1))
        counts = (model.outcome.details.path_BT >= 0).sum(1).bincount(minlength=4)
        assert counts[0] == 0
        assert chisquare(counts[1:], 600 * np.array([0.4, 0.24, 0.36])).pvalue > 1e-4, mode


# ------------------------------------------------------------------------------------------------------- where paths go


@pytest.mark.parametrize("shortest", [1, 4])
@every_halt
@every_mode
def test_visits_are_limited_and_then_the_path_ends(
    mode: str, halt: str, shortest: int, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Pitfalls 6 and 7: with all experts used up and stopping forbidden the path still ends, without a NaN."""
    limits = {"num_total_experts": 2, "max_visits": 1, "max_path_len": 4, "min_path_len": shortest}
    model = build(build_model, mode, halt, path_heads_coef=0.1, **limits)
    set_policy(model, [0.94, 0.05, 0.01])
    for training in (False, True):
        model.train(training)
        loss = loss_of(model, ids_BL, labels_B)
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(loss, model).values())
        paths = model.outcome.details.path_BT.tolist()
        for path in paths:
            assert path in ([0, 1, -1, -1], [1, 0, -1, -1], [0, -1, -1, -1], [1, -1, -1, -1])
            assert path[1] >= 0 or (halt == "action" and training and shortest == 1)
        if training:
            counted = [sum(path.count(expert) for path in paths) for expert in range(2)]
            assert model.balance.counts.sum(0).tolist() == counted
        else:
            assert model.recorded_paths().tolist() == paths


def router_view(
    model: GoEOriginalClassifier, walk: Walk, visits_BN: torch.Tensor, h_BLD: torch.Tensor, ids_BL: torch.Tensor
) -> RouterView:
    """What the router says at the second step after these visits."""
    keep_BL = ids_BL != 0
    model.policy(h_BLD, keep_BL, ids_BL, walk, None, 0, model.value)
    walk.visits_BN = visits_BN
    view = model.policy(h_BLD, keep_BL, ids_BL, walk, None, 1, model.value).router
    assert isinstance(view, RouterView)
    return view


@every_halt
@every_mode
def test_a_masked_action_changes_no_other(mode: str, halt: str, build_model: Build, ids_BL: torch.Tensor) -> None:
    """Pitfall 8: the mask comes after the layer norm and the limits, and the entropy has a finite gradient."""
    model = wake(build(build_model, mode, halt, min_path_len=0))
    torch.nn.init.zeros_(model.policy.router.visits.weight)
    keep_BL = ids_BL != 0
    h_BLD = model.embedding(ids_BL, keep_BL)
    open_BN, spent_BN = torch.zeros(6, 4), torch.tensor([2.0, 0, 0, 0]).expand(6, 4)
    before, after = (
        router_view(model, Walk.begin(h_BLD, 4, 3, model.training, everyone_runs=False), visits_BN, h_BLD, ids_BL)
        for visits_BN in (open_BN, spent_BN)
    )
    assert torch.equal(before.logits_BA[:, 1:], after.logits_BA[:, 1:])
    assert (after.logits_BA[:, 0] == MASKED).all()
    assert (before.logits_BA[:, 0] > MASKED).all()
    assert (before.logits_BA[:, -1] > MASKED).all() == (halt in ("ponder", "action"))
    uncertainty = entropy(after.logits_BA.softmax(-1)).sum()
    assert uncertainty.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(uncertainty, model).values())


@stopping
@every_mode
def test_a_path_ends_where_stopping_is_likelier_than_not(
    mode: str, halt: str, build_model: Build, ids_BL: torch.Tensor
) -> None:
    """Pitfall 9: 0.3 is more than the 0.175 of any expert, and not enough."""
    model = build(build_model, mode, halt, max_visits=3).eval()
    for stop, length in ((0.3, 3), (0.49, 3), (0.51, 1)):
        set_policy(model, [(1 - stop) / 4] * 4 + [stop])
        _, paths = evaluated(model, ids_BL)
        assert {sum(expert >= 0 for expert in path) for path in paths} == {length}


@stopping
@every_mode
def test_the_shortest_path_is_kept(
    mode: str, halt: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Pitfall 24: however likely stopping is; and a path of no expert is the head of the embedding."""
    for shortest in (0, 1, 2):
        model = build(build_model, mode, halt, min_path_len=shortest, path_heads_coef=0.1)
        set_policy(model, [1e-8] * 4 + [1.0])
        logits_BC, paths = evaluated(model.eval(), ids_BL)
        assert {sum(expert >= 0 for expert in path) for path in paths} == {shortest}
        if shortest == 0:
            assert torch.equal(logits_BC, model.head(model.embedding(ids_BL, ids_BL != 0), ids_BL != 0))
        loss = loss_of(model.train(), ids_BL, labels_B)
        assert all(gradient.isfinite().all() for gradient in gradients(loss, model).values())
        lengths_B = (model.outcome.details.path_BT >= 0).sum(1)
        assert set(lengths_B.tolist()) == {shortest if halt == "action" else 3}


def test_a_priced_path_does_not_collapse() -> None:
    """Pitfall 10: pondered paths on a task of one and two hops still take more than one step after 300 steps."""
    dataset = HopDataset(num_samples=320, num_symbols=3, max_hops=2)
    batches = Batches(dataset.to_token_data(), 32, seed=0)
    model = GoEOriginalClassifier(
        vocab_size=dataset.vocab_size + 1, num_classes=3, embed_dim=16, num_heads=2, num_total_experts=2, max_visits=3,
        halt="ponder", path_penalty_coef=0.02, dropout=0.0,
    )  # fmt: skip
    optimizer = build_optimizer(model, OptimizerParams(lr=4e-3))
    for epoch in range(30):
        for number, batch in enumerate(batches.epoch(epoch)):
            loss = model.train().task_loss(logits_of(model, batch), batch.labels) + model.get_auxiliary_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.after_step((epoch * 10 + number + 1) / 300)
    model.eval().start_recording()
    for batch in batches.epoch(0):
        logits_of(model, batch)
    assert model.get_model_specific_metrics()["mean_path_length"] > 1


@every_mode
def test_a_sure_router_goes_the_same_way_in_training(mode: str, build_model: Build, ids_BL: torch.Tensor) -> None:
    """Pitfall 26: noise decides near ties alone, and no coefficient has another value in training.

    "gate" has no noise: there, without dropout, training and evaluation agree whatever the router says.
    """
    model = build(build_model, mode, gumbel_tau=0.3, max_path_len=2)
    if mode == "gate":
        wake(model)
    else:
        set_policy(model, [1e-4, 1.0, 1e-4, 1e-4, 1e-4])
        with torch.no_grad():
            model.policy.router.policy.bias.mul_(10 / math.log(1e4))  # a lead of 10 over the others
    training_BC = model.train()(ids_BL)
    evaluated_BC, paths = evaluated(model.eval(), ids_BL)
    assert (len({tuple(path) for path in paths}) > 1) == (mode == "gate")
    assert_close(training_BC, evaluated_BC, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------- rewards and values


def hand_built(halted: bool) -> tuple[list[Decision], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two experts, three steps. Sample 0 takes experts 0, 1, 0; sample 1 takes expert 1, stops, and is done.

    Returns the decisions and their leaves: values [T, B, A], state values [T, B], logits [T, B, A].
    """
    values_TBA = torch.tensor(
        [
            [[0.2, 0.1, 0.0], [0.7, 0.5, 0.0]],
            [[50.0, 0.4, 0.3], [0.3, -1.0, 0.2]],  # expert 0 has been visited by sample 0
            [[0.6, 50.0, 0.1], [7.0, 7.0, 7.0]],  # and now expert 1; sample 1 is done
        ],
        requires_grad=True,
    )
    masked_TBA = torch.zeros(3, 2, 3, dtype=torch.bool)
    masked_TBA[1, 0, 0] = masked_TBA[2, 0, 1] = True
    masked_TBA[..., 2] |= not halted
    states_TB = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 7.0]], requires_grad=True)
    logits_TBA = torch.randn(3, 2, 3).masked_fill(masked_TBA, MASKED).requires_grad_()
    decided_TB = torch.tensor([[True, True], [True, True], [True, False]])
    action_TB = torch.tensor([[0, 1], [1, 2], [0, 0]])
    decisions = [
        Decision(decided_TB[t], action_TB[t], view)
        for t, view in enumerate(
            RouterView(masked_TBA[t, :, :2], masked_TBA[t], logits_TBA[t], logits_TBA[t], values_TBA[t], states_TB[t])
            for t in range(3)
        )
    ]
    return decisions, values_TBA, states_TB, logits_TBA


TAKEN = [(0, 0, 0), (1, 0, 1), (2, 0, 0), (0, 1, 1), (1, 1, 2)]  # step, sample, action
PRICED = {"path_penalty_coef": 0.1, "discount": 0.5, "discount_final": 0.5}


def test_action_values_learn_returns_by_pencil(build_model: Build) -> None:
    """Pitfall 15. Price 0.1, discount 1/2, lambda 0.8; rewards 1 and -2.

    Masked values of 50 play no part, the last decisions get the reward alone, and only Q(s_t, a_t) has a gradient.
    """
    model = build(build_model, "q", "action", num_total_experts=2, **PRICED)
    decisions, values_TBA, _, logits_TBA = hand_built(halted=True)
    loss = value_losses(model, decisions, torch.tensor([1.0, -2.0]))["q_loss"].raw
    last = -0.1 + 1.0
    second = -0.1 + 0.5 * (0.2 * 0.6 + 0.8 * last)
    first = -0.1 + 0.5 * (0.2 * 0.4 + 0.8 * second)
    returns = [first, second, last, -0.1 + 0.5 * (0.2 * 0.3 + 0.8 * -2.0), -2.0]
    errors = [float(values_TBA.detach()[place]) - expected for place, expected in zip(TAKEN, returns, strict=True)]
    huber = [error**2 / 2 if abs(error) < 1 else abs(error) - 0.5 for error in errors]
    assert_close(loss.detach(), torch.tensor(sum(huber) / 5))
    gradient_TBA, of_logits = torch.autograd.grad(loss, [values_TBA, logits_TBA], allow_unused=True)
    expected_TBA = torch.zeros(3, 2, 3)
    for place, error in zip(TAKEN, errors, strict=True):
        expected_TBA[place] = max(-1.0, min(1.0, error)) / 5
    assert_close(gradient_TBA, expected_TBA)
    assert of_logits is None


@pytest.mark.parametrize("halt", ["off", "action"])
def test_the_policy_gradient_by_pencil(halt: str, build_model: Build) -> None:
    """-mean log p(a) (G - V) and half of mean (V - G)^2 with Monte Carlo returns; neither moves the other's part."""
    model = build(build_model, "reinforce", halt, num_total_experts=2, **PRICED)
    decisions, values_TBA, states_TB, logits_TBA = hand_built(halted=halt == "action")
    taken = TAKEN
    if halt == "off":  # nobody stops: sample 1 ends by a second expert
        decisions[1] = decisions[1]._replace(action_B=torch.tensor([1, 0]))
        taken = [*TAKEN[:-1], (1, 1, 0)]
    terms = value_losses(model, decisions, torch.tensor([1.0, -2.0]))
    end = -2.0 - 0.1 * (halt == "off")
    returns = [-0.1 + 0.5 * (-0.1 + 0.5 * 0.9), -0.1 + 0.5 * 0.9, 0.9, -0.1 + 0.5 * end, end]
    shares_TBA = logits_TBA.detach().softmax(-1)
    policy, value = 0.0, 0.0
    expected_TBA, expected_TB = torch.zeros(3, 2, 3), torch.zeros(3, 2)
    for (step, sample, action), expected in zip(taken, returns, strict=True):
        advantage = expected - float(states_TB.detach()[step, sample])
        policy -= math.log(shares_TBA[step, sample, action]) * advantage / 5
        value += advantage**2 / 5
        hard_A = F.one_hot(torch.tensor(action), 3)
        expected_TBA[step, sample] = (shares_TBA[step, sample] - hard_A) * advantage / 5
        expected_TB[step, sample] = -2 * advantage / 5
    assert_close(terms["policy_loss"].raw.detach(), torch.tensor(policy))
    assert_close(terms["value_loss"].raw.detach(), torch.tensor(value))
    assert terms["value_loss"].weight == terms["policy_loss"].weight / 2
    leaves = [logits_TBA, states_TB, values_TBA]
    of_policy = torch.autograd.grad(terms["policy_loss"].raw, leaves, allow_unused=True)
    of_value = torch.autograd.grad(terms["value_loss"].raw, leaves, allow_unused=True)
    assert_close(of_policy[0], expected_TBA)
    assert_close(of_value[1], expected_TB)
    assert of_policy[1:] == of_value[::2] == (None, None)


@pytest.mark.parametrize("mode", ["reinforce", "q"])
def test_finished_samples_play_no_part(mode: str, build_model: Build) -> None:
    """Pitfall 16: whatever the router says about a sample that is done."""
    model = build(build_model, mode, "action", num_total_experts=2, **PRICED)
    losses = []
    for noise in (0.0, 100.0):
        torch.manual_seed(0)
        decisions, *leaves = hand_built(halted=True)
        with torch.no_grad():
            for leaf in leaves:
                leaf[2, 1] += noise
        terms = value_losses(model, decisions, torch.tensor([1.0, -2.0]))
        losses.append({name: float(term.raw.detach()) for name, term in terms.items()})
    assert losses[0] == losses[1]


@every_halt
@every_mode
def test_only_decisions_count(
    mode: str, halt: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Pitfall 16: entropies, balance and z-loss see a sample once per step it ran, and once more where it stopped."""
    model = build(build_model, mode, halt, max_visits=3, path_heads_coef=0.1)
    set_policy(model, [0.15] * 4 + [0.4])
    train_forward(model, ids_BL.repeat(5, 1), labels_B.repeat(5))
    lengths_B = (model.outcome.details.path_BT >= 0).sum(1)
    assert (len(lengths_B.unique()) > 1) == (halt == "action")
    decisions = int((lengths_B + (lengths_B < 3)).sum())
    assert len(torch.cat(model.outcome.details.logits)) == decisions
    assert sum(int(decision.decided_B.sum()) for decision in model.outcome.details.decisions) in (0, decisions)


@every_mode
def test_an_evaluated_loss_moves_no_statistics(
    mode: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Pitfalls 11 and 17: the running reward above all."""
    model = wake(build(build_model, mode))
    loss_of(model.train(), ids_BL, labels_B)
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    loss_of(model.eval(), ids_BL, labels_B)
    assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    loss_of(model.train(), ids_BL, labels_B.flip(0))
    moved = {key for key, buffer in model.named_buffers() if not torch.equal(buffer, before[key])}
    assert ("value.reward.mean" in moved) == (mode in ("reinforce", "q", "published"))
    assert "balance.load" in moved


def test_the_discount_rises_over_the_training(build_model: Build) -> None:
    """Three decisions of a sample with reward 1 and no price are worth it discounted twice, once and not at all."""
    model = build(build_model, "reinforce", "action", discount=0.2, discount_final=0.8)
    for progress, discount in ((0.0, 0.2), (0.5, 0.5), (1.0, 0.8)):
        model.after_step(progress)
        decisions, _, states_TB, _ = hand_built(halted=True)
        with torch.no_grad():
            states_TB.zero_()
        first_alone = [decision._replace(decided_B=torch.tensor([True, False])) for decision in decisions]
        loss = value_losses(model, first_alone, torch.tensor([1.0, 0.0]))["value_loss"].raw
        assert_close(loss.detach(), torch.tensor((1 + discount**2 + discount**4) / 3))


# ------------------------------------------------------------------------------------------------ numbers at the limits


@every_mode
def test_an_idle_expert_only_decays(
    mode: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Pitfall 21: AdamW takes the weight decay off its matrices and moves nothing else."""
    model = build(build_model, mode, num_total_experts=3, max_visits=3)
    set_policy(model, [0.999, 1e-9, 1e-9, 1e-9])
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerParams(lr=1e-3, weight_decay=0.5))
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model.train(), ids_BL, labels_B).backward()
        optimizer.step()
    assert model.balance.counts.sum(0)[1:].tolist() == [0, 0]
    decays = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all()
        if below(key, "experts"):
            kept = (1 - 1e-3 * decays[id(parameter)]) ** 4
            assert_close(parameter[1:].detach(), kept * before[key][1:], rtol=1e-5, atol=1e-7)
            assert not torch.equal(parameter[0], before[key][0])
    assert 0.5 in decays.values()


@every_halt
@pytest.mark.parametrize("mode", ["st", "st_dense", "published"])
def test_a_cold_router_has_finite_gradients(
    mode: str, halt: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Pitfall 22."""
    model = wake(build(build_model, mode, halt, gumbel_tau=0.01, gumbel_tau_min=0.01)).train()
    found = gradients(loss_of(model, ids_BL, labels_B), model)
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize(
    ("mode", "halt", "share"),
    # Two of four experts are at the limit. From the second step on stopping, which is not, competes: 4 + 5 + 5 logits.
    [("gate", "off", 1 / 2), ("st", "off", 1 / 2), ("reinforce", "confidence", 1 / 2), ("q", "ponder", 6 / 14)],
)
def test_the_share_of_limited_logits_is_counted(
    mode: str, halt: str, share: float, build_model: Build, ids_BL: torch.Tensor
) -> None:
    """Pitfall 22: masked logits are neither limited nor counted."""
    model = build(build_model, mode, halt, max_visits=3).eval()
    set_policy(model, [1.0] * 5)
    with torch.no_grad():
        bias_A = torch.tensor([1.2, -1.7, 0.3, 0.1, -0.2]) * LOGIT_LIMIT
        model.policy.router.policy.bias.copy_(bias_A.repeat(model.policy.router.num_copies))
    evaluated(model, ids_BL)
    assert model.get_model_specific_metrics()["logits_at_limit_share"] == pytest.approx(share)
    model.start_recording()
    assert model.get_model_specific_metrics() == {}  # nothing is recorded


@every_halt
@every_mode
def test_the_next_step_after_a_checkpoint_is_the_same(
    mode: str, halt: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Pitfall 25: temperature, discount, running reward, load, bias and exit threshold are part of the state."""
    arguments = {"path_penalty_coef": 0.1, "router_entropy_coef": 0.1, "balance_bias_rate": 0.3}
    model = wake(build(build_model, mode, halt, **arguments)).train()
    optimizer = build_optimizer(model, OptimizerParams())
    for step in range(2):
        loss_of(model, ids_BL, labels_B).backward()
        optimizer.step()
        model.after_step((step + 1) / 4)
    model.calibrate([batch_of(ids_BL, labels_B)])
    copy = build(build_model, mode, halt, **arguments)
    if halt == "confidence":
        assert float(threshold_of(model)) != float(threshold_of(copy))
    copy.load_state_dict(model.state_dict())
    assert_close(evaluated(model.eval(), ids_BL), evaluated(copy.eval(), ids_BL), rtol=0, atol=0)
    losses = []
    for each in (model, copy):
        torch.manual_seed(5)
        losses.append(loss_of(each.train(), ids_BL, labels_B).detach())
        each.after_step(0.75)
    assert torch.equal(losses[0], losses[1])
    assert_close(dict(copy.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)
    kept = {"progress", "balance.load", "value.reward.mean", "balance.bias"}
    assert kept | ({"halting.threshold"} if halt == "confidence" else set()) <= set(model.state_dict())


# --------------------------------------------------------------------------------------------------------- fixed routes


@pytest.mark.parametrize("mode", ["gate", "st_dense"])
@pytest.mark.parametrize("route", FIXED)
def test_a_fixed_route_has_no_router(
    route: str, mode: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """No parameter, no term, and c = 1: h <- E_a(h). Visits are not limited."""
    model = build(build_model, mode, route=route, max_visits=1, max_path_len=2)
    assert not any(below(key, "router") or below(key, "action_values") for key, _ in model.named_parameters())
    batch = batch_of(ids_BL, labels_B, torch.tensor([[1, 1], [3, 0], [2, -1], [-1, -1], [0, 1], [3, 3]]))
    assert_close(model.train().task_loss(logits_of(model, batch), labels_B).isfinite(), torch.tensor(True))
    assert model.auxiliary_losses() == {}
    model.eval().start_recording()
    logits_BC = logits_of(model, batch)
    paths = model.recorded_paths().tolist()
    assert "logits_at_limit_share" not in model.get_model_specific_metrics()
    for row, path in enumerate(paths):
        kept_1L = ids_BL[row : row + 1, : int((ids_BL[row] != 0).sum())]
        everything = torch.ones_like(kept_1L, dtype=torch.bool)
        h_1LD = model.embedding(kept_1L, everything)
        for expert in path:
            if expert >= 0:
                sizes = [int(e == expert) for e in range(4)]
                h_1LD = model.experts(h_1LD, everything, Dispatch(sizes))
        assert_close(model.head(h_1LD, everything)[0], logits_BC[row], rtol=1e-5, atol=1e-5)
    if route == "oracle":
        assert paths == batch.paths.tolist()


@pytest.mark.parametrize("position", [0, 2, 5, 9])
def test_the_token_route_is_a_token_modulo_the_experts(position: int, build_model: Build, ids_BL: torch.Tensor) -> None:
    """The same expert at every step; 0 for a sample that ends before, however far its batch is padded."""
    model = build_model("goe_original", route="token", route_token=position).eval()
    ids_BL[ids_BL % 4 == 0] -= ids_BL[ids_BL % 4 == 0].sign()  # so that no token leads where a missing one does
    lists = [[int(token) for token in sample_L if token] for sample_L in ids_BL]
    expected = [[sample[position] % 4 if position < len(sample) else 0] * 3 for sample in lists]
    for padding in (0, 1, 6):
        assert evaluated(model, F.pad(ids_BL, (0, padding)))[1] == expected


def test_a_hash_route_spreads_inputs_and_steps() -> None:
    """All 1728 inputs of three tokens: even at each step, independent between steps, and of what is not the input."""
    ids_BL = torch.cartesian_prod(*[torch.arange(1, 13)] * 3)
    for route in ("hash", "random"):
        steps = [fixed_route(route, ids_BL, 0, step, 4, fresh=False) for step in range(3)]
        for chosen_B in steps:
            assert chisquare(chosen_B.bincount(minlength=4)).pvalue > 1e-3
        for one_B, next_B in pairwise(steps):
            assert chisquare((4 * one_B + next_B).bincount(minlength=16)).pvalue > 1e-3
        padded_BL = F.pad(ids_BL, (0, 4))
        assert torch.equal(fixed_route(route, padded_BL[:7], 0, 1, 4, fresh=False), steps[1][:7])
    other_B = fixed_route("hash", ids_BL, 0, 0, 4, fresh=False) * 4 + fixed_route(
        "random", ids_BL, 0, 0, 4, fresh=False
    )
    assert chisquare(other_B.bincount(minlength=16)).pvalue > 1e-3
    reversed_B = fixed_route("hash", ids_BL.flip(1), 0, 0, 4, fresh=False)
    pairs = 4 * fixed_route("hash", ids_BL, 0, 0, 4, fresh=False) + reversed_B
    distinct = ids_BL[:, 0] != ids_BL[:, 2]
    assert chisquare(pairs[distinct].bincount(minlength=16)).pvalue > 1e-4  # the order of tokens counts


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.lists(st.integers(1, 2**31), min_size=1, max_size=6),
    num_experts=st.integers(1, 9),
    step=st.integers(0, 5),
    padding=st.integers(0, 5),
)
def test_a_hash_route_is_one_of_the_experts(tokens: list[int], num_experts: int, step: int, padding: int) -> None:
    ids_BL = torch.tensor([tokens, tokens])
    chosen_B = fixed_route("hash", F.pad(ids_BL, (0, padding)), 0, step, num_experts, fresh=False)
    assert torch.equal(chosen_B, fixed_route("hash", ids_BL, 0, step, num_experts, fresh=True))
    assert 0 <= int(chosen_B[0]) == int(chosen_B[1]) < num_experts


def test_a_random_route_is_fresh_in_training_and_repeats_in_evaluation(
    build_model: Build, ids_BL: torch.Tensor
) -> None:
    model = build_model("goe_original", route="random", path_heads_coef=0.1)
    first, second = evaluated(model.eval(), ids_BL), evaluated(model, ids_BL)
    assert first[1] == second[1]
    many_BL = ids_BL.repeat(50, 1)
    model.train()(many_BL)
    one_BT = model.outcome.details.path_BT
    model(many_BL)
    two_BT = model.outcome.details.path_BT
    for path_BT in (one_BT, two_BT):
        assert chisquare(path_BT.flatten().bincount(minlength=4)).pvalue > 1e-4
    assert 0.15 < float((one_BT == two_BT).float().mean()) < 0.35


def test_an_oracle_needs_paths_that_fit(build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor) -> None:
    model = build_model("goe_original", route="oracle", max_path_len=2).eval()
    for paths_BT, message in (
        (None, "needs a task that knows the right path"),
        (torch.zeros(6, 3, dtype=torch.long), "max_path_len=2: the task's paths have 3 steps"),
        (torch.full((6, 2), 4), "num_total_experts=4: the task's paths have an expert 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.route(batch_of(ids_BL, labels_B, paths_BT))
    with pytest.raises(ConfigError, match="needs a task that knows the right path"):
        model(ids_BL)
    model.start_recording()
    model.route(batch_of(ids_BL, labels_B, torch.full((6, 1), 3)))  # shorter paths end there
    assert model.recorded_paths().tolist() == [[3, -1]] * 6


@every_mode
def test_a_model_follows_given_paths_and_then_its_router_again(
    mode: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Function f of step t goes to expert mapping[t, f], whatever the limit of visits and the router's wish to stop."""
    model = wake(build(build_model, mode, "ponder", max_visits=1))
    with torch.no_grad():
        stop_biases(model).add_(20)
    own = evaluated(model, ids_BL)
    assert any(-1 in path for path in own[1])
    functions_BT = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 1, -1], [1, -1, -1], [0, 0, 1], [-1, -1, -1]])
    mapping_TF = torch.tensor([[3, 2], [3, 1], [3, 0]])
    expected = [[3, 3, 3], [2, 1, 0], [3, 1, -1], [2, -1, -1], [3, 3, 0], [-1, -1, -1]]
    batch = batch_of(ids_BL, labels_B, functions_BT)
    model.follow(mapping_TF)
    model.start_recording()
    logits_BC = logits_of(model, batch)
    assert model.recorded_paths().tolist() == expected
    keep_BL = ids_BL != 0
    h_BLD = model.embedding(ids_BL, keep_BL)
    assert_close(logits_BC[5], model.head(h_BLD, keep_BL)[5], rtol=1e-5, atol=1e-5)
    if mode != "gate":  # c = 1
        image_BLD = model.experts(h_BLD[3:4], keep_BL[3:4], Dispatch([0, 0, 1, 0]))
        assert_close(logits_BC[3:4], model.head(image_BLD, keep_BL[3:4]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="knows the right path"):
        logits_of(model, batch._replace(paths=None))
    model.follow(None)
    again = evaluated(model, ids_BL)
    assert again[1] == own[1]
    assert torch.equal(again[0], own[0])


@every_halt
@pytest.mark.parametrize("visits", [1, 3])
@pytest.mark.parametrize(("route", "mode"), [("learned", mode) for mode in MODES] + [("hash", "gate")])
def test_its_own_recorded_path_gives_its_own_prediction(
    route: str, mode: str, visits: int, halt: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """To the bit, also where the balance bias overturns the likeliest expert, and where visits or halting end paths."""
    if route == "hash" and halt in ("ponder", "action"):
        pytest.skip("a route without a router cannot decide about stopping")
    many_BL, labels_B = ids_BL.repeat(8, 1).flip(0), labels_B.repeat(8)
    many_BL = torch.where(many_BL != 0, 1 + (many_BL + torch.arange(len(many_BL)).unsqueeze(1)) % 12, 0)
    model = wake(build(build_model, mode, halt, route=route, max_visits=visits))
    if route == "learned":
        with torch.no_grad():
            model.balance.bias.copy_(torch.randn_like(model.balance.bias))
            if halt in ("ponder", "action"):
                stop_biases(model).add_(2.0)
    if halt == "confidence":
        threshold_of(model).fill_(0.4)
    model.eval().start_recording()
    own_BC = logits_of(model, batch_of(many_BL, labels_B))
    paths_BT = torch.from_numpy(model.recorded_paths())
    assert len(paths_BT.unique(dim=0)) > 3
    model.follow(torch.arange(model.num_experts).expand(paths_BT.shape[1], -1))
    model.start_recording()
    forced_BC = logits_of(model, batch_of(many_BL, labels_B, paths_BT))
    assert torch.equal(torch.from_numpy(model.recorded_paths()), paths_BT)
    assert torch.equal(forced_BC, own_BC)


# ------------------------------------------------------------------------------------------------------ confident exits


def all_exits(model: GoEOriginalClassifier, ids_BL: torch.Tensor) -> torch.Tensor:
    """Class scores behind min_path_len..T steps, each from a model that is just so deep, [X, B, C]."""
    exits = []
    for steps in range(model.path.min_path_len, model.path.max_path_len + 1):
        with exactly(model, steps):
            torch.manual_seed(3)
            exits.append(model(ids_BL))
    model.start_recording()
    return torch.stack(exits)


@pytest.mark.parametrize("shortest", [0, 1, 3])
@every_mode
def test_confident_training_is_the_mean_over_all_exits(
    mode: str, shortest: int, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    model = wake(build(build_model, mode, "confidence", min_path_len=shortest)).train()
    exits_XBC = all_exits(model, ids_BL)
    assert len(exits_XBC) == 4 - shortest
    torch.manual_seed(3)
    loss = model.task_loss(model(ids_BL), labels_B)
    assert_close(loss, torch.stack([F.cross_entropy(exit_BC, labels_B) for exit_BC in exits_XBC]).mean())
    smooth = model.task_loss(model.outcome.details.exits[-1], labels_B, label_smoothing=0.2)
    smooth_losses = [F.cross_entropy(exit_BC, labels_B, label_smoothing=0.2) for exit_BC in exits_XBC]
    assert_close(smooth, torch.stack(smooth_losses).mean())


@pytest.mark.parametrize("route", ["learned", "hash"])
@every_mode
def test_a_confident_sample_leaves_and_is_no_longer_computed(
    mode: str, route: str, build_model: Build, ids_BL: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its first exit above the threshold, with the scores it has there; behind that no expert sees it."""
    model = wake(build(build_model, mode, "confidence", route=route))
    exits_XBC = all_exits(model, ids_BL)
    confidence_XB = exits_XBC.softmax(-1).amax(-1).detach()
    rows = executed_rows(model, monkeypatch)
    for threshold in (0.0, float(confidence_XB[:2].median()), float(confidence_XB.max()), 1.0):
        threshold_of(model).fill_(threshold)
        rows.clear()
        logits_BC, paths = evaluated(model, ids_BL)
        lengths = [sum(expert >= 0 for expert in path) for path in paths]
        for sample in range(6):
            leaves = [x for x in range(2) if float(confidence_XB[x, sample]) > threshold]
            first = min([*leaves, 2])
            assert lengths[sample] == first + 1
            assert_close(logits_BC[sample], exits_XBC[first, sample].detach(), rtol=1e-5, atol=1e-6)
        assert sum(rows) == sum(lengths)
    assert set(lengths) == {3}


def test_the_threshold_is_calibrated_at_full_depth(
    build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """The smallest of 0.00, 0.01, ... that costs at most half a percent, over all batches, whatever it was before."""
    ids_BL = torch.cat([ids_BL, torch.randint(1, 13, (50, 7))])
    model = wake(build(build_model, "gate", "confidence"))
    labels_B = model(ids_BL).argmax(-1)
    labels_B[:20] = 0  # nearly all are right in the end
    batches = [batch_of(ids_BL[rows], labels_B[rows]) for rows in (slice(0, 20), slice(20, 56))]
    exits_XBC = all_exits(model, ids_BL)
    confidence_XB, right_XB = exits_XBC.softmax(-1).amax(-1), exits_XBC.argmax(-1) == labels_B
    assert right_XB[-1].sum() > right_XB[0].sum()
    full = float(right_XB[-1].double().mean())

    def accuracy(threshold: float) -> float:
        leaves_XB = confidence_XB > torch.tensor(threshold)
        exits = [next((x for x in range(2) if leaves_XB[x, sample]), 2) for sample in range(56)]
        return sum(bool(right_XB[x, sample]) for sample, x in enumerate(exits)) / 56

    good = [step / 100 for step in range(101) if accuracy(step / 100) >= full - 0.005]
    for before in (0.0, 1.0):
        threshold_of(model).fill_(before)
        model.calibrate(batches)
        assert float(threshold_of(model)) == pytest.approx(good[0])
    metrics = model.get_model_specific_metrics()
    assert metrics["full_depth_val_acc"] == pytest.approx(full)
    assert metrics["exit_threshold"] == pytest.approx(good[0])
    given = build_model("goe_original", halt="confidence", exit_threshold=0.77)
    given.calibrate(batches)
    assert float(threshold_of(given)) == pytest.approx(0.77)


def test_batches_whose_paths_end_early_are_calibrated_too(
    build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Their last exit stands for the missing ones."""
    model = build_model("goe_original", route="oracle", halt="confidence", max_path_len=4)
    short_BT, long_BT = torch.tensor([[1, -1, -1, -1]] * 6), torch.tensor([[1, 2, 0, 3]] * 6)
    model.calibrate([batch_of(ids_BL, labels_B, paths_BT) for paths_BT in (short_BT, long_BT)])
    assert 0 <= float(threshold_of(model)) <= 1


# ---------------------------------------------------------------------------------------------------- whole experiments

PLANTED = {"num_samples": 60, "num_functions": 3, "depth": 2, "num_operands": 2, "num_values": 3}
RUNS: dict[str, dict[str, Any]] = {
    "gate-confidence": {"halt": "confidence"},
    "st-ponder": {"router_mode": "st", "halt": "ponder", "halt_warmup": 0.3},
    "st_dense-action": {"router_mode": "st_dense", "halt": "action"},
    "reinforce-action": {"router_mode": "reinforce", "halt": "action", "path_penalty_coef": 0.05},
    "q-confidence": {"router_mode": "q", "halt": "confidence"},
    "published-action": {"router_mode": "published", "halt": "action"},
    "random": {"route": "random"},
    "oracle-confidence": {"route": "oracle", "halt": "confidence"},
}


@pytest.mark.parametrize("model_params", RUNS.values(), ids=RUNS)
def test_a_stopped_run_goes_on_exactly(
    model_params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mode, halting rule and random route from JSON, stopped in the second of two epochs."""
    oracle = model_params.get("route") == "oracle"
    config = small_config(
        model_type="goe_original",
        dataset_name="planted_paths" if oracle else "parity",
        dataset_params=PLANTED if oracle else {"num_samples": 60, "seq_len": 4},
        model_params={**model_params, "dropout": 0.1, "max_path_len": 2},
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    # What the run itself does not need: its cost and its picture.
    monkeypatch.setattr(scores, "measure_flops", lambda *_, **__: (0.0, 0.0))
    monkeypatch.setattr(scores, "measure_latency", lambda *_, **__: {})
    monkeypatch.setattr(experiment, "draw_pictures", lambda *_, **__: None)
    finished = run_in(whole, config)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert run_in(cut, config).status == "interrupted"
    resumed = run_in(cut, config, resume=True)
    assert (finished.status, resumed.status) == ("finished", "finished")
    assert repeatable(resumed.metrics) == repeatable(finished.metrics)
    assert history(cut, resumed.experiment_id) == history(whole, finished.experiment_id)
