"""The looped causal Transformer: one stack of blocks is applied several times (Dehghani et al., 2019)."""

from __future__ import annotations

from typing import Annotated

from torch import nn

from research_eval.annotations import Count, Range
from research_eval.layers.causal.attention import CausalBlock
from research_eval.layers.causal.settings import CausalSettings
from research_eval.models.language.base import LanguageModel, Layer, layer_of
from research_eval.registry import LANGUAGE_MODELS


@LANGUAGE_MODELS.register("looped")
class LoopedLanguageModel(LanguageModel):
    """`num_layers` causal blocks applied `num_loops` times. Each pass has keys and values of its own in the cache."""

    model_type = "looped"
    tuned_options = (("model_params.dropout", (0.1, 0.2)),)

    def __init__(
        self,
        *,
        vocab_size: int,
        max_length: int,
        num_layers: Annotated[Count, Range(1, 2)] = 1,
        num_loops: Annotated[Count, Range(2, 6)] = 4,
        causal: CausalSettings,
    ) -> None:
        super().__init__(vocab_size, max_length, num_layers * num_loops, settings=causal)
        self.layers = nn.ModuleList(CausalBlock(causal) for _ in range(num_layers))

    def layer(self, step: int) -> Layer:
        return layer_of(self.layers, step % len(self.layers))
