"""Weights of the classes in the training loss: closed forms, torch's own weights, and what they leave alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from research_eval.datasets.token_data import DataSplits, TokenData
from research_eval.errors import ConfigError
from research_eval.models.base_model import EvaluableModel
from research_eval.registry import MODELS_MAP
from research_eval.runs.prepare import prepare
from research_eval.tasks.class_weights import class_weights, weighted
from research_eval.tasks.classification import Classification
from research_eval.training.fit import fit
from tests.support import MODELS, small_config

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0], [-1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
LABELS = [0, 0, 1, 0]


def splits(labels: list[int], num_classes: int) -> DataSplits:
    """Samples of one token with these labels, in training and validation."""
    data = TokenData.from_padded(np.ones((len(labels), 1), int), np.array(labels))
    return DataSplits(data, data, None, 2, num_classes, [f"c{number}" for number in range(num_classes)], 1)


def loss(given: Any, labels: list[int], num_classes: int = 3, **options: Any) -> torch.Tensor:
    """The training loss of LOGITS with these labels, if they are the whole training split."""
    task = weighted(Classification(), given, splits(labels, num_classes), torch.device("cpu"))
    return task.loss(LOGITS[:, :num_classes], torch.tensor(labels), **options)


@settings(max_examples=40)
@given(labels=st.lists(st.integers(0, 4), min_size=2).filter(lambda labels: len(set(labels)) > 1))
def test_balanced_weights_are_those_of_scikit_learn(labels: list[int]) -> None:
    found, classes = class_weights("balanced", splits(labels, 6)), sorted(set(labels))
    expected = compute_class_weight("balanced", classes=np.array(classes), y=labels)
    if found is None:  # all alike: the loss stays the same to the last digit
        assert expected == pytest.approx(1)
    else:
        assert found[classes] == pytest.approx(expected) and np.isfinite(found).all()
        assert found[labels].mean() == pytest.approx(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("given", ["balanced", [1.0, 5.0, 7.0]])
def test_the_loss_of_the_whole_split_is_that_of_torch(given: Any, smoothing: float) -> None:
    """torch divides by the weights of the samples, whose sum is here their number. Class 2 has no sample."""
    torch_weights = torch.tensor([4 / 6, 4 / 2, 1.0] if given == "balanced" else given)
    found = loss(given, LABELS, label_smoothing=smoothing)
    if smoothing:  # torch also weighs the classes that smoothing adds; here a sample has one weight
        per_sample = F.cross_entropy(LOGITS, torch.tensor(LABELS), label_smoothing=smoothing, reduction="none")
        weights = torch_weights[LABELS]
        assert_close(found, (per_sample * weights).sum() / weights.sum())
    else:
        assert_close(found, F.cross_entropy(LOGITS, torch.tensor(LABELS), weight=torch_weights))


def test_equal_weights_are_no_weights() -> None:
    """To the last digit, also if a class without samples would weigh something else."""
    for weights, labels in (("balanced", [0, 1, 1, 0]), ([0.7, 0.7, 0.7], LABELS), ([0.3, 0.3, 9.0], LABELS)):
        assert class_weights(weights, splits(labels, 3)) is None
    plain = F.cross_entropy(LOGITS, torch.tensor(LABELS))
    assert torch.equal(loss([0.7, 0.7, 0.7], LABELS), plain) and torch.equal(loss(None, LABELS), plain)


def test_a_list_is_relative() -> None:
    assert_close(loss([1.0, 3.0, 2.0], LABELS), loss([10.0, 30.0, 20.0], LABELS))
    assert not torch.equal(loss([1.0, 3.0, 2.0], LABELS), loss(None, LABELS))


def losses_of_training(folder: Path, **changes: Any) -> list[float]:
    """`train_loss` at every step of a training without dropout."""
    config = small_config(**{**changes, "model_params": {"dropout": 0.0, **changes.get("model_params", {})}})
    runtime, data, model = prepare(config)
    seen: list[float] = []
    observer = SimpleNamespace(
        start=lambda *_: None,
        train_values=lambda step, values: seen.append(values["train_loss"]),
        epoch_end=lambda *_: None,
    )
    folder.mkdir(exist_ok=True)
    fit(model, data, config, runtime, folder, observer)
    return seen


WEIGHTS = {"class_weights": [1.0, 4.0]}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "grad_clip_norm": None}


def test_accumulated_small_batches_are_the_large_batch(tmp_path: Path) -> None:
    """The batches have different shares of the classes, so dividing by the weights of each would not add up."""
    common: dict[str, Any] = {"epochs": 2, "optimizer_params": SGD}
    large = losses_of_training(tmp_path / "large", **common, batch_size=80, training_params=WEIGHTS)
    accumulated = {**WEIGHTS, "gradient_accumulation_steps": 7}
    small = losses_of_training(tmp_path / "small", **common, batch_size=13, training_params=accumulated)
    assert small == pytest.approx(large, rel=1e-4)
    plain = losses_of_training(tmp_path / "plain", **common, batch_size=80)
    assert large != pytest.approx(plain, rel=1e-3)


HALTS = [{"halt": "confidence"}, {"halt": "ponder", "halt_warmup": 0.0}, {"router_mode": "reinforce"}]


@pytest.mark.parametrize(
    ("model_type", "params", "precision"),
    [
        *((name, {}, "fp32") for name in [*MODELS, "looped", "lstm"]),
        *(("goe_original", one, "fp32") for one in HALTS),
        *((name, {}, "bf16") for name in ("dense", "moe")),
    ],
)
def test_every_model_type_learns_with_weights(
    model_type: str, params: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    """A class that weighs a thousand times as much as the other is what the model answers."""
    config = small_config(
        model_type=model_type,
        epochs=4,
        model_params=params,
        optimizer_params={"lr": 0.01},
        training_params={"class_weights": [0.001, 1.0], "precision": precision, "label_smoothing": 0.1},
    )
    runtime, data, model = prepare(config)
    observer = SimpleNamespace(start=lambda *_: None, train_values=lambda *_: None, epoch_end=lambda *_: None)
    _, _, evaluation = fit(model, data, config, runtime, tmp_path, observer)
    recall = evaluation.details["recall_per_class"]
    assert recall == [0.0, 1.0]
    truth = data.validation.labels
    assert evaluation.scores["acc"] == pytest.approx((truth == 1).mean())  # the scores have no weights


def test_a_list_has_a_number_for_each_class() -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(small_config(training_params={"class_weights": [1, 2, 3]}))
    assert str(caught.value) == "training_params.class_weights: expected 2 numbers, one per class (0, 1), got 3"


@pytest.mark.parametrize("given", ["balance", [1, 0], [1, -1], [1, "2"], 2, []])
def test_other_values_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"training_params\.class_weights"):
        prepare(small_config(training_params={"class_weights": given}))


class OwnLoss(EvaluableModel):
    """A user's model that computes its task loss itself."""

    def __init__(self, *, vocab_size: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, num_classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.embedding(input_ids).mean(1)

    def task_loss(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return logits.sum() * 0


def test_a_model_with_a_loss_of_its_own_is_not_trained_without_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS_MAP, "own_loss", OwnLoss)
    config = small_config(model_type="own_loss")
    prepare(config)
    with pytest.raises(ConfigError, match="class_weights: own_loss has a task loss of its own"):
        prepare(small_config(model_type="own_loss", training_params=WEIGHTS))
