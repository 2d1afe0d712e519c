"""What a study leaves: a CSV row per trial, the best configs as JSON, pictures, and its last lines on the terminal.

The CSV has the columns of `optuna.Study.trials_dataframe()` (values under the names of the objectives, parameters under
their plain names), and after them the columns of this project. Past runs that taught the sampler are in none of the
files; only the importances of the parameters are computed with them.
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

from research_eval.analysis.study_trials import TrialRecord, best_of, own_trials, pareto_front
from research_eval.errors import ConfigError
from research_eval.files import file_stem, write_atomically
from research_eval.store.csv_file import csv_text
from research_eval.store.store import Store
from research_eval.studies.adapter import trial_records
from research_eval.studies.options import StudyOptions
from research_eval.system.best_effort import attempted
from research_eval.system.untrusted import stored_object

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

MAX_STEM = 200  # characters; file systems allow 255 together with the endings
MAX_REASONS = 5  # reasons of failed trials in the last lines


@dataclass(frozen=True)
class StudyFiles:
    """The paths of the files of a study, and its data set. `stem` is how all their names begin."""

    stem: str
    folder: Path
    dataset_name: str

    @classmethod
    def of(cls, study_name: str, dataset_type: str, dataset_name: str, folder: Path = Path()) -> StudyFiles:
        """Files in `folder`, whose names consist of the study, the data type and the data set.

        A stem that is too long for a file system becomes shorter; `file_stem` keeps it unique with a checksum.
        """
        stem = f"optuna_study_{file_stem(study_name)}_{file_stem(dataset_type)}_{file_stem(dataset_name)}"
        return cls(stem if len(stem) <= MAX_STEM else file_stem(stem), folder, dataset_name)

    @property
    def csv(self) -> Path:
        """A row per trial."""
        return self.folder / f"{self.stem}_full_results.csv"

    @property
    def best_config(self) -> Path:
        """The config of the best trial, ready to run."""
        return self.folder / f"{self.stem}_best_config.json"

    @property
    def plots(self) -> Path:
        """The folder of the pictures."""
        return self.folder / f"{self.stem}_plots"

    def pareto_config(self, number: int) -> Path:
        """The path for the config of a trial on the Pareto front."""
        return self.folder / f"{self.stem}_pareto_{number}.json"

    def pareto_configs(self) -> list[Path]:
        """The paths of such configs that exist, also from earlier calls."""
        name = re.compile(rf"{re.escape(self.stem)}_pareto_\d+\.json")
        return sorted(path for path in self.folder.glob("*.json") if name.fullmatch(path.name))


# ------------------------------------------------------------------------------------------------------------ files


def write_csv_of(study: optuna.Study, objectives: Sequence[str], files: StudyFiles) -> None:
    """Write the CSV file of the trials as they are now. The new file replaces the old one."""
    columns, rows = _csv(own_trials(trial_records(study)), objectives)
    write_atomically(files.csv, csv_text(columns, rows).encode())


def _csv(records: Sequence[TrialRecord], objectives: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows. A study with several seeds per trial has one more column, with the ids of all runs."""
    params = sorted({name for record in records for name in record.plain_params})
    values = ["value"] if len(objectives) == 1 else [f"values_{name}" for name in objectives]
    several = any(len(record.experiment_ids) > 1 for record in records)
    columns = ["number", *values, "datetime_start", "datetime_complete", "duration"]
    columns += [*(f"params_{name}" for name in params), "state"]
    # The columns up to here are those of Optuna, the columns from here on are the project's own.
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
    """The duration in the format of pandas, which Optuna uses: `0 days 00:01:02.000345`."""
    if record.started is None or record.completed is None:
        return None
    passed = record.completed - record.started
    seconds, microseconds = divmod((passed - timedelta(passed.days)) // timedelta(microseconds=1), 1_000_000)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{passed.days} days {hours:02d}:{minutes:02d}:{seconds % 60:02d}.{microseconds:06d}"


def write_results(study: optuna.Study, objectives: Sequence[str], files: StudyFiles, db: str | None) -> list[Path]:
    """Write CSV, best configs and pictures of the trials as they are now; only the CSV if no trial is finished.

    `db` is the results store, which has the configs of the runs. Returns the paths of the files. Configs of an earlier
    Pareto front are removed if their trials are no longer on it. The trials are stored: what cannot be written is a
    warning, and the rest is written.
    """
    records = trial_records(study)
    written = []
    with attempted(log, "the CSV file of the study is not written"):
        write_csv_of(study, objectives, files)
        written.append(files.csv)
    with attempted(log, "no config is written"):
        written += _write_configs(records, objectives, files, db)
    with attempted(log, "the pictures of the study are not all drawn"):
        from research_eval.analysis.study_charts import StudyCharts
        from research_eval.analysis.study_plots import draw_study

        charts = StudyCharts(study.study_name, files.dataset_name, tuple(objectives), tuple(records))
        if charts.finished:
            written += draw_study(charts, files.plots)
    return written


def _write_configs(
    records: Sequence[TrialRecord], objectives: Sequence[str], files: StudyFiles, db: str | None
) -> list[Path]:
    """Write the best config and, for several objectives, all configs of the Pareto front."""
    best = best_of(records, objectives)
    front = pareto_front(records, objectives) if len(objectives) > 1 else []
    wanted = {} if best is None else {files.best_config: best}
    wanted |= {files.pareto_config(record.number): record for record in front}
    texts = _config_texts(list(wanted.values()), db)
    # A study that continues may find better trials: remove the configs that are no longer on the front.
    for path in files.pareto_configs():
        if path not in wanted:
            with attempted(log, f"{path}: is not on the front any more, but stays"):
                path.unlink()
    written = []
    for path, record in wanted.items():
        if record.number in texts:
            with attempted(log, f"the config of trial {record.number} is not written"):
                write_atomically(path, texts[record.number].encode())
                written.append(path)
    return written


def _config_texts(records: Sequence[TrialRecord], db: str | None) -> dict[int, str]:
    """Trial number -> the config of its first run as indented JSON, for the runs that the results store has."""
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
    except ConfigError as error:  # the trials are safe in the storage of the study, and the other files can be written
        log.warning("no config is written: %s", error)
    return found


# ---------------------------------------------------------------------------------------------------- the last lines


def summary(options: StudyOptions, records: list[TrialRecord], written: list[Path], exit_code: int) -> str:
    """The lines that a study prints at its end: counts, the best trial, reasons of failures, written files."""
    statuses = dict.fromkeys(("finished", "pruned", "diverged", "failed", *(record.status for record in records)))
    counts = {status: sum(record.status == status for record in records) for status in statuses}
    shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    n_trials = options.budget.n_trials
    lines = [f"study {options.study_name}: {len(records)} of {n_trials} trials ({shown or 'none'})"]
    lines += _best_lines(records, options.objectives)
    if counts["pruned"]:
        epochs = sum(record.epochs for record in records)
        whole = options.space.base["epochs"] * options.budget.seeds_per_trial * len(records)
        lines.append(f"  pruning: {epochs} epochs were trained, of {whole}")
    reasons = [
        f"  trial {record.number} {record.status}: {record.reason}"
        for record in records
        if record.status in ("failed", "diverged")
    ]
    lines += reasons[:MAX_REASONS]
    if len(reasons) > MAX_REASONS:
        lines.append(f"  ... and {len(reasons) - MAX_REASONS} more")
    if len(records) < n_trials or exit_code:
        added = options.budget.more_trials is not None
        how = f"--n_trials {n_trials} in place of --more_trials" if added else "the same command"
        lines.append(f"  {how} continues with the rest")
    return "\n".join([*lines, *(f"  {path}" for path in written)])


def _best_lines(records: Sequence[TrialRecord], objectives: Sequence[str]) -> list[str]:
    """The best trial with its values under their stored names; no line without a finished trial."""
    best = best_of(records, objectives)
    if best is None or best.values is None:
        return []
    line = f"  best {objectives[0]} {best.values[0]:.6g}: trial {best.number}, run {best.experiment_ids[0]}"
    return [line, *(f"    {key} = {value}" for key, value in best.params.items())]
