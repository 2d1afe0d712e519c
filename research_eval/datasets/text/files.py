"""Reading text sets: which files are which split, and the rows of a split, checked."""

from __future__ import annotations

import csv as plain_csv
import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import compute as pc

from research_eval.datasets.text.class_folders import class_folders
from research_eval.datasets.text.columns import Columns, find_columns, is_candidate, is_text_word
from research_eval.datasets.text.labels import as_written, class_numbers, classes_of, names_in_schema
from research_eval.datasets.text.opening import CHUNK_BYTES, check_size, decompressed
from research_eval.datasets.text.source import (
    COMPRESSED,
    FILE_TYPES,
    READER_OF_TYPE,
    SPLIT_OF_NAME,
    ColumnNames,
    FileSettings,
    file_type,
    stem_of,
)
from research_eval.datasets.text.splits import RawRows, Rows
from research_eval.datasets.text.tables import TableFile, open_table
from research_eval.errors import ConfigError
from research_eval.system.untrusted import check_regular_file
from research_eval.wording import nearest

log = logging.getLogger(__name__)

SHOWN_ROWS = 5  # in a message
JOINED_BY = "\n"  # between the texts of several columns
UNREADABLE = (pa.ArrowException, OSError, KeyError, UnicodeError, plain_csv.Error)  # what reading a file raises
VARIABLE_SIZES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
# Ending of a file that is not read -> how to get one that is.
OTHER_TYPES = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods"), "Save it in the spreadsheet as CSV UTF-8, and give that file."),
    **dict.fromkeys(
        (".pkl", ".pickle"), "Reading it could run any program. Write it with pandas: to_csv or to_parquet."
    ),
    **dict.fromkeys((".arrow", ".feather"), "Write it with pandas or datasets: to_parquet."),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".rar"), "Unpack it, and give what is in it."),
}


