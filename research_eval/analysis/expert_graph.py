"""The picture of the graph of experts, with the flow of samples through it.

Each column is a step of the path and each row an expert; an edge is as wide as the share of samples that take it.

N experts, then the nodes start and stop  T steps
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research_eval.analysis.figures import expert_colours, figure_for

CROWD = 16  # with more experts than this, the picture stops growing and hides the thinnest flows
HAIR = 0.002  # share of the samples below which a flow is one of the thinnest
NODE_SIZE = 25.0  # diameter of a node in points, if there is room

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """Where nodes lie and how large they are. Experts are the nodes 0 to N - 1; then come start and stop.

    `samples` is the number of samples of the first step. Samples that have stopped are missing in later steps, so that
    all shares refer to this number.
    """

    num_experts: int
    samples: float

    @property
    def start(self) -> int:
        return self.num_experts

    @property
    def stop(self) -> int:
        return self.num_experts + 1

    @property
    def is_crowded(self) -> bool:
        """Whether there are too many experts for a picture of full size."""
        return self.num_experts > CROWD

    @property
    def row_inches(self) -> float:
        """The height of a row."""
        return 0.8 * min(CROWD / self.num_experts, 1)

    @property
    def diameter(self) -> float:
        """The diameter of an expert in points."""
        return NODE_SIZE * min(1, self.row_inches / 0.4)

    @property
    def font_size(self) -> float:
        """The size of the text in and beside an expert."""
        return 9 if not self.is_crowded else max(4.5, 0.45 * self.diameter)

    def place(self, node: int, column: int) -> tuple[float, float]:
        """The coordinates of a node: start beside the middle of the experts, stop below the last one."""
        middle = (self.num_experts - 1) / 2
        below = self.num_experts - 1 + 0.8 / self.row_inches  # 0.8 inches below the last expert
        if node < self.num_experts:
            return float(column), -float(node)
        return float(column), -middle if node == self.start else -below


def draw_expert_graph(metrics: dict[str, Any], path: Path, title: str) -> None:
    """Draw the metric `step_transitions` as a PNG file.

    It has a matrix for each step, which counts the samples that went from a node (row) to a node (column).
    """
    flows_TNN = [np.array(step, float) for step in metrics["step_transitions"]]
    layout = Layout(len(flows_TNN[0]) - 2, flows_TNN[0].sum())
    colours = expert_colours(layout.num_experts)
    size = (2.2 + 1.9 * len(flows_TNN), 2.2 + layout.row_inches * layout.num_experts)
    with figure_for(path, *size) as (_, axes):
        for column, flow_NN in enumerate(flows_TNN):
            _draw_flow(axes, layout, flow_NN, column, colours)
        for column in range(len(flows_TNN) + 1):
            load_N = flows_TNN[column - 1].sum(0) if column else flows_TNN[0].sum(1)
            _draw_nodes(axes, layout, load_N, column, colours)
        _draw_frame(axes, layout, len(flows_TNN), title)


def _draw_flow(axes: Any, layout: Layout, flow_NN: Array, column: int, colours: list[Any]) -> None:
    """Draw the edges between two columns."""
    from research_eval.system.drawing import FancyArrowPatch

    least = HAIR * layout.samples if layout.is_crowded else 1
    for source, target in np.argwhere(flow_NN >= least).tolist():
        share = flow_NN[source, target] / layout.samples
        arrow = FancyArrowPatch(
            layout.place(source, column),
            layout.place(target, column + 1),
            arrowstyle="-|>",
            mutation_scale=4 + 0.24 * layout.diameter,
            shrinkA=layout.diameter / 2,
            shrinkB=layout.diameter / 2,
            linewidth=0.6 + 9 * share,
            alpha=0.35 + 0.5 * share,
            color="0.4" if source >= layout.num_experts else colours[source],
            connectionstyle="arc3,rad=0.06",
        )
        axes.add_patch(arrow)


def _draw_nodes(axes: Any, layout: Layout, load_N: Array, column: int, colours: list[Any]) -> None:
    """Draw the nodes of a column that samples have reached, each with its share of the samples."""
    for node in np.flatnonzero(load_N).tolist():
        x, y = layout.place(node, column)
        is_expert = node < layout.num_experts
        name = str(node) if is_expert else "start" if node == layout.start else "stop"
        width = layout.diameter if is_expert else NODE_SIZE
        colour = colours[node] if is_expert else "0.85"
        axes.scatter([x], [y], s=width**2, color=[colour], edgecolors="black", linewidth=width / 25, zorder=3)
        is_dark = is_expert and sum(colour[:3]) < 1.2  # the text has to be white
        ink = {"color": "white" if is_dark else "black", "fontsize": layout.font_size if is_expert else 9}
        axes.text(x, y, name, ha="center", va="center", zorder=4, **ink)
        beside = layout.is_crowded and is_expert  # below it the next expert follows at once
        axes.annotate(
            f"{load_N[node] / layout.samples:.0%}" if load_N[node] >= 0.01 * layout.samples else "<1%",
            (x, y),
            xytext=(width / 2 + 2, 0) if beside else (0, -width / 2 - 8),
            textcoords="offset points",
            ha="left" if beside else "center",
            va="center",
            fontsize=max(layout.font_size - 1, 4.5) if is_expert else 8,
            color="0.3",
            zorder=5,
        )


def _draw_frame(axes: Any, layout: Layout, num_steps: int, title: str) -> None:
    """Limits, the names of the columns, and the title."""
    axes.set_xlim(-0.5, num_steps + 0.5)
    axes.set_ylim(-layout.num_experts - 1.3 / layout.row_inches + 1, 0.6 * 0.8 / layout.row_inches)
    axes.set_xticks(range(num_steps + 1), ["input", *(f"step {number}" for number in range(1, num_steps)), "end"])
    axes.set_yticks([])
    if layout.is_crowded:
        axes.set_xlabel(f"flows of less than {HAIR:.1%} of the samples are left out", fontsize=8, color="0.35")
    axes.set_title(title, parse_math=False)  # a dollar sign in a name is a dollar sign
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
