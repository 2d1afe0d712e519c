"""The interface between the program and a model.

The program asks a model for two things: `run` makes a forward pass, and `losses` computes the losses of this pass.

B batch  L length  C classes (or other outputs of the head)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from research_eval.annotations import accept_flat_options
from research_eval.datasets.token_data import Batch
from research_eval.errors import ConfigError
from research_eval.layers.dispatch import Executing
from research_eval.layers.intervention import Intervened, Intervention, intervention_of
from research_eval.layers.losses import AuxiliaryLoss as AuxiliaryLoss
from research_eval.layers.packing import Packing, Samples
from research_eval.layers.pretrained import PretrainedTrunk
from research_eval.routing.automaton import WalkerAutomaton
from research_eval.routing.record import EvaluationRecorder
from research_eval.tasks.base import Task
from research_eval.tasks.classification import Classification


@dataclass(frozen=True)
class Outcome:
    """One forward pass: the outputs [B, C], and `details`, from which the model computes its own losses."""

    outputs: Tensor
    details: Any = None


class Losses(NamedTuple):
    """The task loss of a pass, a scalar, and the auxiliary terms by name."""

    task: Tensor
    terms: dict[str, AuxiliaryLoss]


class EvaluableModel(Executing, Intervened):
    """Base class of all models. A class with the same methods also works without inheriting (see `adapt`).

    A simple model overrides `forward`, and optionally `task_loss` and `auxiliary_losses`, which refer to the last
    forward pass. A model whose losses depend on more than the outputs inherits from `RoutedModel`. The program itself
    calls only `run` and `losses`.
    """

    model_type: str = ""
    padding_idx: int = 0
    size_options: tuple[str, ...] = ("dim_feedforward", "embed_dim")
    """The options with which `goe match` makes the model larger or smaller, those that change it least first. The cost
    must not fall when the first one grows."""
    tuned_options: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """What `goe compare` tunes after the learning rate: keys of the config, each with the values that it tries besides
    the default, the most promising ones first."""
    control_options: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    """Further arms of `goe compare --controls`: a name, and keys of the config with their values. A claim about the
    model needs them, such as one about a router the same model with a router that never learns."""
    records_all: bool = True
    """Whether an evaluation leaves nothing in the model but what goes through `recorder`. A class that keeps more, such
    as sums for its own metrics, is evaluated as a whole by each process that trains it. So a class with its own metrics
    or records sets this itself if it is true."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Let a constructor with settings groups also accept their options as keywords: `Model(embed_dim=16)`.

        A subclass that overrides `forward` but not `run` gets the `run` that calls this `forward`.
        """
        super().__init_subclass__(**keywords)
        accept_flat_options(cls)
        if "forward" in cls.__dict__ and "run" not in cls.__dict__:
            cls.run = EvaluableModel.run  # type: ignore[method-assign]  # the overridden `forward` is what runs

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [B, L] int64, attention_mask [B, L] True at real tokens -> logits [B, C]."""
        raise NotImplementedError

    def run(self, batch: Batch) -> Outcome:
        """One forward pass over a batch.

        A `forward` with the argument `num_tokens` receives the number of real tokens. It then need not ask the device.
        """
        known = {"num_tokens": batch.num_tokens} if "num_tokens" in _arguments(type(self).forward) else {}
        return Outcome(self(batch.input_ids, attention_mask=batch.attention_mask, **known))

    def losses(self, outcome: Outcome, labels_B: Tensor, task: Task, label_smoothing: float = 0.0) -> Losses:
        """The losses of a pass. For a simple model this pass has to be the last one."""
        own = type(self).task_loss is not EvaluableModel.task_loss
        loss = self.task_loss if own else task.loss
        return Losses(loss(outcome.outputs, labels_B, label_smoothing), auxiliary_terms(self))

    def task_loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The task loss of the last forward pass, a scalar; the default is that of a classification."""
        return Classification().loss(logits, labels, label_smoothing)

    def auxiliary_losses(self) -> dict[str, AuxiliaryLoss]:
        """The auxiliary terms of the last forward pass in training mode, by name."""
        return {}

    def get_auxiliary_loss(self) -> Tensor | float | None:
        """The weighted sum of the auxiliary terms, which training adds to the task loss."""
        return sum((term.weight * term.raw for term in self.auxiliary_losses().values()), start=0.0)

    def after_step(self, progress: float) -> None:
        """The training loop calls this after every optimiser step, for schedules and bias balancing.

        `progress` is the finished share of the training, from 0 to 1.
        """

    def scheduled_options(self) -> tuple[str, ...]:
        """The options whose effect follows the finished share of the training, so that it depends on all epochs.

        A run with such an option cannot be continued to more epochs. A class with an `after_step` of its own has to say
        that nothing follows its argument.
        """
        return () if type(self).after_step is EvaluableModel.after_step else ("after_step",)

    def units(self) -> list[nn.Module]:
        """The parts whose own forward pass runs once in a pass. Their parameters need not be together before."""
        return []

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """The training loop calls this before each evaluation, for thresholds of early exits.

        `batches` are those of the validation split.
        """

    def start_recording(self) -> None:
        """Discard the recorded statistics and paths, and record those of the coming evaluation."""

    def stop_recording(self) -> None:
        """Record nothing of the coming passes, until `start_recording`: what inference alone needs."""
        recorder = self.recorder()
        if recorder is not None:
            recorder.clear()
            recorder.wants = "nothing"

    def recorder(self) -> EvaluationRecorder | None:
        """The routing decisions of the last evaluation; None for a model without routing.

        Reports, traces and predictions read paths from it.
        """
        return None

    def recorded_paths(self) -> NDArray[np.int64] | None:
        """The experts of each recorded sample, [samples, steps], -1 after the end; None for a model without paths."""
        recorder = self.recorder()
        return None if recorder is None else recorder.paths()

    def can_share(self) -> bool:
        """Whether processes may share an evaluation: the class that records, or one below it, sets `records_all`."""
        mro = type(self).mro()

        def place(name: str) -> int:
            return next(number for number, one in enumerate(mro) if name in vars(one))

        recording = ("start_recording", "recorder", "get_model_specific_metrics")
        return self.records_all and place("records_all") <= min(place(method) for method in recording)

    def follow(self, mapping_TF: Tensor | None) -> bool:
        """Send samples along the task's known paths: function f at step t to expert `mapping[t, f]`; None ends it.

        Returns False if the model has no paths; it then continues as before.
        """
        return False

    @contextmanager
    def intervene(
        self,
        *,
        skip: Collection[int] = (),
        forbid: Collection[int] = (),
        swap: Mapping[int, int] | None = None,
        path: Sequence[int] | None = None,
        step: int | None = None,
    ) -> Iterator[None]:
        """Within the block, evaluations have another routing; after it, the model is what it was, to the bit.

        `skip`: the work of these experts is left out, and their samples or tokens keep their states. `forbid`: the
        routers choose the best of the other experts. `swap`: an expert works in the place of another one, with the
        other one's factor. `path`: the experts of every sample or token in order, with the factors of the router's own
        choices; `goe_original` stops where it ends. `step`: only at this step or layer, counted from 0.

        An inner block replaces the change of an outer one until it ends. Raises ConfigError for a model without
        experts, for numbers that it does not have, and for a path where a token has several experts.
        """
        found, before = intervention_of(skip, forbid, swap, path, step), self.intervention
        self._check_intervention(found)
        self._set_intervention(found)
        try:
            yield
        finally:
            self._set_intervention(before)

    def _set_intervention(self, intervention: Intervention) -> None:
        """Let all parts that choose experts know what is changed."""
        for module in self.modules():
            if isinstance(module, Intervened):
                module.intervention = intervention

    def _check_intervention(self, wanted: Intervention) -> None:
        """Raise ConfigError for what this model cannot do."""
        recorder = self.recorder()
        if recorder is None:
            raise ConfigError(f"intervene: {self.model_type} has no experts that a router chooses")
        if self.training:
            raise ConfigError("intervene: the model is in training mode. Call model.eval() first.")
        num_experts, num_steps = recorder.num_experts, recorder.num_steps
        named = [*wanted.skip, *wanted.forbid, *(wanted.path or ()), *(one for pair in wanted.swap for one in pair)]
        wrong = [number for number in named if not 0 <= number < num_experts]
        if wrong:
            raise ConfigError(f"intervene: there is no expert {wrong[0]}; the model has {num_experts}, from 0")
        if len(wanted.forbid) == num_experts:
            raise ConfigError("intervene: every expert is forbidden. Leave one.")
        if wanted.step is not None and not 0 <= wanted.step < num_steps:
            raise ConfigError(f"intervene: there is no step {wanted.step}; the model has {num_steps}, from 0")
        if wanted.path is not None and not 0 < len(wanted.path) <= num_steps:
            raise ConfigError(f"intervene: a path has 1 to {num_steps} experts, and this one has {len(wanted.path)}")

    def read_automaton(self) -> WalkerAutomaton | None:
        """The finite automaton that the model computes; None for a model that is not an automaton."""
        return None

    def get_model_specific_metrics(self) -> dict[str, Any]:
        """Scalars and lists of the last evaluation. The store saves them under these names."""
        return {}

    def get_parameter_count(self) -> int:
        """Number of trainable parameters."""
        return get_trainable_parameter_count(self)

    def get_active_parameter_count(self) -> int:
        """Number of trainable parameters that one sample can use on its path."""
        return self.get_parameter_count()

    def get_flops_per_sample(self, length: int) -> float | None:
        """Analytic forward FLOPs (two per multiply-add) of one sample of `length` tokens; None if unknown."""
        return None

    def get_model_name(self) -> str:
        """The key in `MODELS_MAP`."""
        return self.model_type

    def packed(self, keep_BL: Tensor, num_tokens: int | None, always: bool = False) -> Samples:
        """The batch without its padding. Kernels that compute padding keep it, unless `always`."""
        return Packing.of(keep_BL, num_tokens, self.execution, packed=True if always else None).samples()


class RoutedModel(EvaluableModel):
    """A model with routing: `route` makes a pass and returns everything that its losses need.

    In evaluation mode, `route` pushes every decision to the recorder. The program computes losses from the outcome that
    it passes in. For interactive use, `forward` stores the outcome of its pass, and `task_loss` and `auxiliary_losses`
    refer to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outcome: Outcome | None = None

    def route(self, batch: Batch) -> Outcome:
        """One forward pass over a batch."""
        raise NotImplementedError

    def task_loss_of(self, outcome: Outcome, labels_B: Tensor, task: Task, label_smoothing: float = 0.0) -> Tensor:
        """The task loss of a pass, a scalar."""
        return task.loss(outcome.outputs, labels_B, label_smoothing)

    def terms_of(self, outcome: Outcome) -> dict[str, AuxiliaryLoss]:
        """The auxiliary terms of a pass, by name."""
        return {}

    def run(self, batch: Batch) -> Outcome:
        return self.route(batch)

    def losses(self, outcome: Outcome, labels_B: Tensor, task: Task, label_smoothing: float = 0.0) -> Losses:
        if outcome.details is None:  # a subclass overrides `forward` and calls this one inside
            outcome = Outcome(outcome.outputs, self._last().details)
        return Losses(self.task_loss_of(outcome, labels_B, task, label_smoothing), self.terms_of(outcome))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        keep_BL = keep_mask(input_ids, attention_mask, self.padding_idx)
        self.outcome = self.route(Batch(input_ids, keep_BL, labels=input_ids.new_empty(0)))
        return self.outcome.outputs

    def task_loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return self.task_loss_of(Outcome(logits, self._last().details), labels, Classification(), label_smoothing)

    def auxiliary_losses(self) -> dict[str, AuxiliaryLoss]:
        return {} if self.outcome is None else self.terms_of(self.outcome)

    def _last(self) -> Outcome:
        """The outcome of the last `forward`. Raises RuntimeError before the first one."""
        if self.outcome is None:
            raise RuntimeError("the model has not been called yet: its losses follow from a forward pass")
        return self.outcome


