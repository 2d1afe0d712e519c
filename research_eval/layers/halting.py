"""When a path ends: exit probabilities, what they cost, and the threshold of a confident exit.

B batch  X exits, in the order of depth  N samples
"""

from __future__ import annotations

import torch
from torch import Tensor

from research_eval.layers.routing import entropy

EXIT_TOLERANCE = 0.005  # accuracy that leaving early may cost on the validation split


def exit_probabilities(stop_XB: Tensor) -> Tensor:
    """pi_t = p_stop,t prod_{k<t} (1 - p_stop,k); the last exit takes the remainder, [X + 1, B]."""
    survive_XB = (1 - stop_XB).cumprod(0)
    reached_XB = torch.cat([torch.ones_like(survive_XB[:1]), survive_XB])
    return reached_XB * torch.cat([stop_XB, torch.ones_like(stop_XB[:1])])


def geometric_prior_kl(pi_XB: Tensor, rate: float) -> Tensor:
    """Mean KL of the exit probabilities to a truncated geometric distribution (PonderNet, Banino et al., 2021)."""
    exits_X = torch.arange(len(pi_XB), device=pi_XB.device, dtype=pi_XB.dtype)
    prior_X = (rate * (1 - rate) ** exits_X) / (rate * (1 - rate) ** exits_X).sum()
    return -(entropy(pi_XB.T) + (pi_XB.T * prior_X.log()).sum(-1)).mean()


def expected_length(pi_XB: Tensor, shortest: int) -> Tensor:
    """E[path length] when the first exit lies behind `shortest` steps; differentiable, unlike the length itself."""
    exits_X = torch.arange(len(pi_XB), device=pi_XB.device, dtype=pi_XB.dtype)
    return ((exits_X + shortest).unsqueeze(1) * pi_XB).sum(0).mean()


def calibrated_threshold(confidence_XN: Tensor, correct_XN: Tensor) -> float:
    """The smallest threshold (in steps of 0.01) at which leaving early costs at most 0.005 of the accuracy.

    A sample leaves at its first exit whose largest class probability is above the threshold, at the last exit at the
    latest. 1 is full depth.
    """
    full_depth = float(correct_XN[-1].double().mean())
    for threshold in torch.arange(100) / 100:
        leaves_XN = confidence_XN > threshold.to(confidence_XN.device)
        leaves_XN[-1] = True
        first_N = leaves_XN.int().argmax(0)
        accuracy = float(correct_XN.gather(0, first_N.unsqueeze(0)).double().mean())
        if accuracy >= full_depth - EXIT_TOLERANCE:
            return float(threshold)
    return 1.0
