"""One data file as a table: its columns first, then the cells of the columns that are wanted.

Every file may be hostile: its size and nesting are limited.
"""

from __future__ import annotations

import csv as plain_csv
import io
import json
import logging
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import csv, parquet
from pyarrow import json as jsonl

from research_eval.datasets.text.opening import check_size, compression, decompressed, text_of
from research_eval.datasets.text.source import READER_OF_TYPE, FileSettings, file_type
from research_eval.errors import ConfigError
from research_eval.store.csv_file import DELIMITERS, likeliest
from research_eval.system.phases import report
from research_eval.system.untrusted import MAX_JSON_DEPTH, parse_json

log = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 24  # a CSV or JSONL row has to fit into one block
PARQUET_ROWS = 1000  # that are decompressed at once
MAX_LIST_BYTES = 2**28  # of a JSON list, which is parsed as a whole
MAX_HEADER = 1 << 20  # characters of the first line of a CSV file
SAMPLE_ROWS = 100
CELL_LIMIT = 2**31 - 1
ONE_TYPE = "Give all values of the column one type: numbers, or text in quotation marks."


@dataclass(frozen=True)
class TableFile:
    """A data file whose columns are known."""

    path: Path
    names: list[str]
    read: Callable[[Sequence[str]], Any]
    """Columns -> an Arrow table with these. Raises ConfigError and what Arrow raises."""
    sample: Callable[[], list[dict[str, Any]]]
    """The first rows, at most SAMPLE_ROWS."""
    schema: Any = None  # of Parquet, which may have the names of the classes
    line_of_row: Callable[[Sequence[int]], list[int]] | None = None
    """Row numbers from 0 -> line numbers from 1; None for a file without lines."""


def open_table(path: Path, names: Container[str], settings: FileSettings) -> TableFile:
    """Find out the columns of a file. `names` are those that one of its columns may have.

    Raises ConfigError and what Arrow raises.
    """
    reader = READER_OF_TYPE[file_type(path)]
    if reader == "parquet":
        return _parquet(path)
    return _csv(path, names, settings) if reader == "csv" else _json(path, settings)


# ----------------------------------------------------------------------------------------------------------------- CSV


class Layout(NamedTuple):
    """How the cells of a CSV file are separated, and where its rows begin."""

    delimiter: str
    names: list[str]
    skipped: int  # lines before the header, such as the "sep=;" of a spreadsheet
    has_header: bool


def _csv(path: Path, names: Container[str], settings: FileSettings) -> TableFile:
    layout = _layout(path, names, settings)

    def read(fields: Sequence[str]) -> Any:
        wrong: list[Any] = []

        def note(row: Any) -> str:
            wrong.append(row)
            return "error"

        with text_of(path, settings.encoding) as file:
            # Arrow reads ahead in a thread of its own. If that calls Python while the program ends, the process aborts.
            content = pa.BufferReader(file.read())
            try:
                table = csv.read_csv(
                    content,
                    csv.ReadOptions(
                        block_size=BLOCK_BYTES,
                        skip_rows=layout.skipped,
                        column_names=None if layout.has_header else layout.names,
                    ),
                    csv.ParseOptions(
                        newlines_in_values=True,
                        ignore_empty_lines=len(layout.names) > 1,  # one column: an empty line is an empty cell
                        delimiter=layout.delimiter,
                        quote_char='"' if settings.quotes else False,
                        invalid_row_handler=note,
                    ),
                    # The cells stay as they are written: a text may look like a number or a date.
                    csv.ConvertOptions(include_columns=list(fields), column_types=dict.fromkeys(fields, pa.string())),
                )
            except pa.ArrowInvalid as error:
                raise ConfigError(_csv_problem(path, layout, settings, error, bool(wrong))) from error
        if settings.quotes:
            _check_quotes(path, layout, settings, table)
        return table

    def sample() -> list[dict[str, Any]]:
        rows = islice(_records(path, layout, settings), SAMPLE_ROWS)
        return [dict(zip(layout.names, cells, strict=False)) for _, cells in rows]

    def line_of_row(rows: Sequence[int]) -> list[int]:
        wanted, last = set(rows), max(rows)
        starts = enumerate(islice(_records(path, layout, settings), last + 1))
        return [line for row, (line, _) in starts if row in wanted]

    return TableFile(path, layout.names, read, sample, line_of_row=line_of_row)


