"""The results store: one row per run, its metrics and its time series; any number of processes may write.

`tables` describes what the columns hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from research_eval.errors import ConfigError, Superseded
from research_eval.store.history import delete_history, put_history
from research_eval.store.queries import DEAD, IDS_PER_QUERY, Queries
from research_eval.store.records import STATUSES, HistoryRow, RunRecord
from research_eval.store.tables import CURATION, FIRST_ATTEMPT, experiments_table, history_runs, metrics_table
from research_eval.store.values import NormalMetrics, canonical_json, normal_metrics, tags_of, tags_text


class Store(Queries):
    """The results database. Every method is one short transaction, so any number of processes may write.

    The class is a line of three, each in a file of its own: `Database` opens, `Queries` reads, `Store` writes. Only
    `Store` is used; the other two exist so that each file has one job.
    """

    def start_experiment(
        self,
        *,
        experiment_id: str,
        run_type: str,
        experiment_name: str,
        model_type: str,
        dataset_name: str,
        dataset_type: str,
        epochs: int,
        batch_size: int,
        seed: int,
        config: dict[str, Any],
        environment: dict[str, Any],
        parent_id: str | None = None,
    ) -> None:
        """Insert a new run with status "running" and the present time."""
        now = datetime.now(UTC)
        row = {
            "experiment_id": experiment_id,
            "run_type": run_type,
            "timestamp": now,
            "experiment_name": experiment_name,
            "model_type": model_type,
            "dataset_name": dataset_name,
            "dataset_type": dataset_type,
            "epochs": epochs,
            "batch_size": batch_size,
            "full_config_json": canonical_json(config),
            "env_details_json": canonical_json(environment),
            "status": "running",
            "seed": seed,
            "heartbeat": now,
            "parent_id": parent_id,
            "data_sha256": _data_sha256(environment),
            "attempt": FIRST_ATTEMPT,
        }
        with self._write() as connection:
            connection.execute(experiments_table.insert(), row)

    def _update(
        self,
        connection: Connection,
        experiment_id: str,
        turn: int | None = None,
        only_unfinished: bool = False,
        **columns: Any,
    ) -> None:
        """Set columns and renew the heartbeat, if it is the turn of this attempt (None: of no matter which).

        Raises Superseded if it is not, or if the run is finished and has to be unfinished; ConfigError if there is no
        such run.
        """
        table = experiments_table.c
        conditions = [table.experiment_id == experiment_id]
        if turn is not None:
            conditions.append(sa.or_(table.attempt == turn, table.attempt.is_(None)))
        if only_unfinished:
            conditions.append(sa.or_(table.status != "finished", table.status.is_(None)))
        changed = experiments_table.update().where(*conditions).values(heartbeat=datetime.now(UTC), **columns)
        if connection.execute(changed).rowcount == 1:
            return
        known = connection.execute(sa.select(table.status).where(table.experiment_id == experiment_id)).first()
        if known is None:
            raise ConfigError(f"no experiment {experiment_id!r} in {self.location}")
        ended = "is finished" if known.status == "finished" else "is continued by another process"
        raise Superseded(f"run {experiment_id} {ended}: its results stay as they are")

    def take_over(self, experiment_id: str) -> int:
        """Set the status to "running", and return the number of this attempt, which its writes have to carry.

        Raises Superseded for a finished run.
        """
        table = experiments_table.c
        with self._write(durable=True) as connection:
            number = sa.func.coalesce(table.attempt, FIRST_ATTEMPT) + 1
            changed: dict[str, Any] = {"attempt": number, "status": "running", "error": None}
            self._update(connection, experiment_id, only_unfinished=True, **changed)
            query = sa.select(table.attempt).where(table.experiment_id == experiment_id)
            return int(connection.execute(query).scalar_one())

    def update_environment(self, experiment_id: str, environment: dict[str, Any], attempt: int | None = None) -> None:
        """Replace the environment record."""
        with self._write() as connection:
            columns = {"env_details_json": canonical_json(environment), "data_sha256": _data_sha256(environment)}
            self._update(connection, experiment_id, attempt, False, **columns)

    def set_status(self, experiment_id: str, status: str, error: str | None = None, attempt: int | None = None) -> None:
        """Set status and error together (no error clears the old one). Raises Superseded for a finished run."""
        if status not in STATUSES:
            raise ConfigError(f"status: unknown {status!r}. Known: {', '.join(STATUSES)}.")
        with self._write(durable=True) as connection:
            self._update(connection, experiment_id, attempt, status != "finished", status=status, error=error)

    def mark_interrupted(self, experiment_id: str) -> bool:
        """Store a dead run as interrupted; False if it is no longer stored as running."""
        with self._write(durable=True) as connection:
            updated = connection.execute(
                experiments_table.update()
                .where(experiments_table.c.experiment_id == experiment_id, experiments_table.c.status == "running")
                .values(status="interrupted", error=DEAD)
            )
        return updated.rowcount == 1

    def add_history(self, experiment_id: str, rows: Sequence[HistoryRow], attempt: int | None = None) -> None:
        """Add points and renew the heartbeat; a point that is written twice keeps its last value."""
        with self._write() as connection:
            self._update(connection, experiment_id, attempt)  # it also makes a second writer of this run wait
            put_history(connection, {experiment_id: rows})

    def truncate_history(self, experiment_id: str, after_step: int, attempt: int | None = None) -> None:
        """Delete the points later than `after_step`: a resumed run writes them again."""
        with self._write() as connection:
            self._update(connection, experiment_id, attempt)
            delete_history(connection, [experiment_id], after_step)

    def finish_experiment(self, experiment_id: str, metrics: dict[str, Any]) -> None:
        """Replace the run's metrics and set its status to "finished". Raises ConfigError for an unstorable metric."""
        self.finish_normalised(experiment_id, normal_metrics(metrics))

    def finish_normalised(self, experiment_id: str, metrics: NormalMetrics, attempt: int | None = None) -> None:
        """`finish_experiment` for metrics that `normal_metrics` has returned, here or in another process."""
        with self._write(durable=True) as connection:
            self._update(connection, experiment_id, attempt, status="finished", error=None)
            connection.execute(metrics_table.delete().where(metrics_table.c.experiment_id == experiment_id))
            _insert_metrics(connection, {experiment_id: metrics})

    def replace_metrics(self, experiment_id: str, metrics: dict[str, Any]) -> None:
        """Store these metrics of a finished run; its other metrics stay. Raises ConfigError."""
        normal = normal_metrics(metrics)
        table = metrics_table.c
        with self._write(durable=True) as connection:
            self._update(connection, experiment_id)
            connection.execute(
                metrics_table.delete().where(table.experiment_id == experiment_id, table.metric_name.in_(normal))
            )
            _insert_metrics(connection, {experiment_id: normal})

    # What people say about runs. None of these renews the heartbeat, which tells how far a run has come.

    def curate(self, experiment_ids: Sequence[str], **columns: Any) -> None:
        """Set columns of CURATION of these runs, in one transaction."""
        assert set(columns) <= set(CURATION)
        with self._write(durable=True) as connection:
            for start in range(0, len(experiment_ids), IDS_PER_QUERY):
                some = experiment_ids[start : start + IDS_PER_QUERY]
                query = experiments_table.update().where(experiments_table.c.experiment_id.in_(some))
                connection.execute(query.values(**columns))

    def change_tags(
        self, experiment_ids: Sequence[str], add: Collection[str] = (), remove: Collection[str] = ()
    ) -> None:
        """Add tags to runs and remove others from them, in one transaction."""
        columns = experiments_table.c
        with self._write(durable=True) as connection:
            for experiment_id in experiment_ids:
                this = columns.experiment_id == experiment_id
                # On PostgreSQL another writer of these tags waits; on SQLite the transaction has the only write lock.
                tags = tags_of(connection.scalar(sa.select(columns.tags).where(this).with_for_update()))
                text = tags_text({*tags, *add} - set(remove))
                connection.execute(experiments_table.update().where(this).values(tags=text))

    def purge(self, experiment_ids: Sequence[str]) -> None:
        """Delete all rows of these runs for good, in one transaction."""
        with self._write(durable=True) as connection:
            for start in range(0, len(experiment_ids), IDS_PER_QUERY):
                _delete_rows(connection, experiment_ids[start : start + IDS_PER_QUERY])

    def merge_records(
        self, records: dict[str, RunRecord], replaces: Callable[[RunRecord, RunRecord], bool]
    ) -> dict[str, RunRecord]:
        """Enter runs of another store in one transaction; return the records that this store had of these ids.

        A run that this store has too is replaced if `replaces(ours, theirs)`, and otherwise left unchanged. In both
        cases it keeps what people said about it here, and gets the tags and the note of the other store in addition.
        """
        with self._write() as connection:
            ours = self._records(connection, list(records))
            replaced = [key for key in ours if replaces(ours[key], records[key])]
            _delete_rows(connection, replaced)
            entered = {key: records[key] for key in records if key not in ours or key in replaced}
            if entered:
                connection.execute(experiments_table.insert(), [record.experiment for record in entered.values()])
            for key, record in ours.items():
                said = joined_curation(record.experiment, records[key].experiment)
                if key in replaced or said != {name: record.experiment[name] for name in CURATION}:
                    this = experiments_table.c.experiment_id == key
                    connection.execute(experiments_table.update().where(this).values(**said))
            _insert_metrics(connection, {key: normal_metrics(record.metrics) for key, record in entered.items()})
            put_history(connection, {key: record.history for key, record in entered.items()})
        return ours


