"""Several seeds of one config: each is what it is alone, however the others and the command end."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import multiprocessing
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support import (
    ROOT,
    Ended,
    command,
    environment,
    history,
    python,
    repeatable,
    results,
    run_in,
    small_config,
    write_config,
)

from research_eval import db_utils
from research_eval.db_utils import DB_FILE, Store
from research_eval.experiment import Result
from research_eval.main import main
from research_eval.models.dense import DenseTransformerClassifier
from research_eval.registry import MODELS_MAP
from research_eval.schema import ExperimentConfig
from research_eval.studies import seeds
from research_eval.studies.seeds import pool_size, run_all
from research_eval.system.progress import PooledProgress
from research_eval.training.checkpoint import load_tensors
from research_eval.training.checkpointer import CHECKPOINT_FILE, MODEL_FILE

SCRIPT = ROOT / "research_eval" / "main.py"
SEEDS = [3, 0, 5]
SECONDS = 200  # a busy machine may need long to start processes; nothing here measures time
needs_two_cores = pytest.mark.skipif("len(os.sched_getaffinity(0)) < 2", reason="a pool needs two cores")

ACTOR = '''
"""A model that acts in its seventh step as the variable ACT says, a mapping from seeds."""
import json, logging, os, signal, time
from pathlib import Path
import torch
from research_eval.errors import ConfigError
from research_eval.models.dense import DenseTransformerClassifier
from research_eval.registry import MODELS_MAP
from research_eval.seeding import derive_seed

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__("odd")

ERRORS = {
    "config": ConfigError("data: mend it"),
    "disk": OSError(28, "no space left", "a file"),
    "text": OSError("only a text"),
    "memory": MemoryError("all is full"),
    "bug": RuntimeError("broken"),
    "odd": Odd(1, 2),
}

def act():
    """The seed of this run, and what it does."""
    seed = next(seed for seed in range(9) if derive_seed(seed, "training") == torch.initial_seed())
    return seed, json.loads(os.environ.get("ACT", "{}")).get(str(seed))

def wait(seed):
    """Until a signal or the file `go`; the process must not outlive the test."""
    arrived = []
    def noting(handler):
        return lambda number, frame: (arrived.append(number), handler(number, frame))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, noting(signal.getsignal(number)))
    Path(f"waits-{seed}").write_text(str(os.getpid()))
    for _ in range(4000):
        if arrived or Path("go").exists():
            return
        time.sleep(0.05)
    raise AssertionError("no signal")

@MODELS_MAP.register("actor")
class Actor(DenseTransformerClassifier):
    model_type = "actor"
    steps = 0

    def after_step(self, progress):
        self.steps += 1
        seed, does = act()
        if self.steps != 7:
            return
        if does == "wait":
            wait(seed)
        elif does == "go":
            Path("go").touch()
        elif does == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif does == "log":
            logging.getLogger("research_eval.actor").warning("two\\nlines \\x1b[31m")
        elif does in ERRORS:
            raise ERRORS[does]

    def get_parameter_count(self):  # while the run is scored
        if act()[1] == "end":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().get_parameter_count()
'''


@pytest.fixture(scope="module", name="extensions")
def _extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extensions")
    (folder / "actor.py").write_text(ACTOR)
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extensions: Path) -> Iterator[None]:
    """A folder of its own, the actor, and a pool of two also on a machine with one core."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOE_EXTENSIONS", str(extensions))
    monkeypatch.delenv("GOE_DB", raising=False)
    monkeypatch.setattr(seeds, "pool_size", lambda configs, _: min(2, len(configs)))
    yield
    assert multiprocessing.active_children() == []


def act(**seeds: Sequence[int]) -> str:
    """What the actors of some seeds do."""
    return json.dumps({seed: does for does, given in seeds.items() for seed in given})


def actor(**changes: Any) -> dict[str, Any]:
    """Settings of ten steps, with dropout, so that every step draws."""
    return {"model_type": "actor", "model_params": {"embed_dim": 8, "num_heads": 2, "dropout": 0.2}, **changes}


def configs_of(*seeds: int, **changes: Any) -> list[ExperimentConfig]:
    return [small_config(seed=seed, **changes) for seed in seeds]


