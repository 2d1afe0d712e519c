"""Scores against scikit-learn, FLOPs against a count by hand, and measurements that leave no trace.

N samples  C classes  B batch  H heads  L length  E width of a head
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as sklearn_metrics
from support import MODELS, generator_draws, small_config
from torch.nn import functional as F

from research_eval.datasets.token_data import Batches, TokenData
from research_eval.experiment import prepare
from research_eval.models.base_model import EvaluableModel
from research_eval.system import load
from research_eval.training.evaluate import Evaluation, evaluate, measure_flops, measure_forward_flops
from research_eval.training.flops import FlopCounter
from research_eval.training.latency import FEWEST, measure_latency
from research_eval.training.runtime import Runtime

CPU = Runtime("cpu")


class Oracle(EvaluableModel):
    """Sample i is the one token i + 1; its logits are row i of a table."""

    def __init__(self, logits_NC: NDArray[np.float32]) -> None:
        super().__init__()
        self.register_buffer("logits_NC", torch.from_numpy(logits_NC))
        self.calls: list[str] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        self.calls.append("train" if self.training else "eval")
        return self.logits_NC[input_ids[:, 0] - 1]

    def start_recording(self) -> None:
        self.calls.append("start_recording")


def scored(logits_NC: NDArray[np.float32], labels: NDArray[np.int64], batch_size: int) -> Evaluation:
    ids_N1 = np.arange(1, len(labels) + 1)[:, None]
    batches = Batches(TokenData.from_padded(ids_N1, labels), batch_size)
    return evaluate(Oracle(logits_NC), batches, logits_NC.shape[1], CPU)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_scores_are_those_of_scikit_learn(data: st.DataObject) -> None:
    num_samples, num_classes = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 6))
    present = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=1, unique=True))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    labels = rng.choice(present, num_samples)
    logits_NC = rng.normal(size=(num_samples, num_classes)).astype(np.float32)
    logits_NC[:, rng.integers(num_classes)] -= 100  # one class is never predicted
    evaluation = scored(logits_NC, labels, batch_size=data.draw(st.integers(1, 12)))
    guesses, every = logits_NC.argmax(1), list(range(num_classes))

    assert evaluation.rows_N.tolist() == list(range(num_samples))
    assert evaluation.correct_N is not None
    np.testing.assert_array_equal(evaluation.correct_N, guesses == labels)
    expected_accuracy = pytest.approx(sklearn_metrics.accuracy_score(labels, guesses))
    assert evaluation.accuracy == expected_accuracy
    expected_f1 = pytest.approx(sklearn_metrics.f1_score(labels, guesses, average="macro", zero_division=0))
    assert evaluation.scores == {"acc": expected_accuracy, "f1": expected_f1}
    table = sklearn_metrics.precision_recall_fscore_support(labels, guesses, labels=every, zero_division=0)
    for name, column in zip(("precision", "recall", "f1", "support"), table, strict=True):
        assert evaluation.details[f"{name}_per_class"] == pytest.approx(column)
    shares_NC = torch.from_numpy(logits_NC).double().softmax(-1).numpy()
    expected_loss = -np.log(shares_NC[np.arange(num_samples), labels]).mean()
    assert evaluation.loss == pytest.approx(expected_loss, rel=1e-5)


def test_labels_that_never_occur_do_not_count_in_macro_f1() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    evaluation = scored(np.eye(3, dtype=np.float32)[labels], labels, batch_size=2)
    assert evaluation.scores["f1"] == evaluation.accuracy == 1.0
    assert evaluation.details["support_per_class"] == [3, 2, 0]


def test_an_evaluation_runs_in_evaluation_mode_and_records_itself_alone() -> None:
    model = Oracle(np.eye(5, dtype=np.float32)).train()
    evaluate(model, Batches(TokenData.from_padded(np.arange(1, 6)[:, None], np.arange(5)), 2), 5, CPU)
    assert model.calls == ["start_recording", "eval", "eval", "eval"]


def test_a_loss_that_is_no_number_is_not_hidden() -> None:
    logits_NC = np.array([[1, 0], [np.nan, 0]], np.float32)
    assert math.isnan(scored(logits_NC, np.array([0, 1]), 1).loss)


# ------------------------------------------------------------------------------------------- latency and FLOPs


def prepared(model_type: str, **params: Any) -> tuple[EvaluableModel, Batches]:
    config = small_config(model_type=model_type, model_params=params)
    _, data, model = prepare(config)
    return model, Batches(data.validation, 8)


def state(model: EvaluableModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers, also those that checkpoints leave out."""
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("measure", [measure_flops, measure_forward_flops, measure_latency])
@pytest.mark.parametrize("model_type", MODELS)
def test_measurements_leave_no_trace(model_type: str, measure: Callable[..., Any]) -> None:
    model, batches = prepared(model_type, dropout=0.5)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(0.25)
    before = state(model)
    CPU.seed(4, "test")
    expected_draws = generator_draws()
    CPU.seed(4, "test")
    measure(model, batches, CPU, repeats=2)
    assert generator_draws() == expected_draws
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert model.get_model_specific_metrics() == {}  # what it recorded is forgotten


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_the_cpu_is_counted(masked: bool) -> None:
    query, key, value = (torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3))  # B H L E
    mask_B11L = torch.ones(2, 1, 1, 7, dtype=torch.bool) if masked else None
    product = 2 * 2 * 3 * 7 * 7 * 4  # two per multiply-add, of one product of matrices
    with FlopCounter() as counter:
        attended = F.scaled_dot_product_attention(query, key, value, mask_B11L)
    assert counter.total == 2 * product
    with FlopCounter() as counter:
        attended.sum().backward()
    assert counter.total == 5 * product  # the scores once more, then two products for each of the two


