"""Texts from a language model, token by token, with or without a cache.

B samples  L tokens that the model sees  V vocabulary
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from research_eval.datasets.language.vocabulary import StreamDecoder, encode, eos_id, num_special, unknown_characters
from research_eval.errors import ConfigError
from research_eval.generation.sampling import SamplingSettings, generators, next_tokens
from research_eval.models.language.base import LanguageModel
from research_eval.wording import shown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """One sample: its text without the prompt, its tokens, and why it ended ("length", "stop" or "eos").

    `tokens_per_second` is the speed of the whole batch of samples.
    """

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: str
    sample: int
    seed: int
    tokens_per_second: float


class Window:
    """The tokens that the model sees: the last ones, at most `capacity`.

    Positions are those in the window. Once it is full, it starts again from the last `capacity` / 2 tokens, with a
    cache and without. So both give the same logits for ever.
    """

    def __init__(self, model: LanguageModel, ids_BL: Tensor, capacity: int, use_cache: bool) -> None:
        self._model, self._capacity, self._use_cache = model, capacity, use_cache
        self._ids_BL = ids_BL[:, -capacity:]
        self._cache = model.new_cache(capacity)

    def logits(self) -> Tensor:
        """Logits [B, V] of the token after the window."""
        if not self._use_cache:
            return self._model.decode(self._ids_BL, self._model.new_cache(self._capacity))[:, -1]
        return self._model.decode(self._ids_BL[:, self._cache.length :], self._cache)[:, -1]

    def append(self, tokens_B: Sequence[int]) -> None:
        """Add a token to each sample."""
        new_B1 = torch.tensor(tokens_B, device=self._ids_BL.device).unsqueeze(1)
        self._ids_BL = torch.cat([self._ids_BL, new_B1], 1)
        if self._ids_BL.shape[1] > self._capacity:
            self._ids_BL = self._ids_BL[:, -max(self._capacity // 2, 1) :]
            self._cache = self._model.new_cache(self._capacity)


class StopFilter:
    """Passes text on, but holds back what may be the beginning of a stop text. It prints no stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.has_stopped = False

    def push(self, text: str) -> str:
        """The text that is certainly before any stop text."""
        if self.has_stopped:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.has_stopped = True
            return self._held[: min(places)]
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        passed, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return passed

    def finish(self) -> str:
        """What was held back, after the last text."""
        return "" if self.has_stopped else self._held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that a stop text begins with."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt; an empty one is `<eos>`, or a line break where the vocabulary has no `<eos>`.

    Raises ConfigError for characters outside the vocabulary, and for an empty prompt that cannot be replaced.
    """
    unknown = unknown_characters(tokenizer, prompt)
    if unknown:
        names = ", ".join(shown(character) for character in unknown[:10])
        raise ConfigError(f"prompt: the vocabulary of the run has no {names}. Write it with other characters.")
    eos = eos_id(tokenizer)
    if prompt or eos is None:
        ids = encode(tokenizer, prompt or "\n").tolist()
        if not prompt and (not ids or ids[0] < num_special(tokenizer)):
            raise ConfigError("prompt: the vocabulary has no line break to start from. Give a prompt.")
        return [eos, *ids] if eos is not None else list(ids)
    return [eos]


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    settings: SamplingSettings,
    capacity: int,
    use_cache: bool = True,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generated]:
    """The samples for one prompt. `capacity` is the largest number of tokens that the model sees at once.

    `on_text` receives the number of a sample and its next piece of text as soon as it is certain. A prompt longer than
    `capacity` loses its beginning, with a warning. Raises ConfigError for a prompt that cannot be encoded.
    """
    start = prompt_ids(tokenizer, prompt)
    if len(start) > capacity:
        log.warning("prompt: %d tokens; the model sees the last %d", len(start), capacity)
    device = next(model.parameters()).device
    count, special = settings.num_samples, num_special(tokenizer)
    eos = eos_id(tokenizer)
    never = [number for number in range(special) if number != eos]
    window = Window(model, torch.tensor([start] * count, device=device), capacity, use_cache)
    writers = [_Writer(tokenizer, settings, number, eos, on_text) for number in range(count)]
    draws, seen = generators(settings), [list(start) for _ in range(count)]
    begun, steps = time.perf_counter(), 0
    with torch.inference_mode(), one_thread(device):
        for _ in range(settings.max_new_tokens):
            tokens = next_tokens(window.logits(), seen, settings, draws, never)
            steps += 1
            for writer, token, known in zip(writers, tokens, seen, strict=True):
                writer.take(token)
                known.append(token)
            if all(writer.reason for writer in writers):
                break
            window.append(tokens)
    speed = steps * count / max(time.perf_counter() - begun, 1e-9)
    return [
        Generated(prompt, writer.end(), writer.tokens, writer.reason or "length", number, settings.seed, speed)
        for number, writer in enumerate(writers)
    ]


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Within the block a CPU computes with one thread: for a single token, threads wait longer than they work."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Writer:
    """The text of one sample as its tokens arrive."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: SamplingSettings,
        number: int,
        eos: int | None,
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self._decoder, self._filter = StreamDecoder(tokenizer), StopFilter(settings.stop)
        self._number, self._eos, self._on_text = number, eos, on_text
        self._parts: list[str] = []
        self.tokens: list[int] = []
        self.reason = ""

    def take(self, token: int) -> None:
        """The next token; ignored after the end."""
        if self.reason:
            return
        if token == self._eos:
            self.reason = "eos"
            return
        self.tokens.append(token)
        self._write(self._filter.push(self._decoder.push(token)))
        if self._filter.has_stopped:
            self.reason = "stop"

    def end(self) -> str:
        """The whole text, after the last token."""
        if self.reason != "stop":
            self._write(self._filter.push(self._decoder.finish()))
            self._write(self._filter.finish())
            if self._filter.has_stopped:
                self.reason = "stop"
        return "".join(self._parts)

    def _write(self, text: str) -> None:
        if text:
            self._parts.append(text)
            if self._on_text is not None:
                self._on_text(self._number, text)