def pooled(configs: Sequence[ExperimentConfig], resume: bool = False, db: str | None = DB_FILE) -> list[Result]:
    """The results of the pool in the working directory, which come with their configs, in order."""
    pairs = list(run_all(configs, db=db, quiet=True, resume=resume))
    assert [config for config, _ in pairs] == list(configs)
    with Store(db, read_only=True) as store:
        assert [store.experiment(result.experiment_id)["seed"] for _, result in pairs] == [c.seed for c in configs]
    return [result for _, result in pairs]


def check_as_alone(configs: Sequence[ExperimentConfig], pool: Sequence[Result]) -> None:
    """Metrics, time series, weights, moments and the states of generators, to the bit."""
    here, alone = Path.cwd(), Path.cwd() / "alone"
    alone.mkdir()
    for config, together in zip(configs, pool, strict=True):
        single = run_in(alone, config)
        assert together.status == single.status == "finished"
        assert repeatable(together.metrics) == repeatable(single.metrics)
        assert history(here, together.experiment_id) == history(alone, single.experiment_id)
        for name in (MODEL_FILE, CHECKPOINT_FILE):
            tensors, values = load_tensors(here / together.folder / name)
            others, other_values = load_tensors(alone / single.folder / name)
            assert tensors.keys() == others.keys()
            assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []
            assert values.get("generators") == other_values.get("generators")
        assert files_of(here / together.folder) == files_of(alone / single.folder)


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def statuses(folder: Path | None = None) -> dict[int, str]:
    with results(folder or Path.cwd()) as store:
        return {row["seed"]: row["status"] for row in store.experiments()}


def run_seeds(*flags: str, **changes: Any) -> Ended:
    return command(main, "--json_config_path", write_config(Path.cwd(), **changes), "--db", DB_FILE, *flags)


def until(happens: Callable[[], bool]) -> None:
    """Wait for something that comes sooner or later."""
    for _ in range(SECONDS * 20):
        if happens():
            return
        time.sleep(0.05)
    pytest.fail("it never happened")


def have_begun(*seeds: int) -> Callable[[], bool]:
    """Whether these seeds train, and wait."""
    return lambda: all(Path(f"waits-{seed}").exists() and Path(f"waits-{seed}").read_text() for seed in seeds)


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


# ----------------------------------------------------------------------------------------------- the same as alone


@pytest.mark.parametrize(
    "changes",
    [
        {
            "epochs": 3,
            "batch_size": 8,
            "model_params": {"dropout": 0.2, "token_dropout": 0.1},
            "scheduler_params": {"name": "cosine_warmup"},
            "training_params": {
                "ema_decay": 0.9,
                "gradient_accumulation_steps": 3,
                "checkpoint_every": 3,
                "test": True,
            },
        },
        {"model_type": "moe", "epochs": 1},
        {"model_type": "goe_original", "model_params": {"router_mode": "st"}, "epochs": 1},
        {"epochs": 9, "training_params": {"early_stopping_patience": 1}},
        {"dataset_name": "addition", "dataset_params": {"num_samples": 60, "seq_len": 8}, "epochs": 1},
    ],
    ids=["dense", "moe", "goe_original", "early stopping", "padding"],
)
def test_each_seed_is_what_it_is_alone(changes: dict[str, Any]) -> None:
    configs = configs_of(*SEEDS, **changes)
    check_as_alone(configs, pooled(configs))


def test_results_come_in_order_though_the_first_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", act(wait=[3], go=[5]))
    assert [result.status for result in pooled(configs_of(3, 0, 5, **actor()))] == ["finished"] * 3


