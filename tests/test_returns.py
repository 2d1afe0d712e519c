"""Returns by pencil and against a recursion over one sample, and the running normal form of the reward.

B batch  T decisions of a path
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from research_eval.layers.path.returns import RewardNormalizer, path_returns

values = st.floats(-2, 2, width=32)


def test_returns_by_pencil() -> None:
    """Price 0.1, discount 1/2, lambda 0.8. A path of three experts, one that stops at its second decision, a stop."""
    decided_TB = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    executed_TB = torch.tensor([[True, True, False], [True, False, False], [True, False, False]])
    nothing = 1e9  # what a finished sample would have been worth plays no part
    best_value_TB = torch.tensor([[9.0, 9.0, 9.0], [0.4, 0.3, nothing], [0.6, nothing, nothing]])
    returns_TB = path_returns(
        decided_TB, executed_TB, best_value_TB, torch.tensor([1.0, -2.0, 0.5]), 0.1, discount=0.5, trace_decay=0.8
    )
    last = -0.1 + 1.0
    second = -0.1 + 0.5 * (0.2 * 0.6 + 0.8 * last)
    assert_close(returns_TB[:, 0], torch.tensor([-0.1 + 0.5 * (0.2 * 0.4 + 0.8 * second), second, last]))
    assert_close(returns_TB[:, 1], torch.tensor([-0.1 + 0.5 * (0.2 * 0.3 + 0.8 * -2.0), -2.0, 0.0]))
    assert_close(returns_TB[:, 2], torch.tensor([0.5, 0.0, 0.0]))  # stopping is free


@settings(deadline=None, max_examples=50)
@given(
    length=st.integers(1, 4),
    stops=st.booleans(),
    padding=st.integers(0, 2),
    best=st.lists(values, min_size=6, max_size=6),
    reward=values,
    price=st.floats(0, 1),
    discount=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_returns_are_a_recursion_over_one_sample(
    length: int,
    stops: bool,
    padding: int,
    best: list[float],
    reward: float,
    price: float,
    discount: float,
    decay: float,
) -> None:
    """The last decision gets the reward and no bootstrap. A batch mate of full length changes nothing."""

    def slow(t: int) -> float:
        last = t == length - 1
        own = 0.0 if last and stops else -price
        return own + (reward if last else discount * ((1 - decay) * best[t + 1] + decay * slow(t + 1)))

    steps = length + padding
    decided_T = torch.arange(steps) < length
    executed_T = decided_T & ~((torch.arange(steps) == length - 1) & stops)
    mates_TB = torch.ones(steps, 2, dtype=torch.bool)
    mates_TB[:, 0] = decided_T
    executed_TB = torch.stack([executed_T, mates_TB[:, 1]], 1)
    best_TB = torch.tensor(best[:steps]).unsqueeze(1).expand(-1, 2)
    returns_TB = path_returns(mates_TB, executed_TB, best_TB, torch.tensor([reward, 0.0]), price, discount, decay)
    assert_close(returns_TB[:length, 0], torch.tensor([slow(t) for t in range(length)]), rtol=1e-4, atol=1e-5)
    assert not returns_TB[length:, 0].any()


def test_without_discount_and_bootstrap_every_decision_gets_the_reward() -> None:
    everyone_TB = torch.ones(3, 4, dtype=torch.bool)
    reward_B = torch.randn(4)
    returns_TB = path_returns(everyone_TB, everyone_TB, torch.full((3, 4), 7.0), reward_B, 0.0, 1.0, 1.0)
    assert_close(returns_TB, reward_B.expand(3, 4))


# ------------------------------------------------------------------------------------------------------- the reward


def test_the_normal_reward_is_the_formula() -> None:
    """Running mean and variance with decay 0.98, updated before use; the first batch sets them."""
    normalizer, mean, variance = RewardNormalizer(), 0.0, 0.0
    for number in range(5):
        reward_B = torch.randn(8) * (number + 1) - number
        if number == 0:
            mean, variance = float(reward_B.mean()), float(reward_B.var(correction=0))
        else:
            mean = 0.98 * mean + 0.02 * float(reward_B.mean())
            variance = 0.98 * variance + 0.02 * float((reward_B - mean).square().mean())
        expected_B = ((reward_B - mean) / (math.sqrt(variance) + 1e-6)).clamp(-2, 2)
        assert_close(normalizer(reward_B), expected_B, rtol=1e-4, atol=1e-5)
    assert normalizer(torch.tensor([1e6, -1e6])).tolist() == [2.0, -2.0]


@pytest.mark.parametrize("value", [0.0, -0.1, -1.7, 1e4])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_constant_reward_is_exactly_zero(value: float, size: int) -> None:
    normalizer = RewardNormalizer()
    for _ in range(20):
        assert normalizer(torch.full((size,), value)).tolist() == [0.0] * size


def test_batches_of_one_sample_are_finite() -> None:
    normalizer = RewardNormalizer()
    rewards = torch.cat([normalizer(reward.view(1)) for reward in torch.randn(50)])
    assert rewards.isfinite().all()
    assert rewards.abs().max() <= 2
    assert rewards[0] == 0
    assert rewards[1:].unique().numel() > 10


def test_the_normalizer_survives_a_checkpoint() -> None:
    normalizer, copy = RewardNormalizer(), RewardNormalizer()
    normalizer(torch.randn(5))
    copy.load_state_dict(normalizer.state_dict())
    reward_B = torch.randn(5) + 1
    assert torch.equal(normalizer(reward_B), copy(reward_B))
    assert not torch.equal(normalizer(reward_B), RewardNormalizer()(reward_B))
