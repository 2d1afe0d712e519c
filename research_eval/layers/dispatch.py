"""Which expert each row goes to, which kernels execute the experts, and how rows reach the process of their expert.

R rows sorted by expert  N experts  D width
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from research_eval.annotations import AttentionRows, Kernels
from research_eval.registry import DISPATCHERS

KERNELS_OF_DEVICE: dict[str, Kernels] = {"cpu": "slices", "cuda": "grouped"}  # "auto"; other devices: "plain"


def kernels_on(device: torch.device, asked: Kernels) -> Kernels:
    """The kernels that execute experts on a device; "plain" while torch compiles a graph.

    "plain": one product per expert, padding included; the reference for the other kernels. "slices": one product per
    expert without padding, the fastest on a CPU. "grouped": one product for all experts without padding; it needs no
    loop and never waits for the device. "auto": the kernels in KERNELS_OF_DEVICE. A pool of small experts may then also
    use one batched product, with spare rows (layers/even.py).
    """
    if torch.compiler.is_compiling():
        return "plain"
    return KERNELS_OF_DEVICE.get(device.type, "plain") if asked == "auto" else asked


@dataclass(frozen=True, eq=False)
class Dispatch:
    """Which expert each row of a sorted batch goes to: the first `sizes[0]` rows to expert 0, and so on.

    If `sizes` is None, the counts stay on the device, in `ends_N`, and the host never waits for them. If `expert` is
    set, all rows go to this expert. If the dispatch is `even`, all experts have equally many rows, which come as
    [N, M, F].
    """

    sizes: list[int] | None
    ends_N: Tensor | None = None  # int32, the first row after those of each expert
    expert: int | None = None
    kernels: Kernels = "auto"
    even: bool = False
    _experts: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def single(cls, num_rows: int) -> Dispatch:
        """All rows go to the only expert."""
        return cls([num_rows], expert=0)

    @classmethod
    def of(cls, counts_N: Tensor, kernels: Kernels = "auto") -> Dispatch:
        """Build the plan from the number of rows of each expert. Only the grouped kernels leave them on the device."""
        if kernels_on(counts_N.device, kernels) == "grouped":
            return cls(None, counts_N.cumsum(0).int(), kernels=kernels)
        return cls(counts_N.tolist(), kernels=kernels)

    def kernels_for(self, x: Tensor) -> Kernels:
        """The kernels that execute the experts of these rows."""
        return kernels_on(x.device, self.kernels)

    def counts(self) -> list[int]:
        """Rows of each expert. Waits for the device if the counts are there."""
        if self.sizes is not None:
            return self.sizes
        assert self.ends_N is not None
        ends = self.ends_N.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def ends(self, device: torch.device) -> Tensor:
        """`ends_N`, computed from `sizes` if it is missing."""
        if self.ends_N is not None:
            return self.ends_N
        return torch.tensor(self.sizes, device=device).cumsum(0).int()

    def experts_of(self, x: Tensor, tokens: int = 1) -> Tensor:
        """The expert of each row of x; with several tokens per row, the expert of each token, [R tokens]."""
        if tokens not in self._experts and self.sizes is not None and x.device.type == "cpu":
            repeats = np.asarray(self.sizes) * tokens  # numpy: a call of torch costs several times as much
            self._experts[tokens] = torch.from_numpy(np.arange(len(self.sizes)).repeat(repeats))
        if tokens not in self._experts:
            places = torch.arange(len(x) * tokens, device=x.device, dtype=torch.int32)
            self._experts[tokens] = torch.searchsorted(self.ends(x.device) * tokens, places, right=True)
        return self._experts[tokens]


@DISPATCHERS.register("local")
class Dispatcher:
    """Sends rows to the process that holds their expert, and the outputs back. With one process nothing moves.

    A subclass that is registered under another name becomes a value of `training_params.dispatcher`. In `moe` a row is
    one token. In a pool of whole Transformers the rows are the tokens of whole samples, and `samples` holds their
    places.

    `is_shared` says that other processes take part: a process without rows has to dispatch too.
    """

    is_shared = False

    def dispatch(self, rows: Tensor, plan: Dispatch, samples: Any = None) -> tuple[Tensor, Dispatch, Any]:
        """Rows sorted by expert -> the rows for this process's experts, their plan and their samples."""
        return rows, plan, samples

    def combine(self, outputs: Tensor, plan: Dispatch) -> Tensor:
        """Outputs of this process's experts -> outputs of the rows that `dispatch` received, in their order."""
        return outputs


@dataclass(frozen=True)
class Execution:
    """How a model executes its layers. These settings never change the computed values."""

    kernels: Kernels = "auto"
    dispatcher: Dispatcher = field(default_factory=Dispatcher)
    attention: AttentionRows = "padded"


class Executing(torch.nn.Module):
    """A module that dispatches rows to experts and therefore needs the execution settings."""

    execution = Execution()


@contextmanager
def no_spare_rows(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block, no expert computes more rows than it was sent, as "auto" may let it do for speed."""
    modules = [module for module in model.modules() if isinstance(module, Executing)]
    before = [module.execution for module in modules]
    for module in modules:
        module.execution = replace(module.execution, kernels=kernels_on(device, module.execution.kernels))
    try:
        yield
    finally:
        for module, execution in zip(modules, before, strict=True):
            module.execution = execution


def set_execution(model: torch.nn.Module, execution: Execution) -> None:
    """Give every module of the model the execution settings."""
    for module in model.modules():
        if isinstance(module, Executing):
            module.execution = execution
