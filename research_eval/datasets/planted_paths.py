"""Planted paths: apply named functions one after the other. The right path of every sample is known.

A function is a random permutation of the values for each operand, fixed by `task_seed`. A sample names the function of
each step, then an operand, which all steps share, and a value; the label is what the functions make of the value. Ids,
everything from 0, with F functions and G = ceil(F / 2) pairs of functions (2g, 2g + 1):

    function f at step t    1 + t (F + G) + f
    pair g at step t        1 + t (F + G) + F + g      ambiguous: one of the two functions
    operand                 1 + depth (F + G) + operand
    value                   1 + depth (F + G) + num_operands + value

Every step has ids of its own, so that the sum of the embeddings tells the path without positions. Function 0 adds one
and function 1 doubles (modulo 3), and the value 1 meets 0, then 1:

>>> task = PlantedPathsDataset(num_functions=2, depth=2, num_values=3, num_operands=1)
>>> task.contents_FOV[:] = [[[1, 2, 0]], [[0, 2, 1]]]
>>> solve([1, 5, 7, 9], task)
1

N samples  T steps  C compositions  F functions  O operands  V values
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset, enough_ids, exact_length
from research_eval.datasets.token_data import TokenData
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.seeding import derive_seed

ENDED = -1  # in place of a function after the last step of a path
UNSEEN = "unseen"
MAX_COMPOSITIONS = 100_000


@dataclass(frozen=True)
class AmbiguitySettings:
    """Which share of the samples has an ambiguous step, and whether the operands tell what it means."""

    ambiguity: Annotated[float, Field(ge=0, le=1)] = 0.0
    ambiguity_cue: Literal["operand", "none"] = "operand"


@SYNTHETIC_DATASETS.register("planted_paths")
class PlantedPathsDataset(SequenceBaseDataset):
    """Compositions of `min_depth` to `depth` functions, all lengths alike; `paths` are the functions, `groups` lengths.

    `imbalance` makes function f as frequent as (f + 1)^-imbalance. `unseen_compositions` is the share of the
    compositions of full length that occur in the test split "unseen" only; every function stays at every step.
    In a share `ambiguity` of the samples one step, any, names a pair of functions instead of one of them. With the cue
    "operand" the first of the pair is meant beside even operands and the second beside odd ones; with "none" nothing
    tells, and no model can be better than `bayes_accuracy`.
    """

    VERSION = 1

    def __init__(
        self,
        *,
        num_samples: Annotated[int, Field(ge=2)] = 10_000,
        seq_len: Annotated[int, Field(ge=3)] | None = None,
        vocab_size: Annotated[int, Field(ge=5)] | None = None,
        num_functions: Annotated[int, Field(ge=1)] = 16,
        depth: Annotated[int, Field(ge=1)] = 2,
        min_depth: Annotated[int, Field(ge=1)] = 1,
        num_values: Annotated[int, Field(ge=2)] = 16,
        num_operands: Annotated[int, Field(ge=1)] = 2,
        unseen_compositions: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        ambiguous: AmbiguitySettings,
        imbalance: Annotated[float, Field(ge=0)] = 0.0,
        task_seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        if min_depth > depth:
            raise ConfigError(f"planted_paths: min_depth={min_depth} is more than depth={depth}")
        num_compositions = num_functions ** min(depth, MAX_COMPOSITIONS.bit_length())  # more steps are too many anyway
        if num_compositions > MAX_COMPOSITIONS:
            raise ConfigError(
                f"planted_paths: num_functions={num_functions} with depth={depth} has {num_compositions} "
                f"compositions; at most {MAX_COMPOSITIONS} work"
            )
        ambiguity, ambiguity_cue = ambiguous.ambiguity, ambiguous.ambiguity_cue
        if ambiguity and ambiguity_cue == "operand" and num_operands % 2:
            raise ConfigError(
                f"planted_paths: num_operands={num_operands} is odd, but even and odd operands are the cue to an "
                "ambiguous step: make it even, or set ambiguity_cue to 'none'"
            )
        self.ids_per_step = num_functions + math.ceil(num_functions / 2)
        self.first_operand = 1 + depth * self.ids_per_step
        reason = f"depth={depth} with num_functions={num_functions}, {num_operands} operands and {num_values} values"
        super().__init__(
            num_samples,
            exact_length("planted_paths", seq_len, depth + 2, f"depth={depth}"),
            enough_ids("planted_paths", vocab_size, self.first_operand - 1 + num_operands + num_values, reason),
        )
        self.depth, self.min_depth = depth, min_depth
        self.ambiguity, self.ambiguity_cue = ambiguity, ambiguity_cue
        rng = np.random.default_rng(derive_seed(task_seed, "planted_paths"))
        shape = (num_functions, num_operands, num_values)
        self.contents_FOV = rng.permuted(np.broadcast_to(np.arange(num_values), shape), axis=-1)
        frequency_F = np.arange(1, num_functions + 1) ** -float(imbalance)
        self.frequency_F = frequency_F / frequency_F.sum()
        self.withheld = _withheld(num_functions, depth, unseen_compositions, task_seed)
        if self.withheld:
            self.further_tests = (UNSEEN,)

    def compositions(self, length: int, unseen: bool = False) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The compositions [C, T] of a length that may occur, in "unseen" or in the other splits, and how often [C]."""
        every_CT = np.indices((len(self.frequency_F),) * length).reshape(length, -1).T
        allowed_C = np.array([(tuple(path) in self.withheld) == unseen for path in every_CT.tolist()])
        frequency_C = self.frequency_F[every_CT].prod(1) * allowed_C
        return every_CT, frequency_C / frequency_C.sum()

    def _generate_data(self) -> None:
        num_functions, num_operands, num_values = self.contents_FOV.shape
        num, unseen = self.num_samples, self.split == UNSEEN
        shortest = self.depth if unseen else self.min_depth
        length_N = self.rng.integers(shortest, self.depth, size=num, endpoint=True)
        paths_NT = np.full((num, self.depth), ENDED)
        for length in range(shortest, self.depth + 1):
            rows = np.flatnonzero(length_N == length)
            every_CT, frequency_C = self.compositions(length, unseen)
            paths_NT[rows, :length] = every_CT[self.rng.choice(len(every_CT), size=len(rows), p=frequency_C)]

        operand_N = self.rng.integers(num_operands, size=num)
        value_N = self.rng.integers(num_values, size=num)
        ambiguous_N = self.rng.random(num) < self.ambiguity
        step_N = self.rng.integers(length_N)
        meant_N = paths_NT[np.arange(num), step_N]
        if self.ambiguity_cue == "operand":
            operand_N = np.where(ambiguous_N, operand_N // 2 * 2 + meant_N % 2, operand_N)
        named_NT = paths_NT.copy()
        named_NT[ambiguous_N, step_N[ambiguous_N]] = num_functions + meant_N[ambiguous_N] // 2

        ids_NL = np.zeros((num, self.depth + 2), np.int64)
        ids_NL[:, : self.depth] = np.where(
            named_NT == ENDED, 0, 1 + np.arange(self.depth) * self.ids_per_step + named_NT
        )
        ids_NL[np.arange(num), length_N] = self.first_operand + operand_N
        ids_NL[np.arange(num), length_N + 1] = self.first_operand + num_operands + value_N
        reached_N = value_N
        for function_N in paths_NT.T:
            reached_N = np.where(function_N == ENDED, reached_N, self.contents_FOV[function_N, operand_N, reached_N])
        self.samples = ArraySamples(ids_NL, reached_N, paths_NT, length_N)
        self.labels_list = list(range(num_values))


def _withheld(num_functions: int, depth: int, share: float, task_seed: int) -> set[tuple[int, ...]]:
    """A random `share` of the compositions of full length, such that every function keeps one at every step."""
    rng = np.random.default_rng(derive_seed(task_seed, "planted_paths withheld"))
    every = list(itertools.product(range(num_functions), repeat=depth))
    wanted = round(share * len(every))
    left = [[len(every) // num_functions] * num_functions for _ in range(depth)]
    withheld: set[tuple[int, ...]] = set()
    for number in rng.permutation(len(every)):
        path = every[number]
        if len(withheld) < wanted and all(left[step][function] > 1 for step, function in enumerate(path)):
            withheld.add(path)
            for step, function in enumerate(path):
                left[step][function] -= 1
    if len(withheld) < wanted:
        raise ConfigError(
            f"planted_paths: unseen_compositions={share} of {len(every)} compositions leaves a function without any at "
            f"some step; {len(withheld) / len(every):.2f} still works"
        )
    return withheld


def answers(tokens: Sequence[int], task: PlantedPathsDataset, unseen: bool = False) -> dict[int, float]:
    """How probable each label is, given the tokens; `unseen`: in the split of that name.

    Walks through every composition that the instructions may stand for.
    """
    num_functions, num_operands, _ = task.contents_FOV.shape
    *instructions, operand, value = tokens
    operand -= task.first_operand
    value -= task.first_operand + num_operands
    meant = []
    for step, token in enumerate(instructions):
        name = token - 1 - step * task.ids_per_step
        if name < num_functions:
            meant.append([name])
            continue
        first = 2 * (name - num_functions)
        pair = range(first, min(first + 2, num_functions))
        meant.append([f for f in pair if task.ambiguity_cue == "none" or f % 2 == operand % 2])
    weights: defaultdict[int, float] = defaultdict(float)
    for path in itertools.product(*meant):
        if (path in task.withheld) == unseen:
            reached = value
            for function in path:
                reached = int(task.contents_FOV[function, operand, reached])
            weights[reached] += math.prod(float(task.frequency_F[function]) for function in path)
    total = sum(weights.values())
    return {label: weight / total for label, weight in weights.items()}


def solve(tokens: Sequence[int], task: PlantedPathsDataset) -> int:
    """The likeliest label; the only possible one unless a step is ambiguous without a cue."""
    probabilities = answers(tokens, task)
    return max(probabilities, key=probabilities.__getitem__)


def bayes_accuracy(data: TokenData, task: PlantedPathsDataset, unseen: bool = False) -> float:
    """Expected accuracy on `data` of always giving the likeliest label: nothing can be better."""
    chances = [max(answers(data.sample(index), task, unseen).values()) for index in range(len(data))]
    return float(np.mean(chances))