def joined_curation(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """What people say about a run that two stores have: ours, with the tags of both, and their note if we have none."""
    tags = tags_text({*tags_of(ours["tags"]), *tags_of(theirs.get("tags"))})
    note = theirs.get("note") if ours["note"] is None else ours["note"]
    return {**{name: ours[name] for name in CURATION}, "tags": tags, "note": note}


def _delete_rows(connection: Connection, experiment_ids: Sequence[str]) -> None:
    """Delete runs with their metrics and points. Rows that refer to a run go before it."""
    delete_history(connection, experiment_ids)
    for table in (metrics_table, history_runs, experiments_table):
        connection.execute(table.delete().where(table.c.experiment_id.in_(experiment_ids)))


def _data_sha256(environment: dict[str, Any]) -> str | None:
    """The hash of a run's data, from its environment record; None if that does not have it."""
    data = environment.get("data")
    found = data.get("data_sha256") if isinstance(data, dict) else None
    return found if isinstance(found, str) else None


def _insert_metrics(connection: Connection, metrics: dict[str, NormalMetrics]) -> None:
    """Insert the metrics of some runs (id -> metrics), in their order."""
    rows = [
        {"experiment_id": experiment_id, "metric_name": name, "metric_value": value}
        for experiment_id, values in metrics.items()
        for name, value in values.items()
    ]
    if rows:
        connection.execute(metrics_table.insert(), rows)
