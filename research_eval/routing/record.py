"""Routing decisions as models push them, and a recorder that collects the decisions of one evaluation.

Arrays may come from numpy or from torch. The recorder only indexes and sums them, and at the end joins them with the
function that it received. This module therefore needs no torch, and arrays stay on their device until the record is
read.

B samples of a batch  S samples of an evaluation  D decisions  K experts per decision  T steps or layers
A actions (the experts, then perhaps stopping)  N experts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from research_eval.routing.report import load_metrics, path_metrics

Array = Any  # a numpy array or a torch tensor
Join = Callable[[Sequence[Array]], NDArray[Any]]  # arrays of one kind -> one numpy array
Wanted = Literal["everything", "paths", "nothing"]  # "paths": experts and their weights

STOPPED = -1  # instead of an expert: the path of the sample has ended


@dataclass(frozen=True)
class RoutingRecord:
    """The decisions of a model about one batch, at one step of a path or in one routed layer."""

    step: int  # number of the step or the layer, from 0
    experts_DK: Array  # int64; STOPPED for a sample whose path has ended
    weights_DK: Array  # factor of each expert's output or change
    sample_D: Array | None = None  # the decision's sample in the batch; None: decision d belongs to sample d
    token_D: Array | None = None  # the decision's token in the sample; None: decisions about whole samples
    probabilities_DA: Array | None = None  # of all actions, before any bias or noise
    entropy_D: Array | None = None  # in nats, of the distribution used for the choice; 0 after the end
    values_DA: Array | None = None  # action values Q, if the model has them
    logits_at_limit_2: Array | None = None  # how many logits of the step are at their limit, and how many there are


class Recorder(Protocol):
    """Receives a model's decisions. The model calls it in evaluation mode only."""

    def begin_batch(self, num_samples: int) -> None:
        """Start a new batch. The next records number its samples from 0."""

    def push(self, record: RoutingRecord) -> None:
        """Add the decisions of one step or layer."""


class _Placed(NamedTuple):
    """A record and the position of its batch in the evaluation."""

    first: int  # number of the batch's first sample in the evaluation
    record: RoutingRecord


class _Shares(NamedTuple):
    """The experts' shares in the tokens of a batch's samples, in one layer."""

    first: int
    step: int
    total_BN: NDArray[np.float64]  # sum of each expert's weights over the tokens of a sample


class _Tokens(NamedTuple):
    """Some of the token decisions of a layer: for each its number, sample, token and expert with the most weight."""

    number_D: NDArray[np.int64]
    sample_D: NDArray[np.int64]
    token_D: NDArray[np.int64]
    expert_D: NDArray[np.int64]


MAX_TOKENS = 10_000  # token decisions of a layer that are kept one by one; at most twice as many while recording


