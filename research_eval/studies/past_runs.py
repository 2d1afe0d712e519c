"""Past runs as the start of new configs: which are still valid, which compute the same, which are the best.

Two configs with the same `identity` compute the same apart from the seed. Their runs are seeds of one experiment, so
that their mean decides how good the config is, and neither of them is a new config for the other.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from research_eval.analysis.runs import OPERATIONAL, enough_seeds, names_of_sources
from research_eval.config.check import stored_config
from research_eval.config.sections import ExperimentConfig
from research_eval.errors import ConfigError
from research_eval.store.metrics import gain_sign
from research_eval.store.records import RunRow
from research_eval.store.values import canonical_json
from research_eval.studies.perturbation import Config
from research_eval.system.untrusted import stored_object

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PastRun:
    """A run with its complete config and its value of the metric; NaN if it has none, or if it did not finish."""

    run_id: str
    config: Config
    value: float
    data_sha256: str | None = None  # None if it is unknown

    @property
    def identity(self) -> str:
        """Equal for runs that compute the same, apart from the seed."""
        return identity(self.config)

    @property
    def experiment(self) -> str:
        """Equal for runs that are seeds of one experiment: as `identity`, but equal data may lie in other places."""
        if self.data_sha256 is None:
            return self.identity
        return self.data_sha256 + identity({**self.config, "dataset_params": self._placeless()})

    @property
    def task(self) -> str:
        """Equal for runs with the same data parameters, wherever the files are."""
        return canonical_json(self._placeless())

    def _placeless(self) -> dict[str, Any]:
        """The data parameters without the place of the files; of the sources of a mix only the names, if known."""
        params = {key: value for key, value in self.config["dataset_params"].items() if key != "data_dir"}
        if self.data_sha256 is not None and isinstance(params.get("sources"), list):
            params["sources"] = names_of_sources(params["sources"])
        return params


@dataclass(frozen=True)
class Template:
    """A past config that does well: its runs with different seeds (the newest of each seed), and their mean value."""

    config: ExperimentConfig
    runs: list[PastRun]
    mean: float


def past_runs(rows: Iterable[RunRow], metric: str) -> list[PastRun]:
    """The runs whose configs the program still accepts, oldest first, without runs on older versions of their data.

    A stored config is complete, unless an earlier version of the program stored it. Then the defaults of the missing
    parameters are filled in.
    """
    found: list[PastRun] = []
    complete: set[str] = set()  # keys of configs that a check has found complete; a check is a hundred times slower
    refused: list[str] = []
    for row in rows:
        config = stored_object(row.config_json)
        if _keys(config) not in complete:
            try:
                checked = stored_config(config, source=f"run {row.experiment_id}").to_dict()
            except ConfigError as error:
                refused.append(str(error))
                continue
            if _keys(checked) == _keys(config):
                complete.add(_keys(config))
            config = checked
        # A run that did not finish still counts as known, but its value must not rank a config.
        value = row.metrics.get(metric, math.nan) if row.status == "finished" else math.nan
        found.append(PastRun(row.experiment_id, config, value, row.data_sha256))
    if refused:
        log.warning("%d runs have configs that the program does not take, the first:\n%s", len(refused), refused[0])
    return _on_newest_data(found)


def _on_newest_data(past: Sequence[PastRun]) -> list[PastRun]:
    """The runs whose data are those of the newest run with the same data parameters. Says how many others there are.

    A run whose data are unknown stays, unless the data have changed between runs.
    """
    contents: dict[str, dict[str, None]] = {}
    newest: dict[str, str] = {}
    for run in past:
        if run.data_sha256 is not None:
            contents.setdefault(run.task, {})[run.data_sha256] = None
            newest[run.task] = run.data_sha256
    kept = [run for run in past if len(contents.get(run.task, ())) < 2 or run.data_sha256 == newest[run.task]]
    if len(kept) < len(past):
        log.warning(
            "%d runs are left out: the content of their data is not that of the newest run", len(past) - len(kept)
        )
    return kept


def _keys(config: Config) -> str:
    """The keys of a config and of its sections as one text."""
    return canonical_json({key: sorted(value) if isinstance(value, dict) else None for key, value in config.items()})


def identity(config: Config) -> str:
    """A text that is equal for complete configs that compute the same, apart from the seed."""
    kept = {key: value for key, value in config.items() if key not in ("seed", "experiment_name")}
    training = {key: value for key, value in config["training_params"].items() if key not in OPERATIONAL}
    return canonical_json({**kept, "training_params": training})


def find_templates(past: Sequence[PastRun], metric: str, top_n: int) -> list[Template]:
    """The `top_n` best different configs by the mean over their seeds, best first; of equal ones the older first.

    One lucky seed does not win: the configs with `enough_seeds` for their task come first, as in the analysis.
    """
    seeds: dict[str, dict[int, PastRun]] = {}
    for run in past:
        if math.isfinite(run.value):
            seeds.setdefault(run.experiment, {})[run.config["seed"]] = run
    groups = [[by_seed[seed] for seed in sorted(by_seed)] for by_seed in seeds.values()]
    most: Counter[str] = Counter()  # seeds of a config, by task
    for runs in groups:
        most[runs[0].task] = max(most[runs[0].task], len(runs))

    def rank(one: tuple[float, list[PastRun]]) -> tuple[bool, float]:
        mean, runs = one
        return len(runs) < enough_seeds(most[runs[0].task]), -gain_sign(metric) * mean

    means = [(fmean(run.value for run in runs), runs) for runs in groups]
    ranked = sorted(means, key=rank)
    better = min(means, key=lambda one: rank(one)[1], default=None)
    if better is not None and better[0] != ranked[0][0]:
        run_id, count = better[1][0].run_id, len(better[1])
        log.info("run %s has the best %s, but %d seed(s) only: configs with more come first", run_id, metric, count)
    templates = [
        Template(stored_config(runs[0].config, f"run {runs[0].run_id}"), runs, mean) for mean, runs in ranked[:top_n]
    ]
    tasks = {template.runs[0].task for template in templates}
    if len(tasks) > 1:
        log.warning("the best configs have %d different dataset_params: their scores do not compare", len(tasks))
    return templates