def test_flops_of_a_dense_model_are_those_counted_by_hand() -> None:
    """Training: each linear map once forward and twice backward, attention as above."""
    model, batches = prepared("dense", num_layers=1, dim_feedforward=12)
    length, width = 6, 8
    linear = 2 * length * (4 * width * width + 2 * width * 12) + 2 * width * 2
    attention = 2 * (2 * length * length * width)
    assert measure_flops(model, batches, CPU) == (linear + attention, 3 * linear + 3.5 * attention)
    assert measure_forward_flops(model, batches, CPU) == linear + attention


def test_flops_are_a_mean_over_short_and_long_batches() -> None:
    model, _ = prepared("dense", num_layers=1)
    rows = [[1] * length for length in (1, 1, 3, 3, 9, 9)]
    ids_NL = np.array([row + [0] * (9 - len(row)) for row in rows])
    flops = [
        measure_flops(model, Batches(TokenData.from_padded(part, np.zeros(len(part), np.int64)), 2), CPU)[0]
        for part in (ids_NL, ids_NL[:2], ids_NL[2:4], ids_NL[4:])
    ]
    assert flops[1] < flops[2] < flops[3]
    assert flops[0] == pytest.approx(np.mean(flops[1:]))


def test_a_batch_that_stands_for_several_is_counted_once() -> None:
    """Of two batches, three of the measurement are the first one twice and the second one."""
    model, _ = prepared("dense", num_layers=1)
    ids_NL = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]])
    parts = [Batches(TokenData.from_padded(part, np.zeros(len(part), np.int64)), 2) for part in np.split(ids_NL, 2)]
    short, long = (np.array(measure_flops(model, part, CPU)) for part in parts)
    passes: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    both = measure_flops(model, Batches(TokenData.from_padded(ids_NL, np.zeros(4, np.int64)), 2), CPU)
    hook.remove()
    assert both == pytest.approx((2 * short + long) / 3)
    assert len(passes) == 2 * 2, "each batch in evaluation and in training mode"


