"""More epochs for a run that has ended: which run is continued, whether that is exact, and the files that it needs.

The longer run is a new run with its own id, row and folder, and the run that it continues stays as it is. The new run
ends with the numbers of a run that had all epochs from its start. This is possible only if nothing in the finished
steps depends on the number of epochs; `Continuation.check` says what does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from research_eval.config.defaults import stored_forms
from research_eval.config.sections import ExperimentConfig
from research_eval.errors import ConfigError
from research_eval.files import run_folder, write_atomically
from research_eval.routing.alarms import Circumstances, find_alarms
from research_eval.routing.trace_files import ROUTING_FOLDER
from research_eval.runs.prepare import Prepared, prepare
from research_eval.store.changes import changes
from research_eval.store.pending import with_retries
from research_eval.store.records import HistoryRow, RunFilter
from research_eval.store.store import Store
from research_eval.system.untrusted import in_folder, read_limited, stored_object
from research_eval.training.checkpoint import (
    checkpoint_exists,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
    save_tensors,
)
from research_eval.training.checkpointer import CHECKPOINT_FILE, MODEL_FILE
from research_eval.training.optimizers import learning_rate_factor, steps_per_epoch
from research_eval.training.state import TrainingState, state_from
from research_eval.wording import shown

log = logging.getLogger(__name__)

MAX_TRACE_BYTES = 10**10
PROGRESS = ("progress", "module.progress")  # the buffer of the finished share, in a model and in its weight average


@dataclass(frozen=True)
class Continuation:
    """A run of `epochs` epochs, or of a part of them, that a new run of the same config trains further."""

    run_id: str
    epochs: int
    is_finished: bool

    @property
    def folder(self) -> Path:
        """The folder of the run that is continued."""
        return run_folder(self.run_id)

    def state(self) -> TrainingState:
        """The state in its newest checkpoint. Raises ConfigError for a damaged one, or one without a valid state."""
        path = in_folder(self.folder, CHECKPOINT_FILE)
        try:
            return state_from(load_checkpoint(path)[1]["state"])
        except (ValueError, TypeError, LookupError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}: not a checkpoint of a run: {error}") from error

    def check(self, config: ExperimentConfig, prepared: Prepared) -> None:
        """Raise ConfigError, with all reasons and what to do, if more epochs would not continue the run exactly."""
        state, reasons = self.state(), list[str]()
        per_epoch = steps_per_epoch(config, prepared.data.train.samples_per_epoch)
        if state.step > per_epoch * config.epochs:
            reasons.append(f"it has trained {state.step:,} steps, which are more")
        # The newest checkpoint may be older than the end of a run that stopped early.
        if state.stopped_early or (self.is_finished and state.step < per_epoch * self.epochs):
            patience = config.training_params.early_stopping_patience
            reasons.append(f"early stopping ended it (early_stopping_patience {patience}), and would end it again")
        before, after = (self._rates(config, epochs * per_epoch, state.step) for epochs in (self.epochs, config.epochs))
        if before != after:
            reasons.append(
                f"scheduler_params.name {config.scheduler_params.name!r}: its past steps would have had other learning "
                f'rates in {_epochs(config.epochs)} (with "none" they are the same)'
            )
        if config.training_params.curriculum:
            reasons.append("training_params.curriculum is a share of all epochs, so the order of its samples differs")
        options = prepared.model.scheduled_options()
        if options:
            reasons.append(f"model_params: the effect of {', '.join(options)} follows the share of all epochs")
        if reasons:
            raise _refusal(self.run_id, self.epochs, config, reasons)

    @staticmethod
    def _rates(config: ExperimentConfig, total_steps: int, steps: int) -> list[float]:
        """The factor of the learning rate at each of the first steps, if the training has so many steps in all."""
        return [learning_rate_factor(step, total_steps, config.scheduler_params) for step in range(steps)]

    def copy_files(self, folder: Path, total_steps: int) -> None:
        """Write the best weights, the routing traces and the checkpoint into the folder of the new run."""
        traces = in_folder(self.folder, ROUTING_FOLDER)
        for file in sorted(traces.glob("epoch_*")):
            (folder / ROUTING_FOLDER).mkdir(exist_ok=True)
            content = read_limited(in_folder(traces, file.name), MAX_TRACE_BYTES, "a routing trace")
            write_atomically(folder / ROUTING_FOLDER / file.name, content)
        weights = in_folder(self.folder, MODEL_FILE)
        if weights.exists():  # absent before the first evaluation
            tensors, values = load_tensors(weights)
            save_tensors(folder / MODEL_FILE, _at(tensors, PROGRESS, values["step"] / total_steps), values)
        tensors, values = load_checkpoint(in_folder(self.folder, CHECKPOINT_FILE))
        names = [f"{part}/{name}" for part in ("model", "average") for name in PROGRESS]
        # Last: a folder with a checkpoint is complete.
        save_checkpoint(folder / CHECKPOINT_FILE, _at(tensors, names, values["state"]["step"] / total_steps), values)

    def copy_history(self, store: Store, experiment_id: str, config: ExperimentConfig, per_epoch: int) -> None:
        """Give the new run the points of this one. Alarms are found again, because they depend on all epochs."""
        state = self.state()
        rows = [
            row for row in store.history(self.run_id) if row.step <= state.step and not row.name.startswith("alarm_")
        ]
        for alarm in find_alarms(state.reports, Circumstances.of(config.epochs, config.model_params)):
            rows.append(HistoryRow(alarm.epoch * per_epoch, float(alarm.epoch), f"alarm_{alarm.name}", alarm.value))
        with_retries(lambda: store.add_history(experiment_id, rows))


def _at(tensors: dict[str, torch.Tensor], names: Sequence[str], share: float) -> dict[str, torch.Tensor]:
    """The tensors with the finished share of the training as it is in the longer one."""
    return {
        name: torch.full_like(tensor, share) if name in names and tensor.ndim == 0 else tensor
        for name, tensor in tensors.items()
    }


def check_continuations(configs: Sequence[ExperimentConfig], db: str | None) -> None:
    """Raise ConfigError if one of the runs that would be continued cannot be, before any of them is trained."""
    with Store(db) as store:
        for config in configs:
            earlier = None if store.find_experiments(*stored_forms(config.to_dict())) else earlier_run(store, config)
            if earlier is not None:
                earlier.check(config, prepare(config))


def earlier_run(store: Store, config: ExperimentConfig) -> Continuation | None:
    """The run to continue if there is none of exactly this config: the same but for `epochs`. None if there is none.

    Finished runs of fewer epochs come first, the longest of them before others, then runs that were interrupted or
    have failed. Raises ConfigError if there are runs of more epochs only, and for a run whose checkpoint is gone.
    """
    rows = [
        row
        for row in store.find_other_epochs(*stored_forms(config.to_dict()))
        if row["status"] not in ("running", "diverged")
    ]
    shorter = [row for row in rows if row["status"] == "finished" and row["epochs"] < config.epochs]
    shorter.sort(key=lambda row: row["epochs"], reverse=True)  # of equally long ones the newest stays first
    unfinished = [row for row in rows if row["status"] != "finished"]
    found = [
        Continuation(row["experiment_id"], row["epochs"], row["status"] == "finished") for row in shorter + unfinished
    ]
    for one in found:
        if checkpoint_exists(in_folder(one.folder, CHECKPOINT_FILE)):
            return one
    longer = next((row for row in rows if row["status"] == "finished"), None)
    if shorter:
        file = found[0].folder / CHECKPOINT_FILE
        reason = f"its checkpoint {file} is not in {Path.cwd()}, which may not be the folder that it was run in"
        raise _refusal(found[0].run_id, found[0].epochs, config, [reason])
    if longer is not None:
        raise _refusal(longer["experiment_id"], longer["epochs"], config, ["it is finished, and has more of them"])
    return None


def _refusal(run_id: str, epochs: int, config: ExperimentConfig, reasons: Sequence[str]) -> ConfigError:
    """The error for a run that cannot be continued to the epochs of a config."""
    return ConfigError(
        f"--resume: run {run_id} of {_epochs(epochs)} cannot be continued to {_epochs(config.epochs)}: "
        f"{'; '.join(reasons)}. Nothing was trained. To train {_epochs(config.epochs)} from the start, "
        "leave --resume out."
    )


def _epochs(number: int) -> str:
    return f"{number} epoch" if number == 1 else f"{number} epochs"


def say_what_differs(store: Store, config: ExperimentConfig) -> None:
    """Warn if the newest run of this name and seed has another config: it is not continued, as a user may expect."""
    wanted = RunFilter(config.dataset_name, config.model_type, experiment_name=config.experiment_name, run_type="json")
    rows = store.find_runs(wanted, descending=True, with_json=True)
    row = next((row for row in rows if row["seed"] == config.seed and row["parent_id"] is None), None)
    if row is not None:
        found = changes(stored_object(row["full_config_json"]), config.to_dict())
        names = ", ".join(f"{change.name} ({shown(change.left)}, now {shown(change.right)})" for change in found)
        log.warning("--resume: run %s has another %s: a new run is trained from the start", row["experiment_id"], names)
