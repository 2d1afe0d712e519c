"""Sets of the Hugging Face hub: downloaded once, then read from the cache as Parquet files."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from research_eval.datasets.text.cache import digest
from research_eval.datasets.text.source import SPLIT_OF_NAME, TextSource
from research_eval.errors import ConfigError

if TYPE_CHECKING:
    from datasets import DatasetDict

log = logging.getLogger(__name__)

CONNECT_SECONDS = 0.7
WAYS_OUT = (
    "Give dataset_params.data_dir a folder with train.parquet, train.csv, train.tsv or train.jsonl, "
    "or run once with network access: the copy is kept in the cache."
)


def hub_copy(source: TextSource, cache: Path) -> Path:
    """The folder in the cache with the splits of a hub set as Parquet; downloads them if the folder is not there yet.

    Raises ConfigError at once if the hub cannot be reached: `datasets` itself would try for half a minute.
    """
    key = digest(source.hub, f"{source.config} {source.revision}")[:12]
    folder = cache / "hub" / f"{re.sub('[^A-Za-z0-9]', '_', source.hub)}-{key}"
    if folder.is_dir():
        return folder
    if _offline_is_set():
        raise ConfigError(f"dataset {source.hub!r} is not in {cache} and HF_HUB_OFFLINE is set. {WAYS_OUT}")
    if not hub_answers():
        raise ConfigError(f"dataset {source.hub!r} is not in {cache} and the hub cannot be reached. {WAYS_OUT}")
    splits = _downloaded(source, cache.absolute() / "huggingface")
    _write(splits, source, folder)
    return folder


def _downloaded(source: TextSource, downloads: Path) -> DatasetDict:
    """The set as `datasets` loads it; its files go below `downloads`. Raises ConfigError if that fails."""
    if "HF_HOME" not in os.environ:
        # `datasets` reads these when it is imported. Its default is the user's home folder, which we do not fill.
        os.environ.setdefault("HF_HUB_CACHE", str(downloads / "hub"))
        os.environ.setdefault("HF_XET_CACHE", str(downloads / "xet"))
    import datasets

    try:
        return datasets.load_dataset(
            source.hub, source.config, revision=source.revision, cache_dir=str(downloads / "datasets")
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"dataset {source.hub!r}: the hub gave no data ({error}). {WAYS_OUT}") from error


def _write(splits: DatasetDict, source: TextSource, folder: Path) -> None:
    """Write the splits that we use as Parquet. The folder appears only when it is complete."""
    wanted = {SPLIT_OF_NAME[name]: part for name, part in splits.items() if name in SPLIT_OF_NAME}
    if "train" not in wanted:
        raise ConfigError(f"dataset {source.hub!r} has no train split, only {', '.join(splits)}. {WAYS_OUT}")
    temporary = folder.with_name(f".{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        for name, part in wanted.items():
            part.to_parquet(temporary / f"{name}.parquet")
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _offline_is_set() -> bool:
    """Whether the user forbids network access, by either variable of the Hugging Face libraries."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return any(value.upper() in {"1", "ON", "YES", "TRUE"} for value in values)


def hub_answers() -> bool:
    """Whether a server accepts a connection within CONNECT_SECONDS: HF_ENDPOINT, or the proxy that leads to it."""
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = getproxies().get(url.scheme)
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    answers = []

    def connect() -> None:
        try:
            socket.create_connection(address, CONNECT_SECONDS).close()
            answers.append(True)
        except OSError as error:
            log.info("no connection to %s:%d: %s", *address, error)

    # In a thread because the time limit of a connection does not cover the look-up of the name.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return bool(answers)
