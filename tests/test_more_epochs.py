"""`--resume` with more epochs: a run that has ended is continued exactly, or the reason is said before any training."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    command,
    history,
    repeatable,
    results,
    run_in,
    small_config,
    stop_at,
    write_config,
)

from research_eval.db_utils import DB_FILE
from research_eval.errors import ConfigError
from research_eval.experiment import Result
from research_eval.layers.path.choice import ChoiceMode, ChoiceSettings
from research_eval.main import main
from research_eval.models.dense import DenseTransformerClassifier
from research_eval.registry import MODELS_MAP
from research_eval.routing.trace_files import read_trace
from research_eval.store.csv_file import CSV_FILE
from research_eval.training.checkpoint import load_tensors
from research_eval.training.fit import CHECKPOINT_FILE, MODEL_FILE

# Each with something that has to survive: averaged weights, patience, several batches per step, a balance, traces,
# alarms, the score on the test split, and best weights from the first part.
EXACT: dict[str, dict[str, Any]] = {
    "dense": {"training_params": {"ema_decay": 0.5, "early_stopping_patience": 9, "gradient_accumulation_steps": 2}},
    "moe": {"model_type": "moe", "training_params": {"test": True, "checkpoint_every": 3}},
    "goe": {"model_type": "goe", "optimizer_params": {"name": "sgd", "lr": 0.1}},
    "goe_original": {"model_type": "goe_original", "training_params": {"ema_decay": 0.9, "trace_routing": True}},
    "st": {
        "model_type": "goe_original",
        "model_params": {"router_mode": "st", "gumbel_tau": 1.0, "gumbel_tau_min": 1.0},
        "optimizer_params": {"lr": 1e-30},  # nothing changes, so that the first epoch keeps the best weights
    },
    "wsd": {"scheduler_params": {"name": "wsd", "warmup_factor": 0.0, "min_lr_factor": 1.0}},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cosine": (
        {"scheduler_params": {"name": "cosine_warmup"}},
        r"scheduler_params\.name 'cosine_warmup'.*\(with \"none\"",
    ),
    "wsd": ({"scheduler_params": {"name": "wsd"}}, r"scheduler_params\.name 'wsd'"),
    "curriculum": ({"training_params": {"curriculum": 0.5}}, r"training_params\.curriculum"),
    "tau": ({"model_type": "goe_original", "model_params": {"router_mode": "st"}}, "gumbel_tau_min"),
    "exploration": ({"model_type": "goe_original", "model_params": {"exploration": 0.5}}, "exploration"),
    "ponder": ({"model_type": "goe_original", "model_params": {"halt": "ponder"}}, "halt_warmup"),
    "balance": ({"model_type": "goe_original", "model_params": {"balance_decay": 0.5}}, "balance_decay"),
    "entropy": ({"model_type": "goe_original", "model_params": {"router_entropy_coef": 0.1}}, "router_entropy_coef"),
    "values": ({"model_type": "goe_original", "model_params": {"router_mode": "q"}}, "discount_final"),
    "scan": ({"model_type": "goe_scan", "model_params": {"num_nodes": 4}}, "edge_entropy_coef"),
}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the trainings."""
    monkeypatch.setattr("research_eval.experiment.draw_pictures", lambda *_: None)


