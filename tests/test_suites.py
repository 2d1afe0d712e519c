"""Suites of comparisons: their files, the ledger, the tables over all tasks and the whole command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_eval.comparing.suite import (
    Ledger,
    aggregate_table,
    bootstrap,
    carry_out,
    code_sha256,
    interquartile_mean,
    read_suite,
    suite_names,
    task_table,
)
from research_eval.config.check import config_from_dict
from research_eval.db_utils import DB_FILE, Store
from research_eval.errors import ConfigError
from research_eval.main import cli
from research_eval.registry import MODELS_MAP
from tests.support import command, environment, python, small_settings
from tests.test_new_files import FILES

SAME = {"code": "1", "config": "2", "data": "3"}


# --------------------------------------------------------------------------------------------------------------- ledger


def do(folder: Path, names: list[str], fails: tuple[str, ...] = (), now: dict[str, str] = SAME, **options: Any) -> Any:
    done: list[str] = []

    def work(name: str) -> None:
        if name in fails:
            raise ConfigError(f"{name} cannot be done")
        done.append(name)

    failed = carry_out(names, Ledger(folder), lambda _: now, work, options.get("allow_drift", False))
    return done, failed


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    assert do(tmp_path, ["a", "b", "c"], fails=("b",)) == (["a", "c"], ["b"])
    assert do(tmp_path, ["a", "b", "c", "d"]) == (["b", "d"], [])
    assert do(tmp_path, ["a", "b", "c", "d"]) == ([], [])


@pytest.mark.parametrize("part", SAME)
def test_a_drift_is_refused_unless_it_is_allowed(part: str, tmp_path: Path) -> None:
    do(tmp_path, ["a"])
    now = {**SAME, part: "other"}
    with pytest.raises(ConfigError, match=f"a: another {part}"):
        do(tmp_path, ["a", "b"], now=now)
    assert do(tmp_path, ["a", "b"], now=now, allow_drift=True) == (["b"], [])


def test_a_failed_task_may_drift(tmp_path: Path) -> None:
    do(tmp_path, ["a"], fails=("a",))
    assert do(tmp_path, ["a"], now={**SAME, "config": "mended"}) == (["a"], [])


def test_a_signal_keeps_what_was_done(tmp_path: Path) -> None:
    def work(name: str) -> None:
        if name == "b":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(["a", "b"], Ledger(tmp_path), lambda _: SAME, work, False)
    assert do(tmp_path, ["a", "b"]) == (["b"], [])


@pytest.mark.parametrize("task", ["3", '{"status": "done", "fingerprint": null}'])
def test_a_damaged_ledger_is_named(task: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text(f'{{"tasks": {{"a": {task}}}}}')
    with pytest.raises(ConfigError, match=r"ledger\.json: no ledger of a suite"):
        Ledger(tmp_path)


# ----------------------------------------------------------------------------------------------------------- aggregates


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_the_interquartile_mean_is_that_of_four_copies_cut_at_the_quartiles(values: list[float]) -> None:
    """Four copies of each value have whole quartiles: the slow way cuts a quarter at each end."""
    copies = np.sort(np.repeat(values, 4))
    slow = copies[len(values) : len(copies) - len(values)].mean()
    assert interquartile_mean(np.array(values)) == pytest.approx(slow)


def test_the_bootstrap_draws_seeds_within_their_task() -> None:
    """Tasks of very different levels, seeds that hardly differ: the interval of the mean stays narrow."""
    scores = [np.array([0.1, 0.11, 0.09]), np.array([0.9, 0.91, 0.89])]
    low, high = bootstrap(scores, lambda values: float(values.mean()))
    assert 0.49 < low < 0.5 < high < 0.51


def certificate(scores: dict[str, list[float | None]]) -> dict[str, Any]:
    arms = [
        {"name": name, "cells": [{"score": score} for score in own], "mean": None, "is_matched": True}
        for name, own in scores.items()
    ]
    return {"arms": arms, "comparisons": [], "test_metric": "test_f1"}


def test_claims_name_the_winner_first() -> None:
    content = certificate({"a": [0.5], "b": [0.7], "c": [0.7]})
    words = {("a", "b"): "b is better", ("a", "c"): "c is better", ("b", "c"): "open"}
    content["comparisons"] = [{"first": one, "second": two, "text": text} for (one, two), text in words.items()]
    (row,) = task_table({"task": content}).rows
    assert row[-1] == "b above a; c above a"


@pytest.mark.parametrize(("metric", "column"), [("test_f1", 2), ("test_loss", 1)])
def test_the_best_score_is_bold(metric: str, column: int) -> None:
    content = certificate({"a": [0.5], "b": [0.7]}) | {"test_metric": metric}
    for arm, mean in zip(content["arms"], (0.5, 0.7), strict=True):
        arm["mean"] = mean
    assert task_table({"task": content}).bold == {(0, column)}


def test_runs_without_a_share_are_left_out_and_named() -> None:
    found = {
        "one": certificate({"a": [0.5, 0.7], "b": [0.5, None]}),
        "two": certificate({"a": [0.7, 0.7], "b": [0.5, 0.5]}),
        "three": certificate({"a": [0.2, 0.3]}) | {"test_metric": "test_loss"},
        "four": certificate({"b": [1.0, 0.9]}) | {"test_metric": "test_exact_match"},
    }
    families = {"one": "first", "two": "second", "three": "second", "four": "second"}
    table = aggregate_table("All", found, families)
    assert [row[:3] for row in table.rows] == [
        ["first", "a", "1"],
        ["second", "a", "1"],
        ["second", "b", "2"],
        ["all", "a", "2"],
        ["all", "b", "2"],
    ]
    assert "b on one, a on three" in table.notes[-1]


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", suite_names())
def test_the_suites_of_the_program_can_be_read(name: str) -> None:
    suite = read_suite(name)
    for task in suite.tasks:
        config_from_dict({"model_type": "dense", "experiment_name": task.name, **task.config})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "name: Field required"),
        ('{"name": "x", "tasks": []}', "tasks: List should have at least 1"),
        ('{"name": "x", "tasks": [{"name": "a", "family": "b", "config": {}, "seeds": 3}]}', "tasks.0.seeds"),
        ('{"name": "x", "seed": 3, "tasks": [{"name": "a", "family": "b", "config": {}}]}', "seed: Extra inputs"),
        (
            '{"name": "x", "tasks": [{"name": "a", "family": "b", "config": {}}, '
            '{"name": "a", "family": "b", "config": {}}]}',
            "two of them have one name",
        ),
        ("[", "mine.json:1:2: expected a value"),
    ],
)
def test_mistakes_in_a_suite_file_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    ended = command(cli, "benchmark", path)
    assert ended.code == 2
    assert message in ended.err


def test_an_unknown_suite_is_answered_with_the_known_ones() -> None:
    ended = command(cli, "benchmark", "smok")
    assert ended.code == 2
    assert "Did you mean 'smoke'?" in ended.err


# -------------------------------------------------------------------------------------------------------- whole command


def write_suite(folder: Path, name: str, *tasks: str, **settings: Any) -> dict[str, Any]:
    """A suite of small generated tasks, in the file NAME.json."""
    small = {key: value for key, value in small_settings(epochs=1).items() if key != "model_type"}
    listed = [{"name": task, "family": task, "config": {**small, "dataset_name": task}} for task in tasks]
    suite = {"name": name, "tuning": 3, "max_lengthened": 0, "tasks": listed, **settings}
    (folder / f"{name}.json").write_text(json.dumps(suite))
    return suite


@pytest.mark.usefixtures("one_process")
def test_a_suite_of_two_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)
    suite = write_suite(tmp_path, "mine", "parity", "majority", models=["dense", "looped"], seeds=2)
    first = command(cli, "benchmark", "mine.json", "--quiet")
    assert first.code == 0, first.err
    folder = tmp_path / "benchmarks" / "mine"
    assert "IQM" in (folder / "table.md").read_text()
    assert "Suite mine" in (folder / "report.html").read_text()
    with Store(DB_FILE, read_only=True) as store:
        count = len(store.experiments())
    again = command(cli, "benchmark", "mine.json", "--quiet")
    assert (again.code, again.out) == (0, first.out)
    with Store(DB_FILE, read_only=True) as store:
        assert len(store.experiments()) == count, "nothing was trained again"
    checked = command(cli, "benchmark", "mine.json", "--verify", "--quiet")
    assert checked.code == 0, checked.err
    assert "the same" in checked.out
    (folder / "parity" / "certificate.json").unlink()
    mended = command(cli, "benchmark", "mine.json", "--quiet")
    assert (mended.code, mended.out) == (0, first.out), "the task is done again, from the runs that are there"
    suite["seeds"] = 3
    Path("mine.json").write_text(json.dumps(suite))
    refused = command(cli, "benchmark", "mine.json")
    assert refused.code == 2
    assert "parity: another config" in refused.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "dense"], "--models: a comparison needs at least two models"),
        (["--models", "dense,densse"], "model_type: unknown 'densse'"),
        (["--out", "mine.json/deep"], "is not a folder"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_any_task(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_suite(tmp_path, "mine", "parity", models=["dense", "looped"])
    ended = command(cli, "benchmark", "mine.json", *words)
    assert ended.code == 2 and message in ended.err, ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json"]


def test_the_code_of_extensions_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_sha256()
    monkeypatch.setenv("GOE_EXTENSIONS", str(tmp_path))
    (tmp_path / "mine.py").write_text("FIRST = 1\n")
    first = code_sha256()
    (tmp_path / "mine.py").write_text("FIRST = 2\n")
    assert len({before, first, code_sha256()}) == 3


def test_a_new_model_file_adds_its_row(tmp_path: Path) -> None:
    """Without `models` in the suite, without a word about the new one in any other file, and without known sizes."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "last_word.py").write_text(textwrap.dedent(FILES["a_model"]))
    others = [name for name in MODELS_MAP if name != "dense"]
    write_suite(tmp_path, "all", "parity", exclude=others, axis="total_params", seeds=1)
    program = "from research_eval.main import cli; raise SystemExit(cli(['benchmark', 'all.json', '--quiet']))"
    ended = python("-c", program, folder=tmp_path, GOE_EXTENSIONS="mine")
    assert ended.code == 0, ended.err
    rows = [
        line for line in (tmp_path / "benchmarks/all/parity/table.md").read_text().splitlines() if "last_word" in line
    ]
    assert rows and "NOT MATCHED" in rows[0]
    assert "last_word" in (tmp_path / "benchmarks" / "all" / "table.md").read_text()


