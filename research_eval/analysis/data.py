"""What the runs on a task say of its data: the facts, and the scores of simple models on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from research_eval.analysis.runs import Group
from research_eval.store.data_facts import Baselines, baselines_of, facts_of

if TYPE_CHECKING:
    from research_eval.store.store import Store


@dataclass(frozen=True)
class TaskData:
    """`facts` are those of one run; `baselines` are means, because generated data differ from seed to seed."""

    facts: Mapping[str, Any]
    baselines: Baselines


def data_of_tasks(store: Store, groups: Sequence[Group]) -> dict[str, TaskData]:
    """Task -> its data, from the runs of these groups. A task whose runs are older than the facts has empty ones."""
    found: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        rows = [store.experiment(run.experiment_id) for run in group.runs]
        found.setdefault(group.task, []).extend(facts_of(row["env_details_json"]) for row in rows)
    return {
        task: TaskData(max(facts, key=len), _means(list(map(baselines_of, facts)))) for task, facts in found.items()
    }


def _means(baselines: Sequence[Baselines]) -> Baselines:
    """Each score as the mean over the runs that have it."""
    values: dict[str, dict[str, list[float]]] = {}
    for one in baselines:
        for name, scores in one.items():
            for score, value in scores.items():
                values.setdefault(name, {}).setdefault(score, []).append(value)
    return {name: {score: fmean(known) for score, known in scores.items()} for name, scores in values.items()}
