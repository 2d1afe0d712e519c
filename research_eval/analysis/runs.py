"""The runs on one dataset, grouped: runs of one config on the same data with different seeds are a group.

Runs with equal dataset parameters and equal data are runs on the same task. Scores compare within a task only.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import PurePath
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from research_eval.analysis.statistics import FEWEST
from research_eval.store.metrics import gain_sign, latency_parts
from research_eval.store.records import ACTIVE_RUNS, RunFilter
from research_eval.system.untrusted import stored_object

if TYPE_CHECKING:
    from research_eval.store.records import RunRow
    from research_eval.store.store import Store

log = logging.getLogger(__name__)

# Two configs that differ only in these training parameters are the same experiment: the parameters say how a run is
# watched and where it is computed, not what is computed.
OPERATIONAL = (
    *("device", "num_threads", "log_every", "checkpoint_every", "trace_routing", "test"),
    "sample_during_training",
)
DATA_DIGITS = 8  # of a hash, in keys and labels
# Runs of these statuses say something about their configs. The others did not come to an end (yet), or failed for a
# reason around them: they are left out, so that a pilot run that was stopped changes no title, column or count.
COUNTED = ("finished", "pruned", "diverged")


@dataclass(frozen=True)
class Group:
    """The finished runs of one config, one for each seed, by seed."""

    model_type: str
    task: str  # its key in `Results.tasks`
    runs: tuple[RunRow, ...]
    lost: int  # seeds of this config that diverged

    def by_seed(self) -> dict[int | str, RunRow]:
        """Seed -> run. A run without a known seed has its id as the key."""
        return {_seed(run): run for run in self.runs}

    def scores(self, metric: str) -> dict[int | str, float]:
        """Seed -> value, for the runs with a finite value. A run without a known seed has its id as the key."""
        found = {_seed(run): run.metrics.get(metric, math.nan) for run in self.runs}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def values(self, metric: str) -> list[float]:
        """The finite values over the seeds."""
        return list(self.scores(metric).values())

    def mean(self, metric: str) -> float | None:
        """The mean over the seeds; None if no run has a finite value."""
        values = self.values(metric)
        return fmean(values) if values else None

    def cost(self, metric: str) -> float | None:
        """The mean over the seeds; for a latency the median, because one busy moment would spoil a mean."""
        values = self.values(metric)
        return median(values) if values and latency_parts(metric) else self.mean(metric)

    @property
    def name(self) -> str:
        """The name of the experiment, as its first run has it."""
        return self.runs[0].experiment_name

    @property
    def config(self) -> dict[str, Any]:
        """The config of the first run; empty if an earlier version of the program stored something else."""
        return stored_object(self.runs[0].config_json)


@dataclass(frozen=True)
class Results:
    """The runs on a dataset, grouped. The runs in `left_out` have a status that is not in COUNTED.

    `selection` are the filters that chose the runs, in words.
    """

    dataset_name: str
    groups: list[Group]  # in the order of their first runs
    tasks: dict[str, str]  # key -> text that tells the task from the others; "" for the only one
    spent: dict[tuple[str, str], Counter[str]]  # (task, model type) -> number of runs by status
    left_out: list[RunRow] = field(default_factory=list)
    selection: str = ""

    @property
    def model_types(self) -> list[str]:
        """The model types that were run, also those without a result."""
        return sorted({model_type for _, model_type in self.spent})

    @property
    def num_runs(self) -> int:
        """All runs but those that are left out."""
        return sum(count.total() for count in self.spent.values())

    def left_out_text(self, best: Sequence[Group] = ()) -> str:
        """How many runs are left out, and how many seeds of the `best` configs are among them; empty without any."""
        if not self.left_out:
            return ""
        statuses = Counter(run.status for run in self.left_out)
        counts = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        num_runs = len(self.left_out)
        text = f"Left out: {num_runs} run{'s' * (num_runs > 1)} without a result ({counts})"
        seeds = sum(len(self._unfinished_seeds(group)) for group in best)
        return f"{text}, with {seeds} more seed{'s' * (seeds > 1)} of the chosen configs." if seeds else f"{text}."

    def _unfinished_seeds(self, group: Group) -> set[int | str]:
        """The seeds of a config whose runs are left out and that no finished run has."""
        alike = {keys(run) for run in group.runs}
        same = [run for run in self.left_out if run.model_type == group.model_type and keys(run) in alike]
        return {_seed(run) for run in same} - {_seed(run) for run in group.runs}

    def only(self, model_types: Sequence[str]) -> Results:
        """The results of these model types, and of the tasks that they have run."""
        spent = {place: count for place, count in self.spent.items() if place[1] in model_types}
        groups = [group for group in self.groups if group.model_type in model_types]
        left_out = [run for run in self.left_out if run.model_type in model_types]
        return replace(self, groups=groups, tasks=_labels({task for task, _ in spent}), spent=spent, left_out=left_out)

    def of_task(self, task: str) -> list[Group]:
        """The groups of one task."""
        return [group for group in self.groups if group.task == task]

    def best(self, metric: str) -> list[Group]:
        """The group with the best mean, for each task and model type; `with_enough_seeds` says which groups can win.

        Of equally good groups the one with more seeds wins, then the older one.
        """
        leaders = _leaders(with_enough_seeds(self.groups, metric), metric)
        order = list(self.tasks)
        return [leaders[place] for place in sorted(leaders, key=lambda place: (order.index(place[0]), place[1]))]

    def passed_over(self, best: Sequence[Group], metric: str) -> list[tuple[Group, Group]]:
        """Pairs of a group in `best` and one with too few seeds that has a better mean.

        The second has the best mean of all groups of its task and model type.
        """
        leaders = _leaders(self.groups, metric)
        pairs = [(one, leaders[one.task, one.model_type]) for one in best]
        return [(one, leader) for one, leader in pairs if leader.mean(metric) != one.mean(metric)]


def enough_seeds(most: int) -> int:
    """How many seeds a config needs to be the best one, if the one with the most seeds has this many.

    A single seed may win by luck. So a config with fewer than three does not beat one with three or more, and if none
    has three, only those with the most compete.
    """
    return min(FEWEST, most)


def with_enough_seeds(groups: Sequence[Group], metric: str) -> list[Group]:
    """The groups that can be the best of their task and model type: those with a mean and `enough_seeds`."""
    most: Counter[tuple[str, str]] = Counter()
    counts = [len(group.values(metric)) for group in groups]
    for group, count in zip(groups, counts, strict=True):
        place = group.task, group.model_type
        most[place] = max(most[place], count)
    return [
        group
        for group, count in zip(groups, counts, strict=True)
        if count and count >= enough_seeds(most[group.task, group.model_type])
    ]


def _leaders(groups: Sequence[Group], metric: str) -> dict[tuple[str, str], Group]:
    """Task and model type -> the group with the best mean, however many seeds it has."""
    sign = gain_sign(metric)
    leaders: dict[tuple[str, str], tuple[tuple[float, int], Group]] = {}
    for group in groups:
        values = group.values(metric)
        if values:
            place, rank = (group.task, group.model_type), (sign * fmean(values), len(values))
            if place not in leaders or rank > leaders[place][0]:
                leaders[place] = rank, group
    return {place: group for place, (_, group) in leaders.items()}


def load_results(
    store: Store, dataset_name: str, metrics: Sequence[str] = (), wanted: RunFilter = ACTIVE_RUNS
) -> Results:
    """Read the `wanted` runs on a dataset from the store, with these metrics."""
    seeds: dict[tuple[str, str, str], dict[int | str, RunRow]] = {}
    ended: dict[tuple[str, str, str], set[int | str]] = {}
    spent: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    found = store.runs(dataset_name, metrics, wanted)
    rows = [row for row in found if row.status in COUNTED]
    for row, (task, config) in zip(rows, keys_by_data(rows), strict=True):
        place = (row.model_type, task, config)
        spent[task, row.model_type][row.status] += 1
        if row.status == "finished":
            seeds.setdefault(place, {})[_seed(row)] = (
                row  # rows come oldest first, so that the newest run of a seed stays
            )
        elif row.status == "diverged":
            ended.setdefault(place, set()).add(_seed(row))
    groups = [
        Group(
            model_type,
            task,
            tuple(runs[seed] for seed in sorted(runs, key=lambda seed: (str(type(seed)), seed))),
            len(ended.get((model_type, task, config), set()) - set(runs)),
        )
        for (model_type, task, config), runs in seeds.items()
    ]
    left_out = [row for row in found if row.status not in COUNTED]
    return Results(dataset_name, groups, _labels({task for task, _ in spent}), dict(spent), left_out)


def with_all_metrics(store: Store, group: Group) -> Group:
    """The group with every numeric metric of its runs; `load_results` reads a few metrics only, to be quick."""
    runs = []
    for run in group.runs:
        stored = store.metrics(run.experiment_id)
        runs.append(run._replace(metrics={name: value for name, value in stored.items() if isinstance(value, float)}))
    return replace(group, runs=tuple(runs))


def _seed(run: RunRow) -> int | str:
    """The key of a run within its group."""
    return run.experiment_id if run.seed is None else run.seed


# ----------------------------------------------------------------------------------------------------- equal configs


def keys(row: RunRow, with_place: bool = True) -> tuple[str, str]:
    """Two keys of a run: equal task keys mean the same task, equal experiment keys the same config but for the seed.

    `with_place` makes the place of the data a part of the experiment key.
    The stored text of a config is canonical, so that this function can cut out the parts that do not matter. That is
    ten times faster than parsing. Any other text is parsed and brought into the canonical form first.
    """
    found = _cut(row.config_json, row.experiment_name, row.seed, with_place)
    if found is not None:
        return found
    config = stored_object(row.config_json)
    found = _cut(json.dumps(config, sort_keys=True), config.get("experiment_name"), config.get("seed"), with_place)
    if found is not None:
        return found
    rest = {key: value for key, value in config.items() if key not in ("seed", "experiment_name")}
    task = _task_key(json.dumps(config.get("dataset_params", {})), with_place)
    return task or "{}", json.dumps(rest, sort_keys=True) if config else row.config_json


def _cut(text: str, name: Any, seed: Any, with_place: bool) -> tuple[str, str] | None:
    """Both keys of a canonical config; None for any other text.

    The parts are searched from the end and around unique neighbours, because user texts may contain any of them.
    """
    head, found_seed, training = text.rpartition(f'"seed": {seed}, "training_params": ')
    before, found_name, after = head.partition(f'"experiment_name": {json.dumps(name)}, ')
    start, found_data, rest = before.partition('"dataset_params": ')
    data, found_type, end = rest.partition(', "dataset_type": ')
    if not (found_seed and found_name and found_data and found_type):
        return None
    task, watched = _task_key(data, with_place), _training_key(training[:-1])
    if task is None or watched is None:
        return None
    return task, f"{start}{data if with_place else task}{end}{after}{watched}"


def keys_by_data(rows: Sequence[RunRow]) -> list[tuple[str, str]]:
    """The `keys` of the runs. If runs on the same task had data with other content, the task key tells them apart.

    Runs whose data are unknown, from an earlier program, count as runs on the data of the others, unless these differ.
    Where the content of all data of a task is known, their place does not matter.
    """
    found = [keys(row) for row in rows]
    unknown = {task for row, (task, _) in zip(rows, found, strict=True) if row.data_sha256 is None}
    found = [
        keys(row, with_place=False) if task not in unknown and _has_place(row.config_json) else (task, config)
        for row, (task, config) in zip(rows, found, strict=True)
    ]
    contents: dict[str, dict[str, None]] = {}  # task -> the hashes of its data, oldest first
    for row, (task, _) in zip(rows, found, strict=True):
        if row.data_sha256 is not None:
            contents.setdefault(task, {})[row.data_sha256] = None
    several = {task: known for task, known in contents.items() if len(known) > 1}
    for known in several.values():
        log.warning(
            "the data have changed between runs with the same dataset_params: runs on data of %d different contents "
            "are kept apart, and their scores are not comparable (%s, oldest first)",
            len(known),
            ", ".join(f"data={content[:DATA_DIGITS]}" for content in known),
        )
    return [
        (_with_data(task, row.data_sha256) if task in several else task, config)
        for row, (task, config) in zip(rows, found, strict=True)
    ]


def without_data(task: str) -> str:
    """The key of a task without the hash that `keys_by_data` may have put into it."""
    return _without(task, ("data",)) or task


@lru_cache(maxsize=4096)
def _with_data(task: str, data_sha256: str | None) -> str:
    """The key of a task, with the beginning of the hash of its data."""
    return json.dumps({**stored_object(task), "data": (data_sha256 or "unknown")[:DATA_DIGITS]}, sort_keys=True)


def _has_place(config_json: str) -> bool:
    """Whether the text of a config names files."""
    return '"data_dir": "' in config_json or '"sources": ["' in config_json


@lru_cache(maxsize=4096)
def _task_key(text: str, with_place: bool) -> str | None:
    """The dataset parameters without `data_dir`. Cached: many runs have the same ones.

    The sources of a mix are a part of the task; without their place, only the names of their folders are.
    """
    task = _without(text, ("data_dir",))
    if task is None or with_place or '"sources": ["' not in task:
        return task
    section = stored_object(task)
    return json.dumps({**section, "sources": names_of_sources(section["sources"])}, sort_keys=True)


def names_of_sources(sources: Sequence[Any]) -> list[str]:
    """The names of folders or files, without the folders that they lie in."""
    return [PurePath(str(source)).name for source in sources]


@lru_cache(maxsize=4096)
def _training_key(text: str) -> str | None:
    """The training parameters that change what is computed."""
    return _without(text, OPERATIONAL)


def _without(text: str, names: Sequence[str]) -> str | None:
    """The JSON object of `text` without these keys; None if the text is no object."""
    section = stored_object(text)
    if not section and text.strip() != "{}":
        return None
    return json.dumps({key: value for key, value in section.items() if key not in names}, sort_keys=True)


# ------------------------------------------------------------------------------------------------- what differs


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """One dictionary for nested ones: the keys on the way are joined with dots."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each of these flat dictionaries the entries in which they differ."""
    texts = [{key: json.dumps(value, sort_keys=True) for key, value in section.items()} for section in sections]
    names = dict.fromkeys(name for section in sections for name in section)
    varied = [name for name in names if len({text.get(name) for text in texts}) > 1]
    return [{name: section[name] for name in varied if name in section} for section in sections]


def described(values: dict[str, Any]) -> str:
    """`seq_len=8, vocab_size=2`."""
    return ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
    )


def _labels(tasks: set[str]) -> dict[str, str]:
    """Task -> the parameters that tell it from the other tasks. Numbers are in numeric order."""
    if len(tasks) == 1:
        return dict.fromkeys(tasks, "")
    ordered = sorted(tasks)
    varied = dict(zip(ordered, differences([flat(stored_object(task)) for task in ordered]), strict=True))
    by_value = sorted(ordered, key=lambda task: [_sortable(value) for value in varied[task].values()])
    return {task: described(varied[task]) or "no parameters" for task in by_value}


def _sortable(value: Any) -> tuple[int, float, str]:
    """A key that puts numbers in numeric order, before all other values."""
    number = isinstance(value, int | float)
    return (0 if number else 1, value if number else 0.0, "" if number else json.dumps(value, sort_keys=True))
