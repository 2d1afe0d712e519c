"""Seeds that are trained together: each is what it would be alone."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import history, repeatable, results, run_in, small_config
from torch import nn

from research_eval.db_utils import DB_FILE
from research_eval.experiment import Journal, Result, run_all
from research_eval.models.dense import DenseTransformerClassifier
from research_eval.registry import MODELS_MAP
from research_eval.schema import ExperimentConfig
from research_eval.training import seeds
from research_eval.training.checkpoint import load_tensors
from research_eval.training.evaluate import Evaluation, Scoring
from research_eval.training.fit import CHECKPOINT_FILE, MODEL_FILE, Step

SEEDS = [3, 0, 5]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "epochs": 4,
        "batch_size": 8,
        "model_params": {
            "dropout": 0.2,
            "bigram_buckets": 5,
            "token_dropout": 0.1,
            "positional_encoding": "rope",
            "pool": "max",
        },
        "optimizer_params": {"lr": 0.01, "grad_clip_norm": 0.1},
        "scheduler_params": {"name": "cosine_warmup"},
        "training_params": {
            "ema_decay": 0.9,
            "gradient_accumulation_steps": 3,
            "label_smoothing": 0.1,
            "checkpoint_every": 3,
            "log_every": 3,
            "test": True,
        },
    },
    "momentum": {
        "model_params": {"dropout": 0.0, "embed_dim": 12, "pool": "last"},
        "optimizer_params": {"name": "sgd", "lr": 0.1, "momentum": 0.8, "grad_clip_norm": None},
    },
    "early stopping": {
        "epochs": 9,
        "model_params": {"positional_encoding": "alibi", "pool": "first"},
        "training_params": {"early_stopping_patience": 1},
    },
}


class Together:
    """Counts what is taken by stacks."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.same: list[bool] = []
        self.evaluations = 0


@pytest.fixture(name="together")
def _together(monkeypatch: pytest.MonkeyPatch) -> Together:
    """Stacking pays whatever the clock says."""
    seen, compare, take, scored = Together(), seeds.compare, seeds.Stack.take, seeds.Stack._scored

    def compared(*arguments: Any) -> tuple[bool, float]:
        seen.same.append(compare(*arguments)[0])
        seen.sizes.clear()
        return seen.same[-1], 2.0

    def taken(self: seeds.Stack, steps: Sequence[Step]) -> None:
        seen.sizes.append(len(steps))
        take(self, steps)

    def counted(self: seeds.Stack, scorings: Sequence[Scoring]) -> list[Evaluation] | None:
        seen.evaluations += 1
        return scored(self, scorings)

    monkeypatch.setattr(seeds, "compare", compared)
    monkeypatch.setattr(seeds.Stack, "take", taken)
    monkeypatch.setattr(seeds.Stack, "_scored", counted)
    return seen


def configs_of(**changes: Any) -> list[ExperimentConfig]:
    return [small_config(seed=seed, **changes) for seed in SEEDS]


def run_together(folder: Path, configs: Sequence[ExperimentConfig]) -> list[Result]:
    with contextlib.chdir(folder):
        return list(run_all(configs, db=DB_FILE, quiet=True))


