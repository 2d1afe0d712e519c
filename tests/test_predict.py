"""Predictions of stored runs: the probabilities of the model that was trained, in words."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from support import Ended, command, python, run_in, small_config

import research_eval
from research_eval import experiment
from research_eval.datasets.token_data import Batches, DataSplits
from research_eval.db_utils import DB_FILE
from research_eval.errors import ConfigError
from research_eval.experiment import Result, prepare
from research_eval.main import cli
from research_eval.models.base_model import EvaluableModel
from research_eval.registry import MODELS_MAP
from research_eval.runs.folder import save_description
from research_eval.runs.predict import Prediction, TrainedModel, predict, read_config, read_texts
from research_eval.schema import ExperimentConfig
from research_eval.training.checkpoint import save_tensors
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
    """With the beginning of the id, the default database and one text per line of a file, blank ones included."""
    file = text_run.folder / "input.txt"
    file.write_text("a superb film\n\nawful and dull\n", encoding="utf-8")
    program = "import sys; from research_eval.main import cli; sys.exit(cli(sys.argv[1:]))"
    arguments = ("predict", "--run", text_run.result.experiment_id[:-3], "--file", file.name, "--device", "cpu")
    ended = python("-c", program, *arguments, folder=text_run.folder)
    assert ended.code == 0, ended.err
    assert ended.out == "".join(f"{one}\n" for one in predicted(text_run, ["a superb film", "", "awful and dull"]))


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
    assert read_texts(str(path)) == ["caf\u00e9", "", "  two words ", "last"]
    path.write_bytes(b"")
    assert read_texts(str(path)) == []
    path.write_bytes(b"\n")
    assert read_texts(str(path)) == [""]


def test_files_that_are_no_text_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "input.txt"

    def message() -> str:
        with pytest.raises(ConfigError, match="--file: ") as caught:
            read_texts(str(path))
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "cannot read" in message()
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in message()
    with path.open("wb") as file:
        os.truncate(file.fileno(), 100_000_001)
    assert "larger than 100,000,000 bytes" in message()
    path.unlink()
    path.mkdir()
    assert "cannot read" in message()


# ---------------------------------------------------------------------------------------- one answer for each input


@pytest.fixture(scope="module")
def text_model(text_run: Trained) -> TrainedModel:
    return research_eval.load(text_run.folder / text_run.result.folder, device="cpu")


@pytest.fixture(scope="module")
def routed_model(routed_run: Trained) -> TrainedModel:
    return research_eval.load(routed_run.folder / routed_run.result.folder, device="cpu")


def assert_same(one: Prediction, other: Prediction) -> None:
    """Equal up to the rounding of batches of other sizes."""
    assert (one.text, one.label_names, one.path) == (other.text, other.label_names, other.path)
    np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-4, atol=1e-6)


def unlike_an_ending(text: str) -> bool:
    """Whether a file can hold it as a line: a carriage return at its end belongs to the end of the line."""
    return not text.endswith("\r")


odd_texts = st.lists(st.text(st.sampled_from("film great dull\n\r\u2028\x85\f\x1c \t\ufeff<br />\u4e16"), max_size=20))


@given(texts=odd_texts, batch_size=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_every_text_has_one_answer_in_order_which_is_its_own(
    text_model: TrainedModel, texts: list[str], batch_size: int
) -> None:
    found = text_model.predict(texts, batch_size=batch_size)
    assert [one.text for one in found] == texts
    for one in found:
        assert_same(one, text_model.predict([one.text])[0])
        assert one.is_blank == (one.text.split() == [])


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")).filter(unlike_an_ending)),
    ending=st.sampled_from(["\n", "\r\n"]),
    is_ended=st.booleans(),
    mark=st.sampled_from(["", "\ufeff"]),
)
@settings(max_examples=50, deadline=None)
def test_only_a_line_feed_ends_a_line(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ending: str, is_ended: bool, mark: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    # Without a last ending, a last blank line is not there.
    closed = is_ended or not texts or texts[-1] == ""
    path.write_bytes((mark + ending.join(texts) + (ending if closed and texts else "")).encode())
    assert read_texts(str(path)) == texts


TEXTS = ['two\nlines, and "quotes"', "", "a\u2028b\x85c\x0cd\re", "  ", "last"]


def write_table(path: Path, texts: Sequence[str], columns: Sequence[str] = ("number", "text")) -> None:
    rows = [{columns[0]: number, columns[-1]: text} for number, text in enumerate(texts)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, dict.fromkeys(columns), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_the_text_column_of_a_table_is_read_one_to_one(suffix: str, text_model: TrainedModel, tmp_path: Path) -> None:
    path = tmp_path / f"input{suffix}"
    write_table(path, TEXTS)
    assert [(one.number, one.text) for one in text_model.read_inputs([str(path)])] == list(enumerate(TEXTS, 1))
    write_table(path, TEXTS, columns=("words", "label"))
    with pytest.raises(ConfigError, match=r"input\.\w+: no column 'text'; found words, label\. Rename"):
        text_model.read_inputs([str(path)])
    path.write_bytes(b"")
    if suffix != ".parquet":
        assert text_model.read_inputs([str(path)]) == []


def test_an_empty_line_of_a_table_with_one_column_is_an_empty_cell(text_model: TrainedModel, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text\n\none\n\ntwo\n")
    (tmp_path / "two.csv").write_text("text,number\n\none,1\n\n,2\n")
    read = [[one.text for one in text_model.read_inputs([str(tmp_path / f"{name}.csv")])] for name in ("one", "two")]
    assert read == [["", "one", "", "two"], ["one", ""]]


def test_the_column_of_the_texts_is_that_of_the_run(tmp_path: Path) -> None:
    write_reviews(tmp_path)
    for split in ("train", "validation"):
        path = tmp_path / f"{split}.csv"
        path.write_text(path.read_text().replace("text,label", "body,label"))
    params = {"data_dir": ".", "text_field": "body", "max_length": 6}
    config = small_config(dataset_type="real_world", dataset_name="reviews", dataset_params=params, epochs=1)
    model = research_eval.load(tmp_path / run_in(tmp_path, config).folder, device="cpu")
    write_table(tmp_path / "new.csv", TEXTS, columns=("text", "body"))
    assert [one.text for one in model.read_inputs([str(tmp_path / "new.csv")])] == TEXTS


# ------------------------------------------------------------------------------------------------ loading a run


def test_a_copied_folder_needs_neither_the_results_nor_the_data(text_run: Trained, tmp_path: Path) -> None:
    shutil.copytree(text_run.folder / text_run.result.folder, tmp_path / "copy")
    expected = predicted(text_run, text_run.texts[:3])
    with contextlib.chdir(tmp_path):
        for place in ("copy", "copy/", str(tmp_path / "copy")):
            assert research_eval.load(place, device="cpu").predict(text_run.texts[:3]) == expected
        ended = command(cli, "predict", "--run", "copy", "--text", text_run.texts[0], "--device", "cpu")
        assert (ended.code, ended.out) == (0, f"{expected[0]}\n")
        with pytest.raises(ConfigError, match=r"no results at .*experiment_results.db.* give the folder of the run"):
            research_eval.load("copy2")
        for wrong, says in {"other/copy": "there is no such folder", "./": "it has no config.json"}.items():
            with pytest.raises(ConfigError, match=f"--run: {wrong} is no folder of a run: {says}"):
                research_eval.load(wrong)


def test_a_folder_without_weights_is_named(text_run: Trained, tmp_path: Path) -> None:
    shutil.copytree(text_run.folder / text_run.result.folder, tmp_path / "copy")
    (tmp_path / "copy" / MODEL_FILE).unlink()
    with pytest.raises(ConfigError, match=r"run copy: no weights in .*copy\."):
        research_eval.load(tmp_path / "copy")


def test_nothing_is_unpickled(text_run: Trained, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    for name in (MODEL_FILE, "config.json", "data.json", "tokenizer.json"):
        folder = tmp_path / name.replace(".", "_")
        shutil.copytree(text_run.folder / text_run.result.folder, folder)
        (folder / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(ConfigError, match=re.escape(name)):
            research_eval.load(folder)
    torch.save(Trap(), tmp_path / "model_safetensors" / MODEL_FILE)
    with pytest.raises(ConfigError, match="not a readable checkpoint"):
        research_eval.load(tmp_path / "model_safetensors")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "model_type", [name for name in MODELS_MAP if MODELS_MAP[name].__module__.startswith("research_eval.")]
)
def test_every_model_type_is_loaded_with_its_weights(model_type: str, tmp_path: Path) -> None:
    """The answers are those of the module whose weights were stored, one sequence at a time."""
    config = small_config(model_type=model_type, dataset_params={"num_samples": 20, "seq_len": 6})
    _, data, model = prepare(config)
    save_description(tmp_path, config, data)
    save_tensors(tmp_path / MODEL_FILE, model.state_dict(), {})
    loaded = research_eval.load(tmp_path, device="cpu")
    assert loaded.label_names == data.label_names and loaded.max_length == 6 and loaded.tokenizer is None
    samples = [data.validation.sample(number) for number in range(len(data.validation))] + [[1], [2, 1]]
    found = loaded.predict(samples, batch_size=3)
    model.eval()
    for sample, one in zip(samples, found, strict=True):
        model.start_recording()
        with torch.no_grad():
            shares = model(torch.tensor([sample])).softmax(-1)[0]
        np.testing.assert_allclose(one.probabilities, shares, rtol=1e-4, atol=1e-6)
        paths = model.recorded_paths()
        assert one.path == (None if paths is None else [expert for expert in paths[0] if expert >= 0])


# ---------------------------------------------------------------------------------------------- token ids and lengths


def test_token_ids_may_be_a_line_a_list_or_an_array(routed_model: TrainedModel) -> None:
    forms: list[Any] = ["1 2 3", [1, 2, 3], (1, 2, 3), np.array([1, 2, 3], np.int16)]
    found = routed_model.predict(forms)
    assert {one.text for one in found} == {"1 2 3"}
    for one in found[1:]:
        assert_same(one, found[0])
    for wrong in ([], [0], [1.0, 2.0], [[1]], [True], [10**6], None, 7):
        with pytest.raises(ConfigError, match="input 2: expected token ids from 1 to"):
            routed_model.predict(["1 2 3", wrong])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="expected a list of texts, got one text"):
        routed_model.predict("1 2 3")
    with pytest.raises(ConfigError, match="batch_size: expected a whole number of at least 1, got 0"):
        routed_model.predict(["1 2 3"], batch_size=0)


def test_a_sequence_longer_than_those_of_the_task_is_refused(routed_run: Trained, routed_model: TrainedModel) -> None:
    longest = routed_run.data.max_length
    assert routed_model.max_length == longest
    routed_model.predict([[1] * longest])
    message = complaint(routed_run, "--run", routed_run.result.experiment_id, "--text", "1 " * (longest + 1))
    assert message == (f"text: {longest + 1} tokens, but a sequence of this task has at most {longest} (max_length)\n")


def test_a_long_text_is_cut_as_in_the_training_and_that_is_said_once(
    text_model: TrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    long = "a great film b c d e f g h i j"
    assert text_model.tokenizer is not None
    ids = text_model.tokenizer.encode(long).ids
    cut = [*ids[:1], *ids[-5:]]  # head_tail keeps a quarter of the six at the front
    as_ids, *as_texts = text_model.predict([cut, long, "a film", long])
    assert caplog.messages == ["2 of 3 texts: longer than 6 tokens (max_length), cut as in the training (head_tail)"]
    assert_same(Prediction(long, *list(vars(as_ids).values())[1:]), as_texts[0])
    with pytest.raises(ConfigError, match="7 tokens, but a sequence of this task has at most 6"):
        text_model.predict([[2] * 7])


# ------------------------------------------------------------------------------------------------------- what it writes


def ask(run: Trained, *arguments: str | Path, folder: Path | None = None) -> Ended:
    place = run.folder / run.result.folder
    with contextlib.chdir(folder or run.folder):
        return command(cli, "predict", "--run", place, "--device", "cpu", *arguments)


def test_every_line_is_a_json_object_with_the_number_of_its_input(text_run: Trained, tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", TEXTS)
    (tmp_path / "b.txt").write_text("a superb film\n\n")
    ended = ask(text_run, "--file", "a.csv", "--file", "b.txt", "--format", "jsonl", folder=tmp_path)
    assert ended.code == 0
    records = [json.loads(line) for line in ended.out.split("\n")[:-1]]
    expected = [("a.csv", number, text) for number, text in enumerate(TEXTS, 1)]
    expected += [("b.txt", 1, "a superb film"), ("b.txt", 2, "")]
    assert [(one["file"], one["input"], one["text"]) for one in records] == expected
    assert [one["blank"] for one in records] == [not text.strip() for *_, text in expected]
    for record in records:
        assert record["label"] == max(record["probabilities"], key=record["probabilities"].get)
        assert sum(record["probabilities"].values()) == pytest.approx(1.0) and record["path"] is None
    alone = ask(text_run, "--file", "b.txt", "--format", "jsonl", folder=tmp_path).out.splitlines()
    assert [json.loads(line) for line in alone] == [
        {name: value for name, value in record.items() if name != "file"}
        | {"probabilities": pytest.approx(record["probabilities"], rel=1e-4)}
        for record in records[-2:]
    ]


def test_a_csv_file_of_answers_is_read_back_as_it_was_written(routed_run: Trained, tmp_path: Path) -> None:
    """A blank line among token ids has a row, and no answer."""
    (tmp_path / "in.txt").write_text("1 2 3\n\n3 2 1")
    assert ask(routed_run, "--file", "in.txt", "--out", "out.csv", folder=tmp_path) == Ended(0, "", "")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = routed_run.data.label_names
    assert list(rows[0]) == ["input", "text", "blank", "label", *(f"probability_{name}" for name in names), "path"]
    assert [(row["input"], row["text"], row["blank"]) for row in rows] == [
        ("1", "1 2 3", "False"),
        ("2", "", "True"),
        ("3", "3 2 1", "False"),
    ]
    (first, last) = predicted(routed_run, ["1 2 3", "3 2 1"])
    for row, one in ((rows[0], first), (rows[2], last)):
        assert row["label"] == one.label and json.loads(row["path"]) == one.path
        assert [float(row[f"probability_{name}"]) for name in names] == pytest.approx(one.probabilities, rel=1e-4)
    assert not any(value for name, value in rows[1].items() if name not in ("input", "blank"))
    text = ask(routed_run, "--file", "in.txt", "in.txt", folder=tmp_path).out
    assert text.count("in.txt:2: (blank)\n  no answer\n") == 2
    assert all(
        json.loads(line)
        for line in ask(routed_run, "--file", "in.txt", "--format", "jsonl", folder=tmp_path).out.splitlines()
    )


def test_an_error_leaves_the_file_of_answers_as_it_was(routed_run: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    (tmp_path / "in.txt").write_text("1 2 3\n1 x\n")
    (tmp_path / "good.txt").write_text("1 2 3\n")
    ended = ask(routed_run, "--file", "good.txt", "in.txt", "--out", out, folder=tmp_path)
    assert ended.code == 2 and ended.err.startswith("in.txt:2: expected token ids")
    assert out.read_text() == "mine"
    ended = ask(routed_run, "--file", "good.txt", "in.txt", "--format", "csv", folder=tmp_path)
    assert (ended.code, ended.out) == (2, "")  # not even a header
    for wrong in ("good.txt", "./good.txt", "nowhere/out.csv", "."):
        ended = ask(routed_run, "--file", "good.txt", "--out", wrong, folder=tmp_path)
        assert ended.code == 2 and ended.err.startswith("--out: ")
    assert (tmp_path / "good.txt").read_text() == "1 2 3\n"
    assert ask(routed_run, "--file", "good.txt", "--out", out, folder=tmp_path).code == 0
    assert json.loads(out.read_text())["input"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.txt", "in.txt", "out.jsonl"]


def test_standard_input_is_read_as_lines(routed_run: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1 2\r\n2 1")))
    ended = ask(routed_run, "--file", "-")
    assert ended.code == 0 and re.findall(r"^[\d ]+$", ended.out, re.MULTILINE) == ["1 2", "2 1"]
    ended = ask(routed_run, "--file", "-")  # nothing is left
    assert (ended.code, ended.out, ended.err) == (0, "", "standard input: no texts\n")
    assert "can be read once" in ask(routed_run, "--file", "-", "-").err


# ------------------------------------------------------------------------------------------------------------ ensembles


@pytest.fixture(scope="module")
def another_seed(text_run: Trained, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("another")
    texts = write_reviews(folder)
    config = read_config(text_run.folder / text_run.result.folder)
    return trained(folder, config.model_copy(update={"seed": 7}), texts)


def test_an_ensemble_answers_with_the_mean_of_its_runs(text_run: Trained, another_seed: Trained) -> None:
    folders = [run.folder / run.result.folder for run in (text_run, another_seed)]
    texts = [*text_run.texts[:20], ""]
    both = research_eval.load(folders)
    first, second = (research_eval.load(folder).predict(texts) for folder in folders)
    assert [one.probabilities for one in first] != [one.probabilities for one in second]
    for mean, one, other in zip(both.predict(texts, batch_size=3), first, second, strict=True):
        assert (mean.text, mean.label_names, mean.path) == (one.text, one.label_names, None)
        assert mean.probabilities == pytest.approx(np.mean([one.probabilities, other.probabilities], 0).tolist())
    ended = command(cli, "predict", "--run", *map(str, folders), "--text", texts[0], "--format", "jsonl")
    assert (ended.code, json.loads(ended.out)["label"]) == (0, both.predict(texts[:1])[0].label)
    assert research_eval.load([folders[0]]).predict(texts)[0].probabilities == first[0].probabilities


def test_an_ensemble_is_of_one_task(text_run: Trained, routed_run: Trained) -> None:
    folders = [run.folder / run.result.folder for run in (text_run, routed_run)]
    ended = command(cli, "predict", "--run", *map(str, folders), "--text", "1 2")
    assert (ended.code, "an ensemble needs runs on the same classes" in ended.err) == (2, True)
    with pytest.raises(ConfigError, match="at least one run"):
        research_eval.load([])
