"""`goe measure`, and how tables mark a latency that cannot be trusted."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Ended, command, results, run_in, small_config

from research_eval.analysis.runs import Group
from research_eval.analysis.summary import latency_text
from research_eval.datasets.token_data import Batch
from research_eval.db_utils import DB_FILE, Store
from research_eval.main import cli
from research_eval.models.base_model import EvaluableModel
from research_eval.runs.measure import Measured, Subject, differing_conditions, measure, subjects
from research_eval.store.metrics import latency_remark, with_remark
from research_eval.store.records import RunRow
from research_eval.training.latency import Timed
from research_eval.training.runtime import Runtime


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each of two models on the same data, and one on longer samples with larger batches."""
    folder = tmp_path_factory.mktemp("lab")
    run_in(folder, small_config())
    run_in(folder, small_config(model_type="moe", seed=1))
    run_in(folder, small_config(dataset_params={"num_samples": 200, "seq_len": 9}, batch_size=8))
    return folder


@pytest.fixture
def ids(lab: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(lab)
    with results(lab) as store:
        return [row["experiment_id"] for row in store.experiments()]


def goe(*words: str, code: int = 0) -> Ended:
    ended = command(cli, *words, "--db", DB_FILE)
    assert ended.code == code, ended.err
    return ended


# -------------------------------------------------------------------------------------------------------- measuring


class Sleeper(EvaluableModel):
    """A model whose passes move a clock and write their order down."""

    def __init__(self, name: str, passes: list[str], seconds: Callable[[int], float]) -> None:
        super().__init__()
        self.name, self.passes, self.seconds = name, passes, seconds

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        self.passes.append(self.name)
        CLOCK[0] += self.seconds(len(self.passes))
        return torch.zeros(len(input_ids), 2)


CLOCK = [0.0]


def sleeping(name: str, passes: list[str], seconds: Callable[[int], float]) -> Subject:
    ids_BL = torch.ones(4, 3, dtype=torch.long)
    batch = Batch(ids_BL, ids_BL.bool(), ids_BL[:, 0])
    return Subject(name, small_config(), Timed(Sleeper(name, passes, seconds), [batch], Runtime("cpu")), 4, 1)


def test_models_take_turns_and_a_change_of_the_machine_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine becomes ten times slower half-way: the medians are useless, the ratio is not."""
    monkeypatch.setattr("research_eval.training.latency.time.perf_counter", lambda: CLOCK[0])
    passes: list[str] = []

    def slower(factor: float) -> Callable[[int], float]:
        return lambda number: factor * (10 if number > 10 else 1)

    found = measure([sleeping("a", passes, slower(1)), sleeping("b", passes, slower(3))], repetitions=8)
    assert passes == [*"ab", *("abba" * 4)], "a warm-up, then every model in each repetition, each first in turn"
    assert [one.ratio for one in found] == [1, 3]
    interval = found[1].ratio_interval()
    assert interval is not None and interval == pytest.approx((3, 3))
    assert found[0].spread > 1 and "unsteady" in found[0].remark
    assert found[0].samples_per_second == pytest.approx(4 / np.median([1, 10]))


def test_the_ratio_is_that_of_neighbours_with_an_interval_between_two_of_them() -> None:
    subject = sleeping("a", [], lambda _: 0)
    times, first = (
        np.array([[2.0], [6.0], [4.0], [9.0], [2.0], [9.0]]),
        np.array([[1.0], [2.0], [4.0], [3.0], [1.0], [1.0]]),
    )
    found = Measured(subject, times, first, 0.0)
    assert found.ratios == [2, 3, 1, 3, 2, 9]
    assert found.ratio == 2.5
    assert found.ratio_interval() == (1, 9)
    assert Measured(subject, times[:5], first[:5], 0.0).ratio_interval() is None, "five are too few for 95 %"


def test_threads_are_those_of_the_run_and_the_process_keeps_its_own(ids: list[str]) -> None:
    before = torch.get_num_threads()
    with results(Path()) as store:
        (one,) = subjects(store, ids[:1])
        (other,) = subjects(store, ids[:1], num_threads=2)
    assert (one.num_threads, other.num_threads) == (1, 2)
    seen = []

    def note(*_: Any) -> None:
        seen.append(torch.get_num_threads())

    one.timed.model.register_forward_pre_hook(note)
    other.timed.model.register_forward_pre_hook(note)
    measure([one, other], repetitions=1)
    assert set(seen) == {1, 2} and seen[0] == 1
    assert torch.get_num_threads() == before


def test_runs_on_the_same_task_get_the_same_batches(ids: list[str]) -> None:
    with results(Path()) as store:
        dense, moe, longer = subjects(store, ids)
    assert dense.timed.batches is moe.timed.batches
    assert {batch.input_ids.shape for batch in dense.timed.batches} == {(16, 6)}
    assert {batch.input_ids.shape for batch in longer.timed.batches} == {(16, 9)}, "of its own data, as large"
    assert differing_conditions([dense, moe]) == []
    (sentence,) = differing_conditions([dense, moe, longer])
    assert "different samples" in sentence


# -------------------------------------------------------------------------------------------------------- the command


def test_the_table_has_a_line_per_run_in_the_given_order(ids: list[str]) -> None:
    done = goe("measure", "--run", ids[1], ids[0], "--run", "latest", "--repetitions", "6")
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == ["id", ids[1], ids[0], ids[2]]
    assert "1.000" in lines[1] and "[" not in lines[1] and "[" in lines[2]
    assert "not comparable: the models were measured on different samples" in done.err


def test_json_and_csv_have_every_figure(ids: list[str]) -> None:
    flags = ["--run", *ids[:2], "--repetitions", "3", "--batch_size", "5", "--num_threads", "1"]
    lines = [json.loads(line) for line in goe("measure", *flags, "--json").out.splitlines()]
    rows = list(csv.DictReader(io.StringIO(goe("measure", *flags, "--csv").out)))
    for one, row, name in zip(lines, rows, ids[:2], strict=True):
        assert one.keys() == row.keys()
        assert one["experiment_id"] == row["experiment_id"] == name
        assert (one["measured_latency_batch_size"], one["measured_latency_repetitions"]) == (5, 3)
        assert one["measured_latency_ms_batch"] > 0 and one["ratio_low"] is None and row["ratio_low"] == ""


def test_stored_figures_stand_beside_those_of_the_run(lab: Path, ids: list[str]) -> None:
    with results(lab) as store:
        before = store.metrics(ids[0])
    for repetitions in ("2", "3"):
        goe("measure", "--run", ids[0], "--repetitions", repetitions, "--store")
    with results(lab) as store:
        after = store.metrics(ids[0])
        assert store.experiment(ids[0])["status"] == "finished"
    measured = {name: value for name, value in after.items() if name not in before}
    assert {name: after[name] for name in before} == before
    assert measured.keys() == {
        f"measured_latency_{part}"
        for part in ("ms_batch", "spread", "repetitions", "load", "batch_size", "num_threads")
    }
    assert measured["measured_latency_repetitions"] == 3, "the newest replaces the one before"
    listed = goe("runs", "--metrics", "measured_latency_ms_batch", "--where", "measured_latency_ms_batch>0").out
    assert ids[0] in listed and "spread" in listed and ids[1] not in listed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "nothing"], "no experiment 'nothing'"),
        (["--run", "latest", "--repetitions", "0"], "--repetitions: expected a number from 1 on, got 0"),
        (["--run", "latest", "--batch_size", "-3"], "--batch_size: expected a number from 1 on, got -3"),
        (["--run", "latest", "--device", "tpu"], "device: unknown 'tpu'"),
    ],
)
def test_mistakes_are_one_message(ids: list[str], words: list[str], message: str) -> None:
    done = goe("measure", *words, code=2)
    assert message in done.err and len(done.err.splitlines()) == 1


def test_a_run_without_its_folder_or_its_end_is_refused(
    ids: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = str(Path(DB_FILE).resolve())
    monkeypatch.chdir(tmp_path)
    done = command(cli, "measure", "--run", ids[0], "--db", database)
    assert done.code == 2 and "no weights in runs/" in done.err
    with Store("other.db") as store:
        config = small_config().to_dict()
        store.start_experiment(
            experiment_id="a", run_type="json", experiment_name="a", model_type="dense", dataset_name="parity",
            dataset_type="synthetic", epochs=1, batch_size=1, seed=0, config=config, environment={},
        )  # fmt: skip
        store.set_status("a", "failed")
    done = command(cli, "measure", "--run", "a", "--db", "other.db")
    assert done.code == 2 and "run a is failed: only finished runs are measured" in done.err


# ---------------------------------------------------------------------------------------------------------- the marks


@pytest.mark.parametrize(
    ("load", "spread", "text"),
    [
        (0.0, 0.2, "spread 20 %"),
        (0.2, 0.21, "unsteady, spread 21 %"),
        (0.21, 0.08, "busy, spread 8 %"),
        (math.nan, math.nan, ""),
        (None, None, ""),
    ],
)
def test_a_latency_under_load_or_with_a_spread_above_a_fifth_is_marked(load: Any, spread: Any, text: str) -> None:
    assert latency_remark(load, spread) == text
    metrics = {"inference_latency_load": load, "inference_latency_spread": spread}
    assert with_remark("24.8", "inference_latency_ms_batch", metrics) == (f"24.8 ({text})" if text else "24.8")
    assert with_remark("24.8", "final_val_f1", metrics) == "24.8"


def seeds(*latencies: float, **others: float) -> Group:
    metrics = [{"inference_latency_ms_batch": value, **others} for value in latencies]
    return Group(
        "dense", "", tuple(RunRow(str(n), "", "dense", "finished", n, "{}", m) for n, m in enumerate(metrics)), 0
    )


def test_seeds_have_their_median_and_their_range_is_a_spread_too() -> None:
    name = "inference_latency_ms_batch"
    known = {"inference_latency_spread": 0.08, "inference_latency_load": 0.0}
    assert latency_text(seeds(24.8, 25.0, 25.2, **known), name) == "25 (spread 8 %)"
    assert latency_text(seeds(24.8, 93.0, 30.7, **known), name) == "30.7 (unsteady, spread 222 %)"
    assert latency_text(seeds(24.8, 25.0, **known | {"inference_latency_load": 0.5}), name) == "24.9 (busy, spread 8 %)"
    assert latency_text(seeds(24.8, 25.0), name) == "24.9", "runs of earlier versions"
    assert latency_text(seeds(24.8), "measured_latency_ms_batch") == ""
    assert seeds(24.8, 93.0, 30.7).cost(name) == 30.7


def test_the_table_takes_the_measured_latency_if_every_row_has_one(lab: Path, ids: list[str], tmp_path: Path) -> None:
    def latencies() -> tuple[list[str], str]:
        done = goe("analyze", "--dataset_name", "parity", "--output_dir", str(tmp_path))
        with (tmp_path / "parity_summary_table_best_finalvalf1.csv").open(newline="") as file:
            return [row["measured_latency_ms_batch"] for row in csv.DictReader(file)], done.out

    goe("measure", "--run", *ids[:2], "--repetitions", "2", "--store")
    values, out = latencies()
    assert "" in values and "goe measure`" not in out
    goe("measure", "--run", *ids, "--repetitions", "2", "--store")
    values, out = latencies()
    assert "" not in values and "The latency is that of `goe measure`." in out
    goe("measure", "--run", ids[2], "--repetitions", "2", "--batch_size", "3", "--store")
    assert "The latency is that of" not in latencies()[1], "another batch size does not compare"


def test_run_and_runs_show_the_mark(lab: Path, ids: list[str]) -> None:
    shown = goe("runs", "show", ids[0]).out
    (line,) = [line for line in shown.splitlines() if "inference_latency_ms_batch " in line]
    assert "spread" in line
    assert "spread" in goe("runs", "--metrics", "inference_latency_ms_batch").out
    assert json.loads(goe("runs", "--json", "--limit", "1").out)["metrics"].keys() == {
        *("final_val_f1", "param_count", "training_duration_seconds")
    }
