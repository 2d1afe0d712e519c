"""What is written to disk comes back as it was, or is refused with an explanation."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import generator_draws
from torch import nn

from research_eval.errors import ConfigError
from research_eval.files import SLICES_FOLDER
from research_eval.schema import OptimizerParams
from research_eval.training.checkpoint import (
    flatten_optimizer,
    generator_states,
    load_checkpoint,
    load_tensors,
    restore_generators,
    restore_optimizer,
    save_checkpoint,
    save_slices,
    save_tensors,
    slice_name,
    write_atomically,
)
from research_eval.training.optimizers import build_optimizer
from research_eval.training.runtime import Runtime


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------------- one file


def test_tensors_and_values_come_back_exactly(tmp_path: Path) -> None:
    tied = torch.randn(3, 4)
    tensors = {
        "a/tied": tied,
        "b/tied": tied,
        "transposed": tied.T,
        "part": tied[1:, ::2],
        "scalar": torch.tensor(7, dtype=torch.int64),
        "half": torch.randn(5).bfloat16(),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "strange": torch.tensor([float("nan"), float("inf"), -0.0]),
        "needs_grad": torch.randn(2, requires_grad=True),
    }
    values = {"step": 3, "best": 0.1 + 0.2, "none": None, "nested": {"list": [1, [2.5, "é"]]}, "huge": 2**70}
    save_tensors(tmp_path / "file", tensors, values)
    loaded, loaded_values = load_tensors(tmp_path / "file")
    assert loaded_values == values
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(loaded[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(loaded["strange"][2])


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*arguments: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(OSError, match="full"):
            write_atomically(path, b"new")
        with pytest.raises(OSError, match="full"):
            save_tensors(path, {"a": torch.zeros(3)}, {})
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["file"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and files(tmp_path) == ["file"]


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, Any]] = []
    path = tmp_path / "file"
    fsync, replace = os.fsync, os.replace

    def syncing(number: int) -> None:
        found = os.fstat(number)
        order.append(("fsync", found.st_ino if stat.S_ISDIR(found.st_mode) else found.st_size))
        fsync(number)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(
        os, "replace", lambda old, new: (order.append(("replace", Path(old).read_bytes())), replace(old, new))
    )
    write_atomically(path, b"content")
    assert order == [("fsync", 7), ("replace", b"content"), ("fsync", tmp_path.stat().st_ino)]


def broken(path: Path, kind: str) -> None:
    save_tensors(path, {"a": torch.arange(1000)}, {"step": 1})
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "other bytes":
        path.write_bytes(b"\xff" * 5000)
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "foreign values":
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, {"values": "{no json"})
    else:
        safetensors.torch.save_file({"a": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "cut", "other bytes", "a folder", "foreign values", "foreign tensors"]
)
def test_a_file_that_is_no_checkpoint_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    broken(path, kind)
    with pytest.raises(ConfigError, match="Run the experiment again") as caught:
        load_tensors(path)
    assert str(path) in str(caught.value)


def test_a_slice_in_the_place_of_another_is_noticed(tmp_path: Path) -> None:
    whole, path = torch.randn(6, 2), tmp_path / "checkpoint.safetensors"
    names = [slice_name(1, number, 2) for number in range(2)]
    (tmp_path / SLICES_FOLDER).mkdir()
    for number, name in enumerate(names):
        save_slices(path, name, {"w": (whole[3 * number : 3 * number + 3], [0, 3 * number, 6])})
    save_checkpoint(path, {}, {"slices": names})
    assert load_checkpoint(path)[0]["w"].equal(whole)
    first, second = (tmp_path / SLICES_FOLDER / name for name in names)
    second.write_bytes(first.read_bytes())  # of the right size, and with the right checksum
    with pytest.raises(ConfigError, match="its slices lack rows of w"):
        load_checkpoint(path)


# --------------------------------------------------------------------------------------- generators and optimisers


def test_all_generators_go_on_where_they_were(tmp_path: Path) -> None:
    runtime = Runtime("cpu")
    runtime.seed(5, "test")
    generator_draws()  # leaves the second half of a normal pair behind in numpy and Python
    save_tensors(tmp_path / "file", *generator_states())
    expected = generator_draws()
    runtime.seed(6, "test")
    generator_draws()
    restore_generators(*load_tensors(tmp_path / "file"))
    assert generator_draws() == expected


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    """The weights after the steps; the data of each follow from its number."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        loss = model(torch.randn(8, 3, generator=generator)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "options",
    [{"name": "adamw"}, {"name": "sgd", "momentum": 0.9}, {"name": "sgd", "momentum": 0.0}],
    ids=["adamw", "momentum", "plain"],
)
def test_an_optimiser_goes_on_where_it_was(options: dict[str, Any], tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        model[0].bias.requires_grad_(False)  # has no state
        return model, build_optimizer(model, OptimizerParams(lr=0.01, weight_decay=0.1, **options))

    model, optimizer = fresh()
    trained(model, optimizer, range(3))
    save_tensors(tmp_path / "model", dict(model.state_dict()), {})
    save_tensors(tmp_path / "optimizer", flatten_optimizer(optimizer), {})
    expected = trained(model, optimizer, range(3, 6))

    model, optimizer = fresh()
    model.load_state_dict(load_tensors(tmp_path / "model")[0])
    restore_optimizer(optimizer, load_tensors(tmp_path / "optimizer")[0])
    torch.testing.assert_close(trained(model, optimizer, range(3, 6)), expected, rtol=0, atol=0)
