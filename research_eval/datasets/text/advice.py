"""Which tokenizer knows more of the words, found by trying the others on a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from research_eval.datasets.text.tokenizer import UNK_ID, TokenizerSettings, encode_texts, train_tokenizer
from research_eval.errors import ConfigError

TRAIN_ROWS, SCORED_ROWS = 2000, 500
MAX_VOCABULARY = 1_000_000
MAX_CHARACTERS = 400  # of a text: a sample of long documents would take seconds
MUCH_BETTER = 0.5  # share of the unknown tokens that a better tokenizer leaves at most


def tokenizer_advice(train_texts: Sequence[str], other_texts: Sequence[str], settings: TokenizerSettings) -> str:
    """A sentence that names the option with the fewest unknown tokens, or says that none helps much.

    The tokenizers are trained on a sample of `train_texts` and score one of `other_texts`.
    """
    train, scored = _sample(train_texts, TRAIN_ROWS), _sample(other_texts, SCORED_ROWS)
    choices = {
        f'"tokenizer": "{kind}"': replace(settings, tokenizer=kind)
        for kind in ("bpe", "wordpiece")
        if kind != settings.tokenizer
    }
    if settings.min_frequency > 1:
        choices['"min_frequency": 1'] = replace(settings, min_frequency=1)
    larger = min(4 * settings.tokenizer_vocab_size, MAX_VOCABULARY)
    choices[f'"tokenizer_vocab_size": {larger}'] = replace(settings, tokenizer_vocab_size=larger)
    shares = {option: _unknown_share(train, scored, choice) for option, choice in choices.items()}
    present = _unknown_share(train, scored, settings)
    best = min(shares, key=lambda option: shares[option])
    if shares[best] > MUCH_BETTER * present:
        return "Other options of the tokenizer leave about as many."
    return f"{best} leaves {shares[best]:.1%} of a sample unknown instead of {present:.1%}."


def _sample(texts: Sequence[str], size: int) -> list[str]:
    """At most `size` texts from all over, cut to their beginnings."""
    return [texts[row][:MAX_CHARACTERS] for row in np.linspace(0, len(texts) - 1, min(size, len(texts))).astype(int)]


def _unknown_share(train: Sequence[str], scored: Sequence[str], settings: TokenizerSettings) -> float:
    """The share of unknown tokens in `scored`; 1 if nothing is frequent enough for a tokenizer."""
    options = asdict(settings)
    try:
        tokenizer = train_tokenizer(train, options.pop("tokenizer"), options.pop("tokenizer_vocab_size"), **options)
    except ConfigError:
        return 1.0
    return float((encode_texts(tokenizer, scored, MAX_CHARACTERS).tokens == UNK_ID).mean())
