"""Real text for classification: a local folder or file, several of them as one set, or the Hugging Face hub.

The splits do not depend on the run's seed: the held-out validation rows and the subsets are drawn with a fixed one, so
that runs with different seeds are compared on the same rows. The tokenizer sees the training rows only.

S tokens in all  N samples  T steps of a path
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import threading
import uuid
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np
import pyarrow as pa
import tokenizers
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from pyarrow import compute as pc
from pyarrow import csv, parquet
from pyarrow import json as jsonl
from pydantic import Field
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from research_eval.annotations import Choice, Range
from research_eval.datasets.token_data import DataSplits, TokenData
from research_eval.errors import ConfigError
from research_eval.seeding import derive_seed
from research_eval.system.untrusted import (
    MAX_JSON_DEPTH,
    check_regular_file,
    parse_json,
    read_limited,
    steers,
    user_path,
)
from research_eval.wording import printable

log = logging.getLogger(__name__)

TokenizerKind = Literal["word", "wordpiece", "bpe"]
Truncation = Literal["head", "head_tail"]
Arrays = dict[str, NDArray[Any]]

PAD, UNK = "[PAD]", "[UNK]"
LINE_BREAK = r"<br\s*/?>"  # of web pages
UNK_ID = 1
SPLIT_SEED = 0
HELD_OUT_SHARE = 0.1  # of train, where a set has no validation split
MAX_CLASSES = 10_000  # a larger number in a label column is an identifier, not a class
MAX_ALPHABET = 1000  # characters that WordPiece and BPE start from
CONNECT_SECONDS = 0.7
ENCODE_ROWS = 1000  # per call: bounds the memory held by encodings
BLOCK_BYTES = 1 << 24  # a CSV or JSONL row has to fit into one block
PARQUET_ROWS = 1000  # that are decompressed at once
MAX_SPLIT_BYTES = 2**31  # of one file, decompressed
VARIABLE_SIZES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
MAX_INFO_BYTES = 10_000_000
MAX_LABEL = 1000  # characters of a class name


@dataclass(frozen=True)
class TextSource:
    """Where the hub keeps a set, and what its columns are called there and in common local copies."""

    hub: str
    config: str | None = None
    revision: str | None = None
    text_fields: tuple[str, ...] = ("text",)
    label_fields: tuple[str, ...] = ("label",)


# A name that is missing here is its own hub name, with the columns `text` and `label`.
TEXT_FIELDS: dict[str, TextSource] = {
    "ag_news": TextSource("fancyzhx/ag_news"),
    "imdb": TextSource("stanfordnlp/imdb"),
    "sst2": TextSource("stanfordnlp/sst2", text_fields=("sentence", "text")),
    # The main branch is a loading script, which `datasets` no longer runs.
    "trec": TextSource("CogComp/trec", revision="refs/convert/parquet", label_fields=("coarse_label", "label")),
}
# Other splits (the `unsupervised` one of imdb) are left alone.
SPLIT_OF_NAME = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


class TextDataset:
    """A text classification set. Raises ConfigError for data that cannot be used.

    `data_dir` is a folder with `train`, `validation` (or `valid`, `val`, `dev`) and `test` as .parquet, .csv or .jsonl
    (shards `train-00000-of-00002.parquet` as well), or one file. Without it the set comes from the hub, once: the copy
    stays in the cache. Validation rows come from the validation split, else a stratified tenth of train is held out.
    A test split without labels is left out. `train_samples` and `val_samples` are random rows; a number above what
    there is takes everything. `truncation="head_tail"` keeps the first quarter of `max_length` and the rest from the
    end of the text. `cache_dir` defaults to the environment variable GOE_CACHE, else `.goe_cache`.

    `sources` instead of `data_dir` mixes several folders or files: each keeps its own classes ("imdb/positive"), and
    validation rows and subsets are taken from each. `groups` then holds every sample's source, and so does each of the
    `path_length` steps of its `paths`. There is a test split if all sources have one.
    """

    VERSION = 1

    def __init__(
        self,
        *,
        dataset_name: str,
        max_length: Annotated[int, Field(ge=1, le=65536), Choice(64, 128, 256)] = 256,
        train_samples: Annotated[int, Field(ge=2)] | None = None,
        val_samples: Annotated[int, Field(ge=1)] | None = None,
        data_dir: str | None = None,
        sources: Annotated[list[str], Field(min_length=2)] | None = None,
        path_length: Annotated[int, Field(ge=0, le=65536)] = 0,
        text_field: str | None = None,
        label_field: str | None = None,
        tokenizer: TokenizerKind = "word",
        tokenizer_vocab_size: Annotated[int, Field(ge=100, le=1_000_000)] = 20_000,
        min_frequency: Annotated[int, Field(ge=1), Range(1, 4)] = 2,
        lowercase: bool = True,
        truncation: Truncation = "head",
        cache_dir: str | None = None,
    ) -> None:
        self.dataset_name = dataset_name
        self.max_length = max_length
        self.subset_sizes = {"train": train_samples, "validation": val_samples}
        if sources and data_dir:
            raise ConfigError(f"data_dir={data_dir!r} and sources={sources} are both given: choose one of them")
        if path_length and not sources:
            raise ConfigError(f"path_length={path_length} gives the paths of a mix: name its sources")
        self.data_dir = data_dir
        self.sources = sources
        self.path_length = path_length
        self.source = TEXT_FIELDS.get(dataset_name, TextSource(dataset_name))
        self.text_field, self.label_field = text_field, label_field
        self.tokenizer_settings: dict[str, Any] = {
            "kind": tokenizer,
            "vocab_size": tokenizer_vocab_size,
            "min_frequency": min_frequency,
            "lowercase": lowercase,
        }
        self.truncation: Truncation = truncation
        self.cache = Path(cache_dir or os.environ.get("GOE_CACHE") or ".goe_cache")

    def splits(self, seed: int = 0) -> DataSplits:
        """Read, split, tokenise. The same rows for every `seed`."""
        if self.sources:
            parts = {
                _source_name(source): self._chosen(user_path(source, "dataset_params.sources"))
                for source in self.sources
            }
            if len(parts) < len(self.sources):
                raise ConfigError(f"dataset_params.sources: two of {self.sources} have the same name. Rename a folder.")
            rows, label_names, groups = _mixed(parts)
        else:
            path = (
                user_path(self.data_dir, "dataset_params.data_dir")
                if self.data_dir
                else hub_copy(self.source, self.cache)
            )
            rows, label_names = self._chosen(path)
            groups = {}

        tokenizer = self._tokenizer(rows["train"].texts)
        tokenizer_hash = _digest(tokenizer.to_str())
        data, truncated = {}, {}
        for name, part in rows.items():
            data[name], truncated[name] = self._encode(tokenizer, tokenizer_hash, part, groups.get(name))
        train_texts = set(map(_folded, rows["train"].texts))
        return DataSplits(
            train=data["train"],
            validation=data["validation"],
            test=data.get("test"),
            vocab_size=tokenizer.get_vocab_size(),
            num_classes=len(label_names),
            label_names=label_names,
            max_length=max(int(part.lengths.max()) for part in data.values()),
            tokenizer=tokenizer,
            fingerprint={
                "version": self.VERSION,
                "source": self._origin(),
                "rows": {name: len(part.texts) for name, part in rows.items()},
                "sha256": {name: _digest(_digest_texts(part.texts), part.labels) for name, part in rows.items()},
                "tokenizer_sha256": tokenizer_hash,
                "vocab_size": tokenizer.get_vocab_size(),
                "train_validation_duplicates": sum(_folded(text) in train_texts for text in rows["validation"].texts),
                "truncated_share": truncated,
            },
        )

    def _origin(self) -> str:
        if self.sources:
            return f"sources {', '.join(self.sources)}"
        return f"data_dir {self.data_dir}" if self.data_dir else f"hub {self.source.hub}"

    def _fields(self, path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names that the columns with the text and with the class may have; a source of a mix has its own."""
        source = TEXT_FIELDS.get(_source_name(path), TextSource("")) if self.sources else self.source
        return (
            (self.text_field,) if self.text_field else source.text_fields,
            (self.label_field,) if self.label_field else source.label_fields,
        )

    def _chosen(self, path: Path) -> tuple[dict[str, _Rows], list[str]]:
        """The rows of every split that are wanted, validation rows among them, and the class names."""
        rows, label_names = self.read(path)
        if "validation" not in rows:
            rows["train"], rows["validation"] = _held_out(rows["train"], path)
        for name, size in self.subset_sizes.items():
            rows[name] = _subset(rows[name], size, name, path)
        if len(np.unique(rows["train"].labels)) < 2:
            raise ConfigError(f"{path}: the training rows have one class only; a classifier needs two or more")
        return rows, label_names

    def read(self, path: Path) -> tuple[dict[str, _Rows], list[str]]:
        """The rows of every split as the files have them, and the class names."""
        tables: dict[str, _RawRows] = {}
        text_fields, label_fields = self._fields(path)
        for name, paths in _files(path).items():
            table = _read_split(paths, text_fields, label_fields, labels_needed=name != "test")
            if table is not None:
                tables[name] = table
        for table in tables.values():
            if table.labels.type != tables["train"].labels.type:
                raise ConfigError(
                    f"{table.where}: labels are {table.labels.type}, but {tables['train'].labels.type} in "
                    f"{tables['train'].where}. Use one kind."
                )
        known_names = _names_beside(path, label_fields) or tables["train"].class_names
        label_names = known_names or _names_in(tables)
        if len(label_names) > MAX_CLASSES:
            raise ConfigError(f"{path}: {len(label_names):,} classes; a classifier takes up to {MAX_CLASSES:,}")
        for name in label_names:
            if len(name) > MAX_LABEL or any(map(steers, name)):
                limits = f"expected at most {MAX_LABEL} characters and no control characters"
                raise ConfigError(f"{path}: label {printable(name[:40])!r}: {limits}")
        rows = {name: _Rows(table.texts, _numbered(table, label_names)) for name, table in tables.items()}
        return rows, label_names

    def _tokenizer(self, texts: list[str]) -> Tokenizer:
        settings = self.tokenizer_settings
        key = _digest(_digest_texts(texts), json.dumps(settings), tokenizers.__version__)

        def build() -> Arrays:
            serialised = train_tokenizer(texts, **settings).to_str()
            return {"tokenizer_json": np.frombuffer(serialised.encode(), np.uint8)}

        arrays = cached_arrays(self.cache / f"tokenizer-{key}.npz", build, _check_tokenizer)
        return Tokenizer.from_str(arrays["tokenizer_json"].tobytes().decode())

    def _encode(
        self, tokenizer: Tokenizer, tokenizer_hash: str, rows: _Rows, groups: NDArray[np.int64] | None
    ) -> tuple[TokenData, float]:
        """The split as tokens, and the share of its samples that were cut."""
        key = _digest(_digest_texts(rows.texts), tokenizer_hash, f"{self.max_length} {self.truncation}")

        def build() -> Arrays:
            encoded = encode_texts(tokenizer, rows.texts, self.max_length, self.truncation)
            return {"tokens": encoded.tokens, "offsets": encoded.offsets, "num_cut": np.array(encoded.num_cut)}

        arrays = cached_arrays(
            self.cache / f"tokens-{key}.npz",
            build,
            lambda arrays: _check_tokens(arrays, len(rows.texts), tokenizer.get_vocab_size()),
        )
        paths_NT = (
            np.repeat(groups[:, None], self.path_length, axis=1) if groups is not None and self.path_length else None
        )
        data = TokenData(arrays["tokens"], arrays["offsets"], rows.labels, paths_NT, groups)
        return data, round(int(arrays["num_cut"]) / len(data), 6)


