"""Text sets with a file for each text, in a folder for each class: `train/pos/17.txt`.

N samples
"""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa

from research_eval.datasets.text.opening import check_size, text_of
from research_eval.datasets.text.source import SPLIT_OF_NAME
from research_eval.datasets.text.splits import RawRows
from research_eval.errors import ConfigError

log = logging.getLogger(__name__)

WITHOUT_LABELS = ("unsup", "unsupervised")  # a folder of texts of no class, as in the reviews of aclImdb


def class_folders(path: Path, encoding: str | None) -> dict[str, RawRows]:
    """The rows of each split; empty if the folder is none of this kind.

    The folders of the classes lie in a folder for each split, or all together in `path`, which is train then.
    """
    splits = {SPLIT_OF_NAME[folder.name]: folder for folder in _folders(path) if folder.name in SPLIT_OF_NAME}
    if "train" not in splits:
        splits = {"train": path}
    classes = {name: [one for one in _folders(folder) if _texts(one)] for name, folder in splits.items()}
    if len(classes["train"]) < 2:
        return {}
    return {name: _read(splits[name], folders, encoding) for name, folders in classes.items() if folders}


def _folders(path: Path) -> list[Path]:
    return sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))


def _texts(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix == ".txt")


def _read(where: Path, folders: list[Path], encoding: str | None) -> RawRows:
    """Every text with the name of its folder."""
    texts: list[str] = []
    labels: list[str] = []
    num_bytes = 0
    for folder in folders:
        if folder.name in WITHOUT_LABELS:
            log.info("%s: texts without a class, which are left out", folder)
            continue
        for path in _texts(folder):
            try:
                with text_of(path, encoding) as file:
                    content = file.read()
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read: {error.strerror}. Write the file again.") from error
            num_bytes += len(content)
            check_size(where, num_bytes)
            texts.append(content.decode())
            labels.append(folder.name)
    return RawRows(str(where), texts, pa.array(labels, pa.string()), None)
