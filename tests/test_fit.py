"""The training loop: what a step, an epoch and a run do.

B batch  C classes
"""

from __future__ import annotations

import math
import os
import signal
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support import MODELS, generator_draws, small_config
from torch.nn import functional as F
from torch.testing import assert_close

from research_eval.datasets.token_data import Batch, Batches, DataSplits
from research_eval.errors import ConfigError
from research_eval.experiment import prepare
from research_eval.models.base_model import EvaluableModel
from research_eval.tasks.base import Evaluation
from research_eval.tasks.classification import Classification
from research_eval.training.checkpoint import load_tensors
from research_eval.training.checkpointer import CHECKPOINT_FILE, MODEL_FILE, Checkpointer
from research_eval.training.evaluate import evaluate
from research_eval.training.fit import fit
from research_eval.training.runtime import Runtime, stop_requests
from research_eval.training.state import Diverged, Interrupted, TrainingState
from research_eval.training.step import Meter

PLAIN_SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "grad_clip_norm": None}
ALL = 80  # training samples of the small config
Weights = dict[str, torch.Tensor]


class Trained(NamedTuple):
    model: EvaluableModel
    data: DataSplits
    state: TrainingState
    scored: EvaluableModel
    evaluation: Evaluation
    seen: Observed
    folder: Path


