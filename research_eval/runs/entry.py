"""The row of a run in the store: a new row, or the row of an earlier process that the run continues."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError
from research_eval.files import run_folder
from research_eval.runs.folder import new_id
from research_eval.runs.journal import Result, Watch, csv_row, start_row
from research_eval.store.csv_file import CSV_FILE, append_csv
from research_eval.store.pending import with_retries
from research_eval.store.store import Store
from research_eval.system.environment import environment_record
from research_eval.training.checkpoint import checkpoint_exists
from research_eval.training.checkpointer import CHECKPOINT_FILE
from research_eval.training.runtime import Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialRun:
    """A run that belongs to a study's trial, under an id that the study has stored before. A resume keeps this id.

    `watch` receives the number of every evaluated epoch and its scores (`val_loss` and those of the task). It may raise
    Pruned.
    """

    study: str
    number: int
    experiment_id: str
    watch: Watch


class RunEntry:
    """Finds the row that a run continues, or creates a new one.

    With `resume`, it is the newest row of the same config; with a `trial`, the row with the trial's id.
    """

    def __init__(
        self,
        store: Store,
        config: ExperimentConfig,
        resume: bool = False,
        parent_id: str | None = None,
        trial: TrialRun | None = None,
    ) -> None:
        self._store, self._config, self._resume = store, config, resume
        self._parent_id, self._trial = parent_id, trial
        self._known = store.find_experiment(config.to_dict()) if resume else None
        if trial is not None:
            self._known = store.find_id(trial.experiment_id)
        ids = (self._known["experiment_id"] if self._known else None, trial.experiment_id if trial else None)
        self.experiment_id: str = next((name for name in ids if name), None) or new_id()

    def result_if_finished(self) -> Result | None:
        """The result of a run that is already finished; None if there is something left to do."""
        if self._known is None or self._known["status"] != "finished":
            return None
        name = self.experiment_id
        log.info("run %s of this config is finished: nothing to resume", name)
        result = Result(name, "finished", self._store.metrics(name), run_folder(name))
        if self._trial is None:  # the row may be missing, for example after a full disk
            append_csv(CSV_FILE, csv_row(self._config, result), unless_known=("experiment_id", "status"))
        return result

    def begin(self, runtime: Runtime, data: DataSplits, folder: Path) -> None:
        """Mark the run as running in the store. Raises ConfigError if it started on other data.

        The data only need to be the same if there is a checkpoint to continue from.
        """
        environment = {**environment_record(str(runtime.device)), "data": data.fingerprint}
        if self._trial is not None:
            environment["study"] = {"name": self._trial.study, "trial": self._trial.number}
        store, name = self._store, self.experiment_id
        if self._known is not None:
            if checkpoint_exists(folder / CHECKPOINT_FILE):
                check_same_data(self._known, data)
            log.info("resuming run %s", name)
            with_retries(lambda: store.set_status(name, "running"))
            with_retries(lambda: store.update_environment(name, environment))
            return
        if self._resume:
            log.info("no earlier run of this config to resume: starting a new one")
        # `find_experiment` ignores trials, so that a resume of the same config never continues one.
        run_type = "json" if self._trial is None else "optuna_trial"
        with_retries(lambda: start_row(store, name, self._config, environment, run_type, self._parent_id))


def check_same_data(known: dict[str, Any], data: DataSplits) -> None:
    """Raise ConfigError if a run started on other data, by the hashes of its splits.

    A row without hashes, from an older version, passes.
    """
    try:
        hashes = dict(json.loads(known["env_details_json"])["data"]["sha256"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return  # the row has no hashes
    for split, now in data.fingerprint.get("sha256", {}).items():
        if split in hashes and hashes[split] != now:
            raise ConfigError(
                f"run {known['experiment_id']}: its {split} split is not what it was begun on (sha256 {now[:12]}, then "
                f"{str(hashes[split])[:12]}). Put the data back as they were, or start a new run without --resume."
            )