# ---------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(
    texts: Sequence[str], kind: TokenizerKind, vocab_size: int, min_frequency: int, lowercase: bool
) -> Tokenizer:
    """A tokenizer with [PAD] = 0 and [UNK] = 1. Line breaks of web pages (`<br />`) become blanks inside it."""
    normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(LINE_BREAK), " "), normalizers.BertNormalizer(lowercase=lowercase)]
    )
    options: dict[str, Any] = {"vocab_size": vocab_size, "min_frequency": min_frequency, "show_progress": False}
    # The model is named by the unknown token alone: the trainer fills in the vocabulary.
    if kind == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
        trainer: trainers.Trainer = trainers.WordLevelTrainer(**options, special_tokens=[PAD, UNK])
    else:
        characters = _alphabet(texts, normalizer, limit=min(MAX_ALPHABET, vocab_size // 4))
        options |= {"initial_alphabet": characters, "limit_alphabet": len(characters)}
        # The trainer numbers characters inside (##x) or at the end (x</w>) of a word in the order of a hash table that
        # differs from process to process, and equally frequent pairs are merged by number: so they are numbered here.
        if kind == "wordpiece":
            tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
            tokenizer.decoder = decoders.WordPiece()
            inner = [f"##{character}" for character in characters]
            trainer = trainers.WordPieceTrainer(**options, special_tokens=[PAD, UNK, *inner])
        else:
            tokenizer = Tokenizer(models.BPE(unk_token=UNK, end_of_word_suffix="</w>"))
            tokenizer.decoder = decoders.BPEDecoder()
            last = [f"{character}</w>" for character in characters]
            trainer = trainers.BpeTrainer(**options, special_tokens=[PAD, UNK, *last], end_of_word_suffix="</w>")
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    # Special tokens would also be found in the text of a user, and 0 has to stay padding: they become plain entries.
    plain = Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "added_tokens": []}))
    if plain.get_vocab_size() <= 2:
        raise ConfigError(f"dataset_params.min_frequency={min_frequency}: no word is that frequent. Lower it.")
    return plain


