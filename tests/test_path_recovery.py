"""Path recovery and regret against the slow spelling: try every matching.

N samples  T steps  F functions  E experts
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from research_eval.routing.recovery import path_recovery, router_regret

Array = NDArray[np.int64]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Array, Array, int]:
    """Paths, planted paths (ends included) and the number of experts."""
    num, steps = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    functions, experts = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))

    def paths(values: int, shortest: int) -> Array:
        ends_N1 = rng.integers(shortest, steps, size=(num, 1), endpoint=True)
        return np.where(np.arange(steps) < ends_N1, rng.integers(values, size=(num, steps)), -1)

    return paths(experts, 0), paths(functions, 1), experts


def best_share(paths_NT: Array, planted_NT: Array, num_experts: int) -> float:
    """Every way to give functions different experts (or none, number -2), tried out."""
    functions = int(planted_NT.max()) + 1
    candidates = [*range(num_experts), *[-2] * functions]
    hits = [
        sum(matching[f] == e for e, f in zip(paths_NT.flat, planted_NT.flat, strict=True) if f >= 0)
        for matching in set(itertools.permutations(candidates, functions))
    ]
    return max(hits) / max((planted_NT >= 0).sum(), 1)


@settings(deadline=None, max_examples=25)
@given(problems())
def test_the_matching_is_the_best_of_all(problem: tuple[Array, Array, int]) -> None:
    paths_NT, planted_NT, num_experts = problem
    recovery = path_recovery(*problem)
    assert recovery.overall == pytest.approx(best_share(*problem))
    decisions_T = (planted_NT >= 0).sum(0)
    shares_T = [
        best_share(paths_NT[:, [step]], planted_NT[:, [step]], num_experts) if decisions_T[step] else 0.0
        for step in range(planted_NT.shape[1])
    ]
    assert recovery.per_step == pytest.approx(np.average(shares_T, weights=decisions_T))
    assert recovery.per_step >= recovery.overall - 1e-12
    same = [(row >= 0).sum() == (planted >= 0).sum() for row, planted in zip(paths_NT, planted_NT, strict=True)]
    assert recovery.same_length == pytest.approx(np.mean(same))


@settings(deadline=None, max_examples=40)
@given(problems(), st.integers(0, 2**16))
def test_names_of_experts_order_of_samples_and_padding_do_not_matter(
    problem: tuple[Array, Array, int], seed: int
) -> None:
    paths_NT, planted_NT, num_experts = problem
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(paths_NT))
    renamed_NT = np.where(paths_NT < 0, -1, rng.permutation(num_experts)[paths_NT])
    wider_NT = np.pad(planted_NT[rows], [(0, 0), (0, 2)], constant_values=-1)
    first, second = path_recovery(*problem), path_recovery(renamed_NT[rows], wider_NT, num_experts)
    assert first[:5] == pytest.approx(second[:5])


def drawn(num: int, steps: int, values: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(values, size=(num, steps))


def test_a_router_that_found_the_path_has_all_of_it() -> None:
    planted_NT = drawn(500, 3, 4, seed=0)
    names_F = np.array([3, 0, 4, 1])
    recovery = path_recovery(names_F[planted_NT], planted_NT, num_experts=5)
    assert recovery[:2] == (1.0, pytest.approx(0.25, abs=0.06))
    assert recovery[2:4] == (1.0, pytest.approx(0.25, abs=0.06))
    assert recovery.same_length == 1.0
    assert recovery.experts_F.tolist() == names_F.tolist()
    assert recovery.experts_TF.tolist() == [names_F.tolist()] * 3


def test_other_names_at_every_step_are_found_per_step_only() -> None:
    planted_NT = drawn(2000, 2, 4, seed=0)
    paths_NT = np.stack([planted_NT[:, 0], (planted_NT[:, 1] + 1) % 4], axis=1)
    recovery = path_recovery(paths_NT, planted_NT, num_experts=4)
    assert recovery.per_step == 1.0
    assert recovery.overall == pytest.approx(0.5, abs=0.03)
    assert recovery.experts_TF.tolist() == [[0, 1, 2, 3], [1, 2, 3, 0]]


def test_independent_routing_has_what_chance_says() -> None:
    planted_NT, paths_NT = drawn(20_000, 2, 4, seed=0), drawn(20_000, 2, 4, seed=1) % 3
    recovery = path_recovery(paths_NT, planted_NT, num_experts=3)
    assert recovery.per_step == pytest.approx(recovery.per_step_by_chance, abs=0.01)
    assert recovery.overall == pytest.approx(recovery.overall_by_chance, abs=0.01)
    constant = path_recovery(np.zeros_like(planted_NT), planted_NT, num_experts=3)
    frequent_T = [np.bincount(step_N).max() / len(step_N) for step_N in planted_NT.T]
    assert constant.per_step == pytest.approx(constant.per_step_by_chance) == pytest.approx(np.mean(frequent_T))


def test_fewer_experts_than_functions_miss_some_and_stand_in_for_all() -> None:
    planted_NT = np.array([[0], [0], [0], [1], [1], [2]])
    recovery = path_recovery(np.array([[1], [1], [1], [0], [0], [0]]), planted_NT, num_experts=2)
    assert recovery.overall == recovery.per_step == 5 / 6
    assert recovery.experts_F.tolist() == [1, 0, 0]
    assert recovery.experts_TF.tolist() == [[1, 0, 0]]


def test_two_functions_on_one_expert_do_not_share_it_where_another_is_free() -> None:
    planted_NT = np.repeat([[0], [1]], [10, 14], axis=0)
    recovery = path_recovery(np.repeat([[0], [1]], [19, 5], axis=0), planted_NT, num_experts=2)
    assert recovery.overall == 15 / 24
    assert recovery.experts_F.tolist() == [0, 1]


def test_a_path_that_stops_early_misses_the_rest() -> None:
    planted_NT = np.array([[0, 1], [1, 0], [1, -1]])
    recovery = path_recovery(np.array([[0, -1], [1, -1], [1, 0]]), planted_NT, num_experts=2)
    assert recovery.overall == 3 / 5
    assert recovery.same_length == 0.0
    shorter = path_recovery(np.array([[0], [1], [1]]), planted_NT, num_experts=2)
    assert (shorter.overall, shorter.same_length) == (3 / 5, 1 / 3)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 paths and 3 planted paths"):
        path_recovery(np.zeros((2, 1), int), np.zeros((3, 1), int), 2)
    with pytest.raises(ValueError, match="no planted path has a step"):
        path_recovery(np.zeros((2, 1), int), np.full((2, 1), -1), 2)


def test_regret_is_the_mean_difference_with_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    forced_N, own_N = rng.random(4000) < 0.9, rng.random(4000) < 0.6
    regret = router_regret(forced_N, own_N)
    assert regret.regret == pytest.approx(forced_N.mean() - own_N.mean())
    assert regret.standard_error == pytest.approx(np.sqrt((0.09 + 0.24) / 4000), rel=0.05)  # independent here
    assert router_regret(own_N, own_N) == (0.0, 0.0)
