"""Hostile inputs: configs, command lines, data files, checkpoints, databases and names that get an error, not control.

`cases()` lists them; `Sandbox.run` puts one before the program and says what is wrong with the answer. Used by
`test_hostile_input.py` (a part of them) and by `benchmarks/hostile.py` (all of them).
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import struct
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import save_file
from support import Ended, command, environment, small_settings

from research_eval import analyze_results, init_db, main, suggest_configs
from research_eval.registry import MODELS_MAP, SYNTHETIC_DATASETS
from research_eval.schema import (
    MODEL_PROVIDED,
    SYNTHETIC_PROVIDED,
    TEXT_PROVIDED,
    OptimizerParams,
    SchedulerParams,
    TrainingParams,
    fields_of,
    signature_model,
)

CATEGORIES = ("config", "command line", "data", "checkpoint", "database", "names")
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "main": main.main,
    "goe": main.cli,
    "analyze": analyze_results.main,
    "suggest": suggest_configs.main,
    "init_db": init_db.main,
}
SCRIPTS = {
    "main": "research_eval.main",
    "analyze": "research_eval.analyze_results",
    "suggest": "research_eval.suggest_configs",
    "init_db": "research_eval.init_db",
}
SECONDS = 20  # that a case may take
MEMORY = 12 << 30  # bytes of address space on top of what is taken
# What a command may make in its working folder; everything else is an escape.
OURS = (
    r"runs|\.goe_cache|analysis_reports|suggested_configs|json_experiment_results\.csv(\.lock)?|"
    r"(experiment_results|optuna_studies)\.db.*|optuna_study_[\w.-]+|out\.(csv|parquet)|backups"
)

ELSEWHERE = r"work(/|$)|home/\.(cache|config)(/matplotlib|$)"  # in the tree; matplotlib has a cache of its own

Prepare = Callable[[Path], object]


def nothing(_folder: Path) -> None:
    """A case that needs no file."""


@dataclass(frozen=True)
class Case:
    """`prepare` makes the input in the working folder; the message has to match `says`, unless it ends with 0."""

    category: str
    name: str
    arguments: tuple[str, ...]
    says: str
    prepare: Prepare = nothing
    codes: tuple[int, ...] = (2,)
    kept: tuple[str, ...] = ()  # files that have to stay as they are
    base: str | None = None  # a folder of runs to start from: "synthetic" or "text"

    def __str__(self) -> str:
        return f"{self.category}: {self.name}"


@dataclass
class Verdict:
    """What became of a case; no `problems` is what is wanted."""

    case: Case
    ended: Ended
    problems: list[str] = field(default_factory=list)


class TooSlow(BaseException):
    """The case took longer than SECONDS."""


def _too_slow(_number: int, _frame: object) -> None:
    raise TooSlow(f"longer than {SECONDS} s")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A bound on time and on memory, so that a bomb that goes off is a finding and not the end of the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    before = signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def snapshot(folder: Path) -> dict[str, str]:
    """Every entry below the folder with what it holds; links are not followed."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent) / name
            if path.is_symlink():
                held = f"link {path.readlink()}"
            elif path.is_file():
                held = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                held = "folder" if path.is_dir() else "special"
            found[str(path.relative_to(folder))] = held
    return found


