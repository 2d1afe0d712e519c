"""A stack and actions on it: what is on the stack at the end? (Chomsky-hierarchy set; Deletang et al., 2023)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research_eval.datasets.language.line_task import LINE_TASKS, Codes, LineTask, joined, letters, ordered


@LINE_TASKS.register("stack_manipulation")
class StackManipulation(LineTask):
    """`abA->ba`: a stack from its bottom to its top, then actions; the answer is read from the top.

    `A` and `B` put an `a` or a `b` on the stack, `-` takes one away, if there is one. The size is the length of stack
    and actions together; how much of it is the stack is drawn.
    """

    alphabet = "abAB-"

    def draw(self, rng: np.random.Generator, sizes_N: NDArray[np.int64]) -> tuple[Codes, Codes]:
        heights_N = rng.integers(0, sizes_N, endpoint=True)
        stack_NL = letters(rng, "ab", np.maximum(heights_N, 1)) * (heights_N > 0)[:, None]
        actions_NL = letters(rng, "AB-", np.maximum(sizes_N - heights_N, 1)) * (sizes_N > heights_N)[:, None]
        found_NL = np.zeros((len(sizes_N), int(sizes_N.max()) + 1), np.uint8)
        found_NL[:, : stack_NL.shape[1]] = stack_NL
        rows_N, tops_N = np.arange(len(sizes_N)), heights_N.copy()
        for action_N in actions_NL.T:
            pushes_N = (action_N == ord("A")) | (action_N == ord("B"))
            pops_N = (action_N == ord("-")) & (tops_N > 0)
            tops_N -= pops_N
            found_NL[rows_N[pops_N], tops_N[pops_N]] = 0
            found_NL[rows_N[pushes_N], tops_N[pushes_N]] = action_N[pushes_N] + 32  # the small letter
            tops_N += pushes_N
        return joined(stack_NL, actions_NL), ordered(found_NL, -np.arange(found_NL.shape[1])[None])

    @staticmethod
    def solve(question: str) -> str:
        stack: list[str] = []
        for character in question:
            if character == "-":
                if stack:
                    stack.pop()
            else:
                stack.append(character.lower())
        return "".join(reversed(stack))
