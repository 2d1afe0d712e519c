"""What people say about runs: `archived_at`, `deleted_at`, `tags` and `note`.

An archived run is left out of tables and suggestions. A deleted run lies in the trash until it is restored or purged.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    added: list[sa.Column[Any]] = [
        sa.Column("archived_at", sa.DateTime),
        sa.Column("deleted_at", sa.DateTime),
        sa.Column("tags", sa.Text),
        sa.Column("note", sa.Text),
    ]
    # An adopted database may have columns of these names already.
    found = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("experiments")}
    for column in added:
        if column.name not in found:
            op.add_column("experiments", column)
    # Every list leaves hidden runs out. They are few, so that this index is small, and a list is still read from
    # `ix_experiments_listing` alone. The expression is the one of the queries, or the index would not be used.
    op.execute(
        "CREATE INDEX IF NOT EXISTS ix_experiments_hidden ON experiments (experiment_id) "
        "WHERE coalesce(deleted_at, archived_at) IS NOT NULL"
    )
