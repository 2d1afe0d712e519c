"""Planted paths: the generator against the slow walk, and what each knob promises.

N samples  T steps  C compositions
"""

from __future__ import annotations

import doctest
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_eval.datasets import planted_paths
from research_eval.datasets.planted_paths import PlantedPathsDataset, answers, bayes_accuracy, solve
from research_eval.datasets.synthetic import synthetic_splits
from research_eval.datasets.token_data import DataSplits, TokenData
from research_eval.errors import ConfigError


def splits_of(seed: int = 0, **params: Any) -> tuple[PlantedPathsDataset, DataSplits]:
    return PlantedPathsDataset(**params), synthetic_splits("planted_paths", params, seed)


def parts(splits: DataSplits) -> dict[str, TokenData]:
    assert splits.test is not None
    return {
        "train": splits.train,
        "validation": splits.validation,
        "test": splits.test,
        **splits.further_tests,
    }


def planted(data: TokenData) -> list[tuple[int, ...]]:
    """The path of each sample, without what stands behind its end."""
    assert data.paths is not None
    return [tuple(step for step in path if step >= 0) for path in data.paths.tolist()]


@st.composite
def knobs(draw: st.DrawFn) -> dict[str, Any]:
    """Parameters that work."""
    functions, depth = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    cue = draw(st.sampled_from(["operand", "none"]))
    return {
        "num_samples": draw(st.integers(2, 60)),
        "num_functions": functions,
        "depth": depth,
        "min_depth": draw(st.integers(1, depth)),
        "num_values": draw(st.integers(2, 6)),
        "num_operands": draw(st.sampled_from([2, 4]) if cue == "operand" else st.integers(1, 3)),
        "unseen_compositions": draw(st.sampled_from([0.0, 0.2])) if functions > 1 and depth > 1 else 0.0,
        "ambiguity": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "ambiguity_cue": cue,
        "imbalance": draw(st.sampled_from([0.0, 1.5])),
        "task_seed": draw(st.integers(0, 3)),
    }


def test_the_documented_sample_is_right() -> None:
    assert doctest.testmod(planted_paths) == (0, 3)


@settings(deadline=None, max_examples=60)
@given(knobs(), st.integers(0, 2**16))
def test_labels_and_paths_agree_with_the_slow_walk(params: dict[str, Any], seed: int) -> None:
    task, splits = splits_of(seed, **params)
    assert splits.vocab_size == task.vocab_size + 1
    assert splits.num_classes == params["num_values"]
    certain = params["ambiguity"] == 0.0 or params["ambiguity_cue"] == "operand"
    for name, data in parts(splits).items():
        assert data.groups is not None
        for row, path in enumerate(planted(data)):
            tokens, label = data.sample(row), int(data.labels[row])
            assert len(path) == len(tokens) - 2 == data.groups[row]
            assert params["min_depth"] <= len(path) <= params["depth"]
            operand, value = tokens[-2] - task.first_operand, tokens[-1] - task.first_operand - params["num_operands"]
            for function in path:
                value = task.contents_FOV[function, operand, value]
            assert label == value
            possible = answers(tokens, task, unseen=name == "unseen")
            assert label in possible
            assert sum(possible.values()) == pytest.approx(1.0)
            if certain:
                assert possible == {label: 1.0}
                if name != "unseen":
                    assert solve(tokens, task) == label


@settings(deadline=None, max_examples=30)
@given(knobs())
def test_every_function_is_a_permutation_for_each_operand(params: dict[str, Any]) -> None:
    task = PlantedPathsDataset(**params)
    assert task.contents_FOV.shape == (params["num_functions"], params["num_operands"], params["num_values"])
    assert (np.sort(task.contents_FOV, axis=-1) == np.arange(params["num_values"])).all()


def test_the_task_stays_while_the_samples_change() -> None:
    params = {"num_samples": 100, "unseen_compositions": 0.3}
    task, first = splits_of(0, **params)
    _, other = splits_of(1, **params)
    assert first.fingerprint["sha256"] != other.fingerprint["sha256"]
    assert first.fingerprint == splits_of(0, **params)[1].fingerprint
    again = PlantedPathsDataset(**params)
    assert np.array_equal(task.contents_FOV, again.contents_FOV)
    assert task.withheld == again.withheld
    different = PlantedPathsDataset(**params, task_seed=1)
    assert not np.array_equal(task.contents_FOV, different.contents_FOV)
    assert task.withheld != different.withheld


@pytest.mark.parametrize(("functions", "depth", "share"), [(8, 2, 0.25), (3, 3, 0.5), (4, 2, 0.0), (2, 2, 0.5)])
def test_unseen_compositions_are_in_their_own_split_only(functions: int, depth: int, share: float) -> None:
    params = {"num_functions": functions, "depth": depth, "unseen_compositions": share, "num_samples": 20_000}
    task, splits = splits_of(**params, num_values=4)
    assert len(task.withheld) == round(share * functions**depth)
    assert task.further_tests == (("unseen",) if share else ())
    seen = set(planted(splits.train)) | set(planted(splits.validation)) | set(planted(splits.test))
    full = {path for path in seen if len(path) == depth}
    assert not full & task.withheld
    assert len(full | task.withheld) == functions**depth
    if share:
        assert set(planted(splits.further_tests["unseen"])) == task.withheld
    for step in range(depth):
        assert {path[step] for path in full} == set(range(functions))


