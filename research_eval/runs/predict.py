"""Predictions of a trained model on new input, with the path of each text.

B batch  N texts  O outputs per text
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from tokenizers import Tokenizer

from research_eval.annotations import Count, Natural
from research_eval.config.check import config_from_dict
from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.text import UNK, UNK_ID, encode_texts
from research_eval.datasets.text.normalizing import has_our_steps
from research_eval.datasets.token_data import CLASSIFICATION, Batches, TokenData
from research_eval.errors import ConfigError
from research_eval.files import run_folder
from research_eval.models.base_model import EvaluableModel, adapt, logits_of
from research_eval.registry import TASKS
from research_eval.runs.prepare import check_model_fits, create_model
from research_eval.store.find import find_run
from research_eval.store.store import Store
from research_eval.system.untrusted import check_regular_file, in_folder, parse_json, read_limited
from research_eval.tasks.base import Task
from research_eval.training.checkpoint import load_tensors, load_weights
from research_eval.training.checkpointer import MODEL_FILE
from research_eval.training.runtime import Runtime
from research_eval.wording import hint, printable

BATCH_SIZE = 64
MAX_FILE_BYTES = 100_000_000  # of a file of texts, and of a tokenizer
MAX_DESCRIPTION_BYTES = 10_000_000  # of `data.json`


@dataclass(frozen=True)
class Prediction:
    """Class probabilities (in the order of `label_names`) and, for a routed model, its experts in order.

    For a task without classes, `values` holds the outputs of the model, and the other two lists are empty.
    """

    text: str
    label_names: list[str]
    probabilities: list[float]
    path: list[int] | None
    values: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The most probable class. Raises ValueError for a task without classes."""
        if not self.probabilities:
            raise ValueError("a task without classes has no likeliest class: see `values`")
        return self.label_names[int(np.argmax(self.probabilities))]

    def __str__(self) -> str:
        """Lines for a terminal: the text, its answers from the most to the least probable, and the path if any."""
        order = np.argsort(self.probabilities)[::-1]
        answers = [f"{printable(self.label_names[index])} {self.probabilities[index]:.4f}" for index in order]
        answers += [f"{value:.6g}" for value in self.values]
        path = "" if self.path is None else f"\n  path: {' -> '.join(['start', *map(str, self.path), 'stop'])}"
        return f"{printable(self.text)}\n  {'  '.join(answers)}{path}"


def predict(run_id: str, texts: list[str], *, db: str | None = None, device: str = "auto") -> list[Prediction]:
    """One prediction per text, with the run's best weights on validation.

    `run_id` is an experiment id, a unique prefix of one, or "latest". For a synthetic task, a text is a line of token
    ids. Raises ConfigError for an unknown run, a run without weights, or a text that is no valid input.
    """
    with Store(db, read_only=True) as store:
        row = find_run(store, run_id)
    source = f"run {row['experiment_id']}"
    stored = parse_json(str(row["full_config_json"]), f"{source}: its config")
    if not isinstance(stored, dict):
        raise ConfigError(f"{source}: its config is no JSON object, but {printable(str(stored)[:80])}")
    config = config_from_dict(stored, source=source)
    folder = run_folder(str(row["experiment_id"]))
    if not in_folder(folder, MODEL_FILE).exists():
        raise ConfigError(
            f"run {row['experiment_id']} ({row['status']}): no weights in {folder}. "
            "Call from the directory it was run in."
        )
    description = read_description(folder)
    runtime = Runtime(device, config.training_params.precision)
    model = load_model(config, description, folder, runtime)
    data = encode(texts, config, description, folder)
    batches = Batches(data, BATCH_SIZE, runtime.device)
    task: Task = TASKS[description["task"]]()
    answers_NO, has_classes = np.zeros((len(texts), description["num_classes"])), True
    paths: list[list[int] | None] = [None] * len(texts)
    # Batches come sorted by length; `rows` puts the answers back into the order of the texts.
    for rows in batches.order(0):
        batch = batches.take(rows)
        model.start_recording()  # so that the recorder holds the paths of this batch only
        with torch.no_grad(), runtime.autocast():
            outputs_BO = logits_of(model, batch)
        probabilities_BO = task.probabilities(outputs_BO.float())
        has_classes = probabilities_BO is not None
        answers_NO[rows] = (outputs_BO.float() if probabilities_BO is None else probabilities_BO).cpu().numpy()
        recorded = model.recorded_paths()
        if recorded is not None:
            for index, path in zip(rows, recorded, strict=True):
                paths[index] = [int(expert) for expert in path if expert >= 0]
    names = class_names(description)
    return [
        Prediction(text, names, answers, path) if has_classes else Prediction(text, [], [], path, answers)
        for text, answers, path in zip(texts, answers_NO.tolist(), paths, strict=True)
    ]


