"""Counting as a baseline: interpolated Kneser-Ney n-grams with three discounts (Chen & Goodman 1999, section 3.4).

    p_k(w | h) = (c(hw) - D(c(hw))) / C(h) + g(h) p_{k-1}(w | h without its first token)
    C(h) = sum of c(hw) over w      g(h) = sum of D(c(hw)) over w / C(h)      p_0 = 1 / (ids but padding)

c is how often hw occurs in the training stream for the highest order n. For a lower order it is in how many different
tokens hw is preceded by. D depends on c = 1, 2, 3 or more, and on the order. Contexts may reach over `<eos>`.

An n-gram is a number: the place of (number of its first k - 1 tokens, last token) in the sorted list of all of its
order. So everything is sorting and counting of whole arrays.

S tokens of a stream  K different n-grams of an order  H different contexts of an order
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.vocabulary import TokenizerKind
from research_eval.system.phases import report

log = logging.getLogger(__name__)

LARGEST_ORDER: Mapping[TokenizerKind, int] = {"char": 8, "byte": 8, "word": 4, "bpe": 4}
HELD_OUT = 0.1  # of the training stream, its end: chooses the order
MOST_TOKENS = 5_000_000  # of the training stream; of a longer one, the beginning is counted
PLAIN_DISCOUNT = 0.5  # where too few n-grams occur once, twice or three times to estimate discounts
LEAST_DISCOUNT = 0.05  # so that every token keeps a probability
PREFIXES = {"validation": "val", "test": "test"}


class Counts(NamedTuple):
    """One kind of counts of an order, and what follows from them."""

    of_gram: NDArray[np.int32]  # c [K]
    of_context: NDArray[np.float64]  # C [H]
    backoff: NDArray[np.float64]  # g [H], 1 where C is 0
    discounts: NDArray[np.float64]  # D for a count of 0, 1, 2, 3 or more


class Order(NamedTuple):
    """The n-grams of one length."""

    keys: NDArray[np.int64]  # [K] number of the context x vocabulary + last token, sorted
    times: Counts  # of occurrence
    ways: Counts | None  # different tokens before it; None for the highest order


class KneserNey:
    """n-grams of all orders up to a highest one. `kneser_ney` counts them."""

    def __init__(self, orders: list[Order], vocab_size: int) -> None:
        self.orders = orders
        self.vocab_size = vocab_size

    def log_probabilities(self, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """The log probability (nats) of every token but the first [n, S - 1]: row k for models of highest order k + 1.

        Each follows from the tokens before it, up to k of them.
        """
        ids = np.asarray(tokens, np.int64)
        numbers = np.zeros(len(ids), np.int64)  # of the k-gram that ends at each place; -1 if training has none
        lower = np.full(len(ids) - 1, 1 / (self.vocab_size - 1))
        result = np.empty((len(self.orders), len(ids) - 1))
        for k, order in enumerate(self.orders):
            contexts = np.concatenate([[0 if k == 0 else -1], numbers[:-1]])
            numbers = _find(order.keys, contexts * self.vocab_size + ids, contexts >= 0)
            places = contexts[1:], numbers[1:]
            result[k] = _interpolated(order.times, *places, lower)
            if order.ways is not None:
                lower = _interpolated(order.ways, *places, lower)
        return np.log(result)

    def losses(self, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """Nats per token [n], over every token but the first, for models of highest order 1, 2, ..."""
        mean: NDArray[np.float64] = -self.log_probabilities(tokens).mean(1)
        return mean


def kneser_ney(tokens: NDArray[np.int32], highest: int, vocab_size: int) -> KneserNey:
    """Count the n-grams of a training stream, at most `highest` tokens long."""
    ids = np.asarray(tokens, np.int64)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
    numbers = np.zeros(len(ids) + 1, np.int64)  # of the k-gram that ends at each place, and of the empty one before
    for k in range(1, min(highest, len(ids)) + 1):
        keys, first, later = np.unique(numbers[:-1] * vocab_size + ids[k - 1 :], return_index=True, return_inverse=True)
        found.append((keys, np.bincount(later), numbers[:-1][first], numbers[1:][first]))
        numbers = later
        report(f"{k} of {highest}")
    orders = []
    for place, (keys, times, contexts, _) in enumerate(found):
        ways = None
        if place + 1 < len(found):
            ends = found[place + 1][3]  # of each longer n-gram, the one without its first token
            ways = _counts(np.bincount(ends, minlength=len(keys)), contexts)
        orders.append(Order(keys, _counts(times, contexts), ways))
    return KneserNey(orders, vocab_size)


def _counts(counts: NDArray[np.int64], contexts: NDArray[np.int64]) -> Counts:
    """The counts of K n-grams with their contexts, and what follows from them."""
    discounts = estimated_discounts(counts)
    totals = np.bincount(contexts, counts).astype(np.float64)
    taken = np.bincount(contexts, discounts[np.minimum(counts, 3)])
    backoff = np.divide(taken, totals, out=np.ones(len(totals)), where=totals > 0)
    return Counts(counts.astype(np.int32), totals, backoff, discounts)


def estimated_discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """D for a count of 0, 1, 2, 3 or more: equation 26 of Chen & Goodman, limited to LEAST_DISCOUNT..count."""
    once, twice, thrice, four = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    if not (once and twice and thrice):
        return np.array([0.0, *[PLAIN_DISCOUNT] * 3])
    share = once / (once + 2 * twice)
    raw = [1 - 2 * share * twice / once, 2 - 3 * share * thrice / twice, 3 - 4 * share * four / thrice]
    return np.array([0.0, *(min(max(value, LEAST_DISCOUNT), count) for count, value in enumerate(raw, 1))])


def _find(keys: NDArray[np.int64], wanted: NDArray[np.int64], possible: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The places of `wanted` in `keys`; -1 where it is not there or not `possible`."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(possible & (keys[places] == wanted), places, -1)


def _interpolated(
    counts: Counts, contexts: NDArray[np.int64], grams: NDArray[np.int64], lower: NDArray[np.float64]
) -> NDArray[np.float64]:
    """p_k of each place from p_{k-1} there (`lower`). -1 stands for a context or an n-gram that training lacks."""
    inside = (contexts >= 0) & (contexts < len(counts.of_context))  # a context may only occur at the end
    contexts = np.where(inside, contexts, 0)
    known = inside & (counts.of_context[contexts] > 0)
    times = np.where(grams >= 0, counts.of_gram[grams], 0)
    own = (times - counts.discounts[np.minimum(times, 3)]) / np.maximum(counts.of_context[contexts], 1)
    return np.where(known, own + counts.backoff[contexts] * lower, lower)


def best_order(tokens: NDArray[np.int32], highest: int, vocab_size: int) -> int:
    """The order with the lowest loss on the end of a training stream, counted on the rest of it."""
    cut = max(2, round(len(tokens) * (1 - HELD_OUT)))
    if len(tokens) - cut < 2:
        return 1
    return 1 + int(np.argmin(kneser_ney(tokens[:cut], highest, vocab_size).losses(tokens[cut:])))


def ngram_scores(
    streams: Mapping[str, NDArray[np.int32]], kind: TokenizerKind, bytes_V: NDArray[np.int64]
) -> dict[str, float]:
    """The order that the training stream chooses, and the losses of the other streams (val_loss, test_loss, ...).

    `bytes_V` has the bytes of each id. A loss is in nats per token, over every token but the first. Bits per byte leave
    special tokens out of both sums. `train_tokens` says how many tokens were counted.
    """
    train = streams["train"]
    if len(train) > MOST_TOKENS:
        log.info("n-grams: the first %s of %s training tokens are counted", f"{MOST_TOKENS:,}", f"{len(train):,}")
        train = train[:MOST_TOKENS]
    vocab_size = len(bytes_V)
    order = best_order(train, LARGEST_ORDER[kind], vocab_size)
    model = kneser_ney(train, order, vocab_size)
    scores: dict[str, float] = {"order": order, "train_tokens": len(train)}
    for name, prefix in PREFIXES.items():
        if name in streams:
            nats = -model.log_probabilities(streams[name])[-1]
            num_bytes = bytes_V[streams[name][1:]]
            scores[f"{prefix}_loss"] = float(nats.mean())
            if num_bytes.any():
                total = float(nats[num_bytes > 0].sum())
                scores[f"{prefix}_bits_per_byte"] = total / math.log(2) / int(num_bytes.sum())
    return scores