def stop_once(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a SIGTERM when the first of its runs reports the step."""
    report, sent = Journal.train_values, []

    def reporting(self: Journal, at: int, values: dict[str, float]) -> None:
        report(self, at, values)
        if at == step and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(Journal, "train_values", reporting)


def check_equal(one: Result, other: Result, folder: Path) -> None:
    """Metrics, time series, weights, moments and the states of generators, to the bit."""
    assert one.status == other.status
    assert repeatable(one.metrics) == repeatable(other.metrics)
    assert history(folder / "alone", one.experiment_id) == history(folder / "together", other.experiment_id)
    for name in (MODEL_FILE, CHECKPOINT_FILE):
        tensors, values = load_tensors(folder / "alone" / one.folder / name)
        others, other_values = load_tensors(folder / "together" / other.folder / name)
        assert tensors.keys() == others.keys()
        assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []
        assert values.get("generators") == other_values.get("generators")


@pytest.mark.parametrize("name", CONFIGS)
def test_each_seed_is_what_it_is_alone(name: str, together: Together, tmp_path: Path) -> None:
    for folder in ("alone", "together"):
        (tmp_path / folder).mkdir()
    configs = configs_of(**CONFIGS[name])
    alone = [run_in(tmp_path / "alone", config) for config in configs]
    for one, other in zip(alone, run_together(tmp_path / "together", configs), strict=True):
        check_equal(one, other, tmp_path)
    if all(together.same):
        assert together.sizes[0] == 3
        lengths = {one.metrics["epochs_completed"] for one in alone}
        assert together.sizes[-1] == 3 or len(lengths) > 1
        averaged = bool(configs[0].training_params.ema_decay)
        assert (together.evaluations == 0) == averaged
    assert (name == "early stopping") == (len({one.metrics["epochs_completed"] for one in alone}) > 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_stack_computes_the_same_whatever_the_rounding(
    name: str, together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a machine rounds differently, and would train one after the other."""
    monkeypatch.setattr(seeds, "compare", lambda *_: (True, 2.0))
    changes = {**CONFIGS[name], "epochs": 2}
    configs = configs_of(**changes)
    for config, result in zip(configs, run_together(tmp_path, configs), strict=True):
        alone = run_in(tmp_path, config)
        assert result.metrics["final_val_loss"] == pytest.approx(alone.metrics["final_val_loss"], rel=1e-4)
    assert together.sizes


def test_what_rounds_otherwise_is_trained_one_by_one(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeds, "compare", lambda *_: (False, 2.0))
    assert [result.status for result in run_together(tmp_path, configs_of())] == ["finished"] * 3
    assert not together.sizes


@pytest.mark.parametrize("wrong", ["weights", "dropout", "clip"])
def test_a_stack_that_computes_something_else_is_found_out(
    wrong: str, together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = seeds._Linear.forward
    if wrong == "weights":
        monkeypatch.setattr(seeds._Linear, "forward", lambda self, x, *_: 1.001 * product(self, x))
    elif wrong == "dropout":
        monkeypatch.setattr(seeds._Dropout, "forward", lambda self, x: x)
    else:
        monkeypatch.setattr(seeds.Stack, "_clip", lambda self, limit: None)
    configs = configs_of(optimizer_params={"grad_clip_norm": 0.01})
    run_together(tmp_path, configs)
    assert together.same == [False]
    assert not together.sizes


def test_a_stack_that_scores_otherwise_is_found_out(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = seeds.Stack._scored

    def wrong(self: seeds.Stack, scorings: Sequence[Scoring]) -> list[Evaluation]:
        return [replace(one, losses_N=one.losses_N + 1) for one in scored(self, scorings) or []]

    monkeypatch.setattr(seeds.Stack, "_scored", wrong)
    configs = configs_of(epochs=3)
    for config, result in zip(configs, run_together(tmp_path, configs), strict=True):
        assert result.metrics["final_val_loss"] == run_in(tmp_path, config).metrics["final_val_loss"]
    assert not all(together.same) or together.evaluations == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "moe"},
        {"model_type": "goe_original"},
        {"dataset_name": "addition", "dataset_params": {"num_samples": 60, "seq_len": 8}},  # of different lengths
        {"model_params": {"positional_encoding": "random"}},
        {"training_params": {"precision": "bf16"}},
    ],
    ids=["moe", "goe_original", "padding", "random positions", "bf16"],
)
def test_what_does_not_fit_into_a_stack_is_trained_one_by_one(
    changes: dict[str, Any], together: Together, tmp_path: Path
) -> None:
    for folder in ("alone", "together"):
        (tmp_path / folder).mkdir()
    configs = configs_of(epochs=1, **changes)
    alone = [run_in(tmp_path / "alone", config) for config in configs]
    for one, other in zip(alone, run_together(tmp_path / "together", configs), strict=True):
        check_equal(one, other, tmp_path)
    assert not together.sizes


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(8, 8, bias=False),
        lambda: nn.LayerNorm(8, eps=1e-3),
        lambda: nn.LayerNorm(8, bias=False),
        lambda: nn.Dropout(0.5),
        lambda: nn.BatchNorm1d(8),
        lambda: nn.GRU(8, 8),
    ],
    ids=["no bias", "another epsilon", "no shift", "torch's dropout", "buffers", "a layer of another kind"],
)
def test_a_model_with_other_layers_is_trained_one_by_one(
    layer: Callable[[], nn.Module], together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Foreign(DenseTransformerClassifier):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.further = layer()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(input_ids, attention_mask) + sum(p.sum() for p in self.further.parameters())

    monkeypatch.setitem(MODELS_MAP, "foreign", Foreign)
    model_params = {"embed_dim": 8, "num_heads": 2}
    results = run_together(tmp_path, configs_of(model_type="foreign", epochs=1, model_params=model_params))
    assert [result.status for result in results] == ["finished"] * 3
    assert not together.sizes


def test_seeds_that_are_stopped_together_go_on_exactly(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("alone", "together"):
        (tmp_path / folder).mkdir()
    configs = configs_of(epochs=3, training_params={"log_every": 1})
    with monkeypatch.context() as patch:
        stop_once(patch, 8)
        stopped = run_together(tmp_path / "together", configs)
    assert [(result.status, result.exit_code) for result in stopped] == [("interrupted", 143)] * 3
    for config in configs:
        check_equal(run_in(tmp_path / "alone", config), run_in(tmp_path / "together", config, resume=True), tmp_path)


def test_an_error_of_one_seed_leaves_the_others_alone(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step = DenseTransformerClassifier.after_step
    broken: list[DenseTransformerClassifier] = []

    def breaks(self: DenseTransformerClassifier, progress: float) -> None:
        after_step(self, progress)
        if not broken:
            broken.append(self)
        if self is broken[0] and progress > 0.5:
            raise RuntimeError("the first one is broken")

    monkeypatch.setattr(DenseTransformerClassifier, "after_step", breaks)
    with pytest.raises(RuntimeError, match="the first one is broken"):
        run_together(tmp_path, configs_of())
    with results(tmp_path) as store:
        statuses = {row["seed"]: row["status"] for row in store.experiments()}
    assert statuses == {3: "failed", 0: "finished", 5: "finished"}


def test_an_error_in_the_stack_is_that_of_every_seed(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = seeds.Stack.take

    def fails(self: seeds.Stack, steps: Sequence[Step]) -> None:
        if len(together.sizes) == 3:
            raise MemoryError
        take(self, steps)

    monkeypatch.setattr(seeds, "compare", lambda *_: (True, 2.0))
    monkeypatch.setattr(seeds.Stack, "take", fails)
    with pytest.raises(MemoryError):
        run_together(tmp_path, configs_of())
    with results(tmp_path) as store:
        assert [row["status"] for row in store.experiments()] == ["failed"] * 3
