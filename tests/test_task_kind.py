"""A task without classes: every command chooses, draws and prints by its own score, and nothing asks for F1."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from numpy.typing import NDArray
from support import Ended, command, run_in, small_config, write_config

from research_eval.analysis import points
from research_eval.analysis.runs import load_results
from research_eval.analysis.summary import Options
from research_eval.cli.run import score_formats
from research_eval.cli.tune import study_options
from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset
from research_eval.datasets.token_data import DataSplits
from research_eval.db_utils import DB_FILE, HistoryRow, Store
from research_eval.errors import ConfigError
from research_eval.main import cli
from research_eval.registry import SYNTHETIC_DATASETS, TASKS
from research_eval.runs.predict import Prediction, predict, read_description
from research_eval.store.find import default_metric_of
from research_eval.store.metrics import check_spelling, default_metric, direction, score_of_epoch
from research_eval.studies.pruning import PruningCallback, dominated, standing
from research_eval.tasks.base import Evaluation, Task, mean_loss
from research_eval.training.state import Pruned


class Share(Task):
    name = "share"
    selected_by = "rmse"

    def num_outputs(self, data: DataSplits) -> int:
        return 1

    def loss_per_sample(self, outputs_BO: Any, targets_B: Any, label_smoothing: float = 0.0) -> torch.Tensor:
        loss_B: torch.Tensor = (outputs_BO.squeeze(1) - targets_B).square()
        return loss_B

    def evaluation(
        self, answers_N: Any, targets_N: Any, losses_N: Any, rows_N: NDArray[Any], num_outputs: int
    ) -> Evaluation:
        errors_N = answers_N.squeeze(1) - targets_N
        scores = {"mae": float(errors_N.abs().mean()), "rmse": float(errors_N.square().mean().sqrt())}
        return Evaluation(mean_loss(losses_N), scores, rows_N=rows_N, losses_N=losses_N.numpy())


class ShareOfOnes(SequenceBaseDataset):
    task = "share"

    def __init__(self, *, num_samples: int = 100, seq_len: int = 7) -> None:
        super().__init__(num_samples, seq_len, vocab_size=3)

    def _generate_data(self) -> None:
        ids_NL = self.rng.integers(1, 4, (self.num_samples, self.seq_len))
        self.samples = ArraySamples(ids_NL, (ids_NL == 1).mean(1))


class Labelled(ShareOfOnes):
    """The same with three classes, for the task of classification."""

    task = "classification"

    def _generate_data(self) -> None:
        ids_NL = self.rng.integers(1, 4, (self.num_samples, self.seq_len))
        self.samples = ArraySamples(ids_NL, ids_NL[:, 0] - 1)
        self.labels_list = [0, 1, 2]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    TASKS["share"] = Share
    SYNTHETIC_DATASETS["share_of_ones"], SYNTHETIC_DATASETS["labelled"] = ShareOfOnes, Labelled
    yield
    del TASKS["share"], SYNTHETIC_DATASETS["share_of_ones"], SYNTHETIC_DATASETS["labelled"]


def settings(**changes: Any) -> dict[str, Any]:
    return {"dataset_name": "share_of_ones", "dataset_params": {}, "training_params": {"test": True}} | changes


@pytest.fixture(scope="module", name="place")
def _place(_registered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three trained regressions: two seeds of one config, and a routed model."""
    folder = tmp_path_factory.mktemp("share")
    for seed in (0, 1):
        run_in(folder, small_config(**settings(seed=seed)))
    small = {"embed_dim": 8, "num_heads": 2, "num_total_experts": 3}
    run_in(folder, small_config(**settings(model_type="goe_original", model_params=small)))
    return folder


@pytest.fixture
def at_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def goe(*words: str) -> Ended:
    ended = command(cli, *words, "--db", DB_FILE)
    assert ended.code == 0, ended.err
    return ended


def first_run(model_type: str = "dense") -> str:
    with Store(DB_FILE, read_only=True) as store:
        rows = [row for row in store.experiments() if row["model_type"] == model_type]
    return str(rows[0]["experiment_id"])


# --------------------------------------------------------------------------------------------- what a name means


