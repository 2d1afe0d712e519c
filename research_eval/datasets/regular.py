"""Tasks for length generalisation: training on short samples, tests on longer ones, and finite automata.

N samples  L length  S states  T tokens
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research_eval.annotations import build
from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.routing.automaton import Automaton

LONGER_TESTS = {"len_41_100": (41, 100), "len_200": (200, 200), "len_500": (500, 500)}


class LengthDataset(SequenceBaseDataset):
    """Samples of `min_length` to `seq_len` tokens, all lengths equally often; more test splits hold longer ones."""

    further_tests: Sequence[str] = tuple(LONGER_TESTS)

    def __init__(self, num_samples: int, seq_len: int, min_length: int, vocab_size: int) -> None:
        super().__init__(num_samples, seq_len, vocab_size)
        if not 1 <= min_length <= seq_len:
            raise ConfigError(f"min_length={min_length}: expected 1 to seq_len={seq_len}")
        self.min_length = min_length

    def draw_lengths(self) -> NDArray[np.int64]:
        """One length per sample of the split that is being generated, [N]."""
        shortest, longest = LONGER_TESTS.get(self.split, (self.min_length, self.seq_len))
        return self.rng.integers(shortest, longest, self.num_samples, endpoint=True)

    def draw_tokens(self, lengths_N: NDArray[np.int64], num_tokens: int) -> NDArray[np.int64]:
        """Uniform ids 1..num_tokens, then padding, [N, L]."""
        shape = (len(lengths_N), int(lengths_N.max()))
        return self.rng.integers(1, num_tokens, shape, endpoint=True) * (np.arange(shape[1]) < lengths_N[:, None])


class RegularDataset(LengthDataset):
    """A task whose answer is that of a finite automaton."""

    @abstractmethod
    def automaton(self) -> Automaton:
        """The automaton that gives the answer to every sample of any length. Its answers are class numbers."""

    def draw_inputs(self) -> NDArray[np.int64]:
        """The samples, [N, L]. A task overrides this if not every sequence of tokens is a sample."""
        return self.draw_tokens(self.draw_lengths(), self.vocab_size)

    def _generate_data(self) -> None:
        automaton = self.automaton()
        ids_NL = self.draw_inputs()
        self.samples = ArraySamples(ids_NL, automaton.answers_S[automaton.run(ids_NL)])
        self.labels_list = list(range(int(automaton.answers_S.max()) + 1))


def task_automaton(dataset_name: str, dataset_params: dict[str, Any]) -> Automaton | None:
    """The automaton of a synthetic task, or None if the task has none. Raises ConfigError for an unknown name."""
    cls = SYNTHETIC_DATASETS.get_or_explain(dataset_name)
    return build(cls, dataset_params).automaton() if issubclass(cls, RegularDataset) else None
