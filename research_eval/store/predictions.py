"""What a run answered to each sample of a test split: a Parquet file in the folder of the run.

Row i is sample i of the split. Files of two runs line up if their `split_sha256` is the same.

N samples of the split
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research_eval.errors import ConfigError
from research_eval.files import run_folder, write_atomically
from research_eval.system.untrusted import check_regular_file, in_folder

TEST_FILE = "predictions_test.parquet"
MAX_SAMPLES = 50_000_000
_KEY = b"predictions"  # of our entry in the metadata of the file
_COLUMNS = ("label", "prediction", "loss", "correct")


@dataclass(frozen=True)
class Predictions:
    """The columns of the file. A task without one number or class per sample has no labels and predictions.

    `correct` is None if the answers of the task are not right or wrong.
    """

    task: str
    split_sha256: str
    losses_N: NDArray[Any]
    labels_N: NDArray[Any] | None = None
    predictions_N: NDArray[Any] | None = None
    correct_N: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.losses_N)


def write_predictions(path: Path, found: Predictions) -> None:
    """Write the file, or replace it."""
    import pyarrow as pa  # here, because it takes long to import, and most users of the store need no Parquet
    import pyarrow.parquet as pq

    arrays = (found.labels_N, found.predictions_N, found.losses_N, found.correct_N)
    columns = {name: pa.array(values) for name, values in zip(_COLUMNS, arrays, strict=True) if values is not None}
    described = json.dumps({"task": found.task, "split_sha256": found.split_sha256})
    content = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata({_KEY: described}), content, compression="zstd")
    write_atomically(path, content.getvalue())


def read_predictions(experiment_id: str, file: str = TEST_FILE) -> Predictions | None:
    """The predictions of a run whose folder is in this working directory; None if they are not there.

    Raises ConfigError for a file that is damaged or was not written by a run.
    """
    path = in_folder(run_folder(experiment_id), file)
    if not path.exists():
        return None
    check_regular_file(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(path)
        if parquet.metadata.num_rows > MAX_SAMPLES:
            raise ValueError(f"it has more than {MAX_SAMPLES:,} rows")
        described = json.loads((parquet.metadata.metadata or {})[_KEY])
        table = parquet.read([name for name in _COLUMNS if name in parquet.schema_arrow.names])
        arrays: dict[str, NDArray[Any]] = {}
        for name in table.column_names:
            arrays[name] = table[name].to_numpy()
            if arrays[name].dtype.kind not in "bif":
                raise ValueError(f"column {name} holds no numbers")
        return Predictions(
            str(described["task"]),
            str(described["split_sha256"]),
            arrays["loss"],
            arrays.get("label"),
            arrays.get("prediction"),
            arrays.get("correct"),
        )
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError, RecursionError, MemoryError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"{path}: not the predictions of a run ({reason}). Run the experiment again.") from error


def one_per_sample(values_N: NDArray[Any] | None) -> NDArray[Any] | None:
    """The values as one number per sample; None if a sample has several."""
    if values_N is None or values_N.size != len(values_N):
        return None
    return np.reshape(values_N, len(values_N))
