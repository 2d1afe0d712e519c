"""Vocabularies of running text: characters, bytes, words or byte pairs, each as a `tokenizers.Tokenizer`.

Id 0 is padding and 1 `<unk>`. Id 2 is `<eos>` if documents are separated. They are plain entries of the vocabulary, and
no text can spell them: a text that holds "<eos>" is encoded as five characters. The kind of a tokenizer follows from
its JSON, so that a run's `tokenizer.json` is all that another program needs.

V ids of the vocabulary  S tokens
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from research_eval.errors import ConfigError
from research_eval.system.phases import report

TokenizerKind = Literal["char", "byte", "word", "bpe"]

PAD, UNK, EOS = "<pad>", "<unk>", "<eos>"
PAD_ID, UNK_ID, EOS_ID = 0, 1, 2
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
NUM_BYTES = 256
ENCODE_ROWS = 64  # chunks per call of the library: bounds the memory held by its encodings
CHUNK = 20_000  # characters of a chunk at least

# Every character of a text belongs to exactly one match, so that the matches joined are the text. No match holds
# characters from both sides of the end of a run of line breaks: a text may be cut there before it is encoded.
ANY = r"[\s\S]"
WORD = r" ?[\p{L}\p{M}\p{N}]+(?:['’][\p{L}\p{M}\p{N}]+)*|[^\p{L}\p{M}\p{N}]"
PAIRED = (
    r" ?[\p{L}\p{M}]+(?:['’][\p{L}\p{M}]+)*| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\n+|"
    r"[^\S\n]+(?!\S)|[^\S\n]+"  # of several blanks before a word, the last one belongs to the word
)


def special_tokens(separated: bool) -> list[str]:
    """The special tokens by id; `separated` says whether the text has documents."""
    return [PAD, UNK, EOS] if separated else [PAD, UNK]


def eos_id(tokenizer: Tokenizer) -> int | None:
    """The id of `<eos>`; None if the text of the tokenizer has no documents."""
    found: int | None = tokenizer.token_to_id(EOS)
    return found


# -------------------------------------------------------------------------------------------------------- construction


def build_tokenizer(kind: TokenizerKind, texts: Sequence[str], separated: bool, vocab_size: int) -> Tokenizer:
    """The tokenizer of the training split. `vocab_size` counts the special tokens; only word and bpe use it.

    char: one id per character, in the order of code points. byte: id = byte + number of special tokens. word: the most
    frequent pieces. bpe: byte pairs, numbered after the bytes in the order of their merges. The same texts give the
    same tokenizer in every process. Raises ConfigError for a bpe vocabulary that cannot hold all bytes.
    """
    special = special_tokens(separated)
    if kind == "char":
        return _assembled(kind, [*special, *sorted(set().union(*map(set, texts)))])
    if kind == "byte":
        return _assembled(kind, [*special, *_letters()])
    if kind == "word":
        return _assembled(kind, [*special, *_frequent_words(texts, vocab_size - len(special))])
    least = NUM_BYTES + len(special)
    if vocab_size < least:
        raise ConfigError(f"dataset_params.vocab_size={vocab_size}: bpe needs {least} or more, an id for each byte")
    merges = _merges(texts, vocab_size - len(special))
    joined = dict.fromkeys(first + second for first, second in merges)  # two merges may give the same piece
    return _assembled(kind, [*special, *_letters(), *joined], merges)


def _assembled(kind: TokenizerKind, pieces: list[str], merges: list[tuple[str, str]] | None = None) -> Tokenizer:
    """A tokenizer of this kind whose ids are the places in `pieces`."""
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(vocabulary, merges or []))
    else:
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = {"char": _split(ANY), "word": _split(WORD)}.get(kind) or pre_tokenizers.Sequence(
        [_byte_level(), _split(ANY)] if kind == "byte" else [_split(PAIRED), _byte_level()]
    )
    tokenizer.decoder = decoders.Fuse() if kind in ("char", "word") else decoders.ByteLevel()
    return tokenizer


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@cache
def _letters() -> tuple[str, ...]:
    """The letter that the library writes for each byte: the byte's own if it can be printed, else one from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printed]
    code = {byte: byte for byte in printed} | {byte: 256 + place for place, byte in enumerate(others)}
    return tuple(chr(code[byte]) for byte in range(NUM_BYTES))


