"""The learned router of `goe_original`, and the fixed routes that serve as its baselines.

B batch  L length  D width  N experts  A = N + 1 actions (the last one stops)  H hidden width
S = 2 D width of a summary  T steps  V vocabulary  R running samples
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.layers.collective import batch_any, drawn
from research_eval.layers.routing import mean_of_rows
from research_eval.layers.text import masked_max, masked_mean, sinusoids_for

LOGIT_LIMIT = 10.0
FixedRoute = Literal["token", "hash", "random"]


class AllSteps(NamedTuple):
    """What the router computes once per pass if its input is the same at every step; one entry per step."""

    summary: tuple[Tensor, ...]  # standardized [B, S]
    hidden: tuple[Tensor, ...]  # W_s s + b + e_t, [B, H]
    policy: list[tuple[Tensor, Tensor]]  # W_pi and its bias


class Router(nn.Module):
    """l = W_pi GELU(W_s s + e_t + W_v visits / max_visits) of a summary s; z = clamp(norm(l + beta Q), +-10).

    With `per_step`, every step has its own W_s and W_pi. `standardize` scales s to mean 0 and variance 1 with running
    statistics, in training and in evaluation, so that random weights split the samples evenly. `normalize` adds the
    layer norm over the actions of the published form. This norm fixes the spread of the logits: with four experts and
    unit gain no probability can exceed 0.75. The gain therefore starts at 2, and the epsilon is large.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        num_experts: int,
        num_steps: int,
        initial_spread: float = 0.0,
        per_step: bool = False,
        standardize: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.num_copies = num_steps if per_step else 1
        self.summary = nn.Linear(2 * embed_dim, self.num_copies * hidden_dim)
        self.visits = nn.Linear(num_experts, hidden_dim, bias=False)
        self.step_bias = nn.Parameter(torch.randn(num_steps, hidden_dim) * 0.02)
        self.policy = nn.Linear(hidden_dim, self.num_copies * (num_experts + 1))
        nn.init.normal_(self.policy.weight, std=initial_spread * hidden_dim**-0.5)
        with torch.no_grad():  # stopping starts improbable
            self.policy.bias.zero_().view(self.num_copies, -1)[:, -1] = -2.0
        self.statistics = RunningStatistics(num_steps, 2 * embed_dim) if standardize else None
        self.norm = nn.LayerNorm(num_experts + 1, eps=1e-2) if normalize else None
        if self.norm is not None:
            nn.init.constant_(self.norm.weight, 2.0)

    def standardized(self, summary_BS: Tensor, running_B: Tensor | None, step: int) -> Tensor:
        """The summary in the form that `forward` takes.

        Training first adds the running samples (None: all samples) to the statistics.
        """
        if self.statistics is None:
            return summary_BS
        standardized_BS: Tensor = self.statistics(summary_BS, running_B, step)
        return standardized_BS

    def of_all_steps(self, summary_BS: Tensor, steps: int) -> AllSteps:
        """What `forward` computes of a summary that is the same at every step, for the first steps in one product.

        Training first adds all samples to the statistics of every step.
        """
        assert self.statistics is not None

        def of_steps(parameter: Tensor) -> Tensor:
            """The maps that lie side by side, [T, ...]: one for each step, or the same for all."""
            apart = parameter.unflatten(0, (self.num_copies, -1))
            return apart[:steps] if self.num_copies > steps else apart.expand(steps, *[-1] * parameter.ndim)

        with torch.autocast(summary_BS.device.type, enabled=False):
            summary_TBS = self.statistics.of_all_steps(summary_BS.float())[:steps]
            step_bias_TH = self.step_bias if steps == len(self.step_bias) else self.step_bias[:steps]
            bias_T1H = (of_steps(self.summary.bias) + step_bias_TH).unsqueeze(1)
            hidden_TBH = torch.baddbmm(bias_T1H, summary_TBS, of_steps(self.summary.weight).transpose(1, 2))
            policy = zip(*(of_steps(part).unbind() for part in self.policy.parameters()), strict=True)
        return AllSteps(summary_TBS.unbind(), hidden_TBH.unbind(), list(policy))

    def forward(
        self,
        summary_BS: Tensor,
        visit_share_BN: Tensor,
        step: int,
        values_BA: Tensor | None = None,
        known: AllSteps | None = None,
    ) -> Tensor:
        """Pooled states or features [B, 2 D] -> logits [B, A]. `values` are added before the clamp.

        What is `known` of all steps is not computed again.
        """
        copy = step if self.num_copies > 1 else 0
        with torch.autocast(summary_BS.device.type, enabled=False):
            if known is None:
                hidden_BH = _slice(self.summary, copy, self.num_copies, summary_BS.float()) + self.step_bias[step]
            else:
                hidden_BH = known.hidden[step]
            hidden_BH = F.gelu(hidden_BH + self.visits(visit_share_BN.float()))
            if known is None:
                logits_BA = _slice(self.policy, copy, self.num_copies, hidden_BH)
            else:
                logits_BA = F.linear(hidden_BH, *known.policy[step])
            if values_BA is not None:
                logits_BA = logits_BA + values_BA
            if self.norm is not None:
                logits_BA = self.norm(logits_BA)
            return logits_BA.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def num_weights(self) -> int:
        """Weights that one decision multiplies."""
        return (
            self.summary.weight.numel() + self.policy.weight.numel()
        ) // self.num_copies + self.visits.weight.numel()