class Sandbox:
    """A tree with a working folder in it, and things beside it that nobody may touch."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("home", "tmp", "beside/folder"):
            (root / name).mkdir(parents=True)
        (root / "beside" / "victim.txt").write_text("do not touch\n")
        (root / "beside" / "victim.json").write_text("{}")
        self.bases: dict[str, Path] = {}
        for name in ("synthetic", "text"):
            self.bases[name] = root.with_name(f"{root.name}_{name}")
            self.bases[name].mkdir()
            with contextlib.chdir(self.bases[name]):
                make_base(name)

    @property
    def work(self) -> Path:
        return self.root / "work"

    def run(self, case: Case, process: Callable[..., Ended] | None = None) -> Verdict:
        """Put the case before the command, here or with `process` in a process of its own, and judge the answer."""
        shutil.rmtree(self.work, ignore_errors=True)
        if case.base is None:
            self.work.mkdir()
        else:
            shutil.copytree(self.bases[case.base], self.work)
        with contextlib.chdir(self.work):
            case.prepare(self.work)
        before, inside, kept = snapshot(self.root), _names(self.work), _held(self.work, case.kept)
        variables = {"HOME": str(self.root / "home"), "TMPDIR": str(self.root / "tmp"), "HF_HUB_OFFLINE": "1"}
        if process is not None:
            ended = process(*_as_process(case.arguments), folder=self.work, **variables)
        else:
            with _variables(**variables), contextlib.chdir(self.work):
                ended = _called(case.arguments)
        verdict = Verdict(case, ended)
        after = snapshot(self.root)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        outside = sorted(name for name in changed if not re.match(ELSEWHERE, name))
        foreign = sorted(name for name in _names(self.work) - inside if not re.fullmatch(OURS, name))
        verdict.problems += [f"changed outside: {name}" for name in outside] + [f"made {name!r}" for name in foreign]
        if _held(self.work, case.kept) != kept:
            verdict.problems.append(f"changed one of {case.kept}")
        verdict.problems += _complaints(case, ended)
        return verdict


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _held(folder: Path, names: Sequence[str]) -> list[str | None]:
    paths = [folder / name for name in names]
    return [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for path in paths]


@contextlib.contextmanager
def _variables(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in [*variables, "GOE_DB", "GOE_CACHE"]}
    os.environ.update(variables)
    os.environ.pop("GOE_DB", None)
    os.environ.pop("GOE_CACHE", None)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _called(arguments: Sequence[str]) -> Ended:
    threads = torch.get_num_threads()
    try:
        with limited():
            return command(COMMANDS[arguments[0]], *arguments[1:])
    except BaseException as error:  # an answer that a user would see as a traceback
        if isinstance(error, KeyboardInterrupt):
            raise
        return Ended(1, "", "".join(traceback.format_exception(error)))
    finally:
        torch.set_num_threads(threads)


def _as_process(arguments: Sequence[str]) -> list[str]:
    name, *rest = arguments
    if name == "goe":
        return ["-c", "from research_eval.main import cli; raise SystemExit(cli())", *rest]
    return ["-m", SCRIPTS[name], *rest]


def _complaints(case: Case, ended: Ended) -> list[str]:
    found = []
    if "Traceback (most recent call last)" in ended.err:
        found.append(f"traceback: {ended.err.strip().splitlines()[-1][:200]}")
    elif ended.code not in case.codes:
        found.append(f"exit code {ended.code} instead of {' or '.join(map(str, case.codes))}: {ended.err[-200:]!r}")
    elif ended.code and not re.search(case.says, ended.err):
        found.append(f"the message does not name {case.says!r}: {ended.err[-300:]!r}")
    steering = re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", ended.err + ended.out)
    if steering:
        found.append(f"a control character {steering[0]!r} on the terminal")
    if len(ended.err) > 20_000:
        found.append(f"a message of {len(ended.err):,} characters")
    return found


# ------------------------------------------------------------------------------------------ what runs start from

REVIEWS = {"good": ["great", "fine", "lovely"], "bad": ["awful", "dull", "poor"]}


def text_rows(count: int = 40) -> list[tuple[str, str]]:
    return [
        (f"the film number {number % 7} was {words[number % 3]}", label)
        for number in range(count // 2)
        for label, words in REVIEWS.items()
    ]


def csv_bytes(rows: Sequence[Sequence[object]], header: Sequence[str] = ("text", "label")) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue().encode()


def base_settings(name: str, **changes: Any) -> dict[str, Any]:
    if name == "synthetic":
        return small_settings(**{"epochs": 1, "dataset_params": {"num_samples": 40, "seq_len": 5}, **changes})
    params = {"data_dir": "data", "max_length": 16, "min_frequency": 1}
    own = {"dataset_type": "real_world", "dataset_name": "reviews", "dataset_params": params, "epochs": 1}
    return small_settings(**{**own, **changes})


def make_base(name: str) -> None:
    """A finished run, its config and its data, in the working folder."""
    Path("config.json").write_text(json.dumps(base_settings(name)))
    if name == "text":
        Path("data").mkdir()
        Path("data/train.csv").write_bytes(csv_bytes(text_rows()))
    with _variables():
        ended = _called(["main", "--json_config_path", "config.json", "--quiet"])
    assert ended.code == 0, ended.err
    if name == "text":  # predict needs no data, and a run on other data would be another one
        return
    with contextlib.closing(sqlite3.connect("experiment_results.db")) as connection, connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def run_of(folder: Path) -> Path:
    """The folder of the one run."""
    (found,) = (folder / "runs").iterdir()
    return found


# ------------------------------------------------------------------------------------------ config


def written(content: str | bytes | dict[str, Any], name: str = "config.json") -> Prepare:
    def prepare(folder: Path) -> None:
        plain = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_bytes(plain.encode(errors="surrogatepass") if isinstance(plain, str) else plain)

    return prepare


class Raw(str):
    """JSON text to stand for itself."""

    __slots__ = ()


def config_text(settings: dict[str, Any], path: Sequence[str], value: Any) -> str:
    """The config with a value at a place; `Raw` text goes in as it is."""
    settings = json.loads(json.dumps(settings))
    target = settings
    for step in path[:-1]:
        target = target.setdefault(step, {})
    target[path[-1]] = "\0here\0" if isinstance(value, Raw) else value
    text = json.dumps(settings)
    return text.replace(json.dumps("\0here\0"), value) if isinstance(value, Raw) else text


# Wrong in every field, whatever its type.
NEVER = {
    "NaN": Raw("NaN"),
    "-Infinity": Raw("-Infinity"),
    "1e999": Raw("1e999"),
    "a number of 5,000 digits": Raw("9" * 5000),
    "half a pair": Raw(r'"\ud800"'),
    "NUL": "a\0b",
    "an escape sequence": "\x1b[2Jx",
    "a long string": "x" * 200_000,
    "deep": Raw("[" * 60 + "]" * 60),
    "object": {"__class__": "os.system", "args": ["id"]},
}
WRONG = {
    int: {"bool": True, "float": 1.5, "text": "7", "huge": 10**30, "negative": -1, "list": [1]},
    float: {"bool": False, "text": "0.1", "negative": -1.0, "list": [0.1]},
    bool: {"number": 1, "text": "true", "list": [True]},
    str: {"number": 5, "bool": True, "list": ["x"]},
}


def kind_of(annotation: Any) -> type | None:
    text = str(annotation)
    return next((kind for kind in (bool, int, float, str) if re.search(rf"\b{kind.__name__}\b", text)), None)


def places() -> Iterator[tuple[dict[str, Any], tuple[str, ...], Any]]:
    """Every field of every section: a config that has it, its path, its annotation."""
    plain = base_settings("synthetic")
    for name, kind in {
        "model_type": str,
        "dataset_type": str,
        "dataset_name": str,
        "epochs": int,
        "batch_size": int,
    }.items():
        yield plain, (name,), kind
    for name, kind in {"experiment_name": str, "seed": int}.items():
        yield plain, (name,), kind
    sections = {
        "optimizer_params": OptimizerParams,
        "scheduler_params": SchedulerParams,
        "training_params": TrainingParams,
    }
    for section, model in sections.items():
        for name, found in fields_of(model).items():
            yield plain, (section, name), found.annotation
    for model_type, cls in sorted(MODELS_MAP.items()):
        settings = base_settings("synthetic", model_type=model_type)
        for name, found in fields_of(signature_model(cls, MODEL_PROVIDED)).items():
            yield settings, ("model_params", name), found.annotation
    for task, cls in sorted(SYNTHETIC_DATASETS.items()):
        settings = base_settings("synthetic", dataset_name=task, dataset_params={})
        for name, found in fields_of(signature_model(cls, SYNTHETIC_PROVIDED)).items():
            yield settings, ("dataset_params", name), found.annotation
    from research_eval.datasets.text import TextDataset

    for name, found in fields_of(signature_model(TextDataset, TEXT_PROVIDED)).items():
        yield base_settings("text"), ("dataset_params", name), found.annotation


def config_cases() -> Iterator[Case]:
    run = ("main", "--json_config_path", "config.json", "--dry_run")

    def case(name: str, content: str | bytes | dict[str, Any], says: str = r"config\.json") -> Case:
        return Case("config", name, run, says, written(content))

    good = json.dumps(base_settings("synthetic"))
    texts: dict[str, str | bytes] = {
        "empty": b"",
        "blank": b" \n\t ",
        "byte-order mark alone": b"\xef\xbb\xbf",
        "NUL bytes": b"\0" * 100,
        "NUL in front": b"\0" + good.encode(),
        "NUL in the middle": good.encode().replace(b",", b",\0", 1),
        "UTF-16": good.encode("utf-16"),
        "UTF-32": good.encode("utf-32"),
        "Latin-1": good.replace("parity", "parit\u00e9").encode("latin-1"),
        "overlong UTF-8": good.encode().replace(b'"dense"', b'"\xc0\xafdense"'),
        "surrogates as UTF-8": good.encode().replace(b'"dense"', b'"\xed\xa0\x80"'),
        "2 MB": good.encode() + b" " * 2_000_000,
        "gzip": gzip.compress(good.encode()),
        "a list": b"[1, 2]",
        "a string": b'"text"',
        "a number": b"1",
        "null": b"null",
        "not closed": good[:-1],
        "closed twice": good + "}",
        "two objects": good + good,
        "50,000 brackets": "[" * 50_000,
        "50,000 objects": '{"a":' * 50_000,
        "200,000 commas": "{" + "," * 200_000 + "}",
        "100,000 keys": "{" + ",".join(f'"k{number}":1' for number in range(60_000)) + "}",
        "a comment that is not closed": "/*" + good,
        "900,000 slashes": "/" * 900_000,
        "300,000 quotes": '"' * 300_000,
        "300,000 backslashes": '{"a": "' + "\\" * 300_000,
        "Python": "__import__('os').system('id')",
        "YAML with an object": "!!python/object/apply:os.system ['id']",
        "pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.",
        "XML": '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
        "single quotes": good.replace('"', "'"),
        "duplicate keys": good.replace("{", '{"epochs": 1,', 1),
        "duplicate section": good.replace("{", '{"model_params": {},', 1),
        "duplicate by escape": good.replace("{", r'{"\u0065pochs": 1,', 1),
        "a section twice by alias": json.dumps(
            base_settings("synthetic", model_type="moe", model_params={"num_experts": 2, "num_experts_per_layer": 4})
        ),
        "hexadecimal": good.replace('"epochs": 1', '"epochs": 0x10'),
        "leading zero": good.replace('"epochs": 1', '"epochs": 01'),
        "plus sign": good.replace('"epochs": 1', '"epochs": +1'),
        "underscores": good.replace('"epochs": 1', '"epochs": 1_000'),
        "other digits": good.replace('"epochs": 1', '"epochs": \u0661'),
        "a key called __proto__": good.replace("{", '{"__proto__": {},', 1),
        "a key called __class__": good.replace("{", '{"__class__": "x",', 1),
        "a key with an escape sequence": good.replace("{", r'{"\u001b]0;owned\u0007": 1,', 1),
        "a key of 100,000 characters": good.replace("{", '{"' + "k" * 100_000 + '": 1,', 1),
        "a key that is half a pair": good.replace("{", r'{"\udc00": 1,', 1),
        "a right-to-left name": good.replace("{", '{"experiment_name": "\u202egnp.exe",', 1),
        "a section that is a list": good.replace("{", '{"scheduler_params": [1],', 1),
        "unknown model": good.replace('"dense"', '"os.system"'),
        "unknown task": good.replace('"parity"', '"../../etc/passwd"'),
    }
    for name, content in texts.items():
        yield case(name, content)
    for settings, path, annotation in places():
        values = NEVER | WRONG.get(kind_of(annotation), {})
        for name, value in values.items():
            if annotation is not None and "None" in str(annotation) and name == "null":
                continue
            if "list" in str(annotation) and name in ("list", "deep"):
                continue
            label = f"{settings['model_type']} {settings['dataset_name']} {'.'.join(path)}: {name}"
            # A data folder that is missing, as here, is said before the rest of the config is checked.
            yield case(label, config_text(settings, path, value), rf"{path[-1]}|config\.json:\d+:\d+: |data_dir")
    yield from size_cases()
    yield from file_cases()


# Numbers that would take more memory than there is.
BIG: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    *(
        (model, {}, ("model_params", name))
        for model, names in {
            "dense": ("embed_dim", "num_heads", "dim_feedforward", "num_layers"),
            "moe": ("embed_dim", "dim_feedforward", "num_layers", "num_experts"),
            "goe": ("embed_dim", "num_total_experts", "max_path_len", "num_layers", "router_hidden_dim"),
            "goe_original": ("embed_dim", "num_total_experts", "max_path_len", "router_hidden_dim", "expert_layers"),
        }.items()
        for name in names
    ),
    *(("dense", {}, ("dataset_params", name)) for name in ("num_samples", "seq_len")),
    ("dense", {}, ("training_params", "num_threads")),
]


COUNTS = ("num_layers", "num_experts", "num_total_experts", "expert_layers", "max_path_len")


def size_cases() -> Iterator[Case]:
    for dry in (True, False):
        run = ("main", "--json_config_path", "config.json", *(("--dry_run",) if dry else ()))
        for (model, changes, path), value in itertools.product(BIG, (10**12, 2**31 - 1, 10**9, 10**7)):
            if (value == 10**7 and path[-1] not in COUNTS) or (not dry and value != 10**9):
                continue
            settings = base_settings("synthetic", model_type=model, **changes)
            yield Case(
                "config",
                f"{model} {'.'.join(path)} = {value:.0e}{'' if dry else ', for real'}",
                run,
                path[-1],
                written(config_text(settings, path, value)),
            )
    run = ("main", "--json_config_path", "config.json", "--dry_run")
    for task, cls in sorted(SYNTHETIC_DATASETS.items()):
        for name, found in fields_of(signature_model(cls, SYNTHETIC_PROVIDED)).items():
            if kind_of(found.annotation) is int and "seed" not in name:  # which may be any number
                for value in (10**12, 10**9):
                    settings = base_settings("synthetic", dataset_name=task, dataset_params={"num_samples": 40})
                    text = config_text(settings, ("dataset_params", name), value)
                    yield Case("config", f"{task} {name} = {value:.0e}", run, rf"{name}|dataset_params", written(text))
    both = {"model_params": {"embed_dim": 65536, "num_heads": 1, "num_layers": 1000}}
    yield Case(
        "config", "each size allowed, not all together", run, "embed_dim", written(base_settings("synthetic", **both))
    )
    data = {"num_samples": 10**6, "seq_len": 10**5}
    yield Case(
        "config", "many long samples", run, "num_samples", written(base_settings("synthetic", dataset_params=data))
    )


def file_cases() -> Iterator[Case]:
    def folder(path: Path) -> None:
        (path / "config.json").mkdir()

    def pipe(path: Path) -> None:
        os.mkfifo(path / "config.json")

    def loop(path: Path) -> None:
        (path / "config.json").symlink_to("config.json")

    def device(path: Path) -> None:
        (path / "config.json").symlink_to("/dev/zero")

    def unreadable(path: Path) -> None:
        (path / "config.json").symlink_to("/proc/self/mem")

    kinds = {
        "a folder": folder,
        "a pipe": pipe,
        "a link to itself": loop,
        "/dev/zero": device,
        "/proc/self/mem": unreadable,
    }
    for name, prepare in kinds.items():
        for flag in ("--json_config_path", "--search_space"):
            arguments = ("main", flag, "config.json")
            if flag == "--search_space":
                arguments += ("--dataset_name", "parity", "--n_trials", "1")
            yield Case("config", f"{flag} is {name}", arguments, r"config\.json", prepare)
    for name in (
        "",
        "/",
        "..",
        "/dev/stdin",
        "/dev/null",
        "/dev/tty",
        "x" * 5000,
        "a\nb",
        "no/such/file.json",
        "https://a.b/c.json",
    ):
        yield Case(
            "config", f"the path {name[:20]!r}", ("main", "--json_config_path", name), r"json|cannot be read|file"
        )
    spaces = {
        "a list": "[]",
        "deep": "[" * 5000,
        "NaN": '{"lr": NaN}',
        "unknown name": '{"optimizer_params": {"lrr": 0.1}}',
        "half a pair": r'{"optimizer_params": {"lr": "\ud800"}}',
        "huge": '{"model_params": {"embed_dim": {"low": 1, "high": 1e999}}}',
        "nothing to choose": '{"model_params": {"embed_dim": {"choices": []}}}',
        "a million choices": json.dumps({"model_params": {"embed_dim": {"choices": list(range(100_000))}}}),
        "text": '{"model_params": "x"}',
        "duplicates": '{"model_params": {}, "model_params": {}}',
        "bytes": b"\xff\xfe",
    }
    for name, content in spaces.items():
        arguments = ("main", "--search_space", "space.json", "--dataset_name", "parity", "--n_trials", "1", "--dry_run")
        yield Case(
            "config", f"search space: {name}", arguments, r"space\.json|search_space", written(content, "space.json")
        )


# ------------------------------------------------------------------------------------------ command line

NASTY = [
    "",
    " ",
    "\x1b[2J",
    "\udcff",
    "a\0b"[:1] + "\u2028",
    "'; DROP TABLE experiments; --",
    "$(id)",
    "`id`",
    "%s%n",
    "-",
    "--",
    "../..",
    "NaN",
    "1e999",
]
NUMBERS = ["-1", "0", "1.5", "1e3", "nan", "inf", "0x10", "9" * 400, "9" * 6000, "", " ", "1;2"]


def command_cases() -> Iterator[Case]:
    def prepare(folder: Path) -> None:
        written(base_settings("synthetic"))(folder)

    run = ("main", "--json_config_path", "config.json")

    def case(
        name: str, arguments: Sequence[str], says: str, codes: tuple[int, ...] = (2,), base: str | None = None
    ) -> Case:
        return Case("command line", name, tuple(arguments), says, prepare, codes, base=base)

    for flag in ("--epochs", "--batch_size"):
        for value in NUMBERS:
            yield case(f"{flag} {value[:12]!r}", (*run, flag, value, "--dry_run"), flag[2:])
    for value in NUMBERS:
        if value != "0":
            yield case(f"--seed {value[:12]!r}", (*run, "--seed", value, "--dry_run"), "seed")
    for value in (
        *NASTY,
        "0-",
        "-5",
        "5-0",
        "0-99999999999999999999",
        "1,,2",
        "0-9999999",
        "1" * 5000,
        "a-b",
    ):
        yield case(f"--seeds {value[:20]!r}", (*run, f"--seeds={value}", "--dry_run"), "seeds")
    for value in (*NASTY, "cuda:99999999999999999999", "cuda:-1", "cuda:99", "meta", "cpu:0:0", "xla"):
        yield case(f"--device {value[:20]!r}", (*run, f"--device={value}", "--dry_run"), "device")
    for value in NASTY:
        yield case(f"--precision {value!r}", (*run, f"--precision={value}", "--dry_run"), "precision")
        yield case(f"unknown flag {value!r}", (*run, f"--zzz{value}"), "unknown argument")
        yield case(f"--data_dir {value!r}", (*run, f"--data_dir={value}", "--dry_run"), "data_dir")
        yield case(f"command {value!r}", ("goe", value), "COMMAND|invalid choice|usage", (2,))
    study = ("main", "--dataset_name", "parity", "--model_types", "dense", "--dry_run")
    for flag in ("--n_trials", "--n_jobs", "--seeds_per_trial", "--max_params", "--syn_num_samples", "--syn_seq_len"):
        for value in NUMBERS:
            yield case(f"study {flag} {value[:12]!r}", (*study, f"{flag}={value}"), flag[2:])
    for value in ("-1", "0", "nan", "inf", "x", ""):
        for flag in ("--timeout", "--max_flops"):
            yield case(f"study {flag} {value!r}", (*study, f"{flag}={value}"), flag[2:])
    for value in NASTY:
        yield case(
            f"--model_types {value!r}",
            ("main", "--dataset_name", "parity", f"--model_types={value}", "--dry_run"),
            "model_type",
        )
        yield case(f"--objectives {value!r}", (*study, f"--objectives={value}"), "objectives", (0, 2))
        yield case(
            f"--dataset_name {value!r}",
            ("main", f"--dataset_name={value}", "--model_types=dense", "--dry_run"),
            "dataset_name|dataset",
        )
    urls = [
        "postgresql://",
        "postgresql://u:secretpassword@127.0.0.1:1/x",
        "postgresql://u:secretpassword@[::1]:99999999/x",
        "mysql://a/b",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=rwc&uri=true",
        "sqlite:///a.db?check_same_thread=no&factory=os.system",
        "sqlite+pysqlcipher:///x",
        "sqlite:///no/such/folder/x.db",
        "sqlite:////proc/self/mem",
        "file:x?mode=rwc",
        "http://a.b/c",
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        "/proc/self/mem",
        "/",
        ".",
        "..",
        "",
        " ",
        "x" * 5000,
        "a\nb/c",
        "://",
        "sqlite://user:secretpassword@host/x",
        "postgresql+psycopg2://x/y",
        "config.json",
    ]
    for url in urls:
        for name, arguments in {
            "init_db": ("init_db",),
            "goe runs": ("goe", "runs"),
            "study": ("main", "--dataset_name=parity", "--model_types=dense", "--n_trials=1"),
        }.items():
            flag = "--storage" if name == "study" else "--db"
            says = (
                r"storage|database|no results at|argument" if name != "goe runs" else r"database|no results at|argument"
            )
            codes = (1, 2) if url.startswith("postgresql") else (2,)  # a server that is not there is no mistake
            yield case(f"{name} {flag} {url[:40]!r}", (*arguments, f"{flag}={url}"), says, codes)
    stored = [
        ("goe", "runs", "--limit", "9" * 30),
        ("goe", "runs", "--limit", "-1"),
        ("goe", "runs", "--sort", "x;--"),
        ("goe", "runs", "--sort", "full_config_json'"),
        ("goe", "runs", "--metrics", "no such metric"),
        ("goe", "runs", "--metrics", "' OR 1=1 --"),
        ("goe", "runs", "--status", "' OR 1=1 --"),
        ("goe", "runs", "--where", "final_val_f1>=1e999x"),
        ("goe", "runs", "--where", "' OR 1=1 --"),
        ("goe", "runs", "--where", "x" * 100_000 + ">=1"),
        ("goe", "runs", "--where", "<" * 100_000),
        ("goe", "runs", "--since", "9999-99-99"),
        ("goe", "runs", "--since", "0001-01-01T00:00:00+14:00"),
        ("goe", "runs", "--since", "\udcff"),
        ("goe", "runs", "show", "'"),
        ("goe", "runs", "show", ""),
        ("goe", "runs", "show", "%"),
        ("goe", "runs", "show", "_" * 10_000),
        ("goe", "runs", "show", "\udcff"),
        ("goe", "runs", "show", "../../beside"),
        ("goe", "runs", "diff", "latest", "*"),
        ("goe", "export", "/etc/passwd"),
        ("goe", "export", "../beside/victim.txt"),
        ("goe", "export", "no/such/folder.csv"),
        ("goe", "export", "x" * 5000 + ".csv"),
        ("goe", "export", "config.json"),
        ("goe", "merge", "config.json"),
        ("goe", "merge", "experiment_results.db"),
        ("goe", "merge", "/dev/zero"),
        ("goe", "merge", "postgresql://127.0.0.1:1/x"),
        ("goe", "replay", "nobody"),
        ("goe", "replay", "latest", "--tolerance", "nan"),
        ("goe", "replay", "latest", "--tolerance", "-1"),
        ("goe", "replay", "latest", "--device", "meta"),
        ("goe", "predict", "--run", "nobody", "--text", "1"),
        ("goe", "predict", "--run", "", "--text", "1"),
        ("goe", "predict", "--run", "%", "--text", "1"),
        ("goe", "predict", "--run", "2", "--text", ""),
        ("goe", "predict", "--run", "2", "--text", "9" * 100),
        ("goe", "predict", "--run", "2", "--text", "-1"),
        ("goe", "predict", "--run", "2", "--text", "0"),
        ("goe", "predict", "--run", "2", "--text", "\u0661"),
        ("goe", "predict", "--run", "2", "--text", "\udcff"),
        ("goe", "predict", "--run", "2", "--text", "1", "--device", "x"),
        ("goe", "predict", "--run", "2", "--file", "/dev/zero"),
        ("goe", "predict", "--run", "2", "--file", "."),
        ("goe", "predict", "--run", "2", "--file", "pipe"),
        ("goe", "predict", "--run", "2", "--file", "no.txt"),
        ("analyze", "--dataset_name", "' OR 1=1 --"),
        ("analyze", "--dataset_name", "parity", "--output_dir", "config.json"),
        ("analyze", "--dataset_name", "parity", "--output_dir", "config.json/x"),
        ("analyze", "--dataset_name", "parity", "--output_dir", "/proc/x"),
        ("analyze", "--dataset_name", "parity", "--confidence", "nan"),
        ("analyze", "--dataset_name", "parity", "--confidence", "1e999"),
        ("analyze", "--dataset_name", "parity", "--solved_at", "nan"),
        ("analyze", "--dataset_name", "parity", "--model_types", "\x1b[2J"),
        ("analyze", "--dataset_name", "parity", "--metric_to_optimize", "../x"),
        ("analyze", "--dataset_name", "parity", "--compare", "dense"),
        ("analyze", "--dataset_name", "parity", "--compare", "a,b,c"),
        ("suggest", "--dataset_name", "parity", "--model_type", "x"),
        ("suggest", "--dataset_name", "x", "--model_type", "dense"),
        ("suggest", "--dataset_name", "parity", "--model_type", "dense", "--top_n", "0"),
        ("suggest", "--dataset_name", "parity", "--model_type", "dense", "--top_n", "-1"),
        ("suggest", "--dataset_name", "parity", "--model_type", "dense", "--num_variations_per_config", "9" * 20),
        ("suggest", "--dataset_name", "parity", "--model_type", "dense", "--perturbation_magnitude", "nan"),
        ("suggest", "--dataset_name", "parity", "--model_type", "dense", "--perturbation_magnitude", "1e999"),
        ("suggest", "--dataset_name", "parity", "--model_type", "dense", "--seed", "-1"),
        ("suggest", "--dataset_name", "parity", "--model_type", "dense", "--seed", "9" * 40),
        ("suggest", "--dataset_name", "parity", "--model_type", "dense", "--output_dir", "config.json"),
        ("suggest", "--dataset_name", "parity", "--model_type", "dense", "--metric_name", "test_f1"),
    ]

    def with_pipe(folder: Path) -> None:
        os.mkfifo(folder / "pipe")

    for arguments in stored:
        flag = next((word.lstrip("-") for word in reversed(arguments) if word.startswith("--")), "")
        given = re.escape(arguments[-1][:20])
        says = "|".join(
            part
            for part in (
                flag,
                given,
                "run",
                "experiment",
                "argument",
                "database",
                "no results",
                "text",
                "merge",
                "seed",
            )
            if part
        )
        name = " ".join(arguments)
        yield Case("command line", name[:100], arguments, says, with_pipe, base="synthetic", kept=("config.json",))


# ------------------------------------------------------------------------------------------ data


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table, sink, **options)
    return sink.getvalue()


def text_table(**columns: Any) -> pa.Table:
    rows = text_rows()
    return pa.table({"text": [text for text, _ in rows], "label": [label for _, label in rows], **columns})


def bomb_table(rows: int) -> bytes:
    """A few kB that are gigabytes of text once they are read: one long text, in a dictionary, again and again."""
    words = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 1_000_000]))
    labels = pa.DictionaryArray.from_arrays(pa.array([0, 1] * (rows // 2), pa.int32()), pa.array(["a", "b"]))
    return parquet_bytes(pa.table({"text": words, "label": labels}), compression="zstd")


def data_cases() -> Iterator[Case]:
    run = ("main", "--json_config_path", "config.json", "--dry_run")

    def case(
        name: str, files: dict[str, bytes], says: str = "train", codes: tuple[int, ...] = (2,), **params: Any
    ) -> Case:
        def prepare(folder: Path) -> None:
            settings = base_settings("text")
            settings["dataset_params"] |= params
            written(settings)(folder)
            (folder / "data").mkdir()
            for path, content in files.items():
                (folder / "data" / path).write_bytes(content)

        return Case("data", name, run, says, prepare, codes)

    good = csv_bytes(text_rows())
    jsonl = b"".join(json.dumps({"text": text, "label": label}).encode() + b"\n" for text, label in text_rows())
    table = parquet_bytes(text_table())
    csvs = {
        "empty": b"",
        "header only": b"text,label\n",
        "blank lines": b"\n" * 1000,
        "NUL bytes": b"\0" * 1000,
        "NUL in a text": good.replace(b"film", b"fi\0lm"),
        "UTF-16": good.decode().encode("utf-16"),
        "Latin-1": good + "caf\u00e9,good\n".encode("latin-1"),
        "surrogates": good + b"\xed\xa0\x80,good\n",
        "gzip": gzip.compress(good),
        "zip": b"PK\x03\x04" + b"\0" * 100,
        "pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.",
        "HTML": b"<html><script>alert(1)</script></html>",
        "no label": b"text\nx\ny\n",
        "no text": b"label\na\nb\n",
        "two columns called text": b"text,text,label\na,b,x\nc,d,y\n" * 20,
        "two columns called label": b"text,label,label\na,x,y\nc,y,x\n",
        "ragged": b"text,label\na,b,c\n",
        "a quote that is not closed": b'text,label\n"abc,good\n' * 50,
        "one class": csv_bytes([("x", "good")] * 20),
        "one row": csv_bytes([("x", "good")]),
        "null labels": csv_bytes([("x", ""), ("y", "a")]),
        "labels are floats": csv_bytes([("x", 0.5), ("y", 1.5)] * 10),
        "labels are dates": csv_bytes([("x", "2020-01-01"), ("y", "2021-01-01")] * 10),
        "a label of 10^18": csv_bytes([("x", 10**18), ("y", 1)] * 10),
        "negative labels": csv_bytes([("x", -1), ("y", -2)] * 10),
        "labels beyond 64 bits": csv_bytes([("x", 2**70), ("y", 1)] * 10),
        "labels of 100,000 characters": csv_bytes([("x", "a" * 100_000), ("y", "b" * 100_000)] * 10),
        "20,000 classes": csv_bytes([(f"text {number}", f"class {number // 2}") for number in range(40_000)]),
        "labels with NUL": csv_bytes([("x", "a\0b"), ("y", "c")] * 10),
        "labels with escape sequences": csv_bytes([("x", "\x1b[2J"), ("y", "\x1b]0;x\x07")] * 10),
        "200,000 columns": b",".join(b"c%d" % number for number in range(200_000)) + b"\n1\n",
        "a field of 20 MB": b'text,label\n"' + b"x" * (20 << 20) + b'",good\n',
        "a header of 5 MB": b"x" * (5 << 20) + b",label\n1,2\n",
    }
    strange = {"NUL in a text", "a quote that is not closed"}  # but texts
    strange |= {"UTF-16", "gzip"}  # their first bytes say so
    strange |= {"labels are floats", "labels are dates", "a label of 10^18", "negative labels", "labels beyond 64 bits"}
    for name, content in csvs.items():
        codes = (0,) if name in strange else (2,)
        yield case(f"CSV, {name}", {"train.csv": content}, r"train|dataset_params|label|data", codes)
    jsonls = {
        "empty": b"",
        "blank lines": b"\n" * 1000,
        "a list": b'[{"text": "a", "label": "b"}]',
        "not closed": jsonl[:-20],
        "deep": b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b', "label": "a"}\n',
        "deep objects": b'{"text": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b', "label": "a"}\n',
        "a deep column beside": jsonl + b'{"text": "a", "label": "good", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
        "NaN": b'{"text": NaN, "label": "a"}\n' * 4,
        "numbers for text": b'{"text": 1, "label": "a"}\n{"text": 2, "label": "b"}\n' * 4,
        "changing types": b'{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n' * 4,
        "huge numbers": b'{"text": "a", "label": 1e999}\n{"text": "b", "label": 1e998}\n' * 4,
        "duplicate keys": b'{"text": "a", "text": "b", "label": "x"}\n' * 4,
        "UTF-16": jsonl.decode().encode("utf-16"),
        "half a pair": b'{"text": "\\ud800", "label": "x"}\n{"text": "a", "label": "y"}\n' * 4,
        "NUL": b'{"text": "a\0", "label": "x"}\n' * 4,
        "gzip": gzip.compress(jsonl),
        "100,000 keys": b"{" + b",".join(b'"k%d": 1' % number for number in range(100_000)) + b"}\n",
        "binary": bytes(range(256)) * 20,
        "one line of 20 MB": b'{"text": "' + b"x" * (20 << 20) + b'", "label": "a"}\n',
    }
    for name, content in jsonls.items():
        codes = (0,) if name in ("UTF-16", "gzip") else (2,)
        yield case(f"JSONL, {name}", {"train.jsonl": content}, r"train|dataset_params|data", codes)

    compressed = {
        "a gzip bomb": ("train.csv.gz", gzip.compress(good + b"x" * (200 << 20))),
        "a Zstandard bomb": ("train.jsonl.zst", pa.compress(b" " * (200 << 20), "zstd", asbytes=True)),
        "a gzip file that is cut off": ("train.csv.gz", gzip.compress(good * 50)[:-20]),
        "a gzip file with a wrong checksum": ("train.csv.gz", gzip.compress(good)[:-8] + b"\0" * 8),
        "zeros after the mark of gzip": ("train.csv.gz", b"\x1f\x8b" + b"\0" * 100),
        "zeros after the mark of Zstandard": ("train.csv.zst", b"\x28\xb5\x2f\xfd" + b"\0" * 100),
        "gzip in gzip": ("train.csv.gz", gzip.compress(gzip.compress(good))),
        "a Parquet file of zeros in gzip": ("train.parquet.gz", gzip.compress(b"PAR1" + b"\0" * 100)),
        "an archive": ("train.csv.gz", b"PK\x03\x04" + b"\0" * 100),
    }
    for name, (file, content) in compressed.items():
        yield case(name, {file: content}, r"train\.(csv|jsonl|parquet)")
    documents = {
        "a deep list": b"[" * 200_000,
        "deep objects": b'[{"text": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}]",
        "not closed": b'[{"text": "a", "label": "b"}',
        "a number": b"5",
        "a list of numbers": b"[1, 2]",
        "an empty list": b"[]",
        "lists of different lengths": b'{"text": ["a"], "label": []}',
        "duplicate keys": b'[{"text": "a", "text": "b", "label": "x"}]',
        "NaN": b'[{"text": NaN, "label": "x"}]',
        "half a pair": b'[{"text": "\\ud800", "label": "x"}, {"text": "a", "label": "y"}]',
        "changing types": b'[{"text": "a", "label": 1}, {"text": "b", "label": "x"}]',
        "a text that is a list": b'[{"text": ["a"], "label": "x"}, {"text": ["b"], "label": "y"}]',
    }
    for name, content in documents.items():
        yield case(f"JSON, {name}", {"train.json": content}, r"train\.json")

    def patched(position: int, content: bytes) -> bytes:
        position %= len(table)
        return table[:position] + content + table[position + len(content) :]

    def with_metadata(content: bytes) -> bytes:
        return parquet_bytes(text_table().replace_schema_metadata({b"huggingface": content}))

    parquets = {
        "empty": b"",
        "the magic alone": b"PAR1PAR1",
        "magic and zeros": b"PAR1" + b"\0" * 1000 + b"PAR1",
        "cut in half": table[: len(table) // 2],
        "a footer that lies about its length": patched(-8, struct.pack("<I", 2**31 - 1)),
        "a footer of zeros": patched(-200, b"\0" * 150),
        "pages of zeros": patched(4, b"\0" * 200),
        "pages of ones": patched(4, b"\xff" * 200),
        "a bomb": bomb_table(100_000),
        "no rows": parquet_bytes(text_table().slice(0, 0)),
        "nested text": parquet_bytes(pa.table({"text": [["a"], ["b"]], "label": ["x", "y"]})),
        "binary text": parquet_bytes(pa.table({"text": [b"\xff", b"\xfe"], "label": ["x", "y"]})),
        "null text": parquet_bytes(pa.table({"text": pa.array([None, None], pa.string()), "label": ["x", "y"]})),
        "label structs": parquet_bytes(pa.table({"text": ["a", "b"], "label": [{"a": 1}, {"a": 2}]})),
        "metadata is no JSON": with_metadata(b"{"),
        "metadata is a list": with_metadata(b"[1]"),
        "metadata is deep": with_metadata(b"[" * 100_000),
        "metadata with names that are a number": with_metadata(b'{"info": {"features": {"label": {"names": 5}}}}'),
        "metadata with info that is text": with_metadata(b'{"info": "x"}'),
        "metadata is binary": with_metadata(b"\xff\xfe"),
        "metadata with names that repeat": with_metadata(
            b'{"info": {"features": {"label": {"names": ["good", "good", "bad"]}}}}'
        ),
        "two columns called text": parquet_bytes(
            pa.Table.from_arrays([pa.array(["a", "b"])] * 3, names=["text", "text", "label"])
        ),
    }
    for name, content in parquets.items():
        codes = (
            (0,) if name in ("metadata is a list", "metadata with info that is text") else (2,)
        )  # not ours: no names
        yield case(f"Parquet, {name}", {"train.parquet": content}, r"train|data|huggingface", codes)
    infos = {
        "not JSON": b"{",
        "a list": b"[]",
        "deep": b"[" * 100_000,
        "binary": b"\xff\xfe\x00",
        "names that are a number": b'{"label_names": 5}',
        "names that are text": b'{"label_names": "ab"}',
        "names that repeat": b'{"label_names": ["a", "a"]}',
        "no names": b'{"label_names": []}',
        "features that are a list": b'{"features": [1]}',
        "names in features that are a number": b'{"features": {"label": {"names": 7}}}',
        "other names": b'{"label_names": ["x", "y"]}',
        "a million names": b'{"label_names": [' + b",".join(b'"n%d"' % number for number in range(200_000)) + b"]}",
        "names that are objects": b'{"label_names": [{"a": 1}, {"a": 2}]}',
        "NaN": b'{"label_names": [NaN, Infinity]}',
        "empty": b"",
        "big": b" " * (30 << 20) + b"{}",
    }
    for name, content in infos.items():
        codes = (0,) if name == "features that are a list" else (2,)
        yield case(
            f"dataset_info, {name}", {"train.csv": good, "dataset_info.json": content}, r"dataset_info|data", codes
        )
    yield case("both train.csv and train.parquet", {"train.csv": good, "train.parquet": table})
    yield case("a shard is missing", {"train-00000-of-00002.csv": good})
    yield case("99999 shards", {"train-00000-of-99999.csv": good})
    yield case(
        "a validation split of another kind",
        {"train.csv": good, "test.csv": csv_bytes([("x", 1), ("y", 2)])},
        "test|train",
    )
    yield case(
        "a class that train lacks", {"train.csv": good, "validation.csv": csv_bytes([("x", "ugly")])}, "validation"
    )
    for name, option in {
        "delimiter of two characters": {"delimiter": "::"},
        "delimiter that is a letter": {"delimiter": "a"},
        "delimiter that is a quotation mark": {"delimiter": '"'},
        "delimiter that is nothing": {"delimiter": ""},
        "encoding that does not exist": {"encoding": "utf-9"},
        "encoding that is none of texts": {"encoding": "zip"},
        "encoding that does not fit": {"encoding": "utf-16"},
        "columns that do not fit": {"columns": ["text"]},
        "columns that repeat": {"columns": ["text", "text"]},
        "no text_field": {"text_field": []},
        "a text_field twice": {"text_field": ["text", "text"]},
        "a text_field that is not there": {"text_field": ["text", "title"]},
        "val_size of all rows": {"val_size": 10**6},
        "val_size and test_size of all rows": {"val_size": 0.5, "test_size": 0.5},
        "val_size of 0": {"val_size": 0},
        "test_size below 0": {"test_size": -0.5},
    }.items():
        yield case(name, {"train.csv": good}, "|".join(option), **option)
    yield case("text_field is label_field", {"train.csv": good}, "text_field|label|train", text_field="label")
    yield case("a field that is not there", {"train.csv": good}, "text_field", text_field="'; DROP TABLE x")
    yield case("too rare words", {"train.csv": good}, "min_frequency", min_frequency=10**6)

    def special(name: str, make: Prepare, says: str = "data", **params: Any) -> Case:
        def prepare(folder: Path) -> None:
            settings = base_settings("text")
            settings["dataset_params"] |= params
            written(settings)(folder)
            make(folder)

        return Case("data", name, run, says, prepare)

    def made(folder: Path, name: str = "data") -> Path:
        (folder / name).mkdir(exist_ok=True)
        return folder / name

    yield special("nothing there", nothing)
    yield special("an empty folder", made)
    yield special("a pipe for a folder", lambda folder: os.mkfifo(folder / "data"))
    yield special("a device", nothing, "data", data_dir="/dev/zero")
    yield special("a pipe in the folder", lambda folder: os.mkfifo(made(folder) / "train.csv"), "train")
    yield special("a folder called train.csv", lambda folder: (made(folder) / "train.csv").mkdir(), "train")
    yield special("a link to a device", lambda folder: (made(folder) / "train.csv").symlink_to("/dev/zero"), "train")
    yield special("a link to itself", lambda folder: (made(folder) / "train.csv").symlink_to("train.csv"), "train")
    yield special("a link that leads nowhere", lambda folder: (made(folder) / "train.csv").symlink_to("no"), "train")
    yield special(
        "a pipe for dataset_info.json",
        lambda folder: (
            (made(folder) / "train.csv").write_bytes(good),
            os.mkfifo(folder / "data" / "dataset_info.json"),
        ),
        "dataset_info",
    )
    for value in (
        "/etc/passwd",
        "/",
        "no\nsuch",
        "x" * 5000,
        "~nobody-of-that-name/x",
        "http://a.b/c.csv",
        "file:///etc/passwd",
        "s3://x/y",
    ):
        yield special(
            f"data_dir {value[:20]!r}", nothing, "data_dir|no train|File name too long|has to end", data_dir=value
        )
    for value in (["data", "data"], ["a", "b"], ["data"], ["data", "../data"], ["", ""]):
        yield special(f"sources {value}", made, "sources|data_dir|a|train", data_dir=None, sources=value)
    yield special(
        "a cache that cannot be",
        lambda folder: (made(folder) / "train.csv").write_bytes(good),
        "cache",
        cache_dir="config.json/x",
    )
    yield special(
        "a cache in /proc", lambda folder: (made(folder) / "train.csv").write_bytes(good), "cache", cache_dir="/proc/x"
    )

    # A cache that somebody else wrote is built again.
    for name, content in {
        "text": b"x",
        "empty": b"",
        "zip without arrays": b"PK\x05\x06" + b"\0" * 18,
        "pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.",
        "other arrays": _npz(other=[1]),
        "an array of objects": _npz(tokens=[1, "x", None], offsets=[0], num_cut=[0], tokenizer_json=[None]),
        "a header that lies": _lying_npz(),
        "wrong numbers": _npz(tokens=[1], offsets=[0, 10**9], num_cut=0, tokenizer_json=[1, 2]),
    }.items():
        yield Case("data", f"cache: {name}", run, "cache|damaged", _poison(content), (0,), base="text")


def _npz(**arrays: Any) -> bytes:
    import numpy as np

    sink = io.BytesIO()
    plain = {
        name: np.array(value, object if name != "num_cut" and None in np.atleast_1d(value) else None)
        for name, value in arrays.items()
    }
    np.savez(sink, **plain)
    return sink.getvalue()


def _lying_npz() -> bytes:
    """Arrays whose headers promise terabytes."""
    import zipfile

    sink = io.BytesIO()
    text = "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"
    with zipfile.ZipFile(sink, "w") as archive:
        for name in ("tokens", "offsets", "num_cut", "tokenizer_json"):
            archive.writestr(f"{name}.npy", header + b"\0" * 16)
    return sink.getvalue()


def _poison(content: bytes) -> Prepare:
    def prepare(folder: Path) -> None:
        for path in (folder / ".goe_cache").glob("*.npz"):
            path.write_bytes(content)

    return prepare


# ------------------------------------------------------------------------------------------ checkpoint


def rewritten(name: str, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> Prepare:
    """A safetensors file of the run with other tensors or values."""

    def prepare(folder: Path) -> None:
        path = run_of(folder) / name
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["values"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        change(tensors, values)
        save_file(tensors, path, {"values": json.dumps(values)})  # without our checksum, as a forger would leave it

    return prepare


def put(name: str, make: Callable[[Path], object]) -> Prepare:
    """Another file in the place of one of the run's."""

    def prepare(folder: Path) -> None:
        path = run_of(folder) / name
        path.unlink(missing_ok=True)
        make(path)

    return prepare