def _alphabet(texts: Sequence[str], normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    """The `limit` most frequent characters, in the order of their code points."""
    counts: Counter[str] = Counter()
    for character, count in Counter("".join(texts)).items():
        for part in normalizer.normalize_str(character).split():
            counts.update(dict.fromkeys(part, count))
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted(by_frequency[:limit])


class EncodedTexts(NamedTuple):
    """`tokens` [S]; sample i is `tokens[offsets[i]:offsets[i + 1]]`; `num_cut` samples were longer than allowed."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    num_cut: int


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int, truncation: Truncation = "head"
) -> EncodedTexts:
    """Texts -> ids, cut to `max_length`; a text without tokens becomes one [UNK]."""
    head = max_length if truncation == "head" else max_length // 4  # quarter and rest: Sun et al., 2019
    tail = max_length - head
    tokens, lengths, num_cut = [np.zeros(0, np.int32)], [], 0
    for start in range(0, len(texts), ENCODE_ROWS):
        encodings = tokenizer.encode_batch_fast(texts[start : start + ENCODE_ROWS], add_special_tokens=False)
        rows = [encoding.ids or [UNK_ID] for encoding in encodings]
        num_cut += sum(len(row) > max_length for row in rows)
        rows = [row if len(row) <= max_length else row[:head] + row[len(row) - tail :] for row in rows]
        tokens.append(np.fromiter(chain.from_iterable(rows), np.int32))
        lengths += [len(row) for row in rows]
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return EncodedTexts(np.concatenate(tokens), offsets, num_cut)


# ---------------------------------------------------------------------------------------------------- cache


class _Damaged(ValueError):
    """What lies in the cache is not what we put there."""


def _check_tokenizer(arrays: Arrays) -> None:
    try:
        Tokenizer.from_str(arrays["tokenizer_json"].tobytes().decode())
    except Exception as error:  # the library raises nothing narrower
        raise _Damaged(str(error)) from error


def _check_tokens(arrays: Arrays, num_samples: int, vocab_size: int) -> None:
    tokens, offsets = arrays["tokens"], arrays["offsets"]
    if not (
        tokens.dtype == np.int32
        and offsets.dtype == np.int64
        and offsets.shape == (num_samples + 1,)
        and tokens.shape == (offsets[-1],)
        and offsets[0] == 0
        and (np.diff(offsets) > 0).all()
        and arrays["num_cut"].shape == ()
        and tokens.min() > 0
        and tokens.max() < vocab_size
    ):
        raise _Damaged("these are not the tokens")


def cached_arrays(path: Path, build: Callable[[], Arrays], check: Callable[[Arrays], object] = len) -> Arrays:
    """The arrays stored at `path`, else those of `build()`, which are stored there. The name of the file is its key.

    What is stored and does not pass `check` (which raises) is built again.
    """
    if path.is_file():
        try:
            with path.open("rb") as file, NpzFile(file, allow_pickle=False) as archive:
                stored = {name: archive[name] for name in archive.files}
            check(stored)
            return stored
        except (OSError, ValueError, TypeError, LookupError, EOFError, MemoryError, zipfile.BadZipFile) as error:
            log.warning("%s is damaged (%s) and is built again", path, error)
    arrays = build()
    temporary = path.with_name(f".{uuid.uuid4().hex}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.savez(temporary, allow_pickle=False, **arrays)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path.parent}: cannot write the cache ({error}). Set cache_dir or GOE_CACHE.") from error
    return arrays


def _digest(*parts: str | NDArray[Any]) -> str:
    """Hash of the parts; all but arrays are short strings, separated by a line break."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part.encode() + b"\n" if isinstance(part, str) else part.tobytes())
    return hasher.hexdigest()


def _folded(text: str) -> str:
    """The text without case and layout: what counts as the same text."""
    return " ".join(text.lower().split())


def _digest_texts(texts: list[str]) -> str:
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))  # without them ["ab"] would equal ["a", "b"]
    return _digest(lengths, "".join(texts))


