"""A suite: the same comparison on many tasks, with a ledger of what is done.

A suite is a file. Its ledger says for each task with which code, config and data it was done; a task that is done is
skipped, one that failed is tried again, and a drift of code, config or data is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

import research_eval
from research_eval.analysis.statistics import Interval
from research_eval.analysis.tables import Table, bounds_of, interval_text, metric_text
from research_eval.comparing.match import Axis
from research_eval.config.jsonc import read_object, read_text
from research_eval.errors import ConfigError
from research_eval.files import write_atomically
from research_eval.registry import extension_files
from research_eval.store.metrics import gain_sign
from research_eval.system.untrusted import parse_json, read_limited
from research_eval.wording import hint

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "suites"
LEDGER = "ledger.json"
MAX_LEDGER = 20_000_000
DRAWS = 2000  # of the bootstrap


class Task(BaseModel):
    """One comparison of a suite: a config, as in a file, and the family that its scores are pooled with."""

    model_config = ConfigDict(strict=True, extra="forbid")
    name: Annotated[str, Field(min_length=1, max_length=80)]
    family: Annotated[str, Field(min_length=1, max_length=80)]
    config: dict[str, Any]


class Suite(BaseModel):
    """A suite file. Without `models` every registered model takes part, apart from those of `exclude`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    name: Annotated[str, Field(min_length=1, max_length=80)]
    description: str = ""
    models: Annotated[list[str], Field(min_length=2)] | None = None
    exclude: list[str] = []
    axis: Axis = "flops"
    tol: Annotated[float, Field(gt=0, lt=1)] = 0.02
    seeds: Annotated[int, Field(ge=1)] = 5
    tuning: Annotated[int, Field(ge=3)] = 8
    tuning_seeds: Annotated[int, Field(ge=1)] = 1
    confirm: Annotated[int, Field(ge=0)] = 2
    max_lengthened: Annotated[int, Field(ge=0)] = 1
    controls: bool = False
    solved_at: Annotated[float, Field(gt=0, le=1)] = 0.99
    margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
    tasks: Annotated[list[Task], Field(min_length=1)]


def suite_names() -> list[str]:
    """The suites that come with the program."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_suite(name: str) -> Suite:
    """A suite of this name, or of this file. Raises ConfigError."""
    path = FOLDER / f"{name}.json" if name in suite_names() else Path(name)
    if not path.is_file():
        known = ", ".join(suite_names())
        raise ConfigError(f"NAME: {name!r} is no file and no suite; there are {known}.{hint(name, suite_names())}")
    data, _, _ = read_object(read_text(path), str(path))
    data.pop("$schema", None)
    try:
        found = Suite.model_validate(data)
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ConfigError("\n".join(lines)) from error
    names = [task.name for task in found.tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: tasks: two of them have one name")
    return found


# -------------------------------------------------------------------------------------------------------------- ledger


@dataclass(frozen=True)
class Done:
    """A task of the ledger."""

    status: str  # "done" or "failed"
    fingerprint: dict[str, str]
    error: str = ""


class Ledger:
    """What is done of a suite, in a file of its folder. It is written after every task."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LEDGER
        self.tasks: dict[str, Done] = {}
        if self._path.is_file():
            content = parse_json(read_limited(self._path, MAX_LEDGER, "a ledger"), str(self._path))
            try:
                self.tasks = TypeAdapter(dict[str, Done]).validate_python(content["tasks"])
            except (KeyError, TypeError, ValidationError) as error:
                raise ConfigError(f"{self._path}: no ledger of a suite. Move it away to begin anew.") from error

    def drift(self, name: str, fingerprint: Mapping[str, str]) -> list[str]:
        """What is another one than when the task was done: "code", "config", "data"."""
        known = self.tasks.get(name)
        if known is None or known.status != "done":
            return []
        return [part for part, value in fingerprint.items() if known.fingerprint.get(part) != value]

    def is_done(self, name: str) -> bool:
        """Whether the task need not be done again."""
        return name in self.tasks and self.tasks[name].status == "done"

    def forget(self, name: str) -> None:
        """Do the task again."""
        self.tasks.pop(name, None)

    def note(self, name: str, done: Done) -> None:
        """Write how a task ended."""
        self.tasks[name] = done
        content = {"tasks": {name: one.__dict__ for name, one in self.tasks.items()}}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(content, indent=1).encode())


