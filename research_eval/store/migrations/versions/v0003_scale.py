"""For very many runs: points of `history` under numbers instead of names, and indexes for lists of runs.

`history` becomes a view with the columns that the table had.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from research_eval.errors import ConfigError

revision = "0003"
down_revision = "0002"

LISTED = ["timestamp", "experiment_id", "status", "model_type", "dataset_name", "experiment_name", "run_type", "seed"]
# `metric_value` where it is a number, letter by letter as the queries have it, or the index would not be used.
SQLITE_NUMBER = "CASE WHEN typeof(metric_value) IN ('real', 'integer') THEN metric_value END"
POSTGRESQL_NUMBER = (
    "CASE WHEN jsonb_typeof(metric_value) = 'number' OR metric_value #>> '{}' IN ('Infinity', '-Infinity') "
    "THEN CAST(metric_value #>> '{}' AS double precision) END"
)


def upgrade() -> None:
    inspector = sa.inspect(op.get_bind())
    for table in ("history_runs", "history_names", "history_points"):
        if inspector.has_table(table):
            raise ConfigError(f"database: its table {table!r} belongs to another program. Give another database.")
    on_postgresql = op.get_bind().dialect.name == "postgresql"
    _number_history(on_postgresql)
    # What runs are filtered and sorted by, so that the rows with their long JSON are not read.
    op.create_index("ix_experiments_listing", "experiments", LISTED)
    number = POSTGRESQL_NUMBER if on_postgresql else SQLITE_NUMBER
    op.execute(f"CREATE INDEX ix_metrics_number ON metrics (metric_name, ({number})) WHERE {number} IS NOT NULL")
    if on_postgresql:  # equal keys share an entry there: a sixth of the size, for a look at the few metrics of a run
        op.drop_index("ix_metrics_experiment_id_metric_name", "metrics")
        op.create_index("ix_metrics_experiment_id", "metrics", ["experiment_id"])


def _number_history(on_postgresql: bool) -> None:
    op.create_table(
        "history_runs",
        sa.Column("run_id", sa.Integer, primary_key=True),
        sa.Column("experiment_id", sa.Text, sa.ForeignKey("experiments.experiment_id"), nullable=False, unique=True),
    )
    op.create_table(
        "history_names",
        sa.Column("name_id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
    )
    # SQLite keeps the rows in the primary key. On PostgreSQL it would be half as large as the table, and three times as
    # large as an index whose equal keys share an entry; there the store itself sees to it that a point is unique.
    key: dict[str, Any] = {} if on_postgresql else {"primary_key": True, "autoincrement": False}
    op.create_table(
        "history_points",
        sa.Column("run_id", sa.Integer, sa.ForeignKey("history_runs.run_id"), nullable=False, **key),
        sa.Column("name_id", sa.Integer, sa.ForeignKey("history_names.name_id"), nullable=False, **key),
        sa.Column("step", sa.BigInteger, nullable=False, **key),
        sa.Column("epoch", sa.Double, nullable=False),
        sa.Column("value", sa.Double),
        sqlite_with_rowid=False,
    )
    op.execute("INSERT INTO history_runs (experiment_id) SELECT DISTINCT experiment_id FROM history ORDER BY 1")
    op.execute("INSERT INTO history_names (name) SELECT DISTINCT name FROM history ORDER BY 1")
    op.execute(
        "INSERT INTO history_points SELECT run_id, name_id, step, epoch, value FROM history "
        "JOIN history_runs USING (experiment_id) JOIN history_names USING (name) ORDER BY 1, 2, 3"
    )
    if on_postgresql:
        op.create_index("ix_history_points_run_id_step", "history_points", ["run_id", "step"])
    op.drop_table("history")
    op.execute(
        "CREATE VIEW history AS SELECT history_runs.experiment_id, history_names.name, step, epoch, value "
        "FROM history_points JOIN history_runs ON history_runs.run_id = history_points.run_id "
        "JOIN history_names ON history_names.name_id = history_points.name_id"
    )
