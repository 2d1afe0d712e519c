"""The frame that all language models share: embedding, steps of attention and feed-forward parts, head, and decoding.

B batch  n new tokens  L tokens  S = B n rows  D width  V vocabulary  N experts  K experts per row  T steps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from research_eval.datasets.token_data import Batch
from research_eval.layers.assignments import Assignments
from research_eval.layers.causal.attention import Attention, CausalBlock, CausalFeedForward, full_precision, normed
from research_eval.layers.causal.context import Cache, Context
from research_eval.layers.causal.products import ExpertMatrix
from research_eval.layers.causal.routes import Choice, Routes, hashed
from research_eval.layers.causal.settings import CausalSettings
from research_eval.layers.dispatch import Dispatch, Dispatcher, Execution
from research_eval.layers.intervention import Intervention
from research_eval.layers.routing import entropy
from research_eval.layers.stacked import Dropout
from research_eval.layers.text import sinusoids_at
from research_eval.models.base_model import (
    AuxiliaryLoss,
    Outcome,
    RoutedModel,
    check_experts_per_token,
    joined_on_host,
    routed_parameters,
)
from research_eval.routing.record import STOPPED, EvaluationRecorder, RoutingRecord
from research_eval.tasks.base import Task

ALL_IN_ONE = Dispatch.single(0)  # for parts that no router chooses


class LanguageEmbedding(nn.Module):
    """h_0 = Drop(norm(Emb[x] + Bigram[hash(x_{i-1}, x_i)])), with entries from N(0, 1)."""

    def __init__(self, settings: CausalSettings, vocab_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.vocab_size = vocab_size
        self.token = nn.Embedding(vocab_size, settings.embed_dim)
        self.bigram = nn.Embedding(settings.bigram_buckets, settings.embed_dim) if settings.bigram_buckets else None
        self.dropout = Dropout(settings.dropout)

    def forward(self, context: Context) -> Tensor:
        """The states of the new tokens, [S, D]."""
        ids_Bn = context.earlier_ids(0)
        h_BnD = self.token(ids_Bn)
        if self.bigram is not None:
            pair_Bn = ids_Bn + context.earlier_ids(1) * self.vocab_size
            h_BnD = h_BnD + self.bigram(hashed(pair_Bn, self.settings.bigram_buckets))
        h_BnD = normed(h_BnD, self.settings.norm)
        if self.settings.positional_encoding == "sin":
            places = context.places()[:, context.offset :] if context.positions is None else context.positions
            h_BnD = h_BnD + sinusoids_at(places.float(), self.settings.embed_dim)
        return self.dropout(h_BnD).flatten(0, 1)


class LanguageHead(nn.Module):
    """logits = norm(h) W in float32. W starts at zero, or is the table of the embedding divided by sqrt(D)."""

    def __init__(self, settings: CausalSettings, embedding: LanguageEmbedding) -> None:
        super().__init__()
        self.settings = settings
        self.linear = nn.Linear(settings.embed_dim, embedding.vocab_size, bias=False)
        if settings.tie_embeddings:
            self.linear.weight = embedding.token.weight
        else:
            nn.init.zeros_(self.linear.weight)

    def forward(self, h_SD: Tensor) -> Tensor:
        """States [S, D] -> logits [S, V]."""
        with torch.autocast(h_SD.device.type, enabled=False):
            logits_SV = self.linear(normed(full_precision(h_SD), self.settings.norm))
            if self.settings.tie_embeddings:
                logits_SV = logits_SV * self.settings.embed_dim**-0.5
            cap = self.settings.logit_softcap
            return logits_SV if cap is None else cap * torch.tanh(logits_SV / cap)


class Layer(NamedTuple):
    """The modules of one step. An entry of `pooled` names a part whose weights belong to the row's expert."""

    projections: dict[str, ExpertMatrix]  # "q", "k", "v", "o"
    feed_forward: CausalFeedForward
    pooled: frozenset[str] = frozenset()  # of "q", "k", "v", "o", "f"; empty without a router
    shared: CausalFeedForward | None = None  # a feed-forward part that every row passes beside its expert


@dataclass
class LanguageWalk:
    """The choices of a pass, and the states after its steps as far as a loss needs them."""

    choices: list[Choice] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)  # per step, each row's expert [S]; -1: it stopped
    exits: list[Tensor] = field(default_factory=list)  # logits [S, V] of the steps before the last

    def paths(self) -> NDArray[np.int64]:
        """The experts of each row, [S, T]; -1 after the end of its path."""
        return joined_on_host([torch.stack(self.experts, 1)])


