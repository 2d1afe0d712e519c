"""From token ids to hidden states, and from hidden states to class scores.

B batch  L length  D width  C classes  V vocabulary (padding included)
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from research_eval.layers.characters import CharacterNgrams
from research_eval.layers.pretrained import PretrainedTrunk
from research_eval.layers.settings import EncoderSettings
from research_eval.layers.settings import Pool as Pool
from research_eval.layers.settings import PositionalEncoding as PositionalEncoding
from research_eval.layers.stacked import Dropout

RANDOM_RANGE = 2048  # range of the positions of "random"; the largest in Ruoss et al. (2023)
SMALLEST_GAP = 1e-4  # the mean gap is 1; a smaller gap may vanish in the rounding of the sum


def masked_mean(h_BLD: torch.Tensor, keep_BL: torch.Tensor | None) -> torch.Tensor:
    """Mean over the real tokens, [B, D]; zero for a sample without tokens. Without a mask all tokens are real."""
    if keep_BL is None:
        return h_BLD.mean(1)
    weights_BL1 = keep_BL.unsqueeze(-1).to(h_BLD.dtype)
    return (h_BLD * weights_BL1).sum(1) / weights_BL1.sum(1).clamp_min(1)


def masked_max(h_BLD: torch.Tensor, keep_BL: torch.Tensor | None) -> torch.Tensor:
    """Largest value over the real tokens, [B, D]; zero for a sample without tokens. Without a mask all are real."""
    if keep_BL is None:
        return h_BLD.amax(1)
    largest_BD = h_BLD.masked_fill(~keep_BL.unsqueeze(-1), torch.finfo(h_BLD.dtype).min).amax(1)
    return largest_BD * keep_BL.any(1, keepdim=True)


def sinusoids(length: int, embed_dim: int) -> torch.Tensor:
    """The fixed positional encoding of Vaswani et al. (2017), [L, D]."""
    return sinusoids_at(torch.arange(length, dtype=torch.float32), embed_dim)


def sinusoids_at(positions: torch.Tensor, embed_dim: int) -> torch.Tensor:
    """The encoding of `sinusoids` at arbitrary positions [...], fractions included: [..., D]."""
    rates = torch.arange(0, embed_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.unsqueeze(-1) * torch.exp(rates * (-math.log(10_000.0) / embed_dim))
    table = positions.new_zeros(*positions.shape, embed_dim)
    table[..., 0::2] = torch.sin(angles)
    table[..., 1::2] = torch.cos(angles[..., : embed_dim // 2])
    return table


def sinusoids_for(ids_BL: torch.Tensor, embed_dim: int, known_LD: torch.Tensor) -> torch.Tensor:
    """A table with at least as many positions as a batch: the known one, if it suffices.

    A new table is at least twice as long, so that growing batches rebuild it rarely.
    """
    length = ids_BL.shape[1]
    if len(known_LD) >= length and known_LD.device == ids_BL.device:
        return known_LD
    return sinusoids_at(torch.arange(max(length, 2 * len(known_LD)), dtype=torch.float32), embed_dim).to(ids_BL.device)


def spread_positions(keep_BL: torch.Tensor, training: bool) -> torch.Tensor:
    """Increasing positions in (0, RANDOM_RANGE) for each sample's tokens, [B, L] float32.

    In training they are sorted uniform draws: the gaps are exponential variables, divided by their sum. In evaluation
    they are the means of these draws, which are evenly spaced. They depend on the sample's own length only, so padding
    and the other samples of the batch change nothing.
    """
    gaps_BL = torch.ones(keep_BL.shape, device=keep_BL.device)
    last_B1 = gaps_BL[:, :1]
    if training:
        gaps_BL, last_B1 = gaps_BL.exponential_(), torch.empty_like(last_B1).exponential_()
        gaps_BL = gaps_BL.clamp_min(SMALLEST_GAP)
    reached_BL = (gaps_BL * keep_BL).cumsum(1)
    return RANDOM_RANGE * reached_BL / (reached_BL[:, -1:] + last_B1)


class TokenEmbedding(nn.Module):
    """h_0 = Drop(LN(sqrt(D) Emb[x] + PE)), optionally with hashed bigrams added to each token.

    A bigram (previous token, token) is hashed into one of `bigram_buckets` additional rows, as in fastText (Joulin et
    al., 2017). It adds word order for the price of a look-up. `char_ngram_buckets` adds the mean of a word's hashed
    character n-grams, so that words with common parts are alike from the beginning. In training, `token_dropout` sets
    whole tokens to zero. A small `embedding_scale` makes all tokens start alike, so that words that are too rare to be
    learnt add little noise.
    PE is zero if `positional_encoding` is "none", or if the attention implements it ("rope", "alibi").
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        padding_idx: int,
        dropout: float,
        positional_encoding: PositionalEncoding = "sin",
        bigram_buckets: int = 0,
        token_dropout: float = 0.0,
        embedding_scale: float = 1.0,
        char_ngram_buckets: int = 0,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx)
        self.bigram = nn.Embedding(bigram_buckets, embed_dim) if bigram_buckets else None
        self.characters = CharacterNgrams(vocab_size, char_ngram_buckets, embed_dim) if char_ngram_buckets else None
        for table in (self.token, self.bigram, None if self.characters is None else self.characters.table):
            if table is not None:
                nn.init.normal_(table.weight, std=embedding_scale * embed_dim**-0.5)
        with torch.no_grad():
            self.token.weight[padding_idx].zero_()
            if self.characters is not None:
                self.characters.table.weight[0].zero_()
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)
        self.token_dropout = Dropout(token_dropout)
        self._positional_encoding = positional_encoding
        self._positions_LD = torch.empty(0, embed_dim)

    @classmethod
    def of(cls, vocab_size: int, padding_idx: int, settings: EncoderSettings) -> nn.Module:
        """The embedding of an encoder with these settings, or the pretrained encoder that stands in its place."""
        if settings.pretrained_dir:
            return PretrainedTrunk(settings.pretrained_dir, vocab_size, settings.embed_dim, settings.dropout)
        return cls(
            vocab_size,
            settings.embed_dim,
            padding_idx,
            settings.dropout,
            settings.positional_encoding,
            settings.bigram_buckets,
            settings.token_dropout,
            settings.embedding_scale,
            settings.char_ngram_buckets,
        )

    def forward(self, ids_BL: torch.Tensor, keep_BL: torch.Tensor) -> torch.Tensor:
        """Ids [B, L] int64 and mask [B, L] bool -> states [B, L, D]."""
        length, width = ids_BL.shape[1], self.token.embedding_dim
        h_BLD = self.token(ids_BL)
        if self.bigram is not None:
            previous_BL = F.pad(ids_BL[:, :-1], (1, 0))
            # Two odd multipliers spread neighbouring ids; the shift uses the product's well-mixed upper bits.
            mixed_BL = (ids_BL * 0x9E3779B1 + previous_BL * 0x85EBCA77) >> 13
            h_BLD = h_BLD + self.bigram(mixed_BL % self.bigram.num_embeddings)
        if self.characters is not None:
            h_BLD = h_BLD + self.characters(ids_BL)
        if self.token_dropout.p:
            h_BLD = h_BLD * self.token_dropout(keep_BL.to(h_BLD.dtype)).unsqueeze(-1)
        h_BLD = h_BLD * math.sqrt(width)
        if self._positional_encoding == "sin":
            self._positions_LD = sinusoids_for(ids_BL, width, self._positions_LD)
            h_BLD = h_BLD + self._positions_LD[:length]
        elif self._positional_encoding == "random":
            h_BLD = h_BLD + sinusoids_at(spread_positions(keep_BL, self.training), width)
        return self.dropout(self.norm(h_BLD))


class ClassificationHead(nn.Module):
    """LN, pooling over the real tokens, dropout, then a linear map to class scores."""

    def __init__(self, embed_dim: int, num_classes: int, dropout: float, pool: Pool = "mean") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(embed_dim, num_classes)
        self.pool = pool

    def forward(self, h_BLD: torch.Tensor, keep_BL: torch.Tensor | None) -> torch.Tensor:
        """States [B, L, D] and mask [B, L] -> logits [B, C]. Without a mask all tokens are real."""
        h_BLD = self.norm(h_BLD)
        if self.pool == "mean":
            pooled_BD = masked_mean(h_BLD, keep_BL)
        elif self.pool == "max":
            pooled_BD = masked_max(h_BLD, keep_BL)
        elif self.pool == "first":
            pooled_BD = h_BLD[:, 0]
        elif keep_BL is None:
            pooled_BD = h_BLD[:, -1]
        else:
            last_B = (keep_BL.sum(1) - 1).clamp_min(0)
            pooled_BD = h_BLD[torch.arange(len(h_BLD), device=h_BLD.device), last_B]
        return self.linear(self.dropout(pooled_BD))
