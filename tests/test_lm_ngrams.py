"""Counted n-grams against a slow version with dictionaries, and the sums of their probabilities.

V ids  S tokens
"""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_eval.datasets.language import ngrams
from research_eval.datasets.language.ngrams import best_order, estimated_discounts, kneser_ney, ngram_scores
from research_eval.datasets.providers import load_splits

Gram = tuple[int, ...]


def slow_discounts(counts: Counter[Gram]) -> list[float]:
    """D for a count of 1, 2, 3 or more."""
    n1, n2, n3, n4 = (sum(count == times for count in counts.values()) for times in (1, 2, 3, 4))
    if 0 in (n1, n2, n3):
        return [0.5, 0.5, 0.5]
    y = n1 / (n1 + 2 * n2)
    found = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return [min(max(one, 0.05), times) for times, one in enumerate(found, 1)]


def slow_probability(train: list[int], highest: int, vocab_size: int, context: Gram, token: int) -> float:
    """The definition, word by word. It counts all n-grams again for every call."""
    probability = 1 / (vocab_size - 1)
    for k in range(1, highest + 1):
        if k - 1 > len(context):
            break
        counts: Counter[Gram] = Counter()
        if k == highest:
            counts.update(tuple(train[start : start + k]) for start in range(len(train) - k + 1))
        else:
            longer = {tuple(train[start : start + k + 1]) for start in range(len(train) - k)}
            counts.update(gram[1:] for gram in longer)
        of_context = {gram: count for gram, count in counts.items() if gram[:-1] == context[len(context) - k + 1 :]}
        total = sum(of_context.values())
        if total:
            d = [0.0, *slow_discounts(counts)]
            own = counts[(*context[len(context) - k + 1 :], token)]
            left = sum(d[min(count, 3)] for count in of_context.values())
            probability = (own - d[min(own, 3)]) / total + left / total * probability
    return probability


STREAM = st.lists(st.integers(1, 4), min_size=12, max_size=60)


