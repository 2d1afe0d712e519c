"""Exit probabilities, their costs and the exit threshold against slow spellings of the same thing.

B batch  X exits  N samples
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from research_eval.layers.path.exits import (
    calibrated_threshold,
    exit_probabilities,
    expected_length,
    geometric_prior_kl,
)

probabilities = st.floats(0, 1, width=32)


@given(stops=st.lists(st.lists(probabilities, min_size=2, max_size=2), min_size=1, max_size=5))
def test_exit_probabilities_are_a_distribution(stops: list[list[float]]) -> None:
    """What is left by the exits before the last leaves there; sure stops and sure steps included."""
    pi_XB = exit_probabilities(torch.tensor(stops))
    assert len(pi_XB) == len(stops) + 1
    assert (pi_XB >= 0).all()
    assert_close(pi_XB.sum(0), torch.ones(2))
    for sample in range(2):
        left = 1.0
        for step, stop in enumerate(stops):
            assert float(pi_XB[step, sample]) == pytest.approx(left * stop[sample], abs=1e-6)
            left *= 1 - stop[sample]


@given(stops=st.lists(probabilities, min_size=1, max_size=4), shortest=st.integers(0, 3))
def test_the_expected_length_is_the_mean_over_exits(stops: list[float], shortest: int) -> None:
    pi_X1 = exit_probabilities(torch.tensor(stops).unsqueeze(1))
    expected = sum((shortest + steps) * float(pi) for steps, pi in enumerate(pi_X1[:, 0]))
    assert float(expected_length(pi_X1, shortest)) == pytest.approx(expected, abs=1e-5)


def test_known_values_of_the_expected_length_and_of_its_gradient() -> None:
    """Exits behind 1, 2 and 3 steps. One more chance to stop shortens the path by what is expected behind it."""
    stop_XB = torch.tensor([[0.5, 1.0, 0.0], [0.5, 0.5, 0.0]], requires_grad=True)
    lengths = expected_length(exit_probabilities(stop_XB), shortest=1)
    assert_close(lengths.detach(), torch.tensor((1.75 + 1.0 + 3.0) / 3))
    (gradient_XB,) = torch.autograd.grad(lengths, stop_XB)
    # E = 1 + (1 - p) + (1 - p)(1 - q)
    assert_close(gradient_XB * 3, torch.tensor([[-1.5, -1.5, -2.0], [-0.5, 0.0, -1.0]]))


def test_known_values_of_the_ponder_prior() -> None:
    """Rate 0.4 over three exits: 0.4, 0.24, 0.144 of 0.784."""
    prior = [0.4 / 0.784, 0.24 / 0.784, 0.144 / 0.784]
    same_XB = torch.tensor(prior).unsqueeze(1)
    assert_close(geometric_prior_kl(same_XB, 0.4), torch.tensor(0.0), rtol=0, atol=1e-6)
    first_XB, last_XB = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[0.0], [0.0], [1.0]])
    assert_close(geometric_prior_kl(first_XB, 0.4), torch.tensor(-math.log(prior[0])), rtol=1e-5, atol=1e-5)
    both_XB = torch.cat([first_XB, last_XB], 1)  # the mean over samples
    expected = -(math.log(prior[0]) + math.log(prior[2])) / 2
    assert_close(geometric_prior_kl(both_XB, 0.4), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert_close(geometric_prior_kl(torch.ones(1, 4), 0.4), torch.tensor(0.0))


def test_the_ponder_prior_has_finite_gradients_at_sure_exits() -> None:
    stop_XB = torch.tensor([[1.0, 0.0, 0.3], [1.0, 0.0, 0.0]], requires_grad=True)
    pi_XB = exit_probabilities(stop_XB)
    (gradient_XB,) = torch.autograd.grad(geometric_prior_kl(pi_XB, 0.4) + expected_length(pi_XB, 1), stop_XB)
    assert gradient_XB.isfinite().all()


# ----------------------------------------------------------------------------------------------------- the threshold


def accuracy_of(confidences: list[list[int]], corrects: list[list[bool]], threshold: int) -> float:
    """Of the samples at their first exit above the threshold, at the last one at the latest; all in percent."""
    right = 0
    for sample_confidences, sample_corrects in zip(confidences, corrects, strict=True):
        exits = [x for x, confidence in enumerate(sample_confidences) if confidence > threshold]
        right += sample_corrects[min([*exits, len(sample_confidences) - 1])]
    return right / len(confidences)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), exits=st.integers(1, 4), samples=st.integers(1, 30))
def test_the_threshold_is_the_smallest_that_costs_nearly_nothing(data: st.DataObject, exits: int, samples: int) -> None:
    rows = st.lists(st.integers(0, 100), min_size=exits, max_size=exits)
    marks = st.lists(st.booleans(), min_size=exits, max_size=exits)
    confidences = data.draw(st.lists(rows, min_size=samples, max_size=samples), "confidences in percent")
    corrects = data.draw(st.lists(marks, min_size=samples, max_size=samples), "corrects")
    full_depth = sum(row[-1] for row in corrects) / samples
    good = [t for t in range(101) if accuracy_of(confidences, corrects, t) >= full_depth - 0.005]
    threshold = calibrated_threshold(torch.tensor(confidences).T / 100, torch.tensor(corrects).T)
    assert round(100 * threshold) == good[0]


@pytest.mark.parametrize(("lost", "threshold"), [(4, 0.0), (5, 0.0), (6, 0.5)])
def test_the_threshold_may_cost_half_a_percent(lost: int, threshold: float) -> None:
    """Of 1000 samples, all right in the end, `lost` are wrong at their first exit, with confidence 0.5."""
    confidence_XN = torch.ones(2, 1000)
    confidence_XN[0, :lost] = 0.5
    correct_XN = torch.ones(2, 1000, dtype=torch.bool)
    correct_XN[0, :lost] = False
    assert calibrated_threshold(confidence_XN, correct_XN) == pytest.approx(threshold)


def test_a_hopeless_exit_gives_full_depth() -> None:
    confidence_XN, correct_XN = torch.ones(2, 8), torch.tensor([[False] * 8, [True] * 8])
    assert calibrated_threshold(confidence_XN, correct_XN) == 1.0
