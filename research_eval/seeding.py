"""Named random streams: every generator of a run gets its seed from the run's one seed and a name."""

from __future__ import annotations

import zlib

import numpy as np


def derive_seed(seed: int, name: str, *indices: int) -> int:
    """A 63-bit seed for the stream `name` and, for example, an epoch number.

    Different names or numbers give independent streams. The seeds stay the same over releases.
    """
    words = np.random.SeedSequence([seed, zlib.crc32(name.encode()), *indices]).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1))
