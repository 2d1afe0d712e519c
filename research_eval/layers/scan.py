"""A path along the sequence: walkers on a learnt graph make one step per token (equations: docs/scan.md).

B batch  L length  D width  R edge sets  S = R + 1 edge sets with "stay"  M walkers  K nodes
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research_eval.layers.routing import entropy

Estimator = Literal["soft", "st"]

# Multiplications per token, B M K^3, up to which products of whole maps in log L rounds are faster than a loop over the
# tokens in training. On a CPU `benchmarks/scan_speed.py` measures them; those of other devices are an estimate: a call
# costs as much there, and a multiplication far less.
MAX_WORK = {"numbers, last": 200_000, "numbers": 80_000, "weights, last": 40_000, "weights": 12_000}
OTHER_DEVICES = 16  # times as much
MIN_LENGTH = 16


class ScanSettings(NamedTuple):
    """Sizes of a scan expert, and the gradient estimators of its discrete choices.

    "soft" trains with probabilities. "st" is straight-through: one-hot values with the gradient of the softmax.
    """

    num_nodes: int = 16
    num_walkers: int = 4
    num_edge_sets: int = 8
    edges: Estimator = "soft"
    picks: Estimator = "st"


def straight_through(logits: Tensor) -> Tensor:
    """One-hot argmax over the last dimension with the gradient of the softmax."""
    soft = logits.softmax(-1)
    hard = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


class WalkerGraph(nn.Module):
    """Every token moves each of M walkers along the edges of one of R edge sets. Padding moves no walker.

    p_0 = softmax(z_0), p_t = p_{t-1} A_t with A_t = sum_r c_t[r] softmax(Z_r). In training, rows of A are probabilities
    ("soft") or one-hot with the gradient of the softmax ("st"). In evaluation, walkers, edges and picks are discrete,
    and a step is a table look-up.
    """

    def __init__(self, num_edge_sets: int, num_walkers: int, num_nodes: int, edges: Estimator = "soft") -> None:
        super().__init__()
        self.num_edge_sets = num_edge_sets
        self.num_walkers = num_walkers
        self.num_nodes = num_nodes
        self.edges = edges
        self.edge_logits = nn.Parameter(torch.randn(num_edge_sets, num_walkers, num_nodes, num_nodes))
        self.start_logits = nn.Parameter(torch.randn(num_walkers, num_nodes))

    def forward(self, picks: Tensor, every_position: bool = False) -> Tensor:
        """The walkers' places after the last token [B, M K], or after every token [B, L, M K].

        `picks` are weights c [B, L, S], the last of which means "stay", or edge-set numbers [B, L], where R means
        "stay".
        """
        with torch.autocast(picks.device.type, enabled=False):
            if self.training:
                if self._pays_to_compose(picks, every_position):
                    return self._composed(picks, every_position).flatten(-2)
                hops = self._mix if picks.is_floating_point() else self._grouped
                return hops(picks, every_position).flatten(-2)
            nodes = self.walk(picks.argmax(-1) if picks.is_floating_point() else picks, every_position)
            return F.one_hot(nodes, self.num_nodes).float().flatten(-2)

    def probabilities(self) -> tuple[Tensor, Tensor]:
        """Start [M, K] and edges [R, M, K, K] as the estimator computes them in training."""
        rows = straight_through if self.edges == "st" else _softmax
        return rows(self.start_logits), rows(self.edge_logits)

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Start [M, K] and edges with "stay" [S, M, K, K]."""
        start_MK, edges_RMKK = self.probabilities()
        stay_1MKK = torch.eye(self.num_nodes, device=start_MK.device).expand(1, self.num_walkers, -1, -1)
        return start_MK, torch.cat([edges_RMKK, stay_1MKK])

    def _mix(self, picks_BLS: Tensor, every_position: bool) -> Tensor:
        """For each walker one product per token: (c_t outer p) [B, S K] with the stacked tables [S K, K]."""
        start_MK, edges_SMKK = self._tables()
        edges_MEK = edges_SMKK.transpose(0, 1).flatten(1, 2)
        state_MBK = start_MK.unsqueeze(1).expand(-1, len(picks_BLS), -1)
        states = []
        for pick_BS in picks_BLS.float().unbind(1):
            state_MBK = torch.bmm((pick_BS.unsqueeze(-1) * state_MBK.unsqueeze(2)).flatten(2), edges_MEK)
            if every_position:
                states.append(state_MBK)
        return torch.stack(states).permute(2, 0, 1, 3) if every_position else state_MBK.transpose(0, 1)

    def _grouped(self, edge_sets_BL: Tensor, every_position: bool) -> Tensor:
        """One product per token and edge set in use. It needs S times fewer FLOPs than `_mix`.

        The samples are sorted by their edge set at each token, and `moves_LB` reorders them from one token to the next.
        """
        start_MK, edges_SMKK = self._tables()
        edge_sets_LB = edge_sets_BL.T
        order_LB = edge_sets_LB.argsort(dim=1, stable=True)
        back_LB = order_LB.argsort(dim=1)
        moves_LB = torch.cat([order_LB[:1], back_LB[:-1].gather(1, order_LB[1:])])  # order at t - 1 -> order at t
        sizes_LS = F.one_hot(edge_sets_LB, len(edges_SMKK)).sum(1).tolist()
        state_MBK = start_MK.unsqueeze(1).expand(-1, len(edge_sets_BL), -1)
        states = []
        for move_B, back_B, sizes in zip(moves_LB, back_LB, sizes_LS, strict=True):
            groups = zip(state_MBK[:, move_B].split(sizes, dim=1), edges_SMKK.unbind(), strict=True)
            state_MBK = torch.cat([torch.bmm(rows, edges_MKK) for rows, edges_MKK in groups if rows.shape[1]], dim=1)
            if every_position:
                states.append(state_MBK[:, back_B])
        if every_position:
            return torch.stack(states).permute(2, 0, 1, 3)
        return state_MBK[:, back_LB[-1]].transpose(0, 1)

    def _pays_to_compose(self, picks: Tensor, every_position: bool) -> bool:
        """Whether `_composed` is faster than a loop over the tokens, from sizes alone, so that a run repeats."""
        kind = ("weights" if picks.is_floating_point() else "numbers") + ("" if every_position else ", last")
        limit = MAX_WORK[kind] * (1 if picks.device.type == "cpu" else OTHER_DEVICES)
        work = len(picks) * self.num_walkers * self.num_nodes**3
        return picks.shape[1] >= MIN_LENGTH and work <= limit

    def _composed(self, picks: Tensor, every_position: bool) -> Tensor:
        """The product of all maps A_1 ... A_t in 2 log2 L rounds of batched products (an associative scan)."""
        start_MK, edges_SMKK = self._tables()
        tables_SE = edges_SMKK.flatten(1)
        maps_BLE = picks.float() @ tables_SE if picks.is_floating_point() else F.embedding(picks, tables_SE)
        maps_BLMKK = maps_BLE.unflatten(-1, edges_SMKK.shape[1:])
        if not every_position:
            return torch.einsum("mi,bmij->bmj", start_MK, product(maps_BLMKK))
        return torch.einsum("mi,blmij->blmj", start_MK, prefix_products(maps_BLMKK))

    @torch.no_grad()
    def walk(self, edge_sets_BL: Tensor, every_position: bool = False) -> Tensor:
        """The discrete path: edge sets (R: stay) -> nodes after the last token [B, M], or each token [B, L, M]."""
        walkers_M = torch.arange(self.num_walkers, device=edge_sets_BL.device)
        stay_1MK = torch.arange(self.num_nodes, device=edge_sets_BL.device).expand(1, self.num_walkers, -1)
        targets = torch.cat([self.edge_logits.argmax(-1), stay_1MK]).flatten()
        rows_BLM = (edge_sets_BL.unsqueeze(-1) * self.num_walkers + walkers_M) * self.num_nodes
        node_BM = self.start_logits.argmax(-1).expand(len(edge_sets_BL), -1)
        nodes = []
        for row_BM in rows_BLM.unbind(1):
            node_BM = targets.take(row_BM + node_BM)
            if every_position:
                nodes.append(node_BM)
        return torch.stack(nodes, dim=1) if every_position else node_BM

    def row_entropy(self) -> Tensor:
        """Mean entropy of the edges' rows in nats: 0 if every node has one target per edge set."""
        return entropy(self.edge_logits.softmax(-1)).mean()

    def flops(self, length: int) -> float:
        """Forward FLOPs of one sample in training. In evaluation a step is a look-up and costs none."""
        return 2.0 * length * self.num_walkers * (self.num_edge_sets + 1) * self.num_nodes**2


