"""Finite automata: minimise one, draw it, and prove whether a walker graph computes it on inputs of every length.

N rows  S states  T tokens  M walkers  K nodes
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from research_eval.files import write_atomically
from research_eval.system.best_effort import attempted

log = logging.getLogger(__name__)

NONE = -1  # no transition, no answer, no pair before
DRAWN_STATES = 150  # with more states the arrows of a picture are not distinguishable
LABELLED_STATES = 16  # with more states the labels overlap


class Automaton(NamedTuple):
    """A Moore machine. Token id t has column t - 1.

    `transitions_ST` is -1 if the token may not follow. `answers_S` is the class number, or -1 if the state needs no
    answer.
    """

    start: int
    transitions_ST: NDArray[np.int64]
    answers_S: NDArray[np.int64]
    tokens: Sequence[str] = ()  # their names in pictures; the ids if there are none

    def run(self, ids_NL: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """The state after each row of ids, [N]. Rows are padded on the right with 0."""
        states_N = np.full(len(ids_NL), self.start)
        for ids_N in ids_NL.T:
            real_N = ids_N > 0
            states_N[real_N] = self.transitions_ST[states_N[real_N], ids_N[real_N] - 1]
        return states_N


class WalkerAutomaton(NamedTuple):
    """M walkers on K nodes each. A joint state is one node per walker."""

    start_M: NDArray[np.int64]
    targets_TMK: NDArray[np.int64]  # token id t + 1 moves a walker from node k to this node
    answers: Callable[[NDArray[np.int64]], NDArray[np.int64]]  # joint states [N, M] -> class numbers [N]

    @classmethod
    def single(cls, automaton: Automaton) -> WalkerAutomaton:
        """One walker whose nodes are the states of an automaton, which has to define every transition."""
        targets_TMK = automaton.transitions_ST.T[:, None, :]
        return cls(np.array([automaton.start]), targets_TMK, lambda nodes_N1: automaton.answers_S[nodes_N1[:, 0]])


class Certificate(NamedTuple):
    """The result of a search over all pairs of a joint state and a task state."""

    equal: bool | None  # on every non-empty input of the task; None: more pairs than the limit
    counterexample: list[int] | None  # a shortest input with a wrong answer
    joint_states: int  # reached by inputs of the task
    wrong_pairs: int
    walked: Automaton | None  # the pairs as states; None above the limit


def certify(model: WalkerAutomaton, task: Automaton, limit: int = 200_000) -> Certificate:
    """Compare two machines on all inputs of the task, of every length.

    The search over reachable pairs is breadth first, so the first wrong pair gives a shortest counterexample. The empty
    input is not compared, because no sample is empty. With more than `limit` pairs the result is undecided.
    """
    num_tokens = task.transitions_ST.shape[1]
    walkers = np.arange(len(model.start_M))
    pairs = [np.append(model.start_M, task.start)]  # pair 0 is the empty input; reached again, it becomes a new pair
    seen: dict[bytes, int] = {}
    came_from: list[tuple[int, int]] = [(NONE, NONE)]  # the pair before, and the token
    transitions = [np.full(num_tokens, NONE)]
    first, frontier = 0, np.stack(pairs)
    while len(frontier):
        fresh_from = len(pairs)
        for token in range(num_tokens):
            next_task_N = task.transitions_ST[frontier[:, -1], token]
            next_nodes_NM = model.targets_TMK[token, walkers, frontier[:, :-1]]
            reached = np.column_stack([next_nodes_NM, next_task_N])
            for row in np.flatnonzero(next_task_N != NONE).tolist():
                number = seen.setdefault(reached[row].tobytes(), len(pairs))
                if number == len(pairs):
                    if number >= limit:
                        return Certificate(None, None, number, 0, None)
                    pairs.append(reached[row])
                    came_from.append((first + row, token))
                    transitions.append(np.full(num_tokens, NONE))
                transitions[first + row][token] = number
        first, frontier = fresh_from, np.array(pairs[fresh_from:])
    pairs_N = np.stack(pairs)
    expected_N, given_N = task.answers_S[pairs_N[:, -1]], model.answers(pairs_N[:, :-1])
    wrong_N = (expected_N != NONE) & (expected_N != given_N)
    wrong_N[0] = False
    counterexample = _path_to(int(wrong_N.argmax()), came_from) if wrong_N.any() else None
    answers_N = np.where(expected_N == NONE, NONE, given_N)
    answers_N[0] = NONE
    return Certificate(
        equal=counterexample is None,
        counterexample=counterexample,
        joint_states=len(np.unique(pairs_N[:, :-1], axis=0)),
        wrong_pairs=int(wrong_N.sum()),
        walked=Automaton(0, np.stack(transitions), answers_N, task.tokens),
    )


def _path_to(pair: int, came_from: list[tuple[int, int]]) -> list[int]:
    """The token ids on the way from the start to a pair."""
    ids: list[int] = []
    while came_from[pair][0] != NONE:
        pair, token = came_from[pair]
        ids.append(token + 1)
    return ids[::-1]


def minimise(automaton: Automaton) -> Automaton:
    """The smallest automaton with the same answers. Its states are in the order of a breadth-first search.

    Moore's refinement: states with equal answers are split until all members of a class have the same successor
    classes. "No answer" and "no transition" differ from every other value. A start without an answer that no token
    leads back to is merged with a state that has the same successors.
    """
    transitions_ST, answers_S = automaton.transitions_ST, automaton.answers_S
    reached = _reachable(automaton)
    place_S = np.full(len(answers_S) + 1, NONE)  # index -1 is the last entry: "no transition" stays -1
    place_S[reached] = np.arange(len(reached))
    transitions_ST, answers_S = place_S[transitions_ST[reached]], answers_S[reached]
    _, classes_S = np.unique(answers_S, return_inverse=True)
    while True:
        signature = np.column_stack([classes_S, np.append(classes_S, NONE)[transitions_ST]])
        found, first_S, refined_S = np.unique(signature, axis=0, return_index=True, return_inverse=True)
        if len(found) == classes_S.max() + 1:
            break
        classes_S = refined_S.ravel()
    successors = found[:, 1:]  # between classes, in the order of `found`
    start = int(refined_S.ravel()[0])
    if answers_S[0] == NONE and not (transitions_ST == 0).any():
        twins = np.flatnonzero((successors == successors[start]).all(1))
        start = int(next((twin for twin in twins if twin != start), start))
    quotient = Automaton(start, successors, answers_S[first_S], automaton.tokens)
    order = _reachable(quotient)
    number_S = np.full(len(found) + 1, NONE)
    number_S[order] = np.arange(len(order))
    return Automaton(0, number_S[successors[order]], quotient.answers_S[order], automaton.tokens)


def _reachable(automaton: Automaton) -> list[int]:
    """The states that inputs can reach, in breadth-first order from the start."""
    order = {automaton.start: None}
    queue = [automaton.start]
    for state in queue:
        for target in automaton.transitions_ST[state].tolist():
            if target != NONE and target not in order:
                order[target] = None
                queue.append(target)
    return queue


def certification_metrics(
    model: WalkerAutomaton, task: Automaton, picture: Path | None = None, title: str = "", limit: int = 200_000
) -> dict[str, Any]:
    """Compare a model with its task and draw the model's minimised automaton to `picture`, if that is possible.

    The metrics are `certified` (1 or 0), `counterexample` (list of ids, or None), `joint_states`, `wrong_pairs` and
    `minimal_states`. Above the limit of pairs there is only `joint_states`.
    """
    found = certify(model, task, limit)
    if found.equal is None or found.walked is None:
        return {"joint_states": found.joint_states}
    smallest = minimise(found.walked)
    if picture is not None and len(smallest.answers_S) <= DRAWN_STATES:
        with attempted(log, f"{picture}: not drawn"):  # the numbers of a run do not depend on its picture
            draw_automaton(smallest, picture, title)
    return {
        "certified": int(found.equal),
        "counterexample": found.counterexample,
        "joint_states": found.joint_states,
        "wrong_pairs": found.wrong_pairs,
        "minimal_states": len(smallest.answers_S),
    }


def draw_automaton(automaton: Automaton, path: Path, title: str) -> None:
    """Draw the states on a circle as a PNG. Colour and second line are the answer; arrows have the tokens' names.

    With more than LABELLED_STATES states, only colours distinguish the tokens.
    """
    from research_eval.system.drawing import FancyArrowPatch, Line2D, colormaps, encoded, new_figure

    num_states, num_tokens = automaton.transitions_ST.shape
    names = list(automaton.tokens) or [str(token + 1) for token in range(num_tokens)]
    labelled = num_states <= LABELLED_STATES
    colours, answer_colours = colormaps["tab10"], colormaps["Pastel1"]
    angles = np.pi / 2 - 2 * np.pi * np.arange(num_states) / num_states
    places = np.column_stack([np.cos(angles), np.sin(angles)]) * (0 if num_states == 1 else 1)
    size = 7.0 if labelled else 9.0
    figure, axes = new_figure(size + 1.2, size)
    radius = 16.0 if labelled else 5.0  # points
    for source in range(num_states):
        tokens_to: dict[int, list[int]] = {}
        for token, target in enumerate(automaton.transitions_ST[source].tolist()):
            if target != NONE:
                tokens_to.setdefault(target, []).append(token)
        for target, tokens in tokens_to.items():
            for token in tokens[:1] if labelled else tokens:
                colour = "0.35" if labelled else colours(token % 10)
                start, end, bend = places[source], places[target], 0.16
                if source == target:
                    outwards = angles[source]
                    turn = 0.09 if labelled else 0.03
                    start, end = (_around(places[source], outwards + side, turn) for side in (1.2, -1.2))
                    bend = -1.6
                axes.add_patch(
                    FancyArrowPatch(
                        (float(start[0]), float(start[1])),
                        (float(end[0]), float(end[1])),
                        arrowstyle="-|>",
                        mutation_scale=12 if labelled else 7,
                        shrinkA=0 if source == target else radius,
                        shrinkB=2 if source == target else radius,
                        linewidth=1.2 if labelled else 0.6,
                        color=colour,
                        alpha=1.0 if labelled else 0.6,
                        connectionstyle=f"arc3,rad={bend}",
                    )
                )
            if labelled:
                text = ", ".join(names[token] for token in tokens)
                x, y = _label_place(places[source], places[target], angles[source], source == target)
                axes.text(
                    x,
                    y,
                    text,
                    ha="center",
                    va="center",
                    fontsize=9,
                    parse_math=False,
                    bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
                    zorder=5,
                )
    for state in range(num_states):
        answer = int(automaton.answers_S[state])
        x, y = places[state]
        axes.scatter(
            [x],
            [y],
            s=(2 * radius) ** 2,
            color=["0.9" if answer == NONE else answer_colours(answer % 9)],
            edgecolors="black",
            linewidths=2.4 if state == automaton.start else 0.8,
            zorder=3,
        )
        if labelled:
            shown = f"{state}\n{'no answer' if answer == NONE else f'class {answer}'}"
            axes.text(x, y, shown, ha="center", va="center", fontsize=6.5, zorder=6)
    if not labelled:
        lines = [Line2D([], [], color=colours(token % 10), label=name) for token, name in enumerate(names)]
        axes.legend(handles=lines, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="token", frameon=False)
    axes.set_xlim(-1.42, 1.42)
    axes.set_ylim(-1.42, 1.42)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(f"{title}\n{num_states} states; the start has the thick rim".strip(), parse_math=False, fontsize=10)
    write_atomically(path, encoded(figure, "png", path.stem))


def _around(place: NDArray[np.float64], angle: float, distance: float) -> NDArray[np.float64]:
    """The point at an angle and a distance from a place."""
    return place + distance * np.array([np.cos(angle), np.sin(angle)])


def _label_place(
    start: NDArray[np.float64], end: NDArray[np.float64], outwards: float, loop: bool
) -> tuple[float, float]:
    """A place on the arrow, nearer to its source, so that labels of opposite and of crossing arrows do not overlap."""
    if loop:
        x, y = _around(start, outwards, 0.33)
        return float(x), float(y)
    along = end - start
    x, y = start + 0.36 * along + 0.075 * np.array([along[1], -along[0]])  # the arc bends to the right of its chord
    return float(x), float(y)
