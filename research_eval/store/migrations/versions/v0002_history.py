"""The state of a run (`status`, `seed`, `error`, `heartbeat`, `parent_id`) and its time series (`history`)."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from research_eval.errors import ConfigError

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    inspector = sa.inspect(op.get_bind())
    if inspector.has_table("history"):
        raise ConfigError("database: its table 'history' belongs to another program. Give another database.")
    added: list[sa.Column[Any]] = [
        sa.Column("status", sa.Text),
        sa.Column("seed", sa.BigInteger),
        sa.Column("error", sa.Text),
        sa.Column("heartbeat", sa.DateTime),
        sa.Column("parent_id", sa.Text),
    ]
    found = {column["name"] for column in inspector.get_columns("experiments")}
    with op.batch_alter_table("experiments") as batch:
        for column in added:
            if column.name not in found:
                batch.add_column(column)
    op.execute(  # runs from before there was a status: whoever has metrics came to its end
        "UPDATE experiments SET status = CASE WHEN experiment_id IN (SELECT experiment_id FROM metrics) "
        "THEN 'finished' ELSE 'interrupted' END WHERE status IS NULL"
    )
    op.create_table(
        "history",
        sa.Column("experiment_id", sa.Text, sa.ForeignKey("experiments.experiment_id"), primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("epoch", sa.Double, nullable=False),
        sa.Column("value", sa.Double),
        sqlite_with_rowid=False,
    )
