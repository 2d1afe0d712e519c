"""The simple Graph-of-Experts: a GRU reads the path so far and chooses the next expert. The path length is fixed.

B batch  L length  D width  N experts  G router state  T steps of the whole path
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from research_eval.annotations import Aka, Choice, Count, Positive, Range, Steps, Weight
from research_eval.datasets.token_data import Batch
from research_eval.layers.block import block_flops
from research_eval.layers.experts import ExpertPool
from research_eval.layers.intervention import NOTHING
from research_eval.layers.routing import balance_losses, entropy, members
from research_eval.layers.settings import EncoderSettings
from research_eval.layers.stacked import one_pass
from research_eval.layers.text import ClassificationHead, TokenEmbedding, masked_mean
from research_eval.models.base_model import AuxiliaryLoss, Outcome, RoutedModel, joined_on_host, routed_parameters
from research_eval.registry import MODELS_MAP
from research_eval.routing.record import EvaluationRecorder, RoutingRecord


class GRURouter(nn.Module):
    """z = W_o GRU(pool(h_t), g_t) / tau with g_0 = tanh(W pool(h_0)).

    The state g carries the path so far. A large tau makes the choice less certain.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, num_experts: int, tau: float) -> None:
        super().__init__()
        self.start = nn.Linear(embed_dim, hidden_dim)
        self.cell = nn.GRUCell(embed_dim, hidden_dim)
        self.policy = nn.Linear(hidden_dim, num_experts)
        self.tau = tau

    def forward(self, pooled_BD: Tensor, state_BG: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pooled states [B, D] and router state [B, G] (None at the start) -> probabilities [B, N] and next state."""
        state_BG = torch.tanh(self.start(pooled_BD)) if state_BG is None else state_BG
        state_BG = self.cell(pooled_BD, state_BG)
        return (self.policy(state_BG) / self.tau).softmax(-1), state_BG


@MODELS_MAP.register("goe")
class GoEClassifier(RoutedModel):
    """`num_layers` GRU routers in sequence, each sending samples through `max_path_len` experts of one shared pool.

    The chosen expert's change is multiplied by its probability, in training and in evaluation. The task loss therefore
    reaches the router. The details of an outcome are the balance losses of all steps.
    """

    model_type = "goe"
    records_all = True
    tuned_options = (("model_params.dropout", (0.0, 0.3)), ("model_params.balance_loss_coef", (0.01,)))
    control_options = (("frozen router", (("optimizer_params.router_lr_mult", 0.0),)),)
    OPTION_ORDER = (  # order in JSON, and of the draws in sampled studies
        "embed_dim",
        "num_layers",
        "num_total_experts",
        "max_path_len",
        "router_hidden_dim",
        "gumbel_tau",
        "num_heads",
        "dim_feedforward",
        "dim_feedforward_factor",
        "dropout",
        "balance_loss_coef",
    )

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        num_layers: Annotated[Count, Aka("num_goe_layers"), Range(1, 2)] = 1,
        num_total_experts: Annotated[Count, Aka("num_total_experts_pool"), Choice(2, 4, 8)] = 4,
        max_path_len: Annotated[Steps, Range(1, 4)] = 3,
        router_hidden_dim: Count | None = None,
        gumbel_tau: Annotated[Positive, Range(0.3, 3.0, log=True)] = 1.0,
        balance_loss_coef: Annotated[Weight, Range(1e-3, 0.3, log=True)] = 0.05,
        encoder: EncoderSettings,
    ) -> None:
        super().__init__()
        width = encoder.feed_forward_width(default=2)
        self.padding_idx = padding_idx
        self.embed_dim = encoder.embed_dim
        self.max_path_len = max_path_len
        self.balance_loss_coef = balance_loss_coef
        self.embedding = TokenEmbedding.of(vocab_size, padding_idx, encoder)
        self.router = nn.ModuleList(
            GRURouter(encoder.embed_dim, router_hidden_dim or encoder.embed_dim, num_total_experts, gumbel_tau)
            for _ in range(num_layers)
        )
        self.experts = ExpertPool(
            num_total_experts,
            1,
            encoder.embed_dim,
            encoder.num_heads,
            width,
            encoder.dropout,
            positional_encoding=encoder.positional_encoding,
        )
        self.head = ClassificationHead(encoder.embed_dim, num_classes, encoder.dropout, encoder.pool)
        self._recorder = EvaluationRecorder(num_total_experts, num_layers * max_path_len, joined_on_host)

    def route(self, batch: Batch) -> Outcome:
        """One pass. `one_pass` joins the experts' gradients once per pass, although a path uses the pool many times."""
        with one_pass(*self.experts.stacks):
            return self._walk(batch)

    def _walk(self, batch: Batch) -> Outcome:
        """Send every sample through its path. Each sample takes the expert with the largest probability.

        No sample stops early, so no step waits for the device (`all_run`).
        """
        keep_BL = batch.attention_mask
        h_BLD = self.embedding(batch.input_ids, keep_BL)
        packing = self.experts.packing(keep_BL, batch.num_tokens)
        shares: list[Tensor] = []  # of the decisions of a step, by expert
        means: list[Tensor] = []  # probabilities
        records = not self.training and self._recorder.wants != "nothing"
        if records:
            self._recorder.begin_batch(len(h_BLD))
        for router in self.router:
            state_BG = None  # each router starts from the states that its predecessor left
            for _ in range(self.max_path_len):
                probabilities_BN, state_BG = router(masked_mean(h_BLD, keep_BL), state_BG)
                # The coefficient carries the gradient; the choice is an integer and has none.
                coefficient_B, choice_B = probabilities_BN.max(-1)
                if self.intervention is not NOTHING:
                    now = self.intervention.at(len(means))
                    coefficient_B, choice_B = now.permitted(probabilities_BN).max(-1)
                    choice_B, coefficient_B = now.changed(choice_B, coefficient_B)
                h_BLD = self.experts.step(h_BLD, packing, choice_B, coefficient_B, all_run=True).h_BLD
                if records:
                    self._push(len(means), choice_B, coefficient_B, probabilities_BN)
                shares.append(members(choice_B, self.experts.num_experts).sum(0) / len(choice_B))
                means.append(probabilities_BN.mean(0))
        balance_T = balance_losses(torch.stack(shares), torch.stack(means), len(h_BLD))
        return Outcome(self.head(h_BLD, keep_BL), balance_T)

    @torch.no_grad()
    def _push(self, step: int, choice_B: Tensor, coefficient_B: Tensor, probabilities_BN: Tensor) -> None:
        """Record the decisions of one step, numbered over all routers."""
        self._recorder.push(
            RoutingRecord(
                step, choice_B.unsqueeze(1), coefficient_B.unsqueeze(1), entropy_D=entropy(probabilities_BN.detach())
            )
        )

    def terms_of(self, outcome: Outcome) -> dict[str, AuxiliaryLoss]:
        """The mean of the balance losses over all steps.

        The steps are not pooled: a pooled load hides a step that always takes the same expert.
        """
        return {"balance_loss": AuxiliaryLoss(outcome.details.mean(), self.balance_loss_coef)}

    def start_recording(self) -> None:
        self._recorder.clear()

    def recorder(self) -> EvaluationRecorder:
        return self._recorder

    def get_model_specific_metrics(self) -> dict[str, Any]:
        return self._recorder.metrics()

    def get_active_parameter_count(self) -> int:
        """All parameters except those of idle experts.

        A path of T steps uses at most T different experts.
        """
        experts = sum(parameter.numel() for parameter in routed_parameters(self, "experts"))
        idle = max(0, self.experts.num_experts - self._recorder.num_steps)
        return self.get_parameter_count() - experts * idle // self.experts.num_experts

    def get_flops_per_sample(self, length: int) -> float:
        """One expert and one router decision per step, the routers' initial states, and the head."""
        weights = self.head.linear.weight.numel()
        for router in (module for module in self.modules() if isinstance(module, GRURouter)):
            starting = router.start.weight.numel()
            total = sum(parameter.numel() for parameter in router.parameters() if parameter.ndim > 1)
            weights += starting + self.max_path_len * (total - starting)
        return self._recorder.num_steps * block_flops(self.experts, self.embed_dim, length) + 2.0 * weights