# ---------------------------------------------------------------------------------------------------- files


class _RawRows(NamedTuple):
    """One split as it was found: `labels` is an Arrow column of int64 or strings."""

    where: str
    texts: list[str]
    labels: Any
    class_names: list[str] | None


class _Rows(NamedTuple):
    texts: list[str]
    labels: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> _Rows:
        return _Rows([self.texts[row] for row in rows], self.labels[rows])


def _read_csv(path: Path, text_fields: tuple[str, ...]) -> Any:
    _check_size(path, path.stat().st_size)
    return csv.read_csv(
        path,
        csv.ReadOptions(block_size=BLOCK_BYTES),
        csv.ParseOptions(newlines_in_values=True),
        csv.ConvertOptions(column_types=dict.fromkeys(text_fields, pa.string())),  # a text may look like a number
    )


def _read_jsonl(path: Path, text_fields: tuple[str, ...]) -> Any:
    _check_size(path, path.stat().st_size)
    _check_depth(path)
    return jsonl.read_json(path, jsonl.ReadOptions(block_size=BLOCK_BYTES))


def _read_parquet(path: Path, text_fields: tuple[str, ...]) -> Any:
    with parquet.ParquetFile(path) as file:  # read_table would also make columns of folder names
        batches, num_bytes = [], 0
        for batch in file.iter_batches(PARQUET_ROWS):  # a small file may hold one long text a million times
            num_bytes += batch.nbytes
            _check_size(path, num_bytes)
            batches.append(batch)
        return pa.Table.from_batches(batches, file.schema_arrow)


