"""Workers that a launcher starts: jobs of submitit, actors of Ray. The engines are optional, and so are their tests."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from optuna.trial import TrialState
from support import command, python
from test_many_workers import num_done, trials_at, wait_for
from test_study import TINY, study_options_of
from test_worker import MORE, STUDY

from research_eval.db_utils import DB_FILE, Store
from research_eval.errors import ConfigError
from research_eval.main import cli
from research_eval.studies import launchers
from research_eval.studies.launchers import Child, LaunchOptions, RayLauncher, Slot, SubmititLauncher, worker_command
from research_eval.studies.queue import TrialQueue

ON_THIS_MACHINE = {"cluster": "local"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)
    monkeypatch.delenv("GOE_STORAGE", raising=False)
    Path("space.json").write_text(json.dumps(TINY))
    Path("options.json").write_text(json.dumps(ON_THIS_MACHINE))


def test_jobs_of_submitit_do_a_study_though_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="submitit starts the jobs")
    url = f"sqlite:///{tmp_path}/s.db"
    words = ["tune", *STUDY, *MORE, "--n_trials", "6", "--launcher", "submitit", "--workers", "2"]
    program = [sys.executable, "-c", launchers.PROGRAM, *words, "--launcher_options", "options.json"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    supervisor = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: num_done(url) >= 1)
        first, *_ = sorted(Path("runs/.submitit").glob("*_submitted.pkl"))
        os.kill(int(first.name.partition("_")[0]), signal.SIGKILL)  # a local job is called by its process
        out, _ = supervisor.communicate(timeout=120)
    finally:
        supervisor.kill()
    assert supervisor.returncode == 0
    assert "6 of 6 trials" in out
    assert Counter(trial.state for trial in trials_at(url)) == {TrialState.COMPLETE: 6}
    with Store() as store:
        assert list(store.statuses().values()) == ["finished"] * 6
    assert Path("runs/.submitit").stat().st_mode & 0o777 == 0o700


def test_a_worker_ends_when_whoever_started_it_is_gone(tmp_path: Path) -> None:
    """The pipe to its standard input breaks: it writes a checkpoint and leaves its trial to others."""
    url, db = f"sqlite:///{tmp_path}/s.db", str(tmp_path / DB_FILE)
    options = study_options_of("--storage", url, "--db", db, "--model_types", "lstm", n_trials=1, epochs=1000)
    with closing(TrialQueue(options)) as queue:
        queue.open_to_workers()
    starter = (
        "import os, signal, subprocess, sys\n"
        "child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "signal.pause()\n"
    )
    environment = {**os.environ, **launchers.places(url, db)}
    program = [sys.executable, "-c", starter, *worker_command(options.study_name, "a")]
    parent = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        wait_for(lambda: any(trial.user_attrs.get("epochs", 0) >= 2 for trial in trials_at(url)))
        parent.kill()
        wait_for(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text())
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    (trial,) = trials_at(url)
    assert trial.state == TrialState.RUNNING
    assert trial.user_attrs["worker"] is None
    with Store() as store:
        assert list(store.statuses().values()) == ["interrupted"]


def test_the_job_that_is_submitted_again_is_the_same_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit", reason="submitit submits it")
    stopped: list[Any] = []
    monkeypatch.setattr(Child, "stop", lambda self: stopped.append(self))
    monkeypatch.setattr(Child, "wait", lambda self: 0)
    monkeypatch.setattr(launchers, "worker_command", lambda study, slot: [sys.executable, "-c", "", study, slot])
    slot = Slot("s", "3")
    assert slot() == 0
    again = slot.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert (again.function.study, again.function.slot) == ("s", "3")
    assert len(stopped) == 1
    stopped[0]._process.communicate()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--launcher", "ray"), "--storage: --launcher ray needs a server"),
        (("--launcher", "submitit"), "--storage: --launcher submitit needs a server"),
        (("--launcher", "submitit", "--storage", "postgresql://a@b/c"), "--db: --launcher submitit needs a server"),
        (("--worker_gpus", "1"), "--worker_gpus: is for --launcher submitit or ray"),
        (("--workers", "2", "--n_jobs", "2"), "--n_jobs and --workers: give one of them"),
        (("--workers", "0"), "--workers: expected a whole number of at least 1, got 0"),
        (("--launcher", "ray", "--worker_cpus", "-1"), "--worker_cpus: expected a number of at least 0"),
        (("--launcher", "submitit", "--worker_gpus", "0.5"), "--worker_gpus: Slurm gives whole cores"),
        (("--launcher", "submitit", "--worker_cpus", "0"), "--worker_cpus: Slurm gives whole cores"),
        (("--launcher", "submitit", "--launcher_options", "no.json"), "no.json: cannot be read"),
        (("--launcher", "submitit", "--launcher_options", "list.json"), "has to hold a JSON object"),
    ],
)
def test_wrong_launches_are_refused_before_any_work(words: tuple[str, ...], message: str) -> None:
    Path("list.json").write_text("[]")
    ended = command(cli, "tune", *STUDY, *MORE, "--n_trials", "1", *words)
    assert ended.code == 2
    assert message in ended.err
    assert not Path("s.db").exists()


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"cluster": "debug", "timeout_min": 1.5}, None),
        ({"cluster": "debug"}, RuntimeError("sbatch: invalid partition")),
    ],
)
def test_what_an_engine_refuses_is_one_line(
    options: dict[str, Any], refused: Exception | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    if refused is not None:
        monkeypatch.setattr("submitit.AutoExecutor.submit", MagicMock(side_effect=refused))
    with pytest.raises(ConfigError, match=r"^--launcher_options: .*(timeout_min|invalid partition)"):
        SubmititLauncher(LaunchOptions("submitit", options=options), "s", {}, 1)


def test_an_open_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_imported", lambda name, extra: None)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(ConfigError, match=r"CVE-2023-48022.*--ray_insecure"):
        RayLauncher(LaunchOptions("ray"), "s", {}, 1)


@pytest.mark.parametrize("name", ["submitit", "ray"])
def test_a_second_call_may_have_no_worker_to_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them still work. Neither engine takes an empty list, and this one refuses everything."""
    engine = MagicMock()
    for call in (engine.wait, engine.AutoExecutor.return_value.batch):
        call.side_effect = ValueError("empty")
    monkeypatch.setattr(launchers, "_imported", lambda name, extra: engine)
    launcher = launchers.launch(LaunchOptions(name, insecure=True), "s", {}, 0)  # type: ignore[arg-type]
    assert launcher.num_alive() == 0
    launcher.stop()


