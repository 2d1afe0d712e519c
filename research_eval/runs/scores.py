"""All metrics of a finished training: validation, test, costs, routing and the automaton."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.kinds import dataset_kind
from research_eval.datasets.language.stream import StreamBatches
from research_eval.datasets.token_data import Batches, DataSplits, TokenData
from research_eval.files import file_stem
from research_eval.models.base_model import EvaluableModel, formula_of
from research_eval.models.language.base import LanguageModel
from research_eval.routing.alarms import SCORE
from research_eval.routing.automaton import certification_metrics
from research_eval.runs.token_report import token_report
from research_eval.store.predictions import Predictions, one_per_sample, write_predictions
from research_eval.system.best_effort import attempted
from research_eval.system.load import LoadMeter
from research_eval.system.untrusted import in_folder
from research_eval.tasks.base import Evaluation, Task, task_of
from research_eval.training.checkpoint import load_tensors, load_weights
from research_eval.training.checkpointer import MODEL_FILE
from research_eval.training.evaluate import evaluate, measure_flops
from research_eval.training.latency import measure_latency
from research_eval.training.length import Length
from research_eval.training.optimizers import steps_per_epoch
from research_eval.training.routing_watch import alarm_metrics, regret_metrics, role_metrics, routing_metrics
from research_eval.training.runtime import Runtime
from research_eval.training.state import TrainingState

log = logging.getLogger(__name__)

AUTOMATON_FILE = "automaton.png"


def score(
    state: TrainingState,
    model: EvaluableModel,
    evaluation: Evaluation,
    data: DataSplits,
    config: ExperimentConfig,
    runtime: Runtime,
    folder: Path,
) -> dict[str, Any]:
    """All metrics of a finished training, by the names that the store saves.

    The test split is scored once, at the end, with the best weights on validation.
    """
    task = task_of(config.task, data)
    # Later entries replace earlier ones: the last evaluation is newer than the report of the last epoch.
    metrics = {name: value for name, value in state.reports[-1].items() if name != SCORE} if state.reports else {}
    metrics |= model.get_model_specific_metrics()
    metrics |= routing_metrics(model, evaluation, data.validation, data.num_classes, task)
    metrics |= role_metrics(model, evaluation, data, task)
    metrics |= alarm_metrics(state.reports, config, Length.of(config, data.train).evaluations)
    validation = data.validation.batches(config.training_params.eval_batch_size or config.batch_size, runtime.device)
    metrics |= {
        "final_val_loss": evaluation.loss,
        **{f"final_val_{name}": value for name, value in evaluation.scores.items()},
        **{f"best_val_{name}_across_epochs": value for name, value in _best(state, task, config).items()},
        **_details("val", evaluation, data.validation),
        **_costs(state, model, data, config, runtime, validation, task),
        **_text_metrics(state, model, evaluation, validation, data, runtime, task),
    }
    scored = {"": validation}  # prefix of a split's metrics -> its batches
    if config.training_params.test and data.test is not None:
        weights, _ = load_tensors(in_folder(folder, MODEL_FILE))
        load_weights(model, weights, folder / MODEL_FILE)
        for name, split in {"": data.test, **{f"{name}_": part for name, part in data.further_tests.items()}}.items():
            scored[f"test_{name}"] = split.batches(validation.batch_size, runtime.device)
            test = evaluate(model, scored[f"test_{name}"], task.num_outputs(data), runtime, task)
            values = {"loss": test.loss, **test.scores}
            metrics |= {f"test_{name}{score}": value for score, value in values.items()}
            metrics |= _details(f"test_{name}".rstrip("_"), test, split)
            with attempted(log, f"{folder}: no file of the predictions on the test split"):
                _write_predictions(folder, f"test_{name}".rstrip("_"), test, split, data, task)
    # If the test split was scored, the model has its best weights on validation from here on.
    metrics |= _certification(model, config, folder)
    if data.validation.paths is not None:
        metrics |= regret_metrics(model, scored, task.num_outputs(data), runtime, task)
    return metrics | {"peak_memory_mb": runtime.peak_memory_mb()}


def _text_metrics(
    state: TrainingState,
    model: EvaluableModel,
    evaluation: Evaluation,
    validation: Batches,
    data: DataSplits,
    runtime: Runtime,
    task: Task,
) -> dict[str, Any]:
    """For running text: the gap to the training loss, losses by class and with overlapping windows, and routes."""
    if not isinstance(validation, StreamBatches):
        return {}
    metrics: dict[str, Any] = (
        {} if state.train_loss is None else {"generalisation_gap": evaluation.loss - state.train_loss}
    )
    if validation.data.eval_stride is not None:
        found = evaluate(model, validation.sliding(), task.num_outputs(data), runtime, task)
        metrics["final_val_loss_sliding"] = found.loss
    if isinstance(model, LanguageModel) and data.tokenizer is not None:
        metrics |= token_report(model, validation, data.tokenizer, runtime).metrics()
    return metrics


def _best(state: TrainingState, task: Task, config: ExperimentConfig) -> dict[str, float | None]:
    """The best value over the epochs of the task's score, and of the metric that selected the weights."""
    selected_by = config.training_params.select_by or task.selected_by
    best = {**state.best_others, selected_by: state.best_score}
    return {name: best[name] for name in dict.fromkeys([task.selected_by, selected_by])}


