"""Calls of our own autograd functions that add no node to the graph during inference."""

from __future__ import annotations

from typing import Any

import torch


class _NoContext:
    """The context of a forward pass without gradients: it stores nothing."""

    def save_for_backward(self, *_: Any) -> None:
        pass

    def set_materialize_grads(self, _: bool) -> None:
        pass


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """The function's output. Without gradients, call its forward pass directly.

    A node of the graph costs as much as a small operation.
    """
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)
