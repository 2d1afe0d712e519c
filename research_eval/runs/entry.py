"""The row of a run in the store: a new row, or the row of an earlier process that the run continues."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_eval.config.defaults import stored_forms
from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.providers import load_splits
from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError
from research_eval.files import run_folder
from research_eval.runs.continuation import Continuation, earlier_run, say_what_differs
from research_eval.runs.data_block import data_block
from research_eval.runs.folder import new_id
from research_eval.runs.journal import Result, Watch, csv_row, start_row
from research_eval.runs.predict import read_description, read_tokenizer
from research_eval.runs.prepare import Prepared
from research_eval.store.csv_file import append_if_possible, csv_accepts_rows
from research_eval.store.data_facts import baselines_of, facts_of
from research_eval.store.pending import with_retries
from research_eval.store.store import Store
from research_eval.store.tables import CONTINUES, FIRST_ATTEMPT
from research_eval.system.environment import environment_record
from research_eval.system.untrusted import in_folder, stored_object
from research_eval.training.checkpoint import checkpoint_exists
from research_eval.training.checkpointer import CHECKPOINT_FILE
from research_eval.training.optimizers import steps_per_epoch
from research_eval.training.runtime import Runtime

log = logging.getLogger(__name__)

NO_SPLIT = "none"  # instead of a hash


@dataclass(frozen=True)
class TrialRun:
    """A run that belongs to a study's trial, under an id that the study has stored before. A resume keeps this id.

    `watch` receives the number of every evaluated epoch and its scores (`val_loss` and those of the task). It may raise
    Pruned. `check_data` receives the fingerprint of the data before the training. It raises ConfigError for data that
    differ from those of other trials.
    """

    study: str
    number: int
    experiment_id: str
    watch: Watch
    check_data: Callable[[dict[str, Any]], None] = lambda _: None
    run_type: str = "optuna_trial"


class RunEntry:
    """Finds the row that a run continues, or creates a new one.

    With `resume`, it is the newest row of the same config on the same data; with a `trial`, the row with the trial's
    id. Without such a row, a resumed run may continue one of other epochs (`continuation`), in a row of its own.
    `data` are the splits, if the search for a row had to load them.
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
        self.data: DataSplits | None = None
        self._earlier: Continuation | None = None
        self._known = self._row_to_resume() if resume else None
        if trial is not None:
            self._known = store.find_id(trial.experiment_id)
            _check_not_deleted(self._known)
        ids = (self._known["experiment_id"] if self._known else None, trial.experiment_id if trial else None)
        self._keep_tokenizer()
        self.experiment_id: str = next((name for name in ids if name), None) or new_id()

    def _row_to_resume(self) -> dict[str, Any] | None:
        """The newest row of this config whose data are the present ones. Says so if there are only rows on other data.

        An unfinished run on other data is returned all the same: `begin` refuses to continue its training.
        """
        config = self._config
        rows = self._store.find_experiments(*stored_forms(config.to_dict()))
        if not rows:
            self._earlier = earlier_run(self._store, config)
            if self._earlier is None:
                say_what_differs(self._store, config)
            return None
        newest = rows[0]
        try:
            self.data = load_splits(config.dataset_type, config.dataset_name, config.dataset_params, config.seed)
        except ConfigError as problem:
            if newest["status"] != "finished":
                raise
            log.warning(
                "run %s: its data cannot be compared with the present ones: %s", newest["experiment_id"], problem
            )
            return newest
        for row in rows:
            if changed_split(row, self.data) is None:
                if self.data.fingerprint.get("sha256") and not _split_hashes(row):
                    log.warning("run %s: an earlier version did not store what its data were", row["experiment_id"])
                return row
        if newest["status"] != "finished":
            return newest
        split, now, then = changed_split(newest, self.data) or ("", "", "")
        log.warning(
            "run %s of this config is finished, but its data were other ones (%s split: sha256 %s, now %s): a new run "
            "is trained on the present data",
            *(newest["experiment_id"], split, then[:12], now[:12]),
        )
        return None

    def _keep_tokenizer(self) -> None:
        """Load the data with the tokenizer of the run that this one continues or repeats, if it has another one.

        An earlier version of the program may have trained another tokenizer on the same texts. The weights of a
        checkpoint belong to the ids of their own tokenizer.
        """
        row, config = self._known, self._config
        origin = self._parent_id if self._earlier is None else self._earlier.run_id
        if row is None and origin is not None:
            row = self._store.find_id(origin)
        folder = None if row is None else run_folder(row["experiment_id"])
        if row is None or folder is None or not in_folder(folder, "tokenizer.json").exists():
            return
        if row is self._known and (row["status"] == "finished" or not checkpoint_exists(folder / CHECKPOINT_FILE)):
            return
        source = config.dataset_type, config.dataset_name, config.dataset_params, config.seed
        self.data = self.data or load_splits(*source)
        known, present = (found.get("tokenizer_sha256") for found in (_fingerprint(row), self.data.fingerprint))
        if self.data.tokenizer is None or present == known or changed_split(row, self.data) is not None:
            return
        tokenizer = read_tokenizer(folder, read_description(folder)["vocab_size"])
        trained = self.data.tokenizer
        if tokenizer is not None and trained is not None and tokenizer.to_str() != trained.to_str():
            log.info("run %s: its own tokenizer is used, because the present one is another", row["experiment_id"])
            self.data = load_splits(*source, tokenizer=tokenizer)

    def result_if_finished(self, to_csv: bool = True) -> Result | None:
        """The result of a run that is already finished; None if there is something left to do.

        Unless it is a trial, `to_csv` adds its row to the CSV file if the file lacks it.
        """
        if self._known is None or self._known["status"] != "finished":
            return None
        name = self.experiment_id
        log.info("run %s of this config is finished: nothing to resume", name)
        result = Result.finished(name, self._store.metrics(name), run_folder(name), self._facts_of_finished())
        if to_csv and self._trial is None:  # the row may be missing, for example after a full disk
            append_if_possible(csv_row(self._config, result), unless_known=("experiment_id", "status"))
        return result

    def _facts_of_finished(self) -> dict[str, Any]:
        """What a finished run has stored of its data, and baselines that were fitted to the same rows after it."""
        assert self._known is not None
        environment = stored_object(self._known["env_details_json"])
        facts = facts_of(self._known["env_details_json"])
        fitted = {} if self.data is None else baselines_of(self.data.fingerprint)
        if facts and not set(fitted) <= set(baselines_of(facts)):
            facts = {**facts, "baselines": fitted}
            self._store.update_environment(self.experiment_id, {**environment, "data": facts})
        return facts

    def check(self, prepared: Prepared) -> None:
        """Say so if the run repeats one on other data.

        Raises ConfigError if it belongs to a study on other data, or if it cannot continue a run of other epochs.
        """
        data = prepared.data
        if self._earlier is not None:
            row = self._store.find_id(self._earlier.run_id)
            if row is not None:
                check_same_data(row, data)
            self._earlier.check(self._config, prepared)
        if self._trial is not None:
            self._trial.check_data(data.fingerprint)
        elif self._parent_id is not None:
            parent = self._store.find_id(self._parent_id)
            changed = None if parent is None else changed_split(parent, data)
            if changed is not None:
                log.warning(
                    "the data are not those of run %s (%s split: sha256 %s, now %s): the two runs are kept apart",
                    *(self._parent_id, changed[0], changed[2][:12], changed[1][:12]),
                )

    def show_data(self, data: DataSplits) -> None:
        """Log what is known of the data, unless the run is one of the many of a study."""
        if self._trial is None:
            for line in data_block(self._config.dataset_name, data):
                log.info("%s", line)

    def wants_csv_row(self, to_csv: bool) -> bool:
        """Whether the CSV file gets a row at the end: not for a trial, and not if the file cannot be continued.

        A warning says the latter now, not after hours of training.
        """
        return to_csv and self._trial is None and csv_accepts_rows()

    def begin(self, runtime: Runtime, data: DataSplits, folder: Path) -> int:
        """Mark the run as running in the store, and return the number of this attempt at it.

        Raises ConfigError if it started on other data, which have to be the same only if there is a checkpoint to
        continue from; Superseded if another process has finished it meanwhile.
        """
        environment = {**environment_record(str(runtime.device)), "data": data.fingerprint}
        if self._trial is not None:
            environment["study"] = {"name": self._trial.study, "trial": self._trial.number}
        store, name = self._store, self.experiment_id
        if self._known is not None:
            _check_not_deleted(store.find_id(name))  # another process may have deleted it since it was found
            if checkpoint_exists(folder / CHECKPOINT_FILE):
                check_same_data(self._known, data)
            if CONTINUES in (known := stored_object(self._known["env_details_json"])):
                environment[CONTINUES] = known[CONTINUES]
            log.info("resuming run %s", name)
            attempt: int = with_retries(lambda: store.take_over(name))
            with_retries(lambda: store.update_environment(name, environment, attempt))
            return attempt
        earlier = self._earlier
        if earlier is not None:
            log.info("continuing run %s of %d epochs as run %s", earlier.run_id, earlier.epochs, name)
            per_epoch = steps_per_epoch(self._config, data.train.samples_per_epoch)
            earlier.copy_files(folder, per_epoch * self._config.epochs)
            environment[CONTINUES] = {"run": earlier.run_id, "epochs": earlier.epochs}
            with_retries(lambda: start_row(store, name, self._config, environment, "json", earlier.run_id))
            earlier.copy_history(store, name, self._config, per_epoch)
            return FIRST_ATTEMPT
        if self._resume:
            log.info("no earlier run of this config to resume: starting a new one")
        # `find_experiment` ignores trials, so that a resume of the same config never continues one.
        run_type = "json" if self._trial is None else self._trial.run_type
        with_retries(lambda: start_row(store, name, self._config, environment, run_type, self._parent_id))
        return FIRST_ATTEMPT


