"""Reading text sets from Parquet, CSV and JSONL files. Every file may be hostile: its size and nesting are limited."""

from __future__ import annotations

import csv as plain_csv
import logging
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import csv, parquet
from pyarrow import json as jsonl

from research_eval.datasets.text.labels import as_written, class_numbers, classes_of, names_in_schema
from research_eval.datasets.text.source import FILE_TYPES, SPLIT_OF_NAME
from research_eval.datasets.text.splits import RawRows, Rows
from research_eval.errors import ConfigError
from research_eval.store.csv_file import header_of
from research_eval.system.untrusted import MAX_JSON_DEPTH, check_regular_file

log = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 24  # a CSV or JSONL row has to fit into one block
PARQUET_ROWS = 1000  # that are decompressed at once
SHOWN_ROWS = 5  # in a message
MAX_SPLIT_BYTES = 2**31  # of one file, decompressed
VARIABLE_SIZES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def read_rows(
    path: Path, text_fields: tuple[str, ...], label_fields: tuple[str, ...]
) -> tuple[dict[str, Rows], list[str]]:
    """The rows of every split in a folder (or of train, in one file), and the class names.

    The fields are the names that the two columns may have. Raises ConfigError for files that cannot be used.
    """
    tables: dict[str, RawRows] = {}
    for name, paths in _files(path).items():
        table = _read_split(paths, text_fields, label_fields, labels_needed=name != "test")
        if table is not None:
            tables[name] = table
    tables = as_written(tables)
    classes = classes_of(path, tables, label_fields)
    return {name: Rows(table.texts, class_numbers(table, classes)) for name, table in tables.items()}, classes.names


# ------------------------------------------------------------------------------------------------------ which files


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of each split, train first. Raises ConfigError if a split has none, two, or missing shards."""
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise ConfigError(f"{path}: the file has to end with {', '.join(FILE_TYPES)}")
        return {"train": [path]}
    if not path.is_dir():
        raise ConfigError(f"dataset_params.data_dir: there is no file or folder {str(path)!r}")
    found: defaultdict[str, defaultdict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for file in _listed(path):
        match = re.fullmatch(r"([a-z]+)(?:-\d{5}-of-(\d{5})(?:-[0-9a-f]{16})?)?", file.stem)
        if file.suffix in FILE_TYPES and match and match[1] in SPLIT_OF_NAME:
            kind = (
                f"{match[1]}{file.suffix}" if match[2] is None else f"{int(match[2])} shards of {match[1]}{file.suffix}"
            )
            found[SPLIT_OF_NAME[match[1]]][kind].append(file)
    if "train" not in found:
        names = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
        wanted = ", ".join(f"train{suffix}" for suffix in FILE_TYPES)
        raise ConfigError(f"{path}: no {wanted}; found {names}")
    files = {}
    for split in sorted(found, key=("train", "validation", "test").index):
        if len(found[split]) > 1:
            raise ConfigError(f"{path}: {' and '.join(found[split])} are all the {split} split. Keep one of them.")
        ((kind, files[split]),) = found[split].items()
        if "shards" in kind and len(files[split]) != int(kind.split()[0]):
            raise ConfigError(f"{path}: {len(files[split])} of {kind} are there. Add the missing ones.")
    return files


def _listed(path: Path) -> list[Path]:
    """The files of a folder, sorted. A folder as the hub gives it has them in its folder `data`."""
    files = sorted(path.iterdir())
    inside = path / "data"
    if inside.is_dir() and not any(file.suffix in FILE_TYPES for file in files):
        return sorted(inside.iterdir())
    return files


# -------------------------------------------------------------------------------------------------- one file as table


def _read_csv(path: Path, fields: tuple[str, ...]) -> Any:
    """The file as an Arrow table, with the cells of the fields as they are written."""
    _check_size(path, path.stat().st_size)
    return csv.read_csv(
        path,
        csv.ReadOptions(block_size=BLOCK_BYTES),
        csv.ParseOptions(newlines_in_values=True, delimiter=_delimiter(path, fields)),
        csv.ConvertOptions(column_types=dict.fromkeys(fields, pa.string())),  # a text may look like a number or a date
    )


def _delimiter(path: Path, fields: tuple[str, ...]) -> str:
    """What separates the cells. A delimiter that the name of the file does not promise is reported."""
    usual = "\t" if path.suffix == ".tsv" else ","
    try:
        best, _ = header_of(path, fields, usual)
    except (UnicodeError, plain_csv.Error):  # the reader of the whole file says what is wrong with it
        return usual
    if best != usual:
        log.info("%s: its cells are separated by %r", path, best)
    return best


def _read_jsonl(path: Path, fields: tuple[str, ...]) -> Any:
    """The file as an Arrow table; one JSON object a line."""
    _check_size(path, path.stat().st_size)
    _check_depth(path)
    options = jsonl.ReadOptions(block_size=BLOCK_BYTES)
    table = jsonl.read_json(path, options)
    # Arrow takes a string such as "2024-01-31" for a time, unless it is told the type.
    times = [field.name for field in table.schema if pa.types.is_temporal(field.type) and field.name in fields]
    if times:
        known = pa.schema([(name, pa.string()) for name in times])
        table = jsonl.read_json(path, options, jsonl.ParseOptions(explicit_schema=known))
    return table


def _read_parquet(path: Path, fields: tuple[str, ...]) -> Any:
    """The file as an Arrow table. Raises ConfigError as soon as too much is decompressed."""
    with parquet.ParquetFile(path) as file:  # read_table would also make columns of folder names
        batches, num_bytes = [], 0
        for batch in file.iter_batches(PARQUET_ROWS):  # a small file may hold one long text a million times
            num_bytes += batch.nbytes
            _check_size(path, num_bytes)
            batches.append(batch)
        return pa.Table.from_batches(batches, file.schema_arrow)


READERS: dict[str, Callable[[Path, tuple[str, ...]], Any]] = dict(
    zip(FILE_TYPES, (_read_parquet, _read_csv, _read_csv, _read_jsonl), strict=True)
)


def _check_size(path: Path, num_bytes: int) -> None:
    """Raise ConfigError for more than MAX_SPLIT_BYTES."""
    if num_bytes > MAX_SPLIT_BYTES:
        raise ConfigError(f"{path}: holds more than {MAX_SPLIT_BYTES / 2**30:.0f} GiB. Give a part of it.")


def _check_depth(path: Path) -> None:
    """Raise ConfigError for a line that is nested deeply: Arrow's JSON reader would crash the process on it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.count(b"[") + line.count(b"{") > MAX_JSON_DEPTH:
                depth = deepest = 0
                for bracket in re.findall(rb"[\[\]{}]", re.sub(rb'"(?:[^"\\]|\\.)*+"?', b"", line)):
                    depth += 1 if bracket in b"[{" else -1
                    deepest = max(deepest, depth)
                if deepest > MAX_JSON_DEPTH:
                    raise ConfigError(f"{path}:{number}: nested deeper than {MAX_JSON_DEPTH} levels")


