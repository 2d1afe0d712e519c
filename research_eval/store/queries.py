"""Reading the results database: one run, its metrics and time series, and lists of very many runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from research_eval.errors import ConfigError
from research_eval.files import is_at_work
from research_eval.store.changes import MISSING
from research_eval.store.database import Database
from research_eval.store.filters import (
    column_conditions,
    fits,
    in_view,
    is_last_of_its_name,
    metric_of_run,
    number,
    one_of,
    runs_with_metric,
    status_condition,
    value_at,
)
from research_eval.store.records import (
    ACTIVE,
    ACTIVE_RUNS,
    ALL,
    COMPARISONS,
    DELETED,
    HIDDEN,
    KEPT,
    HistoryRow,
    MetricSummary,
    RunFilter,
    RunRecord,
    RunRow,
)
from research_eval.store.tables import CONTINUES, JSON_COLUMNS, experiments_table, history_view, metrics_table
from research_eval.store.values import canonical_json
from research_eval.system.untrusted import stored_object
from research_eval.wording import nearest

HEARTBEAT_TIMEOUT = timedelta(minutes=15)  # a run at work writes after every few dozen steps
DEAD = "its process ended without saying why"

IDS_PER_QUERY = 500  # SQLite accepts at least 999 parameters


def is_dead(experiment_id: str, heartbeat: datetime | None) -> bool:
    """Whether the process of a run that is stored as running has ended: no process holds the run's folder.

    If the folder is on another machine, the heartbeat decides: it is too old, or too far in the future of a clock that
    was set back.
    """
    at_work = is_at_work(experiment_id)
    if at_work is not None:
        return not at_work
    return heartbeat is None or abs(datetime.now(UTC) - heartbeat) > HEARTBEAT_TIMEOUT


def _of_runs(query: sa.Select[Any], dataset_name: str | None, view: str = ACTIVE) -> sa.Select[Any]:
    """A query of metrics, restricted to the runs of a view, and to those on a dataset unless that is None."""
    query = query.where(in_view(view, metrics_table.c.experiment_id))
    if dataset_name is None:
        return query
    return query.join(experiments_table).where(experiments_table.c.dataset_name == dataset_name)


def _other_view(row: dict[str, Any], view: str) -> str:
    """The message for a run that exists, but not in the view that was asked."""
    name = row["experiment_id"]
    if view == HIDDEN:
        return f"run {name} is neither archived nor deleted: there is nothing to restore"
    if view == DELETED:
        return f"run {name} is not in the trash: delete it first"
    return f"run {name} is deleted: `goe runs restore {name}` brings it back"


class Queries(Database):
    """The part of `Store` that reads. A run that is stored as running but dead is read as interrupted.

    `Store` inherits it, so that users have one object, while this file holds nothing that writes. Every method opens a
    transaction of its own, so two calls may see the database before and after the write of another process.
    """

    # One run

    def _rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        with self._engine.connect() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        for row in rows:
            # The folder of a deleted run is in the trash, where no process works.
            if row.get("status") == "running" and (
                row.get("deleted_at") or is_dead(row["experiment_id"], row["heartbeat"])
            ):
                row.update(status="interrupted", error=row["error"] or DEAD)
        return rows

    def experiments(self) -> list[dict[str, Any]]:
        """Every run that is not deleted, oldest first; keys are the columns of the table."""
        query = sa.select(experiments_table).where(in_view(KEPT))
        return self._rows(query.order_by(experiments_table.c.timestamp))

    def experiment(self, experiment_id: str, view: str = KEPT) -> dict[str, Any]:
        """The run with this id, or the only run of the view whose id begins so.

        Raises ConfigError if there is not exactly one. The message says so if the run is in another view.
        """
        column = experiments_table.c.experiment_id
        starts_so = sa.func.substr(column, 1, len(experiment_id)) == experiment_id  # LIKE has wildcards and folds case
        query = sa.select(experiments_table).order_by(column).where(starts_so)
        found = self._rows(query.where(in_view(view))) if experiment_id else []
        for row in found:
            if row["experiment_id"] == experiment_id or len(found) == 1:
                return row
        if found:
            shown = ", ".join(row["experiment_id"] for row in found[:5]) + (", ..." if len(found) > 5 else "")
            raise ConfigError(f"experiment {experiment_id!r} is one of {len(found)} in {self.location}: {shown}")
        elsewhere = self._rows(query) if experiment_id and view != ALL else []
        if len(elsewhere) == 1:
            raise ConfigError(_other_view(elsewhere[0], view))
        with self._engine.connect() as connection:
            known = list(
                connection.scalars(sa.select(column).where(in_view(view)).order_by(experiments_table.c.timestamp))
            )
        near = nearest(experiment_id, known)
        hint = (
            f"Did you mean {near!r}?" if near else f"The newest are {', '.join(known[:-6:-1]) or 'none: it is empty'}."
        )
        raise ConfigError(f"no experiment {experiment_id!r} in {self.location}. {hint}")

    def find_id(self, experiment_id: str) -> dict[str, Any] | None:
        """The run with exactly this id, whether it is archived, deleted or neither."""
        found = self._rows(sa.select(experiments_table).where(experiments_table.c.experiment_id == experiment_id))
        return found[0] if found else None

    def find_experiment(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """The newest run of exactly this config, on any data; see `find_experiments`."""
        return next(iter(self.find_experiments(config)), None)

    def find_experiments(self, *configs: dict[str, Any]) -> list[dict[str, Any]]:
        """The runs of exactly one of these configs, newest first. Trials, replays and deleted runs do not count.

        The canonical texts of the complete configs are compared, so a key more or less makes another config. A key that
        is added later must therefore be absent from a config that has its default, or older runs are not found.
        """
        return self._runs_of(configs)

    def find_other_epochs(self, config: dict[str, Any], *forms: dict[str, Any]) -> list[dict[str, Any]]:
        """The runs of this config with other numbers of epochs, newest first; as in `find_experiments`.

        `forms` are other ways in which the config may be stored.
        """
        columns = experiments_table.c
        query = sa.select(columns.epochs).where(
            columns.run_type == "json",
            columns.model_type == config["model_type"],
            columns.dataset_name == config["dataset_name"],
            columns.epochs != config["epochs"],
        )
        with self._engine.connect() as connection:
            numbers = list(connection.scalars(query.distinct()))
        return self._runs_of([{**form, "epochs": epochs} for epochs in numbers for form in (config, *forms)])

    def _runs_of(self, configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The runs of one of these configs, newest first. Replays have a parent too, but do not continue it."""
        columns = experiments_table.c
        return self._rows(
            sa.select(experiments_table)
            .where(
                columns.run_type == "json",
                columns.parent_id.is_(None) | columns.env_details_json.contains(f'"{CONTINUES}": {{', autoescape=True),
                columns.full_config_json.in_(list(map(canonical_json, configs))),
                columns.deleted_at.is_(None),
            )
            .order_by(columns.timestamp.desc())
        )

    def children(self, experiment_id: str) -> list[str]:
        """The ids of the runs whose parent this is, oldest first."""
        table = experiments_table.c
        query = sa.select(table.experiment_id).where(table.parent_id == experiment_id)
        with self._engine.connect() as connection:
            return list(connection.scalars(query.order_by(table.timestamp, table.experiment_id)))

    def metrics(self, experiment_id: str) -> dict[str, Any]:
        """Name -> float, or the list (or dict, or text) that was stored; in the order they were stored."""
        query = (
            sa.select(metrics_table)
            .where(metrics_table.c.experiment_id == experiment_id)
            .order_by(metrics_table.c.metric_id)
        )
        return {row["metric_name"]: row["metric_value"] for row in self._rows(query)}

    def history(self, experiment_id: str, name: str | None = None, after_step: int | None = None) -> list[HistoryRow]:
        """The points of one series, or of all, by step and then name; only those behind `after_step` if it is given."""
        columns = history_view.c
        query = sa.select(columns.step, columns.epoch, columns.name, columns.value).where(
            columns.experiment_id == experiment_id
        )
        if name is not None:
            query = query.where(columns.name == name)
        if after_step is not None:
            query = query.where(columns.step > after_step)
        with self._engine.connect() as connection:
            return [HistoryRow(*row) for row in connection.execute(query.order_by(columns.step, columns.name))]

    def records(self, experiment_ids: Sequence[str]) -> dict[str, RunRecord]:
        """Id -> everything about the run, for those ids that are in this database; statuses as they are stored."""
        with self._engine.connect() as connection:
            return self._records(connection, experiment_ids)

    def _records(self, connection: Connection, experiment_ids: Sequence[str]) -> dict[str, RunRecord]:
        experiments, metrics, history = experiments_table, metrics_table, history_view
        rows = connection.execute(sa.select(experiments).where(experiments.c.experiment_id.in_(experiment_ids)))
        found = {row["experiment_id"]: RunRecord(dict(row), {}, []) for row in rows.mappings()}
        values = (
            sa.select(metrics.c.experiment_id, metrics.c.metric_name, metrics.c.metric_value)
            .where(metrics.c.experiment_id.in_(found))
            .order_by(metrics.c.metric_id)
        )
        for experiment_id, name, value in connection.execute(values):
            found[experiment_id].metrics[name] = value
        points = (
            sa.select(history.c.experiment_id, history.c.step, history.c.epoch, history.c.name, history.c.value)
            .where(history.c.experiment_id.in_(found))
            .order_by(history.c.step, history.c.name)
        )
        for experiment_id, *point in connection.execute(points):
            found[experiment_id].history.append(HistoryRow(*point))
        return found

    # All runs

    def statuses(self) -> dict[str, str]:
        """Id -> status of every run as it is stored, also of hidden ones: a dead run is still "running"."""
        columns = experiments_table.c
        with self._engine.connect() as connection:
            query = sa.select(columns.experiment_id, columns.status).order_by(columns.experiment_id)
            return dict(connection.execute(query).all())

    def dead_runs(self) -> list[str]:
        """The ids of runs that are stored as running and whose process has ended; deleted runs are not among them."""
        columns = experiments_table.c
        query = sa.select(columns.experiment_id, columns.heartbeat)
        query = query.where(columns.status == "running", columns.deleted_at.is_(None))
        with self._engine.connect() as connection:
            found = connection.execute(query)
            return [experiment_id for experiment_id, heartbeat in found if is_dead(experiment_id, heartbeat)]

    def dataset_names(self) -> list[str]:
        """The datasets of all active runs, by name."""
        return self._names(experiments_table.c.dataset_name)

    def model_types(self) -> list[str]:
        """The model types of all active runs, by name."""
        return self._names(experiments_table.c.model_type)

    def _names(self, column: sa.Column[str]) -> list[str]:
        with self._engine.connect() as connection:
            names = connection.scalars(sa.select(column).where(column.is_not(None), in_view(ACTIVE)).distinct())
            return sorted(names)

    def has_metric(self, name: str, dataset_name: str | None = None, view: str = ALL) -> bool:
        """Whether any run of a view, or any such run on a dataset, has a metric of this name."""
        found = _of_runs(sa.select(metrics_table.c.metric_id), dataset_name, view)
        with self._engine.connect() as connection:
            return bool(connection.scalar(sa.select(found.where(metrics_table.c.metric_name == name).exists())))

    def metric_names(self, dataset_name: str | None = None) -> list[str]:
        """The names of the metrics of all active runs, or of those on a dataset, sorted."""
        query = _of_runs(sa.select(metrics_table.c.metric_name).distinct(), dataset_name)
        with self._engine.connect() as connection:
            return sorted(connection.scalars(query))

    def metric_summaries(self, dataset_name: str | None = None) -> list[MetricSummary]:
        """Every metric of all active runs, or of those on a dataset, by name."""
        name, value = metrics_table.c.metric_name, number(self._on_sqlite)
        query = sa.select(name, sa.func.count(), sa.func.min(value), sa.func.max(value)).group_by(name)
        query = _of_runs(query, dataset_name)
        with self._engine.connect() as connection:
            return [MetricSummary(*row) for row in connection.execute(query.order_by(name))]

    def has_config_key(self, path: str) -> bool:
        """Whether the config of any run has a value at this dotted path. Reads configs until it finds one."""
        query = sa.select(experiments_table.c.full_config_json)
        with self._engine.connect() as connection:
            return any(value_at(stored_object(text), path) is not MISSING for text in connection.scalars(query))

    def runs(self, dataset_name: str, metrics: Sequence[str] = (), wanted: RunFilter = ACTIVE_RUNS) -> list[RunRow]:
        """The runs on a dataset that `wanted` describes, oldest first, with their values of these metrics.

        The analysis reads all runs at once: one query, tuples instead of dicts, and only metrics that are numbers.
        """
        columns = experiments_table.c
        values = [
            metric_of_run(name, self._on_sqlite).label(f"metric_{position}") for position, name in enumerate(metrics)
        ]
        when = sa.type_coerce(columns.timestamp, sa.Text)  # not parsed: it is only compared
        query = sa.select(
            when,
            columns.experiment_id,
            sa.func.coalesce(columns.experiment_name, ""),
            sa.func.coalesce(columns.model_type, ""),
            columns.status,
            columns.seed,
            sa.func.coalesce(columns.full_config_json, ""),
            columns.heartbeat,
            columns.data_sha256,
            *values,
        ).where(columns.dataset_name == dataset_name, *self._conditions(wanted))
        with self._engine.connect() as connection:
            found = list(connection.execute(query))
        # Sorted here: to sort, a database would copy the long configs.
        found.sort(key=lambda row: (row[0] is not None, row[0], row[1]))
        runs = []
        for row in found:
            numbers = {name: value for name, value in zip(metrics, row[9:], strict=True) if value is not None}
            run = RunRow._make((*row[1:7], numbers, row[8]))
            dead = run.status == "running" and is_dead(run.experiment_id, row[7])
            runs.append(run._replace(status="interrupted") if dead else run)
        return runs

    # Lists of runs

    def find_runs(
        self,
        wanted: RunFilter = ACTIVE_RUNS,
        *,
        sort: str = "timestamp",
        descending: bool = False,
        limit: int | None = None,
        with_json: bool = False,
        offset: int = 0,
    ) -> list[dict[str, Any]]:
        """The runs that `wanted` describes, sorted by a column or a metric; runs without a number there come last.

        The first `offset` of them are left out.

        Runs with equal values are in the order of their ids. Config and environment are left out unless `with_json`.
        """
        table, ids = experiments_table, experiments_table.c.experiment_id
        conditions = self._conditions(wanted)
        order = self._order(sort, descending)
        query = sa.select(*[column for column in table.columns if with_json or column.name not in JSON_COLUMNS])
        if limit is None or limit > IDS_PER_QUERY:
            return self._rows(query.where(*conditions).order_by(*order).limit(limit).offset(offset))
        # A short list takes two queries. The first finds the ids in an index alone, because reading the long rows, or
        # a metric of every run, is slow. The second reads the rows of these ids.
        if sort in table.columns:
            with self._engine.connect() as connection:
                some = sa.select(ids).where(*conditions).order_by(*order).limit(limit).offset(offset)
                first = list(connection.scalars(some))
        else:
            first = self._first_by_metric(sort, wanted, descending, limit, offset)
        rows = {row["experiment_id"]: row for row in self._rows(query.where(ids.in_(first)))}
        return [rows[experiment_id] for experiment_id in first if experiment_id in rows]

    def _order(self, sort: str, descending: bool) -> list[sa.ColumnElement[Any]]:
        columns = experiments_table.columns
        key: sa.ColumnElement[Any] = columns[sort] if sort in columns else metric_of_run(sort, self._on_sqlite)
        if isinstance(key.type, sa.Text):
            key = sa.collate(key, "BINARY" if self._on_sqlite else "C")  # the order of Python, on every database
        return [sa.nulls_last(key.desc() if descending else key), columns.experiment_id]

    def _first_by_metric(self, name: str, wanted: RunFilter, descending: bool, limit: int, offset: int) -> list[str]:
        """The ids of runs with a number in this metric, in its order, then of those without one."""
        ids, value = metrics_table.c.experiment_id, number(self._on_sqlite)
        numbered = sa.select(ids, metrics_table.c.metric_id).where(
            metrics_table.c.metric_name == name, value.is_not(None)
        )
        if wanted == RunFilter(view=wanted.view):  # then an index of the metrics holds all that is asked for
            numbered = numbered.where(in_view(wanted.view, ids))
        else:
            numbered = numbered.join(experiments_table).where(*self._conditions(wanted))
        last = numbered.where(is_last_of_its_name())

        def window(query: sa.Select[Any]) -> sa.Select[Any]:
            return query.order_by(value.desc() if descending else value, ids).limit(limit).offset(offset)

        with self._engine.connect() as connection:
            # Only an adopted database has a name twice in a run. So the first window is read without a look at every
            # metric, and read again if one of its metrics turns out not to be the last one of its name.
            found = list(connection.execute(window(last if offset else numbered)))
            if not offset:
                some = metrics_table.c.metric_id.in_([metric_id for _, metric_id in found])
                older = sa.select(sa.func.count()).where(some, ~is_last_of_its_name())
                found = list(connection.execute(window(last))) if connection.scalar(older) else found
            first = [experiment_id for experiment_id, _ in found]
            if len(first) < limit:
                numbers = sa.select(sa.func.count()).select_from(last.subquery())
                before = int(connection.scalar(numbers) or 0) if offset else 0
                with_number = last.with_only_columns(ids)
                rest = sa.select(experiments_table.c.experiment_id).where(
                    experiments_table.c.experiment_id.not_in(with_number), *self._conditions(wanted)
                )
                rest = rest.order_by(experiments_table.c.experiment_id).limit(limit - len(first))
                first += connection.scalars(rest.offset(max(0, offset - before)))
        return first

    def count_runs(self, wanted: RunFilter = ACTIVE_RUNS) -> int:
        """How many runs `wanted` describes."""
        with self._engine.connect() as connection:
            conditions = self._conditions(wanted, all_runs=True)
            query = sa.select(sa.func.count()).select_from(experiments_table).where(*conditions)
            return int(connection.scalar(query) or 0)

    def _conditions(self, wanted: RunFilter, all_runs: bool = False) -> list[sa.ColumnElement[bool]]:
        """What the runs have to meet, for a query that reads `all_runs` or one that ends after the first few."""
        conditions = column_conditions(wanted, self._on_sqlite)
        if wanted.status is not None:
            dead = self.dead_runs() if wanted.status in ("running", "interrupted") else []
            conditions.append(status_condition(wanted.status, dead))
        conditions += [self._metric_condition(*comparison, all_runs) for comparison in wanted.where]
        # A run that lacks what a condition asks for is not excluded: NULL counts as false.
        conditions += [
            ~sa.func.coalesce(sa.and_(sa.true(), *self._conditions(one)), sa.false()) for one in wanted.exclude
        ]
        return conditions + self._config_conditions(wanted, conditions)

    def _config_conditions(
        self, wanted: RunFilter, others: Sequence[sa.ColumnElement[bool]]
    ) -> list[sa.ColumnElement[bool]]:
        """The comparisons of configs, as a condition on ids: configs are read from the runs that meet the `others`.

        Python compares, because an adopted database may hold text that is no JSON, which ends a query of a database.
        """
        if not wanted.config:
            return []
        query = sa.select(experiments_table.c.experiment_id, experiments_table.c.full_config_json).where(*others)
        with self._engine.connect() as connection:
            rows = [(experiment_id, stored_object(text)) for experiment_id, text in connection.execute(query)]
        found = [key for key, config in rows if all(fits(config, *comparison) for comparison in wanted.config)]
        return [one_of(found, self._on_sqlite)]

    def _metric_condition(self, name: str, sign: str, limit: float, all_runs: bool) -> sa.ColumnElement[bool]:
        """Whether a run's metric fits the comparison.

        PostgreSQL takes ten times as long as SQLite to look a metric up for every run. There the query begins at the
        metrics, and if few fit, it names their runs, so that the index of the primary key finds them. On SQLite a query
        of all runs begins at the metrics if few fit.
        """
        query, is_last = runs_with_metric(name, sign, limit, self._on_sqlite)
        ids = experiments_table.c.experiment_id
        fits: sa.ColumnElement[bool] = ids.in_(query.where(is_last).correlate(None))
        if self._on_sqlite:
            if not (all_runs and self._are_few(query)):
                fits = COMPARISONS[sign](metric_of_run(name, self._on_sqlite), limit)
            return fits
        with self._engine.connect() as connection:
            some = list(connection.scalars(query.limit(IDS_PER_QUERY + 1)))
        return fits if len(some) > IDS_PER_QUERY else fits & ids.in_(some)

    def _are_few(self, query: sa.Select[str]) -> bool:
        """Whether a query of metrics finds less than a fifth as many rows as there are runs."""
        runs = sa.select(sa.func.count()).select_from(experiments_table).scalar_subquery()
        with self._engine.connect() as connection:
            return bool(
                connection.scalar(sa.select(5 * query.with_only_columns(sa.func.count()).scalar_subquery() < runs))
            )

    def metrics_of(
        self, experiment_ids: Sequence[str], names: Sequence[str] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Id -> `metrics` of that run, or those of the given names; in few queries."""
        found: dict[str, dict[str, Any]] = {experiment_id: {} for experiment_id in experiment_ids}
        table = metrics_table.c
        for start in range(0, len(experiment_ids), IDS_PER_QUERY):
            query = sa.select(table.experiment_id, table.metric_name, table.metric_value).where(
                table.experiment_id.in_(experiment_ids[start : start + IDS_PER_QUERY])
            )
            if names is not None:
                query = query.where(table.metric_name.in_(names))
            with self._engine.connect() as connection:
                for experiment_id, name, value in connection.execute(query.order_by(table.metric_id)):
                    found[experiment_id][name] = value
        return found
