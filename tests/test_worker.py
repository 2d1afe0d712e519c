"""`goe worker`: it needs the name of a study, and takes everything else from the study."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from support import command, python
from test_study import FLAGS, TINY

from research_eval.db_utils import DB_FILE, Store
from research_eval.main import cli

STUDY = ("--study_name", "s", "--storage", "sqlite:///s.db", "--epochs", "1", "--batch_size", "16", *FLAGS)
MORE = ("--model_types", "lstm", "--sampler", "random", "--search_space", "space.json")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)
    monkeypatch.delenv("GOE_STORAGE", raising=False)
    Path("space.json").write_text(json.dumps(TINY | {"optimizer_params": {"lr": {"low": 0.001, "high": 0.01}}}))


def tune(*more: str) -> Any:
    return command(cli, "tune", *STUDY, *MORE, "--quiet", *more)


def trials(name: str = "sqlite:///s.db") -> list[Any]:
    return optuna.load_study(study_name="s", storage=name).trials


def test_a_worker_ends_what_the_command_has_begun_with_equal_trials(tmp_path: Path) -> None:
    assert tune("--n_trials", "4").code == 0
    whole = [(trial.params, trial.values) for trial in trials()]
    study = optuna.load_study(study_name="s", storage="sqlite:///s.db")
    flags = study.user_attrs["flags"]
    assert flags["search_space"]["optimizer_params"] == {"lr": {"low": 0.001, "high": 0.01}}
    assert not {"storage", "db", "quiet"} & set(flags), "places and passwords stay where they were given"
    # The same study in an empty storage: the command makes the first two trials, and a worker elsewhere the others.
    Path("s.db").unlink()
    assert tune("--n_trials", "2").code == 0
    optuna.load_study(study_name="s", storage="sqlite:///s.db").set_user_attr("n_trials", 4)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    storage, db = f"sqlite:///{tmp_path}/s.db", str(tmp_path / DB_FILE)
    one = command(cli, "worker", "--study", "s", "--storage", storage, "--db", db, "--max_trials", "1", "--quiet")
    assert (one.code, len(trials(storage))) == (0, 3)
    rest = command(cli, "worker", "--study", "s", "--storage", storage, "--db", db, "--quiet")
    assert rest.code == 0, rest.err
    found = trials(storage)
    assert [(trial.params, trial.values) for trial in found] == whole
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * 4
    assert not (elsewhere / DB_FILE).exists() and (elsewhere / "runs").is_dir()
    again = command(cli, "worker", "--study", "s", "--storage", storage, "--db", db, "--quiet")
    assert (again.code, len(trials(storage))) == (0, 4)


def test_a_worker_in_a_process_of_its_own_finds_its_places_in_the_environment(tmp_path: Path) -> None:
    assert tune("--n_trials", "1").code == 0
    optuna.load_study(study_name="s", storage="sqlite:///s.db").set_user_attr("n_trials", 2)
    places = {"GOE_STORAGE": f"sqlite:///{tmp_path}/s.db", "GOE_DB": f"sqlite:///{tmp_path}/{DB_FILE}"}
    program = "from research_eval.main import cli; raise SystemExit(cli(['worker', '--study', 's']))"
    (tmp_path / "b").mkdir()
    ended = python("-c", program, folder=tmp_path / "b", **places)
    assert ended.code == 0, ended.err
    with Store(str(tmp_path / DB_FILE)) as store:
        assert list(store.statuses().values()) == ["finished"] * 2


def test_results_that_cannot_be_reached_are_said_at_once() -> None:
    assert tune("--n_trials", "1").code == 0
    ended = command(
        cli, "worker", "--study", "s", "--storage", "sqlite:///s.db", "--db", "postgresql://a@127.0.0.1:9/b"
    )
    assert ended.code == 2
    assert "database postgresql" in ended.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--study", "t"), '--study: there is no study "t" in this storage. It has s.'),
        (("--study", "s", "--storage", "sqlite:///none.db"), "--storage: there is no file"),
        (("--study", "s", "--max_trials", "0"), "--max_trials: expected at least 1, got 0"),
        (("--study", "s", "--max_seconds", "nan"), "--max_seconds: expected a number above 0, got nan"),
        (("--study", "old"), "'old' does not say how it was begun: give its command once more"),
    ],
)
def test_what_a_worker_refuses(words: tuple[str, ...], message: str) -> None:
    optuna.create_study(study_name="s" if "old" not in words else "old", storage="sqlite:///s.db")
    ended = command(cli, "worker", "--storage", "sqlite:///s.db", *words)
    assert (ended.code, message in ended.err) == (2, True), ended.err
    assert not Path("none.db").exists()
