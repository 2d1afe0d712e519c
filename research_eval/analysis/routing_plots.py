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

from research_eval.analysis.figures import expert_colours, figure_for
from research_eval.wording import shortened

LOAD_FILE = "expert_load.png"
ENTROPY_FILE = "router_entropy.png"
LENGTH_FILE = "path_lengths.png"
PANELS = 4  # with more steps than this, one panel shows the mean load of all steps
LEGEND = 16  # with more experts than this, a colour bar replaces the legend
ROWS_WITH_NAMES = 60  # about as many rows of path lengths have their names beside them
NAME_LENGTH = 24  # characters of a class or group


def draw_routing(
    metrics: dict[str, Any], reports: Sequence[dict[str, Any]], label_names: Sequence[str], folder: Path, title: str
) -> None:
    """Write PNG files into `folder`: each picture whose numbers the metrics or the reports contain.

    `reports` has the routing report of every epoch. A picture over epochs needs at least two of them.
    """
    loads = [report["expert_load"] for report in reports if "expert_load" in report]
    if len(loads) > 1:
        draw_load(loads, folder / LOAD_FILE, title)
    entropies = [report["router_entropy"] for report in reports if "router_entropy" in report]
    if len(entropies) > 1:
        draw_entropy(entropies, folder / ENTROPY_FILE, title)
    if "path_length_by_group" in metrics:
        names = [f"group {group}" for group, _ in metrics["path_length_by_group"]]
        draw_lengths([counts for _, counts in metrics["path_length_by_group"]], names, folder / LENGTH_FILE, title)
    elif "path_length_by_class" in metrics:
        draw_lengths(metrics["path_length_by_class"], label_names, folder / LENGTH_FILE, title)


def draw_load(loads_ETN: Sequence[Sequence[Sequence[float]]], path: Path, title: str) -> None:
    """The share of decisions that each expert got, stacked, over the epochs. Each step of the path has a panel."""
    shares_ETN = np.array(loads_ETN, float)
    num_steps, num_experts = shares_ETN.shape[1:]
    names = [f"step {step + 1}" for step in range(num_steps)]
    if num_steps > PANELS:
        shares_ETN, names = shares_ETN.mean(1, keepdims=True), [f"mean of {num_steps} steps"]
    colours = expert_colours(num_experts)
    epochs = np.arange(1, len(shares_ETN) + 1)
    width = 2.6 + 2.6 * len(names)
    with figure_for(path, width, 3.4, ncols=len(names), sharey=True, squeeze=False) as (figure, axes):
        for panel, name, shares_EN in zip(axes[0], names, shares_ETN.swapaxes(0, 1), strict=True):
            panel.stackplot(epochs, shares_EN.T, colors=colours, edgecolor="white", linewidth=3 / max(num_experts, 8))
            panel.set(title=name, xlabel="epoch", xlim=(1, len(epochs)), ylim=(0, 1))
            panel.xaxis.get_major_locator().set_params(integer=True)
        axes[0, 0].set_ylabel("share of decisions")
        _expert_key(figure, axes[0, -1], colours)
        figure.suptitle(title, parse_math=False)


def _expert_key(figure: Any, panel: Any, colours: list[Any]) -> None:
    """Show beside the panel which colour belongs to which expert."""
    from research_eval.system.drawing import ListedColormap, Normalize, Patch, ScalarMappable

    if len(colours) <= LEGEND:
        patches = [Patch(color=colour, label=str(expert)) for expert, colour in enumerate(colours)]
        panel.legend(handles=patches[::-1], title="expert", loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    else:
        scale = ScalarMappable(Normalize(-0.5, len(colours) - 0.5), ListedColormap(colours))
        figure.colorbar(scale, ax=panel, label="expert")


def draw_entropy(entropies_E: Sequence[float], path: Path, title: str) -> None:
    """The router's entropy over the epochs, divided by log N: 0 certain, 1 all experts equally likely."""
    with figure_for(path, 5.2, 3.4) as (_, axes):
        axes.plot(range(1, len(entropies_E) + 1), entropies_E, marker="o", markersize=3)
        for level, name in ((0.0, "0: certain"), (1.0, "1: undecided (log N)")):
            axes.axhline(level, color="0.5", linestyle="--", linewidth=1)
            axes.annotate(
                name,
                (1, level),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 3),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color="0.35",
            )
        axes.set(xlabel="epoch", ylabel="entropy / log N", ylim=(-0.05, 1.12))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(title, parse_math=False)


def draw_lengths(counts_CT: Sequence[Sequence[int]], names: Sequence[str], path: Path, title: str) -> None:
    """How long the paths of each class (or group) are. A cell shows the share of a row's samples with one length."""
    counts = np.array(counts_CT, float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    height = 1.5 + 0.3 * len(shares)
    with figure_for(path, 3.2 + 0.55 * shares.shape[1], max(height, 2.6)) as (figure, axes):
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for row, column in np.argwhere(counts > 0).tolist():
            share = shares[row, column]
            colour = "white" if share > 0.6 else "black"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(shares.shape[1]))
        ticks = range(0, len(shares), math.ceil(len(shares) / ROWS_WITH_NAMES))
        axes.set_yticks(ticks, [shortened(names[row], NAME_LENGTH) for row in ticks], parse_math=False, fontsize=8)
        axes.set_xlabel("path length")
        axes.set_title(title, parse_math=False)
        figure.colorbar(image, ax=axes, label="share of the row's samples")
