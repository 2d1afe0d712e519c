"""The routing trace: what the files hold, that they repeat themselves, and that looking changes nothing.

S samples  T steps of a path  A actions  N experts
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from support import ROOT, generator_draws, history, repeatable, run_in, small_config
from torch import nn

from research_eval.analysis.routing_plots import ENTROPY_FILE, LOAD_FILE
from research_eval.datasets.token_data import Batches, TokenData
from research_eval.errors import ConfigError
from research_eval.experiment import Result, prepare
from research_eval.layers.stacked import Dropout, StackedLinear
from research_eval.models.base_model import EvaluableModel, joined_on_host, logits_of
from research_eval.routing import trace_files
from research_eval.routing.record import EvaluationRecorder, RoutingRecord
from research_eval.routing.trace_files import ROUTING_FOLDER, read_samples, read_trace
from research_eval.schema import ExperimentConfig
from research_eval.tasks.classification import Classification
from research_eval.training.checkpoint import load_tensors
from research_eval.training.evaluate import evaluate
from research_eval.training.fit import CHECKPOINT_FILE
from research_eval.training.routing_watch import expert_similarity, relative_change, training_mode_metrics
from research_eval.training.runtime import Runtime
from research_eval.training.state import Diverged

TASK = Classification()
PLANTED = {
    "dataset_name": "planted_paths",
    "dataset_params": {"num_samples": 120, "num_functions": 2, "depth": 2, "num_values": 3, "num_operands": 1},
}


def config_of(**changes: Any) -> ExperimentConfig:
    """Three epochs of a model that draws noise, on a task whose right paths are known."""
    model_params = {"router_mode": "st", "dropout": 0.1, "max_path_len": 2, **changes.pop("model_params", {})}
    training = {"trace_routing": True, **changes.pop("training_params", {})}
    settings = {"model_type": "goe_original", "epochs": 3, **PLANTED, **changes}
    return small_config(model_params=model_params, training_params=training, **settings)


class Traced(NamedTuple):
    folder: Path
    result: Result

    @property
    def run(self) -> Path:
        return self.folder / self.result.folder

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.run / ROUTING_FOLDER).iterdir()}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    folder = tmp_path_factory.mktemp("traced")
    return Traced(folder, run_in(folder, config_of()))


def test_the_trace_has_a_row_per_validation_sample(traced: Traced) -> None:
    epochs = list(read_trace(traced.run))
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    _, data, _ = prepare(config_of())
    validation = data.validation
    for epoch in epochs:
        table = epoch.samples.to_pandas()
        assert table["sample"].tolist() == list(range(len(validation)))
        assert table["label"].tolist() == validation.labels.tolist()
        assert table["correct"].mean() == pytest.approx(
            {step // 6: value for step, name, value in history(*_place(traced)) if name == "val_acc"}[epoch.epoch]
        )
        planted = [[int(f) for f in path if f >= 0] for path in validation.paths]  # type: ignore[union-attr]
        assert [list(path) for path in table["planted_path"]] == planted
        assert table["group"].tolist() == validation.groups.tolist()  # type: ignore[union-attr]
        load_N = np.bincount(np.concatenate(table["path"]), minlength=4)
        assert load_N / load_N.sum() == pytest.approx(np.mean(epoch.summary["expert_load"], 0), abs=1e-5)
        probabilities_STA = np.array(epoch.samples["probabilities"].to_pylist())
        assert probabilities_STA.shape == (len(validation), 2, 5)
        assert probabilities_STA.sum(-1) == pytest.approx(np.ones((len(validation), 2)), abs=1e-5)
    last = epochs[-1].samples.to_pandas()
    assert last["loss"].mean() == pytest.approx(traced.result.metrics["final_val_loss"], rel=1e-5)


def _place(traced: Traced) -> tuple[Path, str]:
    return traced.folder, traced.result.experiment_id


def test_each_row_is_what_the_model_does_with_that_sample(traced: Traced) -> None:
    """The weights of the last epoch, given the samples in the order of the split."""
    _, data, model = prepare(config_of())
    tensors, _ = load_tensors(traced.run / CHECKPOINT_FILE)
    weights = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    model.load_state_dict(weights)
    rows_S = np.arange(len(data.validation))
    model.eval()
    with torch.no_grad():
        logits_SC = logits_of(model, Batches(data.validation, 1).take(rows_S))
    table = list(read_trace(traced.run))[-1].samples.to_pydict()
    recorded = model.recorder().probabilities()
    assert recorded is not None
    assert recorded.std(axis=0).max() > 1e-4, "the samples differ"
    np.testing.assert_allclose(np.array(table["probabilities"]), recorded, atol=1e-5)
    assert table["path"] == model.recorded_paths().tolist()  # type: ignore[union-attr]
    assert table["correct"] == (logits_SC.argmax(-1).numpy() == data.validation.labels).tolist()


def test_pandas_alone_reads_it(traced: Traced) -> None:
    table = pd.read_parquet(traced.run / ROUTING_FOLDER / "epoch_0003.parquet")
    assert table.groupby("label")["correct"].mean().between(0, 1).all()
    assert table["path"].map(len).max() <= 2


def test_the_samples_and_the_weights_of_the_run_are_named(traced: Traced) -> None:
    _, data, _ = prepare(config_of())
    samples, names = read_samples(traced.run)
    split = data.validation
    assert [row.tolist() for row in np.split(split.tokens, split.offsets[1:-1])] == samples.to_pylist()
    assert names == {"labels": list(data.label_names), "tokens": {}}  # generated tokens are numbers
    epochs = list(read_trace(traced.run))
    assert [epoch.version for epoch in epochs] == [2, 2, 2]
    scores = [dict(_points(traced, "val_f1"))[6 * epoch.epoch] for epoch in epochs]
    assert [epoch.summary["best_so_far"] for epoch in epochs] == [
        all(score > earlier for earlier in scores[:place]) for place, score in enumerate(scores)
    ]
    assert epochs[0].summary["router"]["router_mode"] == "st"
    strengths = np.concatenate(epochs[-1].samples["strength"].to_pylist())
    assert strengths == pytest.approx(1, abs=1e-6), "c is 1 in this mode"


def _points(traced: Traced, wanted: str) -> list[tuple[int, float]]:
    return [(step, value) for step, name, value in history(*_place(traced)) if name == wanted]


def test_a_trace_of_the_first_version_opens(traced: Traced, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(traced.run, folder)
    (folder / ROUTING_FOLDER / "samples.parquet").unlink()
    path = folder / ROUTING_FOLDER / "epoch_0001.parquet"
    table = pq.read_table(path).drop_columns(["prediction", "strength"]).replace_schema_metadata(None)
    pq.write_table(table, path)
    first, *_ = read_trace(folder)
    assert first.version == 1
    assert read_samples(folder) == (None, {"labels": [], "tokens": {}})


def test_the_last_summary_is_what_the_run_stores(traced: Traced) -> None:
    summary = list(read_trace(traced.run))[-1].summary
    stored = traced.result.metrics
    shared = set(summary) - {"epoch", "alarms", "best_so_far", "router"}
    assert {name: stored[name] for name in shared} == {name: summary[name] for name in shared}
    assert {"path_class_nmi", "path_group_nmi_adjusted", "training_mode_gap", "planted_recovery"} <= shared
    assert stored["num_alarms"] == len(stored["alarms"])
    series = {name for _, name, _ in history(*_place(traced))}
    scalars = {name for name in shared if isinstance(summary[name], int | float)}
    assert scalars <= series


def test_the_pictures_lie_in_the_folder_of_the_run(traced: Traced) -> None:
    assert {LOAD_FILE, ENTROPY_FILE} <= {path.name for path in traced.run.iterdir()}
    outside = {path.name for path in traced.folder.iterdir()}
    assert outside <= {"runs", "json_experiment_results.csv", "json_experiment_results.csv.lock"} | {
        name for name in outside if name.startswith("experiment_results.db")
    }


def test_tracing_changes_nothing_else(traced: Traced, tmp_path: Path) -> None:
    plain = run_in(tmp_path, config_of(training_params={"trace_routing": False}))
    assert not (tmp_path / plain.folder / ROUTING_FOLDER).exists()
    assert not (tmp_path / plain.folder / LOAD_FILE).exists()
    with_trace, without = repeatable(traced.result.metrics), repeatable(plain.metrics)
    assert with_trace["num_alarms"] >= without["num_alarms"], "one alarm more needs the trace"
    same = set(without) - {"alarms", "num_alarms"}
    assert {name: with_trace[name] for name in same} == {name: without[name] for name in same}
    assert set(with_trace) - set(without) == {"training_mode_accuracy", "training_mode_gap"}
    weights = [load_tensors(folder / CHECKPOINT_FILE)[0] for folder in (traced.run, tmp_path / plain.folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_resumed_run_writes_the_same_files(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second epoch, between checkpoints, after its first file."""
    original = trace_files.write_atomically

    def killed(path: Path, content: bytes) -> None:
        if path.name == "epoch_0002.parquet":
            raise Diverged("killed")
        original(path, content)

    monkeypatch.setattr(trace_files, "write_atomically", killed)
    first = run_in(tmp_path, config_of())
    assert first.status == "diverged"
    assert {path.name for path in (tmp_path / first.folder / ROUTING_FOLDER).iterdir()} == {
        "epoch_0001.json",
        "epoch_0001.parquet",
        "epoch_0002.json",
        "samples.parquet",
    }
    monkeypatch.undo()
    again = Traced(tmp_path, run_in(tmp_path, config_of(), resume=True))
    assert again.result.experiment_id == first.experiment_id
    assert again.files() == traced.files()
    assert repeatable(again.result.metrics) == repeatable(traced.result.metrics)
    assert history(*_place(again)) == history(*_place(traced))


