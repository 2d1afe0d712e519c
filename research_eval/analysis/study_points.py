"""What the pictures of a study show, whoever draws them: texts, axes, importances.

The files of `study_plots` and the pages of `study_pages` draw the same of these.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from research_eval.analysis.points import Style, is_wide, styles
from research_eval.analysis.routing_plots import shortened
from research_eval.analysis.study_trials import TrialRecord, own_trials, pareto_front, plain_name
from research_eval.analysis.tables import is_score, metric_text, printable, short_number
from research_eval.metrics import direction
from research_eval.search_space import MODEL_TYPE

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

FEWEST = 8  # finished trials of a model type, from which importances are computed
ELITE, ELITE_SHARE = 10, 0.2  # the best trials: a fifth, at least ten, at most half
SHUFFLES = 19  # the largest of as many is passed by chance in one case of twenty
MAX_BARS = 15  # parameters in a panel of importances
MAX_AXES = 16  # parameters in a panel of parallel coordinates
DISCRETE = 8  # whole numbers up to which each has its tick
MISSING = 0.12  # share of an axis for trials that do not have the parameter
MANY = 300  # trials, from which they are drawn small
UNKNOWN = "unknown"  # model type of a trial that ended before it had one
STATUSES = ("finished", "pruned", "diverged", "failed", "running", "waiting")
GRID = "#E6E6E6"
# Viridis upside down, so that the best are the darkest, without the yellow that white paper swallows.
COLOURS = ("#CFE11C", "#5DC863", "#21908C", "#3B528B", "#440154")


@dataclass(frozen=True)
class Story:
    """A study as its pictures tell it; `records` are all of it, past runs too."""

    study: str
    dataset_name: str
    objectives: tuple[str, ...]
    records: tuple[TrialRecord, ...]

    @cached_property
    def own(self) -> list[TrialRecord]:
        return own_trials(self.records)

    @cached_property
    def complete(self) -> list[TrialRecord]:
        """The trials and past runs with a finite value of every objective."""
        complete = (record for record in self.records if record.state == "COMPLETE")
        return [record for record in complete if all(map(math.isfinite, record.values or (math.nan,)))]

    @cached_property
    def finished(self) -> list[TrialRecord]:
        """Those of the study itself, which are drawn."""
        return own_trials(self.complete)

    @cached_property
    def styles(self) -> dict[str, Style]:
        return styles(model_type_of(record) for record in self.records)

    @cached_property
    def by_type(self) -> dict[str, list[TrialRecord]]:
        """The finished trials, in the order of the project's models."""
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
        """Model type -> see `importances`, for each objective; past runs help."""
        return {
            name: [
                importances([record for record in self.complete if model_type_of(record) == name], objective, index)
                for index, objective in enumerate(self.objectives)
            ]
            for name in self.by_type
        }

    def heading(self, what: str) -> str:
        return f"{what}: {_short(self.study, 50)} on {_short(self.dataset_name, 30)}"

    def counts(self) -> str:
        """`100 trials: 78 finished, 22 pruned`."""
        counts = Counter(record.status for record in self.own)
        shown = ", ".join(f"{counts[status]:,} {status}" for status in STATUSES if counts[status])
        return f"{len(self.own):,} trial{'s' * (len(self.own) != 1)}: {shown}"

    def fronts(self) -> str:
        return f"{len(self.front):,} of {len(self.finished):,} finished trials are on the front, the others are pale"


def values_of(records: Sequence[TrialRecord], index: int) -> list[float]:
    """An objective of trials that have it."""
    return [record.values[index] for record in records if record.values is not None]


def model_type_of(record: TrialRecord) -> str:
    return record.model_type or UNKNOWN


def named(model_type: str) -> str:
    """A model type in titles and legends."""
    return _short(model_type, 24)


def way(objective: str) -> str:
    """`final_val_f1 (higher is better)`."""
    return f"{_short(objective, 40)} ({'higher' if direction(objective) == 'maximize' else 'lower'} is better)"


