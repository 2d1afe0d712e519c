"""What the experts do: which classes, groups and tokens each expert handles, compared with chance.

A *unit* is what the router sends to an expert: a sample, or a token of a model that routes tokens. A *kind* is a set of
units, such as the samples of a class or the samples that contain a token.

U units  K kinds  N experts  S samples  T steps of a path (or layers)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_UNITS = 4000  # of more units, so many are taken, spread evenly
MAX_KINDS = 20  # kinds in a table
MAX_FLOWS = 12  # kinds whose paths are kept
MAX_STEPS = 8  # of more steps or layers, so many are taken, spread evenly
CANDIDATES = 60  # most frequent tokens, of which the most unevenly routed ones are shown
FEWEST = 10  # a token needs so many units
SHUFFLES = 100
LEVEL = 95  # per cent of the shuffles that stay inside the band everywhere

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Usage:
    """Which experts the units used at one step: rows of shares that sum to 1.

    `members` maps the name of a grouping, such as "class", to the names of its kinds and their units.
    """

    step: str
    share_UN: Floats
    members: dict[str, tuple[list[str], Floats]]
    has_end: bool = False  # whether the last column stands for paths that have ended


def role_table(member_KU: Floats, share_UN: Floats, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """The mean share of every expert in every kind [K, N], what chance makes of it [N], and the half-width of its band.

    The band [K, N] comes from a permutation null: the shares are shuffled among the units. In 95 % of the shuffles no
    cell of the whole table lies outside. The width of a cell is a multiple of its exact standard deviation under
    shuffling, which for n of U units is that of a mean of n draws without replacement.
    """
    num_units = len(share_UN)
    size_K1 = np.maximum(member_KU.sum(1, keepdims=True), 1)
    expected_N = share_UN.mean(0)
    left_K1 = np.maximum(num_units - size_K1, 0) / max(num_units - 1, 1)
    deviation_KN = np.sqrt(share_UN.var(0) * left_K1 / size_K1)
    scale_KN = np.where(deviation_KN > 1e-9, deviation_KN, np.inf)
    rng = np.random.default_rng(seed)
    largest = [
        (np.abs(member_KU @ share_UN[rng.permutation(num_units)] / size_K1 - expected_N) / scale_KN).max(initial=0)
        for _ in range(SHUFFLES)
    ]
    return member_KU @ share_UN / size_K1, expected_N, float(np.percentile(largest, LEVEL)) * deviation_KN


def expert_roles(usages: Sequence[Usage]) -> list[dict[str, Any]]:
    """The tables of all steps, as plain lists: for each a grouping, a step, and the rows of `role_table`.

    A table shows the kinds with the most units. Of tokens it shows those with the largest distance from chance: the
    band holds for all candidates together, so that this choice does not make chance look like a finding.
    """
    tables = []
    for usage in usages:
        for grouping, (names, member_KU) in usage.members.items():
            if not len(usage.share_UN) or not names:
                continue
            share_KN, expected_N, band_KN = role_table(member_KU, usage.share_UN)
            size_K = member_KU.sum(1)
            if grouping == "token":
                rank_K = (np.abs(share_KN - expected_N) / np.maximum(band_KN, 1e-9)).max(1)
            else:
                rank_K = size_K
            kept = np.sort(np.argsort(-rank_K, kind="stable")[:MAX_KINDS])
            tables.append(
                {
                    "grouping": grouping,
                    "step": usage.step,
                    "has_end": usage.has_end,
                    "kinds": [names[kind] for kind in kept],
                    "num_kinds": len(names),
                    "units": size_K[kept].astype(int).tolist(),
                    "share": share_KN[kept].round(4).tolist(),
                    "expected": expected_N.round(4).tolist(),
                    "band": band_KN[kept].round(4).tolist(),
                }
            )
    return tables


def spread_evenly(number: int, most: int) -> Ints:
    """At most `most` of the numbers from 0 to `number` - 1, spread evenly."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(np.int64))


def members_of(kinds_U: Ints, names: Sequence[str]) -> tuple[list[str], Floats]:
    """The names and the members of the kinds that have units. Unit u is of kind `kinds[u]`."""
    present, place_U = np.unique(kinds_U, return_inverse=True)
    member_KU = (np.arange(len(present))[:, None] == place_U.ravel()).astype(np.float32)
    return [names[kind] for kind in present.tolist()], member_KU


def token_members(tokens: Ints, unit_of_token: Ints, num_units: int) -> tuple[list[int], Floats]:
    """The most frequent tokens, and the units that contain each of them."""
    pairs = np.unique(np.stack([tokens, unit_of_token]), axis=1)
    found, counts = np.unique(pairs[0], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:CANDIDATES]
    kept = np.sort(found[order[counts[order] >= FEWEST]])
    row = np.searchsorted(kept, pairs[0]).clip(max=max(len(kept) - 1, 0))
    known = kept[row] == pairs[0] if len(kept) else np.zeros(pairs.shape[1], bool)
    member_KU = np.zeros((len(kept), num_units), np.float32)
    member_KU[row[known], pairs[1][known]] = 1
    return kept.tolist(), member_KU


def path_usages(paths_ST: Ints, num_experts: int, members: dict[str, tuple[list[str], Floats]]) -> list[Usage]:
    """The experts of samples with paths: over all steps together, then at each step.

    All steps of a path share the experts. A path that has ended counts as one more expert, if there is any.
    """
    ended = bool((paths_ST < 0).any())
    node_ST = np.where(paths_ST < 0, num_experts, paths_ST)
    used_STN = np.eye(num_experts + 1, dtype=np.float32)[node_ST]
    total_SN = used_STN.sum(1)[:, :num_experts]
    usages = [Usage("all steps", total_SN / np.maximum(total_SN.sum(1, keepdims=True), 1), members)]
    if paths_ST.shape[1] > 1:
        usages += [
            Usage(f"step {step + 1}", used_STN[:, step, : num_experts + ended], members, ended)
            for step in spread_evenly(paths_ST.shape[1], MAX_STEPS).tolist()
        ]
    return usages


def flows_by_kind(
    paths_ST: Ints, kinds_S: Ints, names: Sequence[str], grouping: str, num_experts: int
) -> list[dict[str, Any]]:
    """The moves of the samples of each kind, for the kinds with the most samples.

    `flows` has for each step the triples node, next node, number of samples; the nodes are the experts, then start,
    then stop, as in `transition_metrics`. `num_kinds` counts all kinds.
    """
    start, stop = num_experts, num_experts + 1
    present, counts = np.unique(kinds_S, return_counts=True)
    kept = np.sort(np.argsort(-counts, kind="stable")[:MAX_FLOWS])
    found = []
    for kind, count in zip(present[kept].tolist(), counts[kept].tolist(), strict=True):
        start_S1 = np.full((count, 1), start)
        nodes = np.where(paths_ST >= 0, paths_ST, stop)[kinds_S == kind]
        nodes = np.concatenate([start_S1, nodes, start_S1 * 0 + stop], axis=1)
        flows = []
        for step in range(nodes.shape[1] - 1):
            moves = nodes[nodes[:, step] != stop, step : step + 2]
            pairs, sizes = np.unique(moves, axis=0, return_counts=True)
            flows.append(np.column_stack([pairs, sizes]).tolist())
        found.append(
            {
                "grouping": grouping,
                "kind": names[kind],
                "samples": count,
                "num_kinds": len(present),
                "flows": flows,
            }
        )
    return found