def test_a_model_without_paths_is_traced_without_them(tmp_path: Path) -> None:
    result = run_in(tmp_path, small_config(epochs=1, training_params={"trace_routing": True}))
    (epoch,) = read_trace(tmp_path / result.folder)
    assert epoch.samples.column_names == ["sample", "label", "correct", "prediction", "loss"]
    assert "num_alarms" not in result.metrics
    shutil.rmtree(tmp_path / result.folder / ROUTING_FOLDER)
    with pytest.raises(ConfigError, match="trace_routing"):
        list(read_trace(tmp_path / result.folder))


def test_every_name_of_a_traced_run_is_on_the_page(traced: Traced) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    documented = set(re.findall(r"`(\w+)`", page))
    named = set(traced.result.metrics) | {name for _, name, _ in history(*_place(traced))}
    missing = {re.sub(r"_(raw|weighted)$", "", name) for name in named if not name.startswith("alarm_")} - documented
    assert not missing
    for column in pd.read_parquet(traced.run / ROUTING_FOLDER / "epoch_0001.parquet").columns:
        assert f"`{column}`" in page


# ------------------------------------------------------------------------------------------- training-mode accuracy


class Noisy(EvaluableModel):
    """Right in evaluation; in training it errs where its noise is on, drops half of its input, and counts."""

    def __init__(self, flips: float) -> None:
        super().__init__()
        self.flips = flips
        self.dropout, self.other = Dropout(0.5), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        right_B = self.other(self.dropout((input_ids[:, 0] - 1).float()))
        if self.training:
            self.seen += len(input_ids)
            right_B = torch.where(torch.rand(len(input_ids)) < self.flips, 1 - right_B, right_B)
        return torch.stack([1 - right_B, right_B], 1)


