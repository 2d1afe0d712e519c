"""Latency of several finished models, measured in turn, so that a change of the machine's load meets all of them.

R repetitions  K batches of a repetition
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from research_eval.analysis.statistics import Interval, median_interval
from research_eval.config.check import stored_config
from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.providers import load_splits
from research_eval.datasets.token_data import Batch, DataSplits
from research_eval.errors import ConfigError
from research_eval.files import run_folder
from research_eval.layers.block import compile_blocks
from research_eval.layers.dispatch import set_execution
from research_eval.runs.predict import load_model, read_description
from research_eval.runs.prepare import execution_of
from research_eval.store.find import find_run
from research_eval.store.metrics import MEASURED_LATENCY, latency_remark
from research_eval.store.store import Store
from research_eval.system.environment import usable_cores
from research_eval.system.load import LoadMeter
from research_eval.system.untrusted import in_folder, parse_json, stored_object
from research_eval.training.checkpointer import MODEL_FILE
from research_eval.training.latency import Timed, latency_metrics, timed_batches
from research_eval.training.runtime import Runtime

log = logging.getLogger(__name__)

REPETITIONS = 30


@dataclass(frozen=True)
class Subject:
    """A run that is measured: its model with batches, and the CPU threads that it gets."""

    experiment_id: str
    config: ExperimentConfig
    timed: Timed
    batch_size: int
    num_threads: int


@dataclass(frozen=True)
class Measured:
    """The times of a model beside those of the first one, repetition by repetition."""

    subject: Subject
    seconds_RK: NDArray[np.float64]
    first_seconds_RK: NDArray[np.float64]
    load: float  # of other programs, from 0 to 1; the same for all models

    @cached_property
    def metrics(self) -> dict[str, float]:
        """What the store gets, beside the figures that the run itself has measured."""
        return latency_metrics(MEASURED_LATENCY, self.seconds_RK) | {
            f"{MEASURED_LATENCY}_load": self.load,
            f"{MEASURED_LATENCY}_batch_size": float(self.subject.batch_size),
            f"{MEASURED_LATENCY}_num_threads": float(self.subject.num_threads),
        }

    @property
    def milliseconds(self) -> float:
        """The median over the repetitions of the mean time per batch."""
        return self.metrics[f"{MEASURED_LATENCY}_ms_batch"]

    @property
    def spread(self) -> float:
        """The distance of the quartiles of the repetitions, relative to their median."""
        return self.metrics[f"{MEASURED_LATENCY}_spread"]

    @property
    def remark(self) -> str:
        """How far to trust the figures: `busy, spread 12 %`."""
        return latency_remark(self.load, self.spread)

    @property
    def samples_per_second(self) -> float:
        """Samples of a repetition over the median time of a repetition."""
        return self.subject.timed.num_samples / float(np.median(self.seconds_RK.sum(1)))

    @cached_property
    def ratios(self) -> list[float]:
        """For each repetition, the mean time per batch over that of the first model, which is measured beside it."""
        ratios: list[float] = (self.seconds_RK.mean(1) / self.first_seconds_RK.mean(1)).tolist()
        return ratios

    @property
    def ratio(self) -> float:
        """The median of the ratios to the first model."""
        return float(np.median(self.ratios))

    def ratio_interval(self, confidence: float = 0.95) -> Interval | None:
        """The interval of the median ratio; None for fewer than six repetitions."""
        return median_interval(self.ratios, confidence)


def subjects(
    store: Store,
    names: Sequence[str],
    *,
    batch_size: int | None = None,
    num_threads: int | None = None,
    device: str | None = None,
) -> list[Subject]:
    """Load the models of finished runs with their best weights on validation.

    All models get the batches of the first run whose data are generated or read in the same way, from the validation
    split. Without a batch size, it is that of the first run's evaluation; without threads, each run gets as many as it
    had. Raises ConfigError for a run that is not finished, or whose folder or data are not here.
    """
    found: list[Subject] = []
    known: dict[str, tuple[DataSplits, list[Batch]]] = {}  # description of the data -> the first run's data and batches
    for name in names:
        row = find_run(store, name)
        config = _config(row)
        if batch_size is None:
            batch_size = config.training_params.eval_batch_size or config.batch_size
        options = config.training_params
        runtime = Runtime(options.device if device is None else device, options.precision)
        folder = run_folder(str(row["experiment_id"]))
        if not in_folder(folder, MODEL_FILE).exists():
            raise ConfigError(
                f"run {row['experiment_id']}: no weights in {folder}. Call from the directory it was run in."
            )
        description = read_description(folder)
        model = load_model(config, description, folder, runtime)
        set_execution(model, execution_of(options))
        if options.compile:
            compile_blocks(model)
        place = f"{config.dataset_type} {config.dataset_name} {config.dataset_params} {runtime.device}"
        if place not in known:
            data = load_splits(config.dataset_type, config.dataset_name, config.dataset_params, config.seed)
            known[place] = data, timed_batches(data.validation.batches(batch_size, runtime.device))
        data, batches = known[place]
        if data.vocab_size > description["vocab_size"] or data.max_length > description["max_length"]:
            raise ConfigError(
                f"run {row['experiment_id']}: the data are no longer those that it was trained on: they have other "
                "tokens or longer samples. Put the data back as they were."
            )
        had = stored_object(row["env_details_json"]).get("num_threads")
        threads = num_threads or (had if isinstance(had, int) and had > 0 else torch.get_num_threads())
        found.append(
            Subject(
                str(row["experiment_id"]),
                config,
                Timed(model, batches, runtime),
                min(batch_size, max(len(batch.labels) for batch in batches)),
                threads if num_threads else min(threads, usable_cores()),
            )
        )
    return found


def _config(row: dict[str, Any]) -> ExperimentConfig:
    """The config of a run. Raises ConfigError for a run that is not finished."""
    source = f"run {row['experiment_id']}"
    if row["status"] != "finished":
        raise ConfigError(f"{source} is {row['status']}: only finished runs are measured")
    stored = parse_json(str(row["full_config_json"]), f"{source}: its config")
    if not isinstance(stored, dict):
        raise ConfigError(f"{source}: its config is no JSON object")
    return stored_config(stored, source=source)


def measure(found: Sequence[Subject], repetitions: int = REPETITIONS) -> list[Measured]:
    """Time the models in turn. Each repetition begins with another model, so that no model always comes first."""
    before = torch.get_num_threads()
    seconds: list[list[list[float]]] = [[] for _ in found]
    try:
        for subject in found:  # warm-up
            _repetition(subject)
        meter = LoadMeter()
        for repetition in range(repetitions):
            for place in range(len(found)):
                number = (repetition + place) % len(found)
                seconds[number].append(_repetition(found[number]))
    finally:
        torch.set_num_threads(before)
    load = meter.share(computes=all(subject.timed.runtime.device.type == "cpu" for subject in found))
    arrays = [np.array(one) for one in seconds]
    return [Measured(subject, array, arrays[0], load) for subject, array in zip(found, arrays, strict=True)]


def _repetition(subject: Subject) -> list[float]:
    """The seconds of each batch, with the threads of the run."""
    if torch.get_num_threads() != subject.num_threads:
        torch.set_num_threads(subject.num_threads)
    return subject.timed.repetition()


def differing_conditions(found: Sequence[Subject]) -> list[str]:
    """What keeps the times of the models from being comparable, in words; empty if nothing does."""
    sentences = []
    settings = {
        "CPU threads": [str(one.num_threads) for one in found],
        "devices": [str(one.timed.runtime.device) for one in found],
        "precisions": [str(one.timed.runtime.precision) for one in found],
        "batch sizes": [str(one.batch_size) for one in found],
    }
    for what, values in settings.items():
        if len(set(values)) > 1:
            sentences.append(f"the models have different {what}: {', '.join(dict.fromkeys(values))}")
    if len({id(one.timed.batches) for one in found}) > 1:
        sentences.append("the models were measured on different samples, because their runs have different data")
    return sentences
