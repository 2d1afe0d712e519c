"""The dense causal Transformer: every token passes every block. It is the baseline for the routed language models."""

from __future__ import annotations

from typing import Annotated

from torch import nn

from research_eval.annotations import Count, Range
from research_eval.layers.causal.attention import CausalBlock
from research_eval.layers.causal.settings import CausalSettings
from research_eval.models.language.base import LanguageModel, Layer, layer_of
from research_eval.registry import LANGUAGE_MODELS


@LANGUAGE_MODELS.register("dense")
class DenseLanguageModel(LanguageModel):
    """Embedding, `num_layers` causal blocks, head."""

    model_type = "dense"
    tuned_options = (("model_params.dropout", (0.1, 0.2)),)
    control_options = (("hashed bigrams", (("model_params.bigram_buckets", 2048),)),)

    def __init__(
        self,
        *,
        vocab_size: int,
        max_length: int,
        num_layers: Annotated[Count, Range(2, 6)] = 4,
        causal: CausalSettings,
    ) -> None:
        super().__init__(vocab_size, max_length, num_layers, settings=causal)
        self.layers = nn.ModuleList(CausalBlock(causal) for _ in range(num_layers))

    def layer(self, step: int) -> Layer:
        return layer_of(self.layers, step)