def noisy_split(size: int) -> Batches:
    labels_S = np.arange(size) % 2
    return Batches(TokenData.from_padded(labels_S[:, None] + 1, labels_S), 256)


@pytest.mark.parametrize("flips", [0.0, 0.25, 1.0])
def test_the_gap_is_that_of_the_noise_and_not_of_dropout(flips: float) -> None:
    model, batches, runtime = Noisy(flips), noisy_split(3000), Runtime("cpu", "fp32", 1)
    evaluation = evaluate(model, batches, 2, runtime)
    assert evaluation.accuracy == 1.0
    torch.manual_seed(3)
    undisturbed = generator_draws()
    torch.manual_seed(3)
    np.random.seed(0)
    metrics = training_mode_metrics(model, batches, evaluation, runtime, TASK)
    torch.manual_seed(3)
    assert generator_draws()[0] == undisturbed[0]
    assert metrics["training_mode_accuracy"] == pytest.approx(1 - flips, abs=0.05)
    assert metrics["training_mode_gap"] == pytest.approx(-flips, abs=0.05)
    assert model.seen == 0, "buffers are put back"
    assert not any(module.training for module in model.modules())


def test_the_pass_leaves_generators_alone_and_takes_at_most_1000_samples() -> None:
    model, batches, runtime = Noisy(0.5), noisy_split(3000), Runtime("cpu", "fp32", 1)
    evaluation = evaluate(model, batches, 2, runtime)
    counted = []
    model.register_forward_hook(lambda _, inputs, __: counted.append(len(inputs[0])))
    state = torch.get_rng_state()
    training_mode_metrics(model, batches, evaluation, runtime, TASK)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(counted) == 1000


