"""The tasks told apart by length: generators against slow solutions, automata against both, and the lengths of splits.

N samples  L length
"""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_eval.datasets import cycle_navigation, even_pairs, majority, modular_arithmetic, parity, word_problem
from research_eval.datasets.regular import LONGER_TESTS, RegularDataset, task_automaton
from research_eval.datasets.synthetic import synthetic_splits
from research_eval.datasets.token_data import TokenData
from research_eval.errors import ConfigError
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.routing.automaton import NONE, WalkerAutomaton, certify, minimise

Solve = Callable[[Sequence[int]], int]

# Name -> parameters, the slow solution, and the states that are needed.
REGULAR: dict[str, tuple[dict[str, Any], Solve, int]] = {
    "parity": ({"min_length": 1, "vocab_size": 4, "num_classes": 3}, lambda ids: parity.solve(ids, 3), 3),
    "even_pairs": ({}, even_pairs.solve, 5),
    "cycle_navigation": ({}, lambda ids: cycle_navigation.solve(ids, 5), 5),
    # 60 states by the text of the task; * after a product of 1 or -1 is as good as + or -.
    "modular_arithmetic": ({}, lambda ids: modular_arithmetic.solve(ids, 5), 50),
    "s3": ({}, lambda ids: word_problem.solve(ids, word_problem.GROUPS["s3"]), 6),
    "s5": ({}, lambda ids: word_problem.solve(ids, word_problem.GROUPS["s5"]), 120),
}
IRREGULAR: dict[str, Solve] = {"majority": majority.solve, "parity_majority": majority.solve_mixed}
SOLUTIONS = {**{name: (params, solve) for name, (params, solve, _) in REGULAR.items()}} | {
    name: ({}, solve) for name, solve in IRREGULAR.items()
}


def regular(name: str) -> RegularDataset:
    dataset = SYNTHETIC_DATASETS[name](**REGULAR[name][0])
    assert isinstance(dataset, RegularDataset)
    return dataset


@pytest.mark.parametrize("module", [even_pairs, cycle_navigation, modular_arithmetic, word_problem, majority])
def test_the_documented_sample_is_right(module: Any) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module.__name__))
    assert failed == 0 and tried >= 1


@pytest.mark.parametrize("name", SOLUTIONS)
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 30))
def test_generators_agree_with_the_slow_solution_on_every_split(name: str, seed: int, seq_len: int) -> None:
    params, solve = SOLUTIONS[name]
    splits = synthetic_splits(name, {"num_samples": 30, "seq_len": seq_len, **params}, seed)
    assert splits.test is not None
    assert set(splits.further_tests) == set(LONGER_TESTS)
    for split, data in {"": splits.train, "test": splits.test, **splits.further_tests}.items():
        shortest, longest = LONGER_TESTS.get(split, (1, seq_len))
        assert shortest - 1 <= data.lengths.min() <= data.lengths.max() <= longest  # an expression has an odd length
        assert data.labels.tolist() == [solve(data.sample(row)) for row in range(len(data))]


@pytest.mark.parametrize("name", SOLUTIONS)
def test_ten_thousand_samples_agree_with_the_slow_solution(name: str) -> None:
    params, solve = SOLUTIONS[name]
    data = synthetic_splits(name, {"num_samples": 12_500, "seq_len": 40, **params}, 0).train
    assert len(data) == 10_000
    assert data.labels.tolist() == [solve(data.sample(row)) for row in range(len(data))]


@pytest.mark.parametrize("name", REGULAR)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_the_automaton_agrees_with_the_slow_solution(name: str, data: st.DataObject) -> None:
    """Any input that the automaton lets through, drawn token by token."""
    automaton, solve = regular(name).automaton(), REGULAR[name][1]
    state, ids = automaton.start, []
    for _ in range(data.draw(st.integers(1, 12))):
        allowed = np.flatnonzero(automaton.transitions_ST[state] != NONE).tolist()
        token = data.draw(st.sampled_from(allowed))
        ids.append(token + 1)
        state = int(automaton.transitions_ST[state, token])
        assert automaton.answers_S[state] in (NONE, solve(ids) if automaton.answers_S[state] != NONE else NONE)
        if automaton.answers_S[state] != NONE:
            assert automaton.run(np.array([[*ids, 0, 0]])).tolist() == [state]


