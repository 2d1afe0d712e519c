"""What happens to a text before it is cut into words: nothing silently, and the same for every script."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from research_eval.datasets.text import LINE_BREAK, encode_texts, train_tokenizer
from research_eval.datasets.text.normalizing import has_our_steps, normalizer_of, word_splitter
from research_eval.datasets.text.tokenizer import TokenizerSettings
from research_eval.errors import ConfigError
from research_eval.schema import config_from_dict

KINDS = ["word", "wordpiece", "bpe"]


def words(text: str, lowercase: bool = True, **changes: Any) -> list[str]:
    normal = normalizer_of(lowercase, **changes).normalize_str(text)
    return [word for word, _ in word_splitter().pre_tokenize_str(normal)]


def words_of_earlier_versions(text: str) -> list[str]:
    """As all versions did before there were options, exact for English."""
    steps = [normalizers.Replace(Regex(LINE_BREAK), " "), normalizers.BertNormalizer(lowercase=True)]
    normal = normalizers.Sequence(steps).normalize_str(text)
    return [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(normal)]


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("French", "Un CAFÉ à Noël", ["un", "café", "à", "noël"]),
        ("German", "STRASSE, Straße GROẞ", ["strasse", ",", "straße", "groß"]),
        ("Turkish", "Ilık ısı İzmir", ["ilık", "ısı", "i̇zmir"]),
        ("Vietnamese", "Tiếng Việt", ["tiếng", "việt"]),
        ("Russian", "Мой Ёж", ["мой", "ёж"]),
        ("Greek", "ΟΔΥΣΣΕΥΣ Οδυσσεύς ΣΑΣ.", ["οδυσσευς", "οδυσσεύς", "σας", "."]),
        ("Hindi", "हिन्दी में क़िताब।", ["हिन्दी", "में", "क़िताब", "।"]),
        ("Bengali", "আমি বাংলায়", ["আমি", unicodedata.normalize("NFC", "বাংলায়")]),
        ("Tamil", "தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("Telugu", "తెలుగు భాష", ["తెలుగు", "భాష"]),
        ("Malayalam", "അവന്\u200d വന്നു", ["അവന്\u200d", "വന്നു"]),
        ("Thai", "หนังดี มาก", ["หนังดี", "มาก"]),
        ("Khmer", "ខ្ញុំ\u200bស្រឡាញ់", ["ខ្ញុំ", "ស្រឡាញ់"]),
        ("Arabic", "مَرْحَبًا بك", [unicodedata.normalize("NFC", "مَرْحَبًا"), "بك"]),
        ("Persian", "می\u200cخواهم", ["می\u200cخواهم"]),
        ("Hebrew", "שָׁלוֹם\u200f עולם", [unicodedata.normalize("NFC", "שָׁלוֹם"), "עולם"]),
        ("Korean", unicodedata.normalize("NFD", "한국어 각"), ["한국어", "각"]),
        ("Chinese", "我爱NLP。𠀀", ["我", "爱", "nlp", "。", "𠀀"]),
        ("emoji", "👩\u200d💻 fine", ["👩\u200d💻", "fine"]),
    ],
)
def test_words_of_every_script_stay_whole(language: str, text: str, expected: list[str]) -> None:
    normal = [unicodedata.normalize("NFC", word) for word in expected]
    assert words(text) == normal
    tokenizer = train_tokenizer([text], "word", 100, 1, lowercase=True)
    assert tokenizer.encode(unicodedata.normalize("NFD", text)).tokens == normal


@given(st.text())
def test_canonically_equivalent_texts_are_equal(text: str) -> None:
    composed, apart = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert words(text) == words(composed) == words(apart)
    assert words(text, lowercase=False) == words(apart, lowercase=False)


@given(st.text(st.characters(min_codepoint=0x41, max_codepoint=0x52F, categories=["Lu", "Ll"])))
def test_lower_case_is_that_of_unicode(text: str) -> None:
    """Latin, Greek and Cyrillic letters, with the two forms of a small sigma."""
    assert "".join(words(text)) == unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())


ASCII = st.text(st.characters(max_codepoint=0x7F, exclude_characters="\v\f")) | st.sampled_from(
    ["<br />a<br>", "Don't STOP.", "a\x07b\x00c", "C:\\x\ty\r\nz"]
)


@given(ASCII)
def test_english_has_the_words_of_earlier_versions(text: str) -> None:
    assert words(text) == words_of_earlier_versions(text)


@pytest.mark.parametrize("kind", KINDS)
def test_english_has_the_vocabulary_of_earlier_versions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"The {first}{second}ing of <br />{second}, {first}'s!" for first in "abcdef" for second in "stuvw"]
    now = train_tokenizer(texts, kind, 100, 1, lowercase=True)  # type: ignore[arg-type]
    steps = normalizers.Sequence(
        [normalizers.Replace(Regex(LINE_BREAK), " "), normalizers.BertNormalizer(lowercase=True)]
    )
    module = "research_eval.datasets.text.tokenizer"
    monkeypatch.setattr(f"{module}.normalizer_of", lambda lowercase: steps)
    monkeypatch.setattr(f"{module}.word_splitter", pre_tokenizers.BertPreTokenizer)
    before = train_tokenizer(texts, kind, 100, 1, lowercase=True)  # type: ignore[arg-type]
    assert now.get_vocab() == before.get_vocab()
    assert [now.encode(text).ids for text in texts] == [before.encode(text).ids for text in texts]


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({"strip_accents": True}, "Café Ёж ΟΔΟΣ ό हिन्दी", ["cafe", "еж", "οδος", "ο", "हिन्दी"]),
        ({"unicode_form": "nfkc"}, "Ｆull ﬁne ² ™", ["full", "fine", "2", "tm"]),
        ({}, "J\u030c", ["\u01f0"]),  # the small letter has a composed form, the capital has none
        ({"unicode_form": "none"}, "e\u0301", ["e\u0301"]),
        ({"turkish_i": True}, "Ilık İzmir I\u0307", ["ılık", "izmir", "i"]),
        ({"html_line_breaks": False}, "a<br />b", ["a", "<", "br", "/", ">", "b"]),
        ({"drop_invisible": False}, "co\u00adop", ["co\u00adop"]),
        ({}, "co\u00adop \ufeffa\u202eb x\x0cy", ["coop", "ab", "x", "y"]),
        ({"lowercase": False}, "Café İ ΣΑΣ", ["Café", "İ", "ΣΑΣ"]),
    ],
)
def test_each_change_of_a_text_is_an_option(options: dict[str, Any], text: str, expected: list[str]) -> None:
    assert words(text, **options) == expected


def test_options_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"turkish_i=true .* set lowercase to true"):
        TokenizerSettings(lowercase=False, turkish_i=True)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_alphabet_has_the_letters_that_are_composed(kind: str) -> None:
    texts = [unicodedata.normalize("NFD", "été café")] * 3
    tokenizer = train_tokenizer(texts, kind, 100, 1, lowercase=True)  # type: ignore[arg-type]
    assert 1 not in encode_texts(tokenizer, ["ÉCAFÉTÉ"], 20).tokens  # no unknown token


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("form", ["nfc", "nfkc", "none"])
@pytest.mark.parametrize("option", ["strip_accents", "turkish_i", "html_line_breaks", "drop_invisible"])
def test_a_tokenizer_of_ours_is_known_and_another_is_not(lowercase: bool, form: str, option: str) -> None:
    defaults = {"strip_accents": False, "turkish_i": False, "html_line_breaks": True, "drop_invisible": True}
    changes = {option: not defaults[option], "unicode_form": form}
    content = json.loads(train_tokenizer(["a b"], "word", 100, 1, lowercase, **changes).to_str())
    assert has_our_steps(content)
    steps = content["normalizer"]["normalizers"]
    for foreign in ({"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": " "}, {"type": "Prepend"}):
        assert not has_our_steps({**content, "normalizer": {"type": "Sequence", "normalizers": [*steps, foreign]}})
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    words_of_it = {"type": "Sequence", "pretokenizers": [split, {"type": "BertPreTokenizer"}]}
    assert not has_our_steps({**content, "pre_tokenizer": words_of_it})


def test_a_tokenizer_of_earlier_versions_is_known_and_works_as_it_did() -> None:
    content = json.loads(train_tokenizer(["cafe noir"], "word", 100, 1, lowercase=True).to_str())
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Replace", "pattern": {"Regex": LINE_BREAK}, "content": " "},
            {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": True,
                "strip_accents": None,
                "lowercase": True,
            },
        ],
    }
    content["pre_tokenizer"] = {"type": "BertPreTokenizer"}
    assert has_our_steps(content)
    assert Tokenizer.from_str(json.dumps(content)).encode("Café<br />NOIR").tokens == ["cafe", "noir"]


# ------------------------------------------------------------------------------------------------ identity of configs


YOUNGER = {
    "strip_accents": False,
    "unicode_form": "nfc",
    "turkish_i": False,
    "html_line_breaks": True,
    "drop_invisible": True,
    "delimiter": None,
    "columns": None,
    "quotes": True,
    "encoding": None,
    "val_size": None,
    "test_size": None,
}


def stored(**params: Any) -> dict[str, Any]:
    top = {"model_type": "dense", "dataset_type": "real_world", "dataset_name": "x", "epochs": 1, "batch_size": 2}
    found = config_from_dict({**top, "dataset_params": {"data_dir": "x", **params}}).to_dict()["dataset_params"]
    assert isinstance(found, dict)
    return found


def test_a_config_without_the_younger_keys_is_stored_as_before_them() -> None:
    """So `--resume` finds the runs of earlier versions, whose configs are compared as text."""
    before = {
        "max_length": 256,
        "train_samples": None,
        "val_samples": None,
        "data_dir": "x",
        "sources": None,
        "path_length": 0,
        "text_field": None,
        "label_field": None,
        "tokenizer": "word",
        "tokenizer_vocab_size": 20000,
        "min_frequency": 2,
        "lowercase": True,
        "truncation": "head",
        "cache_dir": None,
    }
    assert stored() == before
    assert stored(**YOUNGER) == before  # the defaults written out are the same config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strip_accents", True),
        ("unicode_form", "nfkc"),
        ("turkish_i", True),
        ("html_line_breaks", False),
        ("drop_invisible", False),
        ("delimiter", ";"),
        ("columns", ["label", "text"]),
        ("quotes", False),
        ("encoding", "cp1252"),
        ("val_size", 0.2),
        ("test_size", 100),
        ("text_field", ["title", "body"]),
    ],
)
def test_a_config_with_a_younger_key_is_another_one(name: str, value: Any) -> None:
    assert stored(**{name: value}) == {**stored(), name: value}
    assert stored(**stored(**{name: value})) == stored(**{name: value})