class Observed:
    """An observer that remembers; `at_epoch_end` may look at the model."""

    def __init__(self, at_epoch_end: Callable[[], None] = lambda: None) -> None:
        self.series: dict[str, dict[int, float]] = defaultdict(dict)
        self.starts: list[tuple[int, int, int]] = []
        self.at_epoch_end = at_epoch_end

    def start(self, state: TrainingState, steps_per_epoch: int, total_steps: int) -> None:
        self.starts.append((state.step, steps_per_epoch, total_steps))

    def train_values(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            assert step not in self.series[name]
            self.series[name][step] = value

    def epoch_end(
        self, step: int, evaluation: Evaluation, model_metrics: dict[str, Any], scored: EvaluableModel
    ) -> None:
        self.series["val_f1"][step] = evaluation.scores["f1"]
        self.series["val_loss"][step] = evaluation.loss
        self.at_epoch_end()


def weights(model: torch.nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def train(folder: Path, **changes: Any) -> Trained:
    """`fit` of a small config without dropout."""
    config = small_config(**{**changes, "model_params": {"dropout": 0.0} | changes.get("model_params", {})})
    runtime, data, model = prepare(config)
    seen = Observed()
    state, scored, evaluation = fit(model, data, config, runtime, folder, seen)
    return Trained(model, data, state, scored, evaluation, seen, folder)


def untrained(**changes: Any) -> tuple[EvaluableModel, DataSplits]:
    """What `train` starts from."""
    config = small_config(**{**changes, "model_params": {"dropout": 0.0} | changes.get("model_params", {})})
    _, data, model = prepare(config)
    return model, data


# ------------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize(("batch_size", "every"), [(20, 4), (32, 3), (16, 9)])
def test_accumulated_small_batches_are_the_large_batch(batch_size: int, every: int, tmp_path: Path) -> None:
    """Also where the last micro-batch is smaller (80 = 32 + 32 + 16) or more are asked for than there are."""
    common = {"epochs": 3, "optimizer_params": PLAIN_SGD}
    large = train(tmp_path, **common, batch_size=ALL)
    folder = tmp_path / "small"
    folder.mkdir()
    small = train(folder, **common, batch_size=batch_size, training_params={"gradient_accumulation_steps": every})
    assert small.state.step == large.state.step == 3
    assert_close(weights(small.model), weights(large.model), rtol=1e-5, atol=1e-6)
    assert small.seen.series["train_loss"] == pytest.approx(large.seen.series["train_loss"], rel=1e-5)
    assert small.seen.series["train_acc"] == pytest.approx(large.seen.series["train_acc"])
    before, _ = untrained()
    assert any(not torch.equal(weights(before)[name], weight) for name, weight in weights(large.model).items())


def test_the_step_is_that_of_plain_gradient_descent(tmp_path: Path) -> None:
    """With label smoothing; the loss in the history is the one before the step."""
    run = train(
        tmp_path,
        epochs=1,
        batch_size=ALL,
        optimizer_params={**PLAIN_SGD, "lr": 0.5},
        training_params={"label_smoothing": 0.3},
    )
    model, data = untrained()
    batch = Batches(data.train, ALL).take(Batches(data.train, ALL).order(0)[0])
    loss = F.cross_entropy(
        model(batch.input_ids, attention_mask=batch.attention_mask), batch.labels, label_smoothing=0.3
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    stepped = {
        name: weight - 0.5 * gradient for name, weight, gradient in zip(names, parameters, gradients, strict=True)
    }
    assert_close(weights(run.model), stepped, rtol=1e-5, atol=1e-6)
    assert run.seen.series["train_task_loss"][1] == pytest.approx(loss.item(), rel=1e-5)


def test_gradients_are_clipped_to_their_norm(tmp_path: Path) -> None:
    before, _ = untrained()

    def moved(clip: float | None) -> float:
        folder = tmp_path / str(clip)
        folder.mkdir()
        options = {**PLAIN_SGD, "lr": 1.0, "grad_clip_norm": clip}
        run = train(folder, epochs=1, batch_size=ALL, optimizer_params=options)
        changes = [weight - weights(before)[name] for name, weight in weights(run.model).items()]
        return float(torch.cat([change.flatten() for change in changes]).norm())

    free = moved(None)
    assert free > 0.02
    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)
    assert moved(10 * free) == pytest.approx(free, rel=1e-4)


@pytest.mark.parametrize("model_type", ["moe", "goe", "goe_original"])
def test_auxiliary_losses_are_reported_raw_and_weighted(model_type: str, tmp_path: Path) -> None:
    coefficients = {
        "moe": {"balance_loss": 0.25, "z_loss": 0.125},
        "goe": {"balance_loss": 0.25},
        "goe_original": {"diversity_loss": 0.25, "z_loss": 0.125, "contrastive_loss": 0.5},
    }[model_type]
    params = {f"{name}_coef": weight for name, weight in coefficients.items()}
    run = train(tmp_path, model_type=model_type, model_params=params, optimizer_params={"aux_loss_coeff": 3.0})
    series = run.seen.series
    assert set(coefficients) <= {name.removesuffix("_raw") for name in series if name.endswith("_raw")}
    for step in series["train_loss"]:
        for name, weight in coefficients.items():
            raw = series[f"{name}_raw"][step]
            assert raw != 0 and series[f"{name}_weighted"][step] == pytest.approx(3 * weight * raw, rel=1e-5)
        weighted = sum(values[step] for name, values in series.items() if name.endswith("_weighted"))
        assert series["train_loss"][step] == pytest.approx(series["train_task_loss"][step] + weighted, rel=1e-5)


def test_auxiliary_losses_reach_the_weights_with_their_coefficient(tmp_path: Path) -> None:
    moved = []
    for coefficient in (0.0, 1e9):
        folder = tmp_path / str(coefficient)
        folder.mkdir()
        options = {**PLAIN_SGD, "aux_loss_coeff": coefficient, "grad_clip_norm": 1.0}
        run = train(folder, model_type="moe", batch_size=ALL, epochs=1, optimizer_params=options)
        before, _ = untrained(model_type="moe")
        head = "head.linear.weight"  # behind the routing: no auxiliary loss depends on it
        moved.append(float((weights(run.model)[head] - weights(before)[head]).norm()))
        plain = run.seen.series["train_loss"] == pytest.approx(run.seen.series["train_task_loss"], rel=1e-6)
        assert plain is (coefficient == 0)
    # Clipping shares one norm out: an overwhelming auxiliary gradient leaves nothing for the head.
    assert moved[0] > 0.01 and moved[1] < 1e-6


def batch_of(samples: int) -> Batch:
    ids = torch.ones(samples, 3, dtype=torch.long)
    return Batch(ids, ids.bool(), torch.zeros(samples, dtype=torch.long))


def test_the_meter_gives_means_over_samples() -> None:
    meter = Meter()
    assert meter.read() == {}
    meter.add({"loss": torch.tensor(1.0)}, batch_of(10))
    meter.add({"loss": torch.tensor(4.0)}, batch_of(5))
    values = meter.read()
    assert values["loss"] == pytest.approx(2.0) and values["samples_per_second"] > 0
    meter.add({"loss": torch.tensor(7.0)}, batch_of(1))
    assert meter.read()["loss"] == 7.0


# ------------------------------------------------------------------------------------------------- epochs and runs


def test_reports_come_every_so_many_steps_and_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        epochs=2,
        batch_size=16,
        scheduler_params={"name": "cosine_warmup", "warmup_factor": 0.5, "min_lr_factor": 0.0},
        optimizer_params={"lr": 0.06},
        training_params={"log_every": 2},
    )
    assert run.seen.starts == [(0, 5, 10)]
    assert list(run.seen.series["train_loss"]) == [2, 4, 5, 6, 8, 10]
    assert list(run.seen.series["val_loss"]) == [5, 10]
    rates = run.seen.series["learning_rate"]
    assert [rates[step] for step in (2, 4)] == pytest.approx([0.03, 0.05])  # the rate of the coming step
    assert rates[10] == pytest.approx(0.0)
    assert run.evaluation.loss == run.seen.series["val_loss"][10]


def test_the_moving_average_is_what_is_scored_and_kept(tmp_path: Path) -> None:
    config = small_config(epochs=3, batch_size=ALL, model_params={"dropout": 0.0}, training_params={"ema_decay": 0.75})
    runtime, data, model = prepare(config)
    course: list[Weights] = []
    _, scored, evaluation = fit(model, data, config, runtime, tmp_path, Observed(lambda: course.append(weights(model))))
    averages = list(accumulate(course, lambda old, new: {name: 0.75 * old[name] + 0.25 * new[name] for name in new}))
    assert len(averages) == 3
    assert_close(weights(scored), averages[-1])
    assert any(not torch.equal(weights(model)[name], weight) for name, weight in averages[-1].items())
    assert evaluation.loss == evaluate(scored, Batches(data.validation, ALL), 2, runtime).loss
    kept, values = load_tensors(tmp_path / MODEL_FILE)
    assert_close(kept, averages[values["step"] - 1])


def scores(monkeypatch: pytest.MonkeyPatch, *correct: int) -> None:
    """Let the evaluations of a run find so many of 10 samples of one class correct."""
    coming = iter(correct)

    def prescribed(*arguments: Any) -> Evaluation:
        hits = next(coming)
        guesses = torch.tensor([0] * hits + [1] * (20 - hits))
        truth, losses = torch.tensor([0] * 10 + [1] * 10), torch.full((20,), 0.5)
        return Classification().evaluation(guesses, truth, losses, np.arange(20), 2)

    monkeypatch.setattr("research_eval.training.fit.evaluate", prescribed)


def test_the_best_weights_on_validation_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two equally good epochs the first."""
    scores(monkeypatch, 2, 5, 9, 9, 3)
    config = small_config(epochs=5)
    runtime, data, model = prepare(config)
    course: list[Weights] = []
    seen = Observed(lambda: course.append(weights(model)))
    state, _, evaluation = fit(model, data, config, runtime, tmp_path, seen)
    assert (state.best_score, state.best_step) == (max(seen.series["val_f1"].values()), 15)
    assert evaluation.scores["f1"] == seen.series["val_f1"][25] < max(seen.series["val_f1"].values())
    kept, values = load_tensors(tmp_path / MODEL_FILE)
    assert values == {"step": 15, "val_f1": state.best_score}
    assert_close(kept, course[2], rtol=0, atol=0)


@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (2, 5), (3, 6), (4, 6), (None, 6)])
def test_training_stops_after_so_many_epochs_without_gain(
    patience: int | None, epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As good as before is no gain."""
    scores(monkeypatch, 5, 4, 6, 6, 5, 6)
    run = train(tmp_path, epochs=6, training_params={"early_stopping_patience": patience})
    assert list(run.seen.series["val_f1"]) == [5 * epoch for epoch in range(1, epochs + 1)]
    assert run.state.step == 5 * epochs
    assert run.state.stopped_early is (patience in (1, 2, 3))


def test_checkpoints_come_when_they_are_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(**options: Any) -> list[int]:
        saved: list[int] = []
        monkeypatch.setattr(Checkpointer, "save", lambda self, state: saved.append(state.step))
        folder = tmp_path / str(options)
        folder.mkdir()
        train(folder, epochs=2, training_params=options)
        return saved

    assert steps() == [5, 10]
    assert steps(checkpoint_every=4) == [4, 8, 10]


# --------------------------------------------------------------------------------------------------------- trouble


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step 2: try a lower lr"):
        train(tmp_path, optimizer_params={**PLAIN_SGD, "lr": 1e38})
    assert not (tmp_path / CHECKPOINT_FILE).exists()


def test_the_last_step_can_diverge_too(tmp_path: Path) -> None:
    """Its own loss was still finite: the weights it leaves are not."""
    with pytest.raises(Diverged, match="the validation loss is nan at step 1"):
        train(tmp_path, epochs=1, batch_size=ALL, optimizer_params={**PLAIN_SGD, "lr": 1e38})
    assert not (tmp_path / MODEL_FILE).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_between_two_steps_with_a_checkpoint(number: int, tmp_path: Path) -> None:
    class Impatient(Observed):
        def train_values(self, step: int, values: dict[str, float]) -> None:
            super().train_values(step, values)
            if step == 4:
                os.kill(os.getpid(), number)

    config = small_config()
    runtime, data, model = prepare(config)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        fit(model, data, config, runtime, tmp_path, Impatient())
    assert (caught.value.signal, str(caught.value)) == (number, f"signal {int(number)} after step 4")
    tensors, values = load_tensors(tmp_path / CHECKPOINT_FILE)
    assert values["state"]["step"] == 4
    for name, tensor in model.state_dict().items():
        assert_close(tensors[f"model/{name}"], tensor, rtol=0, atol=0)
    assert signal.getsignal(number) is before


def test_a_second_signal_does_not_wait() -> None:
    with stop_requests() as request:
        assert request.signal is None
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


# -------------------------------------------------------------------------------------------- device and precision


@pytest.mark.parametrize("model_type", MODELS)
def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32(model_type: str, tmp_path: Path) -> None:
    ends = []
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        ends.append(train(folder, model_type=model_type, epochs=1, training_params={"precision": precision}))
    assert all(weight.dtype == torch.float32 for weight in weights(ends[1].model).values())
    assert ends[1].evaluation.loss == pytest.approx(ends[0].evaluation.loss, abs=0.05)
    assert ends[1].evaluation.loss != ends[0].evaluation.loss


def test_tf32_is_asked_of_the_device_by_this_run_alone() -> None:
    runtime = Runtime("cpu", "tf32")
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    with runtime.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    Runtime("cpu")
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        ("cuda:99", "no 'cuda:99'"),
        ("cpu:1", "no 'cpu:1'"),
        ("meta", "no 'meta'"),
        ("gpu", "unknown 'gpu'. Use auto, cpu, cuda, cuda:N or mps."),
    ],
)
def test_devices_that_are_not_there_are_named(device: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Runtime(device)
    assert complaint in str(caught.value)


def test_every_stream_of_a_seed_is_its_own() -> None:
    runtime = Runtime("cpu")
    draws = []
    for seed, name in [(0, "init"), (0, "init"), (0, "training"), (1, "init")]:
        runtime.seed(seed, name)
        draws.append(generator_draws())
    assert draws[0] == draws[1]
    for part in range(len(draws[0])):
        assert len({str(draw[part]) for draw in draws}) == 3


def test_the_peak_memory_is_that_of_a_process_with_torch() -> None:
    assert 50 < Runtime("cpu").peak_memory_mb() < 100_000


@pytest.mark.parametrize(
    ("model_type", "compiled"),
    [
        ("dense", ["Block", "Block"]),
        ("goe_original", ["Block"]),
        ("moe", ["Attention", "FeedForward"] * 2),
        ("lstm", ["LSTMClassifier"]),  # without a block of ours
    ],
)
def test_the_blocks_are_compiled_when_asked_for(
    model_type: str, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: calls.append(type(self).__name__))
    prepare(small_config(model_type=model_type))
    assert calls == []
    prepare(small_config(model_type=model_type, training_params={"compile": True}))
    assert calls == compiled


@pytest.mark.skipif("GOE_TEST_COMPILE" not in os.environ, reason="takes minutes: set GOE_TEST_COMPILE=1")
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("model_type", MODELS)
def test_a_compiled_model_trains_like_the_plain_one(model_type: str, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        folder.mkdir()
        run = train(folder, model_type=model_type, epochs=1, training_params={"compile": compiled})
        losses.append(run.evaluation.loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert all(math.isfinite(loss) for loss in losses)
