"""The interface of a group of processes that train together, and the group with one process."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Parallel(Protocol):
    """Several processes that train one model. Each process runs the same loop on its share of every batch."""

    is_main: bool  # whether this process writes checkpoints and talks to the observer

    def wrap(self, loss: nn.Module) -> nn.Module:
        """Wrap the module that computes the loss, so that its gradients are those of the global batch."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes. Every process receives it."""

    def agree(self, number: int | None) -> int | None:
        """One answer for all processes: the first one that is not None, in the order of their ranks."""


class OneProcess:
    """The group with one process: there is nothing to exchange."""

    is_main = True

    def wrap(self, loss: nn.Module) -> nn.Module:
        return loss

    def sum(self, values: Tensor) -> Tensor:
        return values

    def agree(self, number: int | None) -> int | None:
        return number