def _frequent_words(texts: Iterable[str], number: int) -> list[str]:
    """The most frequent pieces, at most `number`; of equally frequent ones the first in the order of code points."""
    tokenizer = Tokenizer(models.WordLevel({UNK: 0}, unk_token=UNK))
    tokenizer.pre_tokenizer = _split(WORD)
    trainer = trainers.WordLevelTrainer(vocab_size=max(number, 0), min_frequency=1, show_progress=False)
    tokenizer.train_from_iterator(_chunks_of(texts), trainer)
    found = tokenizer.get_vocab()
    return sorted(found, key=lambda word: found[word])


def _merges(texts: Iterable[str], vocab_size: int) -> list[tuple[str, str]]:
    """The byte pairs to be joined, in their order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_split(PAIRED), _byte_level()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, initial_alphabet=sorted(_letters()), show_progress=False
    )
    tokenizer.train_from_iterator(_chunks_of(texts), trainer)
    return [(first, second) for first, second in json.loads(tokenizer.to_str())["model"]["merges"]]


def chunks(text: str) -> Iterator[str]:
    """The text in parts that can be encoded one by one: each ends behind a run of line breaks."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + CHUNK)
        while 0 <= end < len(text) and text[end] == "\n":
            end += 1
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def _chunks_of(texts: Iterable[str]) -> Iterator[str]:
    return chain.from_iterable(map(chunks, texts))


# ------------------------------------------------------------------------------------------------- reading a tokenizer


def _steps(content: dict[str, Any]) -> str:
    """What a tokenizer does besides looking pieces up, as text. A newer library may write further keys of the model."""
    model = content["model"]
    others = [content.get(key) or None for key in ("normalizer", "post_processor", "added_tokens")]
    others += [content.get(key) or None for key in ("truncation", "padding")] + [model.get("dropout") or None]
    return json.dumps([model.get("type"), content.get("pre_tokenizer"), content.get("decoder"), others], sort_keys=True)


@cache
def _kind_of_steps() -> dict[str, TokenizerKind]:
    return {_steps(json.loads(_assembled(kind, [PAD, UNK]).to_str())): kind for kind in get_args(TokenizerKind)}


def kind_in_json(content: Any) -> TokenizerKind | None:
    """The kind of the tokenizer whose parsed JSON this is; None for one that this module does not write."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        return None
    return _kind_of_steps().get(_steps(content))


@dataclass(frozen=True)
class _Tables:
    """What is needed of a tokenizer to encode and decode without it."""

    kind: TokenizerKind
    pieces: tuple[bytes, ...]  # [V] in UTF-8; empty for special tokens
    num_special: int
    id_of_code: NDArray[np.int32]  # char: code point -> id; empty for the other kinds


@lru_cache(maxsize=8)  # a tokenizer is its own key, which is right because no caller changes one
def _tables(tokenizer: Tokenizer) -> _Tables:
    kind = kind_in_json(json.loads(tokenizer.to_str()))
    if kind is None:
        raise ConfigError("this tokenizer is none of a language model of ours (char, byte, word or bpe)")
    found = tokenizer.get_vocab()
    names = sorted(found, key=lambda name: found[name])
    special = 3 if found.get(EOS) == EOS_ID else 2
    if [found[name] for name in names] != list(range(len(names))) or names[:special] != special_tokens(special == 3):
        raise ConfigError("this tokenizer does not begin with <pad>, <unk> (and <eos>), or has gaps between its ids")
    if kind in ("byte", "bpe"):
        byte_of = {letter: bytes([byte]) for byte, letter in enumerate(_letters())}
        pieces = [b"".join(byte_of[letter] for letter in name) for name in names[special:]]
    else:
        pieces = [name.encode() for name in names[special:]]
    id_of_code = np.zeros(0, np.int32)
    if kind == "char":
        codes = np.array([ord(name) for name in names[special:]], np.int64)
        id_of_code = np.full(int(codes.max(initial=0)) + 2, UNK_ID, np.int32)  # the last one stands for all beyond
        id_of_code[codes] = np.arange(special, len(names), dtype=np.int32)
    return _Tables(kind, (b"",) * special + tuple(pieces), special, id_of_code)


def kind_of(tokenizer: Tokenizer) -> TokenizerKind:
    """char, byte, word or bpe. Raises ConfigError for a tokenizer that this module does not write."""
    return _tables(tokenizer).kind


def num_special(tokenizer: Tokenizer) -> int:
    """How many special tokens there are: 2, or 3 with `<eos>`. Their ids come first."""
    return _tables(tokenizer).num_special


def piece_texts(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """The text of each id [V] in UTF-8, empty for special tokens. A piece of byte or bpe may be part of a character."""
    return _tables(tokenizer).pieces


def piece_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The bytes of each id's text [V], 0 for special tokens."""
    return np.array([len(piece) for piece in piece_texts(tokenizer)], np.int64)


