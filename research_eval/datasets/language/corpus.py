"""Running text from files: which text is which split, and where documents begin."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple

from research_eval.datasets.language.stream import Document
from research_eval.datasets.text.files import UNREADABLE, not_there, split_files, text_cells, without_train
from research_eval.datasets.text.opening import text_of
from research_eval.datasets.text.source import FILE_TYPES, FileSettings, file_type
from research_eval.datasets.text.tables import TableFile, open_table
from research_eval.errors import ConfigError
from research_eval.system.untrusted import check_regular_file
from research_eval.wording import did_you_mean, shortened

log = logging.getLogger(__name__)

TEXT = "text"  # the usual name of the column
SHOWN_COLUMNS, SHOWN_NAME = 20, 60  # names, and characters of each, in a message
GLUED = 0.99  # share of the rows that end without white space; above it, there is a warning


class SplitText(NamedTuple):
    """One split: its documents, or one whole text, and where they come from."""

    texts: list[str]
    origin: str


def read_corpus(
    path: Path, document: Document, text_field: str | None, val_fraction: float, field: str = "dataset_params.data_dir"
) -> dict[str, SplitText]:
    """The text of every split in a folder, or in one file; `field` gave the path.

    A table gives a text for each row. A .txt file is the text itself; with document="row" its lines are the rows.
    Rows are joined as they are unless document="row". A document without any character is left out. A set without
    validation split gives the last `val_fraction` of its training text for it. Raises ConfigError.
    """
    if not path.exists():
        raise ConfigError(not_there(path, field))
    try:
        files = split_files(path, (*FILE_TYPES, ".txt"))
        if not files:
            raise ConfigError(without_train(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}. Make its folders readable.") from error
    found = {name: _read(paths, document, text_field) for name, paths in files.items()}
    for name, part in found.items():
        if not any(part.texts):
            raise ConfigError(f"{files[name][0]}: the {name} split has no text. Fill the file or remove it.")
    if "validation" not in found:
        found |= _with_validation(found["train"], document, val_fraction, path)
    order = ("train", "validation", "test")
    return {name: found[name] for name in sorted(found, key=order.index)}


def _read(paths: Sequence[Path], document: Document, text_field: str | None) -> SplitText:
    """The documents of a split, or its whole text as one."""
    rows_of_file, columns = [], []
    for path in paths:
        rows, column = _rows(path, document, text_field)
        rows_of_file.append(rows)
        columns += [] if column is None else [column]
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    origin = f"{paths[0].name}{more}{f': text from {columns[0]!r}' if columns else ''}"
    if document == "file":
        texts = ["".join(rows) for rows in rows_of_file]
    else:
        texts = list(itertools.chain.from_iterable(rows_of_file))
        if document == "none":
            _warn_of_glued_rows(texts, paths[0])
            texts = ["".join(texts)]
    return SplitText([text for text in texts if text], origin)


def _warn_of_glued_rows(rows: list[str], path: Path) -> None:
    if len(rows) > 1 and sum(not row[-1:].isspace() for row in rows) > GLUED * len(rows):
        log.warning(
            "%s: its rows do not end with a line break, so that the last word of each row runs into the next row. "
            'Set "document": "row" to separate them',
            path,
        )


def _rows(path: Path, document: Document, text_field: str | None) -> tuple[list[str], str | None]:
    """The texts of the rows of a file, and the name of the column that has them; no name for plain text."""
    try:
        check_regular_file(path)
        if file_type(path) == ".txt":
            with text_of(path) as file:
                text = file.read().decode()
            return ([line.removesuffix("\r") for line in text.split("\n")] if document == "row" else [text]), None
        table = open_table(path, _Wanted(text_field), FileSettings(text_field=text_field))
        column = _text_column(table, text_field)
        return text_cells(table, [column]), column
    except UNREADABLE as error:
        raise ConfigError(f"{path}: cannot be read: {error}. Write the file again.") from error


class _Wanted(Container[str]):
    """The names that tell which character separates the cells of a CSV file."""

    def __init__(self, text_field: str | None) -> None:
        self._name = TEXT if text_field is None else text_field

    def __contains__(self, name: object) -> bool:
        return name == self._name


def _text_column(table: TableFile, text_field: str | None) -> str:
    """The given column, or `text`, or the only column of texts. Raises ConfigError if it is not clear."""
    names = table.names
    if not names:
        raise ConfigError(f"{table.path}: no rows. Fill the file or remove it.")
    name = TEXT if text_field is None else text_field
    found = [name] if name in names else []
    if not found and text_field is None:
        rows = table.sample()
        found = [one for one in dict.fromkeys(names) if _are_texts([row.get(one) for row in rows])]
        if len(found) == 1:
            log.info("%s: the text is column %r", table.path, found[0])
    if len(found) != 1:
        shown = [shortened(one, SHOWN_NAME, "...") for one in names[:SHOWN_COLUMNS]]
        listed = ", ".join([*shown, *(["..."] if len(names) > SHOWN_COLUMNS else [])])
        near = did_you_mean(name, names) if text_field is not None else ""
        raise ConfigError(
            f"{table.path}: no column {name!r}; found {listed}.{near} Set dataset_params.text_field to the column of "
            "the text."
        )
    if names.count(found[0]) > 1:
        raise ConfigError(f"{table.path}: two columns are called {found[0]!r}. Rename one of them.")
    return found[0]


def _are_texts(values: list[object]) -> bool:
    """Whether the cells are texts, and not numbers that a CSV file writes."""
    cells = [value for value in values if value is not None]
    return bool(cells) and all(isinstance(cell, str) for cell in cells) and not all(map(_is_number, cells))


def _is_number(cell: object) -> bool:
    try:
        float(str(cell))
    except ValueError:
        return False
    return True


def _with_validation(train: SplitText, document: Document, val_fraction: float, path: Path) -> dict[str, SplitText]:
    """The training text without its end, and its end as validation split. Raises ConfigError for an empty part."""
    if document == "none":
        (text,) = train.texts
        end = _cut(text, round(len(text) * (1 - val_fraction)))
        first, last = [text[:end]], [text[end:]]
    else:
        total, end, seen = sum(map(len, train.texts)), 0, 0
        while end < len(train.texts) and seen + len(train.texts[end]) <= (1 - val_fraction) * total:
            seen += len(train.texts[end])
            end += 1
        end = min(max(end, 1), len(train.texts) - 1)
        first, last = train.texts[:end], train.texts[end:]
    if not any(first) or not any(last):
        what = "one document only" if document != "none" else "too short a text"
        raise ConfigError(
            f"{path}: {what}, which cannot give a validation split (val_fraction={val_fraction}). Add a validation "
            "file, or more text."
        )
    origin = f"the last {val_fraction:.0%} of {train.origin}"
    return {"train": SplitText(first, train.origin), "validation": SplitText(last, origin)}


def _cut(text: str, place: int) -> int:
    """Where the text is cut: behind the line break before `place`, else behind the one after it, else at a blank."""
    for mark in ("\n", " "):
        end = text.rfind(mark, 0, place) + 1 or text.find(mark, place) + 1
        if 0 < end < len(text):
            return end
    return place
