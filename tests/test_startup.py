"""What a process has imported, and so waited for, when it begins its work."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from support import ROOT, python, small_settings
from torch import nn

import research_eval
from research_eval.models.base_model import EvaluableModel
from research_eval.registry import MODELS_MAP
from research_eval.schema import config_from_dict

QUICKSTART = ROOT / "examples" / "configs" / "quickstart.json"
NUMBERS = {"torch", "numpy"}
STORES = {"sqlalchemy", "alembic"}
NOT_FOR_TRAINING = {"optuna", "matplotlib", "pandas", "sklearn", "scipy", "datasets", "plotly"}
COMPILER = {"torch._dynamo", "torch._inductor"}


def imported_by(program: str, folder: Path) -> set[str]:
    """The modules that a new process has when it reaches the end of `program`."""
    ended = python("-c", f"{program}\nimport sys\nprint('modules:', *sys.modules)", folder=folder, fresh=True)
    assert ended.code == 0, ended.err
    return set(ended.out.rpartition("modules:")[2].split())


def test_the_package_alone_imports_nothing_heavy(tmp_path: Path) -> None:
    modules = imported_by("import research_eval", tmp_path)
    assert "research_eval" in modules and not modules & (NUMBERS | STORES | NOT_FOR_TRAINING)


def test_load_is_at_hand_without_torch(tmp_path: Path) -> None:
    modules = imported_by("import research_eval\nassert 'load' not in vars(research_eval)", tmp_path)
    assert not modules & NUMBERS
    assert research_eval.load.__module__ == "research_eval.generation.trained"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = research_eval.lode


def test_a_mistake_that_needs_no_torch_is_reported_without_it(tmp_path: Path) -> None:
    """Files that are not there, a file that is no JSON, numbers out of range."""
    text = {"dataset_type": "real_world", "dataset_name": "mine", "epochs": 1, "batch_size": 2, "model_type": "dense"}
    (tmp_path / "lost.json").write_text(json.dumps(text | {"dataset_params": {"data_dir": "nowhere"}}))
    (tmp_path / "mix.json").write_text(json.dumps(text | {"dataset_params": {"sources": [".", "nowhere"]}}))
    (tmp_path / "bad.json").write_text("{,}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    (tmp_path / "some.txt").write_text("a text")
    mistakes = {
        "run --json_config_path lost.json": "dataset_params.data_dir: there is no file or folder 'nowhere'",
        "run --json_config_path mix.json": "dataset_params.sources: there is no file or folder 'nowhere'",
        "run --json_config_path lost.json --data_dir other": "there is no file or folder 'other'",
        "run --json_config_path bad.json": "bad.json:1:2: expected a key",
        "run --json_config_path no.json": "no.json: cannot be read",
        "tune --dataset_name mine --data_dir nowhere": "there is no file or folder 'nowhere'",
        "tune --dataset_name parity --n_trials 0": "--n_trials: expected a whole number of at least 1, got 0",
        "predict --run run --file no.txt": "--file: cannot read no.txt",
        "predict --run run --file some.txt --out no/where": "--out: 'no/where' is not a file in an existing folder",
        "predict --run nobody --file some.txt": "give the folder of the run",
    }
    program = f"""
from research_eval.main import cli
for command in {list(mistakes)!r}:
    assert cli(command.split()) == 2, command
"""
    ended = python("-c", f"{program}import sys\nprint('modules:', *sys.modules)", folder=tmp_path, fresh=True)
    assert ended.code == 0, ended.err
    said = ended.err.splitlines()
    assert [says in line for says, line in zip(mistakes.values(), said, strict=True)] == [True] * len(said), said
    assert "torch" not in ended.out.split()
    assert not list(tmp_path.glob("*.db"))


def test_the_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = """
import contextlib
from research_eval.main import main
with contextlib.suppress(SystemExit):
    main(["--help"])
"""
    modules = imported_by(program, tmp_path)
    assert "research_eval.main" in modules and not modules & (NUMBERS | STORES | NOT_FOR_TRAINING)


def test_the_first_training_step_waits_for_nothing_it_does_not_need(tmp_path: Path) -> None:
    program = f"""
import contextlib
from torch.optim.optimizer import register_optimizer_step_post_hook
from research_eval.main import main

class FirstStep(BaseException):
    pass

def stop(*arguments):
    raise FirstStep

register_optimizer_step_post_hook(stop)
with contextlib.suppress(FirstStep):
    main(["--json_config_path", {str(QUICKSTART)!r}])
    raise AssertionError("no step was made")
"""
    modules = imported_by(program, tmp_path)
    assert {"research_eval.training.fit", "sqlalchemy"} <= modules and not modules & NOT_FOR_TRAINING


def test_looking_a_data_set_up_reads_no_files(tmp_path: Path) -> None:
    program = """
from research_eval.datasets.kinds import DATASET_KINDS
for kind in DATASET_KINDS.values():
    print(kind().constructor("parity"), *kind().names())
"""
    modules = imported_by(program, tmp_path)
    assert "research_eval.datasets.text.dataset" in modules and not modules & (NOT_FOR_TRAINING | {"pyarrow"})


def test_checking_a_config_does_not_import_the_compiler(tmp_path: Path) -> None:
    program = f"""
import torch
from torch import nn
from research_eval.models.base_model import EvaluableModel
from research_eval.registry import MODELS_MAP
from research_eval.schema import config_from_dict

@MODELS_MAP.register("drawing")
class Drawing(EvaluableModel):
    def __init__(self, *, vocab_size: int, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)
        self.weight = nn.Parameter(torch.empty(width, width).normal_(std=0.1))
        nn.init.xavier_normal_(self.weight)

config_from_dict({small_settings(model_type="drawing")!r})
for model_type in MODELS_MAP:
    config_from_dict({small_settings(model_type="dense")!r} | {{"model_type": model_type, "model_params": {{}}}})
"""
    modules = imported_by(program, tmp_path)
    assert "research_eval.models.dense" in modules and not modules & COMPILER


@pytest.mark.parametrize("name", MODELS_MAP)
def test_every_model_is_built_to_the_end_when_its_parameters_are_checked(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A check that stops half-way is logged and accepts everything."""
    with caplog.at_level(logging.DEBUG, "research_eval.schema"):
        config_from_dict(small_settings(model_type=name))
    assert caplog.messages == []


def test_only_draws_without_values_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = {}

    class Drawing(EvaluableModel):
        def __init__(self, *, vocab_size: int, num_classes: int, width: int = 4) -> None:
            super().__init__()
            real = torch.zeros(width, device="cpu").normal_()
            seen["real"] = nn.init.normal_(torch.zeros(width, device="cpu"), std=2.0) * real
            meta = torch.empty(width)
            seen["same"] = meta.normal_() is meta and nn.init.normal_(tensor=meta, mean=1.0) is meta
            seen["meta"] = meta

    monkeypatch.setitem(MODELS_MAP, "drawing", Drawing)
    with caplog.at_level(logging.DEBUG, "research_eval.schema"):
        config_from_dict(small_settings(model_type="drawing"))
    assert caplog.messages == []
    assert seen["same"] and seen["meta"].is_meta
    assert not seen["real"].is_meta and seen["real"].abs().min() > 0
