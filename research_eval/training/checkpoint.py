"""One file holds all that an exact continuation needs: safetensors, with the plain values as JSON in its header."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from research_eval.errors import ConfigError
from research_eval.files import write_atomically


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """`tensors` and JSON-able `values` into one safetensors file, atomically."""
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_atomically(path, safetensors.torch.save(plain, {"values": json.dumps(values)}))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and values of `save_tensors`.

    Raises ConfigError when the file is missing or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {}).get("values", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not a readable checkpoint ({error}). Run the experiment again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a safetensors file, but not one of ours. Run the experiment again.")
    return tensors, values


def generator_states() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of every global generator: torch on all devices, numpy, Python."""
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
    """Put back what `generator_states` gave."""
    torch.set_rng_state(tensors["cpu"])
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
    """The moments of every parameter as `<parameter number>.<name>` -> tensor."""
    return {
        f"{number}.{name}": value
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `flatten_optimizer` gave; learning rates come from the schedule."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