def product(maps_BL: Tensor) -> Tensor:
    """Matrices [B, L, ..., K, K] -> their product over L, [B, ..., K, K]: neighbours in pairs, log2 L rounds."""
    while maps_BL.shape[1] > 1:
        maps_BL = torch.cat([_pairs(maps_BL), maps_BL[:, maps_BL.shape[1] // 2 * 2 :]], dim=1)
    return maps_BL[:, 0]


def prefix_products(maps_BL: Tensor) -> Tensor:
    """Matrices [B, L, ..., K, K] -> the products of the first 1, 2, ..., L of them, the same shape.

    The prefixes of the pairs are the prefixes at odd places. One product more gives those at even places, so all take
    2 L products in 2 log2 L rounds (Blelloch, 1990).
    """
    if maps_BL.shape[1] == 1:
        return maps_BL
    odd_Bl = prefix_products(_pairs(maps_BL))
    later_Bl = maps_BL[:, 2::2]
    even_Bl = torch.cat([maps_BL[:, :1], odd_Bl[:, : later_Bl.shape[1]] @ later_Bl], dim=1)
    both_BL = torch.stack([even_Bl[:, : odd_Bl.shape[1]], odd_Bl], dim=2).flatten(1, 2)
    return torch.cat([both_BL, even_Bl[:, odd_Bl.shape[1] :]], dim=1)


def _pairs(maps_BL: Tensor) -> Tensor:
    """The products of neighbours; without the last matrix if their number is odd."""
    return maps_BL[:, :-1:2] @ maps_BL[:, 1::2]


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


class EdgePicker(nn.Module):
    """c = softmax(W LN(h)): the edge set of each token. In training, "st" takes the one-hot argmax instead."""

    def __init__(self, embed_dim: int, num_edge_sets: int, estimator: Estimator = "st") -> None:
        super().__init__()
        self.estimator = estimator
        self.norm = nn.LayerNorm(embed_dim)
        self.linear = nn.Linear(embed_dim, num_edge_sets)
        nn.init.normal_(self.linear.weight, std=0.5)

    def forward(self, h_BLD: Tensor, keep_BL: Tensor) -> Tensor:
        """States and mask -> picks [B, L, S]. The last pick means "stay" and is 1 at padding."""
        with torch.autocast(h_BLD.device.type, enabled=False):
            logits_BLR = self.linear(self.norm(h_BLD.float()))
            soft = self.training and self.estimator == "soft"
            picks_BLR = logits_BLR.softmax(-1) if soft else straight_through(logits_BLR)
            keep_BL1 = keep_BL.unsqueeze(-1)
            return torch.cat([picks_BLR * keep_BL1, (~keep_BL1).float()], dim=-1)


class ScanExpert(nn.Module):
    """E(h)_t = h_t + W_o vec(p_t): causal, and without a positional encoding of its own."""

    def __init__(self, embed_dim: int, settings: ScanSettings) -> None:
        super().__init__()
        self.picker = EdgePicker(embed_dim, settings.num_edge_sets, settings.picks)
        self.graph = WalkerGraph(settings.num_edge_sets, settings.num_walkers, settings.num_nodes, settings.edges)
        self.output = nn.Linear(settings.num_walkers * settings.num_nodes, embed_dim)

    def forward(self, h_BLD: Tensor, keep_BL: Tensor) -> Tensor:
        """h_BLD, keep_BL -> [B, L, D]."""
        states_BLE = self.graph(self.picker(h_BLD, keep_BL), every_position=True)
        return h_BLD + self.output(states_BLE).to(h_BLD.dtype)

    def flops(self, length: int) -> float:
        """Forward FLOPs of one sample in evaluation."""
        return 2.0 * length * (self.picker.linear.weight.numel() + self.output.weight.numel())
