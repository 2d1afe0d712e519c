"""The causal Transformer with a pool of feed-forward experts in each layer (Shazeer et al., 2017), dropless."""

from __future__ import annotations

from typing import Annotated

from torch import nn

from research_eval.annotations import Choice, Count, Range
from research_eval.errors import ConfigError
from research_eval.layers.causal.attention import CausalFeedForward, Projections
from research_eval.layers.causal.routes import Routes
from research_eval.layers.causal.settings import CausalSettings, RouteSettings
from research_eval.models.language.base import ROUTE_CONTROLS, LanguageModel, Layer
from research_eval.registry import LANGUAGE_MODELS


class MoEBlock(nn.Module):
    """The maps around the attention, the feed-forward experts of one layer, and a part that all tokens share."""

    def __init__(self, settings: CausalSettings, num_experts: int, shared_dim: int) -> None:
        super().__init__()
        self.attention = Projections(settings, "qkvo")
        self.experts = CausalFeedForward(settings, num_experts)
        self.shared = CausalFeedForward(settings, inner=shared_dim) if shared_dim else None


@LANGUAGE_MODELS.register("moe")
class MoELanguageModel(LanguageModel):
    """`num_layers` causal blocks, each with `num_experts` feed-forward experts of its own.

    The router reads the states, and c = p. Raises ConfigError if a token needs more experts than a layer has.
    """

    model_type = "moe"
    tuned_options = (("model_params.route", ("bigram",)), ("model_params.dropout", (0.1, 0.2)))
    control_options = ROUTE_CONTROLS

    def __init__(
        self,
        *,
        vocab_size: int,
        max_length: int,
        num_layers: Annotated[Count, Range(2, 6)] = 4,
        num_experts: Annotated[Count, Choice(2, 4, 8)] = 4,
        top_k_experts: Annotated[Count, Range(1, 2, upto=("num_experts",))] = 1,
        causal: CausalSettings,
        routing: RouteSettings = RouteSettings(router_input="state", gate_scale=1.0),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(vocab_size, max_length, num_layers, settings=causal)
        if top_k_experts > num_experts:
            raise ConfigError(f"top_k_experts={top_k_experts} is more than num_experts={num_experts}")
        self.layers = nn.ModuleList(MoEBlock(causal, num_experts, routing.shared_expert_dim) for _ in range(num_layers))
        self.route_with(Routes(routing, causal.embed_dim, vocab_size, num_experts, num_layers, top_k_experts))

    def layer(self, step: int) -> Layer:
        block = self.layers[step]
        assert isinstance(block, MoEBlock)
        return Layer(block.attention.maps(), block.experts, frozenset("f"), block.shared)

    def experts_per_token(self) -> int:
        return 1 if self.routes is None else self.routes.top_k  # of the pool of one layer
