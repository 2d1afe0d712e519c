"""The tables of benchmarks/research.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from research_eval.schema import load_config

spec = importlib.util.spec_from_file_location("research", ROOT / "benchmarks" / "research.py")
assert spec is not None and spec.loader is not None
research: Any = importlib.util.module_from_spec(spec)
sys.modules["research"] = research
spec.loader.exec_module(research)


def run_of(accuracy: float, **more: Any) -> dict[str, Any]:
    costs = {"param_count": 1000, "inference_flops_per_sample": 2e6, "training_duration_seconds": 3}
    return {"test_acc": accuracy, "final_val_acc": accuracy, **costs, **more}


def test_every_arm_is_a_config_and_every_config_an_arm() -> None:
    arms = {(study, arm) for study, plan in research.STUDIES.items() for arm in plan.arms}
    files = {(path.parent.name, path.stem) for path in research.CONFIGS.glob("*/*.json")}
    assert arms == files
    for study, arm in arms:
        load_config(research.CONFIGS / study / f"{arm}.json")
        assert {name for pair in research.STUDIES[study].pairs for name in pair} <= set(research.STUDIES[study].arms)


def test_an_interval_by_hand() -> None:
    assert research.interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 * 1 / 3**0.5, rel=1e-6)
    assert research.interval([1.0]) != research.interval([1.0])  # not a number


def test_differences_are_paired_by_seed() -> None:
    runs = {arm: [run_of(0.1), run_of(0.5)] for arm in research.STUDIES["tables"].arms}
    runs["goe"] = [run_of(0.3), run_of(0.7)]
    lines = research.tables("tables", runs).splitlines()
    assert "| goe | 2 | 0.500 ± 2.541 | 1.0 k | 2.000 | 3 |" in lines
    assert "| goe - dense_flops | +0.200 ± 0.000 |" in lines


def test_values_that_follow_from_lists() -> None:
    lengths = [[1, [0, 10, 0]], [2, [0, 5, 5]], [3, [0, 0, 10]]]
    run = run_of(0.9, full_depth_val_acc=0.92, path_length_by_group=lengths, val_acc_by_group=[[0, 0.25], [1, 1.0]])
    values = {name: research.value(run, name) for name in ("steps_1", "steps_2", "steps_3", "rising", "group_0")}
    assert values == {"steps_1": 1.0, "steps_2": 1.5, "steps_3": 2.0, "rising": 1.0, "group_0": 0.25}
    assert research.value(run, "exit_gain") == pytest.approx(-0.02)
    assert research.value(run_of(0.9), "depth_gain") == 0.9
    assert research.value(run_of(0.9), "exit_gain") is None
    assert research.value(run_of(0.9, nmi=[0.1, 0.2]), "nmi") == 0.2


def test_tables_stand_between_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n")
    research.write_page(page, {"x": "new"})
    assert page.read_text() == "a\n<!-- begin x -->\nnew\n<!-- end x -->\nb\n"
    with pytest.raises(SystemExit, match="no marks for y"):
        research.write_page(page, {"y": "new"})
    assert set(research.STUDIES) == {
        line.split()[2] for line in (ROOT / "docs" / "research.md").read_text().splitlines() if "<!-- begin" in line
    }
