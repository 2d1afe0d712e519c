"""Generation: what sampling keeps, what a cache may not change, where a text ends, and the commands around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import command, run_in
from test_lm_models import LENGTH, MODELS, made
from tokenizers import Tokenizer

import research_eval
from research_eval.datasets.language.vocabulary import build_tokenizer
from research_eval.errors import ConfigError
from research_eval.generation.decoding import StopFilter, generate, prompt_ids
from research_eval.generation.sampling import SamplingSettings, generators, kept_shares, next_tokens
from research_eval.generation.trained import TrainedLanguageModel
from research_eval.main import cli
from research_eval.runs.predict import TrainedModel
from research_eval.schema import config_from_dict

TEXT = "the king and a rose, my lord.\n"  # 13 ids with two special ones would be too few: see `tokenizer`


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """As many ids as the models of test_lm_models have: padding, <unk>, a line break and ten letters."""
    return build_tokenizer("char", ["\nabcdefghij"], separated=False, vocab_size=100)


def sampled(logits: list[float], **settings: Any) -> list[int]:
    """Which ids 2,000 draws give."""
    chosen = SamplingSettings(**settings)
    draw = torch.Generator().manual_seed(0)
    rows = torch.tensor([logits], dtype=torch.float64).expand(2000, -1).clone()
    found = next_tokens(rows, [[]] * 2000, chosen, [draw] * 2000)
    return np.bincount(found, minlength=len(logits)).tolist()


# ------------------------------------------------------------------------------------------------------------- sampling


def test_a_temperature_of_zero_is_the_arg_max() -> None:
    assert sampled([1.0, 3.0, 2.0], temperature=0.0) == [0, 2000, 0]
    assert sampled([1.0, 3.0, 2.0], top_p=1e-9) == [0, 2000, 0]
    assert sampled([1.0, 3.0, 2.0], min_p=1.0) == [0, 2000, 0]


def test_draws_follow_the_probabilities() -> None:
    shares = np.array(sampled([0.0, 1.0, 2.0])) / 2000
    assert shares == pytest.approx(np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum(), abs=0.03)
    colder = np.array(sampled([0.0, 1.0, 2.0], temperature=0.5)) / 2000
    assert colder == pytest.approx(np.exp([0, 2, 4]) / np.exp([0, 2, 4]).sum(), abs=0.03)


def test_top_k_keeps_exactly_k_and_the_smaller_id_of_a_tie() -> None:
    counts = sampled([1.0, 2.0, 2.0, 2.0, 0.0], top_k=2)
    assert counts[0] == counts[3] == counts[4] == 0
    assert min(counts[1], counts[2]) > 900


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0.01, 1), st.floats(0.01, 1))
def test_top_p_and_min_p_against_the_slow_way(logits: list[float], top_p: float, min_p: float) -> None:
    shares = np.exp(logits) / np.exp(logits).sum()
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept, mass = set(), 0.0
    for token in order:
        if mass < top_p:
            kept.add(token)
        mass += shares[token]
    found_V, order_V = kept_shares(torch.tensor([logits], dtype=torch.float64), SamplingSettings(top_p=top_p))
    close = any(abs(shares[order[:n]].sum() - top_p) < 1e-9 for n in range(len(order)))  # rounding decides
    assert close or {int(token) for token, share in zip(order_V[0], found_V[0], strict=True) if share > 0} == kept
    found_V, order_V = kept_shares(torch.tensor([logits], dtype=torch.float64), SamplingSettings(min_p=min_p))
    expected = {token for token in order if shares[token] >= min_p * max(shares) * (1 + 1e-12)}
    assert {int(token) for token, share in zip(order_V[0], found_V[0], strict=True) if share > 0} >= expected


def test_the_repetition_penalty_lowers_what_was_seen() -> None:
    rows = torch.tensor([[2.0, 1.5, -1.0, -1.5]])
    settings = SamplingSettings(repetition_penalty=2.0, temperature=0.0)
    assert next_tokens(rows, [[0]], settings, generators(settings)) == [1]  # 2 / 2 is below 1.5
    rows = torch.tensor([[-3.0, -3.0, -1.0, -1.5]])
    assert next_tokens(rows, [[2, 2]], settings, generators(settings)) == [3]  # -1 * 2, once however often seen


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"temperature": -1.0}, "temperature: expected"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"top_k": 0}, "top_k: expected"),
        ({"top_p": 0.0}, "top_p: expected"),
        ({"min_p": 1.5}, "min_p: expected"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected"),
        ({"num_samples": 0}, "num_samples: expected"),
        ({"stop": ("",)}, "stop: an empty text"),
    ],
)
def test_values_outside_their_range_are_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        SamplingSettings(**settings)


# ------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_changes_no_text_also_beyond_the_window(name: str, tokenizer: Tokenizer) -> None:
    model = made(name).double().eval()
    settings = SamplingSettings(max_new_tokens=2 * LENGTH + 5, seed=3)
    cached, plain = (generate(model, tokenizer, "abba", settings, LENGTH, use_cache) for use_cache in (True, False))
    assert cached[0].text == plain[0].text
    assert len(cached[0].tokens) == settings.max_new_tokens
    assert cached[0].finish_reason == "length"


def test_a_sample_does_not_depend_on_the_others(tokenizer: Tokenizer) -> None:
    model = made("goe, features").double().eval()
    alone = generate(model, tokenizer, "a", SamplingSettings(max_new_tokens=30), LENGTH)
    three = generate(model, tokenizer, "a", SamplingSettings(max_new_tokens=30, num_samples=3), LENGTH)
    assert three[0].text == alone[0].text
    assert len({one.text for one in three}) == 3
    other = generate(model, tokenizer, "a", SamplingSettings(max_new_tokens=30, seed=1), LENGTH)
    assert other[0].text != alone[0].text


def test_special_tokens_are_never_drawn(tokenizer: Tokenizer) -> None:
    model = made("dense").eval()
    with torch.no_grad():
        model.head.linear.weight[:2] *= 100  # padding and <unk> would win
    found = generate(model, tokenizer, "a", SamplingSettings(max_new_tokens=40), LENGTH)
    assert min(found[0].tokens) >= 2


def test_what_a_prompt_becomes(tokenizer: Tokenizer) -> None:
    separated = build_tokenizer("char", ["abc"], separated=True, vocab_size=100)
    assert prompt_ids(tokenizer, "ab") == [3, 4]
    assert prompt_ids(tokenizer, "") == [2]  # a line break
    assert prompt_ids(separated, "") == [2]  # <eos>
    assert prompt_ids(separated, "a") == [2, 3]  # a document begins with <eos>
    with pytest.raises(ConfigError, match='has no "X", "é"'):
        prompt_ids(tokenizer, "aXéa")
    with pytest.raises(ConfigError, match="no line break"):
        prompt_ids(build_tokenizer("char", ["abc"], separated=False, vocab_size=100), "")


def test_a_text_ends_at_eos() -> None:
    separated = build_tokenizer("char", ["abcdefghij"], separated=True, vocab_size=100)
    model = made("dense").eval()
    found = generate(model, separated, "a", SamplingSettings(max_new_tokens=400), LENGTH)
    assert found[0].finish_reason == "eos"
    assert 2 not in found[0].tokens


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_texts_across_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    """In whatever pieces a text arrives, it ends before the first stop text that is complete first."""
    keeper, passed, place = StopFilter(stops), "", 0
    while place < len(text) and not keeper.has_stopped:
        size = data.draw(st.integers(1, 3))
        passed += keeper.push(text[place : place + size])
        place += size
        seen = text[:place]
        places = [seen.find(stop) for stop in stops if stop in seen]
        assert keeper.has_stopped is bool(places)
        if places:
            assert passed == seen[: min(places)]
    if not keeper.has_stopped:
        assert passed + keeper.finish() == text


def test_streamed_pieces_add_up_to_the_text_and_have_whole_characters() -> None:
    byte = build_tokenizer("byte", [""], separated=False, vocab_size=0)
    from research_eval.annotations import build
    from research_eval.registry import LANGUAGE_MODELS

    model = build(LANGUAGE_MODELS["dense"], {"vocab_size": 258, "max_length": LENGTH, "embed_dim": 8, "num_heads": 2})
    pieces: list[str] = []
    found = generate(
        model.eval(),
        byte,
        "é",
        SamplingSettings(max_new_tokens=60),
        LENGTH,
        on_text=lambda _, part: pieces.append(part),
    )
    assert "".join(pieces) == found[0].text
    assert all(pieces)
    found[0].text.encode()  # no half of a character


# ------------------------------------------------------------------------------------------------------- whole commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database and one run of a small model that has seen one line again and again."""
    folder = tmp_path_factory.mktemp("trained")
    for split, lines in (("train", 60), ("validation", 6)):
        (folder / f"{split}.txt").write_text(TEXT * lines)
    config = {
        "model_type": "goe",
        "dataset_type": "language_modeling",
        "dataset_name": "verse",
        "batch_size": 8,
        "dataset_params": {"data_dir": str(folder), "block_size": 32, "ngram_baseline": False},
        "model_params": {"embed_dim": 32, "num_heads": 2, "num_total_experts": 4, "max_path_len": 2, "route": "bigram"},
        "training_params": {"max_steps": 150, "eval_every": 150, "device": "cpu", "num_threads": 1},
    }
    assert run_in(folder, config_from_dict(config)).status == "finished"
    return folder


