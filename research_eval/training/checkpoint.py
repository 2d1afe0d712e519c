"""Files that hold everything for an exact continuation: safetensors, with plain values as JSON in the header."""

from __future__ import annotations

import json
import logging
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from research_eval.errors import ConfigError
from research_eval.files import SLICES_FOLDER, write_atomically
from research_eval.system import checksum
from research_eval.system.untrusted import check_regular_file, in_folder

log = logging.getLogger(__name__)

SLICE_NAME = re.compile(r"\d+\.\d+-of-\d+\.safetensors")


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], values: dict[str, Any], previous: Path | None = None
) -> None:
    """Write `tensors` and JSON-serialisable `values` into one safetensors file, atomically.

    If `previous` is given, the old file moves there.
    """
    # Clones, because safetensors refuses tensors that share memory, such as tied weights.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    metadata = {"values": json.dumps(values), checksum.KEY: checksum.ZEROS}
    write_atomically(path, checksum.seal(safetensors.torch.save(plain, metadata)), previous)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and values that `save_tensors` wrote.

    Raises ConfigError if the file is missing, damaged, or not written by `save_tensors`.
    """
    try:
        check_regular_file(in_folder(path.parent, path.name))
        intact = checksum.has_intact_checksum(path)
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {}).get("values", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError, OverflowError) as error:
        raise ConfigError(f"{path}: not a readable checkpoint ({error}). Run the experiment again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a safetensors file, but not one of ours. Run the experiment again.")
    if intact is False:
        raise ConfigError(f"{path}: its checksum does not fit: it was damaged or changed. Run the experiment again.")
    return tensors, values


def previous_checkpoint(path: Path) -> Path:
    """The path of the checkpoint before the one at `path`."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def checkpoint_exists(path: Path) -> bool:
    """Whether there is a checkpoint to continue from; the one before the newest also counts."""
    return any(map(os.path.lexists, (path, previous_checkpoint(path))))  # with broken links: loading reports them


def save_checkpoint(path: Path, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Write a checkpoint. The last good one stays beside it, so one whole file exists at every moment."""
    save_tensors(path, tensors, values, previous_checkpoint(path))


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The newest undamaged checkpoint. A damaged one is deleted if an older one can replace it.

    Raises ConfigError if no checkpoint is undamaged.
    """
    previous = previous_checkpoint(path)
    if not os.path.lexists(path):
        return _load_whole(previous)
    try:
        return _load_whole(path)
    except ConfigError as problem:
        if not previous.exists():
            raise
        found = _load_whole(previous)
        log.warning("%s Going on from the one before.", str(problem).removesuffix(" Run the experiment again."))
        path.unlink()  # otherwise the next save replaces the good file by this one
        return found


def delete_checkpoint(path: Path) -> None:
    """Delete the checkpoint and the one before it."""
    for file in (path, previous_checkpoint(path)):
        file.unlink(missing_ok=True)
    drop_slices(path)


def slice_name(step: int, number: int, of: int) -> str:
    """The file of one of several processes."""
    return f"{step}.{number}-of-{of}.safetensors"


def save_slices(path: Path, name: str, tensors: Mapping[str, tuple[torch.Tensor, list[int]]]) -> None:
    """Write what one process has of the tensors of a checkpoint.

    For each these are its rows; the dimension that rows are counted along, the first row, and the number of all rows.
    """
    rows = {key: where for key, (_, where) in tensors.items()}
    save_tensors(path.parent / SLICES_FOLDER / name, {key: part for key, (part, _) in tensors.items()}, {"rows": rows})


def drop_slices(path: Path) -> None:
    """Delete the slices that neither the checkpoint nor the one before it names."""
    folder = path.parent / SLICES_FOLDER
    if not folder.is_dir() or folder.is_symlink():
        return
    named = {name for file in (path, previous_checkpoint(path)) if file.exists() for name in _slices_of(file)}
    for file in folder.iterdir():
        if SLICE_NAME.fullmatch(file.name) and file.name not in named:
            file.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _slices_of(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        found: list[str] = json.loads((opened.metadata() or {}).get("values", "{}")).get("slices", [])
        return found


def _load_whole(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and values of a checkpoint, joined with its slices if several processes have written it.

    Raises ConfigError if a file is missing or damaged, or if they do not have all rows of a tensor.
    """
    tensors, values = load_tensors(path)
    missing: dict[str, set[int]] = {}  # the rows that no slice has brought
    for name in values.get("slices", []):
        if not SLICE_NAME.fullmatch(str(name)):
            raise ConfigError(f"{path}: names {name!r}, which is no file of a checkpoint. Run the experiment again.")
        parts, described = load_tensors(in_folder(path.parent, SLICES_FOLDER) / name)
        for key, part in parts.items():
            dim, first, number = described["rows"][key]
            shape = [number if one == dim else size for one, size in enumerate(part.shape)]
            whole = tensors.setdefault(key, part.new_empty(shape))
            missing.setdefault(key, set(range(number)))
            whole.narrow(dim, first, part.shape[dim]).copy_(part)
            missing[key] -= set(range(first, first + part.shape[dim]))
    lost = [key for key, rows in missing.items() if rows]
    if lost:
        raise ConfigError(f"{path}: its slices lack rows of {lost[0]}. Run the experiment again.")
    return tensors, values


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load weights that were read from `path` into the module.

    Raises ConfigError if a name, shape or type does not fit, or if a value is not finite.
    """
    own = module.state_dict()
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{path}: {name} holds values that are no finite numbers. Run the experiment again.")
        if name in own and tensor.dtype != own[name].dtype:
            raise ConfigError(f"{path}: {name} is {tensor.dtype}, not {own[name].dtype}. Run the experiment again.")
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{path}: not of this model: {error}. Run the experiment again.") from error


def generator_states() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The states of all global generators: torch on all devices, numpy and Python, as tensors and JSON values."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    legacy = np.random.get_state(legacy=False)
    key = legacy["state"]["key"].tolist()
    numpy_state = {**legacy, "state": {**legacy["state"], "key": key}}
    return tensors, {"python": random.getstate(), "numpy": numpy_state}


def restore_generators(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Restore the states that `generator_states` returned. The number of GPUs may differ."""
    torch.set_rng_state(tensors["cpu"].clone())
    cuda = [tensors[f"cuda{number}"] for number in range(torch.cuda.device_count()) if f"cuda{number}" in tensors]
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    if "mps" in tensors:
        torch.mps.set_rng_state(tensors["mps"])
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    state = values["numpy"]
    key = np.array(state["state"]["key"], np.uint32)
    np.random.set_state({**state, "state": {**state["state"], "key": key}})


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The moments of every parameter as `<parameter number>.<name>` -> tensor.

    Hyperparameters are not included: they come from the config.
    """
    return {
        f"{number}.{name}": value
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore the moments that `flatten_optimizer` returned. Learning rates come from the schedule.

    Raises ValueError for moments that do not fit the parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        if not 0 <= int(number) < len(parameters) or value.shape not in (torch.Size([]), parameters[int(number)].shape):
            raise ValueError(f"{key} does not fit a parameter")
        state.setdefault(int(number), {})[name] = value
    kinds = {frozenset(entries) for entries in state.values()}  # muon has two: its matrices keep a momentum alone
    if len(kinds - {frozenset({"momentum"})}) > 1:
        raise ValueError("moments are missing")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
