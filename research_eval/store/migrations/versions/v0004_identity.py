"""The data of a run as a column, and FLOPs of trainings by the rules that counted them.

`data_sha256` is the hash of the data that a run used, so that runs on other data can be kept apart. Runs on text get it
from their stored environment.

Until now the weight gradients of experts and the products of LSTM kernels were not counted in `train_flops`. The metric
of such runs becomes `train_flops_v1`, so that no table and no study compares it with the full count.
"""

import hashlib
import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

WHOLE = ("dense", "looped")  # model types whose FLOPs were counted whole
ROWS = 1000  # read at a time: environments are long


def upgrade() -> None:
    op.add_column("experiments", sa.Column("data_sha256", sa.Text))
    _fill_data_sha256(op.get_bind())
    op.get_bind().execute(
        sa.text(
            "UPDATE metrics SET metric_name = 'train_flops_v1' WHERE metric_name = 'train_flops' AND experiment_id IN "
            "(SELECT experiment_id FROM experiments WHERE model_type IS NULL OR model_type NOT IN :whole)"
        ).bindparams(sa.bindparam("whole", WHOLE, expanding=True))
    )


def _fill_data_sha256(connection: sa.Connection) -> None:
    """Hash the stored hashes of the splits. Generated data have others for every seed, so they stay unknown."""
    table = sa.table(
        "experiments", *map(sa.column, ("experiment_id", "dataset_type", "env_details_json", "data_sha256"))
    )
    ids = sa.select(table.c.experiment_id).where(table.c.dataset_type == "real_world")
    known = list(connection.scalars(ids.order_by(table.c.experiment_id)))
    for start in range(0, len(known), ROWS):
        some = known[start : start + ROWS]
        rows = connection.execute(
            sa.select(table.c.experiment_id, table.c.env_details_json).where(
                table.c.experiment_id.between(some[0], some[-1]), table.c.dataset_type == "real_world"
            )
        ).all()
        for experiment_id, environment in rows:
            found = _data_sha256(environment)
            if found is not None:
                update = table.update().where(table.c.experiment_id == experiment_id)
                connection.execute(update.values(data_sha256=found))


def _data_sha256(environment: Any) -> str | None:
    """The hash of all data; None if the environment does not have the hashes of the splits."""
    try:
        hashes = json.loads(environment)["data"]["sha256"]
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest() if hashes else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
