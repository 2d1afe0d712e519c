"""After the result is stored, nothing costs the user anything: not pictures, not printing, not the CSV file."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Ended, command, environment, python, results, run_in, small_config, write_config
from test_crash_safety import in_child
from test_db_utils import db  # noqa: F401 - a fixture

from research_eval import experiment
from research_eval.analysis import study_plots
from research_eval.analysis.study_plots import draw_study
from research_eval.db_utils import DB_FILE, Store, append_csv
from research_eval.main import cli, main
from research_eval.routing.automaton import Automaton, WalkerAutomaton, certification_metrics
from research_eval.runs import journal
from research_eval.store import csv_file
from research_eval.store.csv_file import CSV_FILE
from research_eval.store.pending import PENDING_FOLDER
from research_eval.studies import seeds, trials, tune
from research_eval.system.best_effort import BestEffortStream, best_effort_output
from research_eval.system.progress import Progress

GOE = "import sys; from research_eval.main import cli; sys.exit(cli())"
SMALL: dict[str, Any] = {"model_type": "moe", "epochs": 1, "dataset_params": {"num_samples": 40, "seq_len": 4}}
STUDY = ("--dataset_name", "parity", "--model_types", "moe", "--epochs", "1", "--syn_num_samples", "40", "--study_name")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)


def shell(line: str, folder: Path, **variables: str) -> Ended:
    """A line of a shell, in which $GOE is the command. The exit code is that of the first part of a pipe."""
    done = subprocess.run(
        ["bash", "-c", f'{line}; exit "${{PIPESTATUS[0]}}"'],
        cwd=folder,
        env=environment(PYTHON=sys.executable, CODE=GOE, PYTHONUNBUFFERED="", **variables),
        capture_output=True,
        check=False,
    )
    return Ended(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def goe(arguments: str) -> str:
    return f'"$PYTHON" -c "$CODE" {arguments}'


def statuses(folder: Path) -> list[str]:
    with results(folder) as store:
        return [row["status"] for row in store.experiments()]


def warnings_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if "CSV" in line or CSV_FILE in line]


def csv_table(path: Path, delimiter: str) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file, delimiter=delimiter))


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


# ------------------------------------------------------------------------------------------------------- printing


def redirect(number: int, where: str) -> None:
    """Let a standard stream of this process lead to a pipe without a reader, to a full disk, to a file or nowhere."""
    if where == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)
    elif where == "closed":
        os.close(number)
        setattr(sys, {1: "stdout", 2: "stderr"}[number], None)  # as Python does at its start
    else:
        os.dup2(os.open("/dev/full" if where == "full" else where, os.O_WRONLY | os.O_CREAT), number)
    if where != "closed" and number == 1:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - with a buffer, whatever this process was told


def run_commands(folder: Path, out: str, err: str, commands: list[list[str]], variables: dict[str, str]) -> None:
    """In a child: commands one after the other, up to the first that fails. Seeds are trained in this process."""
    os.chdir(folder)
    os.environ.update(variables)
    redirect(1, out)
    redirect(2, err)
    seeds.pool_size = lambda *_: 1
    for arguments in commands:
        if code := cli(arguments):
            raise SystemExit(code)


def commands_in_child(folder: Path, out: str, err: str, *commands: list[str], **variables: str) -> tuple[int, str]:
    """The exit code, and what is in the file `err`."""
    code = in_child(run_commands, folder, out, err, list(commands), variables)
    return code, (folder / err).read_text() if (folder / err).is_file() else ""


@pytest.mark.parametrize(
    ("out", "err", "said"),
    [("gone", "err", 0), ("gone", "gone", 0), ("full", "err", 1), ("full", "full", 0), ("closed", "closed", 0)],
)
def test_seeds_are_trained_whoever_reads(out: str, err: str, said: int, tmp_path: Path) -> None:
    write_config(tmp_path, **SMALL)
    code, text = commands_in_child(tmp_path, out, err, ["run", "--json_config_path", "config.json", "--seeds", "0-1"])
    assert (code, text.count("No space left on device")) == (0, said), text
    assert "Traceback" not in text
    assert statuses(tmp_path) == ["finished"] * 2


def test_seeds_in_a_pool_are_trained_though_nobody_reads(tmp_path: Path) -> None:
    write_config(tmp_path, **SMALL)
    ended = shell(goe("run --json_config_path config.json --seeds 0-1 2>&1 | true"), tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert statuses(tmp_path) == ["finished"] * 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_the_terminal_cannot_show_is_escaped(encoding: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, **SMALL, experiment_name="实验")
    content = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(content, encoding=encoding)) as out:
        for arguments in (["run", "--json_config_path", str(config), "--quiet"], ["runs"]):
            assert cli(arguments) == 0
        out.flush()
        assert content.getvalue().count(rb"\u5b9e\u9a8c") == 2


def test_where_standard_output_is_the_product_it_has_to_arrive(tmp_path: Path) -> None:
    write_config(tmp_path, **SMALL)
    assert command(cli, "run", "--json_config_path", "config.json", "--quiet").code == 0
    for ending, code, said in ((">/dev/full", 1, 1), ("| true", 0, 0)):
        ended = shell(goe(f"runs {ending}"), tmp_path)
        assert (ended.code, len(ended.err.splitlines())) == (code, said), ended.err
    assert commands_in_child(tmp_path, "full", "err", ["export", "runs.csv"])[0] == 0
    assert len(csv_table(tmp_path / "runs.csv", ",")) == 2


class Gone(io.StringIO):
    """A stream whose reader is gone, or whose disk is full."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.attempts = number, 0

    def write(self, text: str) -> int:
        self.attempts += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_a_stream_that_fails_is_silent_from_then_on(number: int) -> None:
    out, err = Gone(number), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with best_effort_output():
            print("one")
            print("two")
        assert sys.stdout is out
    assert out.attempts == 1
    assert err.getvalue().count("standard output") == (number != errno.EPIPE)