def test_latency_is_measured_on_whole_batches_of_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only models move: one second per token of the batch's length."""
    monkeypatch.setattr("research_eval.training.latency.FEWEST", FEWEST)  # other tests have fewer
    clock = [0.0]
    monkeypatch.setattr("research_eval.training.latency.time.perf_counter", lambda: clock[0])
    seen = []

    class Slow(Oracle):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            assert not torch.is_grad_enabled() and not self.training
            clock[0] += input_ids.shape[1]
            seen.append(len(input_ids))
            return super().forward(input_ids)

    lengths = [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [9]  # the last batch is not full
    ids_NL = np.array([[1] * length + [0] * (9 - length) for length in lengths])
    batches = Batches(TokenData.from_padded(ids_NL, np.zeros(len(lengths), np.int64)), 4)
    latency = measure_latency(Slow(np.eye(2, dtype=np.float32)), batches, CPU, repeats=4)
    assert set(seen) == {4}
    assert len(seen) == 4 + 4 * 4, "a repetition to warm up, and four that count"
    del latency["inference_latency_load"]
    assert latency == {
        "inference_latency_ms_batch": 2500.0,
        "inference_latency_ms_batch_p95": 4000.0,
        "inference_latency_spread": 0.0,
        "inference_latency_repetitions": 4.0,
        "inference_samples_per_second": pytest.approx(16 / 10),
    }


def test_a_slow_model_is_measured_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes as many seconds as there were passes before it: 0 and 1 to warm up, then 2 and 3, 4 and 5, ..."""
    clock, passes = [0.0], []
    monkeypatch.setattr("research_eval.training.latency.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("research_eval.training.latency.FEWEST", FEWEST)  # other tests have fewer

    class Slower(Oracle):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            clock[0] += len(passes)
            passes.append(1)
            return super().forward(input_ids)

    batches = Batches(TokenData.from_padded(np.ones((8, 3), np.int64), np.zeros(8, np.int64)), 4)
    latency = measure_latency(Slower(np.eye(2, dtype=np.float32)), batches, CPU)
    assert len(passes) == 2 + 2 * FEWEST
    assert latency["inference_latency_repetitions"] == FEWEST == 5
    assert latency["inference_latency_ms_batch"] == 1000 * np.median([2.5, 4.5, 6.5, 8.5, 10.5])
    assert latency["inference_latency_spread"] == pytest.approx((8.5 - 4.5) / 6.5)


@pytest.mark.parametrize(("others", "waited", "expected"), [(0, 0, 0), (3, 0, 0.375), (0, 2, 0.5), (3, 2, 0.5)])
def test_the_load_is_the_work_of_others_and_the_time_without_a_core(
    others: float, waited: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four seconds on two cores: this process works with two threads, of which the first is the one that measures."""
    clock = {"perf_counter": 10.0, "process_time": 5.0, "thread_time": 4.0}
    busy = [100.0]
    for name in clock:
        monkeypatch.setattr(load.time, name, lambda name=name: clock[name])
    monkeypatch.setattr(load, "_busy_seconds", lambda: busy[0])
    monkeypatch.setattr(load.os, "cpu_count", lambda: 2)
    meter = load.LoadMeter()
    clock |= {"perf_counter": 14.0, "process_time": 5.0 + 8 - waited, "thread_time": 4.0 + 4 - waited}
    busy[0] += 8 - waited + others
    assert meter.share() == pytest.approx(expected)
    assert meter.share(computes=False) == pytest.approx(others / 8)
    monkeypatch.setattr(load, "_busy_seconds", lambda: None)
    assert meter.share() == pytest.approx(waited / 4)
    assert math.isnan(meter.share(computes=False)), "nothing is known"


def test_a_process_that_shares_its_core_notices_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_busy_seconds", lambda: None)
    meter, end = load.LoadMeter(), time.thread_time() + 0.02
    while time.thread_time() < end:
        pass
    time.sleep(0.06)  # as if another program had the core
    assert meter.share() > 0.5


def test_latency_of_a_split_smaller_than_a_batch() -> None:
    model, batches = prepared("dense")
    small = Batches(batches.data, 500)
    latency = measure_latency(model, small, CPU, repeats=2)
    assert latency["inference_latency_ms_batch"] > 0 and latency["inference_samples_per_second"] > 0
