"""Batches without their padding: the rows of real tokens, and their places on the grid of samples and positions.

R samples  L length  S real tokens  F features  B batch  G places of all grids
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from research_eval.annotations import AttentionRows, Kernels
from research_eval.layers.dispatch import Execution, kernels_on
from research_eval.layers.kernels.autograd import applied
from research_eval.layers.text import masked_mean

MIN_GROUP = 8  # smallest number of samples that attend together
MAX_GROUPS = 4  # largest number of grids that a batch is cut into
# SIMD width of this CPU, in float32 numbers.
LANES = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)


class _Take(torch.autograd.Function):
    """Gather rows. The backward pass copies, because no row occurs twice."""

    @staticmethod
    def forward(ctx: Any, x_GF: Tensor, index_S: Tensor) -> Tensor:
        ctx.save_for_backward(index_S)
        ctx.num_rows = len(x_GF)
        return x_GF.index_select(0, index_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SF: Tensor) -> tuple[Tensor, None]:
        (index_S,) = ctx.saved_tensors
        return _placed(gradient_SF, index_S, ctx.num_rows), None


class _Place(torch.autograd.Function):
    """Scatter rows into zeros. The backward pass gathers."""

    @staticmethod
    def forward(ctx: Any, x_SF: Tensor, index_S: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index_S)
        return _placed(x_SF, index_S, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_GF: Tensor) -> tuple[Tensor, None, None]:
        (index_S,) = ctx.saved_tensors
        return gradient_GF.index_select(0, index_S), None, None


class _AddAt(torch.autograd.Function):
    """Add to some rows. The backward pass hands its gradient on without a copy of the whole array."""

    @staticmethod
    def forward(ctx: Any, x_GF: Tensor, index_S: Tensor, change_SF: Tensor) -> Tensor:
        ctx.save_for_backward(index_S)
        return x_GF.index_add(0, index_S, change_SF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_GF: Tensor) -> tuple[Tensor, None, Tensor]:
        (index_S,) = ctx.saved_tensors
        return gradient_GF, None, gradient_GF.index_select(0, index_S)


def take(x_GF: Tensor, index_S: Tensor) -> Tensor:
    """Rows `index` of x, [S, F]. No index may occur twice, so that the gradient is a copy and not a sum."""
    rows: Tensor = applied(_Take, x_GF, index_S)
    return rows


def place(x_SF: Tensor, index_S: Tensor, num_rows: int) -> Tensor:
    """The inverse of `take`: row s of x becomes row `index[s]` of `num_rows` rows; all others are zero."""
    rows: Tensor = applied(_Place, x_SF, index_S, num_rows)
    return rows


def add_at(x_GF: Tensor, index_S: Tensor, change_SF: Tensor) -> Tensor:
    """x with `change` added to its rows `index`. No index may occur twice."""
    rows: Tensor = applied(_AddAt, x_GF, index_S, change_SF)
    return rows


def _placed(x_SF: Tensor, index_S: Tensor, num_rows: int) -> Tensor:
    """Scatter rows. The target is filled with zeros only if some of its rows stay empty."""
    empty = x_SF.new_empty if len(index_S) == num_rows else x_SF.new_zeros
    return empty(num_rows, x_SF.shape[1]).index_copy_(0, index_S, x_SF)


class Grid(NamedTuple):
    """Samples that attend together, and their key mask [R, 1, 1, L]; None if no position is padded."""

    num_samples: int
    length: int
    mask: Tensor | None


class Layout(NamedTuple):
    """The places of rows on the grids of samples and positions that attention needs.

    `places` [S] numbers the positions of all grids, one grid after the other. None: the rows are one grid, [R, L, F],
    or the same with the rows of every group together, [groups, R / groups L, F].

    With `starts` [R + 1] the rows of sample r are `starts[r]` to `starts[r + 1]`, and attention may read them without a
    grid.
    """

    grids: list[Grid]
    places: Tensor | None = None
    groups: int | None = None
    starts: Tensor | None = None

    @classmethod
    def whole(cls, keep_RL: Tensor, padded: bool | None = None, places: Tensor | None = None) -> Layout:
        """One grid for all samples. `padded` says whether it has padding; None asks the mask, which costs a wait."""
        mask = attention_mask_for(keep_RL) if padded is None else keep_RL[:, None, None, :] if padded else None
        return cls([Grid(keep_RL.shape[0], keep_RL.shape[1], mask)], places)

    def grids_of(self, x: Tensor) -> list[Tensor]:
        """Rows [S, F] -> [r, l, F] for every grid, zero at padding."""
        if self.groups is not None:
            return [x.view(self.grids[0].num_samples, self.grids[0].length, -1)]
        if self.places is None:
            return [x]
        sizes = [grid.num_samples * grid.length for grid in self.grids]
        parts = place(x, self.places, sum(sizes)).split(sizes)
        return [part.view(grid.num_samples, grid.length, -1) for part, grid in zip(parts, self.grids, strict=True)]

    def rows_of(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `grids_of`: one array per grid -> rows [S, F]."""
        if self.groups is not None:
            return parts[0].view(self.groups, -1, parts[0].shape[-1])
        if self.places is None:
            return parts[0]
        flat = [part.flatten(0, 1) for part in parts]
        return take(flat[0] if len(flat) == 1 else torch.cat(flat), self.places)