def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.chdir(folder)
    return command(cli, *words)


def test_the_command_writes_what_was_learned(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("generate", "--run", "latest", "--prompt", "the ", "--temperature", "0", "--stop", "\\n")
    ended = in_folder(trained, monkeypatch, *words)
    assert (ended.code, ended.out) == (0, "the king and a rose, my lord.\n")
    assert "tokens/s" in ended.err
    for flag in ("--no_stream", "--no_cache"):
        assert in_folder(trained, monkeypatch, *words, flag).out == ended.out


def test_json_lines_and_a_file_of_prompts(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (trained / "prompts.jsonl").write_text('{"prompt": "the king"}\n\n{"prompt": "a rose"}\n')
    words = ("generate", "--run", "latest", "--json", "--max_new_tokens", "7", "--num_samples", "2", "--seed", "4")
    ended = in_folder(trained, monkeypatch, *words, "--prompt_file", "prompts.jsonl")
    records = [json.loads(line) for line in ended.out.splitlines()]
    assert [(one["prompt"], one["sample"]) for one in records] == [
        *(("the king", 0), ("the king", 1)),
        *(("a rose", 0), ("a rose", 1)),
    ]
    assert {one["tokens"] for one in records} == {7}
    assert {one["finish_reason"] for one in records} == {"length"}
    assert in_folder(trained, monkeypatch, *words, "--prompt_file", "prompts.jsonl").out == ended.out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--prompt", "THE"], 'the vocabulary of the run has no "T", "H", "E"'),
        (["--prompt_file", "none.txt"], "cannot read none.txt as text"),
        (["--top_p", "2"], "top_p: expected"),
    ],
)
def test_mistakes_have_one_clear_message(
    words: list[str], part: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = in_folder(trained, monkeypatch, "generate", "--run", "latest", *words)
    assert ended.code == 2
    assert part in ended.err
    assert not ended.out


def test_classifiers_and_language_models_are_told_apart(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = in_folder(trained, monkeypatch, "predict", "--run", "latest", "--text", "the")
    assert ended.code == 2
    assert "goe generate --run" in ended.err
    small = {"model_type": "dense", "dataset_type": "synthetic", "dataset_name": "parity", "epochs": 1, "batch_size": 8}
    small |= {"dataset_params": {"num_samples": 40}, "model_params": {"embed_dim": 8, "num_heads": 2}}
    run_in(tmp_path, config_from_dict(small))
    ended = in_folder(tmp_path, monkeypatch, "generate", "--run", "latest")
    assert ended.code == 2
    assert "goe predict --run" in ended.err
    assert isinstance(research_eval.load("latest"), TrainedModel)


def test_a_loaded_model_writes_and_scores(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    model = research_eval.load("latest", device="cpu")
    assert isinstance(model, TrainedLanguageModel)
    assert model.generate("the ", temperature=0, max_new_tokens=4) == "king"
    assert len(model.generate("the ", num_samples=2, max_new_tokens=4)) == 2
    known, strange = model.loss(TEXT * 3), model.loss(TEXT[::-1] * 3)
    assert known["loss"] < 0.5 < strange["loss"]
    assert known["bits_per_byte"] == pytest.approx(known["loss"] / np.log(2))
    logits_LV = model.logits("the king")
    assert logits_LV.shape[0] == 8
    with pytest.raises(ConfigError, match="at least two tokens"):
        model.loss("t")


def test_an_exported_model_is_the_same_model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "exported"
    ended = in_folder(trained, monkeypatch, "export-model", "--run", "latest", "--out", str(out))
    assert ended.code == 0
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in out.iterdir()} == names
    before = research_eval.load("latest", device="cpu")
    monkeypatch.chdir(tmp_path)  # neither database nor data
    after = research_eval.load(out, device="cpu")
    assert isinstance(before, TrainedLanguageModel)
    assert isinstance(after, TrainedLanguageModel)
    assert (before.logits(TEXT[:-1]) == after.logits(TEXT[:-1])).all()
    assert command(cli, "generate", "--run", str(out), "--prompt", "the ", "--temperature", "0").code == 0
    again = in_folder(trained, monkeypatch, "export-model", "--run", "latest", "--out", str(out))
    assert again.code == 2
    assert "not an empty folder" in again.err


def test_transformers_opens_an_exported_model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `trace`")
    from research_eval.generation.hf import register

    out = tmp_path / "exported"
    assert in_folder(trained, monkeypatch, "export-model", "--run", "latest", "--out", str(out)).code == 0
    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours = research_eval.load(out, device="cpu")
    assert isinstance(ours, TrainedLanguageModel)
    text = "the king and a rose"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    found = model(**ids, labels=ids["input_ids"])
    assert (found.logits[0].detach().numpy() == ours.logits(text)).all()
    assert found.loss.item() == pytest.approx(ours.loss(text)["loss"], abs=1e-5)
    longer = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(longer[0]) == text + str(ours.generate(text, temperature=0, max_new_tokens=5))
