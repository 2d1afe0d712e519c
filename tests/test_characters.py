"""Words through their letters: hashed character n-grams."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import MODELS, small_config
from torch.testing import assert_close

import research_eval
from research_eval.errors import ConfigError
from research_eval.experiment import run
from research_eval.layers.characters import MOST_NGRAMS, CharacterNgrams, character_ngrams
from research_eval.models.base_model import EvaluableModel
from research_eval.runs.prepare import prepare

WORDS = [None, None, "cat", "cats", "a", "incomprehensibilities" * 3]


def learned(buckets: int = 50) -> CharacterNgrams:
    torch.manual_seed(0)
    part = CharacterNgrams(len(WORDS), buckets, 4)
    part.learn(WORDS)
    return part


def test_a_word_is_the_mean_of_its_ngrams() -> None:
    part = learned()
    for token, word in enumerate(WORDS[:5]):
        rows = [1 + zlib.crc32(one.encode()) % 50 for one in character_ngrams(word)] if word else []
        expected = part.table.weight[rows].mean(0) if rows else torch.zeros(4)
        assert_close(part(torch.tensor([[token]]))[0, 0], expected)


@given(st.lists(st.integers(0, len(WORDS) - 1), min_size=1, max_size=12))
def test_a_token_has_the_same_vector_wherever_it_stands(ids: list[int]) -> None:
    part = learned()
    together = part(torch.tensor(ids))
    assert_close(together, torch.stack([part(torch.tensor(one)) for one in ids]))


@given(st.text(min_size=1, max_size=80))
def test_a_long_word_keeps_parts_of_all_its_letters(word: str) -> None:
    found = character_ngrams(word)
    assert {len(one) for one in found} == set(range(2, min(5, len(word) + 2) + 1))
    part = CharacterNgrams(1, 1000, 2)
    part.learn([word])
    assert int((part.buckets_VM > 0).sum()) == min(len(found), MOST_NGRAMS)


def text_config(folder: Path, model_type: str = "dense", **model: Any) -> Any:
    rows = "".join(f"{word} {word}s,{label}\n" for label in (0, 1) for word in (("sun", "moon"), ("dog", "cat"))[label])
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text("text,label\n" + rows * 8)
    return small_config(
        model_type=model_type,
        dataset_type="real_world",
        dataset_name="pets",
        dataset_params={"data_dir": str(folder), "min_frequency": 1, "cache_dir": str(folder / "cache")},
        model_params={"char_ngram_buckets": 64, "dropout": 0.0, **model},
    )


@pytest.mark.parametrize("model_type", MODELS)
def test_models_train_with_letters_and_predict_from_their_folder(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = text_config(tmp_path, model_type)
    model = prepare(config).model
    assert isinstance(model, EvaluableModel)
    (part,) = [one for one in model.modules() if isinstance(one, CharacterNgrams)]
    assert int((part.buckets_VM[2:, 0] > 0).sum()) == len(part.buckets_VM) - 2
    result = run(config, quiet=True)
    trained = research_eval.load(result.folder)
    first = trained.predict(["sun suns", "dog dogs"])
    assert len(first) == 2
    again = research_eval.load(result.folder).predict(["sun suns", "dog dogs"])
    assert json.dumps(first, default=str) == json.dumps(again, default=str)


def test_numbers_have_no_letters() -> None:
    with pytest.raises(ConfigError, match=r"model_params\.char_ngram_buckets: the tokens of these data are numbers"):
        prepare(small_config(model_params={"char_ngram_buckets": 8}))
