"""Generated questions and answers: right, apart in all splits, and scored on the answer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import run_in

from research_eval.datasets.language.line_task import LINE_TASKS, LineTask, codes_of, texts_of
from research_eval.datasets.language.lines import GeneratedLines
from research_eval.datasets.language.vocabulary import decode
from research_eval.datasets.token_data import IGNORED
from research_eval.errors import ConfigError
from research_eval.generation.trained import TrainedLanguageModel
from research_eval.schema import config_from_dict


def lines_of(name: str, **params: Any) -> dict[str, list[str]]:
    data = GeneratedLines(
        name, **{"num_samples": 300, "val_samples": 40, "test_samples": 40, "size": 3} | params
    ).splits()
    parts = {"train": data.train, "validation": data.validation, "test": data.test, **data.further_tests}
    return {
        split: [decode(data.tokenizer, part.sample(row)) for row in range(len(part))]
        for split, part in parts.items()
        if part is not None and data.tokenizer is not None
    }


SIZES = {
    "addition_text": 3,
    "reversal": 3,
    "sorting": 3,
    "mqar": 4,
    "noisy_recall": 4,
    "fuzzy_recall": 4,
    "induction": 8,
}  # of all others 24


@pytest.mark.parametrize("name", LINE_TASKS)
def test_the_answers_are_right_and_the_questions_apart(name: str) -> None:
    task, size = LINE_TASKS[name](), SIZES.get(name, 24)
    splits = lines_of(name, size=size, longest_test_size=size + 4)
    every = [line for lines in splits.values() for line in lines]
    assert len(set(every)) == len(every) == 420
    for line in every:
        question, _, answer = line.removesuffix("\n").rpartition(task.separator)
        assert answer == task.solve(question), line
        assert set(line) <= {*task.alphabet, task.separator, "\n"}
    assert lines_of(name, size=size, longest_test_size=size + 4) == splits
    assert lines_of(name, size=size, task_seed=1) != splits


@pytest.mark.parametrize("name", LINE_TASKS)
def test_ten_thousand_answers_are_right(name: str) -> None:
    """Of all sizes up to that of a longer test."""
    task, rng = LINE_TASKS[name](), np.random.default_rng(0)
    drawn = task.draw(rng, rng.integers(1, 60, 10_000))
    for question, answer in zip(*map(texts_of, drawn), strict=True):
        assert answer == task.solve(question), question
    assert len(drawn[0]) == 10_000


def test_a_size_is_the_length_of_the_question_where_nothing_else_is_said() -> None:
    sizes_N = np.arange(1, 41)
    for name in (
        "reverse_string",
        "duplicate_string",
        "odds_first",
        "bucket_sort",
        "stack_manipulation",
        "compute_sqrt",
    ):
        questions_NL, _ = LINE_TASKS[name]().draw(np.random.default_rng(0), sizes_N)
        assert (questions_NL > 0).sum(1).tolist() == sizes_N.tolist(), name


def test_longer_questions_are_a_test_split_of_their_own() -> None:
    splits = lines_of("reverse_string", size=20, longest_test_size=40)
    lengths = [line.index(">") for line in splits["longer"]]
    assert (min(lengths), max(lengths), len(lengths)) == (21, 40, 40)
    assert max(line.index(">") for line in splits["test"]) == 20
    with pytest.raises(ConfigError, match="longest_test_size=20 has to be larger than size=20"):
        lines_of("reverse_string", size=20, longest_test_size=20)


class Constant(LineTask):
    alphabet = "ab"

    def draw(self, rng: np.random.Generator, sizes_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return codes_of(["ab"] * len(sizes_N)), codes_of(["b"] * len(sizes_N))

    @staticmethod
    def solve(question: str) -> str:
        return "b"


def test_a_task_with_too_few_questions_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LINE_TASKS, "constant", Constant)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="about 1 different questions, too few for 380 lines"):
        lines_of("constant", size=20)


@pytest.mark.parametrize("name", ["addition_text", "sorting", "solve_equation"])
def test_only_the_answer_is_scored(name: str) -> None:
    data = GeneratedLines(name, num_samples=60, val_samples=20, test_samples=0, size=9).splits()
    assert data.test is None
    for seed in (None, 3):
        for batch in data.train.batches(7, seed=seed):
            assert batch.input_ids.shape == batch.labels.shape == (len(batch.labels), data.max_length)
            assert batch.rows is not None
            for row, ids_L, labels_L in zip(batch.rows, batch.input_ids.numpy(), batch.labels.numpy(), strict=True):
                line = decode(data.tokenizer, data.train.sample(int(row)))  # type: ignore[arg-type]
                cut = line.rindex(LINE_TASKS[name].separator)
                scored = labels_L != IGNORED
                assert np.flatnonzero(scored).tolist() == list(range(cut, len(line) - 1))
                assert decode(data.tokenizer, labels_L[scored].tolist()) == line[cut + 1 :]  # type: ignore[arg-type]
                assert decode(data.tokenizer, ids_L[: len(line)].tolist()) == line  # type: ignore[arg-type]


def test_too_few_questions_are_refused() -> None:
    with pytest.raises(ConfigError, match="has 26 different questions, too few for 380 lines"):
        lines_of("reversal", size=1)


def test_exact_match_is_that_of_greedy_answers(tmp_path: Path) -> None:
    config = {
        "model_type": "dense",
        "dataset_type": "language_modeling",
        "dataset_name": "sorting",
        "batch_size": 32,
        "dataset_params": {"num_samples": 600, "size": 3, "val_samples": 40, "test_samples": 40},
        "model_params": {"embed_dim": 32, "num_heads": 2, "num_layers": 2},
        "training_params": {"max_steps": 100, "eval_every": 100, "device": "cpu", "num_threads": 1, "test": True},
    }
    found = run_in(tmp_path, config_from_dict(config))
    model = TrainedLanguageModel(found.folder if found.folder.is_absolute() else tmp_path / found.folder, "cpu")
    right = []
    for line in lines_of("sorting", num_samples=600)["validation"]:
        question = line[: line.index(">") + 1]
        answer = model.generate(question, temperature=0, max_new_tokens=6, stop=("\n",))
        right.append(question + str(answer) + "\n" == line)
    assert 0 < sum(right) < len(right)
    assert found.metrics["final_val_exact_match"] == pytest.approx(np.mean(right))
    assert "test_exact_match" in found.metrics
