"""Experts that lie in several processes: rows travel to the process of their expert, and the outputs back.

E processes, each with n = N / E of the N experts  S rows (tokens)  R samples  L length  D width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from research_eval.layers.dispatch import Dispatch, Dispatcher
from research_eval.layers.kernels.autograd import applied
from research_eval.layers.packing import Packing, Samples, place, take


@dataclass(frozen=True, eq=False)
class _Parcel:
    """Rows that each process sends to each other one, sorted by receiver, and how the receiver sorts them."""

    given: list[int]  # rows for each process
    taken: list[int]  # rows from each process
    order_S: Tensor  # at the receiver: from the order of arrival to that of its experts
    back_S: Tensor
    sizes: list[int]  # of each own expert

    @classmethod
    def of(cls, counts: list[int], device: torch.device, group: Any) -> _Parcel:
        """From the number of rows of each expert. Every process has to call it."""
        size = distributed.get_world_size(group)
        own_N = torch.tensor(counts, device=device)
        came_N = torch.empty_like(own_N)  # of every process the rows of each own expert
        distributed.all_to_all_single(came_N, own_N, group=group)
        came_En = came_N.view(size, -1).cpu()
        each = came_En.shape[1]
        expert_S = torch.arange(each).repeat(size).repeat_interleave(came_En.flatten())
        order_S = expert_S.argsort(stable=True).to(device)
        return cls(
            torch.tensor(counts).view(size, -1).sum(1).tolist(),
            came_En.sum(1).tolist(),
            order_S,
            order_S.argsort(),
            came_En.sum(0).tolist(),
        )

    def there(self, rows: Tensor, group: Any) -> Tensor:
        """Rows -> those for this process's experts, sorted by expert. Has a gradient."""
        return take(applied(_Sent, rows, self.given, self.taken, group), self.order_S)

    def home(self, rows: Tensor, group: Any) -> Tensor:
        """The inverse of `there`."""
        found: Tensor = applied(_Sent, take(rows, self.back_S), self.taken, self.given, group)
        return found