def test_a_finished_seed_is_reported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a store that only this process knows."""
    monkeypatch.setattr(db_utils, "DB_FILE", "mine.db")
    configs = configs_of(0, 1, epochs=1)
    first = pooled(configs, db=None)
    assert pooled(configs, resume=True, db=None) == first
    assert Path("mine.db").exists() and not Path(DB_FILE).exists()
    assert len(list(Path("runs").iterdir())) == 2


def test_seeds_on_a_server(server_url: str) -> None:
    pooled(configs_of(0, 1, epochs=1), db=server_url)
    assert not Path(DB_FILE).exists()


# ------------------------------------------------------------------------------------------------ seeds that fail


@pytest.mark.parametrize(
    ("does", "code", "text"),
    [
        ("config", 2, "data: mend it"),
        ("disk", 1, "a file: no space left"),
        ("text", 1, "the operating system: only a text"),
        ("memory", 1, "not enough memory: all is full. Make model, batch_size or data smaller."),
    ],
)
def test_an_error_of_one_seed_is_reported_when_the_others_have_finished(
    does: str, code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACT", act(**{does: [1]}))
    ended = run_seeds("--seeds", "0-2", "--quiet", **actor())
    assert ended.code == code
    early, last = ended.err.splitlines()
    assert early.startswith("seed 1: ") and last == text
    assert re.findall(r"seed (\d)\): (\w+)", ended.out) == [("0", "finished"), ("2", "finished")]
    assert statuses() == {0: "finished", 1: "failed", 2: "finished"}


@pytest.mark.parametrize(("does", "message"), [("bug", "(?m)^broken$"), ("odd", "Odd: odd")])
def test_a_bug_in_one_seed_is_raised_when_the_others_have_finished(
    does: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the place where it happened; an exception that cannot leave its process is its text."""
    monkeypatch.setenv("ACT", act(**{does: [1]}))
    with pytest.raises(RuntimeError, match=message) as caught:
        run_seeds("--seeds", "0-2", "--quiet", **actor())
    if does == "bug":
        assert re.search(r"In the process of seed 1:[\s\S]*actor.py", "".join(caught.value.__notes__))
    assert statuses() == {0: "finished", 1: "failed", 2: "finished"}


def test_one_after_the_other_they_fail_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "pool_size", lambda *_: 1)
    monkeypatch.setenv("ACT", act(config=[0]))
    ended = run_seeds("--seeds", "0-1", "--quiet", **actor())
    assert (ended.code, ended.err) == (2, "seed 0: ConfigError: data: mend it\ndata: mend it\n")
    assert statuses() == {0: "failed", 1: "finished"}


def test_a_killed_process_is_one_message_and_its_run_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", act(die=[1]))
    ended = run_seeds("--seeds", "0-2", "--quiet", **actor())
    assert ended.code == 1
    assert ended.err.splitlines()[-1] == (
        "seed 1: its process ended by SIGKILL, perhaps because the memory was full. The same command with --resume "
        "continues the run."
    )
    assert statuses() == {0: "finished", 1: "interrupted", 2: "finished"}
    monkeypatch.delenv("ACT")
    configs = configs_of(0, 1, 2, **actor())
    check_as_alone(configs, pooled(configs, resume=True))
    assert len(list(Path("runs").iterdir())) == 3


def test_a_store_that_cannot_be_opened_is_one_message() -> None:
    Path(DB_FILE).write_bytes(b"SQLite format 3\0 and then something else" * 50)
    ended = run_seeds("--seeds", "0-3")
    assert ended.code == 2 and len(ended.err.splitlines()) == 1
    assert not Path("runs").exists()


def test_closing_the_iterator_stops_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", act(wait=[1, 2]))
    with contextlib.closing(run_all(configs_of(0, 1, 2, **actor()), db=DB_FILE, quiet=True)) as pairs:
        assert next(pairs)[1].status == "finished"
        until(have_begun(1))
    assert all(is_gone(int(path.read_text())) for path in Path.cwd().glob("waits-*"))
    assert set(statuses().values()) == {"finished", "interrupted"}


# --------------------------------------------------------------------------------------------- what the screen shows


def test_lines_begin_with_the_seed() -> None:
    ended = run_seeds("--seeds", "0-1", model_type="moe")
    for seed in "01":
        for text in ("epoch 1/2  val_loss ", "epoch 2/2  val_loss "):
            assert f"seed {seed}: {text}" in ended.err
    assert re.search("^seed 0: data: parity\nseed 0: +train +validation +test\n", ended.err, re.MULTILINE)
    assert ended.err.count("data: parity") == 1  # the other seeds have the same task
    assert set(re.findall("^(.*?): ", ended.err, re.MULTILINE)) == {"seed 0", "seed 1"}


def test_quiet_leaves_warnings_and_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", act(log=[1]))
    ended = run_seeds("--seeds", "0-1", "--quiet", **actor())
    assert set(ended.err.splitlines()) == {"seed 1: two", r"lines \x1b[31m"}
    assert re.findall(r"seed (\d)\): (\w+)", ended.out) == [("0", "finished"), ("1", "finished")]
    assert "val_loss" not in ended.err


