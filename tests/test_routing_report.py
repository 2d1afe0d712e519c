"""Specialisation against scikit-learn and closed forms, tables against slow counts.

S samples  T steps of a path  A actions
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from research_eval.routing.report import normalized_mutual_information, path_metrics, routing_report, specialisation

labellings = st.integers(1, 30).flatmap(
    lambda size: st.tuples(*[st.lists(st.integers(-1, 4), min_size=size, max_size=size)] * 2)
)


@settings(deadline=None, max_examples=80)
@given(pair=labellings)
def test_information_is_that_of_scikit_learn(pair: tuple[list[int], list[int]]) -> None:
    first, second = pair
    expected = normalized_mutual_info_score(first, second)
    assert normalized_mutual_information(first, second) == pytest.approx(expected, abs=1e-9)
    assert normalized_mutual_information(second, first) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ([0, 1, 0, 1], [7, 3, 7, 3], 1.0),  # other names
        ([0, 0, 1, 1], [0, 1, 0, 1], 0.0),  # independent
        ([0, 1, 2, 3], [0, 0, 1, 1], 2 / 3),  # 2 log 2 / (2 log 2 + log 2)
        ([5, 5, 5, 5], [0, 1, 0, 1], 0.0),  # one expert for all
    ],
)
def test_known_values_of_information(first: list[int], second: list[int], value: float) -> None:
    assert normalized_mutual_information(first, second) == pytest.approx(value, abs=1e-12)


def test_a_planted_path_tells_the_class_and_shuffled_labels_tell_nothing() -> None:
    """Two steps, each with a bit of the class: half of the information at a step, all of it in the path."""
    rng = np.random.default_rng(1)
    labels_S = rng.integers(0, 4, 1000)
    report = specialisation(np.stack([labels_S // 2, labels_S % 2], axis=1), labels_S, "class")
    assert report["path_class_nmi"] == pytest.approx(1.0)
    assert report["path_class_nmi_adjusted"] == pytest.approx(1.0)
    assert report["step_class_nmi"] == pytest.approx([2 / 3, 2 / 3], abs=0.01)
    shuffled = specialisation(np.stack([labels_S // 2, labels_S % 2], axis=1), rng.permutation(labels_S), "class")
    assert abs(shuffled["path_class_nmi_adjusted"]) < 0.01
    assert shuffled["path_class_nmi"] < 2 * shuffled["path_class_nmi_null_p95"]
    assert shuffled["path_class_nmi_null"] < shuffled["path_class_nmi_null_p95"] < 0.05


def test_the_null_is_what_few_samples_show_by_chance() -> None:
    """With a path for nearly every sample, independent paths seem to tell much; the adjusted value is not fooled."""
    rng = np.random.default_rng(2)
    paths_ST, labels_S = rng.integers(0, 8, (60, 3)), rng.integers(0, 6, 60)
    report = specialisation(paths_ST, labels_S, "class", permutations=200)
    assert report["path_class_nmi"] > 0.5
    assert report["path_class_nmi_null"] == pytest.approx(report["path_class_nmi"], abs=0.05)
    assert abs(report["path_class_nmi_adjusted"]) < 0.2
    draws = [
        normalized_mutual_information(np.unique(paths_ST, axis=0, return_inverse=True)[1], rng.permutation(labels_S))
        for _ in range(400)
    ]
    assert report["path_class_nmi_null"] == pytest.approx(np.mean(draws), abs=0.005)
    assert report["path_class_nmi_null_p95"] == pytest.approx(np.percentile(draws, 95), abs=0.01)


def test_specialisation_repeats_itself_and_leaves_global_generators_alone() -> None:
    rng = np.random.default_rng(3)
    paths_ST, labels_S = rng.integers(-1, 3, (50, 2)), rng.integers(0, 3, 50)
    np.random.seed(5)
    first = specialisation(paths_ST, labels_S, "class")
    drawn = np.random.rand()
    np.random.seed(5)
    assert np.random.rand() == drawn
    assert specialisation(paths_ST, labels_S, "class") == first


def test_the_step_value_counts_a_path_that_ended_as_one_more_expert() -> None:
    paths_ST = np.array([[0, -1], [0, -1], [0, 1], [0, 1]])
    report = specialisation(paths_ST, np.array([0, 0, 1, 1]), "class")
    assert report["step_class_nmi"] == pytest.approx([0.0, 1.0])


def test_the_report_has_a_row_of_lengths_per_class_and_per_group() -> None:
    paths_ST = np.array([[0, 1, 1], [0, -1, -1], [-1, -1, -1], [2, 2, -1], [1, 1, 1]])
    labels_S, groups_S = np.array([0, 0, 2, 2, 0]), np.array([5, 5, 5, -3, 5])
    values_STA = np.arange(5 * 3 * 4, dtype=np.float32).reshape(5, 3, 4)
    report = routing_report(paths_ST, labels_S, 4, groups_S, values_STA)
    assert report["path_length_by_class"] == [[0, 1, 0, 2], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert report["path_length_by_group"] == [[-3, [0, 0, 1, 0]], [5, [1, 1, 0, 2]]]
    # Step 2 is taken by samples 0, 3 and 4, whose values there start at 4, 40 and 52.
    assert report["mean_values"][1] == [32.0, 33.0, 34.0, 35.0]
    assert "path_group_nmi" in report
    plain = routing_report(paths_ST, labels_S, 4)
    assert not {name for name in plain if "group" in name or "values" in name}
    never = routing_report(np.full((2, 1), -1), np.array([0, 1]), 2, None, np.ones((2, 1, 3)))
    assert never["mean_values"] == [None]


def test_entropy_is_normalised_at_every_step_by_the_decisions_taken_there() -> None:
    paths_ST = np.array([[0, 1], [1, -1]])
    metrics = path_metrics(paths_ST, np.log(4) * np.array([[1.0, 0.5], [0.5, 0.0]]), num_experts=4)
    assert metrics["step_entropy"] == pytest.approx([0.75, 0.5])
    assert metrics["router_entropy"] == pytest.approx(2 / 3)
    assert path_metrics(np.zeros((0, 2), np.int64), np.zeros((0, 2)), 4) == {}
