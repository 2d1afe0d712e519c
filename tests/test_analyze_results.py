"""The analysis of stored results: what is grouped, chosen, compared, drawn and written."""

from __future__ import annotations

import argparse
import base64
import csv
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image, pyplot
from support import ROOT, Ended, command, python, small_settings

from research_eval.analysis import points, runs
from research_eval.analysis.comparison import compare
from research_eval.analysis.report import hyperparameters
from research_eval.analysis.result_plots import draw_cost_plot
from research_eval.analysis.runs import Group, Results, load_results, with_all_metrics
from research_eval.analysis.statistics import SHARE, mean_interval
from research_eval.analysis.summary import Options
from research_eval.analysis.tables import Table, is_score, short_number
from research_eval.analyze_results import main
from research_eval.cli.analyze import add_arguments
from research_eval.db_utils import DB_FILE, HistoryRow, RunRow, Store, canonical_json
from research_eval.schema import config_from_dict

SUMMARY = "parity_summary_table_best_finalvalf1"
TABLE = {".csv", ".md", ".tex"}
PICTURE = {".png", ".svg"}
HOSTILE = "<script>alert(1)</script>|$\\frac{x}$ =cmd&%#_{}~^\n../x\x1b[31m"


class Lab:
    """A store in a folder, and runs put into it as the program would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(str(folder / DB_FILE))
        numbers = itertools.count()
        self.new_id: Callable[[], str] = lambda: f"run-{next(numbers):05d}"

    def add(
        self,
        f1: float | None = None,
        *,
        model: str = "dense",
        seed: int | None = 0,
        status: str = "finished",
        metrics: dict[str, Any] | None = None,
        run_type: str = "json",
        row_name: str | None = None,
        row_model: str | None = None,
        dataset: str | None = None,
        curve: bool = False,
        **changes: Any,
    ) -> str:
        """One run; `changes` are those of its config, `row_name` and `row_model` others in its row. Its id."""
        config = config_from_dict(small_settings(model_type=model, seed=seed or 0, **changes)).to_dict()
        run_id = self.new_id()
        self.store.start_experiment(
            experiment_id=run_id,
            run_type=run_type,
            experiment_name=config["experiment_name"] if row_name is None else row_name,
            model_type=model if row_model is None else row_model,
            dataset_name=config["dataset_name"] if dataset is None else dataset,
            dataset_type=config["dataset_type"],
            epochs=config["epochs"],
            batch_size=config["batch_size"],
            seed=seed,  # type: ignore[arg-type] # None as in a database that an earlier program made
            config=config,
            environment={"python_version": "3.11", "versions": {"torch": "2"}},
        )
        if curve:
            rows = [HistoryRow(step, step / 2, "val_f1", (f1 or 0) * step / 4) for step in range(1, 5)]
            rows += [row._replace(name="val_loss", value=1 - row.value) for row in rows]
            self.store.add_history(run_id, rows)
        if status == "finished":
            scores = {} if f1 is None else {"final_val_f1": f1, "final_val_loss": 1 - f1}
            self.store.finish_experiment(run_id, scores | (metrics or {}))
        else:
            self.store.set_status(run_id, status)
        return run_id

    def analyze(self, *arguments: str, dataset: str | None = "parity") -> Ended:
        """The command with this store; files go to `out`."""
        where = [] if dataset is None else ["--dataset_name", dataset]
        fixed = ["--db", str(self.folder / DB_FILE), "--output_dir", str(self.folder / "out")]
        return command(main, *where, *fixed, *arguments)

    def results(self, *metrics: str, dataset: str = "parity") -> Results:
        return load_results(self.store, dataset, metrics or ("final_val_f1",))

    def files(self) -> set[str]:
        return {path.name for path in (self.folder / "out").iterdir()} if (self.folder / "out").exists() else set()

    def rows(self, name: str = f"{SUMMARY}.csv") -> list[dict[str, str]]:
        with (self.folder / "out" / name).open(newline="") as file:
            return list(csv.DictReader(file))

    def text(self, name: str) -> str:
        return (self.folder / "out" / name).read_text()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.store.close()


COSTS = {"param_count": 1000.0, "inference_latency_ms_batch": 2.0, "inference_flops_per_sample": 5e4}


def fill(lab: Lab, *models: str, seeds: int = 3) -> None:
    """Two configs of each model type, with everything that can be drawn."""
    rng = random.Random(0)
    for number, model in enumerate(models):
        for lr in (1e-3, 1e-2):
            for seed in range(seeds):
                f1 = 0.5 + 0.1 * number + 0.04 * rng.random()
                costs = {name: value * (1 + number) for name, value in COSTS.items()}
                more = {"test_f1": f1 - 0.05, "test_loss": 1.0, "router_entropy": 0.5, "path": [[1, 2]]} | costs
                lab.add(f1, model=model, seed=seed, metrics=more, optimizer_params={"lr": lr}, curve=True)


# ---------------------------------------------------------------------------------------------------------- groups


def test_seeds_of_one_config_are_one_group_whoever_ran_them(lab: Lab) -> None:
    lab.add(0.5, seed=0)
    lab.add(0.6, seed=1, experiment_name="another name")
    lab.add(0.7, seed=2, run_type="optuna_trial", row_name="a study", experiment_name="trial 7")
    watched = {"device": "auto", "num_threads": 2, "log_every": 9, "checkpoint_every": 5, "trace_routing": True}
    lab.add(0.8, seed=3, training_params=watched)
    lab.add(0.9, seed=4, training_params={"test": True})
    lab.add(0.1, seed=5, optimizer_params={"lr": 0.5})
    lab.add(0.2, seed=6, training_params={"precision": "bf16"})
    lab.add(0.3, seed=7, epochs=3)
    groups = lab.results().groups
    assert [group.scores("final_val_f1") for group in groups] == [
        {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.8, 4: 0.9},
        {5: 0.1},
        {6: 0.2},
        {7: 0.3},
    ]


def test_the_newest_finished_run_of_a_seed_counts(lab: Lab) -> None:
    lab.add(0.5, seed=1)
    lab.add(0.7, seed=1, experiment_name="again")
    for status in ("failed", "running", "pruned", "diverged"):
        lab.add(seed=1, status=status)
    lab.add(0.2, seed=0)
    lab.add(seed=2, status="diverged")
    lab.add(seed=3, status="pruned")
    (group,) = lab.results().groups
    assert group.scores("final_val_f1") == {0: 0.2, 1: 0.7}
    assert group.lost == 1, "seed 2; a pruned run was stopped because it was bad, not because it could not go on"
    (spent,) = lab.results().spent.values()
    assert spent == {"finished": 3, "pruned": 2, "diverged": 2}
    assert [run.status for run in lab.results().left_out] == ["failed", "running"]


def test_runs_without_a_known_seed_stand_for_themselves(lab: Lab) -> None:
    for f1 in (0.5, 0.6, 0.6):
        lab.add(f1, seed=None)
    (group,) = lab.results().groups
    assert group.values("final_val_f1") == [0.5, 0.6, 0.6]


def test_values_that_are_no_finite_numbers_are_no_scores(lab: Lab) -> None:
    for seed, value in enumerate([0.5, math.nan, math.inf, None, [0.1], 0.7]):
        lab.add(seed=seed, metrics={"final_val_f1": value})
    (group,) = lab.results().groups
    assert group.scores("final_val_f1") == {0: 0.5, 5: 0.7}
    assert group.mean("missing") is None


names = st.text(max_size=12) | st.sampled_from(['"', '\\"seed\\": 1', '"dataset_params": {', '", "seed": 0', HOSTILE])


@settings(max_examples=60, deadline=None)
@given(names, names, st.integers(0, 2**40), st.integers(0, 3))
def test_cutting_the_text_says_the_same_as_parsing_it(name: str, path: str, seed: int, variant: int) -> None:
    config = config_from_dict(small_settings()).to_dict() | {"experiment_name": name, "seed": seed}
    config["dataset_params"] |= {"data_dir": path, "seq_len": 6 + variant % 2}
    config["model_params"] |= {"embed_dim": 8 + variant // 2, "seed": seed, "note": path}

    def row(text: str, row_name: str = name) -> RunRow:
        return RunRow("id", row_name, "dense", "finished", seed, text, {})

    canonical = canonical_json(config)
    fast, parsed = runs.keys(row(canonical)), runs.keys(row(canonical, row_name=f"{name}?"))
    shuffled = runs.keys(row(json.dumps(dict(reversed(config.items())), indent=1)))
    assert fast == parsed == shuffled
    task = {key: value for key, value in config["dataset_params"].items() if key != "data_dir"}
    assert json.loads(fast[0]) == task
    assert json.dumps(path) in fast[1], "what belongs to the model is not cut out with the name"
    other = config | {"seed": seed + 1, "experiment_name": f"{name}!"}
    assert runs.keys(RunRow("id", f"{name}!", "dense", "finished", seed + 1, canonical_json(other), {})) == fast


@pytest.mark.parametrize("text", ["", "no json", "[1]", "null", '{"dataset_params": 3}', '{"lr": 0.1, "seed": 0}'])
def test_configs_of_earlier_programs_are_groups_of_their_own(text: str) -> None:
    one = RunRow("id", "", "dense", "finished", None, text, {})
    assert runs.keys(one) == runs.keys(one)
    assert runs.keys(one)[0] == "{}"
    assert runs.keys(one) != runs.keys(one._replace(config_json='{"lr": 0.2}'))


def test_tasks_are_told_apart_by_what_differs(lab: Lab) -> None:
    for length in (16, 8):
        for model, f1 in (("dense", 0.5), ("moe", 0.6)):
            data = {"num_samples": 100, "seq_len": length}
            lab.add(f1 + length / 100, model=model, dataset_params=data)
            lab.add(f1 - 0.1, model=model, dataset_params=data, epochs=9)
    results = lab.results()
    assert list(results.tasks.values()) == ["seq_len=8", "seq_len=16"]
    assert [(results.tasks[group.task], group.model_type) for group in results.best("final_val_f1")] == [
        ("seq_len=8", "dense"),
        ("seq_len=8", "moe"),
        ("seq_len=16", "dense"),
        ("seq_len=16", "moe"),
    ]
    assert list(results.only(["moe"]).tasks.values()) == ["seq_len=8", "seq_len=16"]
    done = lab.analyze("--run_all")
    assert done.code == 0
    assert done.err.count("are different tasks") == 1
    assert [row["task"] for row in lab.rows()] == ["seq_len=8", "seq_len=8", "seq_len=16", "seq_len=16"]
    assert [row["trials_spent"] for row in lab.rows()] == ["2"] * 4
    assert [row["task"] for row in lab.rows("parity_comparison.csv")] == ["seq_len=8", "seq_len=16"]


def test_one_task_has_no_label(lab: Lab) -> None:
    lab.add(0.5)
    assert list(lab.results().tasks.values()) == [""]
    lab.analyze()
    assert "task" not in lab.rows()[0]


# --------------------------------------------------------------------------------------------------------- the best


@pytest.mark.parametrize("metric", ["final_val_f1", "final_val_loss"])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_each_model_type_is_that_of_the_slow_way(lab: Lab, metric: str, seed: int) -> None:
    rng = random.Random(seed)
    scores: dict[tuple[str, float], dict[int, float]] = {}
    spent: dict[str, int] = {}
    for _ in range(60):
        model, lr, run_seed = rng.choice(["dense", "moe", "goe"]), rng.choice([0.1, 0.2, 0.3, 0.4]), rng.randrange(3)
        status = rng.choice(["finished", "finished", "finished", "failed", "pruned"])
        values = {name: rng.choice([rng.random(), math.nan]) for name in ("final_val_f1", "final_val_loss")}
        lab.add(model=model, seed=run_seed, status=status, metrics=values, optimizer_params={"lr": lr})
        spent[model] = spent.get(model, 0) + (status != "failed")
        if status == "finished":
            scores.setdefault((model, lr), {})[run_seed] = values[metric]
    finite = {place: [value for value in found.values() if math.isfinite(value)] for place, found in scores.items()}
    choose = max if metric == "final_val_f1" else min
    expected = {}
    for model in sorted(spent):
        own = {lr: values for (name, lr), values in finite.items() if name == model}
        most = max(map(len, own.values()))
        means = {lr: fmean(values) for lr, values in own.items() if values and len(values) >= min(3, most)}
        expected[model] = choose(means.items(), key=lambda item: item[1])
    assert lab.analyze("--metric_to_optimize", metric).code == 0
    rows = lab.rows(f"parity_summary_table_best_{metric.replace('_', '')}.csv")
    assert [row["model_type"] for row in rows] == list(expected)
    for row in rows:
        lr, mean = expected[row["model_type"]]
        assert json.loads(row["config_json"])["optimizer_params"]["lr"] == lr
        assert float(row[metric]) == pytest.approx(mean)
        assert int(row["trials_spent"]) == spent[row["model_type"]]
        assert (
            sum(int(value) for name, value in row.items() if re.fullmatch("trials_(?!spent).*", name))
            == spent[row["model_type"]]
        )


@pytest.mark.parametrize("metric", ["final_val_f1", "final_val_loss"])
def test_a_lucky_seed_does_not_beat_a_group_and_the_table_says_so(lab: Lab, metric: str) -> None:
    """In the lab the loss is 1 - F1, so that both metrics have the same order."""
    rng = random.Random(0)
    luck = [lab.add(0.8 + 0.1 * rng.random(), optimizer_params={"lr": 1e-4 * (1 + trial)}) for trial in range(30)]
    lucky = lab.add(0.97, seed=3, optimizer_params={"lr": 0.5}, metrics=COSTS)
    steady = [lab.add(0.7 + seed / 100, seed=seed, epochs=3, metrics=COSTS, curve=True) for seed in range(5)]
    lab.add(0.6, model="moe", metrics=COSTS)
    lab.add(0.5, model="moe", seed=1, epochs=3, metrics=COSTS)
    done = lab.analyze("--metric_to_optimize", metric, "--run_all")
    dense, moe = lab.rows(f"parity_summary_table_best_{metric.replace('_', '')}.csv")
    assert dense["experiment_ids"].split() == steady
    assert moe["num_seeds"] == "1", "nothing has three seeds there"
    way, mean = ("higher", "0.9700") if metric == "final_val_f1" else ("lower", "0.03")
    note = f"dense: a config with 1 seed has a {way} mean ({mean}, run {lucky}), which may be luck. "
    note += "It was passed over: train it with 3 seeds or more."
    for text in (done.out, lab.text("parity_report.html")):
        assert note in text
        assert text.count("passed over") == 1
    _, _, listed = lab.text("parity_report.html").partition('<table id="listed">')
    first = re.search(r'class="number" data-value="([\d.]+)"', listed)
    assert first is not None
    assert float(first[1]) == pytest.approx(0.72 if metric == "final_val_f1" else 0.28), "first in the list"
    results = lab.results("final_val_f1", "param_count")
    found = points.points_of(results, *results.tasks, "param_count", points.Score.of(results, metric), 0.95)
    on_front = [point.group.runs[0].experiment_id for point in found if point.on_front]
    assert on_front == [steady[0]], "it is not on the front, and dominates nothing"
    assert [point.group.runs[0].experiment_id for point in found if not point.competes] == [lucky]
    assert len(luck) == 30


def test_two_seeds_are_enough_where_nothing_has_three(lab: Lab) -> None:
    lab.add(0.9)
    for seed in (0, 1):
        lab.add(0.5, seed=seed, epochs=3)
    assert "It was passed over" in lab.analyze().out
    assert lab.rows()[0]["num_seeds"] == "2"
    lab.add(0.9, seed=1)
    assert "passed over" not in lab.analyze().out
    assert float(lab.rows()[0]["final_val_f1"]) == 0.9


def test_a_test_score_is_shown_and_never_chosen_by(lab: Lab) -> None:
    lab.add(0.5, metrics={"test_f1": 0.99}, optimizer_params={"lr": 0.1})
    lab.add(0.6, metrics={"test_f1": 0.11}, optimizer_params={"lr": 0.2})
    refused = lab.analyze("--metric_to_optimize", "test_f1", "--run_all")
    assert refused.code == 2
    assert "test split" in refused.err
    assert not lab.files()
    assert lab.analyze().code == 0
    assert lab.rows()[0]["test_f1"] == "0.11"


def test_the_test_score_belongs_to_the_metric(lab: Lab) -> None:
    more = {"test_f1": 0.4, "test_acc": 0.3, "test_loss": 0.2, "final_val_acc": 0.9}
    lab.add(0.5, metrics=more)
    for metric, test in {
        "final_val_f1": "test_f1",
        "final_val_acc": "test_acc",
        "final_val_loss": "test_loss",
    }.items():
        lab.analyze("--metric_to_optimize", metric)
        row = lab.rows(f"parity_summary_table_best_{metric.replace('_', '')}.csv")[0]
        assert float(row[test]) == more[test]


def test_the_table_shows_seeds_interval_solve_rate_and_trials(lab: Lab) -> None:
    for seed, f1 in enumerate([1.0, 0.5, 1.0, 0.5]):
        lab.add(f1, seed=seed, metrics={"test_f1": 0.4, "param_count": 12345.0} if seed else {"test_f1": 0.6})
    lab.add(seed=4, status="diverged")
    done = lab.analyze()
    row = lab.rows()[0]
    # t quantile, standard deviation, root of 4. Both ends of Wilson's interval solve (p - mean)^2 = weight p (1 - p).
    weight = (3.182446 * 0.288675 / 2) ** 2 / (0.75 * 0.25)
    for end in ("low", "high"):
        share = float(row[f"final_val_f1_{end}"])
        assert (share - 0.75) ** 2 == pytest.approx(weight * share * (1 - share), rel=1e-5)
    assert (row["solved"], row["num_seeds"], row["seeds"], row["seeds_lost"]) == ("2", "4", "0 1 2 3", "1")
    assert float(row["solve_rate_low"]) == pytest.approx(0.1500, abs=1e-4)
    assert float(row["solve_rate_high"]) == pytest.approx(0.8500, abs=1e-4)
    assert float(row["param_count"]) == 12345
    (line,) = [line for line in done.out.splitlines() if line.startswith("dense ")]
    assert re.split(r"  +", line) == [
        *("dense", "4", "0.7500", "[0.2759, 0.9594]", "2/4", "[0.15, 0.85]", "0.4500", "[0.3030, 0.6063]", "12.3k"),
        "5 (4 finished, 1 diverged)",
    ]
    assert "1 more of the chosen config's seeds ended without a result" in done.out
    narrow = lab.analyze("--confidence", "0.5", "--solved_at", "0.4")
    assert float(lab.rows()[0]["final_val_f1_low"]) > 0.6
    assert lab.rows()[0]["solved"] == "4"
    assert "50 % interval" in narrow.out


def test_no_solved_seed_of_five_has_a_rate(lab: Lab) -> None:
    for seed in range(5):
        lab.add(0.5 + seed / 100, seed=seed)
    done = lab.analyze()
    (line,) = [line for line in done.out.splitlines() if line.startswith("dense ")]
    assert re.split(r"  +", line)[4:6] == ["0/5", "[0.00, 0.43]"]
    row = lab.rows()[0]
    assert (row["solved"], row["solve_rate_low"]) == ("0", "0.0")
    assert float(row["solve_rate_high"]) == pytest.approx(0.4345, abs=1e-4)


@pytest.mark.parametrize("stuck", [1.0, 0.5])
def test_saturated_groups_have_a_solve_rate_and_no_interval(lab: Lab, stuck: float) -> None:
    for seed in range(5):
        lab.add(stuck, seed=seed, metrics=COSTS | {"test_f1": stuck}, curve=True)
        lab.add(0.3, model="moe", seed=seed, metrics=COSTS, curve=True)
    done = lab.analyze("--run_summary_table", "--run_comparison", "--run_report")
    assert done.code == 0
    dense, moe = lab.rows()
    assert (dense["final_val_f1_low"], dense["final_val_f1_high"]) == ("", "")
    assert dense["solved"] == ("5" if stuck == 1 else "0")
    assert float(dense["solve_rate_low"]) == pytest.approx(0.5655 if stuck == 1 else 0, abs=1e-4)
    assert float(dense["solve_rate_high"]) == pytest.approx(1 if stuck == 1 else 0.4345, abs=1e-4)
    assert (moe["solved"], moe["final_val_f1_low"]) == ("0", ""), "stuck at another value"
    assert "all seeds equal" in done.out
    assert "every seed has the same difference" in lab.rows("parity_comparison.csv")[0]["remark"]
    for name in lab.files():
        if not name.endswith((".png", ".html")):
            assert not re.search(r"\b(nan|inf)\b", lab.text(name), re.IGNORECASE), name
    assert "nan" not in done.out.lower()


def test_one_and_two_seeds_have_no_interval(lab: Lab) -> None:
    lab.add(0.5, seed=0)
    lab.add(0.6, seed=1)
    done = lab.analyze()
    assert "no interval" in done.out
    row = lab.rows()[0]
    assert (row["num_seeds"], row["final_val_f1_low"]) == ("2", "")
    assert (row["solved"], row["solve_rate_low"]) == ("0", "0.0"), "the file has every figure"
    assert "solved" not in done.out, "0 of 2 tells nothing"


def test_a_loss_is_not_solved(lab: Lab) -> None:
    lab.add(0.0, metrics={"final_val_loss": 1.5})
    lab.analyze("--metric_to_optimize", "final_val_loss")
    assert lab.rows("parity_summary_table_best_finalvalloss.csv")[0]["solved"] == ""
    scores = ("final_val_f1", "best_val_f1_across_epochs", "final_val_acc", "training_mode_accuracy")
    assert all(map(is_score, scores))
    assert not any(map(is_score, ("final_val_loss", "param_count", "inference_samples_per_second", "router_entropy")))


# ------------------------------------------------------------------------------------------------------- comparison


def test_comparisons_are_paired_by_common_seeds(lab: Lab) -> None:
    for seed, (a, b) in enumerate(zip([0.9, 0.8, 0.85, 0.7], [0.8, 0.75, 0.7, 0.65], strict=True)):
        lab.add(a, model="goe", seed=seed, metrics={"test_f1": a - 0.1})
        lab.add(b, model="dense", seed=seed + (seed == 3) * 7, metrics={"test_f1": b - 0.2})
    done = lab.analyze("--compare", "goe,dense")
    (row,) = lab.rows("parity_comparison.csv")
    assert (row["first"], row["second"], row["common_seeds"]) == ("goe", "dense", "0 1 2")
    assert float(row["difference"]) == pytest.approx(0.1)
    assert float(row["low"]) == pytest.approx(0.1 - 4.302653 * 0.05 / 3**0.5, rel=1e-5)
    assert float(row["test_difference"]) == pytest.approx(0.2)
    assert float(row["p_value"]) == float(row["p_value_holm"]) == pytest.approx(0.0741799, rel=1e-4)
    assert "goe - dense" in done.out
    assert lab.files() == {f"parity_comparison{suffix}" for suffix in TABLE}


def test_several_comparisons_are_corrected_together(lab: Lab) -> None:
    fill(lab, "dense", "moe", "goe", seeds=4)
    results = lab.results("final_val_f1")
    best = [with_all_metrics(lab.store, group) for group in results.best("final_val_f1")]
    options = Options("final_val_f1", 0.95, 0.99)
    one = compare(results, best, [("moe", "dense")], options)
    three = compare(results, best, [("moe", "dense"), ("goe", "dense"), ("goe", "moe")], options)
    assert one[0].adjusted_p == one[0].difference.p_value
    p_values = [found.difference.p_value for found in three]
    assert three[p_values.index(min(p_values, key=lambda p: p or 1))].adjusted_p == pytest.approx(
        3 * min(p or 1 for p in p_values)
    )
    lab.analyze("--run_comparison", "--compare", "moe,dense")
    pairs = [(row["first"], row["second"]) for row in lab.rows("parity_comparison.csv")]
    assert pairs == [("moe", "dense"), ("dense", "goe"), ("goe", "moe")], "a pair is compared once, as it was asked for"


def test_no_common_seed_is_said(lab: Lab) -> None:
    lab.add(0.5, model="dense", seed=0)
    lab.add(0.6, model="moe", seed=1)
    assert lab.analyze("--run_comparison").code == 0
    assert lab.rows("parity_comparison.csv")[0]["remark"] == "no common seed"


# ------------------------------------------------------------------------------------------------------------ flags


def files(*stems: str, suffixes: set[str]) -> set[str]:
    return {f"{stem}{suffix}" for stem in stems for suffix in suffixes}


MADE_BY = {
    "--run_summary_table": files(SUMMARY, suffixes=TABLE),
    "--run_f1_vs_params_plot": files("parity_f1_vs_params", suffixes=PICTURE),
    "--run_f1_vs_latency_plot": files("parity_f1_vs_latency", suffixes=PICTURE),
    "--run_f1_vs_flops_plot": files("parity_f1_vs_flops", suffixes=PICTURE),
    "--run_learning_curves": files("parity_learning_curves", suffixes=PICTURE),
    "--run_comparison": files("parity_comparison", suffixes=TABLE),
    "--run_report": {"parity_report.html"},
}
EVERYTHING: set[str] = set().union(*MADE_BY.values())


@pytest.fixture(scope="module")
def full_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("full"))
    fill(made, "dense", "moe", "goe_original")
    yield made
    made.store.close()


@pytest.fixture
def full(full_lab: Lab) -> Iterator[Lab]:
    yield full_lab
    shutil.rmtree(full_lab.folder / "out", ignore_errors=True)


@pytest.mark.parametrize("flag", MADE_BY)
def test_each_flag_makes_its_files(full: Lab, flag: str) -> None:
    done = full.analyze(flag.replace("_", "-"))
    assert done.code == 0, done.err
    assert full.files() == MADE_BY[flag]
    assert done.err.count("wrote") == len(MADE_BY[flag])
    assert not pyplot.get_fignums(), "every figure is closed"


def test_flags_together_make_the_files_of_all(full: Lab) -> None:
    stored = (full.folder / DB_FILE).read_bytes()
    assert full.analyze("--run_summary_table", "--run_f1_vs_flops_plot").code == 0
    assert full.files() == MADE_BY["--run_summary_table"] | MADE_BY["--run_f1_vs_flops_plot"]
    assert full.analyze("--run_all").code == 0
    assert full.files() == EVERYTHING
    assert (full.folder / DB_FILE).read_bytes() == stored, "results are read and never written"


def test_without_a_run_flag_comes_the_summary_table(full: Lab) -> None:
    assert full.analyze().code == 0
    assert full.files() == MADE_BY["--run_summary_table"]


def test_the_command_of_the_specification(full: Lab) -> None:
    before = {path.name for path in full.folder.iterdir()}
    script = ROOT / "research_eval" / "analyze_results.py"
    flags = ["--dataset_name", "parity", "--model_types", "dense,moe", "--output_dir", "analysis_reports/", "--run_all"]
    done = python(script, *flags, folder=full.folder)
    assert done.code == 0, done.err
    assert {path.name for path in full.folder.iterdir()} - before == {"analysis_reports"}
    (full.folder / "analysis_reports").rename(full.folder / "out")
    assert full.files() == EVERYTHING
    assert [row["model_type"] for row in full.rows()] == ["dense", "moe"]


def test_model_types_take_commas_and_blanks(full: Lab) -> None:
    for spelling in (["dense,moe"], ["dense", "moe"], ["dense,", "moe"], ["moe", "--model-types", "dense,moe"]):
        full.analyze("--model_types", *spelling)
        assert [row["model_type"] for row in full.rows()] == ["dense", "moe"]


def test_the_flags_of_the_page_are_those_of_the_parser() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    page = (ROOT / "docs" / "analysis.md").read_text()
    documented = re.findall(r"^\| `--(\w+)` \| `?([^ |`]*)", page, re.MULTILINE)
    defaults = {name: value for name, value in vars(parser.parse_args([])).items() if value}
    assert [name for name, _ in documented] == list(vars(parser.parse_args([])))
    assert {name: value for name, value in documented if value not in ("", "all", "$GOE_DB")} == {
        name: str(value) for name, value in defaults.items()
    }


def test_quiet_leaves_the_tables(full: Lab) -> None:
    done = full.analyze("--run_summary_table", "--run_f1_vs_params_plot", "--quiet")
    assert "final_val_f1" in done.out
    assert done.err == ""


def test_help_is_quick() -> None:
    """It imports none of the libraries that take their time."""
    code = """
