"""Names of classes: where a set states them, and the class number of every label.

A label is text: its class has the name that the file has. Whole numbers are names too, so the labels 2019, 2020 and
2021 are three classes. Only if the set itself lists its classes may a label be a number into that list.

N samples
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from research_eval.datasets.text.splits import RawRows
from research_eval.errors import ConfigError
from research_eval.system.untrusted import parse_json, read_limited, steers
from research_eval.wording import printable

MAX_CLASSES = 10_000  # a larger number in a label column is an identifier, not a class
MAX_LABEL = 1000  # characters of a class name
WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
FRACTION = re.compile(r"[+-]?[0-9]{1,18}\.0+")
MAX_INFO_BYTES = 10_000_000


class Classes(NamedTuple):
    """The names of the classes in order, and whether the set lists them (otherwise they come from the labels)."""

    names: list[str]
    listed: bool


def classes_of(path: Path, tables: dict[str, RawRows], label_fields: tuple[str, ...]) -> Classes:
    """The classes: from `dataset_info.json`, else from the metadata of train, else from the labels.

    Raises ConfigError for too many classes and for names that a terminal would act on.
    """
    listed = _names_beside(path, label_fields) or tables["train"].class_names
    names = listed or _names_in(tables)
    if len(names) > MAX_CLASSES:
        raise ConfigError(
            f"{path}: {len(names):,} classes; a classifier takes up to {MAX_CLASSES:,}. If the column holds "
            "identifiers, set dataset_params.label_field to another one."
        )
    for name in names:
        if len(name) > MAX_LABEL or any(map(steers, name)):
            limits = f"expected at most {MAX_LABEL} characters and no control characters"
            raise ConfigError(f"{path}: label {printable(name[:40])!r}: {limits}")
    return Classes(names, listed is not None)


def names_in_schema(schema: Any, label_field: str) -> list[str] | None:
    """Class names in the metadata of an Arrow schema, as the `datasets` library writes them. Raises ConfigError."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if not stored:
        return None
    where = "the metadata 'huggingface' of the file"
    content = parse_json(stored[:MAX_INFO_BYTES], where)
    info = content.get("info") if isinstance(content, dict) else None
    features = info.get("features") if isinstance(info, dict) else None
    return _names_of(features, label_field, where)


def class_numbers(table: RawRows, classes: Classes) -> NDArray[np.int64]:
    """Labels as class numbers, [N]. Raises ConfigError for a label of no class.

    If the set lists its classes, a label that is not in the list may be the number of a class, from 0. In a column of
    numbers that are all in range every label is such a number, as the `datasets` library stores it.
    """
    found = table.labels.unique().to_pylist()
    by_name = {name: number for number, name in enumerate(classes.names)}
    numbers = {label: by_name[str(label)] for label in found if str(label) in by_name}
    if classes.listed:
        places = {label: int(label) for label in found if _is_place(label, len(classes.names))}
        are_places = pa.types.is_int64(table.labels.type) and len(places) == len(found)
        numbers = places if are_places else places | numbers
    wrong = [label for label in found if label not in numbers]
    if wrong:
        names = classes.names
        numbered = " Labels are these names, or their numbers from 0." if classes.listed else ""
        raise ConfigError(
            f"{table.where}: label {wrong[0]!r} is none of the {len(names)} classes "
            f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''}).{numbered}"
        )
    labels = table.labels.to_pylist()
    return np.fromiter((numbers[label] for label in labels), np.int64, len(labels))


def _is_place(label: int | str, num_classes: int) -> bool:
    """Whether the label is the number of a class, from 0."""
    return (isinstance(label, int) or label.isdecimal()) and 0 <= int(label) < num_classes


def _names_beside(path: Path, label_fields: tuple[str, ...]) -> list[str] | None:
    """Class names from `dataset_info.json` in the folder: `label_names`, or the features of the `datasets` library."""
    info_path = path / "dataset_info.json"
    if not info_path.exists():
        return None
    info = parse_json(read_limited(info_path, MAX_INFO_BYTES, "a description of data"), str(info_path))
    if not isinstance(info, dict):
        raise ConfigError(f"{info_path}: not a JSON object. Mend or remove it.")
    names = info.get("label_names")
    if names is not None:
        return _checked_names(names, str(info_path), "label_names")
    found = (_names_of(info.get("features"), field, str(info_path)) for field in label_fields)
    return next((names for names in found if names), None)


def _names_of(features: Any, label_field: str, where: str) -> list[str] | None:
    """Class names from a feature description as the `datasets` library writes it. Raises ConfigError."""
    feature = features.get(label_field) if isinstance(features, dict) else None
    names = feature.get("names") if isinstance(feature, dict) else None
    return _checked_names(names, where, "names") if names else None


def _checked_names(names: Any, where: str, key: str) -> list[str]:
    """The names as strings. Raises ConfigError for anything but a list of different names."""
    plain = isinstance(names, list) and all(isinstance(name, str | int | float) for name in names)
    if not plain or not len(set(map(str, names))) == len(names) > 0:
        raise ConfigError(f"{where}: {key} has to be a list of different names, got {str(names)[:80]!r}")
    return [str(name) for name in names]


def _names_in(tables: dict[str, RawRows]) -> list[str]:
    """The different labels. Whole numbers of all splits, in their order; other names of train alone, sorted.

    A name that only another split has is more likely a slip than a class.
    """
    found = {str(label) for table in tables.values() for label in table.labels.unique().to_pylist()}
    if all(WHOLE.fullmatch(label) for label in found):
        return sorted(found, key=lambda label: (int(label), label))
    return sorted(map(str, tables["train"].labels.unique().to_pylist()))


def as_written(tables: dict[str, RawRows]) -> dict[str, RawRows]:
    """The splits, with labels that a program has made fractions ("0.0", "1.0") as whole numbers again.

    Only if the labels of all splits are numbers and at least one of them is such a fraction; otherwise all stay.
    """
    found = {str(label) for table in tables.values() for label in table.labels.unique().to_pylist()}
    are_numbers = all(FRACTION.fullmatch(label) or WHOLE.fullmatch(label) for label in found)
    if not are_numbers or not any(map(FRACTION.fullmatch, found)):
        return tables
    return {name: table._replace(labels=_without_fraction(table.labels)) for name, table in tables.items()}


def _without_fraction(labels: Any) -> Any:
    if not pa.types.is_string(labels.type):
        return labels
    return pa.array([label.partition(".")[0] for label in labels.to_pylist()], pa.string())
