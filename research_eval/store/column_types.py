"""The column types of the tables: how values of Python are stored on SQLite and on PostgreSQL, and read again.

SQLite stores any value in any column, and an adopted database may hold values that another program wrote. The types
here therefore never fail when they read: they return such a value as text, or as unknown.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect

from research_eval.store.values import from_strict_json


def _as_text(value: Any) -> str | None:
    if type(value) is str or value is None:
        return value
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


class Text(sa.Text):
    """Text; a value of another type, which SQLite may return, becomes text."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return _as_text if dialect.name == "sqlite" else super().result_processor(dialect, coltype)


class _RealOrText(sa.REAL[Any]):
    """A REAL column as SQLite understands it: a value that is not a number is stored unchanged.

    SQLAlchemy's own REAL would convert each value to a float and fail for text.
    """

    def bind_processor(self, _dialect: Dialect) -> None:
        return None

    def result_processor(self, _dialect: Dialect, _coltype: object) -> None:
        return None


class MetricValue(sa.types.TypeDecorator[Any]):
    """`metrics.metric_value`: REAL on SQLite, JSONB on PostgreSQL; `tables` describes what both hold.

    It binds values that `normal_metrics` returns: a float, or what strict JSON can hold. Both ways, on both databases:

        value          SQLite             PostgreSQL
        0.5            0.5 (REAL)         0.5 (number)
        NaN            NULL               NULL
        inf            inf (REAL)         "Infinity" (string)
        [0.5, "NaN"]   '[0.5, "NaN"]'     [0.5, "NaN"] (array); both are read as [0.5, nan]
    """

    impl = sa.REAL
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.JSONB(none_as_null=True))
        return dialect.type_descriptor(_RealOrText())

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        in_json_column = dialect.name == "postgresql"
        if isinstance(value, float):
            if math.isnan(value):
                return None
            return json.dumps(value) if in_json_column and math.isinf(value) else value
        return value if in_json_column else json.dumps(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        if value is None:
            return math.nan
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str) and dialect.name != "postgresql":
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return value  # text in an adopted database, written by another program
        if isinstance(value, bytes):
            return _as_text(value)
        return from_strict_json(value)


class NanAsNull(sa.types.TypeDecorator[float]):
    """A double whose NaN is NULL on every database, because SQLite has no NaN."""

    impl = sa.Double
    cache_ok = True

    def process_bind_param(self, value: float | None, _dialect: Dialect) -> float | None:
        return None if value is None or math.isnan(value) else value

    def process_result_value(self, value: float | None, _dialect: Dialect) -> float:
        return math.nan if value is None else value


class _SqliteTime(sqlite.DATETIME):
    """Datetime that reads unparseable values as None."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        parse: Any = super().result_processor(dialect, coltype)

        def process(value: Any) -> datetime | None:
            try:
                parsed: datetime | None = parse(value)
            except (ValueError, TypeError, OverflowError):
                return None
            return parsed

        return process


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """Naive UTC in SQL, aware in Python.

    The documented type of the column is DATETIME, and SQLite has no time zones. One zone for all keeps the order of
    the texts equal to the order of the times.
    """

    impl = sa.DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        own = _SqliteTime() if dialect.name == "sqlite" else sa.DateTime()  # type: ignore[no-untyped-call]
        return dialect.type_descriptor(own)

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
