"""Text -> token ids: training a tokenizer, and encoding with it.

S tokens in all  N samples
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from research_eval.annotations import Range, Younger
from research_eval.datasets.text.normalizing import UnicodeForm, normalizer_of, word_splitter
from research_eval.errors import ConfigError
from research_eval.system.phases import report

TokenizerKind = Literal["word", "wordpiece", "bpe"]
Truncation = Literal["head", "head_tail"]

PAD, UNK = "[PAD]", "[UNK]"
UNK_ID = 1  # [PAD] is 0
MAX_ALPHABET = 1000  # characters that WordPiece and BPE start from
ENCODE_ROWS = 1000  # texts per call: bounds the memory held by encodings


@dataclass(frozen=True)
class TokenizerSettings:
    """What is trained as the tokenizer, and how texts are changed for it; the fields are options of `dataset_params`.

    Everything that changes a text is an option here: `lowercase` (accents and vowel signs stay), `strip_accents` (of
    Latin, Greek and Cyrillic letters), `unicode_form` (texts that look the same become equal), `turkish_i` (I becomes
    ı, and İ becomes i), `html_line_breaks` (`<br />` becomes a blank) and `drop_invisible` (control characters and
    marks of the writing direction vanish). Raises ConfigError for options that do not fit each other.
    """

    tokenizer: TokenizerKind = "word"
    tokenizer_vocab_size: Annotated[int, Field(ge=100, le=1_000_000)] = 20_000
    min_frequency: Annotated[int, Field(ge=1), Range(1, 4)] = 2
    lowercase: bool = True
    strip_accents: Annotated[bool, Younger()] = False
    unicode_form: Annotated[UnicodeForm, Younger()] = "nfc"
    turkish_i: Annotated[bool, Younger()] = False
    html_line_breaks: Annotated[bool, Younger()] = True
    drop_invisible: Annotated[bool, Younger()] = True

    def __post_init__(self) -> None:
        if self.turkish_i and not self.lowercase:
            raise ConfigError("turkish_i=true says how capitals become small letters: set lowercase to true")


DEFAULT_TOKENIZER = TokenizerSettings()


def train_tokenizer(
    texts: Sequence[str], kind: TokenizerKind, vocab_size: int, min_frequency: int, lowercase: bool, **changes: Any
) -> Tokenizer:
    """A tokenizer with [PAD] = 0 and [UNK] = 1. `changes` are the options of `normalizer_of`.

    The same texts give the same tokenizer in every process. Raises ConfigError if no word occurs `min_frequency` times.
    """
    normalizer = normalizer_of(lowercase, **changes)
    tokenizer, trainer = _untrained(texts, kind, vocab_size, min_frequency, normalizer)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = word_splitter()
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    # A user's text may contain "[PAD]". A special token would match there, and 0 must stay padding, so the special
    # tokens become plain entries of the vocabulary.
    plain = Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "added_tokens": []}))
    if plain.get_vocab_size() <= 2:
        raise ConfigError(f"dataset_params.min_frequency={min_frequency}: no word is that frequent. Lower it.")
    return plain


def _untrained(
    texts: Sequence[str], kind: TokenizerKind, vocab_size: int, min_frequency: int, normalizer: normalizers.Normalizer
) -> tuple[Tokenizer, trainers.Trainer]:
    """A tokenizer that knows only its unknown token, and the trainer that fills its vocabulary."""
    options: dict[str, Any] = {"vocab_size": vocab_size, "min_frequency": min_frequency, "show_progress": False}
    if kind == "word":
        return Tokenizer(models.WordLevel(unk_token=UNK)), trainers.WordLevelTrainer(
            **options, special_tokens=[PAD, UNK]
        )
    characters = _alphabet(texts, normalizer, limit=min(MAX_ALPHABET, vocab_size // 4))
    options |= {"initial_alphabet": characters, "limit_alphabet": len(characters)}
    # The library numbers characters inside (##x) or at the end (x</w>) of a word in the order of a hash table, which
    # differs between processes, and it merges equally frequent pairs by number. As special tokens they get fixed
    # numbers.
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
        tokenizer.decoder = decoders.WordPiece()
        inner = [f"##{character}" for character in characters]
        return tokenizer, trainers.WordPieceTrainer(**options, special_tokens=[PAD, UNK, *inner])
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder()
    last = [f"{character}</w>" for character in characters]
    trainer = trainers.BpeTrainer(**options, special_tokens=[PAD, UNK, *last], end_of_word_suffix="</w>")
    return tokenizer, trainer


def _alphabet(texts: Sequence[str], normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    """The `limit` most frequent characters, in the order of their code points."""
    counts: Counter[str] = Counter()
    # A letter and its accent may be two characters that the normalizer makes one, so it has to see the whole text.
    whole = "".join(text if text.isascii() else normalizer.normalize_str(text) for text in texts)
    for character, count in Counter(whole).items():
        for part in normalizer.normalize_str(character).split():
            counts.update(dict.fromkeys(part, count))
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted(by_frequency[:limit])


def words_of(tokenizer: Tokenizer) -> list[str | None]:
    """The word, or the part of one, of every id; None for padding and unknown words."""
    words: list[str | None] = [None] * tokenizer.get_vocab_size()
    for piece, number in tokenizer.get_vocab().items():
        words[number] = None if number <= UNK_ID else piece.removeprefix("##").removesuffix("</w>")
    return words


def special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind a text; none with a tokenizer that the program trained."""
    if tokenizer.post_processor is None:
        return [], []
    encoding = tokenizer.encode("a")
    own = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
    return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]


class EncodedTexts(NamedTuple):
    """`tokens` [S]; sample i is `tokens[offsets[i]:offsets[i + 1]]`, of the `full_lengths[i]` tokens of its text."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    full_lengths: NDArray[np.int32]


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int, truncation: Truncation = "head"
) -> EncodedTexts:
    """Texts -> ids, cut to `max_length`; a text without tokens becomes one [UNK].

    `head_tail` keeps the first quarter of `max_length` and the rest from the end (Sun et al., 2019). The special tokens
    of a pretrained model's tokenizer stand around each text, within `max_length`. Raises ConfigError if they leave no
    room.
    """
    before, behind = special_ids(tokenizer)
    around, room = len(before) + len(behind), max_length - len(before) - len(behind)
    if room < 1:
        raise ConfigError(f"dataset_params.max_length={max_length}: expected more than the {around} special tokens")
    head = room if truncation == "head" else room // 4
    tail = room - head
    tokens, full_lengths, lengths = [np.zeros(0, np.int32)], [], []
    for start in range(0, len(texts), ENCODE_ROWS):
        report(f"{start / len(texts):.0%}")
        encodings = tokenizer.encode_batch_fast(texts[start : start + ENCODE_ROWS], add_special_tokens=False)
        rows = [encoding.ids or [UNK_ID] for encoding in encodings]
        full_lengths += [len(row) + around for row in rows]
        rows = [row if len(row) <= room else row[:head] + row[len(row) - tail :] for row in rows]
        if around:
            rows = [[*before, *row, *behind] for row in rows]
        tokens.append(np.fromiter(chain.from_iterable(rows), np.int32))
        lengths += [len(row) for row in rows]
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return EncodedTexts(np.concatenate(tokens), offsets, np.array(full_lengths, np.int32))
