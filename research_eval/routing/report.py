"""Metrics of a router, computed from recorded paths as plain arrays.

S samples  T steps of a path  N experts  A actions (the experts, then perhaps stopping)  C classes  X variables
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

PERMUTATIONS = 100  # shuffles for the null distribution
DEAD = 0.01  # share of an even load below which an expert is dead


def load_metrics(counts_TN: NDArray[np.int64]) -> dict[str, Any]:
    """Share of decisions per step (or layer) and expert. An expert below 1 % of a fair share is dead."""
    total_N = counts_TN.sum(0)
    share_N = total_N / max(int(total_N.sum()), 1)
    fair = 1 / len(share_N)
    return {
        "expert_load": (counts_TN / np.maximum(counts_TN.sum(1, keepdims=True), 1)).round(6).tolist(),
        "expert_load_cv": float(share_N.std() / fair),
        "dead_experts": int((share_N < DEAD * fair).sum()),
    }


def path_metrics(paths_ST: NDArray[np.int64], entropies_ST: NDArray[np.floating], num_experts: int) -> dict[str, Any]:
    """Load per step, dead experts, path lengths, transitions (start first, stop last), most common paths.

    Paths are -1 after their end, where the entropies are 0. Entropy is divided by log N: 1 is undecided, 0 is certain.
    Without samples the result is empty.
    """
    if not len(paths_ST):
        return {}
    running_ST = paths_ST >= 0
    lengths_S = running_ST.sum(1)
    num_steps = paths_ST.shape[1]
    load_TN = np.stack([np.bincount(step_S[step_S >= 0], minlength=num_experts) for step_S in paths_ST.T])
    scale = np.log(max(num_experts, 2))
    step_entropy_T = entropies_ST.sum(0) / np.maximum(running_ST.sum(0), 1) / scale
    return {
        **load_metrics(load_TN),
        "router_entropy": float(entropies_ST.sum() / max(int(lengths_S.sum()), 1) / scale),
        "step_entropy": [round(float(value), 6) for value in step_entropy_T],
        "mean_path_length": float(lengths_S.mean()),
        "path_length_histogram": np.bincount(lengths_S, minlength=num_steps + 1).tolist(),
        **transition_metrics(paths_ST, num_experts),
    }


def transition_metrics(paths_ST: NDArray[np.int64], num_experts: int) -> dict[str, Any]:
    """The number of samples that move from expert to expert, in all and at each step, and the most common paths.

    The nodes of the matrices are the experts, then start, then stop.
    """
    start, stop = num_experts, num_experts + 1
    edge_S1 = np.full((len(paths_ST), 1), start)
    nodes = np.concatenate([edge_S1, np.where(paths_ST >= 0, paths_ST, stop), edge_S1 * 0 + stop], axis=1)
    transitions = np.zeros((paths_ST.shape[1] + 1, stop + 1, stop + 1), np.int64)
    for step, flow in enumerate(transitions):
        moving_S = nodes[:, step] != stop
        np.add.at(flow, (nodes[moving_S, step], nodes[moving_S, step + 1]), 1)
    common = Counter(tuple(int(e) for e in path[path >= 0]) for path in paths_ST).most_common(10)
    return {
        "transition_matrix": transitions.sum(0).tolist(),
        "step_transitions": transitions.tolist(),
        "common_paths": [[list(path), count] for path, count in common],
    }


def routing_report(
    paths_ST: NDArray[np.int64],
    labels_S: NDArray[np.int64] | None,
    num_classes: int,
    groups_S: NDArray[np.int64] | None = None,
    values_STA: NDArray[np.floating] | None = None,
    with_lengths: bool = True,
) -> dict[str, Any]:
    """How paths depend on their samples: specialisation and lengths per class and per group.

    `labels` is None for samples without classes. `with_lengths` is False if all paths have the same length by design.
    """
    report: dict[str, Any] = {}
    if labels_S is not None:
        report |= specialisation(paths_ST, labels_S, "class")
    if labels_S is not None and with_lengths:
        report["path_length_by_class"] = [
            _length_histogram(paths_ST[labels_S == label]) for label in range(num_classes)
        ]
    if groups_S is not None:
        report |= specialisation(paths_ST, groups_S, "group")
    if groups_S is not None and with_lengths:
        report["path_length_by_group"] = [
            [int(group), _length_histogram(paths_ST[groups_S == group])] for group in np.unique(groups_S)
        ]
    if values_STA is not None:
        report["mean_values"] = _mean_values(paths_ST, values_STA)
    return report


def _length_histogram(paths_ST: NDArray[np.int64]) -> list[int]:
    """Number of paths with 0, 1, ..., T steps."""
    lengths: list[int] = np.bincount((paths_ST >= 0).sum(1), minlength=paths_ST.shape[1] + 1).tolist()
    return lengths


def _mean_values(paths_ST: NDArray[np.int64], values_STA: NDArray[np.floating]) -> list[list[float] | None]:
    """Mean value of every action at each step, over the samples that took the step; None if no sample took it."""
    means: list[list[float] | None] = []
    for taken_S, values_SA in zip(paths_ST.T >= 0, values_STA.swapaxes(0, 1), strict=True):
        means.append(values_SA[taken_S].mean(0, dtype=float).round(6).tolist() if taken_S.any() else None)
    return means


# --------------------------------------------------------------------------------------------------- specialisation


def normalized_mutual_information(first: ArrayLike, second: ArrayLike) -> float:
    """2 I(x; y) / (H(x) + H(y)) of two labellings of the same samples: 0 if independent, 1 if equal up to names.

    For two constants it is 1, as in scikit-learn.
    """
    first_S, second_S = _codes(first), _codes(second)
    return float(_nmi(_entropy(first_S), _entropy(second_S), _joint_entropy(first_S, second_S)))


def specialisation(
    paths_ST: NDArray[np.int64], kinds_S: NDArray[np.int64], kind: str, permutations: int = PERMUTATIONS, seed: int = 0
) -> dict[str, Any]:
    """Normalised mutual information between the sample's kind and the expert at each step, and the whole path.

    The end of a path counts as one more expert. A finite number of samples shows some information by chance. The null
    is the same figure after the kinds are shuffled among the samples: its mean and 95th percentile over `permutations`
    shuffles. `adjusted` is (value - null mean) / (1 - null mean): 0 for chance, 1 at best.
    """
    _, whole_S = np.unique(paths_ST, axis=0, return_inverse=True)
    variables = [_codes(step_S) for step_S in paths_ST.T] + [whole_S.ravel()]
    kinds_S = _codes(kinds_S)
    entropy_X = np.array([_entropy(codes_S) for codes_S in variables])
    entropy = _entropy(kinds_S)
    generator = np.random.default_rng(seed)

    def information(order_S: NDArray[np.int64]) -> NDArray[np.float64]:
        joint_X = np.array([_joint_entropy(codes_S, order_S) for codes_S in variables])
        return _nmi(entropy_X, entropy, joint_X)

    value_X = information(kinds_S)
    null_PX = np.stack([information(generator.permutation(kinds_S)) for _ in range(permutations)])
    mean_X = null_PX.mean(0)
    figures = {
        "nmi": value_X,
        "nmi_null": mean_X,
        "nmi_null_p95": np.percentile(null_PX, 95, axis=0),
        "nmi_adjusted": np.where(mean_X < 1, (value_X - mean_X) / np.maximum(1 - mean_X, 1e-12), 0.0),
    }
    report: dict[str, Any] = {f"path_{kind}_{name}": float(values_X[-1]) for name, values_X in figures.items()}
    return report | {f"step_{kind}_{name}": values_X[:-1].round(6).tolist() for name, values_X in figures.items()}


def _codes(values: ArrayLike) -> NDArray[np.int64]:
    """The labelling with numbers from 0 as labels."""
    codes: NDArray[np.int64] = np.unique(np.asarray(values), return_inverse=True)[1].ravel()
    return codes


def _entropy(codes_S: NDArray[np.int64]) -> float:
    """Entropy of a labelling in nats."""
    counts = np.bincount(codes_S)
    shares = counts[counts > 0] / max(len(codes_S), 1)
    return float(-(shares * np.log(shares)).sum())


def _joint_entropy(first_S: NDArray[np.int64], second_S: NDArray[np.int64]) -> float:
    """Entropy in nats of the pairs of two labellings."""
    return _entropy(first_S * (int(second_S.max(initial=0)) + 1) + second_S)


def _nmi(first: Any, second: Any, joint: Any) -> Any:
    """Normalised mutual information from the entropies of two labellings and of their pairs."""
    total = np.asarray(first + second)
    information = np.maximum(total - joint, 0.0)  # rounding may leave it below 0
    return np.where(total > 0, 2 * information / np.where(total > 0, total, 1.0), 1.0)
