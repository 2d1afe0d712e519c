"""Which columns of a table hold the text and the label, and what to write into a config if that is not clear."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from research_eval.datasets.text.source import ColumnNames
from research_eval.datasets.text.tables import TableFile
from research_eval.errors import ConfigError
from research_eval.wording import did_you_mean, shortened

log = logging.getLogger(__name__)

# What people call the two columns, in small letters without `_` and blanks. "text" may stand before or after a word.
TEXT_WORDS = frozenset(
    ["text", "sentence", "review", "content", "comment", "tweet", "body", "message", "document", "utterance", "phrase"]
)
LABEL_WORDS = frozenset(
    ["label", "labels", "class", "category", "sentiment", "target", "stars", "rating", "topic", "intent", "emotion"]
)
# Columns that number the rows. pandas writes the first two names, the library `datasets` the third.
INDEX_WORDS = frozenset(["", "unnamed0", "indexlevel0", "index", "id", "idx"])
SHOWN_COLUMNS, SHOWN_NAME = 20, 60  # names, and characters of each, in a message


class Columns(NamedTuple):
    """The columns of a file: those whose texts are joined (mostly one), and that of the label if there is one."""

    text: tuple[str, ...]
    label: str | None


def find_columns(table: TableFile, names: ColumnNames, label_is_needed: bool) -> Columns:
    """The columns of a file. A column under a name that nobody gave is logged.

    Raises ConfigError, with the lines to write into the config, if a column is missing, occurs twice or is not clear.
    """
    if not table.names:
        raise ConfigError(f"{table.path}: no rows. Fill the file or remove it.")
    texts: tuple[str, ...] | None = None
    if names.joins_texts:
        texts = names.text if set(names.text) <= set(table.names) else None
    else:
        text = _found(table, names.text, names.text_is_given, TEXT_WORDS, "text")
        texts = None if text is None else (text,)
    label = _found(table, names.label, names.label_is_given, LABEL_WORDS, "label")
    if texts is None or (label is None and label_is_needed):
        raise ConfigError(_advice(table, names, texts, label))
    for name in (*texts, *([] if label is None else [label])):
        if table.names.count(name) > 1:
            raise ConfigError(f"{table.path}: two columns are called {name!r}. Rename one of them.")
    if label in texts:
        raise ConfigError(f"{table.path}: column {label!r} is both text_field and label_field. Give two columns.")
    return Columns(texts, label)


def is_candidate(name: str) -> bool:
    """Whether people call a column of texts or of labels so."""
    return _plain(name) in LABEL_WORDS or is_text_word(name)


def _found(table: TableFile, candidates: Sequence[str], is_given: bool, words: frozenset[str], what: str) -> str | None:
    """The first candidate that is a column; unless it `is_given`, else the only column with a name in `words`."""
    for name in candidates:
        if name in table.names:
            return name
    if is_given:
        return None
    is_word = is_text_word if words is TEXT_WORDS else lambda name: _plain(name) in words
    others = [name for name in table.names if is_word(name)]
    if len(others) != 1:
        return None
    log.info("%s: the %s is column %r", table.path, what, others[0])
    return others[0]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def is_text_word(name: str) -> bool:
    plain = _plain(name)
    return plain in TEXT_WORDS or plain.removesuffix("text") in TEXT_WORDS or plain.removeprefix("text") in TEXT_WORDS


def _advice(table: TableFile, names: ColumnNames, texts: tuple[str, ...] | None, label: str | None) -> str:
    """What is missing, which columns there are, and what to write into the config instead."""
    rows = table.sample()
    guess_text, guess_label = _guess(table, rows, texts, label)
    missing: list[str] = []
    lines: list[str] = []
    given: list[str] = []
    if texts is None:
        wanted = [name for name in names.text if name not in table.names] if names.joins_texts else names.text
        missing.append(f"no column {' or '.join(map(repr, wanted))}")
        lines.append(f'"text_field": {json.dumps(guess_text, ensure_ascii=False)}')
        given += wanted if names.text_is_given else []
    if label is None:
        missing.append(f"no column {' or '.join(map(repr, names.label))}")
        lines.append(f'"label_field": {json.dumps(guess_label, ensure_ascii=False)}')
        given += names.label if names.label_is_given else []
    near = "".join(did_you_mean(name, table.names) for name in given)
    shown = [shortened(name, SHOWN_NAME, "...") for name in table.names[:SHOWN_COLUMNS]]
    found = ", ".join([*shown, *(["..."] if len(table.names) > SHOWN_COLUMNS else [])])
    remedy = f"Set dataset_params.{' and '.join(line.split(':')[0].strip(chr(34)) for line in lines)}"
    text = f"{table.path}: {' and '.join(missing)}; found {found}.{near} {remedy}"
    if len([name for name in table.names if _plain(name) not in INDEX_WORDS]) < 2:
        return f"{text}. A set needs a column of texts and one of labels: write the missing one into the file."
    text += f", for example {', '.join(lines)}."
    if table.line_of_row is not None and len(table.names) <= SHOWN_COLUMNS:
        roles = {guess_text: "text", guess_label: "label"}
        header = [roles.get(name, f"column{place}") for place, name in enumerate(table.names, 1)]
        text += f' If the first line is a row and no header, set "columns": {json.dumps(header)}.'
    return text


def _guess(
    table: TableFile, rows: list[dict[str, Any]], texts: tuple[str, ...] | None, label: str | None
) -> tuple[str, str]:
    """Columns to propose: the longest texts on average, and of the others the one with the fewest different values."""
    names = [name for name in table.names if _plain(name) not in INDEX_WORDS] or table.names
    cells = {name: [str(row.get(name) or "") for row in rows] for name in names}
    longest = max((name for name in names if name != label), key=lambda name: sum(map(len, cells[name])), default="")
    text = longest if texts is None else texts[0]
    others = [name for name in names if name != text]
    word = next((name for name in others if _plain(name) in LABEL_WORDS), None)
    fewest = min(others, key=lambda name: (len({*cells[name]}) < 2, len({*cells[name]}))) if others else text
    return text, label or word or fewest
