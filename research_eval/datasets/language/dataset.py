"""Running text as a data set of the kind "language_modeling": files or a hub set -> splits.

The splits do not depend on the run's seed. The tokenizer knows the training split only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tokenizers
from pydantic import Field
from tokenizers import Tokenizer

from research_eval.annotations import Choice
from research_eval.datasets.language.cache import cached_facts, cached_stream
from research_eval.datasets.language.facts import stream_facts, warn_of
from research_eval.datasets.language.ngrams import ngram_scores
from research_eval.datasets.language.stream import Document, TokenStream, encoded
from research_eval.datasets.language.vocabulary import TokenizerKind, build_tokenizer, eos_id, kind_of, piece_bytes
from research_eval.datasets.text.cache import Arrays, cached_arrays, check_tokenizer, digest, digest_texts
from research_eval.datasets.text.hub import hub_copy
from research_eval.datasets.text.source import TextSource, file_type
from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError
from research_eval.registry import NEXT_TOKEN
from research_eval.system.phases import phase
from research_eval.system.untrusted import user_path

if TYPE_CHECKING:
    from research_eval.datasets.language.corpus import SplitText

# Sets that have a local copy in a data folder, and where the hub keeps them if it does in a form that can be read. The
# main branch of `tiny_shakespeare` is a loading script, which `datasets` no longer runs.
SOURCES: Mapping[str, TextSource | None] = {
    "tiny_shakespeare": TextSource("karpathy/tiny_shakespeare", revision="refs/convert/parquet"),
    "war_and_peace": None,
    "imdb_unsup": None,
}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name


def is_file_name(dataset_name: str) -> bool:
    """Whether a name is the path of a file that can be read."""
    return bool(file_type(dataset_name))


def is_hub_name(dataset_name: str) -> bool:
    """Whether a name can be that of a hub set: owner/name."""
    return HUB_NAME.fullmatch(dataset_name) is not None and not is_file_name(dataset_name)


class LanguageModelingDataset:
    """Running text for models of the next token. Raises ConfigError for data that cannot be used.

    `data_dir` is the folder of the set, a folder that holds one called `dataset_name`, or one file. A folder has the
    files train, validation and test (.parquet, .jsonl, .json, .csv, .tsv or .txt). `dataset_name` may be the path of a
    file itself, or a hub set (owner/name). Without a validation file the last `val_fraction` of the training text is
    the validation split.

    `tokenizer` is char, byte, word or bpe; `vocab_size` counts for word and bpe. `document` says what is separated from
    the rest by `<eos>`: nothing, each row or each file. With `respect_documents`, a model sees only the document that a
    token belongs to. `eval_stride` asks for a sliding evaluation in addition: windows of `block_size` tokens that score
    their last `eval_stride` targets. `ngram_baseline` counts n-grams of the training split, the scores to be beaten.
    `cache_dir` defaults to the environment variable GOE_CACHE, else `.goe_cache`.
    """

    VERSION = 1  # goes up if the same files and options give other tokens

    def __init__(
        self,
        *,
        dataset_name: str,
        data_dir: str | None = None,
        tokenizer: TokenizerKind = "char",
        vocab_size: Annotated[int, Field(ge=4, le=1_000_000), Choice(1024, 4096, 16384)] = 4096,
        block_size: Annotated[int, Field(ge=2, le=65536), Choice(64, 128, 256)] = 128,
        document: Document = "none",
        respect_documents: bool = True,
        text_field: str | None = None,
        val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        eval_stride: Annotated[int, Field(ge=1)] | None = None,
        cache_dir: str | None = None,
        ngram_baseline: bool = True,
    ) -> None:
        if eval_stride is not None and not 1 <= eval_stride < block_size:
            raise ConfigError(
                f"eval_stride={eval_stride}: expected 1 to {block_size - 1}, below block_size={block_size}. Without a "
                "sliding evaluation, leave it out."
            )
        if not 0 < val_fraction < 1:
            raise ConfigError(f"val_fraction={val_fraction}: expected a share of the text between 0 and 1")
        self.dataset_name = dataset_name
        self.data_dir = data_dir
        self.kind: TokenizerKind = tokenizer
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.document: Document = document
        self.respect_documents = respect_documents
        self.text_field = text_field
        self.val_fraction = val_fraction
        self.eval_stride = eval_stride
        self.ngram_baseline = ngram_baseline
        self.cache = Path(cache_dir or os.environ.get("GOE_CACHE") or ".goe_cache")

    def splits(self, tokenizer: Tokenizer | None = None) -> DataSplits:
        """Read the splits and encode them with `tokenizer`, or with one that is made from the training text.

        Raises ConfigError.
        """
        with phase("reading the text"):
            texts = self.texts()
        tokenizer = self._tokenizer(texts["train"].texts) if tokenizer is None else self._fitting(tokenizer)
        hashes = {name: digest_texts(part.texts) for name, part in texts.items()}
        streams = {name: self._stream(tokenizer, part, name, hashes[name]) for name, part in texts.items()}
        size = tokenizer.get_vocab_size()
        key = digest(json.dumps(hashes), digest(tokenizer.to_str()), f"{self.VERSION} {self.separated}")
        facts = self._facts(texts, streams, key)
        ngrams = self._ngrams(tokenizer, streams, key) if self.ngram_baseline else {}
        return DataSplits(
            train=streams["train"],
            validation=streams["validation"],
            test=streams.get("test"),
            vocab_size=size,
            num_classes=size,
            label_names=[],
            max_length=self.block_size,
            tokenizer=tokenizer,
            fingerprint={
                "version": self.VERSION,
                "source": self._origin(),
                "read_from": {name: part.origin for name, part in texts.items()},
                "sha256": hashes,
                "tokenizer": self.kind,
                "tokenizer_sha256": digest(tokenizer.to_str()),
                "vocab_size": size,
                **facts,
                **({"baselines": {"ngram": ngrams}} if ngrams else {}),
            },
            task=NEXT_TOKEN,
        )

    def texts(self) -> dict[str, SplitText]:
        """The text of every split. Raises ConfigError."""
        from research_eval.datasets.language.corpus import read_corpus  # Arrow takes 0.15 s to import

        path, field = self._path()
        return read_corpus(path, self.document, self.text_field, self.val_fraction, field)

    def _path(self) -> tuple[Path, str]:
        """Where the files are, and the field of the config that says so."""
        if self.data_dir is not None:
            path = user_path(self.data_dir, "dataset_params.data_dir")
            name = Path(self.dataset_name)
            inside = path / name if len(name.parts) == 1 and ".." not in name.parts else path
            return (inside if inside.is_dir() else path), "dataset_params.data_dir"
        if is_file_name(self.dataset_name):
            return user_path(self.dataset_name, "dataset_name"), "dataset_name"
        return hub_copy(self._hub_source(), self.cache), "dataset_name"

    def _hub_source(self) -> TextSource:
        source = SOURCES.get(self.dataset_name) or (
            TextSource(self.dataset_name) if is_hub_name(self.dataset_name) else None
        )
        if source is None:
            raise ConfigError(
                f"dataset_name: {self.dataset_name!r} needs dataset_params.data_dir, the folder that has its files, or "
                "a folder that holds this folder"
            )
        return source

    def _origin(self) -> str:
        """Where the text comes from, for the fingerprint."""
        if self.data_dir is not None:
            return f"data_dir {self.data_dir}"
        return f"file {self.dataset_name}" if is_file_name(self.dataset_name) else f"hub {self._hub_source().hub}"

    @property
    def separated(self) -> bool:
        """Whether `<eos>` stands between documents."""
        return self.document != "none"

    def _tokenizer(self, texts: list[str]) -> Tokenizer:
        """The tokenizer of the training texts, from the cache if it is there."""
        options = f"{self.VERSION} {self.kind} {self.separated} {self.vocab_size} {tokenizers.__version__}"

        def build() -> Arrays:
            with phase(f"building the vocabulary ({self.kind})"):
                serialised = build_tokenizer(self.kind, texts, self.separated, self.vocab_size).to_str()
            return {"tokenizer_json": np.frombuffer(serialised.encode(), np.uint8)}

        if self.kind in ("char", "byte"):  # faster than a look into the cache
            return build_tokenizer(self.kind, texts, self.separated, self.vocab_size)
        key = digest(digest_texts(texts), options)
        arrays = cached_arrays(self.cache / f"vocabulary-{key}.npz", build, check_tokenizer)
        return Tokenizer.from_str(arrays["tokenizer_json"].tobytes().decode())

    def _fitting(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer of an earlier run. Raises ConfigError if it is of another kind than the config asks for."""
        kind, has_eos = kind_of(tokenizer), eos_id(tokenizer) is not None
        if kind != self.kind or has_eos != self.separated:
            raise ConfigError(
                f"dataset_params: tokenizer={self.kind!r} and document={self.document!r} do not fit the tokenizer of "
                f"the earlier run, which is {kind!r} with{'' if has_eos else 'out'} <eos>. Set them as that run has "
                "them."
            )
        return tokenizer

    def _stream(self, tokenizer: Tokenizer, part: SplitText, name: str, text_hash: str) -> TokenStream:
        """The split as a stream, from the cache if it is there. Raises ConfigError for less than a block."""
        key = digest(text_hash, tokenizer.to_str(), str(self.VERSION))
        with phase(f"encoding {name}"):
            tokens, starts = cached_stream(
                self.cache / f"stream-{key}.npy",
                lambda: encoded(tokenizer, part.texts),
                len(part.texts) if self.separated else 0,
                tokenizer.get_vocab_size(),
            )
        if len(tokens) <= self.block_size:
            raise ConfigError(
                f"{part.origin}: the {name} split has {len(tokens)} tokens; block_size={self.block_size} needs "
                f"{self.block_size + 1}. Lower dataset_params.block_size or give more text."
            )
        return TokenStream.of(tokens, self.block_size, starts, self.respect_documents, self.eval_stride)

    def _facts(self, texts: Mapping[str, SplitText], streams: Mapping[str, TokenStream], key: str) -> dict[str, Any]:
        """What `stream_facts` says, from the cache if it is there, with its warnings."""

        def build() -> dict[str, Any]:
            with phase("looking for text that two splits have"):
                return stream_facts({name: part.texts for name, part in texts.items()}, streams, self.separated)

        facts = cached_facts(self.cache / f"facts-{key}.json", build)
        warn_of(facts, self.kind, self.dataset_name)
        return facts

    def _ngrams(self, tokenizer: Tokenizer, streams: Mapping[str, TokenStream], key: str) -> dict[str, Any]:
        """The scores of the n-grams, from the cache if they are there."""

        def build() -> dict[str, Any]:
            tokens = {name: stream.tokens for name, stream in streams.items()}
            with phase("counting n-grams"):
                return ngram_scores(tokens, self.kind, piece_bytes(tokenizer))

        return cached_facts(self.cache / f"ngrams-{key}.json", build)
