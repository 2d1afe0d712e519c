"""The queue of a study's trials: workers claim a trial, give it back, or finish it.

The queue lies in Optuna's storage. Every worker, in this process or in another one, claims its next trial under one
lock, so that the number of trials is exact. If a worker dies, another one continues its trial under the same number
and from its checkpoint.

The life of a trial:

- waiting: a point of a grid that no worker has claimed yet. Other trials begin their life as running ones.
- running, with a worker: the worker sends heartbeats. Without them the trial becomes stale after a minute.
- running, without a worker: its worker was interrupted or died. The next claim takes it.
- complete, pruned or failed: the end. No worker changes it any more.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from research_eval.config.defaults import add_former_defaults
from research_eval.errors import ConfigError, Superseded
from research_eval.studies.adapter import StoredStudy, StoredTrial
from research_eval.studies.options import StudyOptions
from research_eval.studies.pruning import make_pruner
from research_eval.studies.storage import lock_of_study, study_attributes, study_names, while_away
from research_eval.studies.trials import Outcome
from research_eval.system.environment import program_record
from research_eval.wording import hint, shown

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # a trial fails after so many workers died while they trained it
SHOWN_SETTING = 200  # characters of a setting in a message


class TrialQueue:
    """A study as a worker sees it: what is to do, what is claimed, what is done.

    Raises ConfigError for a study that was begun with other settings, or by another program.
    """

    def __init__(self, options: StudyOptions) -> None:
        self.options = options
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self.lock():
            self.stored = StoredStudy(options.storage, options.study_name, options.directions, make_pruner(options))
            self._check_settings()

    @property
    def study(self) -> optuna.Study:
        """Optuna's view of the study."""
        return self.stored.study

    def close(self) -> None:
        """Give back the connections to the storage."""
        self.stored.close()

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the study. A process holds it while it adds or claims trials."""
        return lock_of_study(self.options.storage, self.options.study_name)

    def _check_settings(self) -> None:
        """Compare the settings with those that the study was begun with; store them if the study is new."""
        wanted, known = self.options.settings(), self.study.user_attrs.get("settings")
        if known is None and self.stored.trials():
            raise ConfigError(
                f"--study_name: {self.options.study_name!r} in this storage was made by another program: choose another"
            )
        if known is None:
            self.study.set_user_attr("settings", wanted)
            return
        known = {**known, "fixed": _with_former_defaults(known)}
        changed = [name for name in wanted if wanted[name] != known.get(name)]
        if changed:
            text = functools.partial(shown, length=SHOWN_SETTING)
            lines = [f"  {name}: {text(known.get(name))} -> {text(wanted[name])}" for name in changed]
            raise ConfigError(
                f"--study_name: study {self.options.study_name!r} was begun with other settings. Give the same ones "
                "to continue it, or another name to begin a new one:\n" + "\n".join(lines)
            )

    def open_to_workers(self) -> None:
        """Store what `goe worker` needs to take part: the flags, the number of trials and this program's versions."""
        self.study.set_user_attr("flags", self.options.flags)
        self.study.set_user_attr("program", program_record())
        self.study.set_user_attr("n_trials", self.options.budget.n_trials)

    def own_trials(self) -> list[FrozenTrial]:
        """The trials that the budget counts: all but the past runs that teach the sampler."""
        return [trial for trial in self.stored.trials() if "warm_start" not in trial.user_attrs]

    def claim(self, worker: str, without: Collection[int] = ()) -> StoredTrial | None:
        """A trial that belongs to `worker` from now on; None if there is none to do.

        Trials that another worker left come first, then waiting ones, then a new one if the budget allows it. Trials
        whose ids are in `without` are not claimed. A worker has one trial at a time: it claims the next one after it
        has finished or released the one before.
        """
        worn_out: list[StoredTrial] = []
        claimed = while_away(lambda: self._claim(worker, without, worn_out))
        for trial in worn_out:
            self.finish(trial, Outcome("failed", reason=f"its worker died {MAX_ATTEMPTS} times"))
        return None if claimed is None else self.stored.stored(claimed)

    def _claim(self, worker: str, without: Collection[int], worn_out: list[StoredTrial]) -> int | None:
        """The id of the claimed trial. Trials that have had too many attempts are added to `worn_out`."""
        with self.stored.ledger() as ledger:
            for trial in ledger.running():
                if trial.worker == worker and trial.trial_id not in without:
                    return trial.trial_id  # it was claimed, but the answer of the server was lost
                if trial.trial_id in without or (trial.worker is not None and not trial.is_stale):
                    continue
                # A worker that died costs an attempt. A trial that was released has none, however long it waits.
                attempts = trial.attempts + (trial.worker is not None)
                if attempts <= MAX_ATTEMPTS:
                    ledger.assign(trial.trial_id, worker, attempts)
                    return trial.trial_id
                worn_out.append(self.stored.stored(trial.trial_id))
            count, claimed = ledger.counted()
            if claimed is not None:
                ledger.start(claimed)
            elif count < self.options.budget.n_trials:
                claimed = ledger.create()
            if claimed is not None:
                ledger.assign(claimed, worker, 1)
            return claimed

    def release(self, worker: str, died: bool) -> None:
        """Let other workers continue the trials of a worker that has stopped."""

        def released() -> None:
            with self.stored.ledger() as ledger:
                for trial in ledger.running():
                    if trial.worker == worker:
                        ledger.assign(trial.trial_id, None, trial.attempts + died)

        while_away(released)

    def finish(self, trial: StoredTrial, outcome: Outcome) -> None:
        """Store how a trial ended.

        If another worker had counted this one as dead and has finished the trial, that result stays.
        """
        try:
            trial.set_attribute("status", outcome.status)
            if outcome.reason:
                trial.set_attribute("reason", outcome.reason)
        except Superseded:
            return
        trial.end(outcome.status, None if outcome.values is None else list(outcome.values))

    def num_left(self) -> int:
        """How many trials of the budget have not ended."""
        return self.options.budget.n_trials - sum(trial.state.is_finished() for trial in self.own_trials())

    def num_at_work(self) -> int:
        """How many workers train a trial and give signs of life."""
        with self.stored.ledger() as ledger:
            return sum(trial.worker is not None and not trial.is_stale for trial in ledger.running())

    def has_running_trials(self) -> bool:
        """Whether some worker still trains a trial."""
        return any(trial.state == TrialState.RUNNING for trial in self.own_trials())

    def heartbeat(self, trial: StoredTrial, lost: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
        """Show to the others that this worker trains the trial, as long as the block runs.

        `lost` is called if the storage has not answered for so long that another worker may take the trial soon.
        """
        return self.stored.heartbeat(trial, lost)


def stored_flags(storage: str, study_name: str) -> tuple[dict[str, Any], int]:
    """The flags of a study, and its number of trials. Warns if it was begun by other versions of libraries or code.

    Raises ConfigError for a study that no command has begun, or that another version of this program has begun.
    """
    names = study_names(storage)
    if study_name not in names:
        known = f" It has {', '.join(names[:10])}.{hint(study_name, names)}" if names else " It has none."
        raise ConfigError(f"--study: there is no study {shown(study_name)} in this storage.{known}")
    attributes = study_attributes(storage, study_name)
    flags, n_trials = attributes.get("flags"), attributes.get("n_trials")
    if not isinstance(flags, dict) or not isinstance(n_trials, int):
        raise ConfigError(
            f"--study: {study_name!r} does not say how it was begun: give its command once more, and start workers then"
        )
    _compare_programs(attributes.get("program"))
    return flags, n_trials


def _compare_programs(begun: Any) -> None:
    """Raise ConfigError if a study was begun by another version of the program; warn of other differences."""
    here, begun = program_record(), begun if isinstance(begun, dict) else {}
    other = {name: value for name, value in begun.items() if value is not None and here.get(name) != value}
    if "research_eval" in other:
        raise ConfigError(
            f"--study: it was begun by version {shown(other['research_eval'])} of this program, and this is "
            f"{here['research_eval']}: the runs would not compare. Install the same version here."
        )
    for name, value in other.items():
        log.warning("the study was begun with %s %s, and this worker has %s", name, shown(value), here.get(name))


def _with_former_defaults(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fixed model parameters of a study by model type, with the options that are younger than the study."""
    fixed = {}
    for model_type, params in settings.get("fixed", {}).items():
        config = {**settings, "model_type": model_type, "model_params": params}
        add_former_defaults(config)
        fixed[model_type] = config["model_params"]
    return fixed