def test_a_closed_stream_and_foreign_letters_raise_nothing() -> None:
    closed = io.StringIO()
    closed.close()
    BestEffortStream(closed).write("a")
    content = io.BytesIO()
    stream = BestEffortStream(io.TextIOWrapper(content, encoding="cp1252"))
    stream.write("é ≥ \udcff")
    stream.flush()
    assert content.getvalue() == rb"\xe9 \u2265 \udcff".replace(rb"\xe9", b"\xe9")


def test_a_terminal_that_is_gone_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a command around it, and with the bars that a terminal gets."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", Gone(errno.EIO))
    with Progress(epochs=1) as progress:
        result = experiment.run(small_config(**SMALL), db=DB_FILE, progress=progress)
    assert result.status == "finished"
    assert sys.stderr.attempts >= 1  # type: ignore[attr-defined]


@pytest.mark.usefixtures("one_process")
def test_a_summary_that_cannot_be_made_is_only_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("research_eval.cli.run.SHOWN_METRICS", {"param_count": "{:nonsense}"})
    ended = command(main, "--json_config_path", write_config(tmp_path, **SMALL), "--seeds", "0-1", "--quiet")
    assert ended.code == 0
    assert ended.err.count("its summary is not printed") == 2
    assert statuses(tmp_path) == ["finished"] * 2


# ------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.usefixtures("real_pictures")
def test_the_plotting_backend_of_a_notebook_does_not_matter(tmp_path: Path) -> None:
    """The process imports matplotlib for the first picture of the run."""
    write_config(tmp_path, **SMALL)
    study = ["tune", "--n_trials", "2", *STUDY, "s"]
    analysis = ["analyze", "--dataset_name", "parity", "--run_f1_vs_params_plot", "--run_learning_curves"]
    run = ["run", "--json_config_path", "config.json"]
    code, text = commands_in_child(tmp_path, "out", "err", run, study, analysis, MPLBACKEND="nonsense")
    assert code == 0 and "Traceback" not in text, text
    assert "not drawn" not in text and "no expert_graph" not in text
    drawn = {path.name for path in tmp_path.rglob("*.png")}
    assert {"history.png", "parity_f1_vs_params.png", "parity_learning_curves.png"} <= drawn
    assert set(statuses(tmp_path)) == {"finished"}


