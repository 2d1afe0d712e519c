"""What the experts do: shares of experts per class and token, and what chance makes of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from research_eval.datasets.token_data import DataSplits, TokenData
from research_eval.routing import record, roles
from research_eval.routing.record import EvaluationRecorder, RoutingRecord
from research_eval.routing.report import transition_metrics
from research_eval.routing.roles import (
    Usage,
    expert_roles,
    flows_by_kind,
    members_of,
    path_usages,
    role_table,
    spread_evenly,
    token_members,
)
from research_eval.tasks.base import task_of
from research_eval.training.routing_watch import role_metrics


def random_table(seed: int) -> tuple[Any, Any]:
    """200 samples of five classes of different sizes, sent to three experts whatever their class."""
    rng = np.random.default_rng(seed)
    _, member_KU = members_of(rng.choice(5, 200, p=[0.5, 0.2, 0.15, 0.1, 0.05]), list("abcde"))
    return member_KU, np.eye(3, dtype=np.float32)[rng.choice(3, 200, p=[0.6, 0.3, 0.1])]


def test_shares_are_the_means_of_each_kind() -> None:
    member_KU, share_UN = random_table(0)
    share_KN, expected_N, _ = role_table(member_KU, share_UN)
    slow = [[share_UN[member > 0, expert].mean() for expert in range(3)] for member in member_KU]
    np.testing.assert_allclose(share_KN, slow, rtol=1e-5)
    np.testing.assert_allclose(expected_N, share_UN.mean(0), rtol=1e-6)


def test_chance_leaves_the_band_of_a_table_in_one_of_twenty_cases() -> None:
    """In all cells together, not in each of them. Binomial: more than 15 of 100 happens once in 10,000 such tests."""
    outside = 0
    for seed in range(100):
        share_KN, expected_N, band_KN = role_table(*random_table(seed))
        outside += bool((np.abs(share_KN - expected_N) > band_KN).any())
    assert 0 < outside <= 15


def test_a_class_with_an_expert_of_its_own_stands_out() -> None:
    labels_U = np.arange(300) % 3
    expert_U = np.where(labels_U == 2, 1, np.arange(300) // 3 % 2 * 2)  # class 2: expert 1; the others: 0 and 2
    share_KN, expected_N, band_KN = role_table(members_of(labels_U, "abc")[1], np.eye(4, dtype=np.float32)[expert_U])
    clear = np.abs(share_KN - expected_N) > band_KN
    assert clear.tolist() == [[True, True, True, False]] * 3, "expert 3 does nothing, which is the same in all classes"


def test_one_class_tells_nothing() -> None:
    share_KN, expected_N, band_KN = role_table(np.ones((1, 50), np.float32), random_table(0)[1][:50])
    np.testing.assert_allclose(share_KN[0], expected_N, rtol=1e-5)
    assert not band_KN.any()


def test_the_units_of_a_token_contain_it() -> None:
    tokens, samples = np.array([5, 7, 5, 5, 9, 7]), np.array([0, 0, 0, 1, 1, 2])
    times = roles.FEWEST
    many = np.tile(samples, times) + 3 * np.repeat(np.arange(times), 6)
    found, member_KU = token_members(np.tile(tokens, times), many, 3 * times)
    assert found == [5, 7, 9]
    expected = [[1, 1, 0], [1, 0, 1], [0, 1, 0]]
    np.testing.assert_array_equal(member_KU, np.tile(np.array(expected, np.float32), times))
    assert token_members(np.zeros(0, np.int64), np.zeros(0, np.int64), 3)[0] == []


def test_a_path_is_the_mean_of_its_steps_and_its_end_is_a_choice() -> None:
    paths_ST = np.array([[0, 1], [1, -1], [-1, -1]])
    whole, first, second = path_usages(paths_ST, 2, {})
    np.testing.assert_array_equal(whole.share_UN, [[0.5, 0.5], [0, 1], [0, 0]])
    np.testing.assert_array_equal(first.share_UN, [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(second.share_UN, [[0, 1, 0], [0, 0, 1], [0, 0, 1]])


def test_of_many_tokens_the_unevenly_routed_ones_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "MAX_KINDS", 2)
    rng = np.random.default_rng(0)
    member_KU = (rng.random((6, 400)) < 0.2).astype(np.float32)
    expert_U = np.where(member_KU[4] > 0, 0, rng.integers(0, 3, 400))
    usage = Usage("layer 1", np.eye(3, dtype=np.float32)[expert_U], {"token": (list("abcdef"), member_KU)})
    (table,) = expert_roles([usage])
    assert "e" in table["kinds"]
    assert len(table["kinds"]) == 2
    assert table["num_kinds"] == 6
    assert expert_roles([Usage("layer 1", np.zeros((0, 3), np.float32), {"token": (["a"], member_KU[:1, :0])})]) == []


@pytest.mark.parametrize("most", [1, 3, 8, 20])
def test_the_flows_of_the_kinds_add_up_to_those_of_all(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "MAX_FLOWS", most)
    rng = np.random.default_rng(0)
    paths_ST = rng.integers(0, 4, (300, 3))
    paths_ST[np.arange(3) >= rng.integers(0, 4, (300, 1))] = -1
    kinds_S = np.minimum(rng.integers(0, 10, 300), 7)  # the last one is the largest
    found = flows_by_kind(paths_ST, kinds_S, list("abcdefgh"), "class", 4)
    kinds = [kind["kind"] for kind in found]
    total = np.zeros((4, 6, 6), int)
    for kind in found:
        for step, moves in enumerate(kind["flows"]):
            for source, target, count in moves:
                total[step, source, target] += count
    shown = np.isin(kinds_S, ["abcdefgh".index(name) for name in kinds])
    assert total.tolist() == transition_metrics(paths_ST[shown], 4)["step_transitions"]
    assert len(kinds) == min(most, 8)
    assert "h" in kinds


@pytest.mark.parametrize("limit", [10, 10_000])
def test_the_recorder_keeps_token_choices_spread_evenly(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_TOKENS", limit)
    rng = np.random.default_rng(0)
    recorder = EvaluationRecorder(5, 2)
    slow: list[list[tuple[int, int, int]]] = [[], []]
    first = 0
    for batch in range(6):
        sample_D = np.repeat(np.arange(4), 3 + batch)
        token_D = np.tile(np.arange(3 + batch), 4)
        recorder.begin_batch(4)
        for step in range(2):
            experts_DK = np.stack([rng.permutation(5)[:2] for _ in sample_D])
            weights_DK = rng.random((len(sample_D), 2))
            recorder.push(RoutingRecord(step, experts_DK, weights_DK, sample_D, token_D))
            best_D = experts_DK[np.arange(len(sample_D)), weights_DK.argmax(1)]
            slow[step] += zip((first + sample_D).tolist(), token_D.tolist(), best_D.tolist(), strict=True)
        first += 4
    for step in range(2):
        found = list(zip(*(column.tolist() for column in recorder.token_choices(step)), strict=True))
        stride = -(-len(slow[step]) // len(found))  # a power of two
        assert found == slow[step][::stride]
        assert len(found) <= 2 * limit


def test_a_selection_is_spread_over_all() -> None:
    assert spread_evenly(3, 10).tolist() == [0, 1, 2]
    assert spread_evenly(101, 5).tolist() == [0, 25, 50, 75, 100]


def splits_of(tokens_SL: Any, labels_S: Any) -> DataSplits:
    data = TokenData.from_padded(tokens_SL, labels_S)
    return DataSplits(data, data, None, int(tokens_SL.max()) + 1, 2, ["no", "<b>"], tokens_SL.shape[1])


def test_tokens_that_always_go_to_one_expert_stand_out() -> None:
    """The evaluation visits the samples in another order than that of the split: its rows say which they are."""
    rng = np.random.default_rng(0)
    tokens_SL, labels_S = rng.integers(1, 5, (60, 4)), np.arange(60) % 2
    tokens_SL[rng.random((60, 4)) < 0.3] = 0
    tokens_SL = -np.sort(-tokens_SL)  # padding comes last
    tokens_SL[:, 0] = np.maximum(tokens_SL[:, 0], 1)
    rows_S = rng.permutation(60)
    recorder = EvaluationRecorder(3, 1)
    recorder.begin_batch(60)
    sample_D, token_D = np.nonzero(tokens_SL[rows_S])
    ids_D = tokens_SL[rows_S][sample_D, token_D]
    experts_D1 = np.where(ids_D == 2, 1, rng.choice([0, 2], len(ids_D)))[:, None]  # token 2: expert 1
    recorder.push(RoutingRecord(0, experts_D1, np.ones(experts_D1.shape), sample_D, token_D))
    model, evaluation = SimpleNamespace(recorder=lambda: recorder), SimpleNamespace(rows_N=rows_S)
    splits = splits_of(tokens_SL, labels_S)
    found = role_metrics(model, evaluation, splits, task_of("classification", splits))  # type: ignore[arg-type]
    classes, tokens = found["expert_roles"]
    assert (classes["grouping"], tokens["grouping"]) == ("class", "token")
    assert {one["step"] for one in found["expert_roles"]} == {"layer 1"}
    assert classes["kinds"] == ["no", "<b>"]
    assert classes["units"] == [30, 30]
    place = tokens["kinds"].index("2")
    assert tokens["share"][place] == [0, 1, 0]
    assert tokens["units"][place] == int((tokens_SL == 2).sum())
    assert 1 - tokens["expected"][1] > tokens["band"][place][1]
    assert [kind["samples"] for kind in found["path_flows"]] == [30, 30]


def test_a_model_without_routing_has_no_roles() -> None:
    model = SimpleNamespace(recorder=lambda: None)
    assert role_metrics(model, None, None, None) == {}  # type: ignore[arg-type]
