"""Recall: pairs to remember, a pattern that comes again, and letters among blanks."""

from __future__ import annotations

import re
import string

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, column, joined, letters, ordered

KEYS = string.ascii_lowercase
VALUES = string.digits
NOISE = "!,.:;"
WIDEST = 3  # characters of a key or a value of the fuzzy task


@LINE_TASKS.register("mqar")
class MultiQueryRecall(LineTask):
    """`a3c7b1?bca>173`: pairs of key and value, then all keys in another order (Arora et al., 2023, MQAR).

    The size is the number of pairs, 26 at most. Other than there, the values stand together behind the separator.
    """

    alphabet = f"{KEYS}{VALUES}?"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        pairs_N = np.minimum(sizes_N, len(KEYS))
        longest = int(pairs_N.max())
        is_pair_NL = np.arange(longest) < pairs_N[:, None]
        keys_NL = rng.permuted(np.tile(np.frombuffer(KEYS.encode(), np.uint8), (len(pairs_N), 1)), axis=1)[:, :longest]
        keys_NL = np.where(is_pair_NL, keys_NL, 0).astype(np.uint8)
        values_NL = letters(rng, VALUES, pairs_N)
        both_NL = self._written(rng, np.stack([keys_NL, values_NL], 2)).reshape(len(pairs_N), -1)
        order_NL = rng.random(keys_NL.shape).argsort(1)
        asked_NL, answers_NL = (np.take_along_axis(one, order_NL, 1) for one in (keys_NL, values_NL))
        mark_N1 = column("?", len(pairs_N))
        return joined(both_NL, mark_N1, asked_NL), joined(answers_NL)

    @staticmethod
    def _written(rng: np.random.Generator, pairs_NL2: Codes) -> Codes:
        """The pairs as they stand in the question, [N, L, ...]."""
        return pairs_NL2

    @staticmethod
    def solve(question: str) -> str:
        pairs, asked = question.split("?")
        known = dict(zip(pairs[::2], pairs[1::2], strict=True))
        return "".join(known[key] for key in asked)

    def num_questions(self, size: int) -> float:
        return float(len(KEYS) * len(VALUES)) if size == 1 else float(len(KEYS) ** 2 * len(VALUES) ** 2)


@LINE_TASKS.register("noisy_recall")
class NoisyRecall(MultiQueryRecall):
    """`a3.c7!:b1?bca>173`: `mqar` with none to two signs behind each pair that say nothing (Poli et al., 2024, MAD)."""

    alphabet = f"{KEYS}{VALUES}?{NOISE}"

    @staticmethod
    def _written(rng: np.random.Generator, pairs_NL2: Codes) -> Codes:
        shape = pairs_NL2.shape
        signs_NL2 = np.frombuffer(NOISE.encode(), np.uint8)[rng.integers(len(NOISE), size=shape)]
        is_noise_NL2 = (rng.random(shape) < 0.5) & (pairs_NL2[..., :1] > 0)
        return np.concatenate([pairs_NL2, np.where(is_noise_NL2, signs_NL2, 0).astype(np.uint8)], 2)

    @staticmethod
    def solve(question: str) -> str:
        return MultiQueryRecall.solve("".join(one for one in question if one not in NOISE))


@LINE_TASKS.register("fuzzy_recall")
class FuzzyRecall(LineTask):
    """`ab3c71b1?c>71`: keys and values of one to three characters, and one of the keys (Poli et al., 2024, MAD).

    The size is the number of pairs. If a key comes again, its first value counts. Other than there, the question is one
    key behind all pairs.
    """

    alphabet = f"{KEYS}{VALUES}?"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        longest, rows_N = int(sizes_N.max()), np.arange(len(sizes_N))
        is_pair_NL1 = (np.arange(longest) < sizes_N[:, None])[:, :, None]
        keys_NLW, values_NLW = (
            np.where(is_pair_NL1, self._short(rng, alphabet, (len(sizes_N), longest)), 0).astype(np.uint8)
            for alphabet in (KEYS, VALUES)
        )
        asked_NW = keys_NLW[rows_N, rng.integers(sizes_N)]
        first_N = (keys_NLW == asked_NW[:, None]).all(2).argmax(1)
        both_NL = np.concatenate([keys_NLW, values_NLW], 2).reshape(len(sizes_N), -1)
        mark_N1 = column("?", len(sizes_N))
        return joined(both_NL, mark_N1, asked_NW), joined(values_NLW[rows_N, first_N])

    @staticmethod
    def _short(rng: np.random.Generator, alphabet: str, shape: tuple[int, int]) -> Codes:
        """Texts of one to three characters, with zeros behind them, [N, L, W]."""
        codes_NLW = np.frombuffer(alphabet.encode(), np.uint8)[rng.integers(len(alphabet), size=(*shape, WIDEST))]
        is_text_NLW = np.arange(WIDEST) < rng.integers(1, WIDEST + 1, size=(*shape, 1))
        return np.where(is_text_NLW, codes_NLW, 0).astype(np.uint8)

    @staticmethod
    def solve(question: str) -> str:
        pairs, asked = question.split("?")
        return next(value for key, value in re.findall(r"([a-z]+)([0-9]+)", pairs) if key == asked)

    def num_questions(self, size: int) -> float:
        """Those with one pair, by the lengths of key and value."""
        keys, values = (sum(len(one) ** length for length in range(1, WIDEST + 1)) for one in (KEYS, VALUES))
        return float(keys * values)


@LINE_TASKS.register("induction")
class Induction(LineTask):
    """`abcdb>c`: the last letter was there before; what followed it? (Olsson et al., 2022).

    The size is the number of different letters, 26 at most; the last of them is never asked.
    """

    alphabet = KEYS

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        counts_N = np.clip(sizes_N, 2, len(KEYS))
        longest, rows_N = int(counts_N.max()), np.arange(len(counts_N))
        codes_NL = rng.permuted(np.tile(np.frombuffer(KEYS.encode(), np.uint8), (len(counts_N), 1)), axis=1)[
            :, :longest
        ]
        codes_NL = np.where(np.arange(longest) < counts_N[:, None], codes_NL, 0).astype(np.uint8)
        places_N = rng.integers(counts_N - 1)
        return joined(codes_NL, codes_NL[rows_N, places_N][:, None]), codes_NL[rows_N, places_N + 1][:, None]

    @staticmethod
    def solve(question: str) -> str:
        return question[question.index(question[-1]) + 1]

    def num_questions(self, size: int) -> float:
        return float(len(KEYS) * (len(KEYS) - 1)) * (1 if size <= 2 else 2 * (len(KEYS) - 2))


@LINE_TASKS.register("selective_copying")
class SelectiveCopying(LineTask):
    """`a..bc.>abc`: the letters without the blanks (Gu and Dao, 2023). A third of the characters are letters."""

    alphabet = "abcdefgh."

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        questions_NL = letters(rng, self.alphabet[:-1], sizes_N)
        is_blank_NL = (rng.random(questions_NL.shape) < 2 / 3) & (questions_NL > 0)
        questions_NL[is_blank_NL] = ord(".")
        kept_NL = np.where(is_blank_NL, 0, questions_NL).astype(np.uint8)
        return questions_NL, ordered(kept_NL, np.zeros(kept_NL.shape, np.int64))

    @staticmethod
    def solve(question: str) -> str:
        return question.replace(".", "")