class ScheduledModel(RoutedModel):
    """A routed model with schedules: it knows the finished share of the training, also after a resume.

    The share is a buffer, so checkpoints and moving averages of the weights include it. A copy on the host avoids
    reading the buffer from the device at every step.
    """

    progress: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("progress", torch.zeros(()))
        self._known_progress: float | None = None
        self.register_load_state_dict_post_hook(ScheduledModel._forget_progress)  # type: ignore[no-untyped-call]

    def done(self) -> float:
        """The finished share of the training, from 0 to 1."""
        if self._known_progress is None:
            self._known_progress = float(self.progress)
        return self._known_progress

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        self.progress.fill_(progress)
        self._known_progress = float(np.float32(progress))  # the precision of the buffer, so a resumed run is exact

    def _forget_progress(self, *_: Any) -> None:
        """Drop the copy on the host, so that the next read takes the buffer."""
        self._known_progress = None

    def train(self, mode: bool = True) -> Self:
        if not mode:  # a weight average copies buffers from the trained model
            self._forget_progress()
        return super().train(mode)


@functools.cache
def check_experts_per_token(wanted: Intervention, num_experts: int, top_k: int) -> None:
    """Raise ConfigError if tokens with `top_k` experts cannot have this routing."""
    if wanted.path is not None and top_k > 1:
        raise ConfigError(f"intervene: a token has {top_k} experts in a layer, so that no path can be given")
    if len(wanted.forbid) > num_experts - top_k:
        few = f"{len(wanted.forbid)} of {num_experts} experts are forbidden"
        raise ConfigError(f"intervene: {few}, and a token needs {top_k}")


