"""Routing traces on disk: for each epoch a Parquet file with a row per validation sample, and a JSON file of metrics.

One more file holds what does not change from epoch to epoch: the samples, and names of what has numbers.

S samples  T steps of a path  A actions or experts
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from research_eval.errors import ConfigError
from research_eval.files import write_atomically
from research_eval.store.values import canonical_json
from research_eval.system.untrusted import parse_json, read_limited

ROUTING_FOLDER = "routing"
SAMPLES_FILE = "samples.parquet"
MAX_SUMMARY_BYTES = 50_000_000
NAMES = "goe.names"  # in the metadata of the samples: JSON
FORMAT = {"goe.trace": "2"}  # in the metadata of the Parquet files; version 1 has none


@dataclass(frozen=True)
class TracedEpoch:
    """One row per validation sample, and all metrics of the epoch."""

    epoch: int
    samples: pa.Table
    summary: dict[str, Any]
    version: int = 1


def write_trace(folder: Path, columns: Mapping[str, NDArray[Any]], summary: dict[str, Any]) -> None:
    """Write `epoch_0001.parquet` with the columns and `epoch_0001.json` with the summary.

    The summary's "epoch" numbers the files. A column [S, T] holds paths, -1 after their end, and becomes lists without
    these -1. A column [S, T, A] becomes lists of lists.
    """
    folder.mkdir(exist_ok=True)
    kinds = {1: pa.array, 2: _paths, 3: _nested}
    content = io.BytesIO()
    table = pa.table({name: kinds[values.ndim](values) for name, values in columns.items()}, metadata=FORMAT)
    pq.write_table(table, content, compression="zstd")
    stem = f"epoch_{summary['epoch']:04}"
    write_atomically(folder / f"{stem}.json", canonical_json(summary).encode())
    write_atomically(folder / f"{stem}.parquet", content.getvalue())  # last: the summary already exists


def write_samples(folder: Path, tokens: NDArray[np.int32], offsets: NDArray[np.int64], names: dict[str, Any]) -> None:
    """Write the tokens of every sample, and the names of classes, groups and tokens, unless they are there."""
    folder.mkdir(exist_ok=True)
    if (folder / SAMPLES_FILE).exists():
        return
    content = io.BytesIO()
    lists = pa.ListArray.from_arrays(offsets.astype(np.int32), tokens.astype(np.int32))
    table = pa.table({"tokens": lists}, metadata={**FORMAT, NAMES: canonical_json(names)})
    pq.write_table(table, content, compression="zstd")
    write_atomically(folder / SAMPLES_FILE, content.getvalue())


def _paths(paths_ST: NDArray[np.int64]) -> pa.Array:
    """Paths without the -1 after their end."""
    taken_ST = paths_ST >= 0
    offsets = np.append(0, taken_ST.sum(1).cumsum()).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, paths_ST[taken_ST])


def _nested(values_STA: NDArray[np.float32]) -> pa.Array:
    """Lists of lists, [T][A] per sample."""
    samples, steps, actions = values_STA.shape
    inner = pa.ListArray.from_arrays(np.arange(0, values_STA.size + 1, actions, dtype=np.int32), values_STA.ravel())
    return pa.ListArray.from_arrays(np.arange(0, samples * steps + 1, steps, dtype=np.int32), inner)


def read_trace(folder: Path) -> Iterator[TracedEpoch]:
    """The traced epochs in a run's folder, in order.

    Raises ConfigError if there are none.
    """
    files = sorted((folder / ROUTING_FOLDER).glob("epoch_*.parquet"))
    if not files:
        raise ConfigError(f"{folder}: no routing trace; train with training_params.trace_routing: true")
    for file in files:
        yield read_epoch(file)


def read_epoch(file: Path) -> TracedEpoch:
    """One traced epoch, from its Parquet file. Raises ConfigError for a damaged file."""
    summary = read_summary(file.with_suffix(".json"))
    with damage_is_said(file):
        table = pq.read_table(file)
        version = int((table.schema.metadata or {}).get(b"goe.trace", b"1"))
    return TracedEpoch(summary["epoch"], table, summary, version)


def read_summary(file: Path) -> dict[str, Any]:
    """The metrics of a traced epoch; None for one that is no number. Raises ConfigError for a damaged file."""
    with damage_is_said(file):
        summary = json.loads(read_limited(file, MAX_SUMMARY_BYTES, "a routing summary"), parse_constant=lambda _: None)
    if not isinstance(summary, dict) or type(summary.get("epoch")) is not int:
        raise ConfigError(f"{file}: damaged: expected an object with the number of the epoch")
    return summary


@contextmanager
def damage_is_said(file: Path) -> Iterator[None]:
    """What fails in this block is the fault of the file: raises ConfigError with its name."""
    try:
        yield
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file}: damaged or no trace: {error}") from error


def read_samples(folder: Path) -> tuple[pa.Array | None, dict[str, Any]]:
    """The tokens of every sample, lists of numbers, and names; None and no names for a trace of the first version."""
    path = folder / ROUTING_FOLDER / SAMPLES_FILE
    if not path.exists():
        return None, {"labels": [], "tokens": {}}
    with damage_is_said(path):
        table = pq.read_table(path)
        names = parse_json(table.schema.metadata[NAMES.encode()], str(path))
        if not pa.types.is_list(table.schema.field("tokens").type) or not isinstance(names, dict):
            raise ValueError("expected lists of tokens and an object of names")
        return table["tokens"].combine_chunks(), names
