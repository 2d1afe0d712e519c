"""Walkers on a learnt graph: the layer against oracles, the pool, the models, and what is known to go wrong.

B batch  L length  D width  R edge sets  S = R + 1 with "stay"  M walkers  K nodes  C classes
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import history, run_in
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from research_eval.datasets.regular import LONGER_TESTS, task_automaton
from research_eval.datasets.synthetic import synthetic_splits
from research_eval.datasets.token_data import Batches
from research_eval.errors import ConfigError
from research_eval.experiment import Result
from research_eval.layers import scan
from research_eval.layers.dispatch import Dispatch
from research_eval.layers.experts import ExpertPool
from research_eval.layers.packing import Layout
from research_eval.layers.scan import EdgePicker, ScanExpert, ScanSettings, WalkerGraph, straight_through
from research_eval.layers.text import masked_mean
from research_eval.models.base_model import EvaluableModel, auxiliary_terms
from research_eval.models.goe_scan import GoEScanClassifier
from research_eval.models.lstm import LSTMClassifier
from research_eval.routing.automaton import certification_metrics, certify
from research_eval.runs.prepare import create_model
from research_eval.schema import OptimizerParams, SchedulerParams, config_from_dict
from research_eval.training.checkpoint import load_tensors
from research_eval.training.fit import MODEL_FILE
from research_eval.training.optimizers import learning_rate_factor, parameter_groups

Build = Callable[..., EvaluableModel]

# The model of the tests takes 13 ids; these have a shape of their own in every dimension.
VARIANTS = [
    {"num_nodes": 5, "num_walkers": 3},
    {"num_nodes": 5, "num_walkers": 3, "edges": "st"},
    {"num_nodes": 5, "num_walkers": 2, "num_edge_sets": 4},
    {"num_nodes": 5, "num_walkers": 2, "num_edge_sets": 4, "picks": "soft", "edges": "st"},
]
every_variant = pytest.mark.parametrize("arguments", VARIANTS, ids=str)


def one_hot_picks(edge_sets_BL: Tensor, keep_BL: Tensor, num_edge_sets: int) -> Tensor:
    return F.one_hot(edge_sets_BL.masked_fill(~keep_BL, num_edge_sets), num_edge_sets + 1).float()


def random_picks(batch: int, length: int, num_edge_sets: int, hard: bool) -> Tensor:
    """Picks [B, L, S] with some padding at the end of some rows."""
    keep_BL = torch.arange(length) < torch.randint(0, length + 1, (batch, 1))
    if hard:
        return one_hot_picks(torch.randint(0, num_edge_sets, (batch, length)), keep_BL, num_edge_sets)
    picks_BLR = torch.rand(batch, length, num_edge_sets).softmax(-1) * keep_BL.unsqueeze(-1)
    return torch.cat([picks_BLR, (~keep_BL).unsqueeze(-1).float()], dim=-1)


def built(graph: WalkerGraph, picks_BLS: Tensor) -> tuple[Tensor, Tensor]:
    """Start [M, K] and A_t [B, L, M, K, K] written out."""
    start_MK, edges_RMKK = graph.probabilities()
    stay = torch.eye(graph.num_nodes).expand(1, graph.num_walkers, -1, -1)
    return start_MK, torch.einsum("bls,smij->blmij", picks_BLS, torch.cat([edges_RMKK, stay]))


def by_loop(graph: WalkerGraph, picks_BLS: Tensor) -> Tensor:
    """p_t = p_{t-1} A_t, one token after the other."""
    start_MK, steps_BLMKK = built(graph, picks_BLS)
    state_BMK, states = start_MK.expand(len(picks_BLS), -1, -1), []
    for step_BMKK in steps_BLMKK.unbind(1):
        state_BMK = torch.einsum("bmi,bmij->bmj", state_BMK, step_BMKK)
        states.append(state_BMK)
    return torch.stack(states, 1).flatten(-2)


def by_prefix(graph: WalkerGraph, picks_BLS: Tensor) -> Tensor:
    """All products A_1 ... A_t in log2 L rounds (Hillis and Steele, 1986)."""
    start_MK, products_BLMKK = built(graph, picks_BLS)
    shift = 1
    while shift < picks_BLS.shape[1]:
        earlier = products_BLMKK[:, :-shift] @ products_BLMKK[:, shift:]
        products_BLMKK = torch.cat([products_BLMKK[:, :shift], earlier], dim=1)
        shift *= 2
    return torch.einsum("mi,blmij->blmj", start_MK, products_BLMKK).flatten(-2)


def by_composition(graph: WalkerGraph, picks_BLS: Tensor) -> Tensor:
    """The composed map of each prefix, node by node; then where it sends the start."""
    targets_RMK = graph.edge_logits.argmax(-1).tolist()
    start_M, size = graph.start_logits.argmax(-1).tolist(), graph.num_nodes
    states = torch.zeros(*picks_BLS.shape[:2], graph.num_walkers, size)
    for row, picks_LS in enumerate(picks_BLS):
        for walker in range(graph.num_walkers):
            composed = list(range(size))
            for step, pick_S in enumerate(picks_LS):
                edge_set = int(pick_S.argmax())
                if edge_set < graph.num_edge_sets:
                    composed = [targets_RMK[edge_set][walker][node] for node in composed]
                states[row, step, walker, composed[start_M[walker]]] = 1
    return states.flatten(-2)


# --------------------------------------------------------------------------------------------------------- the forms


@pytest.mark.parametrize("min_length", [1, 1000], ids=["composed", "token by token"])
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the patch is the same for all examples
@given(st.sampled_from(["soft", "st"]), st.booleans(), st.integers(1, 9), st.integers(0, 1000))
def test_loop_mix_groups_and_prefix_agree_in_values_and_gradients(
    min_length: int, monkeypatch: pytest.MonkeyPatch, edges: Any, hard: bool, length: int, seed: int
) -> None:
    monkeypatch.setattr(scan, "MIN_LENGTH", min_length)
    torch.manual_seed(seed)
    graph = WalkerGraph(num_edge_sets=3, num_walkers=2, num_nodes=4, edges=edges).train()
    picks_BLS = random_picks(5, length, 3, hard).requires_grad_()
    weight = torch.randn(5, length, 8)
    found = []
    for form in (lambda g, c: g(c, every_position=True), by_loop, by_prefix):
        states = form(graph, picks_BLS)
        gradients = torch.autograd.grad((states * weight).sum(), [graph.edge_logits, graph.start_logits, picks_BLS])
        found.append([states.detach(), *gradients])
    for other in found[1:]:
        assert_close(other, found[0], rtol=1e-5, atol=1e-5)
    assert_close(graph(picks_BLS), found[0][0][:, -1], rtol=1e-5, atol=1e-5)
    if hard:  # the numbers of the edge sets instead of one-hot weights
        states = graph(picks_BLS.argmax(-1), every_position=True)
        gradients = torch.autograd.grad((states * weight).sum(), [graph.edge_logits, graph.start_logits])
        assert_close([states.detach(), *gradients], found[0][:3], rtol=1e-5, atol=1e-5)
        assert_close(graph(picks_BLS.argmax(-1)), found[0][0][:, -1], rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 7), st.integers(0, 1000))
def test_evaluation_composes_the_maps_of_the_hard_edges(length: int, seed: int) -> None:
    torch.manual_seed(seed)
    graph = WalkerGraph(num_edge_sets=3, num_walkers=2, num_nodes=4, edges="st")
    picks_BLS = random_picks(5, length, 3, hard=True)
    composed = by_composition(graph, picks_BLS)
    assert torch.equal(graph.eval()(picks_BLS, every_position=True), composed)
    assert torch.equal(graph(picks_BLS), composed[:, -1])
    assert_close(graph.train()(picks_BLS, every_position=True), composed, rtol=1e-5, atol=1e-5)
    assert_close(by_prefix(graph, picks_BLS), composed, rtol=1e-5, atol=1e-5)


def hand_made_graph() -> WalkerGraph:
    """Edge set 0 swaps nodes 0 and 1, edge set 1 rotates 0 -> 1 -> 2 -> 0; the walker starts at node 0."""
    graph = WalkerGraph(num_edge_sets=2, num_walkers=1, num_nodes=3, edges="st")
    with torch.no_grad():
        graph.edge_logits.copy_(
            10 * torch.stack([F.one_hot(torch.tensor(m), 3) for m in ([1, 0, 2], [1, 2, 0])])[:, None]
        )
        graph.start_logits.copy_(torch.tensor([[5.0, 0.0, 0.0]]))
    return graph


@pytest.mark.parametrize("training", [False, True])
def test_pitfall_6_the_first_token_acts_first(training: bool) -> None:
    """Swap, then rotate: 0 -> 1 -> 2. Rotate, then swap: 0 -> 1 -> 0."""
    graph = hand_made_graph().train(training)
    picks_BLS = one_hot_picks(torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2, dtype=torch.bool), 2)
    expected = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert_close(graph(picks_BLS), expected, rtol=1e-5, atol=1e-5)
    for form in (by_loop, by_prefix, by_composition):
        assert_close(form(graph, picks_BLS)[:, -1], expected, rtol=1e-5, atol=1e-5)


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    weight = torch.randn(4, 5)
    value = straight_through(logits)
    assert torch.equal(value.round(), F.one_hot(logits.argmax(-1), 5).float())
    (hard,) = torch.autograd.grad((value * weight).sum(), logits)
    (soft,) = torch.autograd.grad((logits.softmax(-1) * weight).sum(), logits)
    assert_close(hard, soft)


def test_known_entropy_of_the_rows() -> None:
    graph = WalkerGraph(num_edge_sets=2, num_walkers=3, num_nodes=4)
    with torch.no_grad():
        graph.edge_logits.zero_()
        assert float(graph.row_entropy()) == pytest.approx(np.log(4))
        graph.edge_logits[..., 0] = 50.0
        assert float(graph.row_entropy()) == pytest.approx(0.0, abs=1e-6)


# --------------------------------------------------------------------------------------------- expert and mixed pool


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("estimator", ["soft", "st"])
def test_the_scan_expert_is_causal_and_deaf_to_padding(training: bool, estimator: Any) -> None:
    expert = ScanExpert(6, ScanSettings(num_nodes=4, num_walkers=2, num_edge_sets=3, edges=estimator, picks=estimator))
    expert.train(training)
    h_BLD, keep_BL = torch.randn(3, 7, 6), torch.arange(7) < torch.tensor([[7], [5], [3]])
    out_BLD = expert(h_BLD, keep_BL)
    changed_BLD = h_BLD.clone()
    changed_BLD[:, 4:] = torch.randn(3, 3, 6)
    assert torch.equal(expert(changed_BLD, keep_BL)[:, :4], out_BLD[:, :4])
    noisy_BLD = torch.where(keep_BL.unsqueeze(-1), h_BLD, torch.randn_like(h_BLD))
    assert_close(expert(noisy_BLD, keep_BL)[keep_BL], out_BLD[keep_BL], rtol=1e-5, atol=1e-5)
    longer_BLD, longer_BL = F.pad(h_BLD, (0, 0, 0, 4)), F.pad(keep_BL, (0, 4))
    assert_close(expert(longer_BLD, longer_BL)[:, :7][keep_BL], out_BLD[keep_BL], rtol=1e-5, atol=1e-5)


def test_the_scan_expert_is_the_formula() -> None:
    expert = ScanExpert(6, ScanSettings(num_nodes=4, num_walkers=2, num_edge_sets=3, picks="soft"))
    h_BLD, keep_BL = torch.randn(3, 5, 6), torch.ones(3, 5, dtype=torch.bool)
    picks_BLR = expert.picker.linear(F.layer_norm(h_BLD, (6,))).softmax(-1)
    states = by_loop(expert.graph, F.pad(picks_BLR, (0, 1)))
    assert_close(expert(h_BLD, keep_BL), h_BLD + expert.output(states), rtol=1e-5, atol=1e-5)


def mixed_pool(num_attention: int, num_scan: int, **arguments: Any) -> ExpertPool:
    torch.manual_seed(0)
    settings = ScanSettings(num_nodes=4, num_walkers=2, num_edge_sets=3)
    return ExpertPool(num_attention + num_scan, 2, 8, 2, 16, 0.0, num_scan_experts=num_scan, scan=settings, **arguments)


@pytest.mark.parametrize(("num_attention", "num_scan"), [(2, 2), (1, 1), (0, 1), (0, 2), (1, 2), (2, 0)])
def test_every_row_of_a_mixed_pool_goes_through_its_expert(num_attention: int, num_scan: int) -> None:
    """Row by row: the pool alone with one sample."""
    pool = mixed_pool(num_attention, num_scan, adaptive_gate=True).eval()
    number = num_attention + num_scan
    h_BLD, keep_BL = torch.randn(9, 5, 8), torch.arange(5) < torch.randint(1, 6, (9, 1))
    choice_B = torch.randint(0, number + 1, (9,))
    step = pool.step(h_BLD, pool.packing(keep_BL), choice_B, torch.full((9,), 0.5))
    for row, expert in enumerate(choice_B.tolist()):
        one, mask = h_BLD[row : row + 1], keep_BL[row : row + 1]
        expected = one
        if expert < number:
            if expert >= num_attention:
                z = pool.scans[expert - num_attention](one, mask)
            else:
                sizes = [int(expert == other) for other in range(num_attention)]
                z = pool._attend(one, Layout.whole(mask), Dispatch(sizes))
            assert pool.gate is not None
            gate = torch.sigmoid(pool.gate.weight[expert] @ masked_mean(z, mask)[0] + pool.gate.bias[expert])
            expected = one + 0.5 * (gate * (z - one) + pool.gate.tag[expert])
        assert_close(step.h_BLD[row][mask[0]], expected[mask], rtol=1e-5, atol=1e-5)


def test_unselected_experts_get_no_gradient() -> None:
    pool = mixed_pool(2, 2).train()
    h_BLD, keep_BL = torch.randn(4, 5, 8), torch.ones(4, 5, dtype=torch.bool)
    step = pool.step(h_BLD, pool.packing(keep_BL), torch.tensor([1, 2, 2, 1]), torch.ones(4))
    assert step.edge_entropy is not None
    (step.h_BLD.square().sum() + step.edge_entropy).backward()
    for name, parameter in pool.named_parameters():
        if name.startswith("scans.1"):
            assert parameter.grad is None or not parameter.grad.any(), name
        elif name.startswith("scans.0"):
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is not None and not parameter.grad[0].any() and parameter.grad[1].any(), name


def test_the_edge_entropy_is_that_of_the_scan_experts_at_work() -> None:
    pool = mixed_pool(1, 2)
    h_BLD, keep_BL = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    for choice, used in (([0, 0], []), ([0, 1], [0]), ([1, 2], [0, 1]), ([2, 3], [1]), ([3, 3], [])):
        step = pool.train().step(h_BLD, pool.packing(keep_BL), torch.tensor(choice), torch.ones(2))
        if used:
            entropies = [pool.scans[number].graph.row_entropy() for number in used]
            assert_close(step.edge_entropy, torch.stack(entropies).mean())
        else:
            assert step.edge_entropy is None
        assert pool.eval().step(h_BLD, pool.packing(keep_BL), torch.tensor(choice), torch.ones(2)).edge_entropy is None


def test_a_pool_without_scan_experts_draws_no_other_numbers() -> None:
    plain = mixed_pool(3, 0)
    torch.manual_seed(0)
    mixed = ExpertPool(3, 2, 8, 2, 16, 0.0)
    after = torch.rand(3)
    assert_close(dict(plain.named_parameters()), dict(mixed.named_parameters()), rtol=0, atol=0)
    mixed_pool(3, 0)
    assert torch.equal(torch.rand(3), after)


def test_too_many_scan_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 scan experts are more than the 2 experts"):
        ExpertPool(2, 1, 8, 2, 16, 0.0, num_scan_experts=3)


# -------------------------------------------------------------------------------------------------------- the models


@every_variant
def test_pitfall_4_padding_moves_no_walker(arguments: dict[str, Any], build_model: Build, ids_BL: Tensor) -> None:
    model = build_model("goe_scan", **arguments)
    for training in (False, True):
        logits_BC = model.train(training)(ids_BL)
        padded_BL = F.pad(ids_BL, (0, 9))
        assert_close(model(padded_BL), logits_BC, rtol=1e-5, atol=1e-5)
        assert_close(model(padded_BL + 3 * (padded_BL == 0), padded_BL != 0), logits_BC, rtol=1e-5, atol=1e-5)


@every_variant
def test_pitfall_5_the_head_reads_the_state_behind_the_last_token(
    arguments: dict[str, Any], build_model: Build, ids_BL: Tensor
) -> None:
    model = build_model("goe_scan", **arguments)
    assert isinstance(model, GoEScanClassifier)
    last_B = (ids_BL != 0).sum(1) - 1
    for training in (False, True):
        model.train(training)
        assert_close(model.prefix_logits(ids_BL)[torch.arange(6), last_B], model(ids_BL), rtol=1e-5, atol=1e-5)
        states = model._states(ids_BL, None, every_position=False)
        assert_close(states.sum(-1), torch.full((6,), float(arguments["num_walkers"])), rtol=1e-5, atol=1e-5)


@every_variant
def test_prefix_scores_do_not_know_what_follows(arguments: dict[str, Any], build_model: Build) -> None:
    model = build_model("goe_scan", **arguments)
    assert isinstance(model, GoEScanClassifier)
    ids_BL = torch.randint(1, 13, (4, 9))
    for training in (False, True):
        logits_BLC = model.train(training).prefix_logits(ids_BL)
        for length in range(1, 10):
            assert_close(model(ids_BL[:, :length]), logits_BLC[:, length - 1], rtol=1e-5, atol=1e-5)


@every_variant
def test_pitfall_12_the_empty_input_is_finite(arguments: dict[str, Any], build_model: Build) -> None:
    model = build_model("goe_scan", **arguments)
    for training in (False, True):
        logits_BC = model.train(training)(torch.tensor([[0, 0], [3, 0]]))
        assert logits_BC.isfinite().all()
    model.task_loss(logits_BC, torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@every_variant
def test_the_automaton_that_is_read_is_the_evaluated_model(arguments: dict[str, Any], build_model: Build) -> None:
    model = build_model("goe_scan", **arguments).eval()
    assert isinstance(model, GoEScanClassifier)
    ids_BL = torch.randint(1, 13, (200, 11))
    automaton = model.read_automaton()
    nodes_BM = np.tile(automaton.start_M, (200, 1))
    for ids_B in ids_BL.T.numpy():
        nodes_BM = automaton.targets_TMK[ids_B[:, None] - 1, np.arange(nodes_BM.shape[1]), nodes_BM]
    assert automaton.answers(nodes_BM).tolist() == model(ids_BL).argmax(-1).tolist()


def test_pitfall_9_tied_tokens_use_an_edge_set_each_and_learnt_ones_are_counted(build_model: Build) -> None:
    assert build_model("goe_scan").get_model_specific_metrics()["edge_sets_used"] == 12
    learnt = build_model("goe_scan", num_edge_sets=40, embed_dim=16)
    assert isinstance(learnt, GoEScanClassifier) and learnt.picker is not None
    assert 6 <= learnt.get_model_specific_metrics()["edge_sets_used"] <= 12  # 12 tokens, far apart from the start
    with torch.no_grad():
        learnt.picker.linear.bias[3] = 1e6
    assert learnt.get_model_specific_metrics()["edge_sets_used"] == 1


def test_pitfall_9_picks_learn_straight_through() -> None:
    hard, soft = EdgePicker(6, 4, "st").train(), EdgePicker(6, 4, "soft").train()
    soft.load_state_dict(hard.state_dict())
    h_BLD, keep_BL, weight = torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 3, 5)
    gradients = []
    for picker in (hard, soft):
        picks_BLS = picker(h_BLD, keep_BL)
        gradients.append(torch.autograd.grad((picks_BLS * weight).sum(), list(picker.parameters())))
        assert_close(picker.eval()(h_BLD, keep_BL).round().sum(-1), torch.ones(2, 3))
    assert_close(gradients[0], gradients[1])
    assert torch.equal(hard.train()(h_BLD, keep_BL).round(), hard.eval()(h_BLD, keep_BL).round())


def test_the_entropy_term_grows_with_the_training(build_model: Build, ids_BL: Tensor) -> None:
    model = build_model("goe_scan", edge_entropy_coef=0.02).train()
    model(ids_BL)
    weights = []
    for progress in (0.0, 0.25, 1.0):
        model.after_step(progress)
        weights.append(auxiliary_terms(model)["edge_entropy_loss"].weight)
    assert weights == pytest.approx([0.0, 0.005, 0.02])


def test_parameters_are_counted_by_hand() -> None:
    """The single walker on parity: 2 edge sets of 16 x 16, 16 starts, 16 x 2 + 2 in the head."""
    assert GoEScanClassifier(vocab_size=3, num_classes=2, num_walkers=1).get_parameter_count() == 562
    assert GoEScanClassifier(vocab_size=7, num_classes=6, num_walkers=1).get_parameter_count() == 1654
    assert LSTMClassifier(vocab_size=3, num_classes=2, embed_dim=32).get_parameter_count() == (
        3 * 32 + 64 + 4 * (2 * 32 * 32 + 2 * 32) + 64 + 32 * 2 + 2
    )


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing_for_the_lstm(training: bool, build_model: Build, ids_BL: Tensor) -> None:
    model = build_model("lstm", num_layers=2).train(training)
    logits_BC = model(ids_BL)
    assert_close(model(F.pad(ids_BL, (0, 9))), logits_BC, rtol=1e-5, atol=1e-5)
    for row, sample_L in enumerate(ids_BL):
        assert_close(model(sample_L[sample_L != 0].unsqueeze(0))[0], logits_BC[row], rtol=1e-5, atol=1e-5)


def test_the_lstm_is_the_equations(build_model: Build) -> None:
    """Gates in torch's order: input, forget, candidate, output."""
    model = build_model("lstm").eval()
    assert isinstance(model, LSTMClassifier)
    ids_BL = torch.randint(1, 13, (3, 5))
    x_BLD = model.embedding(ids_BL, ids_BL != 0)
    lstm: Any = model.lstm
    h_BD = cell_BD = torch.zeros(3, 16)
    for x_BD in x_BLD.unbind(1):
        gates = x_BD @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + h_BD @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        enter, forget, candidate, leave = gates.chunk(4, -1)
        cell_BD = forget.sigmoid() * cell_BD + enter.sigmoid() * candidate.tanh()
        h_BD = leave.sigmoid() * cell_BD.tanh()
    assert_close(model(ids_BL), model.head.linear(model.head.norm(h_BD)), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("scanning", ["goe_scan", "pool"])
def test_pitfall_8_edge_tables_learn_faster_and_do_not_decay(scanning: str, build_model: Build) -> None:
    model: nn.Module = (
        build_model("goe_scan", num_edge_sets=3)
        if scanning == "goe_scan"
        else nn.ModuleDict({"experts": mixed_pool(1, 2)})
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    params = OptimizerParams(lr=3e-3, weight_decay=0.1, expert_lr_mult=2.0)
    met: list[str] = []
    for group in parameter_groups(model, params):
        for parameter in group["params"]:
            met.append(names[parameter])
            if names[parameter].endswith(("edge_logits", "start_logits")):
                assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.03), 0.0)
            else:
                assert group["lr"] == pytest.approx(6e-3 if scanning == "pool" else 3e-3)
    assert sorted(met) == sorted(names.values())
    assert sum(name.endswith("_logits") for name in met) == (2 if scanning == "goe_scan" else 4)


