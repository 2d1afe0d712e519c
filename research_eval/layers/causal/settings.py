"""Options that language models share, as settings groups. This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from research_eval.annotations import Choice, Count, Divides, Natural, Positive, Range, Share, Weight, When
from research_eval.errors import ConfigError
from research_eval.layers.settings import feed_forward_width

CausalPositions = Literal["rope", "sin", "none"]
CausalNorm = Literal["layer", "rms"]
Activation = Literal["gelu", "relu2", "swiglu"]
RoutedParts = Literal["ffn", "qo_ffn", "block", "block_query_kv"]
CausalRoute = Literal["learned", "token_id", "bigram", "trigram", "random", "layered"]
RouterInput = Literal["features", "state", "token", "bigram", "trigram", "segment", "prefix", "sample"]
Granularity = Literal["token", "segment", "prefix", "sample"]

NGRAM_ORDER = {"token_id": 1, "bigram": 2, "trigram": 3}  # tokens that a table reads
# Short forms of `router_input` -> the option that says it and its value.
SHORT_FORMS = {
    "token": ("route", "token_id"),
    "bigram": ("route", "bigram"),
    "trigram": ("route", "trigram"),
    "segment": ("lm_routing", "segment"),
    "prefix": ("lm_routing", "prefix"),
    "sample": ("lm_routing", "sample"),
}


@dataclass(frozen=True)
class CausalSettings:
    """The options of a causal Transformer: width, attention, feed-forward part, input and head.

    Raises ConfigError for heads that do not fit the width.
    """

    embed_dim: Annotated[Count, Choice(64, 128, 256)] = 128
    num_heads: Annotated[Count, Choice(2, 4, 8), Divides("embed_dim")] = 4
    dim_feedforward: Count | None = None
    dim_feedforward_factor: Annotated[Positive | None, Choice(2.0, 4.0), When("dim_feedforward", None)] = None
    dropout: Annotated[Share, Range(0.0, 0.3)] = 0.0
    task_head: Literal["lm"] = "lm"
    positional_encoding: CausalPositions = "rope"
    qk_norm: bool = True
    norm: CausalNorm = "layer"
    activation: Activation = "gelu"
    zero_init: bool = True
    tie_embeddings: bool = False
    logit_softcap: Positive | None = None
    bigram_buckets: Natural = 0

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}")
        if self.positional_encoding == "rope" and self.embed_dim // self.num_heads % 2:
            raise ConfigError(
                f"positional_encoding='rope' turns pairs of channels: embed_dim={self.embed_dim} over "
                f"num_heads={self.num_heads} gives {self.embed_dim // self.num_heads} per head, which has to be even"
            )

    @property
    def feed_forward_width(self) -> int:
        """The inner width of the feed-forward part: as given, or four times `embed_dim`."""
        return feed_forward_width(self.embed_dim, self.dim_feedforward, self.dim_feedforward_factor, default=4)


@dataclass(frozen=True)
class RouteSettings:
    """How a language model chooses the experts of a token, and how it balances their load.

    A route of whole segments reads the tokens of the segment before, whatever `router_input` says.

    Raises ConfigError for a route that would see the future, and for options that contradict each other.
    """

    route: CausalRoute = "learned"
    router_input: RouterInput = "features"
    lm_routing: Granularity = "token"
    learned_table: bool = False
    shared_expert_dim: Natural = 0
    router_window: Annotated[Count, Range(1, 8)] = 4
    segment_length: Count = 16
    router_hidden_dim: Count | None = None
    router_init: Positive | None = None
    router_per_step: bool = True
    gate_scale: Annotated[Positive | None, Range(1.0, 4.0)] = None
    straight_through: bool = False
    balance_bias_rate: Weight = 1e-3
    balance_loss_coef: Annotated[Weight, Range(1e-3, 0.1, log=True)] = 0.01
    z_loss_coef: Weight = 1e-3

    def __post_init__(self) -> None:
        option, value = SHORT_FORMS.get(self.router_input, ("", ""))
        if option:  # a frozen dataclass is filled in through `object`
            if getattr(self, option) not in (value, "learned" if option == "route" else "token"):
                raise ConfigError(
                    f"router_input={self.router_input!r} stands for {option}={value!r}, and {option} is "
                    f"{getattr(self, option)!r}: give one of them"
                )
            object.__setattr__(self, option, value)
            object.__setattr__(self, "router_input", "features")
        if self.learned_table and self.route not in NGRAM_ORDER:
            raise ConfigError(f"learned_table needs a route by a table ({', '.join(NGRAM_ORDER)}), not {self.route!r}")
        if self.lm_routing == "sample":
            raise ConfigError(
                "lm_routing='sample' routes by a mean over the whole block, so a token would see the tokens after it, "
                "which the model has to predict. Use 'token', 'segment' or 'prefix'."
            )
        if self.lm_routing != "token" and self.route != "learned":
            raise ConfigError(
                f"lm_routing={self.lm_routing!r} needs a learned route: route is {self.route!r}, which is one per token"
            )

    @property
    def scale(self) -> float:
        """The factor k of the gate c = k p. A fixed route has the gate 1."""
        return self.gate_scale or 2.0

    @property
    def initial_spread(self) -> float:
        """Spread of the first logits: large for fixed inputs, whose routes stay the same from step to step."""
        return self.router_init or (1.0 if self.router_input == "state" and self.lm_routing == "token" else 4.0)
