"""The causal Graph-of-Experts whose tokens may end their paths early.

B batch  n new tokens  S = B n rows  D width  V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from research_eval.annotations import Aka, Choice, Count, Range, Steps, Weight, When
from research_eval.errors import ConfigError
from research_eval.layers.causal.settings import CausalSettings, RoutedParts, RouteSettings
from research_eval.models.base_model import Outcome
from research_eval.models.language.base import ROUTE_CONTROLS, LanguageWalk
from research_eval.models.language.goe import GoELanguageModel
from research_eval.registry import LANGUAGE_MODELS
from research_eval.tasks.base import Task

Threshold = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class ExitSettings:
    """When the path of a token ends. "confidence": at the first step whose most probable token exceeds a threshold."""

    halt: Literal["off", "confidence"] = "off"
    exit_threshold: Annotated[Threshold, Range(0.5, 1.0), When("halt", "confidence")] = 0.9
    min_path_len: Count = 1


@LANGUAGE_MODELS.register("goe_original")
class GoEOriginalLanguageModel(GoELanguageModel):
    """`goe` with an exit per token.

    With halt="confidence" the loss is the mean over all steps of the cross-entropy of the shared head. In evaluation, a
    token that stopped keeps its state. Its keys and values at later steps are made from that state. Raises ConfigError
    for a shortest path that is longer than the longest.
    """

    model_type = "goe_original"
    records_all = True
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
        exits: ExitSettings,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            max_length=max_length,
            num_total_experts=num_total_experts,
            max_path_len=max_path_len,
            top_k_experts=top_k_experts,
            routed_parts=routed_parts,
            home_bias=home_bias,
            causal=causal,
            routing=routing,
        )
        if exits.min_path_len > max_path_len:
            raise ConfigError(f"min_path_len={exits.min_path_len} is more than max_path_len={max_path_len}")
        self.exits = exits

    def after_layer(self, step: int, h_SD: Tensor, walk: LanguageWalk, running: Tensor | None) -> Tensor | None:
        if self.exits.halt == "off":
            return None
        if self.training:
            walk.exits.append(self.head(h_SD))
            return None
        if step + 1 < self.exits.min_path_len:
            return running
        rows = torch.arange(len(h_SD), device=h_SD.device) if running is None else running
        confidence_R = self.head(h_SD.index_select(0, rows)).softmax(-1).amax(-1)
        return rows[confidence_R <= self.exits.exit_threshold]

    def task_loss_of(self, outcome: Outcome, labels_B: Tensor, task: Task, label_smoothing: float = 0.0) -> Tensor:
        outputs = [exit_SV.view_as(outcome.outputs) for exit_SV in outcome.details.exits] + [outcome.outputs]
        losses = [task.loss(logits, labels_B, label_smoothing) for logits in outputs]
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

    def get_model_specific_metrics(self) -> dict[str, Any]:
        metrics = super().get_model_specific_metrics()
        if self.exits.halt != "off" and self._recorder is not None and metrics:
            decisions_T = self._recorder.decisions_per_step()
            metrics["mean_path_length"] = float(decisions_T.sum() / max(decisions_T[0], 1))
        return metrics
