"""The page of a study: its figures are those of the analysis, and its address holds what was chosen."""

from __future__ import annotations

import itertools
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("starlette", reason="needs the extra `dashboard`")
from dashboard_site import STUDY, THEMES, TRIALS, Site, Watched, browser, findings, study_site

from research_eval.analysis.study_importance import FEWEST
from research_eval.dashboard.study import distribution_of
from research_eval.db_utils import DB_FILE, Store

PATH = f"/api/study/{quote(STUDY)}"


def test_the_figures_of_a_study_are_those_of_its_runs(study_site: Site) -> None:
    found = study_site.get(PATH)
    assert (found["x"], found["y"], found["data"]) == ("param_count", "final_val_f1", "parity")
    offered = ["final_val_f1", "final_val_loss", "param_count", "training_duration_seconds"]
    assert found["offered"] == offered, "no score of the test split"
    assert found["counts"] == f"{TRIALS} trials: {TRIALS - 2} finished, 1 pruned, 1 failed"
    with Store(str(study_site.folder / DB_FILE), read_only=True) as store:
        rows = store.find_runs(with_json=True)
        metrics = store.metrics_of([row["experiment_id"] for row in rows])
    by_trial: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_trial.setdefault(int(row["experiment_id"][9:15]), []).append(metrics[row["experiment_id"]])

    def mean(number: int, name: str) -> float:
        return sum(one[name] for one in by_trial[number]) / 2

    done = [number for number in range(TRIALS) if number not in (5, 11)]  # a seed of 11 has failed
    points = dict(found["history"]["points"])
    assert points == pytest.approx({number: mean(number, "final_val_f1") for number in done})
    best = list(itertools.accumulate((points[number] for number in done), max))
    steps = [(number, value) for number, value, before in zip(done, best, [0, *best], strict=False) if value > before]
    assert [tuple(pair) for pair in found["history"]["best"]] == steps
    pairs = {number: (mean(number, "param_count"), points[number]) for number in done}
    front = [
        number
        for number, (x, y) in pairs.items()
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in pairs.values())
    ]
    assert found["pareto"]["front"] == front
    slow = study_site.get(f"{PATH}/parameters")
    lists = {one["title"].split(",")[0]: one for one in itertools.chain(*slow["importance"]["rows"])}
    for name in ("dense", "moe"):
        label, share, chance, is_clear = lists[name]["bars"][0]
        assert (label, is_clear) == ("lr", True), "the score depends on the learning rate alone"
        assert share > 0.5 > chance
    axes = {one["title"].split(",")[0]: one for one in slow["parallel"]}
    labels = [axis["label"] for axis in axes["moe"]["axes"]]
    assert (sorted(labels[:-1]), labels[-1]) == (["dropout", "embed_dim", "lr", "num_experts"], "final_val_f1")
    assert len(axes["dense"]["trials"]) + len(axes["moe"]["trials"]) == len(done)
    top = axes["moe"]["trials"][axes["moe"]["axes"][-1]["places"].index(1.0)]
    assert points[top] == max(points[number] for number in axes["moe"]["trials"])
    table = found["trials"]
    assert table["total"] == TRIALS
    assert table["rows"][0]["values"][0] == max(points.values())
    assert [seed for _, seed in table["rows"][0]["runs"]] == [0, 1], "both seeds of a trial"


def test_the_metrics_of_a_study_can_be_chosen_but_not_by_test_scores(study_site: Site) -> None:
    found = study_site.get(f"{PATH}?y=final_val_loss&x=final_val_f1")
    assert found["pareto"]["rises"] is False, "more of the second metric is better"
    values = [value for _, value in found["history"]["best"]]
    assert values == sorted(values, reverse=True), "less is better"
    for query, words in (
        ("y=test_f1", "y: 'test_f1' is a score of the test split"),
        ("x=test_f1", "x: 'test_f1' is a score of the test split"),
        ("x=parameters", "x: no metric 'parameters'"),
        ("y=final_val_f1&x=final_val_f1", "give two different metrics"),
    ):
        status, content, _ = study_site.fetch(f"{PATH}?{query}")
        assert status == 400
        assert words in content["error"]
    assert study_site.fetch(f"{PATH}/parameters?y=test_f1")[0] == 400
    assert study_site.get(f"{PATH}/parameters?y=param_count")["importance"]["rows"]
    assert study_site.fetch("/api/study/other")[0] == study_site.fetch("/api/study/other/parameters")[0] == 404


def test_values_suggest_their_range() -> None:
    few, many = distribution_of([64, 16, 32, 16]), distribution_of(list(range(1, 40)))
    assert few.choices == (16, 32, 64)
    assert (many.low, many.high, many.log) == (1, 39, True)
    assert distribution_of([1e-4, 1e-2]).log
    assert not distribution_of([0.0, 0.3]).log
    assert distribution_of(["relu", None, True, 1]).choices == ("relu", None, True, 1)
    assert FEWEST <= TRIALS // 2 - 1


def test_the_page_of_a_study_draws_them_and_its_address_holds_the_choice(study_site: Site, browser: Any) -> None:
    watched = Watched(browser, study_site)
    page = watched.open(f"/study/{quote(STUDY)}", "study")
    assert page.locator("svg.chart").count() == 2
    assert page.locator("svg.parallel").count() == 2
    assert page.locator("svg.parallel .trial").count() == TRIALS - 2
    assert {"16", "32", "64"} <= set(page.locator("svg.parallel .tick").all_text_contents())
    assert page.get_by_role("heading", name=f"Study {STUDY}").count() == 1
    assert "test_f1" not in page.locator("#choose-x").inner_text()
    page.locator("#choose-x").select_option("final_val_loss")
    page.wait_for_url("**x=final_val_loss**")
    page.locator("figcaption").get_by_text("final_val_f1 and final_val_loss").wait_for()
    assert page.locator(":focus").get_attribute("id") == "choose-x"
    shown = page.locator("#page").inner_text()
    again = watched.open(page.url.removeprefix(study_site.address.rstrip("/")), "study")
    assert again.locator("#page").inner_text() == shown
    page.go_back()
    page.locator("svg.chart .point").last.click()
    watched.ready("run")
    watched.close()


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing_serious_on_the_page_of_a_study(study_site: Site, browser: Any, theme: str) -> None:
    page = Watched(browser, study_site, color_scheme=theme).open(f"/study/{quote(STUDY)}", "study")
    assert findings(page, theme) == []
    page.close()