@pytest.mark.parametrize(
    ("way", "names"),
    [
        (
            "minimize",
            "final_val_rmse test_mse val_mae best_val_word_error_across_epochs edit_distance test_perplexity "
            "final_val_nats val_bits_per_byte final_val_loss validation_gap param_count",
        ),
        ("maximize", "final_val_f1 test_maestro errors_corrected_share rebits_x final_val_auc samples_per_second"),
    ],
)
def test_the_direction_of_a_score_follows_from_the_words_of_its_name(way: str, names: str) -> None:
    assert {name: direction(name) for name in names.split()} == dict.fromkeys(names.split(), way)


def test_a_metric_of_the_end_belongs_to_a_series_of_the_epochs() -> None:
    assert {name: score_of_epoch(name) for name in ("final_val_rmse", "final_val_loss", "final_val_f1")} == {
        "final_val_rmse": "val_rmse",
        "final_val_loss": "val_loss",
        "final_val_f1": "val_f1",
    }
    assert score_of_epoch("best_val_word_error_across_epochs") == "val_word_error"
    for name in ("param_count", "test_rmse", "final_val_", "best_val_f1", "my_final_val_f1"):
        assert score_of_epoch(name) is None


def test_the_default_metric_is_f1_or_the_score_that_the_task_selects_by() -> None:
    assert default_metric([]) == "final_val_f1"
    assert default_metric(["param_count"]) == "final_val_f1"
    rmse = ["best_val_rmse_across_epochs", "final_val_loss", "final_val_mae", "final_val_rmse"]
    assert default_metric(rmse) == "final_val_rmse"
    assert default_metric([*rmse, "final_val_f1"]) == "final_val_f1"
    assert default_metric(rmse[::-1]) == "final_val_rmse"
    assert default_metric(["best_val_a_across_epochs", "best_val_b_across_epochs"]) == "final_val_a"


def test_the_default_metric_is_that_of_the_runs_on_the_dataset(place: Path, tmp_path: Path) -> None:
    with Store(str(place / DB_FILE), read_only=True) as store:
        assert default_metric_of(store) == default_metric_of(store, "share_of_ones") == "final_val_rmse"
        assert default_metric_of(store, "unknown") == "final_val_f1"
        assert {"final_val_mae", "test_rmse"} <= set(store.metric_names("share_of_ones"))
        assert store.metric_names("unknown") == []
        assert store.has_metric("final_val_mae", "share_of_ones") and not store.has_metric("final_val_mae", "unknown")
    run_in(tmp_path, small_config(dataset_name="labelled", dataset_params={}, epochs=1))
    run_in(tmp_path, small_config(**settings(epochs=1)))
    with Store(str(tmp_path / DB_FILE), read_only=True) as store:
        assert default_metric_of(store, "share_of_ones") == "final_val_rmse"
        assert default_metric_of(store, "labelled") == default_metric_of(store) == "final_val_f1"


def test_an_objective_may_look_like_a_score_that_other_tasks_have() -> None:
    for name in ("final_val_acb", "final_val_mae", "final_val_rmse", "best_val_rmse_across_epochs", "my_cost"):
        check_spelling(name, "--objectives", "rmse")
    mistakes = {("final_val_acb", "f1"): "final_val_acc", ("final_val_rmsee", "rmse"): "final_val_rmse"}
    mistakes[("param_cuont", "rmse")] = "param_count"
    for (name, selected_by), near in mistakes.items():
        with pytest.raises(ConfigError, match=f"Did you mean '{near}'"):
            check_spelling(name, "--objectives", selected_by)


# ------------------------------------------------------------------------------------------------------ run, predict


def test_a_run_prints_all_scores_of_its_task(at_place: Path) -> None:
    ended = command(cli, "run", "--json_config_path", write_config(at_place, **settings(seed=7)), "--db", "other.db")
    lines = [line.split()[0] for line in ended.out.splitlines()[1:6]]
    assert lines == ["final_val_mae", "final_val_rmse", "final_val_loss", "test_mae", "test_rmse"]
    assert "_f1" not in ended.out and "_acc" not in ended.out


def test_a_classification_prints_f1_accuracy_and_loss() -> None:
    metrics = {"final_val_loss": 1.0, "final_val_acc": 0.5, "final_val_f1": 0.5, "test_acc": 0.5, "final_val_x": 1.0}
    assert list(score_formats(metrics)) == ["final_val_f1", "final_val_acc", "final_val_loss", "test_f1"]


