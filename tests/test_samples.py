"""Test scores per sample: the file of a run, intervals over the samples of a test split, and paired tests.

N samples  R runs
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sklearn_metrics
from support import command, run_in, small_config

from research_eval.analysis import samples
from research_eval.analysis.runs import Group
from research_eval.analysis.samples import (
    SampleError,
    SampleTest,
    corrected,
    sample_error,
    sample_test,
    seed_and_sample_interval,
)
from research_eval.analysis.statistics import mcnemar, median_interval, share_interval, wilson_interval
from research_eval.datasets.providers import load_splits
from research_eval.datasets.token_data import Batches
from research_eval.errors import ConfigError
from research_eval.experiment import prepare
from research_eval.files import run_folder
from research_eval.main import cli
from research_eval.runs.predict import predict
from research_eval.store.predictions import TEST_FILE, Predictions, read_predictions, write_predictions
from research_eval.store.records import RunRow
from research_eval.training.evaluate import evaluate


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stored(name: str, labels_N: Any, answers_N: Any, split: str = "one", losses_N: Any = None) -> dict[str, float]:
    """Write the file of a run into its folder; returns the run's test scores."""
    labels_N, answers_N = np.asarray(labels_N), np.asarray(answers_N)
    losses_N = np.linspace(0, 1, len(labels_N)) if losses_N is None else losses_N
    run_folder(name).mkdir(parents=True)
    found = Predictions("classification", split, losses_N, labels_N, answers_N, labels_N == answers_N)
    write_predictions(run_folder(name) / TEST_FILE, found)
    f1 = sklearn_metrics.f1_score(labels_N, answers_N, average="macro", zero_division=0)
    return {"test_f1": f1, "test_acc": float((labels_N == answers_N).mean()), "test_loss": float(losses_N.mean())}


def group(model: str, labels: Any, answers_RN: Any, splits: str | None = None) -> Group:
    """A group with a run per row of answers. Each letter of `splits` is the test split of a run."""
    runs = [
        RunRow(name := f"{model}-{seed}", "", model, "finished", seed, "{}", stored(name, labels, answers_N, split))
        for seed, (answers_N, split) in enumerate(zip(answers_RN, splits or "a" * len(answers_RN), strict=True))
    ]
    return Group(model, "task", tuple(runs), 0)


def flipped(rng: np.random.Generator, labels_N: NDArray[Any], rate: float) -> NDArray[Any]:
    """Answers that are wrong at this rate."""
    return np.where(rng.random(len(labels_N)) < rate, 1 - labels_N, labels_N)


# ------------------------------------------------------------------------------------------------------ closed forms


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_the_interval_of_a_share_is_the_published_one() -> None:
    """Wilson, 81 of 263, as in Newcombe (1998), table I."""
    found = share_interval(81 / 263, 81 / 263 * 182 / 263 / 263, 263)
    assert found == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert share_interval(1.0, 0.0, 50) == wilson_interval(50, 50)
    assert share_interval(0.0, 0.0, 50) == wilson_interval(0, 50)
    assert share_interval(0.5, 0.0, 50) is None, "nothing varies, and yet neither all nor none is right"


@pytest.mark.parametrize("count", [*range(1, 41), 2000])
def test_the_interval_of_the_median_covers_it_exactly(count: int) -> None:
    """The number of values below the median is binomial; the ranks are the widest-apart that still suffice."""
    found = median_interval(range(1, count + 1))
    if found is None:
        assert count < 6
        return
    low, high = found
    assert low + high == count + 1
    coverage = stats.binom.cdf(high - 1, count, 0.5) - stats.binom.cdf(low - 1, count, 0.5)
    narrower = stats.binom.cdf(high - 2, count, 0.5) - stats.binom.cdf(low, count, 0.5)
    assert coverage >= 0.95 > narrower


# ---------------------------------------------------------------------------------------------- intervals over samples


def test_the_accuracy_of_one_run_has_wilsons_interval(here: Path) -> None:
    one = group("dense", [0, 1] * 50, [[0, 1] * 40 + [1, 0] * 10])
    assert sample_error(one, "test_acc", 0.95) == SampleError(pytest.approx(wilson_interval(80, 100)), 100)


