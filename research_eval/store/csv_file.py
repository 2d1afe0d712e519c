"""CSV files: a line per run, appended by any number of processes, and whole tables as text."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from research_eval.errors import ConfigError
from research_eval.files import sync_folder
from research_eval.store.locks import locked
from research_eval.store.values import to_strict_json
from research_eval.wording import plain

CSV_FILE = "json_experiment_results.csv"  # a line per run from JSON, in the working directory

# The first characters by which a spreadsheet recognises a formula (OWASP, "CSV Injection").
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def append_csv(path: str | Path, row: dict[str, Any], unless_known: Sequence[str] = ()) -> None:
    """Append one row; a column that the header lacks is added to it, and old rows get an empty cell.

    Text that a spreadsheet would run as a formula gets a leading apostrophe. Several processes may append. The function
    does nothing if a row has the same cells in all the columns `unless_known`. Raises ConfigError if the folder does
    not exist or the file is not text.
    """
    path = Path(path).resolve()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{path}: not a file in an existing folder. Create the folder or give another name.")
    cells = {str(_cell(name)): _cell(value) for name, value in row.items()}
    csv.field_size_limit(2**31 - 1)  # a cell may be a long list
    with locked(path):
        try:
            header = next(_csv_rows(path), [])
            if unless_known and _is_known(path, header, {name: str(cells[name]) for name in unless_known}):
                return
            columns = [*header, *(name for name in cells if name not in header)]
            new_line = [cells.get(name, "") for name in columns]
            if columns == header:  # the usual case costs one line, however long the file is
                _append_line(path, new_line)
            else:
                old_lines = [[*line, *[""] * (len(columns) - len(line))] for line in _csv_rows(path)][1:]
                _replace_csv(path, [columns, *old_lines, new_line])
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: not UTF-8 text; it was left alone. Move it away or give another name."
            ) from error


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A whole file, header first; cells as `append_csv` writes them."""
    return csv_lines([columns, *rows])


def csv_lines(rows: Sequence[Sequence[Any]]) -> str:
    """Lines without a header, for a file that is written in parts."""
    text = io.StringIO()
    csv.writer(text).writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """The value as the csv module writes it: a number, or text that no spreadsheet takes for a formula.

    A negative number begins with "-" too, but a number is safe: only text gets the apostrophe.
    """
    value = plain(value)
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(to_strict_json(value))
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _csv_rows(path: Path) -> Iterator[list[str]]:
    """The lines of a file, none if it does not exist. Tolerates the byte-order mark that a spreadsheet writes."""
    if path.exists():
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from csv.reader(file)


def _is_known(path: Path, header: list[str], wanted: dict[str, str]) -> bool:
    """Whether a line has these cells in these columns."""
    if not set(wanted) <= set(header):
        return False
    return any(wanted.items() <= dict(zip(header, line, strict=False)).items() for line in _csv_rows(path))


def _append_line(path: Path, line: list[Any]) -> None:
    """Append the whole line or nothing: if the disk is full, the file is cut to its old length.

    The file may end without a line break, for example after an editor: then the line begins with one.
    """
    text = io.StringIO()
    csv.writer(text).writerow(line)
    with path.open("rb+", buffering=0) as file:
        size = file.seek(-1, os.SEEK_END) + 1
        last_line_is_whole = file.read(1) in (b"\n", b"\r")
        content = (b"" if last_line_is_whole else b"\r\n") + text.getvalue().encode()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _replace_csv(path: Path, lines: list[list[Any]]) -> None:
    """Write a new file and rename it: a crash leaves the old file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