@pytest.mark.parametrize("name", ["moe", "goe", "goe_original"])
def test_deterministic_routing_has_no_gap(
    name: str, build_model: Callable[..., EvaluableModel], ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    model, runtime = build_model(name, dropout=0.5), Runtime("cpu", "fp32", 1)
    batches = Batches(TokenData.from_padded(ids_BL.numpy(), labels_B.numpy()), 4)
    before = {key: value.clone() for key, value in model.named_buffers()}
    evaluation = evaluate(model, batches, 3, runtime)
    metrics = model.get_model_specific_metrics()
    assert training_mode_metrics(model, batches, evaluation, runtime, TASK)["training_mode_gap"] == 0
    assert model.get_model_specific_metrics() == metrics, "the record is still that of the evaluation"
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())


# ---------------------------------------------------------------------------------------- parameters and the record


def test_similarity_of_experts_is_the_mean_cosine_of_their_weights() -> None:
    class Pool(nn.Module):
        def __init__(self, num_experts: int) -> None:
            super().__init__()
            self.experts = nn.ModuleList([StackedLinear(num_experts, 3, 5), StackedLinear(num_experts, 5, 2)])

    pool = Pool(3)
    vectors = torch.cat([p.detach().flatten(1) for p in pool.parameters() if p.ndim > 2], 1)
    pairs = [torch.cosine_similarity(vectors[i], vectors[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert expert_similarity(pool) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    assert expert_similarity(pool) == pytest.approx(1.0)
    assert expert_similarity(Pool(1)) is None
    assert expert_similarity(nn.Linear(3, 3)) is None
    both = nn.ModuleDict({"healthy": Pool(4), "copies": pool})
    assert expert_similarity(both) == pytest.approx(1.0), "one collapsed layer is not hidden by the others"


@pytest.mark.parametrize("name", ["moe", "goe", "goe_original"])
def test_fresh_experts_are_strangers(name: str, build_model: Callable[..., EvaluableModel]) -> None:
    similarity = expert_similarity(build_model(name))
    assert similarity is not None
    assert abs(similarity) < 0.1


def test_change_is_relative_to_the_start() -> None:
    before = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert relative_change(before, before) == 0
    assert relative_change(before, [torch.tensor([3.0, 1.0]), torch.tensor([[4.0]])]) == pytest.approx(0.2)


def test_the_record_keeps_probabilities_and_values_with_their_paths() -> None:
    recorder = EvaluationRecorder(2, 3, joined_on_host)
    assert recorder.probabilities() is None
    assert recorder.values() is None

    def record(part_BTA: torch.Tensor) -> None:
        recorder.begin_batch(len(part_BTA))
        experts_B1 = torch.zeros(len(part_BTA), 1, dtype=torch.long)
        for step, part_BA in enumerate(part_BTA.unbind(1)):
            weights_B1 = torch.ones(len(part_BA), 1)
            recorder.push(RoutingRecord(step, experts_B1, weights_B1, probabilities_DA=part_BA, values_DA=-part_BA))

    parts = [torch.rand(size, 3, 3).requires_grad_() for size in (4, 1)]
    for part in parts:
        record(part)
    probabilities_STA, values_STA = recorder.probabilities(), recorder.values()
    assert probabilities_STA is not None
    assert values_STA is not None
    np.testing.assert_array_equal(probabilities_STA, torch.cat(parts).detach().numpy())
    np.testing.assert_array_equal(values_STA, -probabilities_STA)
    recorder.clear()
    assert recorder.probabilities() is None
    recorder.wants = "paths"
    record(parts[1])
    assert recorder.probabilities() is None
    assert len(recorder.paths()) == 1


def test_values_are_traced_where_a_model_has_them(tmp_path: Path) -> None:
    result = run_in(tmp_path, config_of(epochs=1, model_params={"router_mode": "q"}))
    (epoch,) = read_trace(tmp_path / result.folder)
    values_STA = np.array(epoch.samples["values"].to_pylist())
    assert values_STA.shape == (24, 2, 5)
    means = epoch.summary["mean_values"]
    assert np.array(means) == pytest.approx(values_STA.mean(0), abs=1e-5), "all paths are full"
    json.dumps(result.metrics["mean_values"])


def test_logits_of_a_batch_are_not_changed_by_a_pass_in_training_mode(
    build_model: Callable[..., EvaluableModel], ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    model, runtime = build_model("goe_original", router_mode="st", dropout=0.3), Runtime("cpu", "fp32", 1)
    batches = Batches(TokenData.from_padded(ids_BL.numpy(), labels_B.numpy()), 6)
    evaluation = evaluate(model, batches, 3, runtime)
    (batch,) = batches
    before = logits_of(model, batch)
    training_mode_metrics(model, batches, evaluation, runtime, TASK)
    assert torch.equal(logits_of(model, batch), before)
