"""Probabilities of a trained model for new input, and the path it took."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from tokenizers import Tokenizer

from research_eval.annotations import Count, Natural
from research_eval.datasets.text import LINE_BREAK, UNK, UNK_ID, encode_texts
from research_eval.datasets.token_data import Batches, TokenData
from research_eval.db_utils import Store
from research_eval.errors import ConfigError
from research_eval.experiment import check_model_fits, create_model, run_folder
from research_eval.models.base_model import EvaluableModel, adapt, logits_of
from research_eval.schema import ExperimentConfig, config_from_dict
from research_eval.system.untrusted import check_regular_file, in_folder, parse_json, read_limited
from research_eval.training.checkpoint import load_tensors, load_weights
from research_eval.training.fit import MODEL_FILE
from research_eval.training.runtime import Runtime
from research_eval.wording import printable

BATCH_SIZE = 64
MAX_FILE_BYTES = 100_000_000
MAX_DESCRIPTION_BYTES = 10_000_000


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
        shares = "  ".join(f"{printable(self.label_names[index])} {self.probabilities[index]:.4f}" for index in order)
        path = "" if self.path is None else f"\n  path: {' -> '.join(['start', *map(str, self.path), 'stop'])}"
        return f"{printable(self.text)}\n  {shares}{path}"


def predict(run_id: str, texts: list[str], *, db: str | None = None, device: str = "auto") -> list[Prediction]:
    """One prediction per text, from the run's best weights on validation.

    `run_id` is an experiment id or a unique beginning of one. A text of a synthetic task is a line of token ids.
    Raises ConfigError for an unknown run, one without weights, or a text that is not input for it.
    """
    with Store(db, read_only=True) as store:
        row = store.experiment(run_id)
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


class Description(BaseModel):
    """What `data.json` holds: how the run's data were numbered."""

    model_config = ConfigDict(strict=True, extra="forbid")
    vocab_size: Count
    num_classes: Count
    padding_idx: Natural
    max_length: Count
    label_names: list[str]


def read_description(folder: Path) -> dict[str, Any]:
    """`data.json` of a run's folder. Raises ConfigError."""
    path = in_folder(folder, "data.json")
    content = parse_json(read_limited(path, MAX_DESCRIPTION_BYTES, "what a run writes"), str(path))
    try:
        found = Description.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ConfigError(f"{path}: {where}: {first['msg']}. Run the experiment again.") from error
    if len(found.label_names) != found.num_classes or found.padding_idx >= found.vocab_size:
        raise ConfigError(f"{path}: its numbers do not go together. Run the experiment again.")
    return found.model_dump()


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a run's folder, if it has one. Raises ConfigError for one that we would not have written."""
    path = in_folder(folder, "tokenizer.json")
    if not path.exists():
        return None
    text = read_limited(path, MAX_FILE_BYTES, "a tokenizer")
    content = parse_json(text, str(path))
    try:
        if not isinstance(content, dict) or not _is_ours(content):
            raise ValueError("holds steps that no run of ours has")
        tokenizer = Tokenizer.from_str(text.decode())
        largest = max(tokenizer.get_vocab().values(), default=-1)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path}: not a tokenizer of ours: {error}. Run the experiment again.") from error
    if tokenizer.token_to_id(UNK) != UNK_ID:
        raise ConfigError(f"{path}: {UNK} is not {UNK_ID}: not a tokenizer of ours. Run the experiment again.")
    if largest >= vocab_size:
        raise ConfigError(f"{path}: id {largest} is beyond the vocabulary of {vocab_size}. Run the experiment again.")
    return tokenizer


def _is_ours(content: dict[str, Any]) -> bool:
    """Whether all but the vocabulary is what `train_tokenizer` makes: a foreign pattern may take for ever."""
    normalizer, words = content.get("normalizer"), content.get("pre_tokenizer")
    steps = normalizer.get("normalizers") if isinstance(normalizer, dict) else None
    return (
        isinstance(steps, list)
        and [step.get("type") for step in steps if isinstance(step, dict)] == ["Replace", "BertNormalizer"]
        and steps[0].get("pattern") == {"Regex": LINE_BREAK}
        and steps[0].get("content") == " "
        and isinstance(words, dict)
        and words.get("type") == "BertPreTokenizer"
        and not any(content.get(key) for key in ("post_processor", "added_tokens", "truncation", "padding"))
    )


def load_model(config: ExperimentConfig, description: dict[str, Any], folder: Path, runtime: Runtime) -> EvaluableModel:
    """The trained model of a run's folder, in evaluation mode."""
    context = {name: description[name] for name in ("vocab_size", "num_classes", "padding_idx", "max_length")}
    check_model_fits(config.model_type, config.model_params, context, copies=1)
    model = adapt(create_model(config.model_type, config.model_params, context, runtime.device), config.model_type)
    weights, _ = load_tensors(in_folder(folder, MODEL_FILE))
    load_weights(model, weights, folder / MODEL_FILE)
    return model.eval()


def encode(texts: list[str], config: ExperimentConfig, description: dict[str, Any], folder: Path) -> TokenData:
    """Texts as the run's model saw them in training."""
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
