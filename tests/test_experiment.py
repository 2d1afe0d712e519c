"""A run from its config to its row: repeatable, complete, and exactly resumable."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from matplotlib import image
from support import (
    MODELS,
    ROOT,
    command,
    environment,
    history,
    python,
    repeatable,
    results,
    run_in,
    small_config,
    write_config,
)

from research_eval.db_utils import DB_FILE
from research_eval.errors import ConfigError
from research_eval.experiment import Journal, Result, prepare
from research_eval.files import run_folder
from research_eval.main import main
from research_eval.models.base_model import EvaluableModel
from research_eval.registry import MODELS_MAP
from research_eval.runs.pictures import GRAPH_FILE
from research_eval.schema import ExperimentConfig, config_from_dict
from research_eval.store.csv_file import CSV_FILE
from research_eval.training.checkpoint import load_tensors
from research_eval.training.evaluate import Evaluation, evaluate
from research_eval.training.fit import CHECKPOINT_FILE, MODEL_FILE

METRICS = {
    "final_val_loss",
    "final_val_acc",
    "final_val_f1",
    "best_val_f1_across_epochs",
    "inference_latency_ms_batch",
    "training_duration_seconds",
    "param_count",
    "active_param_count",
    "train_flops",
    "inference_flops_per_sample",
    "peak_memory_mb",
    "epochs_completed",
    "test_loss",
    "test_acc",
    "test_f1",
    # beyond the documented ones
    "inference_latency_ms_batch_p95",
    "inference_latency_spread",
    "inference_latency_repetitions",
    "inference_latency_load",
    "inference_samples_per_second",
    "active_flops_per_sample",
    *(f"{split}_{name}_per_class" for split in ("val", "test") for name in ("precision", "recall", "f1", "support")),
}
LOAD_METRICS = {"expert_load", "expert_load_cv", "dead_experts", "router_entropy"}
PATH_METRICS = {
    "mean_path_length",
    "path_length_histogram",
    "transition_matrix",
    "step_transitions",
    "common_paths",
}
INFORMATION = {
    f"{what}_class_nmi{suffix}" for what in ("path", "step") for suffix in ("", "_null", "_null_p95", "_adjusted")
}
LOAD_METRICS |= {"router_change", "expert_similarity", "alarms", "num_alarms"}
LOAD_METRICS |= {"step_entropy", "expert_roles", "path_flows"}
PATH_METRICS |= {"path_length_by_class"} | INFORMATION
MODEL_METRICS = {
    "dense": set(),
    "moe": LOAD_METRICS | INFORMATION | {"transition_matrix", "step_transitions", "common_paths"},
    "goe": LOAD_METRICS | PATH_METRICS,
    "goe_original": LOAD_METRICS | PATH_METRICS | {"logits_at_limit_share"},
}


def config_of(model_type: str, **changes: Any) -> ExperimentConfig:
    return small_config(model_type=model_type, epochs=3, training_params={"test": True}, **changes)


class Twice(NamedTuple):
    model_type: str
    folder: Path
    first: Result
    second: Result


@pytest.fixture(scope="module", params=MODELS)
def twice(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, real_graphs: None) -> Twice:
    """The same config run two times in one folder."""
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(request.param)
    return Twice(request.param, folder, run_in(folder, config), run_in(folder, config))


# ------------------------------------------------------------------------------------------------ repeatable runs


def test_the_same_config_gives_the_same_numbers(twice: Twice) -> None:
    assert twice.first.status == twice.second.status == "finished"
    assert repeatable(twice.first.metrics) == repeatable(twice.second.metrics)
    assert history(twice.folder, twice.first.experiment_id) == history(twice.folder, twice.second.experiment_id)
    weights = [load_tensors(twice.folder / end.folder / MODEL_FILE)[0] for end in (twice.first, twice.second)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_another_seed_gives_other_numbers(tmp_path: Path) -> None:
    ends = [
        run_in(tmp_path, small_config(seed=seed, dataset_name="tables", dataset_params={"num_samples": 100}))
        for seed in (0, 1)
    ]
    assert ends[0].metrics["final_val_loss"] != ends[1].metrics["final_val_loss"]
    with results(tmp_path) as store:
        hashes = [json.loads(row["env_details_json"])["data"]["sha256"]["train"] for row in store.experiments()]
    assert hashes[0] != hashes[1]


def test_the_stored_config_runs_again_to_the_same_numbers(tmp_path: Path) -> None:
    """Also for a config full of options that leave nothing at its default."""
    config = small_config(
        model_type="moe",
        seed=7,
        experiment_name="everything",
        model_params={"num_experts_per_layer": 3, "top_k_experts": 1, "pool": "max", "dropout": 0.3},
        optimizer_params={"name": "sgd", "lr": 0.05, "momentum": 0.8, "router_lr_mult": 2.0, "grad_clip_norm": None},
        scheduler_params={"name": "cosine_warmup", "warmup_factor": 0.3},
        training_params={"ema_decay": 0.5, "label_smoothing": 0.1, "gradient_accumulation_steps": 2},
    )
    first = run_in(tmp_path, config)
    with results(tmp_path) as store:
        stored = json.loads(store.experiment(first.experiment_id)["full_config_json"])
    again = run_in(tmp_path, config_from_dict(stored))
    assert repeatable(again.metrics) == repeatable(first.metrics)
    with results(tmp_path) as store:
        assert json.loads(store.experiment(again.experiment_id)["full_config_json"]) == stored


# --------------------------------------------------------------------------------------------------- what is stored


def test_the_row_says_what_was_run(twice: Twice) -> None:
    with results(twice.folder) as store:
        assert len(store.experiments()) == 2
        row = store.experiment(twice.first.experiment_id)
    expected = {
        "run_type": "json",
        "status": "finished",
        "error": None,
        "model_type": twice.model_type,
        "dataset_name": "parity",
        "dataset_type": "synthetic",
        "experiment_name": f"{twice.model_type}_parity",
        "epochs": 3,
        "batch_size": 16,
        "seed": 0,
    }
    assert {name: row[name] for name in expected} == expected
    assert json.loads(row["full_config_json"]) == config_of(twice.model_type).to_dict()
    details = json.loads(row["env_details_json"])
    assert details["device"] == "cpu" and details["data"]["dataset"] == "parity"
    assert twice.first.experiment_id != twice.second.experiment_id


def test_the_metrics_have_their_documented_names(twice: Twice) -> None:
    with results(twice.folder) as store:
        stored = store.metrics(twice.first.experiment_id)
    assert set(stored) == METRICS | MODEL_METRICS[twice.model_type]
    assert stored == twice.first.metrics


def test_the_metrics_have_plausible_values(twice: Twice) -> None:
    metrics = twice.first.metrics
    _, data, model = prepare(config_of(twice.model_type))
    for name in ("final_val_acc", "final_val_f1", "best_val_f1_across_epochs", "test_acc", "test_f1"):
        assert 0 <= metrics[name] <= 1
    assert metrics["best_val_f1_across_epochs"] >= metrics["final_val_f1"]
    assert 0.3 < metrics["final_val_loss"] < 2
    assert sum(metrics["val_support_per_class"]) == len(data.validation) == 20
    assert np.mean(metrics["val_f1_per_class"]) == pytest.approx(metrics["final_val_f1"])
    assert metrics["param_count"] == sum(parameter.numel() for parameter in model.parameters())
    assert (metrics["active_param_count"] < metrics["param_count"]) is (twice.model_type != "dense")
    assert metrics["epochs_completed"] == 3
    assert 0 < metrics["training_duration_seconds"] < 60
    assert 0 < metrics["inference_latency_ms_batch"] <= metrics["inference_latency_ms_batch_p95"] < 60_000
    assert 50 < metrics["peak_memory_mb"] < 100_000
    assert metrics["inference_flops_per_sample"] > metrics["param_count"]
    assert 3 * 80 * 2 < metrics["train_flops"] / metrics["inference_flops_per_sample"] < 3 * 80 * 5


def test_numbers_are_stored_as_numbers_and_lists_as_json(twice: Twice) -> None:
    query = "SELECT metric_name, typeof(metric_value), metric_value FROM metrics WHERE experiment_id = ?"
    connection = sqlite3.connect(twice.folder / DB_FILE)
    rows = connection.execute(query, [twice.first.experiment_id]).fetchall()
    connection.close()
    assert len(rows) == len(twice.first.metrics)
    for name, kind, value in rows:
        expected = twice.first.metrics[name]
        if isinstance(expected, list):
            assert kind == "text" and json.loads(value) == expected
        else:
            assert kind == "real" and value == expected


def test_the_csv_has_a_line_per_run_with_the_same_numbers(twice: Twice) -> None:
    with (twice.folder / CSV_FILE).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["experiment_id"] for line in lines] == [twice.first.experiment_id, twice.second.experiment_id]
    for line, end in zip(lines, (twice.first, twice.second), strict=True):
        scalars = {name: value for name, value in end.metrics.items() if not isinstance(value, list)}
        assert {name: float(line[name]) for name in scalars} == scalars
        described = {name: line[name] for name in line.keys() - scalars.keys() - {"experiment_id", "timestamp"}}
        assert described == {
            "experiment_name": f"{twice.model_type}_parity",
            "model_type": twice.model_type,
            "dataset_type": "synthetic",
            "dataset_name": "parity",
            "epochs": "3",
            "batch_size": "16",
            "seed": "0",
            "status": "finished",
            "flops_version": "2",
        }


def test_the_history_is_a_table_of_its_own(twice: Twice) -> None:
    points = history(twice.folder, twice.first.experiment_id)
    assert len({(step, name) for step, name, _ in points}) == len(points)
    steps = {name: [step for step, other, _ in points if other == name] for _, name, _ in points}
    assert steps["train_loss"] == steps["learning_rate"] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert steps["val_loss"] == steps["val_f1"] == [5, 10, 15]
    assert ("router_entropy" in steps) is (twice.model_type != "dense")
    last = {name: value for step, name, value in points if step == 15}
    assert last["val_f1"] == twice.first.metrics["final_val_f1"]
    with results(twice.folder) as store:
        assert [row.epoch for row in store.history(twice.first.experiment_id, "val_loss")] == [1.0, 2.0, 3.0]


def test_a_run_has_a_folder_of_its_own(twice: Twice) -> None:
    folder = twice.folder / twice.first.folder
    assert folder == twice.folder / "runs" / twice.first.experiment_id
    assert json.loads((folder / "config.json").read_text()) == config_of(twice.model_type).to_dict()
    _, _, model = prepare(config_of(twice.model_type))
    weights, values = load_tensors(folder / MODEL_FILE)
    model.load_state_dict(weights)
    assert values["val_f1"] == twice.first.metrics["best_val_f1_across_epochs"]
    assert not list(folder.glob("*.tmp"))
    others = {path.name for path in twice.folder.iterdir()} - {"runs", CSV_FILE, DB_FILE}
    assert all(name.startswith((CSV_FILE, DB_FILE)) for name in others)  # lock files


def test_routed_models_get_a_picture_of_their_graph(twice: Twice) -> None:
    path = twice.folder / twice.first.folder / GRAPH_FILE
    assert path.exists() is (twice.model_type != "dense")
    if path.exists():
        pixels = image.imread(path)
        assert pixels.shape[0] > 100 and pixels.shape[1] > 100
        assert all(np.unique(pixels[..., channel]).size > 20 for channel in range(3))


def test_training_flops_are_those_of_the_steps_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research_eval.runs.scores.measure_flops", lambda *_, **__: (10.0, 30.0))
    patience = {"early_stopping_patience": 1}
    end = run_in(tmp_path, small_config(epochs=9, optimizer_params={"lr": 1e-12}, training_params=patience))
    assert end.metrics["epochs_completed"] == 2
    assert end.metrics["train_flops"] == 2 * 80 * 30.0
    assert end.metrics["inference_flops_per_sample"] == 10.0


def test_the_test_split_is_scored_once_with_the_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coming = iter([1.0, 0.5])  # the first epoch is the best
    monkeypatch.setattr("research_eval.training.fit.evaluate", lambda *_: Evaluation(0.5, {"f1": next(coming)}))
    used = []

    def watching(model: EvaluableModel, *arguments: Any) -> Evaluation:
        used.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return evaluate(model, *arguments)

    monkeypatch.setattr("research_eval.runs.scores.evaluate", watching)
    end = run_in(tmp_path, small_config(training_params={"test": True}))
    best, values = load_tensors(tmp_path / end.folder / MODEL_FILE)
    assert values["step"] == 5
    (weights,) = used
    torch.testing.assert_close(weights, best, rtol=0, atol=0)
    assert (end.metrics["final_val_f1"], end.metrics["best_val_f1_across_epochs"]) == (0.5, 1.0)


def test_a_name_with_signs_of_formulas_and_paths_is_a_name(tmp_path: Path) -> None:
    name = "../../a $\\foo$ b"
    end = run_in(tmp_path, small_config(model_type="goe", epochs=1, experiment_name=name))
    assert end.status == "finished"
    with results(tmp_path) as store:
        assert store.experiment(end.experiment_id)["experiment_name"] == name
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [end.experiment_id]


# ---------------------------------------------------------------------------------------------- runs that go wrong


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_that_diverges_is_stored_with_its_step(epochs: int, tmp_path: Path) -> None:
    options = {"name": "sgd", "lr": 1e38, "momentum": 0.0, "grad_clip_norm": None}
    end = run_in(tmp_path, small_config(epochs=epochs, batch_size=80, optimizer_params=options))
    assert (end.status, end.exit_code, end.metrics) == ("diverged", 1, {})
    assert "is nan at step 1" in str(end.error)
    with results(tmp_path) as store:
        row = store.experiment(end.experiment_id)
        assert (row["status"], row["error"]) == ("diverged", end.error)
        assert store.metrics(end.experiment_id) == {}
    lines = list(csv.DictReader((tmp_path / CSV_FILE).read_text().splitlines()))
    assert [line["status"] for line in lines] == ["diverged"]


class Broken(EvaluableModel):
    """Fails in the second epoch."""

    def __init__(self, *, vocab_size: int, num_classes: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, num_classes)
        self.steps = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.table(input_ids).mean(1)

    def after_step(self, progress: float) -> None:
        if progress > 0.5:
            raise RuntimeError("the model is broken")


def test_a_run_that_fails_is_stored_and_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS_MAP, "broken", Broken)
    with pytest.raises(RuntimeError, match="the model is broken"):
        run_in(tmp_path, small_config(model_type="broken"))
    with results(tmp_path) as store:
        (row,) = store.experiments()
    assert (row["status"], row["error"]) == ("failed", "RuntimeError: the model is broken")
    lines = list(csv.DictReader((tmp_path / CSV_FILE).read_text().splitlines()))
    assert [line["status"] for line in lines] == ["failed"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"training_params": {"device": "cuda:99"}}, "no 'cuda:99'"),
        ({"dataset_params": {"num_samples": 2, "seq_len": 1}}, "different inputs"),
    ],
)
def test_what_cannot_be_run_leaves_no_row_and_no_folder(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        run_in(tmp_path, small_config(**changes))
    with results(tmp_path) as store:
        assert store.experiments() == []
    assert not (tmp_path / "runs").exists() and not (tmp_path / CSV_FILE).exists()


# ---------------------------------------------------------------------------------------------------------- resume


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a SIGTERM when the given step is reported."""
    report = Journal.train_values

    def reporting(self: Journal, at: int, values: dict[str, float]) -> None:
        report(self, at, values)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Journal, "train_values", reporting)


