"""What a command shows before its first result: one line for each phase that takes long, and nothing of the others."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from support import command, small_settings, write_config

from research_eval.datasets.providers import load_splits
from research_eval.errors import ConfigError
from research_eval.main import cli
from research_eval.studies.workers import quiet_runs
from research_eval.system import phases
from research_eval.system.phases import ERASE_LINE, phase, phases_to, report
from research_eval.system.progress import PooledProgress, Progress


class Timer:
    """Every phase has lasted long enough as soon as it begins."""

    def __init__(self, seconds: float, function: Callable[..., None], arguments: list[Any]) -> None:
        assert seconds == phases.SECONDS_BEFORE_SHOWN
        self.start = lambda: function(*arguments)

    def cancel(self) -> None:
        pass


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """A machine on which everything takes long."""
    monkeypatch.setattr(phases, "threading", SimpleNamespace(Timer=Timer))
    caplog.set_level(logging.INFO, "research_eval")
    return caplog


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    screen = Screen()
    monkeypatch.setattr(phases, "error_stream", lambda: screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    return screen


def seen(screen: Screen) -> list[str]:
    """What a line has shown, one after the other; "" when it was erased."""
    return [part.removesuffix("\n") for part in screen.getvalue().split(ERASE_LINE)[1:]]


def write_text_set(folder: Path) -> None:
    folder.mkdir()
    rows = [f"{word} film {number},{label}" for number in range(20) for word, label in (("good", 1), ("bad", 0))]
    (folder / "train.csv").write_text("\n".join(["text,label", *rows]))


# -------------------------------------------------------------------------------------------------- without a terminal


def test_what_is_quick_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "research_eval")
    with phase("working"):
        report("half")
    assert caplog.messages == []


def test_a_long_phase_is_one_line(slow: pytest.LogCaptureFixture) -> None:
    with phase("working"):
        for number in range(100):
            report(f"{number} %")
    report("nobody works")
    assert slow.messages == ["working ..."]


def test_a_very_long_phase_is_a_line_every_few_seconds(
    slow: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    with phase("working"):
        for number in range(26):
            clock[0] += 1.0
            report(f"{number} of 26")
    assert slow.messages == ["working ...", "working: 9 of 26 ...", "working: 19 of 26 ..."]


def test_the_innermost_phase_is_the_one_that_is_shown(slow: pytest.LogCaptureFixture) -> None:
    with phase("outer"):
        with phase("inner"):
            report("1")
        report("2")
    assert slow.messages == ["outer ...", "inner ..."]


def test_a_quiet_command_and_a_run_of_a_study_show_no_phase(slow: pytest.LogCaptureFixture, terminal: Screen) -> None:
    with quiet_runs(), phase("working"):
        report("half")
    logging.getLogger("research_eval").setLevel(logging.WARNING)
    with phase("working"):
        report("half")
    assert (slow.messages, terminal.getvalue()) == ([], "")


def test_a_run_on_text_says_what_it_does_before_its_first_step(slow: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """The second time, tokenizer and tokens come from the cache."""
    write_text_set(tmp_path / "data")
    params = {"data_dir": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), "min_frequency": 1}
    config = write_config(tmp_path, dataset_type="real_world", dataset_name="mine", dataset_params=params)
    first = [
        "importing torch ...",
        "checking the config ...",
        "preparing the data ...",
        "reading the data ...",
        "training the tokenizer on 36 texts ...",
        "tokenising 36 texts ...",
        "tokenising 4 texts ...",
        "building the model ...",
    ]
    for expected in (first, [line for line in first if "token" not in line]):
        ended = command(cli, "run", "--dry_run", "--json_config_path", config)
        assert ended.code == 0
        assert [line for line in ended.err.splitlines() if line.endswith(" ...")] == expected
    ended = command(cli, "run", "--dry_run", "--quiet", "--json_config_path", config)
    assert (ended.code, " ...\n" in ended.err) == (0, False)


def test_a_missing_column_of_the_last_file_is_reported_before_the_tokenizer(
    slow: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    write_text_set(tmp_path / "data")
    (tmp_path / "data" / "test.csv").write_text("words,label\na,1\n")
    with pytest.raises(ConfigError, match=r"test\.csv: no column 'text'"):
        load_splits("real_world", "mine", {"data_dir": str(tmp_path / "data"), "cache_dir": str(tmp_path)}, 0)
    assert slow.messages == ["preparing the data ...", "reading the data ..."]


def test_the_rows_of_a_file_are_counted_while_it_is_read(
    slow: pytest.LogCaptureFixture, terminal: Screen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(phases, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    write_text_set(tmp_path / "data")
    load_splits("real_world", "mine", {"data_dir": str(tmp_path / "data"), "cache_dir": str(tmp_path)}, 0)
    assert "reading the data: train.csv, line 40 ..." in seen(terminal)
    assert "tokenising 36 texts: 0% ..." in seen(terminal)


# ------------------------------------------------------------------------------------------------------- on a terminal


def test_on_a_terminal_one_line_is_drawn_again_and_erased(
    slow: pytest.LogCaptureFixture, terminal: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    with phase("outer"), phase("inner"):
        report("50%")
        report("\x1b[31m" + "x" * 100)
    assert slow.messages == [] and "\n" not in terminal.getvalue()
    shown = seen(terminal)
    assert shown[:3] == ["outer ...", "inner ...", "inner: 50% ..."]
    assert shown[3].startswith("inner: \\x1b[31mxxx") and len(shown[3]) == 59  # one column stays free: no second line
    assert shown[4:] == ["", "outer ...", ""]


def test_a_log_line_takes_the_place_of_the_phase_on_a_terminal(
    slow: pytest.LogCaptureFixture, terminal: Screen
) -> None:
    handler = logging.StreamHandler(terminal)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with phase("working"):
            logging.getLogger("research_eval").warning("a warning")
        logging.getLogger("research_eval").warning("another one")
    finally:
        root.removeHandler(handler)
    assert seen(terminal) == ["working ...", "a warning", "another one"]
    assert handler.filters == []


def test_an_interruption_leaves_a_clean_terminal(slow: pytest.LogCaptureFixture, terminal: Screen) -> None:
    with pytest.raises(KeyboardInterrupt), phase("working"):
        raise KeyboardInterrupt
    assert seen(terminal) == ["working ...", ""]


def test_a_phase_of_a_training_stands_above_its_bar(
    slow: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr("research_eval.system.progress.Console", lambda **_: console)
    with Progress(1), phase("compiling kernels"):
        pass
    assert "compiling kernels ...\n" in screen.getvalue() and slow.messages == []
    with phase("afterwards"):
        pass
    assert slow.messages == ["afterwards ..."]


# ---------------------------------------------------------------------------------------------------- several processes


def test_a_run_of_a_pool_shows_its_phases_beside_its_name(
    slow: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    with phases_to(sent.append), phase("reading the data"):
        report("half")
    assert sent == ["reading the data", ""]
    with PooledProgress(["seed 3"], epochs=1) as progress:
        for text in sent:
            progress.show(0, "phase", (text,))
        progress.show(0, "start", (0, 9, 1))
    assert slow.messages == ["seed 3: reading the data ..."]
    screen = io.StringIO()
    monkeypatch.setattr(
        "research_eval.system.progress.Console", lambda **_: Console(file=screen, force_terminal=True, width=80)
    )
    with PooledProgress(["seed 3"], epochs=1) as progress:
        progress.show(0, "phase", (sent[0],))
        assert progress._bar is not None
        progress._bar.refresh()
        progress.show(0, "start", (2, 9, 1))
    assert "reading the data" in screen.getvalue() and "None" not in screen.getvalue()
    last = screen.getvalue().rpartition("seed 3")[2]
    assert "2/9" in last and "reading" not in last


def test_a_compiled_model_says_that_it_is_compiled(
    slow: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("research_eval.runs.prepare.compile_blocks", lambda model: None)  # which takes a minute
    options = small_settings()["training_params"] | {"compile": True}
    ended = command(cli, "run", "--json_config_path", write_config(tmp_path, epochs=1, training_params=options))
    assert ended.code == 0 and ended.err.count("compiling kernels ...\n") == 1
