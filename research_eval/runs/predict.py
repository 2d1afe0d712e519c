"""Predictions of a trained model on new input, with the path of each text.

    model = research_eval.load("runs/20260531-101500-0a1b2c3d")
    for prediction in model.predict(["a good film", "a bad film"]):
        print(prediction.label, prediction.probabilities, prediction.path)

B batch  N texts  O outputs per text
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from tokenizers import Tokenizer

from research_eval.annotations import Count, Natural
from research_eval.config.check import stored_config
from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.kinds import dataset_kind
from research_eval.datasets.language import vocabulary
from research_eval.datasets.text import UNK, UNK_ID, TextDataset, encode_texts
from research_eval.datasets.text.normalizing import has_our_steps
from research_eval.datasets.text.pretrained import has_known_steps
from research_eval.datasets.text.source import FILE_TYPES, file_type
from research_eval.datasets.token_data import CLASSIFICATION, Batches, TokenData
from research_eval.errors import ConfigError
from research_eval.files import CONFIG_FILE, MODEL_FILE
from research_eval.models.base_model import EvaluableModel, adapt
from research_eval.registry import NEXT_TOKEN, TASKS
from research_eval.runs.inputs import MAX_FILE_BYTES, STDIN, Input
from research_eval.runs.inputs import read_texts as read_texts
from research_eval.runs.locate import find_folder
from research_eval.runs.prepare import check_model_fits, create_model
from research_eval.system.phases import phase
from research_eval.system.untrusted import in_folder, parse_json, read_limited, user_path
from research_eval.tasks.base import Task
from research_eval.training.checkpoint import load_tensors, load_weights
from research_eval.training.runtime import Runtime
from research_eval.wording import hint, printable

log = logging.getLogger(__name__)

EXPERIMENT = "experiment"  # key of an exported config.json that holds the config of the run

BATCH_SIZE = 64
BATCHES_AT_ONCE = 64  # whose inputs are sorted by length together; their answers come together
MAX_CONFIG_BYTES = 1_000_000  # of `config.json`
MAX_DESCRIPTION_BYTES = 10_000_000  # of `data.json`


@dataclass(frozen=True)
class Prediction:
    """Class probabilities (in the order of `label_names`) and, for a routed model, its experts in order.

    For a task without classes, `values` holds the outputs of the model, and the other two lists are empty. `text` is
    the input; for a sequence of token ids it has them with blanks between them.
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

    @property
    def is_blank(self) -> bool:
        """Whether the input has nothing but white space."""
        return not self.text.strip()

    def __str__(self) -> str:
        """Lines for a terminal: the text, its answers from the most to the least probable, and the path if any."""
        order = np.argsort(self.probabilities)[::-1]
        answers = [f"{printable(self.label_names[index])} {self.probabilities[index]:.4f}" for index in order]
        answers += [f"{value:.6g}" for value in self.values]
        path = "" if self.path is None else f"\n  path: {' -> '.join(['start', *map(str, self.path), 'stop'])}"
        text = "(blank)" if self.is_blank else printable(self.text)
        return f"{text}\n  {'  '.join(answers) or 'no answer'}{path}"


TokenIds = Sequence[int] | NDArray[np.integer[Any]]