@pytest.mark.parametrize("model_type", ["dense", "goe_original"])
def test_predictions_of_a_task_without_classes_are_its_outputs(model_type: str, at_place: Path) -> None:
    texts = ["1 1 1 1 1 1 1", "2 3"]
    run_id = first_run(model_type)
    found = predict(run_id, texts, device="cpu", db=DB_FILE)
    assert [len(one.values) for one in found] == [1, 1]
    assert all(one.probabilities == [] and one.label_names == [] for one in found)
    assert found[0].values != found[1].values
    assert (found[0].path is None) == (model_type == "dense")
    with pytest.raises(ValueError, match="no likeliest class"):
        _ = found[0].label
    printed = goe("predict", "--run", run_id, "--text", texts[0], "--device", "cpu").out.splitlines()
    assert printed[:2] == [texts[0], f"  {found[0].values[0]:.6g}"]


def test_a_prediction_prints_classes_or_values() -> None:
    assert str(Prediction("a", ["x", "y"], [0.25, 0.75], [1])) == "a\n  y 0.7500  x 0.2500\n  path: start -> 1 -> stop"
    assert str(Prediction("a", [], [], None, [0.125, -1234567.0])) == "a\n  0.125  -1.23457e+06"


def test_data_json_names_the_task_unless_it_is_classification(place: Path, tmp_path: Path) -> None:
    (folder, *_) = sorted((place / "runs").iterdir())
    stored = json.loads((folder / "data.json").read_text())
    assert (stored["task"], stored["num_classes"], stored["label_names"]) == ("share", 1, [])
    result = run_in(tmp_path, small_config(dataset_name="labelled", dataset_params={}, epochs=1))
    path = tmp_path / result.folder / "data.json"
    stored = json.loads(path.read_text())
    assert "task" not in stored
    assert read_description(path.parent)["task"] == "classification"
    wrong = {
        "numbers do not go together": {"label_names": []},
        r"data\.json: task: unknown 'shares'\. Did you mean 'share'\?": {"task": "shares"},
        "task: Input should be a valid string": {"task": 1},
    }
    for message, changes in wrong.items():
        path.write_text(json.dumps(stored | changes))
        with pytest.raises(ConfigError, match=message):
            read_description(path.parent)
    path.write_text(json.dumps(stored | {"label_names": [], "task": "share"}))
    assert read_description(path.parent)["task"] == "share"


def test_a_dry_run_speaks_of_outputs_or_of_classes(tmp_path: Path) -> None:
    ended = command(cli, "run", "--dry_run", "--json_config_path", write_config(tmp_path, **settings()))
    assert re.search(r"^vocabulary, outputs +4 rows with padding, 1$", ended.out, re.MULTILINE)
    assert re.search(r"^task +share$", ended.out, re.MULTILINE)
    assert "[16, 7] ids -> [16, 1] outputs" in ended.out
    ended = command(cli, "run", "--dry_run", "--json_config_path", write_config(tmp_path, dataset_name="parity"))
    assert re.search(r"^vocabulary, classes +3 rows with padding, 2 \(0, 1\)$", ended.out, re.MULTILINE)
    assert "-> [16, 2] logits" in ended.out
    assert not re.search("^task", ended.out, re.MULTILINE)


# -------------------------------------------------------------------------------------- lists, suggestions, analysis


def test_lists_show_the_score_of_the_runs(at_place: Path) -> None:
    header = goe("runs").out.splitlines()[0].split()
    assert header[7:10] == ["final_val_rmse", "param_count", "seconds"]
    assert goe("runs", "--dataset_name", "share_of_ones", "--metrics", "test_mae").out.split()[7] == "test_mae"


def test_suggestions_start_from_the_smallest_error(at_place: Path) -> None:
    ended = goe(
        "suggest", "--dataset_name", "share_of_ones", "--model_type", "dense", "--num_variations_per_config", "1"
    )
    assert re.search(r"from run \S+ \(final_val_rmse [\d.]+, mean of 2 seeds\)", ended.out)


