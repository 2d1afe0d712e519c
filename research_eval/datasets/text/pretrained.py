"""The tokenizer of a pretrained model's folder, with this program's numbers for padding and unknown words.

V vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, processors

from research_eval.datasets.text.tokenizer import PAD, UNK, UNK_ID, special_ids
from research_eval.errors import ConfigError
from research_eval.system.untrusted import in_folder, parse_json, read_limited

MAX_TOKENIZER_BYTES = 100_000_000
MODELS = ("WordPiece", "WordLevel", "BPE", "Unigram")
# What a foreign tokenizer may do with a text: all of these take a time that grows with its length. A regular expression
# of its own may take exponential time.
STEPS = frozenset(
    {
        *("Sequence", "BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt"),
        *("Prepend", "Precompiled", "Replace"),
        *("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"),
    }
)
PATTERNS = (" {2,}",)  # of Replace, besides plain text
NEVER_FOUND = "{} "  # a name with a blank, which no word has: a text that spells out a special token is not that token


def folder_tokenizer(folder: Path) -> tuple[Tokenizer, NDArray[np.int64]]:
    """The tokenizer with [PAD] = 0 and [UNK] = 1, and for each of its ids the one in the folder's model [V].

    Special tokens that stand around a text in the folder's model stand there, too. A text that contains the name of a
    special token is cut like any other text. Raises ConfigError for a folder without a tokenizer that works like this.
    """
    path = in_folder(folder, "tokenizer.json")
    text = read_limited(path, MAX_TOKENIZER_BYTES, "a tokenizer")
    content = parse_json(text, str(path))
    try:
        original = Tokenizer.from_str(text.decode())
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{path}: not a tokenizer: {error}") from error
    foreign = {**content, "added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    if not has_known_steps(foreign):
        raise ConfigError(f"{path}: changes texts in a way that this program does not run. Use another model.")
    original.no_truncation()
    original.no_padding()
    before, behind = special_ids(original)
    named = _special_names(folder, content["model"])
    numbers = _numbers(content, path)
    missing = [name for name in named if name not in numbers]
    if missing or len(set(named)) < len(named):
        raise ConfigError(f"{path}: needs two different tokens for padding and for unknown words, and has {named}")
    order_V = np.arange(len(numbers))
    for place, name in enumerate(named):
        at = int(np.flatnonzero(order_V == numbers[name])[0])
        order_V[[place, at]] = order_V[[at, place]]
    new_V = np.argsort(order_V)
    foreign["model"] = _renumbered(content, numbers, new_V, dict(zip(named, (PAD, UNK), strict=True)))
    tokenizer = Tokenizer.from_str(json.dumps(foreign))
    if before or behind:
        names = {number: original.id_to_token(number) for number in [*before, *behind]}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(names[number] for number in before), "$A", *(names[number] for number in behind)],
            special_tokens=[(name, int(new_V[number])) for number, name in names.items()],
        )
    return tokenizer, order_V


def has_known_steps(content: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` may come from `folder_tokenizer`, so that it takes a bounded time for a text."""
    if any(content.get(key) for key in ("added_tokens", "truncation", "padding")):
        return False
    model, around = content.get("model"), content.get("post_processor")
    if not isinstance(model, dict) or model.get("type") not in MODELS:
        return False
    if around is not None and not (isinstance(around, dict) and around.get("type") == "TemplateProcessing"):
        return False
    return all(map(_is_known, [*_steps(content.get("normalizer")), *_steps(content.get("pre_tokenizer"))]))


def _is_known(step: Any) -> bool:
    if not isinstance(step, dict) or step.get("type") not in STEPS:
        return False
    pattern = step.get("pattern")
    return pattern is None or (isinstance(pattern, dict) and pattern.get("Regex") in (None, *PATTERNS))


def _steps(step: Any) -> Iterator[Any]:
    """A step and the steps that it consists of; nothing for none."""
    if step is not None:
        yield step
    if isinstance(step, dict):
        for inner in [*step.get("normalizers", ()), *step.get("pretokenizers", ())]:
            yield from _steps(inner)


def _special_names(folder: Path, model: dict[str, Any]) -> list[str]:
    """The names of the tokens for padding and for unknown words."""
    path = in_folder(folder, "tokenizer_config.json")
    settings = parse_json(read_limited(path, MAX_TOKENIZER_BYTES, "settings"), str(path))
    given = [settings.get(key) if isinstance(settings, dict) else None for key in ("pad_token", "unk_token")]
    names = [one.get("content") if isinstance(one, dict) else one for one in given]
    if model["type"] == "Unigram" and isinstance(model.get("unk_id"), int):
        names[1] = model["vocab"][model["unk_id"]][0]
    names[1] = model.get("unk_token") or names[1]
    found = [name for name in names if isinstance(name, str)]
    if len(found) < len(names):
        raise ConfigError(f"{path}: names no pad_token or no unk_token. Use another model.")
    return found


def _numbers(content: dict[str, Any], path: Path) -> dict[str, int]:
    """The id of every token in the folder's model, added ones among them. Raises ConfigError for gaps."""
    vocabulary = content["model"]["vocab"]
    numbers = (
        dict(vocabulary)
        if isinstance(vocabulary, dict)
        else {piece: number for number, (piece, _) in enumerate(vocabulary)}
    )
    for token in content.get("added_tokens") or []:
        numbers.setdefault(token["content"], token["id"])
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise ConfigError(f"{path}: the numbers of its tokens have gaps. Use another model.")
    return numbers


def _renumbered(
    content: dict[str, Any], numbers: dict[str, int], new_V: NDArray[np.int64], renamed: dict[str, str]
) -> dict[str, Any]:
    """The model of a `tokenizer.json` with new numbers, and with this program's names of the two renamed tokens."""
    model: dict[str, Any] = dict(content["model"])
    by_number = sorted((int(new_V[number]), renamed.get(name, name), name) for name, number in numbers.items())
    if model["type"] == "Unigram":
        special = {token["content"] for token in content.get("added_tokens") or []} | set(renamed)
        scores = dict(model["vocab"])
        model["vocab"] = [
            [NEVER_FOUND.format(new) if name in special and new != UNK else new, scores.get(name, 0.0)]
            for _, new, name in by_number
        ]
        model["unk_id"] = UNK_ID
    else:
        model["vocab"] = {new: number for number, new, _ in by_number}
        if model.get("unk_token"):
            model["unk_token"] = UNK
    return model
