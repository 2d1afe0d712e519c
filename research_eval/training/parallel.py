"""The interface of a group of processes that train one model together, and the group with one process."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor, nn

from research_eval.training.checkpointer import Checkpointer
from research_eval.training.state import TrainingState


class Parallel(Protocol):
    """Several processes that train one model. Each process runs the same loop on its rows of every batch."""

    is_main: bool  # whether this process writes checkpoints and talks to the observer

    def begin(self, model: nn.Module, checkpointer: Checkpointer, total_steps: int) -> TrainingState:
        """Let all processes start from the checkpoint of the main one, if it has one, and return its state."""

    def own(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The rows of a batch that this process computes."""

    def part(self, num_rows: int, step: int, number: int) -> AbstractContextManager[object]:
        """Inside, the process computes its rows of a batch with `num_rows`: micro-batch `number` of a step."""

    def weight(self, num_rows: int) -> float:
        """How much an own row of a batch with `num_rows` counts: less than 1 if other processes compute it too."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes. Every process receives it."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give each parameter the sum of its gradients over all processes; none if no process has one."""

    def agree(self, number: int | None) -> int | None:
        """One answer for all processes: the first one that is not None, in the order of their ranks."""


class OneProcess:
    """The group with one process: there is nothing to exchange."""

    is_main = True

    def begin(self, model: nn.Module, checkpointer: Checkpointer, total_steps: int) -> TrainingState:
        return checkpointer.restore(total_steps)

    def own(self, rows: NDArray[Any]) -> NDArray[Any]:
        return rows

    def part(self, num_rows: int, step: int, number: int) -> AbstractContextManager[object]:
        return nullcontext()

    def weight(self, num_rows: int) -> float:
        return 1.0

    def sum(self, values: Tensor) -> Tensor:
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass

    def agree(self, number: int | None) -> int | None:
        return number
