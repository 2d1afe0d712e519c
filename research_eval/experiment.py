"""One experiment, top to bottom: config -> dataset -> model -> training -> scores -> results store."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import nn

from research_eval.analysis.automaton import certification_metrics
from research_eval.analysis.expert_graph import draw_expert_graph
from research_eval.analysis.routing_plots import draw_routing
from research_eval.datasets.providers import load_splits
from research_eval.datasets.regular import task_automaton
from research_eval.datasets.token_data import Batches, DataSplits, TokenData
from research_eval.db_utils import HistoryRow, Store, append_csv, normal_metrics
from research_eval.errors import ConfigError
from research_eval.files import LOCK_FILE, write_atomically
from research_eval.files import RUNS_FOLDER as RUNS_FOLDER
from research_eval.files import run_folder as run_folder
from research_eval.layers.block import compile_blocks
from research_eval.models.base_model import EvaluableModel, adapt
from research_eval.registry import MODELS_MAP
from research_eval.schema import ExperimentConfig, context_arguments, without_draws
from research_eval.spool import CSV_FILE, Ledger, Write, merge_pending, patiently
from research_eval.system.environment import check_fits, environment_record
from research_eval.system.progress import Progress
from research_eval.system.untrusted import in_folder
from research_eval.training.checkpoint import checkpoint_exists, load_tensors, load_weights, previous_checkpoint
from research_eval.training.evaluate import Evaluation, evaluate, measure_flops, measure_latency
from research_eval.training.fit import (
    CHECKPOINT_FILE,
    MODEL_FILE,
    Diverged,
    Interrupted,
    Pruned,
    Training,
    TrainingState,
    fit_stepwise,
    to_the_end,
)
from research_eval.training.runtime import Runtime
from research_eval.training.seeds import side_by_side
from research_eval.training.trace import alarm_metrics, regret_metrics, routing_metrics
from research_eval.wording import largest_of

log = logging.getLogger(__name__)

GRAPH_FILE = "expert_graph.png"
AUTOMATON_FILE = "automaton.png"
CLAIM_SECONDS = 1.0  # who only asks whether a run is at work holds its lock for a moment


@dataclass(frozen=True)
class Result:
    """How a run ended. `metrics` is empty unless `status` is "finished"."""

    experiment_id: str
    status: str
    metrics: dict[str, Any]
    folder: Path
    error: str | None = None
    exit_code: int = 0


Watch = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrialRun:
    """A run as part of a study's trial, under an id that was given to it before: it goes on where it was.

    `watch` gets the number of every epoch just evaluated and its scores (`val_loss`, `val_acc`, `val_f1`); it may raise
    Pruned.
    """

    study: str
    number: int
    experiment_id: str
    watch: Watch


def run(
    config: ExperimentConfig,
    *,
    db: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    parent_id: str | None = None,
    trial: TrialRun | None = None,
) -> Result:
    """Train, score and store one experiment; `resume` goes on with the newest run of the same config.

    Raises ConfigError before any work for what the user has to change. A run that diverges, is pruned or interrupted is
    a Result with that status; anything else that goes wrong is stored as failed and raised.
    """
    return to_the_end(_run(config, db, resume, quiet, parent_id, trial))


def run_all(
    configs: Sequence[ExperimentConfig], *, db: str | None = None, resume: bool = False, quiet: bool = False
) -> Iterator[Result]:
    """`run` for each of them, in their order, until one is interrupted.

    The steps of small models are taken as one, with the same results as one by one; the screen shows the first of them.
    """
    if resume:  # they may have come to different steps
        groups: Iterator[list[Result]] = ([run(config, db=db, resume=True, quiet=quiet)] for config in configs)
    else:
        groups = side_by_side(_run(config, db, quiet=quiet or config is not configs[0]) for config in configs)
    for results in groups:
        yield from results
        if any(result.exit_code > 128 for result in results):
            return


def _run(
    config: ExperimentConfig,
    db: str | None,
    resume: bool = False,
    quiet: bool = False,
    parent_id: str | None = None,
    trial: TrialRun | None = None,
) -> Training[Result]:
    with Store(db) as store:
        merge_pending(store)
        known = store.find_experiment(config.to_dict()) if resume else None
        if trial is not None:
            known = store.find_id(trial.experiment_id)
        if known is not None and known["status"] == "finished":
            log.info("run %s of this config is finished: nothing to resume", known["experiment_id"])
            metrics = store.metrics(known["experiment_id"])
            result = Result(known["experiment_id"], "finished", metrics, run_folder(known["experiment_id"]))
            if trial is None:  # a full disk may have kept it out
                append_csv(CSV_FILE, csv_row(config, result), unless_known=("experiment_id", "status"))
            return result
        runtime, data, model = prepare(config)
        log.info(
            "%s: %s training and %s validation samples, of which %s occur in training too",
            config.dataset_name,
            f"{len(data.train):,}",
            f"{len(data.validation):,}",
            f"{data.fingerprint['train_validation_duplicates']:,}",
        )
        experiment_id = known["experiment_id"] if known else trial.experiment_id if trial else new_id()
        environment = {**environment_record(str(runtime.device)), "data": data.fingerprint}
        if trial is not None:
            environment["study"] = {"name": trial.study, "trial": trial.number}
        with claimed_folder(experiment_id) as folder:
            if known is not None:
                if checkpoint_exists(folder / CHECKPOINT_FILE):
                    check_same_data(known, data)
                log.info("resuming run %s", experiment_id)
                patiently(lambda: store.set_status(experiment_id, "running"))
                patiently(lambda: store.update_environment(experiment_id, environment))
            else:
                if resume:
                    log.info("no earlier run of this config to resume: starting a new one")
                run_type = "json" if trial is None else "optuna_trial"
                patiently(lambda: start_row(store, experiment_id, config, environment, run_type, parent_id))
            save_description(folder, config, data)
            with Progress(config.epochs, quiet, warns=trial is None) as progress:
                journal = Journal(store, experiment_id, progress, None if trial is None else trial.watch)
                return (yield from _train_and_store(experiment_id, folder, config, runtime, data, model, journal))


def check_same_data(known: dict[str, Any], data: DataSplits) -> None:
    """Raise ConfigError where a run was begun on other data than these, by the hashes of the splits' content."""
    try:
        hashes = dict(json.loads(known["env_details_json"])["data"]["sha256"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return  # not recorded
    for split, now in data.fingerprint.get("sha256", {}).items():
        if split in hashes and hashes[split] != now:
            raise ConfigError(
                f"run {known['experiment_id']}: its {split} split is not what it was begun on (sha256 {now[:12]}, then "
                f"{str(hashes[split])[:12]}). Put the data back as they were, or start a new run without --resume."
            )


def prepare(config: ExperimentConfig, data: DataSplits | None = None) -> tuple[Runtime, DataSplits, EvaluableModel]:
    """Device, data (unless it is given) and freshly initialised model of a config."""
    options = config.training_params
    runtime = Runtime(options.device, options.precision, options.num_threads, options.kernels, options.keep_memory)
    if data is None:
        data = load_splits(config.dataset_type, config.dataset_name, config.dataset_params, config.seed)
    if options.test and data.test is None:
        raise ConfigError(f"training_params.test: {config.dataset_name} has no test split with labels: set it to false")
    context = {name: getattr(data, name) for name in ("vocab_size", "num_classes", "padding_idx", "max_length")}
    check_model_fits(config.model_type, config.model_params, context, copies=4 if runtime.device.type == "cpu" else 1)
    runtime.seed(config.seed, "init")
    model = adapt(create_model(config.model_type, config.model_params, context, runtime.device), config.model_type)
    if options.compile:
        compile_blocks(model)
    return runtime, data, model


def create_model(model_type: str, params: dict[str, Any], context: dict[str, Any], device: torch.device) -> nn.Module:
    """The model of `MODELS_MAP` with its own parameters and, of the context, what its constructor takes."""
    cls = MODELS_MAP.get_or_explain(model_type)
    model: nn.Module = cls(**context_arguments(cls, {**context, "device": device}), **params)
    return model.to(device)


def check_model_fits(model_type: str, params: dict[str, Any], context: dict[str, Any], copies: int) -> None:
    """Raise ConfigError where `copies` of the weights are more than the memory; a foreign class is not asked.

    Training keeps four: weights, gradients and two moments.
    """
    cls = MODELS_MAP.get_or_explain(model_type)
    if not issubclass(cls, EvaluableModel):
        return
    try:
        with torch.device("meta"), without_draws():
            model = cls(**context_arguments(cls, {**context, "device": torch.device("meta")}), **params)
    except Exception:  # it may need real numbers; if it is wrong, its real construction says so
        log.debug("%s: the size of the model is not known", model_type, exc_info=True)
        return
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    check_fits(num_bytes * copies, f"model_params: {model_type} with {largest_of({**context, **params})}")


def new_id() -> str:
    """Sortable by time, unique without asking anyone."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


@contextmanager
def claimed_folder(experiment_id: str) -> Iterator[Path]:
    """The run's own folder, ours alone until the end. Raises ConfigError while another process works in it."""
    folder = run_folder(experiment_id)
    lock = in_folder(folder, LOCK_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(lock, timeout=CLAIM_SECONDS):
            for unfinished in folder.glob("*.tmp"):  # of a process that was killed while it wrote
                unfinished.unlink()
            yield folder
    except filelock.Timeout as error:
        raise ConfigError(
            f"run {experiment_id} is being trained by another process: wait for it, or drop --resume"
        ) from error


def save_description(folder: Path, config: ExperimentConfig, data: DataSplits) -> None:
    """What `predict` needs beside the weights: the config, the class names and the tokenizer."""
    description = {
        "vocab_size": data.vocab_size,
        "num_classes": data.num_classes,
        "padding_idx": data.padding_idx,
        "max_length": data.max_length,
        "label_names": data.label_names,
    }
    write_atomically(folder / "config.json", json.dumps(config.to_dict(), indent=2).encode())
    write_atomically(folder / "data.json", json.dumps(description, indent=2).encode())
    if data.tokenizer is not None:
        write_atomically(folder / "tokenizer.json", data.tokenizer.to_str().encode())


def start_row(
    store: Store,
    experiment_id: str,
    config: ExperimentConfig,
    environment: dict[str, Any],
    run_type: str = "json",
    parent_id: str | None = None,
) -> None:
    """Enter the run into the store as running."""
    store.start_experiment(
        experiment_id=experiment_id,
        run_type=run_type,
        experiment_name=config.experiment_name,
        model_type=config.model_type,
        dataset_name=config.dataset_name,
        dataset_type=config.dataset_type,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        config=config.to_dict(),
        environment=environment,
        parent_id=parent_id,
    )


def _train_and_store(
    experiment_id: str,
    folder: Path,
    config: ExperimentConfig,
    runtime: Runtime,
    data: DataSplits,
    model: EvaluableModel,
    journal: Journal,
) -> Training[Result]:
    status, error, exit_code, metrics, reports = "finished", None, 0, {}, []
    try:
        state, scored, evaluation = yield from fit_stepwise(model, data, config, runtime, folder, journal)
        metrics = score(state, scored, evaluation, data, config, runtime, folder)
        normal_metrics(metrics)
        reports = state.reports
    except Diverged as problem:
        status, error, exit_code = "diverged", str(problem), 1
    except Pruned as problem:
        status, error = "pruned", str(problem)
    except Interrupted as problem:
        status, error, exit_code = "interrupted", str(problem), 128 + problem.signal
    except KeyboardInterrupt:
        status, error, exit_code = "interrupted", "keyboard", 130
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
        try:
            journal.end(config, Result(experiment_id, "failed", {}, folder, error, 1))
        except OSError as further:  # what has gone wrong first is more telling
            log.warning("run %s: its failure could not be stored: %s", experiment_id, further)
        raise
    result = Result(experiment_id, status, metrics, folder, error, exit_code)
    journal.end(config, result)
    if status == "finished":
        previous_checkpoint(folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        _draw(result, reports, config, data)
    else:
        log.log(logging.INFO if status == "pruned" else logging.WARNING, "run %s: %s: %s", experiment_id, status, error)
    return result


def _draw(result: Result, reports: list[dict[str, Any]], config: ExperimentConfig, data: DataSplits) -> None:
    """The pictures of a run, which is stored already: a disk that is full now does not undo it."""
    title = f"{config.experiment_name}: paths of {len(data.validation):,} validation samples"
    try:
        if "step_transitions" in result.metrics:
            draw_expert_graph(result.metrics, result.folder / GRAPH_FILE, title)
        if config.training_params.trace_routing:
            draw_routing(result.metrics, reports, data.label_names, result.folder, config.experiment_name)
    except OSError as problem:
        log.warning("run %s: no pictures: %s", result.experiment_id, problem)


def csv_row(config: ExperimentConfig, result: Result) -> dict[str, Any]:
    """A run in `json_experiment_results.csv`."""
    row = {
        "experiment_id": result.experiment_id,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "experiment_name": config.experiment_name,
        "model_type": config.model_type,
        "dataset_type": config.dataset_type,
        "dataset_name": config.dataset_name,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "status": result.status,
    }
    numbers = {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}
    return row | numbers


def score(
    state: TrainingState,
    model: EvaluableModel,
    evaluation: Evaluation,
    data: DataSplits,
    config: ExperimentConfig,
    runtime: Runtime,
    folder: Path,
) -> dict[str, Any]:
    """All metrics of a finished training. The test split is scored once, with the best weights on validation."""
    metrics = dict(state.reports[-1]) if state.reports else {}
    metrics |= model.get_model_specific_metrics()
    metrics |= routing_metrics(model, evaluation, data.validation, data.num_classes)
    metrics |= alarm_metrics(state.reports, config)
    batch_size = config.training_params.eval_batch_size or config.batch_size
    validation = Batches(data.validation, batch_size, runtime.device)
    steps_per_epoch = -(-len(data.train) // (config.batch_size * config.training_params.gradient_accumulation_steps))
    forward_flops, training_flops = measure_flops(model, validation, runtime)
    lengths, counts = np.unique(data.validation.lengths, return_counts=True)
    analytic = [model.get_flops_per_sample(length) for length in lengths.tolist()]
    metrics |= {
        "final_val_loss": evaluation.loss,
        "final_val_acc": evaluation.accuracy,
        "final_val_f1": evaluation.macro_f1,
        "best_val_f1_across_epochs": state.best_f1,
        **_details("val", evaluation, data.validation),
        "epochs_completed": state.step // steps_per_epoch,
        "training_duration_seconds": state.seconds,
        "param_count": model.get_parameter_count(),
        "active_param_count": model.get_active_parameter_count(),
        "inference_flops_per_sample": forward_flops,
        "train_flops": training_flops * len(data.train) * state.step / steps_per_epoch,
        **measure_latency(model, validation, runtime),
    }
    if None not in analytic:
        metrics["active_flops_per_sample"] = float(np.average(np.array(analytic, float), weights=counts))
    scored = {"": validation}
    if config.training_params.test and data.test is not None:
        weights, _ = load_tensors(in_folder(folder, MODEL_FILE))
        load_weights(model, weights, folder / MODEL_FILE)
        for name, split in {"": data.test, **{f"{name}_": part for name, part in data.further_tests.items()}}.items():
            scored[f"test_{name}"] = Batches(split, batch_size, runtime.device)
            test = evaluate(model, scored[f"test_{name}"], data.num_classes, runtime)
            values = {"loss": test.loss, "acc": test.accuracy, "f1": test.macro_f1}
            metrics |= {f"test_{name}{score}": value for score, value in values.items()}
            metrics |= _details(f"test_{name}".rstrip("_"), test, split)
    learned = model.read_automaton()
    task = task_automaton(config.dataset_name, config.dataset_params) if config.dataset_type == "synthetic" else None
    if learned is not None and task is not None:
        metrics |= certification_metrics(learned, task, folder / AUTOMATON_FILE, config.experiment_name)
    if data.validation.paths is not None:
        metrics |= regret_metrics(model, scored, data.num_classes, runtime)
    return metrics | {"peak_memory_mb": runtime.peak_memory_mb()}


def _details(split: str, evaluation: Evaluation, data: TokenData) -> dict[str, list[Any]]:
    """Scores per class, and accuracy per group of samples where the data has groups."""
    rows = evaluation.per_class()
    details: dict[str, list[Any]] = {
        f"{split}_{name}_per_class": [row[name] for row in rows] for name in ("precision", "recall", "f1", "support")
    }
    if data.groups is not None:
        groups_N = data.groups[evaluation.rows_N]
        details[f"{split}_acc_by_group"] = [
            [int(group), float(evaluation.correct_N[groups_N == group].mean())] for group in np.unique(groups_N)
        ]
    return details


class Journal:
    """Writes what training reports to the store, and passes it on to the screen and to whoever watches."""

    def __init__(self, store: Store, experiment_id: str, progress: Progress, watch: Watch | None = None) -> None:
        self.watch = watch
        self._ledger = Ledger(store, experiment_id)
        self._progress = progress
        self._steps_per_epoch = 1

    def start(self, state: TrainingState, steps_per_epoch: int, total_steps: int) -> None:
        """Rows behind the checkpoint that is being continued are written again."""
        self._steps_per_epoch = steps_per_epoch
        self._ledger.write("truncate", state.step)
        self._progress.start(state.step, total_steps)

    def train_values(self, step: int, values: dict[str, float]) -> None:
        self._write(step, values)
        self._progress.step(step, values)

    def epoch_end(self, step: int, evaluation: Evaluation, model_metrics: dict[str, Any]) -> None:
        values = {"val_loss": evaluation.loss, "val_acc": evaluation.accuracy, "val_f1": evaluation.macro_f1}
        scalars = {name: float(value) for name, value in model_metrics.items() if isinstance(value, int | float)}
        self._write(step, {**scalars, **values})
        self._progress.epoch(step // self._steps_per_epoch, values)
        for alarm in model_metrics.get("alarms", ()):
            self._progress.warn(str(alarm))
        if self.watch is not None:
            self.watch(step // self._steps_per_epoch, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        epoch = step / self._steps_per_epoch
        self._ledger.write("history", [HistoryRow(step, epoch, name, value) for name, value in values.items()])

    def end(self, config: ExperimentConfig, result: Result) -> None:
        """How the run ended, into the store and, but for trials and what will go on, the CSV file."""
        finished = result.status == "finished"
        writes: list[Write] = [("metrics", result.metrics) if finished else ("status", [result.status, result.error])]
        if self.watch is None and result.status != "interrupted":
            writes.append(("csv", csv_row(config, result)))
        self._ledger.end(*writes)