def code_sha256() -> str:
    """A hash of the source of the package, and of the files in the folders of GOE_EXTENSIONS."""
    root = Path(research_eval.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    for path in extension_files():
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def config_sha256(suite: Suite, task: Task, config: Mapping[str, Any]) -> str:
    """A hash of everything in the suite that a task's result depends on."""
    # Results from before there was `confirm` had no such runs.
    plan = suite.model_dump(exclude={"tasks", "name", "description", *(() if suite.confirm else ("confirm",))})
    text = json.dumps([plan, task.name, dict(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def carry_out(
    names: Sequence[str],
    ledger: Ledger,
    fingerprint_of: Callable[[str], dict[str, str]],
    work: Callable[[str], None],
    allow_drift: bool,
) -> list[str]:
    """Do what is not done, one task after the other. Returns the names of those that failed.

    Raises ConfigError before any work if code, config or data of a task that is done have changed.
    """
    fingerprints = {name: fingerprint_of(name) for name in names}
    changed = {name: parts for name in names if (parts := ledger.drift(name, fingerprints[name]))}
    if changed and not allow_drift:
        lines = [f"  {name}: another {', '.join(parts)}" for name, parts in changed.items()]
        raise ConfigError(
            "tasks of this suite were done with something else than there is now:\n" + "\n".join(lines) + "\n"
            "Give another --out to begin anew, or --allow_drift to keep their results."
        )
    failed = []
    for name in names:
        if ledger.is_done(name):
            log.info("%s: done before", name)
            continue
        try:
            work(name)
        except (ConfigError, RuntimeError, OSError, MemoryError) as problem:
            log.error("%s: %s", name, problem)
            ledger.note(name, Done("failed", fingerprints[name], str(problem)))
            failed.append(name)
            continue
        ledger.note(name, Done("done", fingerprints[name]))
    return failed


# ----------------------------------------------------------------------------------------------------------- aggregates


def interquartile_mean(scores: NDArray[np.float64]) -> float:
    """The mean of the middle half of all values, with parts of values at its ends (Agarwal et al., 2021).

    >>> interquartile_mean(np.array([0.0, 1.0, 2.0, 3.0, 100.0]))
    2.0
    """
    ordered = np.sort(scores.ravel())
    places = np.arange(len(ordered) + 1) / len(ordered)
    weights = np.clip(np.minimum(places[1:], 0.75) - np.maximum(places[:-1], 0.25), 0, None)
    return float(ordered @ weights / weights.sum())


def bootstrap(
    scores: Sequence[NDArray[np.float64]], statistic: Callable[[NDArray[np.float64]], float], seed: int = 0
) -> Interval:
    """The 95 % percentile interval of a statistic over tasks. Seeds are drawn within each task (stratified)."""
    rng = np.random.default_rng(seed)
    draws = [statistic(np.concatenate([rng.choice(own, len(own)) for own in scores])) for _ in range(DRAWS)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(low), float(high))


def aggregate_table(title: str, certificates: Mapping[str, dict[str, Any]], families: Mapping[str, str]) -> Table:
    """A row for each model and family of tasks, and for each model over all: IQM and mean of the test scores."""
    found: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    left_out: dict[str, None] = {}
    for task, content in certificates.items():
        for arm in content["arms"]:
            scores = [cell["score"] for cell in arm["cells"]]
            if None in scores or bounds_of(content["test_metric"]) is None:
                left_out[f"{arm['name']} on {task}"] = None
                continue
            for family in (families[task], "all"):
                found.setdefault((family, arm["name"]), []).append(np.array(scores, float))
    rows = []
    for family in [*dict.fromkeys(families.values()), "all"]:
        for (its_family, arm), scores in found.items():
            if its_family == family:
                whole = np.concatenate(scores)
                iqm, mean = interquartile_mean(whole), float(whole.mean())
                rows.append(
                    [
                        *(family, arm, str(len(scores)), metric_text(iqm, "test_f1")),
                        interval_text(bootstrap(scores, interquartile_mean), "test_f1"),
                        metric_text(mean, "test_f1"),
                        interval_text(bootstrap(scores, lambda values: float(values.mean())), "test_f1"),
                    ]
                )
    notes = [
        "IQM: mean of the middle half of all tasks and seeds. Intervals: stratified bootstrap over seeds within tasks.",
        *(
            [f"Left out, because a seed did not finish or the score is no share: {', '.join(left_out)}."]
            if left_out
            else []
        ),
    ]
    columns = ["family", "arm", "tasks", "IQM", "95 % interval", "mean", "95 % interval of the mean"]
    return Table(title, columns, rows, ("family", "arm"), notes)


def task_table(certificates: Mapping[str, dict[str, Any]]) -> Table:
    """A row for each task: the mean test score of each arm, and the claims that the tests allow."""
    arms = list(dict.fromkeys(arm["name"] for content in certificates.values() for arm in content["arms"]))
    rows, bold = [], set()
    for number, (task, content) in enumerate(certificates.items()):
        means = {arm["name"]: arm["mean"] for arm in content["arms"]}
        marks = {arm["name"]: "" if arm["is_matched"] else " (not matched)" for arm in content["arms"]}
        cells = [
            "" if means.get(arm) is None else metric_text(means[arm], content["test_metric"]) + marks[arm]
            for arm in arms
        ]
        known = [(means[arm], place) for place, arm in enumerate(arms) if means.get(arm) is not None]
        if known:
            sign = gain_sign(content["test_metric"])
            bold.add((number, 1 + max((sign * mean, place) for mean, place in known)[1]))
        rows.append([task, *cells, _claims(content["comparisons"])])
    notes = ["Claims: paired t-tests over seeds, Holm-adjusted within a task."]
    return Table("Mean test scores", ["task", *arms, "claims"], rows, ("task", "claims"), notes, frozenset(bold))


def _claims(comparisons: Sequence[dict[str, Any]]) -> str:
    """Which arm is better than which others, as the tests allow to say."""
    beaten: dict[str, list[str]] = {}
    for one in comparisons:
        for winner, loser in ((one["first"], one["second"]), (one["second"], one["first"])):
            if one["text"] == f"{winner} is better":
                beaten.setdefault(winner, []).append(loser)
    return "; ".join(f"{winner} above {', '.join(losers)}" for winner, losers in beaten.items())