def best_so_far(numbers: Sequence[int], values: Sequence[float], objective: str) -> list[tuple[int, float]]:
    """The trials, by number, that were better than all before them."""
    sign = 1 if direction(objective) == "maximize" else -1
    found: list[tuple[int, float]] = []
    for number, value in sorted(zip(numbers, values, strict=True)):
        if not found or sign * value > sign * found[-1][1]:
            found.append((number, value))
    return found


def on_log_scale(values: Sequence[float], objective: str) -> bool:
    """Costs over more than a factor of ten; never scores."""
    representable = min(values) > 1e-100 and max(values) < 1e100  # with room around them
    return representable and is_wide(values) and not is_score(objective)


def described(record: TrialRecord, objectives: Sequence[str]) -> list[str]:
    """The lines that a point says of itself."""
    lines = [f"trial {record.number}: {model_type_of(record)}, {record.status}"]
    for index, name in enumerate(objectives):
        value = record.value(objectives, index)
        lines += [] if value is None else [f"{name} {metric_text(value, name)}"]
    params = {name: value for name, value in record.plain_params.items() if name != MODEL_TYPE}
    named = [f"{label} {_value_text(params[name])}" for name, label in short_names(params).items()]
    lines += [", ".join(named[start : start + 3]) for start in range(0, len(named), 3)]
    lines += [record.reason] if record.reason else []
    lines += [f"run {record.experiment_ids[0]}"] if record.experiment_ids else []
    return [_short(line, 120) for line in lines]


# ------------------------------------------------------------------------------------------------------- parameters


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Plain name -> what a reader calls it: without its section, where that leaves it clear.

    >>> short_names(["dense.num_heads", "optimizer_params.lr", "scheduler_params.name"])
    {'dense.num_heads': 'num_heads', 'optimizer_params.lr': 'lr', 'scheduler_params.name': 'scheduler name'}
    """
    short: dict[str, str] = {}
    for name in names:
        section, _, rest = name.partition(".")
        short[name] = f"{section.removesuffix('_params')} name" if rest == "name" else rest or name
    counts = Counter(short.values())
    return {name: _short(label if counts[label] == 1 else name, 28) for name, label in short.items()}


def searched(records: Sequence[TrialRecord]) -> dict[str, BaseDistribution]:
    """The parameters that varied over the trials of a model type, each with all values that it could have.

    Choices that other values had narrowed, and ranges that they had cut, are put together.
    """
    found: dict[str, list[BaseDistribution]] = {}
    for record in records:
        for name, distribution in record.distributions.items():
            if name != MODEL_TYPE:
                found.setdefault(plain_name(name), []).append(distribution)
    together = {name: _united(distributions) for name, distributions in found.items()}
    return {name: distribution for name, distribution in together.items() if not distribution.single()}


def _united(distributions: Sequence[BaseDistribution]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    first = distributions[0]
    if isinstance(first, CategoricalDistribution):
        choices = dict.fromkeys(
            choice for one in distributions if isinstance(one, CategoricalDistribution) for choice in one.choices
        )
        numbers = all(isinstance(choice, int | float) for choice in choices)
        return CategoricalDistribution(sorted(choices, key=float) if numbers else list(choices))  # type: ignore[arg-type]
    assert isinstance(first, IntDistribution | FloatDistribution)
    others = [one for one in distributions if isinstance(one, IntDistribution | FloatDistribution)]
    low, high = min(one.low for one in others), max(one.high for one in others)
    if isinstance(first, IntDistribution):
        return IntDistribution(int(low), int(high), log=first.log)
    return FloatDistribution(low, high, log=first.log)


@contextmanager
def _silent() -> Iterator[None]:
    """Optuna's notices about studies in memory, small samples and experimental parts are not for our users."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


# ------------------------------------------------------------------------------------------------------- importance


@dataclass(frozen=True)
class Importance:
    """The share of a parameter, and the largest one that it had when the values were shuffled over the trials."""

    share: float
    chance: float | None

    @property
    def is_clear(self) -> bool:
        return self.chance is None or self.share > self.chance


