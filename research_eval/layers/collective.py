"""Statistics and draws of a whole training batch, of which this process may hold a part.

Several processes that train one model hold different rows of every batch. Inside `part_of_batch`, the statistics of a
batch are those of all its rows: their values are global, and each process has the gradient of its own rows. The sum of
the gradients over the processes is then the gradient of the whole batch, without a collective operation in the backward
pass. Random draws are made for all rows, and each process takes its own, so they do not depend on the number of
processes. Outside, there is one process, and every function returns what it got.

All processes have to call the same functions in the same order.

An evaluation has no statistics of a batch, so its batches are shared as a whole: see `in_shares`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The rows of a batch that this process holds.

    If the batch has fewer rows than there are processes, each process holds all of them, and counts as a share of one.
    """

    num_processes: int
    num_rows: int  # of the whole batch
    own_rows: slice
    sum_of: Callable[[Tensor], Tensor]  # over all processes
    common_draws: Callable[[], AbstractContextManager[object]]  # inside, all processes draw the same numbers

    @property
    def holds_all(self) -> bool:
        """Whether every process holds the whole batch."""
        return self.num_rows < self.num_processes


_PART: ContextVar[Part | None] = ContextVar("part", default=None)


@contextmanager
def part_of_batch(part: Part | None) -> Iterator[None]:
    """Let the functions of this module speak for the batch that `part` belongs to; None for a batch of one process."""
    before = _PART.set(part)
    try:
        yield
    finally:
        _PART.reset(before)


def _shared(value: Tensor, num_processes: int) -> Tensor:
    """The value, with an equal share of its gradient."""
    return value.detach() + (value - value.detach()) / num_processes if value.requires_grad else value


def batch_sum(own: Tensor) -> Tensor:
    """The sum over the rows of the batch, from that over the own rows."""
    part = _PART.get()
    if part is None:
        return own
    if part.holds_all:
        return _shared(own, part.num_processes)
    whole = part.sum_of(own.detach())
    return whole + (own - own.detach()) if own.requires_grad else whole


def batch_mean(own: Tensor, count: int) -> Tensor:
    """The mean over rows of the batch, from the mean over `count` own rows, which may be none."""
    part = _PART.get()
    if part is None:
        return own
    if part.holds_all:
        return _shared(own, part.num_processes)
    total = own * count if count else torch.zeros_like(own)
    known = torch.cat([total.detach().flatten().float(), torch.tensor([float(count)], device=own.device)])
    *_, whole_count = whole = part.sum_of(known)
    mean = (whole[:-1] / whole_count.clamp_min(1)).view_as(total).to(total.dtype)
    return mean + (total - total.detach()) / whole_count.clamp_min(1) if total.requires_grad else mean


def part_of_mean(own: Tensor, count: Callable[[], int]) -> Tensor:
    """What the own rows contribute to the mean over the batch, from the mean over `count()` of them.

    The parts of all processes add up to the mean. One process need not count, which would wait for the device.
    """
    part = _PART.get()
    if part is None:
        return own
    if part.holds_all:
        return own / part.num_processes
    own_count = count()
    whole = int(part.sum_of(torch.tensor([own_count], dtype=torch.int64)))
    return own * (own_count / whole) if own_count else own.new_zeros((), requires_grad=True)


def first_of_batch(own_B: Tensor) -> Tensor:
    """The entry of the first row of the batch. A process knows the entries of its own rows, at least one."""
    part = _PART.get()
    if part is None or part.holds_all:
        return own_B[0]
    return part.sum_of(own_B[0] if part.own_rows.start == 0 else torch.zeros_like(own_B[0]))


def batch_any(own: bool) -> bool:
    """Whether it is true of any process's rows."""
    part = _PART.get()
    if part is None or part.holds_all:
        return own
    return bool(part.sum_of(torch.tensor([own], dtype=torch.int64)))


def of_parameters(value: Tensor) -> Tensor:
    """A loss that depends on the parameters alone: each process has a share of its gradient."""
    part = _PART.get()
    return value if part is None else _shared(value, part.num_processes)


def drawn(like_B: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """What `draw` fills an empty tensor of this shape with, for the rows [B, ...] of this process.

    It is drawn for the whole batch, the same in every process.
    """
    part = _PART.get()
    if part is None:
        return draw(torch.empty_like(like_B, memory_format=torch.contiguous_format))
    with part.common_draws():
        whole = draw(like_B.new_empty((part.num_rows, *like_B.shape[1:])))
    return whole if part.holds_all else whole[part.own_rows]


Named = dict[str, Tensor]
Shares = Callable[[Iterable[Any], Callable[[Any], Named]], Iterator[Named]]  # see `in_shares`

_SHARES: ContextVar[Shares | None] = ContextVar("shares", default=None)


@contextmanager
def shared_by(shares: Shares) -> Iterator[None]:
    """Let the processes share what `in_shares` does."""
    before = _SHARES.set(shares)
    try:
        yield
    finally:
        _SHARES.reset(before)


def are_shared() -> bool:
    """Whether other processes do a part of what `in_shares` does."""
    return _SHARES.get() is not None


def in_shares(items: Iterable[Any], work: Callable[[Any], Named]) -> Iterator[Named]:
    """`work(item)` of every item, in their order. Inside `shared_by`, each process works on some of the items.

    All processes have to read the whole result.
    """
    shares = _SHARES.get()
    return map(work, items) if shares is None else shares(items, work)
