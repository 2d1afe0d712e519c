"""The interface of a task whose samples are lines: a question, a separator, and an answer of any length.

A task draws many lines at once, as arrays of ASCII codes with 0 after the end of a text. `solve` answers one question
and shares no code with `draw`, so that the tests can compare the two.

N lines  L characters
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from research_eval.registry import Registry

Codes = NDArray[np.uint8]  # [N, L]


class LineTask(ABC):
    """One task. It has no state.

    `alphabet` has the characters of questions and answers, `separator` stands between them. A size is the length of a
    question, unless the task says otherwise.
    """

    alphabet: str
    separator: str = ">"

    @abstractmethod
    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        """Questions and answers of these sizes."""

    @staticmethod
    @abstractmethod
    def solve(question: str) -> str:
        """The answer to one question, the slow and obvious way."""

    def num_questions(self, size: int) -> float:
        """At least so many different questions have sizes from 1 to `size`."""
        return float(sum(2.0**length for length in range(1, size + 1)))


LINE_TASKS: Registry[type[LineTask]] = Registry("dataset_name", "research_eval.datasets.line_tasks")


def letters(rng: np.random.Generator, alphabet: str, lengths_N: NDArray[np.int64]) -> Codes:
    """Texts of these lengths whose characters are drawn evenly, [N, longest]."""
    longest = int(lengths_N.max())
    codes_A = np.frombuffer(alphabet.encode(), np.uint8)
    drawn_NL = codes_A[rng.integers(len(alphabet), size=(len(lengths_N), longest))]
    return np.where(np.arange(longest) < lengths_N[:, None], drawn_NL, 0).astype(np.uint8)


def ordered(codes_NL: Codes, keys_NL: NDArray[np.integer]) -> Codes:
    """Each text with its characters sorted by keys; equal keys keep their order, and the ends stay at the end."""
    last = np.iinfo(np.int64).max
    order_NL = np.where(codes_NL > 0, keys_NL, last).argsort(1, kind="stable")
    return np.take_along_axis(codes_NL, order_NL, 1)


def joined(*parts: Codes) -> Codes:
    """The texts of several arrays one after the other, without gaps."""
    whole_NL = np.concatenate(parts, axis=1)
    is_text_NL = whole_NL > 0
    lengths_N = is_text_NL.sum(1)
    joined_NL = np.zeros((len(whole_NL), int(lengths_N.max(initial=1))), np.uint8)
    joined_NL[np.arange(joined_NL.shape[1]) < lengths_N[:, None]] = whole_NL[is_text_NL]
    return joined_NL


def column(character: str, num_texts: int) -> Codes:
    """So many texts of one character each."""
    return np.full((num_texts, 1), ord(character), np.uint8)


def codes_of(texts: Sequence[str]) -> Codes:
    """ASCII texts as an array."""
    longest = max([1, *map(len, texts)])
    return np.array([text.encode() for text in texts], f"S{longest}").view(np.uint8).reshape(len(texts), longest)


def texts_of(codes_NL: Codes) -> list[str]:
    """The texts of an array."""
    width = codes_NL.shape[1]
    if not width:
        return [""] * len(codes_NL)
    found: list[str] = np.ascontiguousarray(codes_NL).view(f"S{width}").ravel().astype(f"U{width}").tolist()
    return found