class Description(BaseModel):
    """The content of `data.json`: the sizes of the run's data, and the task of the model.

    `num_classes` is the number of outputs of the task. For classification, `label_names` has a name for each output.
    The check is strict, because the file may come from another machine.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    vocab_size: Count
    num_classes: Count
    padding_idx: Natural
    max_length: Count
    label_names: list[str]
    task: str = CLASSIFICATION


def read_description(folder: Path) -> dict[str, Any]:
    """Read and check `data.json` of a run's folder. Raises ConfigError."""
    path = in_folder(folder, "data.json")
    content = parse_json(read_limited(path, MAX_DESCRIPTION_BYTES, "what a run writes"), str(path))
    try:
        found = Description.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ConfigError(f"{path}: {where}: {first['msg']}. Run the experiment again.") from error
    if found.task not in TASKS:
        raise ConfigError(f"{path}: task: unknown {found.task!r}.{hint(found.task, TASKS)}")
    unnamed = found.task == CLASSIFICATION and len(found.label_names) != found.num_classes
    if unnamed or found.padding_idx >= found.vocab_size:
        raise ConfigError(f"{path}: its numbers do not go together. Run the experiment again.")
    return found.model_dump()


def class_names(description: Mapping[str, Any]) -> list[str]:
    """A name for each output. If the classes have no names, such as next tokens, their numbers are the names."""
    names, number = list(description["label_names"]), int(description["num_classes"])
    return names if len(names) == number else [str(one) for one in range(number)]


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a run's folder; None if it has none.

    Raises ConfigError for a tokenizer that this program does not write, because the file may come from elsewhere.
    """
    path = in_folder(folder, "tokenizer.json")
    if not path.exists():
        return None
    text = read_limited(path, MAX_FILE_BYTES, "a tokenizer")
    content = parse_json(text, str(path))
    try:
        if not isinstance(content, dict) or not has_our_steps(content):
            raise ValueError("holds steps that no run of ours has")
        tokenizer = Tokenizer.from_str(text.decode())
        largest = max(tokenizer.get_vocab().values(), default=-1)
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{path}: not a tokenizer of ours: {error}. Run the experiment again.") from error
    if tokenizer.token_to_id(UNK) != UNK_ID:
        raise ConfigError(f"{path}: {UNK} is not {UNK_ID}: not a tokenizer of ours. Run the experiment again.")
    if largest >= vocab_size:
        raise ConfigError(f"{path}: id {largest} is beyond the vocabulary of {vocab_size}. Run the experiment again.")
    return tokenizer


def load_model(config: ExperimentConfig, description: dict[str, Any], folder: Path, runtime: Runtime) -> EvaluableModel:
    """Build the model of a run's folder and load its weights; it is in evaluation mode.

    Raises ConfigError for a model that is larger than the memory, and for weights that do not fit it.
    """
    context = {name: description[name] for name in ("vocab_size", "num_classes", "padding_idx", "max_length")}
    check_model_fits(config.model_type, config.model_params, context, copies=1)
    model = adapt(create_model(config.model_type, config.model_params, context, runtime.device), config.model_type)
    weights, _ = load_tensors(in_folder(folder, MODEL_FILE))
    load_weights(model, weights, folder / MODEL_FILE)
    return model.eval()


def encode(texts: list[str], config: ExperimentConfig, description: dict[str, Any], folder: Path) -> TokenData:
    """Convert texts to tokens as in the run's training. The labels are zeros, because they are unknown."""
    labels = np.zeros(len(texts), np.int64)
    tokenizer = read_tokenizer(folder, description["vocab_size"])
    if tokenizer is not None:
        params = config.dataset_params
        encoded = encode_texts(tokenizer, texts, params["max_length"], params["truncation"])
        return TokenData(encoded.tokens, encoded.offsets, labels)
    rows = [_token_ids(text, description["vocab_size"]) for text in texts]
    offsets = np.cumsum([0, *map(len, rows)])
    return TokenData(np.array([token for row in rows for token in row], np.int32), offsets, labels)


def _token_ids(text: str, vocab_size: int) -> list[int]:
    """The token ids in a line of text. Raises ConfigError for anything else."""
    words = text.split()
    # At most nine digits, so that `int` never meets a huge number, which it rejects with a ValueError.
    if not words or not all(re.fullmatch(r"[0-9]{1,9}", word) and 0 < int(word) < vocab_size for word in words):
        raise ConfigError(
            f"text: expected token ids from 1 to {vocab_size - 1} with blanks between them, got {text[:80]!r}"
        )
    return [int(word) for word in words]


def read_texts(path: str) -> list[str]:
    """The non-empty lines of a UTF-8 file, one text each.

    Raises ConfigError for a file that is missing, empty, too large or not text.
    """
    file = Path(path)
    try:
        check_regular_file(file)
    except ConfigError as error:
        raise ConfigError(f"--file: cannot read {path} as text: {error}") from error
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"--file: {path} is larger than {MAX_FILE_BYTES:,} bytes: split it")
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file: cannot read {path} as text: {error}") from error
    if not lines:
        raise ConfigError(f"--file: {path} has no text")
    return lines
