"""What a user should know of running text: its size, unknown tokens, and validation text that training has too.

C characters  Q windows that are looked for
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.vocabulary import UNK_ID, TokenizerKind
from research_eval.datasets.token_data import TokenData

log = logging.getLogger(__name__)

WINDOW = 50  # characters
LOUD = 0.01  # share of unknown tokens, or of windows that training has too; above it, there is a warning
PART = 1 << 22  # characters whose hashes are in memory at once
FILTER_BITS = 22
BASE, MIX = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd numbers of 64 bits
ALL_KNOWING: Mapping[str, TokenizerKind] = {"char": "byte", "word": "bpe"}  # what leaves no token unknown, instead


def stream_facts(
    texts: Mapping[str, Sequence[str]], streams: Mapping[str, TokenData], documents: bool
) -> dict[str, Any]:
    """Facts by split, for the fingerprint. `documents` says whether each text is one.

    `unknown_share` is the share of `<unk>` in the tokens. `shared_windows` is the share of the 50 characters at every
    50th place of a split that occur anywhere in the training text.
    """
    facts: dict[str, Any] = {
        "tokens": {name: len(stream.tokens) for name, stream in streams.items()},
        "characters": {name: sum(map(len, parts)) for name, parts in texts.items()},
        "bytes": {name: sum(len(part.encode()) for part in parts) for name, parts in texts.items()},
    }
    if documents:
        facts["documents"] = {name: len(parts) for name, parts in texts.items()}
    counts = {name: np.bincount(stream.tokens, minlength=UNK_ID + 1) for name, stream in streams.items()}
    train = "".join(texts["train"])
    return facts | {
        "distinct_ids": {name: int(np.count_nonzero(found)) for name, found in counts.items()},
        "unknown_share": {name: round(int(found[UNK_ID]) / int(found.sum()), 6) for name, found in counts.items()},
        "shared_windows": {
            name: round(shared_windows(train, "".join(parts)), 6) for name, parts in texts.items() if name != "train"
        },
    }


def warn_of(facts: Mapping[str, Any], kind: TokenizerKind, dataset_name: str) -> None:
    """Log a warning for every share that is more than LOUD."""
    unknown = {name: share for name, share in facts["unknown_share"].items() if share > LOUD}
    if unknown:
        log.warning(
            '%s: the tokenizer (%s) does not know %s (share of the tokens). "tokenizer": "%s" knows every text',
            *(dataset_name, kind, _shares(unknown), ALL_KNOWING.get(kind, "byte")),
        )
    shared = {name: share for name, share in facts["shared_windows"].items() if share > LOUD}
    if shared:
        log.warning(
            "%s: %s occur in the training text too (pieces of %d characters), so the scores are too good",
            *(dataset_name, _shares(shared), WINDOW),
        )


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.1%} of {name}" for name, share in shares.items())


def shared_windows(train: str, other: str, window: int = WINDOW) -> float:
    """The share of the windows of `other` (one behind the other) that occur at any place of `train`.

    They are compared by hashes of 64 bits. 0 for a text that is shorter than a window.
    """
    wanted_Q = window_hashes(_codes(other), window)[::window]
    if not len(wanted_Q):
        return 0.0
    sorted_Q = np.unique(wanted_Q)
    # Most windows of the training text are no match: a small table of bits rules nearly all of them out.
    shift = np.uint64(64 - FILTER_BITS)
    may_be = np.zeros(1 << FILTER_BITS, bool)
    may_be[sorted_Q >> shift] = True
    found = np.zeros(len(sorted_Q), bool)
    codes = _codes(train)
    for start in range(0, max(len(codes) - window + 1, 0), PART):
        hashes = window_hashes(codes[start : start + PART + window - 1], window)
        hashes = hashes[may_be[hashes >> shift]]
        places = np.minimum(np.searchsorted(sorted_Q, hashes), len(sorted_Q) - 1)
        found[places[sorted_Q[places] == hashes]] = True
    return float(found[np.searchsorted(sorted_Q, wanted_Q)].mean())


def _codes(text: str) -> NDArray[np.uint32]:
    """The code points of a text [C]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def window_hashes(codes_C: NDArray[np.uint32], window: int) -> NDArray[np.uint64]:
    """A hash of the `window` characters from each place on, where there are so many: a polynomial modulo 2**64.

    The sum over places i.. of code x BASE**place is a difference of running sums; BASE**-i moves it to place 0.
    """
    count = len(codes_C) - window + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    values_C = (codes_C.astype(np.uint64) + np.uint64(1)) * np.uint64(MIX)
    values_C ^= values_C >> np.uint64(29)  # else the low bits of a hash would depend on the low bits of codes alone
    sums = np.zeros(len(codes_C) + 1, np.uint64)
    np.cumsum(values_C * _powers(BASE, len(codes_C)), out=sums[1:])
    hashes = (sums[window:] - sums[:count]) * _powers(pow(BASE, -1, 2**64), count)
    hashes ^= hashes >> np.uint64(32)
    return hashes * np.uint64(MIX)


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """base**0, base**1, ... modulo 2**64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)
