"""A description of an experiment that trains nothing: shapes, parameters, FLOPs and memory."""

from __future__ import annotations

import json

import numpy as np
import torch

from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.token_data import DataSplits
from research_eval.models.base_model import EvaluableModel
from research_eval.registry import NEXT_TOKEN
from research_eval.runs.data_block import data_block
from research_eval.runs.prepare import prepare
from research_eval.tasks.base import task_of
from research_eval.training.evaluate import measure_flops
from research_eval.training.length import Length
from research_eval.training.runtime import Runtime

MIB = 2**20  # bytes


def describe(config: ExperimentConfig) -> str:
    """The complete config as JSON, then data and parameter shapes, parameters, FLOPs and the memory of training.

    The data are loaded and the model is built, so this finds the same errors as a run. Raises ConfigError.
    """
    runtime, data, model = prepare(config)
    validation = data.validation.batches(config.batch_size, runtime.device)
    task = task_of(config.task, data)
    forward, training = measure_flops(model, validation, runtime, task=task)
    weights, activations = memory_estimate(model, config, data, runtime)
    lengths, length = data.train.lengths, Length.of(config, data.train)
    rows = [
        ("device, precision", f"{runtime.device}, {runtime.precision}"),
        ("samples", f"train {len(data.train):,}, validation {len(data.validation):,}, test {_size(data)}"),
        ("tokens per sample", f"mean {lengths.mean():.1f}, longest {data.max_length}"),
        *_outputs(config, data, task.num_outputs(data)),
        ("parameters", f"{model.get_parameter_count():,} in all, {model.get_active_parameter_count():,} active"),
        ("FLOPs per sample", f"forward {forward:,.0f}, training {training:,.0f}"),
        ("FLOPs of the training", f"{training * data.train.samples_per_epoch * length.passes:.3g}"),
        (
            "memory of training",
            f"{weights:.1f} MiB for weights, gradients and optimiser, {activations:.1f} MiB for the largest batch",
        ),
    ]
    shapes = [(name, " x ".join(map(str, parameter.shape))) for name, parameter in model.named_parameters()]
    width = max(len(name) for name, _ in [*rows, *shapes])
    lines = [json.dumps(config.to_dict(), indent=2), "", *data_block(config.dataset_name, data), ""]
    lines += [f"{name:<{width}}  {text}" for name, text in [*rows, ("", ""), *shapes]]
    return "\n".join(line.rstrip() for line in lines)


def _outputs(config: ExperimentConfig, data: DataSplits, num_outputs: int) -> list[tuple[str, str]]:
    """Rows on the model's input and output.

    They speak of classes if the data have a name for each output, otherwise of the task and its outputs.
    """
    has_classes = len(data.label_names) == num_outputs
    positions = f"{data.max_length}, " if config.task_name == NEXT_TOKEN else ""
    names = f"{num_outputs} ({', '.join(data.label_names[:8])})" if has_classes else str(num_outputs)
    return [
        (
            "vocabulary, classes" if has_classes else "vocabulary, outputs",
            f"{data.vocab_size:,} rows with padding, {names}",
        ),
        *([] if has_classes else [("task", config.task or data.task)]),
        (
            "input, output",
            f"[{config.batch_size}, {data.max_length}] ids -> [{config.batch_size}, {positions}{num_outputs}] "
            + ("logits" if has_classes else "outputs"),
        ),
    ]


def _size(data: DataSplits) -> str:
    """Number of test samples in words."""
    return "none" if data.test is None else f"{len(data.test):,}"


def memory_estimate(
    model: EvaluableModel, config: ExperimentConfig, data: DataSplits, runtime: Runtime
) -> tuple[float, float]:
    """MiB of weights with gradients and optimiser state, and MiB that one step on the longest batch stores.

    The second figure is measured: one forward pass runs, and the distinct storages that autograd saves for the backward
    pass are added up. Weights do not count again.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # AdamW: weights, gradients and two moments; SGD and Muon: one moment. A weight average is one more.
    copies = {"adamw": 4, "sgd": 3, "muon": 3}[config.optimizer_params.name] + (config.training_params.ema_decay > 0)
    longest = np.argsort(-data.train.lengths, kind="stable")[: config.batch_size]
    batch = data.train.batches(config.batch_size, runtime.device).take(longest)
    # Linear layers save their weights too; these are already in the first figure.
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    # Two saved tensors may share a storage: count it once.
    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor), runtime.autocast():
        task, terms = model.losses(model.run(batch), batch.labels, task_of(config.task, data))
        loss = task + sum(term.raw for term in terms.values())
    del loss
    return weights * copies / MIB, sum(saved.values()) / MIB