def _costs(
    state: TrainingState,
    model: EvaluableModel,
    data: DataSplits,
    config: ExperimentConfig,
    runtime: Runtime,
    validation: Batches,
    task: Task,
) -> dict[str, Any]:
    """Epochs, seconds, parameters, FLOPs and latency.

    `active_flops_per_sample` is the analytic figure, averaged over the lengths of the validation split.
    """
    meter = LoadMeter()  # counting FLOPs takes time too, and a longer look sees more of the load of the machine
    per_epoch = steps_per_epoch(config, data.train.samples_per_epoch)
    forward_flops, training_flops = measure_flops(model, validation, runtime, task=task)
    # One analytic count per distinct length, weighted by the number of its samples.
    lengths, counts = np.unique(data.validation.lengths, return_counts=True)
    analytic = [formula_of(model, length) for length in lengths.tolist()]
    costs = {
        "epochs_completed": state.step // per_epoch,
        "training_duration_seconds": state.seconds,
        "param_count": model.get_parameter_count(),
        "active_param_count": model.get_active_parameter_count(),
        "inference_flops_per_sample": forward_flops,
        "train_flops": training_flops * data.train.samples_per_epoch * state.step / per_epoch,
        **measure_latency(model, validation, runtime, meter=meter),
    }
    costs |= task.costs(costs, data, state.step_tokens / max(state.step_seconds, 1e-9))
    if None not in analytic:  # the model knows its own FLOPs
        costs["active_flops_per_sample"] = float(np.average(np.array(analytic, float), weights=counts))
    return costs


def _details(split: str, evaluation: Evaluation, data: TokenData) -> dict[str, list[Any]]:
    """The task's lists, and the accuracy of each group of samples if the data have groups."""
    details = {f"{split}_{name}": values for name, values in evaluation.details.items()}
    if data.groups is not None and evaluation.correct_N is not None:
        groups_N = data.groups[evaluation.rows_N]
        details[f"{split}_acc_by_group"] = [
            [int(group), float(evaluation.correct_N[groups_N == group].mean())] for group in np.unique(groups_N)
        ]
    return details


def _write_predictions(
    folder: Path, split_name: str, evaluation: Evaluation, split: TokenData, data: DataSplits, task: Task
) -> None:
    """Write the answers to a test split, in the order of the split, as far as the task has one per sample."""
    order = np.argsort(evaluation.rows_N)

    def ordered(values_N: NDArray[Any] | None) -> NDArray[Any] | None:
        found = one_per_sample(values_N)
        return None if found is None else found[order]

    part = split_name.removeprefix("test_")
    known = data.fingerprint.get("sha256", {}).get(part)
    path = in_folder(folder, f"predictions_{file_stem(split_name)}.parquet")
    write_predictions(
        path,
        Predictions(
            task.name,
            known or split.sha256(),
            evaluation.losses_N[order],
            ordered(evaluation.targets_N),
            ordered(evaluation.answers_N),
            ordered(evaluation.correct_N),
        ),
    )


def _certification(model: EvaluableModel, config: ExperimentConfig, folder: Path) -> dict[str, Any]:
    """Compare the model's automaton with that of the task, and draw it; empty unless both are automata."""
    learned = model.read_automaton()
    task = dataset_kind(config.dataset_type).automaton(config.dataset_name, config.dataset_params)
    if learned is None or task is None:
        return {}
    return certification_metrics(learned, task, folder / AUTOMATON_FILE, config.experiment_name)
