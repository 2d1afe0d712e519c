"""Whether a router found the planted path. Experts have arbitrary numbers, so they are first matched to functions.

N samples  T steps  F functions  E experts
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

ENDED = -1  # after the last step of a path
Paths = NDArray[np.integer]


class PathRecovery(NamedTuple):
    """Shares of the planted decisions that took the matched expert, and the same shares for independent routing.

    A router that uses its experts equally often, but independently of the sample, gets the share `..._by_chance`.
    Compare with this share and not with zero. A path that stops early misses the decisions after its end.
    """

    per_step: float  # each step has its own matching
    per_step_by_chance: float
    overall: float  # one matching for all steps: an expert is the same function everywhere
    overall_by_chance: float
    same_length: float  # share of the paths that are as long as the planted one
    experts_TF: NDArray[np.int64]  # the expert matched to each function at each step
    experts_F: NDArray[np.int64]  # the expert matched to each function over all steps


class Regret(NamedTuple):
    """The accuracy that the router's own choice loses, and the standard error of this loss."""

    regret: float
    standard_error: float


def path_recovery(paths_NT: Paths, planted_NT: Paths, num_experts: int) -> PathRecovery:
    """Compare the taken paths with the planted ones. Both are -1 after their end; the shorter array is extended.

    The matching is the one with the largest agreement (Kuhn, 1955). If there are fewer experts than functions, some
    functions have no expert and count as missed. Raises ValueError if the numbers of paths differ or no planted path
    has a step.
    """
    if len(paths_NT) != len(planted_NT):
        raise ValueError(f"{len(paths_NT)} paths and {len(planted_NT)} planted paths: give both of every sample")
    num_steps = max(paths_NT.shape[1], planted_NT.shape[1])
    paths_NT, planted_NT = _filled(paths_NT, num_steps), _filled(planted_NT, num_steps)
    num_functions = int(planted_NT.max(initial=ENDED)) + 1
    if num_functions == 0:
        raise ValueError("no planted path has a step")
    counts_TFE = np.zeros((num_steps, num_functions, num_experts + 1))  # the last column: the path had ended
    step_NT = np.broadcast_to(np.arange(num_steps), planted_NT.shape)
    planted = planted_NT != ENDED
    taken = np.where(paths_NT == ENDED, num_experts, paths_NT)
    np.add.at(counts_TFE, (step_NT[planted], planted_NT[planted], taken[planted]), 1)
    totals_TF = counts_TFE.sum(2)
    expected_TFE = totals_TF[:, :, None] * counts_TFE.sum(1)[:, None] / np.maximum(totals_TF.sum(1), 1)[:, None, None]
    decisions = totals_TF.sum()
    counts_TFE, expected_TFE = counts_TFE[..., :-1], expected_TFE[..., :-1]
    return PathRecovery(
        sum(map(_agreement, counts_TFE)) / decisions,
        sum(map(_agreement, expected_TFE)) / decisions,
        _agreement(counts_TFE.sum(0)) / decisions,
        _agreement(expected_TFE.sum(0)) / decisions,
        float(((paths_NT != ENDED).sum(1) == planted.sum(1)).mean()),
        np.stack([_experts(counts_FE) for counts_FE in counts_TFE]),
        _experts(counts_TFE.sum(0)),
    )


def router_regret(correct_forced_N: NDArray[np.bool_], correct_own_N: NDArray[np.bool_]) -> Regret:
    """Accuracy along the planted paths minus accuracy along the model's own, on the same samples in the same order.

    The model follows the planted paths with the experts of `PathRecovery.experts_TF`. The standard error is that of the
    mean of the paired differences.
    """
    difference_N = correct_forced_N.astype(float) - correct_own_N
    return Regret(float(difference_N.mean()), float(difference_N.std(ddof=1) / np.sqrt(len(difference_N))))


def _filled(paths_NT: Paths, num_steps: int) -> Paths:
    """Extend paths with ENDED to `num_steps` steps."""
    return np.pad(paths_NT, [(0, 0), (0, num_steps - paths_NT.shape[1])], constant_values=ENDED)


def _agreement(counts_FE: NDArray[np.float64]) -> float:
    """The number of decisions that agree under the best matching."""
    return float(counts_FE[linear_sum_assignment(counts_FE, maximize=True)].sum())


def _experts(counts_FE: NDArray[np.float64]) -> NDArray[np.int64]:
    """The matched expert of each function; for a function without a match, the expert that it meets most often."""
    functions, experts = linear_sum_assignment(counts_FE, maximize=True)
    experts_F = counts_FE.argmax(1)
    experts_F[functions] = experts
    return experts_F
