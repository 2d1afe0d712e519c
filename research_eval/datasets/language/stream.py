"""A split of running text as one stream of ids, and the batches of blocks that are drawn from it.

Without documents the stream is the text. With documents, `<eos>` stands before each document and once at the end, and
belongs to the document that it opens: so the first token of a document is predicted from `<eos>` alone, and every token
but the first one of the stream is a target.

S tokens  L tokens of a block  N blocks of an evaluation  M blocks of a training epoch  B batch
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from research_eval.datasets.language.vocabulary import encode_many, eos_id
from research_eval.datasets.token_data import IGNORED, Batch, Batches, TokenData
from research_eval.seeding import derive_seed

Document = Literal["none", "row", "file"]  # what is a document of its own


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Texts -> the stream [S] and the places of the `<eos>` that open the documents.

    Each text is a document if the tokenizer has `<eos>`. Otherwise the texts follow each other without places.
    """
    ids, lengths = encode_many(tokenizer, texts)
    eos = eos_id(tokenizer)
    if eos is None:
        return ids, np.zeros(0, np.int64)
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(lengths + 1, out=starts[1:])
    tokens = np.empty(len(ids) + len(starts), np.int32)
    is_text = np.ones(len(tokens), bool)
    is_text[starts] = False
    tokens[is_text], tokens[starts] = ids, eos
    return tokens, starts[:-1]  # the last <eos> opens no document


@dataclass(frozen=True)
class TokenStream(TokenData):
    """One split as a stream. `TokenStream.of` makes it.

    Sample i is the input of evaluation block i, `tokens[offsets[i]:offsets[i + 1]]`; its targets are the tokens one
    place later. `labels` is the first target of each block. `tokens` may be a memory-mapped file.
    """

    block_size: int = 0  # L
    document_starts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Places of the `<eos>` that open the documents, sorted; empty if documents are not separated."""
    respect_documents: bool = True
    """Whether batches say which tokens belong to the same document."""
    eval_stride: int | None = None
    """Targets that each window of a sliding evaluation scores; None for no such evaluation."""

    @classmethod
    def of(
        cls,
        tokens: NDArray[np.int32],
        block_size: int,
        document_starts: NDArray[np.int64] | None = None,
        respect_documents: bool = True,
        eval_stride: int | None = None,
    ) -> TokenStream:
        """The stream of these tokens, at least two. The last evaluation block may be shorter than `block_size`."""
        offsets = np.append(np.arange(0, len(tokens) - 1, block_size, dtype=np.int64), len(tokens) - 1)
        return cls(
            tokens,
            offsets,
            tokens[offsets[:-1] + 1].astype(np.int64),
            block_size=block_size,
            document_starts=np.zeros(0, np.int64) if document_starts is None else document_starts,
            respect_documents=respect_documents,
            eval_stride=eval_stride,
        )

    @property
    def num_targets(self) -> int:
        """Targets of an evaluation: every token but the first."""
        return len(self.tokens) - 1

    @property
    def samples_per_epoch(self) -> int:
        """M. One block fewer than there is room for, unless this leaves none, so that every phase gives as many."""
        return max(1, (len(self.tokens) - self.block_size) // self.block_size)

    def batches(
        self,
        batch_size: int,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        curriculum_epochs: float = 0.0,
    ) -> StreamBatches:
        """Blocks at new places in each epoch for training with a `seed`, else the evaluation blocks in their order.

        All blocks are equally long, so that a curriculum of lengths changes nothing.
        """
        return StreamBatches(self, batch_size, device, seed)

    def sha256(self) -> str:
        """Hash of the tokens and of the starts of documents, the same on machines of either byte order."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.document_starts):
            digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
        return digest.hexdigest()