def weights(folder: Path, result: Result, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and values of a file of a run, without the seconds."""
    tensors, values = load_tensors(folder / result.folder / name)
    for name in ("seconds", "step_seconds"):
        values.get("state", {}).pop(name, None)
    return tensors, values


@pytest.mark.parametrize("name", EXACT)
def test_two_parts_are_the_same_run_as_one(name: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    at_once = run_in(whole, small_config(epochs=4, **EXACT[name]))
    first = run_in(parts, small_config(epochs=2, **EXACT[name]))
    files = {path: path.read_bytes() for path in (parts / first.folder).iterdir() if path.is_file()}
    longer = run_in(parts, small_config(epochs=4, **EXACT[name]), resume=True)
    assert repeatable(longer.metrics) == repeatable(at_once.metrics)
    assert history(parts, longer.experiment_id) == history(whole, at_once.experiment_id)
    for file in (MODEL_FILE, CHECKPOINT_FILE):
        (own, own_values), (wanted, wanted_values) = weights(parts, longer, file), weights(whole, at_once, file)
        torch.testing.assert_close(own, wanted, rtol=0, atol=0)
        assert own_values == wanted_values
    if name == "goe_original":
        traced = [
            [epoch.epoch for epoch in read_trace(at / run.folder)] for at, run in ((whole, at_once), (parts, longer))
        ]
        assert traced == [[1, 2, 3, 4]] * 2
    with results(parts) as store:  # a row of its own; the finished one stays as it is
        assert store.experiment(longer.experiment_id)["parent_id"] == first.experiment_id
        row = store.experiment(first.experiment_id)
        assert (row["status"], row["epochs"], store.metrics(first.experiment_id)) == ("finished", 2, first.metrics)
    assert {path: path.read_bytes() for path in files} == files
    assert (parts / CSV_FILE).read_text().count("\n") == 3


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_all_epochs_is_said_before_the_training(name: str, tmp_path: Path) -> None:
    changes, reason = REFUSED[name]
    first = run_in(tmp_path, small_config(epochs=1, **changes))
    with pytest.raises(ConfigError, match=f"(?s)--resume: run {first.experiment_id} of 1 epoch .*2 epochs: .*{reason}"):
        run_in(tmp_path, small_config(epochs=2, **changes), resume=True)
    with results(tmp_path) as store:
        assert len(store.experiments()) == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [first.experiment_id]


class Foreign(DenseTransformerClassifier):
    """A model whose schedule nobody knows."""

    def after_step(self, progress: float) -> None:
        self.embedding.dropout.p = 0.1 * progress


def test_a_model_with_a_schedule_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS_MAP, "foreign", Foreign)
    run_in(tmp_path, small_config(epochs=1, model_type="foreign"))
    with pytest.raises(ConfigError, match="the effect of after_step follows the share"):
        run_in(tmp_path, small_config(epochs=2, model_type="foreign"), resume=True)


def test_an_interrupted_run_gets_more_or_fewer_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was stopped within its second epoch, so that three epochs continue it as well as two."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        stopped = run_in(parts, small_config(epochs=9))
    assert stopped.status == "interrupted"
    at_once = run_in(whole, small_config(epochs=3))
    longer = run_in(parts, small_config(epochs=3), resume=True)
    assert repeatable(longer.metrics) == repeatable(at_once.metrics)
    with pytest.raises(ConfigError, match="it has trained 8 steps, which are more"):
        run_in(parts, small_config(epochs=1), resume=True)


def test_a_continued_run_is_resumed_and_continued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in(tmp_path, small_config(epochs=1))
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        stopped = run_in(tmp_path, small_config(epochs=3), resume=True)
    assert stopped.status == "interrupted"
    ended = run_in(tmp_path, small_config(epochs=3), resume=True)
    assert (ended.experiment_id, ended.status) == (stopped.experiment_id, "finished")
    again = run_in(tmp_path, small_config(epochs=4), resume=True)
    (tmp_path / "whole").mkdir()
    assert repeatable(again.metrics) == repeatable(run_in(tmp_path / "whole", small_config(epochs=4)).metrics)
    with results(tmp_path) as store:
        assert store.experiment(again.experiment_id)["parent_id"] == ended.experiment_id


# ------------------------------------------------------------------------------------------------ on the command line


@pytest.fixture
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)


def num_runs(folder: Path) -> int:
    with results(folder) as store:
        return len(store.experiments())


@pytest.mark.usefixtures("_in_its_folder")
def test_more_epochs_on_the_command_line(tmp_path: Path) -> None:
    """One epoch, then three, then two: each time the longest run that is shorter is continued."""
    config = write_config(tmp_path, epochs=1)
    assert command(main, "--json_config_path", config, "--quiet").code == 0
    assert command(main, "--json_config_path", config, "--resume", "--epochs", "3", "--quiet").code == 0
    ended = command(main, "--json_config_path", config, "--resume", "--epochs", "2")
    assert ended.code == 0 and "continuing run" in ended.err
    assert "epoch 2/2" in ended.err and "epoch 1/2" not in ended.err
    ended = command(main, "--json_config_path", config, "--resume", "--epochs", "5", "--quiet")
    assert ended.code == 0
    fewer = command(main, "--json_config_path", config, "--resume", "--epochs", "4", "--quiet")
    assert fewer.code == 0  # from 3


@pytest.mark.usefixtures("_in_its_folder")
@pytest.mark.parametrize("case", ["fewer", "no_checkpoint", "damaged", "stopped_early", "other_data"])
def test_what_cannot_be_continued_is_one_message(case: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2}
    if case == "stopped_early":  # a rate of zero changes nothing, so that the second epoch is no better
        settings |= {"epochs": 4, "training_params": {"early_stopping_patience": 1}, "optimizer_params": {"lr": 1e-30}}
    config = write_config(tmp_path, **settings)
    assert command(main, "--json_config_path", config, "--quiet").code == 0
    with results(tmp_path) as store:
        (row,) = store.experiments()
    checkpoint = tmp_path / "runs" / row["experiment_id"] / CHECKPOINT_FILE
    epochs, message = "6", ""
    if case == "fewer":
        epochs, message = "1", "of 2 epochs cannot be continued to 1 epoch: it is finished, and has more of them"
    elif case == "no_checkpoint":
        checkpoint.unlink()
        message = f"its checkpoint runs/{row['experiment_id']}/{CHECKPOINT_FILE} is not in"
    elif case == "damaged":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
        message = "not a readable checkpoint"
    elif case == "stopped_early":
        message = "early stopping ended it (early_stopping_patience 1), and would end it again"
    else:
        with sqlite3.connect(DB_FILE) as connection:
            connection.execute(
                "UPDATE experiments SET env_details_json = json_set(env_details_json, '$.data.sha256.train', 'x')"
            )
        connection.close()
        message = "its train split is not what it was begun on"
    ended = command(main, "--json_config_path", config, "--resume", "--epochs", epochs, "--quiet")
    assert ended.code == 2 and message in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert num_runs(tmp_path) == 1


@pytest.mark.usefixtures("_in_its_folder")
def test_all_seeds_are_checked_before_any_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research_eval.studies.seeds.usable_cores", lambda: 1)
    config = write_config(tmp_path, epochs=1)
    cosine = ("--scheduler_params.name", "cosine_warmup")
    assert command(main, "--json_config_path", config, "--seed", "1", "--quiet", *cosine).code == 0
    more = ("--seeds", "0-1", "--resume", "--epochs", "2", "--quiet")
    ended = command(main, "--json_config_path", config, *more, *cosine)
    assert ended.code == 2 and ended.err.count("cannot be continued") == 1 and num_runs(tmp_path) == 1
    assert command(main, "--json_config_path", config, "--seeds", "0-1", "--quiet").code == 0
    assert command(main, "--json_config_path", config, *more).code == 0
    with results(tmp_path) as store:
        assert [row["parent_id"] is not None for row in store.experiments()] == [False, False, False, True, True]


@pytest.mark.usefixtures("_in_its_folder")
def test_another_config_of_the_same_name_is_said_to_be_trained_from_the_start(tmp_path: Path) -> None:
    config = write_config(tmp_path, epochs=1)
    assert command(main, "--json_config_path", config, "--quiet").code == 0
    ended = command(main, "--json_config_path", config, "--quiet", "--resume", "--set", "optimizer_params.lr=0.5")
    assert ended.code == 0 and "has another optimizer_params.lr (0.001, now 0.5): a new run is trained" in ended.err
    shutil.rmtree("runs")
    anew = command(main, "--json_config_path", config, "--quiet", "--resume", "--seed", "7")
    assert anew.code == 0 and anew.err == ""


def test_a_choice_mode_that_does_not_say_is_taken_for_one_with_a_schedule() -> None:
    class Unknown(ChoiceMode):
        choose = None  # type: ignore[assignment]

    Unknown.__abstractmethods__ = frozenset()
    assert Unknown(ChoiceSettings()).scheduled_options() == ("router_mode",)
