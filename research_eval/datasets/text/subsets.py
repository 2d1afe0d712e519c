"""How many rows of a split are used, and how a subset keeps the shares of the classes.

N samples  C classes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from research_eval.annotations import Younger


@dataclass(frozen=True)
class SubsetSettings:
    """The sizes of subsets, and how they are drawn; the fields are options of `dataset_params`."""

    train_samples: Annotated[int, Field(ge=2)] | None = None
    val_samples: Annotated[int, Field(ge=1)] | None = None
    stratify: Annotated[bool, Younger()] = False


ALL_ROWS = SubsetSettings()


def stratified(labels_N: NDArray[np.int64], order_N: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """`size` of the rows `order_N`, in this order: of each class its first ones, as many as `rows_per_class` says."""
    labels_N = labels_N[order_N]
    left_C = rows_per_class(np.bincount(labels_N), size)
    by_class = np.argsort(labels_N, kind="stable")
    starts_C = np.searchsorted(labels_N[by_class], np.arange(len(left_C)))
    place_N = np.empty(len(labels_N), np.int64)  # of a row among those of its class
    place_N[by_class] = np.arange(len(labels_N)) - starts_C[labels_N[by_class]]
    return order_N[place_N < left_C[labels_N]]


def rows_per_class(counts_C: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """How many of `size` rows each class gets: its share, rounded, but a row at least if `size` suffices for that.

    The largest remainders are rounded up (Hamilton's method).

    >>> rows_per_class(np.array([180, 10, 10, 0]), 8).tolist()
    [6, 1, 1, 0]
    >>> rows_per_class(np.array([5, 5, 5]), 7).tolist()
    [3, 2, 2]
    """
    share_C = counts_C * size / counts_C.sum()
    least_C = np.minimum(counts_C, 1) if size >= np.count_nonzero(counts_C) else np.zeros_like(counts_C)
    given_C: NDArray[np.int64] = np.maximum(np.floor(share_C).astype(np.int64), least_C)
    while (missing := size - int(given_C.sum())) != 0:
        # Each class gives or takes one row at most in a round; several rounds are rare.
        wish_C = (share_C - given_C) * np.sign(missing)
        wish_C[given_C == (counts_C if missing > 0 else least_C)] = -np.inf
        changed = np.argsort(-wish_C, kind="stable")[: abs(missing)]
        changed = changed[wish_C[changed] > -np.inf]
        given_C[changed] += np.sign(missing)
    return given_C