def replaced(name: str, content: bytes) -> Prepare:
    return put(name, lambda path: path.write_bytes(content))


def unfinished(prepare: Prepare) -> Prepare:
    """The run is filed as interrupted, so that it is resumed."""

    def both(folder: Path) -> None:
        with contextlib.closing(sqlite3.connect(folder / "experiment_results.db")) as connection, connection:
            connection.execute("UPDATE experiments SET status = 'interrupted'")
        prepare(folder)

    return both


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def safetensors_files() -> dict[str, bytes]:
    whole = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    return {
        "empty": b"",
        "eight bytes": b"\0" * 8,
        "text": b"not a checkpoint",
        "pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.",
        "a PyTorch zip": b"PK\x03\x04" + b"\0" * 200,
        "a header of 2^63": header(b"{}", 2**63),
        "a header of 99 MB": header(b"{}", 99_000_000),
        "a header that is no JSON": header(b"{" * 100),
        "a deep header": header(b"[" * 1_000_000),
        "a header with NUL": header(b"\0" * 50),
        "a header that is a list": header(b"[]"),
        "offsets behind the end": header(json.dumps(whole).encode()),
        "negative offsets": header(json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}).encode()),
        "a shape that overflows": header(
            json.dumps({"w": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 8]}}).encode()
        )
        + b"\0" * 8,
        "an unknown type": header(json.dumps({"w": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}).encode())
        + b"\0" * 8,
        "no values": header(json.dumps(whole).encode()) + b"\0" * 8,
        "values that are deep": header(json.dumps({"__metadata__": {"values": "[" * 100_000}, **whole}).encode())
        + b"\0" * 8,
        "values that are a list": header(json.dumps({"__metadata__": {"values": "[]"}, **whole}).encode()) + b"\0" * 8,
        "values that are no JSON": header(json.dumps({"__metadata__": {"values": "{"}, **whole}).encode()) + b"\0" * 8,
    }