def piece_characters(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The characters of each id's text [V], 0 for special tokens.

    A character counts where its first byte is, so that sums over a text are exact even if pieces cut characters.
    """
    return np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in piece_texts(tokenizer)], np.int64)


# -------------------------------------------------------------------------------------------------- encoding, decoding


def encode(tokenizer: Tokenizer, text: str) -> NDArray[np.int32]:
    """The ids of a text [S], without special tokens except `<unk>`."""
    return encode_many(tokenizer, [text])[0]


def encode_many(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The ids of all texts one after the other [S], and how many of them each text has."""
    tables = _tables(tokenizer)
    if tables.kind == "char":
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        last = len(tables.id_of_code) - 1
        ids = tables.id_of_code[np.minimum(codes, last) if codes.max(initial=0) > last else codes]
        return ids, np.fromiter(map(len, texts), np.int64, len(texts))
    if tables.kind == "byte":
        parts = [whole_characters(text).encode() for text in texts]
        ids = np.frombuffer(b"".join(parts), np.uint8).astype(np.int32) + np.int32(tables.num_special)
        return ids, np.fromiter(map(len, parts), np.int64, len(parts))
    return _encode_in_chunks(tokenizer, texts)


def _encode_in_chunks(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """`encode_many` with the library, chunk by chunk: one call for a long text would hold much memory."""
    found, lengths = [np.zeros(0, np.int32)], np.zeros(len(texts), np.int64)
    waiting: list[tuple[int, str]] = []

    def flush() -> None:
        encodings = tokenizer.encode_batch_fast([chunk for _, chunk in waiting], add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        for (number, _), row in zip(waiting, ids, strict=True):
            lengths[number] += len(row)
        found.append(np.fromiter(chain.from_iterable(ids), np.int32))
        waiting.clear()

    for number, text in enumerate(texts):
        for chunk in chunks(whole_characters(text)):
            waiting.append((number, chunk))
            if len(waiting) == ENCODE_ROWS:
                report(f"{number / len(texts):.0%}")
                flush()
    flush()
    return np.concatenate(found), lengths


def whole_characters(text: str) -> str:
    """The text with half surrogate pairs, which a command line may hold and UTF-8 cannot, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if has_surrogates(text) else text


def has_surrogates(text: str) -> bool:
    """Whether a text holds half surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of the ids. `<unk>` and bytes that are no UTF-8 become U+FFFD; padding and `<eos>` have no text."""
    decoder = StreamDecoder(tokenizer)
    return "".join(map(decoder.push, ids)) + decoder.finish()


class StreamDecoder:
    """Decodes ids one by one and gives whole characters only: the first bytes of a character wait for the others."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = list(piece_texts(tokenizer))
        pieces[UNK_ID] = REPLACEMENT.encode()
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that are complete with this id; "" if none is."""
        return self._decoder.decode(self._pieces[token])

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, mostly ""."""
        return self._decoder.decode(b"", final=True)


def unknown_characters(tokenizer: Tokenizer, text: str) -> list[str]:
    """The characters of a text that its ids cannot give back, each once; for word, the pieces that are not known."""
    kind, found = kind_of(tokenizer), tokenizer.get_vocab()
    parts: Iterable[str] = text
    if kind == "word":
        parts = (piece for piece, _ in _split(WORD).pre_tokenize_str(whole_characters(text)))
    elif kind in ("byte", "bpe"):
        return [part for part in dict.fromkeys(text) if has_surrogates(part)]
    return [part for part in dict.fromkeys(parts) if part not in found]
