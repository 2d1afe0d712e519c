"""What a score has to beat: even guessing, always the majority class, and stored baselines of the data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from research_eval.store.data_facts import SHORT_NAMES, facts_of
from research_eval.store.data_facts import baselines_of as facts_baselines

if TYPE_CHECKING:
    from research_eval.analysis.runs import Results
    from research_eval.store.store import Store

_METRIC = re.compile(r"(?:final|best)_val_(f1|acc)(?:_across_epochs)?")


@dataclass(frozen=True)
class Baseline:
    """A score that needs no model of the project, on the validation split."""

    name: str
    value: float


def baselines_of(store: Store, results: Results, metric: str) -> dict[str, list[Baseline]]:
    """Task -> its baselines, the lowest first; a task whose classes are not known has none.

    A run's environment may hold measured baselines of its data. Guessing and the majority class follow from the
    number of validation samples of each class.
    """
    found = _METRIC.fullmatch(metric)
    if found is None:
        return {}
    baselines = {}
    for group in results.groups:
        if group.task not in baselines:
            run = group.runs[0].experiment_id
            scores = facts_baselines(facts_of(store.experiment(run)["env_details_json"]))
            stored = {SHORT_NAMES[name]: scores[name].get(f"val_{found[1]}") for name in scores}
            support = store.metrics(run).get("val_support_per_class")
            known = expected_scores(support, found[1]) if isinstance(support, list) else {}
            named = [Baseline(name, value) for name, value in (known | stored).items() if value is not None]
            baselines[group.task] = sorted(named, key=lambda one: one.value)
    return baselines


def expected_scores(support: Sequence[Any], score: str) -> dict[str, float]:
    """The accuracy ("acc") or macro-F1 ("f1") of guessing all classes equally often, and of the majority class.

    `support` has the number of samples of each class. Guessing has its value in the limit of many samples: with C
    classes, recall is 1 / C and precision is the share p of the class, so that F1 is 2 p / (1 + C p).

    >>> expected_scores([30, 10], "acc")
    {'chance': 0.5, 'majority class': 0.75}
    """
    counts = [float(count) for count in support if isinstance(count, int | float) and count > 0]
    total, classes = sum(counts), len(support)
    if not total:
        return {}
    shares = [count / total for count in counts]
    if score == "acc":
        return {"chance": 1 / classes, SHORT_NAMES["majority"]: max(shares)}
    guessed = [2 * share / (1 + classes * share) for share in shares]
    most = max(shares)
    return {"chance": sum(guessed) / classes, SHORT_NAMES["majority"]: 2 * most / (1 + most) / len(counts)}