def linked(name: str, target: str) -> Prepare:
    return put(name, lambda path: path.symlink_to(target))


def piped(name: str) -> Prepare:
    return put(name, os.mkfifo)


def of_folder(name: str) -> Prepare:
    return put(name, Path.mkdir)


def moved_out(name: str) -> Prepare:
    """The file lies beside the working folder, a link leads to it."""

    def prepare(folder: Path) -> None:
        path = run_of(folder) / name
        path.rename(folder / "elsewhere")
        path.symlink_to(folder / "elsewhere")

    return prepare


def checkpoint_cases() -> Iterator[Case]:
    resume = ("main", "--json_config_path", "config.json", "--resume", "--quiet")
    predict = ("goe", "predict", "--run", "2", "--text", "1 2 1")

    def resumed(
        name: str, prepare: Prepare, says: str = r"checkpoint\.safetensors|runs/", codes: tuple[int, ...] = (2,)
    ) -> Case:
        return Case("checkpoint", f"resume: {name}", resume, says, unfinished(prepare), codes, base="synthetic")

    def predicted(
        name: str, prepare: Prepare, says: str = r"model\.safetensors|runs/", codes: tuple[int, ...] = (2,)
    ) -> Case:
        return Case("checkpoint", f"predict: {name}", predict, says, prepare, codes, base="synthetic")

    for name, content in safetensors_files().items():
        # A damaged checkpoint may also be one that the run does without: it starts again or takes an older one.
        yield resumed(name, replaced("checkpoint.safetensors", content))
        yield predicted(name, replaced("model.safetensors", content))
    for name, make in {"a pipe": piped, "a folder": of_folder}.items():
        yield resumed(name, make("checkpoint.safetensors"))
        yield predicted(name, make("model.safetensors"))
    for target in ("/dev/zero", "/etc/passwd", "../../../beside/victim.txt", "checkpoint.safetensors"):
        yield resumed(f"a link to {target}", linked("checkpoint.safetensors", target))
        yield predicted(f"a link to {target}", linked("model.safetensors", target))
        yield predicted(f"data.json is a link to {target}", linked("data.json", target), "data.json")
    yield resumed("a link to a good file elsewhere", moved_out("checkpoint.safetensors"))
    yield predicted("a link to a good file elsewhere", moved_out("model.safetensors"))
    yield predicted("data.json is a link to a good file elsewhere", moved_out("data.json"), "data.json")

    Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]

    def changed(pattern: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Change:
        def change(tensors: dict[str, torch.Tensor], _values: dict[str, Any]) -> None:
            for key in [key for key in tensors if re.search(pattern, key)]:
                tensors[key] = function(tensors[key])

        return change

    def dropped(pattern: str) -> Change:
        def change(tensors: dict[str, torch.Tensor], _values: dict[str, Any]) -> None:
            for key in [key for key in tensors if re.search(pattern, key)]:
                del tensors[key]

        return change

    def state(**values: Any) -> Change:
        return lambda _tensors, held: held["state"].update(values)

    def generators(**values: Any) -> Change:
        return lambda _tensors, held: held["generators"].update(values)

    changes: dict[str, Change] = {
        "other shapes": changed("^model/", lambda tensor: torch.zeros(3)),
        "weights of integers": changed("^model/.*weight", lambda tensor: tensor.long()),
        "weights that are NaN": changed("^model/.*weight", lambda tensor: tensor * torch.nan),
        "weights that are infinite": changed("^model/.*weight", lambda tensor: tensor + torch.inf),
        "no weights": dropped("^model/"),
        "a further weight": lambda tensors, _values: tensors.update({"model/extra": torch.zeros(1)}),
        "no generators": dropped("^generator/"),
        "generators of other shapes": changed("^generator/", lambda tensor: torch.zeros(3, dtype=torch.uint8)),
        "generators of floats": changed("^generator/", lambda tensor: tensor.float()),
        "generators of zeros": changed("^generator/", torch.zeros_like),
        "moments of other shapes": changed("^optimizer/", lambda tensor: torch.zeros(7)),
        "moments for no parameter": lambda tensors, _values: tensors.update(
            {"optimizer/99999.exp_avg": torch.zeros(1)}
        ),
        "moments without a number": lambda tensors, _values: tensors.update({"optimizer/x": torch.zeros(1)}),
        "moments with a name like a path": lambda tensors, _values: tensors.update(
            {"optimizer/../../x.y": torch.zeros(1)}
        ),
        "moments that are NaN": changed("^optimizer/.*exp_avg", lambda tensor: tensor * torch.nan),
        "moments without a step": dropped(r"^optimizer/.*\.step"),
        "no state": lambda _tensors, values: values.pop("state"),
        "a state that is a list": lambda _tensors, values: values.update(state=[1]),
        "a further entry of the state": state(evil=1),
        "a step that is text": state(step="1"),
        "a step that is true": state(step=True),
        "a negative step": state(step=-5),
        "a step of 10^30": state(step=10**30),
        "a step that is NaN": state(step=float("nan")),
        "a step behind the end": state(step=10**6),
        "seconds that are text": state(seconds="x"),
        "seconds that are infinite": state(seconds=float("inf")),
        "reports that are text": state(reports="x"),
        "reports of numbers": state(reports=[1, 2]),
        "patience that is text": state(epochs_without_gain="x"),
        "a best score that is a list": state(best_f1=[1]),
        "no generator values": lambda _tensors, values: values.pop("generators"),
        "python generator of text": generators(python="x"),
        "python generator too short": generators(python=[3, [1, 2], None]),
        "python generator of huge numbers": generators(python=[3, [2**80] * 625, None]),
        "numpy generator of text": generators(numpy="x"),
        "numpy generator too short": generators(numpy={"bit_generator": "MT19937", "state": {"key": [1], "pos": 0}}),
        "numpy generator of another kind": generators(
            numpy={"bit_generator": "os.system", "state": {"key": [1], "pos": 0}}
        ),
    }
    benign = {"a best score that is a list": (2,)}
    for name, change in changes.items():
        codes = benign.get(name, (1, 2) if "NaN" in name or "infinite" in name else (2,))
        if name in ("moments for no parameter", "generators of zeros", "moments that are NaN"):
            codes = (0, 1, 2)
        yield resumed(name, rewritten("checkpoint.safetensors", change), r"checkpoint\.safetensors|nan", codes)
    weights: dict[str, Change] = {
        "other shapes": changed("", lambda tensor: torch.zeros(3)),
        "a matrix of 2^20 rows": changed("embedding.*weight", lambda tensor: torch.zeros(2**20, tensor.shape[-1])),
        "NaN": changed("weight", lambda tensor: tensor * torch.nan),
        "infinite": changed("weight", lambda tensor: tensor + torch.inf),
        "integers": changed("weight", lambda tensor: tensor.long()),
        "none": dropped(""),
        "one is missing": dropped("embedding"),
        "a further one": lambda tensors, _values: tensors.update({"extra": torch.zeros(1)}),
    }
    for name, change in weights.items():
        yield predicted(f"weights: {name}", rewritten("model.safetensors", change))
    described = {"vocab_size": 3, "num_classes": 2, "padding_idx": 0, "max_length": 5, "label_names": ["0", "1"]}
    descriptions: dict[str, Any] = {
        "empty": b"",
        "not JSON": b"{",
        "a list": b"[]",
        "deep": b"[" * 200_000,
        "binary": b"\xff\xfe",
        "100 MB": b" " * 100_000_000,
        "nothing": {},
        "no label_names": {name: value for name, value in described.items() if name != "label_names"},
        **{
            f"{key} = {str(value)[:12]}": {**described, key: value}
            for key in ("vocab_size", "num_classes", "padding_idx", "max_length")
            for value in (10**12, -1, "x", None, True, 1.5, [1])
        },
        "label_names too few": {**described, "label_names": ["0"]},
        "label_names that are text": {**described, "label_names": "ab"},
        "label_names of numbers": {**described, "label_names": [1, 2]},
        "label_names of null": {**described, "label_names": None},
        "other classes": {**described, "num_classes": 3, "label_names": ["0", "1", "2"]},
        "duplicates": json.dumps(described).replace("{", '{"vocab_size": 9,', 1).encode(),
        "NaN": json.dumps({**described, "vocab_size": float("nan")}).encode(),
    }
    for name, content in descriptions.items():
        plain = content if isinstance(content, bytes) else json.dumps(content).encode()
        yield predicted(f"data.json: {name}", replaced("data.json", plain), r"data\.json|model\.safetensors")
    yield predicted("data.json is missing", lambda folder: (run_of(folder) / "data.json").unlink(), r"data\.json")
    yield predicted("data.json is a pipe", piped("data.json"), r"data\.json")
    yield predicted("data.json is a folder", of_folder("data.json"), r"data\.json")

    def ask(name: str, prepare: Prepare, says: str = r"tokenizer\.json") -> Case:
        arguments = ("goe", "predict", "--run", "2", "--text", "the film was great")
        return Case("checkpoint", f"tokenizer: {name}", arguments, says, prepare, base="text")

    def changed_tokenizer(change: Callable[[dict[str, Any]], object]) -> Prepare:
        def prepare(folder: Path) -> None:
            path = run_of(folder) / "tokenizer.json"
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))

        return prepare

    def rows_beyond(content: dict[str, Any]) -> None:
        content["model"]["vocab"] = {word: 10**6 + row for row, word in enumerate(content["model"]["vocab"])}

    tokenizers: dict[str, Callable[[dict[str, Any]], object]] = {
        "ids behind the vocabulary": rows_beyond,
        "no model": lambda content: content.pop("model"),
        "an unknown model": lambda content: content["model"].update(type="os.system"),
        "a vocabulary that is a list": lambda content: content["model"].update(vocab=[1]),
        "negative ids": lambda content: content["model"].update(vocab={"a": -1}),
        "no unknown token": lambda content: content["model"].update(vocab={"the": 5}),
        "a pattern that takes for ever": lambda content: content["normalizer"]["normalizers"].insert(
            0, {"type": "Replace", "pattern": {"Regex": "(a+)+$|(.*)*x"}, "content": "b"}
        ),
        "a pattern that is none": lambda content: content["normalizer"]["normalizers"].insert(
            0, {"type": "Replace", "pattern": {"Regex": "("}, "content": "b"}
        ),
        "a replacement that grows": lambda content: content["normalizer"]["normalizers"].insert(
            0, {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**7}
        ),
        "added tokens": lambda content: content.update(
            added_tokens=[
                {
                    "id": 10**6,
                    "content": "film",
                    "special": True,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                }
            ]
        ),
        "truncation": lambda content: content.update(
            truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
        ),
    }
    for name, change in tokenizers.items():
        yield ask(name, changed_tokenizer(change), r"tokenizer\.json|model\.safetensors")
    for name, content in {
        "empty": b"",
        "not JSON": b"{",
        "deep": b"[" * 100_000,
        "binary": b"\xff",
        "a list": b"[]",
    }.items():
        yield ask(name, replaced("tokenizer.json", content))
    yield ask("a pipe", piped("tokenizer.json"))
    yield ask("a folder", of_folder("tokenizer.json"))
    yield ask("a link elsewhere", moved_out("tokenizer.json"))
    yield ask("a link to /dev/zero", linked("tokenizer.json", "/dev/zero"))

    def folder_link(folder: Path) -> None:
        found = run_of(folder)
        found.rename(folder / "elsewhere")
        found.symlink_to(folder / "elsewhere")

    yield resumed("the run folder is a link", folder_link)
    yield predicted("the run folder is a link", folder_link, "runs/")

    def trap(name: str) -> Prepare:
        """What the run is about to write is a link to somebody's file."""

        def prepare(folder: Path) -> None:
            path = run_of(folder) / name.format(pid=os.getpid())
            path.unlink(missing_ok=True)
            path.symlink_to("../../../beside/victim.txt")

        return prepare

    for name in (
        "config.json",
        "data.json",
        "config.json.{pid}.tmp",
        "checkpoint.safetensors.{pid}.tmp",
        "expert_graph.png",
        "routing.csv",
    ):
        yield resumed(f"{name} is a link to somebody's file", trap(name), "link", (0, 1, 2))
    yield resumed(".lock is a link to somebody's file", trap(".lock"), "lock|link", (1, 2))


