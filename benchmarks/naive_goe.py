"""Graph-of-Experts as one would write it first: a Python loop over the experts, boolean masks, padding computed.

The peer that `goe_original` is measured against, and the oracle of its arithmetic: the same parameters give the same
paths, logits, losses and gradients. It knows the default router (`router_mode` "gate", `router_input` "features",
`router_per_step`, `halt` "off") and Transformer experts; every expert is a module of its own with torch's own layers.

B batch  L length  D width  H heads  C channels of a head  N experts  A = N + 1 actions  S = 2 D width of a summary
"""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.layers.block import Block as StackedBlock
from research_eval.layers.path.balance import LOAD_DECAY
from research_eval.layers.path.policy import LearnedPolicy
from research_eval.layers.text import sinusoids
from research_eval.models.goe_original import GoEOriginalClassifier
from research_eval.registry import MODELS_MAP

Attend = Literal["matmul", "sdpa"]
UNUSED = ("progress", "value.reward.")  # of the model's state: of other modes


class Attention(nn.Module):
    """Gated attention over padded samples; "matmul" keeps the weights, as torch's own layer does when asked to."""

    def __init__(self, width: int, num_heads: int, attend: Attend) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend = attend
        self.norm = nn.LayerNorm(width)
        self.input = nn.Linear(width, 4 * width)
        self.output = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)

    def forward(self, h_BLD: Tensor, mask_B11L: Tensor | None) -> Tensor:
        query, key, value, from_input_BLD = self.input(self.norm(h_BLD)).chunk(4, dim=-1)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        if self.attend == "sdpa":
            attended_BHLC = F.scaled_dot_product_attention(query, key, value, mask_B11L)
        else:
            scores_BHLL = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            if mask_B11L is not None:
                scores_BHLL = scores_BHLL.masked_fill(~mask_B11L, float("-inf"))
            attended_BHLC = scores_BHLL.softmax(-1) @ value
        attended_BLD = self.output(attended_BHLC.transpose(1, 2).flatten(2))
        return attended_BLD * torch.sigmoid(from_input_BLD + self.gate(attended_BLD))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.expand = nn.Linear(width, inner)
        self.contract = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.contract(self.dropout(F.gelu(self.expand(x))))
        return out


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, inner: int, dropout: float, attend: Attend) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads, attend)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, inner, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h_BLD: Tensor, mask_B11L: Tensor | None) -> Tensor:
        h_BLD = h_BLD + self.dropout(self.attention(h_BLD, mask_B11L))
        return h_BLD + self.dropout(self.feed_forward(self.norm(h_BLD)))


class Expert(nn.Module):
    """E(h) = g z + (1 - g) h + tag, where z is h behind the blocks and g reads the mean of z."""

    def __init__(self, layers: int, width: int, num_heads: int, inner: int, dropout: float, attend: Attend) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, num_heads, inner, dropout, attend) for _ in range(layers))
        self.gate = nn.Linear(width, 1)
        self.tag = nn.Parameter(torch.zeros(width))

    def forward(self, h_BLD: Tensor, keep_BL: Tensor, mask_B11L: Tensor | None) -> Tensor:
        z_BLD = h_BLD
        for block in self.blocks:
            z_BLD = block(z_BLD, mask_B11L)
        gate_B11 = torch.sigmoid(self.gate(mean(z_BLD, keep_BL))).unsqueeze(1)
        return gate_B11 * z_BLD + (1 - gate_B11) * h_BLD + self.tag


class Router(nn.Module):
    """Logits of the actions of each step from standardised random features of the tokens and the visits so far."""

    def __init__(self, width: int, hidden: int, num_experts: int, steps: int) -> None:
        super().__init__()
        self.summary = nn.ModuleList(nn.Linear(2 * width, hidden) for _ in range(steps))
        self.policy = nn.ModuleList(nn.Linear(hidden, num_experts + 1) for _ in range(steps))
        self.visits = nn.Linear(num_experts, hidden, bias=False)
        self.step_bias = nn.Parameter(torch.zeros(steps, hidden))
        self.statistics = Statistics(steps, 2 * width)

    def forward(self, features_BS: Tensor, visit_share_BN: Tensor, step: int) -> Tensor:
        summary_BS = self.statistics(features_BS, step)
        hidden = F.gelu(self.summary[step](summary_BS) + self.step_bias[step] + self.visits(visit_share_BN))
        logits_BA: Tensor = self.policy[step](hidden).clamp(-10, 10)
        return logits_BA


