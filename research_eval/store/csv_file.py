"""CSV files: a line per run, appended by any number of processes, and whole tables as text.

Users open the file of the runs in spreadsheets, which save it in their own ways. A file that is still CSV in UTF-8 is
continued as it is, with its own delimiter; any other file is left alone.
"""

from __future__ import annotations

import codecs
import csv
import errno
import io
import json
import logging
import os
import shutil
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from research_eval.errors import ConfigError
from research_eval.files import sync_folder
from research_eval.store.locks import locked
from research_eval.store.values import to_strict_json
from research_eval.system.best_effort import attempted, reason_of
from research_eval.wording import plain

log = logging.getLogger(__name__)

CSV_FILE = "json_experiment_results.csv"  # a line per run from JSON, in the working directory
FIRST_COLUMNS = ("experiment_id", "timestamp", "experiment_name", "model_type", "dataset_name", "seed", "status")
DELIMITERS = (",", ";", "\t", "|")  # the first one for a new file; spreadsheets and other programs write the others
CHUNK_BYTES = 2**20

# The first characters by which a spreadsheet recognises a formula (OWASP, "CSV Injection").
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def append_csv(path: str | Path, row: dict[str, Any], unless_known: Sequence[str] = ()) -> None:
    """Append one row; a column that the header lacks is added to it, and old rows get an empty cell.

    Text that a spreadsheet would run as a formula gets a leading apostrophe. Several processes may append. The function
    does nothing if a row has the same cells in all the columns `unless_known`. Raises ConfigError if the folder does
    not exist or the file is not CSV in UTF-8.
    """
    path = _checked_place(path)
    cells = {str(_cell(name)): _cell(value) for name, value in row.items()}
    with locked(path):
        table = _Table.of(path, cells)
        if unless_known and table.has({name: str(cells[name]) for name in unless_known}):
            return
        columns = [*table.header, *(name for name in cells if name not in table.header)]
        new_line = [cells.get(name, "") for name in columns]
        if columns == table.header:  # the usual case writes one line, however long the file is
            _append_line(path, table.text([new_line]), table.has_open_quote)
        else:
            old_lines = [[*line, *[""] * (len(columns) - len(line))] for line in table.lines()]
            _replace_csv(path, table.mark + table.header_text(columns) + table.text([*old_lines, new_line]))


def append_if_possible(row: dict[str, Any], unless_known: Sequence[str] = ()) -> None:
    """Append the row of a run, which has an `experiment_id`, to CSV_FILE; a problem is only a warning.

    The database has the result. A later `--resume` of the same config adds a row that is missing.
    """
    with attempted(log, f"{CSV_FILE}: no row for run {row['experiment_id']}, whose result is in the database"):
        append_csv(CSV_FILE, row, unless_known)


def csv_accepts_rows() -> bool:
    """Whether rows can be appended to CSV_FILE, as far as that is known before a run. If not, a warning says why."""
    try:
        path = _checked_place(CSV_FILE)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        if path.exists():
            with locked(path):
                _Table.of(path, FIRST_COLUMNS)
    except (ConfigError, OSError) as problem:
        reason = reason_of(problem).rstrip(".")
        log.warning("results CSV: cannot be appended: %s. The results go to the database only.", reason)
        return False
    return True


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


def _checked_place(path: str | Path) -> Path:
    """The absolute path. Raises ConfigError if no regular file can be there; another kind may block forever."""
    path = Path(path).absolute()
    try:
        path = path.resolve()
        is_possible = path.parent.is_dir() and (path.is_file() or not path.exists())
    except RuntimeError:  # links in a circle
        is_possible = False
    if not is_possible:
        raise ConfigError(f"{path}: not a file in an existing folder. Create the folder or give another name.")
    return path


