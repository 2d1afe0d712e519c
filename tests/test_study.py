"""Studies: budgets, workers that die, pruning, continuation, and the flags of the command."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState
from support import ROOT, Ended, command, environment, repeatable

from research_eval import experiment
from research_eval.cli.tune import add_study_arguments, study_options
from research_eval.db_utils import DB_FILE, RunFilter, Store
from research_eval.errors import ConfigError
from research_eval.experiment import Journal, run
from research_eval.main import cli, main, objective
from research_eval.registry import MODELS_MAP
from research_eval.schema import config_from_dict
from research_eval.studies import pruning, storage, workers
from research_eval.studies.adapter import StoredTrial, given_values, trial_records
from research_eval.studies.distributions import grid_values
from research_eval.studies.initial_trials import add_trials, enqueue_grid
from research_eval.studies.options import StudyOptions
from research_eval.studies.pruning import PruningCallback, dominated, make_pruner, standing
from research_eval.studies.queue import TrialQueue
from research_eval.studies.trials import Outcome
from research_eval.training.state import Diverged

TINY = {"model_params": {"embed_dim": [8, 16]}, "training_params": {"num_threads": 1}}
FLAGS = ("--dataset_type", "synthetic", "--dataset_name", "parity", "--syn_num_samples", "80", "--syn_seq_len", "5")
FILES = "optuna_study_s_synthetic_parity"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)
    Path("space.json").write_text(json.dumps(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "POLL_SECONDS", 0.05)
        yield


def arguments(*more: str, n_trials: int = 4, epochs: int = 2, name: str = "s") -> list[str]:
    small = ("--study_name", name, "--storage", "sqlite:///s.db", "--n_trials", str(n_trials), "--epochs", str(epochs))
    return [*small, "--batch_size", "16", "--search_space", "space.json", *FLAGS, *more]


def study_of(*more: str, **keywords: Any) -> Ended:
    return command(main, *arguments(*more, **keywords))


def load(name: str = "s") -> optuna.Study:
    return optuna.load_study(study_name=name, storage="sqlite:///s.db")


def rows() -> list[dict[str, Any]]:
    with Store(DB_FILE, read_only=True) as store:
        return store.find_runs(with_json=True)


def csv_rows(stem: str = FILES) -> list[dict[str, str]]:
    with Path(f"{stem}_full_results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------- one study, whole


@pytest.mark.usefixtures("real_study_pictures")
def test_a_study_leaves_what_the_documentation_names_and_its_best_config_gives_the_same_score() -> None:
    ended = study_of("--model_types", "dense,moe,goe,goe_original", n_trials=5)
    assert ended.code == 0, ended.err
    assert "5 of 5 trials" in ended.out
    study = load()
    assert len(study.trials) == 5
    assert len(csv_rows()) == 5
    assert [row["run_type"] for row in rows()] == ["optuna_trial"] * 5
    assert {row["experiment_name"] for row in rows()} == {"s"}
    assert sorted(json.loads(row["env_details_json"])["study"]["trial"] for row in rows()) == [0, 1, 2, 3, 4]
    for picture in ("history", "importance", "parallel_coordinates"):
        assert Path(f"{FILES}_plots/{picture}.html").is_file()
        assert Path(f"{FILES}_plots/{picture}.png").is_file()
    ended = command(main, "--json_config_path", f"{FILES}_best_config.json", "--quiet")
    assert ended.code == 0, ended.err
    with Store(DB_FILE, read_only=True) as store:
        again = store.find_runs(RunFilter(run_type="json"))[0]["experiment_id"]
        assert store.metrics(again)["final_val_f1"] == study.best_value


def test_every_trial_runs_again_from_its_row_with_equal_metrics() -> None:
    study_of("--model_types", "goe_original", "moe", "--pruner", "none", n_trials=2)
    for row in rows():
        config = config_from_dict(json.loads(row["full_config_json"]))
        assert json.loads(row["full_config_json"]) == config.to_dict()
        with Store(DB_FILE, read_only=True) as store:
            first = store.metrics(row["experiment_id"])
        assert repeatable(run(config, db="again.db", quiet=True).metrics) == repeatable(first)


def test_the_same_study_chooses_the_same_trials() -> None:
    for name in ("one", "two"):
        study_of("--model_types", "lstm,dense", name=name, n_trials=12, epochs=1)
    one, two = load("one").trials, load("two").trials
    assert [trial.params for trial in one] == [trial.params for trial in two]
    assert [trial.values for trial in one] == [trial.values for trial in two]
    study_of("--model_types", "lstm,dense", "--seed", "1", name="three", n_trials=1, epochs=1)
    assert load("three").trials[0].params != one[0].params


def test_the_same_command_goes_on_and_then_has_nothing_to_do() -> None:
    small = ("--model_types", "lstm")
    study_of(*small, n_trials=2)
    first = [trial.params for trial in load().trials]
    study_of(*small, n_trials=3)
    assert len(load().trials) == 3
    ended = study_of(*small, n_trials=3)
    assert ended.code == 0
    assert len(load().trials) == 3
    assert [trial.params for trial in load().trials][:2] == first
    study_of(*small, n_trials=3, name="whole")
    assert [trial.params for trial in load("whole").trials] == [trial.params for trial in load().trials]


def test_other_settings_do_not_mix_into_a_study() -> None:
    study_of(n_trials=1)
    ended = study_of(n_trials=2, epochs=3)
    assert ended.code == 2
    assert "epochs: 2 -> 3" in ended.err
    ended = study_of("--objectives", "final_val_loss", n_trials=2)
    assert ended.code == 2
    assert "objectives" in ended.err
    optuna.create_study(study_name="foreign", storage="sqlite:///s.db").enqueue_trial({})
    assert "made by another program" in study_of(name="foreign").err
    assert len(load().trials) == 1


# ------------------------------------------------------------------------------------------------- samplers, pruners


@pytest.mark.parametrize("sampler", ["random", "gp", "nsga2", "cmaes", "grid"])
def test_every_sampler_finishes_a_study(sampler: str) -> None:
    ended = study_of("--sampler", sampler, "--model_types", "lstm,dense", n_trials=4, epochs=1)
    assert ended.code == 0, ended.err
    assert [trial.state for trial in load().trials] == [TrialState.COMPLETE] * 4


def test_a_grid_that_is_smaller_than_the_budget_is_tried_whole_and_once() -> None:
    fixed = {"optimizer_params": {"lr": [1e-3, 1e-2], "weight_decay": 0.0}, "scheduler_params": {"name": "none"}}
    fixed |= {"model_params": {"embed_dim": [8, 12], "num_layers": 1, "dropout": 0.0}}
    Path("space.json").write_text(json.dumps(fixed))
    ended = study_of("--sampler", "grid", "--model_types", "lstm", n_trials=9, epochs=1)
    assert ended.code == 0, ended.err
    tried = [(trial.params["lstm.embed_dim"], trial.params["optimizer_params.lr"]) for trial in load().trials]
    assert sorted(tried) == [(8, 1e-3), (8, 1e-2), (12, 1e-3), (12, 1e-2)]
    assert study_of("--sampler", "grid", "--model_types", "lstm", n_trials=9, epochs=1).code == 0
    assert len(load().trials) == 4


def test_the_pruner_gives_up_bad_trials_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "STARTUP_TRIALS", 1)
    scores = iter([0.9, 0.9, 0.9, 0.1])
    report = PruningCallback.epoch_end

    def worse(self: PruningCallback, epoch: int, values: dict[str, float]) -> None:
        report(self, epoch, {**values, "val_f1": next(scores)})

    monkeypatch.setattr(PruningCallback, "epoch_end", worse)
    study_of("--model_types", "lstm", n_trials=2, epochs=3)
    pruned = load().trials[1]
    assert pruned.state == TrialState.PRUNED
    assert pruned.user_attrs["reason"] == "median pruner after epoch 1: val_f1 0.1000"
    assert [row["status"] for row in rows()] == ["finished", "pruned"]
    assert "val_f1 0.1000" in rows()[1]["error"]
    assert csv_rows()[1]["status"] == "pruned"
    assert csv_rows()[1]["epochs"] == "1"


def test_without_a_pruner_every_epoch_is_trained() -> None:
    study_of("--pruner", "none", "--model_types", "lstm", n_trials=8)
    assert {row["epochs"] for row in csv_rows()} == {"2"}
    options = study_options_of("--pruner", "hyperband")
    assert isinstance(make_pruner(options), optuna.pruners.HyperbandPruner)


@pytest.mark.usefixtures("real_study_pictures")
def test_several_objectives_make_a_pareto_study() -> None:
    ended = study_of("--objectives", "final_val_f1,param_count", "--model_types", "lstm", n_trials=8)
    assert ended.code == 0, ended.err
    study = load()
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    front = {trial.number for trial in study.best_trials}
    assert {int(path.stem.rsplit("_", 1)[1]) for path in Path().glob(f"{FILES}_pareto_*.json")} == front
    assert Path(f"{FILES}_plots/pareto.png").is_file()
    with Store(DB_FILE, read_only=True) as store:
        for trial in study.trials:
            if trial.values:
                metrics = store.metrics(trial.user_attrs["experiment_ids"][0])
                assert trial.values == [metrics["final_val_f1"], metrics["param_count"]]


def test_a_trial_is_dominated_by_three_that_are_better_in_everything() -> None:
    names = ("final_val_f1", "final_val_loss", "param_count")

    def at(f1: float, size: float) -> dict[str, float]:
        return standing(
            names, {"final_val_f1": {"1": f1, "2": 0.0}, "final_val_loss": {"1": 1 - f1}}, {"param_count": size}, 2
        )

    own = at(0.5, 100)
    assert own == {"final_val_f1": 0.5, "final_val_loss": -0.5, "param_count": -100}
    assert dominated(own, [at(0.6, 100)] * 3)
    assert not dominated(own, [at(0.6, 100)] * 2)
    assert not dominated(own, [at(0.6, 101)] * 5)  # better, but larger
    assert not dominated(own, [at(0.5, 50)] * 5)  # smaller, but nothing says that training will not help
    assert not dominated(own, [at(0.6, 100)] * 2 + [at(0.4, 1)] * 5)


def test_several_objectives_are_pruned_by_domination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "STARTUP_TRIALS", 3)
    fixed = {"model_params": {"embed_dim": 8, "num_layers": 1}}
    Path("space.json").write_text(json.dumps(fixed))
    scores = iter([0.9] * 6 + [0.1])
    report = PruningCallback.epoch_end

    def worse(self: PruningCallback, epoch: int, values: dict[str, float]) -> None:
        report(self, epoch, {**values, "val_f1": next(scores)})

    monkeypatch.setattr(PruningCallback, "epoch_end", worse)
    study_of("--objectives", "final_val_f1", "param_count", "--model_types", "lstm", n_trials=4)
    assert [trial.state.name for trial in load().trials] == ["COMPLETE"] * 3 + ["PRUNED"]
    assert "better in every objective" in load().trials[3].user_attrs["reason"]


# ------------------------------------------------------------------------------------------------- budgets


def test_no_trial_is_over_the_budgets() -> None:
    study_of("--model_types", "lstm,dense", "--pruner", "none", name="free", n_trials=5, epochs=1)
    sizes, flops = [], []
    with Store(DB_FILE, read_only=True) as store:
        for row in store.find_runs():
            metrics = store.metrics(row["experiment_id"])
            sizes.append(metrics["param_count"])
            flops.append(metrics["inference_flops_per_sample"])
    limits = (int(sorted(sizes)[2]), sorted(flops)[2])
    Path(DB_FILE).unlink()
    budgets = ("--max_params", str(limits[0]), "--max_flops", str(limits[1]))
    ended = study_of("--model_types", "lstm,dense", *budgets, n_trials=6, epochs=1)
    assert ended.code == 0, ended.err
    assert len(load().trials) == len(rows()) == 6
    with Store(DB_FILE, read_only=True) as store:
        for row in store.find_runs(RunFilter(status="finished")):
            metrics = store.metrics(row["experiment_id"])
            assert metrics["param_count"] <= limits[0]
            assert metrics["inference_flops_per_sample"] <= limits[1]


def test_a_budget_that_nothing_keeps_is_an_error_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research_eval.studies.tune.MAX_PROPOSALS", 20)
    ended = study_of("--max_params", "10", "--model_types", "lstm,dense")
    assert ended.code == 2
    assert "parameters are more than --max_params 10" in ended.err
    assert not Path("s.db").exists()


def test_seeds_per_trial_are_averaged() -> None:
    study_of("--seeds_per_trial", "3", "--seed", "5", "--model_types", "lstm", n_trials=2, epochs=1)
    found = rows()
    assert sorted(row["seed"] for row in found) == [5, 5, 6, 6, 7, 7]
    for trial in load().trials:
        ids = trial.user_attrs["experiment_ids"]
        with Store(DB_FILE, read_only=True) as store:
            values = [store.metrics(run_id)["final_val_f1"] for run_id in ids]
            assert [store.experiment(run_id)["parent_id"] for run_id in ids] == [None, ids[0], ids[0]]
        assert trial.value == pytest.approx(sum(values) / 3)


def test_time_that_is_up_stops_a_run_and_the_same_command_goes_on() -> None:
    started = time.monotonic()
    ended = study_of("--timeout", "3", "--model_types", "lstm", "--pruner", "none", n_trials=3, epochs=500)
    assert time.monotonic() - started < 60
    assert "the same command continues" in ended.out
    assert sum(row["status"] == "interrupted" for row in rows()) == 1
    begun = load().trials
    assert begun[-1].state == TrialState.RUNNING
    assert len(begun) < 3 or begun[-1].number == 2
    with Store(DB_FILE, read_only=True) as store:
        run_id = begun[-1].user_attrs["experiment_ids"][0]
        assert store.history(run_id)
    options = study_options_of("--model_types", "lstm", "--pruner", "none", n_trials=3, epochs=500)
    claimed = TrialQueue(options).claim("next")
    assert claimed is not None and claimed.trial_id == begun[-1]._trial_id


# ------------------------------------------------------------------------------------------------- trials that go wrong


class Unlucky:
    """Raises, or makes a loss that is no number, for every second run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
        self.calls = 0
        original = experiment.fit

        def fit(*args: Any, **keywords: Any) -> Any:
            self.calls += 1
            if self.calls % 2:
                if problem == "diverged":
                    raise Diverged("the loss is nan at step 3")
                raise MemoryError("out of memory")
            return original(*args, **keywords)

        monkeypatch.setattr(experiment, "fit", fit)


