"""A mixture of experts decides about tokens: shares of a sample, its path, and everything that follows from paths.

B batch  L length  N experts  K experts per token  T layers  S samples
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import run_in, small_config, wake

from research_eval.models.base_model import EvaluableModel, logits_of
from research_eval.routing.record import EvaluationRecorder, RoutingRecord
from research_eval.routing.trace_files import read_trace
from research_eval.runs.pictures import GRAPH_FILE
from research_eval.runs.predict import predict


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_shares_and_paths_are_a_slow_count(data: st.DataObject) -> None:
    """Two batches of ragged samples, two experts per token."""
    num_experts, num_layers = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    recorder = EvaluationRecorder(num_experts, num_layers)
    recorder.begin_batch(1)
    recorder.push(RoutingRecord(0, np.zeros((1, 1), int), np.ones((1, 1)), np.zeros(1, int), np.zeros(1, int)))
    recorder.clear()
    shares, counts = [], np.zeros((num_layers, num_experts), int)
    for _ in range(2):
        lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        recorder.begin_batch(len(lengths))
        batch = np.zeros((len(lengths), num_layers, num_experts))
        sample_D = np.repeat(np.arange(len(lengths)), lengths)
        token_D = np.concatenate([np.arange(length) for length in lengths])
        for layer in range(num_layers):
            experts_DK = np.array([rng.permutation(num_experts)[:2] for _ in sample_D])
            weights_DK = rng.random((len(sample_D), 2))
            recorder.push(
                RoutingRecord(layer, experts_DK, weights_DK, sample_D, token_D, entropy_D=np.ones(len(sample_D)))
            )
            for sample, experts, weights in zip(sample_D, experts_DK, weights_DK, strict=True):
                for expert, weight in zip(experts, weights, strict=True):
                    batch[sample, layer, expert] += weight
                    counts[layer, expert] += 1
        shares.append(batch / batch.sum(-1, keepdims=True))
    expected_STN = np.concatenate(shares)
    assert recorder.is_about_tokens()
    np.testing.assert_allclose(recorder.expert_shares(), expected_STN, rtol=1e-5)
    assert recorder.paths().tolist() == recorder.expert_shares().argmax(-1).tolist()
    metrics = recorder.metrics()
    assert np.array(metrics["expert_load"]) == pytest.approx(counts / counts.sum(1, keepdims=True), abs=1e-6)
    assert metrics["router_entropy"] == pytest.approx(1 / np.log(num_experts))


def test_the_shares_of_a_model_are_its_tokens_and_padding_plays_no_part(
    build_model: Callable[..., EvaluableModel], ids_BL: torch.Tensor
) -> None:
    """Each sample alone, without padding, has the shares that it has in the padded batch."""
    model = wake(build_model("moe", num_experts=3))
    model.start_recording()
    model(ids_BL)
    together_STN = model.recorder().expert_shares()
    np.testing.assert_allclose(together_STN.sum(-1), 1, rtol=1e-5)
    for row, ids_L in enumerate(ids_BL):
        model.start_recording()
        model(ids_L[ids_L != 0].unsqueeze(0))
        np.testing.assert_allclose(model.recorder().expert_shares()[0], together_STN[row], atol=1e-5)
    model.start_recording()
    assert model.recorder().expert_shares() is None


def test_training_records_nothing(build_model: Callable[..., EvaluableModel], ids_BL: torch.Tensor) -> None:
    for name in ("moe", "goe", "goe_original"):
        model = wake(build_model(name)).train()
        model.start_recording()
        model(ids_BL)
        assert len(model.recorded_paths()) == 0, name


@pytest.mark.parametrize("name", ["moe", "goe", "goe_original"])
def test_a_model_records_what_is_wanted(
    name: str, build_model: Callable[..., EvaluableModel], ids_BL: torch.Tensor
) -> None:
    """Nothing, the paths alone, or everything; the outputs are the same to the bit."""
    model = wake(build_model(name))
    model.start_recording()
    expected, recorder = model(ids_BL), model.recorder()
    assert recorder is not None
    paths, entropy = model.recorded_paths(), model.get_model_specific_metrics()["router_entropy"]
    assert len(paths) == len(ids_BL)
    assert entropy > 0
    model.stop_recording()
    assert torch.equal(model(ids_BL), expected)
    assert len(model.recorded_paths()) == 0
    model.start_recording()
    recorder.wants = "paths"
    assert torch.equal(model(ids_BL), expected)
    assert (model.recorded_paths() == paths).all()
    assert recorder.probabilities() is None
    model.start_recording()
    model(ids_BL)
    assert model.get_model_specific_metrics()["router_entropy"] == entropy


def test_losses_follow_from_the_outcome_alone(
    build_model: Callable[..., EvaluableModel], ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Passes in between change nothing: no loss reads what another pass has left in the model."""
    from research_eval.datasets.token_data import Batch
    from research_eval.tasks.classification import Classification

    batch = Batch(ids_BL, ids_BL != 0, labels_B)
    other = Batch(ids_BL.flip(0), ids_BL.flip(0) != 0, labels_B.flip(0))
    for name in ("moe", "goe", "goe_original"):
        model = wake(build_model(name)).train()
        torch.manual_seed(2)
        outcome = model.run(batch)
        buffers = {key: value.clone() for key, value in model.named_buffers()}
        wanted = model.losses(outcome, labels_B, Classification())
        logits_of(model, other)
        model.run(other)
        for key, value in model.named_buffers():  # running statistics belong to the model, not to a pass
            value.copy_(buffers[key])
        found = model.losses(outcome, labels_B, Classification())
        assert torch.equal(found.task, wanted.task), name
        assert found.terms.keys() == wanted.terms.keys()
        assert all(torch.equal(found.terms[key].raw, wanted.terms[key].raw) for key in wanted.terms), name


