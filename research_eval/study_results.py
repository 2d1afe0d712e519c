"""What a study leaves behind: a CSV row per trial, the best configs as JSON, and pictures.

The CSV has the columns of `optuna.Study.trials_dataframe()` (values under the names of the objectives, parameters under
one name each) and the project's own after them. Past runs that taught the sampler are in none of the files; only the
importances of the parameters are computed with them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_eval.analysis.study_trials import TrialRecord, best_of, own_trials, pareto_front, trial_records
from research_eval.db_utils import Store, csv_text
from research_eval.errors import ConfigError
from research_eval.files import file_stem, write_atomically
from research_eval.system.untrusted import stored_object

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

MAX_STEM = 200  # characters; file systems allow 255 with all endings


@dataclass(frozen=True)
class StudyFiles:
    """Where the files of a study go, and the data set that it is about."""

    stem: str
    folder: Path
    dataset_name: str

    @classmethod
    def of(cls, study_name: str, dataset_type: str, dataset_name: str, folder: Path = Path()) -> StudyFiles:
        """In the working directory, under names made of the study, the data type and the data set."""
        stem = f"optuna_study_{file_stem(study_name)}_{file_stem(dataset_type)}_{file_stem(dataset_name)}"
        return cls(stem if len(stem) <= MAX_STEM else file_stem(stem), folder, dataset_name)

    @property
    def csv(self) -> Path:
        return self.folder / f"{self.stem}_full_results.csv"

    @property
    def best_config(self) -> Path:
        return self.folder / f"{self.stem}_best_config.json"

    @property
    def plots(self) -> Path:
        return self.folder / f"{self.stem}_plots"

    def pareto_config(self, number: int) -> Path:
        """The config of a trial on the Pareto front."""
        return self.folder / f"{self.stem}_pareto_{number}.json"

    def pareto_configs(self) -> list[Path]:
        """Those that are there."""
        name = re.compile(rf"{re.escape(self.stem)}_pareto_\d+\.json")
        return sorted(path for path in self.folder.glob("*.json") if name.fullmatch(path.name))


# ------------------------------------------------------------------------------------------------------------ files


def write_csv_of(study: optuna.Study, objectives: Sequence[str], files: StudyFiles) -> None:
    """The CSV of the trials as they stand; the whole file is replaced."""
    columns, rows = _csv(own_trials(trial_records(study)), objectives)
    write_atomically(files.csv, csv_text(columns, rows).encode())


def _csv(records: Sequence[TrialRecord], objectives: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    params = sorted({name for record in records for name in record.plain_params})
    values = ["value"] if len(objectives) == 1 else [f"values_{name}" for name in objectives]
    several = any(len(record.experiment_ids) > 1 for record in records)
    columns = ["number", *values, "datetime_start", "datetime_complete", "duration"]
    columns += [*(f"params_{name}" for name in params), "state"]
    columns += ["status", "reason", "model_type", "experiment_id", *["experiment_ids"] * several, "epochs", "attempts"]
    rows = []
    for record in records:
        found = record.plain_params
        row = [record.number, *(record.values or [None] * len(values)), record.started, record.completed]
        row += [_duration(record), *(found.get(name) for name in params), record.state]
        row += [record.status, record.reason, record.model_type, next(iter(record.experiment_ids), None)]
        row += [" ".join(record.experiment_ids)] * several
        rows.append([*row, record.epochs, record.attempts])
    return columns, rows


def _duration(record: TrialRecord) -> str | None:
    """As pandas writes it, which is what reads it."""
    if record.started is None or record.completed is None:
        return None
    passed = record.completed - record.started
    seconds, microseconds = divmod((passed - timedelta(passed.days)) // timedelta(microseconds=1), 1_000_000)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{passed.days} days {hours:02d}:{minutes:02d}:{seconds % 60:02d}.{microseconds:06d}"


def write_results(study: optuna.Study, objectives: Sequence[str], files: StudyFiles, db: str | None) -> list[Path]:
    """CSV, best configs and pictures of the trials as they stand; without a finished one only the CSV.

    Returns what was written. The configs of a Pareto front that an earlier call has left are removed.
    """
    from research_eval.analysis.study_plots import draw_study
    from research_eval.analysis.study_points import Story

    write_csv_of(study, objectives, files)
    records = trial_records(study)
    written = [files.csv, *_write_configs(records, objectives, files, db)]
    story = Story(study.study_name, files.dataset_name, tuple(objectives), tuple(records))
    if story.finished:
        written += draw_study(story, files.plots)
    return written


def _write_configs(
    records: Sequence[TrialRecord], objectives: Sequence[str], files: StudyFiles, db: str | None
) -> list[Path]:
    """The best config and, of several objectives, those of the Pareto front."""
    best = best_of(records, objectives)
    front = pareto_front(records, objectives) if len(objectives) > 1 else []
    wanted = {} if best is None else {files.best_config: best}
    wanted |= {files.pareto_config(record.number): record for record in front}
    texts = _config_texts(list(wanted.values()), db)
    for path in files.pareto_configs():
        if path not in wanted:
            path.unlink()
    written = []
    for path, record in wanted.items():
        if record.number in texts:
            write_atomically(path, texts[record.number].encode())
            written.append(path)
    return written


def _config_texts(records: Sequence[TrialRecord], db: str | None) -> dict[int, str]:
    """Trial number -> the config of its first run as indented JSON, for those that the results store has."""
    found: dict[int, str] = {}
    if not records:
        return found
    try:
        with Store(db, read_only=True) as store:
            for record in records:
                run = store.find_id(record.experiment_ids[0]) if record.experiment_ids else None
                if run is None:
                    log.warning("trial %d: its run is not in %s: no config is written", record.number, store.location)
                else:
                    found[record.number] = json.dumps(stored_object(run["full_config_json"]), indent=2) + "\n"
    except ConfigError as error:  # the study is safe in its own storage; the rest of its files can be written
        log.warning("no config is written: %s", error)
    return found
