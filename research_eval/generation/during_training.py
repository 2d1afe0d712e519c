"""Texts that a language model writes while it is trained, so that one can read what it has learned."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.language.vocabulary import decode
from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError
from research_eval.files import SAMPLES_FILE, write_atomically
from research_eval.generation.decoding import generate, prompt_ids
from research_eval.generation.sampling import SamplingSettings
from research_eval.models.base_model import EvaluableModel
from research_eval.models.language.base import LanguageModel
from research_eval.system.best_effort import attempted
from research_eval.training.runtime import Runtime
from research_eval.wording import printable

log = logging.getLogger(__name__)

TEMPERATURE = 0.8
SEED = 0  # the same draws after every evaluation: the texts differ by the weights alone


class TrainingSamples:
    """Shows a text after each evaluation, and keeps all of them in `samples.jsonl` in the run's folder.

    The prompt is what the model starts from without one: `<eos>` or a line break, else the first character of the
    validation text. The model has to be in evaluation mode. A text that cannot be written is a warning.
    """

    def __init__(self, config: ExperimentConfig, data: DataSplits, runtime: Runtime, folder: Path) -> None:
        self._length = config.training_params.sample_during_training
        self._data, self._runtime, self._file = data, runtime, folder / SAMPLES_FILE

    def write(self, step: int, model: EvaluableModel) -> None:
        """Add the sample of a step. Those of later steps, which a resumed training makes again, are dropped."""
        if not self._length:
            return
        with attempted(log, f"the sample after step {step}"):
            text = self._sample(model)
            log.info("a sample after %d steps:\n%s", step, "\n".join(map(printable, text.split("\n"))))
            known = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
            lines = [line for line in known if json.loads(line)["step"] < step]
            lines.append(json.dumps({"step": step, "text": text}))
            write_atomically(self._file, "".join(f"{line}\n" for line in lines).encode())

    def _sample(self, model: EvaluableModel) -> str:
        tokenizer = self._data.tokenizer
        assert isinstance(model, LanguageModel)
        assert tokenizer is not None
        settings = SamplingSettings(self._length, TEMPERATURE, seed=SEED)
        prompt = ""
        try:
            prompt_ids(tokenizer, prompt)
        except ConfigError:
            prompt = decode(tokenizer, self._data.validation.tokens[:1].tolist())
        with self._runtime.autocast():
            (found,) = generate(model, tokenizer, prompt, settings, self._data.max_length)
        return (prompt + found.text)[: self._length]
