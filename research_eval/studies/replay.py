"""Replay: run a finished run again, from its row alone, and compare the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from research_eval.errors import ConfigError
from research_eval.store.changes import (
    MISSING,
    Change,
    MetricDifference,
    environment_changes,
    json_object,
    metric_differences,
)
from research_eval.store.find import find_run
from research_eval.store.metrics import OLD_COUNTS, is_measured
from research_eval.store.store import Store

if TYPE_CHECKING:
    from research_eval.experiment import Result


@dataclass(frozen=True)
class Replay:
    """A run and its repetition. The comparisons are empty if the repetition did not finish.

    `num_compared` metrics were compared, `num_measured` were left out because a clock or the operating system measured
    them. Metrics under the names of old counts are left out too: no present run has them.
    """

    original: str
    result: Result
    differences: list[MetricDifference]
    environment: list[Change]
    num_compared: int = 0
    num_measured: int = 0

    @property
    def largest(self) -> MetricDifference | None:
        """The largest difference of a metric that both runs have."""
        both = [pair for pair in self.differences if pair.left is not MISSING and pair.right is not MISSING]
        return max(both, key=lambda pair: pair.difference, default=None)

    def exceeds(self, tolerance: float) -> bool:
        """Whether a metric differs by more than the tolerance or is missing in the repetition.

        A metric that only the repetition has does not count: a newer program may measure more.
        """
        return any(pair.difference > tolerance for pair in self.differences if pair.left is not MISSING)


def replay(run_id: str, *, db: str | None = None, device: str | None = None, quiet: bool = False) -> Replay:
    """Run a finished run again, as its child, and compare. Raises ConfigError for a run without metrics.

    The stored config is complete, so the row is enough. A key that it lacks is newer than the run and gets its default.
    """
    with Store(db, read_only=True) as store:
        row = find_run(store, run_id)
        metrics = store.metrics(row["experiment_id"])
    original = row["experiment_id"]
    if row["status"] != "finished" or not metrics:
        state = row["status"] if row["status"] != "finished" else "finished, but without metrics"
        raise ConfigError(f"run {original} is {state}: there is nothing to compare a replay with")
    result = _run_again(row, db, device, quiet)
    with Store(db, read_only=True) as store:
        again = store.experiment(result.experiment_id)
        repeated = store.metrics(result.experiment_id)
    environment = environment_changes(json_object(row["env_details_json"]), json_object(again["env_details_json"]))
    if result.status != "finished":
        return Replay(original, result, [], environment)
    return _compared(original, result, metrics, repeated, environment)


def _run_again(row: dict[str, Any], db: str | None, device: str | None, quiet: bool) -> Result:
    """Run the stored config, on another device if one is given."""
    from research_eval.config.check import stored_config
    from research_eval.experiment import run  # here, because it imports torch, and a refusal must not wait for that
    from research_eval.studies.original_trials import config_of, is_adopted

    original = row["experiment_id"]
    stored = config_of(row) if is_adopted(row) else json_object(row["full_config_json"])
    config = stored_config(stored, source=f"run {original}")
    if device is not None:
        settings = config.to_dict()
        settings["training_params"]["device"] = device
        config = stored_config(settings, source=f"run {original} with --device {device}")
    return run(config, db=db, quiet=quiet, parent_id=original)


def _compared(
    original: str, result: Result, metrics: dict[str, Any], repeated: dict[str, Any], environment: list[Change]
) -> Replay:
    """Compare all metrics except those that a clock or the operating system measured."""
    before, after = (
        {name: value for name, value in side.items() if not is_measured(name) and name not in OLD_COUNTS}
        for side in (metrics, repeated)
    )
    return Replay(
        original,
        result,
        metric_differences(before, after),
        environment,
        num_compared=len(before.keys() & after.keys()),
        num_measured=sum(map(is_measured, metrics)),
    )