# ---------------------------------------------------------------------------------------------- a split of its tables


def _read_split(
    paths: list[Path], text_fields: tuple[str, ...], label_fields: tuple[str, ...], labels_needed: bool
) -> RawRows | None:
    """The rows of one split; None for a split without labels if `labels_needed` is false.

    A label column that is empty or holds only -1, as in the test splits of GLUE, counts as no labels.
    """
    where = str(paths[0])
    try:
        for path in paths:
            check_regular_file(path)
        tables = [READERS[path.suffix](path, (*text_fields, *label_fields)) for path in paths]
        columns = tables[0].column_names
        text_field = _pick(text_fields, columns, "text_field", where)
        if not labels_needed and not set(label_fields) & set(columns):
            return None
        label_field = _pick(label_fields, columns, "label_field", where)
        names = names_in_schema(tables[0].schema, label_field)
        table = pa.concat_tables([table.select([text_field, label_field]) for table in tables])
        texts = _plain(table[text_field], paths[0])
        labels = _whole(_plain(table[label_field], paths[0]))
        texts.validate(full=True)  # Parquet does not promise UTF-8
        labels.validate(full=True)
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}. Write the file again.") from error
    if len(texts) == 0:
        raise ConfigError(f"{where}: no rows. Fill the file or remove it.")
    if not labels_needed and (labels.null_count == len(labels) or set(map(str, labels.unique().to_pylist())) == {"-1"}):
        log.info("%s: no labels, so there is no test split", where)
        return None
    _check_columns(where, (text_field, texts), (label_field, labels))
    return RawRows(where, texts.to_pylist(), labels, names)


def _check_columns(where: str, text_column: tuple[str, Any], label_column: tuple[str, Any]) -> None:
    """Raise ConfigError unless the texts are strings, the labels strings or whole numbers, and no cell is empty."""
    (text_field, texts), (label_field, labels) = text_column, label_column
    if not pa.types.is_string(texts.type):
        raise ConfigError(f"{where}: column {text_field!r} holds {texts.type}, not text. Set text_field.")
    for name, column in (text_column, label_column):
        if column.null_count:
            raise ConfigError(f"{where}: column {name!r} has {column.null_count} empty cells (null). Remove the rows.")
    if not (pa.types.is_string(labels.type) or pa.types.is_int64(labels.type)):
        raise ConfigError(f"{where}: column {label_field!r} holds {labels.type}. Labels are whole numbers or strings.")
    if pa.types.is_string(labels.type):
        blank = [row for row, label in enumerate(labels.to_pylist()) if not label.strip()]
        if blank:
            places = _lines_of(Path(where), blank, (text_field, label_field))
            raise ConfigError(
                f"{where}: column {label_field!r} has {len(blank)} blank labels ({places}). "
                "Fill them in or remove the rows."
            )


def _lines_of(path: Path, rows: list[int], fields: tuple[str, ...]) -> str:
    """Where rows are, for a message: their lines in a CSV file, otherwise their numbers from 1."""
    places = [row + 1 for row in rows[:SHOWN_ROWS]]
    what = "row"
    if path.suffix in (".csv", ".tsv"):
        what, last = "line", 1
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = plain_csv.reader(file, delimiter=_delimiter(path, fields))
            starts = []  # of the rows: a cell may hold line breaks
            for cells in reader:
                if cells:
                    starts.append(last)
                last = reader.line_num + 1
        places = [starts[place] for place in places if place < len(starts)]
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return f"{what}{'s'[: len(rows) - 1]} {', '.join(map(str, places))}{more}"


def _pick(candidates: tuple[str, ...], columns: list[str], key: str, where: str) -> str:
    """The first candidate that is a column. Raises ConfigError if none is."""
    for name in candidates:
        if name in columns:
            return name
    wanted = " or ".join(map(repr, candidates))
    raise ConfigError(f"{where}: no column {wanted}; found {', '.join(columns)}. Set dataset_params.{key}.")


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
            _check_size(path, pc.sum(lengths.take(array.indices)).as_py() or 0)
        array = array.cast(kind)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_boolean(kind):
        return array.cast(pa.string())
    return array.cast(pa.int64()) if pa.types.is_integer(kind) else array
