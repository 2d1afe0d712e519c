"""Pictures of the routing of one run: load of the experts, entropy of the router, lengths of the paths.

Training draws them after a run, from the reports of its epochs and its metrics.

T steps of a path (or layers)  N experts  E epochs  C classes or groups
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research_eval.analysis.figures import (
    INK,
    PALE,
    draw_grid,
    expert_colours,
    figure_for,
    ink_on,
    label,
    routes_in_layers,
    set_heading,
    stage,
)

LOAD_FILE = "expert_load.png"
ENTROPY_FILE = "router_entropy.png"
LENGTH_FILE = "path_lengths.png"
PANELS = 12  # of more steps or layers, so many are drawn, spread evenly
COLUMNS = 4  # panels beside each other
LEGEND = 16  # with more experts than this, a colour bar replaces the legend
NAMED_LINES = 6  # with more steps than this, the picture of the entropy shows the mean alone
ROWS_WITH_NAMES = 60  # about as many rows of path lengths have their names beside them
NAME_LENGTH = 24  # characters of a class or group


def draw_routing(
    metrics: dict[str, Any],
    reports: Sequence[dict[str, Any]],
    label_names: Sequence[str],
    folder: Path,
    title: str,
    halts: bool = False,
) -> None:
    """Write PNG files into `folder`: each picture that has something to show.

    `reports` has the routing report of every epoch. A picture over epochs needs at least two of them. Path lengths are
    drawn if they differ, or if the model `halts`: else all paths are equally long.
    """
    in_layers = routes_in_layers(metrics)
    loads = [report["expert_load"] for report in reports if "expert_load" in report]
    if len(loads) > 1:
        draw_load(loads, folder / LOAD_FILE, title, in_layers)
    known = [report for report in reports if math.isfinite(report.get("router_entropy", math.nan))]
    if len(known) > 1:
        steps = [_entropies_of_steps(report) for report in known]
        draw_entropy([report["router_entropy"] for report in known], folder / ENTROPY_FILE, title, steps, in_layers)
    if "path_length_by_group" in metrics:
        names = [f"group {group}" for group, _ in metrics["path_length_by_group"]]
        counts_CT, kind = [counts for _, counts in metrics["path_length_by_group"]], "group"
    else:
        names, counts_CT, kind = list(label_names), metrics.get("path_length_by_class", []), "class"
    num_lengths = np.count_nonzero(np.array(counts_CT).sum(0))
    if num_lengths > (0 if halts else 1):
        draw_lengths(counts_CT, names, folder / LENGTH_FILE, f"Path lengths of each {kind}: {title}")


def _entropies_of_steps(report: dict[str, Any]) -> list[float]:
    """The entropy at each step; NaN at a step that no sample has reached."""
    loads = report.get("expert_load", [])
    found = zip(report.get("step_entropy", []), loads, strict=False)
    return [entropy if any(load_N) else math.nan for entropy, load_N in found]


def draw_load(loads_ETN: Sequence[Sequence[Sequence[float]]], path: Path, title: str, in_layers: bool = False) -> None:
    """The share of decisions that each expert got, stacked, over the epochs. Each step (or layer) has a panel."""
    shares_ETN = np.array(loads_ETN, float)
    num_epochs, num_steps, num_experts = shares_ETN.shape
    drawn = np.unique(np.linspace(0, num_steps - 1, min(num_steps, PANELS)).round().astype(int)).tolist()
    colours = expert_colours(num_experts)
    epochs = np.arange(1, num_epochs + 1)
    columns = min(len(drawn), COLUMNS)
    rows = math.ceil(len(drawn) / columns)
    size = (max(4.6, 1.8 + 2.4 * columns), 1.0 + 2.4 * rows)
    with figure_for(path, *size, nrows=rows, ncols=columns, sharey=True, squeeze=False) as (figure, axes):
        panels = list(axes.flat)
        for blank in panels[len(drawn) :]:
            blank.remove()
        for panel, step in zip(panels, drawn, strict=False):
            edge = 3 / max(num_experts, 8)
            panel.stackplot(epochs, shares_ETN[:, step].T, colors=colours, edgecolor="white", linewidth=edge)
            panel.set_title(stage(in_layers, step + 1), fontsize=10)
            panel.set(xlabel="epoch", xlim=(1, num_epochs), ylim=(0, 1))
            panel.xaxis.get_major_locator().set_params(integer=True)
        for row in axes[:, 0]:
            row.set_ylabel("share of decisions")
        _expert_key(figure, panels[: len(drawn)], colours)
        hidden = f" ({len(drawn)} of {num_steps} {'layers' if in_layers else 'steps'})" * (len(drawn) < num_steps)
        set_heading(figure, f"Share of each expert in the router's decisions{hidden}", title)


def _expert_key(figure: Any, panels: list[Any], colours: list[Any]) -> None:
    """Show beside the panels which colour belongs to which expert."""
    from research_eval.system.drawing import ListedColormap, Normalize, Patch, ScalarMappable

    if len(colours) <= LEGEND:
        patches = [Patch(color=colour, label=str(expert)) for expert, colour in enumerate(colours)]
        figure.legend(handles=patches[::-1], title="expert", loc="outside right center", fontsize=9, frameon=False)
    else:
        scale = ScalarMappable(Normalize(-0.5, len(colours) - 0.5), ListedColormap(colours))
        bar = figure.colorbar(scale, ax=panels, label="expert")
        bar.ax.yaxis.get_major_locator().set_params(integer=True)


def draw_entropy(
    entropies_E: Sequence[float],
    path: Path,
    title: str,
    steps_ET: Sequence[Sequence[float]] = (),
    in_layers: bool = False,
) -> None:
    """The router's entropy over the epochs, divided by log N: 0 certain, 1 all experts equally likely.

    A thick line is the mean of all decisions, thin lines are the steps (or layers). The axis shows the values with room
    around them; the limits 0 and 1 are drawn if they are near. The first and the last value are written out.
    """
    epochs = list(range(1, len(entropies_E) + 1))
    num_steps = min((len(steps) for steps in steps_ET), default=0)
    lines = [[steps[step] for steps in steps_ET] for step in range(num_steps)] if 1 < num_steps <= NAMED_LINES else []
    with figure_for(path, 6.4, 3.8) as (figure, axes):
        for step, (values, colour) in enumerate(zip(lines, expert_colours(len(lines)), strict=True)):
            axes.plot(epochs, values, color=colour, linewidth=1.4, label=stage(in_layers, step + 1))
        axes.plot(epochs, entropies_E, color=INK, marker="o", markersize=5, linewidth=2.2, label="all decisions")
        for place in (0, -1):
            axes.annotate(
                f"{entropies_E[place]:.3f}",
                (epochs[place], entropies_E[place]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="left" if place == 0 else "right",
                fontsize=9,
                color=INK,
            )
        values = [value for line in (entropies_E, *lines) for value in line if math.isfinite(value)]
        room = max(0.15 * (max(values) - min(values)), 0.05)
        axes.set_ylim(max(min(values) - room, -0.03), min(max(values) + 1.6 * room, 1.05))
        for level, name in ((0.0, "0: certain"), (1.0, "1: undecided, all experts equally likely")):
            if axes.get_ylim()[0] <= level <= axes.get_ylim()[1]:
                axes.axhline(level, color=PALE, linestyle="--", linewidth=1, zorder=1)
                axes.annotate(
                    name,
                    (0.5, level),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, -4),
                    textcoords="offset points",
                    ha="center",
                    va="top",
                    fontsize=8,
                    color="0.35",
                )
        axes.set(xlabel="epoch", ylabel="entropy / log N")
        axes.xaxis.get_major_locator().set_params(integer=True)
        draw_grid(axes)
        if lines:
            figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
        set_heading(figure, "How undecided the router is: 0 certain, 1 undecided", title)


def draw_lengths(counts_CT: Sequence[Sequence[int]], names: Sequence[str], path: Path, title: str) -> None:
    """How long the paths of each class (or group) are. A cell shows the share of a row's samples with one length.

    Beside each row stand its number of samples and its mean length.
    """
    counts = np.array(counts_CT, float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    means = shares @ np.arange(shares.shape[1])
    first = 0 if counts[:, 0].any() else 1  # a path of no steps is rare
    height = 1.7 + 0.3 * len(shares)
    with figure_for(path, 5.2 + 0.6 * (shares.shape[1] - first), max(height, 2.6)) as (figure, axes):
        top = max(float(shares.max()), 1e-9)
        image = axes.imshow(shares[:, first:], vmin=0, vmax=top, cmap="Blues", aspect="auto")
        for row, column in np.argwhere(counts > 0).tolist():
            share = shares[row, column]
            text = f"{share:.0%}" if share >= 0.005 else "<1%"
            colour = ink_on(image.cmap(share / top))
            axes.text(column - first, row, text, ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(shares.shape[1] - first), range(first, shares.shape[1]))
        ticks = list(range(0, len(shares), math.ceil(len(shares) / ROWS_WITH_NAMES)))
        named = [
            f"{label(names[row], NAME_LENGTH)}  (N = {counts[row].sum():,.0f}, mean {means[row]:.2f})" for row in ticks
        ]
        axes.set_yticks(ticks, named, parse_math=False, fontsize=9)
        axes.set_xlabel("path length in steps")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, label="share of the row's samples")
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        set_heading(figure, title)