def joint(one: Group, metric: str = "test_acc") -> tuple[float, float]:
    found = seed_and_sample_interval(one.runs, metric)
    assert found is not None
    return found


def test_the_joint_interval_is_that_of_the_samples_if_seeds_do_not_differ(here: Path) -> None:
    labels, answers = [0, 1] * 200, [0, 1] * 160 + [1, 0] * 40
    same = group("dense", labels, [answers] * 3)
    assert joint(same) == pytest.approx(wilson_interval(320, 400), abs=0.012)
    expected = sample_error(same, "test_f1", 0.95).interval
    assert joint(same, "test_f1") == pytest.approx(expected, abs=0.006)
    assert seed_and_sample_interval(same.runs[:1], "test_acc") is None
    wrong = [run._replace(metrics={"test_acc": 0.5}) for run in same.runs]
    assert seed_and_sample_interval(wrong, "test_acc") is None, "the answers are of other runs"
    assert seed_and_sample_interval([run._replace(experiment_id="gone") for run in same.runs], "test_acc") is None


def test_the_joint_interval_covers_the_mean_over_seeds_and_samples(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds of 0.8 on average and a deviation of 0.05, 300 samples that they share or not."""
    monkeypatch.setattr(samples, "DRAWS", 400)
    rng, labels_N = np.random.default_rng(3), np.arange(300) % 2
    for splits in ("aaaaa", "abcde"):
        covered, widths = 0, []
        for number in range(60):
            rates = np.clip(rng.normal(0.2, 0.05, 5), 0, 1)
            hard_N = rng.random(300)  # samples that are hard for one seed are hard for the others
            answers = [
                np.where((hard_N if splits == "aaaaa" else rng.random(300)) < rate, 1 - labels_N, labels_N)
                for rate in rates
            ]
            low, high = joint(group(f"{splits}{number}", labels_N, answers, splits))
            covered += low <= 0.8 <= high
            widths.append(high - low)
        assert covered >= 52, (splits, covered)  # 0.95 of 60 is 57; percentiles of five seeds are a little narrow
        assert np.mean(widths) < 0.16


def test_runs_on_the_same_samples_add_no_samples_and_runs_on_their_own_do(here: Path) -> None:
    labels, answers = [0, 1] * 50, [0, 1] * 40 + [1, 0] * 10
    same, own = group("dense", labels, [answers] * 3), group("moe", labels, [answers] * 3, "abc")
    assert sample_error(same, "test_acc", 0.95).interval == pytest.approx(wilson_interval(80, 100))
    assert sample_error(own, "test_acc", 0.95) == SampleError(pytest.approx(wilson_interval(240, 300)), 300)
    apart = group(
        "goe", labels, [[1, 0] * 10 + [0, 1] * 40, answers]
    )  # the errors of the two runs are on other samples
    found = sample_error(apart, "test_acc", 0.95).interval
    assert found is not None
    for share in found:
        weight = 1.959964**2 * (0.4 * 0.5**2 + 0.6 * 1**2 - 0.8**2) / 100 / (0.8 * 0.2)
        assert (share - 0.8) ** 2 == pytest.approx(weight * share * (1 - share), rel=1e-5)
    f1 = {one.model_type: sample_error(one, "test_f1", 0.95).interval for one in (same, own)}
    assert f1["dense"] is not None and f1["moe"] is not None
    widths = [high - low for low, high in (f1["dense"], f1["moe"])]
    assert widths[1] == pytest.approx(widths[0] / math.sqrt(3), rel=0.1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(2, 4), st.integers(1, 3))
def test_a_draw_of_cells_scores_like_the_samples_themselves(seed: int, classes: int, runs: int) -> None:
    """The slow way: the samples are written out, as often as they were drawn, and scikit-learn scores them."""
    rng = np.random.default_rng(seed)
    labels_N, answers_RN = rng.integers(0, classes, 30), rng.integers(0, classes + 1, (runs, 30))
    table = np.unique(np.stack([labels_N, *answers_RN]), axis=1)
    counts_DK = rng.multinomial(3, np.full(table.shape[1], 1 / table.shape[1]), 4)  # few, so that classes are missing
    for row in range(runs):
        fast = samples._macro_f1(table[0], table[row + 1], counts_DK)
        slow = [
            sklearn_metrics.f1_score(
                np.repeat(table[0], counts_K), np.repeat(table[row + 1], counts_K), average="macro", zero_division=0
            )
            for counts_K in counts_DK
        ]
        assert fast == pytest.approx(slow)


def test_the_bootstrap_of_f1_has_the_spread_of_new_test_splits(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 2, 400)
    interval = sample_error(group("dense", labels_N, [flipped(rng, labels_N, 0.2)]), "test_f1", 0.95).interval
    scores = []
    for _ in range(800):
        fresh_N = rng.integers(0, 2, 400)
        scores.append(sklearn_metrics.f1_score(fresh_N, flipped(rng, fresh_N, 0.2), average="macro"))
    assert interval is not None
    assert interval.high - interval.low == pytest.approx(np.ptp(np.percentile(scores, [2.5, 97.5])), rel=0.15)


def test_a_run_without_an_error_has_a_bound_for_accuracy_and_none_for_f1(here: Path) -> None:
    one = group("dense", [0, 1] * 50, [[0, 1] * 50])
    assert sample_error(one, "test_acc", 0.95).interval == pytest.approx(wilson_interval(100, 100))
    assert sample_error(one, "test_f1", 0.95) == SampleError(None, 100)


def test_the_loss_has_a_normal_interval_and_other_scores_have_none(here: Path) -> None:
    one = group("dense", [0, 1] * 50, [[0, 1] * 50])
    half = 1.959964 * np.linspace(0, 1, 100).std() / 10
    assert sample_error(one, "test_loss", 0.95).interval == pytest.approx((0.5 - half, 0.5 + half))
    assert sample_error(one, "test_rmse", 0.95) == SampleError()


# ------------------------------------------------------------------------------------------------------- paired tests


def test_one_run_on_each_side_is_compared_by_mcnemar(here: Path) -> None:
    labels = [0] * 50 + [1] * 50
    better, worse = labels.copy(), labels.copy()
    better[:2], worse[1:11] = [1, 1], [1] * 10  # sample 0: only `worse` is right; 2 to 10: only `better`
    found = sample_test(group("moe", labels, [better]), group("dense", labels, [worse]), [0], "test_acc", 0.95)
    assert (found.method, found.only_first, found.only_second) == ("McNemar", 9, 1)
    assert found.p_value == pytest.approx(stats.binomtest(1, 10).pvalue)
    assert found.difference == pytest.approx(0.08) and found.num_samples == 100
    half = 1.96 * math.sqrt(0.1 - 0.08**2) / 10  # the normal interval of a paired difference
    assert found.interval == pytest.approx((0.08 - half, 0.08 + half), abs=0.012)


def test_several_seeds_are_compared_by_the_paired_bootstrap(here: Path) -> None:
    rng = np.random.default_rng(1)
    labels_N = rng.integers(0, 2, 300)
    hard_N = rng.random(300) < 0.3  # both models fail on these: pairs cancel what they share
    both = [np.where(hard_N, 1 - labels_N, flipped(rng, labels_N, rate)) for rate in (0.02, 0.02, 0.1, 0.1)]
    first, second = group("goe", labels_N, both[:2]), group("dense", labels_N, both[2:])
    found = sample_test(first, second, [0, 1], "test_f1", 0.95)
    back = sample_test(second, first, [0, 1], "test_f1", 0.95)
    assert found.method == "bootstrap" and found.only_first is None
    assert found.interval is not None and found.p_value is not None and back.interval is not None
    assert 0 < found.interval.low < found.difference < found.interval.high
    assert found.p_value < 0.05
    assert back.difference == pytest.approx(-found.difference)
    assert back.interval == pytest.approx((-found.interval.high, -found.interval.low), abs=0.01)
    alone = [sample_error(one, "test_f1", 0.95).interval for one in (first, second)]
    unpaired = math.hypot(*(one.high - one.low for one in alone if one is not None))
    assert found.interval.high - found.interval.low < 0.7 * unpaired
    equal = sample_test(first, group("again", labels_N, both[:2]), [0, 1], "test_f1", 0.95)
    assert (equal.difference, equal.interval, equal.p_value) == (0, None, None), "no sample tells them apart"


def test_runs_with_other_samples_are_not_compared(here: Path) -> None:
    labels = [0, 1] * 20
    first, second = group("moe", labels, [labels], "a"), group("dense", labels, [labels], "b")
    found = sample_test(first, second, [0], "test_acc", 0.95)
    assert found.difference is None and "other test samples" in found.reason
    third = group("goe", labels[::-1], [labels], "a")
    assert sample_test(first, third, [0], "test_acc", 0.95).difference is None, "the hash is right, the labels are not"


def test_the_correction_covers_the_tests_that_there_are() -> None:
    tests = corrected([SampleTest(p_value=0.01), SampleTest(reason="no file"), SampleTest(p_value=0.04)])
    assert [one.adjusted_p for one in tests] == [0.02, None, 0.04]


# ---------------------------------------------------------------------------------------------- file and command


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of two models, trained and tested."""
    folder = tmp_path_factory.mktemp("lab")
    for model in ("dense", "moe"):
        for seed in range(3):
            run_in(folder, small_config(model_type=model, seed=seed, training_params={"test": True}))
    return folder


def runs_of(folder: Path, model: str) -> list[Path]:
    return [
        path
        for path in sorted((folder / "runs").iterdir())
        if path.name != "pending" and json.loads((path / "config.json").read_text())["model_type"] == model
    ]


@pytest.fixture
def copied(lab: Path, here: Path) -> Path:
    shutil.copytree(lab, here, dirs_exist_ok=True)
    return here


def test_the_file_has_the_answers_of_the_stored_weights_in_the_order_of_the_split(here: Path) -> None:
    """Evaluation sorts these samples by length."""
    config = small_config(dataset_name="majority", dataset_params={"num_samples": 100}, training_params={"test": True})
    name = run_in(here, config).experiment_id
    found, longer = read_predictions(name), read_predictions(name, "predictions_test_len_200.parquet")
    data = load_splits(config.dataset_type, config.dataset_name, config.dataset_params, config.seed)
    assert data.test is not None and found is not None
    assert found.labels_N is not None and found.predictions_N is not None and found.correct_N is not None
    assert found.split_sha256 == data.fingerprint["sha256"]["test"] == data.test.sha256()
    assert found.labels_N.tolist() == data.test.labels.tolist()
    texts = [" ".join(map(str, data.test.sample(index))) for index in range(len(data.test))]
    again = predict(name, texts, db="experiment_results.db", device="cpu")
    assert found.predictions_N.tolist() == [int(np.argmax(one.probabilities)) for one in again]
    likely = [one.probabilities[label] for one, label in zip(again, found.labels_N, strict=True)]
    assert found.losses_N == pytest.approx(-np.log(likely), rel=1e-4)
    assert found.correct_N.tolist() == (found.labels_N == found.predictions_N).tolist()
    assert longer is not None and longer.split_sha256 == data.further_tests["len_200"].sha256()


def test_without_a_test_there_is_no_file(here: Path) -> None:
    result = run_in(here, small_config())
    assert result.status == "finished" and read_predictions(result.experiment_id) is None


def test_a_full_disk_costs_the_file_and_not_the_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "predictions_test.parquet")

    monkeypatch.setattr("research_eval.runs.scores.write_predictions", fail)
    result = run_in(here, small_config(training_params={"test": True}))
    assert result.status == "finished" and "test_f1" in result.metrics
    assert "No space left on device" in caplog.text


