"""The metric that selects the weights and the one that stops the training, by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from research_eval.cli.tune import study_options
from research_eval.db_utils import DB_FILE, Store
from research_eval.errors import ConfigError
from research_eval.runs.prepare import prepare
from research_eval.schema import config_from_dict
from research_eval.tasks.base import Evaluation, is_better
from research_eval.tasks.classification import Classification
from research_eval.training.checkpoint import load_tensors
from research_eval.training.checkpointer import MODEL_FILE
from research_eval.training.fit import fit
from research_eval.training.state import TrainingState, state_from
from tests.support import results, run_in, small_config, small_settings, stop_at

STEPS = 5  # per epoch of the small config


@pytest.fixture(name="epochs")
def _epochs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, float]]:
    """What the evaluations find from now on: loss, accuracy and F1 of each epoch."""
    coming: list[tuple[float, float, float]] = []

    def prescribed(*arguments: Any) -> Evaluation:
        loss, accuracy, f1 = coming.pop(0)
        return Evaluation(loss, {"acc": accuracy, "f1": f1})

    monkeypatch.setattr("research_eval.training.fit.evaluate", prescribed)
    return coming


DISAGREEING = [(0.9, 0.2, 0.3), (0.5, 0.4, 0.2), (0.7, 0.9, 0.4), (0.8, 0.3, 0.8), (0.6, 0.5, 0.6)]
# The best loss is that of epoch 2, the best accuracy that of epoch 3, the best F1 that of epoch 4.


def trained(folder: Path, **options: Any) -> TrainingState:
    config = small_config(epochs=len(DISAGREEING), training_params=options)
    runtime, data, model = prepare(config)
    observer = SimpleNamespace(start=lambda *_: None, train_values=lambda *_: None, epoch_end=lambda *_: None)
    return fit(model, data, config, runtime, folder, observer)[0]


@pytest.mark.parametrize(
    ("select_by", "epoch", "score", "name"),
    [(None, 4, 0.8, "val_f1"), ("f1", 4, 0.8, "val_f1"), ("loss", 2, 0.5, "val_loss"), ("val_acc", 3, 0.9, "val_acc")],
)
def test_the_metric_chooses_the_epoch(
    select_by: str | None, epoch: int, score: float, name: str, tmp_path: Path, epochs: list[Any]
) -> None:
    epochs += DISAGREEING
    state = trained(tmp_path, select_by=select_by)
    assert (state.best_score, state.best_step) == (score, epoch * STEPS)
    assert load_tensors(tmp_path / MODEL_FILE)[1] == {"step": epoch * STEPS, name: score}


@pytest.mark.parametrize(
    ("select_by", "stopping", "last"),
    [(None, None, 5), ("loss", None, 4), ("loss", "acc", 5), (None, "loss", 4), ("acc", "loss", 4), ("acc", None, 5)],
)
def test_early_stopping_watches_its_own_metric(
    select_by: str | None, stopping: str | None, last: int, tmp_path: Path, epochs: list[Any]
) -> None:
    """With a patience of 2: the loss is best in epoch 2 and then stops in epoch 4."""
    epochs += DISAGREEING
    options = {"select_by": select_by, "early_stopping_metric": stopping, "early_stopping_patience": 2}
    state = trained(tmp_path, **options)
    assert state.step == last * STEPS
    assert state.stopped_early == (last < 5 or state.epochs_without_gain >= 2)
    best = {"loss": 2, "acc": 3, "f1": 4}[select_by or "f1"]
    assert state.best_step == min(best, last) * STEPS


def test_less_of_a_loss_is_better() -> None:
    assert is_better("loss", 0.1, 0.2) and not is_better("loss", 0.2, 0.1) and not is_better("loss", 0.1, 0.1)
    assert is_better("f1", 0.2, 0.1) and not is_better("f1", 0.1, 0.1) and is_better("rmse", 1.0, None)


def test_the_stored_metrics_name_what_selected(tmp_path: Path) -> None:
    """`best_val_f1_across_epochs` stays the highest F1, whatever selected the weights."""
    common: dict[str, Any] = {"epochs": 3, "optimizer_params": {"lr": 0.02}}
    plain = run_in(tmp_path, small_config(**common)).metrics
    chosen = run_in(tmp_path, small_config(**common, training_params={"select_by": "loss"}))
    with results(tmp_path) as store:
        losses = [row.value for row in store.history(chosen.experiment_id) if row.name == "val_loss"]
    assert chosen.metrics["best_val_loss_across_epochs"] == min(losses)
    assert chosen.metrics["best_val_f1_across_epochs"] == plain["best_val_f1_across_epochs"]
    assert "best_val_loss_across_epochs" not in plain


def test_a_resumed_training_remembers_all_of_its_best_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"select_by": "loss", "early_stopping_metric": "acc", "early_stopping_patience": 3}
    config = small_config(epochs=4, training_params=options)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = run_in(whole, config).metrics
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert run_in(parts, config).status == "interrupted"
    found = run_in(parts, config, resume=True).metrics
    for name in ("best_val_loss_across_epochs", "best_val_f1_across_epochs", "final_val_loss", "epochs_completed"):
        assert found[name] == expected[name], name


def test_a_checkpoint_of_an_earlier_version_has_no_other_best_values() -> None:
    state = state_from({"step": 3, "best_score": 0.5})
    assert (state.best_score, state.best_others) == (0.5, {})


@pytest.mark.parametrize("key", ["select_by", "early_stopping_metric"])
def test_an_unknown_metric_is_an_error_with_the_list(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(small_config(training_params={key: "los"}))
    assert str(caught.value) == (
        f"training_params.{key}: unknown metric 'los'. Did you mean 'loss'? Known: loss, acc, f1."
    )
    with pytest.raises(ConfigError, match=f"training_params.{key}: expected a metric of the validation split"):
        small_config(training_params={key: "test_f1"})


def test_the_names_are_those_of_the_tasks_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of a user need not list them."""

    def with_another(self: Classification, *arguments: Any) -> Evaluation:
        return Evaluation(1.0, {"recall_at_5": 0.5})

    monkeypatch.setattr(Classification, "evaluation", with_another)
    prepare(small_config(training_params={"select_by": "recall_at_5"}))
    with pytest.raises(ConfigError, match="Known: loss, recall_at_5"):
        prepare(small_config(training_params={"select_by": "f1"}))


