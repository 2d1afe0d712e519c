"""Real text for classification: a local folder or file, several of them as one set, or the Hugging Face hub.

The splits do not depend on the run's seed: a fixed seed draws the held-out validation rows and the subsets, so that
runs with different seeds are compared on the same rows. The tokenizer is trained on the training rows only.

S tokens in all  N samples  T steps of a path
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tokenizers
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer

from research_eval.annotations import Choice, Younger, accept_flat_options
from research_eval.datasets.label_facts import length_facts
from research_eval.datasets.text.advice import tokenizer_advice
from research_eval.datasets.text.baselines import FILES, fit_linear_baseline, stored_scores
from research_eval.datasets.text.cache import (
    Arrays,
    cached_arrays,
    check_tokenizer,
    check_tokens,
    digest,
    digest_texts,
)
from research_eval.datasets.text.facts import text_facts, warn_of
from research_eval.datasets.text.hub import hub_copy
from research_eval.datasets.text.pretrained import folder_tokenizer
from research_eval.datasets.text.source import AS_USUAL, TEXT_FIELDS, ColumnNames, FileSettings, TextSource, source_name
from research_eval.datasets.text.splits import (
    NOTHING_HELD_OUT,
    HeldOutSettings,
    Rows,
    mixed,
    subset,
    with_missing_splits,
)
from research_eval.datasets.text.subsets import ALL_ROWS, SubsetSettings
from research_eval.datasets.text.tokenizer import (
    DEFAULT_TOKENIZER,
    UNK_ID,
    TokenizerSettings,
    Truncation,
    encode_texts,
    train_tokenizer,
)
from research_eval.datasets.token_data import DataSplits, TokenData
from research_eval.errors import ConfigError
from research_eval.system.phases import phase
from research_eval.system.untrusted import user_path

log = logging.getLogger(__name__)

SHOWN_CLASSES = 10  # in a message
MANY_UNKNOWN = 0.05  # share of unknown tokens in all splits; above it, there is a warning


class TextDataset:
    """A text classification set. Raises ConfigError for data that cannot be used.

    `data_dir` is a folder with `train`, `validation` (or `valid`, `val`, `dev`) and `test`, or one file;
    docs/configuration.md lists the layouts. Without it the set comes from the hub, once: the copy stays in the cache.
    Validation rows come from the validation split, else they are held out of train, class by class. A test split
    without labels is left out. `train_samples` and `val_samples` are random rows, drawn class by class with `stratify`;
    a larger number than there are takes all. `truncation="head_tail"` keeps the first quarter of `max_length` and the
    rest from the end of the text. `cache_dir` defaults to the environment variable GOE_CACHE, else `.goe_cache`.

    `sources` instead of `data_dir` mixes several folders or files: each keeps its own classes ("imdb/positive"), and
    validation rows and subsets are taken from each. `groups` then holds every sample's source, and so does each of the
    `path_length` steps of its `paths`. There is a test split if all sources have one.

    `tokenizer_dir` is the folder of a pretrained model whose tokenizer is taken instead of one that is trained.
    """

    VERSION = 2  # goes up if the same rows and options give other tokens; 1 removed accents with `lowercase`

    def __init__(
        self,
        *,
        dataset_name: str,
        max_length: Annotated[int, Field(ge=1, le=65536), Choice(64, 128, 256)] = 256,
        subset_settings: SubsetSettings = ALL_ROWS,
        data_dir: str | None = None,
        sources: Annotated[list[str], Field(min_length=2)] | None = None,
        path_length: Annotated[int, Field(ge=0, le=65536)] = 0,
        file_settings: FileSettings = AS_USUAL,
        held_out_settings: HeldOutSettings = NOTHING_HELD_OUT,
        tokenizer_settings: TokenizerSettings = DEFAULT_TOKENIZER,
        truncation: Truncation = "head",
        cache_dir: str | None = None,
        tokenizer_dir: Annotated[str | None, Younger()] = None,
    ) -> None:
        self.dataset_name = dataset_name
        self.max_length = max_length
        self.subsets = subset_settings
        if sources and data_dir:
            raise ConfigError(f"data_dir={data_dir!r} and sources={sources} are both given: choose one of them")
        if path_length and not sources:
            raise ConfigError(f"path_length={path_length} gives the paths of a mix: name its sources")
        if tokenizer_dir and tokenizer_settings != DEFAULT_TOKENIZER:
            raise ConfigError(
                f"tokenizer_dir={tokenizer_dir!r} has a tokenizer that is ready: leave out the options of training one"
            )
        self.tokenizer_dir = tokenizer_dir
        self.data_dir = data_dir
        self.sources = sources
        self.path_length = path_length
        self.source = TEXT_FIELDS.get(dataset_name, TextSource(dataset_name))
        self.file_settings = file_settings
        self.held_out_settings = held_out_settings
        self.tokenizer_settings = tokenizer_settings
        self.truncation: Truncation = truncation
        self.cache = Path(cache_dir or os.environ.get("GOE_CACHE") or ".goe_cache")

    def splits(self, seed: int = 0, tokenizer: Tokenizer | None = None) -> DataSplits:
        """Read, split, tokenise; with this tokenizer, or else with that of the training rows.

        The same rows for every `seed`.
        """
        with phase("reading the data"):
            rows, label_names, groups = self._rows()
        tokenizer = tokenizer or self._tokenizer(rows["train"].texts)
        tokenizer_hash = digest(tokenizer.to_str())
        data, full_lengths = {}, {}
        for name, part in rows.items():
            data[name], full_lengths[name] = self._encode(tokenizer, tokenizer_hash, part, groups.get(name))
        unknown = {name: round(float((part.tokens == UNK_ID).mean()), 6) for name, part in data.items()}
        num_tokens = sum(len(part.tokens) for part in data.values())
        if sum(unknown[name] * len(part.tokens) for name, part in data.items()) > MANY_UNKNOWN * num_tokens:
            settings = self.tokenizer_settings
            log.warning(
                "%s: unknown to the tokenizer (%s, min_frequency %d) are %s of the tokens. %s",
                *(self.dataset_name, settings.tokenizer, settings.min_frequency),
                ", ".join(f"{share:.0%} in {name}" for name, share in unknown.items()),
                "Use another model."
                if self.tokenizer_dir
                else tokenizer_advice(rows["train"].texts, rows["validation"].texts, settings),
            )
        facts = text_facts(rows)
        warn_of(facts, {name: len(part.texts) for name, part in rows.items()}, self.dataset_name)
        hashes = _hashes(rows)
        linear = {name: stored_scores(self._baseline_path(hashes, name)) for name in FILES}
        fitted = {name: scores for name, scores in linear.items() if scores}
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
                "read_from": {name: part.origin for name, part in rows.items()},
                "rows": {name: len(part.texts) for name, part in rows.items()},
                "sha256": hashes,
                "tokenizer_sha256": tokenizer_hash,
                "vocab_size": tokenizer.get_vocab_size(),
                "train_validation_duplicates": facts["shared_texts"]["validation"]["train"],
                **facts,
                "token_lengths": {name: length_facts(lengths) for name, lengths in full_lengths.items()},
                "truncated_share": {
                    name: round(float((lengths > self.max_length).mean()), 6) for name, lengths in full_lengths.items()
                },
                "unknown_share": unknown,
                **({"baselines": fitted} if fitted else {}),
            },
        )

    def fit_baselines(self) -> None:
        """Fit the linear baselines, whose scores are in the fingerprint from then on. Raises ConfigError."""
        rows, _, _ = self._rows()
        for name in FILES:
            fit_linear_baseline(rows, self._baseline_path(_hashes(rows), name), name)

    def _baseline_path(self, hashes: dict[str, str], name: str) -> Path:
        """Where the scores of a linear baseline on rows with these hashes are stored."""
        return self.cache / f"{FILES[name]}-{digest(json.dumps(hashes))}.json"

    def _rows(self) -> tuple[dict[str, Rows], list[str], dict[str, NDArray[np.int64]]]:
        """The rows of every split, the class names, and for a mix the source number of each row by split."""
        if self.sources:
            parts = {
                source_name(source): self._chosen(user_path(source, "dataset_params.sources"))
                for source in self.sources
            }
            if len(parts) < len(self.sources):
                raise ConfigError(f"dataset_params.sources: two of {self.sources} have the same name. Rename a folder.")
            return mixed(parts)
        if self.data_dir:
            path = user_path(self.data_dir, "dataset_params.data_dir")
        else:
            path = hub_copy(self.source, self.cache)
        return *self._chosen(path), {}

    def _origin(self) -> str:
        """Where the texts come from, for the fingerprint."""
        if self.sources:
            return f"sources {', '.join(self.sources)}"
        return f"data_dir {self.data_dir}" if self.data_dir else f"hub {self.source.hub}"

    def _names(self, path: Path) -> ColumnNames:
        """The names that the text column and the label column may have. A source of a mix has its own."""
        source = TEXT_FIELDS.get(source_name(path), TextSource("")) if self.sources else self.source
        return ColumnNames.of(source, self.file_settings)

    def _chosen(self, path: Path) -> tuple[dict[str, Rows], list[str]]:
        """The rows of every split after subsets are drawn, with validation rows, and the class names."""
        rows, label_names = self.read(path)
        rows = with_missing_splits(rows, self.held_out_settings, path, strict=not self.sources)
        wanted = self.subsets
        trainable = np.unique(rows["train"].labels)
        for name, size in (("train", wanted.train_samples), ("validation", wanted.val_samples)):
            rows[name] = subset(rows[name], size, name, path, wanted.stratify)
        _warn_of_untrained(rows, label_names, trainable, path)
        if len(np.unique(rows["train"].labels)) < 2:
            raise ConfigError(f"{path}: the training rows have one class only; a classifier needs two or more")
        return rows, label_names

    def read(self, path: Path) -> tuple[dict[str, Rows], list[str]]:
        """The rows of every split as the files have them, and the class names."""
        from research_eval.datasets.text.files import read_rows  # Arrow takes 0.15 s to import

        return read_rows(path, self._names(path), self.file_settings)

    def read_texts(self, path: Path) -> list[str]:
        """The texts of any file whose text column has the name that it has in this set. Labels are not needed."""
        from research_eval.datasets.text.files import read_text_column

        places = [Path(source) for source in self.sources or [str(path)]]
        texts = dict.fromkeys(name for place in places for name in self._names(place).text)
        return read_text_column(path, replace(self._names(places[0]), text=tuple(texts)), self.file_settings)

    def _tokenizer(self, texts: list[str]) -> Tokenizer:
        """The tokenizer of a pretrained model, or else that of these texts, from the cache if it is there."""
        if self.tokenizer_dir:
            return folder_tokenizer(user_path(self.tokenizer_dir, "dataset_params.tokenizer_dir"))[0]
        options = asdict(self.tokenizer_settings)  # all of them are a part of the key
        key = digest(digest_texts(texts), json.dumps(options), tokenizers.__version__)

        def build() -> Arrays:
            kind, vocab_size = options.pop("tokenizer"), options.pop("tokenizer_vocab_size")
            with phase(f"training the tokenizer on {len(texts):,} texts"):
                serialised = train_tokenizer(texts, kind, vocab_size, **options).to_str()
            return {"tokenizer_json": np.frombuffer(serialised.encode(), np.uint8)}

        arrays = cached_arrays(self.cache / f"tokenizer-{key}.npz", build, check_tokenizer)
        return Tokenizer.from_str(arrays["tokenizer_json"].tobytes().decode())

    def _encode(
        self, tokenizer: Tokenizer, tokenizer_hash: str, rows: Rows, groups: NDArray[np.int64] | None
    ) -> tuple[TokenData, NDArray[np.int32]]:
        """The split as tokens, and how many tokens its N texts have before they are cut."""
        key = digest(digest_texts(rows.texts), tokenizer_hash, f"{self.max_length} {self.truncation}")

        def build() -> Arrays:
            with phase(f"tokenising {len(rows.texts):,} texts"):
                return encode_texts(tokenizer, rows.texts, self.max_length, self.truncation)._asdict()

        arrays = cached_arrays(
            self.cache / f"encoded-{key}.npz",
            build,
            lambda arrays: check_tokens(arrays, len(rows.texts), tokenizer.get_vocab_size()),
        )
        paths_NT = (
            np.repeat(groups[:, None], self.path_length, axis=1) if groups is not None and self.path_length else None
        )
        return TokenData(arrays["tokens"], arrays["offsets"], rows.labels, paths_NT, groups), arrays["full_lengths"]


def _hashes(rows: dict[str, Rows]) -> dict[str, str]:
    """Split -> hash of its texts and labels."""
    return {name: digest(digest_texts(part.texts), part.labels) for name, part in rows.items()}


def _warn_of_untrained(rows: dict[str, Rows], label_names: list[str], trainable: NDArray[np.int64], path: Path) -> None:
    """Say which classes have no training row: a model cannot learn them, but every score counts them.

    `trainable` are the classes that had training rows before a subset was drawn.
    """
    counts = {name: np.bincount(part.labels, minlength=len(label_names)) for name, part in rows.items()}
    missing = np.flatnonzero(counts["train"] == 0)
    if len(missing):
        scored = [f"{sum(count[missing])} rows of {name}" for name, count in counts.items() if sum(count[missing])]
        names = ", ".join(label_names[number] for number in missing[:SHOWN_CLASSES])
        lost = set(missing.tolist()) & set(trainable.tolist())
        log.warning(
            "%s: %d of %d classes have no training row (%s%s)%s%s",
            *(path, len(missing), len(label_names), names, ", ..." if len(missing) > SHOWN_CLASSES else ""),
            f", and {' and '.join(scored)} belong to them" if scored else "",
            '. Set "stratify": true to draw train_samples class by class' if lost else "",
        )


accept_flat_options(TextDataset)
