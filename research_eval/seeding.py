"""Every source of randomness is a named generator derived from the run's one seed."""

from __future__ import annotations

import zlib

import numpy as np


def derive_seed(seed: int, name: str, *indices: int) -> int:
    """A 63-bit seed for the stream `name` (and, say, epoch number): independent streams, stable over releases."""
    words = np.random.SeedSequence([seed, zlib.crc32(name.encode()), *indices]).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1))