class _Sent(torch.autograd.Function):
    """Rows, sorted by receiver -> rows, sorted by sender. The gradients travel back."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, given: list[int], taken: list[int], group: Any) -> Tensor:
        ctx.given, ctx.taken, ctx.group = given, taken, group
        return _sent(rows_SD, given, taken, group)

    @staticmethod
    def backward(ctx: Any, gradient_SD: Tensor) -> tuple[Tensor, None, None, None]:
        return _sent(gradient_SD, ctx.taken, ctx.given, ctx.group), None, None, None


def _sent(rows_SD: Tensor, given: list[int], taken: list[int], group: Any) -> Tensor:
    came_SD = rows_SD.new_empty(sum(taken), rows_SD.shape[1])
    distributed.all_to_all_single(came_SD, rows_SD.contiguous(), taken, given, group=group)
    return came_SD


@dataclass(frozen=True, eq=False)
class _Arrived(Dispatch):
    """The plan of rows that came from several processes, and what sends their outputs back."""

    parcel: _Parcel | None = None
    from_samples: Samples | None = None  # what the sender has
    samples: Samples | None = None  # what the receiver has
    has_guest: bool = False  # a row was added because none came


class Exchange(Dispatcher):
    """Sends every row to the process of its expert, within a group of processes that hold all experts together.

    Expert e lies in process e // n. All processes of the group have to dispatch equally often, if need be without rows.
    What travels are real tokens; in a pool of whole Transformers, the tokens of whole samples and their places.
    """

    is_shared = True

    def __init__(self, group: Any) -> None:
        self._group = group

    def dispatch(
        self, rows: Tensor, plan: Dispatch, samples: Samples | None = None
    ) -> tuple[Tensor, Dispatch, Samples | None]:
        if samples is None:
            parcel = _Parcel.of(plan.counts(), rows.device, self._group)
            return self._arrived(parcel, parcel.there(rows, self._group), plan)
        lengths_R = samples.keep_RL.sum(1)
        counts_R, counts_S = _samples_and_tokens(plan, samples, lengths_R)
        of_samples = _Parcel.of(counts_R, rows.device, self._group)
        parcel = _Parcel.of(counts_S, rows.device, self._group)
        tokens_SD = rows if samples.places is not None else take(rows.flatten(0, 1), _places(samples.keep_RL))
        keep_RL = self._masks(samples.keep_RL, of_samples)
        return self._arrived(parcel, parcel.there(tokens_SD, self._group), plan, samples, keep_RL, of_samples.sizes)

    def _masks(self, keep_RL: Tensor, of_samples: _Parcel) -> Tensor:
        """The masks of the samples that arrive. All processes pad them to one length."""
        length = torch.tensor([keep_RL.shape[1]], device=keep_RL.device)
        distributed.all_reduce(length, distributed.ReduceOp.MAX, group=self._group)
        padded_RL = torch.nn.functional.pad(keep_RL.to(torch.uint8), (0, int(length) - keep_RL.shape[1]))
        came_RL = _sent(padded_RL, of_samples.given, of_samples.taken, self._group)
        return came_RL[of_samples.order_S].bool()

    def _arrived(
        self,
        parcel: _Parcel,
        tokens_SD: Tensor,
        plan: Dispatch,
        sender: Samples | None = None,
        keep_RL: Tensor | None = None,
        num_samples: list[int] | None = None,
    ) -> tuple[Tensor, Dispatch, Samples | None]:
        """The rows, plan and samples of this process's experts.

        If no row came, the first expert gets a guest whose output nobody reads. So this process has the same graph as
        all others, and its part of the backward pass runs.
        """
        has_guest = not len(tokens_SD)
        first = [1] + [0] * (len(parcel.sizes) - 1)
        if has_guest:
            tokens_SD = torch.cat([tokens_SD, tokens_SD.new_zeros(1, tokens_SD.shape[1])])
        sizes, samples = first if has_guest else parcel.sizes, None
        if keep_RL is not None:
            if has_guest:
                keep_RL = torch.zeros(1, keep_RL.shape[1], dtype=torch.bool, device=keep_RL.device)
                keep_RL[0, 0] = True
            samples = Packing(keep_RL, len(tokens_SD), plan.kernels).samples()
            if samples.places is None:
                sizes = first if has_guest else num_samples or []
                tokens_SD = _on_grid(tokens_SD, keep_RL)
        counts_n = torch.tensor(sizes, device=tokens_SD.device)
        local = Dispatch.of(counts_n, plan.kernels)
        held = _Arrived(
            local.sizes,
            local.ends_N,
            kernels=plan.kernels,
            parcel=parcel,
            from_samples=sender,
            samples=samples,
            has_guest=has_guest,
        )
        return tokens_SD, held, samples

    def combine(self, outputs: Tensor, plan: Dispatch) -> Tensor:
        assert isinstance(plan, _Arrived)
        assert plan.parcel is not None
        rows = outputs
        if plan.samples is not None and plan.samples.places is None:
            rows = take(outputs.flatten(0, 1), _places(plan.samples.keep_RL))
        home_SD = plan.parcel.home(rows[:-1] if plan.has_guest else rows, self._group)
        sender = plan.from_samples
        return home_SD if sender is None or sender.places is not None else _on_grid(home_SD, sender.keep_RL)


def _places(keep_RL: Tensor) -> Tensor:
    """The places of the real tokens on the grid of samples and positions."""
    return keep_RL.flatten().nonzero().squeeze(1)


def _on_grid(tokens_SD: Tensor, keep_RL: Tensor) -> Tensor:
    """Real tokens -> [R, L, D], zero at padding."""
    return place(tokens_SD, _places(keep_RL), keep_RL.numel()).view(*keep_RL.shape, tokens_SD.shape[1])


def _samples_and_tokens(plan: Dispatch, samples: Samples, lengths_R: Tensor) -> tuple[list[int], list[int]]:
    """How many samples and how many real tokens each expert gets. A plan counts one of the two."""
    counts = torch.tensor(plan.counts())
    ends_S = torch.cat([lengths_R.new_zeros(1), lengths_R.cumsum(0)]).cpu()  # tokens before each sample
    if samples.places is None:
        ends_R = counts.cumsum(0)
        return counts.tolist(), ends_S[ends_R].diff(prepend=ends_S.new_zeros(1)).tolist()
    ends_R = torch.searchsorted(ends_S, counts.cumsum(0))
    return ends_R.diff(prepend=ends_R.new_zeros(1)).tolist(), counts.tolist()
