"""Hostile inputs get an error, not control: a part of `hostile.cases`, and fuzzing of configs and data files.

`benchmarks/hostile.py` runs all cases; `make fuzz` fuzzes for minutes (GOE_FUZZ_SECONDS).
"""

from __future__ import annotations

import ast
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
from hostile import (
    CATEGORIES,
    Case,
    Sandbox,
    Verdict,
    base_settings,
    bomb_table,
    cases,
    config_text,
    csv_bytes,
    places,
    text_rows,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT, Ended

from research_eval.datasets.text import TextDataset
from research_eval.errors import ConfigError
from research_eval.files import write_atomically
from research_eval.schema import parse_config
from research_eval.system.untrusted import MAX_LINE, in_folder, message, parse_json, printable, read_limited

SLICE = {"config": 90, "command line": 14, "data": 6, "checkpoint": 7, "database": 24, "names": 12}  # every nth case
ALWAYS = re.compile(
    r"a bomb|JSONL, deep$|: a browser's|behind the vocabulary|experiment_name: |embed_dim = 1e\+09$|somebody's"
    r"|: a pipe$|without our tables|a further entry|~nobody|resume: a link to checkpoint"
)
FUZZ_SECONDS = float(os.environ.get("GOE_FUZZ_SECONDS", "0"))
FUZZ = settings(
    max_examples=300 if FUZZ_SECONDS else 60,
    deadline=None,
    database=None,
    derandomize=not FUZZ_SECONDS,
    suppress_health_check=list(HealthCheck),
)
UNSAFE = r"pickle|joblib|marshal|shelve|dill|yaml|eval|exec|compile|load_dataset_builder"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("hostile") / "sandbox")


ALL = cases()
BY_CATEGORY = {category: [case for case in ALL if case.category == category] for category in CATEGORIES}
CHOSEN = [
    case
    for category, found in BY_CATEGORY.items()
    for number, case in enumerate(found)
    if number % SLICE[category] == 0 or ALWAYS.search(str(case))
]


def test_there_are_enough_cases_of_every_kind() -> None:
    counts = {category: sum(case.category == category for case in ALL) for category in CATEGORIES}
    assert min(counts.values()) >= 100 and sum(counts.values()) >= 500, counts


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_a_hostile_input_gets_a_message(case: Case, sandbox: Sandbox) -> None:
    verdict = sandbox.run(case)
    assert verdict.problems == [], verdict.ended.err


def test_the_judge_notices_what_it_is_there_for(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(write: str, err: str, code: int, **changes: Any) -> Verdict:
        def answer(_arguments: object) -> Ended:
            if write:
                Path(write).write_text("x")
            return Ended(code, "", err)

        monkeypatch.setattr(hostile, "_called", answer)
        prepared = hostile.written("{}", "kept")
        return sandbox.run(Case("data", "x", ("main",), "field", prepared, **changes))

    assert verdict("", "field", 2).problems == []
    assert "traceback" in verdict("", "Traceback (most recent call last):\nX: field", 1).problems[0]
    assert "exit code" in verdict("", "field", 1).problems[0]
    assert "does not name" in verdict("", "something", 2).problems[0]
    assert "control character" in verdict("", "field \x1b[2J", 2).problems[0]
    assert verdict("../beside/new", "field", 2).problems == ["changed outside: beside/new"]
    assert verdict("evil", "field", 2).problems == ["made 'evil'"]
    assert "changed one" in verdict("kept", "field", 2, kept=("kept",)).problems[0]


def test_a_process_answers_as_the_function_does(sandbox: Sandbox) -> None:
    chosen = {"config: NUL bytes"}
    found = [case for case in ALL if str(case) in chosen]
    assert len(found) == len(chosen)
    for case in found:
        assert sandbox.run(case, hostile.in_a_process).problems == []


# ------------------------------------------------------------------------------------------ nothing runs code


def calls_in(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text())
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_is_unpickled_and_no_text_is_run() -> None:
    """numpy may not unpickle, torch reads no files of its own, and no name of a module that runs what it reads."""
    for path in sorted((ROOT / "research_eval").rglob("*.py")):
        for name, call in calls_in(path):
            words = name.split(".")
            where = f"{path}:{call.lineno}: {name}"
            assert not re.fullmatch(UNSAFE, words[0]), where
            assert name not in ("torch.load", "np.load", "numpy.load", "os.system", "os.popen"), where
            options = {option.arg: option.value for option in call.keywords}
            for option in ("allow_pickle", "trust_remote_code", "shell"):
                value = options.get(option)
                assert value is None or (isinstance(value, ast.Constant) and value.value is False), where
        imported = re.findall(r"^\s*(?:import|from) ([\w.]+)", path.read_text(), re.MULTILINE)
        assert not [name for name in imported if re.fullmatch(UNSAFE, name.split(".")[0])], path


# -------------------------------------------------------------------------------------------------- the small functions


def test_a_limited_read_takes_regular_files_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_limited(path, 5, "x") == b"12345"
    with pytest.raises(ConfigError, match="larger than"):
        read_limited(path, 4, "x")
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path, tmp_path / "pipe", "/dev/zero", tmp_path / "no", "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_limited(special, 5, "x")


def test_a_link_is_not_followed_out_of_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "good").touch()
    assert in_folder(tmp_path / "run", "good").is_file() and not in_folder(tmp_path / "run", "no").exists()
    (tmp_path / "run" / "bad").symlink_to("good")
    (tmp_path / "other").symlink_to("run")
    for folder, name in (("run", "bad"), ("other", "good")):
        with pytest.raises(ConfigError, match="symbolic link"):
            in_folder(tmp_path / folder, name)


