"""The task loss for few and for very many classes, and the record of an auxiliary loss term.

B batch  C classes
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MANY_CLASSES = 4096  # from here on, copies of the scores cost more than the Python calls of a loop
CHUNK = 2**18  # scores per piece of the loop


class AuxiliaryLoss(NamedTuple):
    """A loss term in addition to the task loss: its raw value and its coefficient in the sum."""

    raw: Tensor
    weight: float


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy of a batch, as `F.cross_entropy` computes it.

    For many classes a function of our own keeps one number per sample for the backward pass. The gradient is then the
    only additional array of the size of the scores.
    """
    if logits_BC.shape[-1] < MANY_CLASSES:
        return F.cross_entropy(logits_BC, labels_B, label_smoothing=label_smoothing)
    loss: Tensor = _CrossEntropy.apply(logits_BC, labels_B, label_smoothing)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy that recomputes the softmax in the backward pass, in pieces of CHUNK scores."""

    @staticmethod
    def forward(ctx: Any, logits_BC: Tensor, labels_B: Tensor, label_smoothing: float) -> Tensor:
        rows = max(1, CHUNK // logits_BC.shape[1])
        normalizer_B = torch.cat([part.logsumexp(-1) for part in logits_BC.split(rows)])
        ctx.save_for_backward(logits_BC, labels_B, normalizer_B)
        ctx.label_smoothing, ctx.rows = label_smoothing, rows
        score_B = logits_BC.gather(1, labels_B.unsqueeze(1)).squeeze(1)
        target_B = (1 - label_smoothing) * score_B + label_smoothing * logits_BC.mean(-1)
        return (normalizer_B - target_B).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits_BC, labels_B, normalizer_B = ctx.saved_tensors
        to_logits_BC = torch.empty_like(logits_BC)
        parts = (x.split(ctx.rows) for x in (logits_BC, labels_B, normalizer_B, to_logits_BC))
        for logits, labels, normalizer, out in zip(*parts, strict=True):
            torch.sub(logits, normalizer.unsqueeze(1), out=out).exp_()
            out.sub_(ctx.label_smoothing / logits.shape[1])
            out.scatter_add_(1, labels.unsqueeze(1), out.new_full((len(out), 1), ctx.label_smoothing - 1))
            out.mul_(gradient / len(logits_BC))
        return to_logits_BC, None, None
