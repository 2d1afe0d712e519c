"""The report of `goe_original` on its paths in evaluation.

B batch  N experts  A = N + 1 actions (the last one stops)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from research_eval.layers.path.router import LOGIT_LIMIT
from research_eval.layers.path.walk import MASKED, Choice, RouterView, Walk
from research_eval.layers.routing import entropy
from research_eval.routing.record import STOPPED, EvaluationRecorder, RoutingRecord


class PathReport:
    """Pushes the decisions of every step to the recorder, with the number of logits that are at their limit."""

    def __init__(self, recorder: EvaluationRecorder) -> None:
        self.recorder = recorder

    def clear(self) -> None:
        """Discard the records of the evaluation so far."""
        self.recorder.clear()

    def begin_batch(self, num_samples: int) -> None:
        """Start a batch of this many samples."""
        self.recorder.begin_batch(num_samples)

    @torch.no_grad()
    def push(self, step: int, view: RouterView | None, choice: Choice, walk: Walk, decided_B: Tensor) -> None:
        """Record the decisions of one step; zeros and STOPPED for samples whose path has ended.

        `decided_B` is True at samples whose path went on until this step: the probabilities with which a path ends are
        recorded too.
        """
        if self.recorder.wants == "nothing":
            return
        experts_B = choice.action_B
        if self.recorder.wants == "paths":
            view = None
        probabilities_BA = None if view is None else view.logits_BA.softmax(-1)
        entropy_B = None if view is None else entropy(choice.probabilities_BN.detach())
        values_BA = None if view is None else view.values_BA
        running_B = None if walk.everyone_runs else walk.running_B
        if running_B is not None:
            experts_B = experts_B.masked_fill(~running_B, STOPPED)
            probabilities_BA, values_BA = (_only(found, decided_B) for found in (probabilities_BA, values_BA))
            entropy_B = _only(entropy_B, running_B)
        limited_2 = None
        if view is not None:
            limited_2 = _count_at_limit(view.logits_BA if running_B is None else view.logits_BA[running_B])
        self.recorder.push(
            RoutingRecord(
                step,
                experts_DK=experts_B.unsqueeze(1),
                weights_DK=choice.coefficient_B.unsqueeze(1),
                probabilities_DA=probabilities_BA,
                entropy_D=entropy_B,
                values_DA=values_BA,
                logits_at_limit_2=limited_2,
            )
        )

    def metrics(self, has_router: bool) -> dict[str, Any]:
        """The metrics of the recorded paths. Entropies are included only if a router decides.

        `logits_at_limit_share` is the share of logits at LOGIT_LIMIT, where their gradient is zero.
        """
        metrics = self.recorder.metrics()
        if not metrics:
            return {}
        if not has_router:
            return {name: value for name, value in metrics.items() if name not in ("router_entropy", "step_entropy")}
        at_limit, total = self.recorder.logits_at_limit()
        return metrics | {"logits_at_limit_share": at_limit / max(total, 1)}


def _count_at_limit(logits_RA: Tensor) -> Tensor:
    """Number of logits at the limit, and number of all logits. Masked logits do not count."""
    unmasked_RA = logits_RA > MASKED
    at_limit_RA = unmasked_RA & (logits_RA.abs() >= LOGIT_LIMIT)
    return torch.stack([at_limit_RA.sum(), unmasked_RA.sum()])


def _only(values: Tensor | None, running_B: Tensor) -> Tensor | None:
    """The values [B] or [B, A] of running samples, 0 for the others."""
    if values is None:
        return None
    return values * (running_B if values.ndim == 1 else running_B.unsqueeze(1))
