"""Names of classes: where a set states them, and the class number of every label.

N samples
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from research_eval.datasets.text.splits import RawRows
from research_eval.errors import ConfigError
from research_eval.system.untrusted import parse_json, read_limited, steers
from research_eval.wording import printable

MAX_CLASSES = 10_000  # a larger number in a label column is an identifier, not a class
MAX_LABEL = 1000  # characters of a class name
MAX_INFO_BYTES = 10_000_000


def class_names(path: Path, tables: dict[str, RawRows], label_fields: tuple[str, ...]) -> list[str]:
    """The classes in order: from `dataset_info.json`, else from the metadata of train, else from the labels.

    Raises ConfigError for too many classes and for names that a terminal would act on.
    """
    names = _names_beside(path, label_fields) or tables["train"].class_names or _names_in(tables)
    if len(names) > MAX_CLASSES:
        raise ConfigError(f"{path}: {len(names):,} classes; a classifier takes up to {MAX_CLASSES:,}")
    for name in names:
        if len(name) > MAX_LABEL or any(map(steers, name)):
            limits = f"expected at most {MAX_LABEL} characters and no control characters"
            raise ConfigError(f"{path}: label {printable(name[:40])!r}: {limits}")
    return names


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


def class_numbers(table: RawRows, names: list[str]) -> NDArray[np.int64]:
    """Labels as class numbers, [N]. `names` are the classes in order. Raises ConfigError for a label of no class."""
    found = table.labels.unique().to_pylist()
    if pa.types.is_int64(table.labels.type):
        wrong = [label for label in found if not 0 <= label < len(names)]
        numbers = {label: label for label in found}
    else:
        wrong = [label for label in found if label not in names]
        numbers = {name: number for number, name in enumerate(names)}
    if wrong:
        raise ConfigError(
            f"{table.where}: label {wrong[0]!r} is none of the {len(names)} classes "
            f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''}). Labels are numbers from 0 or these names."
        )
    labels = table.labels.to_pylist()
    return np.fromiter((numbers[label] for label in labels), np.int64, len(labels))


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
    """Class names made from the labels: the sorted strings of train, or the numbers up to the largest label."""
    if pa.types.is_string(tables["train"].labels.type):
        return sorted(tables["train"].labels.unique().to_pylist())
    largest, where = max((max(table.labels.unique().to_pylist()), table.where) for table in tables.values())
    if largest >= MAX_CLASSES:
        raise ConfigError(f"{where}: label {largest}: number the classes from 0 to at most {MAX_CLASSES - 1}")
    return [str(label) for label in range(largest + 1)]
