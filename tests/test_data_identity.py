"""A run's identity is its config and its data: runs on other data are never taken for runs on the present ones.

The data are a small CSV file whose labels are "repaired" between runs, or a generator that changes.
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Ended, command, results, small_config, stop_at
from test_db_utils import db  # noqa: F401 - a fixture
from tokenizers import Regex, normalizers, pre_tokenizers

from research_eval.analysis.runs import load_results
from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset
from research_eval.datasets.providers import load_splits
from research_eval.datasets.synthetic import synthetic_splits
from research_eval.datasets.text import LINE_BREAK
from research_eval.db_utils import Store
from research_eval.errors import ConfigError
from research_eval.experiment import run
from research_eval.main import cli, main
from research_eval.registry import SYNTHETIC_DATASETS
from research_eval.schema import ExperimentConfig
from research_eval.studies import replay
from research_eval.studies.suggestion import Request, suggest

ROWS = 60


def write_reviews(folder: Path, *, swapped: bool = False, rows: int = ROWS) -> None:
    labels = ["pos", "neg"] if swapped else ["neg", "pos"]
    lines = [f"{('dull plot', 'fine acting')[i % 2]} number {i},{labels[i % 2]}" for i in range(rows)]
    folder.mkdir(exist_ok=True)
    (folder / "train.csv").write_text("\n".join(["text,label", *lines]) + "\n")


def reviews_config(**changes: Any) -> ExperimentConfig:
    params = {"data_dir": "data", "min_frequency": 1, "max_length": 8}
    text = {"dataset_type": "real_world", "dataset_name": "reviews", "epochs": 1}
    return small_config(**text | {"dataset_params": params, "experiment_name": "mine"} | changes)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None) -> Path:
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path / "data")
    return tmp_path


def saved(config: ExperimentConfig) -> Path:
    Path("c.json").write_text(json.dumps(config.to_dict()))
    return Path("c.json")


def run_main(config: ExperimentConfig, *flags: str) -> Ended:
    ended = command(main, "--json_config_path", saved(config), "--quiet", *flags)
    assert ended.code == 0, ended.err
    return ended


def ids() -> list[str]:
    with results(Path()) as store:
        return [row["experiment_id"] for row in store.experiments()]


def forget(*run_ids: str) -> None:
    """Make the data of runs unknown, as in a database of an earlier program."""
    with sqlite3.connect("experiment_results.db") as connection:
        connection.executemany("UPDATE experiments SET data_sha256 = NULL WHERE experiment_id = ?", zip(run_ids))
    connection.close()


# ------------------------------------------------------------------------------------------------------ --resume


def test_a_finished_run_on_other_data_is_not_the_result_of_the_present_ones(folder: Path) -> None:
    run_main(reviews_config())
    write_reviews(folder / "data", swapped=True)
    ended = run_main(reviews_config(), "--resume")
    first, second = ids()
    assert f"run {first} of this config is finished, but its data were other ones" in ended.err
    assert second in ended.out and first not in ended.out
    again = run_main(reviews_config(), "--resume")
    assert second in again.out and again.err == ""
    write_reviews(folder / "data")  # the old file comes back, and with it the old run, though a newer one exists
    back = run_main(reviews_config(), "--resume")
    assert first in back.out and len(ids()) == 2


def test_every_seed_asks_for_its_data(folder: Path) -> None:
    run_main(reviews_config(), "--seeds", "0-1")
    write_reviews(folder / "data", rows=ROWS + 2)
    run_main(reviews_config(), "--seeds", "0-2", "--resume")
    assert len(ids()) == 5


def test_a_finished_run_whose_data_are_gone_is_still_known(folder: Path) -> None:
    run_main(reviews_config())
    shutil.rmtree(folder / "data")
    ended = run_main(reviews_config(), "--resume")
    assert "its data cannot be compared with the present ones" in ended.err
    assert len(ids()) == 1 and ids()[0] in ended.out


def test_a_moved_folder_is_the_same_data(folder: Path) -> None:
    run_main(reviews_config())
    shutil.move("data", "moved")
    run_main(reviews_config(dataset_params={"data_dir": "moved", "min_frequency": 1, "max_length": 8}, seed=1))
    with results(folder) as store:
        assert len({row["data_sha256"] for row in store.experiments()}) == 1
        (group,) = load_results(store, "reviews").groups
    assert len(group.runs) == 2


def test_equal_data_in_another_place_are_one_experiment(folder: Path) -> None:
    """For suggestions and for a warm start; the place is a part of the config only."""
    assert tune("--n_trials", "2").code == 0
    shutil.copytree("data", "copy")
    ended = tune("--n_trials", "1", "--study_name", "t", "--warm_start", "--data_dir", "./copy")
    assert "2 past runs fit the search space" in ended.err
    with Store() as store:
        params = [{"data_dir": place, "min_frequency": 1, "max_length": 8} for place in ("data", "copy", "far/away")]
        for seed, own in enumerate(params):
            enter(store, f"run{seed}", reviews_config(dataset_params=own, seed=seed).to_dict(), 0.9, "a" * 64)
        (one, *_) = suggest(store, Request("reviews", "dense", top_n=1))
    assert "mean of 3 seeds" in one.source


def test_a_mix_whose_sources_have_moved_is_the_same_data(folder: Path) -> None:
    write_reviews(folder / "films")
    write_reviews(folder / "books", rows=ROWS + 4)
    (folder / "moved").mkdir()
    for seed, place in enumerate((".", "moved")):
        sources = [f"{place}/films", f"{place}/books"]
        run_main(reviews_config(dataset_params={"sources": sources, "min_frequency": 1}, seed=seed))
        if place == ".":
            shutil.copytree("films", "moved/films")
            shutil.copytree("books", "moved/books")
    with results(folder) as store:
        assert [len(group.runs) for group in load_results(store, "reviews").groups] == [2]


# ------------------------------------------------------------------------------------------------------ groups


def two_versions(folder: Path) -> tuple[list[str], list[str]]:
    """The ids of two runs on the old data and of three on the new ones."""
    run_main(reviews_config(), "--seeds", "0-1")
    old = ids()
    write_reviews(folder / "data", swapped=True)
    run_main(reviews_config(), "--seeds", "2-4")
    return old, [name for name in ids() if name not in old]


def test_seeds_on_two_versions_of_a_file_share_no_mean(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = two_versions(folder)
    with results(folder) as store:
        hashes = {row["data_sha256"][:8] for row in store.experiments()}
        found = load_results(store, "reviews", ["final_val_f1"])
    groups = [sorted(run.experiment_id for run in group.runs) for group in found.groups]
    assert sorted(groups) == sorted([sorted(old), sorted(new)])
    assert {label.removeprefix("data=") for label in found.tasks.values()} == hashes
    assert "runs on data of 2 different contents are kept apart" in caplog.text
    ended = command(cli, "analyze", "--dataset_name", "reviews", "--run_summary_table")
    assert ended.code == 0 and all(f"data={found}" in ended.out for found in hashes)
    assert ended.err.count("kept apart") == 1


def test_runs_on_unknown_data_join_the_others_only_if_these_agree(folder: Path) -> None:
    run_main(reviews_config(), "--seeds", "0-1")
    forget(ids()[0])
    with results(folder) as store:
        assert [len(group.runs) for group in load_results(store, "reviews").groups] == [2]
    write_reviews(folder / "data", swapped=True)
    run_main(reviews_config(seed=2))
    with results(folder) as store:
        found = load_results(store, "reviews")
    assert [len(group.runs) for group in found.groups] == [1, 1, 1]
    assert "data=unknown" in found.tasks.values()


def test_a_replay_on_other_data_replaces_no_seed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_main(reviews_config())
    (first,) = ids()
    write_reviews(folder / "data", swapped=True)
    done = replay.replay(first, quiet=True)
    assert f"the data are not those of run {first}" in caplog.text
    with results(folder) as store:
        groups = load_results(store, "reviews").groups
    assert [[run.experiment_id for run in group.runs] for group in groups] == [[first], [done.result.experiment_id]]


# ------------------------------------------------------------------------------------------------------ suggestions


def test_suggestions_start_from_runs_on_the_newest_data(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Store() as store:
        for name, score, data in (("old", 0.9, "a" * 64), ("new", 0.5, "b" * 64), ("older", 0.8, None)):
            lr = {"old": 0.001, "new": 0.002, "older": 0.003}[name]
            config = reviews_config(optimizer_params={"lr": lr}).to_dict()
            enter(store, name, config, score, data)
        found = suggest(store, Request("reviews", "dense", top_n=3))
    assert {one.source.split()[2] for one in found} == {"new"}
    assert "2 runs are left out: the content of their data is not that of the newest run" in caplog.text


def test_suggestions_say_that_the_files_have_changed_since(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_main(reviews_config())
    with Store() as store:
        suggest(store, Request("reviews", "dense"))
        assert "have changed" not in caplog.text
        write_reviews(folder / "data", swapped=True)
        suggest(store, Request("reviews", "dense"))
        assert f"the data of reviews have changed since run {ids()[0]}" in caplog.text


def test_both_databases_keep_data_apart(db: str) -> None:  # noqa: F811 - the fixture
    config = reviews_config().to_dict()
    with Store(db) as store:
        for seed, data in enumerate(("a" * 64, "a" * 64, "b" * 64)):
            enter(store, f"run{seed}", config | {"seed": seed}, 0.5, data)
        assert [len(group.runs) for group in load_results(store, "reviews").groups] == [2, 1]
        store.update_environment("run2", {"data": {"data_sha256": "a" * 64}})
        assert [len(group.runs) for group in load_results(store, "reviews").groups] == [3]
        enter(store, "again", config | {"seed": 0}, 0.5, "b" * 64)
        assert [row["experiment_id"] for row in store.find_experiments(config | {"seed": 0})] == ["again", "run0"]


def enter(store: Store, name: str, config: dict[str, Any], score: float, data: str | None) -> None:
    store.start_experiment(
        experiment_id=name,
        run_type="json",
        config=config,
        environment={} if data is None else {"data": {"data_sha256": data}},
        **{key: config[key] for key in ("experiment_name", "model_type", "dataset_name", "dataset_type")},
        **{key: config[key] for key in ("epochs", "batch_size", "seed")},
    )
    store.finish_experiment(name, {"final_val_f1": score})


# ------------------------------------------------------------------------------------------------------ studies

SPACE = {
    "model_params": {"embed_dim": 8, "num_heads": [1, 2], "num_layers": 1},
    "optimizer_params": {"lr": {"low": 0.001, "high": 0.01, "log": True}},
    "dataset_params": {"max_length": 8, "min_frequency": 1},
}


def tune(*flags: str, space: dict[str, Any] | None = None) -> Ended:
    Path("space.json").write_text(json.dumps(space or SPACE))
    text = ["--dataset_name", "reviews", "--data_dir", "data", "--model_types", "dense", "--search_space", "space.json"]
    return command(cli, "tune", *text, "--study_name", "s", "--epochs", "1", *flags)


def test_a_study_does_not_go_on_with_other_data(folder: Path) -> None:
    assert tune("--n_trials", "1").code == 0
    write_reviews(folder / "data", swapped=True)
    ended = tune("--n_trials", "2")
    assert ended.code == 2
    assert "--study_name: the data of reviews have changed since the study 's' began" in ended.err
    assert len(ids()) == 1
    write_reviews(folder / "data")
    ended = tune("--n_trials", "2")
    assert ended.code == 0 and "2 of 2 trials (2 finished)" in ended.out


def test_a_study_from_before_learns_its_data_from_its_runs(folder: Path) -> None:
    """Also for `dataset_params` that the first config of the new command does not have."""
    import optuna

    space = SPACE | {"dataset_params": {"max_length": [8, 16, 32], "min_frequency": 1}}
    assert tune("--n_trials", "3", space=space).code == 0
    study = optuna.load_study(study_name="s", storage="sqlite:///optuna_studies.db")
    noted = {name for name in study.user_attrs if name.startswith("data_sha256")}
    with sqlite3.connect("optuna_studies.db") as connection:
        connection.executemany("DELETE FROM study_user_attributes WHERE key = ?", [(name,) for name in noted])
    connection.close()
    write_reviews(folder / "data", swapped=True)
    ended = tune("--n_trials", "9", space=space)
    with results(folder) as store:
        rows = store.experiments()
    versions: dict[str, set[str]] = {}
    for row in rows:
        params = json.dumps(json.loads(row["full_config_json"])["dataset_params"], sort_keys=True)
        versions.setdefault(params, set()).add(row["data_sha256"])
    assert all(len(found) == 1 for found in versions.values())
    assert "the data of reviews have changed since the study" in ended.out + ended.err


def test_a_trial_on_data_that_changed_in_the_middle_is_not_ranked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from research_eval.studies import trials

    run, calls = trials.run, []

    def running(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            write_reviews(folder / "data", swapped=True)
        return run(*arguments, **options)

    monkeypatch.setattr(trials, "run", running)
    ended = tune("--n_trials", "2")
    assert ended.code == 0 and "2 of 2 trials (1 finished, 1 failed)" in ended.out
    assert "the data of reviews have changed since the study" in ended.out
    assert len(ids()) == 1


def test_past_runs_on_other_data_teach_no_sampler(folder: Path) -> None:
    assert tune("--n_trials", "2").code == 0
    write_reviews(folder / "data", swapped=True)
    text = tune("--n_trials", "1", "--study_name", "t", "--warm_start")
    assert text.code == 0
    assert "2 past runs are left out: the content of their data is not the present one" in text.err
    write_reviews(folder / "data")
    text = tune("--n_trials", "1", "--study_name", "u", "--warm_start")
    assert "1 past runs are left out" in text.err and "2 past runs fit the search space" in text.err


# ------------------------------------------------------------------------------------------------------ generators


@pytest.fixture
def generator() -> Any:
    """A task whose generator a test can change: `generator(1)` enters it anew with another answer."""

    def enter_task(answer: int) -> None:
        class Ends(SequenceBaseDataset):
            def __init__(self, *, num_samples: int = 60, seed: int = 0) -> None:
                super().__init__(num_samples, 5, vocab_size=4, seed=seed)

            def _generate_data(self) -> None:
                self.labels_list = [0, 1]
                ids_NL = self.rng.integers(1, 5, (self.num_samples, 5))
                self.samples = ArraySamples(ids_NL, (ids_NL[:, 0] + answer) % 2)

        SYNTHETIC_DATASETS["ends"] = Ends

    yield enter_task
    del SYNTHETIC_DATASETS["ends"]


def test_seeds_of_generated_data_are_one_group_until_the_generator_changes(
    folder: Path, generator: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    generator(0)
    config = small_config(dataset_name="ends", dataset_params={"num_samples": 60}, epochs=1)
    run_main(config, "--seeds", "0-1")
    with results(folder) as store:
        splits = {json.loads(row["env_details_json"])["data"]["sha256"]["train"] for row in store.experiments()}
        assert len(splits) == 2  # every seed has samples of its own
        assert [len(group.runs) for group in load_results(store, "ends").groups] == [2]
    generator(1)
    run_main(config.model_copy(update={"seed": 2}))
    ended = run_main(config, "--resume")
    assert "is finished, but its data were other ones" in ended.err
    with results(folder) as store:
        assert sorted(len(group.runs) for group in load_results(store, "ends").groups) == [2, 2]


@pytest.mark.parametrize(
    "change",
    [
        'labels_N if self.split == "train" else 1 - labels_N',
        "np.where(np.arange(len(labels_N)) < 100, labels_N, 1 - labels_N)",
        "labels_N ^ (ids_NL[:, :5] == 1).all(1)",  # one of 1,024 inputs
    ],
)
def test_a_small_change_of_a_generator_is_seen(change: str) -> None:
    def fingerprint(expression: str) -> Any:
        class Ends(SequenceBaseDataset):
            def __init__(self, *, num_samples: int = 60, seed: int = 0) -> None:
                super().__init__(num_samples, 12, vocab_size=4, seed=seed)

            def _generate_data(self) -> None:
                self.labels_list = [0, 1]
                ids_NL = self.rng.integers(1, 5, (self.num_samples, 12))
                labels_N = ids_NL[:, 5] % 2
                names = {"self": self, "labels_N": labels_N, "ids_NL": ids_NL, "np": np}
                self.samples = ArraySamples(ids_NL, eval(expression, names))

        SYNTHETIC_DATASETS["ends"] = Ends
        try:
            return load_splits("synthetic", "ends", {"num_samples": 5000}, 0).fingerprint["data_sha256"]
        finally:
            del SYNTHETIC_DATASETS["ends"]

    assert fingerprint("labels_N") != fingerprint(change)


@pytest.mark.parametrize("name", list(SYNTHETIC_DATASETS))
def test_generated_data_have_one_hash_for_all_seeds(name: str) -> None:
    params = {"num_samples": 50} | ({"seq_len": 6} if name in ("parity", "majority") else {})
    first, second = (load_splits("synthetic", name, params, seed).fingerprint for seed in (0, 1))
    assert first["data_sha256"] == second["data_sha256"] is not None


def test_generated_data_of_other_parameters_have_another_hash() -> None:
    one, other = (
        synthetic_splits("tables", {"num_samples": 50, "task_seed": seed}, 0).fingerprint["data_sha256"]
        for seed in (0, 1)
    )
    assert one != other


def test_an_unfinished_run_is_not_continued_on_other_data(folder: Path) -> None:
    """The present message stays: a training on half of one and half of another file is nobody's result."""
    from research_eval.runs.entry import check_same_data

    run_main(reviews_config())
    with results(folder) as store:
        (row,) = store.experiments()
    write_reviews(folder / "data", swapped=True)
    data = load_splits("real_world", "reviews", reviews_config().dataset_params, 0)
    with pytest.raises(ConfigError, match="its train split is not what it was begun on"):
        check_same_data(row, data)
    logging.getLogger("research_eval").setLevel(logging.NOTSET)


