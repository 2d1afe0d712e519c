"""The long short-term memory (Hochreiter and Schmidhuber, 1997), a recurrent baseline.

B batch  L length  D width
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from research_eval.annotations import Choice, Count, Range, Share, Younger
from research_eval.layers.text import ClassificationHead, TokenEmbedding
from research_eval.models.base_model import EvaluableModel, keep_mask
from research_eval.registry import MODELS_MAP


@MODELS_MAP.register("lstm")
class LSTMClassifier(EvaluableModel):
    """Embedding without positions, `num_layers` LSTM layers from left to right, and a head at the last token.

    The states have width `hidden_dim`, by default that of the embedding. Padding is on the right, so it cannot change
    the state at the last real token.
    """

    model_type = "lstm"
    size_options = ("hidden_dim", "embed_dim")
    tuned_options = (("model_params.dropout", (0.3,)), ("optimizer_params.weight_decay", (0.1,)))

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        embed_dim: Annotated[Count, Choice(32, 64, 128)] = 64,
        num_layers: Annotated[Count, Range(1, 2)] = 1,
        dropout: Annotated[Share, Range(0.0, 0.3)] = 0.0,
        hidden_dim: Annotated[Count | None, Younger()] = None,
    ) -> None:
        super().__init__()
        self.padding_idx = padding_idx
        self.embedding = TokenEmbedding(vocab_size, embed_dim, padding_idx, dropout, positional_encoding="none")
        between = dropout if num_layers > 1 else 0.0  # torch warns about dropout with a single layer
        self.lstm = nn.LSTM(embed_dim, hidden_dim or embed_dim, num_layers, batch_first=True, dropout=between)
        self.head = ClassificationHead(hidden_dim or embed_dim, num_classes, dropout, pool="last")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        keep_BL = keep_mask(input_ids, attention_mask, self.padding_idx)
        embedded_BLD = self.embedding(input_ids, keep_BL)
        with torch.autocast(embedded_BLD.device.type, enabled=False):  # not every CPU supports an LSTM in bf16
            h_BLD, _ = self.lstm(embedded_BLD.float())
        return self.head(h_BLD, keep_BL)

    def get_flops_per_sample(self, length: int) -> float:
        """Two FLOPs per weight and token, and the head once."""
        weights = sum(
            parameter.numel() for name, parameter in self.lstm.named_parameters() if name.startswith("weight")
        )
        return 2.0 * (length * weights + self.head.linear.weight.numel())
