"""Where a text set lies on the hub, and what its columns and its split files may be called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


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

FILE_TYPES = (".parquet", ".csv", ".tsv", ".jsonl")


def source_name(source: str | Path) -> str:
    """The name of a source in a mix: that of its folder, or of its file without the ending."""
    path = Path(source).expanduser().absolute()
    return path.stem if path.suffix in FILE_TYPES else path.name