@pytest.mark.parametrize("problem", ["diverged", "failed"])
def test_a_trial_that_goes_wrong_is_recorded_and_the_study_goes_on(
    monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    Unlucky(monkeypatch, problem)
    ended = study_of("--model_types", "lstm", n_trials=4, epochs=1)
    assert ended.code == 0, ended.err
    assert [row["status"] for row in csv_rows()] == [problem, "finished"] * 2
    assert [row["state"] for row in csv_rows()] == ["FAIL", "COMPLETE"] * 2
    reason = "the loss is nan at step 3" if problem == "diverged" else "MemoryError: out of memory"
    assert csv_rows()[0]["reason"] == reason
    assert sorted(row["status"] for row in rows()) == sorted([problem, "finished"] * 2)
    assert reason in ended.out


def test_a_study_without_a_finished_trial_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "fit", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no")))
    ended = study_of("--model_types", "lstm", n_trials=2, epochs=1)
    assert ended.code == 1
    assert not Path(f"{FILES}_best_config.json").exists()


def test_an_objective_that_no_run_has_is_the_reason_of_the_failure() -> None:
    study_of("--objectives", "no_such_metric", "--model_types", "lstm", n_trials=1, epochs=1)
    assert load().trials[0].user_attrs["reason"] == "the run has no metric 'no_such_metric'"


def test_a_key_error_of_a_run_is_not_taken_for_a_missing_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "fit", lambda *_, **__: {}["weights"])
    study_of("--model_types", "lstm", n_trials=1, epochs=1)
    assert load().trials[0].user_attrs["reason"] == "KeyError: 'weights'"


