"""How a token's expert is chosen from earlier tokens only: learned routers, n-gram tables, hashes.

B batch  n new tokens  L tokens  S = B n rows  D width  F width of the router's input  R hidden width  N experts
K experts per row  T steps  V vocabulary  W window  E entries of a table
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.errors import ConfigError
from research_eval.layers.causal.attention import full_precision, normed
from research_eval.layers.causal.context import Context
from research_eval.layers.causal.settings import NGRAM_ORDER, RouteSettings
from research_eval.layers.collective import batch_sum
from research_eval.layers.intervention import NOTHING, Intervened, Intervention
from research_eval.layers.losses import AuxiliaryLoss
from research_eval.layers.routing import balanced_bias, router_losses

FADING = 0.7  # weight of a token in the features, for each place that it lies further back
MOST_ENTRIES = 2**17  # of an n-gram table; longer n-grams are hashed
MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # odd, from the golden ratio (Knuth's multiplicative hash), as int64


@dataclass
class Choice:
    """The experts of each row [S, K], the factors of their outputs (None: 1), and the router's logits [S, N].

    `sizes_N` are the rows of each expert; they are known once the rows are sorted.
    """

    chosen_SK: Tensor
    weights_SK: Tensor | None = None
    logits_SN: Tensor | None = None
    sizes_N: Tensor | None = None

    def sizes(self) -> Tensor:
        """The rows of each expert, of a choice whose rows are sorted."""
        assert self.sizes_N is not None, "the rows are not sorted yet"
        return self.sizes_N


class Features(nn.Module):
    """r_i = [norm(t_0[x_i]); norm(sum_w 0.7^w t_w[x_{i-w}])] with fixed random tables t_w, w = 1..W-1.

    They do not change while the model learns, so a token keeps its route from one step of the training to the next.
    """

    tables_WVD: Tensor

    def __init__(self, vocab_size: int, embed_dim: int, window: int) -> None:
        super().__init__()
        tables_WVD = torch.randn(window, vocab_size, embed_dim)
        tables_WVD[:, 0] = 0  # padding, and what stands before the start
        self.register_buffer("tables_WVD", tables_WVD)

    def forward(self, context: Context) -> Tensor:
        """The features of the new tokens, [S, 2 D]."""
        now, *earlier = self.tables_WVD
        present_BnD = F.embedding(context.earlier_ids(0), now)
        past_BnD = torch.zeros_like(present_BnD)
        for distance, table_VD in enumerate(earlier, 1):
            past_BnD = past_BnD + FADING**distance * F.embedding(context.earlier_ids(distance), table_VD)
        return torch.cat([normed(present_BnD), normed(past_BnD)], -1).flatten(0, 1)


class Pools(nn.Module):
    """r_i = norm(mean of t_0 over a finished segment): the one before the token's own, or the first one ("prefix").

    It is zero while no segment is finished. Segments restart with each document.
    """

    table_VD: Tensor

    def __init__(self, vocab_size: int, embed_dim: int, length: int, only_first: bool) -> None:
        super().__init__()
        self.length, self.only_first = length, only_first
        table_VD = torch.randn(vocab_size, embed_dim)
        table_VD[0] = 0
        self.register_buffer("table_VD", table_VD)

    def forward(self, context: Context) -> Tensor:
        """The pool that each new token may read, [S, D]."""
        sums_BLD = F.embedding(context.ids_BL, self.table_VD).cumsum(1)
        sums_BLD = F.pad(sums_BLD, (0, 0, 1, 0))  # entry i sums the tokens before i
        places_BL = context.places().expand_as(context.ids_BL)
        index_BL = torch.arange(context.ids_BL.shape[1], device=places_BL.device)
        start_BL = index_BL - places_BL  # of the document
        end_BL = self.length if self.only_first else places_BL - places_BL % self.length
        is_ready_BL = places_BL >= self.length
        end_BL = torch.where(is_ready_BL, start_BL + end_BL, index_BL + 1)
        first_BL = (end_BL - self.length).clamp_min(0)

        def at(place_BL: Tensor) -> Tensor:
            return sums_BLD.gather(1, place_BL.unsqueeze(-1).expand(-1, -1, sums_BLD.shape[-1]))

        pool_BLD = (at(end_BL) - at(first_BL)) / self.length * is_ready_BL.unsqueeze(-1)
        return normed(pool_BLD[:, context.offset :]).flatten(0, 1)


class CausalRouter(nn.Module):
    """z = GELU(r W_s + b) W_pi + b', in float32, with weights of its own for each of `copies` steps.

    The entries of W_pi are drawn so that the first logits have the standard deviation `spread`.
    """

    def __init__(self, width: int, hidden_dim: int, num_experts: int, copies: int, spread: float) -> None:
        super().__init__()
        bound = (3 / width) ** 0.5
        self.summary = nn.Parameter(torch.empty(copies, width, hidden_dim).uniform_(-bound, bound))
        self.summary_bias = nn.Parameter(torch.zeros(copies, 1, hidden_dim))
        mean_square = 0.425  # of GELU(x) for a normal x
        self.policy = nn.Parameter(
            torch.randn(copies, hidden_dim, num_experts) * spread / (mean_square * hidden_dim) ** 0.5
        )
        self.policy_bias = nn.Parameter(torch.zeros(copies, 1, num_experts))

    def forward(self, input_SF: Tensor, copy: int | None = None) -> Tensor:
        """Logits [S, N] of one step, or [T, S, N] of all steps from the same input."""
        weights = (self.summary, self.summary_bias, self.policy, self.policy_bias)
        summary, summary_bias, policy, policy_bias = weights if copy is None else (w[copy] for w in weights)
        with torch.autocast(input_SF.device.type, enabled=False):
            x = full_precision(input_SF)
            hidden = F.gelu(torch.matmul(x, summary) + summary_bias)
            return torch.matmul(hidden, policy) + policy_bias


class NgramTable(nn.Module):
    """The expert of the n-gram that ends at a token, another table for each step. `learn` balances it by frequency."""

    table_TE: Tensor

    def __init__(self, vocab_size: int, order: int, num_experts: int, num_steps: int) -> None:
        super().__init__()
        self.order, self.vocab_size, self.num_experts = order, vocab_size, num_experts
        self.num_entries = min(vocab_size**order, MOST_ENTRIES)
        self.register_buffer("table_TE", torch.zeros(num_steps, self.num_entries, dtype=torch.int16))

    def learn(self, tokens_S: NDArray[np.int32], rng: np.random.Generator) -> None:
        """Give each n-gram the expert with the smallest load so far, the most frequent n-grams first.

        `tokens_S` is the training text. Equal loads and n-grams that do not occur are decided by chance.
        """
        ids = torch.from_numpy(tokens_S.astype(np.int64))
        earlier = [F.pad(ids, (distance, 0))[: len(ids)] for distance in range(self.order)]
        counts_E = np.bincount(self._entries(earlier).numpy(), minlength=self.num_entries)
        tables = [balanced_table(counts_E, self.num_experts, rng) for _ in self.table_TE]
        self.table_TE.copy_(torch.from_numpy(np.stack(tables)))

    def _entries(self, ids: Sequence[Tensor]) -> Tensor:
        """The number of the n-gram with these ids, the last token first."""
        entry = _joined(ids, self.vocab_size)
        if self.vocab_size**self.order <= MOST_ENTRIES:
            return entry
        return hashed(entry, self.num_entries)

    def entries(self, context: Context) -> Tensor:
        """The number of the n-gram that ends at each new token, [S]."""
        return self._entries([context.earlier_ids(distance) for distance in range(self.order)]).flatten()

    def forward(self, context: Context, step: int) -> Tensor:
        """The expert of each new token, [S]."""
        return self.table_TE[step].index_select(0, self.entries(context)).long()


class TableRouter(nn.Module):
    """Logits of each n-gram as parameters, [T, E, N]: at the start `spread` for the expert of a table, 0 for others.

    So it starts as the table does, and learns to leave it. A look-up costs no FLOPs.
    """

    def __init__(self, table: NgramTable, spread: float) -> None:
        super().__init__()
        self.spread = spread
        self.logits = nn.Parameter(torch.zeros(*table.table_TE.shape, table.num_experts))

    @torch.no_grad()
    def start_from(self, table: NgramTable) -> None:
        """Prefer the expert of the table."""
        self.logits.copy_(self.spread * F.one_hot(table.table_TE.long(), table.num_experts))

    def forward(self, entries_S: Tensor, step: int) -> Tensor:
        """The logits of n-grams, [S, N]."""
        return F.embedding(entries_S, self.logits[step])


def _joined(ids: Sequence[Tensor], vocab_size: int) -> Tensor:
    """One number for several ids. It may wrap around, which a hash does not mind."""
    joined = ids[0].long()
    for factor, other in enumerate(ids[1:], 1):
        joined = joined + other * vocab_size**factor
    return joined


def hashed(numbers: Tensor, size: int) -> Tensor:
    """A pseudo-random number below `size` for each number."""
    mixed = numbers * MULTIPLIER
    mixed = (mixed ^ (mixed >> 29)) * MULTIPLIER
    return (mixed >> 33).remainder(size)


def balanced_table(counts_E: NDArray[np.int64], num_experts: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """Spread entries over the experts so that each expert has about the same sum of counts, [E]."""
    table_E = rng.integers(num_experts, size=len(counts_E)).astype(np.int16)
    seen = np.flatnonzero(counts_E)
    order = seen[np.lexsort((rng.random(len(seen)), -counts_E[seen]))]
    loads = [(0, float(tie), expert) for expert, tie in enumerate(rng.random(num_experts))]
    heapq.heapify(loads)
    ties = rng.random(len(order)).tolist()
    for entry, count, tie in zip(order.tolist(), counts_E[order].tolist(), ties, strict=True):
        load, _, expert = loads[0]
        table_E[entry] = expert
        heapq.heapreplace(loads, (load + count, tie, expert))
    return table_E


class Routes(nn.Module, Intervened):
    """The experts of every row at every step, and the balance of their load.

    `balance_bias` changes which experts a learned route chooses, but not their weights (DeepSeek-V3). `counts` sums the
    choices since the last optimiser step.
    """

    balance_bias: Tensor
    counts: Tensor

    def __init__(
        self, settings: RouteSettings, embed_dim: int, vocab_size: int, num_experts: int, num_steps: int, top_k: int = 1
    ) -> None:
        super().__init__()
        self.settings, self.top_k = settings, top_k
        self.num_experts, self.num_steps, self.vocab_size = num_experts, num_steps, vocab_size
        self.features: Features | Pools | None = None
        self.router: CausalRouter | TableRouter | None = None
        self.table: NgramTable | None = None
        if settings.route in NGRAM_ORDER:
            self.table = NgramTable(vocab_size, NGRAM_ORDER[settings.route], num_experts, num_steps)
            if settings.learned_table:
                self.router = TableRouter(self.table, settings.initial_spread)
        elif settings.route == "learned":
            width = embed_dim
            if settings.lm_routing != "token":
                only_first = settings.lm_routing == "prefix"
                self.features = Pools(vocab_size, embed_dim, settings.segment_length, only_first)
            elif settings.router_input == "features":
                self.features = Features(vocab_size, embed_dim, settings.router_window)
                width = 2 * embed_dim
            copies = num_steps if settings.router_per_step else 1
            hidden = settings.router_hidden_dim or embed_dim
            self.router = CausalRouter(width, hidden, num_experts, copies, settings.initial_spread)
        self.register_buffer("balance_bias", torch.zeros(num_steps, num_experts))
        self.register_buffer("counts", torch.zeros(num_steps, num_experts), persistent=False)

    @torch.no_grad()
    def start_at_home(self, bias: float) -> None:
        """Let the experts at home at a step begin with this much more in their logits: step t has the t-th share.

        Raises ConfigError for a route that is not learned for every step on its own.
        """
        if not isinstance(self.router, CausalRouter) or len(self.router.policy_bias) < self.num_steps:
            raise ConfigError(
                f"home_bias={bias:g} needs a learned route with router_per_step, got route={self.settings.route!r}, "
                f"router_per_step={str(self.settings.router_per_step).lower()}"
            )
        home_N = torch.arange(self.num_experts) * self.num_steps // self.num_experts
        is_home_TN = home_N == torch.arange(self.num_steps).unsqueeze(1)
        self.router.policy_bias.copy_(bias * is_home_TN.unsqueeze(1))

    def learn(self, tokens_S: NDArray[np.int32], rng: np.random.Generator) -> None:
        """Balance the tables of a fixed route by the training text."""
        if self.table is not None:
            self.table.learn(tokens_S, rng)
            if isinstance(self.router, TableRouter):
                self.router.start_from(self.table)

    def begin(self, context: Context) -> list[Tensor] | None:
        """The logits of all steps [T, S, N], if they do not depend on the states."""
        if self.features is None or not isinstance(self.router, CausalRouter):
            return None
        logits = self.router(self.features(context))
        return list(logits if len(logits) == self.num_steps else logits.expand(self.num_steps, -1, -1))

    def choose(self, step: int, h_SD: Tensor, context: Context, begun: list[Tensor] | None) -> Choice:
        """The experts of the rows at one step."""
        now = self.intervention.at(step)
        choice = self._fixed(step, context) if self.router is None else self._learned(step, h_SD, context, begun, now)
        if now is NOTHING:
            return choice
        if self.router is None:
            choice.chosen_SK = now.rerouted(choice.chosen_SK, self.num_experts)
        weights_SK = torch.ones_like(choice.chosen_SK, dtype=h_SD.dtype)
        if choice.weights_SK is not None:
            weights_SK = choice.weights_SK
        return Choice(*now.changed(choice.chosen_SK, weights_SK), choice.logits_SN)

    def _learned(
        self, step: int, h_SD: Tensor, context: Context, begun: list[Tensor] | None, now: Intervention
    ) -> Choice:
        """The experts that the router chooses, as far as an intervention permits them."""
        if begun is not None:
            logits_SN = begun[step]
        elif isinstance(self.router, TableRouter):
            assert self.table is not None
            logits_SN = self.router(self.table.entries(context), step)
        else:
            assert self.router is not None
            logits_SN = self.router(normed(h_SD), step if self.settings.router_per_step else 0)
        scores_SN = logits_SN.softmax(-1)
        biased_SN = now.permitted(scores_SN.detach() + self.balance_bias[step])
        chosen_SK = biased_SN.topk(self.top_k, dim=-1).indices if self.top_k > 1 else biased_SN.argmax(-1, keepdim=True)
        weights_SK = scores_SN.gather(-1, chosen_SK)
        if self.top_k > 1:
            weights_SK = weights_SK / weights_SK.sum(-1, keepdim=True)
        elif self.settings.straight_through:
            weights_SK = 1 + weights_SK - weights_SK.detach()
        else:
            weights_SK = self.settings.scale * weights_SK
        return Choice(chosen_SK, weights_SK, logits_SN)

    def _fixed(self, step: int, context: Context) -> Choice:
        """The experts of a route that is not learned, with the gate 1."""
        if self.table is not None:
            chosen_S = self.table(context, step)
        else:
            window = [context.earlier_ids(distance) for distance in range(self.settings.router_window)]
            number_S = _joined(window, self.vocab_size).flatten()
            if self.settings.route == "layered":
                chosen_S = torch.full_like(number_S, step % self.num_experts)
            else:
                chosen_S = hashed(number_S * self.num_steps + step, self.num_experts)
        if self.top_k == 1:
            return Choice(chosen_S.unsqueeze(1))
        others = torch.arange(self.top_k, device=chosen_S.device)  # the next experts, in equal shares
        chosen_SK = (chosen_S.unsqueeze(1) + others) % self.num_experts
        return Choice(chosen_SK, torch.full(chosen_SK.shape, 1 / self.top_k, device=chosen_S.device))

    def count(self, choices: Sequence[Choice]) -> None:
        """Add the loads of all steps of a training batch."""
        self.counts += batch_sum(torch.stack([choice.sizes() for choice in choices]))

    def losses(self, choices: Sequence[Choice]) -> dict[str, AuxiliaryLoss]:
        """Balance and z-loss, as means over the steps; empty for a fixed route."""
        if self.router is None:
            return {}
        shares = [choice.sizes() / choice.chosen_SK.numel() for choice in choices]
        balance, z = router_losses(shares, [choice.logits_SN for choice in choices if choice.logits_SN is not None])
        return {
            "balance_loss": AuxiliaryLoss(balance, self.settings.balance_loss_coef),
            "z_loss": AuxiliaryLoss(z, self.settings.z_loss_coef),
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the biases of a learned route by the loads since the last step."""
        if self.router is not None:
            for step in range(self.num_steps):
                moved_N = balanced_bias(self.balance_bias[step], self.counts[step], self.settings.balance_bias_rate)
                self.balance_bias[step].copy_(moved_N)
        self.counts.zero_()

    def num_weights(self) -> int:
        """Weights that all decisions about one token multiply."""
        if not isinstance(self.router, CausalRouter):
            return 0
        one = self.router.summary[0].numel() + self.router.policy[0].numel()
        return one * (self.num_steps if self.features is None else len(self.router.summary))
