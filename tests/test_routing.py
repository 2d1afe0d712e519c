"""Routing losses by pencil, and the record of paths against a slow count.

R running decisions  D width  N experts  S samples  T steps
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from research_eval.layers.routing import (
    balance_of,
    balanced_bias,
    contrastive_loss,
    entropy,
    mean_entropy_loss,
    mean_of_rows,
    z_loss,
)
from research_eval.models.base_model import joined_on_host
from research_eval.routing.record import STOPPED, EvaluationRecorder, RoutingRecord
from research_eval.routing.report import load_metrics

UNIFORM = torch.full((6, 4), 0.25)
COLLAPSED = torch.eye(4)[torch.zeros(6, dtype=torch.long)]
DIVIDED = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])]  # each decision is certain, all experts are used
ALONE = torch.ones(5, 1)


@pytest.mark.parametrize(
    ("probabilities_RN", "load_N", "balance", "mean_entropy"),
    [
        (UNIFORM, [0.25, 0.25, 0.25, 0.25], 1.0, -math.log(4)),
        (COLLAPSED, [1.0, 0.0, 0.0, 0.0], 4.0, 0.0),
        (DIVIDED, [0.25, 0.25, 0.25, 0.25], 1.0, -math.log(4)),
        (ALONE, [1.0], 1.0, 0.0),
        # 4 (1/2 * 0.7 + 1/2 * 0.1) and 0.7 ln 0.7 + 3 * 0.1 ln 0.1
        (torch.tensor([[0.7, 0.1, 0.1, 0.1]]), [0.5, 0.5, 0.0, 0.0], 1.6, -0.940448),
        # means [0.5, 0.5]: 2 (1/4 * 1/2 + 3/4 * 1/2) and ln 1/2
        (torch.tensor([[0.9, 0.1], [0.1, 0.9]]), [0.25, 0.75], 1.0, -math.log(2)),
    ],
    ids=["uniform", "collapsed", "divided", "alone", "leaning", "opposed"],
)
def test_known_values_of_the_balance_terms(
    probabilities_RN: torch.Tensor, load_N: list[float], balance: float, mean_entropy: float
) -> None:
    loss = balance_of(torch.tensor(load_N), mean_of_rows(probabilities_RN))
    assert_close(loss, torch.tensor(balance), rtol=1e-6, atol=1e-6)
    assert_close(mean_entropy_loss(probabilities_RN.mean(0)), torch.tensor(mean_entropy), rtol=1e-6, atol=1e-6)


def test_known_values_of_entropy_and_z_loss() -> None:
    probabilities = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, 0]])
    expected = torch.tensor([2 * math.log(2), 0, math.log(2), 1.5 * math.log(2)])
    assert_close(entropy(probabilities), expected, rtol=1e-6, atol=1e-6)
    # Equal logits c: logsumexp = c + ln N.
    assert_close(z_loss(torch.full((3, 4), 2.0)), torch.tensor((2 + math.log(4)) ** 2))
    assert_close(z_loss(torch.tensor([[0.0], [3.0]])), torch.tensor(4.5))


def test_masked_actions_leave_the_losses_of_the_others_alone() -> None:
    """Value and gradient are those of the logits without the masked column, and finite."""
    few_RA = torch.randn(5, 3, requires_grad=True)
    many_RA = torch.cat([few_RA.detach(), torch.full((5, 1), -1e9)], dim=1).requires_grad_()
    for loss in (z_loss, lambda logits: entropy(logits.softmax(-1)).sum()):
        few, many = loss(few_RA), loss(many_RA)
        assert_close(many, few, rtol=1e-6, atol=1e-6)
        small, large = torch.autograd.grad(few, few_RA)[0], torch.autograd.grad(many, many_RA)[0]
        assert_close(large[:, :3], small, rtol=1e-5, atol=1e-6)
        assert not large[:, 3].any()


def test_the_balance_loss_moves_probabilities_and_not_the_load() -> None:
    load_N, logits_RN = torch.tensor([0.7, 0.2, 0.1], requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    balance_of(load_N, mean_of_rows(logits_RN.softmax(-1))).backward()
    assert load_N.grad is None
    # d/dz_i of 3 sum_j f_j P_j at P = 1/3, shared by 4 rows: (f_i - 1/3) / 4.
    expected = (torch.tensor([0.7, 0.2, 0.1]) - 1 / 3) / 4
    assert_close(logits_RN.grad, expected.expand(4, 3))


RIGHT, UP, LEFT, SLANTED = [1.0, 0.0], [0.0, 1.0], [-2.0, 0.0], [0.5, math.sqrt(0.75)]


@pytest.mark.parametrize(
    ("deltas", "experts", "expected"),
    [
        ([RIGHT, UP], [0, 1], 0.0),
        ([RIGHT, LEFT], [0, 3], 1.0),
        ([RIGHT, SLANTED], [2, 1], 0.25),
        ([RIGHT, RIGHT, UP], [0, 0, 1], 0.0),  # samples of one expert do not repel
        ([RIGHT, UP, RIGHT], [0, 0, 1], 0.5),  # the mean of expert 0 lies at 45 degrees
        ([RIGHT, UP, SLANTED], [0, 1, 2], (0 + 0.25 + 0.75) / 3),
        ([RIGHT, UP], [2, 2], 0.0),  # one expert has nobody to differ from
        ([RIGHT, [0.0, 0.0]], [0, 1], 0.0),
    ],
)
def test_known_values_of_the_contrastive_loss(deltas: list[list[float]], experts: list[int], expected: float) -> None:
    """The mean squared cosine between what two experts do on average."""
    delta_RD = torch.tensor(deltas, requires_grad=True)
    loss = contrastive_loss(delta_RD, torch.tensor(experts), num_experts=4)
    assert_close(loss.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    (gradient_RD,) = torch.autograd.grad(loss, delta_RD)
    assert gradient_RD.isfinite().all()


def test_the_balancing_bias_steps_against_the_load() -> None:
    bias_N = torch.tensor([0.5, 0.0, -0.5])
    moved = balanced_bias(bias_N, torch.tensor([6.0, 5.0, 4.0]), rate=0.1)
    assert_close(moved, torch.tensor([0.4, 0.0, -0.4]))  # 5 of 15 is a fair share exactly
    assert torch.equal(balanced_bias(bias_N, torch.zeros(3), rate=0.1), bias_N)
    assert torch.equal(balanced_bias(bias_N[:1], torch.tensor([7.0]), rate=0.1), bias_N[:1])


def test_the_balancing_bias_evens_out_a_fixed_preference() -> None:
    scores_RN = torch.randn(400, 4) * 0.1 + torch.tensor([0.3, 0.0, 0.0, -0.3])
    bias_N = torch.zeros(4)
    shares = []
    for _ in range(60):
        counts_N = (scores_RN + bias_N).argmax(1).bincount(minlength=4).float()
        shares.append(counts_N / 400)
        bias_N = balanced_bias(bias_N, counts_N, rate=0.01)
    assert shares[0].max() > 0.9
    assert shares[-1].max() < 0.35


# -------------------------------------------------------------------------------------------------- the path record


@st.composite
def path_tables(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    num_experts, num_steps = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts = st.lists(st.integers(0, num_experts - 1), max_size=num_steps)
    paths = draw(st.lists(experts, min_size=1, max_size=12))
    return num_experts, [[*path, *[STOPPED] * (num_steps - len(path))] for path in paths]


def push(record: EvaluationRecorder, path_ST: torch.Tensor, entropy_ST: torch.Tensor) -> None:
    """One batch as a model reports it, step by step, until no path continues."""
    record.begin_batch(len(path_ST))
    for step in range(path_ST.shape[1]):
        if (path_ST[:, step] == STOPPED).all():
            break
        experts_S1 = path_ST[:, step : step + 1]
        record.push(RoutingRecord(step, experts_S1, torch.ones(experts_S1.shape), entropy_D=entropy_ST[:, step]))


@settings(deadline=None, max_examples=40)
@given(table=path_tables(), cut=st.integers(0, 12))
def test_path_metrics_are_a_slow_count(table: tuple[int, list[list[int]]], cut: int) -> None:
    num_experts, padded = table
    num_steps = len(padded[0])
    record = EvaluationRecorder(num_experts, num_steps, joined_on_host)
    push(record, torch.tensor([[9] * num_steps]) % num_experts, torch.ones(1, num_steps))
    record.clear()
    for part in (padded[:cut], padded[cut:]):  # two batches, one of them perhaps without a sample
        path_ST = torch.tensor(part, dtype=torch.long).view(-1, num_steps)
        push(record, path_ST, torch.full(path_ST.shape, 0.5) * (path_ST >= 0))
    assert record.paths().tolist() == padded
    paths = [[e for e in path if e >= 0] for path in padded]
    lengths = [len(path) for path in paths]
    metrics = record.metrics()

    assert metrics["mean_path_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert metrics["path_length_histogram"] == [lengths.count(length) for length in range(num_steps + 1)]
    taken = Counter(expert for path in paths for expert in path)
    steps = [Counter(path[step] for path in paths if len(path) > step) for step in range(num_steps)]
    expected_load = [[step[e] / max(step.total(), 1) for e in range(num_experts)] for step in steps]
    assert np.array(metrics["expert_load"]) == pytest.approx(np.array(expected_load), abs=1e-6)
    shares = [taken[e] / max(taken.total(), 1) for e in range(num_experts)]
    assert metrics["expert_load_cv"] == pytest.approx(float(np.std(shares)) * num_experts)
    assert metrics["dead_experts"] == sum(share < 0.01 / num_experts for share in shares)
    assert metrics["router_entropy"] == pytest.approx(0.5 * bool(sum(lengths)) / math.log(max(num_experts, 2)))

    start, stop = num_experts, num_experts + 1
    flow = np.zeros((num_steps + 1, stop + 1, stop + 1), int)
    for path in paths:
        nodes = [start, *path, stop]
        for step, (source, target) in enumerate(pairwise(nodes)):
            flow[step, source, target] += 1
    assert metrics["step_transitions"] == flow.tolist()
    assert metrics["transition_matrix"] == flow.sum(0).tolist()
    counted = Counter(map(tuple, paths))
    assert {tuple(path): count for path, count in metrics["common_paths"]}.items() <= counted.items()
    assert [count for _, count in metrics["common_paths"]] == sorted(counted.values(), reverse=True)[:10]


def test_an_empty_record_has_no_metrics() -> None:
    record = EvaluationRecorder(3, 2)
    assert record.paths().shape == (0, 2)
    assert record.metrics() == {}


def test_known_values_of_the_load() -> None:
    metrics = load_metrics(np.array([[4, 0, 0, 0], [0, 4, 0, 0]]))
    assert metrics == {"expert_load": [[1, 0, 0, 0], [0, 1, 0, 0]], "expert_load_cv": 1.0, "dead_experts": 2}
    assert load_metrics(np.array([[993, 4, 3]]))["dead_experts"] == 1  # less than 1 % of a third
    assert load_metrics(np.zeros((1, 2), np.int64))["expert_load"] == [[0, 0]]
