"""Text classification sets: local files, several of them as one set, or the Hugging Face hub."""

from research_eval.datasets.text.cache import cached_arrays
from research_eval.datasets.text.dataset import TextDataset
from research_eval.datasets.text.hub import hub_copy
from research_eval.datasets.text.normalizing import LINE_BREAK
from research_eval.datasets.text.source import TEXT_FIELDS, TextSource
from research_eval.datasets.text.tokenizer import PAD, UNK, UNK_ID, encode_texts, train_tokenizer

__all__ = [
    "LINE_BREAK",
    "PAD",
    "TEXT_FIELDS",
    "UNK",
    "UNK_ID",
    "TextDataset",
    "TextSource",
    "cached_arrays",
    "encode_texts",
    "hub_copy",
    "train_tokenizer",
]
