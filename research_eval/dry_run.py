"""What an experiment would do, without doing it."""

from __future__ import annotations

import json

import numpy as np
import torch

from research_eval.datasets.token_data import Batches, DataSplits
from research_eval.experiment import prepare
from research_eval.models.base_model import EvaluableModel, auxiliary_terms, logits_of
from research_eval.schema import ExperimentConfig
from research_eval.training.evaluate import measure_flops
from research_eval.training.runtime import Runtime

MIB = 2**20


def describe(config: ExperimentConfig) -> str:
    """Resolved config, data and parameter shapes, parameters, FLOPs and the memory of training."""
    runtime, data, model = prepare(config)
    validation = Batches(data.validation, config.batch_size, runtime.device)
    forward, training = measure_flops(model, validation, runtime)
    weights, activations = memory_estimate(model, config, data, runtime)
    lengths = data.train.lengths
    rows = [
        ("device, precision", f"{runtime.device}, {runtime.precision}"),
        ("samples", f"train {len(data.train):,}, validation {len(data.validation):,}, test {_size(data)}"),
        ("tokens per sample", f"mean {lengths.mean():.1f}, longest {data.max_length}"),
        (
            "vocabulary, classes",
            f"{data.vocab_size:,} rows with padding, {data.num_classes} ({', '.join(data.label_names[:8])})",
        ),
        (
            "input, output",
            f"[{config.batch_size}, {data.max_length}] ids -> [{config.batch_size}, {data.num_classes}] logits",
        ),
        ("parameters", f"{model.get_parameter_count():,} in all, {model.get_active_parameter_count():,} active"),
        ("FLOPs per sample", f"forward {forward:,.0f}, training {training:,.0f}"),
        ("FLOPs of the training", f"{training * len(data.train) * config.epochs:.3g}"),
        (
            "memory of training",
            f"{weights:.1f} MiB for weights, gradients and optimiser, {activations:.1f} MiB for the largest batch",
        ),
    ]
    shapes = [(name, " x ".join(map(str, parameter.shape))) for name, parameter in model.named_parameters()]
    width = max(len(name) for name, _ in [*rows, *shapes])
    lines = [json.dumps(config.to_dict(), indent=2), ""]
    lines += [f"{name:<{width}}  {text}" for name, text in [*rows, ("", ""), *shapes]]
    return "\n".join(line.rstrip() for line in lines)


def _size(data: DataSplits) -> str:
    return "none" if data.test is None else f"{len(data.test):,}"


def memory_estimate(
    model: EvaluableModel, config: ExperimentConfig, data: DataSplits, runtime: Runtime
) -> tuple[float, float]:
    """MiB of weights with their gradients and optimiser state, and of what one step on the longest batch keeps.

    The second figure is measured: the distinct storages that autograd saves for the backward pass.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    copies = {"adamw": 4, "sgd": 3}[config.optimizer_params.name] + (config.training_params.ema_decay > 0)
    longest = np.argsort(-data.train.lengths, kind="stable")[: config.batch_size]
    batch = Batches(data.train, config.batch_size, runtime.device).take(longest)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor), runtime.autocast():
        loss = model.task_loss(logits_of(model, batch), batch.labels)
        loss = loss + sum(term.raw for term in auxiliary_terms(model).values())
    del loss
    return weights * copies / MIB, sum(saved.values()) / MIB
