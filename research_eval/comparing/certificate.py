"""The certificate of a comparison: what was done, what was found and which rules held, for programs; and its check.

A check trains one cell (an arm with a seed) again from the certificate alone, and compares its test score.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from research_eval.analysis.statistics import mean_interval
from research_eval.analysis.tables import bounds_of
from research_eval.comparing.protocol import FIRST_TUNING_SEED, Outcome, cell_config
from research_eval.comparing.verdicts import Verdict
from research_eval.config.check import stored_config
from research_eval.errors import ConfigError
from research_eval.store.store import Store
from research_eval.system.untrusted import parse_json, read_limited, stored_object

VERSION = 1
MAX_BYTES = 20_000_000
PROGRAM = ("versions", "git_commit", "git_dirty", "python_version", "cpu_model")  # of the environment record
SAME = 1e-9  # relative difference of scores that counts as none


def certificate(store: Store, outcome: Outcome, found: Sequence[Verdict], margin: float) -> dict[str, Any]:
    """The certificate as JSON holds it."""
    plan = outcome.plan
    rows = {
        arm.name: [store.find_id(run.experiment_id) or {} for run in outcome.results[arm.name]] for arm in outcome.arms
    }
    most_runs = max(len(trial.experiment_ids) for arm in outcome.arms for trial in arm.trials)
    environment = stored_object(rows[outcome.arms[0].name][0].get("env_details_json"))
    return {
        "certificate_version": VERSION,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "program": {name: environment.get(name) for name in PROGRAM},
        "dataset_name": outcome.base.dataset_name,
        "data_sha256": sorted({str(row.get("data_sha256")) for own in rows.values() for row in own}),
        "axis": plan.axis,
        "tolerance": plan.tol,
        "tuning_metric": outcome.metric,
        "test_metric": outcome.test_metric,
        "seeds": list(range(plan.num_seeds)),
        "tuning_seeds": [FIRST_TUNING_SEED + number for number in range(most_runs)],
        "rates_added": outcome.num_added,
        "lengthened": outcome.num_lengthened,
        "arms": [_arm(outcome, number, rows) for number in range(len(outcome.arms))],
        "margin": margin,
        "comparisons": [_finite(asdict(one)) for one in found],
        "baselines": outcome.baselines(),
        "contracts": contracts(store, outcome, rows),
    }


def _arm(outcome: Outcome, number: int, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    arm = outcome.arms[number]
    found, scores = outcome.matches[arm.name], outcome.scores(arm)
    complete = all(map(math.isfinite, scores))
    return {
        "name": arm.name,
        "config": arm.configured().to_dict(),
        "cost": found.cost,
        "cost_of_base": found.target,
        "is_matched": found.is_matched,
        "trials": [_finite(asdict(trial)) for trial in arm.trials],
        "chosen": dict(arm.best.changes),
        "at_the_edge": arm.edge != 0,
        "still_learning": arm.best.is_learning,
        "mean": fmean(scores) if complete else None,
        "interval": mean_interval(scores, bounds=bounds_of(outcome.test_metric)) if complete else None,
        "cells": [
            {
                "seed": seed,
                "experiment_id": run.experiment_id,
                "status": run.status,
                "score": score if math.isfinite(score) else None,
                "data_sha256": row.get("data_sha256"),
            }
            for seed, (run, score, row) in enumerate(
                zip(outcome.results[arm.name], scores, rows[arm.name], strict=True)
            )
        ],
    }


def contracts(store: Store, outcome: Outcome, rows: dict[str, list[dict[str, Any]]]) -> dict[str, bool]:
    """The rules of a fair comparison, and whether each held, by what the store says of the runs."""
    arms = outcome.arms
    reported = {row.get("seed") for own in rows.values() for row in own}
    trials = [store.find_id(run) or {} for arm in arms for trial in arm.trials for run in trial.experiment_ids]
    return {
        "every arm is matched": all(outcome.matches[arm.name].is_matched for arm in arms),
        "every arm has the same number of trials": len({len(arm.trials) for arm in arms}) == 1
        and len({sum(len(trial.experiment_ids) for trial in arm.trials) for arm in arms}) == 1,
        "no trial had a reported seed": all(row.get("seed") not in reported for row in trials),
        "no trial scored the test split": not any(_scores_test(row) for row in trials),
        "every seed has the same data in all arms": all(
            len({row.get("data_sha256") for row in of_seed}) == 1 for of_seed in zip(*rows.values(), strict=True)
        ),
        "every reported run has finished": all(
            run.status == "finished" for arm in arms for run in outcome.results[arm.name]
        ),
        "no best rate is at an end of the grid": not any(arm.edge for arm in arms),
        "no arm is still learning at the end": not any(arm.best.is_learning for arm in arms),
    }


def _scores_test(row: dict[str, Any]) -> bool:
    """Whether the config of a run scores the test split."""
    options = stored_object(row.get("full_config_json")).get("training_params")
    return not isinstance(options, dict) or bool(options.get("test", False))


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------------------------------------------- check


@dataclass(frozen=True)
class Checked:
    """A cell that was trained again."""

    arm: str
    seed: int
    stored: float
    repeated: float | None
    interval: Sequence[float] | None
    has_same_data: bool

    @property
    def is_same(self) -> bool:
        """Whether the score is the stored one, apart from rounding."""
        return self.repeated is not None and math.isclose(self.repeated, self.stored, rel_tol=SAME)

    @property
    def holds(self) -> bool:
        """Whether the score is the stored one, or at least lies in the interval of its arm, on the same data."""
        within = self.interval is not None and self.repeated is not None
        inside = within and self.interval[0] <= self.repeated <= self.interval[1]  # type: ignore[index,operator]
        return self.has_same_data and (self.is_same or inside)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Cell(_Strict):
    seed: int
    score: float | None
    data_sha256: str | None


class _Arm(_Strict):
    name: str
    config: dict[str, Any]
    is_matched: bool
    mean: float | None
    interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    cells: list[_Cell]


class _Pair(_Strict):
    first: str
    second: str
    text: str


class _Certificate(_Strict):
    """What readers of a certificate need."""

    test_metric: str
    arms: list[_Arm]
    comparisons: list[_Pair]


def read_certificate(path: Path) -> dict[str, Any]:
    """Read a certificate. Raises ConfigError for a file that is none."""
    content = parse_json(read_limited(path, MAX_BYTES, "a certificate"), str(path))
    if not isinstance(content, dict) or content.get("certificate_version") != VERSION:
        raise ConfigError(f"{path}: expected a certificate of version {VERSION} that `goe compare` has written")
    try:
        _Certificate.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path}: the certificate is damaged: {place}: {first['msg']}. Run the comparison again."
        ) from error
    return content


def verify(path: Path, cells: int, quiet: bool) -> list[Checked]:
    """Train random cells of a certificate again, in a results store that is thrown away. Raises ConfigError."""
    content = read_certificate(path)
    known = [(arm, cell) for arm in content["arms"] for cell in arm["cells"] if cell["score"] is not None]
    if not known:
        raise ConfigError(f"{path}: no seed in it has a score, so there is nothing to check. Run the comparison again.")
    chosen = random.sample(known, min(cells, len(known)))
    return [_checked(arm, cell, content["test_metric"], path, quiet) for arm, cell in chosen]


def _checked(arm: dict[str, Any], cell: dict[str, Any], metric: str, path: Path, quiet: bool) -> Checked:
    from research_eval.experiment import run

    config = cell_config(stored_config(arm["config"], f"{path}: {arm['name']}"), cell["seed"])
    with tempfile.TemporaryDirectory() as folder:
        db = f"{folder}/verify.db"
        result = run(config, db=db, quiet=quiet, to_csv=False, show_data=False)
        shutil.rmtree(result.folder)  # of the store that is thrown away
        if result.exit_code > 128:
            raise KeyboardInterrupt(result.exit_code - 128)
        with Store(db, read_only=True) as store:
            data = store.experiment(result.experiment_id)["data_sha256"]
    repeated = result.metrics.get(metric)
    same_data = data == cell["data_sha256"]
    return Checked(arm["name"], cell["seed"], cell["score"], repeated, arm["interval"], same_data)