@pytest.mark.usefixtures("one_process")
def test_a_suite_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL of the whole process group in the second task: no cell is lost or trained twice.

    The killed command trains in a pool of processes. The test then continues the suite in its own process.
    """
    write_suite(tmp_path, "killed", *TWO_TASKS, models=["dense", "looped"], seeds=1)
    program = "from research_eval.main import cli; raise SystemExit(cli(['benchmark', 'killed.json', '--quiet']))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment(), start_new_session=True)
    while process.poll() is None and finished(tmp_path) < 10:  # of 16 runs: 3 trials, 1 seed, 2 models, 2 tasks
        time.sleep(0.1)
    assert process.poll() is None, "it was done before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)
    again = command(cli, "benchmark", "killed.json", "--quiet")
    assert again.code == 0, again.err
    with Store(str(tmp_path / DB_FILE), read_only=True) as store:
        rows = store.experiments()
        configs = [store.experiment(row["experiment_id"])["full_config_json"] for row in rows]
    assert {row["status"] for row in rows} == {"finished"}
    assert len(set(configs)) == len(configs)
    for name in TWO_TASKS:
        found = json.loads((tmp_path / "benchmarks" / "killed" / name / "certificate.json").read_text())
        assert [len(arm["cells"]) for arm in found["arms"]] == [1, 1]


TWO_TASKS = ("parity", "majority")


def finished(folder: Path) -> int:
    """The runs that have ended; 0 while there is no database."""
    try:
        with Store(str(folder / DB_FILE), read_only=True) as store:
            return sum(status == "finished" for status in store.statuses().values())
    except (ConfigError, OSError):
        return 0