def test_nothing_in_a_line_steers_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    monkeypatch.setattr("research_eval.system.progress.Console", lambda **_: console)
    with PooledProgress(["seed 8"], epochs=1) as progress:
        progress.show(0, "start", (0, 9, 1))
        progress.show(0, "log", (logging.WARNING, "a \x1b[31m\n[red]b[/red] :smile:"))
    assert "seed 8: a \\x1b[31m\n" in screen.getvalue() and "[red]b[/red] :smile:\n" in screen.getvalue()


def test_alarms_are_shown_though_it_is_quiet() -> None:
    ended = run_seeds("--seeds", "0-1", "--quiet", model_type="moe", epochs=4)
    assert re.findall(r"^seed (\d): \w+ in epoch \d .*", ended.err, re.MULTILINE)


# ------------------------------------------------------------------------- whole commands, signals, and killed parents


def start(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_two_cores
def test_a_signal_to_the_command_ends_all_runs_with_checkpoints() -> None:
    settings = actor(epochs=3, training_params={"log_every": 1})  # a stop is a step that is logged
    config = write_config(Path.cwd(), **settings)
    flags = ("--json_config_path", config, "--seeds", "0-3")
    program = start("-m", "research_eval.main", *flags, ACT=act(wait=[0, 1, 2, 3]))
    until(have_begun(0, 1))
    program.send_signal(signal.SIGTERM)
    out, err = program.communicate(timeout=SECONDS)
    assert program.returncode == 143, err
    assert re.findall(r"seed (\d)\): (\w+)\n  signal 15 after step 7$", out, re.MULTILINE) == [
        ("0", "interrupted"),
        ("1", "interrupted"),
    ]
    assert "Traceback" not in err and "seed 1: epoch 1/3  val_loss" in err
    assert statuses() == {0: "interrupted", 1: "interrupted"}
    assert len(list(Path("runs").glob(f"*/{CHECKPOINT_FILE}"))) == 2
    configs = configs_of(0, 1, **settings)
    check_as_alone(configs, pooled(configs, resume=True))
    assert len(list(Path("runs").iterdir())) == 2


def test_a_signal_while_a_run_is_scored_interrupts_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", act(end=[1]))
    ended = run_seeds("--seeds", "0-1", "--quiet", **actor())
    assert (ended.code, statuses()) == (143, {0: "finished", 1: "interrupted"})
    assert "seed 1): interrupted\n  signal 15\n" in ended.out
    monkeypatch.delenv("ACT")
    configs = configs_of(0, 1, **actor())
    check_as_alone(configs, pooled(configs, resume=True))


@pytest.mark.parametrize("early", [True, False])
def test_a_signal_before_any_training(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the processes begin, or while they begin."""
    begin = seeds._Pool._start_waiting

    def interrupted(pool: seeds._Pool) -> None:
        if not early:
            begin(pool)
        monkeypatch.setattr(seeds._Pool, "_start_waiting", begin)
        signal.raise_signal(signal.SIGTERM)
        begin(pool)

    monkeypatch.setattr(seeds._Pool, "_start_waiting", interrupted)
    ended = run_seeds("--seeds", "0-2", "--quiet")
    assert ended.code == 143
    if early:
        assert (ended.out, ended.err) == ("", "interrupted\n")
        assert not Path("runs").exists()


class Terminal:
    """A command on a terminal of its own, with what it shows."""

    def __init__(self, *arguments: str | Path, **variables: str) -> None:
        variables |= {"TERM": "xterm", "COLUMNS": "120"}
        self.pid, self._screen = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, *map(str, arguments)], environment(**variables))
        self.shown = ""

    def shows(self, *texts: str) -> bool:
        """Whether it has shown all texts by now."""
        while select.select([self._screen], [], [], 0)[0]:
            try:
                part = os.read(self._screen, 65536)
            except OSError as problem:  # Linux says so at the end
                if problem.errno != errno.EIO:
                    raise
                break
            if not part:
                break
            self.shown += part.decode(errors="replace")
        return all(text in self.shown for text in texts)

    def press(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def code(self) -> int:
        ended: list[int] = []

        def has_ended() -> bool:
            self.shows()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            ended.append(os.waitstatus_to_exitcode(status) if pid else 0)
            return bool(pid)

        until(has_ended)
        self.shows()
        os.close(self._screen)
        return ended[-1]


@needs_two_cores
def test_a_terminal_has_a_bar_per_seed_and_ctrl_c_asks_every_run_once(tmp_path: Path) -> None:
    """`goe run`, as the console script starts it. A second signal would not have waited for the step."""
    script = tmp_path / "goe"
    script.write_text(
        "import sys\nfrom research_eval.main import cli\nif __name__ == '__main__':\n    sys.exit(cli())\n"
    )
    config = write_config(tmp_path, **actor(epochs=3))
    terminal = Terminal(script, "run", "--json_config_path", config, "--seeds", "4,6", ACT=act(wait=[4, 6]))
    until(lambda: have_begun(4, 6)() and terminal.shows("seed 4: epoch 1/3", "seed 6: epoch 1/3"))
    terminal.press("\x03")
    assert terminal.code() == 130, terminal.shown
    for seed in "46":
        assert re.search(rf"seed {seed} [^\n:]*━[^\n]*\d+/15 loss", terminal.shown)
        assert re.search(rf"seed {seed}\): interrupted\r\n  signal 2 after step 7", terminal.shown)
    assert terminal.shown.count("\x1b[?25l") == 1, "one display alone hides the cursor"
    assert statuses() == {4: "interrupted", 6: "interrupted"}


@needs_two_cores
def test_nothing_trains_on_when_the_command_is_killed(tmp_path: Path) -> None:
    """The script, from another folder; its runs go on with --resume."""
    config = write_config(tmp_path, **actor(epochs=3))
    program = start(
        SCRIPT, "--json_config_path", config, "--seeds", "0-1", "--quiet", ACT=act(wait=[0, 1]), PYTHONPATH=""
    )
    until(have_begun(0, 1))
    program.kill()
    program.communicate(timeout=SECONDS)
    workers = [int(Path(f"waits-{seed}").read_text()) for seed in (0, 1)]
    until(lambda: all(map(is_gone, workers)))
    with results(tmp_path) as store:
        assert {row["error"] for row in store.experiments()} <= {
            f"signal 15 after step {step}" for step in range(7, 99)
        }
    assert statuses() == {0: "interrupted", 1: "interrupted"}
    configs = configs_of(0, 1, **actor(epochs=3))
    assert [result.status for result in pooled(configs, resume=True)] == ["finished"] * 2
    assert len(list(Path("runs").iterdir())) == 2


OWN = """
from research_eval.main import MODELS_MAP, main
from research_eval.models.dense import DenseTransformerClassifier

class Mine(DenseTransformerClassifier):
    model_type = "mine"

MODELS_MAP["mine"] = Mine
main()
"""


@needs_two_cores
def test_a_model_of_a_users_script_is_known_in_every_process(tmp_path: Path) -> None:
    """Even of one that calls `main()` wherever it is imported."""
    (tmp_path / "own.py").write_text(OWN)
    config = write_config(tmp_path, model_type="mine", model_params={"embed_dim": 8, "num_heads": 2}, epochs=1)
    ended = python("own.py", "--json_config_path", config, "--seeds", "0-1", "--quiet", folder=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert re.findall(r"seed (\d)\): (\w+)", ended.out) == [("0", "finished"), ("1", "finished")]


# ----------------------------------------------------------------------------------------------- how many at a time


class Importable(DenseTransformerClassifier):
    """Another process can import it."""


def test_a_model_that_the_caller_has_entered_is_sent_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS_MAP, "importable", Importable)
    configs = configs_of(0, 1, model_type="importable", epochs=1)
    assert [result.status for result in pooled(configs)] == ["finished"] * 2


@pytest.mark.parametrize(
    ("cores", "seeds", "threads", "size"), [(4, 8, 1, 4), (4, 2, None, 2), (8, 8, 3, 2), (1, 3, 1, 1), (2, 3, 4, 1)]
)
def test_as_many_runs_as_cores(
    cores: int, seeds: int, threads: int | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert pool_size(configs_of(*range(seeds), training_params={"num_threads": threads})) == size


def test_what_only_this_process_has_is_trained_here(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(DenseTransformerClassifier):
        pass

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for model, size in ((Local, 1), (Importable, 2)):
        monkeypatch.setitem(MODELS_MAP, "given", model)
        assert pool_size(configs_of(0, 1, model_type="given")) == size
    monkeypatch.setattr(seeds, "choose_device", lambda _: torch.device("cuda"))
    assert pool_size(configs_of(0, 1)) == 1
