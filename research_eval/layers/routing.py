"""Losses on a router's probabilities, and the bias that balances the load of the experts.

R decisions  N experts  D width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from research_eval.layers.collective import batch_mean, batch_sum


def members(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """True at the expert of each decision, [..., N].

    Unlike `one_hot`, it never reads values back from the device.
    """
    return experts.unsqueeze(-1) == torch.arange(num_experts, device=experts.device)


def mean_of_rows(values_R: torch.Tensor) -> torch.Tensor:
    """The mean over the first dimension, [R, ...] -> [...], of the rows of the whole batch."""
    return batch_mean(values_R.mean(0), len(values_R))


def balance_losses(shares_TN: torch.Tensor, means_TN: torch.Tensor, count: int) -> torch.Tensor:
    """The balance losses [T] of T decisions about `count` own rows, from own shares and mean probabilities.

    Several processes exchange them once, after the last decision: after each one they would wait for each other.
    """
    return balance_of(*batch_mean(torch.stack([shares_TN, means_TN]), count))


def router_losses(shares: Sequence[torch.Tensor], logits: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The balance loss and the z-loss, as means over T decisions about every row, from shares [N] and logits [R, N]."""
    means_TN = torch.stack([logits_RN.softmax(-1).mean(0) for logits_RN in logits])
    squares_T = torch.stack([logits_RN.logsumexp(-1).square().mean() for logits_RN in logits])
    whole_TX = batch_mean(torch.cat([torch.stack(list(shares)), means_TN, squares_T.unsqueeze(1)], 1), len(logits[0]))
    share_TN, mean_TN, square_T1 = whole_TX.split([means_TN.shape[1]] * 2 + [1], 1)
    return balance_of(share_TN, mean_TN).mean(), square_T1.mean()


def balance_of(load_N: torch.Tensor, mean_N: torch.Tensor) -> torch.Tensor:
    """N sum_i f_i P_i (Switch Transformer, Fedus et al., 2021): 1 if the load is uniform, N if one expert takes all.

    [..., N] -> [...]. `load_N` is each expert's share of the decisions and carries no gradient; P is the mean
    probability.
    """
    return load_N.shape[-1] * (load_N.detach() * mean_N).sum(-1)


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last dimension. The floor keeps the gradient finite at masked actions."""
    return torch.special.entr(probabilities.clamp_min(1e-9)).sum(-1)


def mean_entropy_loss(mean_N: torch.Tensor) -> torch.Tensor:
    """Negative entropy of the mean probabilities: -log N if the batch uses all experts alike, 0 if it uses one."""
    return -entropy(mean_N)


def z_loss(logits_RN: torch.Tensor) -> torch.Tensor:
    """Mean squared log-partition (ST-MoE, Zoph et al., 2022): keeps the logits small."""
    return mean_of_rows(logits_RN.logsumexp(-1).square())


def balanced_bias(bias_N: torch.Tensor, counts_N: torch.Tensor, rate: float) -> torch.Tensor:
    """b_i - rate * sign(f_i - 1/N), the loss-free balancing of DeepSeek-V3; unchanged if no decision was made.

    Bias and counts [..., N] may be those of several steps.
    """
    total = counts_N.sum(-1, keepdim=True)
    share_N = counts_N / total.clamp_min(1)
    return bias_N - rate * torch.sign(share_N - 1 / bias_N.shape[-1]) * (total > 0)


def contrastive_loss(delta_RD: torch.Tensor, experts_R: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Mean of cos^2 between the mean changes of two experts, over all pairs of experts in use.

    It pushes experts towards different directions. With fewer than two experts in use it is zero.
    """
    member_RN = members(experts_R, num_experts)
    counts_N = batch_sum(member_RN.sum(0))
    sums_ND = batch_sum(member_RN.T.to(delta_RD.dtype) @ delta_RD)
    means_ND = sums_ND[counts_N > 0] / counts_N[counts_N > 0, None]
    directions_ND = torch.nn.functional.normalize(means_ND, dim=-1)
    pairs = torch.triu_indices(len(directions_ND), len(directions_ND), offset=1, device=delta_RD.device)
    if not pairs.shape[1]:
        return delta_RD.sum() * 0.0  # zero that stays part of the graph
    return (directions_ND[pairs[0]] * directions_ND[pairs[1]]).sum(-1).square().mean()
