"""Running text: vocabularies, streams of ids and their batches, files, and the kind of data "language_modeling".

S tokens  L block  B batch
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, pre_tokenizers

from research_eval.datasets.kinds import dataset_kind, dataset_type_of
from research_eval.datasets.language import facts, vocabulary
from research_eval.datasets.language.corpus import read_corpus
from research_eval.datasets.language.stream import StreamBatches, TokenStream, encoded
from research_eval.datasets.language.vocabulary import (
    StreamDecoder,
    build_tokenizer,
    decode,
    encode,
    encode_many,
    kind_of,
    piece_bytes,
    piece_characters,
    unknown_characters,
)
from research_eval.datasets.providers import load_splits
from research_eval.datasets.token_data import IGNORED, Batch, DataSplits
from research_eval.errors import ConfigError
from research_eval.runs.data_block import data_block
from research_eval.runs.predict import read_tokenizer
from research_eval.schema import config_from_dict, json_schema
from research_eval.store.data_facts import facts_lines
from tests.support import small_settings

KINDS: list[vocabulary.TokenizerKind] = ["char", "byte", "word", "bpe"]
POEM = "The sun is up,\nthe moon is down; it's fünf o'clock.\n\n  Two  blanks — and a 𝒳 with 12,5 %\r\nof rest.\n" * 4
SIZES = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOE_CACHE", str(tmp_path / "cache"))


def load(name: str = "mine", earlier: Tokenizer | None = None, **params: Any) -> DataSplits:
    params = {"ngram_baseline": False, "block_size": 8} | params
    return load_splits("language_modeling", name, params, seed=0, tokenizer=earlier)


def stream(size: int, length: int, starts: list[int] | None = None, **options: Any) -> TokenStream:
    """Tokens 3, 4, 5, ..., so that a token tells its place."""
    places = None if starts is None else np.array(starts, np.int64)
    return TokenStream.of(np.arange(3, size + 3, dtype=np.int32), length, places, **options)


def targets_of(batches: StreamBatches, epoch: int = 0) -> list[int]:
    """The places in the stream that count as targets, in the order of the batches."""
    found: list[int] = []
    for batch in batches.epoch(epoch):
        found += (batch.labels[batch.labels != IGNORED] - 3).tolist()
    return found


# -------------------------------------------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("separated", [False, True])
def test_the_text_of_the_training_comes_back_also_from_a_stored_tokenizer(
    kind: vocabulary.TokenizerKind, separated: bool
) -> None:
    tokenizer = build_tokenizer(kind, [POEM], separated, 400)
    stored = Tokenizer.from_str(tokenizer.to_str())
    ids = encode(tokenizer, POEM)
    assert ids.dtype == np.int32 and decode(tokenizer, ids) == decode(stored, ids.tolist()) == POEM
    np.testing.assert_array_equal(encode(stored, POEM), ids)
    assert tokenizer.encode(POEM).ids == ids.tolist()  # the library alone does the same
    for counts, other, whole in (
        (piece_bytes(tokenizer), piece_bytes(stored), len(POEM.encode())),
        (piece_characters(tokenizer), piece_characters(stored), len(POEM)),
    ):
        np.testing.assert_array_equal(counts, other)
        assert counts[ids].sum() == whole and len(counts) == tokenizer.get_vocab_size()
        assert not counts[: 2 + separated].any()
    assert piece_bytes(tokenizer)[2 + separated :].all()
    assert kind_of(stored) == kind and ids.min() >= 2 + separated
    assert [stored.token_to_id(name) for name in ("<pad>", "<unk>", "<eos>")] == [0, 1, 2 if separated else None]


def test_ids_are_in_the_order_that_the_kind_promises() -> None:
    char = build_tokenizer("char", ["ba\n", "é𝒳"], True, 0)
    assert [char.id_to_token(number) for number in range(3, 8)] == ["\n", "a", "b", "é", "𝒳"]
    byte = build_tokenizer("byte", [""], True, 0)
    assert encode(byte, "\0aé").tolist() == [3, 100, 3 + 0xC3, 3 + 0xA9]
    assert byte.get_vocab_size() == 259
    word = build_tokenizer("word", ["b b b a a c\n"], False, 5)  # the three most frequent pieces
    assert [word.id_to_token(number) for number in range(2, 5)] == [" a", " b", "\n"]
    pairs = build_tokenizer("bpe", ["ab ab ab abc\n" * 3], False, 261)
    assert encode(pairs, "ab")[0] == 258 and encode(pairs, " ab").tolist() == [259] and encode(pairs, "c")[0] == 2 + 99


def test_a_text_cannot_spell_a_special_token() -> None:
    for kind in KINDS:
        tokenizer = build_tokenizer(kind, ["<eos> <pad> <unk>"], True, 300)
        ids = encode(tokenizer, "<eos><pad><unk>")
        assert ids.min() > 2 and len(ids) >= 9 and decode(tokenizer, ids) == "<eos><pad><unk>"


@SIZES
@given(st.text(max_size=60), st.sampled_from(["byte", "bpe"]))
def test_bytes_and_byte_pairs_know_every_text(text: str, kind: vocabulary.TokenizerKind) -> None:
    tokenizer = PAIRS[kind]
    ids = encode(tokenizer, text)
    assert decode(tokenizer, ids) == text and (len(ids) == 0 or ids.min() > 1)
    assert piece_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert piece_characters(tokenizer)[ids].sum() == len(text)
    assert tokenizer.encode(text).ids == ids.tolist() and unknown_characters(tokenizer, text) == []


PAIRS = {kind: build_tokenizer(kind, [POEM], True, 400) for kind in KINDS}


@SIZES
@given(st.text(max_size=60))
def test_characters_that_training_lacks_are_unknown_and_no_others(text: str) -> None:
    known = set(POEM)
    ids = encode(PAIRS["char"], text)
    assert [number == 1 for number in ids] == [letter not in known for letter in text]
    assert decode(PAIRS["char"], ids) == "".join(letter if letter in known else "\ufffd" for letter in text)
    assert unknown_characters(PAIRS["char"], text) == [letter for letter in dict.fromkeys(text) if letter not in known]


@SIZES
@given(st.text(max_size=80), st.sampled_from([vocabulary.WORD, vocabulary.PAIRED]))
def test_the_pieces_of_any_text_joined_are_the_text(text: str, pattern: str) -> None:
    found = pre_tokenizers.Split(vocabulary.Regex(pattern), "isolated").pre_tokenize_str(text)
    assert "".join(piece for piece, _ in found) == text


def test_words_keep_the_blank_before_them() -> None:
    tokenizer = build_tokenizer("word", ["It's naïve, they\u2019d say:\n\n 12 ways"], False, 100)
    pieces = [tokenizer.id_to_token(number) for number in encode(tokenizer, "It's naïve, they\u2019d say:\n\n 12 ways")]
    assert pieces == ["It's", " naïve", ",", " they\u2019d", " say", ":", "\n", "\n", " 12", " ways"]
    assert unknown_characters(tokenizer, "It's a 12-way") == [" a", "-", "way"]


@SIZES
@given(st.lists(st.text("ab \n\té1.", max_size=40), max_size=5), st.integers(1, 30))
def test_long_texts_are_encoded_in_parts_as_if_they_were_whole(texts: list[str], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "CHUNK", size)
        patch.setattr(vocabulary, "ENCODE_ROWS", 3)
        for kind in KINDS:
            ids, lengths = encode_many(PAIRS[kind], texts)
            assert lengths.tolist() == [len(PAIRS[kind].encode(text).ids) for text in texts]
            assert ids.tolist() == [number for text in texts for number in PAIRS[kind].encode(text).ids]


def test_training_does_not_depend_on_how_a_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [build_tokenizer(kind, [POEM], True, 330).to_str() for kind in KINDS]
    monkeypatch.setattr(vocabulary, "CHUNK", 7)
    assert [build_tokenizer(kind, [POEM], True, 330).to_str() for kind in KINDS] == whole


@SIZES
@given(st.lists(st.integers(0, 399), max_size=30), st.text(max_size=20))
def test_a_stream_of_ids_gives_whole_characters_only(random_ids: list[int], text: str) -> None:
    for kind, tokenizer in PAIRS.items():
        size = tokenizer.get_vocab_size()
        for ids in (encode(tokenizer, text).tolist(), [number % size for number in random_ids]):
            decoder = StreamDecoder(tokenizer)
            parts = [decoder.push(number) for number in ids]
            assert "".join(parts) + decoder.finish() == decode(tokenizer, ids)
            known = b"".join(vocabulary.piece_texts(tokenizer)[number] or b"?" * (number == 1) for number in ids)
            if kind in ("byte", "bpe") and 1 not in ids:
                assert decode(tokenizer, ids) == known.decode("utf-8", "replace")
    byte = StreamDecoder(PAIRS["byte"])
    parts = [byte.push(number) for number in encode(PAIRS["byte"], text)]
    assert all(unicodedata.category(letter) != "Cs" for part in parts for letter in part)
    assert [part for part in parts if part] == list(text)  # each character with its last byte


def test_half_surrogate_pairs_are_unknown_characters() -> None:
    for tokenizer in PAIRS.values():
        assert unknown_characters(tokenizer, "a\udce4b")[0] == "\udce4" or kind_of(tokenizer) == "word"
        assert "\ufffd" in decode(tokenizer, encode(tokenizer, "a\udce4"))


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    content = json.loads(PAIRS["char"].to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = read_tokenizer(tmp_path, 100)
    assert found is not None and found.to_str() == PAIRS["char"].to_str()
    for change in ({"pre_tokenizer": None}, {"model": {**content["model"], "vocab": {"<unk>": 0}}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
        with pytest.raises(ConfigError, match="not a tokenizer of ours"):
            read_tokenizer(tmp_path, 100)
    with pytest.raises(ConfigError, match="none of a language model"):
        kind_of(Tokenizer.from_str(json.dumps(content | {"pre_tokenizer": None})))


# -------------------------------------------------------------------------------------------- the stream and its blocks


def test_eos_opens_each_document_and_closes_the_stream() -> None:
    tokenizer = build_tokenizer("char", ["ab"], True, 0)
    tokens, starts = encoded(tokenizer, ["ab", "b", "aa"])
    assert tokens.tolist() == [2, 3, 4, 2, 4, 2, 3, 3, 2] and starts.tolist() == [0, 3, 5]
    tokens, starts = encoded(build_tokenizer("char", ["ab"], False, 0), ["ab", "b"])
    assert tokens.tolist() == [2, 3, 3] and starts.tolist() == []


@SIZES
@given(st.integers(2, 60), st.integers(2, 9), st.integers(1, 7), st.integers(0, 5))
def test_every_target_of_an_epoch_occurs_once_except_at_the_ends(
    size: int, length: int, batch: int, epoch: int
) -> None:
    data = stream(size + length, length)
    batches = data.batches(batch, seed=3)
    found = sorted(targets_of(batches, epoch))
    assert found == list(range(found[0], found[0] + length * data.samples_per_epoch))  # each once, without gaps
    assert 1 <= found[0] <= length and len(data.tokens) - 1 - found[-1] <= 2 * length
    assert len(batches) == len(batches.order(epoch)) and sum(map(len, batches.order(epoch))) == data.samples_per_epoch
    for one in batches.epoch(epoch):
        assert one.attention_mask.all() and one.input_ids.shape[1] == length and one.num_tokens == one.labels.numel()
        torch.testing.assert_close(one.labels, one.input_ids + 1)  # here the next token is the next number
        assert one.rows is not None and (one.rows + 3).tolist() == one.input_ids[:, 0].tolist()


def test_the_order_follows_from_the_seed_and_the_epoch_alone() -> None:
    def order(seed: int, epoch: int, size: int) -> list[int]:
        return np.concatenate(stream(500, 8).batches(size, seed=seed).order(epoch)).tolist()

    batches = stream(500, 8).batches(4, seed=1)
    again = [np.concatenate(batches.order(epoch)).tolist() for epoch in (2, 0, 1)]
    assert again == [order(1, epoch, 7) for epoch in (2, 0, 1)]
    starts = [order(1, epoch, 7) for epoch in range(20)]
    assert len({tuple(one) for one in starts}) == 20 and len({min(one) for one in starts}) > 5  # other phases
    assert order(1, 0, 7) != order(2, 0, 7)


def test_phases_cover_all_places_of_a_block() -> None:
    batches = stream(100, 4).batches(100, seed=0)
    assert {int(min(batches.order(epoch)[0])) for epoch in range(100)} == {0, 1, 2, 3}
    short = stream(6, 4).batches(2, seed=0)  # room for a block at places 0 and 1 only
    assert {int(min(short.order(epoch)[0])) for epoch in range(40)} == {0, 1}


@SIZES
@given(st.integers(2, 40), st.integers(2, 12))
def test_an_evaluation_scores_every_token_but_the_first_for_any_batch_size(size: int, length: int) -> None:
    data = stream(size, length)
    assert len(data) == len(data.lengths) and data.lengths.sum() == size - 1 == data.num_targets
    for batch_size in (1, 3, 64):
        batches = data.batches(batch_size)
        assert targets_of(batches) == list(range(1, size)) and len(list(batches)) == len(batches)
        for batch in batches:
            real = batch.labels != IGNORED
            assert torch.equal(real, batch.attention_mask) and not batch.input_ids[~real].any()
            assert batch.input_ids.shape[1] == length and batch.num_tokens == int(real.sum())
            assert batch.rows is not None
            for row, ids, keep in zip(batch.rows, batch.input_ids, real, strict=True):
                assert ids[keep].tolist() == data.sample(row)
        rows = np.concatenate([batch.rows for batch in batches if batch.rows is not None])
        assert rows.tolist() == list(range(len(data)))
    assert data.labels.tolist() == [data.tokens[place + 1] for place in data.offsets[:-1]]


@SIZES
@given(st.integers(2, 50), st.integers(2, 9), st.data())
def test_sliding_windows_score_every_target_once(size: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length - 1))
    whole = stream(size, length, eval_stride=stride)
    for batches in (whole.batches(4).sliding(), whole.batches(4).sliding(stride)):
        assert targets_of(batches) == list(range(1, size)) and len(list(batches)) == len(batches)
    seen = [
        int(place) + 1
        for batch in whole.batches(5).sliding()
        for row in batch.labels != IGNORED
        for place in row.nonzero()
    ]
    assert min(seen[length:], default=length) > length - stride  # with that many tokens before it


@SIZES
@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.integers(2, 9), st.booleans())
def test_documents_never_mix(lengths: list[int], length: int, trains: bool) -> None:
    starts = np.cumsum([0, *lengths])  # a document takes its length with <eos>
    size = int(starts[-1]) + 1
    data = stream(size, length, starts[:-1].tolist())
    owner = np.repeat(np.arange(len(lengths)), lengths)  # of each token but the last <eos>
    if trains and size <= length:
        return
    for batch in data.batches(3, seed=0 if trains else None):
        assert batch.documents is not None and batch.documents.shape == batch.input_ids.shape
        real = batch.attention_mask
        assert batch.documents[real].tolist() == owner[batch.input_ids[real].numpy() - 3].tolist()
    plain = stream(size, length, starts[:-1].tolist(), respect_documents=False)
    assert all(batch.documents is None for batch in plain.batches(3))


def test_the_hash_is_that_of_tokens_and_documents() -> None:
    first = stream(30, 4, [0, 7]).sha256()
    assert first == stream(30, 9, [0, 7], respect_documents=False).sha256()
    assert len({first, stream(30, 4, [0, 8]).sha256(), stream(31, 4, [0, 7]).sha256(), stream(30, 4).sha256()}) == 4


def test_a_mapped_stream_gives_the_same_batches(tmp_path: Path) -> None:
    data = stream(40, 4)
    np.save(tmp_path / "ids.npy", data.tokens)
    mapped = TokenStream.of(np.load(tmp_path / "ids.npy", mmap_mode="r"), 4)
    for seed in (None, 1):
        for one, other in zip(data.batches(3, seed=seed), mapped.batches(3, seed=seed), strict=True):
            assert_equal(one, other)
    assert mapped.sha256() == data.sha256()


def assert_equal(one: Batch, other: Batch) -> None:
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(getattr(one, name), getattr(other, name))


# --------------------------------------------------------------------------------------------------------------- files


ROWS = ["One line.\n", "Another é line\n", "and more of it\n", "the end\n"]


def write(path: str, content: str | bytes | list[str], column: str = "text") -> str:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        if ".parquet" in path:
            parquet.write_table(pa.table({"id": range(len(content)), column: content}), file)
            return path
        content = "".join(json.dumps({"id": number, column: row}) + "\n" for number, row in enumerate(content))
    content = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(content) if path.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.jsonl.gz", "train.txt", "train.txt.gz"])
def test_all_files_give_the_same_text(name: str) -> None:
    text = "".join(ROWS)
    write(f"set/{name}", text if ".txt" in name else ROWS)
    write("set/valid.txt", "the end\n\n")
    write("set/test.txt", "the test")
    found = read_corpus(Path("set"), "none", None, 0.1)
    assert {split: part.texts for split, part in found.items()} == {
        "train": [text],
        "validation": ["the end\n\n"],
        "test": ["the test"],
    }
    rows = read_corpus(Path("set"), "row", None, 0.1)
    assert [row.removesuffix("\n") for row in rows["train"].texts] == [row[:-1] for row in ROWS]
    assert rows["validation"].texts == ["the end"]  # without the lines that have no character
    assert read_corpus(Path("set"), "file", None, 0.1)["train"].texts == [text]


def test_the_files_of_a_folder_can_be_documents() -> None:
    for number in range(3):
        write(f"set/train/{number}.txt", f"text {number}\n")
    write("set/validation/only.txt", "one more\n")
    found = read_corpus(Path("set"), "file", None, 0.1)
    assert found["train"].texts == ["text 0\n", "text 1\n", "text 2\n"] and found["validation"].texts == ["one more\n"]
    assert read_corpus(Path("set"), "none", None, 0.1)["train"].texts == ["text 0\ntext 1\ntext 2\n"]


@pytest.mark.parametrize("document", ["none", "row"])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.95])
def test_the_end_of_the_text_is_the_validation_split_where_there_is_none(document: Any, fraction: float) -> None:
    lines = [f"line number {number}\n" for number in range(100)]
    write("all.txt", "".join(lines))
    found = read_corpus(Path("all.txt"), document, None, fraction)
    train, validation = (found[name].texts for name in ("train", "validation"))
    assert "".join([*train, *validation]) == "".join(lines).replace("\n", "" if document == "row" else "\n")
    share = sum(map(len, validation)) / sum(map(len, [*train, *validation]))
    assert fraction <= share < fraction + 0.02
    assert validation[0].startswith("line") and train[-1].rstrip("\n")[-1].isdigit()  # cut between lines


def test_a_text_without_line_breaks_is_cut_at_a_blank() -> None:
    write("all.txt", "abc " * 50)
    found = read_corpus(Path("all.txt"), "none", None, 0.1)
    assert len(found["validation"].texts[0]) == 20 and found["validation"].texts[0].startswith("abc")


def test_the_column_is_given_or_called_text_or_the_only_one_with_texts(caplog: pytest.LogCaptureFixture) -> None:
    write("set/train.parquet", ROWS, "body_of_it")
    assert read_corpus(Path("set"), "row", None, 0.3)["train"].origin == "train.parquet: text from 'body_of_it'"
    assert "body_of_it" not in caplog.text or "column" in caplog.text
    write("two.jsonl", "".join(json.dumps({"title": "a", "text": row}) + "\n" for row in ROWS))
    assert read_corpus(Path("two.jsonl"), "row", None, 0.3)["train"].texts[0] == ROWS[0]
    assert read_corpus(Path("two.jsonl"), "row", "title", 0.3)["train"].texts[0] == "a"
    write("two.csv", "number,words\n1,some words\n2,other words\n3,last words\n")
    assert read_corpus(Path("two.csv"), "row", None, 0.3)["train"].texts[0] == "some words"


def test_rows_that_run_into_each_other_are_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    write("set.jsonl", [row.rstrip() for row in ROWS])
    assert read_corpus(Path("set.jsonl"), "none", None, 0.3)
    assert "runs into the next row" in caplog.text and '"document": "row"' in caplog.text


@pytest.mark.parametrize(
    ("name", "params", "complaint"),
    [
        ("mine", {"data_dir": "nowhere"}, r"dataset_params.data_dir: there is no file or folder 'nowhere'"),
        ("nowhere.txt", {}, r"dataset_name: there is no file or folder 'nowhere.txt'. Did you mean 'somewhere.txt'"),
        ("mine", {}, r"unknown 'mine'.* Text of your own needs dataset_params.data_dir"),
        ("war_and_peace", {}, r"'war_and_peace' needs dataset_params.data_dir"),
        ("mine", {"data_dir": "empty"}, r"empty: no train.parquet"),
        ("mine", {"data_dir": "blank"}, r"validation.txt: the validation split has no text"),
        ("mine", {"data_dir": "numbers.jsonl"}, r"numbers.jsonl: no column 'text'; found a, b. Set .*text_field"),
        ("two.jsonl", {}, r"two.jsonl: no column 'text'; found title, body"),
        ("two.jsonl", {"text_field": "bodi"}, r"no column 'bodi'; found title, body. Did you mean 'body'\?"),
        ("numbers.jsonl", {"text_field": "a"}, r"column 'a' holds int64, not text"),
        ("somewhere.txt", {"block_size": 64}, r"the last 10% of somewhere.txt: the validation split has 20 tokens;"),
        ("somewhere.txt", {"document": "file"}, r"one document only, which cannot give a validation split"),
        ("somewhere.txt", {"tokenizer": "bpe", "vocab_size": 100}, r"vocab_size=100: bpe needs 258 or more"),
        ("somewhere.txt", {"eval_stride": 8}, r"eval_stride=8: expected 1 to 7, below block_size=8"),
        ("latin.txt", {}, r"latin.txt:1: not UTF-8"),
    ],
)
def test_errors_say_what_is_wrong(name: str, params: dict[str, Any], complaint: str) -> None:
    write("somewhere.txt", "abc\n" * 50)
    Path("empty").mkdir()
    write("blank/train.txt", "abc\n" * 50)
    write("blank/validation.txt", "")
    write("numbers.jsonl", '{"a": 1, "b": 2}\n' * 9)
    write("two.jsonl", '{"title": "one", "body": "two"}\n' * 9)
    write("latin.txt", b"\xe4bc\n" * 50)
    with pytest.raises(ConfigError, match=complaint):
        load(name, **params)


# ---------------------------------------------------------------------------------------------------- the kind of data


def test_the_splits_say_what_a_model_needs() -> None:
    write("poems/mine/train.txt", POEM)
    write("poems/mine/validation.txt", "The moon is upß\n")
    data = load(data_dir="poems", eval_stride=4)
    assert isinstance(data.train, TokenStream) and data.test is None and data.task == "next_token"
    assert data.vocab_size == data.num_classes == 2 + len(set(POEM)) and data.label_names == [] and data.max_length == 8
    assert data.tokenizer is not None and decode(data.tokenizer, data.train.tokens) == POEM
    assert data.validation.tokens.tolist().count(1) == 1  # the letter that training lacks
    assert isinstance(data.validation, TokenStream) and data.validation.eval_stride == 4
    fingerprint = data.fingerprint
    assert fingerprint["source"] == "data_dir poems" and fingerprint["read_from"]["train"] == "train.txt"
    assert fingerprint["sha256"].keys() == {"train", "validation"} and len(fingerprint["data_sha256"]) == 64
    # The folder of the set itself, one file, and a path as the name lead to the same training text.
    for params in ({"data_dir": "poems/mine"}, {"data_dir": "poems/mine/train.txt"}):
        assert load(**params).tokenizer is not None
    named = load("poems/mine/train.txt")
    assert named.fingerprint["source"] == "file poems/mine/train.txt"
    assert load(data_dir="poems/mine", document="row").fingerprint["sha256"] != fingerprint["sha256"]


def test_documents_need_a_vocabulary_with_eos() -> None:
    write("all.jsonl", [f"document {number} of some words" for number in range(30)])
    data = load("all.jsonl", document="row")
    assert isinstance(data.train, TokenStream) and data.tokenizer is not None
    assert (data.train.tokens == 2).sum() == len(data.train.document_starts) + 1 == 28
    text = decode(data.tokenizer, data.train.tokens[: data.train.document_starts[1]])
    assert text == "document 0 of some words"
    assert next(iter(data.train.batches(2))).documents is not None
    assert next(iter(load("all.jsonl", document="row", respect_documents=False).train.batches(2))).documents is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_of_an_earlier_run_is_used(kind: vocabulary.TokenizerKind) -> None:
    write("all.txt", POEM)
    earlier = build_tokenizer(kind, [POEM + "ÄÖÜ neue Wörter"], False, 300)
    params = {"tokenizer": kind, "vocab_size": 290}
    data, own = load("all.txt", earlier, **params), load("all.txt", **params)
    assert data.vocab_size == earlier.get_vocab_size() and data.tokenizer is earlier
    assert data.fingerprint["sha256"] == own.fingerprint["sha256"]  # that of the text
    if kind != "byte":
        assert data.fingerprint["tokenizer_sha256"] != own.fingerprint["tokenizer_sha256"]
    with pytest.raises(ConfigError, match=f"the earlier run, which is '{kind}' without <eos>"):
        load("all.txt", earlier, tokenizer="char" if kind != "char" else "byte")


@pytest.mark.parametrize("document", ["none", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_from_the_cache_equals_a_fresh_one(kind: str, document: str) -> None:
    write("all.jsonl", [f"document {number} of words\n" for number in range(30)])
    params = {"tokenizer": kind, "vocab_size": 300, "document": document}
    fresh, again = load("all.jsonl", **params), load("all.jsonl", **params)
    assert fresh.tokenizer is not None
    texts = read_corpus(Path("all.jsonl"), document, None, 0.1)  # type: ignore[arg-type]
    for name, one, other in (("train", fresh.train, again.train), ("validation", fresh.validation, again.validation)):
        assert isinstance(one, TokenStream) and isinstance(other, TokenStream) and isinstance(other.tokens, np.memmap)
        tokens, starts = encoded(fresh.tokenizer, texts[name].texts)
        for part in (one, other):
            assert part.tokens.tolist() == tokens.tolist() and part.document_starts.tolist() == starts.tolist()
            assert part.tokens.dtype == np.int32 and not part.tokens.flags.writeable
        assert [batch.labels.tolist() for batch in one.batches(3, seed=1)] == [
            batch.labels.tolist() for batch in other.batches(3, seed=1)
        ]
    files = [path.name for path in Path("cache").glob("stream-*.npy")]
    assert len(files) == 2
    load("all.jsonl", **params, block_size=5)
    assert len(list(Path("cache").glob("stream-*.npy"))) == 2  # the ids do not depend on the blocks


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text", "pickle", "float", "vocabulary"])
def test_a_damaged_cache_file_is_encoded_again(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    write("all.txt", POEM)
    tokens = load("all.txt").train.tokens.tolist()
    for path in Path("cache").glob("stream-*.npy"):
        content = path.read_bytes()
        if damage in ("pickle", "float", "vocabulary"):
            wrong = {"pickle": np.array([{}]), "float": np.ones(99), "vocabulary": np.full(99, 77, np.int32)}[damage]
            if damage == "vocabulary":
                wrong = np.append(wrong, np.frombuffer(hashlib.sha256(wrong).digest(), np.int32))
            path.unlink()
            np.save(path, wrong)
        else:
            path.write_bytes(
                {
                    "cut": content[:-5],
                    "bit": content[:300] + bytes([content[300] ^ 1]) + content[301:],
                    "empty": b"",
                    "text": b"abc",
                }[damage]
            )
    assert load("all.txt").train.tokens.tolist() == tokens
    assert caplog.text.count("is encoded again") == 2
    assert not list(Path("cache").glob(".*"))


@pytest.mark.parametrize("content", ["", "[]", '{"facts": {}, "sha256": "x"}', "[" * 500])
def test_damaged_facts_are_made_again(content: str, caplog: pytest.LogCaptureFixture) -> None:
    write("all.txt", POEM)
    fingerprint = load("all.txt", ngram_baseline=True).fingerprint
    files = [*Path("cache").glob("*.json")]
    for path in files:
        path.write_text(content)
    assert load("all.txt", ngram_baseline=True).fingerprint == fingerprint
    assert len(files) == 2 and caplog.text.count("is made again") == 2


# --------------------------------------------------------------------------------------------------------------- facts


def test_what_the_fingerprint_says_of_a_text() -> None:
    write("all/train.jsonl", ["aé b\n", "bcd"])
    write("all/validation.jsonl", ["axx", "ab"])
    fingerprint = load("all", data_dir="all", document="row", block_size=4).fingerprint
    assert fingerprint["tokens"] == {"train": 11, "validation": 8}  # with <eos> before each document and at the end
    assert fingerprint["characters"] == {"train": 8, "validation": 5} and fingerprint["bytes"]["train"] == 9
    assert fingerprint["documents"] == {"train": 2, "validation": 2}
    assert fingerprint["distinct_ids"] == {"train": 8, "validation": 4}
    assert fingerprint["unknown_share"] == {"train": 0.0, "validation": 0.25}
    assert "documents" not in load("all", data_dir="all", block_size=4).fingerprint


@pytest.mark.parametrize("kind", ["char", "word"])
def test_many_unknown_tokens_are_a_warning_with_a_better_tokenizer(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    write("all/train.txt", "abc def\n" * 50)
    write("all/validation.txt", "abc xyz\n" * 10)
    load("all", data_dir="all", tokenizer=kind, vocab_size=50)
    better = {"char": "byte", "word": "bpe"}[kind]
    assert f'of validation (share of the tokens). "tokenizer": "{better}" knows every text' in caplog.text
    caplog.clear()
    load("all", data_dir="all", tokenizer=better, vocab_size=300)
    assert "does not know" not in caplog.text


@SIZES
@given(st.text("ab", max_size=60), st.text("ab", max_size=60), st.integers(1, 6), st.integers(1, 20))
def test_shared_windows_are_those_that_a_search_finds(train: str, other: str, window: int, part: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "PART", part)
        found = facts.shared_windows(train, other, window)
    windows = [other[start : start + window] for start in range(0, len(other) - window + 1, window)]
    assert found == (sum(one in train for one in windows) / len(windows) if windows else 0)


def test_hashes_tell_apart_windows_that_differ_in_one_character() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 0x10FFFF, size=20_000).astype(np.uint32)
    hashes = facts.window_hashes(codes, 50)
    assert len(np.unique(hashes)) == len(codes) - 49
    changed = np.concatenate([codes[:50]] * 50).reshape(50, 50)
    changed[np.arange(50), np.arange(50)] ^= 1
    assert len({int(facts.window_hashes(row, 50)[0]) for row in [codes[:50], *changed]}) == 51


def test_validation_text_that_training_has_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefgh \n"))
    train, other = ("".join(rng.choice(letters, 3000)) for _ in range(2))
    write("all/train.txt", train)
    write("all/validation.txt", train[777:1277] + other[:500])
    write("all/test.txt", other)
    assert load("all", data_dir="all").fingerprint["shared_windows"] == {"validation": 0.5, "test": 0.0}
    assert "50.0% of validation occur in the training text too" in caplog.text


def test_the_data_block_shows_sizes_and_the_counted_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    write("all/train.txt", POEM)
    write("all/validation.txt", POEM[:60])
    write("all/test.txt", POEM[:90])
    monkeypatch.setenv("COLUMNS", "200")
    lines = data_block("mine", load("mine", data_dir="all", ngram_baseline=True))
    cells = {line[:20].strip(): line[20:].split() for line in lines}
    assert lines[0] == "data: mine (data_dir all)" and cells[""] == ["train", "validation", "test"]
    assert cells["tokens"] == cells["characters"] == [str(len(POEM)), "60", "90"]
    assert cells["different tokens"][0] == str(len(set(POEM)))
    assert cells["text in train too"] == ["-", "100.0", "%", "100.0", "%"]
    (note,) = [line for line in lines if "Kneser-Ney" in line]
    assert re.search(r"n-grams of order \d: validation loss \d\.\d{4}, bits per byte \d\.\d{4}; test loss", note)
    assert not any("rows" in line for line in lines)
    assert "first 10 training tokens" in "".join(
        facts_lines({"tokens": {"train": 99}, "baselines": {"ngram": {"order": 2, "train_tokens": 10}}}, 200)
    )


def test_names_that_are_accepted() -> None:
    kind = dataset_kind("language_modeling")
    assert {"tiny_shakespeare", "war_and_peace", "imdb_unsup"} <= set(kind.names())
    assert kind.any_name and kind.task("tiny_shakespeare") == "next_token"
    assert dataset_type_of("tiny_shakespeare") == "language_modeling" and dataset_type_of("mine") == "real_world"
    accepted = ["tiny_shakespeare", "books/mine.txt", "mine.parquet", "mine.jsonl.gz", "owner/corpus"]
    assert all(kind.accepts(name, {}) for name in accepted)
    assert not any(kind.accepts(name, {}) for name in ["mine", "../mine", "/a/b/c"])
    assert kind.accepts("mine", {"data_dir": "x"})


def test_a_config_of_this_kind_has_its_own_defaults() -> None:
    write("all.txt", POEM)
    config = config_from_dict(
        small_settings(dataset_type="language_modeling", dataset_name="all.txt", dataset_params={})
    )
    assert config.optimizer_params.name == "muon" and config.scheduler_params.name == "wsd"
    assert config.dataset_params["tokenizer"] == "char" and config.dataset_params["block_size"] == 128
    rules = [rule for rule in json_schema()["allOf"] if "language_modeling" in json.dumps(rule["if"])]
    assert any("dataset_params" in rule["then"]["properties"] for rule in rules)


def test_tiny_shakespeare_is_the_known_text() -> None:
    folder = os.environ.get("GOE_DATA_DIR", "")
    if not (Path(folder) / "tiny_shakespeare").is_dir() or not folder:
        pytest.skip("GOE_DATA_DIR does not name a folder with tiny_shakespeare")
    data = load("tiny_shakespeare", data_dir=folder, block_size=64)
    assert (len(data.train.tokens), len(data.validation.tokens), data.vocab_size) == (1_003_854, 111_540, 67)
