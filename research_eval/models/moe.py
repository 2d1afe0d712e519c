"""Token-choice mixture of experts (Shazeer et al., 2017; Fedus et al., 2021), dropless.

B batch  L length  D width  S real tokens  N experts  K experts per token  R = S * K assignments
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from research_eval.annotations import Aka, Choice, Count, Range, Weight
from research_eval.datasets.token_data import Batch
from research_eval.errors import ConfigError
from research_eval.layers.assignments import Assignments
from research_eval.layers.block import Attention, FeedForward, block_flops
from research_eval.layers.collective import batch_sum
from research_eval.layers.dispatch import Dispatch, Executing
from research_eval.layers.intervention import Intervened, Intervention
from research_eval.layers.overwrite import plus
from research_eval.layers.packing import Layout, Samples
from research_eval.layers.routing import balanced_bias, entropy, router_losses
from research_eval.layers.settings import EncoderSettings, PositionalEncoding
from research_eval.layers.stacked import Dropout, StackedLayerNorm, one_pass, weight_count
from research_eval.layers.text import ClassificationHead, TokenEmbedding
from research_eval.models.base_model import (
    AuxiliaryLoss,
    Outcome,
    RoutedModel,
    check_experts_per_token,
    joined_on_host,
    routed_parameters,
)
from research_eval.registry import MODELS_MAP
from research_eval.routing.record import EvaluationRecorder, RoutingRecord


class LayerRouting(NamedTuple):
    """The decisions of one routed layer about the real tokens of a batch."""

    logits_SN: Tensor  # without the balance bias
    chosen_SK: Tensor  # int64, the experts of each token
    weights_SK: Tensor  # the factor of each chosen expert's output
    sizes_N: Tensor  # assignments of each expert

    def load(self) -> Tensor:
        """Share of the assignments that each expert receives, [N]."""
        return self.sizes_N / max(self.chosen_SK.numel(), 1)


class RoutedFeedForward(Executing, Intervened):
    """Sum over the chosen K of w_i FFN_i(x).

    w are the softmax scores, renormalised over the chosen experts unless K = 1. `balance_bias` changes which experts
    are chosen, but not w. `counts` sums the assignments since the last optimiser step.
    """

    balance_bias: Tensor
    counts: Tensor

    def __init__(self, embed_dim: int, dim_feedforward: int, dropout: float, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.num_experts = num_experts
        self.router = nn.Linear(embed_dim, num_experts, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)  # small, so that the first choices are nearly uniform
        self.experts = FeedForward(embed_dim, dim_feedforward, dropout, num_experts)
        self.register_buffer("balance_bias", torch.zeros(num_experts))
        self.register_buffer("counts", torch.zeros(num_experts), persistent=False)  # reset at every step

    def forward(self, x_SD: Tensor) -> tuple[Tensor, LayerRouting]:
        """Real tokens [S, D] -> their outputs [S, D], and the routing. Padding is neither dispatched nor counted.

        The router computes in float32, also under autocast, because rounding changes decisions.
        """
        with torch.autocast(x_SD.device.type, enabled=False):
            logits_SN = self.router(x_SD.float())
            scores_SN = logits_SN.softmax(-1)
        # The bias balances the choice alone (loss-free balancing, DeepSeek-V3), so it has no gradient.
        biased_SN = self.intervention.permitted(scores_SN.detach() + self.balance_bias)
        chosen_SK = biased_SN.topk(self.top_k, dim=-1).indices
        weights_SK = scores_SN.gather(-1, chosen_SK)
        if self.top_k > 1:  # with one expert the renormalised weight is 1, without a gradient
            weights_SK = weights_SK / weights_SK.sum(-1, keepdim=True)
        chosen_SK, weights_SK = self.intervention.changed(chosen_SK, weights_SK)
        assignments = Assignments.of(chosen_SK, self.num_experts)
        dispatcher = self.execution.dispatcher
        plan = Dispatch.of(assignments.sizes_N, self.execution.kernels)
        rows_RD, plan, _ = dispatcher.dispatch(assignments.rows(x_SD), plan)
        with one_pass(self.experts.expand, self.experts.contract):
            outputs_RD = dispatcher.combine(self.experts(rows_RD, plan), plan)
        routing = LayerRouting(logits_SN, chosen_SK, weights_SK, assignments.sizes_N)
        return assignments.combined(outputs_RD, weights_SK), routing


class MoEBlock(nn.Module):
    """A pre-LN block that routes each token through its own feed-forward experts."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        num_experts: int,
        top_k: int,
        positional_encoding: PositionalEncoding = "none",
    ) -> None:
        super().__init__()
        self.attention = Attention(embed_dim, num_heads, positional_encoding=positional_encoding)
        self.norm = StackedLayerNorm(1, embed_dim)
        self.feed_forward = RoutedFeedForward(embed_dim, dim_feedforward, dropout, num_experts, top_k)
        self.dropout = Dropout(dropout)

    def forward(self, h: Tensor, layout: Layout) -> tuple[Tensor, LayerRouting]:
        """Rows of real tokens [S, D], or a grid [B, L, D] without padding -> the same shape, and the routing."""
        everyone = Dispatch.single(len(h))
        attended = self.dropout(self.attention(h, layout, everyone))
        h = plus(h, attended, self.attention, self.attention.output, self.dropout)
        update_SD, routing = self.feed_forward(self.norm(h, everyone).flatten(0, -2))
        return plus(h, self.dropout(update_SD.view_as(h)), self.feed_forward, self.dropout), routing


