"""What the code made before it was divided into packages is still worth the same.

`fixtures/make_before_restructuring.py` says what the files hold and how the old code made them. Numbers must be equal
to the last bit on a machine like the one that made them, and equal within 1e-4 on any other.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fixtures.make_before_restructuring import ARCHIVE, DATABASE, TARGET, TEXTS, Expected, machine, outcome, trials
from support import Ended, command

from research_eval.config.check import stored_config
from research_eval.config.defaults import stored_forms
from research_eval.db_utils import Store
from research_eval.experiment import run
from research_eval.main import cli

EXPECTED: Expected = json.loads((TARGET / "expected.json").read_text())
IS_SAME_MACHINE = EXPECTED["machine"] == machine()
TOLERANCE = 0.0 if IS_SAME_MACHINE else 1e-4
INTERRUPTED = {expected["name"]: run_id for run_id, expected in EXPECTED["interrupted"].items()}
PADDED = ("inference_flops_per_sample", "train_flops")  # they count the padding, which fits the vectors of the CPU
WHOLE = ("dense", "looped")  # models whose products were all counted
STARTUP_TRIALS = 10  # the sampler draws them at random; later ones depend on the scores of all before
CHECKS = (
    "database",
    "integrity",
    "schema",
    "waiting results",
    "dead runs",
    "folders",
    "temporary files",
    "checkpoints",
)


@pytest.fixture(scope="module", name="unpacked")
def _unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of the old code; to be read only."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(TARGET / ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(name="_here")
def _copy(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it as the working directory, with the tables of the present program."""
    monkeypatch.delenv("GOE_DB", raising=False)
    shutil.copytree(unpacked, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    Store(DATABASE).close()


def goe(*arguments: str) -> Ended:
    return command(cli, *arguments)


def config_in_row(run_id: str) -> dict[str, Any]:
    with Store(DATABASE, read_only=True) as store:
        config: dict[str, Any] = json.loads(store.experiment(run_id)["full_config_json"])
    return config


def differences(found: Any, wanted: Any, place: str = "") -> list[str]:
    """Where they differ by more than `TOLERANCE`. `found` may have keys that `wanted` has not."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [line for key in wanted for line in differences(found.get(key), wanted[key], f"{place}.{key}")]
    if isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{place}[{index}]")]
    if isinstance(wanted, float) and isinstance(found, int | float):
        both_nan = math.isnan(wanted) and math.isnan(found)
        is_close = both_nan or math.isclose(found, wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE / 100)
        return [] if is_close else [f"{place}: {found!r}, before {wanted!r}"]
    return [] if found == wanted else [f"{place}: {found!r}, before {wanted!r}"]


def test_the_comparison_sees_what_differs():
    assert not differences({"x": [1.0, math.nan], "new": 1}, {"x": [1.0, math.nan]})
    assert differences({"x": [1.0, 2.0]}, {"x": [1.0, 2.001]}) == [".x[1]: 2.0, before 2.001"]
    assert differences({}, {"x": 1.0}) == [".x: None, before 1.0"]
    assert differences([1.0], [1.0, 2.0])
    assert bool(differences(1.0 + 1e-9, 1.0)) == IS_SAME_MACHINE


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_run_ends_as_if_nothing_had_happened(name):
    run_id = INTERRUPTED[name]
    result = run(stored_config(config_in_row(run_id), run_id), db=DATABASE, resume=True, quiet=True)
    assert (result.status, result.experiment_id) == ("finished", run_id)
    found, wanted = outcome(run_id), EXPECTED["interrupted"][run_id]
    left_out = set() if IS_SAME_MACHINE else set(PADDED)
    left_out |= set() if name in WHOLE else {"train_flops"} | ({PADDED[0]} if name == "lstm" else set())
    metrics = {metric: value for metric, value in wanted["metrics"].items() if metric not in left_out}
    assert not differences(found["metrics"], metrics, "metrics")
    assert not differences(found["history"], wanted["history"], "history")
    assert set(found["files"]) >= set(wanted["files"])
    assert not differences(found["trace"], wanted["trace"], "trace")
    for file, hashes in wanted["tensors"].items():
        assert not IS_SAME_MACHINE or set(found["tensors"][file]) >= set(hashes), (
            f"{file} lacks tensors, or they differ"
        )


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("run_id", EXPECTED["predictions"])
def test_a_finished_run_is_repeated_exactly(run_id):
    ended = goe("replay", run_id, "--quiet", "--tolerance", str(TOLERANCE))
    assert ended.code == 0, ended.out + ended.err
    assert "The data are not those of the original" not in ended.out
    assert f"of {run_id}: finished" in ended.out


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("run_id", EXPECTED["predictions"])
def test_finished_weights_predict_the_same(run_id):
    Path("texts.txt").write_text("\n".join(TEXTS) + "\n")
    ended = goe("predict", "--run", run_id, "--file", "texts.txt", "--device", "cpu")
    assert ended.code == 0, ended.err
    expected, out = EXPECTED["predictions"][run_id], ended.out
    if "  path: " not in expected:  # a mixture of experts had no paths to show then
        out = "".join(line for line in out.splitlines(keepends=True) if not line.startswith("  path: "))
        assert out != ended.out
    found, wanted = out.split(), expected.split()
    if IS_SAME_MACHINE:
        assert out == expected
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):  # probabilities have four digits
        assert one == other or float(one) == pytest.approx(float(other), abs=2e-4)


@pytest.mark.usefixtures("_here")
def test_the_database_opens_and_lists_and_is_sound():
    content = Path(DATABASE).read_bytes()
    with Store(DATABASE, read_only=True) as store:
        rows = {row["experiment_id"]: row for row in store.experiments()}
        assert all(store.history(run_id) for run_id in INTERRUPTED.values())
        assert all(store.metrics(run_id) for run_id in EXPECTED["predictions"])
    counts = Counter(row["status"] for row in rows.values())
    assert counts == {"finished": 5, "diverged": 1, "interrupted": len(INTERRUPTED) + 1}, "trials included"
    for name, run_id in INTERRUPTED.items():
        assert rows[run_id]["experiment_name"] == name
        read = stored_config(config_in_row(run_id), run_id).to_dict()
        assert config_in_row(run_id) in stored_forms(read), "the same keys and defaults"

    listed = goe("runs", "--json", "--limit", "0")
    assert listed.code == 0, listed.err
    assert {json.loads(line)["experiment_id"] for line in listed.out.splitlines()} == rows.keys()

    findings = goe("doctor").out.splitlines()
    for check in CHECKS:
        assert [line for line in findings if f"  {check}: " in line and line.startswith("ok ")], "\n".join(findings)
    assert Path(DATABASE).read_bytes() == content


@pytest.mark.usefixtures("_here")
def test_the_study_goes_on_with_the_same_trials():
    before = trials()
    assert [trial["state"] for trial in before] == ["COMPLETE", "COMPLETE", "RUNNING"]
    ended = goe(*EXPECTED["study_arguments"])
    assert ended.code == 0, ended.out + ended.err
    found, wanted = trials(), EXPECTED["trials"]
    assert len(found) == len(wanted)
    if IS_SAME_MACHINE:
        assert not differences(found, wanted)
    params, wanted_params = ([trial["params"] for trial in side] for side in (found, wanted))
    assert not differences(params[:STARTUP_TRIALS], wanted_params[:STARTUP_TRIALS])
    with contextlib.closing(Store(DATABASE, read_only=True)) as store:
        assert "interrupted" not in {row["status"] for row in store.experiments() if row["run_type"] == "optuna_trial"}
