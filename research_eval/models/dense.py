"""The dense Transformer encoder: every sample passes every block. It is the baseline for the routed models.

B batch  L length  S real tokens  D width  C classes
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from research_eval.annotations import Count, Range
from research_eval.layers.block import block_flops, encoder_blocks
from research_eval.layers.dispatch import Dispatch
from research_eval.layers.settings import EncoderSettings
from research_eval.layers.text import ClassificationHead, TokenEmbedding
from research_eval.models.base_model import EvaluableModel, keep_mask
from research_eval.registry import MODELS_MAP


@MODELS_MAP.register("dense")
class DenseTransformerClassifier(EvaluableModel):
    """Embedding, `num_layers` pre-LN blocks, pooled head.

    The feed-forward part is twice as wide as the states by default.
    """

    model_type = "dense"
    tuned_options = (("model_params.dropout", (0.0, 0.3)), ("optimizer_params.weight_decay", (0.1,)))
    control_options = (
        ("hashed bigrams", (("model_params.bigram_buckets", 2048),)),
        ("one wide layer", (("model_params.num_layers", 1),)),
    )
    OPTION_ORDER = ("embed_dim",)

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        num_layers: Annotated[Count, Range(1, 4)] = 2,
        encoder: EncoderSettings,
    ) -> None:
        super().__init__()
        self.padding_idx = padding_idx
        self.embedding = TokenEmbedding.of(vocab_size, padding_idx, encoder)
        self.layers = encoder_blocks(encoder, num_layers)
        self.head = ClassificationHead(encoder.embed_dim, num_classes, encoder.dropout, encoder.pool)
        self.embed_dim = encoder.embed_dim

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, num_tokens: int | None = None) -> Tensor:
        """Ids and mask [B, L] -> logits [B, C].

        `num_tokens`, if the caller knows it, avoids counting the real tokens. The blocks compute no padding, except
        with the plain kernels.
        """
        keep_BL = keep_mask(input_ids, attention_mask, self.padding_idx)
        samples = self.packed(keep_BL, num_tokens)
        h = samples.take(self.embedding(input_ids, keep_BL))
        everyone = Dispatch.single(len(h))
        for layer in self.layers:
            h = layer(h, samples.layout, everyone)
        return self.head(samples.grid(h), keep_BL)

    def units(self) -> list[nn.Module]:
        return list(self.layers)

    def get_flops_per_sample(self, length: int) -> float:
        """Blocks and head. The embedding is a look-up and costs none."""
        blocks = sum(block_flops(layer, self.embed_dim, length) for layer in self.layers)
        return blocks + 2.0 * self.head.linear.weight.numel()
