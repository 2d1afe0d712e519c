"""A `RunFilter` as conditions of SQL, and the number in a metric as SQL reads it.

Values of the user are bound parameters everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from research_eval.store.changes import MISSING
from research_eval.store.records import ACTIVE, ALL, ARCHIVED, COMPARISONS, DELETED, HIDDEN, RunFilter
from research_eval.store.tables import experiments_table, metrics_table

# `metric_value` if it is a number, else NULL. Written exactly as in the index `ix_metrics_number` of the migrations: a
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


def in_view(view: str, column: sa.ColumnElement[str] = experiments_table.c.experiment_id) -> sa.ColumnElement[bool]:
    """Whether the run with the id in this column belongs to the view.

    Few runs are hidden. The condition looks their ids up in an index of their own (`v0005_curation`), so that a list is
    still read from its index alone.
    """
    if view == ALL:
        return sa.true()
    hidden = experiments_table.alias("hidden")
    ids = sa.select(hidden.c.experiment_id).where(
        sa.func.coalesce(hidden.c.deleted_at, hidden.c.archived_at).is_not(None)
    )
    if view in (ACTIVE, HIDDEN):
        return column.not_in(ids) if view == ACTIVE else column.in_(ids)
    if view == ARCHIVED:
        return column.in_(ids.where(hidden.c.deleted_at.is_(None)))
    deleted = ids.where(hidden.c.deleted_at.is_not(None))
    return column.in_(deleted) if view == DELETED else column.not_in(deleted)


def one_of(ids: Sequence[str], on_sqlite: bool) -> sa.ColumnElement[bool]:
    """Whether a run has one of these ids. They are one parameter, because databases limit the number of parameters."""
    column, text = experiments_table.c.experiment_id, json.dumps(list(ids))
    if on_sqlite:
        return column.in_(sa.select(sa.func.json_each(text).table_valued("value").c.value))
    return column.in_(sa.select(sa.func.jsonb_array_elements_text(sa.cast(list(ids), JSONB)).column_valued()))


def value_at(config: Any, path: str) -> Any:
    """The value of a config at a dotted path; MISSING if there is none."""
    for key in path.split("."):
        if not isinstance(config, dict) or key not in config:
            return MISSING
        config = config[key]
    return config


def fits(config: Any, path: str, sign: str, wanted: Any) -> bool:
    """Whether the value of a config at a dotted path fits the comparison. A config without that key never does.

    Only numbers have an order. True and false equal no number.

    >>> fits({"a": {"b": 64}}, "a.b", ">=", 32.0), fits({"a": True}, "a", "==", 1.0), fits({}, "a", "!=", 1.0)
    (True, False, False)
    """
    value = value_at(config, path)
    if value is MISSING:
        return False
    are_numbers = [isinstance(one, int | float) and not isinstance(one, bool) for one in (value, wanted)]
    if sign in ("==", "!="):
        return (are_numbers[0] == are_numbers[1] and value == wanted) == (sign == "==")
    return all(are_numbers) and bool(COMPARISONS[sign](value, wanted))


def column_conditions(wanted: RunFilter, on_sqlite: bool) -> list[sa.ColumnElement[bool]]:
    """The parts of the filter that compare columns; status, metrics and configs are not among them."""
    columns = experiments_table.c
    names = ("dataset_name", "model_type", "experiment_name", "run_type")
    conditions = [columns[name] == getattr(wanted, name) for name in names if getattr(wanted, name) is not None]
    if wanted.study is not None:
        conditions += [columns.run_type == "optuna_trial", columns.experiment_name == wanted.study]
    if wanted.since is not None:
        conditions.append(columns.timestamp >= wanted.since)
    if wanted.until is not None:
        conditions.append(columns.timestamp < wanted.until)
    if wanted.name is not None:
        conditions.append(_matches(columns.experiment_name, wanted.name, on_sqlite))
    # Tags are JSON text without characters that JSON would change, so a quoted tag is found as it stands.
    position = sa.func.instr if on_sqlite else sa.func.strpos
    conditions += [position(columns.tags, json.dumps(tag)) > 0 for tag in wanted.tags]
    if wanted.ids is not None:
        conditions.append(one_of(wanted.ids, on_sqlite))
    if wanted.view != ALL:
        conditions.append(in_view(wanted.view))
    return conditions


def _matches(column: sa.ColumnElement[str], pattern: str, on_sqlite: bool) -> sa.ColumnElement[bool]:
    """Whether a text matches a pattern, case included: `*` stands for any characters, `?` for one."""
    if on_sqlite:  # its LIKE ignores case; in GLOB a bracket begins a set of characters
        return column.op("GLOB", return_type=sa.Boolean)(pattern.replace("[", "[[]"))
    for letter in "\\%_":
        pattern = pattern.replace(letter, f"\\{letter}")
    return column.like(pattern.replace("*", "%").replace("?", "_"), escape="\\")


def status_condition(status: str, dead: list[str]) -> sa.ColumnElement[bool]:
    """Whether a run has this status. The `dead` ids are runs that are stored as running and count as interrupted."""
    columns = experiments_table.c
    if status == "running":
        return (columns.status == "running") & columns.experiment_id.not_in(dead)
    if status == "interrupted":
        return (columns.status == "interrupted") | columns.experiment_id.in_(dead)
    return columns.status == status


def runs_with_metric(
    name: str, sign: str, limit: float, on_sqlite: bool
) -> tuple[sa.Select[str], sa.ColumnElement[bool]]:
    """The ids of runs with a metric of this name that fits, and the condition that it is the last one.

    An adopted database may have a name twice in a run; the last one counts. That condition is apart, because a caller
    that only asks whether few runs fit is faster without it.
    """
    query = sa.select(metrics_table.c.experiment_id).where(
        metrics_table.c.metric_name == name, COMPARISONS[sign](number(on_sqlite), limit)
    )
    return query, is_last_of_its_name()


def is_last_of_its_name() -> sa.ColumnElement[bool]:
    """Whether a metric is the last one of its name in its run."""
    later = metrics_table.alias()
    return ~sa.exists().where(
        later.c.experiment_id == metrics_table.c.experiment_id,
        later.c.metric_name == metrics_table.c.metric_name,
        later.c.metric_id > metrics_table.c.metric_id,
    )