# ------------------------------------------------------------------------------------------------------ counts


def test_a_study_of_old_counts_does_not_go_on(folder: Path) -> None:
    """Its trials lack the weight gradients of experts; new ones have them."""
    import optuna

    assert tune("--n_trials", "1", "--objectives", "final_val_f1,train_flops").code == 0
    study = optuna.load_study(study_name="s", storage="sqlite:///optuna_studies.db")
    settings = dict(study.user_attrs["settings"])
    del settings["flops_version"]
    study.set_user_attr("settings", settings)
    ended = tune("--n_trials", "2", "--objectives", "final_val_f1,train_flops")
    assert ended.code == 2 and "flops_version: null -> 2" in ended.err
    assert tune("--n_trials", "1", "--study_name", "t").code == 0, "another objective has no version"


# ------------------------------------------------------------------------------------------ tokenizers of old runs


@contextmanager
def an_earlier_version() -> Iterator[None]:
    """Within the block, tokenizers are trained as before accents were kept. The caches of two versions differ."""
    steps = [normalizers.Replace(Regex(LINE_BREAK), " "), normalizers.BertNormalizer(lowercase=True)]
    module = "research_eval.datasets.text.tokenizer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOE_CACHE", "cache_of_an_earlier_version")
        patch.setattr(f"{module}.normalizer_of", lambda *_, **__: normalizers.Sequence(steps))
        patch.setattr(f"{module}.word_splitter", pre_tokenizers.BertPreTokenizer)
        yield


