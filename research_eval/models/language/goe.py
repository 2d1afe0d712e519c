"""The causal Graph-of-Experts: one pool of experts for all steps, and a path of its own for every token.

B batch  n new tokens  S = B n rows  D width  H heads  L tokens so far  K width of a head  N experts  V vocabulary
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from research_eval.annotations import Aka, Choice, Count, Range, Steps, Weight
from research_eval.errors import ConfigError
from research_eval.layers.causal.attention import CausalFeedForward, Projections
from research_eval.layers.causal.context import Context
from research_eval.layers.causal.routes import Routes
from research_eval.layers.causal.settings import CausalSettings, RoutedParts, RouteSettings
from research_eval.models.language.base import ROUTE_CONTROLS, LanguageModel, Layer, Sorted
from research_eval.registry import LANGUAGE_MODELS

OWNED = {"ffn": "", "qo_ffn": "qo", "block": "qkvo", "block_query_kv": "qkvo"}  # projections that belong to an expert


class Pool(nn.Module):
    """The experts that all steps share: feed-forward parts, and the maps around the attention that belong to them."""

    def __init__(self, settings: CausalSettings, owned: str, num_experts: int) -> None:
        super().__init__()
        self.projections = Projections(settings, owned, num_experts)
        self.feed_forward = CausalFeedForward(settings, num_experts)


@LANGUAGE_MODELS.register("goe")
class GoELanguageModel(LanguageModel):
    """Every token takes `max_path_len` steps, each through one expert of a pool of `num_total_experts`.

    `routed_parts` says what an expert is: its feed-forward part ("ffn"), also the maps of queries and outputs
    ("qo_ffn"), or the whole block. Parts that do not belong to an expert exist once per step. With "block", keys and
    values come from the expert of their own row; with "block_query_kv", from the expert of the row that reads them.
    With `home_bias`, a learned route starts near `moe`: the experts of a step's own share of the pool begin with this
    much more in their logits. Raises ConfigError for several experts per token, and for a shared expert, with any kind
    but "ffn".
    """

    model_type = "goe"
    tuned_options = (("model_params.route", ("bigram",)), ("model_params.dropout", (0.1, 0.2)))
    control_options = ROUTE_CONTROLS

    def __init__(
        self,
        *,
        vocab_size: int,
        max_length: int,
        num_total_experts: Annotated[Count, Aka("num_total_experts_pool"), Choice(8, 16, 32)] = 16,
        max_path_len: Annotated[Steps, Range(2, 6)] = 4,
        top_k_experts: Annotated[Count, Range(1, 2, upto=("num_total_experts",))] = 1,
        routed_parts: RoutedParts = "ffn",
        home_bias: Weight = 0.0,
        causal: CausalSettings,
        routing: RouteSettings,
    ) -> None:
        super().__init__(vocab_size, max_length, max_path_len, settings=causal)
        if top_k_experts > num_total_experts:
            raise ConfigError(f"top_k_experts={top_k_experts} is more than num_total_experts={num_total_experts}")
        if top_k_experts > 1 and routed_parts != "ffn":
            raise ConfigError(f"top_k_experts={top_k_experts} needs routed_parts='ffn', got {routed_parts!r}")
        if routing.shared_expert_dim and routed_parts != "ffn":
            raise ConfigError(
                f"shared_expert_dim={routing.shared_expert_dim} needs routed_parts='ffn', got {routed_parts!r}"
            )
        self.routed_parts = routed_parts
        owned = OWNED[routed_parts]
        shared = "".join(name for name in "qkvo" if name not in owned)
        self.layers = nn.ModuleList(Projections(causal, shared) for _ in range(max_path_len))
        self.experts = Pool(causal, owned, num_total_experts)
        inner = routing.shared_expert_dim
        self.shared = nn.ModuleList(CausalFeedForward(causal, inner=inner) for _ in range(max_path_len if inner else 0))
        self.route_with(Routes(routing, causal.embed_dim, vocab_size, num_total_experts, max_path_len, top_k_experts))
        if home_bias:
            assert self.routes is not None
            self.routes.start_at_home(home_bias)

    def layer(self, step: int) -> Layer:
        own = self.layers[step]
        assert isinstance(own, Projections)
        pooled = frozenset(OWNED[self.routed_parts]) | {"f"}
        shared = self.shared[step] if len(self.shared) else None
        assert shared is None or isinstance(shared, CausalFeedForward)
        return Layer(own.maps() | self.experts.projections.maps(), self.experts.feed_forward, pooled, shared)

    def _attended(self, layer: Layer, step: int, y_SD: Tensor, context: Context, sort: Sorted | None) -> Tensor:
        if self.routed_parts != "block_query_kv":
            return super()._attended(layer, step, y_SD, context, sort)
        return self._attended_by_query(layer, step, y_SD, context, sort)

    def _attended_by_query(
        self, layer: Layer, step: int, y_SD: Tensor, context: Context, sort: Sorted | None
    ) -> Tensor:
        """The expert of a query makes the keys and values of all rows: N times the work, so this is an ablation."""
        assert sort is not None
        maps, chosen_S = layer.projections, sort.dispatch.experts_of(sort.assignments.order_R)
        chosen_S = chosen_S.index_select(0, sort.assignments.place_SK.squeeze(1))
        query = self.attention.keys(sort.mixed(maps["q"], y_SD, None), context)
        out_SD = torch.zeros_like(y_SD)
        for expert in range(len(maps["k"].weight)):
            weights = (maps[name].weight[expert] for name in "kv")
            k_SD, v_SD = (torch.nn.functional.linear(y_SD, weight) for weight in weights)
            key, value = self.attention.keys(k_SD, context), self.attention.heads(v_SD, context)
            if context.cache is not None:
                key = context.cache.extended(f"{step}.{expert}.k", key)
                value = context.cache.extended(f"{step}.{expert}.v", value)
            attended_SD = self.attention.attended(query, key, value, context)
            out_SD = torch.where((chosen_S == expert).unsqueeze(1), attended_SD, out_SD)
        return out_SD