# ------------------------------------------------------------------------------------------------- workers


def study_options_of(*more: str, **keywords: Any) -> StudyOptions:
    return options_of_line(arguments(*more, **keywords))


def options_of_line(line: list[str]) -> StudyOptions:
    import argparse

    from research_eval.cli.run import add_common_arguments

    parser = argparse.ArgumentParser()
    add_common_arguments(parser)
    add_study_arguments(parser)
    return study_options(parser.parse_args(line))


def test_the_budget_is_exact_however_many_claim() -> None:
    options = study_options_of(n_trials=10)
    queues = [TrialQueue(options) for _ in range(4)]
    claimed: list[StoredTrial | None] = []

    def claim(queue: TrialQueue, name: str) -> None:
        for number in range(5):
            claimed.append(queue.claim(f"{name}, {number}"))

    threads = [threading.Thread(target=claim, args=(queue, str(index))) for index, queue in enumerate(queues)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    given = [trial for trial in claimed if trial is not None]
    assert len(given) == len(set(given)) == 10
    assert len(load().trials) == 10


def fall_silent(url: str = "sqlite:///s.db") -> None:
    """Make the last heartbeats of all workers so old that they count as dead."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00.000000'")
    engine.dispose()


def test_a_trial_whose_worker_died_is_given_to_the_next_until_it_has_killed_three() -> None:
    options = study_options_of(n_trials=1)
    queue = TrialQueue(options)
    first = queue.claim("first")
    assert first is not None
    assert queue.claim("second") is None
    queue.release("first", died=True)
    assert queue.claim("second") == first
    fall_silent()
    assert queue.claim("third") == first
    queue.release("third", died=True)
    assert queue.claim("fourth") is None
    (trial,) = load().trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["reason"] == "its worker died 3 times"


def test_a_trial_that_was_released_waits_as_long_as_it_has_to() -> None:
    """Its run may be at work in a folder that others share: nobody has died."""
    queue = TrialQueue(study_options_of(n_trials=1))
    trial = queue.claim("first")
    assert trial is not None
    for number in range(10):
        queue.release("first" if number == 0 else f"w{number - 1}", died=False)
        fall_silent()
        assert queue.claim(f"w{number}") == trial
    assert trial.attributes["attempts"] == 1


def test_a_heartbeat_keeps_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "HEARTBEAT_SECONDS", 0.5)
    monkeypatch.setattr(storage, "GRACE_SECONDS", 1.5)  # the clock of SQLite has whole seconds
    queue = TrialQueue(study_options_of(n_trials=1))
    trial_id = queue.claim("slow")
    assert trial_id is not None
    with queue.heartbeat(trial_id):
        time.sleep(3.5)
        assert queue.claim("eager") is None
    time.sleep(3.5)
    assert queue.claim("eager") == trial_id


def with_more(number: int, *flags: str, name: str = "s") -> list[str]:
    """`arguments` without --n_trials."""
    line = arguments("--more_trials", str(number), *flags, name=name)
    place = line.index("--n_trials")
    return line[:place] + line[place + 2 :]


def test_a_study_that_is_done_says_so_and_takes_more_trials() -> None:
    flags = ("--model_types", "dense", "--pruner", "none", "--quiet")
    assert "are done" not in study_of(*flags, n_trials=2, epochs=1).err
    again = study_of(*flags, n_trials=1, epochs=1)
    assert again.code == 0
    assert (
        "study s: all of its 2 trials are done, and no more are asked for. Add some with --more_trials N" in again.err
    )
    longer = command(main, *with_more(1, *flags, "--epochs", "1"))
    assert longer.code == 0 and "study s: 3 of 3 trials (3 finished)" in longer.out and longer.err == ""
    assert [row["status"] for row in rows()] == ["finished"] * 3
    assert "3 of 3 trials" in study_of(*flags, n_trials=3, epochs=1).out  # the same study as with --n_trials 3


def test_two_commands_add_their_trials_both() -> None:
    """The second one comes before a worker of the first has begun, and neither takes the other's for its own."""
    first, second = (TrialQueue(options_of_line(with_more(2))) for _ in range(2))
    add_trials(first)
    add_trials(second)
    assert (first.options.budget.n_trials, second.options.budget.n_trials) == (2, 4)
    claimed = [queue.claim(f"w{number}") for number, queue in enumerate((first, first, second, second))]
    assert len({trial.number for trial in claimed if trial is not None}) == 4
    assert first.claim("x") is None and second.claim("x") is None


def test_a_grid_takes_more_of_its_points() -> None:
    line = ("--sampler", "grid", "--model_types", "dense")
    queue = TrialQueue(options_of_line(with_more(3, *line)))
    enqueue_grid(queue)
    assert len(queue.own_trials()) == queue.options.budget.n_trials == 3
    queue_again = TrialQueue(options_of_line(with_more(2, *line)))
    enqueue_grid(queue_again)
    points = [json.dumps(given_values(trial)) for trial in queue_again.own_trials()]
    assert len(set(points)) == len(points) == queue_again.options.budget.n_trials == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--n_trials", "3"), "--n_trials counts all trials of a study, and --more_trials those to be added: give one"),
        (("--more_trials", "0"), "--more_trials: expected a whole number of at least 1, got 0"),
    ],
)
def test_more_trials_that_make_no_sense(flags: tuple[str, str], message: str) -> None:
    ended = command(main, *with_more(1, *flags))
    assert ended.code == 2 and message in ended.err