@pytest.mark.parametrize("backend", ["nonsense", "module://no_such_module.backend_inline"])
def test_a_backend_that_is_not_there_is_not_asked_for(backend: str, tmp_path: Path) -> None:
    program = """
import os
from pathlib import Path
import numpy as np
from research_eval.analysis.expert_graph import draw_expert_graph
from research_eval.analysis.study_axes import round_numbers
from research_eval.routing.automaton import Automaton, draw_automaton
before = os.environ["MPLBACKEND"]
round_numbers(0.0, 1.0, log=False)
draw_automaton(Automaton(0, np.array([[1, 0], [0, 1]]), np.array([0, 1])), Path("a.png"), "")
draw_expert_graph({"step_transitions": np.arange(16).reshape(1, 4, 4).tolist()}, Path("b.png"), "")
assert os.environ["MPLBACKEND"] == before
"""
    ended = python("-c", program, folder=tmp_path, fresh=True, MPLBACKEND=backend)
    assert ended.code == 0, ended.err
    assert (tmp_path / "a.png").is_file() and (tmp_path / "b.png").is_file()


def test_drawing_leaves_the_backend_of_the_user_alone(tmp_path: Path) -> None:
    program = """
import research_eval.system.drawing
import matplotlib.pyplot as plt
print(plt.get_backend(), end="")
"""
    assert python("-c", program, folder=tmp_path, fresh=True, MPLBACKEND="svg").out == "svg"


def test_matplotlib_is_imported_in_one_place() -> None:
    """There it is imported without the backend that the environment names."""
    found = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "research_eval").rglob("*.py"))
        if re.search(r"^\s*(import|from) matplotlib", path.read_text(), re.MULTILINE)
    ]
    assert found == ["research_eval/system/drawing.py"]


@pytest.mark.parametrize("what", ["a disk", "a bug", "the whole step"])
def test_a_run_without_its_picture_is_finished(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    failing = full if what == "a disk" else bug
    monkeypatch.setattr("research_eval.analysis.expert_graph.draw_expert_graph", failing)
    if what == "the whole step":
        monkeypatch.setattr("research_eval.runs.pictures._draw", bug)
        monkeypatch.setattr(journal, "drop_previous", full)
    settings = SMALL | {"model_type": "goe_original", "training_params": {"trace_routing": True}, "epochs": 2}
    result = run_in(tmp_path, small_config(**settings))
    assert (result.status, statuses(tmp_path)) == ("finished", ["finished"])
    assert (tmp_path / result.folder / "expert_load.png").is_file() == (what != "the whole step"), "another picture"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in warnings if "no " in text]) == 1
    assert len(warnings) == (2 if what == "the whole step" else 1)


def test_the_numbers_of_an_automaton_do_not_depend_on_its_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """This picture is drawn before the result is stored."""
    import numpy as np

    parity = Automaton(0, np.array([[1, 0], [0, 1]]), np.array([0, 1]))
    blocked = tmp_path / "automaton.png"
    blocked.mkdir()
    with_picture = certification_metrics(WalkerAutomaton.single(parity), parity, blocked)
    assert with_picture == certification_metrics(WalkerAutomaton.single(parity), parity)
    assert caplog.text.count("not drawn") == 1


# -------------------------------------------------------------------------------------------------------- CSV file