def _check_size(path: Path, num_bytes: int) -> None:
    if num_bytes > MAX_SPLIT_BYTES:
        raise ConfigError(f"{path}: holds more than {MAX_SPLIT_BYTES / 2**30:.0f} GiB. Give a part of it.")


def _check_depth(path: Path) -> None:
    """Raise ConfigError for a line that is nested deeply: the reader of Arrow would crash on it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.count(b"[") + line.count(b"{") > MAX_JSON_DEPTH:
                depth = deepest = 0
                for bracket in re.findall(rb"[\[\]{}]", re.sub(rb'"(?:[^"\\]|\\.)*+"?', b"", line)):
                    depth += 1 if bracket in b"[{" else -1
                    deepest = max(deepest, depth)
                if deepest > MAX_JSON_DEPTH:
                    raise ConfigError(f"{path}:{number}: nested deeper than {MAX_JSON_DEPTH} levels")


READERS: dict[str, Callable[[Path, tuple[str, ...]], Any]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of each split, train first."""
    if path.is_file():
        if path.suffix not in READERS:
            raise ConfigError(f"{path}: the file has to end with {', '.join(READERS)}")
        return {"train": [path]}
    if not path.is_dir():
        raise ConfigError(f"dataset_params.data_dir: there is no file or folder {str(path)!r}")
    found: defaultdict[str, defaultdict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(path.iterdir()):
        match = re.fullmatch(r"([a-z]+)(?:-\d{5}-of-(\d{5}))?", file.stem)
        if file.suffix in READERS and match and match[1] in SPLIT_OF_NAME:
            kind = (
                f"{match[1]}{file.suffix}" if match[2] is None else f"{int(match[2])} shards of {match[1]}{file.suffix}"
            )
            found[SPLIT_OF_NAME[match[1]]][kind].append(file)
    if "train" not in found:
        names = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
        raise ConfigError(f"{path}: no train.parquet, train.csv or train.jsonl; found {names}")
    files = {}
    for split in sorted(found, key=("train", "validation", "test").index):
        if len(found[split]) > 1:
            raise ConfigError(f"{path}: {' and '.join(found[split])} are all the {split} split. Keep one of them.")
        ((kind, files[split]),) = found[split].items()
        if "shards" in kind and len(files[split]) != int(kind.split()[0]):
            raise ConfigError(f"{path}: {len(files[split])} of {kind} are there. Add the missing ones.")
    return files


def _pick(candidates: tuple[str, ...], columns: list[str], key: str, where: str) -> str:
    for name in candidates:
        if name in columns:
            return name
    wanted = " or ".join(map(repr, candidates))
    raise ConfigError(f"{where}: no column {wanted}; found {', '.join(columns)}. Set dataset_params.{key}.")


def _read_split(
    paths: list[Path], text_fields: tuple[str, ...], label_fields: tuple[str, ...], labels_needed: bool
) -> _RawRows | None:
    """The rows of one split; None for a split without labels where none are needed."""
    where = str(paths[0])
    try:
        for path in paths:
            check_regular_file(path)
        tables = [READERS[path.suffix](path, text_fields) for path in paths]
        columns = tables[0].column_names
        text_field = _pick(text_fields, columns, "text_field", where)
        if not labels_needed and not set(label_fields) & set(columns):
            return None
        label_field = _pick(label_fields, columns, "label_field", where)
        class_names = _names_in_schema(tables[0].schema, label_field)
        table = pa.concat_tables([table.select([text_field, label_field]) for table in tables])
        texts = _plain(table[text_field], paths[0])
        labels = _plain(table[label_field], paths[0])
        texts.validate(full=True)  # Parquet does not promise UTF-8
        labels.validate(full=True)
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}. Write the file again.") from error
    if len(texts) == 0:
        raise ConfigError(f"{where}: no rows. Fill the file or remove it.")
    if not labels_needed and (labels.null_count == len(labels) or set(labels.unique().to_pylist()) == {-1}):
        log.info("%s: no labels, so there is no test split", where)
        return None
    if not pa.types.is_string(texts.type):
        raise ConfigError(f"{where}: column {text_field!r} holds {texts.type}, not text. Set text_field.")
    for name, column in ((text_field, texts), (label_field, labels)):
        if column.null_count:
            raise ConfigError(f"{where}: column {name!r} has {column.null_count} empty cells (null). Remove the rows.")
    if not (pa.types.is_string(labels.type) or pa.types.is_int64(labels.type)):
        raise ConfigError(
            f"{where}: column {label_field!r} holds {labels.type}. Labels are whole numbers from 0 or strings."
        )
    return _RawRows(where, texts.to_pylist(), labels, class_names)


