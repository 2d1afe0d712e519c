"""The graph of experts with the flow of samples through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from research_eval.analysis.routing_plots import expert_colours, figure_for

CROWD = 16  # with more experts than that the picture grows no further, and the thinnest flows are left out
HAIR = 0.002


def draw_expert_graph(metrics: dict[str, Any], path: Path, title: str) -> None:
    """Draw `step_transitions` as a PNG: edges as wide as the share of samples that took them.

    Columns are the steps of the path, rows the experts; every matrix counts from node (row) to node (column), the nodes
    being the experts, then start, then stop.
    """
    from matplotlib.patches import FancyArrowPatch

    flows = [np.array(step, float) for step in metrics["step_transitions"]]
    samples = flows[0].sum()
    num_experts = len(flows[0]) - 2
    start, stop = num_experts, num_experts + 1
    colours = expert_colours(num_experts)
    crowded = num_experts > CROWD
    row_inches = 0.8 * min(CROWD / num_experts, 1)
    diameter = 25.0 * min(1, row_inches / 0.4)  # in points
    size = 9 if not crowded else max(4.5, 0.45 * diameter)

    def place(node: int, column: int) -> tuple[float, float]:
        middle = (num_experts - 1) / 2
        below = num_experts - 1 + 0.8 / row_inches  # 0.8 inches below the last expert
        return (float(column), -float(node) if node < num_experts else -middle if node == start else -below)

    with figure_for(path, 2.2 + 1.9 * len(flows), 2.2 + row_inches * num_experts) as (_, axes):
        for column, flow in enumerate(flows):
            for source, target in np.argwhere(flow >= (HAIR * samples if crowded else 1)).tolist():
                share = flow[source, target] / samples
                arrow = FancyArrowPatch(
                    place(source, column),
                    place(target, column + 1),
                    arrowstyle="-|>",
                    mutation_scale=4 + 0.24 * diameter,
                    shrinkA=diameter / 2,
                    shrinkB=diameter / 2,
                    linewidth=0.6 + 9 * share,
                    alpha=0.35 + 0.5 * share,
                    color="0.4" if source >= num_experts else colours[source],
                    connectionstyle="arc3,rad=0.06",
                )
                axes.add_patch(arrow)
        for column in range(len(flows) + 1):
            load = flows[column - 1].sum(0) if column else flows[0].sum(1)
            for node in np.flatnonzero(load).tolist():
                x, y = place(node, column)
                name = "start" if node == start else "stop" if node == stop else str(node)
                is_expert = node < num_experts
                width = diameter if is_expert else 25.0
                colour = colours[node] if is_expert else "0.85"
                axes.scatter([x], [y], s=width**2, color=[colour], edgecolors="black", linewidth=width / 25, zorder=3)
                dark = is_expert and sum(colour[:3]) < 1.2
                ink = {"color": "white" if dark else "black", "fontsize": size if is_expert else 9}
                axes.text(x, y, name, ha="center", va="center", zorder=4, **ink)
                beside = crowded and is_expert
                axes.annotate(
                    f"{load[node] / samples:.0%}" if load[node] >= 0.01 * samples else "<1%",
                    (x, y),
                    xytext=(width / 2 + 2, 0) if beside else (0, -width / 2 - 8),
                    textcoords="offset points",
                    ha="left" if beside else "center",
                    va="center",
                    fontsize=max(size - 1, 4.5) if is_expert else 8,
                    color="0.3",
                    zorder=5,
                )
        axes.set_xlim(-0.5, len(flows) + 0.5)
        axes.set_ylim(-num_experts - 1.3 / row_inches + 1, 0.6 * 0.8 / row_inches)
        axes.set_xticks(range(len(flows) + 1), ["input", *(f"step {number}" for number in range(1, len(flows))), "end"])
        axes.set_yticks([])
        if crowded:
            axes.set_xlabel(f"flows of less than {HAIR:.1%} of the samples are left out", fontsize=8, color="0.35")
        axes.set_title(title, parse_math=False)  # a dollar sign in a name is a dollar sign
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
