"""The picture of the graph of experts, with the flow of samples through it.

Each column is a step of the path (or a layer) and each row an expert; an edge is as wide as the share of samples that
take it. Below, small graphs show the samples of each group or class alone.

N experts, then the nodes start and stop  T steps
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research_eval.analysis.figures import (
    INK,
    PALE,
    expert_colours,
    figure_for,
    ink_on,
    label,
    routes_in_layers,
    set_heading,
    stage,
)
from research_eval.routing.report import DEAD

CROWD = 16  # with more experts than this, the picture stops growing and hides the thinnest flows
HAIR = 0.002  # share of the samples below which a flow is one of the thinnest
WRITTEN = 0.04  # share of the samples from which an edge has its share written on it
NODE_SIZE = 25.0  # diameter of a node in points, if there is room
COLUMN_INCHES = 1.9
SMALL_INCHES = 2.5  # width of a small graph
NAME_LENGTH = 24  # characters of a class or group

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """Where nodes lie and how large they are. Experts are the nodes 0 to N - 1; then come start and stop.

    `samples` is the number of samples of the first step. Samples that have stopped are missing in later steps, so that
    all shares refer to this number. `last` is the number of the last column.
    """

    num_experts: int
    samples: float
    last: int

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
        """The coordinates of a node: start and the last stop beside the middle of the experts.

        Paths that stop earlier end below the experts of the next step.
        """
        if node < self.num_experts:
            return float(column), -float(node)
        if node == self.stop and column < self.last:
            return float(column), -(self.num_experts - 1 + 0.8 / self.row_inches)  # 0.8 inches below the last expert
        return float(column), -(self.num_experts - 1) / 2


def draw_expert_graph(metrics: dict[str, Any], path: Path, title: str) -> None:
    """Draw the metric `step_transitions` as a PNG file, with small graphs of the metric `path_flows` if it is there.

    The former has a matrix for each step, which counts the samples that went from a node (row) to a node (column).
    """
    flows_TNN = [np.array(step, float) for step in metrics["step_transitions"]]
    layout = Layout(len(flows_TNN[0]) - 2, flows_TNN[0].sum(), len(flows_TNN))
    colours = expert_colours(layout.num_experts)
    kinds = metrics.get("path_flows", [])
    kinds = kinds if len(kinds) > 1 else []  # a single kind is the whole picture
    stops_early = any(flow[:, layout.stop].any() for flow in flows_TNN[:-1])
    width = max(2.2 + COLUMN_INCHES * len(flows_TNN), 6.0)
    height = 1.6 + layout.row_inches * layout.num_experts + 0.9 * stops_early
    with _panels(path, (width, height), len(kinds), layout.num_experts) as (figure, main, panels):
        _draw_whole(main, layout, flows_TNN, colours, in_layers=routes_in_layers(metrics))
        for kind, panel in zip(kinds, panels, strict=True):
            _draw_kind(panel, layout, kind, colours)
        set_heading(figure, title, *_about_kinds(kinds))


@contextmanager
def _panels(
    path: Path, size: tuple[float, float], number: int, num_experts: int
) -> Iterator[tuple[Any, Any, list[Any]]]:
    """A figure, its large panel of this size in inches, and `number` small ones: below it, or beside a tall one."""
    width, height = size
    is_tall = height > 1.1 * width
    small = 0.75 + min(max(0.17 * num_experts, 0.9), 2.4)
    if is_tall:
        rows = max(1, min(number, int(height / small)))
        columns = math.ceil(number / rows)
        whole = width + SMALL_INCHES * columns, height
        grid: dict[str, Any] = {"nrows": rows, "ncols": 1 + columns}
        grid["gridspec_kw"] = {"width_ratios": [width, *[SMALL_INCHES] * columns]}
    else:
        columns = max(1, min(number, int(width / SMALL_INCHES)))
        rows = math.ceil(number / columns)
        whole = width, height + small * rows + 0.4 * bool(rows)
        grid = {"nrows": 1 + rows, "ncols": columns, "gridspec_kw": {"height_ratios": [height, *[small] * rows]}}
    with figure_for(path, *whole, squeeze=False, **grid) as (figure, axes):
        cells = axes[0, 0].get_gridspec()
        place = cells[:, 0] if is_tall else cells[0, :]
        for panel in axes[:, 0] if is_tall else axes[0]:
            panel.remove()
        panels = list((axes[:, 1:] if is_tall else axes[1:]).flat)
        for blank in panels[number:]:
            blank.remove()
        yield figure, figure.add_subplot(place), panels[:number]


def _about_kinds(kinds: Sequence[dict[str, Any]]) -> list[str]:
    """What the small graphs are, for the title."""
    if not kinds:
        return []
    shown, number, grouping = len(kinds), kinds[0]["num_kinds"], kinds[0]["grouping"]
    some = f" (the {shown} largest of {number} {'classes' if grouping == 'class' else 'groups'})"
    return [f"Small graphs: the samples of each {grouping} alone" + some * (shown < number)]


def dead_experts(flows_TNN: Sequence[Array], num_experts: int) -> list[int]:
    """The experts that get less than 1 % of an even share of all decisions."""
    load_N = np.sum([flow[:, :num_experts].sum(0) for flow in flows_TNN], axis=0)
    return np.flatnonzero(load_N < DEAD * load_N.sum() / num_experts).tolist()


def _draw_whole(axes: Any, layout: Layout, flows_TNN: Sequence[Array], colours: list[Any], in_layers: bool) -> None:
    """Draw the graph of all samples."""
    dead = dead_experts(flows_TNN, layout.num_experts)
    taken: list[tuple[float, float]] = []
    for column, flow_NN in enumerate(flows_TNN):
        _draw_flow(axes, layout, flow_NN, column, colours, taken)
    for column in range(len(flows_TNN) + 1):
        load_N = flows_TNN[column - 1].sum(0) if column else flows_TNN[0].sum(1)
        _draw_nodes(axes, layout, load_N, column, colours, dead)
    _draw_frame(axes, layout, flows_TNN, dead, in_layers)


def _draw_flow(
    axes: Any, layout: Layout, flow_NN: Array, column: int, colours: list[Any], taken: list[tuple[float, float]]
) -> None:
    """Draw the edges between two columns, the widest last, and their shares where there is room."""
    from research_eval.system.drawing import FancyArrowPatch

    least = HAIR * layout.samples if layout.is_crowded else 1
    edges = sorted(np.argwhere(flow_NN >= least).tolist(), key=lambda edge: flow_NN[edge[0], edge[1]])
    for source, target in edges:
        share = flow_NN[source, target] / layout.samples
        arrow = FancyArrowPatch(
            layout.place(source, column),
            layout.place(target, column + 1),
            arrowstyle="-|>",
            mutation_scale=4 + 0.24 * layout.diameter,
            shrinkA=layout.diameter / 2,
            shrinkB=layout.diameter / 2,
            linewidth=0.6 + 9 * share,
            alpha=0.4 + 0.5 * share,
            color="0.45" if source >= layout.num_experts else colours[source],
            connectionstyle="arc3,rad=0.04",
        )
        axes.add_patch(arrow)
    for source, target in [] if layout.is_crowded else edges[::-1]:
        share = flow_NN[source, target] / layout.samples
        if share >= WRITTEN:
            _write_share(axes, layout, (source, target), column, share, taken)


def _write_share(
    axes: Any, layout: Layout, edge: tuple[int, int], column: int, share: float, taken: list[tuple[float, float]]
) -> None:
    """Write the share of an edge on it, at the first of a few places that no other share has taken."""
    (x0, y0), (x1, y1) = layout.place(edge[0], column), layout.place(edge[1], column + 1)
    for along in (0.5, 0.36, 0.64, 0.28, 0.72):
        x, y = x0 + along * (x1 - x0), y0 + along * (y1 - y0)
        near = [
            abs(x - other) * COLUMN_INCHES < 0.3 and abs(y - height) * layout.row_inches < 0.14
            for other, height in taken
        ]
        if not any(near):
            box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5}
            axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=7.5, color="0.25", zorder=2.5, bbox=box)
            taken.append((x, y))
            return


def _draw_nodes(axes: Any, layout: Layout, load_N: Array, column: int, colours: list[Any], dead: Sequence[int]) -> None:
    """Draw the nodes of a column, each with its share of the samples.

    Experts that no sample has reached here are hollow, and dead ones have a dashed ring.
    """
    experts = list(range(layout.num_experts)) if 0 < column < layout.last else []
    ends = [node for node in (layout.start, layout.stop) if load_N[node]]
    for node in [*experts, *ends]:
        x, y = layout.place(node, column)
        is_expert, is_dead, share = node < layout.num_experts, node in dead, load_N[node] / layout.samples
        is_empty = is_dead or not share
        name = str(node) if is_expert else "start" if node == layout.start else "stop"
        width = layout.diameter if is_expert else NODE_SIZE
        colour = "white" if is_empty else colours[node] if is_expert else "0.85"
        axes.scatter(
            [x],
            [y],
            s=width**2,
            color=[colour],
            edgecolors=PALE if is_empty else INK,
            linewidth=width / 25,
            linestyle="--" if is_dead else "-",
            zorder=3,
        )
        ink = PALE if is_empty else ink_on(colour) if is_expert else INK
        size = layout.font_size if is_expert else 9
        axes.text(x, y, name, ha="center", va="center", zorder=4, color=ink, fontsize=size)
        beside = layout.is_crowded and is_expert  # below it the next expert follows at once
        axes.annotate(
            "dead" if is_dead else f"{share:.0%}" if share >= 0.005 or not share else "<1%",
            (x, y),
            xytext=(width / 2 + 2, 0) if beside else (0, -width / 2 - 8),
            textcoords="offset points",
            ha="left" if beside else "center",
            va="center",
            fontsize=max(layout.font_size - 1, 4.5) if is_expert else 8,
            color=PALE if is_empty else "0.3",
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.2},
            zorder=2.8,
        )


def _draw_frame(axes: Any, layout: Layout, flows_TNN: Sequence[Array], dead: Sequence[int], in_layers: bool) -> None:
    """Limits, the names of the columns, and remarks below them."""
    bottom = min(layout.place(node, 1)[1] for node in range(layout.num_experts))
    if any(flow[:, layout.stop].any() for flow in flows_TNN[:-1]):
        bottom = layout.place(layout.stop, 0)[1]
    axes.set_xlim(-0.4, layout.last + 0.4)
    axes.set_ylim(bottom - 0.5 / layout.row_inches, 0.35 / layout.row_inches)
    names = ["input", *(stage(in_layers, number) for number in range(1, layout.last)), "end"]
    axes.set_xticks(range(layout.last + 1), names)
    axes.set_yticks([])
    remarks = []
    if dead:
        text = ", ".join(map(str, dead)) if len(dead) <= CROWD else f"{len(dead)} of {layout.num_experts}"
        remarks.append(f"dead experts (less than {DEAD:.0%} of an even share): {text}")
    if layout.is_crowded:
        remarks.append(f"flows of less than {HAIR:.1%} of the samples are left out")
    axes.set_xlabel("\n".join(remarks), fontsize=8, color="0.35")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_kind(panel: Any, layout: Layout, kind: dict[str, Any], colours: list[Any]) -> None:
    """Draw the small graph of one class or group: shares of its samples."""
    samples = kind["samples"]
    for column, flow in enumerate(kind["flows"]):
        for source, target, count in sorted(flow, key=lambda edge: edge[2]):
            x, y = zip(layout.place(source, column), layout.place(target, column + 1), strict=True)
            colour = "0.45" if source >= layout.num_experts else colours[source]
            share = count / samples
            panel.plot(x, y, color=colour, linewidth=0.4 + 5 * share, alpha=0.3 + 0.6 * share, solid_capstyle="round")
    experts = [(node, column) for column in range(1, layout.last) for node in range(layout.num_experts)]
    moves = [(column, *edge[:2]) for column, flow in enumerate(kind["flows"]) for edge in flow]
    ends = {(layout.start, 0)} | {(layout.stop, column + 1) for column, _, target in moves if target == layout.stop}
    for nodes, marks, marker in ((experts, [colours[node] for node, _ in experts], "o"), (sorted(ends), "0.6", "s")):
        x, y = zip(*(layout.place(*node) for node in nodes), strict=True)
        panel.scatter(x, y, s=4 if layout.is_crowded else 22, color=marks, marker=marker, zorder=3)
    name = label(kind["kind"], NAME_LENGTH)
    panel.set_title(f"{name} (N = {samples:,})", fontsize=8.5, parse_math=False)
    numbers = range(0, layout.num_experts, math.ceil(layout.num_experts / CROWD))
    panel.set_yticks([-node for node in numbers], [str(node) for node in numbers], fontsize=6.5, color="0.35")
    panel.set_xticks([])
    room = 0.03 * layout.num_experts + 0.4
    lowest = min(layout.place(*node)[1] for node in [*experts, *ends])
    panel.set(xlim=(-0.25, layout.last + 0.25), ylim=(lowest - room, room))
    panel.tick_params(length=0)
    panel.spines[:].set_color("0.9")