def _plain(column: Any, path: Path) -> Any:
    """One array of string or int64 where the column can be that; else the column as it is."""
    array = column.combine_chunks()
    kind = array.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        if any(is_kind(kind) for is_kind in VARIABLE_SIZES):  # a small file may name one long text often
            lengths = pc.binary_length(array.dictionary).cast(pa.int64())
            _check_size(path, pc.sum(lengths.take(array.indices)).as_py() or 0)
        array = array.cast(kind)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_boolean(kind):
        return array.cast(pa.string())
    return array.cast(pa.int64()) if pa.types.is_integer(kind) else array


def _names_of(features: Any, label_field: str, where: str) -> list[str] | None:
    """Class names from a feature description as the `datasets` library writes it. Raises ConfigError."""
    feature = features.get(label_field) if isinstance(features, dict) else None
    names = feature.get("names") if isinstance(feature, dict) else None
    return _checked_names(names, where, "names") if names else None


def _checked_names(names: Any, where: str, key: str) -> list[str]:
    plain = isinstance(names, list) and all(isinstance(name, str | int | float) for name in names)
    if not plain or not len(set(map(str, names))) == len(names) > 0:
        raise ConfigError(f"{where}: {key} has to be a list of different names, got {str(names)[:80]!r}")
    return [str(name) for name in names]