def _layout(path: Path, names: Container[str], settings: FileSettings) -> Layout:
    """Find out the delimiter and the names of the columns. A delimiter that the file's name does not say is logged."""
    usual = "\t" if file_type(path) in (".tsv", ".txt") else ","
    given = "\t" if settings.delimiter == "tab" else settings.delimiter
    with text_of(path, settings.encoding) as file:
        start = file.read(MAX_HEADER).decode(errors="ignore")
    skipped = 0
    if marked := re.match(r'"?sep=([^\w\s]|\t)"?\r?\n', start):  # a spreadsheet writes and reads this line
        skipped, start, given = 1, start[marked.end() :], given or marked[1]
    headers: list[tuple[str, list[str]]] = [
        (one, next(filter(None, _reader(io.StringIO(start, newline=""), one, settings)), []))
        for one in (DELIMITERS if given is None else [given])
    ]
    if settings.columns is not None:
        fitting = [one for one in headers if len(one[1]) == len(settings.columns)]
        if not fitting:
            raise ConfigError(
                f"{path}: dataset_params.columns has {len(settings.columns)} names, and the first line has "
                f"{len(likeliest(headers, (), usual)[1])} cells. Name all of them"
            )
        delimiter, columns = likeliest(fitting, (), usual)[0], settings.columns
    else:
        delimiter, columns = likeliest(headers, names, usual)
    if delimiter != usual and given is None:
        log.info("%s: its cells are separated by %r", path, delimiter)
    return Layout(delimiter, columns, skipped, settings.columns is None)


def _reader(lines: Iterable[str], delimiter: str, settings: FileSettings, strict: bool = False) -> Any:
    """Reads the records of a CSV file."""
    plain_csv.field_size_limit(CELL_LIMIT)  # a text may be longer than the library expects
    quoting: Literal[0, 3] = plain_csv.QUOTE_MINIMAL if settings.quotes else plain_csv.QUOTE_NONE
    return plain_csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=strict)


def _records(path: Path, layout: Layout, settings: FileSettings) -> Iterator[tuple[int, list[str]]]:
    """The rows below the header, each with the number of its first line: a cell may hold line breaks."""
    with text_of(path, settings.encoding) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        for _ in range(layout.skipped):
            text.readline()
        reader = _reader(text, layout.delimiter, settings)
        start, is_header = layout.skipped + 1, layout.has_header
        for cells in reader:
            if cells and not is_header:
                yield start, cells
            is_header = is_header and not cells
            start = layout.skipped + reader.line_num + 1


def _csv_problem(path: Path, layout: Layout, settings: FileSettings, error: Exception, is_ragged: bool) -> str:
    """What is wrong with a CSV file that Arrow refuses, and what to do."""
    if is_ragged:
        for line, cells in _records(path, layout, settings):
            if len(cells) != len(layout.names):
                more = len(cells) > len(layout.names)
                remedy = (
                    f'Put a cell that has {layout.delimiter!r} in it into quotation marks (")' if more else "Mend it"
                )
                if settings.quotes and any('"' in cell or "\n" in cell for cell in cells):
                    remedy += ', or set "quotes": false in dataset_params if a quotation mark is an ordinary character'
                return (
                    f"{path}:{line}: cannot be read: {len(cells)} cells, but {len(layout.names)} columns "
                    f"(separated by {layout.delimiter!r}). {remedy}."
                )
    if "straddling" in str(error):
        long = f"cannot be read: a row is longer than {BLOCK_BYTES / 2**20:.0f} MB"
        return f'{path}: {long}. Close its quotation marks, set "quotes": false in dataset_params, or shorten the text.'
    if "Empty CSV" in str(error):
        return f"{path}: no rows. Fill the file or remove it."
    return f"{path}: cannot be read: {error}. Write the file again."