def importances(records: Sequence[TrialRecord], objective: str, index: int) -> dict[str, Importance] | str:
    """The share of every searched parameter in what makes the best trials of a model type, largest first.

    PED-ANOVA (Watanabe et al., 2023; for parameters that only some trials have as in arXiv 2601.20800), in the region
    that was searched. A few trials give every parameter some share: hence the shuffles. In words why there is none.
    """
    import optuna

    space = searched(records)
    if len(records) < FEWEST:
        return f"importances need {FEWEST} trials or past runs"
    if not space:
        return "no parameter varied"
    sign = 1.0 if direction(objective) == "minimize" else -1.0
    costs = [sign * value for value in values_of(records, index)]
    with _silent():
        study = optuna.create_study()
        for record, cost in zip(records, costs, strict=True):
            params = {name: value for name, value in record.plain_params.items() if name in space}
            distributions = {name: space[name] for name in params}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=cost))
        quantile = min(0.5, max(ELITE_SHARE, ELITE / len(records)))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
        found = evaluator.evaluate(study)
        rng = np.random.default_rng(0)
        shuffled = [rng.permutation(costs).tolist() for _ in range(SHUFFLES)]
        null = [evaluator.evaluate(study, target=_looked_up(one)) for one in shuffled]
    total = sum(found.values())
    if total <= 0:
        return "all trials are equally good"
    order = sorted(found, key=lambda name: (-found[name], name))
    return {name: Importance(found[name] / total, max(one[name] for one in null) / total) for name in order}


def _looked_up(costs: Sequence[float]) -> Callable[[FrozenTrial], float]:
    return lambda trial: costs[trial.number]


def explained_by_type(records: Sequence[TrialRecord], index: int) -> float | None:
    """The share of the variance of an objective that lies between the model types (eta squared).

    None where there is one type, or no variance.
    """
    groups: dict[str, list[float]] = {}
    for record in records:
        groups.setdefault(model_type_of(record), []).extend(values_of([record], index))
    values = [value for group in groups.values() for value in group]
    if len(groups) < 2:
        return None
    mean = fmean(values)
    total = math.fsum((value - mean) ** 2 for value in values)
    between = math.fsum(len(group) * (fmean(group) - mean) ** 2 for group in groups.values())
    return between / total if total > 0 else None


@dataclass(frozen=True)
class Block:
    """One list of bars, label -> share; or in the note why there are none."""

    title: str
    bars: dict[str, Importance]
    colour: str
    below: str = ""  # the title
    note: str = ""


def importance_rows(story: Story) -> list[list[Block]]:
    """The lists of bars in rows; a row per model type, or for one objective two types in a row."""
    several = len(story.objectives) > 1
    types = [[_block(story, name, index) for index in range(len(story.objectives))] for name in story.by_type]
    if not several:
        blocks = [block for (block,) in types]
        types = [blocks[start : start + 2] for start in range(0, len(blocks), 2)]
    shares = {name: explained_by_type(story.complete, index) for index, name in enumerate(story.objectives)}
    between = {_short(name, 28): Importance(share, None) for name, share in shares.items() if share is not None}
    first = [[Block("variance between the model types (η²)", between, "#555555")]] if between else []
    return first + types


def _block(story: Story, name: str, index: int) -> Block:
    found, records = story.importances[name][index], story.by_type[name]
    title, below = (
        f"{named(name)}, {_counted(len(records))}",
        _short(story.objectives[index], 40) * (len(story.objectives) > 1),
    )
    colour = story.styles[name].colour
    if isinstance(found, str):
        return Block(title, {}, colour, below, found)
    labels = short_names(found)
    bars = {
        labels[one] + " (if used)" * any(one not in record.plain_params for record in records): had
        for one, had in list(found.items())[:MAX_BARS]
    }
    return Block(title, bars, colour, below, f"and {len(found) - len(bars)} more" if len(found) > len(bars) else "")