class Samples(NamedTuple):
    """A selection of a batch's samples in some order, and the rows that represent them."""

    layout: Layout
    source: Tensor | None  # place of each row on the batch's grid [B L], or without `places` the number of each sample;
    # None: the rows are the whole batch
    places: Tensor | None  # place of each row on these samples' grid [R L]; None: every place has a row
    keep_RL: Tensor  # True at real tokens

    def take(self, h_BLD: Tensor) -> Tensor:
        """The states of these samples: rows [S, D], or [R, L, D] with their padding."""
        if self.source is None:
            return h_BLD
        if self.places is None:
            return take(h_BLD.flatten(1), self.source).view(len(self.source), *h_BLD.shape[1:])
        return take(h_BLD.flatten(0, 1), self.source)

    def add_to(self, h_BLD: Tensor, change: Tensor, factor_R: Tensor) -> Tensor:
        """The states of the batch [B, L, D] after `change`, times a factor per sample, is added to these rows."""
        assert self.source is not None
        change = (self.spread(factor_R) * change).to(h_BLD.dtype)
        whole, rows = (h_BLD.flatten(1), change.flatten(1)) if self.places is None else (h_BLD.flatten(0, 1), change)
        return add_at(whole, self.source, rows).view_as(h_BLD)

    def grid(self, x: Tensor) -> Tensor:
        """Rows -> [R, L, F], zero at places without a row."""
        if self.places is None:
            return x
        grid = place(x, self.places, self.keep_RL.numel())
        return grid.view(*self.keep_RL.shape, -1)

    @property
    def is_full(self) -> bool:
        """Whether the rows are a grid without padding."""
        return self.places is None and self.layout.grids[0].mask is None

    def of_experts(self, sizes: list[int]) -> list[Samples]:
        """Full samples that are sorted by expert, apart."""
        parts = self.keep_RL.split(sizes)
        return [Samples(Layout.whole(keep_RL, padded=False), None, None, keep_RL) for keep_RL in parts]

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the tokens of each sample, [R, F]."""
        return masked_mean(self.grid(x), None if self.is_full else self.keep_RL)

    def spread(self, x_R: Tensor) -> Tensor:
        """Repeat one number per sample for each of its rows, [S, 1] or [R, 1, 1]."""
        if self.places is None:
            return x_R[:, None, None]
        return take(x_R.unsqueeze(1).expand(self.keep_RL.shape).reshape(-1, 1), self.places)

    def num_rows(self, lengths_R: Tensor) -> Tensor:
        """Rows of each sample, [R]: its tokens, or 1 if each row is a whole sample."""
        return torch.ones_like(lengths_R) if self.places is None else lengths_R


class Packing:
    """A batch of samples of different lengths, of which only the real tokens are computed.

    A sample without tokens counts as one token, at its first place. `num_tokens` is the number of real tokens, if the
    caller knows it; otherwise the host waits for the device to count them. If `packed` is False, padding is computed
    too.
    """

    def __init__(
        self,
        keep_BL: Tensor,
        num_tokens: int | None = None,
        kernels: Kernels = "auto",
        packed: bool | None = None,
        attention: AttentionRows = "padded",
    ) -> None:
        chosen = kernels_on(keep_BL.device, kernels)
        # All tokens are real, or a sample without tokens counts as one token of one place.
        is_full = num_tokens == keep_BL.numel() and keep_BL.shape[1] > 1
        self.keep_BL = keep_BL if is_full else with_first_places(keep_BL)
        self.lengths_B = self.keep_BL.sum(1)
        self.num_tokens = int(self.lengths_B.sum()) if num_tokens is None else num_tokens
        self.packed = chosen != "plain" if packed is None else packed
        self.padded = self.num_tokens < keep_BL.numel()
        self.packed = self.packed and self.padded
        # A grid can only be shortened if all padding stands on the right.
        ragged = self.packed and chosen != "grouped"
        positions = torch.arange(keep_BL.shape[1], device=keep_BL.device)
        self._cut = ragged and torch.equal(self.keep_BL, positions < self.lengths_B.unsqueeze(1))
        self._varlen = attention == "varlen" and self.packed and not ragged

    @classmethod
    def of(cls, keep_BL: Tensor, num_tokens: int | None, execution: Execution, packed: bool | None = None) -> Packing:
        """The packing that these settings ask for."""
        return cls(keep_BL, num_tokens, execution.kernels, packed, execution.attention)

    def samples(self, rows_R: Tensor | None = None) -> Samples:
        """The samples with these numbers, in this order; None selects all."""
        length = self.keep_BL.shape[1]
        whole = rows_R is None or len(rows_R) == len(self.keep_BL)
        if not self.packed and rows_R is None:
            return Samples(Layout.whole(self.keep_BL, self.padded), None, None, self.keep_BL)
        if rows_R is None:
            rows_R = torch.arange(len(self.keep_BL), device=self.keep_BL.device)
        # Without padding all rows of the mask are alike.
        keep_RL = self.keep_BL[rows_R] if self.padded else self.keep_BL[: len(rows_R)]
        if not self.packed:
            return Samples(Layout.whole(keep_RL, self.padded), rows_R, None, keep_RL)
        flat = keep_RL.flatten()
        places = (torch.nonzero_static(flat, size=self.num_tokens) if whole else flat.nonzero()).squeeze(1)
        sample_S, position_S = places // length, places % length
        index = rows_R[sample_S] * length + position_S
        if not self._cut:
            layout = Layout.whole(keep_RL, True, places)
            if self._varlen:
                ends_R = self.lengths_B[rows_R].cumsum(0)
                layout = layout._replace(starts=torch.cat([ends_R.new_zeros(1), ends_R]).int())
            return Samples(layout, index, places, keep_RL)
        grids, starts_R = _cut_grids(self.lengths_B[rows_R])
        return Samples(Layout(grids, starts_R[sample_S] + position_S), index, places, keep_RL)


def _cut_grids(lengths_R: Tensor) -> tuple[list[Grid], Tensor]:
    """Sort samples into grids of similar length, and find the place where each sample begins.

    A grid is as long as attention needs for its longest sample. Short samples then cost less than in one large grid.
    """
    order_R = lengths_R.argsort(stable=True)
    size = max(MIN_GROUP, -(-len(lengths_R) // MAX_GROUPS))
    groups: dict[int, list[Tensor]] = {}
    for members in order_R.split(size):
        groups.setdefault(attended_length(int(lengths_R[members[-1]])), []).append(members)
    starts_R, grids, start = torch.empty_like(lengths_R), [], 0
    for length, parts in groups.items():
        members = torch.cat(parts)
        lengths = lengths_R[members]
        mask = None
        if int(lengths[0]) < length:
            mask = (torch.arange(length) < lengths.unsqueeze(1))[:, None, None, :]
        starts_R[members] = start + torch.arange(len(members)) * length
        grids.append(Grid(len(members), length, mask))
        start += len(members) * length
    return grids, starts_R


def attended_length(length: int) -> int:
    """The length of the grid on which a CPU attends fastest to `length` tokens.

    A row of scores is processed in SIMD vectors, and the tail after the last full vector one number at a time. If the
    tail fills at least half a vector, one more padded vector is faster.
    """
    return length + -length % LANES if length % LANES >= LANES // 2 else length


def attention_mask_for(keep_BL: Tensor) -> Tensor | None:
    """The key mask [B, 1, 1, L] for attention, or None if no position is padded."""
    return None if bool(keep_BL.all()) else with_first_places(keep_BL)[:, None, None, :]


def with_first_places(keep_BL: Tensor) -> Tensor:
    """The mask, with the first place of each empty sample set to True, so that no softmax runs over an empty set."""
    allowed_BL = keep_BL.clone()
    allowed_BL[:, 0] |= ~keep_BL.any(1)
    return allowed_BL
