"""The looped Transformer encoder: one stack of blocks is applied several times (Dehghani et al., 2019).

B batch  L length  D width
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from research_eval.annotations import Count, Range
from research_eval.layers.block import block_flops, encoder_blocks
from research_eval.layers.dispatch import Dispatch
from research_eval.layers.settings import EncoderSettings
from research_eval.layers.text import ClassificationHead, TokenEmbedding
from research_eval.models.base_model import EvaluableModel, keep_mask
from research_eval.registry import MODELS_MAP


@MODELS_MAP.register("looped")
class LoopedTransformerClassifier(EvaluableModel):
    """Embedding, `num_layers` pre-LN blocks applied `num_loops` times, pooled head.

    The depth is `num_layers` times `num_loops`. This is the baseline for paths that visit an expert again: shared
    weights without a router.
    """

    model_type = "looped"
    tuned_options = (("model_params.dropout", (0.0, 0.3)), ("optimizer_params.weight_decay", (0.1,)))
    OPTION_ORDER = ("embed_dim",)

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        num_layers: Annotated[Count, Range(1, 2)] = 1,
        num_loops: Annotated[Count, Range(1, 4)] = 2,
        encoder: EncoderSettings,
    ) -> None:
        super().__init__()
        self.padding_idx = padding_idx
        self.num_loops = num_loops
        self.embedding = TokenEmbedding.of(vocab_size, padding_idx, encoder)
        self.layers = encoder_blocks(encoder, num_layers)
        self.head = ClassificationHead(encoder.embed_dim, num_classes, encoder.dropout, encoder.pool)
        self.embed_dim = encoder.embed_dim

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, num_tokens: int | None = None) -> Tensor:
        """Ids and mask [B, L] -> logits [B, C].

        `num_tokens`, if the caller knows it, avoids counting the real tokens.
        """
        keep_BL = keep_mask(input_ids, attention_mask, self.padding_idx)
        samples = self.packed(keep_BL, num_tokens)
        h = samples.take(self.embedding(input_ids, keep_BL))
        everyone = Dispatch.single(len(h))
        for _ in range(self.num_loops):
            for layer in self.layers:
                h = layer(h, samples.layout, everyone)
        return self.head(samples.grid(h), keep_BL)

    def get_flops_per_sample(self, length: int) -> float:
        """All loops and the head; shared weights do not reduce the computation."""
        one_loop = sum(block_flops(layer, self.embed_dim, length) for layer in self.layers)
        return self.num_loops * one_loop + 2.0 * self.head.linear.weight.numel()