def _check_not_deleted(row: dict[str, Any] | None) -> None:
    """Raise ConfigError for a run in the trash: a deleted run is never continued, and its result is not used."""
    if row is not None and row["deleted_at"] is not None:
        name = row["experiment_id"]
        raise ConfigError(f"run {name} was deleted: `goe runs restore {name}` brings it back")


def check_same_data(known: dict[str, Any], data: DataSplits) -> None:
    """Raise ConfigError if a run started on other data. A test split may come or go: no training reads it."""
    changed = changed_split(known, data)
    if changed is not None and NO_SPLIT not in changed:
        split, now, then = changed
        raise ConfigError(
            f"run {known['experiment_id']}: its {split} split is not what it was begun on (sha256 {now[:12]}, then "
            f"{then[:12]}). Put the data back as they were, or start a new run without --resume."
        )


def changed_split(known: dict[str, Any], data: DataSplits) -> tuple[str, str, str] | None:
    """A split that differs from the one that a run had, with both hashes (now, then); None if no split differs.

    In a row without hashes, from an older version, none differs.
    """
    hashes, now = _split_hashes(known), data.fingerprint.get("sha256", {})
    for split in dict.fromkeys([*now, *hashes]) if now and hashes else ():
        if hashes.get(split) != now.get(split):
            return split, str(now.get(split, NO_SPLIT)), str(hashes.get(split, NO_SPLIT))
    return None


def _split_hashes(row: dict[str, Any]) -> dict[str, Any]:
    """Split -> hash of its content, as a run has stored them; empty if it has not."""
    hashes = _fingerprint(row).get("sha256")
    return hashes if isinstance(hashes, dict) else {}


def _fingerprint(row: dict[str, Any]) -> dict[str, Any]:
    """What a run has stored of its data; empty if it has not."""
    try:
        return dict(json.loads(row["env_details_json"])["data"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return {}
