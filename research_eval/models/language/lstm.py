"""The long short-term memory (Hochreiter and Schmidhuber, 1997) as a language model, a recurrent reference.

B batch  n new tokens  L length  D width  V vocabulary
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from research_eval.annotations import Choice, Count, Range, Share
from research_eval.layers.causal.attention import full_precision
from research_eval.layers.causal.context import Cache, Context
from research_eval.layers.causal.settings import CausalSettings
from research_eval.models.base_model import Outcome
from research_eval.models.language.base import LanguageModel, LanguageWalk
from research_eval.registry import LANGUAGE_MODELS


@LANGUAGE_MODELS.register("lstm")
class LSTMLanguageModel(LanguageModel):
    """Embedding, `num_layers` LSTM layers from left to right, head. Each document starts from an empty memory."""

    model_type = "lstm"
    size_options = ("embed_dim",)
    tuned_options = (("model_params.dropout", (0.1, 0.2)),)

    def __init__(
        self,
        *,
        vocab_size: int,
        max_length: int,
        embed_dim: Annotated[Count, Choice(64, 128, 256)] = 128,
        num_layers: Annotated[Count, Range(1, 3)] = 2,
        dropout: Annotated[Share, Range(0.0, 0.3)] = 0.0,
    ) -> None:
        settings = CausalSettings(embed_dim, num_heads=1, dropout=dropout, positional_encoding="none")
        super().__init__(vocab_size, max_length, num_layers, settings=settings)
        between = dropout if num_layers > 1 else 0.0  # torch warns about dropout with a single layer
        self.lstm = nn.LSTM(embed_dim, embed_dim, num_layers, batch_first=True, dropout=between)

    def pass_over(
        self,
        ids_Bn: Tensor,
        documents_BL: Tensor | None = None,
        recorded_BL: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Outcome:
        context = Context.of(ids_Bn, documents_BL, cache)
        x_BnD = self.embedding(context).unflatten(0, ids_Bn.shape)
        with torch.autocast(x_BnD.device.type, enabled=False):  # not every CPU supports an LSTM in bf16
            if documents_BL is None:
                h_BnD, states = self.lstm(full_precision(x_BnD), None if cache is None else cache.states)
            else:
                h_BnD, states = self._by_document(full_precision(x_BnD), context), None
        if cache is not None:
            cache.states = states
        return Outcome(self.head(h_BnD.flatten(0, 1)).unflatten(0, ids_Bn.shape), LanguageWalk())

    def _by_document(self, x_BnD: Tensor, context: Context) -> Tensor:
        """The states of blocks with several documents: each document starts from an empty memory."""
        assert context.documents_BL is not None
        rows = []
        for x_nD, documents_n in zip(x_BnD, context.documents_BL, strict=True):
            _, sizes = documents_n.unique_consecutive(return_counts=True)
            rows.append(torch.cat([self.lstm(part.unsqueeze(0))[0][0] for part in x_nD.split(sizes.tolist())]))
        return torch.stack(rows)

    def get_flops_per_sample(self, length: int) -> float:
        """Two FLOPs per weight and token, and the head."""
        weights = sum(
            parameter.numel() for name, parameter in self.lstm.named_parameters() if name.startswith("weight")
        )
        return 2.0 * length * (weights + self.vocab_size * self.settings.embed_dim)