def _check_quotes(path: Path, layout: Layout, settings: FileSettings, table: Any) -> None:
    """Raise ConfigError if a quotation mark that nothing closes makes the rest of the file one cell.

    It is a warning if cells with line breaks may be several rows, because a quotation mark stands inside a cell or the
    cells are separated by tabs: in such files quotation marks are often ordinary characters.
    """
    num_breaks = sum(pc.sum(pc.match_substring(column, "\n")).as_py() or 0 for column in table.columns)
    if not num_breaks:
        return
    remedy = 'set "quotes": false in dataset_params if a quotation mark is an ordinary character in this file'
    doubt = " between tabs" if layout.delimiter == "\t" else ""
    start = 1
    with text_of(path, settings.encoding) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        reader = _reader(text, layout.delimiter, settings, strict=True)
        try:
            for _ in reader:
                start = reader.line_num + 1
        except plain_csv.Error as error:
            if "unexpected end" in str(error):
                raise ConfigError(
                    f"{path}:{start}: a quotation mark is opened and never closed. Close it, or {remedy}."
                ) from error
            doubt = f", and a quotation mark stands inside the cell of line {start}"
    if doubt:
        log.warning("%s: %d cells have line breaks%s. Check them, and %s", path, num_breaks, doubt, remedy)


# ---------------------------------------------------------------------------------------------------------------- JSON


def _json(path: Path, settings: FileSettings) -> TableFile:
    """JSON lines, one object a line, or one JSON document: the content decides, not the name of the file."""
    with text_of(path, settings.encoding) as file:
        start = file.read(1 << 16).lstrip()[:1]
        file_is_list = start == b"["
    if file_is_list or (start == b"{" and _is_document(path, settings)):
        return _of_columns(path, _document(path, settings))
    return _json_lines(path, settings)


def _is_document(path: Path, settings: FileSettings) -> bool:
    """Whether a file that begins with an object is that object alone, with lists or objects as its values."""
    with text_of(path, settings.encoding) as file:
        lines = (line for line in file if line.strip())
        try:
            first, second = json.loads(next(lines)), next(lines, None)
        except (ValueError, RecursionError):
            return next(lines, None) is not None  # the first line is no object, so that more lines belong to it
    return second is None and any(isinstance(value, list | dict) for value in first.values())


def _json_lines(path: Path, settings: FileSettings) -> TableFile:
    with text_of(path, settings.encoding) as file:
        _check_depth(path, file)

    def parsed(explicit: Any = None) -> Any:
        with text_of(path, settings.encoding) as file:
            try:
                options = jsonl.ReadOptions(block_size=BLOCK_BYTES)
                return jsonl.read_json(
                    pa.BufferReader(file.read()), options, jsonl.ParseOptions(explicit_schema=explicit)
                )
            except pa.ArrowInvalid as error:
                raise ConfigError(_json_problem(path, settings, error)) from error

    table = parsed()

    def read(fields: Sequence[str]) -> Any:
        # Arrow takes a string such as "2024-01-31" for a time, unless it is told the type.
        times = [field.name for field in table.schema if pa.types.is_temporal(field.type) and field.name in fields]
        again = parsed(pa.schema([(name, pa.string()) for name in times])) if times else table
        return again.select(list(fields))

    return TableFile(path, table.column_names, read, lambda: table.slice(0, SAMPLE_ROWS).to_pylist())


def _json_problem(path: Path, settings: FileSettings, error: Exception) -> str:
    """What is wrong with JSON lines that Arrow refuses, and what to do."""
    with text_of(path, settings.encoding) as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise ValueError("this is no object")
            except (ValueError, RecursionError) as problem:
                return f"{path}:{number}: cannot be read: {problem}. Write one JSON object in each line."
    if "Empty JSON" in str(error):
        return f"{path}: cannot be read: no rows. Fill the file or remove it."
    if "straddling" in str(error):
        return f"{path}: cannot be read: a row is longer than {BLOCK_BYTES / 2**20:.0f} MB. Shorten the text."
    remedy = "Mend this value."
    if "changed from" in str(error):
        remedy = ONE_TYPE
    return f"{path}: cannot be read: {error}. {remedy}"


