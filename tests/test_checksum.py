"""A file that is not as it was written is never read, wherever it was changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research_eval.errors import ConfigError
from research_eval.system.checksum import KEY, ZEROS, has_intact_checksum
from research_eval.training.checkpoint import load_tensors, save_tensors

texts = st.text(max_size=8) | st.sampled_from([KEY, ZEROS, f'"{KEY}":"{ZEROS}"', "values"])


def test_every_changed_byte_and_every_missing_end_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": torch.arange(5.0)}, {"step": 3})
    content = path.read_bytes()
    assert has_intact_checksum(path) is True
    for number in range(len(content)):
        for bit in (1, 32):
            path.write_bytes(content[:number] + bytes([content[number] ^ bit]) + content[number + 1 :])
            with pytest.raises(ConfigError, match="Run the experiment again"):
                load_tensors(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ConfigError, match="Run the experiment again"):
            load_tensors(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ConfigError, match="Run the experiment again"):
        load_tensors(path)


def test_other_weights_of_the_same_shape_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": torch.zeros(100)}, {})
    path.write_bytes(path.read_bytes()[:-4] + torch.ones(1).numpy().tobytes())
    assert has_intact_checksum(path) is False
    with pytest.raises(ConfigError, match=r"model\.safetensors: its checksum does not fit"):
        load_tensors(path)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.sets(texts.filter(lambda text: text != "__metadata__"), max_size=3),
    values=st.dictionaries(texts, texts, max_size=3),
)
def test_whatever_the_names_and_values_the_checksum_fits(
    tmp_path: Path, names: set[str], values: dict[str, str]
) -> None:
    path = tmp_path / "any.safetensors"
    save_tensors(path, {name: torch.rand(2) for name in names}, values)
    assert has_intact_checksum(path) is True
    tensors, read = load_tensors(path)
    assert (set(tensors), read) == (names, values)


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.ones(2)}, {"values": '{"step": 1}'}))
    assert has_intact_checksum(path) is None
    assert load_tensors(path)[1] == {"step": 1}


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * 8, b"\xff" * 16, (5).to_bytes(8, "little") + b"[1,2]"])
def test_what_is_no_safetensors_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors header"):
        has_intact_checksum(tmp_path / "x")
