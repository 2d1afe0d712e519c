"""Our models and their peers as language models of equal size: embedding, blocks, and a linear map at every position.

What differs is said where it is: GPT-2, Mixtral and OLMoE look backwards only (half of the attention's products), ours,
BERT and torch's encoder in both directions.

B batch  L length  D width  E experts  S tokens  K experts per token
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.datasets.token_data import Batch
from research_eval.models.base_model import EvaluableModel, logits_of
from research_eval.models.moe import RoutedFeedForward
from research_eval.registry import MODELS_MAP

NUM_HEADS = 4


class Shape(NamedTuple):
    width: int
    layers: int
    length: int
    batch: int
    vocab_size: int
    experts: int = 0
    top_k: int = 0

    def __str__(self) -> str:
        experts = f" E{self.experts} k{self.top_k}" if self.experts else ""
        return f"d{self.width} {self.layers} layers s{self.length} b{self.batch} v{self.vocab_size}{experts}"

    def ids(self, device: str) -> Tensor:
        torch.manual_seed(1)
        return torch.randint(1, self.vocab_size, (self.batch, self.length), device=device)


class EveryPosition(nn.Module):
    """In the place of a classification head: class scores of every token, [B, L, C]."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_classes, bias=False)

    def forward(self, h_BLD: Tensor, keep_BL: Tensor) -> Tensor:
        scores: Tensor = self.linear(self.norm(h_BLD))
        return scores


class Ours(nn.Module):
    """A classifier of ours with a head at every position."""

    def __init__(self, model_type: str, shape: Shape, dropout: float, **arguments: Any) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "vocab_size": shape.vocab_size,
            "num_classes": 2,
            "embed_dim": shape.width,
            "num_heads": NUM_HEADS,
        }
        sizes |= {"num_layers": shape.layers, "dropout": dropout}
        self.model: EvaluableModel = MODELS_MAP[model_type](**sizes, **arguments)
        self.model.head = EveryPosition(shape.width, shape.vocab_size)

    def forward(self, ids_BL: Tensor) -> Tensor:
        nothing = ids_BL[:, 0]
        return logits_of(
            self.model, Batch(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool), nothing, None, None, ids_BL.numel())
        )


