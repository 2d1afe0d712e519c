"""The trials of a study as this program reads them are those that Optuna reads."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from research_eval.store.connection import database_url
from research_eval.studies.storage import StudyStorage

DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "z": FloatDistribution(1e-4, 1.0, log=True),
    "a": IntDistribution(2, 64, log=True),
    "step": IntDistribution(0, 10, step=5),
    "kind": CategoricalDistribution(["x", 3, None, False]),
}
PARAMS: dict[str, Any] = {"z": 0.25, "a": 8, "step": 5, "kind": None}


def fill(storage: StudyStorage) -> int:
    """The id of one of two studies, which has trials of every state and with every kind of number."""
    for name in ("other", "mine"):
        study = optuna.create_study(study_name=name, storage=storage, directions=["minimize", "maximize"])
        attributes = {"attempts": 1, "experiment_ids": ["r1", "r2"], "curves": {"f1": {"1": 0.5}}, "reason": name}
        for values in ([1.0, 2.0], [math.inf, -math.inf]):
            study.add_trial(
                create_trial(values=values, params=PARAMS, distributions=DISTRIBUTIONS, user_attrs=attributes)
            )
        study.enqueue_trial({"a": 4}, user_attrs={"config": 3})
        study.add_trial(create_trial(state=TrialState.FAIL))
    # Scores need a study with one objective.
    single = optuna.create_study(study_name="single", storage=storage)
    scores = {3: math.nan, 1: 0.5, 2: math.inf, 4: -math.inf}
    single.add_trial(create_trial(state=TrialState.PRUNED, value=0.5, intermediate_values=scores))
    single.add_trial(create_trial(state=TrialState.RUNNING, params=PARAMS, distributions=DISTRIBUTIONS))
    return storage.get_study_id_from_name("mine")


def exact(trials: list[FrozenTrial]) -> list[str]:
    """Every field of the trials, with the order of the parameters; a text, because nan is not equal to itself."""
    return [
        repr((trial._trial_id, trial.number, trial.state, trial.values, trial.datetime_start, trial.datetime_complete))
        + repr((list(trial.params.items()), list(trial.distributions.items())))
        + repr((sorted(trial.user_attrs.items()), sorted(trial.system_attrs.items())))
        + repr(sorted(trial.intermediate_values.items()))
        for trial in trials
    ]


@pytest.mark.parametrize("place", ["file", "server"])
def test_trials_are_read_as_optuna_reads_them(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = database_url(str(tmp_path / "s.db") if place == "file" else request.getfixturevalue("server_url"))
    with closing(StudyStorage(url)) as storage:
        mine = fill(storage)
        everything = RDBStorage._get_trials(storage, mine, None, set(), -1)
        ids = [trial._trial_id for trial in everything]
        assert [trial.state.name for trial in everything] == ["COMPLETE", "COMPLETE", "WAITING", "FAIL"]
        other = storage.get_study_id_from_name("other")
        questions: list[tuple[int, Any, set[int], int]] = [
            *((study, None, set(), -1) for study in (mine, other, storage.get_study_id_from_name("single"))),
            (mine, None, set(), ids[1]),
            (mine, None, {ids[0], ids[3]}, ids[1]),
            (mine, None, {ids[0], ids[0] - 1}, ids[3]),
            (mine, None, set(), ids[3]),
            (mine, (TrialState.COMPLETE,), set(), -1),
        ]
        for question in questions:
            found = exact(storage._get_trials(*question))
            assert found == exact(RDBStorage._get_trials(storage, *question)), question
        with pytest.raises(KeyError):
            storage._get_trials(10**6, None, set(), -1)


def test_a_study_may_have_more_unfinished_trials_than_a_query_has_parameters(tmp_path: Path) -> None:
    with closing(StudyStorage(database_url(str(tmp_path / "s.db")))) as storage:
        study = fill(storage)
        trials = storage._get_trials(study, None, set(range(300_000)), 299_999)
    assert len(trials) == 4
