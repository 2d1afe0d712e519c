"""What experts tell about tokens: closed forms, agreement of routes, and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from support import command, history, run_in
from test_generation import in_folder
from test_generation import trained as trained  # a fixture

from research_eval.analysis.token_page import PageRun, write_token_page
from research_eval.main import cli
from research_eval.routing.token_classes import (
    CLASSES,
    TokenReport,
    class_information,
    class_numbers,
    class_of,
    information,
    means_by_class,
    route_agreement,
)
from research_eval.schema import config_from_dict


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        *(("a", "letter"), ("Q", "capital"), ("é", "letter"), ("É", "capital"), ("7", "digit"), (",", "punctuation")),
        *((" ", "space"), ("\n", "break"), (" the", "letter"), (" The", "capital"), (".\n", "break"), ("", "other")),
        *((" \t ", "space"), ("�", "other"), ("字", "letter")),
    ],
)
def test_the_class_of_a_piece(piece: str, expected: str) -> None:
    assert class_of(piece) == expected
    assert CLASSES[class_numbers([piece])[0]] == expected


def test_information_has_its_closed_forms() -> None:
    classes = np.repeat([0, 1, 2, 3], 100)
    assert information(classes, classes) == pytest.approx(2.0)  # the entropy of four equal classes
    assert information(classes // 2, classes) == pytest.approx(1.0)
    assert information(np.tile([0, 1], 200), classes) == pytest.approx(0.0)
    rng = np.random.default_rng(0)
    bits, by_chance = class_information(rng.integers(4, size=400), classes, rng)
    assert bits == pytest.approx(by_chance, abs=0.02)
    assert 0 < by_chance < 0.03
    assert class_information(classes, classes, rng)[0] > 1.9


def test_renamed_experts_agree_and_random_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    paths_UT = rng.integers(4, size=(4000, 2))
    renamed = np.stack([np.array([2, 0, 3, 1])[paths_UT[:, 0]], np.array([1, 2, 3, 0])[paths_UT[:, 1]]], 1)
    found, by_chance = route_agreement(paths_UT, renamed, rng)
    assert found == [1.0, 1.0]
    assert by_chance == pytest.approx([0.26, 0.26], abs=0.03)
    other, _ = route_agreement(paths_UT, rng.integers(4, size=(4000, 2)), rng)
    assert other == pytest.approx([0.26, 0.26], abs=0.03)
    with pytest.raises(ValueError, match="cannot be compared"):
        route_agreement(paths_UT, paths_UT[:, :1], rng)


def test_ended_paths_do_not_count_as_agreement() -> None:
    rng = np.random.default_rng(0)
    first = np.array([[0], [1], [-1], [-1]])
    assert route_agreement(first, np.array([[1], [0], [0], [-1]]), rng)[0] == [1.0]


def test_means_by_class() -> None:
    assert means_by_class(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 4])) == [["letter", 2.0], ["space", 5.0]]


def test_path_lengths_by_class() -> None:
    found = report(["", "a", " "], [1, 1, 2, 2, 1], num_experts=2)
    found.paths_UT[:] = [[0, -1], [0, 1], [1, 0], [1, -1]]  # type: ignore[index]
    assert found.metrics()["length_by_class"] == [["letter", 1.0], ["space", 2.0]]
    found.paths_UT[:] = 1  # type: ignore[index]
    assert "length_by_class" not in found.metrics()


HOSTILE = "</script><script>alert(1)</script>"


def report(pieces: list[str], tokens: list[int], num_experts: int = 3) -> TokenReport:
    rng = np.random.default_rng(0)
    tokens_U = np.array(tokens)
    return TokenReport(
        tokens_U[:-1],
        tokens_U[1:],
        rng.random(len(tokens) - 1).astype(np.float32),
        class_numbers(pieces)[tokens_U[1:]],
        rng.integers(num_experts, size=(len(tokens) - 1, 2)),
        pieces,
    )


def test_the_page_is_closed_and_shows_hostile_text_as_text(tmp_path: Path) -> None:
    pieces = ["", HOSTILE, "a", "\n", "&amp;"]
    found = report(pieces, [1, 2, 3, 4, 1, 2, 2, 3] * 5)
    write_token_page(tmp_path / "page.html", [PageRun(HOSTILE, found, 3), PageRun("b", found, 3)], HOSTILE)
    page = (tmp_path / "page.html").read_text()
    assert HOSTILE not in page
    assert not re.search(r"https?://|src=|@import", page)
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    data = json.loads(match[1])
    run = data["runs"][0]
    assert [run["pieces"][token] for token in run["tokens"]] == [pieces[token] for token in found.inputs_U]
    assert run["paths"] == found.paths_UT.tolist()
    assert run["losses"][1:] == pytest.approx(found.losses_U[:-1].tolist(), abs=1e-3)
    assert data["agreement"]["steps"] == [1.0, 1.0]


def test_the_command_writes_a_page_of_one_or_two_runs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = in_folder(trained, monkeypatch, "routes", "--run", "latest", "--out", "one.html")
    assert (ended.code, ended.out) == (0, "one.html\n")
    (trained / "text.txt").write_text("the king and a rose")
    words = ("routes", "--run", "latest", "latest", "--text_file", "text.txt", "--out", "two.html")
    assert in_folder(trained, monkeypatch, *words).code == 0
    assert '"agreement": {' in (trained / "two.html").read_text()


def test_mistakes_of_the_command(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, part in (
        (("latest", "--out", "no/such/x.html"), "is not a file in an existing folder"),
        (("latest", "--text_file", "none.txt"), "cannot read none.txt as text"),
        (("a", "b", "c"), "expected one or two runs"),
        (("latest", "--max_tokens", "1"), "expected at least 2"),
    ):
        ended = in_folder(trained, monkeypatch, "routes", "--run", *words)
        assert ended.code == 2
        assert part in ended.err


def test_a_finished_run_has_the_metrics_of_its_tokens(trained: Path, tmp_path: Path) -> None:
    config = {
        "model_type": "goe_original",
        "dataset_type": "language_modeling",
        "dataset_name": "verse",
        "batch_size": 8,
        "dataset_params": {"data_dir": str(trained), "block_size": 32, "ngram_baseline": False},
        "model_params": {"embed_dim": 16, "num_heads": 2, "num_total_experts": 4, "max_path_len": 3}
        | {"route": "token_id", "halt": "confidence", "exit_threshold": 0.6},
        "training_params": {"max_steps": 40, "eval_every": 40, "device": "cpu", "num_threads": 1},
    }
    found = run_in(tmp_path, config_from_dict(config))
    metrics = found.metrics
    classes = [name for name, _ in metrics["loss_by_class"]]
    assert {"letter", "space", "punctuation", "break"} <= set(classes)
    assert len(metrics["expert_class_information"]) == 3
    # A table of the present token tells much about the next one in a text of one line.
    assert metrics["expert_class_information"][0] > 3 * metrics["expert_class_information_by_chance"][0]
    assert history(tmp_path, found.experiment_id)


def test_a_dense_model_has_no_routes(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "model_type": "dense",
        "dataset_type": "language_modeling",
        "dataset_name": "verse",
        "batch_size": 8,
        "dataset_params": {"data_dir": str(trained), "block_size": 32, "ngram_baseline": False},
        "model_params": {"embed_dim": 16, "num_heads": 2, "num_layers": 1},
        "training_params": {"max_steps": 2, "eval_every": 2, "device": "cpu", "num_threads": 1},
    }
    metrics = run_in(tmp_path, config_from_dict(config)).metrics
    assert "loss_by_class" in metrics
    assert "expert_class_information" not in metrics
    monkeypatch.chdir(tmp_path)
    ended = command(cli, "routes", "--run", "latest")
    assert ended.code == 2
    assert "has no experts to show" in ended.err