def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's arguments."""
    return frozenset(inspect.signature(function).parameters)


def logits_of(model: EvaluableModel, batch: Batch) -> Tensor:
    """One forward pass over a batch, [B, C]. A routed model stores the outcome for its stateful methods."""
    outcome = model.run(batch)
    if isinstance(model, RoutedModel) and outcome.details is not None:
        model.outcome = outcome
    return outcome.outputs


def formula_of(model: EvaluableModel, length: int) -> float | None:
    """The model's own count of FLOPs; None if it has none, or if a part of it, a pretrained encoder, has none."""
    if any(isinstance(part, PretrainedTrunk) for part in model.modules()):
        return None
    return model.get_flops_per_sample(length)


def get_trainable_parameter_count(model: nn.Module) -> int:
    """Number of parameters that receive a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def keep_mask(input_ids: Tensor, attention_mask: Tensor | None, padding_idx: int) -> Tensor:
    """True at real tokens, [B, L]; without a mask, every id except `padding_idx` is real."""
    return input_ids != padding_idx if attention_mask is None else attention_mask.bool()


class AdaptedModel(EvaluableModel):
    """Wraps a user's module that has the documented methods but does not inherit from `EvaluableModel`.

    Every method that the module lacks has the default of `EvaluableModel`.
    """

    def __init__(self, model: nn.Module, model_type: str) -> None:
        super().__init__()
        self.model = model
        self.model_type = model_type

    def _call(self, method: str, default: Any) -> Any:
        # Only here are methods optional: a foreign class needs `forward` and nothing else.
        function = getattr(self.model, method, None)
        return function() if callable(function) else default

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask)

    def get_auxiliary_loss(self) -> Tensor | float | None:
        loss: Tensor | float | None = self._call("get_auxiliary_loss", None)
        return loss

    def can_share(self) -> bool:
        return not callable(getattr(self.model, "get_model_specific_metrics", None))

    def get_model_specific_metrics(self) -> dict[str, Any]:
        return self._call("get_model_specific_metrics", None) or {}

    def get_parameter_count(self) -> int:
        return int(self._call("get_parameter_count", get_trainable_parameter_count(self.model)))


def auxiliary_terms(model: EvaluableModel) -> dict[str, AuxiliaryLoss]:
    """The auxiliary terms of the last forward pass, by name.

    If a model defines `get_auxiliary_loss` only, its result counts as one term with weight 1.
    """
    terms = model.auxiliary_losses()
    total = None if terms else model.get_auxiliary_loss()
    return {"auxiliary_loss": AuxiliaryLoss(total, 1.0)} if isinstance(total, Tensor) else terms


def adapt(model: nn.Module, model_type: str) -> EvaluableModel:
    """The model itself, or a wrapper around a class that does not inherit from `EvaluableModel`.

    Raises ConfigError for an object that is not a torch module.
    """
    if isinstance(model, EvaluableModel):
        return model
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model_type: {model_type!r} is a {type(model).__name__}, expected a torch.nn.Module")
    return AdaptedModel(model, model_type)


def joined_on_host(arrays: Sequence[Tensor]) -> NDArray[Any]:
    """Concatenate tensors into one numpy array, with a single copy from the device."""
    whole = arrays[0] if len(arrays) == 1 else torch.cat(list(arrays))
    whole = whole.detach()
    return (whole.float() if whole.is_floating_point() else whole).cpu().numpy()


def routed_parameters(model: nn.Module, fragment: str) -> Iterator[nn.Parameter]:
    """Parameters inside a module with the name `fragment` ("experts", "router")."""
    for name, parameter in model.named_parameters():
        if fragment in name.split("."):
            yield parameter
