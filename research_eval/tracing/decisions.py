"""What one routed layer decided: in the present call of the model, and summed over all calls.

R rows: tokens of one call  K experts per token  E experts  I width of the states
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNKNOWN = -1
SUM_OF_PROBABILITIES = 0.01  # so far may a sum of probabilities be from 1, in bfloat16


@dataclass
class Totals:
    """Sums over all real tokens of a layer, whether they are kept or not."""

    num_experts: int
    tokens: int = 0
    k: int = 0
    dropped: int = 0  # tokens with fewer than K experts
    counts_E: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    probability_E: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    with_probability: int = 0
    entropy: float = 0.0
    weight_low: float = np.inf  # of the sums of a token's weights
    weight_high: float = -np.inf

    def add(self, chosen_RK: Tensor, weights_RK: Tensor | None, probabilities_RE: Tensor | None) -> None:
        """Add the decisions about some real tokens."""
        if not len(self.counts_E):
            self.counts_E = np.zeros(self.num_experts, np.int64)
            self.probability_E = np.zeros(self.num_experts)
        self.tokens += len(chosen_RK)
        self.k = max(self.k, chosen_RK.shape[1])
        is_used_RK = chosen_RK >= 0
        if weights_RK is not None and len(weights_RK):
            is_used_RK = is_used_RK & (weights_RK != 0)
            sums_R = weights_RK.sum(1)
            self.weight_low = float(np.minimum(self.weight_low, float(sums_R.min())))  # keeps NaN
            self.weight_high = float(np.maximum(self.weight_high, float(sums_R.max())))
        self.dropped += int((is_used_RK.sum(1) < chosen_RK.shape[1]).sum())
        self.counts_E += np.bincount(chosen_RK[chosen_RK >= 0].numpy(), minlength=self.num_experts)
        if probabilities_RE is not None:
            self.probability_E += probabilities_RE.double().sum(0).numpy()
            self.with_probability += len(probabilities_RE)
            self.entropy += float(torch.special.entr(probabilities_RE.double()).sum())

    def mean_entropy(self) -> float | None:
        """Of the gate's probabilities, in nats."""
        return self.entropy / self.with_probability if self.with_probability else None

    def weight_sums(self) -> list[float] | None:
        """The smallest and the largest sum of a token's weights."""
        return None if self.weight_low > self.weight_high else [self.weight_low, self.weight_high]

    def balance_loss(self) -> float | None:
        """E sum_i f_i P_i with f the assignments of an expert per token, as transformers defines it; K is balanced."""
        if not self.with_probability or not self.tokens:
            return None
        share_E = self.counts_E / self.tokens
        return float(self.num_experts * (share_E * self.probability_E / self.with_probability).sum())


@dataclass
class Seen:
    """What the hooks of one layer saw in the present call of the model."""

    calls: int = 0  # of the layer
    chosen_RK: Tensor | None = None
    weights_RK: Tensor | None = None
    log_probabilities_RE: Tensor | None = None  # or logits
    # Of a layer with a list of experts:
    inputs: list[Tensor] = field(default_factory=list)  # of the gate and of the block, [R, I]
    rows: dict[int, list[Tensor]] = field(default_factory=dict)  # expert -> its input rows

    def gate_put_out(self, output: Any, num_experts: int) -> None:
        """Keep the scores among what a gate returns: logits, or probabilities."""
        for one in output if isinstance(output, tuple | list) else (output,):
            if isinstance(one, Tensor) and one.is_floating_point() and one.ndim and one.shape[-1] == num_experts:
                scores_RE = one.detach().reshape(-1, num_experts).float().cpu()
                self.log_probabilities_RE = scores_RE.clamp_min(1e-30).log() if _sum_to_1(scores_RE) else scores_RE
                return

    def probabilities(self, rows: int) -> Tensor | None:
        """Of the gate for every row, [R, E]; None if the gate saw other rows."""
        found = self.log_probabilities_RE
        return None if found is None or len(found) != rows else found.softmax(-1)

    def find_chosen(self) -> None:
        """Which experts of a list read which row, by the values of the rows."""
        rows = {expert: torch.cat(found).cpu() for expert, found in self.rows.items()}
        for states_RI in self.inputs:
            found = matched_rows(states_RI.cpu(), rows)
            if found is not None:
                self.chosen_RK = found
                return


def _sum_to_1(scores_RE: Tensor) -> bool:
    """Whether these are probabilities, and no logits."""
    near = (scores_RE.sum(-1) - 1).abs() < SUM_OF_PROBABILITIES
    return bool(len(scores_RE)) and bool((scores_RE >= 0).all()) and bool(near.all())


def matched_rows(states_RI: Tensor, rows: dict[int, Tensor]) -> Tensor | None:
    """Which experts read each row of the states, [R, K], the smaller number first.

    UNKNOWN stands where a row has fewer. The rows of an expert are found by their values; equal ones are taken in
    order. None if an expert read a row that is none of the states.
    """
    places: dict[bytes, list[int]] = {}
    for place, row in enumerate(states_RI.contiguous().float().numpy()):
        places.setdefault(row.tobytes(), []).append(place)
    chosen: list[list[int]] = [[] for _ in range(len(states_RI))]
    for expert in sorted(rows):
        taken: dict[bytes, int] = {}
        for row in rows[expert].contiguous().float().numpy():
            key = row.tobytes()
            number = taken.get(key, 0)
            taken[key] = number + 1
            if number >= len(places.get(key, ())):
                return None
            chosen[places[key][number]].append(expert)
    width = max((len(one) for one in chosen), default=0)
    if not width:
        return None
    return torch.tensor([one + [UNKNOWN] * (width - len(one)) for one in chosen], dtype=torch.long)