@dataclass(frozen=True)
class _Table:
    """What one has to know of a file to continue it. A file that does not exist is an empty table."""

    path: Path
    mark: str  # the byte-order mark that a spreadsheet writes, or nothing
    delimiter: str
    header: list[str]
    has_open_quote: bool  # the file was cut off inside a cell

    @classmethod
    def of(cls, path: Path, expected: Container[str]) -> _Table:
        """Read a file in which some of the `expected` columns are. Raises ConfigError if it is not CSV in UTF-8."""
        csv.field_size_limit(2**31 - 1)  # a cell may be a long list
        try:
            mark, has_open_quote = _checked_text(path)
            delimiter, header = header_of(path, expected)
        except (UnicodeError, csv.Error) as error:
            raise ConfigError(
                f"{path}: not UTF-8 text; it was left alone. Save it as CSV in UTF-8, or move it away."
            ) from error
        if "experiment_id" in expected and header and not any(name in expected for name in header):
            raise ConfigError(f"{path}: its first line names no column of the runs; it was left alone. Move it away.")
        return cls(path, mark, delimiter, header, has_open_quote)

    def lines(self) -> Iterator[list[str]]:
        """The lines after the header."""
        return islice(_csv_lines(self.path, self.delimiter), 1, None)

    def has(self, wanted: dict[str, str]) -> bool:
        """Whether a line has these cells in these columns."""
        if not set(wanted) <= set(self.header):
            return False
        return any(wanted.items() <= dict(zip(self.header, line, strict=False)).items() for line in self.lines())

    def text(self, lines: Sequence[Sequence[Any]], quoting: Literal[0, 1] = csv.QUOTE_MINIMAL) -> str:
        """Lines as they are in this file."""
        text = io.StringIO()
        csv.writer(text, delimiter=self.delimiter, quoting=quoting).writerows(lines)
        return text.getvalue()

    def header_text(self, columns: Sequence[str]) -> str:
        """The first line. Names with a foreign delimiter are in quotes, so that it is not taken for the file's own."""
        is_clear = not any(delimiter in name for name in columns for delimiter in DELIMITERS)
        return self.text([columns], csv.QUOTE_MINIMAL if is_clear else csv.QUOTE_ALL)


def header_of(path: Path, expected: Container[str], usual: str = DELIMITERS[0]) -> tuple[str, list[str]]:
    """The delimiter of a CSV file, and its header.

    It is the delimiter that gives the header most of the expected columns, and otherwise most columns; of equally good
    ones `usual`. Raises UnicodeError and csv.Error.
    """
    return likeliest([(delimiter, next(_csv_lines(path, delimiter), [])) for delimiter in DELIMITERS], expected, usual)


def likeliest(headers: list[tuple[str, list[str]]], expected: Container[str], usual: str) -> tuple[str, list[str]]:
    """Of a header as each delimiter gives it, the one that `header_of` takes."""
    return max(headers, key=lambda one: (sum(name in expected for name in one[1]), len(one[1]), one[0] == usual))


def _checked_text(path: Path) -> tuple[str, bool]:
    """Read the whole file once; return its byte-order mark, and whether a quote is open at its end.

    Raises UnicodeError unless it is UTF-8 without zero bytes. A file in another encoding may look like UTF-8 for many
    lines, and UTF-16 may be UTF-8 with zero bytes.
    """
    if not path.exists():
        return "", False
    num_quotes = 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        mark = codecs.BOM_UTF8.decode() if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else ""
        file.seek(0)
        while chunk := file.read(CHUNK_BYTES):
            decoder.decode(chunk)
            if b"\0" in chunk:
                raise UnicodeError("a zero byte")
            num_quotes += chunk.count(b'"')
    decoder.decode(b"", final=True)
    return mark, num_quotes % 2 == 1


def _csv_lines(path: Path, delimiter: str) -> Iterator[list[str]]:
    """The lines of a file, none if it does not exist. A byte-order mark is skipped."""
    if path.exists():
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from csv.reader(file, delimiter=delimiter)


def _append_line(path: Path, line: str, has_open_quote: bool) -> None:
    """Append the whole line or nothing: if the disk is full, the file is cut to its old length.

    The file may end without a line break, for example after an editor: then the line begins with one. A cell that was
    cut off is closed first, or it would swallow the line.
    """
    with path.open("rb+", buffering=0) as file:
        size = file.seek(-1, os.SEEK_END) + 1
        last_line_is_whole = file.read(1) in (b"\n", b"\r")
        content = (b"" if last_line_is_whole else b"\r\n") + line.encode()
        if has_open_quote:
            content = b'"\r\n' + line.encode()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _replace_csv(path: Path, content: str) -> None:
    """Write a new file and rename it: a crash leaves the old file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
