"""Generated questions and answers: right, apart in all splits, and scored on the answer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import run_in

from research_eval.datasets.language.lines import LINES, GeneratedLines
from research_eval.datasets.language.vocabulary import decode
from research_eval.datasets.token_data import IGNORED
from research_eval.errors import ConfigError
from research_eval.generation.trained import TrainedLanguageModel
from research_eval.schema import config_from_dict


def lines_of(name: str, **params: Any) -> dict[str, list[str]]:
    data = GeneratedLines(
        name, **{"num_samples": 300, "val_samples": 40, "test_samples": 40, "size": 3} | params
    ).splits()
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        split: [decode(data.tokenizer, part.sample(row)) for row in range(len(part))]
        for split, part in parts.items()
        if part is not None and data.tokenizer is not None
    }


@pytest.mark.parametrize("name", LINES)
def test_the_answers_are_right_and_the_questions_apart(name: str) -> None:
    splits = lines_of(name)
    every = [line for lines in splits.values() for line in lines]
    assert len(set(every)) == len(every) == 380
    for line in every:
        question, answer = line.rstrip("\n").replace("=", ">").split(">")
        if name == "addition_text":
            first, second = question.split("+")
            assert int(answer) == int(first) + int(second)
        else:
            assert answer == ("".join(reversed(question)) if name == "reversal" else "".join(sorted(question)))
    assert lines_of(name) == splits
    assert lines_of(name, task_seed=1) != splits


@pytest.mark.parametrize("name", LINES)
def test_only_the_answer_is_scored(name: str) -> None:
    data = GeneratedLines(name, num_samples=60, val_samples=20, test_samples=0, size=3).splits()
    assert data.test is None
    for seed in (None, 3):
        for batch in data.train.batches(7, seed=seed):
            assert batch.input_ids.shape == batch.labels.shape == (len(batch.labels), data.max_length)
            assert batch.rows is not None
            for row, ids_L, labels_L in zip(batch.rows, batch.input_ids.numpy(), batch.labels.numpy(), strict=True):
                line = decode(data.tokenizer, data.train.sample(int(row)))  # type: ignore[arg-type]
                cut = max(line.find(mark) for mark in "=>")
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
