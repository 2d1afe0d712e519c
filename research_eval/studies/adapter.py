"""The border to Optuna: its storage, its locks, its trials.

Optuna has no public interface for workers that share one queue of trials, continue the trials of workers that died and
know the ids of trials. This is the only file that uses Optuna's storage directly, and private attributes of Optuna.
The version of Optuna is therefore pinned.

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
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url

from research_eval.analysis.study_trials import TrialRecord, TrialRuns, TrialSettings
from research_eval.errors import ConfigError, Superseded
from research_eval.registry import MODEL_TYPE
from research_eval.store.connection import database_url
from research_eval.store.metrics import Direction
from research_eval.store.migrate import foreign_table
from research_eval.studies.names import plain_name
from research_eval.studies.space import SECTIONS

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60  # a trial without a heartbeat for so long is stale: its worker counts as dead
LOCK_SECONDS = 120  # longest wait for another process that holds the lock of a study
SQLITE_SECONDS = 60  # longest wait for another process that writes into a SQLite file
# The status of a trial by Optuna's state. Optuna has one state for failed and for diverged trials.
STATUSES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}  # any other status becomes FAIL


@contextmanager
def experimental() -> Iterator[None]:
    """Hide the warnings of Optuna's experimental parts: its version is pinned, and tests cover these parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """Ask a trial of Optuna for the value of a parameter."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, step, log_scale = distribution.low, distribution.high, distribution.step, distribution.log
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, int(low), int(high), step=int(step or 1), log=log_scale)
    return trial.suggest_float(name, low, high, step=step, log=log_scale)


# -------------------------------------------------------------------------------------------------------- storage


def storage_url(storage: str) -> str:
    """The URL of a study storage: a path, sqlite:///path or postgresql://... Raises ConfigError."""
    try:
        return database_url(storage)
    except ConfigError as error:
        raise ConfigError(f"--storage: {error}") from error


def _open_storage(url: str) -> RDBStorage:
    """Open the storage; create it if it does not exist. Raises ConfigError.

    A SQLite file is in WAL mode, in which readers do not block writers.
    """
    is_file = make_url(url).drivername == "sqlite"
    try:
        if is_file:
            _check_ours(url)
        with experimental():
            storage = RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": SQLITE_SECONDS}} if is_file else {"pool_pre_ping": True},
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
            )
        if is_file:
            sa.event.listen(storage.engine, "connect", _set_up_sqlite)
            storage.engine.dispose()  # Optuna has made connections already; new ones get the settings
    except (sa.exc.SQLAlchemyError, RuntimeError) as error:
        raise ConfigError(f"--storage: {str(getattr(error, 'orig', error)).strip()}") from error
    return storage


def _check_ours(url: str) -> None:
    """Raise ConfigError if the file is the database of another program."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        foreign = foreign_table(connection)
    if foreign is not None:
        raise ConfigError(
            f"--storage: {make_url(url).database} belongs to another program (it has a table {foreign!r}); it was left "
            "alone. Give another name."
        )


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    """Set up a new connection.

    With synchronous=NORMAL a power failure may cost the last writes, but it never damages the file.
    """
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


@contextmanager
def study_lock(url: str, study_name: str) -> Iterator[None]:
    """Hold the lock of a study. One process at a time holds it, on any machine that uses the storage."""
    address = make_url(url)
    if address.drivername == "sqlite":
        with filelock.FileLock(f"{address.database}.study.lock", timeout=LOCK_SECONDS):
            yield
        return
    # PostgreSQL releases an advisory lock at the end of its transaction, also if this process dies.
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(zlib.crc32(study_name.encode()))))
        yield


# --------------------------------------------------------------------------------------------------------- studies


def study_names(url: str) -> list[str]:
    """The studies in a storage, which has to exist. Raises ConfigError."""
    address = make_url(url)
    if address.drivername == "sqlite" and not Path(address.database or "").is_file():
        raise ConfigError(f"--storage: there is no file {address.database}")
    with _opened(url) as storage:
        return sorted(optuna.get_all_study_names(storage))


def study_attributes(url: str, study_name: str) -> dict[str, Any]:
    """What commands have stored with a study. Raises ConfigError."""
    with _opened(url) as storage:
        return storage.get_study_user_attrs(storage.get_study_id_from_name(study_name))


@contextmanager
def _opened(url: str) -> Iterator[RDBStorage]:
    storage = _open_storage(url)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


class StoredStudy:
    """A study in Optuna's storage. It is created if the storage does not have it.

    `study` is Optuna's view of it, which samplers and pruners need. Raises ConfigError for a storage that cannot be
    opened. The caller holds the lock of the study, because two processes may want to create it at the same time.
    """

    def __init__(
        self, url: str, study_name: str, directions: Sequence[Direction], pruner: optuna.pruners.BasePruner
    ) -> None:
        self._storage = _open_storage(url)
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
        self._storage.remove_session()
        self._storage.engine.dispose()

    def trials(self) -> list[FrozenTrial]:
        """All trials as they are now, past runs included. The caller must not change them."""
        return self.study.get_trials(deepcopy=False)

    def stale_ids(self) -> set[int]:
        """The ids of the running trials whose workers have sent no heartbeat for `GRACE_SECONDS`."""
        return set(self._storage._get_stale_trial_ids(self._study_id))

    def stored(self, trial: FrozenTrial) -> StoredTrial:
        """The trial of this study that can be changed."""
        return StoredTrial(trial._trial_id, self.study, self._storage)

    def create_trial(self) -> StoredTrial:
        """A new trial, which is running and has no values yet."""
        return StoredTrial(self._storage.create_new_trial(self._study_id), self.study, self._storage)

    def start(self, trial: FrozenTrial) -> StoredTrial:
        """Turn a waiting trial into a running one."""
        self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        return self.stored(trial)

    def beat(self, trial: StoredTrial) -> None:
        """Say that a worker trains the trial."""
        self._storage.record_heartbeat(trial.trial_id)

    @contextmanager
    def heartbeat(self, trial: StoredTrial) -> Iterator[None]:
        """Record a heartbeat of the trial every few seconds, as long as the block runs."""
        done = threading.Event()

        def beat_until_done() -> None:
            while not done.wait(HEARTBEAT_SECONDS):
                try:
                    self.beat(trial)
                except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError):
                    log.debug("no heartbeat", exc_info=True)  # the grace period allows to miss several

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
        """Store how the trial ended; a trial that has ended already stays as it is."""
        state = STATES.get(status, TrialState.FAIL)
        self.study.tell(self.number, values=values, state=state, skip_if_finished=True)


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
