"""Routing losses, and the record of where samples went.

B batch  R running decisions  N experts  T steps of a path
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

STOPPED = -1


def balance_loss(load_N: torch.Tensor, probabilities_RN: torch.Tensor) -> torch.Tensor:
    """N sum_i f_i P_i (Switch Transformer, Fedus et al., 2021): 1 when uniform, N when one expert takes all.

    `load_N` is the share of decisions per expert, without gradient; P is the mean probability.
    """
    return len(load_N) * (load_N.detach() * probabilities_RN.mean(0)).sum()


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last dimension. The floor keeps the gradient finite at masked actions."""
    return torch.special.entr(probabilities.clamp_min(1e-9)).sum(-1)


def mean_entropy_loss(probabilities_RN: torch.Tensor) -> torch.Tensor:
    """Negative entropy of the mean probabilities: -log N when the batch uses all experts, 0 when one takes all."""
    return -entropy(probabilities_RN.mean(0))


def z_loss(logits_RN: torch.Tensor) -> torch.Tensor:
    """Mean squared log-partition (ST-MoE, Zoph et al., 2022): keeps the logits small."""
    return logits_RN.logsumexp(-1).square().mean()


def balanced_bias(bias_N: torch.Tensor, counts_N: torch.Tensor, rate: float) -> torch.Tensor:
    """b_i - rate * sign(f_i - 1/N), the loss-free balancing of DeepSeek-V3; unchanged when nothing was routed."""
    total = counts_N.sum()
    share_N = counts_N / total.clamp_min(1)
    return bias_N - rate * torch.sign(share_N - 1 / len(bias_N)) * (total > 0)


class PathRecord:
    """Paths of the samples of one evaluation, and what follows from them."""

    def __init__(self, num_experts: int, num_steps: int) -> None:
        self.num_experts = num_experts
        self.num_steps = num_steps
        self.clear()

    def clear(self) -> None:
        self._paths: list[torch.Tensor] = []
        self._entropies: list[torch.Tensor] = []

    def add(self, path_BT: torch.Tensor, entropy_BT: torch.Tensor) -> None:
        """Experts taken (STOPPED behind the end) and the entropy of each decision (0 behind the end)."""
        self._paths.append(path_BT.detach())
        self._entropies.append(entropy_BT.detach())

    def paths(self) -> NDArray[np.int64]:
        """All recorded paths, [samples, T]."""
        if not self._paths:
            return np.zeros((0, self.num_steps), np.int64)
        return torch.cat(self._paths).cpu().numpy()

    def metrics(self) -> dict[str, Any]:
        """Load per step, dead experts, path lengths, transitions (start first, stop last), most common paths.

        Entropy is divided by log N: 1 is undecided, 0 is certain.
        """
        paths_ST = self.paths()
        if not len(paths_ST):
            return {}
        lengths = (paths_ST != STOPPED).sum(1)
        load_TN = np.stack([np.bincount(step[step >= 0], minlength=self.num_experts) for step in paths_ST.T])
        start, stop = self.num_experts, self.num_experts + 1
        column = np.full((len(paths_ST), 1), start)
        nodes = np.concatenate([column, np.where(paths_ST < 0, stop, paths_ST), column * 0 + stop], axis=1)
        transitions_TAA = np.zeros((self.num_steps + 1, stop + 1, stop + 1), np.int64)
        for step, flow_AA in enumerate(transitions_TAA):
            moving = nodes[:, step] != stop
            np.add.at(flow_AA, (nodes[moving, step], nodes[moving, step + 1]), 1)
        common = Counter(tuple(int(e) for e in path[path >= 0]) for path in paths_ST).most_common(10)
        mean_entropy = float(torch.cat(self._entropies).sum()) / max(int(lengths.sum()), 1)
        return {
            **load_metrics(load_TN),
            "router_entropy": float(mean_entropy / np.log(max(self.num_experts, 2))),
            "mean_path_length": float(lengths.mean()),
            "path_length_histogram": np.bincount(lengths, minlength=self.num_steps + 1).tolist(),
            "transition_matrix": transitions_TAA.sum(0).tolist(),
            "step_transitions": transitions_TAA.tolist(),
            "common_paths": [[list(path), count] for path, count in common],
        }


def load_metrics(counts_TN: NDArray[np.int64]) -> dict[str, Any]:
    """Share of decisions per step (or layer) and expert; experts that got less than 1 % of a fair share are dead."""
    total_N = counts_TN.sum(0)
    share_N = total_N / max(int(total_N.sum()), 1)
    fair = 1 / len(share_N)
    return {
        "expert_load": (counts_TN / np.maximum(counts_TN.sum(1, keepdims=True), 1)).round(6).tolist(),
        "expert_load_cv": float(share_N.std() / fair),
        "dead_experts": int((share_N < 0.01 * fair).sum()),
    }
