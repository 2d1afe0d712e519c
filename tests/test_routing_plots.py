"""The pictures: drawn for every shape of run, with names as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image, pyplot

from research_eval.analysis import routing_plots
from research_eval.analysis.expert_graph import draw_expert_graph
from research_eval.analysis.figures import label
from research_eval.analysis.routing_plots import ENTROPY_FILE, LENGTH_FILE, LOAD_FILE, draw_load, draw_routing
from research_eval.routing.report import path_metrics, routing_report

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
    return reports[-1] | routing_report(paths_ST, labels_S, 20, groups_S), reports


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
    assert not list(tmp_path.iterdir())


def test_load_panels_stack_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each panel shows its own step; with more steps than panels, their mean."""
    drawn: list[Any] = []
    original = routing_plots.figure_for

    def spied(*arguments: Any, **options: Any) -> Any:
        manager = original(*arguments, **options)
        enter = manager.__enter__

        class Spy:
            def __enter__(self) -> Any:
                pair = enter()
                for panel in pair[1][0]:
                    panel.stackplot = lambda _, shares, **__: drawn.append(np.array(shares))
                return pair

            def __exit__(self, *problem: Any) -> Any:
                return manager.__exit__(*problem)

        return Spy()

    monkeypatch.setattr(routing_plots, "figure_for", spied)
    loads = [[[1.0, 0.0], [0.5, 0.5]], [[0.2, 0.8], [0.4, 0.6]]]
    draw_load(loads, tmp_path / "a.png", "")
    assert [shares.tolist() for shares in drawn] == [[[1.0, 0.2], [0.0, 0.8]], [[0.5, 0.4], [0.5, 0.6]]]
    drawn.clear()
    draw_load([[[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2] * 2, tmp_path / "b.png", "")
    assert [shares.tolist() for shares in drawn] == [[[0.6, 0.6], [0.4, 0.4]]]


def test_labels_are_one_line_and_shortened_to_fit() -> None:
    assert label("short", 24) == "short"
    assert label("x" * 24, 24) == "x" * 24
    assert label("x" * 25, 24) == "x" * 23 + "…"
    assert label("two\nlines", 24) == "two\N{REPLACEMENT CHARACTER}lines"