def _names_in_schema(schema: Any, label_field: str) -> list[str] | None:
    stored = (schema.metadata or {}).get(b"huggingface")
    if not stored:
        return None
    where = "the metadata 'huggingface' of the file"
    content = parse_json(stored[:MAX_INFO_BYTES], where)
    info = content.get("info") if isinstance(content, dict) else None
    features = info.get("features") if isinstance(info, dict) else None
    return _names_of(features, label_field, where)


def _names_beside(path: Path, label_fields: tuple[str, ...]) -> list[str] | None:
    """Class names from `dataset_info.json` in the folder: `label_names`, or the features of the `datasets` library."""
    info_path = path / "dataset_info.json"
    if not info_path.exists():
        return None
    info = parse_json(read_limited(info_path, MAX_INFO_BYTES, "a description of data"), str(info_path))
    if not isinstance(info, dict):
        raise ConfigError(f"{info_path}: not a JSON object. Mend or remove it.")
    names = info.get("label_names")
    if names is not None:
        return _checked_names(names, str(info_path), "label_names")
    found = (_names_of(info.get("features"), field, str(info_path)) for field in label_fields)
    return next((names for names in found if names), None)


def _names_in(tables: dict[str, _RawRows]) -> list[str]:
    """Class names where none were given: the sorted strings of train, or the numbers up to the largest label."""
    if pa.types.is_string(tables["train"].labels.type):
        return sorted(tables["train"].labels.unique().to_pylist())
    largest, where = max((max(table.labels.unique().to_pylist()), table.where) for table in tables.values())
    if largest >= MAX_CLASSES:
        raise ConfigError(f"{where}: label {largest}: number the classes from 0 to at most {MAX_CLASSES - 1}")
    return [str(label) for label in range(largest + 1)]


def _numbered(table: _RawRows, names: list[str]) -> NDArray[np.int64]:
    """Labels as class numbers. `names` are the classes in order."""
    found = table.labels.unique().to_pylist()
    if pa.types.is_int64(table.labels.type):
        wrong = [label for label in found if not 0 <= label < len(names)]
        numbers = {label: label for label in found}
    else:
        wrong = [label for label in found if label not in names]
        numbers = {name: number for number, name in enumerate(names)}
    if wrong:
        raise ConfigError(
            f"{table.where}: label {wrong[0]!r} is none of the {len(names)} classes "
            f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''}). Labels are numbers from 0 or these names."
        )
    labels = table.labels.to_pylist()
    return np.fromiter((numbers[label] for label in labels), np.int64, len(labels))


def _source_name(source: str | Path) -> str:
    """What a source of a mix is called: its folder, or its file without the ending."""
    path = Path(source).expanduser().absolute()
    return path.stem if path.suffix in READERS else path.name


def _mixed(
    parts: Mapping[str, tuple[dict[str, _Rows], list[str]]],
) -> tuple[dict[str, _Rows], list[str], dict[str, NDArray[np.int64]]]:
    """Sources as one set: the rows of every split, the classes of all, and the number of each row's source by split."""
    label_names = [f"{source}/{label}" for source, (_, labels) in parts.items() for label in labels]
    first_labels = np.cumsum([0, *(len(labels) for _, labels in parts.values())])
    rows, groups = {}, {}
    for name in ("train", "validation", "test"):
        lacking = [source for source, (splits, _) in parts.items() if name not in splits]
        if lacking:
            log.info("no %s split: %s has none", name, ", ".join(lacking))
            continue
        found = [splits[name] for splits, _ in parts.values()]
        labels = [part.labels + first for part, first in zip(found, first_labels[:-1], strict=True)]
        rows[name] = _Rows(list(chain.from_iterable(part.texts for part in found)), np.concatenate(labels))
        groups[name] = np.repeat(np.arange(len(found)), [len(part.texts) for part in found])
    return rows, label_names, groups