def _slice(linear: nn.Linear, copy: int, num_copies: int, x: Tensor) -> Tensor:
    """Apply one of the linear maps that `linear` stores side by side."""
    return F.linear(x, linear.weight.chunk(num_copies)[copy], linear.bias.chunk(num_copies)[copy])


class RunningStatistics(nn.Module):
    """(s - mean) / deviation for the summaries of each step, over all training batches so far.

    The weight of a batch never falls below 1/1000, so the statistics can follow slow changes.
    """

    mean_TS: Tensor
    variance_TS: Tensor
    batches_T: Tensor

    def __init__(self, num_steps: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_TS", torch.zeros(num_steps, width))
        self.register_buffer("variance_TS", torch.ones(num_steps, width))
        self.register_buffer("batches_T", torch.zeros(num_steps))

    def forward(self, summary_BS: Tensor, running_B: Tensor | None, step: int) -> Tensor:
        """Summaries [B, S] -> standardized summaries [B, S]."""
        if self.training:
            summary_RS = summary_BS.detach() if running_B is None else summary_BS.detach()[running_B]
            self._add(summary_RS.float(), step)
        return (summary_BS - self.mean_TS[step]) / (self.variance_TS[step].sqrt() + 1e-3)

    def of_all_steps(self, summary_BS: Tensor) -> Tensor:
        """Summaries [B, S] that are the same at every step -> standardized summaries [T, B, S]."""
        if self.training:
            self._add_to_all(summary_BS.detach().float())
        return (summary_BS - self.mean_TS.unsqueeze(1)) / (self.variance_TS.sqrt() + 1e-3).unsqueeze(1)

    @torch.no_grad()
    def _add_to_all(self, summary_BS: Tensor) -> None:
        """Update the mean and the variance of every step with the same summaries."""
        if not batch_any(len(summary_BS) > 0):
            return
        self.batches_T += 1
        weight_T1 = (1 / self.batches_T).clamp_min(1e-3).unsqueeze(1)
        self.mean_TS += weight_T1 * (mean_of_rows(summary_BS) - self.mean_TS)
        gap_BTS = summary_BS.unsqueeze(1) - self.mean_TS
        self.variance_TS += weight_T1 * (mean_of_rows(gap_BTS.square()) - self.variance_TS)

    @torch.no_grad()
    def _add(self, summary_RS: Tensor, step: int) -> None:
        """Update the mean and the variance of a step with the summaries of running samples."""
        if not batch_any(len(summary_RS) > 0):
            return
        self.batches_T[step] += 1
        weight = (1 / self.batches_T[step]).clamp_min(1e-3)
        self.mean_TS[step] += weight * (mean_of_rows(summary_RS) - self.mean_TS[step])
        self.variance_TS[step] += weight * (
            mean_of_rows((summary_RS - self.mean_TS[step]).square()) - self.variance_TS[step]
        )


class TokenFeatures(nn.Module):
    """Fixed features of the tokens: one random vector per token, which no training changes.

    A route that depends on trained states drifts with them. If an input moves to another expert, the first expert's
    knowledge about it is lost (docs/research.md).
    """

    table_VD: Tensor

    def __init__(self, vocab_size: int, embed_dim: int, positions: bool = True, cursor: bool = False) -> None:
        super().__init__()
        self.register_buffer("table_VD", torch.randn(vocab_size, embed_dim))
        self.positions = positions
        self.cursor = cursor
        self._pooled_BS = torch.empty(0)
        self._positions_LD = torch.empty(0, embed_dim)

    def forward(self, ids_BL: Tensor, keep_BL: Tensor | None, step: int) -> Tensor:
        """[mean; max] over the real tokens, or with `cursor` token number `step` twice, [B, 2 D].

        The pooled features of a batch are computed at step 0 and reused at all later steps.
        """
        if self.cursor:
            if step >= ids_BL.shape[1]:
                return self.table_VD.new_zeros(len(ids_BL), 2 * self.table_VD.shape[1])  # as after a sample's end
            features_BD = self.table_VD[ids_BL[:, step]]
            return (features_BD if keep_BL is None else features_BD * keep_BL[:, step, None]).repeat(1, 2)
        if step == 0:
            width, features_BLD = self.table_VD.shape[1], F.embedding(ids_BL, self.table_VD)
            if self.positions:
                self._positions_LD = sinusoids_for(ids_BL, width, self._positions_LD)
                features_BLD = features_BLD + self._positions_LD[: ids_BL.shape[1]]
            features_BLD = F.layer_norm(features_BLD, (width,))
            self._pooled_BS = torch.cat([masked_mean(features_BLD, keep_BL), masked_max(features_BLD, keep_BL)], dim=-1)
        return self._pooled_BS


class ActionValues(nn.Module):
    """Q(s, a) and V(s) from a hidden layer of their own. No gradient flows to the states.

    `static` is the published form: one value per action, independent of the state.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, num_experts: int, num_steps: int, static: bool) -> None:
        super().__init__()
        self.step_bias = nn.Parameter(torch.randn(num_steps, hidden_dim) * 0.02) if not static else None
        self.summary = nn.Linear(2 * embed_dim, hidden_dim) if not static else None
        self.output = nn.Linear(hidden_dim, num_experts + 2) if not static else None
        self.value_bias = nn.Parameter(torch.zeros(num_experts + 2)) if static else None
        if self.output is not None:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, summary_BS: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Q [B, A] and V [B]."""
        with torch.autocast(summary_BS.device.type, enabled=False):
            if self.summary is None or self.output is None or self.step_bias is None:
                assert self.value_bias is not None
                values = self.value_bias.repeat(len(summary_BS), 1)  # a view needs a gradient even in evaluation
            else:
                hidden_BH = F.gelu(self.summary(summary_BS.detach().float()) + self.step_bias[step])
                values = self.output(hidden_BH)
            return values[:, :-1], values[:, -1]


def fixed_route(route: FixedRoute, ids_BL: Tensor, position: int, step: int, num_experts: int, fresh: bool) -> Tensor:
    """The expert of each sample at one step, [B], from the input alone. Padding (id 0) has no influence.

    "token": the token at `position`, modulo N; 0 for a sample that ends earlier. "hash": a hash of the whole input and
    the step. "random": a new draw on every call if `fresh` (training), otherwise another hash, so that evaluation
    repeats.
    """
    if route == "token":
        padded_BL = F.pad(ids_BL, (0, max(0, position + 1 - ids_BL.shape[1])))  # extends short batches with padding
        return padded_BL[:, position] % num_experts
    if route == "random" and fresh:
        return drawn(ids_BL[:, 0], lambda empty_B: empty_B.random_(num_experts))
    places_L = torch.arange(1, ids_BL.shape[1] + 1, device=ids_BL.device)
    key_B = (_mixed(ids_BL + (places_L << 32)) * (ids_BL != 0)).sum(1)
    return _mixed(key_B + step + (1 << 20 if route == "random" else 0)) % num_experts


def _mixed(keys: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014): every input bit changes every output bit.

    Torch's int64 shifts keep the sign, so a mask clears the bits that an unsigned shift fills with zeros.
    """
    keys = (keys ^ ((keys >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    keys = (keys ^ ((keys >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return (keys ^ ((keys >> 31) & 0x1FFFFFFFF)) & 0x7FFFFFFFFFFFFFFF