@MODELS_MAP.register("moe")
class MoETransformerClassifier(RoutedModel):
    """The dense encoder with routed feed-forward layers. `dim_feedforward` is the width of one expert.

    The details of an outcome are the routing of every layer. Raises ConfigError if a token needs more experts than
    exist.
    """

    model_type = "moe"
    records_all = True
    tuned_options = (("model_params.dropout", (0.0, 0.3)), ("model_params.balance_loss_coef", (0.1,)))
    control_options = (("frozen router", (("optimizer_params.router_lr_mult", 0.0),)),)
    OPTION_ORDER = (  # order in JSON, and of the draws in sampled studies
        "embed_dim",
        "num_layers",
        "num_heads",
        "num_experts",
        "top_k_experts",
        "dim_feedforward",
        "dim_feedforward_factor",
        "dropout",
        "balance_loss_coef",
        "z_loss_coef",
        "balance_bias_rate",
    )

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        num_layers: Annotated[Count, Range(1, 4)] = 2,
        num_experts: Annotated[Count, Aka("num_experts_per_layer"), Choice(2, 4, 8)] = 4,
        top_k_experts: Annotated[Count, Range(1, 4, upto=("num_experts",))] = 2,
        balance_loss_coef: Annotated[Weight, Range(1e-3, 0.1, log=True)] = 0.01,
        z_loss_coef: Weight = 1e-3,
        balance_bias_rate: Weight = 0.0,
        encoder: EncoderSettings,
    ) -> None:
        super().__init__()
        if top_k_experts > num_experts:
            raise ConfigError(f"top_k_experts={top_k_experts} is more than num_experts={num_experts}")
        width = encoder.feed_forward_width(default=2)
        self.padding_idx = padding_idx
        self.embed_dim = encoder.embed_dim
        self.top_k_experts = top_k_experts
        self.num_experts = num_experts
        self.balance_loss_coef = balance_loss_coef
        self.z_loss_coef = z_loss_coef
        self.balance_bias_rate = balance_bias_rate
        self.embedding = TokenEmbedding.of(vocab_size, padding_idx, encoder)
        self.layers = nn.ModuleList(
            MoEBlock(
                encoder.embed_dim,
                encoder.num_heads,
                width,
                encoder.dropout,
                num_experts,
                top_k_experts,
                encoder.positional_encoding,
            )
            for _ in range(num_layers)
        )
        self.head = ClassificationHead(encoder.embed_dim, num_classes, encoder.dropout, encoder.pool)
        self._recorder = EvaluationRecorder(num_experts, num_layers, joined_on_host)

    def route(self, batch: Batch) -> Outcome:
        keep_BL = batch.attention_mask
        # All kernels see real tokens only: padding is neither dispatched nor counted.
        samples = self.packed(keep_BL, batch.num_tokens, always=True)
        h = samples.take(self.embedding(batch.input_ids, keep_BL))
        layers = []
        for layer in self.layers:
            h, routing = layer(h, samples.layout)
            layers.append(routing)
        if self.training:
            self._count(layers)
        elif self._recorder.wants != "nothing":
            self._push(layers, samples)
        return Outcome(self.head(samples.grid(h), keep_BL), layers)

    def units(self) -> list[nn.Module]:
        return list(self.layers)

    def _set_intervention(self, intervention: Intervention) -> None:
        self.intervention = intervention
        for number, routed in enumerate(self._routed()):
            routed.intervention = intervention.at(number)

    def _check_intervention(self, wanted: Intervention) -> None:
        super()._check_intervention(wanted)
        check_experts_per_token(wanted, self.num_experts, self.top_k_experts)

    def _routed(self) -> list[RoutedFeedForward]:
        """The routed part of every layer, in the order of the layers."""
        return [module for module in self.modules() if isinstance(module, RoutedFeedForward)]

    def terms_of(self, outcome: Outcome) -> dict[str, AuxiliaryLoss]:
        """Balance loss and z-loss, each as the mean over the layers.

        The layers are not pooled: a pooled load hides a collapsed layer.
        """
        layers = [layer for layer in outcome.details if len(layer.logits_SN)]
        if not layers:
            return {}
        balance, z = router_losses([layer.load() for layer in layers], [layer.logits_SN for layer in layers])
        return {
            "balance_loss": AuxiliaryLoss(balance, self.balance_loss_coef),
            "z_loss": AuxiliaryLoss(z, self.z_loss_coef),
        }

    def scheduled_options(self) -> tuple[str, ...]:
        return ()  # the bias moves in the same way at every step

    def after_step(self, progress: float) -> None:
        """Move every layer's balance bias against its load since the last step, and reset the counts."""
        for layer in self._routed():
            if self.balance_bias_rate:
                layer.balance_bias.copy_(balanced_bias(layer.balance_bias, layer.counts, self.balance_bias_rate))
            layer.counts.zero_()

    def _count(self, layers: list[LayerRouting]) -> None:
        """Add the assignments of a training batch. Several processes exchange those of all layers at once."""
        sizes_TN = batch_sum(torch.stack([layer.sizes_N for layer in layers]))
        for routed, sizes_N in zip(self._routed(), sizes_TN, strict=True):
            routed.counts += sizes_N

    @torch.no_grad()
    def _push(self, layers: list[LayerRouting], samples: Samples) -> None:
        """Record every layer's decisions about every real token."""
        num_samples, length = samples.keep_RL.shape
        places_S = samples.places
        if places_S is None:  # no padding: the rows are the whole grid
            places_S = torch.arange(num_samples * length, device=samples.keep_RL.device)
        sample_S, token_S = places_S // length, places_S % length
        self._recorder.begin_batch(num_samples)
        for number, layer in enumerate(layers):
            probabilities_SN = layer.logits_SN.detach().softmax(-1)
            self._recorder.push(
                RoutingRecord(
                    step=number,
                    experts_DK=layer.chosen_SK,
                    weights_DK=layer.weights_SK.detach(),
                    sample_D=sample_S,
                    token_D=token_S,
                    probabilities_DA=probabilities_SN,
                    entropy_D=entropy(probabilities_SN),
                )
            )

    def start_recording(self) -> None:
        self._recorder.clear()

    def recorder(self) -> EvaluationRecorder:
        return self._recorder

    def get_model_specific_metrics(self) -> dict[str, Any]:
        return self._recorder.metrics()

    def get_active_parameter_count(self) -> int:
        """All parameters except those of the N - K experts that a token does not use."""
        experts = sum(parameter.numel() for parameter in routed_parameters(self, "experts"))
        return self.get_parameter_count() - experts * (self.num_experts - self.top_k_experts) // self.num_experts

    def get_flops_per_sample(self, length: int) -> float:
        """Attention, K feed-forward experts and the router per token, and the head."""
        total = 2.0 * self.head.linear.weight.numel()
        for layer, routed in zip(self.layers, self._routed(), strict=True):
            one_expert = block_flops(layer, self.embed_dim, length)  # attention and a single feed-forward expert
            other_weights = (self.top_k_experts - 1) * weight_count(routed) + routed.router.weight.numel()
            total += one_expert + 2.0 * length * other_weights
        return total
