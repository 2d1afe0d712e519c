"""Probabilities of a trained model for new input, and the path it took."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from research_eval.datasets.token_data import Batches, TokenData
from research_eval.db_utils import Store
from research_eval.errors import ConfigError
from research_eval.experiment import create_model, run_folder
from research_eval.models.base_model import EvaluableModel, adapt, logits_of
from research_eval.schema import ExperimentConfig, config_from_dict
from research_eval.training.checkpoint import load_tensors
from research_eval.training.fit import MODEL_FILE
from research_eval.training.runtime import Runtime

BATCH_SIZE = 64
MAX_FILE_BYTES = 100_000_000


@dataclass(frozen=True)
class Prediction:
    """Class probabilities (in the order of `label_names`) and, for routed models, the experts in order."""

    text: str
    label_names: list[str]
    probabilities: list[float]
    path: list[int] | None

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.label_names[int(np.argmax(self.probabilities))]

    def __str__(self) -> str:
        order = np.argsort(self.probabilities)[::-1]
        shares = "  ".join(f"{self.label_names[index]} {self.probabilities[index]:.4f}" for index in order)
        path = "" if self.path is None else f"\n  path: {' -> '.join(['start', *map(str, self.path), 'stop'])}"
        return f"{self.text}\n  {shares}{path}"


def predict(run_id: str, texts: list[str], *, db: str | None = None, device: str = "auto") -> list[Prediction]:
    """One prediction per text, from the run's best weights on validation.

    `run_id` is an experiment id or a unique beginning of one. A text of a synthetic task is a line of token ids.
    Raises ConfigError for an unknown run, one without weights, or a text that is not input for it.
    """
    with Store(db, read_only=True) as store:
        row = store.experiment(run_id)
    config = config_from_dict(json.loads(row["full_config_json"]), source=f"run {row['experiment_id']}")
    folder = run_folder(str(row["experiment_id"]))
    if not (folder / MODEL_FILE).is_file():
        raise ConfigError(
            f"run {row['experiment_id']} ({row['status']}): no weights in {folder}. "
            "Call from the directory it was run in."
        )
    description = json.loads((folder / "data.json").read_text())
    runtime = Runtime(device, config.training_params.precision)
    model = load_model(config, description, folder, runtime)
    data = encode(texts, config, description, folder)
    batches = Batches(data, BATCH_SIZE, runtime.device)
    probabilities = np.zeros((len(texts), description["num_classes"]))
    paths: list[list[int] | None] = [None] * len(texts)
    for rows in batches.order(0):
        batch = batches.take(rows)
        model.start_recording()
        with torch.no_grad(), runtime.autocast():
            logits_BC = logits_of(model, batch)
        probabilities[rows] = logits_BC.float().softmax(-1).cpu().numpy()
        recorded = model.recorded_paths()
        if recorded is not None:
            for index, path in zip(rows, recorded, strict=True):
                paths[index] = [int(expert) for expert in path if expert >= 0]
    names = description["label_names"]
    return [
        Prediction(text, names, shares.tolist(), path)
        for text, shares, path in zip(texts, probabilities, paths, strict=True)
    ]


def load_model(config: ExperimentConfig, description: dict[str, Any], folder: Path, runtime: Runtime) -> EvaluableModel:
    """The trained model of a run's folder, in evaluation mode."""
    context = {name: description[name] for name in ("vocab_size", "num_classes", "padding_idx", "max_length")}
    model = adapt(create_model(config.model_type, config.model_params, context, runtime.device), config.model_type)
    weights, _ = load_tensors(folder / MODEL_FILE)
    model.load_state_dict(weights)
    return model.eval()


def encode(texts: list[str], config: ExperimentConfig, description: dict[str, Any], folder: Path) -> TokenData:
    """Texts as the run's model saw them in training."""
    labels = np.zeros(len(texts), np.int64)
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        from research_eval.datasets.text import encode_texts

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        params = config.dataset_params
        encoded = encode_texts(tokenizer, texts, params["max_length"], params["truncation"])
        return TokenData(encoded.tokens, encoded.offsets, labels)
    rows = [_token_ids(text, description["vocab_size"]) for text in texts]
    offsets = np.cumsum([0, *map(len, rows)])
    return TokenData(np.array([token for row in rows for token in row], np.int32), offsets, labels)


def _token_ids(text: str, vocab_size: int) -> list[int]:
    words = text.split()
    # No id has ten digits, and `int` refuses thousands.
    if not words or not all(re.fullmatch(r"[0-9]{1,9}", word) and 0 < int(word) < vocab_size for word in words):
        raise ConfigError(
            f"text: expected token ids from 1 to {vocab_size - 1} with blanks between them, got {text[:80]!r}"
        )
    return [int(word) for word in words]


def read_texts(path: str) -> list[str]:
    """The non-empty lines of a UTF-8 file. Raises ConfigError."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"--file: {path} is larger than {MAX_FILE_BYTES:,} bytes: split it")
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file: cannot read {path} as text: {error}") from error
    if not lines:
        raise ConfigError(f"--file: {path} has no text")
    return lines