class StreamBatches(Batches):
    """Batches of blocks of L tokens. `take` gets their START places in the stream, as `order` gives them.

    With a `seed`, epoch e has M blocks. They begin at a phase in 0..L - 1 that is drawn for the epoch, and come in
    random order; both follow from (seed, e) alone. So every token is a target once per epoch, except at the ends, and
    its place in the block changes. Without a seed the blocks of the evaluation come in the order of the text. The last
    one is padded with id 0.

    Labels [B, L] are the next ids, IGNORED at padding. `rows` are numbers of evaluation blocks, and places in training.
    Only a CUDA device holds the whole stream. For other devices each batch is read from the array or the mapped file.
    """

    data: TokenStream

    def __init__(
        self, data: TokenStream, batch_size: int, device: torch.device | str = "cpu", seed: int | None = None
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self._offsets_L = np.arange(data.block_size + 1)
        self._last = len(data.tokens) - 1
        self._resident_S = torch.from_numpy(np.array(data.tokens)).to(device) if self.device.type == "cuda" else None

    def __len__(self) -> int:
        blocks = len(self.data) if self.seed is None else self.data.samples_per_epoch
        return math.ceil(blocks / self.batch_size)

    def order(self, epoch: int) -> list[NDArray[np.int64]]:
        """The start places of the blocks of each batch of this epoch."""
        starts = self._evaluation_starts() if self.seed is None else self._training_starts(self.seed, epoch)
        return [starts[first : first + self.batch_size] for first in range(0, len(starts), self.batch_size)]

    def _evaluation_starts(self) -> NDArray[np.int64]:
        return self.data.offsets[:-1]

    def _training_starts(self, seed: int, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng(derive_seed(seed, "sampler", epoch))
        length, blocks = self.data.block_size, self.data.samples_per_epoch
        phase = rng.integers(min(length - 1, self._last - blocks * length), endpoint=True)
        return phase + length * rng.permutation(blocks)

    def take(self, rows: NDArray[np.int64]) -> Batch:
        """The blocks that start at these places, as one batch."""
        places_BL = rows[:, None] + self._offsets_L  # one more than L: the last is a target only
        real_BL = places_BL[:, 1:] <= self._last
        ids_BL = self._ids_at(np.minimum(places_BL, self._last))
        inputs_BL, labels_BL, mask_BL = ids_BL[:, :-1], ids_BL[:, 1:], torch.from_numpy(real_BL).to(self.device)
        if not real_BL.all():
            inputs_BL, labels_BL = inputs_BL * mask_BL, labels_BL.masked_fill(~mask_BL, IGNORED)
        return Batch(
            inputs_BL.contiguous(),
            mask_BL,
            self._scored(labels_BL, rows).contiguous(),
            rows=self._numbers(rows),
            num_tokens=int(real_BL.sum()),
            documents=self._documents_at(np.minimum(places_BL[:, :-1], self._last)),
        )

    def _ids_at(self, places: NDArray[np.int64]) -> torch.Tensor:
        if self._resident_S is not None:
            return self._resident_S[torch.from_numpy(places).to(self.device)].long()
        return torch.from_numpy(self.data.tokens[places].astype(np.int64)).to(self.device)

    def _documents_at(self, places_BL: NDArray[np.int64]) -> torch.Tensor | None:
        """The number of each token's document; padding counts to the last one."""
        starts = self.data.document_starts
        if not self.data.respect_documents or not len(starts):
            return None
        return torch.from_numpy(np.searchsorted(starts, places_BL, side="right") - 1).to(self.device)

    def _numbers(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """`rows` of a batch."""
        return starts // self.data.block_size if self.seed is None else starts

    def _scored(self, labels_BL: torch.Tensor, starts: NDArray[np.int64]) -> torch.Tensor:
        """The labels that count."""
        return labels_BL

    def sliding(self, stride: int | None = None) -> SlidingBatches:
        """Windows of the same stream with more context for each target. `stride` is `eval_stride` of the data."""
        stride = stride or self.data.eval_stride or self.data.block_size
        return SlidingBatches(self.data, self.batch_size, self.device, stride)


class SlidingBatches(StreamBatches):
    """Windows of L tokens that start every `stride` places. Only the last `stride` targets of a window count.

    All targets of the first window count, so that each target counts once. `rows` are the numbers of the windows.
    """

    def __init__(self, data: TokenStream, batch_size: int, device: torch.device | str, stride: int) -> None:
        super().__init__(data, batch_size, device)
        self.stride = stride

    def __len__(self) -> int:
        return math.ceil(len(self._evaluation_starts()) / self.batch_size)

    def _evaluation_starts(self) -> NDArray[np.int64]:
        later = math.ceil(max(self.data.num_targets - self.data.block_size, 0) / self.stride)
        return np.arange(1 + later, dtype=np.int64) * self.stride

    def _numbers(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        return starts // self.stride

    def _scored(self, labels_BL: torch.Tensor, starts: NDArray[np.int64]) -> torch.Tensor:
        seen_L = np.arange(self.data.block_size) < self.data.block_size - self.stride  # scored by the window before
        seen_BL = torch.from_numpy((starts > 0)[:, None] & seen_L).to(self.device)
        return labels_BL.masked_fill(seen_BL, IGNORED)
