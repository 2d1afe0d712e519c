"""The sections of a config file: what a user may write, with defaults and bounds.

The options of models and datasets are not here: their constructors name them (see `signatures`). The docstrings of
sections and fields appear in the JSON Schema, so that editors show them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from research_eval.annotations import (
    AttentionRows,
    Choice,
    Count,
    Kernels,
    Natural,
    Positive,
    Precision,
    Range,
    Share,
    Weight,
    When,
    Younger,
)
from research_eval.config.signatures import younger_fields
from research_eval.datasets.kinds import DATASET_KINDS, task_name
from research_eval.files import MAX_NAME
from research_eval.registry import DISPATCHERS, TASKS, Registered, models_for


class _Section(BaseModel):
    """One object of the file: no other keys, no silent conversion (3 is no text, "3" no number), and read-only."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class OptimizerParams(_Section):
    """The optimiser and what scales its gradients."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """Update rule; muon orthogonalises the updates of matrices and uses adamw for all other parameters."""
    lr: Annotated[Positive, Range(3e-4, 1e-2, log=True)] = 1e-3
    """Largest learning rate. With muon it counts for matrices, and `adam_lr` for all other parameters."""
    weight_decay: Annotated[Weight, Range(1e-3, 0.3, log=True)] = 0.01
    """Decay of weight matrices: decoupled for adamw, added to the gradient for sgd."""
    grad_clip_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm; null for no clipping."""
    aux_loss_coeff: Weight = 1.0
    """Multiplies the model's whole auxiliary loss."""
    router_lr_mult: Weight = 1.0
    """Learning rate of routers relative to `lr`."""
    expert_lr_mult: Weight = 1.0
    """Learning rate of experts relative to `lr`."""
    edge_lr_mult: Weight = 10.0
    """Learning rate of the edge tables of scan experts relative to `lr`."""
    momentum: Annotated[Share, Range(0.5, 0.95), When("name", "sgd")] = 0.9
    """Momentum of sgd; an error with the other update rules."""
    adam_lr: Annotated[Positive | None, Younger()] = None
    """Largest learning rate of the parameters that muon leaves to adamw; null for 3e-3. An error without muon."""
    adam_beta2: Annotated[Share | None, Younger()] = None
    """Decay of adamw's squared gradients; null for 0.999, and for 0.95 beside muon."""

    @field_validator("momentum", "adam_lr")  # runs for a given value only, never for the default
    @classmethod
    def _only_for_its_rule(cls, value: float | None, info: Any) -> float | None:
        owner = {"momentum": "sgd", "adam_lr": "muon"}[info.field_name]
        if value is not None and info.data.get("name", owner) != owner:
            raise ValueError(f"must be left out unless name is {owner!r}")
        return value


class SchedulerParams(_Section):
    """The learning rate over the steps."""

    name: Annotated[Literal["none", "cosine_warmup", "wsd"], Choice("none", "cosine_warmup")] = "none"
    """Course of the learning rate: constant, a linear rise and half a cosine, or rise, flat and linear fall."""
    warmup_factor: Annotated[Share, Range(0.02, 0.2), When("name", "cosine_warmup", "wsd")] = 0.1
    """Share of the steps that the rise takes."""
    min_lr_factor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the last step relative to the largest."""
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 1 / 3
    """Share of the steps that the fall of wsd takes."""


def _known_device(device: str) -> str:
    """The name itself. Raises ValueError for a device that torch does not have; the run says if the machine has it."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", device):
        raise ValueError("expected auto, cpu, cuda, cuda:N or mps")
    return device


def metric_of_validation(name: str) -> str:
    """`f1` for `f1`, `val_f1` and `final_val_f1`. Raises ValueError for a score of the test split."""
    if name.startswith("test_"):
        raise ValueError("expected a metric of the validation split such as 'f1' or 'loss': nothing is chosen by test")
    return name.removeprefix("final_").removeprefix("val_")


ValidationMetric = Annotated[str, AfterValidator(metric_of_validation)]


class ParallelParams(_Section):
    """How the processes of torchrun share one training; one process ignores it. It never changes what is computed."""

    data: Literal["auto", "ddp", "fsdp"] = "auto"
    """Weights, gradients and moments: whole in every process (ddp), or in slices (fsdp); auto slices large models."""
    experts: Count = 1
    """So many processes hold the experts together, and rows travel. It divides the processes and the experts."""
    checkpoint: Literal["auto", "single", "sharded"] = "auto"
    """One process writes all of a checkpoint (single), or each its slices, into a folder that all share (sharded)."""


