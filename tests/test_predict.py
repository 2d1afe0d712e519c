"""Predictions of stored runs: the probabilities of the model that was trained, in words."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support import command, python, run_in, small_config

from research_eval import experiment
from research_eval.datasets.token_data import Batches, DataSplits
from research_eval.db_utils import DB_FILE
from research_eval.errors import ConfigError
from research_eval.experiment import Result, prepare
from research_eval.main import cli
from research_eval.models.base_model import EvaluableModel
from research_eval.runs.predict import Prediction, predict, read_texts
from research_eval.schema import ExperimentConfig
from research_eval.training.fit import MODEL_FILE, fit

WORDS = {"good": ["great", "fine", "lovely", "superb"], "bad": ["awful", "dull", "poor", "weak"]}


def review(number: int, label: str) -> str:
    return " ".join(["The film", str(number), *np.random.default_rng(number).choice(WORDS[label], 1 + number % 7)])


def write_reviews(folder: Path) -> list[str]:
    """Training and validation data; the texts of the latter."""
    for split, numbers in (("train", range(60)), ("validation", range(60, 80))):
        texts = [(review(number, label), label) for number in numbers for label in WORDS]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *map(",".join, texts)]))
    return [text for text, _ in texts]


class Trained(NamedTuple):
    """A run, and the model that it ended with (after one epoch, so also the best one)."""

    folder: Path
    result: Result
    data: DataSplits
    model: EvaluableModel
    texts: list[str]  # of the validation samples, as a user types them


def trained(folder: Path, config: ExperimentConfig, texts: list[str] | None = None) -> Trained:
    models = []

    def watching(*arguments: Any) -> Any:
        ended = fit(*arguments)
        models.append(ended[1])
        return ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "fit", watching)
        result = run_in(folder, config)
    with contextlib.chdir(folder):
        _, data, _ = prepare(config)
    validation = data.validation
    token_ids = [" ".join(map(str, validation.sample(number))) for number in range(len(validation))]
    return Trained(folder, result, data, models[0].eval(), texts or token_ids)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("text")
    texts = write_reviews(folder)
    with contextlib.chdir(folder):
        config = small_config(
            model_type="dense",
            dataset_type="real_world",
            dataset_name="reviews",
            dataset_params={"data_dir": ".", "max_length": 6, "truncation": "head_tail", "tokenizer": "bpe"},
            epochs=1,
            optimizer_params={"lr": 0.02},
            training_params={"ema_decay": 0.5},
        )
    return trained(folder, config, texts)


@pytest.fixture(scope="module")
def routed_run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    config = small_config(
        model_type="goe_original",
        dataset_name="addition",
        dataset_params={"num_samples": 100},
        epochs=1,
        model_params={"halt": "ponder", "max_path_len": 4, "num_total_experts": 2, "max_visits": 1},
    )
    return trained(tmp_path_factory.mktemp("routed"), config)


def own_probabilities(run: Trained) -> np.ndarray[Any, Any]:
    """Of the validation samples in their order, one at a time and unpadded."""
    batches = Batches(run.data.validation, 1)
    shares = np.zeros((len(run.data.validation), run.data.num_classes))
    with torch.no_grad():
        for rows in batches.order(0):
            batch = batches.take(rows)
            shares[rows] = run.model(batch.input_ids, attention_mask=batch.attention_mask).softmax(-1)
    return shares


def predicted(run: Trained, texts: list[str]) -> list[Prediction]:
    with contextlib.chdir(run.folder):
        return predict(run.result.experiment_id, texts, db=DB_FILE, device="cpu")


# --------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("name", ["text_run", "routed_run"])
def test_probabilities_are_those_of_the_trained_model(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("research_eval.runs.predict.BATCH_SIZE", 7)
    run: Trained = request.getfixturevalue(name)
    predictions = predicted(run, run.texts)
    expected = own_probabilities(run)
    np.testing.assert_allclose([one.probabilities for one in predictions], expected, rtol=1e-4, atol=1e-6)
    assert [one.text for one in predictions] == run.texts
    assert [one.label for one in predictions] == [run.data.label_names[place] for place in expected.argmax(1)]
    accuracy = np.mean(expected.argmax(1) == run.data.validation.labels)
    assert accuracy == pytest.approx(run.result.metrics["final_val_acc"])
    assert len(np.unique(expected[:, 0])) > 10  # the inputs make a difference


def test_the_classes_have_their_names(text_run: Trained) -> None:
    (prediction,) = predicted(text_run, ["a superb film"])
    assert prediction.label_names == ["bad", "good"]
    assert sum(prediction.probabilities) == pytest.approx(1.0)
    assert prediction.path is None
    first, shares = str(prediction).splitlines()
    assert first == "a superb film"
    likeliest, other = sorted(zip(prediction.probabilities, prediction.label_names, strict=True))[::-1]
    assert shares == f"  {likeliest[1]} {likeliest[0]:.4f}  {other[1]} {other[0]:.4f}"


def test_routed_models_show_the_path(routed_run: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same path alone and among others, and the one that the metrics counted; it ends when no expert is left."""
    monkeypatch.setattr("research_eval.runs.predict.BATCH_SIZE", 7)
    predictions = predicted(routed_run, routed_run.texts)
    for prediction in predictions[:5]:
        (alone,) = predicted(routed_run, [prediction.text])
        assert set(prediction.path or []) <= {0, 1} and 1 <= len(prediction.path or []) <= 2
        assert alone.path == prediction.path
        steps = " -> ".join(str(expert) for expert in prediction.path or [])
        assert str(prediction).endswith(f"\n  path: start -> {steps} -> stop")
    counts = [[one.path for one in predictions].count(path) for path, _ in routed_run.result.metrics["common_paths"]]
    assert counts == [count for _, count in routed_run.result.metrics["common_paths"]]