def test_a_study_optimises_what_selects_its_weights(tmp_path: Path) -> None:
    """If the search space fixes it, and the user names no objective."""
    space = tmp_path / "space.json"
    flags = {"dataset_name": "parity", "search_space": str(space)}
    for fixed, objective in (({}, "final_val_f1"), ({"select_by": "val_loss"}, "final_val_loss")):
        space.write_text(json.dumps({"training_params": fixed}))
        assert study_options(argparse.Namespace(**flags)).objectives == (objective,)
    assert study_options(argparse.Namespace(**flags, objectives="final_val_acc")).objectives == ("final_val_acc",)


# ------------------------------------------------------------------------------------------------------- identity

KEYS_BEFORE = {  # of `training_params` in every stored config, since version 0.1
    *("checkpoint_every", "compile", "curriculum", "device", "early_stopping_patience", "ema_decay", "precision"),
    *("eval_batch_size", "gradient_accumulation_steps", "keep_memory", "kernels", "label_smoothing", "log_every"),
    *("num_threads", "test", "trace_routing"),
}
TEXT_KEYS_BEFORE = {
    *("cache_dir", "data_dir", "label_field", "lowercase", "max_length", "min_frequency", "path_length", "sources"),
    *("text_field", "tokenizer", "tokenizer_vocab_size", "train_samples", "truncation", "val_samples"),
}


def test_configs_that_do_not_use_the_new_keys_are_those_of_before() -> None:
    """Also if a config spells out their defaults: they are the same experiment."""
    text = {"dataset_type": "real_world", "dataset_name": "mine", "dataset_params": {"data_dir": "data"}}
    spelled = {"class_weights": None, "select_by": None, "early_stopping_metric": None}
    config = small_config(**text, training_params=spelled)
    stored = config.to_dict()
    assert set(stored["training_params"]) == KEYS_BEFORE
    assert set(stored["dataset_params"]) == TEXT_KEYS_BEFORE
    with_default = {**text, "dataset_params": {"data_dir": "data", "stratify": False}}
    assert small_config(**with_default).to_dict() == small_config(**text).to_dict()
    used = {**text, "dataset_params": {"data_dir": "data", "stratify": True}}
    changed = small_config(**used, training_params={"select_by": "val_loss", "class_weights": "balanced"}).to_dict()
    assert changed["dataset_params"]["stratify"] is True
    assert (changed["training_params"]["select_by"], changed["training_params"]["class_weights"]) == (
        "loss",
        "balanced",
    )
    assert config_from_dict(json.loads(json.dumps(changed))).to_dict() == changed


def test_a_row_that_was_stored_before_is_found(tmp_path: Path) -> None:
    """The run of an earlier version, whose text lacks the new keys, is resumed; one that uses them is another run."""
    first = run_in(tmp_path, small_config(epochs=1))
    with Store(str(tmp_path / DB_FILE)) as store:
        text = store.experiment(first.experiment_id)["full_config_json"]
    assert not any(key in text for key in ("class_weights", "select_by", "early_stopping_metric"))
    spelled = small_settings(epochs=1, training_params={"select_by": None})
    assert run_in(tmp_path, config_from_dict(spelled), resume=True).experiment_id == first.experiment_id
    other = run_in(tmp_path, small_config(epochs=1, training_params={"select_by": "loss"}), resume=True)
    assert other.experiment_id != first.experiment_id
