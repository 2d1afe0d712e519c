"""The interface of a group of processes that train one model together, and the group with one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from research_eval.training.checkpointer import Checkpointer
from research_eval.training.state import TrainingState

Found = TypeVar("Found")


class Parallel(Protocol):
    """Several processes that train one model. Each process runs the same loop on its rows of every batch."""

    is_main: bool  # whether this process writes checkpoints and talks to the observer

    def begin(
        self, loss_of: nn.Module, optimizer: torch.optim.Optimizer, checkpointer: Checkpointer, total_steps: int
    ) -> TrainingState:
        """Let all processes start from the checkpoint of the main one, if it has one, and return its state.

        `loss_of` is the module whose forward pass is a training step. Its parameters, and those of the optimiser, may
        lie in slices in the processes from now on.
        """

    def own(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The rows of a batch that this process computes."""

    def part(self, num_rows: int, step: int, number: int) -> AbstractContextManager[object]:
        """Inside, the process computes its rows of a batch with `num_rows`: micro-batch `number` of a step."""

    def weight(self, num_rows: int) -> float:
        """How much an own row of a batch with `num_rows` counts: less than 1 if other processes compute it too."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes. Every process receives it."""

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a step."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give each parameter the sum of its gradients over all processes; none if no process has one."""

    def clip(self, parameters: Iterable[nn.Parameter], largest: float) -> None:
        """Scale the gradient of the whole model down to this norm."""

    def whole(self) -> AbstractContextManager[object]:
        """Inside, the model has whole parameters, and no computation needs another process. All have to enter it."""

    def shared(self, work: Callable[[], Found]) -> Found:
        """What `work` returns, whose passes in `collective.in_shares` all processes share. All have to call it."""

    def save(self, checkpointer: Checkpointer, state: TrainingState) -> None:
        """Write a checkpoint. All processes have to call it."""

    def end(self) -> None:
        """Give the model its whole parameters for good. All processes have to call it."""

    def agree(self, number: int | None) -> int | None:
        """One answer for all processes: the first one that is not None, in the order of their ranks."""


class OneProcess:
    """The group with one process: there is nothing to exchange."""

    is_main = True

    def begin(
        self, loss_of: nn.Module, optimizer: torch.optim.Optimizer, checkpointer: Checkpointer, total_steps: int
    ) -> TrainingState:
        return checkpointer.restore(total_steps)

    def own(self, rows: NDArray[Any]) -> NDArray[Any]:
        return rows

    def part(self, num_rows: int, step: int, number: int) -> AbstractContextManager[object]:
        return nullcontext()

    def weight(self, num_rows: int) -> float:
        return 1.0

    def sum(self, values: Tensor) -> Tensor:
        return values

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass

    def clip(self, parameters: Iterable[nn.Parameter], largest: float) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, largest)

    def whole(self) -> AbstractContextManager[object]:
        return nullcontext()

    def shared(self, work: Callable[[], Found]) -> Found:
        return work()

    def save(self, checkpointer: Checkpointer, state: TrainingState) -> None:
        checkpointer.save(state)

    def end(self) -> None:
        pass

    def agree(self, number: int | None) -> int | None:
        return number
