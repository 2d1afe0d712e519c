"""A graph of experts along the sequence: the tokens move walkers through a learnt graph (docs/scan.md).

The class follows from the walkers' last places. The trained model can be read as a finite automaton.

B batch  L length  D width  V vocabulary (padding included)  R edge sets  S = R + 1 with "stay"  M walkers  K nodes
E = M K  C classes  N joint states
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.annotations import Choice, Count, Range, Weight
from research_eval.layers.collective import of_parameters
from research_eval.layers.scan import EdgePicker, Estimator, WalkerGraph
from research_eval.layers.text import TokenEmbedding
from research_eval.models.base_model import AuxiliaryLoss, EvaluableModel, keep_mask
from research_eval.registry import MODELS_MAP
from research_eval.routing.automaton import WalkerAutomaton


@MODELS_MAP.register("goe_scan")
class GoEScanClassifier(EvaluableModel):
    """One scan expert, and a linear map of its walkers' places after the last token.

    If `num_edge_sets` is null, every token has its own edge set. If it is a number, each token chooses one of them by
    its embedding. Edge sets depend on tokens and never on positions, so a trained model is a finite automaton.
    """

    model_type = "goe_scan"
    records_all = True  # its metrics follow from the weights
    size_options = ("num_walkers", "num_nodes")
    tuned_options = (("model_params.edge_entropy_coef", (0.1, 0.001)),)
    progress: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        num_nodes: Annotated[Count, Choice(8, 16, 32)] = 16,
        num_walkers: Annotated[Count, Choice(1, 2, 4, 8)] = 4,
        num_edge_sets: Count | None = None,
        edges: Estimator = "soft",
        picks: Estimator = "st",
        embed_dim: Count = 32,
        edge_entropy_coef: Annotated[Weight, Range(1e-3, 0.1, log=True)] = 0.01,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.padding_idx = padding_idx
        self.edge_entropy_coef = edge_entropy_coef
        self.embedding: TokenEmbedding | None = None
        self.picker: EdgePicker | None = None
        if num_edge_sets is not None:
            self.embedding = TokenEmbedding(vocab_size, embed_dim, padding_idx, 0.0, positional_encoding="none")
            self.picker = EdgePicker(embed_dim, num_edge_sets, picks)
        self.head = nn.Linear(num_walkers * num_nodes, num_classes)
        # Without a number, every id except the padding has its own edge set.
        self.graph = WalkerGraph(num_edge_sets or vocab_size - 1, num_walkers, num_nodes, edges)
        self.register_buffer("progress", torch.zeros(()))

    def picks(self, ids_BL: Tensor, keep_BL: Tensor) -> Tensor:
        """The edge sets for the walkers: numbers [B, L], or weights [B, L, S] if tokens choose their edge sets."""
        if self.embedding is None or self.picker is None:
            edge_sets_BL = ids_BL - (ids_BL > self.padding_idx).long()
            return edge_sets_BL.masked_fill(~keep_BL, self.graph.num_edge_sets)
        ids_1V = torch.arange(self.vocab_size, device=ids_BL.device).unsqueeze(0)
        keep_1V = ids_1V != self.padding_idx
        picks_1VS = self.picker(self.embedding(ids_1V, keep_1V), keep_1V)  # once per vocabulary entry
        return F.embedding(ids_BL.masked_fill(~keep_BL, self.padding_idx), picks_1VS.squeeze(0))

    def _states(self, input_ids: Tensor, attention_mask: Tensor | None, every_position: bool) -> Tensor:
        """One-hot or probable places of the walkers, [B, E], or [B, L, E] for every position."""
        keep_BL = keep_mask(input_ids, attention_mask, self.padding_idx)
        return self.graph(self.picks(input_ids, keep_BL), every_position)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self._states(input_ids, attention_mask, every_position=False))

    def prefix_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The class scores of every prefix, [B, L, C]: position t depends on the tokens up to t."""
        return self.head(self._states(input_ids, attention_mask, every_position=True))

    def scheduled_options(self) -> tuple[str, ...]:
        return ("edge_entropy_coef",) if self.edge_entropy_coef else ()

    def after_step(self, progress: float) -> None:
        self.progress.fill_(progress)

    def auxiliary_losses(self) -> dict[str, AuxiliaryLoss]:
        """The edge entropy. Its weight grows with the training, so that the edges can explore first."""
        weight = self.edge_entropy_coef * float(self.progress)
        return {"edge_entropy_loss": AuxiliaryLoss(of_parameters(self.graph.row_entropy()), weight)}

    @torch.no_grad()
    def get_model_specific_metrics(self) -> dict[str, Any]:
        """Entropy of the edges (0 decided, 1 undecided), and the number of edge sets that the vocabulary uses."""
        undecided = float(self.graph.row_entropy()) / np.log(max(self.graph.num_nodes, 2))
        return {"edge_entropy": float(undecided), "edge_sets_used": len(set(self._edge_sets()))}

    @torch.no_grad()
    def _edge_sets(self) -> list[int]:
        """The edge set of each token except the padding, in the order of their ids."""
        ids_V = torch.arange(self.vocab_size, device=self.head.weight.device)
        ids_1V = ids_V[ids_V != self.padding_idx].unsqueeze(0)
        picks = self.picks(ids_1V, torch.ones_like(ids_1V, dtype=torch.bool)).squeeze(0)
        edge_sets: list[int] = (picks.argmax(-1) if picks.is_floating_point() else picks).tolist()
        return edge_sets

    @torch.no_grad()
    def read_automaton(self) -> WalkerAutomaton:
        """Start nodes, targets per token, and the class of each joint state, as evaluation uses them."""
        targets_RMK = self.graph.edge_logits.argmax(-1).cpu().numpy()
        weight_MKC = self.head.weight.T.unflatten(0, (self.graph.num_walkers, self.graph.num_nodes)).cpu().numpy()
        bias_C = self.head.bias.cpu().numpy()

        def answers(nodes_NM: NDArray[np.int64]) -> NDArray[np.int64]:
            logits_NC = weight_MKC[np.arange(nodes_NM.shape[1]), nodes_NM].sum(1) + bias_C
            return logits_NC.argmax(-1)

        start_M = self.graph.start_logits.argmax(-1).cpu().numpy()
        return WalkerAutomaton(start_M, targets_RMK[self._edge_sets()], answers)

    def get_flops_per_sample(self, length: int) -> float:
        """FLOPs in evaluation, where a step is a look-up. The picks do not count: a batch computes them once."""
        return 2.0 * self.head.weight.numel()
