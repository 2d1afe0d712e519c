"""The value of a decision: returns of paths, and the reward at their end.

B batch  T decisions of a path
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from research_eval.layers.collective import first_of_batch
from research_eval.layers.routing import mean_of_rows

DECAY = 0.98  # of the running mean and variance of the reward
REWARD_LIMIT = 2.0


def path_returns(
    decided_TB: Tensor,
    executed_TB: Tensor,
    best_value_TB: Tensor,
    reward_B: Tensor,
    price: float,
    discount: float,
    trace_decay: float,
) -> Tensor:
    """G_t = r_t + gamma ((1 - lambda) max_a Q(s_t+1, a) + lambda G_t+1), and r_t + R for the last decision; [T, B].

    r_t = -`price` if an expert was executed. `best_value` is the largest value of a permitted action, without gradient.
    `trace_decay` is lambda (Sutton and Barto, 2018, ch. 12); 1 is Monte Carlo. The return is zero after the end of a
    path.
    """
    step_reward_TB = -price * executed_TB.to(reward_B.dtype)
    returns_TB = torch.zeros_like(step_reward_TB)
    for t in reversed(range(len(decided_TB))):
        is_last_B = decided_TB[t] if t + 1 == len(decided_TB) else decided_TB[t] & ~decided_TB[t + 1]
        future_B = reward_B
        if t + 1 < len(decided_TB):
            bootstrap_B = (1 - trace_decay) * best_value_TB[t + 1] + trace_decay * returns_TB[t + 1]
            future_B = torch.where(is_last_B, reward_B, discount * bootstrap_B)
        returns_TB[t] = (step_reward_TB[t] + future_B) * decided_TB[t]
    return returns_TB


class RewardNormalizer(nn.Module):
    """R = clip((r - mu) / (sigma + 1e-6), -2, 2). The running mu and sigma are updated before they are used."""

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("variance", torch.zeros(()))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def forward(self, reward_B: Tensor) -> Tensor:
        """Rewards of one training batch, [B] -> [B]."""
        reward_B = reward_B.float()
        first = first_of_batch(reward_B)
        mean = first + mean_of_rows(reward_B - first)  # exact when all are equal
        self.mean.copy_(torch.where(self.batches > 0, self.mean.lerp(mean, 1 - DECAY), mean))
        variance = mean_of_rows((reward_B - self.mean).square())
        self.variance.copy_(torch.where(self.batches > 0, self.variance.lerp(variance, 1 - DECAY), variance))
        self.batches += 1
        return ((reward_B - self.mean) / (self.variance.sqrt() + 1e-6)).clamp(-REWARD_LIMIT, REWARD_LIMIT)