def read_rows(path: Path, names: ColumnNames, settings: FileSettings) -> tuple[dict[str, Rows], list[str]]:
    """The rows of every split in a folder (or of train, in one file), and the class names.

    `names` are those that the two columns may have. Raises ConfigError for files that cannot be used.
    """
    tables: dict[str, RawRows] = {}
    try:
        files = split_files(path)
        if not files:
            tables = class_folders(path, settings.encoding)
            if not tables:
                raise ConfigError(without_train(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}. Make its folders readable.") from error
    _check_used(path, [file_type(file) for paths in files.values() for file in paths], settings)
    for name, paths in files.items():
        found = _read_split(paths, names, settings, labels_needed=name != "test")
        if found is not None:
            tables[name], columns = found
            names = names.preferring(columns.text, columns.label)  # the other splits have the columns of train
    tables = as_written(tables)
    classes = classes_of(path, tables, names.label)
    rows = {name: Rows(table.texts, class_numbers(table, classes), table.origin) for name, table in tables.items()}
    return rows, classes.names


def read_text_column(path: Path, names: ColumnNames, settings: FileSettings) -> list[str]:
    """The texts of one file in their order, without labels; an empty cell is an empty text.

    `names` are those that the column may have. Raises ConfigError for a file that cannot be used.
    """
    try:
        with decompressed(path) as file:
            if not file.read(CHUNK_BYTES).strip():
                return []
        table = open_table(path, _Wanted(names), settings)
        if not any(name in names.text or is_text_word(name) for name in table.names):  # no config can be changed here
            wanted, found = " or ".join(map(repr, names.text)), ", ".join(table.names)
            raise ConfigError(f"{path}: no column {wanted}; found {found}. Rename the column of the texts.")
        columns = find_columns(table, names, label_is_needed=False)
        return text_cells(table, columns.text)
    except UNREADABLE as error:
        raise ConfigError(f"{path}: cannot be read: {error}. Write the file again.") from error


def text_cells(table: TableFile, fields: Sequence[str]) -> list[str]:
    """The texts of one column, or of several joined by line breaks; an empty cell is an empty text.

    Raises ConfigError for a column that holds something else, and what Arrow raises (UNREADABLE).
    """
    cells = table.read(fields)
    parts = [_plain(cells[name], table.path) for name in fields]
    parts = [part.cast(pa.string()) if pa.types.is_null(part.type) else part for part in parts]
    for part in parts:
        part.validate(full=True)  # Parquet does not promise UTF-8
    for name, part in zip(fields, parts, strict=True):
        if not pa.types.is_string(part.type):
            raise ConfigError(f"{table.path}: column {name!r} holds {part.type}, not text. Write it as text.")
    return [text or "" for text in parts[0].to_pylist()] if len(parts) == 1 else _joined(parts)


# ------------------------------------------------------------------------------------------------------ which files


def split_files(path: Path, in_folders: Sequence[str] = FILE_TYPES) -> dict[str, list[Path]]:
    """The files of each split, train first; none if there is no train. Raises ConfigError for two files or no shard.

    `in_folders` are the types of files that the folder of a split may hold.
    """
    if path.is_file():
        if not file_type(path):
            raise ConfigError(f"{path}: {_how_to_read(path)}")
        return {"train": [path]}
    if not path.is_dir():
        raise ConfigError(not_there(path))
    for place in (path, path / "data"):  # a folder as the hub gives it has the files in `data`
        found = _kinds(place, in_folders) if place.is_dir() else {}
        if "train" in found:
            break
    else:
        return {}
    files = {}
    for split in sorted(found, key=("train", "validation", "test").index):
        if len(found[split]) > 1:
            raise ConfigError(f"{path}: {' and '.join(found[split])} are all the {split} split. Keep one of them.")
        ((kind, files[split]),) = found[split].items()
        if "shards" in kind and len(files[split]) != int(kind.split()[0]):
            raise ConfigError(f"{path}: {len(files[split])} of {kind} are there. Add the missing ones.")
    return files


def _kinds(folder: Path, in_folders: Sequence[str]) -> dict[str, dict[str, list[Path]]]:
    """Split -> what its files are called together -> these files.

    A table counts first, then a folder for the split with tables of any names in it, and a .txt if there is neither.
    """
    found: list[defaultdict[str, dict[str, list[Path]]]] = [defaultdict(dict), defaultdict(dict), defaultdict(dict)]
    for file in sorted(folder.iterdir()):
        match = re.fullmatch(r"([a-z]+)(?:-\d{5}-of-(\d{5})(?:-[0-9a-f]{16})?)?", stem_of(file).lower())
        split = SPLIT_OF_NAME.get(match[1]) if match else None
        if match and split and file_type(file):
            name = f"{stem_of(file).partition('-')[0]}{file.name.removeprefix(stem_of(file))}"
            kind = name if match[2] is None else f"{int(match[2])} shards of {name}"
            found[0 if file_type(file) in FILE_TYPES else 2][split].setdefault(kind, []).append(file)
        elif split and file.is_dir():
            parts = [part for part in sorted(file.iterdir()) if file_type(part) in in_folders]
            if parts:
                found[1][split][f"{file.name}/"] = parts
    return found[2] | found[1] | found[0]


def _check_used(path: Path, types: list[str], settings: FileSettings) -> None:
    """Raise ConfigError for an option that no file of these types uses."""
    usual = FileSettings()
    for name in ("delimiter", "columns", "quotes", "encoding"):
        is_used = any(READER_OF_TYPE[one] == "csv" or (name == "encoding" and one != ".parquet") for one in types)
        if getattr(settings, name) != getattr(usual, name) and not is_used and (types or name != "encoding"):
            raise ConfigError(f"{path}: dataset_params.{name} is for other types of files than these. Leave it out.")


def _how_to_read(path: Path) -> str:
    """What to do with a file of a type that is not read."""
    ending = Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()
    wanted = f"the file has to end with {', '.join(FILE_TYPES)} (compressed: also {' or '.join(COMPRESSED)})"
    remedy = OTHER_TYPES.get(ending)
    if remedy is None:
        remedy = "If it is a table of text, rename it: .csv, or .tsv if tabs separate its cells."
    return f"{wanted}. {remedy}"


def not_there(path: Path, field: str = "dataset_params.data_dir") -> str:
    """What to say about a path that leads nowhere; `field` gave it."""
    if path.exists():
        return f"{field}: {str(path)!r} is neither a folder nor a regular file. Give one of them."
    try:
        near = nearest(path.name, [other.name for other in path.parent.iterdir()])
    except OSError:
        near = None
    hint = f" Did you mean {str(path.with_name(near))!r}?" if near else ""
    relative = "" if path.is_absolute() else f" Paths begin in {str(Path.cwd())!r}."
    return f"{field}: there is no file or folder {str(path)!r}.{hint}{relative}"


def without_train(path: Path) -> str:
    """What to say about a folder without a training split."""
    inside = sorted(path.iterdir())
    names = ", ".join(file.name for file in inside[:10]) or "nothing"
    wanted = ", ".join(f"train{ending}" for ending in FILE_TYPES)
    single = next((file for file in inside if file_type(file) and not file.name.startswith("dataset_info")), None)
    folder = next((one for one in inside if one.is_dir() and _has_train(one)), None)
    other = next((file for file in inside if file.suffix.lower() in OTHER_TYPES), None)
    remedy = "Put a file of one of these names there, or set dataset_params.data_dir to the file of the training rows."
    if folder is not None:
        remedy = f"Set dataset_params.data_dir to {str(folder)!r}."
    elif single is not None:
        remedy = f"Rename the file of the training rows, or set dataset_params.data_dir to it: {str(single)!r}."
    elif other is not None:
        remedy = f"{other.name}: {OTHER_TYPES[other.suffix.lower()]}"
    return f"{path}: no {wanted}; found {names}. {remedy}"


def _has_train(folder: Path) -> bool:
    try:
        return "train" in split_files(folder)
    except (ConfigError, OSError):
        return False


# ---------------------------------------------------------------------------------------------- a split of its tables


class _Wanted:
    """The names that a header should have: those of a config, and the words for texts and labels."""

    def __init__(self, names: ColumnNames) -> None:
        self._names = {*names.text, *names.label}

    def __contains__(self, name: object) -> bool:
        return name in self._names or is_candidate(str(name))


def _read_split(
    paths: list[Path], names: ColumnNames, settings: FileSettings, labels_needed: bool
) -> tuple[RawRows, Columns] | None:
    """The rows of one split and their columns; None without labels if `labels_needed` is false.

    A label column that is empty or holds only -1, as in the test splits of GLUE, counts as no labels.
    """
    where = str(paths[0])
    try:
        for path in paths:
            check_regular_file(path)
        files = [open_table(path, _Wanted(names), settings) for path in paths]
        columns = find_columns(files[0], names, labels_needed)
        if columns.label is None:
            return None
        fields = (*columns.text, columns.label)
        for file in files[1:]:
            if not set(fields) <= set(file.names):
                raise ConfigError(f"{file.path}: has other columns than {paths[0].name}. Give both the same ones.")
        class_names = None if files[0].schema is None else names_in_schema(files[0].schema, columns.label)
        table = pa.concat_tables([file.read(fields) for file in files])
        parts = [_plain(table[name], paths[0]) for name in columns.text]
        labels = _whole(_plain(table[columns.label], paths[0]))
        for array in (*parts, labels):
            array.validate(full=True)  # Parquet does not promise UTF-8
    except UNREADABLE as error:
        raise ConfigError(f"{where}: cannot be read: {error}. Write the file again.") from error
    if len(labels) == 0:
        raise ConfigError(f"{where}: no rows. Fill the file or remove it.")
    if not labels_needed and (labels.null_count == len(labels) or set(map(str, labels.unique().to_pylist())) == {"-1"}):
        log.info("%s: no labels, so there is no test split", where)
        return None
    _check_columns(files, columns, parts, labels)
    texts = parts[0].to_pylist() if len(parts) == 1 else _joined(parts)
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    origin = f"{paths[0].name}{more}: text from {', '.join(map(repr, columns.text))}, label from {columns.label!r}"
    return RawRows(where, texts, labels, class_names, origin), columns


def _joined(parts: list[Any]) -> list[str]:
    """The texts of several columns as one: those that are not blank, in the order of the columns."""
    rows = zip(*(part.to_pylist() for part in parts), strict=True)
    return [JOINED_BY.join(cell for cell in cells if cell and not cell.isspace()) for cells in rows]


def _check_columns(files: list[TableFile], columns: Columns, texts: list[Any], labels: Any) -> None:
    """Raise ConfigError unless the texts are strings, the labels strings or whole numbers, and no cell is empty."""
    where = str(files[0].path)
    for name, column in zip(columns.text, texts, strict=True):
        if not pa.types.is_string(column.type) and not (len(texts) > 1 and pa.types.is_null(column.type)):
            raise ConfigError(
                f"{where}: column {name!r} holds {column.type}, not text. Set dataset_params.text_field to a column "
                "of texts, or write the column as text."
            )
    # One of several texts may be empty, since it is left out.
    for name, column in [*(zip(columns.text, texts, strict=True) if len(texts) == 1 else ()), (columns.label, labels)]:
        if column.null_count:
            rows = [row for row, is_empty in enumerate(column.is_null().to_pylist()) if is_empty]
            places = _places(files, rows)
            raise ConfigError(
                f"{where}: column {name!r} has {column.null_count} empty cells (null) ({places}). Fill them in or "
                "remove the rows."
            )
    if not (pa.types.is_string(labels.type) or pa.types.is_int64(labels.type)):
        raise ConfigError(
            f"{where}: column {columns.label!r} holds {labels.type}. Labels are whole numbers or strings: write them "
            "as strings, or set dataset_params.label_field to another column."
        )
    if pa.types.is_string(labels.type):
        blank = [row for row, label in enumerate(labels.to_pylist()) if not label.strip()]
        if blank:
            raise ConfigError(
                f"{where}: column {columns.label!r} has {len(blank)} blank labels ({_places(files, blank)}). "
                "Fill them in or remove the rows."
            )


def _places(files: list[TableFile], rows: Sequence[int]) -> str:
    """Where rows are, for a message: their lines in a CSV file, otherwise their numbers from 1."""
    shown, find = list(rows[:SHOWN_ROWS]), files[0].line_of_row
    lines = find(shown) if find is not None and len(files) == 1 else None
    what, places = ("row", [row + 1 for row in shown]) if lines is None else ("line", lines)
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return f"{what}{'s'[: len(rows) - 1]} {', '.join(map(str, places))}{more}"


def _whole(labels: Any) -> Any:
    """The labels; a column of fractions that are all whole numbers (0.0, 1.0) becomes one of whole numbers."""
    if pa.types.is_floating(labels.type):
        try:
            return labels.cast(pa.int64())  # refuses anything but whole numbers
        except pa.ArrowInvalid:
            return labels
    return labels


def _plain(column: Any, path: Path) -> Any:
    """One array of string or int64 if the column can be cast to that; else the column's array as it is."""
    array = column.combine_chunks()
    kind = array.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        if any(is_kind(kind) for is_kind in VARIABLE_SIZES):  # a small file may name one long text often
            lengths = pc.binary_length(array.dictionary).cast(pa.int64())
            check_size(path, pc.sum(lengths.take(array.indices)).as_py() or 0)
        array = array.cast(kind)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_boolean(kind):
        return array.cast(pa.string())
    return array.cast(pa.int64()) if pa.types.is_integer(kind) else array
