"""Token sequences stored flat, and the batches drawn from them.

N samples  S tokens in all  B batch  L length of the batch's longest sample  T steps of the right path
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from research_eval.registry import CLASSIFICATION as CLASSIFICATION
from research_eval.seeding import derive_seed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORED = -100  # label of a token that no loss and no score counts


@dataclass(frozen=True)
class TokenData:
    """One split. Sample i holds `tokens[offsets[i]:offsets[i + 1]]`: no padding is stored."""

    tokens: NDArray[np.int32]  # [S], ids from 1; 0 is padding and never occurs here
    offsets: NDArray[np.int64]  # [N + 1]
    labels: NDArray[Any]  # [N], int64 class numbers 0..num_classes - 1, or float32 numbers to be predicted
    paths: NDArray[np.int64] | None = None  # [N, T], the right path if the task knows it, -1 after its end
    groups: NDArray[np.int64] | None = None  # [N], difficulty or family of each sample

    @classmethod
    def from_padded(
        cls,
        ids_NL: NDArray[np.integer[Any]],
        labels: NDArray[np.integer[Any] | np.floating[Any]],
        paths: NDArray[np.integer[Any]] | None = None,
        groups: NDArray[np.integer[Any]] | None = None,
    ) -> TokenData:
        """Drop the padding (id 0, on the right) of a rectangular array. Fractions become float32, else int64."""
        keep_NL = ids_NL != 0
        offsets = np.zeros(len(ids_NL) + 1, np.int64)
        np.cumsum(keep_NL.sum(1), out=offsets[1:])
        return cls(
            ids_NL[keep_NL].astype(np.int32),
            offsets,
            labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64),
            None if paths is None else paths.astype(np.int64),
            None if groups is None else groups.astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per sample, [N]."""
        return np.diff(self.offsets)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one pass of the training."""
        return len(self)

    def batches(
        self,
        batch_size: int,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        curriculum_epochs: float = 0.0,
    ) -> Batches:
        """The split as batches: for training with a `seed`, else for evaluation (see `Batches`)."""
        return Batches(self, batch_size, device, seed, curriculum_epochs)

    def sample(self, index: int) -> list[int]:
        """The tokens of one sample."""
        return [int(token) for token in self.tokens[self.offsets[index] : self.offsets[index + 1]]]

    def sha256(self) -> str:
        """Hash of the samples in their order, the same on machines of either byte order."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.offsets, self.labels):
            digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class DataSplits:
    """The data of an experiment, and what a model has to know about it to fit."""

    train: TokenData
    validation: TokenData
    test: TokenData | None
    vocab_size: int  # embedding rows: the largest id + 1, padding included
    num_classes: int  # 1 if the task has no classes: a model then gives one number per sample
    label_names: list[str]  # empty if the task has no classes
    max_length: int  # no sample of any split is longer
    padding_idx: int = 0
    tokenizer: Tokenizer | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    """Identifies the data in the results. Each kind chooses its keys. Other code reads `sha256` by split (a resumed run
    refuses other data), `data_sha256` (one hash that is the same for every seed: runs on other data are kept apart) and
    `train_validation_duplicates`."""
    further_tests: dict[str, TokenData] = field(default_factory=dict)  # longer samples, unseen combinations, ...
    task: str = CLASSIFICATION  # the task of models, by its name in the registry of tasks


