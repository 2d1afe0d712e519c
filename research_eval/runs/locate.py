"""Where a stored run is, by its folder or by its id. The module imports no torch, so that it answers at once."""

from __future__ import annotations

from pathlib import Path

from research_eval.errors import ConfigError
from research_eval.files import CONFIG_FILE, MODEL_FILE, run_folder
from research_eval.store.find import find_run
from research_eval.store.store import Store
from research_eval.system.untrusted import in_folder, user_path


def find_folder(run: str | Path, db: str | None = None) -> Path:
    """The folder of a run with weights: `run` is that folder, or an id, the unique beginning of one, or "latest".

    A folder needs no database; it may be a copy. An id is looked up in `db`, and the folder is then in `runs/` of the
    working directory. Raises ConfigError for an unknown run, and for a run or a folder without weights.
    """
    text = str(run)
    path = user_path(text, "--run")
    if text and _holds_a_run(path):
        folder, status = path.resolve(), ""
    elif path.name != text.rstrip("/"):  # an id is a single word
        known = f"it has no {CONFIG_FILE}" if path.is_dir() else "there is no such folder"
        raise ConfigError(f"--run: {text} is no folder of a run: {known}")
    else:
        try:
            store = Store(db, read_only=True)
        except ConfigError as error:
            raise ConfigError(f"{error}. Without a database, give the folder of the run.") from error
        with store:
            row = find_run(store, text)
        folder, status = run_folder(str(row["experiment_id"])), f" ({row['status']})"
    if not in_folder(folder, MODEL_FILE).exists():
        elsewhere = " Call from the directory it was run in, or give its folder." if status else ""
        raise ConfigError(f"run {folder.name}{status}: no weights in {folder}.{elsewhere}")
    return folder


def _holds_a_run(folder: Path) -> bool:
    """Whether a run has written its config there."""
    try:
        return (folder / CONFIG_FILE).is_file()
    except OSError:  # too long to be a path
        return False
