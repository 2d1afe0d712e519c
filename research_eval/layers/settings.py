"""Options that several models share, as settings groups (`research_eval.annotations`).

This module does not import torch, so that reading options stays cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from research_eval.annotations import Choice, Count, Divides, Natural, Positive, Range, Share, When, Younger
from research_eval.errors import ConfigError

PositionalEncoding = Literal["sin", "none", "rope", "alibi", "random"]  # layers/text and layers/block implement them
Pool = Literal["mean", "max", "first", "last"]  # how the head reduces the tokens' states to one vector


def feed_forward_width(embed_dim: int, dim_feedforward: int | None, factor: float | None, default: float) -> int:
    """The inner width from either of its two spellings; `default` times the width if neither is given.

    Raises ConfigError if both are given.
    """
    if dim_feedforward is not None and factor is not None:
        raise ConfigError(
            f"dim_feedforward={dim_feedforward} and dim_feedforward_factor={factor} name the same width: give one"
        )
    return dim_feedforward if dim_feedforward is not None else max(1, round(embed_dim * (factor or default)))


@dataclass(frozen=True)
class EncoderSettings:
    """The options of a Transformer encoder: width, attention, feed-forward part, regularisation, input and head.

    A sampled study draws options in the order of these fields. Add new fields at the end, so that studies with the same
    seed stay the same.
    """

    embed_dim: Annotated[Count, Choice(32, 64, 128)] = 64
    num_heads: Annotated[Count, Choice(1, 2, 4, 8), Divides("embed_dim")] = 4
    dim_feedforward: Count | None = None
    dim_feedforward_factor: Annotated[Positive | None, Choice(1.0, 2.0, 4.0), When("dim_feedforward", None)] = None
    dropout: Annotated[Share, Range(0.0, 0.3)] = 0.1
    positional_encoding: PositionalEncoding = "sin"
    pool: Pool = "mean"
    bigram_buckets: Natural = 0
    token_dropout: Share = 0.0
    embedding_scale: Positive = 1.0
    char_ngram_buckets: Annotated[Natural, Younger()] = 0
    pretrained_dir: Annotated[str | None, Younger()] = None

    def feed_forward_width(self, default: float) -> int:
        """The inner width of the feed-forward part: as given, or `default` times `embed_dim`.

        Raises ConfigError if both spellings of the width are given.
        """
        return feed_forward_width(self.embed_dim, self.dim_feedforward, self.dim_feedforward_factor, default)