def bar_limit(rows: Sequence[Sequence[Block]]) -> float:
    """The same length of a share in all lists."""
    return 1.2 * max([bar.share for row in rows for block in row for bar in block.bars.values()] + [0.3])


IMPORTANCE_LEGEND = (
    "Share of each parameter in what makes the best trials (PED-ANOVA). Mark: the largest share that it got from "
    f"{SHUFFLES} shuffles of the values; pale: not above it."
)


def _counted(number: int) -> str:
    return f"{number:,} finished trial{'s' * (number != 1)}"


# ------------------------------------------------------------------------------------------------------------- axes


@dataclass(frozen=True)
class Axis:
    """One of many upright axes: where each trial crosses it, from 0 at the bottom to 1, and what stands beside it."""

    label: str
    positions: list[float]
    ticks: list[tuple[float, str]]
    is_discrete: bool  # many trials have the same position


def parameter_axis(label: str, values: Sequence[Any], distribution: BaseDistribution) -> Axis:
    """The axis of a parameter; trials without it (`ABSENT`) cross at the bottom, below all values."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        last = max(len(distribution.choices) - 1, 1)
        place = {_key(choice): index / last for index, choice in enumerate(distribution.choices)}
        axis = Axis(
            label,
            [math.nan if value is ABSENT else place[_key(value)] for value in values],
            [(index / last, _value_text(choice)) for index, choice in enumerate(distribution.choices)],
            is_discrete=True,
        )
    else:
        low, high, log = distribution.low, distribution.high, distribution.log  # type: ignore[attr-defined]
        numbers = [math.nan if value is ABSENT else float(value) for value in values]
        few = isinstance(distribution, IntDistribution) and not log and high - low < DISCRETE
        ticks = [float(number) for number in range(low, high + 1)] if few else round_numbers(low, high, log)
        axis = _numeric_axis(label, numbers, (low, high), ticks, log, is_discrete=few)
    if not any(map(math.isnan, axis.positions)):
        return axis
    return Axis(
        label,
        [0.0 if math.isnan(at) else MISSING + (1 - MISSING) * at for at in axis.positions],
        [(0.0, "not used"), *((MISSING + (1 - MISSING) * at, text) for at, text in axis.ticks)],
        axis.is_discrete,
    )


ABSENT = object()


def value_axis(objective: str, values: Sequence[float], everywhere: Sequence[float]) -> Axis:
    """The axis of an objective, from the lowest to the highest value `everywhere`."""
    log, ends = on_log_scale(everywhere, objective), (min(everywhere), max(everywhere))
    return _numeric_axis(objective, values, ends, round_numbers(*ends, log), log, is_discrete=False)


def _numeric_axis(
    label: str, values: Sequence[float], ends: tuple[float, float], ticks: Sequence[float], log: bool, is_discrete: bool
) -> Axis:
    low, high = (math.log(end) for end in ends) if log else ends

    def place(value: float) -> float:
        if low == high:
            return 0.5
        return ((math.log(value) if log else value) - low) / (high - low)

    return Axis(
        label,
        [place(value) for value in values],
        list(zip(map(place, ticks), tick_texts(ticks), strict=True)),
        is_discrete,
    )


def round_numbers(low: float, high: float, log: bool) -> list[float]:
    """A few numbers between the ends that are easy to read."""
    from matplotlib.ticker import MaxNLocator

    if low == high:
        return [low]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) if log else range(0)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    if len(found) == 2:
        return found
    margin = (high - low) * 1e-9  # for what rounding has moved past an end
    found = list(map(float, MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)))
    return [value for value in found if low - margin <= value <= high + margin]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Round numbers with as many digits as tell them apart.

    >>> tick_texts([0.998, 0.9985, 0.999]), tick_texts([0, 2500, 5000])
    (['0.998', '0.9985', '0.999'], ['0', '2.5k', '5k'])
    """
    ticks = [0.0 if abs(tick) < 1e-300 else tick for tick in ticks]
    for digits in range(3, 16):
        if all(math.isclose(float(f"{tick:.{digits}g}"), tick, rel_tol=1e-9) for tick in ticks):
            break
    return [short_number(tick) if digits == 3 else f"{tick:,.{digits}g}" for tick in ticks]


