"""The folder of a run: its lock, and the files that describe the run to `predict`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import filelock

from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.token_data import CLASSIFICATION, DataSplits
from research_eval.errors import RunIsBusy
from research_eval.files import CONFIG_FILE, LOCK_FILE, run_folder, write_atomically
from research_eval.system.untrusted import in_folder
from research_eval.tasks.base import task_of

CLAIM_SECONDS = 1.0  # `is_at_work` of another process may hold the lock for a moment


def new_id() -> str:
    """A new run id: the UTC time, so that ids sort by time, and 32 random bits, so that no registry is needed."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


@contextmanager
def claimed_folder(experiment_id: str) -> Iterator[Path]:
    """Create and lock the run's folder for the block. Raises RunIsBusy while another process works in it.

    Two processes that resume the same run at once then cannot overwrite each other's checkpoints.
    """
    folder = run_folder(experiment_id)
    lock = in_folder(folder, LOCK_FILE)
    folder.mkdir(parents=True, exist_ok=True)  # a resumed run has its folder already
    try:
        with filelock.FileLock(lock, timeout=CLAIM_SECONDS):
            for unfinished in folder.glob("*.tmp"):  # left by a process that was killed while writing
                unfinished.unlink()
            yield folder
    except filelock.Timeout as error:
        raise RunIsBusy(
            f"run {experiment_id} is being trained by another process: wait for it, or drop --resume"
        ) from error


def save_description(folder: Path, config: ExperimentConfig, data: DataSplits) -> None:
    """Write the files that `predict` needs in addition to the weights: config, class names and tokenizer.

    `num_classes` is the number of outputs of the task, as for the model's constructor. Classification is the default
    task, so it is not written.
    """
    name = config.task or data.task
    description = {
        "vocab_size": data.vocab_size,
        "num_classes": task_of(name, data).num_outputs(data),
        "padding_idx": data.padding_idx,
        "max_length": data.max_length,
        "label_names": data.label_names,
        **({} if name == CLASSIFICATION else {"task": name}),
    }
    write_atomically(folder / CONFIG_FILE, json.dumps(config.to_dict(), indent=2).encode())
    write_atomically(folder / "data.json", json.dumps(description, indent=2).encode())
    if data.tokenizer is not None:
        write_atomically(folder / "tokenizer.json", data.tokenizer.to_str().encode())