@settings(max_examples=25, deadline=None)
@given(STREAM, st.lists(st.integers(1, 5), min_size=2, max_size=8))
def test_the_probabilities_are_those_of_the_definition(train: list[int], scored: list[int]) -> None:
    """Id 5 never occurs in training."""
    found = kneser_ney(np.array(train, np.int32), 4, 6).log_probabilities(np.array(scored, np.int32))
    for highest in range(1, 5):
        for place in range(1, len(scored)):
            context = tuple(scored[max(0, place - highest + 1) : place])
            expected = slow_probability(train, highest, 6, context, scored[place])
            assert math.exp(found[highest - 1, place - 1]) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(STREAM, st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_the_probabilities_of_all_tokens_sum_to_one(train: list[int], context: list[int]) -> None:
    model = kneser_ney(np.array(train, np.int32), 5, 6)
    sums = sum(np.exp(model.log_probabilities(np.array([*context, token], np.int32))[:, -1]) for token in range(1, 6))
    np.testing.assert_allclose(sums, 1, rtol=1e-12)


def test_discounts_are_estimated_from_the_counts_of_counts() -> None:
    counts = np.repeat([1, 2, 3, 4, 5], [10, 5, 3, 2, 1])
    y = 10 / 20
    expected = [0, 1 - 2 * y * 5 / 10, 2 - 3 * y * 3 / 5, 3 - 4 * y * 2 / 3]
    np.testing.assert_allclose(estimated_discounts(counts), expected)
    assert estimated_discounts(np.array([1, 1, 7])).tolist() == [0, 0.5, 0.5, 0.5]
    assert estimated_discounts(np.repeat([1, 2, 3], [1, 1, 9]))[2] == 0.05  # else it would be negative


def repeated(pattern: str, times: int, noise: float = 0.0, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    rng = np.random.default_rng(seed)
    ids = np.array([ord(letter) - 95 for letter in pattern * times], np.int32)
    wrong = rng.random(len(ids)) < noise
    return np.where(wrong, rng.integers(2, 28, len(ids)), ids).astype(np.int32)


def test_the_order_is_chosen_on_training_text_alone() -> None:
    long_memory = repeated("aabaac", 400, noise=0.02)  # two letters tell nothing: three or more are needed
    independent = np.random.default_rng(0).integers(2, 28, 4000).astype(np.int32)
    assert best_order(long_memory, 6, 30) >= 3 and best_order(independent, 6, 30) == 1
    scores = ngram_scores({"train": long_memory, "validation": independent}, "char", np.ones(30, np.int64))
    assert scores["order"] == best_order(long_memory, 8, 30)


def test_more_context_helps_where_there_is_something_to_learn() -> None:
    train, other = repeated("abcabd", 500, 0.01), repeated("abcabd", 50, 0.01, seed=1)
    losses = kneser_ney(train, 4, 30).losses(other)
    assert losses[1] < losses[0] - 0.5 and abs(losses[2] - losses[1]) < 0.05  # "b" and "ab" do not tell c from d
    assert losses[3] < losses[2] - 0.1  # "cab" and "dab" do


def test_scores_are_per_token_and_per_byte(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    train, other = repeated("abcabd", 60), repeated("abd", 9, 0.2)
    bytes_V = np.array([0, 0, *[1] * 14, *[2] * 14])
    scores = ngram_scores({"train": train, "validation": other, "test": train[:50]}, "word", bytes_V)
    assert scores.keys() == {
        *("order", "train_tokens", "val_loss", "val_bits_per_byte", "test_loss", "test_bits_per_byte")
    }
    assert scores["order"] <= 4 and scores["train_tokens"] == 360
    nats = -kneser_ney(train, int(scores["order"]), 30).log_probabilities(other)[-1]
    assert scores["val_loss"] == pytest.approx(nats.mean())
    assert scores["val_bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / bytes_V[other[1:]].sum())
    bytes_V[3] = 0  # as if "b" were a special token
    special = ngram_scores({"train": train, "validation": other}, "word", bytes_V)
    kept = other[1:] != 3
    expected = nats[kept].sum() / math.log(2) / bytes_V[other[1:]].sum()
    assert special["val_bits_per_byte"] == pytest.approx(expected) and "test_loss" not in special
    monkeypatch.setattr(ngrams, "MOST_TOKENS", 100)
    with caplog.at_level("INFO"):
        assert ngram_scores({"train": train, "validation": other}, "word", bytes_V)["train_tokens"] == 100
    assert "the first 100 of 360 training tokens are counted" in caplog.text


def test_a_stream_of_few_tokens_is_counted_all_the_same() -> None:
    short = np.array([2, 3, 2], np.int32)
    assert best_order(short, 8, 4) == 1
    assert np.isfinite(kneser_ney(short, 8, 4).losses(np.array([3, 3, 3, 2, 3], np.int32))).all()


def test_other_numbers_for_the_same_letters_change_nothing() -> None:
    train, other = repeated("abcabd", 80, 0.1), repeated("abcabd", 20, 0.1, seed=1)
    names = np.random.default_rng(1).permutation(28) + 2
    renamed = [names[ids - 2].astype(np.int32) for ids in (train, other)]
    first = kneser_ney(train, 5, 30).losses(other)
    np.testing.assert_allclose(kneser_ney(renamed[0], 5, 30).losses(renamed[1]), first, rtol=1e-12)
    assert len(kneser_ney(train, 5, 30).orders) == 5


def test_the_fingerprint_has_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOE_CACHE", str(tmp_path / "cache"))
    Path("all.txt").write_text("the cat and the dog\n" * 60)
    params = {"block_size": 8}
    scores = load_splits("language_modeling", "all.txt", params, 0).fingerprint["baselines"]["ngram"]
    assert scores["val_loss"] < 0.2 and scores["val_bits_per_byte"] == pytest.approx(scores["val_loss"] / math.log(2))
    monkeypatch.setattr("research_eval.datasets.language.dataset.ngram_scores", None)  # the second time from the cache
    again = load_splits("language_modeling", "all.txt", params | {"block_size": 4}, 1).fingerprint
    assert again["baselines"]["ngram"] == scores
    without = load_splits("language_modeling", "all.txt", params | {"ngram_baseline": False}, 0).fingerprint
    assert "baselines" not in without


def test_known_losses_of_tiny_shakespeare() -> None:
    folder = os.environ.get("GOE_DATA_DIR", "")
    if not folder or not (Path(folder) / "tiny_shakespeare").is_dir():
        pytest.skip("GOE_DATA_DIR does not name a folder with tiny_shakespeare")
    params = {"data_dir": folder, "ngram_baseline": False}
    data = load_splits("language_modeling", "tiny_shakespeare", params, 0)
    losses = kneser_ney(data.train.tokens, 7, data.vocab_size).losses(data.validation.tokens)
    np.testing.assert_allclose(losses[4:], [1.561, 1.523, 1.517], atol=1e-3)