def test_a_stopped_run_goes_on_exactly(twice: Twice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the second epoch, at a step that is reported anyway."""
    config = config_of(twice.model_type)
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        stopped = run_in(tmp_path, config)
    assert (stopped.status, stopped.exit_code) == ("interrupted", 143)
    with results(tmp_path) as store:
        row = store.experiment(stopped.experiment_id)
        assert (row["status"], row["error"]) == ("interrupted", "signal 15 after step 8")
        assert max(point.step for point in store.history(stopped.experiment_id)) == 8
    assert not (tmp_path / CSV_FILE).exists()

    resumed = run_in(tmp_path, config, resume=True)
    assert (resumed.experiment_id, resumed.status) == (stopped.experiment_id, "finished")
    assert repeatable(resumed.metrics) == repeatable(twice.first.metrics)
    assert history(tmp_path, resumed.experiment_id) == history(twice.folder, twice.first.experiment_id)
    with results(tmp_path) as store:
        (row,) = store.experiments()
        assert (row["status"], row["error"]) == ("finished", None)
    assert len((tmp_path / CSV_FILE).read_text().splitlines()) == 2


EVERYTHING: dict[str, Any] = {
    "model_type": "goe_original",
    "epochs": 6,
    "batch_size": 8,
    "model_params": {
        "halt": "ponder",
        "router_mode": "st",
        "dropout": 0.2,
        "contrastive_loss_coef": 0.1,
        "path_penalty_coef": 0.01,
        "router_entropy_coef": 0.1,
        "halt_warmup": 0.1,
    },
    "optimizer_params": {"lr": 0.01},
    "scheduler_params": {"name": "cosine_warmup"},
    "training_params": {
        "ema_decay": 0.9,
        "gradient_accumulation_steps": 3,
        "label_smoothing": 0.1,
        "checkpoint_every": 7,  # an epoch has 4 steps
        "log_every": 3,
        "test": True,
    },
}


def killed_after_a_checkpoint(folder: Path, config: Path) -> None:
    """Run the script in a process of its own and kill it as soon as there is a checkpoint."""
    script = ROOT / "research_eval" / "main.py"
    process = subprocess.Popen(
        [sys.executable, script, "--json_config_path", config.name, "--quiet"], cwd=folder, env=environment()
    )
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob(f"runs/*/{CHECKPOINT_FILE}")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"


def test_a_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    """With dropout, Gumbel noise, moving average, accumulation, schedule and moments, from within an epoch."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        config = write_config(folder, **EVERYTHING)
    expected = run_in(whole, small_config(**EVERYTHING))
    killed_after_a_checkpoint(cut, config)
    with results(cut) as store, contextlib.chdir(cut):
        (row,) = store.experiments()
        assert row["status"] == "interrupted"
    step = load_tensors(cut / "runs" / row["experiment_id"] / CHECKPOINT_FILE)[1]["state"]["step"]
    assert step < 24

    resumed = python("-m", "research_eval.main", "--json_config_path", config.name, "--resume", folder=cut)
    assert resumed.code == 0, resumed.err
    assert f"resuming run {row['experiment_id']}" in resumed.err
    with results(cut) as store:
        assert [known["experiment_id"] for known in store.experiments()] == [row["experiment_id"]]
        metrics = store.metrics(row["experiment_id"])
    assert repeatable(metrics) == repeatable(expected.metrics)
    assert history(cut, row["experiment_id"]) == history(whole, expected.experiment_id)
    assert len((cut / CSV_FILE).read_text().splitlines()) == 2


def test_points_behind_the_checkpoint_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies between two checkpoints leaves points that the resumed run will reach again."""
    config = small_config(training_params={"checkpoint_every": 3, "log_every": 1})
    report = Journal.train_values

    def dying(self: Journal, step: int, values: dict[str, float]) -> None:
        report(self, step, {**values, "only_once": 1.0} if step in (3, 5) else values)
        if step == 5:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "train_values", dying)
        with pytest.raises(MemoryError):
            run_in(tmp_path, config)
    end = run_in(tmp_path, config, resume=True)
    points = history(tmp_path, end.experiment_id)
    assert [step for step, name, _ in points if name == "train_loss"] == list(range(1, 11))
    assert [step for step, name, _ in points if name == "only_once"] == [3]


def test_a_finished_run_has_nothing_to_resume(twice: Twice) -> None:
    files = sorted((twice.folder / "runs").rglob("*"))
    times = [path.stat().st_mtime_ns for path in files]
    lines = (twice.folder / CSV_FILE).read_text()
    end = run_in(twice.folder, config_of(twice.model_type), resume=True)
    assert (end.experiment_id, end.status, end.exit_code) == (twice.second.experiment_id, "finished", 0)
    assert end.metrics == twice.second.metrics
    assert [path.stat().st_mtime_ns for path in files] == times
    assert sorted((twice.folder / "runs").rglob("*")) == files
    assert (twice.folder / CSV_FILE).read_text() == lines
    with results(twice.folder) as store:
        assert len(store.experiments()) == 2


def test_only_the_same_config_is_resumed(tmp_path: Path) -> None:
    first = run_in(tmp_path, small_config())
    other = run_in(tmp_path, small_config(seed=1), resume=True)
    assert other.experiment_id != first.experiment_id
    with results(tmp_path) as store:
        assert [row["seed"] for row in store.experiments()] == [0, 1]


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        return run_in(folder, small_config())


def test_a_run_in_other_hands_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = interrupted(tmp_path, monkeypatch)
    config = write_config(tmp_path)
    with (tmp_path / stopped.folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        monkeypatch.chdir(tmp_path)
        ended = command(main, "--json_config_path", config, "--resume", "--db", DB_FILE)
    assert ended.code == 2
    assert f"run {stopped.experiment_id} is being trained by another process" in ended.err
    with results(tmp_path) as store:
        assert store.experiment(stopped.experiment_id)["status"] == "interrupted"
    assert run_in(tmp_path, small_config(), resume=True).status == "finished"


def test_a_broken_checkpoint_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = interrupted(tmp_path, monkeypatch)
    checkpoint = tmp_path / stopped.folder / CHECKPOINT_FILE
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="not a readable checkpoint"):
        run_in(tmp_path, small_config(), resume=True)
    with results(tmp_path) as store:
        row = store.experiment(stopped.experiment_id)
    assert row["status"] == "failed" and str(row["error"]).startswith("ConfigError: runs/")
    assert run_in(tmp_path, small_config()).status == "finished"


def test_a_run_stopped_at_its_very_end_needs_only_its_scores(
    twice: Twice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 15)
        assert run_in(tmp_path, config_of(twice.model_type)).status == "interrupted"
    resumed = run_in(tmp_path, config_of(twice.model_type), resume=True)
    assert repeatable(resumed.metrics) == repeatable(twice.first.metrics)
    assert history(tmp_path, resumed.experiment_id) == history(twice.folder, twice.first.experiment_id)


@pytest.mark.parametrize("name", ["", "..", "../elsewhere", "a/b", "a\\b", "nul\0"])
def test_an_id_from_a_foreign_database_is_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match="experiment id"):
        run_folder(name)