def analyzed(*words: str) -> tuple[str, list[dict[str, str]], list[dict[str, str]]]:
    done = command(
        cli,
        "analyze",
        "--dataset_name",
        "parity",
        *words,
        "--output_dir",
        "out",
        "--run_summary_table",
        "--run_comparison",
    )
    assert done.code == 0, done.err
    tables = []
    for file in ("summary_table_best_finalvalf1", "comparison"):
        with Path(f"out/parity_{file}.csv").open(newline="") as lines:
            tables.append(list(csv.DictReader(lines)))
    return done.out, tables[0], tables[1]


def test_analyze_shows_both_intervals_and_the_paired_test(copied: Path) -> None:
    out, rows, pairs = analyzed()
    assert out.count("95 % over samples") == 2, "in both tables"
    assert "95 % over seeds" in out and "p (samples)" in out
    for row in rows:
        assert row["num_test_samples"] == "60", "three seeds with 20 samples of their own"
        assert float(row["test_f1_samples_low"]) < float(row["test_f1"]) < float(row["test_f1_samples_high"])
    (pair,) = pairs
    assert (pair["sample_test"], pair["num_test_samples"]) == ("bootstrap", "60")
    assert 0 < float(pair["p_value_samples"]) <= float(pair["p_value_samples_holm"]) <= 1
    assert analyzed() == (out, rows, pairs), "the draws are seeded"


