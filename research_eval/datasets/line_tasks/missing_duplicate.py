"""A text twice, with one letter replaced by a blank: which one is missing? (Deletang et al., 2023)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, joined, letters


@LINE_TASKS.register("missing_duplicate")
class MissingDuplicate(LineTask):
    """`ab_b>a`. The size is the length of the text, half of the question. The blank may be anywhere."""

    alphabet = "ab_"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        half_NL = letters(rng, "ab", sizes_N)
        questions_NL, rows_N = joined(half_NL, half_NL), np.arange(len(sizes_N))
        places_N = rng.integers(2 * sizes_N)
        answers_N1 = questions_NL[rows_N, places_N][:, None].copy()
        questions_NL[rows_N, places_N] = ord("_")
        return questions_NL, answers_N1

    @staticmethod
    def solve(question: str) -> str:
        half = len(question) // 2
        return next(
            (second if first == "_" else first)
            for first, second in zip(question[:half], question[half:], strict=True)
            if "_" in (first, second)
        )
