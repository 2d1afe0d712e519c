"""What the Path Atlas draws: a traced epoch as columns, the samples and their names. No torch.

S samples  T steps of a path  A actions or experts
"""

from __future__ import annotations

import base64
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from research_eval.errors import ConfigError
from research_eval.files import run_folder
from research_eval.routing.trace_files import (
    ROUTING_FOLDER,
    TracedEpoch,
    damage_is_said,
    read_epoch,
    read_samples,
    read_summary,
)
from research_eval.system.untrusted import in_folder

log = logging.getLogger(__name__)

KEPT = ("router_entropy", "path_class_nmi_adjusted", "path_group_nmi_adjusted", "planted_recovery", "mean_path_length")


def trace_folder(experiment_id: str) -> Path:
    """The folder of a run with a trace. Raises ConfigError for a run without one, and for a link."""
    folder = run_folder(experiment_id)
    if folder.is_symlink() or not in_folder(folder, ROUTING_FOLDER).is_dir():
        raise ConfigError(
            f"run {experiment_id}: no routing trace. Train again with training_params.trace_routing: true."
        )
    return folder


def epoch_list(folder: Path) -> list[dict[str, Any]]:
    """The traced epochs, with the numbers that stand above the slider. `saved` marks the epoch of the run's weights.

    An epoch whose summary is damaged is left out, with a message in the log.
    """
    found = []
    for path in sorted((folder / ROUTING_FOLDER).glob("epoch_*.json")):
        if not path.with_suffix(".parquet").exists():
            continue
        try:
            summary = read_summary(in_folder(path.parent, path.name))
        except ConfigError as error:
            log.warning("%s", error)
            continue
        alarms = [one.get("name") for one in summary.get("alarms") or () if isinstance(one, dict)]
        kept = {name: summary[name] for name in KEPT if isinstance(summary.get(name), int | float)}
        found.append({"epoch": summary["epoch"], "best": bool(summary.get("best_so_far")), "alarms": alarms, **kept})
    best = [one["epoch"] for one in found if one.pop("best")]
    return [{**one, "saved": bool(best) and one["epoch"] == best[-1]} for one in found]


def epoch_columns(folder: Path, epoch: int) -> dict[str, Any]:
    """One epoch as columns of numbers in base64, little endian.

    Raises ConfigError for an epoch that was not traced, and for a damaged file.
    """
    traced = read(folder, epoch)
    with damage_is_said(folder / ROUTING_FOLDER / f"epoch_{epoch:04}.parquet"):
        return _columns(folder, traced)


def _columns(folder: Path, traced: TracedEpoch) -> dict[str, Any]:
    table, size = traced.samples, traced.samples.num_rows
    if "path" not in table.column_names:
        raise ConfigError(f"{folder.name}: the model has no experts that a router chooses")
    paths_ST = _padded(table["path"].combine_chunks())
    probabilities_STA = _nested(table, "probabilities", size, paths_ST.shape[1])
    shares_STA = _nested(table, "expert_share", size, paths_ST.shape[1])
    taken_STA = shares_STA if probabilities_STA is None else probabilities_STA
    experts = _num_experts(traced, paths_ST, taken_STA, has_stop=probabilities_STA is not None)
    columns: dict[str, NDArray[Any]] = {"path": paths_ST.astype(np.int16)}
    if taken_STA is not None:
        chosen_ST = np.take_along_axis(taken_STA, np.maximum(paths_ST, 0)[..., None], 2)[..., 0]
        columns["chosen"] = np.rint(255 * np.where(paths_ST >= 0, chosen_ST, 0)).astype(np.uint8)
    for name, kind in (("label", np.int16), ("prediction", np.int16), ("group", np.int16), ("correct", np.uint8)):
        if name in table.column_names:
            columns[name] = np.asarray(table[name]).astype(kind)
    columns["loss"] = np.asarray(table["loss"]).astype(np.float32)
    return {
        "epoch": traced.epoch,
        "version": traced.version,
        "samples": size,
        "steps": paths_ST.shape[1],
        "experts": experts,
        "about_tokens": shares_STA is not None,
        "router": traced.summary.get("router", {}),
        "columns": {name: packed(column) for name, column in columns.items()},
    }


def sample_row(folder: Path, epoch: int, sample: int) -> dict[str, Any]:
    """All that one epoch's trace says of a sample. Raises ConfigError for a number beyond the samples."""
    table = read(folder, epoch).samples
    if not 0 <= sample < table.num_rows:
        raise ConfigError(f"sample: expected a number from 0 to {table.num_rows - 1}, got {sample}")
    return {name: plain(value) for name, value in table.slice(sample, 1).to_pylist()[0].items()}


def samples_of(folder: Path) -> dict[str, Any]:
    """The tokens of all samples, and the names of classes and tokens; empty for a trace of the first version."""
    tokens, names = read_samples(folder)
    if tokens is None:
        return {"names": names, "columns": {}}
    flat, offsets = np.asarray(tokens.values), np.asarray(tokens.offsets)
    columns = {"tokens": flat.astype(np.int32), "offsets": offsets.astype(np.int32)}
    return {"names": names, "columns": {name: packed(column) for name, column in columns.items()}}


def read(folder: Path, epoch: int) -> TracedEpoch:
    """A traced epoch. Raises ConfigError if there is none of this number."""
    path = in_folder(folder / ROUTING_FOLDER, f"epoch_{epoch:04}.parquet")
    if not path.is_file():
        raise ConfigError(f"{folder.name}: epoch {epoch} was not traced")
    return read_epoch(path)


def packed(column: NDArray[Any]) -> dict[str, str]:
    """A column for a browser: the name of its numbers' type, and their bytes in base64."""
    little = np.ascontiguousarray(column, column.dtype.newbyteorder("<"))
    return {"type": str(column.dtype), "data": base64.b64encode(little.tobytes()).decode()}


def _padded(paths: pa.ListArray) -> NDArray[np.int64]:
    """Lists of experts as rows with -1 after their end, without a Python object per number."""
    offsets, values = np.asarray(paths.offsets), np.asarray(paths.values)
    lengths = np.diff(offsets)
    padded_ST = np.full((len(lengths), max(int(lengths.max(initial=0)), 1)), -1, np.int64)
    padded_ST[np.arange(padded_ST.shape[1]) < lengths[:, None]] = values[offsets[0] : offsets[-1]]
    return padded_ST


def _nested(table: pa.Table, name: str, size: int, steps: int) -> NDArray[np.float32] | None:
    """A column of lists of lists as an array [S, T, A], cut to the longest path; None if there is none."""
    if name not in table.column_names or not size:
        return None
    flat = np.asarray(table[name].combine_chunks().flatten().flatten())
    whole_STA = flat.reshape(size, len(table[name][0]), -1)
    found: NDArray[np.float32] = whole_STA[:, :steps]
    return found


def _num_experts(
    traced: TracedEpoch, paths_ST: NDArray[np.int64], taken_STA: NDArray[np.float32] | None, has_stop: bool
) -> int:
    """How many experts there are: the width of what was recorded, or the load, or at least those that were used."""
    load = traced.summary.get("expert_load")
    if isinstance(load, list) and load:
        return len(load[0]) if isinstance(load[0], list) else len(load)
    return int(paths_ST.max(initial=0)) + 1 if taken_STA is None else taken_STA.shape[2] - has_stop


def plain(value: Any) -> Any:
    """The value with short numbers, for JSON; None for what is no number."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