class Statistics(nn.Module):
    mean_TS: Tensor
    variance_TS: Tensor
    batches_T: Tensor

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_TS", torch.zeros(steps, width))
        self.register_buffer("variance_TS", torch.ones(steps, width))
        self.register_buffer("batches_T", torch.zeros(steps))

    def forward(self, x_BS: Tensor, step: int) -> Tensor:
        if self.training:
            self.batches_T[step] += 1
            weight = (1 / self.batches_T[step]).clamp_min(1e-3)
            self.mean_TS[step] += weight * (x_BS.mean(0) - self.mean_TS[step])
            self.variance_TS[step] += weight * ((x_BS - self.mean_TS[step]).square().mean(0) - self.variance_TS[step])
        return (x_BS - self.mean_TS[step]) / (self.variance_TS[step].sqrt() + 1e-3)


class NaiveGoE(nn.Module):
    """Built from a model of ours, with a copy of its weights."""

    balance_bias: Tensor
    load: Tensor
    counts: Tensor

    def __init__(self, model: GoEOriginalClassifier, attend: Attend = "matmul") -> None:
        super().__init__()
        ours, policy, block = model.state_dict(), model.policy, model.experts.blocks[0]
        choice, balance = model.choice.settings, model.balance.settings
        default = choice.router_mode == "gate" and model.halting.settings.halt == "off"
        if not default or not isinstance(policy, LearnedPolicy) or policy.features is None:
            raise ValueError("the naive loop knows the default router of goe_original only")
        width, steps, self.num_experts = model.embed_dim, model.path.max_path_len, model.num_experts
        assert isinstance(block, StackedBlock)
        heads, inner = block.attention.num_heads, block.feed_forward.expand.weight.shape[1]
        dropout = block.dropout.p
        self.width, self.max_visits, self.gate_scale = width, model.path.max_visits, choice.gate_scale
        self.balance_bias_rate = balance.balance_bias_rate
        self.diversity_loss_coef, self.z_loss_coef = balance.diversity_loss_coef, balance.z_loss_coef
        vocab_size = len(ours["embedding.token.weight"])
        table = nn.Embedding(vocab_size, width, padding_idx=model.padding_idx)
        self.embedding = nn.ModuleDict({"token": table, "norm": nn.LayerNorm(width)})
        self.dropout = nn.Dropout(dropout)
        self.experts = nn.ModuleList(
            Expert(len(model.experts.blocks), width, heads, inner, dropout, attend) for _ in range(self.num_experts)
        )
        self.router = Router(width, ours["policy.router.visits.weight"].shape[0], self.num_experts, steps)
        classes = nn.Linear(width, model.head.linear.out_features)
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(width), "linear": classes})
        self.features = nn.ParameterDict({"table_VD": nn.Parameter(ours["policy.features.table_VD"].clone(), False)})
        self.register_buffer("balance_bias", ours["balance.bias"].clone())
        self.register_buffer("load", ours["balance.load"].clone())
        self.register_buffer("counts", torch.zeros_like(self.load), persistent=False)
        self.auxiliary_loss = torch.zeros(())
        self.to(self.load.device)
        self._copy_weights(ours)

    def _copy_weights(self, ours: dict[str, Tensor]) -> None:
        left = {name: tensor.flatten() for name, tensor in ours.items()}
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                if (source := our_name(name)) in left:
                    tensor.copy_(left[source][: tensor.numel()].view_as(tensor))
                    left[source] = left[source][tensor.numel() :]
        rest = [name for name, tensor in left.items() if len(tensor) and not name.startswith(UNUSED)]
        assert not rest, f"the naive loop has no place for {', '.join(rest)}"

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter, under its name in `goe_original` and in its shape there up to a reshape (flat)."""
        parts: dict[str, list[Tensor]] = {}
        for name, parameter in self.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if parameter.requires_grad:
                parts.setdefault(our_name(name), []).append(gradient.flatten())
        return {name: torch.cat(gradients) for name, gradients in parts.items()}

    def forward(self, ids_BL: Tensor, attention_mask: Tensor) -> Tensor:
        keep_BL = attention_mask.bool()
        mask_B11L = None if bool(keep_BL.all()) else keep_BL[:, None, None, :]
        positions_LD = sinusoids(ids_BL.shape[1], self.width).to(ids_BL.device)
        h_BLD = self.dropout(
            self.embedding["norm"](self.embedding["token"](ids_BL) * math.sqrt(self.width) + positions_LD)
        )
        features_BLD = F.layer_norm(self.features["table_VD"][ids_BL] + positions_LD, (self.width,))
        features_BS = torch.cat([mean(features_BLD, keep_BL), largest(features_BLD, keep_BL)], dim=-1)
        visits_BN = h_BLD.new_zeros(len(ids_BL), self.num_experts)
        decisions = []
        for step in range(len(self.router.summary)):
            full_BN = visits_BN >= self.max_visits
            if bool(full_BN.all()):
                break
            logits_BA = self.router(features_BS, visits_BN / self.max_visits, step)
            may_not_BA = torch.cat([full_BN, ~full_BN.all(1, keepdim=True)], dim=-1)
            logits_BA = logits_BA.masked_fill(may_not_BA, -1e9)
            probabilities_BN = logits_BA[:, :-1].softmax(-1)
            scores_BN = (probabilities_BN.detach() + self.balance_bias[step]).masked_fill(full_BN, float("-inf"))
            action_B = scores_BN.argmax(-1)
            coefficient_B = self.gate_scale * probabilities_BN.gather(1, action_B.unsqueeze(1)).squeeze(1)
            after_BLD = h_BLD.clone()
            for number, expert in enumerate(self.experts):
                mine_B = action_B == number
                if not bool(mine_B.any()):
                    continue
                before_RLD = h_BLD[mine_B]
                change_RLD = expert(before_RLD, keep_BL[mine_B], None if mask_B11L is None else mask_B11L[mine_B])
                change_RLD = change_RLD - before_RLD
                after_BLD[mine_B] = before_RLD + coefficient_B[mine_B][:, None, None] * change_RLD
            h_BLD = after_BLD
            chosen_BN = F.one_hot(action_B, self.num_experts)
            visits_BN = visits_BN + chosen_BN
            if self.training:
                self.counts[step] += chosen_BN.sum(0)
                self.load[step].lerp_(chosen_BN.float().mean(0), 1 - LOAD_DECAY)
            decisions.append(logits_BA)
        if self.training:
            self.auxiliary_loss = self._auxiliary_loss(decisions)
        logits_BC: Tensor = self.head["linear"](self.dropout(mean(self.head["norm"](h_BLD), keep_BL)))
        return logits_BC

    def _auxiliary_loss(self, decisions: list[Tensor]) -> Tensor:
        diversity = torch.zeros((), device=self.load.device)
        for logits_BA, load_N in zip(decisions, self.load, strict=False):
            share_N = logits_BA[:, :-1].softmax(-1).mean(0)
            balance = self.num_experts * (load_N * share_N).sum()
            diversity = diversity + balance + (share_N.clamp_min(1e-9) * share_N.clamp_min(1e-9).log()).sum()
        z_loss = torch.cat(decisions).logsumexp(-1).square().mean()
        return self.diversity_loss_coef * diversity / len(decisions) + self.z_loss_coef * z_loss

    @torch.no_grad()
    def after_step(self) -> None:
        """Loss-free balancing, as the model has it by default."""
        for bias_N, counts_N in zip(self.balance_bias, self.counts, strict=True):
            if counts_N.sum() > 0:
                bias_N -= self.balance_bias_rate * torch.sign(counts_N / counts_N.sum() - 1 / self.num_experts)
        self.counts.zero_()


def our_name(name: str) -> str:
    """Where `goe_original` keeps the values: experts and steps lie one behind the other in one parameter."""
    if name in ("balance_bias", "load"):
        return f"balance.{name.removeprefix('balance_')}"
    if name.startswith(("router.", "features.")):
        return "policy." + re.sub(r"^(router\.\w+)\.\d+\.", r"\1.", name)
    if not name.startswith("experts."):
        return name
    name = re.sub(r"^experts\.\d+\.", "experts.", name).replace("experts.tag", "experts.gate.tag")
    return name.replace("norm.weight", "norm.scale").replace("norm.bias", "norm.shift")


def mean(h_BLD: Tensor, keep_BL: Tensor) -> Tensor:
    return (h_BLD * keep_BL.unsqueeze(-1)).sum(1) / keep_BL.sum(1, keepdim=True)


def largest(h_BLD: Tensor, keep_BL: Tensor) -> Tensor:
    return h_BLD.masked_fill(~keep_BL.unsqueeze(-1), float("-inf")).amax(1)


def goe_original(
    width: int,
    inner: int,
    num_experts: int,
    steps: int,
    *,
    num_heads: int = 4,
    dropout: float = 0.0,
    vocab_size: int = 1000,
    num_classes: int = 4,
    expert_layers: int = 2,
) -> GoEOriginalClassifier:
    """The model of ours that the loop is written for, two layers per expert and two visits; the same at every call."""
    torch.manual_seed(0)
    model = MODELS_MAP["goe_original"](
        vocab_size=vocab_size,
        num_classes=num_classes,
        embed_dim=width,
        num_total_experts=num_experts,
        expert_layers=expert_layers,
        max_path_len=steps,
        max_visits=2,
        num_heads=num_heads,
        dim_feedforward=inner,
        dropout=dropout,
    )
    assert isinstance(model, GoEOriginalClassifier)
    return model


def padded_batch(samples: int, length: int, padded: bool, vocab_size: int = 1000) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, L]: full, or of lengths drawn from 1..L, which leaves half of the grid empty."""
    generator = torch.Generator().manual_seed(1)
    ids_BL = torch.randint(1, vocab_size, (samples, length), generator=generator)
    lengths_B = torch.full((samples,), length)
    if padded:
        lengths_B = torch.randint(1, length + 1, (samples,), generator=generator)
        lengths_B[0] = length
    keep_BL = torch.arange(length) < lengths_B.unsqueeze(1)
    return ids_BL * keep_BL, keep_BL


