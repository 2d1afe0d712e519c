"""The border to Optuna: its studies and trials.

Optuna has no public interface for workers that share one queue of trials, continue the trials of workers that died and
know the ids of trials. Only this file, `storage`, `ledger` and `trial_rows` use Optuna's storage directly, and private
attributes of Optuna. The version of Optuna is therefore pinned.

Workers store these user attributes with a trial (`StoredTrial.set_attribute`); they are part of the users' databases:

- `worker`, `attempts`: who trains the trial (None: no worker at the moment), and how many workers have begun it
- `experiment_ids`: the runs of the trial in the results store, one per seed
- `epochs`: how many epochs all seeds have trained so far
- `status`, `reason`: how the trial ended; Optuna's own states do not tell a diverged trial from a failed one
- `model_type`: also for trials of a study that does not sample it
- `curves`, `costs`: scores by epoch and costs before training, in studies with several objectives only
- `warm_start`: the id of the past run that the trial stands for

The study itself has the attribute `settings` (`StudyOptions.settings`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from research_eval.analysis.study_trials import TrialRecord, TrialRuns, TrialSettings
from research_eval.errors import Superseded
from research_eval.registry import MODEL_TYPE
from research_eval.store.metrics import Direction
from research_eval.studies import storage
from research_eval.studies.ledger import Ledger
from research_eval.studies.names import plain_name
from research_eval.studies.space import SECTIONS
from research_eval.studies.storage import StudyStorage

log = logging.getLogger(__name__)

LOST_SECONDS = 45.0  # a worker whose heartbeats fail for so long stops its run
# The status of a trial by Optuna's state. Optuna has one state for failed and for diverged trials.
STATUSES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}  # any other status becomes FAIL


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """Ask a trial of Optuna for the value of a parameter."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, step, log_scale = distribution.low, distribution.high, distribution.step, distribution.log
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, int(low), int(high), step=int(step or 1), log=log_scale)
    return trial.suggest_float(name, low, high, step=step, log=log_scale)


# --------------------------------------------------------------------------------------------------------- studies


