"""Which parameters of a study make its best trials, and how much lies between the model types.

The method is PED-ANOVA (Watanabe et al., 2023) as Optuna implements it; for parameters that only some trials have it
follows arXiv 2601.20800. A few trials give every parameter some share by chance, so that each share is compared with
the shares that shuffled values give.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from research_eval.analysis.study_texts import counted_trials, model_type_of
from research_eval.analysis.study_trials import TrialRecord
from research_eval.registry import MODEL_TYPE
from research_eval.store.metrics import gain_sign

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

FEWEST = 8  # importances need at least this many finished trials of a model type
# The "best trials" are a fifth of all trials, at least ten, and at most half of them.
ELITE, ELITE_SHARE, MOST_SHARE = 10, 0.2, 0.5
SHUFFLES = 19  # a share exceeds the largest of 19 shuffled ones by chance in one of twenty cases


@dataclass(frozen=True)
class Importance:
    """The share of a parameter in what makes the best trials, from 0 to 1.

    `chance` is the largest share that the parameter got from shuffled values; None if nothing was shuffled.
    """

    share: float
    chance: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the share is larger than chance explains."""
        return self.chance is None or self.share > self.chance


def values_of(records: Sequence[TrialRecord], index: int) -> list[float]:
    """The values of the `index`-th objective, of the trials that have one."""
    return [record.values[index] for record in records if record.values is not None]


def searched(records: Sequence[TrialRecord]) -> dict[str, BaseDistribution]:
    """The parameters that varied over the trials of a model type, each with all values that it could have.

    A study narrows some choices and ranges by the values chosen before. These parts are united again here.
    """
    found: dict[str, list[BaseDistribution]] = {}
    for record in records:
        for name, distribution in record.plain_distributions.items():
            if name != MODEL_TYPE:
                found.setdefault(name, []).append(distribution)
    together = {name: _united(distributions) for name, distributions in found.items()}
    return {name: distribution for name, distribution in together.items() if not distribution.single()}


def _united(distributions: Sequence[BaseDistribution]) -> BaseDistribution:
    """One distribution with the values of all; they are of the same kind, because they are of one parameter."""
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
    """Hide Optuna's notices about studies in memory, small samples and experimental parts: users cannot act on them."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def importances(records: Sequence[TrialRecord], objective: str, index: int) -> dict[str, Importance] | str:
    """The share of every searched parameter in what makes the best trials of a model type, largest first.

    `records` are the complete trials of one model type; `objective` is the `index`-th of the study. If no share can be
    computed, the result is the reason in words.
    """
    costs = [-gain_sign(objective) * value for value in values_of(records, index)]
    return _shares([record.plain_params for record in records], searched(records), costs)


def pooled_importances(records: Sequence[TrialRecord], objective: str, index: int) -> dict[str, Importance] | str:
    """The same for the parameters that several model types share, over the trials of all types together.

    A parameter of a model type counts as that of the same name of another type. A trial counts by its rank among the
    trials of its own type, so that a type that is better than another one is no share of a parameter.
    """
    by_type: dict[str, list[TrialRecord]] = {}
    for record in records:
        by_type.setdefault(model_type_of(record), []).append(record)
    spaces = {
        name: {_shared_name(key, name): one for key, one in searched(group).items()} for name, group in by_type.items()
    }
    common = {key for key, count in Counter(key for space in spaces.values() for key in space).items() if count > 1}
    found: dict[str, list[BaseDistribution]] = {}
    for space in spaces.values():
        for key in common & space.keys():
            found.setdefault(key, []).append(space[key])
    # A choice of one type may be a range of another one: their values have no common order.
    space = {key: _united(each) for key, each in sorted(found.items()) if len(set(map(type, each))) == 1}
    params, costs = [], []
    for name, group in by_type.items():
        values = [-gain_sign(objective) * value for value in values_of(group, index)]
        # The middle rank of equal values: halfway between the trials that are better and those that are not worse.
        below = np.searchsorted(np.sort(values), values, "left") + np.searchsorted(np.sort(values), values, "right")
        costs += (below / (2 * len(values))).tolist()
        params += [{_shared_name(key, name): value for key, value in one.plain_params.items()} for one in group]
    return _shares(params, space, costs)


def _shared_name(name: str, model_type: str) -> str:
    """The name of a parameter without its model type: `num_heads` of `dense.num_heads`."""
    return name.removeprefix(f"{model_type}.")


def _shares(
    params: Sequence[dict[str, Any]], space: dict[str, BaseDistribution], costs: Sequence[float]
) -> dict[str, Importance] | str:
    """The shares of the parameters of `space` in what makes trials of these values cheap, or why there are none."""
    import optuna

    if len(params) < FEWEST:
        return f"{counted_trials(len(params))} do not suffice: importances need {FEWEST}"
    if not space:
        return "no parameter varied"
    with _silent():
        # A study in memory with minimised values and plain names, which is what the evaluator expects.
        study = optuna.create_study()
        for chosen, cost in zip(params, costs, strict=True):
            known = {name: value for name, value in chosen.items() if name in space}
            distributions = {name: space[name] for name in known}
            study.add_trial(optuna.trial.create_trial(params=known, distributions=distributions, value=cost))
        quantile = min(MOST_SHARE, max(ELITE_SHARE, ELITE / len(params)))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
        found = evaluator.evaluate(study)
        rng = np.random.default_rng(0)
        shuffled = [rng.permutation(costs).tolist() for _ in range(SHUFFLES)]
        # Shuffled values have no connection with the parameters: their shares show what chance produces.
        null = [evaluator.evaluate(study, target=_looked_up(one)) for one in shuffled]
    total = sum(found.values())
    if total <= 0:
        return "all trials are equally good"
    order = sorted(found, key=lambda name: (-found[name], name))
    return {name: Importance(found[name] / total, max(one[name] for one in null) / total) for name in order}


def _looked_up(costs: Sequence[float]) -> Callable[[FrozenTrial], float]:
    """A target function for Optuna that ignores the trial's own value and returns the cost of its number."""
    return lambda trial: costs[trial.number]


def explained_by_type(records: Sequence[TrialRecord], index: int) -> float | None:
    """The share of the variance of an objective that lies between the model types (eta squared).

    None if there is only one type, or no variance.
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
