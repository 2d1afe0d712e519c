"""A whole comparison: data, baselines, protocol, tables and files."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

from research_eval.analysis.tables import Table, bounds_of
from research_eval.comparing.match import check_axis
from research_eval.comparing.protocol import HERE, Place, Plan, compare, with_test_split
from research_eval.comparing.report import pairs_table, summary, write_files
from research_eval.comparing.verdicts import MARGIN, verdicts
from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.kinds import dataset_kind
from research_eval.datasets.providers import load_splits
from research_eval.errors import ConfigError
from research_eval.runs.data_block import data_block
from research_eval.system.phases import phase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """Where the results go, and what counts as equal and as solved."""

    folder: Path
    margin: float = MARGIN
    solved_at: float = 0.99

    def __post_init__(self) -> None:
        check_out(self.folder)
        if not 0 < self.margin < math.inf:
            raise ConfigError(f"--margin: expected a positive number, got {self.margin:g}")
        if not 0 < self.solved_at <= 1:
            raise ConfigError(f"--solved_at: expected a score above 0 and up to 1, got {self.solved_at:g}")


def check_out(folder: Path) -> None:
    """Raise ConfigError, before anything is trained, where results cannot be written."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ConfigError(f"--out: {str(there)!r} is not a folder. Give another place.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--out: nothing may be written in {str(there)!r}. Give another place, or change its rights.")


def compare_and_report(
    base: ExperimentConfig, plan: Plan, report: Report, place: Place = HERE
) -> tuple[list[Table], list[Path]]:
    """Compare the models of the plan; returns the tables and the files that were written. Raises as `compare`."""
    check_axis(plan.axis)
    with phase("reading the data"):
        base = with_test_split(base)
        data = load_splits(base.dataset_type, base.dataset_name, base.dataset_params, base.seed)
    log.info("%s", "\n".join(data_block(base.dataset_name, data)))
    _fit_baselines(base)
    outcome = compare(base, plan, data, place)
    scores = {arm.name: outcome.scores(arm) for arm in outcome.arms}
    noise = {arm.name: outcome.noise(arm) for arm in outcome.arms}
    found = verdicts(
        scores, sign=outcome.sign, margin=report.margin, bounds=bounds_of(outcome.test_metric), noise=noise
    )
    paths = write_files(report.folder, outcome, found, place.db, report.solved_at, report.margin)
    return [summary(outcome, report.solved_at), pairs_table(outcome, found, report.margin)], paths


def _fit_baselines(base: ExperimentConfig) -> None:
    """Fit TF-IDF with logistic regression to texts, so that it stands in the table. Without scikit-learn say so."""
    if base.dataset_type != "real_world":
        return
    try:
        dataset_kind(base.dataset_type).fit_baselines(base.dataset_name, base.dataset_params)
    except ConfigError as problem:
        log.warning("the table has no rows for TF-IDF: %s", problem)