def test_a_folder_that_is_gone_is_one_line_and_no_error(copied: Path) -> None:
    gone = runs_of(copied, "moe")[1]
    shutil.rmtree(gone)
    out, rows, pairs = analyzed()
    lines = [line for line in out.splitlines() if gone.name in line]
    assert len(lines) == 2 and all("moved or deleted" in line for line in lines), "one in each table"
    assert [bool(row["test_f1_samples_low"]) for row in rows] == [True, False]
    assert pairs[0]["sample_test"] == ""
    assert float(pairs[0]["test_difference"]) == pytest.approx(float(rows[0]["test_f1"]) - float(rows[1]["test_f1"]))


def damages(path: Path) -> dict[str, Any]:
    """What may be wrong with a file, and a word of the message."""
    table = pq.read_table(path)
    described = table.schema.metadata

    def rewritten(changed: pa.Table) -> Any:
        return lambda: pq.write_table(changed.replace_schema_metadata(described), path)

    texts = pa.array(["x"] * len(table))
    return {
        "not the predictions": lambda: path.write_bytes(b"PAR1 no"),
        "holds no numbers": rewritten(table.set_column(1, "prediction", texts)),
        "not the predictions of a run": lambda: pq.write_table(table.replace_schema_metadata({}), path),
        "is not of this run": rewritten(table.set_column(1, "prediction", pa.array([7] * len(table)))),
        "symbolic link": lambda: (path.rename(path.with_name("x")), path.symlink_to("x")),
        "no classes": rewritten(table.drop_columns(["label"])),
    }


