"""How a text is changed before it is cut into words: options, the steps that they stand for, and words themselves.

The steps are a part of `tokenizer.json`, so that a run folder needs nothing else. Each one holds for every script:
lower-casing keeps accents and vowel signs, and canonically equivalent texts become equal.
"""

from __future__ import annotations

from typing import Any, Literal

from tokenizers import Regex, normalizers, pre_tokenizers

UnicodeForm = Literal["nfc", "nfkc", "none"]

LINE_BREAK = r"<br\s*/?>"  # of web pages
# Control characters that separate nothing, soft hyphens, marks of the writing direction, joiners of words and
# byte-order marks. The joiners U+200C and U+200D stay: Persian and Indian scripts spell words with them.
INVISIBLE = (
    r"[\x{0}-\x{8}\x{e}-\x{1f}\x{7f}-\x{84}\x{86}-\x{9f}\x{ad}\x{61c}\x{200e}\x{200f}\x{202a}-\x{202e}"
    r"\x{2060}-\x{2064}\x{2066}-\x{2069}\x{feff}]"
)
ZERO_WIDTH_SPACE = r"\x{200b}"  # separates words in Thai, Lao, Khmer and Burmese
# Upper-case sigma has two lower-case forms. The library knows one of them, which is wrong at the end of a word.
LAST_SIGMA = r"(?<=[\p{L}\p{M}])Σ(?![\p{L}\p{M}])"
DOTTED_I = r"I\x{307}|İ"
ACCENTS = r"[\x{300}-\x{36f}]"  # combining accents of Latin, Greek and Cyrillic; vowel signs are other characters
HAN = r"\p{Han}"

# All replacements that a tokenizer of ours may have: a foreign regular expression can take exponential time.
REPLACED = {
    LINE_BREAK: " ",
    INVISIBLE: "",
    ZERO_WIDTH_SPACE: " ",
    LAST_SIGMA: "ς",
    DOTTED_I: "i",
    "I": "ı",
    ACCENTS: "",
}
MAX_STEPS = 20


def normalizer_of(
    lowercase: bool,
    *,
    strip_accents: bool = False,
    unicode_form: UnicodeForm = "nfc",
    turkish_i: bool = False,
    html_line_breaks: bool = True,
    drop_invisible: bool = True,
) -> normalizers.Normalizer:
    """The steps from a text to its normal form; `TokenizerSettings` explains the options."""
    forms: dict[UnicodeForm, list[normalizers.Normalizer]] = {"nfc": [normalizers.NFC()], "nfkc": [normalizers.NFKC()]}
    form = forms.get(unicode_form, [])
    steps: list[normalizers.Normalizer] = [_replace(LINE_BREAK)] if html_line_breaks else []
    steps += form
    if drop_invisible:
        steps += [_replace(INVISIBLE), _replace(ZERO_WIDTH_SPACE)]
    if lowercase:
        steps += [_replace(DOTTED_I), _replace("I")] if turkish_i else []
        steps += [_replace(LAST_SIGMA), normalizers.Lowercase()]
    if strip_accents:
        steps += [normalizers.NFD(), _replace(ACCENTS), *([] if form else [normalizers.NFC()])]
    # A second time, because a lower-case letter may have a composed form that its upper-case letter lacks.
    return normalizers.Sequence(steps + form)


def _replace(pattern: str) -> normalizers.Normalizer:
    return normalizers.Replace(Regex(pattern), REPLACED[pattern])


def word_splitter() -> pre_tokenizers.PreTokenizer:
    """Words are separated by white space; a punctuation mark and a Chinese character are words of their own."""
    chinese = pre_tokenizers.Split(Regex(HAN), "isolated")
    return pre_tokenizers.Sequence([chinese, pre_tokenizers.BertPreTokenizer()])


# ---------------------------------------------------------------------------------------------- is a file one of ours


def has_our_steps(content: dict[str, Any]) -> bool:
    """Whether everything in a `tokenizer.json`, except the vocabulary, is as this or an earlier version writes it."""
    if any(content.get(key) for key in ("post_processor", "added_tokens", "truncation", "padding")):
        return False
    steps, words = _steps(content.get("normalizer"), "normalizers"), content.get("pre_tokenizer")
    if [step.get("type") for step in steps] == ["Replace", "BertNormalizer"]:  # before the options above existed
        return _is_ours(steps[0]) and _type_of(words) == "BertPreTokenizer"
    splits = _steps(words, "pretokenizers")
    return (
        0 <= len(steps) <= MAX_STEPS
        and _type_of(content.get("normalizer")) == "Sequence"
        and all(map(_is_ours, steps))
        and [step.get("type") for step in splits] == ["Split", "BertPreTokenizer"]
        and splits[0].get("pattern") == {"Regex": HAN}
        and splits[0].get("behavior") == "Isolated"
        and splits[0].get("invert") is False
    )


def _type_of(step: Any) -> Any:
    return step.get("type") if isinstance(step, dict) else None


def _steps(sequence: Any, key: str) -> list[dict[str, Any]]:
    """The parts of a sequence of steps; empty for anything else."""
    steps = sequence.get(key) if isinstance(sequence, dict) else None
    return steps if isinstance(steps, list) and all(isinstance(step, dict) for step in steps) else []


def _is_ours(step: dict[str, Any]) -> bool:
    """Whether `normalizer_of` may have written this step."""
    if step.get("type") != "Replace":
        return step.get("type") in ("NFC", "NFKC", "NFD", "Lowercase")
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) and len(pattern) == 1 else None
    return isinstance(regex, str) and REPLACED.get(regex) == step.get("content")
