"""A trained language model that writes, scores and is exported; and `load`, which opens any run.

B batch  L tokens of a text  V vocabulary
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from research_eval.datasets.language.stream import TokenStream, encoded
from research_eval.datasets.language.vocabulary import decode, encode, piece_bytes, piece_characters
from research_eval.datasets.providers import load_splits
from research_eval.errors import ConfigError
from research_eval.files import CONFIG_FILE, MODEL_FILE, write_atomically
from research_eval.generation.decoding import Generated, generate, prompt_ids
from research_eval.generation.sampling import SamplingSettings
from research_eval.models.language.base import LanguageModel
from research_eval.registry import NEXT_TOKEN
from research_eval.routing.token_classes import TokenReport
from research_eval.runs.ensemble import Ensemble
from research_eval.runs.locate import find_folder
from research_eval.runs.predict import (
    EXPERIMENT,
    TrainedModel,
    load_model,
    read_config,
    read_description,
    read_tokenizer,
)
from research_eval.runs.token_report import token_report
from research_eval.system.phases import phase
from research_eval.system.untrusted import in_folder
from research_eval.tasks.next_token import NextToken
from research_eval.training.evaluate import evaluate
from research_eval.training.runtime import Runtime

EXPORTED_TYPE = "graph_of_experts"  # `model_type` of an exported config.json
BATCH_SIZE = 16


class TrainedLanguageModel:
    """The language model of a finished run, with the weights of its best validation loss. `load` makes one.

    `config` is the complete config of the run. `model` is the torch module in evaluation mode. `tokenizer` has the
    vocabulary of the training. `max_length` is the number of tokens that the model sees at once.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        """Read the folder of a run, or an exported model. Raises ConfigError for files that are missing or damaged."""
        self.folder = folder
        self.config = read_config(folder)
        self._description = read_description(folder)
        if self._description["task"] != NEXT_TOKEN:
            raise ConfigError(
                f"run {folder.name} is a {self._description['task']} model, which writes no text: use "
                f"`goe predict --run {folder.name}`"
            )
        tokenizer = read_tokenizer(folder, self._description["vocab_size"])
        if tokenizer is None:
            raise ConfigError(f"{folder}: tokenizer.json is missing: no text can be read or written without it.")
        self.tokenizer = tokenizer
        self._runtime = Runtime(device, self.config.training_params.precision)
        with phase("building the model"):
            model = load_model(self.config, self._description, folder, self._runtime)
        assert isinstance(model, LanguageModel)
        self.model = model
        self.max_length: int = self._description["max_length"]

    def generate(self, prompt: str = "", **settings: Any) -> str | list[str]:
        r"""Text that continues a prompt, without the prompt; a list for `num_samples` above 1.

        The settings are those of `SamplingSettings`, such as temperature=0.8, top_p=0.9, max_new_tokens=100 or
        stop=("\\n\\n",). Raises ConfigError for a value outside its range, or a prompt with unknown characters.
        """
        found = self.samples(prompt, SamplingSettings(**settings))
        texts = [one.text for one in found]
        return texts if len(texts) > 1 else texts[0]

    def check_prompt(self, prompt: str) -> None:
        """Raise ConfigError for a prompt that the vocabulary cannot write."""
        prompt_ids(self.tokenizer, prompt)

    def samples(
        self,
        prompt: str,
        settings: SamplingSettings,
        use_cache: bool = True,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generated]:
        """The samples for a prompt, with their tokens and the speed. The others as in `decoding.generate`."""
        with self._runtime.autocast():
            return generate(self.model, self.tokenizer, prompt, settings, self.max_length, use_cache, on_text)

    def loss(self, text: str) -> dict[str, float]:
        """The scores of a text under the model: "loss" (nats per token), "perplexity", "bits_per_byte" and others.

        The text is read in blocks, as in the evaluation of a training. Raises ConfigError for less than two tokens.
        """
        tokens, _ = encoded(self.tokenizer, [text])
        if len(tokens) < 2:
            raise ConfigError("text: expected at least two tokens, because the first one has nothing before it")
        batches = TokenStream.of(tokens, self.max_length).batches(BATCH_SIZE, self._runtime.device)
        task = NextToken(piece_bytes(self.tokenizer), piece_characters(self.tokenizer))
        found = evaluate(self.model, batches, self._description["vocab_size"], self._runtime, task)
        return {"loss": found.loss, **found.scores}

    def logits(self, text: str) -> NDArray[np.float32]:
        """The logits after each token of a text that fits into one block, [L, V]. Raises ConfigError otherwise."""
        ids = encode(self.tokenizer, text)
        if not 0 < len(ids) <= self.max_length:
            raise ConfigError(f"text: expected 1 to {self.max_length} tokens, got {len(ids)}")
        ids_1L = torch.from_numpy(ids).long().unsqueeze(0).to(self._runtime.device)
        with torch.inference_mode(), self._runtime.autocast():
            found: NDArray[np.float32] = self.model.pass_over(ids_1L).outputs[0].float().cpu().numpy()
        return found

    def validation_text(self) -> str:
        """The validation text of the run, from its data. Raises ConfigError if the data cannot be read."""
        config = self.config
        data = load_splits(
            config.dataset_type, config.dataset_name, config.dataset_params, config.seed, tokenizer=self.tokenizer
        )
        return decode(self.tokenizer, data.validation.tokens.tolist())

    def tokens_of(self, text: str, max_tokens: int) -> TokenReport:
        """What the model does with each token of a text. Raises ConfigError for less than two tokens."""
        tokens, _ = encoded(self.tokenizer, [text])
        if len(tokens) < 2:
            raise ConfigError("text: expected at least two tokens, because the first one has nothing before it")
        batches = TokenStream.of(tokens[:max_tokens], self.max_length).batches(BATCH_SIZE, self._runtime.device)
        return token_report(self.model, batches, self.tokenizer, self._runtime, max_tokens)

    def export(self, out: Path) -> None:
        """Write weights, config and tokenizer into a new folder, which `load` and transformers open without the run.

        Raises ConfigError for a folder that has something in it.
        """
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out: {out} is not an empty folder. Give another name.")
        unfinished = out.with_name(f"{out.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        config = {
            "model_type": EXPORTED_TYPE,
            "architectures": ["GraphOfExpertsForCausalLM"],
            "vocab_size": self._description["vocab_size"],
            "max_position_embeddings": self.max_length,
            EXPERIMENT: self.config.to_dict(),
            "data": self._description,
        }
        shutil.copyfile(in_folder(self.folder, MODEL_FILE), unfinished / MODEL_FILE)
        shutil.copyfile(in_folder(self.folder, "tokenizer.json"), unfinished / "tokenizer.json")
        write_atomically(unfinished / CONFIG_FILE, json.dumps(config, indent=2).encode())
        defaults = {"do_sample": True, "temperature": 1.0, "pad_token_id": 0, "use_cache": False}
        write_atomically(unfinished / "generation_config.json", json.dumps(defaults, indent=2).encode())
        if out.exists():
            out.rmdir()
        unfinished.rename(out)


def load(
    run: str | Path | Sequence[str | Path], *, db: str | None = None, device: str = "auto"
) -> TrainedModel | TrainedLanguageModel | Ensemble:
    """The trained model of a run: `research_eval.load("runs/20260531-101500-0a1b2c3d")`.

    A classifier is a `TrainedModel`, which predicts; a language model is a `TrainedLanguageModel`, which generates.
    Of several classifiers, such as the seeds of a config, it is an `Ensemble`: the mean of their probabilities.

    `run` is the folder of a run, which may be a copy without a database or the training data; an exported model; or an
    experiment id, a unique beginning of one, or "latest" (the run that started last). Ids are looked up in the results
    `db` (default: $GOE_DB, else experiment_results.db). `device` is auto, cpu, cuda, cuda:N or mps. No file is
    unpickled. Raises ConfigError for an unknown run, one without weights, or files that are damaged.
    """
    if not isinstance(run, str | Path):
        if not run:
            raise ConfigError("load: expected at least one run, got none")
        return Ensemble([find_folder(one, db) for one in run], device)
    folder = find_folder(run, db)
    is_language = read_description(folder)["task"] == NEXT_TOKEN
    return TrainedLanguageModel(folder, device) if is_language else TrainedModel(folder, device)