@pytest.mark.parametrize(
    "word", ["not the predictions", "holds no numbers", "is not of this run", "symbolic link", "no classes"]
)
def test_a_file_that_is_damaged_or_foreign_is_one_line_and_no_error(word: str, copied: Path) -> None:
    path = runs_of(copied, "dense")[0] / TEST_FILE
    damages(path)[word]()
    out, rows, _ = analyzed()
    assert sum(word in line for line in out.splitlines()) == 2
    assert [bool(row["test_f1_samples_low"]) for row in rows] == [False, True]


def test_a_file_without_its_description_is_refused(copied: Path) -> None:
    path = runs_of(copied, "dense")[0] / TEST_FILE
    damages(path)["not the predictions of a run"]()
    with pytest.raises(ConfigError, match=r"predictions_test\.parquet: not the predictions of a run"):
        read_predictions(path.parent.name)


def test_an_evaluation_keeps_the_answers_in_its_order() -> None:
    config = small_config()
    runtime, data, model = prepare(config)
    found = evaluate(model, Batches(data.validation, 7), data.num_classes, runtime)
    assert found.answers_N is not None and found.targets_N is not None
    assert found.targets_N.tolist() == data.validation.labels[found.rows_N].tolist()
    assert float((found.answers_N == found.targets_N).mean()) == found.accuracy
