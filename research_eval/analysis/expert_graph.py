"""The graph of experts with the flow of samples through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def draw_expert_graph(metrics: dict[str, Any], path: Path, title: str) -> None:
    """Draw `step_transitions` as a PNG: edges as wide as the share of samples that took them.

    Columns are the steps of the path, rows the experts; every matrix counts from node (row) to node (column), the nodes
    being the experts, then start, then stop.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyArrowPatch

    flows = [np.array(step, float) for step in metrics["step_transitions"]]
    samples = flows[0].sum()
    num_experts = len(flows[0]) - 2
    start, stop = num_experts, num_experts + 1
    colours = plt.get_cmap("tab10")
    figure, axes = plt.subplots(figsize=(2.2 + 1.9 * len(flows), 1.4 + 0.8 * num_experts), constrained_layout=True)

    def place(node: int, column: int) -> tuple[float, float]:
        middle = (num_experts - 1) / 2
        return (float(column), -float(node) if node < num_experts else -middle if node == start else -num_experts + 0.2)

    for column, flow in enumerate(flows):
        for source, target in np.argwhere(flow).tolist():
            share = flow[source, target] / samples
            arrow = FancyArrowPatch(
                place(source, column),
                place(target, column + 1),
                arrowstyle="-|>",
                mutation_scale=10,
                shrinkA=13,
                shrinkB=13,
                linewidth=0.6 + 9 * share,
                alpha=0.35 + 0.5 * share,
                color="0.4" if source >= num_experts else colours(source % 10),
                connectionstyle="arc3,rad=0.06",
            )
            axes.add_patch(arrow)
    for column in range(len(flows) + 1):
        load = flows[column - 1].sum(0) if column else flows[0].sum(1)
        for node in np.flatnonzero(load).tolist():
            x, y = place(node, column)
            name = "start" if node == start else "stop" if node == stop else str(node)
            colour = "0.85" if node >= num_experts else colours(node % 10)
            axes.scatter([x], [y], s=620, color=[colour], edgecolors="black", zorder=3)
            axes.text(x, y, name, ha="center", va="center", zorder=4, fontsize=9)
            axes.text(x, y - 0.42, f"{load[node] / samples:.0%}", ha="center", va="center", fontsize=8, color="0.3")
    axes.set_xlim(-0.5, len(flows) + 0.5)
    axes.set_ylim(-num_experts - 0.4, 0.6)
    axes.set_xticks(range(len(flows) + 1), ["input", *(f"step {number}" for number in range(1, len(flows))), "end"])
    axes.set_yticks([])
    axes.set_title(title, parse_math=False)  # a dollar sign in a name is a dollar sign
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
