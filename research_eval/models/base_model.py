"""What the experiment asks of a model.

B batch  L length  C classes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from research_eval.analysis.automaton import WalkerAutomaton
from research_eval.datasets.token_data import Batch
from research_eval.errors import ConfigError
from research_eval.layers.losses import cross_entropy
from research_eval.layers.packing import Packing, Samples


class AuxiliaryLoss(NamedTuple):
    """A term beside the task loss: its raw value and the coefficient it enters the sum with."""

    raw: torch.Tensor
    weight: float


class EvaluableModel(nn.Module):
    """Base class of all classifiers. A class with the same methods that does not inherit works too (see `adapt`)."""

    model_type: str = ""
    stackable: bool = False  # whether samples do not depend on each other, and nothing but dropout is drawn
    _num_tokens: int | None = None

    def prepare(self, batch: Batch) -> None:
        """Called before each forward pass with the whole batch, for what the arguments of `forward` do not carry."""
        self._num_tokens = batch.num_tokens

    def num_tokens(self) -> int | None:
        """Tokens of the batch that was prepared for this forward pass, once; None when nobody counted them."""
        known, self._num_tokens = self._num_tokens, None
        return known

    def packed(self, keep_BL: torch.Tensor, always: bool = False) -> Samples:
        """The batch without its padding, or with it where the kernels say so, unless `always`."""
        return Packing(keep_BL, self.num_tokens(), packed=True if always else None).samples()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """input_ids [B, L] int64, attention_mask [B, L] True where a token is real -> logits [B, C]."""
        raise NotImplementedError

    def task_loss(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """The loss of the last forward pass, a scalar. Class 0 is an ordinary class."""
        return cross_entropy(logits, labels, label_smoothing)

    def auxiliary_losses(self) -> dict[str, AuxiliaryLoss]:
        """The terms of the last forward pass in training mode, by name."""
        return {}

    def get_auxiliary_loss(self) -> torch.Tensor | float | None:
        """The weighted sum of the auxiliary terms, to be added to the task loss."""
        return sum((term.weight * term.raw for term in self.auxiliary_losses().values()), start=0.0)

    def after_step(self, progress: float) -> None:
        """Called after every optimiser step with the share of training done: schedules and bias balancing."""

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Called before each evaluation of the validation split, with its batches: thresholds of early exits."""

    def start_recording(self) -> None:
        """Forget the routing statistics and paths collected so far and collect those of the coming evaluation."""

    def recorded_paths(self) -> NDArray[np.int64] | None:
        """The experts of each recorded sample, [samples, steps], -1 behind the end; None for a model without paths."""
        return None

    def follow(self, mapping_TF: torch.Tensor | None) -> bool:
        """Send samples along the task's known paths: function f at step t to expert `mapping[t, f]`; None ends it.

        False for a model without paths to give, which goes on as before.
        """
        return False

    def read_automaton(self) -> WalkerAutomaton | None:
        """The finite automaton that the model is, where it is one."""
        return None

    def recorded_probabilities(self) -> NDArray[np.float32] | None:
        """Probabilities of each action at each step, [samples, steps, actions], where they were kept."""
        return None

    def recorded_values(self) -> NDArray[np.float32] | None:
        """Q-values of each action at each step, [samples, steps, actions], where the model has them."""
        return None

    def get_model_specific_metrics(self) -> dict[str, Any]:
        """Scalars and lists of the last evaluation; they go into the database under their own names."""
        return {}

    def get_parameter_count(self) -> int:
        """Trainable parameters."""
        return get_trainable_parameter_count(self)

    def get_active_parameter_count(self) -> int:
        """Trainable parameters that one sample can meet on its way."""
        return self.get_parameter_count()

    def get_flops_per_sample(self, length: int) -> float | None:
        """Analytic forward FLOPs (two per multiply-add) of one sample of `length` tokens; None when not known."""
        return None

    def get_model_name(self) -> str:
        """The key in `MODELS_MAP`."""
        return self.model_type


def logits_of(model: EvaluableModel, batch: Batch) -> torch.Tensor:
    """One forward pass over a batch, [B, C]."""
    model.prepare(batch)
    logits_BC: torch.Tensor = model(batch.input_ids, attention_mask=batch.attention_mask)
    return logits_BC


def get_trainable_parameter_count(model: nn.Module) -> int:
    """Number of parameters that receive a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def keep_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, padding_idx: int) -> torch.Tensor:
    """True where a token is real, [B, L]."""
    return input_ids != padding_idx if attention_mask is None else attention_mask.bool()


class AdaptedModel(EvaluableModel):
    """A user's module that has the documented methods without inheriting from `EvaluableModel`."""

    def __init__(self, model: nn.Module, model_type: str) -> None:
        super().__init__()
        self.model = model
        self.model_type = model_type

    def _call(self, method: str, default: Any) -> Any:
        # The one place where methods are optional: a foreign class may lack any of them but `forward`.
        function = getattr(self.model, method, None)
        return function() if callable(function) else default

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids, attention_mask=attention_mask)

    def get_auxiliary_loss(self) -> torch.Tensor | float | None:
        loss: torch.Tensor | float | None = self._call("get_auxiliary_loss", None)
        return loss

    def get_model_specific_metrics(self) -> dict[str, Any]:
        return self._call("get_model_specific_metrics", None) or {}

    def get_parameter_count(self) -> int:
        return int(self._call("get_parameter_count", get_trainable_parameter_count(self.model)))


def auxiliary_terms(model: EvaluableModel) -> dict[str, AuxiliaryLoss]:
    """The auxiliary terms of the last forward pass by name; a plain `get_auxiliary_loss` counts as one term."""
    terms = model.auxiliary_losses()
    total = None if terms else model.get_auxiliary_loss()
    return {"auxiliary_loss": AuxiliaryLoss(total, 1.0)} if isinstance(total, torch.Tensor) else terms


def adapt(model: nn.Module, model_type: str) -> EvaluableModel:
    """The model itself, or a wrapper around a class that does not inherit from `EvaluableModel`.

    Raises ConfigError for something that is no torch module.
    """
    if isinstance(model, EvaluableModel):
        return model
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model_type: {model_type!r} is a {type(model).__name__}, expected a torch.nn.Module")
    return AdaptedModel(model, model_type)


def routed_parameters(model: nn.Module, fragment: str) -> Iterator[nn.Parameter]:
    """Parameters below a module called `fragment` ("experts", "router")."""
    for name, parameter in model.named_parameters():
        if fragment in name.split("."):
            yield parameter
