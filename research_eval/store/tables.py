"""The tables of the results database: the sum of all migrations. What the columns hold on both databases:

- Times are UTC. They are naive in SQL and come back as aware `datetime` objects.
- `metric_value` is REAL on SQLite and JSONB on PostgreSQL. A number is a number (read as `float`); everything else is
  JSON: text on SQLite, a JSON value on PostgreSQL. NaN and None ("not measured") are SQL NULL, so that AVG, MAX and
  ORDER BY keep working, and are read as NaN. An infinity is SQLite's infinity, or the JSON string "Infinity" on
  PostgreSQL. Inside lists, which have to be valid JSON, non-finite numbers are the strings "NaN", "Infinity" and
  "-Infinity"; reading turns them into numbers again.
- `history.value` is NULL for NaN. `history` is a view: its points are stored under the numbers of a run and of a name.
- `full_config_json` is canonical (`canonical_json`), so equal configs are equal text.
- `data_sha256` is the same for all runs on the same data, whatever their seeds; NULL if it is unknown. The config and
  this hash together are what identifies a run.
- `archived_at` and `deleted_at` say when a run was archived or moved to the trash, else they are NULL. A run with one
  of them is hidden from lists, tables and suggestions. `tags` is a sorted JSON list of text, NULL if there are none.
"""

from __future__ import annotations

import sqlalchemy as sa

from research_eval.store.column_types import MetricValue, NanAsNull, Text, UtcDateTime

SCHEMA_VERSION = "0007"  # the newest file in migrations/versions
VERSION_TABLE = "goe_schema_version"  # own name: Optuna keeps its `alembic_version` in the same database
NUM_OLD_COLUMNS = 11  # `experiments` had this many columns before there was a schema version
CONTINUES = "continues"  # key of `env_details_json`: the run of fewer epochs, the parent, that a run trained on from
JSON_COLUMNS = ("full_config_json", "env_details_json")  # long, so lists of runs leave them out
FIRST_ATTEMPT = 1
CURATION = ("archived_at", "deleted_at", "tags", "note")  # columns that people change, not runs

metadata = sa.MetaData()

experiments_table = sa.Table(
    "experiments",
    metadata,
    sa.Column("experiment_id", Text(), primary_key=True),
    sa.Column("run_type", Text()),
    sa.Column("timestamp", UtcDateTime),
    sa.Column("experiment_name", Text()),
    sa.Column("model_type", Text()),
    sa.Column("dataset_name", Text()),
    sa.Column("dataset_type", Text()),
    sa.Column("epochs", sa.Integer),
    sa.Column("batch_size", sa.Integer),
    sa.Column("full_config_json", Text()),
    sa.Column("env_details_json", Text()),
    sa.Column("status", Text()),
    sa.Column("seed", sa.BigInteger),
    sa.Column("error", Text()),
    sa.Column("heartbeat", UtcDateTime),
    sa.Column("parent_id", Text()),
    sa.Column("data_sha256", Text()),
    sa.Column("archived_at", UtcDateTime),
    sa.Column("deleted_at", UtcDateTime),
    sa.Column("tags", Text()),
    sa.Column("note", Text()),
    sa.Column("attempt", sa.Integer),  # which process's turn it is: writes of an earlier one are refused
    sa.Index("ix_experiments_dataset_name_model_type", "dataset_name", "model_type"),
    # A covering index: a list of runs reads it alone, and not the rows with their long JSON.
    sa.Index(
        "ix_experiments_listing",
        *("timestamp", "experiment_id", "status", "model_type", "dataset_name", "experiment_name", "run_type", "seed"),
    ),
)

metrics_table = sa.Table(
    "metrics",
    metadata,
    sa.Column("metric_id", sa.Integer, primary_key=True),
    sa.Column("experiment_id", Text(), sa.ForeignKey("experiments.experiment_id"), nullable=False),
    sa.Column("metric_name", Text(), nullable=False),
    sa.Column("metric_value", MetricValue),
    sa.Index("ix_metrics_experiment_id_metric_name", "experiment_id", "metric_name"),
    sqlite_autoincrement=True,
)

# Points refer to a run and to a name by number: with the texts themselves the table would be several times as large.
history_runs = sa.Table(
    "history_runs",
    metadata,
    sa.Column("run_id", sa.Integer, primary_key=True),
    sa.Column("experiment_id", Text(), sa.ForeignKey("experiments.experiment_id"), nullable=False, unique=True),
)

history_names = sa.Table(
    "history_names",
    metadata,
    sa.Column("name_id", sa.Integer, primary_key=True),
    sa.Column("name", Text(), nullable=False, unique=True),
)

history_points = sa.Table(
    "history_points",
    metadata,
    sa.Column("run_id", sa.Integer, sa.ForeignKey("history_runs.run_id"), primary_key=True, autoincrement=False),
    sa.Column("name_id", sa.Integer, sa.ForeignKey("history_names.name_id"), primary_key=True, autoincrement=False),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Double, nullable=False),
    sa.Column("value", NanAsNull),
    sqlite_with_rowid=False,
)

# The documented face of the time series. It is a view, so it is not part of `metadata`.
history_view = sa.table(
    "history",
    sa.column("experiment_id", Text()),
    sa.column("name", Text()),
    sa.column("step", sa.BigInteger),
    sa.column("epoch", sa.Double),
    sa.column("value", NanAsNull),
)

version_table = sa.table(VERSION_TABLE, sa.column("version_num", sa.String))