def test_pitfall_7_the_rate_stays_flat_until_the_last_third() -> None:
    params = SchedulerParams(name="wsd", warmup_factor=0.1, min_lr_factor=0.0)
    factors = [learning_rate_factor(step, 30, params) for step in range(31)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[3:21] == [1.0] * 18
    assert factors[20:] == pytest.approx([left / 10 for left in range(10, -1, -1)])
    early = SchedulerParams(name="wsd", warmup_factor=0.5, decay_factor=1.0, min_lr_factor=0.2)
    assert [learning_rate_factor(step, 8, early) for step in (4, 6, 8)] == pytest.approx([1.0, 0.6, 0.2])


CONFIG = {
    "model_type": "goe_scan",
    "dataset_type": "synthetic",
    "dataset_name": "parity",
    "epochs": 12,
    "batch_size": 64,
    "dataset_params": {"num_samples": 1600, "seq_len": 16, "min_length": 1},
    "optimizer_params": {"lr": 3e-3},
    "scheduler_params": {"name": "wsd", "warmup_factor": 0.05, "min_lr_factor": 0.0},
    "training_params": {"device": "cpu", "num_threads": 1, "curriculum": 0.4, "log_every": 20, "test": True},
}


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished training on parity, a few seconds long."""
    folder = tmp_path_factory.mktemp("scan")
    return folder, run_in(folder, config_from_dict(CONFIG))


def model_of(run: tuple[Path, Result]) -> GoEScanClassifier:
    folder, result = run
    description = json.loads((folder / result.folder / "data.json").read_text())
    context = {name: description[name] for name in ("vocab_size", "num_classes", "padding_idx", "max_length")}
    model = create_model("goe_scan", config_from_dict(CONFIG).model_params, context, torch.device("cpu"))
    model.load_state_dict(load_tensors(folder / result.folder / MODEL_FILE)[0])
    assert isinstance(model, GoEScanClassifier)
    return model


def test_pitfall_1_soft_training_and_hard_evaluation_agree_in_the_end(run: tuple[Path, Result]) -> None:
    points = history(run[0], run[1].experiment_id)
    train_accuracy = [value for _, name, value in points if name == "train_acc"][-1]
    hard_accuracy = [value for _, name, value in points if name == "val_acc"][-1]
    assert abs(train_accuracy - hard_accuracy) < 0.01


def test_pitfall_2_accuracy_is_not_taken_for_correctness(run: tuple[Path, Result]) -> None:
    """One wrong edge that is met: the certificate falls, with an input that shows it."""
    model, task = model_of(run).eval(), task_automaton("parity", CONFIG["dataset_params"])
    assert task is not None
    assert certification_metrics(model.read_automaton(), task)["certified"] == 1
    with torch.no_grad():
        model.head.weight.neg_()
        model.head.bias.neg_()
    found = certify(model.read_automaton(), task)
    assert found.equal is False and found.counterexample is not None and len(found.counterexample) == 1
    answer = int(model(torch.tensor([found.counterexample])).argmax())
    assert answer != found.counterexample.count(1) % 2


def test_pitfall_3_the_accuracy_does_not_depend_on_the_length(run: tuple[Path, Result]) -> None:
    metrics = run[1].metrics
    assert [metrics[f"test_{name}_acc"] for name in LONGER_TESTS] == [metrics["test_acc"]] * 3 == [1.0] * 3


def test_pitfall_7_the_task_is_solved_before_the_rate_falls(run: tuple[Path, Result]) -> None:
    points = history(run[0], run[1].experiment_id)
    rates = [(step, value) for step, name, value in points if name == "learning_rate"]
    flat_until = max(step for step, rate in rates if rate == pytest.approx(3e-3))
    solved_at = min(step for step, name, value in points if name == "val_acc" and value > 0.99)
    assert solved_at < flat_until


def test_pitfall_11_training_and_validation_never_see_the_test_lengths() -> None:
    splits = synthetic_splits("parity", {"num_samples": 500, "seq_len": 40, "min_length": 1}, seed=0)
    seen = max(int(splits.train.lengths.max()), int(splits.validation.lengths.max()))
    assert seen == 40
    assert min(int(split.lengths.min()) for split in splits.further_tests.values()) == 41
    batches = Batches(splits.train, 50, seed=0, curriculum_epochs=4)
    first = max(int(splits.train.lengths[rows].max()) for rows in batches.order(0))
    assert first <= 1 + 39 / 4
