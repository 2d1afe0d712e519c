"""The tables `experiments` and `metrics`; a pair that an earlier program made is adopted with its rows."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from research_eval.errors import ConfigError

revision = "0001"
down_revision = None


def _tables() -> dict[str, list[sa.Column[Any]]]:
    return {
        "experiments": [
            sa.Column("experiment_id", sa.Text, primary_key=True),
            sa.Column("run_type", sa.Text),
            sa.Column("timestamp", sa.DateTime),
            sa.Column("experiment_name", sa.Text),
            sa.Column("model_type", sa.Text),
            sa.Column("dataset_name", sa.Text),
            sa.Column("dataset_type", sa.Text),
            sa.Column("epochs", sa.Integer),
            sa.Column("batch_size", sa.Integer),
            sa.Column("full_config_json", sa.Text),
            sa.Column("env_details_json", sa.Text),
        ],
        "metrics": [
            sa.Column("metric_id", sa.Integer, primary_key=True),
            sa.Column("experiment_id", sa.Text, sa.ForeignKey("experiments.experiment_id"), nullable=False),
            sa.Column("metric_name", sa.Text, nullable=False),
            sa.Column("metric_value", sa.REAL().with_variant(JSONB(none_as_null=True), "postgresql")),
        ],
    }


def upgrade() -> None:
    inspector = sa.inspect(op.get_bind())
    for table, columns in _tables().items():
        if not inspector.has_table(table):
            op.create_table(table, *columns, sqlite_autoincrement=table == "metrics")
            continue
        found = {column["name"] for column in inspector.get_columns(table)}
        missing = [column.name for column in columns if column.name not in found]
        if missing:
            raise ConfigError(
                f"database: its table {table!r} belongs to another program (it has no {', '.join(missing)}). "
                "Give another database."
            )
    op.create_index(
        "ix_experiments_dataset_name_model_type", "experiments", ["dataset_name", "model_type"], if_not_exists=True
    )
    op.create_index(
        "ix_metrics_experiment_id_metric_name", "metrics", ["experiment_id", "metric_name"], if_not_exists=True
    )