def french_config() -> ExperimentConfig:
    lines = [f"{('café fade', 'thé gâté')[row % 2]} numéro {row},{row % 2}" for row in range(ROWS)]
    Path("data/train.csv").write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return reviews_config(epochs=2, training_params={"log_every": 1, "num_threads": 1})


def words_of(run_id: str) -> dict[str, int]:
    vocabulary: dict[str, int] = json.loads((Path("runs") / run_id / "tokenizer.json").read_text())["model"]["vocab"]
    return vocabulary


def test_an_interrupted_run_of_an_earlier_version_continues_with_its_own_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its weights belong to the ids of that tokenizer."""
    config = french_config()
    with an_earlier_version():
        whole = run(config, quiet=True)
        with monkeypatch.context() as patch:
            stop_at(patch, step=5)
            stopped = run(config, quiet=True)
    assert stopped.status == "interrupted"
    continued = run(config, quiet=True, resume=True)
    assert (continued.experiment_id, continued.status) == (stopped.experiment_id, "finished")
    assert "cafe" in words_of(continued.experiment_id)
    for name in ("final_val_loss", "final_val_f1"):
        assert continued.metrics[name] == whole.metrics[name]
    fresh = run(config, quiet=True)
    assert "café" in words_of(fresh.experiment_id) and "cafe" not in words_of(fresh.experiment_id)


def test_a_replay_of_a_run_of_an_earlier_version_has_its_tokenizer() -> None:
    config = french_config()
    with an_earlier_version():
        first = run(config, quiet=True)
    again = run(config, quiet=True, parent_id=first.experiment_id)
    assert again.metrics["final_val_loss"] == first.metrics["final_val_loss"]
    assert words_of(again.experiment_id) == words_of(first.experiment_id)