def test_a_text_of_words_never_seen_is_still_a_text(text_run: Trained) -> None:
    predictions = predicted(text_run, ["", "\u00fc\u4e16\u754c", "long " * 500])
    assert all(sum(one.probabilities) == pytest.approx(1.0) for one in predictions)


# ------------------------------------------------------------------------------------------------------- commands


def test_a_new_process_gives_the_same_answer(text_run: Trained) -> None:
    """With the beginning of the id, the default database and one text per line of a file."""
    file = text_run.folder / "input.txt"
    file.write_text("a superb film\n\n   \nawful and dull\n", encoding="utf-8")
    program = "import sys; from research_eval.main import cli; sys.exit(cli(sys.argv[1:]))"
    arguments = ("predict", "--run", text_run.result.experiment_id[:-3], "--file", file.name, "--device", "cpu")
    ended = python("-c", program, *arguments, folder=text_run.folder)
    assert ended.code == 0, ended.err
    assert ended.out == "".join(f"{one}\n" for one in predicted(text_run, ["a superb film", "awful and dull"]))


def test_goe_predict_prints_a_prediction(routed_run: Trained) -> None:
    with contextlib.chdir(routed_run.folder):
        ended = command(
            cli, "predict", "--run", routed_run.result.experiment_id, "--text", " 1  2\t3 ", "--db", DB_FILE
        )
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"^  path: start( -> \d)+ -> stop$", ended.out, re.MULTILINE)


def complaint(run: Trained, *arguments: str) -> str:
    with contextlib.chdir(run.folder):
        ended = command(cli, "predict", "--db", DB_FILE, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "Traceback" not in ended.err
    return ended.err


@pytest.mark.parametrize(
    "text",
    ["", "one", "0", "1 0", "-1", "1.0", "99", "1 99999999999999999999", "000000000199", "\u0661", "1,2", "9" * 5000],
    ids=lambda text: ascii(text[:12]),
)
def test_what_is_no_line_of_token_ids_is_refused(text: str, routed_run: Trained) -> None:
    message = complaint(routed_run, "--run", routed_run.result.experiment_id, f"--text={text}")
    largest = routed_run.data.vocab_size - 1
    assert message == f"text: expected token ids from 1 to {largest} with blanks between them, got {text[:80]!r}\n"


def test_the_latest_run_may_be_asked_for(text_run: Trained) -> None:
    with contextlib.chdir(text_run.folder):
        own, latest = (
            predict(name, ["a"], db=DB_FILE, device="cpu") for name in (text_run.result.experiment_id, "latest")
        )
    assert [one.values for one in own] == [one.values for one in latest]


def test_unknown_runs_are_named(text_run: Trained) -> None:
    assert "no experiment 'nothing'" in complaint(text_run, "--run", "nothing", "--text", "a")
    assert "no experiment ''" in complaint(text_run, "--run", "", "--text", "a")


def test_unknown_devices_are_named(text_run: Trained) -> None:
    run = ("--run", text_run.result.experiment_id, "--text", "a")
    assert "device: unknown 'gpu'" in complaint(text_run, *run, "--device", "gpu")
    assert "this machine has no 'cuda:88'" in complaint(text_run, *run, "--device", "cuda:88")


def test_results_that_are_not_there_are_named(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        ended = command(cli, "predict", "--run", "a", "--text", "a", "--db", "nowhere.db")
    assert ended.code == 2 and "no results at" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_weights_is_named(tmp_path: Path) -> None:
    options = {"name": "sgd", "lr": 1e38, "grad_clip_norm": None}
    end = run_in(tmp_path, small_config(optimizer_params=options))
    with contextlib.chdir(tmp_path), pytest.raises(ConfigError, match=r"\(diverged\): no weights in runs/"):
        predict(end.experiment_id, ["1 2"], db=DB_FILE)


def test_weights_that_cannot_be_read_are_named(routed_run: Trained) -> None:
    path = routed_run.folder / routed_run.result.folder / MODEL_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    try:
        message = complaint(routed_run, "--run", routed_run.result.experiment_id, "--text", "1 2")
    finally:
        path.write_bytes(whole)
    assert "not a readable checkpoint" in message


def test_one_source_of_text_is_needed(text_run: Trained) -> None:
    run = ("--run", text_run.result.experiment_id)
    assert "--text" in complaint(text_run, *run)
    assert "not allowed with" in complaint(text_run, *run, "--text", "a", "--file", "b")


def test_files_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes("caf\u00e9\r\n\n  two words \nlast".encode())
    assert read_texts(str(path)) == ["caf\u00e9", "  two words ", "last"]


def test_files_without_text_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "input.txt"

    def message() -> str:
        with pytest.raises(ConfigError, match="--file: ") as caught:
            read_texts(str(path))
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "cannot read" in message()
    for content in (b"", b" \n\n"):
        path.write_bytes(content)
        assert "has no text" in message()
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in message()
    with path.open("wb") as file:
        os.truncate(file.fileno(), 100_000_001)
    assert "larger than 100,000,000 bytes" in message()
    path.unlink()
    path.mkdir()
    assert "cannot read" in message()
