"""The results database and the CSV file: the documented names, under the address that users know.

    from research_eval.db_utils import Store

    with Store("results.db", read_only=True) as store:
        for run in store.find_runs(sort="final_val_f1", descending=True, limit=5):
            print(run["experiment_id"], store.metrics(run["experiment_id"]))

The code is in `research_eval.store`, which imports nothing of this module; `store/tables.py` describes the tables and
columns. `DB_FILE` is the database of a command without `--db` and without `$GOE_DB`; assigning to it changes that.
"""

from __future__ import annotations

from research_eval.store import connection as _connection
from research_eval.store.backup import back_up, copy_database
from research_eval.store.connection import DB_VARIABLE, StoreUnavailable, database_url
from research_eval.store.csv_file import append_csv, csv_lines, csv_text
from research_eval.store.migrate import foreign_table
from research_eval.store.records import (
    COMPARISONS,
    STATUSES,
    HistoryRow,
    MetricSummary,
    RunFilter,
    RunRecord,
    RunRow,
)
from research_eval.store.store import Store
from research_eval.store.tables import (
    SCHEMA_VERSION,
    VERSION_TABLE,
    experiments_table,
    history_names,
    history_points,
    history_runs,
    history_view,
    metadata,
    metrics_table,
)
from research_eval.store.values import canonical_json, normal_metrics, strict_json

DB_FILE = _connection.DB_FILE
_connection.default_file = lambda: DB_FILE  # read at each use, so that an assignment to DB_FILE counts everywhere

__all__ = [
    "COMPARISONS",
    "DB_FILE",
    "DB_VARIABLE",
    "SCHEMA_VERSION",
    "STATUSES",
    "VERSION_TABLE",
    "HistoryRow",
    "MetricSummary",
    "RunFilter",
    "RunRecord",
    "RunRow",
    "Store",
    "StoreUnavailable",
    "append_csv",
    "back_up",
    "canonical_json",
    "copy_database",
    "csv_lines",
    "csv_text",
    "database_url",
    "experiments_table",
    "foreign_table",
    "history_names",
    "history_points",
    "history_runs",
    "history_view",
    "metadata",
    "metrics_table",
    "normal_metrics",
    "strict_json",
]