class TrainingParams(_Section):
    """How the training runs; none of it changes what is trained."""

    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """auto (the best one there is), cpu, cuda, cuda:N or mps."""
    precision: Precision = "fp32"
    """Number format of the forward and backward pass; weights stay fp32."""
    compile: bool = False
    """Compile the model's blocks with torch.compile."""
    gradient_accumulation_steps: Count = 1
    """Batches whose gradients are averaged into one optimiser step."""
    label_smoothing: Share = 0.0
    """Share of each target that is spread evenly over the classes."""
    class_weights: Annotated[Literal["balanced"] | list[Positive] | None, Younger()] = None
    """Weight of each class in the training loss: balanced (inverse to its rows), one number per class, or null."""
    select_by: Annotated[ValidationMetric | None, Younger()] = None
    """Validation metric whose best epoch gives the weights, such as f1, acc or loss; null for the task's own."""
    ema_decay: Share = 0.0
    """Decay of the moving average of the weights that is evaluated; 0 for no average."""
    early_stopping_patience: Count | None = None
    """Stop after so many epochs without a better validation score; null for never."""
    early_stopping_metric: Annotated[ValidationMetric | None, Younger()] = None
    """Validation metric that early stopping watches; null for the one of select_by."""
    eval_batch_size: Count | None = None
    """Samples per batch in evaluation; null for the training batch size."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; null for one at the end of every epoch."""
    log_every: Count = 50
    """Steps between log lines."""
    curriculum: Share = 0.0
    """Share of the epochs over which the longest training sample admitted grows from the shortest to the longest."""
    trace_routing: bool = False
    """Write every validation sample's path and action probabilities after each epoch."""
    test: bool = False
    """Score the test splits once, after training."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of torch; null for torch's own choice."""
    kernels: Kernels = "auto"
    """How experts are executed: auto (what suits the device), plain (with the padding), slices or grouped."""
    attention: Annotated[AttentionRows, Younger()] = "padded"
    """What attention reads: padded grids, or varlen (rows without padding; CUDA in bf16, elsewhere padded)."""
    dispatcher: Annotated[str, Registered(DISPATCHERS), Younger()] = "local"
    """How rows reach the process that holds their expert: local (one process), or a dispatcher of your own."""
    parallel: Annotated[ParallelParams, Younger()] = ParallelParams()
    """How the processes of torchrun share the model."""
    keep_memory: bool = False
    """Linux: let the process keep freed memory instead of giving it back to the system after every step."""
    max_steps: Annotated[Count | None, Younger()] = None
    """Length of the training in optimiser steps, in place of epochs; null for the epochs."""
    max_tokens: Annotated[Count | None, Younger()] = None
    """Length of the training in tokens, in place of epochs; null for the epochs. Give it or max_steps."""
    eval_every: Annotated[Count | None, Younger()] = None
    """Steps between evaluations; null for one after each epoch."""
    sample_during_training: Annotated[Natural, Younger()] = 0
    """Characters that a language model writes and shows after each evaluation; 0 for none."""

    @field_validator("max_tokens")
    @classmethod
    def _one_length(cls, max_tokens: int | None, info: Any) -> int | None:
        if max_tokens is not None and info.data.get("max_steps") is not None:
            raise ValueError("max_steps gives the length of the training too: give one of the two")
        return max_tokens


class ExperimentConfig(_Section):
    """A checked config. `dataset_params` and `model_params` hold every parameter under its canonical name."""

    model_type: str
    """Key in MODELS_MAP, or for running text in LANGUAGE_MODELS: dense, moe, goe, goe_original or one of your own."""
    dataset_type: Annotated[str, Registered(DATASET_KINDS)]
    """Generated by a task, or read from files."""
    dataset_name: Annotated[str, Field(max_length=MAX_NAME)]
    """Key in SYNTHETIC_DATASETS, entry of REAL_WORLD_DATASETS, or any name beside `dataset_params.data_dir`."""
    epochs: Count
    """Passes over the training split."""
    batch_size: Count
    """Samples per batch."""
    experiment_name: str = Field(
        default_factory=lambda given: f"{given['model_type']}_{given['dataset_name']}",
        min_length=1,
        max_length=MAX_NAME,
    )
    """Name of the run in the results; the default is made of model_type and dataset_name."""
    seed: Natural = 0
    """Data, weights, batch order and noise all follow from it."""
    dataset_params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the dataset."""
    model_params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the model."""
    optimizer_params: OptimizerParams = Field(default_factory=OptimizerParams)
    scheduler_params: SchedulerParams = Field(default_factory=SchedulerParams)
    training_params: TrainingParams = Field(default_factory=TrainingParams)
    task: Annotated[Annotated[str, Registered(TASKS)] | None, Younger()] = None
    """What the model is trained for, a key in TASKS; null for the task that the dataset is made for."""

    def model_class(self) -> type:
        """The class of the model: that of `model_type` for the task. Raises ConfigError for an unknown name."""
        found: type = models_for(self.task_name).get_or_explain(self.model_type)
        return found

    @property
    def task_name(self) -> str:
        """The task that the model is trained for."""
        return task_name({"dataset_type": self.dataset_type, "dataset_name": self.dataset_name, "task": self.task})

    def to_dict(self) -> dict[str, Any]:
        """The complete config for JSON; `config_from_dict` makes an equal config of it."""
        config = self.model_dump(mode="json")
        if self.optimizer_params.name != "sgd":
            del config["optimizer_params"]["momentum"]
        sections = [(self, config)]
        sections += [(getattr(self, name), config[name]) for name in ("optimizer_params", "training_params")]
        for section, values in sections:
            for name in younger_fields(type(section)):
                if getattr(section, name) == type(section).model_fields[name].default:
                    del values[name]
        return config
