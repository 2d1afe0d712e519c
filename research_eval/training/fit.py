"""The training loop, written once for all models, tasks and devices."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.token_data import Batches, DataSplits
from research_eval.models.base_model import EvaluableModel
from research_eval.system.phases import phase
from research_eval.tasks.base import Evaluation, Task, is_better, task_of
from research_eval.tasks.class_weights import weighted
from research_eval.tasks.selection import Selection
from research_eval.training.checkpointer import CHECKPOINT_FILE as CHECKPOINT_FILE
from research_eval.training.checkpointer import MODEL_FILE as MODEL_FILE
from research_eval.training.checkpointer import Checkpointer
from research_eval.training.evaluate import evaluate
from research_eval.training.length import Length
from research_eval.training.optimizers import build_optimizer, build_schedule
from research_eval.training.parallel import OneProcess
from research_eval.training.parallel import Parallel as Parallel
from research_eval.training.routing_watch import RoutingWatch
from research_eval.training.runtime import Runtime, stop_requests
from research_eval.training.state import Diverged, Interrupted, TrainingState
from research_eval.training.step import Meter, TrainingLoss, take_step


class Observer(Protocol):
    """Receives the reports of a training, for the store, the log and the progress bar.

    `epoch_end` also receives the scored model, which it must not change. It may raise Pruned to end the run.
    """

    def start(self, state: TrainingState, steps_per_evaluation: int, total_steps: int) -> None: ...
    def train_values(self, step: int, values: dict[str, float]) -> None: ...
    def epoch_end(
        self, step: int, evaluation: Evaluation, model_metrics: dict[str, Any], scored: EvaluableModel
    ) -> None: ...


Fitted = tuple[TrainingState, EvaluableModel, Evaluation]  # state, model to score, its last evaluation


def fit(
    model: EvaluableModel,
    data: DataSplits,
    config: ExperimentConfig,
    runtime: Runtime,
    folder: Path,
    observer: Observer,
    parallel: Parallel | None = None,
) -> Fitted:
    """Train a model and return the state, the model to score, and its last evaluation.

    The model to score is the weight average, if the config keeps one. A checkpoint in `folder` is continued exactly.
    Raises Diverged for a loss that is not finite, Interrupted after a signal, and Pruned if the observer raises it.
    """
    parallel = parallel or OneProcess()
    options, task, clip = config.training_params, task_of(config.task, data), config.optimizer_params.grad_clip_norm
    selection = Selection.of(task, options.select_by, options.early_stopping_metric)
    train, validation = _batches(config, data, runtime)
    every = options.gradient_accumulation_steps
    length = Length.of(config, data.train)

    with phase("importing the compiler of torch"):  # the first optimiser of a process does
        optimizer = build_optimizer(model, config.optimizer_params)
    schedule = build_schedule(optimizer, config.scheduler_params, length.total)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay)) if options.ema_decay else None
    scored = _scored_model(model, average)
    loss_of = _training_loss(model, task, data, config, runtime)
    watch = RoutingWatch(model, validation, task, data, config, runtime, folder)
    runtime.seed(config.seed, "training")  # before `restore`, which loads the generators of a checkpoint
    checkpointer = Checkpointer(folder, model, average, optimizer, schedule)
    state = parallel.begin(loss_of, optimizer, checkpointer, length.total)
    observer.start(state, length.period, length.total)
    # `seconds` sums all sessions of a run, so the clock starts earlier by the seconds of the others.
    meter = Meter(state.step_seconds, state.step_tokens, parallel)
    started, first_step, evaluation = time.perf_counter() - state.seconds, state.step, None

    with stop_requests() as request:
        while state.step < length.total and not state.stopped_early:
            # After a resume, the epoch continues after its finished steps: its order depends on the seed alone.
            epoch, steps_done = divmod(state.step, length.per_epoch)
            order = train.order(epoch)[steps_done * every :]
            for first in range(0, len(order), every)[: length.total - state.step]:
                if not model.training:  # an evaluation came before
                    model.train()
                whole = order[first : first + every]
                batches, sizes = [train.take(parallel.own(rows)) for rows in whole], [len(rows) for rows in whole]
                with phase("compiling kernels") if options.compile and state.step == first_step else nullcontext():
                    take_step(loss_of, batches, optimizer, clip, runtime, meter, parallel, sizes, state.step)
                schedule.step()
                _update_average(average, model)
                state.step += 1
                model.after_step(state.step / length.total)
                epoch_ends = length.is_evaluated(state.step)
                due = epoch_ends if options.checkpoint_every is None else state.step % options.checkpoint_every == 0
                # All processes have to stop at the same step, also if only one received the signal.
                stop = parallel.agree(request.signal)
                # A report empties the meter, so every checkpoint follows one: it need not hold the meter.
                reported = epoch_ends or state.step % options.log_every == 0 or due or bool(stop)
                if reported:
                    _report(observer, meter, state, float(schedule.get_last_lr()[0]))
                if epoch_ends:
                    with parallel.whole():
                        evaluation = _evaluated(scored, validation, data, task, runtime, parallel)
                        _check_finite("validation loss", evaluation.loss, state.step)
                        metrics = watch.epoch_end(length.number(state.step), scored, evaluation, state.reports)
                        observer.epoch_end(state.step, evaluation, metrics, scored)
                        gains = _keep_best(state, evaluation, task, selection, scored, checkpointer)
                    _count_patience(state, gains, options.early_stopping_patience, parallel)
                    meter.reset()  # the speed of the steps is that without evaluations
                stop = stop or (parallel.agree(request.signal) if reported else None)  # one that came meanwhile
                if due or stop or state.step == length.total:
                    state.seconds = time.perf_counter() - started
                    parallel.save(checkpointer, state)
                if stop:
                    raise Interrupted(stop, state.step)
    state.seconds = time.perf_counter() - started
    parallel.end()
    if evaluation is None:  # the checkpoint was already at the last step
        evaluation = _evaluated(scored, validation, data, task, runtime, parallel)
    return state, scored, evaluation


def _batches(config: ExperimentConfig, data: DataSplits, runtime: Runtime) -> tuple[Batches, Batches]:
    """The batches of the training, in a new order in every epoch, and those of the validation split."""
    options, device = config.training_params, runtime.device
    train = data.train.batches(
        config.batch_size, device, config.seed, curriculum_epochs=options.curriculum * config.epochs
    )
    return train, data.validation.batches(options.eval_batch_size or config.batch_size, device)


def _update_average(average: AveragedModel | None, model: EvaluableModel) -> None:
    """Move the weight average, if there is one, towards the weights of the last step."""
    if average is not None:
        average.update_parameters(model)


def _scored_model(model: EvaluableModel, average: AveragedModel | None) -> EvaluableModel:
    """The model that is evaluated: the weight average if there is one, otherwise the trained model."""
    if average is None:
        return model
    assert isinstance(average.module, EvaluableModel)
    return average.module


def _training_loss(
    model: EvaluableModel, task: Task, data: DataSplits, config: ExperimentConfig, runtime: Runtime
) -> TrainingLoss:
    """The loss that the steps minimise: that of the task, with the weights of the classes if the config has some."""
    options = config.training_params
    trained = weighted(task, options.class_weights, data, runtime.device)
    return TrainingLoss(model, trained, config.optimizer_params.aux_loss_coeff, options.label_smoothing)


def _evaluated(
    scored: EvaluableModel, validation: Batches, data: DataSplits, task: Task, runtime: Runtime, parallel: Parallel
) -> Evaluation:
    """Evaluate the validation split, after the model has calibrated itself on it."""

    def calibrated_and_evaluated() -> Evaluation:
        with runtime.autocast():
            scored.calibrate(validation)
        return evaluate(scored, validation, task.num_outputs(data), runtime, task)

    return parallel.shared(calibrated_and_evaluated) if scored.can_share() else calibrated_and_evaluated()


def _report(observer: Observer, meter: Meter, state: TrainingState, rate: float) -> None:
    """Send the means since the last report to the observer. Raises Diverged if the loss is not finite."""
    values, step = meter.read(), state.step
    state.step_seconds, state.step_tokens = meter.seconds, meter.tokens
    if values:
        _check_finite("loss", values["train_loss"], step)
        state.train_loss = values["train_task_loss"]
        observer.train_values(step, {**values, "learning_rate": rate})


def _check_finite(name: str, loss: float, step: int) -> None:
    """Raise Diverged for a loss that is NaN or infinite."""
    if not math.isfinite(loss):
        raise Diverged(f"the {name} is {loss} at step {step}: try a lower lr or a smaller grad_clip_norm")


def _keep_best(
    state: TrainingState,
    evaluation: Evaluation,
    task: Task,
    selection: Selection,
    scored: EvaluableModel,
    checkpointer: Checkpointer,
) -> bool:
    """Save the weights if they have the best validation score so far; on equal scores the lower loss decides.

    Returns whether the metric of early stopping is better than before; an equal value is no gain.
    """
    name = selection.weights
    score = evaluation.metric(name)
    better = {name: is_better(name, score, state.best_score)}
    equal = score == state.best_score and state.best_loss is not None and evaluation.loss < state.best_loss
    if better[name] or equal:
        state.best_score, state.best_step, state.best_loss = score, state.step, evaluation.loss
        checkpointer.save_best(scored, state.step, (name, score))
    for other in {selection.stopping, task.selected_by} - {name}:
        value = evaluation.metric(other)
        better[other] = is_better(other, value, state.best_others.get(other))
        if better[other]:
            state.best_others[other] = value
    return better[selection.stopping]


def _count_patience(state: TrainingState, gains: bool, patience: int | None, parallel: Parallel) -> None:
    """Count the epochs without a gain, and stop the training after `patience` of them; None for never.

    On GPUs the scores of the processes may differ in their last digits, so the processes agree.
    """
    state.epochs_without_gain = 0 if gains else state.epochs_without_gain + 1
    is_over = patience is not None and state.epochs_without_gain >= patience
    state.stopped_early = bool(parallel.agree(1 if is_over else None))
