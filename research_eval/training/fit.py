"""The training loop."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from research_eval.annotations import Natural
from research_eval.datasets.token_data import Batch, Batches, DataSplits
from research_eval.errors import ConfigError
from research_eval.models.base_model import EvaluableModel, auxiliary_terms, logits_of
from research_eval.schema import ExperimentConfig
from research_eval.training.checkpoint import (
    checkpoint_exists,
    flatten_optimizer,
    generator_states,
    load_checkpoint,
    load_weights,
    restore_generators,
    restore_optimizer,
    save_checkpoint,
    save_tensors,
)
from research_eval.training.evaluate import Evaluation, Scoring, evaluate
from research_eval.training.optimizers import build_optimizer, build_schedule
from research_eval.training.runtime import Runtime, stop_requests
from research_eval.training.trace import RoutingWatch

CHECKPOINT_FILE = "checkpoint.safetensors"
MODEL_FILE = "model.safetensors"


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class Pruned(RuntimeError):
    """Whoever watches the run gives it up; the message says why."""


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM arrived; a checkpoint of the last finished step has been written."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"signal {number} after step {step}")
        self.signal = number


@dataclass
class TrainingState:
    """Where a run is; together with the tensors of a checkpoint enough to go on exactly."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: Natural = 0
    best_f1: float = -1.0
    best_step: Natural = 0
    best_loss: float | None = None  # validation loss at the best step
    epochs_without_gain: Natural = 0
    stopped_early: bool = False
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    reports: list[dict[str, Any]] = field(default_factory=list)  # the routing of every epoch, in short


_STATE = TypeAdapter(TrainingState)


class Observer(Protocol):
    """Who wants to know how training goes: the store, the log, the progress bar."""

    def start(self, state: TrainingState, steps_per_epoch: int, total_steps: int) -> None: ...
    def train_values(self, step: int, values: dict[str, float]) -> None: ...
    def epoch_end(self, step: int, evaluation: Evaluation, model_metrics: dict[str, Any]) -> None: ...