def _key(value: Any) -> str:
    """Choices that are equal in Python, such as 1 and true, are different ones."""
    return json.dumps(value, default=str)


def _value_text(value: Any) -> str:
    """A value as a reader wants it."""
    if isinstance(value, str):
        return _short(value, 16)
    if isinstance(value, float):
        return short_number(value)
    return _short(json.dumps(value, default=str), 16)


def _short(text: str, length: int) -> str:
    return shortened(printable(text), length)


@dataclass(frozen=True)
class Lines:
    """The finished trials of a model type as lines through upright axes; the last one is that of the colours."""

    title: str
    axes: list[Axis]
    records: list[TrialRecord]
    goodness: list[float]  # of each trial, from 0 for the worst of the study to 1 for the best
    legend: list[tuple[float, str]]  # values by their goodness

    def places(self, axis: Axis) -> list[float]:
        """Where the lines are drawn: at a position that many trials have they lie beside each other."""
        spread = [(record.number * 0.618034) % 1 - 0.5 for record in self.records]
        return [at + 0.05 * axis.is_discrete * by for at, by in zip(axis.positions, spread, strict=True)]


def lines_of(story: Story, model_type: str) -> Lines:
    """The parameters, of many the most important ones, and then the objectives."""
    records = story.by_type[model_type]
    space = searched(records)
    kept = list(space)
    if len(kept) > MAX_AXES:
        found = story.importances[model_type][0]
        order = kept if isinstance(found, str) else list(found)
        kept = [name for name in space if name in order[:MAX_AXES]]
    names = short_names(kept)
    params = [record.plain_params for record in records]
    axes = [parameter_axis(names[name], [one.get(name, ABSENT) for one in params], space[name]) for name in kept]
    for index, objective in reversed(list(enumerate(story.objectives))):
        axes.append(value_axis(objective, values_of(records, index), values_of(story.finished, index)))
    title = f"{named(model_type)}, {_counted(len(records))}"
    title += f", the {len(kept)} most important of {len(space)} parameters" * (len(kept) < len(space))
    rising = direction(story.objectives[0]) == "maximize"
    good = [at if rising else 1 - at for at in axes[-1].positions]
    return Lines(title, axes, records, good, [(at if rising else 1 - at, text) for at, text in axes[-1].ticks])


# ------------------------------------------------------------------------------------------------------ plain scales


@dataclass(frozen=True)
class Scale:
    """What an ordinary axis shows: room around the values, and ticks that can be read."""

    low: float
    high: float
    log: bool
    ticks: list[float]
    texts: list[str]

    def shows(self, value: float | None) -> bool:
        return value is not None and self.low <= value <= self.high


def scale_of(values: Sequence[float], objective: str) -> Scale:
    """The scale of an objective."""
    low, high = min(values), max(values)
    log = on_log_scale(values, objective)
    if log:
        room = (high / low) ** 0.07
        low, high = low / room, high * room
    else:
        room = 0.07 * (high - low) or abs(high) * 0.1 or 0.1
        low, high = low - room, high + room
    ticks = round_numbers(low, high, log)
    return Scale(low, high, log, ticks, tick_texts(ticks))


def front_line(story: Story, scale: Scale) -> list[tuple[float, float]]:
    """What can be had at each price: the front of two objectives, second first, as far as the second's scale goes."""
    front = [record for record in story.finished if record.number in story.front]
    best = sorted(zip(values_of(front, 1), values_of(front, 0), strict=True))
    if rises_to_the_right(story):
        return [*best, (scale.high, best[-1][1])]
    return [(scale.low, best[0][1]), *best]


def rises_to_the_right(story: Story) -> bool:
    """Whether less of the second objective is better, so that a step holds until the next point on its right."""
    return direction(story.objectives[1]) == "minimize"