class TrainedModel:
    """The model of a finished run, with the weights that the validation split has selected. `load` makes one.

    `config` is the complete config of the run, `model` the torch module in evaluation mode, `tokenizer` that of the
    training (None for generated sequences), and `label_names` has the classes in the order of the outputs. It is empty
    for a task without classes, whose model gives `num_outputs` numbers. `max_length` is that of a sequence, in tokens.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        """Read the folder of a run. Raises ConfigError for files that are missing, damaged or not of one run."""
        self.folder = folder
        self.config = read_config(folder)
        self._description = read_description(folder)
        if self._description["task"] == NEXT_TOKEN:
            raise ConfigError(f"run {folder.name} is a language model: use `goe generate --run {folder.name}`")
        self.tokenizer = read_tokenizer(folder, self._description["vocab_size"])
        self._runtime = Runtime(device, self.config.training_params.precision)
        self.task: Task = TASKS[self._description["task"]]()
        with phase("building the model"):
            self.model = load_model(self.config, self._description, folder, self._runtime)
        self.num_outputs: int = self._description["num_classes"]
        has_classes = self.task.probabilities(torch.zeros(1, self.num_outputs)) is not None
        self.label_names = class_names(self._description) if has_classes else []
        params = self.config.dataset_params
        is_text = self.tokenizer is not None and "max_length" in params
        self.max_length: int = params["max_length"] if is_text else self._description["max_length"]

    def predict(self, inputs: Sequence[str | TokenIds], *, batch_size: int | None = None) -> list[Prediction]:
        """One prediction per input, in the order of the inputs (N).

        An input is a text, or a sequence of token ids (whole numbers from 1; a list or an array [L]). For a generated
        task a text is a line of token ids. A text that is longer than `max_length` tokens is cut as in the training,
        and one warning says how many are. A blank text is one unknown token. The answers do not depend on the other
        inputs or on `batch_size` (default 64), except for rounding.

        Raises ConfigError for a single text instead of a list, for a batch size below 1, and for an input that is no
        valid sequence: no token, an id outside the vocabulary, or more than `max_length` ids.
        """
        if isinstance(inputs, str | bytes):
            raise ConfigError("predict: expected a list of texts, got one text: put it into a list")
        batch_size = BATCH_SIZE if batch_size is None else batch_size
        if batch_size < 1:
            raise ConfigError(f"batch_size: expected a whole number of at least 1, got {batch_size}")
        names = ["text"] if len(inputs) == 1 else [f"input {number}" for number in range(1, len(inputs) + 1)]
        data = self._encode(inputs, names)
        texts = [one if isinstance(one, str) else " ".join(map(str, np.asarray(one).tolist())) for one in inputs]
        return list(self._answers(texts, data, batch_size))

    def answers(self, inputs: Sequence[Input]) -> Iterator[Prediction]:
        """The predictions for what was read, in its order. All inputs are checked before the first prediction.

        A blank line among the sequences of a generated task has no answer: its `probabilities` and `values` are empty.
        """
        is_asked = [self.tokenizer is not None or not one.file or bool(one.text.strip()) for one in inputs]
        asked = [one for one, is_one in zip(inputs, is_asked, strict=True) if is_one]
        texts = [one.text for one in asked]
        found = self._answers(texts, self._encode(texts, [one.where for one in asked]), BATCH_SIZE)
        return (
            next(found) if is_one else Prediction(one.text, self.label_names, [], None)
            for one, is_one in zip(inputs, is_asked, strict=True)
        )

    def read_inputs(self, paths: Sequence[str]) -> list[Input]:
        """The texts of files in their order: the lines of a text file, or the text column of a table.

        A table ends with .csv, .tsv, .jsonl or .parquet, and its column has the name that it has in the data of the
        run. "-" is standard input, as lines. Raises ConfigError for a file that cannot be read.
        """
        found = []
        for path in paths:
            texts = self._read_texts(path)
            found += [Input(path, number, text) for number, text in enumerate(texts, 1)]
            if not texts:
                log.warning("%s: no texts", "standard input" if path == STDIN else path)
        return found

    def _read_texts(self, path: str) -> list[str]:
        if path == STDIN or file_type(path) not in FILE_TYPES:
            return read_texts(path)
        config = self.config
        dataset = dataset_kind(config.dataset_type).build(config.dataset_name, config.dataset_params)
        if not isinstance(dataset, TextDataset):
            dataset = TextDataset(dataset_name="any")  # whose column is `text`
        return dataset.read_texts(user_path(path, "--file"))

    def _encode(self, inputs: Sequence[str | TokenIds], names: Sequence[str]) -> TokenData:
        """Inputs as tokens, as in the run's training. The labels are zeros, because they are unknown.

        `names` are what messages call the inputs. Raises ConfigError for an input that is no valid sequence.
        """
        rows: list[NDArray[np.int32]] = [np.zeros(0, np.int32)] * len(inputs)
        texts = {place: one for place, one in enumerate(inputs) if isinstance(one, str) and self.tokenizer is not None}
        if texts and self.tokenizer is not None:
            truncation = self.config.dataset_params.get("truncation", "head")
            with phase(f"tokenising {len(texts):,} texts"):
                encoded = encode_texts(self.tokenizer, list(texts.values()), self.max_length, truncation)
            for place, first, last in zip(texts, encoded.offsets[:-1], encoded.offsets[1:], strict=True):
                rows[place] = encoded.tokens[first:last]
            num_cut = int((encoded.full_lengths > self.max_length).sum())
            if num_cut:
                log.warning(
                    "%d of %d texts: longer than %d tokens (max_length), cut as in the training (%s)",
                    *(num_cut, len(texts), self.max_length, truncation),
                )
        for place, (one, name) in enumerate(zip(inputs, names, strict=True)):
            if place not in texts:
                rows[place] = self._token_ids(one, name)
        offsets = np.cumsum([0, *map(len, rows)])
        return TokenData(np.concatenate([np.zeros(0, np.int32), *rows]), offsets, np.zeros(len(rows), np.int64))

    def _token_ids(self, given: str | TokenIds, name: str) -> NDArray[np.int32]:
        """A checked sequence of token ids [L], from a line of text or from numbers. Raises ConfigError."""
        largest = self._description["vocab_size"] - 1
        if isinstance(given, str):
            # At most nine digits, so that `int` never meets a huge number, which it rejects with a ValueError.
            ids = [int(word) if re.fullmatch(r"[0-9]{1,9}", word) else 0 for word in given.split()]
        else:
            array = np.asarray(given)
            ids = array.tolist() if array.ndim == 1 and array.dtype.kind in "iu" else []
        if not ids or not all(0 < number <= largest for number in ids):
            shown = given if isinstance(given, str) else str(given)
            raise ConfigError(
                f"{name}: expected token ids from 1 to {largest} with blanks between them, got {shown[:80]!r}"
            )
        if len(ids) > self.max_length:
            raise ConfigError(
                f"{name}: {len(ids)} tokens, but a sequence of this task has at most {self.max_length} (max_length)"
            )
        return np.array(ids, np.int32)

    def _answers(self, texts: Sequence[str], data: TokenData, batch_size: int) -> Iterator[Prediction]:
        """One prediction per text, in their order."""
        names, step = self.label_names, batch_size * BATCHES_AT_ONCE
        batches = Batches(data, batch_size, self._runtime.device)
        for start in range(0, len(texts), step):
            rows = np.arange(start, min(start + step, len(texts)))
            outputs_NO, paths = self._outputs(batches, rows)
            for text, answers, path in zip(texts[start : start + step], outputs_NO.tolist(), paths, strict=True):
                yield Prediction(text, names, answers, path) if names else Prediction(text, [], [], path, answers)

    def _outputs(self, batches: Batches, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], list[list[int] | None]]:
        """Probabilities, or for a task without classes outputs, of these rows, and the path of each if there are paths.

        Inputs of similar length share a batch. The answers are in the order of `rows`.
        """
        outputs_NO = np.zeros((len(rows), self.num_outputs))
        paths: list[list[int] | None] = [None] * len(rows)
        by_length = np.argsort(batches.data.lengths[rows], kind="stable")
        self.model.start_recording()
        recorder = self.model.recorder()
        if recorder is not None:
            recorder.wants = "paths"
        outputs = []
        for first in range(0, len(rows), batches.batch_size):
            batch = batches.take(rows[by_length[first : first + batches.batch_size]])
            with torch.no_grad(), self._runtime.autocast():
                outputs.append(self.model.run(batch).outputs.float())
        joined_NO = torch.cat(outputs)
        probabilities_NO = self.task.probabilities(joined_NO)
        outputs_NO[by_length] = (joined_NO if probabilities_NO is None else probabilities_NO).cpu().numpy()
        recorded = self.model.recorded_paths()
        if recorded is not None:
            for place, path in zip(by_length.tolist(), recorded.tolist(), strict=True):
                paths[place] = [expert for expert in path if expert >= 0]
        self.model.stop_recording()
        return outputs_NO, paths


def load(run: str | Path, *, db: str | None = None, device: str = "auto") -> TrainedModel:
    """The trained model of a run, ready to predict: `research_eval.load("runs/20260531-101500-0a1b2c3d")`.

    `run` is the folder of a run, which may be a copy without a database or the training data, or an experiment id, a
    unique beginning of one, or "latest" (the run that started last). Ids are looked up in the results `db` (default:
    $GOE_DB, else experiment_results.db). `device` is auto, cpu, cuda, cuda:N or mps. No file is unpickled. Raises
    ConfigError for an unknown run, one without weights, or files that are damaged.
    """
    return TrainedModel(find_folder(run, db), device)


def predict(run_id: str, texts: list[str], *, db: str | None = None, device: str = "auto") -> list[Prediction]:
    """One prediction per text, with the run's best weights on validation: `load(run_id).predict(texts)`.

    Raises ConfigError for an unknown run, a run without weights, or a text that is no valid input.
    """
    return load(run_id, db=db, device=device).predict(texts)


def read_config(folder: Path) -> ExperimentConfig:
    """Read and check `config.json` of a run's folder, or of an exported model. Raises ConfigError."""
    path, content = _config_file(folder)
    experiment = content.get(EXPERIMENT, content)
    if not isinstance(experiment, dict):
        raise ConfigError(f"{path}: {EXPERIMENT}: no JSON object. Export the model again.")
    return stored_config(experiment, source=str(path))