class Meter:
    """Keeps what each step reports on the device; nothing is read back until `read`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._values: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._samples: dict[str, list[int]] = defaultdict(list)
        self._total = 0
        self._started = time.perf_counter()

    def add(self, values: dict[str, torch.Tensor], samples: int) -> None:
        """Means over `samples` samples."""
        self._total += samples
        for name, value in values.items():
            self._values[name].append(value.detach())
            self._samples[name].append(samples)

    def read(self) -> dict[str, float]:
        """Means since the last read, and samples per second."""
        values = {}
        for name, means in self._values.items():
            known = torch.stack(means).cpu().double()
            values[name] = float(known @ torch.tensor(self._samples[name], dtype=torch.float64)) / self._total
        if self._total:
            values["samples_per_second"] = self._total / (time.perf_counter() - self._started)
        self.reset()
        return values


class Step(NamedTuple):
    """An optimiser step that is due, on the mean loss over all samples of the micro-batches."""

    model: EvaluableModel
    micro_batches: Sequence[Batch]
    optimizer: torch.optim.Optimizer
    config: ExperimentConfig
    runtime: Runtime
    meter: Meter

    @property
    def num_samples(self) -> int:
        return sum(len(batch.labels) for batch in self.micro_batches)


Fitted = tuple[TrainingState, EvaluableModel, Evaluation]
T = TypeVar("T")
# Yields each step before it is taken, and each model before it is scored. Where somebody else takes the step, what is
# sent puts the training's own generators back; where somebody else scores, it is the evaluation.
Training = Generator[Step | Scoring, Callable[[], None] | Evaluation | None, T]


def to_the_end(training: Training[T]) -> T:
    """What a training returns whose steps nobody else takes."""
    while True:
        try:
            next(training)
        except StopIteration as end:
            result: T = end.value
            return result


def fit(
    model: EvaluableModel,
    data: DataSplits,
    config: ExperimentConfig,
    runtime: Runtime,
    folder: Path,
    observer: Observer,
) -> Fitted:
    """Train and return the state, the model to score (the weight average where one is kept), and its last evaluation.

    A checkpoint in `folder` is continued exactly. Raises Diverged, Interrupted, and Pruned where the observer does.
    """
    return to_the_end(fit_stepwise(model, data, config, runtime, folder, observer))


def fit_stepwise(
    model: EvaluableModel,
    data: DataSplits,
    config: ExperimentConfig,
    runtime: Runtime,
    folder: Path,
    observer: Observer,
) -> Training[Fitted]:
    """`fit`, which gives way before each step and each evaluation."""
    options = config.training_params
    train = Batches(
        data.train, config.batch_size, runtime.device, config.seed, curriculum_epochs=options.curriculum * config.epochs
    )
    validation = Batches(data.validation, options.eval_batch_size or config.batch_size, runtime.device)
    every = options.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(train) / every)
    total_steps = steps_per_epoch * config.epochs

    optimizer = build_optimizer(model, config.optimizer_params)
    schedule = build_schedule(optimizer, config.scheduler_params, total_steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay)) if options.ema_decay else None
    scored = model
    if average is not None:
        assert isinstance(average.module, EvaluableModel)
        scored = average.module
    watch = RoutingWatch(model, validation, data.num_classes, config, runtime, folder)
    runtime.seed(config.seed, "training")
    state = TrainingState()
    if checkpoint_exists(folder / CHECKPOINT_FILE):
        state = _restore(folder / CHECKPOINT_FILE, model, average, optimizer, schedule, total_steps)
    observer.start(state, steps_per_epoch, total_steps)
    started, meter, evaluation = time.perf_counter() - state.seconds, Meter(), None

    with stop_requests() as request:
        while state.step < total_steps and not state.stopped_early:
            epoch, done = divmod(state.step, steps_per_epoch)
            order = train.order(epoch)[done * every :]
            for first in range(0, len(order), every):
                if not model.training:
                    model.train()
                micro_batches = [train.take(rows) for rows in order[first : first + every]]
                step = Step(model, micro_batches, optimizer, config, runtime, meter)
                own_generators = yield step
                assert not isinstance(own_generators, Evaluation)
                if own_generators is None:
                    take(step)
                schedule.step()
                if average is not None:
                    average.update_parameters(model)
                state.step += 1
                model.after_step(state.step / total_steps)

                epoch_ends = state.step % steps_per_epoch == 0
                due = epoch_ends if options.checkpoint_every is None else state.step % options.checkpoint_every == 0
                if own_generators is not None and (epoch_ends or due):
                    own_generators()
                    own_generators = None
                if epoch_ends or state.step % options.log_every == 0 or due or request.signal:
                    _report(observer, meter, state.step, float(schedule.get_last_lr()[0]))
                if epoch_ends:
                    scoring = Scoring(scored, validation, data.num_classes, runtime)
                    given = None if average is not None else (yield scoring)
                    evaluation = given if isinstance(given, Evaluation) else _evaluated(scoring)
                    _check_finite("validation loss", evaluation.loss, state.step)
                    metrics = watch.epoch_end(epoch + 1, scored, evaluation, state.reports)
                    observer.epoch_end(state.step, evaluation, metrics)
                    _keep_best(state, evaluation, scored, folder, options.early_stopping_patience)
                stop = request.signal
                if own_generators is not None and stop:
                    own_generators()
                if due or stop or (epoch_ends and state.step == total_steps):
                    state.seconds = time.perf_counter() - started
                    _save(folder / CHECKPOINT_FILE, state, model, average, optimizer)
                if stop:
                    raise Interrupted(stop, state.step)
    state.seconds = time.perf_counter() - started
    if evaluation is None:  # nothing was left to train
        evaluation = _evaluated(Scoring(scored, validation, data.num_classes, runtime))
    return state, scored, evaluation


def _evaluated(scoring: Scoring) -> Evaluation:
    with scoring.runtime.autocast():
        scoring.model.calibrate(scoring.batches)
    return evaluate(*scoring)


def take(step: Step) -> None:
    """Forward, backward, update."""
    gradients(step)
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)


def gradients(step: Step) -> None:
    """Those of the mean loss over all samples, clipped, into the parameters."""
    for batch in step.micro_batches:
        with step.runtime.autocast():
            loss = step_loss(step, batch, logits_of(step.model, batch))
        loss.backward()
    if step.config.optimizer_params.grad_clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(step.model.parameters(), step.config.optimizer_params.grad_clip_norm)


def step_loss(step: Step, batch: Batch, logits_BC: torch.Tensor) -> torch.Tensor:
    """The part of a step's loss that comes from one of its micro-batches; the meter gets its values."""
    coefficient = step.config.optimizer_params.aux_loss_coeff
    task = step.model.task_loss(logits_BC, batch.labels, step.config.training_params.label_smoothing)
    terms = auxiliary_terms(step.model)
    loss = task
    if terms:
        loss = task + coefficient * sum(term.weight * term.raw for term in terms.values())
    correct = (logits_BC.detach().argmax(-1) == batch.labels).float().mean()
    values = {"train_loss": loss, "train_task_loss": task, "train_acc": correct}
    for name, term in terms.items():
        values |= {f"{name}_raw": term.raw, f"{name}_weighted": coefficient * term.weight * term.raw}
    step.meter.add(values, len(batch.labels))
    return loss if len(step.micro_batches) == 1 else loss * (len(batch.labels) / step.num_samples)


