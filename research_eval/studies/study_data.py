"""The data of a study: all its trials with the same `dataset_params` have to see the same content.

The study keeps the hash of the data for each `dataset_params` that a trial has used. So a file that is corrected in the
middle of a study, or between two commands, does not mix trials on old and on new data.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

import optuna

from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError
from research_eval.runs.data_block import data_block
from research_eval.store.store import Store
from research_eval.store.values import canonical_json
from research_eval.studies.proposals import splits_of
from research_eval.system.untrusted import stored_object

if TYPE_CHECKING:
    from research_eval.studies.queue import TrialQueue

log = logging.getLogger(__name__)

DIGITS = 12  # of a hash, in messages
NOTED = "data_sha256 noted"  # attribute of a study whose trials have all noted their data


def check_data(study: optuna.Study, config: ExperimentConfig, fingerprint: dict[str, Any]) -> None:
    """Raise ConfigError if a trial with these `dataset_params` had data of another content; else note the content.

    Data without a hash pass.
    """
    found = fingerprint.get("data_sha256")
    if found is None:
        return
    name = _attribute(config.dataset_params)
    known = study.user_attrs.get(name)
    if known is None:
        study.set_user_attr(name, found)
    elif known != found:
        raise ConfigError(
            f"--study_name: the data of {config.dataset_name} have changed since the study {study.study_name!r} began "
            f"(sha256 {str(known)[:DIGITS]}, now {found[:DIGITS]}), so its trials do not compare. Put the data back, "
            "or give another name to begin a new study"
        )


def check_present_data(queue: TrialQueue, config: ExperimentConfig) -> None:
    """`check_data` before any trial, with the data as they are now. Raises ConfigError."""
    now = present_sha256(config)
    with queue.lock():
        if NOTED not in queue.study.user_attrs:
            _note_data_of_trials(queue)
            queue.study.set_user_attr(NOTED, True)
        check_data(queue.study, config, {"data_sha256": now})


def present_sha256(config: ExperimentConfig) -> str | None:
    """The hash of the data of a config as they are now. Raises ConfigError for unusable data."""
    found: str | None = _present_data(config).fingerprint.get("data_sha256")
    return found


def show_present_data(config: ExperimentConfig) -> None:
    """Log what is known of the data of a config as they are now. Raises ConfigError for unusable data."""
    for line in data_block(config.dataset_name, _present_data(config)):
        log.info("%s", line)


def _present_data(config: ExperimentConfig) -> DataSplits:
    params = canonical_json(config.dataset_params)
    return splits_of(config.dataset_type, config.dataset_name, params, config.seed)


def _attribute(dataset_params: dict[str, Any]) -> str:
    """The name under which the study keeps the hash for these parameters."""
    return f"data_sha256 of {hashlib.sha256(canonical_json(dataset_params).encode()).hexdigest()[:DIGITS]}"


def _note_data_of_trials(queue: TrialQueue) -> None:
    """Note the data of the trials of a study that began before hashes were noted, from the rows of their runs."""
    ids = [found for trial in queue.own_trials() for found in trial.user_attrs.get("experiment_ids", [])[:1]]
    known = dict(queue.study.user_attrs)
    with Store(queue.options.db) as store:
        rows = [store.find_id(experiment_id) for experiment_id in ids]
    for row in rows:
        params = {} if row is None else stored_object(row["full_config_json"]).get("dataset_params")
        if row is not None and row["data_sha256"] is not None and isinstance(params, dict):
            name = _attribute(params)
            if name not in known:
                known[name] = row["data_sha256"]
                queue.study.set_user_attr(name, row["data_sha256"])
