"""The dense Transformer encoder: every sample passes every block."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from research_eval.annotations import Choice, Count, Divides, Natural, Positive, Range, Share, When
from research_eval.layers.block import Block, block_flops, feed_forward_width
from research_eval.layers.kernels import Dispatch
from research_eval.layers.text import ClassificationHead, Pool, PositionalEncoding, TokenEmbedding
from research_eval.models.base_model import EvaluableModel, keep_mask
from research_eval.registry import MODELS_MAP


@MODELS_MAP.register("dense")
class DenseTransformerClassifier(EvaluableModel):
    """Embedding, `num_layers` pre-LN blocks, pooled head."""

    model_type = "dense"

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        embed_dim: Annotated[Count, Choice(32, 64, 128)] = 64,
        num_layers: Annotated[Count, Range(1, 4)] = 2,
        num_heads: Annotated[Count, Choice(1, 2, 4, 8), Divides("embed_dim")] = 4,
        dim_feedforward: Count | None = None,
        dim_feedforward_factor: Annotated[Positive | None, Choice(1.0, 2.0, 4.0), When("dim_feedforward", None)] = None,
        dropout: Annotated[Share, Range(0.0, 0.3)] = 0.1,
        positional_encoding: PositionalEncoding = "sin",
        pool: Pool = "mean",
        bigram_buckets: Natural = 0,
        token_dropout: Share = 0.0,
        embedding_scale: Positive = 1.0,
    ) -> None:
        super().__init__()
        width = feed_forward_width(embed_dim, dim_feedforward, dim_feedforward_factor, default=2)
        self.stackable = positional_encoding != "random"
        self.padding_idx = padding_idx
        self.embedding = TokenEmbedding(
            vocab_size,
            embed_dim,
            padding_idx,
            dropout,
            positional_encoding,
            bigram_buckets,
            token_dropout,
            embedding_scale,
        )
        self.layers = nn.ModuleList(
            Block(embed_dim, num_heads, width, dropout, positional_encoding=positional_encoding)
            for _ in range(num_layers)
        )
        self.head = ClassificationHead(embed_dim, num_classes, dropout, pool)
        self.embed_dim = embed_dim

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        keep_BL = keep_mask(input_ids, attention_mask, self.padding_idx)
        samples = self.packed(keep_BL)
        h = samples.take(self.embedding(input_ids, keep_BL))
        everyone = Dispatch.single(len(h))
        for layer in self.layers:
            h = layer(h, samples.layout, everyone)
        return self.head(samples.grid(h), keep_BL)

    def get_flops_per_sample(self, length: int) -> float:
        blocks = sum(block_flops(layer, self.embed_dim, length) for layer in self.layers)
        return blocks + 2.0 * self.head.linear.weight.numel()