def _report(observer: Observer, meter: Meter, step: int, rate: float) -> None:
    values = meter.read()
    if values:
        _check_finite("loss", values["train_loss"], step)
        observer.train_values(step, {**values, "learning_rate": rate})


def _check_finite(name: str, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"the {name} is {loss} at step {step}: try a lower lr or a smaller grad_clip_norm")


def _keep_best(
    state: TrainingState, evaluation: Evaluation, scored: EvaluableModel, folder: Path, patience: int | None
) -> None:
    """The weights of the best validation macro-F1 so far, of the lower loss among equals, go to `model.safetensors`."""
    better = evaluation.macro_f1 > state.best_f1
    equal = evaluation.macro_f1 == state.best_f1 and state.best_loss is not None and evaluation.loss < state.best_loss
    state.epochs_without_gain = 0 if better else state.epochs_without_gain + 1
    if better or equal:
        state.best_f1, state.best_step, state.best_loss = evaluation.macro_f1, state.step, evaluation.loss
        save_tensors(folder / MODEL_FILE, scored.state_dict(), {"step": state.step, "val_f1": evaluation.macro_f1})
    state.stopped_early = patience is not None and state.epochs_without_gain >= patience


def _save(
    path: Path,
    state: TrainingState,
    model: EvaluableModel,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    generators, generator_values = generator_states()
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    if average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in average.state_dict().items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in flatten_optimizer(optimizer).items()}
    tensors |= {f"generator/{name}": tensor for name, tensor in generators.items()}
    save_checkpoint(path, tensors, {"state": asdict(state), "generators": generator_values})


def _restore(
    path: Path,
    model: EvaluableModel,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    total_steps: int,
) -> TrainingState:
    tensors, values = load_checkpoint(path)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    load_weights(model, part("model/"), path)
    if average is not None:
        load_weights(average, part("average/"), path)
    try:
        restore_optimizer(optimizer, part("optimizer/"))
        state = _STATE.validate_json(json.dumps(values["state"]), strict=True)
        restore_generators(part("generator/"), values["generators"])
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{path}: not a checkpoint of this run: {error}. Run the experiment again.") from error
    if state.step > total_steps:
        raise ConfigError(f"{path}: is at step {state.step} of {total_steps}. Run the experiment again.")
    # LambdaLR is a pure function of the step.
    schedule.last_epoch = state.step
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(state.step)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    return state
