"""Merging two stores: copying the runs of another database into ours."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from research_eval.errors import ConfigError
from research_eval.store.changes import difference
from research_eval.store.connection import StoreUnavailable, database_url
from research_eval.store.pending import merge_pending
from research_eval.store.records import DELETED, KEPT, RunFilter, RunRecord
from research_eval.store.store import Store, joined_curation
from research_eval.store.tables import CURATION

RUNS_PER_BATCH = 200  # the points of so many runs are in memory at once
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass
class MergeReport:
    """How many runs of the other store were copied, updated or skipped, and how many lie in its trash.

    `conflicts` are the ids of runs that differ and were left unchanged on both sides.
    """

    copied: int = 0
    updated: int = 0
    skipped: int = 0
    deleted: int = 0
    conflicts: list[str] = field(default_factory=list)


def merge(other: str, db: str | None = None) -> MergeReport:
    """Copy the runs of the store `other`, which is only read, into `db`.

    The runs are entered in batches, one transaction each, so that a merge that was interrupted can simply be repeated.
    If a run differs on both sides, the later state wins (`is_later`). If neither state is later, our run stays and is
    reported as a conflict. Runs that are deleted there are not copied, and runs that are deleted here stay deleted.
    Raises ConfigError.
    """
    if _is_same_place(database_url(other), database_url(db)):
        raise ConfigError(
            f"merge: both names are {make_url(database_url(other)).render_as_string()}. Give another store."
        )
    report = MergeReport()
    with Store(other, read_only=True) as theirs, Store(db) as ours:
        merge_pending(ours)
        try:
            ids = [row["experiment_id"] for row in theirs.find_runs(RunFilter(view=KEPT))]
            report.deleted = theirs.count_runs(RunFilter(view=DELETED))
            for start in range(0, len(ids), RUNS_PER_BATCH):
                records = theirs.records(ids[start : start + RUNS_PER_BATCH])
                _count(report, records, ours.merge_records(records, is_later))
        except (SQLAlchemyError, StoreUnavailable, ValueError, TypeError) as error:  # a value that ours cannot hold
            cause = getattr(error, "orig", None) or getattr(error, "strerror", None) or error
            raise ConfigError(
                f"merge of {theirs.location} into {ours.location} stopped after {report.copied + report.updated} runs, "
                f"which stay: {str(cause).strip()}"
            ) from error
    return report


def _is_same_place(one: str, other: str) -> bool:
    """Whether two URLs name the same database.

    Two paths may lead to one file through a link. Two names of one server are not recognised; merging a database into
    itself changes nothing, it is only slow.
    """
    files = [make_url(url).database or "" for url in (one, other) if url.startswith("sqlite")]
    if len(files) == 2 and all(map(os.path.exists, files)):
        return Path(files[0]).samefile(files[1])
    return one == other


def is_later(ours: RunRecord, theirs: RunRecord) -> bool:
    """Whether theirs is the later state of the same run: finished and ours not, or both unfinished and alive longer."""
    states = [(record.experiment["status"] == "finished", record.experiment["heartbeat"]) for record in (ours, theirs)]
    (our_end, our_life), (their_end, their_life) = states
    if our_end or their_end:
        return their_end and not our_end
    return (their_life or _LONG_AGO) > (our_life or _LONG_AGO)


def _count(report: MergeReport, theirs: dict[str, RunRecord], ours: dict[str, RunRecord]) -> None:
    """Add a batch to the report; `ours` are the records that this store had before."""
    for experiment_id, record in theirs.items():
        known = ours.get(experiment_id)
        if known is None:
            report.copied += 1
            continue
        before = {name: known.experiment[name] for name in CURATION}
        is_said_more = joined_curation(known.experiment, record.experiment) != before
        if is_later(known, record) or (is_said_more and _differ_by_nothing_else(known, record)):
            report.updated += 1
        elif is_later(record, known) or _differ_by_nothing_else(known, record):
            report.skipped += 1
        else:
            report.conflicts.append(experiment_id)


def _differ_by_nothing_else(ours: RunRecord, theirs: RunRecord) -> bool:
    """Whether two records are equal but for what people say about the run."""
    same = [record._replace(experiment={**record.experiment, **dict.fromkeys(CURATION)}) for record in (ours, theirs)]
    return difference(*same) == 0
