"""What the pictures of results and the report show: baselines, standings, ticks, filters; and tables of a paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_analyze_results import COSTS, Lab, fill

from research_eval.analysis.baselines import Baseline, baselines_of, expected_scores
from research_eval.analysis.comparison import compare
from research_eval.analysis.paper import comparison_paper, summary_paper
from research_eval.analysis.points import Score, Standing, points_of
from research_eval.analysis.report_routes import role_tables
from research_eval.analysis.result_plots import draw_cost_plot
from research_eval.analysis.runs import with_all_metrics
from research_eval.analysis.study_axes import tick_texts
from research_eval.analysis.summary import Options, summary_rows
from research_eval.analysis.tables import Table
from research_eval.routing.roles import Usage, expert_roles, members_of
from research_eval.tasks.classification import macro_f1, per_class

F1, COST = "final_val_f1", "param_count"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.store.close()


def drawn_costs(lab: Lab, drawn: dict[str, Any], tmp_path: Path, **settings: Any) -> Any:
    """The figure of scores against parameters."""
    results = lab.results(F1, *COSTS)
    score = Score.of(results, F1)
    score = Score(**vars(score) | settings)
    assert draw_cost_plot(results, COST, score, 0.95, tmp_path / "plot.png")
    return drawn["plot"]


def legend_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ------------------------------------------------------------------------------------------------------- standings


def add_seeds(lab: Lab, values: list[float], cost: float, rate: float) -> None:
    for seed, value in enumerate(values):
        lab.add(value, seed=seed, metrics={COST: cost}, optimizer_params={"lr": rate})


def test_overlapping_intervals_decide_nothing(lab: Lab) -> None:
    add_seeds(lab, [0.70, 0.72, 0.74], 100, 0.1)  # the best, and the cheapest
    add_seeds(lab, [0.69, 0.71, 0.73], 200, 0.2)  # a little worse
    add_seeds(lab, [0.30, 0.31, 0.32], 300, 0.3)  # far worse
    add_seeds(lab, [0.10], 400, 0.4)  # a single seed
    results = lab.results(F1, COST)
    found = points_of(results, results.groups[0].task, COST, Score.of(results, F1), 0.95)
    standings = {point.cost: point.standing for point in found}
    assert standings == {100: Standing.FRONT, 200: Standing.LEVEL, 300: Standing.WORSE, 400: Standing.OPEN}


def test_a_better_config_that_costs_more_makes_none_worse(lab: Lab) -> None:
    add_seeds(lab, [0.30, 0.31, 0.32], 100, 0.1)
    add_seeds(lab, [0.70, 0.71, 0.72], 200, 0.2)
    add_seeds(lab, [0.29, 0.30, 0.32], 150, 0.3)
    results = lab.results(F1, COST)
    found = points_of(results, results.groups[0].task, COST, Score.of(results, F1), 0.95)
    assert [point.standing for point in found] == [Standing.FRONT, Standing.FRONT, Standing.LEVEL]


@given(
    st.lists(st.tuples(st.integers(1, 4), st.lists(st.floats(0, 1), min_size=3, max_size=3)), min_size=1, max_size=8)
)
def test_clearly_worse_is_what_the_slow_way_says(configs: list[tuple[int, list[float]]]) -> None:
    class FakeGroup(SimpleNamespace):
        """As much of a group as a point needs."""

        def values(self, metric: str) -> list[float]:
            return self.metrics[metric]

        def mean(self, metric: str) -> float:
            return float(np.mean(self.metrics[metric]))

        cost = mean

    groups = [
        FakeGroup(model_type="dense", task="t", metrics={"final_val_loss": values, COST: [float(cost)]})
        for cost, values in configs
    ]
    results = SimpleNamespace(of_task=lambda _: groups)
    score = Score("final_val_loss", "loss", "loss", {})
    found = points_of(results, "t", COST, score, 0.95)  # type: ignore[arg-type]
    for point in found:
        ends = {id(one): (min(one.group.values("final_val_loss")),) * 2 for one in found if one.interval is None}
        ends |= {id(one): tuple(one.interval) for one in found if one.interval is not None}
        better = [one for one in found if one.cost <= point.cost and ends[id(one)][1] < ends[id(point)][0]]
        assert (point.standing is Standing.WORSE) == (bool(better) and not point.on_front)


def test_each_standing_has_its_look_and_its_place_in_the_legend(
    lab: Lab, drawn: dict[str, Any], tmp_path: Path
) -> None:
    add_seeds(lab, [0.70, 0.72, 0.74], 100, 0.1)
    add_seeds(lab, [0.30, 0.31, 0.32], 300, 0.3)
    add_seeds(lab, [0.10], 400, 0.4)
    figure = drawn_costs(lab, drawn, tmp_path)
    (panel,) = figure.axes
    shown = {one.get_label(): one for one in panel.collections if one.get_label() in Standing.__members__}
    assert {name: one.get_offsets().tolist() for name, one in shown.items()} == {
        "FRONT": [[100, pytest.approx(0.72)]],
        "WORSE": [[300, pytest.approx(0.31)]],
        "OPEN": [[400, pytest.approx(0.10)]],
    }
    assert len(shown["OPEN"].get_facecolors()) == 0, "hollow"
    assert shown["WORSE"].get_alpha() < shown["FRONT"].get_alpha()
    assert {"pale: clearly worse, and not cheaper", "hollow: too few seeds for an interval"} <= set(legend_of(figure))
    assert not any("overlaps" in text for text in legend_of(figure)), "nothing here has this standing"


# ------------------------------------------------------------------------------------------------- ticks and titles


def test_costs_that_differ_by_a_percent_have_different_ticks(lab: Lab, drawn: dict[str, Any], tmp_path: Path) -> None:
    for number, cost in enumerate((100_000, 100_400, 101_000)):
        lab.add(0.5 + number / 100, metrics={COST: cost}, optimizer_params={"lr": 0.1 + number})
    (panel,) = drawn_costs(lab, drawn, tmp_path).axes
    for axis in (panel.xaxis, panel.yaxis):
        texts = [tick.get_text() for tick in axis.get_ticklabels()]
        assert len(texts) >= 3
        assert len(set(texts)) == len(texts)
        low, high = axis.get_view_interval()
        assert all(low <= place <= high for place in axis.get_ticklocs())


def test_a_long_name_is_wrapped_and_not_cut_off(lab: Lab, drawn: dict[str, Any], tmp_path: Path) -> None:
    lab.add(0.5, metrics={COST: 10}, dataset="a data set with a rather long name of many words, for reasons of its own")
    results = lab.results(
        F1, *COSTS, dataset="a data set with a rather long name of many words, for reasons of its own"
    )
    draw_cost_plot(results, COST, Score.of(results, F1), 0.95, tmp_path / "plot.png")
    figure = drawn["plot"]
    lines = figure.get_suptitle().splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) * 0.0077 * 11.5 <= figure.get_figwidth()


# -------------------------------------------------------------------------------------------------------- baselines


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any))
def test_expected_scores_are_those_of_real_guesses(support: list[int]) -> None:
    truth = np.repeat(np.arange(len(support)), support)
    most = np.full(len(truth), int(np.argmax(support)))
    scores = expected_scores(support, "f1")
    assert scores["majority class"] == pytest.approx(macro_f1(per_class(truth, most, len(support))))
    assert expected_scores(support, "acc")["majority class"] == pytest.approx((truth == most).mean())
    # Every sample guessed as each class once is guessing all classes equally often.
    everything = np.tile(np.arange(len(support)), len(truth))
    guessed = macro_f1(per_class(np.repeat(truth, len(support)), everything, len(support)))
    assert scores["chance"] == pytest.approx(guessed)
    assert expected_scores(support, "acc")["chance"] == pytest.approx(1 / len(support))


def test_baselines_come_from_the_classes_and_from_the_environment(lab: Lab) -> None:
    run = lab.add(0.9, metrics={"val_support_per_class": [30, 10], COST: 10})
    results = lab.results(F1)
    (task,) = results.tasks
    assert [one.name for one in baselines_of(lab.store, results, F1)[task]] == ["majority class", "chance"]
    stored = {"data": {"baselines": {"tfidf_logreg": {"val_f1": 0.8, "test_f1": 0.7}, "majority": {"val_f1": 0.44}}}}
    lab.store.update_environment(run, stored)
    found = {one.name: one.value for one in baselines_of(lab.store, results, F1)[task]}
    assert found["TF-IDF"] == 0.8
    assert found["majority class"] == 0.44, "what was measured replaces what follows from the classes"
    assert baselines_of(lab.store, results, "final_val_loss") == {}


def test_near_baselines_are_lines_and_far_ones_a_sentence(lab: Lab, drawn: dict[str, Any], tmp_path: Path) -> None:
    for number in range(3):
        lab.add(0.80 + number / 20, metrics={COST: 10 + number}, optimizer_params={"lr": 0.1 + number})
    (task,) = lab.results(F1).tasks
    known = [Baseline("chance", 0.1), Baseline("TF-IDF", 0.75)]
    (panel,) = drawn_costs(lab, drawn, tmp_path, baselines={task: known}).axes
    lines = {line.get_label(): line.get_ydata()[0] for line in panel.lines if "TF" in str(line.get_label())}
    assert lines == {"TF-IDF 0.750": 0.75}
    assert panel.get_ylim()[0] < 0.75
    assert "TF-IDF 0.750" in [text.get_text() for text in panel.texts]
    assert "chance 0.100: below the axis" in panel.get_xlabel()
    assert panel.get_ylim()[0] > 0.5, "the points are not squeezed"


# ----------------------------------------------------------------------------------------------------------- report


def page_of(lab: Lab) -> str:
    assert lab.analyze("--run_report").code == 0
    (name,) = (name for name in lab.files() if name.endswith(".html"))
    text = lab.text(name)
    return text[: text.index("<script>")] + text[text.rindex("<script type") :]  # without plotly


def test_hyperparameters_are_columns_with_filters(lab: Lab) -> None:
    lab.add(0.5, optimizer_params={"lr": 0.1})
    lab.add(0.6, optimizer_params={"lr": 0.001})
    lab.add(0.7, model="moe", model_params={"num_experts": 4})
    lab.add(0.8, model="moe", model_params={"num_experts": 8})
    page = page_of(lab)
    listed = page[page.index('<table id="listed">') : page.index('<section id="again">')]
    heads = re.findall(r'<button type="button">([^<]*)</button>', listed)
    assert {"lr", "num_experts"} <= set(heads)
    assert listed.count("<input") == len(heads)
    place = heads.index("lr")
    rows = [re.findall(r'data-value="([^"]*)"', row) for row in re.findall(r"<tr>.*?</tr>", listed, re.DOTALL)[1:]]
    assert {row[0]: [] for row in rows} == {"dense": [], "moe": []}
    assert sorted(float(row[place]) for row in rows if row[0] == "dense") == [0.001, 0.1]


def roles_of(seed: int = 0) -> list[dict[str, Any]]:
    labels_U = np.arange(200) % 2
    expert_U = np.where(labels_U == 0, 0, np.random.default_rng(seed).integers(0, 3, 200))
    members = {"class": members_of(labels_U, ["no", "<b>yes</b>"])}
    return expert_roles([Usage("layer 1", np.eye(3, dtype=np.float32)[expert_U], members)])


def test_the_report_says_what_the_experts_of_moe_do(lab: Lab) -> None:
    lab.add(0.8, model="moe", metrics={"router_entropy": 0.5, "expert_roles": roles_of()})
    page = page_of(lab)
    assert "class × expert" in page
    assert "&lt;b&gt;yes&lt;/b&gt;" in page
    assert "<b>yes</b>" not in page
    cells = re.findall(
        r'<td title="([\d.]+%; by chance [^"]*)"( style="background: rgba\([^"]*"| class="inside")', page
    )
    assert len(cells) == 6
    assert all("rgba" in look for _, look in cells), "class 0 has an expert of its own"


def test_cells_inside_the_null_band_have_no_colour() -> None:
    stored = roles_of()
    stored[0]["band"] = [[1.0] * 3] * 2
    ((one,),) = (grouping["tables"] for grouping in role_tables(stored))
    assert one["num_clear"] == 0
    assert not any(cell["colour"] for row in one["rows"] for cell in row["cells"])


@pytest.mark.parametrize("change", [{"share": "x"}, {"band": [[1.0]]}, {"kinds": None}, {"units": [1]}])
def test_a_damaged_table_of_a_foreign_store_is_left_out(change: dict[str, Any]) -> None:
    assert role_tables([roles_of()[0] | change]) == []
    assert role_tables(None) == role_tables("text") == role_tables([1]) == []


def test_epochs_of_the_report_are_whole_numbers(lab: Lab) -> None:
    lab.add(0.8, curve=True)
    assert 'dtick: Math.max(1, Math.ceil(most / 10)), tickformat: "d"' in page_of(lab)


# ------------------------------------------------------------------------------------------------- tables of a paper


def paper_of(lab: Lab, *extra: str) -> Table:
    options = Options(F1, 0.95, 0.99)
    results = lab.results(F1)
    best = [with_all_metrics(lab.store, group) for group in results.best(F1)]
    return summary_paper(results, summary_rows(results, best, options), options, extra)


def test_the_best_mean_of_each_task_is_bold(lab: Lab) -> None:
    for length in (6, 7):
        for model, level in (("dense", 0.5), ("moe", 0.9 if length == 6 else 0.1)):
            for seed in range(3):
                data = {"num_samples": 100, "seq_len": length}
                more = {"test_f1": 1 - level, **COSTS}
                lab.add(level + seed / 100, model=model, seed=seed, dataset_params=data, metrics=more)
    table = paper_of(lab)
    assert list(table.columns[:4]) == ["task", "model", "seeds", "validation macro-F1"]
    bold = {(table.rows[row][1], table.columns[column]) for row, column in table.bold}
    assert sorted(table.rows[row][1] for row, column in table.bold if column == 3) == ["dense", "moe"]
    assert bold == {
        ("moe", "validation macro-F1"),
        ("dense", "validation macro-F1"),
        ("dense", "test macro-F1"),
        ("moe", "test macro-F1"),
    }
    assert re.search(r"moe & 3 & \\textbf\{0\.9100\} \{\[\}0\.\d{4}, 0\.\d{4}\{\]\} & 0\.1000 &", table.latex())


def test_equal_means_are_both_bold_and_a_single_row_is_not(lab: Lab) -> None:
    lab.add(0.5, metrics=COSTS)
    assert paper_of(lab).bold == frozenset()
    lab.add(0.5, model="moe", metrics=COSTS)
    assert paper_of(lab).bold == {(0, 2), (1, 2)}


def test_operational_columns_are_there_if_asked_for(lab: Lab) -> None:
    fill(lab, "dense", "moe")
    plain = paper_of(lab)
    assert list(plain.columns) == [
        *("model", "seeds", "validation macro-F1", "test macro-F1"),
        *("parameters", "FLOPs/sample"),
    ]
    assert not re.search("run-|latency|training s", plain.latex())
    asked = paper_of(lab, "inference_latency_ms_batch", "experiment_ids")
    assert "latency ms" in asked.columns
    assert re.search(r"run-\d{5} run-\d{5} run-\d{5}", asked.latex())
    lab.analyze("--latex_columns", "experiment_ids,trials_spent")
    (text,) = (lab.text(name) for name in lab.files() if name.endswith(".tex"))
    assert "trials spent & runs" in text
    done = lab.analyze("--latex_columns", "latency")
    assert done.code == 2
    assert "--latex_columns: no column 'latency'" in done.err


def test_minus_signs_are_real_and_hyphens_stay(lab: Lab) -> None:
    table = Table("t", ["a", "b"], [["x-ray 1e-5 2026-11-28", "-0.5 [-1, 2]"], ["a - b", "$-1"]])
    rows = table.latex().splitlines()[8:10]
    assert rows == [
        r"    x-ray 1e-5 2026-11-28 & $-$0.5 {[}$-$1, 2{]} \\",
        r"    a $-$ b & \$$-$1 \\",
    ]
    fill(lab, "dense", "moe")
    options = Options(F1, 0.95, 0.99)
    results = lab.results(F1)
    best = [with_all_metrics(lab.store, group) for group in results.best(F1)]
    paper = comparison_paper(results, compare(results, best, [("dense", "moe")], options), options)
    assert list(paper.columns) == [
        *("difference", "seeds", "validation macro-F1", "test macro-F1", "effect size", "p (Holm)"),
    ]
    assert re.search(r"dense \$-\$ moe & 3 & \$-\$0\.\d{4} \{\[\}\$-\$0\.\d{4}, \$-\$0\.\d{4}\{\]\}", paper.latex())


def test_ticks_of_close_numbers_have_the_digits_that_tell_them_apart() -> None:
    assert tick_texts([100_000, 100_500, 101_000]) == ["100k", "100.5k", "101k"]
    assert tick_texts([0.87, 0.875]) == ["0.87", "0.875"]