class Batch(NamedTuple):
    """`input_ids` [B, L] int64, padded with 0; `attention_mask` [B, L], True where a token is real; `labels` [B].

    Labels are class numbers (int64), or targets (float32) if the task has no classes. Running text has a label for each
    token, [B, L]. `paths` [B, T] is the right path of each sample, if the task knows it; `rows` [B] its place in the
    split. `num_tokens` counts the real tokens, and a sample without any as one. `documents` [B, L] numbers the document
    of each token, if a sample has tokens of several documents that must not see each other.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    paths: torch.Tensor | None = None
    rows: NDArray[np.int64] | None = None
    num_tokens: int | None = None
    documents: torch.Tensor | None = None


class Batches:
    """Batches of one split, each cut to its longest sample.

    With a `seed` every epoch has a new order, the same for the same seed. Similar lengths share a batch (buckets of
    `BUCKET` batches are sorted by length), and the batches come in random order. Without a seed the samples come sorted
    by length, every sample exactly once. The whole split lies on `device`.

    With `curriculum_epochs` the longest admitted length grows in equal steps over that many epochs. Admitted samples
    are repeated, so that every epoch has the same number of samples.
    """

    BUCKET = 50

    def __init__(
        self,
        data: TokenData,
        batch_size: int,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        curriculum_epochs: float = 0.0,
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.curriculum_epochs = curriculum_epochs
        self._lengths = data.lengths
        longest = int(self._lengths.max(initial=1))
        self._tokens_S = torch.from_numpy(data.tokens).to(device)
        same_length = len(data) > 0 and int(self._lengths.min()) == longest
        self._tokens_NL = self._tokens_S.view(-1, longest) if same_length else None
        self._offsets = torch.from_numpy(data.offsets[:-1]).to(device)
        self._lengths_N = torch.from_numpy(self._lengths).to(device)
        self._labels_N = torch.from_numpy(data.labels).to(device)
        self._paths_NT = None if data.paths is None else torch.from_numpy(data.paths).to(device)
        self._steps_L = torch.arange(longest, device=device)

    def __len__(self) -> int:
        return math.ceil(len(self.data) / self.batch_size)

    def order(self, epoch: int) -> list[NDArray[np.int64]]:
        """The sample numbers of each batch of this epoch."""
        if self.seed is None:
            rows = np.argsort(self._lengths, kind="stable")
            return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        rng = np.random.default_rng(derive_seed(self.seed, "sampler", epoch))
        rows = rng.permutation(len(self.data))
        if epoch + 1 < self.curriculum_epochs:
            shortest, longest = int(self._lengths.min()), int(self._lengths.max())
            limit = shortest + (longest - shortest) * (epoch + 1) / self.curriculum_epochs
            rows = np.resize(rows[self._lengths[rows] <= limit], len(rows))
        bucket = self.BUCKET * self.batch_size
        batches = []
        for start in range(0, len(rows), bucket):
            part = rows[start : start + bucket]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            batches += [part[first : first + self.batch_size] for first in range(0, len(part), self.batch_size)]
        return [batches[number] for number in rng.permutation(len(batches))]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch number `start` on."""
        for rows in self.order(epoch)[start:]:
            yield self.take(rows)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def take(self, rows: NDArray[np.int64]) -> Batch:
        """The given samples as one batch."""
        rows_B = torch.from_numpy(rows)
        if self._tokens_S.is_cuda:
            rows_B = rows_B.pin_memory()  # a copy from there does not wait for the device
        rows_B = rows_B.to(self._tokens_S.device, non_blocking=self._tokens_S.is_cuda)
        labels_B = self._labels_N.index_select(0, rows_B)
        paths_BT = None if self._paths_NT is None else self._paths_NT.index_select(0, rows_B)
        if self._tokens_NL is not None:
            ids_BL = self._tokens_NL.index_select(0, rows_B).long()
            return Batch(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool), labels_B, paths_BT, rows, ids_BL.numel())
        lengths = np.maximum(self._lengths[rows], 1)
        steps_L = self._steps_L[: int(lengths.max())]
        keep_BL = steps_L < self._lengths_N.index_select(0, rows_B).unsqueeze(1)
        index_BL = self._offsets.index_select(0, rows_B).unsqueeze(1) + steps_L
        ids_BL = self._tokens_S.take(index_BL.clamp_(max=max(len(self._tokens_S) - 1, 0))).long().mul_(keep_BL)
        return Batch(ids_BL, keep_BL, labels_B, paths_BT, rows, int(lengths.sum()))