def test_nothing_is_written_through_a_planted_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"old")
    for name in ("file", f"file.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to("victim")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "victim").read_bytes() == b"old"
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize(
    "text",
    ["{", "NaN", "[Infinity]", "1e999", '{"a": 1, "a": 2}', "[" * 101 + "]" * 101, "[" * 10**6, b"\xff", "9" * 5000],
)
def test_json_that_is_not_strict_is_refused(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"^here: "):
        parse_json(text, "here")


@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), st.lists))
def test_plain_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps(value), "here") == value


@given(st.text())
def test_a_message_cannot_steer_a_terminal(text: str) -> None:
    assert printable(text).isprintable()
    assert all(line.isprintable() and len(line) <= MAX_LINE + 3 for line in message(text * 3).split("\n"))


def test_a_text_that_a_small_file_names_often_is_not_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.parquet").write_bytes(bomb_table(rows=100))  # 100 MB, of which the file holds 1
    monkeypatch.setattr("research_eval.datasets.text.opening.MAX_SPLIT_BYTES", 10_000_000)
    dataset = TextDataset(dataset_name="bomb", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="holds more than"):
        dataset.splits()


# ------------------------------------------------------------------------------------------ fuzzing


def fuzz(check: Callable[[], None]) -> None:
    """Call a property at least once; where seconds are given, with new examples until its part of them is over."""
    end = time.monotonic() + FUZZ_SECONDS / 3
    check()
    while time.monotonic() < end:
        check()


SIGNS = st.sampled_from('{}[]",:/*\\eE-.0')
PLACES = [(config, path) for config, path, _ in places()]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from([10**9, 2**31, -1, 0, 1e308, "\ud800", "../..", "a\0", "=1+1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def test_a_config_with_any_value_anywhere_is_accepted_or_refused() -> None:
    """What is accepted is written and read as the same config."""

    @FUZZ
    @given(st.data())
    def check(data: st.DataObject) -> None:
        config, path = data.draw(st.sampled_from(PLACES))
        try:
            found = parse_config(config_text(config, path, data.draw(VALUES)), "fuzz.json")
        except ConfigError as error:
            assert str(error).startswith("fuzz.json:") and len(str(error)) < 20_000  # noqa: PT017
        else:
            assert parse_config(json.dumps(found.to_dict()), "again.json") == found

    fuzz(check)


def test_a_config_of_any_text_is_accepted_or_refused() -> None:
    @FUZZ
    @given(st.data())
    def check(data: st.DataObject) -> None:
        text = list(json.dumps(base_settings("synthetic")))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(text)))
            text[at : at + data.draw(st.integers(0, 5))] = data.draw(st.text(max_size=5) | SIGNS)
        try:
            parse_config("".join(text), "fuzz.json")
        except ConfigError as error:
            assert str(error).startswith("fuzz.json")  # noqa: PT017

    fuzz(check)


def data_files() -> dict[str, bytes]:
    rows = [json.dumps({"text": text, "label": label}) for text, label in text_rows()]
    return {
        "train.csv": csv_bytes(text_rows()),
        "train.jsonl": "\n".join(rows).encode(),
        "train.parquet": hostile.parquet_bytes(hostile.text_table()),
    }


def test_a_data_file_of_any_bytes_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    @FUZZ
    @given(st.data())
    def check(data: st.DataObject) -> None:
        folder = tmp_path_factory.mktemp("data")
        name, content = data.draw(st.sampled_from(sorted(data_files().items())))
        changed = bytearray(content)
        for _ in range(data.draw(st.integers(1, 6))):
            at = data.draw(st.integers(0, len(changed)))
            changed[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
        (folder / name).write_bytes(bytes(changed))
        dataset = TextDataset(
            dataset_name="fuzz", data_dir=str(folder), max_length=16, min_frequency=1, cache_dir=str(folder / "cache")
        )
        try:
            splits = dataset.splits()
        except ConfigError as error:
            assert len(str(error)) < 20_000  # noqa: PT017
        else:
            assert len(splits.train) > 0 and splits.num_classes >= 2

    fuzz(check)


# ------------------------------------------------------------------------------------------ the catalogue


def test_every_message_of_the_catalogue_is_one_of_the_program() -> None:
    """The words of each message, without what varies, stand in the source."""
    source = "".join(path.read_text() for path in sorted((ROOT / "research_eval").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a text that goes on in the next line
    messages = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(messages) >= 30
    for text in messages:
        for words in text.split("…"):
            assert words.strip(" :.,(") in source, f"{text}: nothing says {words!r}"
