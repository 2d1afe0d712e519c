"""What the layers of a language model need to know of a batch: ids, documents, positions, and the cache.

B batch  n new tokens  L tokens so far, the new ones included  H heads  K width of a head  D width
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Cache:
    """What decoding keeps of earlier tokens: their ids, and the arrays of each step, made on first use.

    Arrays have room for `capacity` tokens from the start, so that no token moves the others. A model without attention
    keeps its state in `states`.
    """

    capacity: int
    ids_BL: Tensor | None = None
    length: int = 0
    arrays: dict[str, Tensor] = field(default_factory=dict)
    states: tuple[Tensor, ...] | None = None

    def extended(self, name: str, new: Tensor) -> Tensor:
        """The entries of all tokens so far [..., L, K], after the new ones [..., n, K] are stored."""
        if name not in self.arrays:
            shape = (*new.shape[:-2], self.capacity, new.shape[-1])
            self.arrays[name] = new.new_empty(shape)
        end = self.length + new.shape[-2]
        self.arrays[name][..., self.length : end, :] = new
        return self.arrays[name][..., :end, :]


@dataclass
class Context:
    """One pass over tokens that stand behind `offset` cached ones."""

    ids_BL: Tensor  # with the cached ones
    offset: int
    documents_BL: Tensor | None
    cache: Cache | None
    mask: Tensor | None  # [B or 1, 1, n, L], True where a key is visible; None: causal and nothing else
    positions: Tensor | None  # [B, n], places in the document; None: offset, offset + 1, ...

    @classmethod
    def of(cls, ids_Bn: Tensor, documents_BL: Tensor | None = None, cache: Cache | None = None) -> Context:
        """The context of a whole block, or of the tokens that follow those in a cache. A cache has one document."""
        offset = 0 if cache is None else cache.length
        ids_BL = ids_Bn if cache is None or cache.ids_BL is None else torch.cat([cache.ids_BL, ids_Bn], 1)
        new, total = ids_Bn.shape[1], ids_BL.shape[1]
        mask = positions = None
        if offset and new > 1:
            mask = torch.ones(new, total, dtype=torch.bool, device=ids_Bn.device).tril(offset)[None, None]
        if documents_BL is not None:
            causal_LL = torch.ones(total, total, dtype=torch.bool, device=ids_Bn.device).tril()
            mask = (causal_LL & (documents_BL.unsqueeze(2) == documents_BL.unsqueeze(1))).unsqueeze(1)
            positions = _positions(documents_BL)
        return cls(ids_BL, offset, documents_BL, cache, mask, positions)

    @property
    def is_causal(self) -> bool:
        """Whether the attention is that of a whole block without a mask."""
        return self.mask is None and self.offset == 0

    @property
    def num_new(self) -> int:
        """The number of tokens per sample in this pass."""
        return self.ids_BL.shape[1] - self.offset

    def places(self) -> Tensor:
        """The place of every token in its document, cached ones included, [B or 1, L]."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.ids_BL.shape[1], device=self.ids_BL.device).unsqueeze(0)

    def earlier_ids(self, distance: int) -> Tensor:
        """The ids `distance` tokens before the new ones [B, n]; 0 before the document's first token."""
        start, end = self.offset - distance, self.ids_BL.shape[1] - distance
        ids = self.ids_BL[:, max(start, 0) : max(end, 0)]
        ids = F.pad(ids, (self.num_new - ids.shape[1], 0)) if ids.shape[1] < self.num_new else ids
        if self.positions is not None:
            ids = ids * (self.positions >= distance)
        return ids


def _positions(documents_BL: Tensor) -> Tensor:
    """The place of each token in its document, [B, L]. Documents are contiguous."""
    length = documents_BL.shape[1]
    index_L = torch.arange(length, device=documents_BL.device)
    is_first_BL = F.pad(documents_BL[:, 1:] != documents_BL[:, :-1], (1, 0), value=True)
    return index_L - torch.where(is_first_BL, index_L, 0).cummax(1).values