def test_the_analysis_and_its_report_show_the_score(at_place: Path) -> None:
    ended = goe("analyze", "--dataset_name", "share_of_ones", "--run_all", "--output_dir", "out")
    assert "by the lowest mean of final_val_rmse" in ended.out
    assert "test_rmse" in ended.out
    made = {path.name.removeprefix("share_of_ones_") for path in Path("out").iterdir()}
    assert {"rmse_vs_params.png", "rmse_vs_latency.svg", "rmse_vs_flops.png", "learning_curves.png"} <= made
    assert "summary_table_best_finalvalrmse.csv" in made
    page = Path("out/share_of_ones_report.html").read_text()
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert data["score"] == "rmse on validation (final_val_rmse)"
    assert data["series"] == {"val_rmse": "rmse on validation", "val_loss": "loss on validation"}
    (task,) = data["tasks"]
    assert [len(task["curves"][series]) for series in data["series"]] == [2, 2]
    assert all("<br>rmse " in text for text in task["scatter"]["hover"].values())
    body = re.sub(r"base64,[\w+/=]+", "", page.partition("<script>")[0])
    assert "F1" not in body and "_f1" not in body


def test_a_metric_that_the_user_names_wins_over_the_default(at_place: Path) -> None:
    metric = ("--metric_to_optimize", "final_val_loss")
    ended = goe(
        "analyze", "--dataset_name", "share_of_ones", *metric, "--run_f1_vs_params_plot", "--output_dir", "loss"
    )
    assert "loss_vs_params.png" in ended.err
    ended = goe("analyze", "--dataset_name", "share_of_ones", *metric, "--output_dir", "loss")
    assert "test_loss" in ended.out
    metric = ("--metric_to_optimize", "param_count")
    ended = goe("analyze", "--dataset_name", "share_of_ones", *metric, "--output_dir", "loss")
    assert "test_rmse" in ended.out


@pytest.mark.parametrize(
    ("metric", "default", "test_metric"),
    [
        ("final_val_f1", "final_val_f1", "test_f1"),
        ("final_val_acc", "final_val_f1", "test_acc"),
        ("final_val_loss", "final_val_f1", "test_loss"),
        ("best_val_f1_across_epochs", "final_val_f1", "test_f1"),
        ("param_count", "final_val_f1", "test_f1"),
        ("final_val_rmse", "final_val_rmse", "test_rmse"),
        ("param_count", "final_val_rmse", "test_rmse"),
    ],
)
def test_the_test_score_beside_a_metric(metric: str, default: str, test_metric: str) -> None:
    assert Options(metric, 0.95, 0.99, default).test_metric == test_metric


def stored_errors(folder: Path, *configs: tuple[float, float], name: str = "final_val_rmse") -> Store:
    """A store with one run for each pair of score and number of parameters."""
    store = Store(str(folder / "errors.db"))
    for number, (score, size) in enumerate(configs):
        config = small_config(optimizer_params={"lr": 0.001 * (number + 1)}).to_dict()
        columns = {key: config[key] for key in ("model_type", "dataset_name", "dataset_type", "epochs", "batch_size")}
        run_id = f"run-{number}"
        store.start_experiment(
            **columns,
            experiment_id=run_id,
            run_type="json",
            experiment_name="errors",
            seed=0,
            config=config,
            environment={},
        )
        store.add_history(run_id, [HistoryRow(1, 1.0, "val_rmse", score)])
        store.finish_experiment(run_id, {name: score, "param_count": size})
    return store


def test_smaller_errors_are_on_the_pareto_front(tmp_path: Path) -> None:
    with stored_errors(tmp_path, (0.5, 10.0), (0.9, 20.0), (0.2, 30.0), (0.5, 40.0)) as store:
        results = load_results(store, "parity", ["final_val_rmse", "param_count", "final_val_f1"])
    score = points.Score.of(results, "final_val_rmse")
    (task,) = results.tasks
    found = points.points_of(results, task, "param_count", score, 0.95)
    assert [(point.score, point.on_front) for point in found] == [(0.5, True), (0.9, False), (0.2, True), (0.5, False)]


