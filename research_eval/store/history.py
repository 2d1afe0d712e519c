"""Writing time series: points as rows of `history_points`, with the numbers of their runs and names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from research_eval.store.records import HistoryRow
from research_eval.store.tables import history_names, history_points, history_runs

POINTS_PER_QUERY = 1000


def put_history(connection: Connection, history: Mapping[str, Sequence[HistoryRow]]) -> None:
    """Insert the points of some runs (id -> points); a point that exists already gets the new value.

    A run writes points again after `--resume`, and when pending writes are stored twice. If one call has a point
    twice, the last value counts, as in two calls.
    """
    points = _as_rows(connection, history)
    points = list({(point["run_id"], point["name_id"], point["step"]): point for point in points}.values())
    if connection.dialect.name == "postgresql":
        _replace_on_postgresql(connection, points)
    elif points:
        insert = sqlite.insert(history_points)
        new = {name: insert.excluded[name] for name in ("epoch", "value")}
        upsert = insert.on_conflict_do_update(index_elements=list(history_points.primary_key), set_=new)
        connection.execute(upsert, points)


def _replace_on_postgresql(connection: Connection, points: list[dict[str, Any]]) -> None:
    """An upsert by hand: there is no unique index on PostgreSQL, see `v0003_scale`.

    The caller has updated the row of the run before, so no other writer of this run can insert the same points between
    the SELECT and the INSERT.
    """
    columns = history_points.c
    key = (columns.run_id, columns.step, columns.name_id)
    for start in range(0, len(points), POINTS_PER_QUERY):
        some = points[start : start + POINTS_PER_QUERY]
        keys = {tuple(point[column.name] for column in key) for point in some}
        runs, steps, _ = map(set, zip(*keys, strict=True))
        near = sa.select(*key).where(columns.run_id.in_(runs), columns.step.in_(steps))
        if replaced := keys & set(map(tuple, connection.execute(near))):
            connection.execute(history_points.delete().where(sa.tuple_(*key).in_(list(replaced))))
        connection.execute(history_points.insert(), some)


def _as_rows(connection: Connection, history: Mapping[str, Sequence[HistoryRow]]) -> list[dict[str, Any]]:
    """The points as rows of `history_points`; runs and names that have no number yet get one."""
    runs = _numbers(connection, history_runs, {key for key, points in history.items() if points})
    names = _numbers(connection, history_names, {point.name for points in history.values() for point in points})
    return [
        {
            "run_id": runs[experiment_id],
            "name_id": names[point.name],
            "step": int(point.step),
            "epoch": float(point.epoch),
            "value": float(point.value),
        }
        for experiment_id, points in history.items()
        for point in points
    ]


def _numbers(connection: Connection, table: sa.Table, texts: set[str]) -> dict[str, int]:
    """Text -> its number in `history_runs` or `history_names`; a new text gets the next number.

    Another writer may insert the same text between the two queries. The INSERT then does nothing, and the second SELECT
    finds the number that the other writer got.
    """
    number, text = table.columns
    query = sa.select(text, number).where(text.in_(sorted(texts)))
    found: dict[str, int] = dict(connection.execute(query).all()) if texts else {}
    missing = sorted(texts - found.keys())  # in one order, or two writers could wait for each other
    if missing:
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        connection.execute(insert(table).on_conflict_do_nothing(), [{text.name: key} for key in missing])
        found |= dict(connection.execute(query).all())
    return found


def delete_history(connection: Connection, experiment_ids: Sequence[str], after_step: int | None = None) -> None:
    """Delete the points of runs: all of them, or those later than `after_step`."""
    runs = sa.select(history_runs.c.run_id).where(history_runs.c.experiment_id.in_(experiment_ids))
    query = history_points.delete().where(history_points.c.run_id.in_(runs))
    connection.execute(query if after_step is None else query.where(history_points.c.step > after_step))