import sys
from research_eval import analyze_results
try:
    analyze_results.main(["--help"])
finally:
    heavy = {"torch", "numpy", "scipy", "sqlalchemy", "matplotlib", "plotly", "jinja2", "pandas"} & set(sys.modules)
    assert not heavy, heavy
"""
    done = python("-c", code, folder=Path("/"), fresh=True)
    assert done.code == 0, done.err
    for flag in MADE_BY:
        assert flag in done.out


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_types", "dens"], "no results for 'dens' .* Did you mean 'dense'"),
        (["--model_types", "zzz"], "There is dense, goe_original, moe"),
        (["--model_types", ","], "--model_types: no name"),
        (["--metric_to_optimize", "final_val_f"], "Did you mean 'final_val_f1'"),
        (["--metric_to_optimize", "path"], "no results for 'path'"),
        (["--metric_to_optimize", "test_acc"], "test split"),
        (["--compare", "dense"], "--compare: expected two model types"),
        (["--compare", "dense,dense"], "--compare: expected two model types"),
        (["--compare", "dense,go"], "--compare: no results for 'go'"),
        (["--model_types", "dense", "--compare", "dense,moe"], "--compare: no results for 'moe'"),
        (["--confidence", "95"], "--confidence: expected a number between 0 and 1"),
        (["--confidence", "nan"], "--confidence: expected"),
        (["--solved_at", "2"], "--solved_at: expected"),
        (["--run_sumary_table"], "Did you mean '--run_summary_table'"),
        (["--run_f1"], "unknown argument"),
    ],
)
def test_mistakes_are_explained_and_nothing_is_written(full: Lab, arguments: list[str], message: str) -> None:
    done = full.analyze(*arguments)
    assert done.code == 2
    assert re.search(message, done.err), done.err
    assert "Traceback" not in done.err
    assert not full.files()


def test_an_unknown_dataset_is_explained(full: Lab) -> None:
    done = full.analyze(dataset="party")
    assert (done.code, "Did you mean 'parity'" in done.err) == (2, True)
    done = full.analyze("--run_all", dataset=None)
    assert (done.code, "--dataset_name: missing" in done.err) == (2, True)


def test_stores_that_are_empty_or_missing(lab: Lab, tmp_path: Path) -> None:
    done = lab.analyze()
    assert (done.code, "There is nothing yet" in done.err) == (2, True)
    done = command(main, "--dataset_name", "parity", "--db", str(tmp_path / "none.db"))
    assert (done.code, "no results at" in done.err) == (2, True)
    assert not (tmp_path / "none.db").exists()
    assert lab.analyze("--list_metrics", dataset=None).code == 0


def test_runs_without_results_are_counted_and_named(lab: Lab) -> None:
    lab.add(status="failed")
    lab.add(status="running", seed=1)
    done = lab.analyze()
    assert (done.code, "no finished run on 'parity' to analyze (1 failed, 1 running)" in done.err) == (2, True)
    lab.add(0.5, model="moe")
    done = lab.analyze()
    assert done.code == 0
    assert "Left out: 2 runs without a result (1 failed, 1 running).\n" in done.out
    assert [row["model_type"] for row in lab.rows()] == ["moe"]


def test_a_folder_that_cannot_be_made_is_explained(full: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        done = full.analyze("--output_dir", str(folder))
        assert (done.code, "--output_dir" in done.err) == (2, True)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_there_is_nothing_of_is_not_drawn(lab: Lab) -> None:
    lab.add(0.5)
    done = lab.analyze("--run_all")
    assert done.code == 0
    assert lab.files() == MADE_BY["--run_summary_table"] | MADE_BY["--run_report"]
    for name in ("f1_vs_params", "f1_vs_latency", "f1_vs_flops", "learning_curves"):
        assert f"parity_{name}.png: not drawn" in done.err
    assert "comparison: " in done.err


# ---------------------------------------------------------------------------------------------------------- metrics


def test_the_list_of_metrics(full: Lab) -> None:
    done = full.analyze("--list_metrics")
    assert not full.files(), "it only prints"
    lines = {line.split()[0]: re.split(r"  +", line) for line in done.out.splitlines() if "  " in line}
    assert lines["final_val_loss"][1:3] == ["18", "minimize"]
    assert lines["param_count"] == ["param_count", "18", "minimize", "1k", "3k", "yes"]
    assert lines["test_f1"][-1] == "no: test score"
    assert lines["path"][-1] == "no: not a number"
    both = full.analyze("--list_metrics", "--run_summary_table")
    assert full.files() == MADE_BY["--run_summary_table"]
    assert done.out in both.out


def test_all_datasets_are_listed_together_without_a_name(lab: Lab) -> None:
    lab.add(0.5)
    lab.add(0.9, dataset="other")
    assert re.search(r"final_val_f1 +2 +maximize +0.5 +0.9", lab.analyze("--list_metrics", dataset=None).out)
    assert re.search(r"final_val_f1 +1 +maximize +0.5 +0.5", lab.analyze("--list_metrics").out)


# --------------------------------------------------------------------------------------------------------- pictures


def groups_of(scores: list[tuple[float, float]], models: tuple[str, ...] = ("dense", "goe")) -> Results:
    """Groups with these costs and scores, without a store."""
    groups = [
        Group(
            models[number % len(models)],
            "{}",
            tuple(
                RunRow(
                    f"r{number}-{seed}", "n", "m", "finished", seed, "{}", {"final_val_f1": score, "param_count": cost}
                )
                for seed in range(1)
            ),
            0,
        )
        for number, (cost, score) in enumerate(scores)
    ]
    return Results("parity", groups, {"{}": ""}, {("{}", name): runs.Counter(finished=1) for name in models})


@pytest.mark.parametrize("number", [1, 2, 70, 5000])
def test_plots_of_any_number_of_points(tmp_path: Path, number: int) -> None:
    rng = random.Random(0)
    results = groups_of([(rng.uniform(1e3, 1e6), rng.random()) for _ in range(number)])
    assert draw_cost_plot(results, "param_count", points.Score.of(results, "final_val_f1"), 0.95, tmp_path / "a.png")
    picture = image.imread(tmp_path / "a.png")
    assert 300 < picture.shape[0] < 1500
    assert picture.std() > 0.01
    assert (tmp_path / "a.svg").stat().st_size < 400_000, "a crowd is a picture inside"
    assert not draw_cost_plot(
        results, "inference_latency_ms_batch", points.Score.of(results, "final_val_f1"), 0.95, tmp_path / "b.png"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.svg"}


def test_equal_results_are_equal_files(tmp_path: Path) -> None:
    results = groups_of([(1e3, 0.5), (1e5, 0.9), (1e4, 0.4)])
    drawn = []
    for _ in range(2):
        draw_cost_plot(results, "param_count", points.Score.of(results, "final_val_f1"), 0.95, tmp_path / "a.png")
        drawn.append([(tmp_path / f"a{suffix}").read_bytes() for suffix in (".png", ".svg")])
    assert drawn[0] == drawn[1]
    assert b"<dc:date>" not in drawn[0][1]


def test_points_are_means_with_intervals_and_a_front(lab: Lab) -> None:
    for seed, f1 in enumerate([0.6, 0.7, 0.8]):
        lab.add(f1, seed=seed, metrics={"param_count": 100.0 + seed})
    lab.add(0.6, model="moe", metrics={"param_count": 500.0})
    lab.add(0.9, model="goe", metrics={"param_count": 500.0})
    lab.add(0.9, model="lstm", metrics={})
    results = lab.results("final_val_f1", "param_count")
    (task,) = results.tasks
    found = points.points_of(results, task, "param_count", points.Score.of(results, "final_val_f1"), 0.95)
    assert [(point.group.model_type, point.cost, point.on_front) for point in found] == [
        ("dense", 101.0, True),
        ("moe", 500.0, False),
        ("goe", 500.0, True),
    ]
    assert found[0].score == pytest.approx(0.7)
    assert found[0].interval == pytest.approx(mean_interval([0.6, 0.7, 0.8], bounds=SHARE))
    assert found[1].interval is None
    assert points.is_wide([1, 11])
    assert not points.is_wide([1, 10])
    assert not points.is_wide([0, 100])


def test_a_model_type_looks_the_same_whatever_else_is_there() -> None:
    alone, all_of_them = points.styles(["goe"]), points.styles(["dense", "goe", "mine", "other"])
    assert alone["goe"] == all_of_them["goe"]
    assert len({(look.colour, look.marker) for look in all_of_them.values()}) == len(all_of_them)


def test_learning_curves_are_means_where_all_seeds_have_a_point(lab: Lab) -> None:
    lengths = {0: 4, 1: 4, 2: 3}
    for seed, length in lengths.items():
        run = lab.add(0.5, seed=seed)
        lab.store.add_history(
            run, [HistoryRow(s, float(s), "val_f1", s / 10 + seed / 100) for s in range(1, length + 1)]
        )
        lab.store.add_history(run, [HistoryRow(9, 9.0, "val_f1", math.nan)])
    (group,) = lab.results().groups
    curve = points.curve_of(lab.store, group, "val_f1", 0.95)
    assert curve is not None
    assert curve.epochs == [1, 2, 3]
    assert curve.mean == pytest.approx([0.11, 0.21, 0.31])
    assert curve.intervals[0] == pytest.approx(mean_interval([0.1, 0.11, 0.12], bounds=SHARE))
    assert [len(epochs) for epochs, _ in curve.seeds] == [4, 4, 3]
    assert points.curve_of(lab.store, group, "val_loss", 0.95) is None


# ----------------------------------------------------------------------------------------------------- hostile names


def test_names_are_only_text_everywhere(lab: Lab) -> None:
    typed = "".join(filter(str.isprintable, HOSTILE))  # the command line takes no control characters
    for model in ("dense", "moe", "goe_original"):
        for seed in range(3):
            more = COSTS | {"router_entropy": 0.5}
            run = lab.add(0.5 + seed / 10, model=model, seed=seed, metrics=more, dataset=typed, curve=True)
    lab.add(0.9, dataset=typed, experiment_name=typed, metrics=COSTS)
    lab.add(0.9, dataset=typed, row_model=HOSTILE, metrics=COSTS, curve=True)
    lab.add(status="failed", dataset=typed, row_model=f"{HOSTILE}2")
    data = {"num_samples": 100, "seq_len": 9, "min_length": 9}
    lab.add(0.9, dataset=typed, dataset_params=data, metrics=COSTS)
    done = lab.analyze("--run_all", "--list_metrics", dataset=typed)
    assert done.code == 0, done.err
    assert len(lab.files()) == len(EVERYTHING)
    for name in lab.files():
        assert re.fullmatch(r"[\w.-]+", name)
    assert {path.name for path in lab.folder.iterdir()} <= {
        "out",
        DB_FILE,
        f"{DB_FILE}-wal",
        f"{DB_FILE}-shm",
        f"{DB_FILE}.lock",
    }
    assert "\x1b" not in done.out + done.err
    assert "\x1b" not in lab.analyze(dataset="zzzz").err
    (page,) = (lab.text(name) for name in lab.files() if name.endswith(".html"))
    assert "<script>alert" not in page
    assert page.count("<script") == 3, "plotly, the data, the page's own"
    for text in (lab.text(name) for name in lab.files() if name.endswith(".tex")):
        assert "\\frac" not in text
        assert not re.search(r"[$#^~\x1b]", re.sub(r"\\[$#]|\$\\geq\$|\$-\$", "", text))
    (markdown,) = (lab.text(name) for name in lab.files() if "summary" in name and name.endswith(".md"))
    assert "<script>" not in markdown.replace(r"\<", "")
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")}
    assert len(cells) == 1, "every row has the same cells"
    assert run.startswith("run-")


def test_cells_of_the_tables_are_escaped() -> None:
    table = Table("a_b", ["[x]", "="], [["[y] & |", "=1+1"], ["*_z_*", "\x1b\n"]], left=("[x]",), notes=["100 %"])
    assert r"{[}y{]} \& \textbar{} & =1+1 \\" in table.latex()
    assert r"| \[y\] & \| | =1+1 |" in table.markdown()
    assert r"| \*\_z\_\* | �� |" in table.markdown()
    assert r"\footnotesize 100 \%" in table.latex()
    assert table.text().splitlines()[-1] == "100 %"


def test_formulas_stay_text_in_csv(lab: Lab) -> None:
    lab.add(0.5, experiment_name="=1+1")
    lab.analyze()
    assert lab.rows()[0]["experiment_name"] == "'=1+1"


def test_short_numbers() -> None:
    values = {
        0: "0",
        999.6: "1k",
        1e6: "1M",
        2.5e9: "2.5G",
        -1500: "-1.5k",
        math.nan: "",
        math.inf: "inf",
        1e30: "1e+30",
    }
    assert {value: short_number(value) for value in values} == values


# ----------------------------------------------------------------------------------------------------------- report


def test_the_report_holds_all_that_it_shows(full: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(full.folder)
    assert full.analyze("--run_report").code == 0
    body, _, rest = full.text("parity_report.html").partition("<script>")  # the first script is plotly
    script = rest[rest.index('<script type="application/json"') :]
    for part in (body, script):
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|<link|<iframe", part)
        assert not re.search(r'(src|href)="(?!#|data:)', part)
    assert "default-src 'none'" in body
    assert "connect-src" not in body, "nothing may be fetched"
    found = re.search(r'id="data">(.*?)</script>', script, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    (task,) = data["tasks"]
    assert {cost: len(one["points"]) for cost, one in task["scatter"]["costs"].items()} == dict.fromkeys(COSTS, 6)
    assert "lr=0.01" in " ".join(task["scatter"]["hover"].values())
    assert len(task["curves"]["val_f1"]) == 3
    assert "Its pictures are not here" in body
    assert "--seeds 0,1,2" in body


def test_the_pictures_of_the_best_routed_run_are_inside(full: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(full.folder)
    *_, group = full.results().best("final_val_f1")[:2]  # dense and goe_original, which is the better of the two
    assert group.model_type == "goe_original"
    best, *others = sorted(group.runs, key=lambda run: -run.metrics["final_val_f1"])
    for run in (best, *others):
        folder = full.folder / "runs" / run.experiment_id
        folder.mkdir(parents=True)
        (folder / "expert_graph.png").write_bytes(run.experiment_id.encode())
    full.analyze("--run_report")
    shutil.rmtree(full.folder / "runs")
    picture = base64.b64encode(best.experiment_id.encode()).decode()
    assert re.findall(r'<img src="data:image/png;base64,([^"]*)"', full.text("parity_report.html")) == [picture]


def test_an_id_of_a_foreign_database_is_no_path(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.folder)
    monkeypatch.setattr(lab, "new_id", lambda: "..")
    lab.add(0.5, model="moe", metrics=COSTS | {"router_entropy": 0.1})
    (lab.folder / "expert_graph.png").write_bytes(b"secret")
    (lab.folder / "runs").mkdir()
    assert lab.analyze("--run_report").code == 0
    assert "<img" not in lab.text("parity_report.html")


def test_hyperparameters_are_what_differs_within_a_model_type(lab: Lab) -> None:
    for seed, (model, lr, width) in enumerate(
        (("dense", 0.1, 8), ("dense", 0.2, 8), ("moe", 0.1, 16), ("moe", 0.1, 32))
    ):
        changes = {"optimizer_params": {"lr": lr}, "model_params": {"embed_dim": width}, "experiment_name": f"{seed}"}
        lab.add(0.5, model=model, seed=seed, training_params={"log_every": 1 + seed}, **changes)
    assert hyperparameters(lab.results().groups) == [{"lr": 0.1}, {"lr": 0.2}, {"embed_dim": 16}, {"embed_dim": 32}]


CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to open the report")
@pytest.mark.parametrize("bare", [False, True])
def test_the_report_opens_in_a_browser_without_an_error_or_a_request(lab: Lab, bare: bool, tmp_path: Path) -> None:
    if bare:
        lab.add(0.5)
    else:
        fill(lab, "dense", "moe", "goe_original")
        image_tag = "<img src=http://127.0.0.1/a.png onerror=alert(1)>"
        lab.add(0.99, experiment_name=image_tag, row_model=f"{image_tag}</script>", metrics=COSTS, curve=True)
        lab.add(0.99, metrics=COSTS, dataset_params={"num_samples": 100, "seq_len": 7})
    assert lab.analyze("--run_report").code == 0
    page, said, requests = browse(lab.folder / "out" / "parity_report.html", tmp_path)
    assert "CONSOLE" not in said, said
    assert not requests
    assert ('class="main-svg"' in page) != bare, "plotly has drawn"
    assert ('id="curve-plots">These runs have no series' in page) == bare


def browse(page: Path, folder: Path) -> tuple[str, str, list[str]]:
    """The page's final DOM, what the browser logged, and the addresses that the page asked for beside its own."""
    assert CHROMIUM is not None
    log = folder / "net.json"
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    switches += [
        "--disable-background-networking",
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    switches += ["--dump-dom", "--enable-logging=stderr", "--virtual-time-budget=10000", f"--log-net-log={log}"]
    done = subprocess.run(
        [CHROMIUM, *switches, f"--user-data-dir={folder / 'profile'}", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=os.environ | {"HOME": str(folder)},
    )
    started = re.findall(r'"initiator":"([^"]*)".*"url":"((?!file:|data:)[^"]*)"', log.read_text())
    own = [url for initiator, url in started if initiator != "not an origin"]  # the others are the browser's errands
    return done.stdout, done.stderr, own


def test_analysis_imports_the_store_and_what_lies_below_it() -> None:
    allowed = {
        "analysis",
        "store",
        "routing",
        "registry",
        "system",
        "files",
        "errors",
        "wording",
        "db_utils",
        "metrics",
    }
    for path in (ROOT / "research_eval" / "analysis").glob("*.py"):
        parts = set(re.findall(r"from research_eval\.(\w+)", path.read_text()))
        assert parts <= allowed, path.name


def test_a_picture_that_cannot_be_written_costs_no_other(full: Lab) -> None:
    """Exit code 1, because it was asked for; everything else is there."""
    blocked = full.folder / "out" / "parity_f1_vs_params.png"
    blocked.mkdir(parents=True)
    ended = full.analyze("--run_all")
    assert ended.code == 1 and "parity_f1_vs_params.png: Is a directory" in ended.err
    wanted = {name for flag in MADE_BY for name in MADE_BY[flag]}
    assert wanted - full.files() <= {"parity_f1_vs_params.png", "parity_f1_vs_params.svg"}
