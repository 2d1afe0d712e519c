"""Device, data and model of a config, ready to train."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import nn

from research_eval.annotations import build
from research_eval.config.construction import without_draws
from research_eval.config.sections import ExperimentConfig, TrainingParams
from research_eval.config.signatures import context_arguments
from research_eval.datasets.providers import load_splits
from research_eval.datasets.text.tokenizer import words_of
from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError
from research_eval.layers.block import compile_blocks
from research_eval.layers.characters import CharacterNgrams
from research_eval.layers.dispatch import Execution, set_execution
from research_eval.layers.pretrained import PretrainedTrunk
from research_eval.models.base_model import EvaluableModel, adapt
from research_eval.models.language.base import LanguageModel
from research_eval.registry import CLASSIFICATION, DISPATCHERS, NEXT_TOKEN, models_for
from research_eval.seeding import derive_seed
from research_eval.system.environment import check_fits
from research_eval.system.phases import phase
from research_eval.tasks.base import task_of
from research_eval.tasks.class_weights import class_weights
from research_eval.tasks.selection import check_metric
from research_eval.training.runtime import Runtime
from research_eval.wording import largest_of

log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """Everything that a training needs in addition to its config."""

    runtime: Runtime
    data: DataSplits
    model: EvaluableModel


def prepare(config: ExperimentConfig, data: DataSplits | None = None) -> Prepared:
    """Choose the device, load the data (unless they are given) and build a freshly initialised model.

    Raises ConfigError for options that do not fit the data or the machine.
    """
    options = config.training_params
    runtime = Runtime(options.device, options.precision, options.num_threads, options.keep_memory)
    if data is None:
        data = load_splits(config.dataset_type, config.dataset_name, config.dataset_params, config.seed)
    if options.test and data.test is None:  # fail now, and not after the training
        raise ConfigError(f"training_params.test: {config.dataset_name} has no test split with labels: set it to false")
    _check_options(config, data)
    context = model_context(config, data)
    with phase("building the model"):
        copies = 4 if runtime.device.type == "cpu" else 1
        check_model_fits(config.model_type, config.model_params, context, copies, config.task_name)
        runtime.seed(config.seed, "init")  # the initial weights depend on the seed, and not on what ran before
        made = create_model(config.model_type, config.model_params, context, runtime.device, config.task_name)
        model = adapt(made, config.model_type)
        if isinstance(model, LanguageModel):
            model.learn_text(data.train.tokens, derive_seed(config.seed, "routes"))
        _learn_tokens(model, data)
        _check_weighted_loss(config, model)
        set_execution(model, execution_of(options))
        if options.compile:
            compile_blocks(model)
    return Prepared(runtime, data, model)


def execution_of(options: TrainingParams) -> Execution:
    """How a run executes the layers of its model. Raises ConfigError for an unknown dispatcher."""
    dispatcher = DISPATCHERS.get_or_explain(options.dispatcher)()
    return Execution(options.kernels, dispatcher, options.attention)


def _check_options(config: ExperimentConfig, data: DataSplits) -> None:
    """Raise ConfigError for training options that do not fit the data or the task."""
    options, task = config.training_params, task_of(config.task, data)
    class_weights(options.class_weights, data)
    check_metric(options.select_by, "select_by", task, data)
    check_metric(options.early_stopping_metric, "early_stopping_metric", task, data)
    if options.sample_during_training and config.task_name != NEXT_TOKEN:
        raise ConfigError(
            f"training_params.sample_during_training: {config.dataset_name!r} is no running text, so no model of it "
            "writes any. Leave the key out, or set it to 0."
        )


def _learn_tokens(model: EvaluableModel, data: DataSplits) -> None:
    """Give the vocabulary to the parts that read letters, or that have a tokenizer of their own.

    Raises ConfigError if the tokens are no words, or come from another tokenizer.
    """
    for trunk in (part for part in model.modules() if isinstance(part, PretrainedTrunk)):
        trunk.learn(data.tokenizer, data.max_length)
    parts = [part for part in model.modules() if isinstance(part, CharacterNgrams)]
    if not parts:
        return
    if data.tokenizer is None:
        raise ConfigError(
            "model_params.char_ngram_buckets: the tokens of these data are numbers and no words, so they have no "
            "letters. Set it to 0."
        )
    words = words_of(data.tokenizer)
    for part in parts:
        part.learn(words)


def _check_weighted_loss(config: ExperimentConfig, model: EvaluableModel) -> None:
    """Raise ConfigError for class weights beside a model that computes the task loss itself."""
    kind = type(model)
    computes = kind.losses is EvaluableModel.losses and kind.task_loss is not EvaluableModel.task_loss
    if config.training_params.class_weights is not None and computes:
        raise ConfigError(
            f"training_params.class_weights: {config.model_type} has a task loss of its own, which takes no weights. "
            "Set it to null."
        )


def model_context(config: ExperimentConfig, data: DataSplits) -> dict[str, Any]:
    """The constructor arguments that follow from the data. `num_classes` is the number of outputs of the task."""
    return {
        "vocab_size": data.vocab_size,
        "num_classes": task_of(config.task, data).num_outputs(data),
        "padding_idx": data.padding_idx,
        "max_length": data.max_length,
    }


def create_model(
    model_type: str, params: dict[str, Any], context: dict[str, Any], device: torch.device, task: str = CLASSIFICATION
) -> nn.Module:
    """Build a model for a task. Its constructor receives `params` and those entries of `context` that it takes."""
    cls = models_for(task).get_or_explain(model_type)
    model: nn.Module = build(cls, context_arguments(cls, {**context, "device": device}) | params)
    return model.to(device)


def check_model_fits(
    model_type: str, params: dict[str, Any], context: dict[str, Any], copies: int, task: str = CLASSIFICATION
) -> None:
    """Raise ConfigError if `copies` of the weights need more than the machine's memory.

    Training on a CPU keeps four copies: weights, gradients and two moments. A class that does not inherit from
    `EvaluableModel` is not checked. The model is built on torch's "meta" device, which allocates nothing.
    """
    cls = models_for(task).get_or_explain(model_type)
    if not issubclass(cls, EvaluableModel):
        return
    try:
        with torch.device("meta"), without_draws():
            model = build(cls, context_arguments(cls, {**context, "device": torch.device("meta")}) | params)
    except Exception:  # meta tensors may not suffice; the real construction reports real errors
        log.debug("%s: the size of the model is not known", model_type, exc_info=True)
        return
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    check_fits(num_bytes * copies, f"model_params: {model_type} with {largest_of({**context, **params})}")