ROW = {"experiment_id": "b", "note": "x;y, z", "f1": 0.5}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("row", [ROW, ROW | {"new;column": 1}], ids=["same columns", "a new column"])
def test_a_file_that_a_spreadsheet_saved_stays_one_table(
    delimiter: str, mark: bytes, row: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(mark + f"experiment_id{delimiter}note{delimiter}f1\r\na{delimiter}é{delimiter}0.25\r\n".encode())
    append_csv(path, row)
    append_csv(path, row, unless_known=("experiment_id", "f1"))
    append_csv(path, row | {"experiment_id": "c"})
    lines = csv_table(path, delimiter)
    assert lines[0] == list(row) and [line[:3] for line in lines[1:]] == [
        ["a", "é", "0.25"],
        ["b", "x;y, z", "0.5"],
        ["c", "x;y, z", "0.5"],
    ]
    assert {len(line) for line in lines} == {len(row)}
    assert path.read_bytes().startswith(mark or b"exp" if len(row) == 3 else mark)


def test_a_name_with_a_semicolon_does_not_change_the_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    for row in ({"a;b": 1}, {"c\td": 2}):
        append_csv(path, row)
    assert csv_table(path, ",") == [["a;b", "c\td"], ["1", ""], ["", "2"]]


def test_a_row_that_was_cut_off_swallows_no_other(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    append_csv(path, ROW)
    content = path.read_bytes()
    for cut in range(content.index(b"b,") + 1, len(content) - 1):
        path.write_bytes(content[:cut])
        append_csv(path, ROW | {"experiment_id": "c"})
        assert csv_table(path, ",")[-1] == ["c", "x;y, z", "0.5"], content[:cut]


UNUSABLE = {
    "a mark of Excel in the first line": b"sep=;\r\nexperiment_id;note\r\n1;a\r\n",
    "something else": b"hello world\n",
    "another table": b"note;mine\r\n1;2\r\n",
    "cp1252": b"experiment_id,note\r\n1,caf\xe9\r\n",
    "cp1252, far below": b"experiment_id,note\r\n" + b"1,cafe\r\n" * 20_000 + b"1,caf\xe9\r\n",
    "UTF-16": "experiment_id,note\r\n1,a\r\n".encode("utf-16"),
    "UTF-16 without its mark": "experiment_id,note\r\n1,a\r\n".encode("utf-16-le"),
    "zero bytes": b"experiment_id,note\r\n1,a\0\r\n",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_of_another_kind_is_left_alone_and_this_is_said_before_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(CSV_FILE).write_bytes(UNUSABLE[name])
    seen: list[str] = []
    monkeypatch.setattr(experiment, "fit", lambda *_: seen.append("training") or full())
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: seen.append(record.getMessage()))
    logging.getLogger("research_eval.store.csv_file").addHandler(handler)
    try:
        with pytest.raises(OSError, match="No space"):
            run_in(tmp_path, small_config(**SMALL))
    finally:
        logging.getLogger("research_eval.store.csv_file").removeHandler(handler)
    (warning, training) = seen
    assert training == "training" and "cannot be appended" in warning and "left alone" in warning
    assert Path(CSV_FILE).read_bytes() == UNUSABLE[name]


def block(what: str) -> None:
    """Make the results CSV one that takes no rows."""
    path = Path(CSV_FILE)
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "link to itself":
        path.symlink_to(path)
    elif what == "another encoding":
        path.write_bytes(UNUSABLE["cp1252"])
    else:
        raise ValueError(what)


@pytest.mark.parametrize("what", ["folder", "pipe", "link to itself", "another encoding"])
def test_a_run_with_an_unusable_csv_is_finished_with_one_warning(what: str, tmp_path: Path) -> None:
    block(what)
    config = write_config(tmp_path, **SMALL)
    ended = command(main, "--json_config_path", config, "--quiet")
    assert (ended.code, len(warnings_in(ended.err))) == (0, 1), ended.err
    again = command(main, "--json_config_path", config, "--quiet", "--resume")
    assert (again.code, len(warnings_in(again.err))) == (0, 1), again.err
    assert "final_val_f1" in ended.out and again.out == ended.out
    assert statuses(tmp_path) == ["finished"] and not PENDING_FOLDER.exists()


def test_a_row_that_was_missed_comes_with_resume(tmp_path: Path) -> None:
    block("folder")
    config = write_config(tmp_path, **SMALL)
    assert command(main, "--json_config_path", config, "--quiet").code == 0
    Path(CSV_FILE).rmdir()
    ended = command(main, "--json_config_path", config, "--quiet", "--resume")
    assert ended.code == 0 and ended.err == ""
    assert len(csv_table(Path(CSV_FILE), ",")) == 2


def test_seeds_with_an_unusable_csv_are_all_trained_with_one_warning(tmp_path: Path) -> None:
    block("another encoding")
    ended = command(main, "--json_config_path", write_config(tmp_path, **SMALL), "--seeds", "0-2")
    assert (ended.code, len(warnings_in(ended.err))) == (0, 1), ended.err
    assert ended.out.count("final_val_f1") == 3
    assert ended.err.index("cannot be appended") < ended.err.index("epoch 1/1")
    assert statuses(tmp_path) == ["finished"] * 3


def test_a_csv_that_fails_at_the_end_costs_nothing_in_either_store(
    db: str,  # noqa: F811 - the fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The disk becomes full during the training; the end of the run does not wait for the CSV file."""
    monkeypatch.setattr(csv_file, "_replace_csv", full)
    result = experiment.run(small_config(**SMALL), db=db, quiet=True)
    assert result.status == "finished" and not PENDING_FOLDER.exists()
    with Store(db, read_only=True) as store:
        (row,) = store.experiments()
        assert row["status"] == "finished"
        assert store.metrics(result.experiment_id)["final_val_f1"] == result.metrics["final_val_f1"]
    assert caplog.text.count("no row for run") == 1


# --------------------------------------------------------------------------------------------------------- studies


def test_what_a_study_cannot_write_costs_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "delete_checkpoint", full)
    monkeypatch.setattr(tune, "CSV_SECONDS", 0.0)
    monkeypatch.setattr("research_eval.runs.pictures._draw", full)
    stem = "optuna_study_s_synthetic_parity"
    Path(f"{stem}_full_results.csv").mkdir()
    Path(f"{stem}_best_config.json").mkdir()
    Path(f"{stem}_plots").touch()
    ended = command(cli, "tune", *STUDY, "s", "--n_trials", "2")
    assert ended.code == 0, ended.err
    assert "2 of 2 trials (2 finished)" in ended.out and "best final_val_f1" in ended.out
    assert statuses(tmp_path) == ["finished"] * 2
    for words in (
        "kept up to date",
        "CSV file of the study is not written",
        "config of trial",
        "pictures of the study",
    ):
        assert ended.err.count(words) == 1, words


def test_a_study_prints_to_a_full_disk_and_is_finished(tmp_path: Path) -> None:
    assert commands_in_child(tmp_path, "full", "full", ["tune", *STUDY, "s", "--n_trials", "2"])[0] == 0
    assert statuses(tmp_path) == ["finished"] * 2
    assert len(csv_table(tmp_path / "optuna_study_s_synthetic_parity_full_results.csv", ",")) == 3


def test_one_picture_of_a_study_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def draw(_: Any, path: Path) -> None:
        path.touch()

    class Charts:
        objectives = ("final_val_f1",)

    monkeypatch.setattr(study_plots, "draw_history", full)
    monkeypatch.setattr(study_plots, "draw_importance", draw)
    monkeypatch.setattr(study_plots, "draw_parallel_coordinates", draw)
    monkeypatch.setattr(study_plots, "write_pages", lambda *_: [tmp_path / "a.html"])
    written = draw_study(Charts(), tmp_path)  # type: ignore[arg-type]
    assert [path.name for path in written] == ["importance.png", "parallel_coordinates.png", "a.html"]
    assert caplog.text.count("not drawn: history.png") == 1
