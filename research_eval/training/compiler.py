"""Torch without its compiler, whose import takes longer than a small training.

Functions of torch that must not be compiled import the compiler at their first call, only to exclude themselves from
it. The program compiles blocks of a model at most, and calls none of these functions inside them.
"""

from __future__ import annotations

import contextlib
import inspect
from types import CodeType, FunctionType
from typing import Any, TypeVar

import torch

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)

_EXCLUDED: CodeType | None = None
with contextlib.suppress(AttributeError):  # another version of torch then imports the compiler; nothing else changes
    _EXCLUDED = torch._compile._disable_dynamo(lambda: None).__code__  # of the wrapper around such functions


def leave_out(owner: Any) -> None:
    """Let the functions of a class run without the compiler."""
    for found in vars(owner).values():
        while isinstance(found, FunctionType):
            inner = getattr(found, "__wrapped__", None)
            if found.__code__ is _EXCLUDED and inner is not None:
                inner.__dict__.setdefault("__dynamo_disable", inner)
            found = inner


def without_compiler(kind: type[Optimizer]) -> type[Optimizer]:
    """The optimiser whose `step` does not import the compiler. It computes the same."""
    leave_out(torch.optim.Optimizer)
    step = inspect.unwrap(kind.step)

    @torch.no_grad()
    def plain_step(self: Optimizer, closure: Any = None) -> Any:
        return step(self, closure)

    return type(kind.__name__, (kind,), {"step": plain_step})
