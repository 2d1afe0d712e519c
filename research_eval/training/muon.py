"""Muon (Jordan et al., 2024) for matrices, with AdamW for all other parameters, as one optimiser.

N experts  O out  I in
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTUM, STEPS = 0.95, 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from the reference implementation
EPSILON = 1e-7


def orthogonalised(matrices_NOI: Tensor, steps: int = STEPS) -> Tensor:
    """Near-orthogonal matrices with the same singular vectors, by Newton-Schulz iterations on each [O, I].

    The singular values end between about 0.7 and 1.2. On a CPU without fast bf16 products the iterations are float32.
    """
    a, b, c = COEFFICIENTS
    x = matrices_NOI.bfloat16() if matrices_NOI.device.type == "cuda" else matrices_NOI.float()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + EPSILON)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices_NOI.dtype)


class Muon(torch.optim.Optimizer):
    """Groups with `factors` > 0 hold matrices [..., O, I]; the others belong to AdamW.

    A parameter of many experts is one matrix for each expert. A parameter that joins several maps side by side, such
    as queries, keys and values, is `factors` matrices along O. The update of each matrix is orthogonalised by itself
    and multiplied by sqrt(max(1, O / I)). Weight decay is decoupled.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.02, "weight_decay": 0.0, "factors": 0})
        self._betas = betas

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            members = [parameter for parameter in group["params"] if parameter.grad is not None]
            if members and group["factors"]:
                self._orthogonal_step(members, group)
            elif members:
                self._adam_step(members, group)

    def _orthogonal_step(self, members: list[Tensor], group: dict[str, Any]) -> None:
        """W <- W - lr scale O(Nesterov momentum); matrices of one shape share a batched product."""
        batches: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for parameter in members:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            update = parameter.grad.lerp(momentum, MOMENTUM)
            for part, target in zip(
                _matrices(update, group["factors"]), _matrices(parameter, group["factors"]), strict=True
            ):
                batches.setdefault(tuple(part.shape[-2:]), []).append((part, target))
        for (out_features, in_features), pairs in batches.items():
            scale = max(1.0, out_features / in_features) ** 0.5
            updates = orthogonalised(torch.cat([part for part, _ in pairs]))
            for update, (_, target) in zip(updates.split([len(part) for part, _ in pairs]), pairs, strict=True):
                target.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _adam_step(self, members: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW in torch's fused form."""
        for parameter in members:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in members]
        adamw(
            members,
            [parameter.grad for parameter in members if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def _matrices(stack: Tensor, factors: int) -> list[Tensor]:
    """Views [N, O, I] of the matrices in a parameter [N, factors O, I] or [factors O, I]."""
    whole = stack.unsqueeze(0) if stack.ndim == 2 else stack.flatten(0, -3)
    return list(whole.chunk(factors, dim=-2))
