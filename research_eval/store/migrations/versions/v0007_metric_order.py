"""The index of numbers also holds the run, so that SQLite sorts and counts runs by a metric from the index alone."""

from alembic import op

revision = "0007"
down_revision = "0006"

NUMBER = "CASE WHEN typeof(metric_value) IN ('real', 'integer') THEN metric_value END"  # as in v0003 and in the queries


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":  # which reads an indexed expression from the table all the same
        return
    op.drop_index("ix_metrics_number", "metrics")
    op.execute(
        f"CREATE INDEX ix_metrics_number ON metrics (metric_name, ({NUMBER}), experiment_id) WHERE {NUMBER} IS NOT NULL"
    )