class EvaluationRecorder:
    """Keeps the paths of all samples of one evaluation, and computes metrics from them.

    Decisions about tokens are summed per sample as they arrive: the recorder keeps the share of each expert in a
    sample's tokens. The expert with the largest share is the sample's expert in its path.

    Models ask what the recorder `wants` and compute no more than that.
    """

    def __init__(self, num_experts: int, num_steps: int, join: Join = np.concatenate) -> None:
        self.num_experts = num_experts
        self.num_steps = num_steps
        self._join = join
        self.clear()

    def clear(self) -> None:
        """Discard everything that was recorded, and want everything again."""
        self.wants: Wanted = "everything"
        self._num_samples = self._first = 0
        self._records: list[_Placed] = []
        self._shares: list[_Shares] = []
        self._tokens: list[_Tokens] = [_Tokens(*(np.zeros((0,), np.int64),) * 4)] * self.num_steps
        self._stride = 1
        self._counts_TN = np.zeros((self.num_steps, self.num_experts), np.int64)
        self._entropy: Any = 0.0
        self._entropy_T: list[Any] = [0.0] * self.num_steps
        self._num_decisions_T = np.zeros(self.num_steps, np.int64)
        self._postponed: list[int | RoutingRecord] | None = None

    @contextmanager
    def postponed(self) -> Iterator[list[int | RoutingRecord]]:
        """Inside, nothing is recorded. The list receives the arguments of `begin_batch` and `push`, to be given later.

        So processes that share an evaluation can give each other their records.
        """
        calls: list[int | RoutingRecord] = []
        self._postponed = calls
        try:
            yield calls
        finally:
            self._postponed = None

    def begin_batch(self, num_samples: int) -> None:
        if self.wants == "nothing":
            return
        if self._postponed is not None:
            self._postponed.append(num_samples)
            return
        self._first = self._num_samples
        self._num_samples += num_samples

    def push(self, record: RoutingRecord) -> None:
        if self.wants == "nothing":
            return
        if self._postponed is not None:
            self._postponed.append(record)
            return
        if record.token_D is not None:
            self._push_tokens(record)
            return
        if self.wants == "paths":
            record = RoutingRecord(record.step, record.experts_DK, record.weights_DK, record.sample_D)
        self._records.append(_Placed(self._first, record))

    def _push_tokens(self, record: RoutingRecord) -> None:
        """Add the token decisions of one layer to the loads, and their shares per sample."""
        experts_DK, weights_DK = self._join([record.experts_DK]), self._join([record.weights_DK])
        self._counts_TN[record.step] += np.bincount(experts_DK.ravel(), minlength=self.num_experts)
        self._num_decisions_T[record.step] += len(experts_DK)
        if record.entropy_D is not None:
            entropy = record.entropy_D.sum()
            self._entropy = self._entropy + entropy
            self._entropy_T[record.step] = self._entropy_T[record.step] + entropy
        sample_D = self._join([record.sample_D])
        num_samples = self._num_samples - self._first
        cells_DK = sample_D[:, None] * self.num_experts + experts_DK
        total = np.bincount(cells_DK.ravel(), weights_DK.ravel(), num_samples * self.num_experts)
        total_BN = np.asarray(total, np.float64).reshape(num_samples, self.num_experts)
        self._shares.append(_Shares(self._first, record.step, total_BN))
        self._keep_tokens(record, sample_D, experts_DK, weights_DK)

    def _keep_tokens(
        self,
        record: RoutingRecord,
        sample_D: NDArray[np.int64],
        experts_DK: NDArray[np.int64],
        weights_DK: NDArray[np.floating[Any]],
    ) -> None:
        """Keep every n-th decision of the layer. If too many are kept, n doubles, for all layers.

        Samples come sorted by length: a selection that is spread evenly has them all.
        """
        seen = int(self._counts_TN[record.step].sum()) // max(experts_DK.shape[1], 1) - len(sample_D)
        chosen = np.flatnonzero((seen + np.arange(len(sample_D))) % self._stride == 0)
        expert_D = experts_DK[chosen, weights_DK[chosen].argmax(1)]
        new = (seen + chosen, self._first + sample_D[chosen], self._join([record.token_D])[chosen], expert_D)
        kept = self._tokens[record.step]
        self._tokens[record.step] = _Tokens(*map(np.concatenate, zip(kept, new, strict=True)))
        if len(self._tokens[record.step].number_D) > 2 * MAX_TOKENS:
            self._stride *= 2
            for step, tokens in enumerate(self._tokens):
                stays = tokens.number_D % self._stride == 0
                self._tokens[step] = _Tokens(*(column[stays] for column in tokens))

    def token_choices(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Some token decisions of a layer, spread evenly: sample, token in the sample, expert with the most weight."""
        _, sample_D, token_D, expert_D = self._tokens[step]
        return sample_D, token_D, expert_D

    def decisions_per_step(self) -> NDArray[np.int64]:
        """The number of token decisions at each step or layer, [T]; fewer at later steps if paths end early."""
        return self._num_decisions_T

    def is_about_tokens(self) -> bool:
        """Whether the decisions are about tokens. A sample's path then holds its most used experts."""
        return bool(self._shares)

    def paths(self) -> NDArray[np.int64]:
        """The expert of each sample at each step, [S, T]; STOPPED after the end."""
        shares_STN = self.expert_shares()
        if shares_STN is not None:
            return shares_STN.argmax(-1).astype(np.int64)
        paths_ST = np.full((self._num_samples, self.num_steps), STOPPED, np.int64)
        self._fill(paths_ST, lambda record: record.experts_DK[:, 0])
        return paths_ST

    def expert_shares(self) -> NDArray[np.float32] | None:
        """The weighted share of each expert in a sample's tokens, [S, T, N]; None for decisions about samples."""
        if not self._shares:
            return None
        shares_STN = np.zeros((self._num_samples, self.num_steps, self.num_experts), np.float32)
        for first, step, total_BN in self._shares:
            shares_STN[first : first + len(total_BN), step] = total_BN / np.maximum(
                total_BN.sum(1, keepdims=True), 1e-12
            )
        return shares_STN

    def probabilities(self) -> NDArray[np.float32] | None:
        """Probabilities of the actions, [S, T, A], 0 after the end; None if no record has any."""
        return self._joined(lambda record: record.probabilities_DA)

    def values(self) -> NDArray[np.float32] | None:
        """Action values, [S, T, A], 0 after the end; None for a model without them."""
        return self._joined(lambda record: record.values_DA)

    def strengths(self) -> NDArray[np.float32] | None:
        """The factor of each expert's change, [S, T], 0 after the end; None for decisions about tokens."""
        if self._shares:
            return None
        strengths_ST = np.zeros((self._num_samples, self.num_steps), np.float32)
        self._fill(strengths_ST, lambda record: record.weights_DK[:, 0])
        return strengths_ST * (self.paths() != STOPPED)

    def entropies(self) -> NDArray[np.float64]:
        """Entropy of each decision in nats, [S, T]; 0 after the end."""
        entropies_ST = np.zeros((self._num_samples, self.num_steps))
        self._fill(entropies_ST, lambda record: record.entropy_D)
        return entropies_ST

    def logits_at_limit(self) -> tuple[int, int]:
        """How many logits of all records are at their limit, and how many there are."""
        found = [one for _, record in self._records if (one := record.logits_at_limit_2) is not None]
        at_limit, total = self._join(found).reshape(-1, 2).sum(0).tolist() if found else (0, 0)
        return int(at_limit), int(total)

    def metrics(self) -> dict[str, Any]:
        """The metrics of `path_metrics`, or for token decisions those of `load_metrics`; empty without records."""
        if self._shares:
            scale = np.log(max(self.num_experts, 2))
            entropy = float(self._entropy) / max(int(self._num_decisions_T.sum()), 1)
            total_T = np.array([float(total) for total in self._entropy_T])
            return {
                **load_metrics(self._counts_TN),
                "router_entropy": float(entropy / scale),
                "step_entropy": (total_T / np.maximum(self._num_decisions_T, 1) / scale).round(6).tolist(),
            }
        if not self._num_samples:
            return {}
        return path_metrics(self.paths(), self.entropies(), self.num_experts)

    def _joined(self, part: Callable[[RoutingRecord], Array | None]) -> NDArray[np.float32] | None:
        """One part of all records, [S, T, width], 0 if missing; None if no record has the part."""
        widths = {found.shape[-1] for _, record in self._records if (found := part(record)) is not None}
        if not widths:
            return None
        whole_STA = np.zeros((self._num_samples, self.num_steps, widths.pop()), np.float32)
        self._fill(whole_STA, part)
        return whole_STA

    def _fill(self, target: NDArray[Any], part: Callable[[RoutingRecord], Array | None]) -> None:
        """Copy one part of all records into `target`, with a single call of `join`."""
        found = [(placed, array) for placed in self._records if (array := part(placed.record)) is not None]
        if not found:
            return
        whole = self._join([array for _, array in found])
        start = 0
        for (first, record), array in found:
            size = len(array)
            rows = slice(first, first + size) if record.sample_D is None else first + self._join([record.sample_D])
            target[rows, record.step] = whole[start : start + size]
            start += size