def test_a_missing_engine_names_its_extra() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'graph-of-experts\[slurm\]'"):
        launchers._imported("no_such_engine", "slurm")


def test_engines_are_imported_only_when_they_are_asked_for(tmp_path: Path) -> None:
    program = "import sys\nimport research_eval.studies.tune\nprint({'ray', 'submitit'} & set(sys.modules))"
    assert python("-c", program, folder=tmp_path, fresh=True).out.endswith("set()\n")


@contextmanager
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster of Ray on this machine, and its second node."""
    pytest.importorskip("ray", reason="ray is the cluster")
    utilities = importlib.import_module("ray.cluster_utils")
    cluster = utilities.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        yield cluster, cluster.add_node(num_cpus=2)
    finally:
        cluster.shutdown()


@pytest.mark.timeout(600)
def test_a_node_that_is_lost_loses_no_trial(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with two_nodes() as (cluster, node):
        for name, value in {"RAY_ADDRESS": cluster.address, "GOE_STORAGE": server_url, "GOE_DB": server_url}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        words = ["tune", "--study_name", "s", "--dataset_name", "parity", "--syn_num_samples", "400", "--epochs", "3"]
        words += [
            *MORE,
            "--pruner",
            "none",
            "--n_trials",
            "20",
            "--launcher",
            "ray",
            "--workers",
            "2",
            "--ray_insecure",
        ]
        supervisor = subprocess.Popen([sys.executable, "-c", launchers.PROGRAM, *words])
        try:
            wait_for(lambda: num_done(server_url) >= 4, seconds=200)
            time.sleep(0.3)
            cluster.remove_node(node, allow_graceful=False)
            assert supervisor.wait(300) == 0
        finally:
            supervisor.kill()
    trials = trials_at(server_url)
    assert Counter(trial.state for trial in trials) == {TrialState.COMPLETE: 20}
    assert sum(trial.user_attrs["attempts"] > 1 for trial in trials) <= 2
    with Store(server_url) as store:
        assert list(store.statuses().values()) == ["finished"] * 20