class StoredStudy:
    """A study in Optuna's storage. It is created if the storage does not have it.

    `study` is Optuna's view of it, which samplers and pruners need. Raises ConfigError for a storage that cannot be
    opened. The caller holds the lock of the study, because two processes may want to create it at the same time.
    """

    def __init__(
        self, url: str, study_name: str, directions: Sequence[Direction], pruner: optuna.pruners.BasePruner
    ) -> None:
        self._storage = StudyStorage(url)
        self.study = optuna.create_study(
            study_name=study_name,
            storage=self._storage,
            directions=list(directions),
            pruner=pruner,
            load_if_exists=True,
        )
        self._study_id = self._storage.get_study_id_from_name(study_name)

    def close(self) -> None:
        """Give back the connections to the storage."""
        self._storage.close()

    def trials(self) -> list[FrozenTrial]:
        """All trials as they are now, past runs included. The caller must not change them."""
        return self.study.get_trials(deepcopy=False)

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """A transaction that claims trials, under the lock of the study."""
        with self._storage.locked(self.study.study_name) as connection:
            yield Ledger(connection, self._study_id, storage.GRACE_SECONDS)

    def stored(self, trial_id: int) -> StoredTrial:
        """The trial of this study that can be changed."""
        return StoredTrial(trial_id, self.study, self._storage)

    def beat(self, trial: StoredTrial) -> None:
        """Say that a worker trains the trial."""
        self._storage.record_heartbeat(trial.trial_id)

    @contextmanager
    def heartbeat(self, trial: StoredTrial, lost: Callable[[], None]) -> Iterator[None]:
        """Record a heartbeat of the trial every few seconds, as long as the block runs.

        If none could be recorded for LOST_SECONDS, `lost` is called once: soon another worker may take the trial.
        """
        done = threading.Event()

        def beat_until_done() -> None:
            last, is_lost = time.monotonic(), False
            while not done.wait(storage.HEARTBEAT_SECONDS):
                try:
                    self.beat(trial)
                    last = time.monotonic()
                except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError):
                    log.debug("no heartbeat", exc_info=True)  # the grace period allows to miss several
                if time.monotonic() - last > LOST_SECONDS and not is_lost and not done.is_set():
                    is_lost = True
                    lost()

        thread = threading.Thread(target=beat_until_done, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def given_values(trial: FrozenTrial) -> dict[str, Any]:
    """The values that a trial has already: those that it was enqueued with, and those that were drawn for it."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


@dataclass(frozen=True)
class StoredTrial:
    """One trial of a study, to be read and changed in Optuna's storage. Trials with equal ids are equal."""

    trial_id: int
    study: optuna.Study = field(repr=False, compare=False)
    _storage: BaseStorage = field(repr=False, compare=False)

    @classmethod
    def of(cls, trial: optuna.Trial) -> StoredTrial:
        """The trial that `optuna.Study.optimize` passes to an objective."""
        return cls(trial._trial_id, trial.study, trial.storage)

    def frozen(self) -> FrozenTrial:
        """The trial as it is now."""
        return self._storage.get_trial(self.trial_id)

    @property
    def number(self) -> int:
        """The number of the trial within its study, from 0."""
        return self.frozen().number

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What workers have stored with the trial."""
        return self.frozen().user_attrs

    def set_attribute(self, name: str, value: Any) -> None:
        """Store a value that JSON can hold with the trial. Raises Superseded if another worker has ended the trial."""
        with self._unless_ended():
            self._storage.set_trial_user_attr(self.trial_id, name, value)

    @contextmanager
    def _unless_ended(self) -> Iterator[None]:
        try:
            yield
        except optuna.exceptions.UpdateFinishedTrialError as error:
            raise Superseded(f"trial {self.number} has been ended by another worker") from error

    def enter_values(self, entries: Mapping[str, tuple[Any, BaseDistribution]]) -> None:
        """Store the values of parameters, by their stored names; those that the trial has already stay."""
        known = self.frozen().params
        for name, (value, distribution) in entries.items():
            if name not in known:
                internal = distribution.to_internal_repr(value)
                self._storage.set_trial_param(self.trial_id, name, internal, distribution)

    def report(self, epoch: int, score: float) -> None:
        """Store the score of an epoch; a resumed run that reports an epoch again changes nothing. Raises Superseded."""
        if epoch in self.frozen().intermediate_values:
            return
        with self._unless_ended():
            self._storage.set_trial_intermediate_value(self.trial_id, epoch, score)

    def should_stop(self) -> bool:
        """Whether the study's pruner would stop the trial after the scores reported so far."""
        return self.study.pruner.prune(self.study, self.frozen())

    def end(self, status: str, values: Sequence[float] | None) -> None:
        """Store how the trial ended; a trial that has ended already stays as it is.

        The value of a pruned trial is its last score, as `optuna.Study.tell` has it, which takes three times as long.
        """
        state = STATES.get(status, TrialState.FAIL)
        if state == TrialState.PRUNED and values is None:
            scores = self.frozen().intermediate_values
            last = scores[max(scores)] if scores else math.nan
            values = None if math.isnan(last) else [last]
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_state_values(self.trial_id, state, values)


# --------------------------------------------------------------------------------------------------------- records


def trial_records(study: optuna.Study) -> list[TrialRecord]:
    """All trials by number, including the past runs that teach the sampler."""
    return [_record(trial) for trial in sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)]


def _record(trial: FrozenTrial) -> TrialRecord:
    """The trial as files and pictures need it."""
    attributes, state = trial.user_attrs, trial.state.name
    diverged = state == "FAIL" and attributes.get("status") == "diverged"
    return TrialRecord(
        number=trial.number,
        state=state,
        status="diverged" if diverged else STATUSES[state],
        reason=attributes.get("reason"),
        values=None if trial.values is None else tuple(trial.values),
        last=_last_scores(attributes) if state == "PRUNED" else {},
        model_type=attributes.get("model_type") or _model_type(trial.params),
        settings=TrialSettings(
            sampled=trial.params,
            # A trial has at most one stored name per parameter, so that plain names do not collide.
            plain={plain_name(name): value for name, value in trial.params.items()},
            distributions={plain_name(name): one for name, one in trial.distributions.items()},
        ),
        runs=TrialRuns(
            experiment_ids=list(attributes.get("experiment_ids", [])),
            epochs=attributes.get("epochs", 0),
            attempts=attributes.get("attempts", 0),
        ),
        warm_start=attributes.get("warm_start"),
        started=trial.datetime_start,
        completed=trial.datetime_complete,
    )


def _model_type(params: Mapping[str, Any]) -> str | None:
    """The sampled model type. A study of one type does not sample it: its parameters begin with its name."""
    own = [name.partition(".")[0] for name in params if "." in name]
    return params.get(MODEL_TYPE) or next((name for name in own if name not in SECTIONS), None)


def _last_scores(attributes: Mapping[str, Any]) -> dict[str, float]:
    """The last score of each objective. Optuna stores scores of epochs for one objective only; attributes hold them."""
    curves: dict[str, dict[str, float]] = attributes.get("curves", {})
    scores = {name: curve[max(curve, key=int)] for name, curve in curves.items() if curve}
    return {**attributes.get("costs", {}), **scores}
