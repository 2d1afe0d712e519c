"""Exit probabilities of a path, their costs, and the threshold of a confident exit.

B batch  X exits, in the order of depth  N samples
"""

from __future__ import annotations

import torch
from torch import Tensor

from research_eval.layers.routing import entropy, mean_of_rows

EXIT_TOLERANCE = 0.005  # largest loss of validation accuracy by early exits


def exit_probabilities(stop_XB: Tensor) -> Tensor:
    """pi_t = p_stop,t prod_{k<t} (1 - p_stop,k); the last exit receives the remaining probability, [X + 1, B]."""
    survive_XB = (1 - stop_XB).cumprod(0)
    reached_XB = torch.cat([torch.ones_like(survive_XB[:1]), survive_XB])
    return reached_XB * torch.cat([stop_XB, torch.ones_like(stop_XB[:1])])


def geometric_prior_kl(pi_XB: Tensor, rate: float) -> Tensor:
    """Mean KL of the exit probabilities to a truncated geometric distribution (PonderNet, Banino et al., 2021)."""
    exits_X = torch.arange(len(pi_XB), device=pi_XB.device, dtype=pi_XB.dtype)
    prior_X = (rate * (1 - rate) ** exits_X) / (rate * (1 - rate) ** exits_X).sum()
    return -mean_of_rows(entropy(pi_XB.T) + (pi_XB.T * prior_X.log()).sum(-1))


def expected_length(pi_XB: Tensor, shortest: int) -> Tensor:
    """E[path length] if the first exit is after `shortest` steps. It is differentiable; the sampled length is not."""
    exits_X = torch.arange(len(pi_XB), device=pi_XB.device, dtype=pi_XB.dtype)
    return mean_of_rows(((exits_X + shortest).unsqueeze(1) * pi_XB).sum(0))


def calibrated_threshold(confidence_XN: Tensor, correct_XN: Tensor) -> float:
    """The smallest threshold (in steps of 0.01) at which early exits cost at most EXIT_TOLERANCE of accuracy.

    A sample takes the first exit whose largest class probability exceeds the threshold, or the last exit. A threshold
    of 1 always gives full depth.
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