def _document(path: Path, settings: FileSettings) -> dict[str, list[Any]]:
    """The columns of a JSON document: a list of objects, alone or as a value of an object, or an object of columns."""
    with text_of(path, settings.encoding) as file:
        content = file.read(MAX_LIST_BYTES + 1)
    if len(content) > MAX_LIST_BYTES:
        limit = MAX_LIST_BYTES // 2**20
        raise ConfigError(f"{path}: a JSON document of more than {limit} MB. Write one JSON object in each line.")
    try:
        whole = parse_json(content, str(path))
    except ConfigError as error:
        raise ConfigError(f"{error}. Mend it, or write one JSON object in each line.") from error
    rows = whole
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if _are_rows(value)]
        rows = whole.get("data") if _are_rows(whole.get("data")) else lists[0] if len(lists) == 1 else None
        if rows is None:
            return _columns_in(whole, path)
    if not _are_rows(rows):
        raise ConfigError(f"{path}: cannot be read: not a list of JSON objects. Write one object for each row.")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(row, dict) for row in value)


def _columns_in(whole: dict[str, Any], path: Path) -> dict[str, list[Any]]:
    """The columns of an object of lists, or of objects with the same keys, as pandas writes them."""
    values = list(whole.values())
    if all(isinstance(value, list) for value in values) and len(set(map(len, values))) == 1:
        return whole
    if all(isinstance(value, dict) and value.keys() == values[0].keys() for value in values) and values:
        return {name: list(value.values()) for name, value in whole.items()}
    raise ConfigError(f"{path}: cannot be read: no list of JSON objects in it. Write one object for each row.")


def _of_columns(path: Path, columns: dict[str, list[Any]]) -> TableFile:
    def read(fields: Sequence[str]) -> Any:
        arrays = {}
        for name in fields:
            try:
                arrays[name] = pa.array(columns[name])
            except UnicodeError as error:
                raise ConfigError(f"{path}: cannot be read: column {name!r}: {error}. Mend this value.") from error
            except (pa.ArrowException, TypeError, ValueError) as error:
                raise ConfigError(f"{path}: cannot be read: column {name!r}: {error}. {ONE_TYPE}") from error
        return pa.table(arrays)

    def sample() -> list[dict[str, Any]]:
        rows = islice(zip(*columns.values(), strict=True), SAMPLE_ROWS)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    return TableFile(path, list(columns), read, sample)


def _check_depth(path: Path, file: IO[bytes]) -> None:
    """Raise ConfigError for a line that is nested deeply: Arrow's JSON reader would crash the process on it."""
    for number, line in enumerate(file, 1):
        if line.count(b"[") + line.count(b"{") > MAX_JSON_DEPTH:
            depth = deepest = 0
            for bracket in re.findall(rb"[\[\]{}]", re.sub(rb'"(?:[^"\\]|\\.)*+"?', b"", line)):
                depth += 1 if bracket in b"[{" else -1
                deepest = max(deepest, depth)
            if deepest > MAX_JSON_DEPTH:
                raise ConfigError(f"{path}:{number}: nested deeper than {MAX_JSON_DEPTH} levels. Remove that value.")


# ------------------------------------------------------------------------------------------------------------- Parquet


def _parquet(path: Path) -> TableFile:
    def opened() -> Any:  # read_table would also make columns of folder names
        if compression(path) is None:
            return parquet.ParquetFile(path)
        with decompressed(path) as file:
            return parquet.ParquetFile(pa.BufferReader(file.read()))

    def batches(fields: Sequence[str] | None) -> Iterator[Any]:
        num_bytes = num_rows = 0
        with opened() as file:
            for batch in file.iter_batches(PARQUET_ROWS, columns=None if fields is None else list(fields)):
                num_bytes += batch.nbytes  # a small file may hold one long text a million times
                check_size(path, num_bytes)
                num_rows += len(batch)
                report(f"{path.name}, row {num_rows:,} of {file.metadata.num_rows:,}")
                yield batch

    with opened() as file:
        schema = file.schema_arrow

    def read(fields: Sequence[str]) -> Any:
        found = list(batches(fields))
        empty = pa.schema([schema.field(name) for name in fields])
        return pa.Table.from_batches(found, found[0].schema if found else empty).select(list(fields))

    def sample() -> list[dict[str, Any]]:
        first = next(batches(None), None)
        return [] if first is None else first.slice(0, SAMPLE_ROWS).to_pylist()

    return TableFile(path, schema.names, read, sample, schema)
