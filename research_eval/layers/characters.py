"""Words through their letters: hashed character n-grams, as in fastText (Bojanowski et al., 2017).

U different tokens  M n-grams of a token  V vocabulary  D width  S tokens
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = range(2, 6)  # letters of an n-gram; the borders of a word count as letters
MOST_NGRAMS = 48  # of a token; those of a longer word are drawn evenly from all of them
BORDERS = "<{}>"


def character_ngrams(word: str) -> list[str]:
    """The n-grams of a word between its borders, the short ones first.

    >>> character_ngrams("cat")
    ['<c', 'ca', 'at', 't>', '<ca', 'cat', 'at>', '<cat', 'cat>', '<cat>']
    """
    whole = BORDERS.format(word)
    return [whole[start : start + size] for size in SIZES for start in range(len(whole) - size + 1)]


class CharacterNgrams(nn.Module):
    """The mean over a token's n-grams of rows of a table with `buckets` rows, into which the n-grams are hashed.

    A token that is no word, such as padding, has none and gives zero. `learn` has to be called once before the
    training; later the buckets of each token come with the weights.
    """

    buckets_VM: Tensor  # 0 stands for no n-gram

    def __init__(self, vocab_size: int, buckets: int, embed_dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets + 1, embed_dim, padding_idx=0)
        self.register_buffer("buckets_VM", torch.zeros(vocab_size, MOST_NGRAMS, dtype=torch.int32))

    def learn(self, words: Sequence[str | None]) -> None:
        """Take the words of the vocabulary; None for a token that is no word."""
        buckets_VM = torch.zeros(self.buckets_VM.shape, dtype=torch.int32)
        for token, word in enumerate(words):
            found = [] if word is None else character_ngrams(word)
            step = max(1, len(found) / MOST_NGRAMS)
            kept = [found[int(place * step)] for place in range(min(len(found), MOST_NGRAMS))]
            hashed = [1 + zlib.crc32(one.encode()) % (self.table.num_embeddings - 1) for one in kept]
            buckets_VM[token, : len(hashed)] = torch.tensor(hashed, dtype=torch.int32)
        self.buckets_VM.copy_(buckets_VM)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any shape -> their vectors, [..., D]. Each different token is computed once."""
        tokens_U, places = ids.unique(return_inverse=True)
        buckets_UM = self.buckets_VM[tokens_U].long()
        vectors_UD = F.embedding_bag(buckets_UM, self.table.weight, mode="mean", padding_idx=0)
        return F.embedding(places, vectors_UD)