ROUTE_CONTROLS = (
    ("frozen router", (("optimizer_params.router_lr_mult", 0.0),)),
    ("hash of tokens", (("model_params.route", "random"),)),
    ("bigram table", (("model_params.route", "bigram"),)),
)


class LanguageModel(RoutedModel):
    """Predicts the next token at every position: ids [B, L] -> logits [B, L, V].

    A subclass gives the modules of each step by `layer`. It sets `routes` if experts are chosen. Every row (a token of
    a sample) has a route of its own, and no row sees a later one.
    """

    records_all = True

    def __init__(self, vocab_size: int, max_length: int, num_steps: int, *, settings: CausalSettings) -> None:
        super().__init__()
        self.settings = settings
        self.num_steps = num_steps
        self.vocab_size = vocab_size
        self.embedding = LanguageEmbedding(settings, vocab_size)
        self.attention = Attention(settings, max_length)
        self.dropout = Dropout(settings.dropout)
        self.head = LanguageHead(settings, self.embedding)
        self.routes: Routes | None = None
        self._recorder: EvaluationRecorder | None = None

    def route_with(self, routes: Routes) -> None:
        """Choose experts by these routes, and record the choices of evaluations."""
        self.routes = routes
        self._recorder = EvaluationRecorder(routes.num_experts, self.num_steps, joined_on_host)

    def layer(self, step: int) -> Layer:
        """The modules of a step."""
        raise NotImplementedError

    def learn_text(self, tokens_S: NDArray[np.int32], seed: int) -> None:
        """Prepare what is counted on the training text, before the training: the tables of fixed routes."""
        if self.routes is not None:
            self.routes.learn(tokens_S, np.random.default_rng(seed))

    # ------------------------------------------------------------------------------------------------------- forward

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        recorded_BL = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        self.outcome = self.pass_over(input_ids, recorded_BL=None if self.training else recorded_BL)
        return self.outcome.outputs

    def run(self, batch: Batch) -> Outcome:
        return self.pass_over(batch.input_ids, batch.documents, None if self.training else batch.attention_mask)

    def new_cache(self, capacity: int) -> Cache:
        """A cache for `decode`, with room for so many tokens."""
        return Cache(capacity)

    @torch.no_grad()
    def decode(self, ids_Bn: Tensor, cache: Cache) -> Tensor:
        """Logits [B, n, V] of tokens that follow those in the cache, which then holds these tokens too."""
        outputs = self.pass_over(ids_Bn, cache=cache).outputs
        cache.ids_BL = ids_Bn if cache.ids_BL is None else torch.cat([cache.ids_BL, ids_Bn], 1)
        cache.length += ids_Bn.shape[1]
        return outputs

    def pass_over(
        self,
        ids_Bn: Tensor,
        documents_BL: Tensor | None = None,
        recorded_BL: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Outcome:
        """One pass. The choices at True entries of `recorded_BL` go to the recorder, if it is given."""
        context = Context.of(ids_Bn, documents_BL, cache)
        h_SD, walk = self.embedding(context), LanguageWalk()
        begun = None if self.routes is None else self.routes.begin(context)
        running: Tensor | None = None  # numbers of the rows whose paths go on; None: all
        for step in range(self.num_steps):
            choice = None if self.routes is None else self.routes.choose(step, h_SD, context, begun)
            h_SD = self._step(step, h_SD, context, choice, running)
            if choice is not None:
                self._note(walk, choice, running)
            if step + 1 < self.num_steps:
                running = self.after_layer(step, h_SD, walk, running)
        if self.training and self.routes is not None:
            self.routes.count(walk.choices)
        recorder = self._recorder
        if recorded_BL is not None and recorder is not None and recorder.wants != "nothing" and walk.experts:
            self._push(walk, recorded_BL)
        outputs_BnV = self.head(h_SD).unflatten(0, ids_Bn.shape)
        return Outcome(outputs_BnV, walk)

    def after_layer(self, step: int, h_SD: Tensor, walk: LanguageWalk, running: Tensor | None) -> Tensor | None:
        """Which rows continue after a step that is not the last: their numbers, or None for all."""
        return None

    def _step(self, step: int, h_SD: Tensor, context: Context, choice: Choice | None, running: Tensor | None) -> Tensor:
        """h + o + c f for routed feed-forward parts; h + c (o + f) if the expert has attention matrices too."""
        layer, kind = self.layer(step), self.settings.norm
        sort = Sorted.of(choice, self.routes, self.execution) if choice is not None and self.routes else None
        if sort is not None and choice is not None:
            choice.sizes_N = sort.assignments.sizes_N
        attended_SD = self._attended(layer, step, normed(h_SD, kind), context, sort)
        if running is not None and layer.pooled <= {"f"}:  # only rows that go on are computed
            return self._continued(layer, h_SD, attended_SD, choice, running)
        o_SD = self.dropout(_applied(layer.projections["o"], attended_SD, sort if "o" in layer.pooled else None))
        after_SD = h_SD + o_SD
        x_SD, weights = normed(after_SD, kind), None if choice is None else choice.weights_SK
        if "o" in layer.pooled:
            assert sort is not None
            f_SD = self.dropout(_applied(layer.feed_forward, x_SD, sort))
            change_SD = o_SD + f_SD if weights is None else weights.to(o_SD.dtype) * (o_SD + f_SD)
            after_SD = h_SD + change_SD
        elif sort is not None:
            f_SD = sort.mixed(layer.feed_forward, x_SD, weights)
            after_SD = after_SD + self.dropout(_with_shared(layer, x_SD, f_SD))
        else:
            after_SD = after_SD + self.dropout(layer.feed_forward(x_SD, ALL_IN_ONE))
        if running is None:
            return after_SD
        return h_SD.index_copy(0, running, after_SD.index_select(0, running))

    def _continued(
        self, layer: Layer, h_SD: Tensor, attended_SD: Tensor, choice: Choice | None, running: Tensor
    ) -> Tensor:
        """The states after a step of which only the running rows take part; the others keep theirs."""
        if not len(running):
            return h_SD
        h_RD = h_SD.index_select(0, running)
        h_RD = h_RD + self.dropout(layer.projections["o"](attended_SD.index_select(0, running), ALL_IN_ONE))
        x_RD = normed(h_RD, self.settings.norm)
        if choice is None or self.routes is None:
            f_RD = layer.feed_forward(x_RD, ALL_IN_ONE)
        else:
            weights = None if choice.weights_SK is None else choice.weights_SK.index_select(0, running)
            part = Choice(choice.chosen_SK.index_select(0, running), weights)
            f_RD = Sorted.of(part, self.routes, self.execution).mixed(layer.feed_forward, x_RD, weights)
            f_RD = _with_shared(layer, x_RD, f_RD)
        return h_SD.index_copy(0, running, h_RD + self.dropout(f_RD))

    def _attended(self, layer: Layer, step: int, y_SD: Tensor, context: Context, sort: Sorted | None) -> Tensor:
        """The attended values before the output projection, [S, D]."""
        maps = layer.projections
        q_SD, k_SD, v_SD = (_applied(maps[name], y_SD, sort if name in layer.pooled else None) for name in "qkv")
        return self.attention(q_SD, k_SD, v_SD, context, str(step))

    def _note(self, walk: LanguageWalk, choice: Choice, running: Tensor | None) -> None:
        """Keep a choice for the losses, and the expert with the largest weight of each row for records."""
        walk.choices.append(choice)
        if not self.training:
            best_S = choice.chosen_SK[:, 0]
            if running is not None:
                best_S = torch.full_like(best_S, STOPPED).index_copy(0, running, best_S.index_select(0, running))
            walk.experts.append(best_S)

    @torch.no_grad()
    def _push(self, walk: LanguageWalk, recorded_BL: Tensor) -> None:
        """Record the choices about the real tokens of a batch."""
        assert self._recorder is not None
        self._recorder.begin_batch(len(recorded_BL))
        sample_S = torch.arange(len(recorded_BL), device=recorded_BL.device).repeat_interleave(recorded_BL.shape[1])
        token_S = torch.arange(recorded_BL.shape[1], device=recorded_BL.device).repeat(len(recorded_BL))
        for step, (choice, best_S) in enumerate(zip(walk.choices, walk.experts, strict=True)):
            kept = (recorded_BL.flatten() & (best_S != STOPPED)).nonzero().squeeze(1)
            weights = torch.ones_like(choice.chosen_SK, dtype=torch.float32)
            if choice.weights_SK is not None:
                weights = choice.weights_SK
            logits = choice.logits_SN
            self._recorder.push(
                RoutingRecord(
                    step,
                    choice.chosen_SK[kept],
                    weights[kept],
                    sample_S[kept],
                    token_S[kept],
                    entropy_D=None if logits is None else entropy(logits[kept].softmax(-1)),
                )
            )

    # ---------------------------------------------------------------------------------------------- losses and costs

    def task_loss_of(self, outcome: Outcome, labels_B: Tensor, task: Task, label_smoothing: float = 0.0) -> Tensor:
        return task.loss(outcome.outputs, labels_B, label_smoothing)

    def terms_of(self, outcome: Outcome) -> dict[str, AuxiliaryLoss]:
        return {} if self.routes is None else self.routes.losses(outcome.details.choices)

    def after_step(self, progress: float) -> None:
        if self.routes is not None:
            self.routes.after_step()

    def scheduled_options(self) -> tuple[str, ...]:
        return ()

    def _check_intervention(self, wanted: Intervention) -> None:
        super()._check_intervention(wanted)
        assert self.routes is not None
        check_experts_per_token(wanted, self.routes.num_experts, self.routes.top_k)

    def start_recording(self) -> None:
        if self._recorder is not None:
            self._recorder.clear()

    def recorder(self) -> EvaluationRecorder | None:
        return self._recorder

    def get_model_specific_metrics(self) -> dict[str, Any]:
        return {} if self._recorder is None else self._recorder.metrics()

    def get_active_parameter_count(self) -> int:
        """All parameters except those of experts that one token cannot use on its path."""
        if self.routes is None:
            return self.get_parameter_count()
        experts = sum(parameter.numel() for parameter in routed_parameters(self, "experts"))
        used = min(self.routes.num_experts, self.experts_per_token())
        return self.get_parameter_count() - experts * (self.routes.num_experts - used) // self.routes.num_experts

    def experts_per_token(self) -> int:
        """The largest number of experts of one pool that a token can use."""
        return self.num_steps if self.routes is None else self.num_steps * self.routes.top_k

    def get_flops_per_sample(self, length: int) -> float:
        """Projections, attention scores, feed-forward parts, router and head of a block of `length` tokens.

        Attention counts all pairs of tokens, as torch's counter does.
        """
        width, top_k = self.settings.embed_dim, 1 if self.routes is None else self.routes.top_k
        weights = 0
        for step in range(self.num_steps):
            layer = self.layer(step)
            weights += sum(one.weight[0].numel() for one in layer.projections.values())
            weights += top_k * sum(part.weight[0].numel() for part in layer.feed_forward.matrices())
            weights += 0 if layer.shared is None else sum(part.weight[0].numel() for part in layer.shared.matrices())
        weights += self.vocab_size * width + (0 if self.routes is None else self.routes.num_weights())
        return 2.0 * length * weights + 4.0 * length**2 * width * self.num_steps


class Sorted(NamedTuple):
    """The rows of a pass sorted by expert."""

    assignments: Assignments
    dispatch: Dispatch
    dispatcher: Dispatcher

    @classmethod
    def of(cls, choice: Choice, routes: Routes, execution: Execution) -> Sorted:
        """Sort by the chosen experts."""
        assignments = Assignments.of(choice.chosen_SK, routes.num_experts)
        return cls(assignments, Dispatch.of(assignments.sizes_N, execution.kernels), execution.dispatcher)

    def mixed(self, function: Callable[[Tensor, Dispatch], Tensor], x_SD: Tensor, weights_SK: Tensor | None) -> Tensor:
        """Per row the sum of its experts' outputs, each times its weight (None: 1)."""
        rows_RD, plan, _ = self.dispatcher.dispatch(self.assignments.rows(x_SD), self.dispatch)
        out_RD = self.dispatcher.combine(function(rows_RD, plan), plan)
        if weights_SK is None:
            weights_SK = out_RD.new_ones(self.assignments.place_SK.shape)
        return self.assignments.combined(out_RD, weights_SK)


def _applied(module: nn.Module, x_SD: Tensor, sort: Sorted | None) -> Tensor:
    """The module on rows in their order; by the row's own expert if `sort` is given."""
    out: Tensor = module(x_SD, ALL_IN_ONE) if sort is None else sort.mixed(module, x_SD, None)
    return out


def _with_shared(layer: Layer, x_SD: Tensor, f_SD: Tensor) -> Tensor:
    """`f_SD` comes from the routed experts. Add the output of the shared part, if the layer has one."""
    return f_SD if layer.shared is None else f_SD + layer.shared(x_SD, ALL_IN_ONE)


def layer_of(blocks: nn.ModuleList, number: int) -> Layer:
    """The modules of a block without experts."""
    block = blocks[number]
    assert isinstance(block, CausalBlock)
    return Layer(block.attention.maps(), block.feed_forward)
