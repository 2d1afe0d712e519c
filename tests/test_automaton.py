"""Minimising, comparing and drawing automata, on some that are made by hand.

S states  T tokens  M walkers
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import environment

from research_eval.routing.automaton import (
    NONE,
    Automaton,
    WalkerAutomaton,
    certification_metrics,
    certify,
    draw_automaton,
    minimise,
)

PARITY = Automaton(0, np.array([[1, 0], [0, 1]]), np.array([0, 1]))
# The same counted modulo four: state 2 is state 0 again, and 3 is 1.
DOUBLED = Automaton(0, np.array([[1, 0], [2, 1], [3, 2], [0, 3]]), np.array([0, 1, 0, 1]))


@st.composite
def automata(draw: st.DrawFn, partial: bool = False) -> Automaton:
    """Up to 7 states, 3 tokens and 3 answers."""
    num_states, num_tokens = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    least = NONE if partial else 0
    target = st.integers(least, num_states - 1)
    rows = draw(
        st.lists(st.lists(target, min_size=num_tokens, max_size=num_tokens), min_size=num_states, max_size=num_states)
    )
    answers = draw(st.lists(st.integers(least, 2), min_size=num_states, max_size=num_states))
    return Automaton(draw(st.integers(0, num_states - 1)), np.array(rows), np.array(answers))


def answer(automaton: Automaton, ids: tuple[int, ...]) -> int | None:
    """Step by step; None for what is no input."""
    state = automaton.start
    for token in ids:
        state = int(automaton.transitions_ST[state, token - 1])
        if state == NONE:
            return None
    return int(automaton.answers_S[state])


def inputs(num_tokens: int, longest: int) -> list[tuple[int, ...]]:
    """All inputs but the empty one, the shortest first."""
    tokens = range(1, num_tokens + 1)
    return [ids for length in range(1, longest + 1) for ids in itertools.product(tokens, repeat=length)]


# ---------------------------------------------------------------------------------------------------------- minimising


@settings(max_examples=60, deadline=None)
@given(automata(partial=True))
def test_the_smallest_automaton_answers_alike_and_cannot_shrink(automaton: Automaton) -> None:
    smallest = minimise(automaton)
    for ids in inputs(automaton.transitions_ST.shape[1], 5):
        assert answer(smallest, ids) == answer(automaton, ids)
    assert len(smallest.answers_S) <= len(automaton.answers_S)
    again = minimise(smallest)
    assert again.transitions_ST.tolist() == smallest.transitions_ST.tolist()
    assert again.answers_S.tolist() == smallest.answers_S.tolist()
    states = range(len(smallest.answers_S))
    longest = len(states)  # two different states of n part within n - 1 tokens
    for one, other in itertools.combinations(states, 2):
        if smallest.answers_S[one] == smallest.answers_S[other]:
            words = inputs(automaton.transitions_ST.shape[1], min(longest, 6))
            first, second = (smallest._replace(start=state) for state in (one, other))
            assert any(answer(first, ids) != answer(second, ids) for ids in words)


def test_known_sizes() -> None:
    assert minimise(DOUBLED).transitions_ST.tolist() == PARITY.transitions_ST.tolist()
    assert minimise(DOUBLED).answers_S.tolist() == [0, 1]
    unreachable = Automaton(0, np.array([[0], [1]]), np.array([0, 1]))
    assert len(minimise(unreachable).answers_S) == 1
    # A start that is never asked is the state which it acts as.
    unasked = Automaton(0, np.array([[2, 1], [2, 1], [1, 2]]), np.array([NONE, 0, 1]))
    assert len(minimise(unasked).answers_S) == 2
    asked = unasked._replace(answers_S=np.array([1, 0, 1]))
    assert len(minimise(asked).answers_S) == 3


# ----------------------------------------------------------------------------------------------------------- comparing


@settings(max_examples=60, deadline=None)
@given(automata(), automata(partial=True))
def test_a_certificate_says_what_trying_all_inputs_says(model: Automaton, task: Automaton) -> None:
    num_tokens = min(model.transitions_ST.shape[1], task.transitions_ST.shape[1])
    task = task._replace(transitions_ST=task.transitions_ST[:, :num_tokens])
    found = certify(WalkerAutomaton.single(model), task)
    wrong = next(
        (
            ids
            for ids in inputs(num_tokens, 6)
            if answer(task, ids) not in (None, NONE) and answer(model, ids) != answer(task, ids)
        ),
        None,
    )
    if found.equal:
        assert wrong is None and found.counterexample is None and found.wrong_pairs == 0
    else:
        assert found.counterexample is not None and found.wrong_pairs > 0
        example = tuple(found.counterexample)
        assert answer(task, example) not in (None, NONE) and answer(model, example) != answer(task, example)
        assert wrong is None or len(wrong) == len(example)
        if wrong is None:
            assert len(example) > 6


def test_pitfall_2_a_wrong_edge_gives_the_shortest_counterexample() -> None:
    """The third 1 falls back to state 2 instead of 3: three ones are answered as two."""
    assert certify(WalkerAutomaton.single(DOUBLED), PARITY).equal is True
    transitions_ST = DOUBLED.transitions_ST.copy()
    transitions_ST[2, 0] = 2
    found = certify(WalkerAutomaton.single(DOUBLED._replace(transitions_ST=transitions_ST)), PARITY)
    assert (found.equal, found.counterexample) == (False, [1, 1, 1])


def counters(num_walkers: int, size: int) -> WalkerAutomaton:
    """Walker m counts token m + 1 modulo `size`; the answer is the parity of all counts."""
    targets_TMK = np.tile(np.arange(size), (num_walkers, num_walkers, 1))
    for walker in range(num_walkers):
        targets_TMK[walker, walker] = (np.arange(size) + 1) % size
    return WalkerAutomaton(np.zeros(num_walkers, np.int64), targets_TMK, lambda nodes_NM: nodes_NM.sum(1) % 2)


def test_walkers_are_composed() -> None:
    """Three walkers on four nodes have 64 joint states, which are two in truth: every token counts."""
    task = Automaton(0, np.array([[1] * 3, [0] * 3]), np.array([0, 1]))
    found = certify(counters(3, 4), task)
    assert (found.equal, found.joint_states, found.wrong_pairs) == (True, 64, 0)
    assert found.walked is not None and len(minimise(found.walked).answers_S) == 2
    assert certify(counters(3, 3), task).counterexample == [1, 1, 1]


def test_pitfall_10_above_the_limit_nothing_is_claimed() -> None:
    task = Automaton(0, np.array([[1] * 3, [0] * 3]), np.array([0, 1]))
    for model in (counters(3, 4), counters(3, 3)):  # one right, one wrong
        found = certify(model, task, limit=10)
        assert found.equal is None and found.counterexample is None and found.walked is None
        metrics = certification_metrics(model, task, limit=10)
        assert "certified" not in metrics and "counterexample" not in metrics


@pytest.mark.parametrize("asked", [False, True])
def test_pitfall_12_the_empty_input_is_not_compared(asked: bool) -> None:
    """A start that answers wrongly is no mistake, unless an input leads back to it."""
    transitions_ST = np.array([[0 if asked else 1, 1], [1, 1]])
    task, model = (Automaton(0, transitions_ST, np.array(answers)) for answers in ([0, 1], [1, 1]))
    assert certify(WalkerAutomaton.single(model), task).equal is (not asked)


def test_inputs_that_the_task_does_not_have_are_not_compared() -> None:
    """Token 2 may only follow token 1, and only then the answer is asked for."""
    task = Automaton(0, np.array([[1, NONE], [NONE, 0]]), np.array([0, NONE]))
    model = Automaton(0, np.array([[1, 2], [2, 0], [2, 2]]), np.array([0, 7, 7]))
    found = certify(WalkerAutomaton.single(model), task)
    assert (found.equal, found.joint_states) == (True, 2)


# ------------------------------------------------------------------------------------------------ metrics and pictures


def test_metrics_of_a_right_and_a_wrong_model(tmp_path: Path) -> None:
    picture = tmp_path / "automaton.png"
    right = certification_metrics(WalkerAutomaton.single(DOUBLED), PARITY, picture, "parity")
    assert right == {
        "certified": 1,
        "counterexample": None,
        "joint_states": 4,
        "wrong_pairs": 0,
        "minimal_states": 2,
    }
    assert picture.read_bytes().startswith(b"\x89PNG")
    wrong = certification_metrics(WalkerAutomaton.single(DOUBLED._replace(answers_S=np.array([0, 0, 0, 1]))), PARITY)
    assert wrong["certified"] == 0 and wrong["counterexample"] == [1]


@pytest.mark.parametrize("num_states", [1, 2, 9, 40])
def test_any_automaton_is_drawn(num_states: int, tmp_path: Path) -> None:
    """Names and titles are text, not formulas; a missing transition is no arrow."""
    transitions_ST = np.column_stack([np.roll(np.arange(num_states), 1), np.full(num_states, NONE)])
    automaton = Automaton(0, transitions_ST, np.arange(num_states) - 1, ("$x_1^2", "a_{b}$"))
    draw_automaton(automaton, tmp_path / "a.png", "costs $5_ and $6^")
    assert (tmp_path / "a.png").stat().st_size > 2000


def test_the_module_needs_no_torch() -> None:
    code = "import sys, research_eval.routing.automaton; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
