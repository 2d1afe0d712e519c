"""Given runs that workers of a launcher train: all seeds of a config, and the cells of a comparison."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support import Ended, command, repeatable, results, small_config, write_config

from research_eval import __version__
from research_eval.db_utils import DB_FILE
from research_eval.files import RUNS_FOLDER
from research_eval.main import cli
from research_eval.studies import tune
from research_eval.studies.batch import batch_options
from research_eval.studies.launchers import Elsewhere, LaunchOptions, launch
from research_eval.studies.queue import TrialQueue
from research_eval.studies.storage import StudyStorage, study_names
from research_eval.studies.trials import CONFIG

ONE_MACHINE = ("--launcher", "submitit", "--launcher_options", "options.json", "--storage", "sqlite:///q.db")


class HereAndNow:
    """A launcher whose worker trains in this process, before the command goes on."""

    output = "nowhere"
    started: ClassVar[list[str]] = []

    def __init__(self, options: LaunchOptions, study: str, environment: Mapping[str, str], num_workers: int) -> None:
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            for _ in range(min(num_workers, 1)):
                self.started.append(study)
                assert cli(["worker", "--study", study, "--quiet"]) == 0
        finally:
            os.environ.clear()
            os.environ.update(before)

    def num_alive(self) -> int:
        return 0

    def stop(self) -> None:
        pass


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)
    monkeypatch.delenv("GOE_STORAGE", raising=False)
    Path("options.json").write_text('{"cluster": "local"}')
    monkeypatch.setattr(tune, "launch", HereAndNow)
    HereAndNow.started = []
    return tmp_path


def seeds(folder: Path, *words: str, **changes: Any) -> Ended:
    return command(cli, "run", "--json_config_path", write_config(folder, **changes), "--quiet", *words)


def metrics(folder: Path) -> dict[int, Any]:
    """The repeatable metrics of every run, by seed."""
    with results(folder) as store:
        rows = [store.find_id(name) for name in store.statuses()]
        return {row["seed"]: repeatable(store.metrics(row["experiment_id"])) for row in rows if row is not None}


def test_seeds_on_workers_are_the_runs_of_one_process(here: Path) -> None:
    ended = seeds(here, "--seeds", "0-3", *ONE_MACHINE, "--workers", "2")
    assert ended.code == 0, ended.err
    assert ended.out.count("finished") == 4
    elsewhere = metrics(here)
    assert sorted(elsewhere) == [0, 1, 2, 3]
    with results(here) as store:
        assert {row["run_type"] for row in map(store.find_id, store.statuses()) if row is not None} == {"json"}
    lines = Path("json_experiment_results.csv").read_text().splitlines()
    assert len(lines) == 5

    alone = here / "alone"
    alone.mkdir()
    os.chdir(alone)
    assert seeds(alone, "--seeds", "0-3").code == 0
    assert metrics(alone) == elsewhere


def test_the_same_command_does_nothing_the_second_time(here: Path) -> None:
    assert seeds(here, "--seeds", "0,1", *ONE_MACHINE).code == 0
    first = metrics(here)
    again = seeds(here, "--seeds", "0,1", *ONE_MACHINE)
    assert again.code == 0
    assert again.out.count("finished") == 2
    assert len(HereAndNow.started) == 1
    assert metrics(here) == first
    assert len(Path("json_experiment_results.csv").read_text().splitlines()) == 3
    (name,) = study_names("sqlite:///q.db")
    assert name.startswith("batch:")
    assert len(name) == len("batch:") + 12


def test_runs_that_the_store_has_are_not_repeated(here: Path) -> None:
    assert seeds(here, "--seeds", "0,1").code == 0
    first = metrics(here)
    ended = seeds(here, "--seeds", "0-2", "--resume", *ONE_MACHINE)
    assert ended.code == 0
    assert ended.out.count("finished") == 3
    found = metrics(here)
    assert {seed: found[seed] for seed in first} == first
    with closing(StudyStorage("sqlite:///q.db")) as storage:
        (study,) = storage.get_all_studies()
        assert [trial.system_attrs["fixed_params"] for trial in storage.get_all_trials(study._study_id)] == [
            {"config": 2}
        ]


def test_a_run_that_diverged_is_said_and_tried_once_more_by_the_next_call(here: Path) -> None:
    changes: dict[str, Any] = {"optimizer_params": {"lr": 1e30}, "training_params": {"log_every": 1}}
    ended = seeds(here, "--seeds", "0,1", *ONE_MACHINE, **changes)
    assert ended.code == 1
    assert ended.out.count("diverged") >= 2
    with results(here) as store:
        assert set(store.statuses().values()) == {"diverged"}
    assert seeds(here, "--seeds", "0,1", *ONE_MACHINE, **changes).code == 1
    assert len(HereAndNow.started) == 2


def scores() -> list[tuple[str, str, float]]:
    """Arm, seed and test score of every cell of the comparison."""
    with Path("comparisons/parity/scores.csv").open() as file:
        return [(row["arm"], row["seed"], float(row["test_f1"])) for row in csv.DictReader(file)]


def test_a_comparison_on_workers_is_that_of_one_process(here: Path) -> None:
    words = ["compare", "parity", "--models", "dense,lstm", "--seeds", "1", "--tuning", "3", "--epochs", "1"]
    words += ["--set", "dataset_params.num_samples=60", "--max_lengthened", "0", "--quiet"]
    ended = command(cli, *words, *ONE_MACHINE)
    assert ended.code == 0, ended.err
    found = scores()
    alone = here / "alone"
    alone.mkdir()
    os.chdir(alone)
    assert command(cli, *words).code == 0
    assert scores() == found


def test_a_worker_of_another_version_is_refused(here: Path) -> None:
    options = batch_options([small_config().to_dict()], 1, DB_FILE, Elsewhere("sqlite:///q.db", LaunchOptions()))
    with closing(TrialQueue(options)) as queue:
        queue.study.enqueue_trial({CONFIG: 0})
        queue.open_to_workers()
        program = queue.study.user_attrs["program"]
        assert program["research_eval"] == __version__
        queue.study.set_user_attr("program", {**program, "torch": "1.0"})
    words = ("worker", "--study", options.study_name, "--storage", "sqlite:///q.db")
    warned = command(cli, *words)
    assert warned.code == 0
    assert 'begun with torch "1.0"' in warned.err
    with closing(TrialQueue(options)) as queue:
        queue.study.set_user_attr("program", {**program, "research_eval": "0.0.1"})
    refused = command(cli, *words)
    assert refused.code == 2
    assert 'begun by version "0.0.1" of this program' in refused.err


def test_wrong_flags_are_refused_before_any_work(here: Path) -> None:
    for words, text in (
        (("--launcher", "ray"), "--storage: --launcher ray needs a server"),
        (("--storage", "sqlite:///q.db"), "--storage: is for --launcher submitit or ray"),
        (("--workers", "0"), "--workers: expected a whole number of at least 1, got 0"),
    ):
        ended = seeds(here, "--seeds", "0,1", *words)
        assert (ended.code, text in ended.err) == (2, True), ended.err
    assert not RUNS_FOLDER.exists()


def test_a_password_on_the_command_line_is_warned_of(here: Path) -> None:
    ended = seeds(here, "--seeds", "0,1", "--db", "postgresql://user:secret@127.0.0.1:1/none")
    assert "--db: everyone on this machine can read the password" in ended.err
    assert "secret" not in ended.err
    assert "password" not in seeds(here, "--dry_run", "--db", "postgresql://user@127.0.0.1:1/none").err


def test_a_job_of_submitit_trains_the_seeds(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="submitit starts the jobs")
    monkeypatch.setattr(tune, "launch", launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = here / "elsewhere"
    monkeypatch.setenv("GOE_RUNS", str(runs))  # of the worker; this process has read it already
    ended = seeds(here, "--seeds", "0,1", *ONE_MACHINE)
    assert ended.code == 0, ended.err
    assert sorted(metrics(here)) == [0, 1]
    assert json.loads(next(runs.glob("*/config.json")).read_text())["model_type"] == "dense"
