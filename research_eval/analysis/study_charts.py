"""What the pictures of a study show, both as files (`study_plots`) and as web pages (`study_pages`).

`StudyCharts` groups the trials. The other functions compute one picture each, without drawing it: importances as lists
of bars, trials as lines through parallel axes, the Pareto front as a step line.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from research_eval.analysis.figures import label
from research_eval.analysis.points import Style, styles
from research_eval.analysis.study_axes import ABSENT, Axis, Scale, parameter_axis, value_axis
from research_eval.analysis.study_importance import (
    SHUFFLES,
    Importance,
    explained_by_type,
    importances,
    pooled_importances,
    searched,
    values_of,
)
from research_eval.analysis.study_texts import (
    OBJECTIVE_LENGTH,
    PARAMETER_LENGTH,
    counted_trials,
    heading,
    model_label,
    model_type_of,
    short_names,
)
from research_eval.analysis.study_trials import TrialRecord, own_trials, pareto_front
from research_eval.store.metrics import direction, gain_sign

MAX_BARS = 8  # parameters in a panel of importances
MAX_AXES = 16  # parameters in a panel of parallel coordinates
MANY = 300  # with more trials than this, their points are small
SHARED = "#444444"  # colour of bars that concern all model types
STATUSES = ("finished", "pruned", "diverged", "failed", "running", "waiting")
# Plasma upside down, so that the best are the darkest, without the yellow that is hard to see on white.
COLOURS = ("#E8803A", "#D8576B", "#B12A90", "#6A00A8", "#0D0887")
IMPORTANCE_LEGEND = (
    "Share of each parameter in what makes the best trials (PED-ANOVA). Mark: the largest share that it got from "
    f"{SHUFFLES} shuffles of the values; pale: not above it, so it may be chance."
)


@dataclass(frozen=True)
class StudyCharts:
    """The trials of a study, grouped as its pictures need them. `records` are all trials, past runs included."""

    study: str
    dataset_name: str
    objectives: tuple[str, ...]
    records: tuple[TrialRecord, ...]

    @cached_property
    def own(self) -> list[TrialRecord]:
        """The trials that the study made, without past runs."""
        return own_trials(self.records)

    @cached_property
    def complete(self) -> list[TrialRecord]:
        """The trials and past runs with a finite value of every objective."""
        complete = (record for record in self.records if record.state == "COMPLETE")
        return [record for record in complete if all(map(math.isfinite, record.values or (math.nan,)))]

    @cached_property
    def finished(self) -> list[TrialRecord]:
        """The complete trials that the study made. The pictures draw these."""
        return own_trials(self.complete)

    @cached_property
    def styles(self) -> dict[str, Style]:
        """Model type -> colour and marker."""
        return styles(model_type_of(record) for record in self.records)

    @cached_property
    def by_type(self) -> dict[str, list[TrialRecord]]:
        """Model type -> its finished trials, in the order of `styles`."""
        types = {model_type_of(record) for record in self.finished}
        return {
            name: [record for record in self.finished if model_type_of(record) == name]
            for name in self.styles
            if name in types
        }

    @cached_property
    def front(self) -> set[int]:
        """The numbers of the trials on the Pareto front."""
        return {record.number for record in pareto_front(self.finished, self.objectives)}

    @cached_property
    def importances(self) -> dict[str, list[dict[str, Importance] | str]]:
        """Model type -> for each objective what `importances` returns. Past runs count too."""
        return {
            name: [
                importances([record for record in self.complete if model_type_of(record) == name], objective, index)
                for index, objective in enumerate(self.objectives)
            ]
            for name in self.by_type
        }

    @cached_property
    def pooled(self) -> list[dict[str, Importance] | str]:
        """For each objective what `pooled_importances` returns; empty for a study of one model type."""
        if len(self.by_type) < 2:
            return []
        return [pooled_importances(self.complete, name, index) for index, name in enumerate(self.objectives)]

    def heading(self, what: str) -> str:
        """The title of a picture that shows `what`."""
        return heading(what, self.study, self.dataset_name)

    def counts(self) -> str:
        """`100 trials: 78 finished, 22 pruned`."""
        counts = Counter(record.status for record in self.own)
        shown = ", ".join(f"{counts[status]:,} {status}" for status in STATUSES if counts[status])
        return f"{len(self.own):,} trial{'s' * (len(self.own) != 1)}: {shown}"

    def front_counts(self) -> str:
        """How many trials are on the Pareto front, in a sentence."""
        return f"{len(self.front):,} of {len(self.finished):,} finished trials are on the front, the others are pale"


def best_so_far(numbers: Sequence[int], values: Sequence[float], objective: str) -> list[tuple[int, float]]:
    """The trials that were better than all trials before them, as pairs of number and value, by number."""
    sign = gain_sign(objective)
    found: list[tuple[int, float]] = []
    for number, value in sorted(zip(numbers, values, strict=True)):
        if not found or sign * value > sign * found[-1][1]:
            found.append((number, value))
    return found


# ------------------------------------------------------------------------------------------------ bars of importances


@dataclass(frozen=True)
class BarList:
    """One list of bars, label -> share. Without bars the note says why."""

    title: str
    bars: dict[str, Importance]
    colour: str
    subtitle: str = ""
    note: str = ""


def importance_rows(charts: StudyCharts) -> list[list[BarList]]:
    """The lists of bars, arranged in rows: what all model types share, then one row per type.

    If there is one objective, two lists stand in a row.
    """
    types = [[_bar_list(charts, name, index) for index in range(len(charts.objectives))] for name in charts.by_type]
    pooled = [_pooled_list(charts, found, index) for index, found in enumerate(charts.pooled)]
    shares = {name: explained_by_type(charts.complete, index) for index, name in enumerate(charts.objectives)}
    between = {
        label(name, PARAMETER_LENGTH): Importance(share, None) for name, share in shares.items() if share is not None
    }
    title = BarList("Model type: its share in the variance of the values (η²)", between, SHARED)
    if len(charts.objectives) > 1:
        return [*[[title]] * bool(between), *[pooled] * bool(pooled), *types]
    lists = [*pooled, *[title] * bool(between), *(one for (one,) in types)]
    return [lists[start : start + 2] for start in range(0, len(lists), 2)]


def _bar_list(charts: StudyCharts, name: str, index: int) -> BarList:
    """The most important parameters of a model type for the `index`-th objective."""
    records = charts.by_type[name]
    title = f"{model_label(name)}, {counted_trials(len(records))}"
    subtitle = label(charts.objectives[index], OBJECTIVE_LENGTH) * (len(charts.objectives) > 1)
    found = charts.importances[name][index]
    used = {one for one in found if all(one in record.plain_params for record in records)}
    return _list_of(found, used, len(records), BarList(title, {}, charts.styles[name].colour, subtitle))


def _pooled_list(charts: StudyCharts, found: dict[str, Importance] | str, index: int) -> BarList:
    """The most important parameters that several model types share."""
    number = len(charts.finished)
    subtitle = label(charts.objectives[index], OBJECTIVE_LENGTH) * (len(charts.objectives) > 1)
    title = f"Shared settings, all model types together, {counted_trials(number)}"
    return _list_of(found, set(found), number, BarList(title, {}, SHARED, subtitle))


def _list_of(found: dict[str, Importance] | str, used: set[str], number: int, empty: BarList) -> BarList:
    """The list with the largest of these shares; `used` are the parameters that every trial has.

    If no share is above all that shuffled values gave to any parameter, the list says that the trials do not suffice:
    of many parameters, one is above its own mark by chance.
    """
    if isinstance(found, str):
        return replace(empty, note=found)
    labels = short_names(found)
    bars = {labels[one] + " (if used)" * (one not in used): had for one, had in list(found.items())[:MAX_BARS]}
    notes = []
    chance = max((one.chance or 0.0 for one in found.values()), default=0.0)
    if not any(one.share > chance for one in found.values()):
        notes.append(f"{counted_trials(number)} do not suffice: no share stands out from chance")
    if len(found) > len(bars):
        notes.append(f"and {len(found) - len(bars)} more")
    return replace(empty, bars=bars, note="; ".join(notes))


def bar_limit(rows: Sequence[Sequence[BarList]]) -> float:
    """The share at the right end of every list, so that equal shares are equally long everywhere."""
    return 1.2 * max([bar.share for row in rows for one in row for bar in one.bars.values()] + [0.3])


# --------------------------------------------------------------------------------------------- parallel coordinates


@dataclass(frozen=True)
class ParallelCoordinates:
    """The finished trials of a model type as lines through upright axes. The last axis gives the colours.

    `goodness` has a number for each trial, from 0 for the worst of the study to 1 for the best; `legend` has values of
    the first objective by their goodness.
    """

    title: str
    axes: list[Axis]
    records: list[TrialRecord]
    goodness: list[float]
    legend: list[tuple[float, str]]

    def places(self, axis: Axis) -> list[float]:
        """Where the lines cross the axis. On a discrete axis they are spread a little, so that none hides another."""
        # Multiples of the golden ratio, modulo 1, spread evenly for any number of trials.
        spread = [(record.number * 0.618034) % 1 - 0.5 for record in self.records]
        return [at + 0.05 * axis.is_discrete * by for at, by in zip(axis.positions, spread, strict=True)]


def parallel_coordinates_of(charts: StudyCharts, model_type: str) -> ParallelCoordinates:
    """Axes for the parameters (the most important ones, if there are many), then for the objectives."""
    records = charts.by_type[model_type]
    space = searched(records)
    kept = list(space)
    if len(kept) > MAX_AXES:
        found = charts.importances[model_type][0]
        order = kept if isinstance(found, str) else list(found)
        kept = [name for name in space if name in order[:MAX_AXES]]
    names = short_names(kept)
    params = [record.plain_params for record in records]
    axes = [parameter_axis(names[name], [one.get(name, ABSENT) for one in params], space[name]) for name in kept]
    # The first objective comes last: it gives the colours, and stands beside the colour bar.
    for index, objective in reversed(list(enumerate(charts.objectives))):
        axes.append(value_axis(objective, values_of(records, index), values_of(charts.finished, index)))
    title = f"{model_label(model_type)}, {counted_trials(len(records))}"
    title += f", the {len(kept)} most important of {len(space)} parameters" * (len(kept) < len(space))
    rising = direction(charts.objectives[0]) == "maximize"
    good = [at if rising else 1 - at for at in axes[-1].positions]
    legend = [(at if rising else 1 - at, text) for at, text in axes[-1].ticks]
    return ParallelCoordinates(title, axes, records, good, legend)


# ------------------------------------------------------------------------------------------------------ Pareto front


def front_line(charts: StudyCharts, scale: Scale) -> list[tuple[float, float]]:
    """The front of two objectives as the corners of a step line, (second, first), up to the end of the second's scale.

    The line shows which value of the first objective is reachable at each value of the second.
    """
    front = [record for record in charts.finished if record.number in charts.front]
    best = sorted(zip(values_of(front, 1), values_of(front, 0), strict=True))
    if rises_to_the_right(charts):
        return [*best, (scale.high, best[-1][1])]
    return [(scale.low, best[0][1]), *best]


def rises_to_the_right(charts: StudyCharts) -> bool:
    """Whether a smaller second objective is better, so that a step reaches from a point to the next on its right."""
    return direction(charts.objectives[1]) == "minimize"