# ------------------------------------------------------------------------------------------ database


def sql(*statements: str | tuple[str, tuple[Any, ...]]) -> Prepare:
    def prepare(folder: Path) -> None:
        with contextlib.closing(sqlite3.connect(folder / "experiment_results.db")) as connection, connection:
            connection.execute("PRAGMA foreign_keys=OFF")
            for statement in statements:
                connection.execute(*((statement,) if isinstance(statement, str) else statement))

    return prepare


def foreign(*statements: str, name: str = "experiment_results.db") -> Prepare:
    def prepare(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(folder / name)) as connection, connection:
            for statement in statements:
                connection.execute(statement)

    return prepare


def bytes_at(position: int, content: bytes, keep: int | None = None) -> Prepare:
    """The database with other bytes at a place, or only its first `keep` bytes."""

    def prepare(folder: Path) -> None:
        path = folder / "experiment_results.db"
        for suffix in ("-wal", "-shm"):
            (folder / f"experiment_results.db{suffix}").unlink(missing_ok=True)
        held = path.read_bytes()[:keep]
        path.write_bytes(held[:position] + content + held[position + len(content) :])

    return prepare


def database_cases() -> Iterator[Case]:
    uses = {
        "init_db": ("init_db",),
        "runs": ("goe", "runs"),
        "show": ("goe", "runs", "show", "latest"),
        "run": ("main", "--json_config_path", "config.json", "--quiet"),
        "resume": ("main", "--json_config_path", "config.json", "--resume", "--quiet"),
        "analyze": ("analyze", "--dataset_name", "parity", "--run_report"),
        "suggest": ("suggest", "--dataset_name", "parity", "--model_type", "dense"),
        "predict": ("goe", "predict", "--run", "2", "--text", "1 2"),
        "replay": ("goe", "replay", "latest", "--quiet"),
        "export": ("goe", "export", "out.parquet"),
        "merge": ("goe", "merge", "experiment_results.db", "--db", "out.db"),
        "study": (
            "main",
            "--dataset_name=parity",
            "--model_types=dense",
            "--n_trials=1",
            "--epochs=1",
            "--storage",
            "experiment_results.db",
            "--db",
            "experiment_results.db",
        ),
    }
    database = ("experiment_results.db",)

    def case(
        name: str, use: str, prepare: Prepare, codes: tuple[int, ...] = (2,), kept: tuple[str, ...] = database
    ) -> Case:
        return Case(
            "database",
            f"{use}: {name}",
            uses[use],
            r"database|experiment_results\.db|storage|run |config|no results|merge|experiment id|column",
            prepare,
            codes,
            kept,
            "synthetic",
        )

    contents = {
        "text": b"this is a text file\n" * 100,
        "a config": json.dumps(base_settings("synthetic")).encode(),
        "a picture": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        "one byte": b"S",
        "the magic alone": b"SQLite format 3\0",
        "magic and zeros": b"SQLite format 3\0" + b"\0" * 4000,
        "magic and ones": b"SQLite format 3\0" + b"\xff" * 4000,
    }

    def whole(content: bytes) -> Prepare:
        def prepare(folder: Path) -> None:
            for suffix in ("", "-wal", "-shm"):
                (folder / f"experiment_results.db{suffix}").unlink(missing_ok=True)
            (folder / "experiment_results.db").write_bytes(content)

        return prepare

    for name, content in contents.items():
        for use in ("init_db", "runs", "run", "merge", "study"):
            yield case(name, use, whole(content))
    foreigners: dict[str, Prepare] = {
        "a browser's": foreign(
            "CREATE TABLE moz_places (id INTEGER PRIMARY KEY, url TEXT)", "INSERT INTO moz_places VALUES (1, 'x')"
        ),
        "an experiments table of another kind": foreign("CREATE TABLE experiments (a, b)", "CREATE TABLE metrics (c)"),
        "a view": foreign("CREATE TABLE t (a)", "CREATE VIEW experiments AS SELECT a AS experiment_id FROM t"),
        "our version without our tables": foreign(
            "CREATE TABLE goe_schema_version (version_num TEXT)", "INSERT INTO goe_schema_version VALUES ('0002')"
        ),
        "a version from the future": foreign(
            "CREATE TABLE goe_schema_version (version_num TEXT)", "INSERT INTO goe_schema_version VALUES ('9999')"
        ),
        "a version that is none": foreign(
            "CREATE TABLE goe_schema_version (version_num TEXT)", "INSERT INTO goe_schema_version VALUES ('0001; x')"
        ),
        "a version that is a number": foreign(
            "CREATE TABLE goe_schema_version (version_num)", "INSERT INTO goe_schema_version VALUES (7)"
        ),
        "a version table with other columns": foreign("CREATE TABLE goe_schema_version (x)"),
        "a version that is bytes": foreign(
            "CREATE TABLE goe_schema_version (version_num)", "INSERT INTO goe_schema_version VALUES (x'ff00')"
        ),
    }
    for name, prepare in foreigners.items():
        for use in ("init_db", "runs", "run", "merge"):
            yield case(name, use, prepare)
    for name in ("a browser's",):
        yield case(name, "study", foreigners[name])
    for name, prepare in {
        "half of it": bytes_at(0, b"", 6000),
        "its first page": bytes_at(0, b"", 4096),
        "pages of zeros": bytes_at(4096, b"\0" * 40_000),
        "pages of ones": bytes_at(4096, b"\xff" * 40_000),
        "a damaged list of tables": bytes_at(200, b"\xff" * 3000),
    }.items():
        for use in ("init_db", "runs", "run", "show", "analyze", "export"):
            yield case(name, use, prepare, (2,), database if use != "run" else ())

    def link(target: str) -> Prepare:
        def prepare(folder: Path) -> None:
            path = folder / "experiment_results.db"
            path.unlink()
            path.symlink_to(target)

        return prepare

    def pipe(folder: Path) -> None:
        (folder / "experiment_results.db").unlink()
        os.mkfifo(folder / "experiment_results.db")

    for use in ("init_db", "runs", "run", "study"):
        yield case("a pipe", use, pipe)
        yield case("a link to /dev/zero", use, link("/dev/zero"))
        yield case("a link to somebody's text", use, link("../beside/victim.txt"))
        yield case("a link to itself", use, link("experiment_results.db"))
    # Rows that another program wrote.
    values: dict[str, list[Any]] = {
        "experiment_id": [
            "../../beside/x",
            "/etc/passwd",
            "a\0b",
            "",
            "\x1b[2J",
            "x" * 100_000,
            b"\xff\xfe",
            "<script>",
            "latest",
        ],
        "timestamp": ["not a time", "9999999999999", "", 5, b"\xff", "0000-00-00 00:00:00"],
        "heartbeat": ["not a time", "", 7],
        "status": [None, "", "\x1b[2J", 5, b"\xff", "<b>"],
        "seed": ["x", 2**62, 1.5, b"\xff", -1],
        "epochs": ["x", 2**62, b"\xff"],
        "experiment_name": [
            None,
            "\x1b[2J",
            "=cmd()",
            "<script>alert(1)</script>",
            "\\input{/etc/passwd}",
            7,
            b"\xff",
            "x" * 100_000,
            "../../x",
            "a\nb|c",
        ],
        "model_type": [None, "\x1b[2J", 7, b"\xff", "<script>", "../x", "x" * 10_000],
        "dataset_type": [None, 7, b"\xff", "\x1b["],
        "full_config_json": [
            None,
            "",
            "{",
            "[" * 100_000,
            "[]",
            "7",
            '{"model_type": "os.system"}',
            b"\xff",
            '{"a": NaN}',
            "x" * 10_000,
            '{"model_params": "x"}',
            '{"dataset_params": 5, "seed": {}}',
        ],
        "env_details_json": [None, "{", "[" * 100_000, b"\xff", "[]", '{"study": 5}', '{"data": "x"}'],
        "parent_id": ["x", 7, b"\xff"],
        "error": ["\x1b[2J", b"\xff", "x" * 100_000],
    }
    for (column, tried), use in itertools.product(
        values.items(), ("runs", "show", "analyze", "suggest", "predict", "resume", "export", "replay")
    ):
        if use == "replay" and column not in ("full_config_json", "experiment_id", "env_details_json", "status"):
            continue
        for number, value in enumerate(tried):
            if use in ("resume", "suggest") and number % 2:
                continue
            tables = ("experiments", *(("metrics",) if column == "experiment_id" else ()))
            prepare = sql(*((f"UPDATE {table} SET {column} = ?", (value,)) for table in tables))
            shown = value if isinstance(value, str) else repr(value)
            yield case(f"{column} = {shown[:24]!r}", use, prepare, (0, 2), ())
    for value in ["x", "[" * 100_000, "\x1b[2J", b"\xff", 9e999, "[1, 2", '{"a": 1}', "x" * 100_000]:
        for use in ("runs", "show", "analyze", "suggest", "export"):
            shown = value if isinstance(value, str) else repr(value)
            yield case(
                f"metric = {shown[:12]!r}", use, sql(("UPDATE metrics SET metric_value = ?", (value,))), (0, 2), ()
            )
    for value in ["\x1b[2J", "=1+1", "<script>", "a\nb", "x" * 10_000, "' OR 1=1", "../x", b"\xff", ""]:
        for use in ("runs", "show", "analyze", "export"):
            shown = value if isinstance(value, str) else repr(value)
            yield case(
                f"metric_name = {shown[:12]!r}",
                use,
                sql(("UPDATE metrics SET metric_name = ? || metric_id", (value,))),
                (0, 2),
                (),
            )
    trigger = "CREATE TRIGGER t AFTER INSERT ON experiments BEGIN DELETE FROM metrics; END"
    yield case("a trigger", "run", sql(trigger), (0, 2), ())
    yield case(
        "a trigger that fails",
        "run",
        sql("CREATE TRIGGER t BEFORE INSERT ON experiments BEGIN SELECT RAISE(ABORT, 'no'); END"),
        (1, 2),
        (),
    )
    yield case("a missing column", "runs", sql("ALTER TABLE experiments DROP COLUMN heartbeat"), (2,), ())
    yield case("a missing column", "run", sql("ALTER TABLE experiments DROP COLUMN heartbeat"), (2,), ())
    yield case("a missing table", "show", sql("DROP TABLE metrics"), (0, 2), ())
    yield case("a missing table", "run", sql("DROP TABLE metrics"), (1, 2), ())


