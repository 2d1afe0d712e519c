"""The tables of benchmarks/research.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from support import ROOT, benchmark

from research_eval.datasets.providers import load_splits
from research_eval.schema import load_config

research: Any = benchmark("research")
language: Any = benchmark("language")


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
        assert set(research.STUDIES[study].equal_flops) <= set(research.STUDIES[study].arms)


def test_settings_are_chosen_on_tasks_that_no_table_reports() -> None:
    for study in ("tables", "planted"):
        arm = research.STUDIES[study].arms[0]
        reported = [research.config_of(study, arm, seed, None) for seed in range(5)]
        assert {config.dataset_params["task_seed"] for config in reported} == {0}
        tuned = research.config_of(study, arm, research.TUNING_SEED, None, 0.5)
        assert (tuned.dataset_params["task_seed"], tuned.optimizer_params.lr) == (1, 0.5)
        assert not tuned.training_params.test, "a choice has to leave the test split alone"
        hashes = [
            load_splits("synthetic", config.dataset_name, config.dataset_params | {"num_samples": 50}, 0).fingerprint
            for config in (reported[0], tuned)
        ]
        assert hashes[0]["data_sha256"] != hashes[1]["data_sha256"]
    hop = research.config_of("hop", "dense", 100, None)
    assert "task_seed" not in hop.dataset_params


def rows_of(page: str) -> list[list[str]]:
    """The cells of all table rows of a page."""
    lines = (ROOT / page).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_every_arm_that_a_claim_needs_is_in_the_table_with_five_seeds() -> None:
    """A claim for routing has to stand beside dense models with as many parameters, other tricks and more steps."""
    seeds = {row[0]: row[1] for row in rows_of("docs/research.md") if len(row) == 6}
    needed = ("dense_bigrams", "dense_bigrams_wide", "dense_flops_4x_steps", "moe", "looped", "goe_bigrams")
    assert {seeds.get(arm) for arm in needed} == {"5"}
    shown = {row[1].split()[0] for row in rows_of("README.md") if len(row) == 4 and "[" in row[1]}
    reported = [(row[2].split()[0], row[0]) for row in rows_of("docs/research.md") if len(row) == 6 and "[" in row[2]]
    assert {arm for mean, arm in reported if mean in shown} >= {
        "dense_flops",
        "moe",
        "goe",
        "dense_bigrams",
        "goe_bigrams",
    }


def test_a_model_that_uses_all_its_parameters_is_not_called_routed() -> None:
    rows = [row for row in rows_of("docs/real_text.md") if len(row) == 7 and row[1].startswith("`")]
    assert len(rows) == 16
    for row in rows:
        is_whole = row[3] == row[4] and row[1] != "`dense`"
        assert row[1].endswith("(all active)") == is_whole, row


def test_every_config_has_the_best_rate_of_the_table() -> None:
    page = (ROOT / "docs" / "research.md").read_text()
    for study in ("tables", "tables_wide", "planted"):
        _, _, rest = page.partition(research.BEGIN.format(f"{study} tuning"))
        lines = rest.partition(research.END.format(f"{study} tuning"))[0].strip().splitlines()
        rates = [float(cell) for cell in lines[0].split("|")[2:-2]]
        assert set(rates) >= set(research.STUDIES[study].rates)
        arms = []
        for line in lines[2:]:
            arm, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            scores = {rate: float(cell) for rate, cell in zip(rates, cells[:-1], strict=True) if cell}
            taken = float(cells[-1])
            arms.append(arm)
            assert max(scores.values()) == scores[taken]
            assert load_config(research.CONFIGS / study / f"{arm}.json").optimizer_params.lr == taken
            assert taken not in (min(scores), max(scores)), f"{arm}: the best rate is at the edge of the grid"
        assert tuple(arms) == research.STUDIES[study].tuned


def test_an_interval_by_hand() -> None:
    assert research.interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 * 1 / 3**0.5, rel=1e-6)
    assert research.interval([1.0]) != research.interval([1.0])  # not a number


def test_differences_are_paired_by_seed() -> None:
    runs = {arm: [run_of(0.1), run_of(0.5)] for arm in research.STUDIES["tables"].arms}
    runs["goe"] = [run_of(0.3), run_of(0.7)]
    lines = research.tables("tables", runs).splitlines()
    assert "| goe | 2 | 0.500 | 1.0 k | 2.000 | 3 |" in lines, "two seeds have no interval"
    assert "| goe - dense_flops | +0.200 ± 0.000 |" in lines


@pytest.mark.parametrize(
    ("differences", "text"),
    [
        ([0.001, -0.001, 0.002, -0.002, 0.0], ", equal within 0.01 (p < 0.001)"),
        ([0.006, 0.005, 0.007, 0.0065, 0.0055], ", equal within 0.01 (p < 0.001)"),  # they differ, but by little
        ([0.03, 0.032, 0.028, 0.031, 0.029], ""),  # different
        ([0.0, 0.0, 0.0], ""),
        ([0.0, 0.1], ""),
    ],
)
def test_arms_are_called_equal_only_by_a_test(differences: list[float], text: str) -> None:
    assert research.equal_text(differences) == text


def largest_p(differences: list[float], margin: float) -> float:
    """The larger p-value of two one-sided t-tests, by scipy."""
    below = ttest_1samp(differences, -margin, alternative="greater")
    above = ttest_1samp(differences, margin, alternative="less")
    return float(max(below.pvalue, above.pvalue))


def test_an_open_difference_would_be_equal_within_the_margin_that_is_named() -> None:
    rng, found = np.random.default_rng(0), 0
    for _ in range(100):
        differences = rng.normal(0.005, 0.02, rng.integers(3, 11)).tolist()
        text = research.equal_text(differences)
        if not text.startswith(", open"):
            continue
        found += 1
        p_value, smallest = map(float, re.findall(r"[0-9.]+", text))
        assert largest_p(differences, 0.01) == pytest.approx(p_value, abs=0.0051)
        assert largest_p(differences, smallest) <= 0.05 < largest_p(differences, smallest - 0.001)
    assert found > 50


def test_intervals_of_accuracies_stay_below_1() -> None:
    runs = {arm: [run_of(0.5)] * 3 for arm in research.STUDIES["tables"].arms}
    runs["goe"] = [run_of(accuracy) for accuracy in (0.997, 1.0, 1.0)]
    lines = research.tables("tables", runs).splitlines()
    assert "| goe | 3 | 0.999 [0.980, 1.000] | 1.0 k | 2.000 | 3 |" in lines
    assert "| hash | 3 | 0.500 | 1.0 k | 2.000 | 3 |" in lines, "no spread, no interval"


def test_how_equal_the_flops_are_is_said_over_all_arms() -> None:
    runs = {arm: [run_of(0.5)] * 3 for arm in research.STUDIES["tables"].arms}
    runs["moe"] = [run_of(0.5, inference_flops_per_sample=flops) for flops in (2.1e6, 2.3e6, 2.2e6)]
    runs["dense_params"] = [run_of(0.5, inference_flops_per_sample=5e6)] * 3
    lines = research.tables("tables", runs).splitlines()
    equal = "Forward FLOPs: 2.000 to 2.200 MFLOPs over the 13 arms that are meant to be equal (spread 10 %)"
    assert f"{equal}; dense_params: 5.000." in lines
    hops = research.tables("hop", {arm: [run_of(0.5)] for arm in research.STUDIES["hop"].arms})
    assert "Forward FLOPs" not in hops, "there no arms are meant to be equal"


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


def test_the_curve_of_language_models_pairs_seeds_within_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each schedule has the length of its run, rates are those of the results, and results of other seeds stay out."""
    trained: list[dict[str, Any]] = []

    def metrics(config: dict[str, Any]) -> dict[str, float]:
        trained.append(config)
        routed = config["model_type"] == "goe"
        return {"final_val_loss": 2.0 - config["training_params"]["max_steps"] / 1000 + config["seed"] - 0.1 * routed}

    monkeypatch.setattr(language, "metrics", metrics)
    known = {
        arm: {"rate": 0.01 * number, "steps": 800, "seeds": [2, 1, 0], "losses": [3.0, 2.0, 1.0 + number]}
        for number, arm in enumerate(language.CURVE_ARMS, start=1)
    }
    points = language.curve([0, 1], Path("text"), known)
    assert {one["training_params"]["max_steps"] for one in trained} == {200, 400}
    assert all(one["training_params"]["eval_every"] == one["training_params"]["max_steps"] for one in trained)
    assert {one["optimizer_params"]["lr"] for one in trained} == {one["rate"] for one in known.values()}
    assert points["dense"] == {200: [1.8, 2.8], 400: [1.6, 2.6], 800: [2.0, 2.0]}
    lines = language.curve_table(points).splitlines()
    assert lines[0] == "| nats per character | 200 steps | 400 steps | 800 steps |"
    gaps = next(line for line in lines[9:] if line.startswith("| dense |"))
    assert gaps.startswith("| dense | -0.100 ± 0.000 | -0.100 ± 0.000 | +2.500 ±")