def test_who_was_taken_for_dead_does_not_have_the_last_word() -> None:
    queue = TrialQueue(study_options_of(n_trials=1))
    trial_id = queue.claim("a")
    assert trial_id is not None
    queue.finish(trial_id, Outcome("finished", (0.5,)))
    queue.finish(trial_id, Outcome("failed", reason="late"))
    assert load().trials[0].value == 0.5
    assert "reason" not in load().trials[0].user_attrs


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_killed_worker_is_replaced_and_its_trial_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    line = arguments("--n_jobs", "2", "--model_types", "lstm", "--pruner", "none", n_trials=2, epochs=60)
    study = subprocess.Popen(
        [sys.executable, str(ROOT / "research_eval" / "main.py"), *line],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killed = None
    while killed is None and study.poll() is None:
        time.sleep(0.05)
        with contextlib.suppress(Exception):
            workers = [pid for child in children_of(study.pid) for pid in children_of(int(child))]
            if any(Path("runs").glob("*/checkpoint.safetensors")):
                killed = int(workers[0])
                os.kill(killed, signal.SIGKILL)
    out, err = study.communicate(timeout=240)
    assert study.returncode == 0, out + err
    assert f"worker {killed} died" in err
    found = load().trials
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * 2
    assert len(rows()) == len(csv_rows()) == 2
    assert {row["status"] for row in rows()} == {"finished"}
    attempts = [trial.user_attrs["attempts"] for trial in found]
    for trial in found:  # whoever was cut off comes to the result of a run in one piece
        if trial.user_attrs["attempts"] > 1 or max(attempts) == 1:
            row = next(row for row in rows() if row["experiment_id"] == trial.user_attrs["experiment_ids"][0])
            again = run(config_from_dict(json.loads(row["full_config_json"])), db="again.db", quiet=True)
            assert again.metrics["final_val_f1"] == trial.value


def test_a_signal_stops_the_study_with_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Journal.train_values

    def stopping(self: Journal, step: int, values: dict[str, float]) -> None:
        report(self, step, values)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Journal, "train_values", stopping)
    ended = study_of("--model_types", "lstm", n_trials=2)
    assert ended.code == 128 + signal.SIGTERM
    assert load().trials[0].state == TrialState.RUNNING
    monkeypatch.setattr(Journal, "train_values", report)
    assert study_of("--model_types", "lstm", n_trials=2).code == 0
    assert [trial.state for trial in load().trials] == [TrialState.COMPLETE] * 2
    assert len(rows()) == 2


