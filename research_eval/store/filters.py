"""A `RunFilter` as conditions of SQL, and the number in a metric as SQL reads it."""

from __future__ import annotations

import sqlalchemy as sa

from research_eval.store.records import COMPARISONS, RunFilter
from research_eval.store.tables import experiments_table, metrics_table

# `metric_value` if it is a number, else NULL. Written exactly as in the index `ix_metrics_number` of `v0003_scale`: a
# database uses an index over an expression only for the same expression. Hence no bound parameters either.
_SQLITE_NUMBER = "CASE WHEN typeof(metric_value) IN ('real', 'integer') THEN metric_value END"
_POSTGRESQL_NUMBER = (
    "CASE WHEN jsonb_typeof(metric_value) = 'number' OR metric_value #>> '{}' IN ('Infinity', '-Infinity') "
    "THEN CAST(metric_value #>> '{}' AS double precision) END"
)


def number(on_sqlite: bool) -> sa.ColumnElement[float | None]:
    """`metric_value` if it is a number, else NULL."""
    return sa.literal_column(_SQLITE_NUMBER if on_sqlite else _POSTGRESQL_NUMBER, sa.Double)


def metric_of_run(name: str, on_sqlite: bool) -> sa.ScalarSelect[float | None]:
    """In a query of runs: the metric of this name, NULL if it is missing, NaN or no number."""
    return (
        sa.select(number(on_sqlite))
        .where(metrics_table.c.experiment_id == experiments_table.c.experiment_id, metrics_table.c.metric_name == name)
        .order_by(metrics_table.c.metric_id.desc())  # an adopted database may have a name twice: the last counts
        .limit(1)
        .correlate(experiments_table)
        .scalar_subquery()
    )


def column_conditions(wanted: RunFilter) -> list[sa.ColumnElement[bool]]:
    """The parts of the filter that compare columns; status and metrics are not among them."""
    columns = experiments_table.c
    names = ("dataset_name", "model_type", "experiment_name", "run_type")
    conditions = [columns[name] == getattr(wanted, name) for name in names if getattr(wanted, name) is not None]
    if wanted.study is not None:
        conditions += [columns.run_type == "optuna_trial", columns.experiment_name == wanted.study]
    if wanted.since is not None:
        conditions.append(columns.timestamp >= wanted.since)
    return conditions


def status_condition(status: str, dead: list[str]) -> sa.ColumnElement[bool]:
    """Whether a run has this status. The `dead` ids are runs that are stored as running and count as interrupted."""
    columns = experiments_table.c
    if status == "running":
        return (columns.status == "running") & columns.experiment_id.not_in(dead)
    if status == "interrupted":
        return (columns.status == "interrupted") | columns.experiment_id.in_(dead)
    return columns.status == status


def runs_with_metric(name: str, sign: str, limit: float) -> tuple[sa.Select[str], sa.ColumnElement[bool]]:
    """On PostgreSQL: the ids of runs with a metric of this name that fits, and the condition that it is the last one.

    An adopted database may have a name twice in a run; the last one counts. That condition is apart, because a caller
    that only asks whether few runs fit is faster without it.
    """
    later = metrics_table.alias()
    is_last = ~sa.exists().where(
        later.c.experiment_id == metrics_table.c.experiment_id,
        later.c.metric_name == name,
        later.c.metric_id > metrics_table.c.metric_id,
    )
    query = sa.select(metrics_table.c.experiment_id).where(
        metrics_table.c.metric_name == name, COMPARISONS[sign](number(on_sqlite=False), limit)
    )
    return query, is_last