def _config_file(folder: Path) -> tuple[Path, dict[str, Any]]:
    """`config.json` and its content. In an exported model it holds the config of the run and the sizes of its data."""
    path = in_folder(folder, CONFIG_FILE)
    content = parse_json(read_limited(path, MAX_CONFIG_BYTES, "a config"), str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: no JSON object, but {printable(str(content)[:80])}")
    return path, content


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
    config_path, config = _config_file(folder)
    if EXPERIMENT in config:
        path, content = config_path, config.get("data")
    else:
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
        is_language = vocabulary.kind_in_json(content) is not None
        known = isinstance(content, dict) and (has_our_steps(content) or has_known_steps(content))
        if not is_language and not known:
            raise ValueError("holds steps that no run of ours has")
        tokenizer = Tokenizer.from_str(text.decode())
        largest = max(tokenizer.get_vocab().values(), default=-1)
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{path}: not a tokenizer of ours: {error}. Run the experiment again.") from error
    unknown = vocabulary.UNK if is_language else UNK
    if tokenizer.token_to_id(unknown) != UNK_ID:
        raise ConfigError(f"{path}: {unknown} is not {UNK_ID}: not a tokenizer of ours. Run the experiment again.")
    if largest >= vocab_size:
        raise ConfigError(f"{path}: id {largest} is beyond the vocabulary of {vocab_size}. Run the experiment again.")
    return tokenizer


def load_model(config: ExperimentConfig, description: dict[str, Any], folder: Path, runtime: Runtime) -> EvaluableModel:
    """Build the model of a run's folder and load its weights; it is in evaluation mode.

    Raises ConfigError for a model that is larger than the memory, and for weights that do not fit it.
    """
    context = {name: description[name] for name in ("vocab_size", "num_classes", "padding_idx", "max_length")}
    check_model_fits(config.model_type, config.model_params, context, copies=1, task=config.task_name)
    model = adapt(
        create_model(config.model_type, config.model_params, context, runtime.device, config.task_name),
        config.model_type,
    )
    weights, _ = load_tensors(in_folder(folder, MODEL_FILE))
    load_weights(model, weights, folder / MODEL_FILE)
    model.eval().stop_recording()  # until an evaluation asks for records
    return model