def test_a_signal_while_a_run_is_scored_interrupts_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    score = experiment.score

    def stopping(*arguments: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return score(*arguments)

    monkeypatch.setattr(experiment, "score", stopping)
    assert study_of("--model_types", "lstm", n_trials=1, epochs=1).code > 128
    assert [row["status"] for row in rows()] == ["interrupted"]
    assert load().trials[0].state == TrialState.RUNNING
    monkeypatch.setattr(experiment, "score", score)
    assert study_of("--model_types", "lstm", n_trials=1, epochs=1).code == 0
    assert [row["status"] for row in rows()] == ["finished"]


# ------------------------------------------------------------------------------------------------- past runs


def test_past_runs_that_fit_teach_the_sampler_and_are_no_trials() -> None:
    study_of("--model_types", "lstm", "--pruner", "none", name="past", n_trials=3)
    study_of("--model_types", "lstm", "--pruner", "none", name="other", n_trials=1, epochs=1)
    study_of("--model_types", "dense", "--pruner", "none", name="another", n_trials=1)
    ended = study_of("--warm_start", "--model_types", "lstm", n_trials=2)
    assert ended.code == 0, ended.err
    assert "3 past runs fit" in ended.err
    study = load()
    past = {trial.user_attrs["warm_start"]: trial for trial in study.trials if "warm_start" in trial.user_attrs}
    assert len(study.trials) == 5
    assert len(csv_rows()) == 2
    for trial in load("past").trials:
        taught = past[trial.user_attrs["experiment_ids"][0]]
        assert taught.params == trial.params
        assert taught.value == trial.value
    assert "0 past runs fit" in study_of("--warm_start", "--model_types", "lstm", n_trials=2).err
    assert len([record for record in trial_records(load()) if record.warm_start is None]) == 2


# ------------------------------------------------------------------------------------------------- flags and names


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--n_trials", "0"), "--n_trials: expected a whole number of at least 1"),
        (("--objectives", "test_f1"), "score of the test split"),
        (("--objectives", "final_val_fl"), "Did you mean 'final_val_f1'?"),
        (("--objectives", "final_val_f1,param_count", "--sampler", "cmaes"), "takes one objective"),
        (("--model_types", "dens"), "Did you mean 'dense'?"),
        (("--storage", "mysql://x/y"), "--storage:"),
        (("--storage", "sqlite:////no/such/folder/s.db"), "--storage:"),
        (("--rw_max_length", "9"), "--rw_max_length: is for real_world data"),
        (("--timeout", "nan"), "--timeout: expected a number above 0"),
        (("--max_params", "-1"), "--max_params"),
        (("--dataset_name", "parrity"), "parrity"),
        (("--search_space", "missing.json"), "missing.json: cannot be read"),
        (("--seeds", "0-3"), "--seeds: is a flag of one experiment"),
        (("--n_trails", "3"), "Did you mean '--n_trials'?"),
        (("--sampler", "tbe"), "invalid choice"),
        (("--seed", "-1"), "--seed"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(flags: tuple[str, ...], words: str) -> None:
    ended = study_of(*flags)
    assert ended.code == 2
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert not Path("s.db").exists()


def test_flags_of_a_study_do_not_go_with_a_config() -> None:
    ended = command(main, "--json_config_path", "x.json", "--n_trials", "3")
    assert ended.code == 2
    assert "--n_trials: is a flag of studies" in ended.err
    ended = command(main)
    assert ended.code == 2
    assert "--json_config_path FILE" in ended.err


def test_a_fixed_value_is_not_searched() -> None:
    Path("space.json").write_text(json.dumps({"batch_size": [8, 16], "optimizer_params": {"lr": 0.01}}))
    options = study_options_of("--model_types", "lstm")
    names = {parameter.name for parameter in options.space.parameters["lstm"]}
    assert "batch_size" not in names  # the flag is given
    assert "optimizer_params.lr" not in names
    assert options.space.base["optimizer_params"] == {"lr": 0.01}
    assert options.space.base["dataset_params"] == {"num_samples": 80, "seq_len": 5}


def test_what_a_study_would_search_can_be_seen_before() -> None:
    ended = study_of("--dry_run", "--model_types", "dense,goe_original")
    assert ended.code == 0
    assert "goe_original.max_path_len: 1 to 4, at most num_total_experts * max_visits" in ended.out
    assert not Path("s.db").exists()


def test_goe_tune_is_the_same_command() -> None:
    assert command(cli, "tune", *arguments("--model_types", "lstm", n_trials=1, epochs=1)).code == 0
    assert len(load().trials) == 1


def test_a_name_never_leaves_the_working_directory(tmp_path: Path) -> None:
    name = "../../=evil<script>"
    assert study_of("--model_types", "lstm", name=name, n_trials=1, epochs=1).code == 0
    assert load(name).trials[0].state == TrialState.COMPLETE
    assert not list(tmp_path.parent.glob("*evil*"))
    (file,) = Path().glob("optuna_study_*_full_results.csv")
    assert file.name.startswith("optuna_study_")


def test_a_class_of_ones_own_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    original = MODELS_MAP["lstm"]
    monkeypatch.setitem(MODELS_MAP, "mine", type("Mine", (original,), {"model_type": "mine"}))
    ended = study_of("--model_types", "mine", n_trials=1, epochs=1)
    assert ended.code == 0, ended.err
    assert "mine.embed_dim" in load().trials[0].params


def test_objective_serves_a_study_of_ones_own() -> None:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    given = {"dataset_name": "parity", "model_types": "lstm", "epochs": 1, "syn_num_samples": 80, "syn_seq_len": 5}
    study.optimize(lambda trial: objective(trial, given), n_trials=2)
    assert len(study.best_params) >= 5
    with Store(DB_FILE, read_only=True) as store:
        values = [store.metrics(trial.user_attrs["experiment_ids"][0])["final_val_f1"] for trial in study.trials]
    assert [trial.value for trial in study.trials] == values
    with pytest.raises(ConfigError, match="data set"):
        objective(study.ask(), {})
    study.optimize(lambda trial: objective(trial, {**given, "max_params": 5}), n_trials=1)
    assert study.trials[-1].state == TrialState.PRUNED


# ------------------------------------------------------------------------------------------------- a server


def test_a_study_on_a_server(server_url: str) -> None:
    line = arguments("--model_types", "lstm", "--db", server_url, n_trials=2, epochs=1)
    line[line.index("--storage") + 1] = server_url
    ended = command(main, *line)
    assert ended.code == 0, ended.err
    assert "2 of 2 trials" in ended.out
    with Store(server_url, read_only=True) as store:
        assert [row["status"] for row in store.find_runs()] == ["finished"] * 2
    assert len(csv_rows()) == 2
    assert not Path(DB_FILE).exists()


# ------------------------------------------------------------------------------------------------- the border to Optuna


def test_only_the_adapter_uses_the_storage_and_private_parts_of_optuna() -> None:
    private = re.compile(
        r"\b(_trial_id|_get_stale_trial_ids|_storage|RDBStorage|BaseStorage|system_attrs|create_new_trial"
        r"|set_trial_\w+|get_trial|record_heartbeat|_rdb)\b"
    )
    package = ROOT / "research_eval"
    users = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if private.search(path.read_text())}
    assert users == {f"studies/{name}.py" for name in ("adapter", "ledger", "storage", "trial_rows")}


def test_the_name_of_a_narrowed_parameter_is_that_of_the_studies_in_peoples_databases() -> None:
    Path("space.json").write_text(json.dumps({"model_params": {"embed_dim": 12, "num_layers": 1, "dropout": 0.0}}))
    space = study_options_of("--model_types", "dense").space
    entries: dict[str, tuple[Any, ...]] = {}

    def first(name: str, distribution: Any) -> Any:
        entries[name] = getattr(distribution, "choices", ())
        return grid_values(distribution)[0]

    space.sample(first)
    assert entries["dense.num_heads of 1, 2, 4"] == (1, 2, 4)  # 8 does not divide 12
    assert entries["dense.dim_feedforward_factor"] == (1.0, 2.0, 4.0)  # nothing narrows it


def test_one_worker_per_core_may_be_asked_for() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert study_options_of("--n_jobs", "-1").n_jobs == cores
    for wrong in ("0", "-2"):
        with pytest.raises(ConfigError, match="--n_jobs: expected a whole number of at least 1"):
            study_options_of("--n_jobs", wrong)