def _held_out(train: _Rows, path: Path) -> tuple[_Rows, _Rows]:
    """Train without, and validation made of, a tenth of every class (at least one row of a class that has two)."""
    rng = np.random.default_rng(derive_seed(SPLIT_SEED, "validation split"))
    held_out = np.zeros(len(train.texts), bool)
    for label in np.unique(train.labels):
        rows = rng.permutation(np.flatnonzero(train.labels == label))
        if len(rows) > 1:
            held_out[rows[: max(1, round(len(rows) * HELD_OUT_SHARE))]] = True
    if not held_out.any():
        raise ConfigError(f"{path}: no validation split, and every class has one row only: add rows or a split")
    return train.take(np.flatnonzero(~held_out)), train.take(np.flatnonzero(held_out))


def _subset(rows: _Rows, size: int | None, name: str, path: Path) -> _Rows:
    """`size` random rows: files are often sorted by label."""
    if size is None or size == len(rows.texts):
        return rows
    if size > len(rows.texts):
        log.warning("%s: %s: %d samples are wanted and %d are there: all are used", path, name, size, len(rows.texts))
        return rows
    rng = np.random.default_rng(derive_seed(SPLIT_SEED, f"{name} subset"))
    return rows.take(rng.permutation(len(rows.texts))[:size])


# ---------------------------------------------------------------------------------------------------- hub


def hub_copy(source: TextSource, cache: Path) -> Path:
    """The folder in the cache with the splits of a hub set as Parquet; downloaded when it is not there yet.

    Raises ConfigError at once where the hub cannot be reached: `datasets` itself would try for half a minute.
    """
    key = _digest(source.hub, f"{source.config} {source.revision}")[:12]
    folder = cache / "hub" / f"{re.sub('[^A-Za-z0-9]', '_', source.hub)}-{key}"
    if folder.is_dir():
        return folder
    ways_out = (
        "Give dataset_params.data_dir a folder with train.parquet, train.csv or train.jsonl, "
        "or run once with network access: the copy is kept in the cache."
    )
    if _offline_is_set():
        raise ConfigError(f"dataset {source.hub!r} is not in {cache} and HF_HUB_OFFLINE is set. {ways_out}")
    if not hub_answers():
        raise ConfigError(f"dataset {source.hub!r} is not in {cache} and the hub cannot be reached. {ways_out}")

    downloads = cache.absolute() / "huggingface"
    if "HF_HOME" not in os.environ:  # read when `datasets` is imported; the home folder is not ours to fill
        os.environ.setdefault("HF_HUB_CACHE", str(downloads / "hub"))
        os.environ.setdefault("HF_XET_CACHE", str(downloads / "xet"))
    import datasets

    try:
        splits = datasets.load_dataset(
            source.hub, source.config, revision=source.revision, cache_dir=str(downloads / "datasets")
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"dataset {source.hub!r}: the hub gave no data ({error}). {ways_out}") from error
    wanted = {SPLIT_OF_NAME[name]: part for name, part in splits.items() if name in SPLIT_OF_NAME}
    if "train" not in wanted:
        raise ConfigError(f"dataset {source.hub!r} has no train split, only {', '.join(splits)}. {ways_out}")
    temporary = folder.with_name(f".{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        for name, part in wanted.items():
            part.to_parquet(temporary / f"{name}.parquet")
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _offline_is_set() -> bool:
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return any(value.upper() in {"1", "ON", "YES", "TRUE"} for value in values)


def hub_answers() -> bool:
    """Whether something accepts a connection at HF_ENDPOINT, or at the proxy in front of it, in CONNECT_SECONDS."""
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = getproxies().get(url.scheme)
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    answers = []

    def connect() -> None:
        try:
            socket.create_connection(address, CONNECT_SECONDS).close()
            answers.append(True)
        except OSError as error:
            log.info("no connection to %s:%d: %s", *address, error)

    # In a thread because the time limit of a connection does not cover the look-up of the name.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return bool(answers)