def test_lengths_functions_and_labels_are_balanced_without_imbalance() -> None:
    _, splits = splits_of(num_samples=30_000, depth=3, min_depth=1, num_functions=4)
    paths = planted(splits.train)
    lengths = Counter(map(len, paths))
    assert all(lengths[length] / 24_000 == pytest.approx(1 / 3, abs=0.015) for length in (1, 2, 3))
    for step in range(3):
        counts = Counter(path[step] for path in paths if len(path) > step)
        assert all(count / counts.total() == pytest.approx(1 / 4, abs=0.02) for count in counts.values())
    assert np.bincount(splits.train.labels) / 24_000 == pytest.approx(np.full(16, 1 / 16), abs=0.01)


def test_imbalance_is_the_exponent_of_the_frequencies() -> None:
    _, splits = splits_of(num_samples=50_000, imbalance=1.0, num_functions=4)
    for step in range(2):
        counts = Counter(path[step] for path in planted(splits.train) if len(path) > step)
        expected = np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12)
        assert [counts[function] / counts.total() for function in range(4)] == pytest.approx(expected, abs=0.015)


def named(task: PlantedPathsDataset, data: TokenData) -> list[list[int]]:
    """What the instructions of each sample name: functions, and pairs from num_functions on."""
    return [
        [token - 1 - step * task.ids_per_step for step, token in enumerate(data.sample(row)[:-2])]
        for row in range(len(data))
    ]


@pytest.mark.parametrize("cue", ["operand", "none"])
def test_ambiguity_hides_one_step_of_its_share_of_the_samples(cue: str) -> None:
    task, splits = splits_of(num_samples=5000, ambiguity=0.3, ambiguity_cue=cue, num_functions=4, depth=3)
    agrees, hidden = [], []
    for row, (path, names) in enumerate(zip(planted(splits.train), named(task, splits.train), strict=True)):
        pairs = [step for step, name in enumerate(names) if name >= 4]
        hidden.append(len(pairs))
        assert all(name == function for name, function in zip(names, path, strict=True) if name < 4)
        for step in pairs:
            assert path[step] // 2 == names[step] - 4
            operand = splits.train.sample(row)[-2] - task.first_operand
            agrees.append(path[step] % 2 == operand % 2)
    assert set(hidden) == {0, 1}
    assert np.mean(hidden) == pytest.approx(0.3, abs=0.04)
    assert np.mean(agrees) == (1.0 if cue == "operand" else pytest.approx(0.5, abs=0.05))


def test_bayes_accuracy_is_what_the_likeliest_answer_gets() -> None:
    params = {"num_samples": 8000, "ambiguity": 0.6, "ambiguity_cue": "none", "imbalance": 0.7, "num_values": 4}
    task, splits = splits_of(**params, num_functions=4, num_operands=2, unseen_compositions=0.25)
    for name, data in parts(splits).items():
        unseen = name == "unseen"
        guesses = [answers(data.sample(row), task, unseen) for row in range(len(data))]
        right = np.mean([max(guess, key=guess.get) == label for guess, label in zip(guesses, data.labels, strict=True)])
        assert bayes_accuracy(data, task, unseen) == pytest.approx(right, abs=4 * np.sqrt(0.25 / len(data)))
        assert unseen or bayes_accuracy(data, task) < 0.95


def test_bayes_accuracy_by_hand() -> None:
    """Functions 0 and 1 are as frequent as 2 to 1; they agree on one value of three."""
    task = PlantedPathsDataset(
        num_functions=2, depth=1, num_values=3, num_operands=1, ambiguity=1.0, ambiguity_cue="none", imbalance=1.0
    )
    task.contents_FOV[:] = [[[0, 1, 2]], [[0, 2, 1]]]
    samples = [[3, 4, 5 + value] for value in range(3)]
    assert [answers(tokens, task) for tokens in samples[:2]] == [
        {0: pytest.approx(1.0)},
        {1: pytest.approx(2 / 3), 2: pytest.approx(1 / 3)},
    ]
    data = TokenData.from_padded(np.array(samples), np.zeros(3, int))
    assert bayes_accuracy(data, task) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert bayes_accuracy(data, PlantedPathsDataset(num_functions=2, depth=1, num_values=3, num_operands=2)) == 1.0


def test_without_ambiguity_everything_can_be_known() -> None:
    task, splits = splits_of(num_samples=300, unseen_compositions=0.2)
    assert bayes_accuracy(splits.train, task) == 1.0
    assert bayes_accuracy(splits.further_tests["unseen"], task, unseen=True) == 1.0


def test_a_withheld_composition_is_no_candidate_where_it_cannot_occur() -> None:
    task = PlantedPathsDataset(num_functions=2, depth=2, num_values=3, num_operands=1, ambiguity_cue="none")
    task.withheld = {(0, 1)}
    tokens = [3, 5, 7, 8]  # a pair, then function 1
    alone = answers(tokens, task)
    assert list(alone.values()) == [1.0]
    reached = task.contents_FOV[1, 0, task.contents_FOV[1, 0, 0]]
    assert list(alone) == [reached]
    assert list(answers(tokens, task, unseen=True)) == [task.contents_FOV[1, 0, task.contents_FOV[0, 0, 0]]]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"depth": 2, "min_depth": 3}, "min_depth=3 is more than depth=2"),
        ({"num_functions": 50, "depth": 3}, "has 125000 compositions; at most 100000"),
        ({"ambiguity": 0.1, "num_operands": 3}, "num_operands=3 is odd"),
        ({"unseen_compositions": 0.9, "num_functions": 4}, r"unseen_compositions=0.9 of 16 .*; 0\.[67]\d still works"),
        ({"unseen_compositions": 0.5, "depth": 1}, "0.00 still works"),
        ({"seq_len": 5}, "depth=2 makes it 4"),
        ({"vocab_size": 65}, "at least 66"),
    ],
)
def test_what_cannot_work_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlantedPathsDataset(**params)
