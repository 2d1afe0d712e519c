"""Routing losses, and the record of where samples went.

B batch  R running decisions  N experts  T steps of a path
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from research_eval.analysis.routing_report import load_metrics as load_metrics
from research_eval.analysis.routing_report import path_metrics

STOPPED = -1


def members(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """True at the expert of each decision, [..., N]; unlike `one_hot` it never looks at the values from the host."""
    return experts.unsqueeze(-1) == torch.arange(num_experts, device=experts.device)


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


def contrastive_loss(delta_RD: torch.Tensor, experts_R: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Mean of cos^2 between the mean changes that two experts made, over the pairs of experts in use."""
    member_RN = members(experts_R, num_experts)
    counts_N = member_RN.sum(0)
    means_ND = (member_RN.T.to(delta_RD.dtype) @ delta_RD)[counts_N > 0] / counts_N[counts_N > 0, None]
    directions_ND = torch.nn.functional.normalize(means_ND, dim=-1)
    pairs = torch.triu_indices(len(directions_ND), len(directions_ND), offset=1, device=delta_RD.device)
    if not pairs.shape[1]:
        return delta_RD.sum() * 0.0
    return (directions_ND[pairs[0]] * directions_ND[pairs[1]]).sum(-1).square().mean()


class PathRecord:
    """Paths of the samples of one evaluation, and what follows from them."""

    def __init__(self, num_experts: int, num_steps: int) -> None:
        self.num_experts = num_experts
        self.num_steps = num_steps
        self.keep_probabilities = True  # references to what the forward pass has made: set to False to save memory
        self.clear()

    def clear(self) -> None:
        self._paths: list[torch.Tensor] = []
        self._entropies: list[torch.Tensor] = []
        self._probabilities: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def add(
        self,
        path_BT: torch.Tensor,
        entropy_BT: torch.Tensor,
        probabilities_BTA: torch.Tensor | None = None,
        values_BTA: torch.Tensor | None = None,
    ) -> None:
        """Experts taken (STOPPED behind the end) and the entropy of each decision (0 behind the end).

        A model that gives the probabilities of its actions, or their Q-values, gives them with every batch.
        """
        self._paths.append(path_BT.detach())
        self._entropies.append(entropy_BT.detach())
        if self.keep_probabilities:
            for kept, given in ((self._probabilities, probabilities_BTA), (self._values, values_BTA)):
                if given is not None:
                    kept.append(given.detach())

    def paths(self) -> NDArray[np.int64]:
        """All recorded paths, [samples, T]."""
        if not self._paths:
            return np.zeros((0, self.num_steps), np.int64)
        return torch.cat(self._paths).cpu().numpy()

    def probabilities(self) -> NDArray[np.float32] | None:
        """Probabilities of the actions, [samples, T, A]; None where they were not kept."""
        return _joined(self._probabilities)

    def values(self) -> NDArray[np.float32] | None:
        """Q-values of the actions, [samples, T, A]; None for a model without them."""
        return _joined(self._values)

    def metrics(self) -> dict[str, Any]:
        """See `path_metrics`; nothing while nothing is recorded."""
        if not self._paths:
            return {}
        return path_metrics(self.paths(), torch.cat(self._entropies).cpu().double().numpy(), self.num_experts)


def _joined(parts: list[torch.Tensor]) -> NDArray[np.float32] | None:
    return torch.cat(parts).float().cpu().numpy() if parts else None