# ------------------------------------------------------------------------------------------ names

NAMES = [
    "../../beside/evil",
    "..",
    ".",
    "/tmp/evil",
    "~/evil",
    "C:\\evil",
    "a/b",
    "con",
    "a\0b",
    "a\nb",
    "a\rb",
    "a\tb",
    "\x1b]0;evil\x07",
    "\x9b2J",
    "\u202eevil",
    "\ud800",
    "\u2028",
    " ",
    "",
    "-rf",
    "--help",
    "=cmd|' /C calc'!A0",
    "+1",
    "@SUM(1)",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}",
    "{% import os %}",
    "${HOME}",
    "$(id)",
    "%s%s%n",
    "{0.__class__}",
    "\\input{/etc/passwd}",
    "a & b $x$ #1 _y_ ^z",
    "[link](javascript:alert(1))",
    "'; DROP TABLE experiments; --",
    "x" * 300,
    "x" * 100_000,
    "\U0001f600" * 50,
    "[red]bold[/red]",
    "a" + "\u0301" * 500,
    ".hidden",
    "CON.json",
    "*",
    "name.json",
]


def name_cases() -> Iterator[Case]:
    for number, name in enumerate(NAMES):
        shown = ascii(name[:30])
        settings = base_settings("synthetic", experiment_name=name)
        run = ("main", "--json_config_path", "config.json")
        yield Case("names", f"experiment_name {shown}", run, r"experiment_name|config\.json", written(settings), (0, 2))
        if "\0" in name:
            continue
        text = base_settings("text", dataset_name=name)
        prepare = _with_data(text, text_rows())
        yield Case("names", f"dataset_name {shown}", (*run, "--dry_run"), r"dataset_name|config\.json", prepare, (0, 2))
        if number % 2 == 0 and name.isprintable():
            labels = [(content, name if label == "good" else label) for content, label in text_rows()]
            prepare = _with_data(base_settings("text"), labels)
            yield Case("names", f"label {shown}", (*run, "--quiet"), r"label|train|config", prepare, (0, 2))
        study = (
            "main",
            "--dataset_name=parity",
            "--model_types=dense",
            "--n_trials=1",
            "--epochs=1",
            "--syn_num_samples=40",
            "--syn_seq_len=4",
            "--quiet",
            "--device=cpu",
        )
        quick = number % 4 == 0
        arguments = (*study, f"--study_name={name}", *(() if quick else ("--dry_run",)))
        yield Case("names", f"study_name {shown}", arguments, r"study_name|storage", nothing, (0, 2))
        renamed = sql(
            ("UPDATE experiments SET dataset_name = ?, experiment_name = ?, model_type = ?", (_plain(name),) * 3)
        )
        analyze = ("analyze", f"--dataset_name={_plain(name)}", "--run_summary_table", "--run_comparison")
        yield Case(
            "names", f"analyze {shown}", analyze, r"dataset_name|config|No|no ", renamed, (0, 2), base="synthetic"
        )
        suggest = ("suggest", f"--dataset_name={_plain(name)}", "--model_type=dense")
        renamed = sql(("UPDATE experiments SET dataset_name = ?, experiment_name = ?", (_plain(name),) * 2))
        yield Case(
            "names",
            f"suggest {shown}",
            suggest,
            r"dataset_name|config|no |run|Nothing|dataset",
            renamed,
            (0, 2),
            base="synthetic",
        )


def _plain(name: str) -> str:
    return name.encode(errors="replace").decode()


def _with_data(settings: dict[str, Any], rows: Sequence[tuple[str, str]]) -> Prepare:
    def prepare(folder: Path) -> None:
        written(settings)(folder)
        (folder / "data").mkdir()
        (folder / "data" / "train.csv").write_bytes(csv_bytes(rows))

    return prepare


def cases() -> list[Case]:
    """All of them; their names differ."""
    made = [config_cases, command_cases, data_cases, checkpoint_cases, database_cases, name_cases]
    found = {str(case): case for make in made for case in make()}
    return list(found.values())


def in_a_process(*arguments: str, folder: Path, **variables: str) -> Ended:
    """`support.python` with a time limit; arguments that no process can get are shortened before the NUL."""
    import subprocess

    words = [os.fsencode(word.split("\0")[0]) for word in arguments]
    try:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=4 * SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Ended(124, "", f"Traceback (most recent call last)\nlonger than {4 * SECONDS} s")
    return Ended(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))
