"""The record must be cheap, complete, storable, and silent about who ran the experiment where."""

import json
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import research_eval
from research_eval.system import environment
from research_eval.system.environment import environment_record

ROOT = Path(__file__).resolve().parent.parent


def test_the_record_is_json_and_names_every_direct_dependency():
    record = environment_record("cpu")
    assert json.loads(json.dumps(record)) == record
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w.-]+", requirement).group() for requirement in project["dependencies"]}
    assert set(record["versions"]) == names | {"research_eval"}
    assert record["versions"]["research_eval"] == research_eval.__version__
    assert record["versions"]["sqlalchemy"] == pytest.importorskip("sqlalchemy").__version__
    assert record["python_version"] == platform.python_version()
    assert record["device"] == "cpu"
    assert record["logical_cores"] >= 1
    assert record["memory_total_bytes"] > 2**28


def test_the_record_does_not_name_the_host(monkeypatch):
    uname = platform.uname()
    monkeypatch.setattr(platform, "uname", lambda: uname._replace(node="secret-host"))
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    assert "secret-host" not in json.dumps(environment_record("cpu"))


def test_torch_is_asked_but_never_imported(monkeypatch):
    code = (
        "import sys; from research_eval.system.environment import environment_record\n"
        "print(environment_record('cpu')['num_threads'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "None False\n"
    torch = pytest.importorskip("torch")
    assert environment_record("cpu")["num_threads"] == torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU at {device}")
    assert environment_record("cuda:1")["gpu_name"] == "GPU at cuda:1"


def test_a_missing_dependency_has_no_version():
    assert environment._version("no-such-distribution-anywhere") is None


def test_without_a_checkout_the_installed_package_names_the_dependencies(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "SOURCE_ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\ndependencies = ["wrong"]\n')
    asked = []

    def requires(name):
        asked.append(name)
        return ["torch>=2", "psycopg[binary]>=3 ; python_version > '3'", "ray ; extra == 'cluster'"]

    monkeypatch.setattr(environment.importlib.metadata, "requires", requires)
    assert environment._direct_dependencies() == ["psycopg", "torch"]
    assert asked == ["graph-of-experts"]


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setattr(environment, "SOURCE_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    (tmp_path / "research_eval").mkdir()
    (tmp_path / "research_eval" / "model.py").write_text("x = 1\n")
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-q", "-m", "first"],
    ):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    return tmp_path


def test_the_commit_is_recorded_and_results_do_not_make_it_dirty(checkout, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    (checkout / "experiment_results.db").write_text("")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside a git hook
    assert environment._git_facts() == {"git_commit": head.stdout.strip(), "git_dirty": False}


@pytest.mark.parametrize("name", ["model.py", "new_model.py"])
def test_changed_or_new_code_makes_it_dirty(checkout, name):
    (checkout / "research_eval" / name).write_text("x = 2\n")
    assert environment._git_facts()["git_dirty"] is True


def test_no_checkout_no_git_or_a_slow_git_is_none(checkout, monkeypatch):
    nothing = {"git_commit": None, "git_dirty": None}
    with monkeypatch.context() as patch:
        patch.setattr(environment, "_GIT_SECONDS", 0.0)
        assert environment._git_facts() == nothing
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert environment._git_facts() == nothing
    monkeypatch.setattr(environment, "SOURCE_ROOT", checkout / "research_eval")
    assert environment._git_facts() == nothing
