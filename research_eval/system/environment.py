"""The environment of a run, stored with every result. It holds nothing that identifies the machine or its user."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import research_eval
from research_eval.errors import ConfigError

DISTRIBUTION = "graph-of-experts"
SOURCE_ROOT = Path(__file__).resolve().parent.parent.parent
_GIT_SECONDS = 5.0  # limit for a git command, for example on a slow network disk


def environment_record(device: str) -> dict[str, Any]:
    """JSON-serialisable facts; None for an unknown one. `device` is the run's device ("cpu", "cuda:0")."""
    return {
        "python_version": platform.python_version(),
        "platform": platform.platform(),
        "cpu_model": _cpu_model(),
        "logical_cores": os.cpu_count(),
        "memory_total_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
        **_torch_facts(device),
        "versions": {"research_eval": research_eval.__version__}
        | {name: _version(name) for name in _direct_dependencies()},
        **_git_facts(),
    }


def program_record() -> dict[str, Any]:
    """What decides the numbers of a run besides its config and the machine, as JSON: the versions of the program."""
    return {
        "research_eval": research_eval.__version__,
        "torch": _version("torch"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **_git_facts(),
    }


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """The memory of this machine, or the limit of the process's control group if that is smaller."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(found, int(text)) if text.isdecimal() else found


def check_fits(num_bytes: float, what: str) -> None:
    """Raise ConfigError if `num_bytes` exceed the memory, before anything is allocated.

    `what` names the cause and begins the message.
    """
    if num_bytes > (available := memory_bytes()):
        raise ConfigError(
            f"{what} needs {num_bytes / 2**30:,.0f} GiB of memory; {available / 2**30:,.0f} GiB available"
        )


def _cpu_model() -> str:
    """The processor's name from /proc/cpuinfo, otherwise from Python."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if model:
            return model.group(1)
    return platform.processor() or platform.machine()


def _torch_facts(device: str) -> dict[str, Any]:
    """Threads, GPU and CUDA version. None for each of them if torch is not imported."""
    torch = sys.modules.get("torch")  # never import torch here: it takes seconds
    if torch is None:
        return {"num_threads": None, "gpu_name": None, "cuda_version": None}
    gpu = torch.cuda.is_available()
    return {
        "num_threads": torch.get_num_threads(),
        "gpu_name": torch.cuda.get_device_name(device if device.startswith("cuda") else None) if gpu else None,
        "cuda_version": torch.version.cuda,
    }


def direct_requirements() -> list[str]:
    """The direct dependencies, such as "numpy>=2.0".

    They come from this checkout's pyproject.toml if there is one, otherwise from the installed package.
    """
    pyproject = SOURCE_ROOT / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text()).get("project", {}) if pyproject.is_file() else {}
    if project.get("name") == DISTRIBUTION:
        return list(project["dependencies"])
    return [text for text in importlib.metadata.requires(DISTRIBUTION) or [] if "extra ==" not in text]


def _direct_dependencies() -> list[str]:
    """The names of the direct dependencies, sorted, without versions."""
    return sorted(re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in direct_requirements())


@cache
def _version(name: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_facts() -> dict[str, Any]:
    """The commit of the checkout, and whether the package's files differ from it."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", "research_eval") if commit else None
    return {"git_commit": commit, "git_dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    """The output of a git command on the source checkout; None if it fails, or if there is no git or checkout.

    A slow or failing git gives None as well: a missing fact must not stop a run.
    """
    git = shutil.which("git")
    if git is None or not (SOURCE_ROOT / ".git").exists():  # git also finds an enclosing repository of another project
        return None
    # A git hook sets GIT_DIR to another repository. Without optional locks, `git status` never writes.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments
            [git, "-C", str(SOURCE_ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            env=variables | {"GIT_OPTIONAL_LOCKS": "0"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