@pytest.mark.parametrize("name", REGULAR)
def test_the_automaton_is_as_large_as_known_and_certifies_itself(name: str) -> None:
    automaton = task_automaton(name, REGULAR[name][0])
    assert automaton is not None
    assert len(minimise(automaton).answers_S) == REGULAR[name][2]
    assert len(automaton.tokens) in (0, automaton.transitions_ST.shape[1])
    complete = automaton._replace(transitions_ST=np.maximum(automaton.transitions_ST, 0))  # a model has no gaps
    assert certify(WalkerAutomaton.single(complete), automaton).equal


def test_tasks_without_an_automaton_say_so() -> None:
    assert task_automaton("majority", {}) is None
    assert task_automaton("parity_majority", {}) is None
    assert task_automaton("tables", {}) is None


def test_modular_arithmetic_has_sixty_states_and_python_agrees() -> None:
    assert len(regular("modular_arithmetic").automaton().answers_S) == 60
    splits = synthetic_splits("modular_arithmetic", {"num_samples": 300, "seq_len": 15}, 0)
    for row in range(len(splits.train)):
        ids = splits.train.sample(row)
        expression = "".join("01234+-*"[token - 1] for token in ids)
        assert eval(expression) % 5 == splits.train.labels[row]
        assert len(ids) % 2 == 1


@pytest.mark.parametrize("name", SOLUTIONS)
def test_all_lengths_and_classes_occur_and_seeds_decide(name: str) -> None:
    params = {"num_samples": 3000, "seq_len": 12, **SOLUTIONS[name][0]}
    first, again, other = (synthetic_splits(name, params, seed) for seed in (3, 3, 4))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint["sha256"]["len_200"] != other.fingerprint["sha256"]["len_200"]
    assert len(set(first.fingerprint["sha256"].values())) == 6
    shares = np.bincount(first.train.lengths, minlength=13)[1:] / len(first.train)
    shortest = 2 if name == "parity_majority" else 1
    possible = range(shortest, 13, 2 if name == "modular_arithmetic" else 1)
    assert np.flatnonzero(shares).tolist() == [length - 1 for length in possible]
    assert shares[shares > 0] == pytest.approx(1 / len(possible), abs=5 * np.sqrt(1 / len(possible) / 2400))
    labels = np.concatenate([first.train.labels, *(split.labels for split in first.further_tests.values())])
    assert np.bincount(labels, minlength=first.num_classes).min() > 0
    assert first.max_length == 500 or name == "modular_arithmetic"


def test_a_mixed_sample_knows_its_family() -> None:
    splits = synthetic_splits("parity_majority", {"num_samples": 1000}, 0)
    for data in (splits.train, splits.further_tests["len_41_100"]):
        assert data.groups is not None
        questions = data.tokens[data.offsets[:-1]]
        assert questions.tolist() == (3 + data.groups).tolist()
        rest = np.delete(data.tokens, data.offsets[:-1])
        assert set(rest.tolist()) == {1, 2}
        assert data.groups.mean() == pytest.approx(0.5, abs=0.2)


def test_parity_of_one_length_is_what_it_was() -> None:
    """Without `min_length` samples, splits and input space are those of the first version."""
    dataset = parity.ParityDataset(num_samples=50, seq_len=6, vocab_size=3)
    assert (dataset.input_space(), dataset.further_tests) == (3**6, ())
    assert parity.ParityDataset(min_length=1).input_space() is None
    dataset.generate(7)
    ids_NL = np.maximum(np.random.default_rng(7).integers(0, 3, (50, 6), np.int32, endpoint=True), 1)
    found = dataset.to_token_data()
    assert found.tokens.tolist() == ids_NL.ravel().tolist()
    assert found.labels.tolist() == ((ids_NL == 1).sum(1) % 2).tolist()


@pytest.mark.parametrize("name", ["even_pairs", "parity"])
def test_impossible_lengths_are_explained(name: str) -> None:
    with pytest.raises(ConfigError, match="min_length=9: expected 1 to seq_len=8"):
        SYNTHETIC_DATASETS[name](seq_len=8, min_length=9)


def test_the_splits_hold_what_they_say() -> None:
    """The right data type for everything behind the generator."""
    data = synthetic_splits("s5", {"num_samples": 50}, 0).train
    assert isinstance(data, TokenData) and (data.tokens.dtype, data.labels.dtype) == (np.int32, np.int64)