class Encoder(nn.Module):
    """torch.nn.TransformerEncoderLayer, normalised first as ours."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocab_size, shape.width)
        self.position = nn.Parameter(torch.randn(shape.length, shape.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            shape.width, NUM_HEADS, 4 * shape.width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, shape.layers, enable_nested_tensor=False)
        self.head = EveryPosition(shape.width, shape.vocab_size)

    def forward(self, ids_BL: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layers(self.token(ids_BL) + self.position), ids_BL)
        return scores


class HuggingFace(nn.Module):
    """A model of transformers without its own head; its last norm is its own."""

    def __init__(self, trunk: nn.Module, shape: Shape) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)

    def forward(self, ids_BL: Tensor) -> Tensor:
        scores: Tensor = self.head(self.trunk(input_ids=ids_BL).last_hidden_state)
        return scores


def transformers() -> Any:
    """Imported when needed; without its advice on token ids that a model without text does not have."""
    package = importlib.import_module("transformers")
    package.logging.set_verbosity_error()
    return package


def ours(shape: Shape, dropout: float = 0.0) -> nn.Module:
    return Ours("dense", shape, dropout, dim_feedforward=4 * shape.width)


def gpt2(shape: Shape, dropout: float = 0.0) -> nn.Module:
    """With the exact (erf) GELU; by default it composes the tanh form, which is slower."""
    config = transformers().GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=NUM_HEADS,
        activation_function="gelu",
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,  # ours has none there either
        use_cache=False,
    )
    return HuggingFace(transformers().GPT2Model(config), shape)


def bert(shape: Shape, dropout: float = 0.0) -> nn.Module:
    config = transformers().BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=NUM_HEADS,
        intermediate_size=4 * shape.width,
        max_position_embeddings=shape.length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )
    return HuggingFace(transformers().BertModel(config, add_pooling_layer=False), shape)


def ours_moe(shape: Shape, inner: int) -> nn.Module:
    return Ours("moe", shape, 0.0, dim_feedforward=inner, num_experts=shape.experts, top_k_experts=shape.top_k)


def two_thirds(inner: int) -> int:
    """The inner width at which the three matrices of SwiGLU cost what the two of GELU do, less up to 16 (alignment)."""
    return 2 * inner // 3 // 16 * 16


def mixture(name: str, shape: Shape, inner: int) -> nn.Module:
    """Mixtral or Olmoe with `grouped_mm`: SwiGLU of two thirds of the inner width, RMSNorm, RoPE, causal."""
    package = transformers()
    number = {"Mixtral": "num_local_experts", "Olmoe": "num_experts"}[name]
    config = getattr(package, f"{name}Config")(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=two_thirds(inner),
        num_hidden_layers=shape.layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=shape.length,
        num_experts_per_tok=shape.top_k,
        use_cache=False,
        **{number: shape.experts},
    )
    return HuggingFace(
        getattr(package, f"{name}Model")._from_config(config, experts_implementation="grouped_mm"), shape
    )


def gelu_experts(layer: RoutedFeedForward, implementation: str) -> nn.Module:
    """Our routed layer computed by transformers: its Mixtral router, and its "eager" or "grouped_mm" experts.

    The experts are what ours are (two matrices with biases, GELU), of the same weights.
    """
    package = transformers()
    mixtral = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    moe = importlib.import_module("transformers.integrations.moe")
    weights = layer.state_dict()
    experts, inner, width = weights["experts.expand.weight"].shape
    config = package.MixtralConfig(
        hidden_size=width, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=layer.top_k
    )
    config._experts_implementation = implementation
    block: Any = mixtral.MixtralSparseMoeBlock(config)
    undecorated = type("GeluExperts", (GeluExperts,), {})  # the decorator changes the class
    block.experts = moe.use_experts_implementation(undecorated, has_gate=False, has_bias=True)(config)
    with torch.no_grad():
        block.gate.weight.copy_(weights["router.weight"])
        for name, source in (("up_proj", "expand"), ("down_proj", "contract")):
            getattr(block.experts, name).copy_(weights[f"experts.{source}.weight"])
            getattr(block.experts, f"{name}_bias").copy_(weights[f"experts.{source}.bias"])
    built: nn.Module = block
    return built


def swiglu_experts(layer: RoutedFeedForward) -> nn.Module:
    """Mixtral's own routed layer, `grouped_mm`, of about as many products, that routes as ours does."""
    package = transformers()
    mixtral = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    experts, inner, width = layer.state_dict()["experts.expand.weight"].shape
    config = package.MixtralConfig(
        hidden_size=width,
        intermediate_size=two_thirds(inner),
        num_local_experts=experts,
        num_experts_per_tok=layer.top_k,
    )
    config._experts_implementation = "grouped_mm"
    block: Any = mixtral.MixtralSparseMoeBlock(config)
    for parameter in block.experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        block.gate.weight.copy_(layer.state_dict()["router.weight"])
    built: nn.Module = block
    return built


class GeluExperts(nn.Module):
    """The form that transformers' decorator asks for; its forward is the "eager" one of transformers' models."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        experts, width, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.num_experts = experts
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, inner))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, width))
        self.act_fn = F.gelu

    def forward(self, x_SD: Tensor, chosen_SK: Tensor, weights_SK: Tensor) -> Tensor:
        out_SD = torch.zeros_like(x_SD)
        with torch.no_grad():
            member_EKS = F.one_hot(chosen_SK, num_classes=self.num_experts).permute(2, 1, 0)
            used = (member_EKS.sum((1, 2)) > 0).nonzero()
        for (expert,) in used:
            place, token = torch.where(member_EKS[expert])
            up = self.act_fn(F.linear(x_SD[token], self.up_proj[expert], self.up_proj_bias[expert]))
            down = F.linear(up, self.down_proj[expert], self.down_proj_bias[expert])
            out_SD.index_add_(0, token, down * weights_SK[token, place, None])
        return out_SD
