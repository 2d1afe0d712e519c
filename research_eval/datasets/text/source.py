"""Where a text set lies on the hub, and what its columns and its split files may be called."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from research_eval.annotations import Younger
from research_eval.errors import ConfigError


@dataclass(frozen=True)
class TextSource:
    """Where the hub keeps a set, and what its columns are called there and in common local copies."""

    hub: str  # owner/name
    config: str | None = None  # the subset, if the set has several
    revision: str | None = None  # branch, tag or commit; None is the main branch
    text_fields: tuple[str, ...] = ("text",)
    label_fields: tuple[str, ...] = ("label",)


# Every other name is a hub name itself, with the columns `text` and `label`.
TEXT_FIELDS: dict[str, TextSource] = {
    "ag_news": TextSource("fancyzhx/ag_news"),
    "imdb": TextSource("stanfordnlp/imdb"),
    "sst2": TextSource("stanfordnlp/sst2", text_fields=("sentence", "text")),
    # The main branch is a loading script, which `datasets` no longer runs.
    "trec": TextSource("CogComp/trec", revision="refs/convert/parquet", label_fields=("coarse_label", "label")),
}

# Users append to `research_eval.datasets.providers.REAL_WORLD_DATASETS`, or assign another list to it. This package
# cannot read that name, because `providers` imports it, so `providers` puts its own function here.
real_world_names: Callable[[], Sequence[str]] = lambda: list(TEXT_FIELDS)  # noqa: E731 - replaced by assignment

# Spelling in file names and on the hub -> our name. Every other split (`unsupervised` of imdb) is ignored.
SPLIT_OF_NAME = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}

# Ending of a file -> how it is read.
READER_OF_TYPE = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".txt": "csv",
}
FILE_TYPES = tuple(ending for ending in READER_OF_TYPE if ending != ".txt")  # .txt may be any text
COMPRESSED = (".gz", ".zst")  # may follow any of them


def file_type(path: str | Path) -> str:
    """The ending that says how a file is read: ".csv" for `train.csv.gz`; "" if it is none of READER_OF_TYPE."""
    path = Path(path)
    path = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return path.suffix.lower() if path.suffix.lower() in READER_OF_TYPE else ""


def stem_of(path: str | Path) -> str:
    """The name of a file without the endings for its compression and its type."""
    path = Path(path)
    path = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return path.stem if path.suffix.lower() in READER_OF_TYPE else path.name


def source_name(source: str | Path) -> str:
    """The name of a source in a mix: that of its folder, or of its file without the ending."""
    path = Path(source).expanduser().absolute()
    return stem_of(path) if file_type(path) else path.name


@dataclass(frozen=True)
class FileSettings:
    """How files are read; the fields are options of `dataset_params`.

    `text_field` may name several columns, whose texts are joined by line breaks. `delimiter` (one character, or "tab"),
    `columns` (the names of the columns, for files without a header) and `quotes` (false if a quotation mark is a
    character like any other) are for CSV and TSV, `encoding` is for every text file. Raises ConfigError.
    """

    text_field: str | Annotated[list[str], Field(min_length=1)] | None = None
    label_field: str | None = None
    delimiter: Annotated[str | None, Younger()] = None
    columns: Annotated[Annotated[list[str], Field(min_length=2)] | None, Younger()] = None
    quotes: Annotated[bool, Younger()] = True
    encoding: Annotated[str | None, Younger()] = None

    def __post_init__(self) -> None:
        if self.delimiter is not None and not re.fullmatch(r'tab|[^"\w\r\n]', self.delimiter, re.ASCII):
            raise ConfigError(f'delimiter={self.delimiter!r}: expected one punctuation mark, a blank, or "tab"')
        if self.delimiter is not None and not self.delimiter.isascii():
            raise ConfigError(f"delimiter={self.delimiter!r}: expected a character of ASCII")
        for name in ("columns", "text_field"):
            given = getattr(self, name)
            if isinstance(given, list) and len(set(given)) < len(given):
                raise ConfigError(f"{name}={given} has a name twice")
        if self.encoding is not None:
            try:
                codecs.getincrementaldecoder(self.encoding)
                "a".encode(self.encoding)  # refuses codecs that are none of text
            except (LookupError, UnicodeError) as error:
                raise ConfigError(
                    f"encoding={self.encoding!r}: {error}. Expected a name such as cp1252, latin-1 or utf-16"
                ) from error


AS_USUAL = FileSettings()


@dataclass(frozen=True)
class ColumnNames:
    """What the columns of a set may be called."""

    text: tuple[str, ...]  # the first one that there is; if `joins_texts`, all of them
    label: tuple[str, ...]
    joins_texts: bool = False
    text_is_given: bool = False  # by the user: then no other column is looked for
    label_is_given: bool = False

    @classmethod
    def of(cls, source: TextSource, settings: FileSettings) -> ColumnNames:
        """The names that the user gives, else those of the source."""
        given, label = settings.text_field, settings.label_field
        joins = isinstance(given, list)
        return cls(
            (given,) if isinstance(given, str) else tuple(given or source.text_fields),
            (label,) if label else source.label_fields,
            joins,
            given is not None,
            label is not None,
        )

    def preferring(self, text: tuple[str, ...], label: str | None) -> ColumnNames:
        """The same with these names first, and none that is only looked for."""
        texts = self.text if self.joins_texts else (*text, *self.text)
        labels = self.label if label is None else (label, *self.label)
        return ColumnNames(tuple(dict.fromkeys(texts)), tuple(dict.fromkeys(labels)), self.joins_texts, True, True)