@pytest.mark.parametrize(
    ("metric", "name", "axis", "series"),
    [
        ("final_val_f1", "F1", "macro-F1 on validation (final_val_f1)", ["val_f1", "val_loss"]),
        ("final_val_rmse", "rmse", "rmse on validation (final_val_rmse)", ["val_rmse", "val_loss"]),
        ("final_val_loss", "loss", "loss on validation (final_val_loss)", ["val_loss"]),
        (
            "best_val_rmse_across_epochs",
            "rmse",
            "best rmse on validation (best_val_rmse_across_epochs)",
            ["val_rmse", "val_loss"],
        ),
        ("router_entropy", "router_entropy", "router_entropy", ["val_loss"]),
    ],
)
def test_what_the_pictures_show(metric: str, name: str, axis: str, series: list[str], tmp_path: Path) -> None:
    with stored_errors(tmp_path, (0.5, 10.0), name=metric) as store:
        score = points.Score.of(load_results(store, "parity", [metric]), metric)
    assert (score.name, score.axis, list(score.curves)) == (name, axis, series)


def test_the_pictures_of_a_classification_show_f1_whatever_chooses(tmp_path: Path) -> None:
    with stored_errors(tmp_path, (0.5, 10.0), name="final_val_f1") as store:
        results = load_results(store, "parity", ["final_val_f1", "param_count"])
    assert points.Score.of(results, "param_count").metric == "final_val_f1"


# ------------------------------------------------------------------------------------------------------------ studies


def test_a_study_optimises_the_score_of_the_task(at_place: Path) -> None:
    space = Path("space.json")
    space.write_text(json.dumps({"model_params": {"embed_dim": 8, "num_heads": 2}}))
    flags = ("--dataset_name", "share_of_ones", "--model_types", "dense", "--n_trials", "3", "--epochs", "2")
    ended = goe("tune", *flags, "--storage", "s.db", "--study_name", "s", "--search_space", str(space), "--quiet")
    study = optuna.load_study(study_name="s", storage="sqlite:///s.db")
    assert [one.name for one in study.directions] == ["MINIMIZE"]
    values = [trial.value for trial in study.trials if trial.value is not None]
    assert f"best final_val_rmse {min(values):.6g}" in ended.out
    assert [set(trial.intermediate_values) for trial in study.trials] == [{1, 2}] * 3


def options_of(name: str, **more: Any) -> Any:
    return study_options(SimpleNamespace(dataset_name=name, model_types=["dense"], **more))  # type: ignore[arg-type]


def test_the_default_objective_is_that_of_the_data() -> None:
    assert options_of("share_of_ones").objectives == ("final_val_rmse",)
    assert options_of("labelled").objectives == options_of("parity").objectives == ("final_val_f1",)
    assert options_of("share_of_ones", objectives="final_val_mae").objectives == ("final_val_mae",)
    with pytest.raises(ConfigError, match=r"expected 'synthetic' or 'real_world'.*Did you mean 'synthetic'\?"):
        options_of("parity", dataset_type="syntetic")


class FakeTrial:
    """A trial that remembers what it was told, and that its pruner would stop."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {"experiment_ids": ["a"]}
        self.reported: list[tuple[int, float]] = []

    def set_attribute(self, name: str, value: Any) -> None:
        self.attributes[name] = value

    def report(self, epoch: int, value: float) -> None:
        self.reported.append((epoch, value))

    def should_stop(self) -> bool:
        return True


def test_a_trial_is_pruned_by_the_curve_of_its_objective() -> None:
    config = small_config(epochs=3)
    for objective in ("final_val_rmse", "best_val_rmse_across_epochs"):
        trial = FakeTrial()
        callback = PruningCallback(trial, options_of("share_of_ones", objectives=objective), config, judges=True)  # type: ignore[arg-type]
        with pytest.raises(Pruned, match=r"after epoch 1: val_rmse 0\.5000"):
            callback.epoch_end(1, {"val_loss": 0.25, "val_rmse": 0.5})
        assert trial.reported == [(1, 0.5)]
    for objective in ("param_count", "final_val_mae"):  # without a curve, or with one that this epoch does not have
        trial = FakeTrial()
        callback = PruningCallback(trial, options_of("share_of_ones", objectives=objective), config, judges=True)  # type: ignore[arg-type]
        callback.epoch_end(1, {"val_loss": 0.25, "val_rmse": 0.5})
        assert trial.reported == []


def test_a_larger_error_is_dominated() -> None:
    names = ("final_val_rmse", "param_count")
    own, other = (standing(names, {"final_val_rmse": {"1": rmse}}, {"param_count": 9.0}, 1) for rmse in (0.5, 0.4))
    assert dominated(own, [other] * 3)
    assert not dominated(other, [own] * 3)
