"""The pictures: drawn for every shape of run, with names as they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image, pyplot

from research_eval.analysis import routing_plots
from research_eval.analysis.expert_graph import Layout, draw_expert_graph
from research_eval.analysis.figures import expert_colours, label, set_heading
from research_eval.analysis.routing_plots import (
    ENTROPY_FILE,
    LENGTH_FILE,
    LOAD_FILE,
    draw_entropy,
    draw_load,
    draw_routing,
)
from research_eval.routing.report import path_metrics, routing_report, transition_metrics
from research_eval.routing.roles import flows_by_kind
from research_eval.system import drawing

NAMES = [f"class ${number}_x$ \\frac with a name that is rather long" for number in range(20)]


def run_of(num_experts: int, num_steps: int, groups: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    reports = []
    for _ in range(3):
        paths_ST = rng.integers(0, num_experts, (200, num_steps))
        paths_ST[np.arange(num_steps) >= rng.integers(0, num_steps + 1, (200, 1))] = -1
        reports.append(path_metrics(paths_ST, (paths_ST >= 0) * 0.5, num_experts))
    labels_S = rng.integers(0, 20, 200)
    groups_S = rng.integers(0, 3, 200) if groups else None
    flows = flows_by_kind(paths_ST, labels_S, NAMES, "class", num_experts)
    return reports[-1] | routing_report(paths_ST, labels_S, 20, groups_S) | {"path_flows": flows}, reports


@pytest.mark.parametrize(("num_experts", "num_steps", "groups"), [(64, 2, False), (3, 6, True), (1, 1, False)])
def test_all_pictures_are_drawn(num_experts: int, num_steps: int, groups: bool, tmp_path: Path) -> None:
    metrics, reports = run_of(num_experts, num_steps, groups)
    draw_routing(metrics, reports, NAMES, tmp_path, "$a_b$ 100 %")
    draw_expert_graph(metrics, tmp_path / "graph.png", "$a_b$ 100 %")
    for name in (LOAD_FILE, ENTROPY_FILE, LENGTH_FILE, "graph.png"):
        picture = image.imread(tmp_path / name)
        assert 200 < picture.shape[0] <= 2000, "a picture that fits a page, however many experts there are"
        assert picture.shape[1] > 300
        assert picture.std() > 0.01, "not empty"
    assert not pyplot.get_fignums(), "every figure is closed"


def test_what_a_run_does_not_have_is_not_drawn(tmp_path: Path) -> None:
    draw_routing({}, [], [], tmp_path, "dense")
    draw_routing({}, [{"val": 1}, {"val": 2}], [], tmp_path, "dense")
    _, reports = run_of(3, 2)
    draw_routing({}, reports[:1], [], tmp_path, "one epoch has no course")
    draw_routing({}, [{"router_entropy": math.nan}] * 3, [], tmp_path, "no entropy was measured")
    assert not list(tmp_path.iterdir())


def texts_of(panel: Any) -> list[str]:
    return [text.get_text() for text in panel.texts]


def stacked(panel: Any) -> list[float]:
    """The height of each area of a stack at the last epoch."""
    tops = [area.get_paths()[0].vertices for area in panel.collections]
    last = max(tops[0][:, 0])
    return [round(float(np.ptp(area[area[:, 0] == last][:, 1])), 6) for area in tops]


def test_each_panel_of_the_load_shows_its_own_layer(drawn: dict[str, Any], tmp_path: Path) -> None:
    loads = np.random.default_rng(0).dirichlet(np.ones(3), (4, 6))
    draw_load(loads.tolist(), tmp_path / "a.png", "a run", in_layers=True)
    panels = [panel for panel in drawn["a"].axes if panel.get_title()]
    assert [panel.get_title() for panel in panels] == [f"layer {number}" for number in range(1, 7)]
    for panel, load_N in zip(panels, loads[-1], strict=True):
        assert stacked(panel) == pytest.approx(load_N, abs=1e-5)
    assert drawn["a"].get_suptitle().splitlines() == ["Share of each expert in the router's decisions", "a run"]


def test_of_many_steps_the_load_shows_some_and_says_so(drawn: dict[str, Any], tmp_path: Path) -> None:
    draw_load([[[0.5, 0.5]] * 40] * 2, tmp_path / "a.png", "")
    titles = [panel.get_title() for panel in drawn["a"].axes]
    assert len(titles) == routing_plots.PANELS
    assert (titles[0], titles[-1]) == ("step 1", "step 40")
    assert "(12 of 40 steps)" in drawn["a"].get_suptitle()


@pytest.mark.parametrize("level", [0.0, 0.5, 0.97])
def test_the_entropy_fills_its_axis_wherever_it_lies(level: float, drawn: dict[str, Any], tmp_path: Path) -> None:
    values = [level, level + 0.01, level + 0.02]
    draw_entropy(values, tmp_path / "a.png", "a run")
    (panel,) = drawn["a"].axes
    low, high = panel.get_ylim()
    assert low < level
    assert level + 0.02 < high
    assert high - low < 0.2, "the values take a good part of the height"
    assert {f"{values[0]:.3f}", f"{values[-1]:.3f}"} <= set(texts_of(panel)), "they are also written out"
    assert [line.get_ydata().tolist() for line in panel.lines if len(line.get_xdata()) == 3] == [values]


def test_a_step_that_no_sample_reached_has_no_entropy(drawn: dict[str, Any], tmp_path: Path) -> None:
    stopped = {"router_entropy": 0.5, "step_entropy": [0.5, 0.0], "expert_load": [[0.5, 0.5], [0.0, 0.0]]}
    going = {"router_entropy": 0.6, "step_entropy": [0.7, 0.5], "expert_load": [[0.5, 0.5], [1.0, 0.0]]}
    draw_routing({"mean_path_length": 1.0}, [stopped, going], [], tmp_path, "")
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn["router_entropy"].axes[0].lines}
    assert lines["step 1"] == [0.5, 0.7]
    assert math.isnan(lines["step 2"][0])
    assert lines["step 2"][1] == 0.5


def test_path_lengths_are_drawn_if_they_differ(drawn: dict[str, Any], tmp_path: Path) -> None:
    draw_routing({"path_length_by_class": [[0, 0, 5], [0, 0, 3]]}, [], ["a", "b"], tmp_path, "")
    assert not drawn, "without halting all paths have the same length"
    draw_routing({"path_length_by_class": [[0, 1, 3], [0, 0, 4]]}, [], ["a", "$b"], tmp_path, "")
    panel, _ = drawn["path_lengths"].axes
    assert [text.get_text() for text in panel.get_yticklabels()] == [
        "a  (N = 4, mean 1.75)",
        "$b  (N = 4, mean 2.00)",
    ]
    assert texts_of(panel) == ["25%", "75%", "100%"]


def test_start_and_stop_are_at_one_height_and_early_stops_below() -> None:
    layout = Layout(num_experts=5, samples=10, last=4)
    assert layout.place(layout.start, 0)[1] == layout.place(layout.stop, 4)[1] == -2
    assert layout.place(layout.stop, 2)[1] < layout.place(4, 2)[1], "it hides no expert"


def graph_metrics() -> dict[str, Any]:
    """Four experts, of which the last is dead; class "one" goes 0, 2 and the others 1, 0."""
    labels_S = np.array([0] * 30 + [1] * 50 + [2] * 20)
    paths_ST = np.where(labels_S[:, None] == 0, [0, 2], [1, 0])
    flows = flows_by_kind(paths_ST, labels_S, ["one", "two", "thr$ee"], "class", 4)
    return path_metrics(paths_ST, np.zeros((100, 2)), 4) | {"path_flows": flows}


def test_the_graph_says_who_is_dead_and_how_many_take_an_edge(drawn: dict[str, Any], tmp_path: Path) -> None:
    draw_expert_graph(graph_metrics(), tmp_path / "a.png", "a run")
    main = next(panel for panel in drawn["a"].axes if panel.patches)
    written = texts_of(main)
    assert written.count("dead") == 2, "in the columns of both steps"
    assert "dead experts (less than 1% of an even share): 3" in main.get_xlabel()
    # start to 0, 0 to 2, 2 to stop; start to 1, 1 to 0, 0 to stop: as many edges, each with its share
    assert len(main.patches) == 6
    assert written.count("30%") == 3 + 2
    assert written.count("70%") == 3 + 2, "on three edges and below two experts"
    assert [tick.get_text() for tick in main.get_xticklabels()] == ["input", "step 1", "step 2", "end"]


def test_each_class_has_a_small_graph_of_its_own(drawn: dict[str, Any], tmp_path: Path) -> None:
    draw_expert_graph(graph_metrics(), tmp_path / "a.png", "a run")
    small = [panel for panel in drawn["a"].axes if panel.get_title()]
    assert [panel.get_title() for panel in small] == ["one (N = 30)", "two (N = 50)", "thr$ee (N = 20)"]
    heights = [[list(line.get_ydata()) for line in panel.lines] for panel in small]
    assert heights[0] == [[-1.5, 0.0], [0.0, -2.0], [-2.0, -1.5]]
    assert heights[1] == heights[2] == [[-1.5, -1.0], [-1.0, 0.0], [0.0, -1.5]]
    assert "the samples of each class alone" in drawn["a"].get_suptitle()


def test_a_model_that_routes_tokens_has_layers(drawn: dict[str, Any], tmp_path: Path) -> None:
    metrics = transition_metrics(np.array([[0, 1], [1, 1]]), 2)
    draw_expert_graph(metrics, tmp_path / "a.png", "")
    (main,) = drawn["a"].axes
    assert [tick.get_text() for tick in main.get_xticklabels()] == ["input", "layer 1", "layer 2", "end"]


@pytest.mark.parametrize("number", [1, 8, 64])
def test_colours_of_experts_are_different_and_visible_on_white(number: int) -> None:
    colours = expert_colours(number)
    assert len({tuple(colour) for colour in colours}) == number
    assert all(0.299 * red + 0.587 * green + 0.114 * blue < 0.8 for red, green, blue, _ in colours)


def test_a_heading_is_wrapped_to_its_figure() -> None:
    figure, _ = drawing.new_figure(3, 2)
    set_heading(figure, "a name of many words " * 8, "$x_{y$")
    lines = figure.get_suptitle().splitlines()
    assert len(lines) > 3
    assert lines[-1] == "$x_{y$"
    assert max(map(len, lines)) * 0.0077 * 11.5 <= 3


def test_labels_are_one_line_and_shortened_to_fit() -> None:
    assert label("short", 24) == "short"
    assert label("x" * 24, 24) == "x" * 24
    assert label("x" * 25, 24) == "x" * 23 + "…"
    assert label("two\nlines", 24) == "two\N{REPLACEMENT CHARACTER}lines"