@pytest.fixture(name="finished", scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory, real_graphs: None):
    folder = tmp_path_factory.mktemp("moe")
    config = small_config(
        model_type="moe", model_params={"num_experts": 3, "num_layers": 2}, training_params={"trace_routing": True}
    )
    return folder, run_in(folder, config)


def test_a_mixture_has_specialisation_with_its_null_and_pictures(finished) -> None:
    folder, result = finished
    metrics = result.metrics
    assert metrics["path_class_nmi_null"] >= 0
    assert len(metrics["step_class_nmi_adjusted"]) == 2, "one figure per layer"
    assert sum(map(sum, metrics["step_transitions"][0])) == 20, "every validation sample starts once"
    assert "path_length_by_class" not in metrics, "all paths have one step per layer"
    assert (folder / result.folder / GRAPH_FILE).stat().st_size > 1000


def test_the_trace_of_a_mixture_has_experts_per_sample_and_class(finished) -> None:
    folder, result = finished
    *_, last = read_trace(folder / result.folder)
    rows = last.samples.to_pylist()
    assert len(rows) == 20
    for row in rows:
        assert np.array(row["expert_share"]).shape == (2, 3)
        assert [sum(shares) for shares in row["expert_share"]] == pytest.approx([1, 1], abs=1e-5)
        assert row["path"] == [int(np.argmax(shares)) for shares in row["expert_share"]]
    assert {row["label"] for row in rows} == {0, 1}
    assert json.loads(json.dumps(last.summary))["step_class_nmi"] == last.summary["step_class_nmi"]


def test_a_mixture_predicts_with_experts(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = finished
    monkeypatch.chdir(folder)
    (prediction,) = predict(result.experiment_id, ["1 2 1 2 2 1"], device="cpu")
    assert prediction.path is not None
    assert len(prediction.path) == 2
    assert f"path: start -> {prediction.path[0]} -> {prediction.path[1]} -> stop" in str(prediction)


def test_paths_of_samples_are_recorded_with_their_place(tmp_path: Path) -> None:
    """Records of single samples, as a model may push them, land where the sample is."""
    recorder = EvaluationRecorder(3, 2)
    recorder.begin_batch(3)
    recorder.push(RoutingRecord(0, np.array([[2], [1], [0]]), np.ones((3, 1)), entropy_D=np.ones(3)))
    recorder.push(RoutingRecord(1, np.array([[1]]), np.ones((1, 1)), sample_D=np.array([2]), entropy_D=np.ones(1)))
    recorder.begin_batch(1)
    recorder.push(RoutingRecord(0, np.array([[2]]), np.ones((1, 1)), entropy_D=np.ones(1)))
    assert recorder.paths().tolist() == [[2, -1], [1, -1], [0, 1], [2, -1]]
    assert recorder.metrics()["mean_path_length"] == 1.25