def difference(model: GoEOriginalClassifier, ids_BL: Tensor, keep_BL: Tensor, labels_B: Tensor) -> dict[str, float]:
    """Largest difference between the model and the loop: of logits, loss and gradients in a training pass (which the
    model, without dropout, makes here), and of the logits in evaluation afterwards. Gradients are relative to the
    largest of their parameter where that is above 1.
    """
    naive = NaiveGoE(model)
    logits: list[Tensor] = []
    losses: list[Tensor] = []
    for module in (model.train(), naive.train()):
        module.zero_grad()
        logits.append(module(ids_BL, attention_mask=keep_BL))
        auxiliary = naive.auxiliary_loss if module is naive else model.get_auxiliary_loss() or 0.0
        losses.append(F.cross_entropy(logits[-1], labels_B) + auxiliary)
        losses[-1].backward()
    found = {"logits": greatest(*logits), "loss": greatest(*losses), "gradients": 0.0}
    expected = naive.gradients()
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = max(1.0, float(expected[name].abs().max()))
        found["gradients"] = max(found["gradients"], greatest(gradient.flatten(), expected.pop(name)) / scale)
    assert not expected, f"the model has no {', '.join(expected)}"
    model.eval().start_recording()
    with torch.no_grad():
        found["logits in evaluation"] = greatest(model(ids_BL, keep_BL), naive.eval()(ids_BL, keep_BL))
    return found


def greatest(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


def check(model: GoEOriginalClassifier, ids_BL: Tensor, keep_BL: Tensor, labels_B: Tensor) -> dict[str, float]:
    """`difference`; AssertionError where it is above 1e-5."""
    found = difference(model, ids_BL, keep_BL, labels_B)
    assert all(value < 1e-5 for value in found.values()), f"goe_original and the naive loop disagree: {found}"
    return found


if __name__ == "__main__":
    for padded in (False, True):
        batch = padded_batch(32, 32, padded)
        print("padded" if padded else "full", check(goe_original(64, 256, 4, 6), *batch, torch.arange(32) % 4))
