"""One experiment, top to bottom: config -> dataset -> model -> training -> scores -> results store."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

from research_eval.config.sections import ExperimentConfig
from research_eval.generation.during_training import TrainingSamples
from research_eval.runs.entry import RunEntry
from research_eval.runs.entry import TrialRun as TrialRun
from research_eval.runs.folder import claimed_folder, save_description
from research_eval.runs.journal import Journal, ending_of
from research_eval.runs.journal import Result as Result
from research_eval.runs.pictures import draw_pictures
from research_eval.runs.prepare import Prepared
from research_eval.runs.prepare import prepare as prepare
from research_eval.runs.scores import score
from research_eval.store.pending import merge_pending
from research_eval.store.store import Store
from research_eval.store.values import normal_metrics
from research_eval.system.progress import Display, Progress
from research_eval.training.fit import Parallel, fit

log = logging.getLogger(__name__)


def run(
    config: ExperimentConfig,
    *,
    db: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    parent_id: str | None = None,
    trial: TrialRun | None = None,
    progress: Display | None = None,
    to_csv: bool = True,
    show_data: bool = True,
    parallel: Parallel | None = None,
) -> Result:
    """Train, score and store one experiment; `resume` continues the newest run of the same config, also a shorter one.

    The screen shows the progress, unless it goes to a `progress` of the caller. `to_csv` adds the run, unless it is a
    trial, to the CSV file. `show_data` logs what is known of the data. `parallel` is the group of processes that train
    together, of which this one is the main one.

    Raises ConfigError before any work for what the user has to change. A run that diverges, is pruned or interrupted is
    a Result with that status; every other problem is stored as failed and raised. After the result is stored, a problem
    is only a warning.
    """
    with Store(db) as store:
        merge_pending(store)
        entry = RunEntry(store, config, resume, parent_id, trial)
        finished = entry.result_if_finished(to_csv)
        if finished is not None:
            return finished
        prepared = prepare(config, entry.data)
        entry.check(prepared)
        if show_data:
            entry.show_data(prepared.data)
        with claimed_folder(entry.experiment_id) as folder:
            attempt = entry.begin(prepared.runtime, prepared.data, folder)
            save_description(folder, config, prepared.data)
            with nullcontext(progress) if progress else Progress(config.epochs, quiet, warns=trial is None) as screen:
                watch = None if trial is None else trial.watch
                samples = TrainingSamples(config, prepared.data, prepared.runtime, folder)
                to_csv = entry.wants_csv_row(to_csv)
                journal = Journal(store, entry.experiment_id, screen, watch, to_csv, samples.write, attempt)
                return _train_and_store(entry.experiment_id, folder, config, prepared, journal, parallel)


def _train_and_store(
    experiment_id: str,
    folder: Path,
    config: ExperimentConfig,
    prepared: Prepared,
    journal: Journal,
    parallel: Parallel | None,
) -> Result:
    """Train and score; in whatever way it ends, the store gets to know."""
    runtime, data, model = prepared
    try:
        state, scored, evaluation = fit(model, data, config, runtime, folder, journal, parallel)
        metrics = score(state, scored, evaluation, data, config, runtime, folder)
        stored = normal_metrics(metrics)  # here, so that a metric which the store cannot hold fails the run
    except (Exception, KeyboardInterrupt) as problem:
        result = ending_of(problem, experiment_id, folder)
        if result is None:
            journal.fail(config, problem, folder)
            raise
        journal.end(config, result)
        log.log(
            logging.INFO if result.status == "pruned" else logging.WARNING,
            "run %s: %s: %s",
            experiment_id,
            result.status,
            result.error,
        )
        return result
    result = Result.finished(experiment_id, metrics, folder, data.fingerprint)
    journal.end(config, result, stored)
    draw_pictures(result, state.reports, config, data)
    return result
