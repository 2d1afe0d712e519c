"""`attempt`: how often a process has begun or continued a run. Only the last of them may write about it."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    # An adopted database may have a column of this name already.
    found = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("experiments")}
    if "attempt" not in found:
        op.add_column("experiments", sa.Column("attempt", sa.Integer))
