"""What a study leaves behind: its CSV, its best configs, its pictures."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState, create_trial
from support import small_config

from research_eval.analysis import study_charts
from research_eval.analysis.study_axes import ABSENT, parameter_axis, round_numbers, scale_of, tick_texts
from research_eval.analysis.study_charts import StudyCharts, best_so_far, front_line, parallel_coordinates_of
from research_eval.analysis.study_importance import FEWEST, explained_by_type, importances, searched
from research_eval.analysis.study_lines import colour_of
from research_eval.analysis.study_pages import SCRIPT
from research_eval.analysis.study_trials import best_of, pareto_front
from research_eval.db_utils import Store
from research_eval.schema import load_config
from research_eval.store.metrics import direction
from research_eval.studies.adapter import trial_records
from research_eval.studies.distributions import random_pick
from research_eval.studies.results import StudyFiles, write_csv_of, write_results
from research_eval.studies.space import build_space

pytestmark = pytest.mark.usefixtures("real_graphs")  # tests here look at pictures of studies

F1, COST = "final_val_f1", "param_count"
STATES = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.FAIL,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
    "waiting": TrialState.WAITING,
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def study_of(*objectives: str, name: str = "s") -> optuna.Study:
    return optuna.create_study(study_name=name, directions=[direction(one) for one in objectives])


def add(
    study: optuna.Study,
    values: Sequence[float] | float | None = None,
    status: str = "finished",
    params: dict[str, tuple[Any, BaseDistribution]] | None = None,
    **attributes: Any,
) -> None:
    """A trial as the workers of a study leave it."""
    chosen = params or {}
    trial = create_trial(
        state=STATES[status],
        values=[values] if isinstance(values, float) else values,
        params={key: value for key, (value, _) in chosen.items()},
        distributions={key: distribution for key, (_, distribution) in chosen.items()},
        user_attrs={"status": status, **attributes},
    )
    study.add_trial(trial)


def finished(*rows: Sequence[float]) -> list[Any]:
    study = study_of(*[F1, COST, "final_val_loss"][: len(rows[0])])
    for row in rows:
        add(study, list(row))
    return trial_records(study)


def sampled(
    num_trials: int, objectives: Sequence[str], types: Sequence[str], name: str = "s", effect: bool = True
) -> optuna.Study:
    """Random settings of the real search space; the score depends on the learning rate alone."""
    base = {"dataset_type": "synthetic", "dataset_name": "parity", "epochs": 2, "batch_size": 16}
    space = build_space(types, base, {})
    rng = np.random.default_rng(0)
    study = study_of(*objectives, name=name)
    for number in range(num_trials):
        entries: dict[str, tuple[Any, BaseDistribution]] = {}
        draw = random_pick(rng)

        def pick(name: str, distribution: BaseDistribution, entries: Any = entries, draw: Any = draw) -> Any:
            entries[name] = (draw(name, distribution), distribution)
            return entries[name][0]

        config = space.sample(pick)
        rate = math.log10(config["optimizer_params"]["lr"] / 3e-4) / math.log10(0.01 / 3e-4)
        score = float(0.5 + 0.4 * (rate if effect else rng.uniform()) + rng.normal() * 0.01)
        status = ("finished", "finished", "finished", "finished", "pruned", "diverged", "failed")[number % 7]
        known = {F1: score, COST: 1000.0 * 4 ** (number % 5), "final_val_loss": -math.log(score)}
        values = [known[one] for one in objectives] if status == "finished" else None
        more = {"reason": "<b>because</b>"} if status != "finished" else {}
        add(study, values, status, entries, experiment_ids=[f"run{number}"], model_type=config["model_type"], **more)
    return study


def charts_of(study: optuna.Study, *objectives: str) -> StudyCharts:
    return StudyCharts(study.study_name, "parity", objectives, tuple(trial_records(study)))


# -------------------------------------------------------------------------------------------------------- names


def test_files_are_named_as_the_specification_says() -> None:
    files = StudyFiles.of("my_hpo_study", "synthetic", "parity")
    assert files.csv == Path("optuna_study_my_hpo_study_synthetic_parity_full_results.csv")
    assert files.best_config == Path("optuna_study_my_hpo_study_synthetic_parity_best_config.json")
    assert files.plots == Path("optuna_study_my_hpo_study_synthetic_parity_plots")


@example("é" * 200, "synthetic", "é" * 200)
@given(st.text(max_size=400), st.text(max_size=400), st.text(max_size=400))
def test_names_of_users_stay_in_the_folder_and_fit_a_file_system(study: str, kind: str, dataset: str) -> None:
    files = StudyFiles.of(study, kind, dataset)
    for path in (files.csv, files.best_config, files.plots, files.pareto_config(10**6)):
        assert path.parent == Path()
        assert len(f"{path.name}.4194304.tmp") <= 255
        assert re.fullmatch(r"[\w.-]+", path.name, re.ASCII)


# ------------------------------------------------------------------------------------------------------ records


def test_a_record_has_what_the_workers_wrote() -> None:
    study = study_of(F1)
    wide, narrow = CategoricalDistribution((1, 2, 4)), CategoricalDistribution((1, 2))
    add(
        study,
        0.5,
        params={"moe.num_heads of 1, 2": (2, narrow), "moe.size": (4, wide)},
        experiment_ids=["a", "b"],
        epochs=7,
        attempts=2,
    )
    (record,) = trial_records(study)
    assert (record.number, record.state, record.status, record.values) == (0, "COMPLETE", "finished", (0.5,))
    assert (record.experiment_ids, record.epochs, record.attempts) == (["a", "b"], 7, 2)
    assert record.model_type == "moe"  # as its parameters say
    assert record.params == {"moe.num_heads of 1, 2": 2, "moe.size": 4}
    assert record.plain_params == {"moe.num_heads": 2, "moe.size": 4}


@pytest.mark.parametrize("status", STATES)
def test_a_trial_has_a_status_with_and_without_a_note_of_it(status: str) -> None:
    study = study_of(F1)
    value = 0.5 if status == "finished" else None
    add(study, value, status, reason="why")
    study.add_trial(create_trial(state=STATES[status], value=value))
    noted, bare = trial_records(study)
    assert (noted.status, noted.reason) == (status, "why")
    assert (bare.status, bare.reason) == ("failed" if status == "diverged" else status, None)


def test_a_note_does_not_make_a_failed_trial_a_finished_one() -> None:
    """A worker that was taken for dead may have noted what it found before it learned that."""
    study = study_of(F1)
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"status": "finished"}))
    assert trial_records(study)[0].status == "failed"


def test_a_pruned_trial_of_several_objectives_keeps_its_last_scores() -> None:
    study = study_of(F1, COST)
    add(study, None, "pruned", curves={F1: {"2": 0.4, "10": 0.6, "9": 0.5}}, costs={COST: 100.0})
    (record,) = trial_records(study)
    assert [record.value((F1, COST), index) for index in (0, 1)] == [0.6, 100.0]


# ---------------------------------------------------------------------------------------------------------- CSV


def rows_of(study: optuna.Study, folder: Path, *objectives: str) -> list[dict[str, str]]:
    files = StudyFiles.of(study.study_name, "synthetic", "parity", folder)
    write_csv_of(study, objectives, files)
    return list(csv.DictReader(io.StringIO(files.csv.read_text())))


def dated(study: optuna.Study) -> None:
    """A trial with all kinds of values, by Optuna's own hand."""
    trial = study.ask()
    trial.suggest_float("optimizer_params.lr", 1e-4, 1e-2)
    trial.suggest_categorical("moe.size", [1, 2])
    trial.suggest_categorical("scheduler_params.name", ["none", "cosine"])
    study.tell(trial, [0.1 * (trial.number + 1)] * len(study.directions))


def test_the_csv_begins_with_the_columns_and_cells_of_optuna(tmp_path: Path) -> None:
    study = study_of(F1)
    for _ in range(3):
        dated(study)
    trial = study.ask()
    trial.report(0.25, 1)
    study.tell(trial, state=TrialState.PRUNED)
    expected = list(csv.DictReader(io.StringIO(study.trials_dataframe().to_csv(index=False))))
    found = rows_of(study, tmp_path, F1)
    assert [list(row)[: len(expected[0])] for row in found] == [list(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for name, cell in wanted.items():  # pandas makes a column of whole numbers with gaps one of fractions
            assert row[name] == cell or float(row[name]) == float(cell), name


@given(st.timedeltas(timedelta(0), timedelta(days=40)))
def test_a_duration_is_written_so_that_pandas_reads_it(passed: timedelta) -> None:
    import pandas

    from research_eval.studies.results import _duration

    trial = create_trial(value=0.5)
    trial.datetime_start = datetime(2026, 1, 1)
    trial.datetime_complete = trial.datetime_start + passed
    study = study_of(F1)
    study.add_trial(trial)
    assert pandas.Timedelta(_duration(trial_records(study)[0])).to_pytimedelta() == passed


def test_the_csv_has_a_row_per_trial_with_what_became_of_it(tmp_path: Path) -> None:
    study = study_of(F1, COST)
    add(study, [0.5, 10.0], warm_start="old", params={"moe.only_here": (1, IntDistribution(1, 2))})
    add(study, [0.6, 20.0], experiment_ids=["a", "b"], epochs=4, attempts=1, model_type="moe")
    add(study, None, "diverged", reason="loss nan at step 3", experiment_ids=["c"])
    add(study, None, "waiting")
    rows = rows_of(study, tmp_path, F1, COST)
    assert [row["number"] for row in rows] == ["1", "2", "3"]  # not the past run
    assert [row[f"values_{F1}"] for row in rows] == ["0.6", "", ""]
    assert [row["state"] for row in rows] == ["COMPLETE", "FAIL", "WAITING"]
    assert [row["status"] for row in rows] == ["finished", "diverged", "waiting"]
    assert [row["reason"] for row in rows] == ["", "loss nan at step 3", ""]
    assert [row["experiment_id"] for row in rows] == ["a", "c", ""]
    assert [row["experiment_ids"] for row in rows] == ["a b", "c", ""]
    assert (rows[0]["model_type"], rows[0]["epochs"], rows[0]["attempts"]) == ("moe", "4", "1")
    assert "params_moe.only_here" not in rows[0]


def test_narrowed_choices_share_a_column(tmp_path: Path) -> None:
    study = study_of(F1)
    add(study, 0.1, params={"moe.num_heads of 1, 2": (2, CategoricalDistribution((1, 2)))})
    add(study, 0.2, params={"moe.num_heads": (4, CategoricalDistribution((1, 2, 4)))})
    rows = rows_of(study, tmp_path, F1)
    assert [row["params_moe.num_heads"] for row in rows] == ["2", "4"]
    assert sum("num_heads" in name for name in rows[0]) == 1


def test_a_study_without_trials_has_a_csv_with_a_header(tmp_path: Path) -> None:
    assert rows_of(study_of(F1), tmp_path, F1) == []
    assert (tmp_path / "optuna_study_s_synthetic_parity_full_results.csv").read_text().startswith("number,value,")


def test_text_that_a_spreadsheet_would_run_is_escaped(tmp_path: Path) -> None:
    study = study_of(F1)
    add(study, None, "failed", reason='=HYPERLINK("x")\n,"')
    assert rows_of(study, tmp_path, F1)[0]["reason"] == '\'=HYPERLINK("x")\n,"'


# ------------------------------------------------------------------------------------------------- best and front


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), max_size=12), st.integers(1, 3))
def test_the_front_is_that_of_optuna(points: list[tuple[int, int, int]], number: int) -> None:
    objectives = [F1, COST, "final_val_loss"][:number]
    study = study_of(*objectives)
    for point in points:
        add(study, [float(value) for value in point[:number]])
    records = trial_records(study)
    front = {record.number for record in pareto_front(records, objectives)}
    assert front == {trial.number for trial in study.best_trials} or number == 1
    best = best_of(records, objectives)
    assert (best is None) == (not points)
    if best is not None:
        first = [
            point for point in points if point[0] == max(point[0] for point in points)
        ]  # of F1, the rest are costs
        assert best.number == points.index(min(first, key=lambda point: point[1:number]))
        assert best.number in front


def test_less_of_a_loss_is_better_and_past_runs_and_unfinished_trials_are_not_chosen() -> None:
    study = study_of("final_val_loss")
    add(study, 0.1, warm_start="old")
    add(study, 0.2, "pruned")
    for value in (0.5, 0.3, 0.3, 0.4):
        add(study, value)
    best = best_of(trial_records(study), ["final_val_loss"])
    assert best is not None
    assert best.number == 3


def stored(folder: Path, *ids: str) -> str:
    """A results store with a run under each id, whose seeds are 0, 1, ..."""
    db = str(folder / "results.db")
    with Store(db) as store:
        for seed, run in enumerate(ids):
            config = small_config(seed=seed, experiment_name="s")
            store.start_experiment(
                experiment_id=run,
                run_type="optuna_trial",
                experiment_name="s",
                model_type="dense",
                dataset_name="parity",
                dataset_type="synthetic",
                epochs=2,
                batch_size=16,
                seed=seed,
                config=config.to_dict(),
                environment={},
            )
    return db


@pytest.fixture(name="no_pictures")
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research_eval.analysis.study_plots.draw_study", lambda charts, folder: [])


@pytest.mark.usefixtures("no_pictures")
def test_the_best_config_is_the_stored_one_and_runs_again(tmp_path: Path) -> None:
    db = stored(tmp_path, "a", "b", "c")
    study = study_of(F1)
    for value, run in ((0.5, "a"), (0.9, "b"), (0.7, "c")):
        add(study, value, experiment_ids=[run, "another seed"])
    files = StudyFiles.of("s", "synthetic", "parity", tmp_path)
    assert write_results(study, [F1], files, db) == [files.csv, files.best_config]
    text = files.best_config.read_text()
    with Store(db, read_only=True) as store:
        assert json.loads(text) == json.loads(store.experiment("b")["full_config_json"])
    assert "\n  " in text
    assert load_config(files.best_config) == small_config(seed=1, experiment_name="s")


@pytest.mark.usefixtures("no_pictures")
def test_every_trial_of_the_front_has_its_config_and_old_ones_go(tmp_path: Path) -> None:
    db = stored(tmp_path, "a", "b", "c")
    study = study_of(F1, COST)
    files = StudyFiles.of("s", "synthetic", "parity", tmp_path)
    others = [tmp_path / f"{files.stem}_pareto_x.json", tmp_path / f"{files.stem}_pareto_1.json.bak"]
    others.append(tmp_path / f"x{files.stem}_pareto_1.json")
    for path in others:
        path.write_text("mine")
    add(study, [0.5, 10.0], experiment_ids=["a"])
    add(study, [0.6, 20.0], experiment_ids=["b"])
    write_results(study, [F1, COST], files, db)
    assert files.pareto_configs() == [files.pareto_config(0), files.pareto_config(1)]
    assert json.loads(files.best_config.read_text())["seed"] == 1
    add(study, [0.7, 10.0], experiment_ids=["c"])  # better than both
    written = write_results(study, [F1, COST], files, db)
    assert files.pareto_configs() == [files.pareto_config(2)]
    assert written == [files.csv, files.best_config, files.pareto_config(2)]
    assert json.loads(files.best_config.read_text()) == json.loads(files.pareto_config(2).read_text())
    assert [path.read_text() for path in others] == ["mine"] * 3


@pytest.mark.usefixtures("no_pictures")
def test_what_the_results_store_lacks_is_said_and_the_rest_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = study_of(F1)
    add(study, 0.5, experiment_ids=["gone"])
    files = StudyFiles.of("s", "synthetic", "parity", tmp_path)
    with caplog.at_level(logging.WARNING):
        assert write_results(study, [F1], files, str(tmp_path / "none.db")) == [files.csv]
        assert write_results(study, [F1], files, stored(tmp_path, "a")) == [files.csv]
    assert "no results at" in caplog.messages[0]
    assert "trial 0: its run is not in" in caplog.messages[1]
    assert not files.best_config.exists()


def test_without_a_finished_trial_there_is_a_csv_and_no_error(tmp_path: Path) -> None:
    study = study_of(F1)
    add(study, 0.5, warm_start="old")
    add(study, None, "diverged", reason="nan")
    add(study, 0.3, "pruned")
    files = StudyFiles.of("s", "synthetic", "parity", tmp_path)
    assert write_results(study, [F1], files, str(tmp_path / "none.db")) == [files.csv]
    assert list(tmp_path.iterdir()) == [files.csv]


# --------------------------------------------------------------------------------------------------- importances


def test_the_parameter_that_the_score_depends_on_is_the_important_one() -> None:
    charts = charts_of(sampled(140, [F1], ["dense"]), F1)
    (found,) = charts.importances["dense"]
    assert isinstance(found, dict)
    assert next(iter(found)) == "optimizer_params.lr"
    assert next(name for name, one in found.items() if one.is_clear) == "optimizer_params.lr"
    assert math.isclose(sum(one.share for one in found.values()), 1.0)
    assert {"dense.num_heads", "scheduler_params.warmup_factor"} <= set(found)  # narrowed, conditional
    assert not any(" of " in name for name in found)


def test_the_importance_of_a_loss_is_about_its_low_values() -> None:
    """What is best about a score is best about its logarithm, negated."""
    study = sampled(60, [F1, "final_val_loss"], ["dense"])
    for_score, for_loss = charts_of(study, F1, "final_val_loss").importances["dense"]
    assert for_score == for_loss


def test_where_nothing_matters_little_is_clear() -> None:
    """One of twenty by chance; all of them would be clear without the shuffles."""
    charts = charts_of(sampled(140, [F1], ["dense"], effect=False), F1)
    (found,) = charts.importances["dense"]
    assert isinstance(found, dict)
    assert sum(one.is_clear for one in found.values()) <= 2


def test_importances_say_why_there_are_none() -> None:
    study = study_of(F1)
    size = {"moe.size": (1, IntDistribution(1, 3)), "moe.fixed": (1, CategoricalDistribution((1,)))}
    for _ in range(FEWEST - 1):
        add(study, 0.5, params=size)
    records = trial_records(study)
    assert importances(records, F1, 0) == f"{FEWEST - 1} finished trials do not suffice: importances need {FEWEST}"
    add(study, 0.5, params=size, warm_start="old")
    records = trial_records(study)
    assert importances(records, F1, 0) == "all trials are equally good"
    only_fixed = study_of(F1)
    for value in range(FEWEST):
        add(only_fixed, float(value), params={"moe.fixed": size["moe.fixed"]})
    assert importances(trial_records(only_fixed), F1, 0) == "no parameter varied"


def test_importances_leave_optunas_logging_as_it_was() -> None:
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    study = study_of(F1)
    for number in range(FEWEST):
        add(study, float(number), params={"moe.size": (number % 3 + 1, IntDistribution(1, 3))})
    importances(trial_records(study), F1, 0)
    assert optuna.logging.get_verbosity() == optuna.logging.DEBUG


def test_choices_and_ranges_that_were_narrowed_are_put_together() -> None:
    study = study_of(F1)
    add(
        study,
        0.1,
        params={
            "moe.num_heads of 1, 2": (2, CategoricalDistribution((1, 2))),
            "moe.top": (2, IntDistribution(1, 2)),
            "moe.rate": (0.1, FloatDistribution(0.01, 0.1, log=True)),
            "moe.fixed": (3, IntDistribution(3, 3)),
        },
    )
    add(
        study,
        0.2,
        params={
            "moe.num_heads": (8, CategoricalDistribution((8, 1, 2, 4))),
            "moe.top": (4, IntDistribution(1, 4)),
            "moe.rate": (0.5, FloatDistribution(0.1, 0.5, log=True)),
            "moe.fixed": (3, IntDistribution(3, 3)),
        },
    )
    assert searched(trial_records(study)) == {
        "moe.num_heads": CategoricalDistribution((1, 2, 4, 8)),
        "moe.top": IntDistribution(1, 4),
        "moe.rate": FloatDistribution(0.01, 0.5, log=True),
    }


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.floats(-10, 10), min_size=1, max_size=5)))
def test_the_variance_between_types_is_what_their_means_explain(groups: dict[str, list[float]]) -> None:
    """Eta squared is the squared correlation of the values with the means of their groups."""
    study = study_of("param_count")
    for name, values in groups.items():
        for value in values:
            add(study, value, model_type=name)
    found = explained_by_type(trial_records(study), 0)
    values = [value for group in groups.values() for value in group]
    means = [float(np.mean(group)) for group in groups.values() for _ in group]
    if len(groups) < 2:
        assert found is None
    elif found is not None and np.std(means) > 1e-6:
        assert found == pytest.approx(np.corrcoef(values, means)[0, 1] ** 2, abs=1e-6)


# ----------------------------------------------------------------------------------------------- axes and scales


def test_an_axis_has_the_values_where_they_belong() -> None:
    log = parameter_axis("lr", [1e-4, 1e-3, 1e-2], FloatDistribution(1e-4, 1e-2, log=True))
    assert log.positions == pytest.approx([0, 0.5, 1])
    assert [text for _, text in log.ticks] == ["0.0001", "0.001", "0.01"]
    whole = parameter_axis("layers", [1, 4, 3], IntDistribution(1, 4))
    assert whole.positions == pytest.approx([0, 1, 2 / 3])
    assert [text for _, text in whole.ticks] == ["1", "2", "3", "4"]
    choices = parameter_axis("name", ["b", None, 1, True], CategoricalDistribution(("b", None, 1, True)))
    assert choices.positions == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [text for _, text in choices.ticks] == ["b", "null", "1", "true"]


def test_trials_without_a_parameter_cross_its_axis_below_all_values() -> None:
    axis = parameter_axis("warmup", [0.0, ABSENT, 1.0], FloatDistribution(0, 1))
    low, absent, high = axis.positions
    assert absent == 0 < low < high == 1
    assert axis.ticks[0] == (0.0, "not used")
    assert all(at > 0 for at, _ in axis.ticks[1:])


@given(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12), st.booleans())
def test_ticks_lie_on_the_axis_and_are_few_and_different(low: float, high: float, log: bool) -> None:
    low, high = sorted((low, high))
    if high < low * 1.001:
        return
    ticks = round_numbers(low, high, log)
    assert 1 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))
    margin = 1e-6 * (high if log else high - low)
    assert all(low - margin <= tick <= high + margin for tick in ticks)
    assert len(set(tick_texts(ticks))) == len(ticks)


@given(st.lists(st.floats(-1e6, 1e6) | st.floats(1e-300, 1e300), min_size=1, max_size=20), st.sampled_from([F1, COST]))
def test_a_scale_shows_all_values_with_room_around_them(values: list[float], objective: str) -> None:
    scale = scale_of(values, objective)
    assert scale.low < min(values) <= max(values) < scale.high
    assert not (scale.log and objective == F1)
    assert all(map(scale.shows, values))


def test_costs_over_more_than_a_factor_of_ten_have_a_log_scale_and_scores_never() -> None:
    assert scale_of([0.01, 0.9], "final_val_loss").log
    assert not scale_of([0.01, 0.9], F1).log
    assert not scale_of([0.1, 0.9], "final_val_loss").log
    assert not scale_of([0.0, 0.9], "final_val_loss").log


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.sampled_from([F1, "final_val_loss"]))
def test_the_best_so_far_is_the_running_best(values: list[float], objective: str) -> None:
    numbers = random.Random(0).sample(range(100), len(values))
    steps = best_so_far(numbers, values, objective)
    better = max if direction(objective) == "maximize" else min
    for number in numbers:
        known = [value for at, value in zip(numbers, values, strict=True) if at <= number]
        assert [value for at, value in steps if at <= number][-1] == better(known)


def test_lines_are_coloured_by_how_good_they_are() -> None:
    study = study_of("final_val_loss")
    for value in (0.9, 0.1, 0.5):
        add(study, value, params={"moe.size": (1, IntDistribution(1, 3))}, model_type="moe")
    lines = parallel_coordinates_of(charts_of(study, "final_val_loss"), "moe")
    assert lines.goodness == pytest.approx([0, 1, 0.5])
    assert [axis.label for axis in lines.axes] == ["size", "final_val_loss"]
    assert lines.legend[0][0] > lines.legend[-1][0]  # the smallest loss is the best


def test_of_many_parameters_the_important_ones_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_charts, "MAX_AXES", 2)
    lines = parallel_coordinates_of(charts_of(sampled(60, [F1], ["dense"]), F1), "dense")
    assert len(lines.axes) == 3
    assert "lr" in [axis.label for axis in lines.axes]
    assert "the 2 most important of 9 parameters" in lines.title


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (COST, [(10.0, 0.5), (20.0, 0.8), (40.0, 0.9)]),
        ("inference_samples_per_second", [(40.0, 0.9)]),
    ],
)
def test_the_line_of_the_front_ends_where_the_picture_ends(second: str, expected: list[tuple[float, float]]) -> None:
    study = study_of(F1, second)
    for cost, score in ((10.0, 0.5), (20.0, 0.8), (30.0, 0.7), (40.0, 0.9)):
        add(study, [score, cost])
    scale = scale_of([10.0, 40.0], second)
    line = front_line(charts_of(study, F1, second), scale)
    cheap = direction(second) == "minimize"
    assert line == ([*expected, (scale.high, 0.9)] if cheap else [(scale.low, 0.9), *expected])


# ------------------------------------------------------------------------------------------------------ pictures

HOSTILE = "$x^{2$ </script><script>alert(1)</script> & {0} {title} %{x}"


@pytest.fixture(scope="module", name="drawn")
def _drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of pictures of a study with several types, objectives, states, and a hostile name."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = tmp_path_factory.mktemp("study")
    study = sampled(40, [F1, COST], ["dense", "moe"], name=HOSTILE)
    label = {f"dense.{HOSTILE}": (HOSTILE, CategoricalDistribution((HOSTILE, "$\\frac")))}
    add(study, [0.9, 500.0], params=label, experiment_ids=[HOSTILE], model_type="dense")
    add(study, [0.8, 600.0], model_type=HOSTILE)
    add(study, [0.95, 10.0], params=label, warm_start="a past run")
    files = StudyFiles.of(HOSTILE, "synthetic", HOSTILE, folder)
    written = write_results(study, [F1, COST], files, str(folder / "none.db"))
    names = ["history", "importance", "parallel_coordinates", "pareto"]
    assert written[1:] == [files.plots / f"{name}{end}" for end in (".png", ".html") for name in names]
    return files.plots


PAGES = ["history", "importance", "parallel_coordinates", "pareto"]


@pytest.mark.parametrize("name", PAGES)
def test_a_picture_is_a_png_of_some_size(drawn: Path, name: str) -> None:
    from matplotlib import image

    pixels = image.imread(drawn / f"{name}.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels.min() < 0.5 < pixels.max()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_for_nothing_but_its_own_script(drawn: Path, name: str) -> None:
    page = (drawn / f"{name}.html").read_text()
    script = [] if name == "parallel_coordinates" else [SCRIPT]
    links = [f"{other}.html" for other in PAGES]
    assert re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page) == ["data:,", *script, *links]
    assert not re.search(r"""(?:https?:)?//[a-z]|url\(|@import|fetch\(""", page)
    assert (drawn / SCRIPT).stat().st_size > 1_000_000


@pytest.mark.parametrize("name", PAGES)
def test_names_of_users_are_text_on_a_page(drawn: Path, name: str) -> None:
    page = (drawn / f"{name}.html").read_text()
    assert "<script>alert" not in page
    assert "<b>because" not in page
    assert page.count("</script>") == page.count("<script")
    assert "&lt;/script&gt;" in page


def figures(page: str) -> list[list[dict[str, Any]]]:
    """The data of the figures of a page."""
    found = []
    for start in re.finditer(r'Plotly\.newPlot\(\s*"[\w-]+",\s*', page):
        data, _ = json.JSONDecoder().raw_decode(page[start.end() :])
        found.append(data)
    return found


def test_the_history_shows_every_trial_of_the_study_once(drawn: Path) -> None:
    for data in figures((drawn / "history.html").read_text()):
        points = [trace for trace in data if trace["mode"] == "markers"]
        assert sorted(number for trace in points for number in trace["x"]) == list(range(42))
        assert not any("past run" in text for trace in points for text in trace["hovertext"])
        assert all("<" not in text.replace("<br>", "") for trace in points for text in trace["hovertext"])


def test_the_front_shows_every_finished_trial_once(drawn: Path) -> None:
    ((*data,),) = figures((drawn / "pareto.html").read_text())
    points = [trace for trace in data if trace["mode"] == "markers" and "hovertext" in trace]
    assert sum(len(trace["x"]) for trace in points) == sum(number % 7 < 4 for number in range(40)) + 2


def lines_of(page: str) -> list[list[ElementTree.Element]]:
    """The trials of each picture of parallel coordinates on a page."""
    pictures = [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    return [[part for part in picture if part.get("class") == "trial"] for picture in pictures]


def test_every_finished_trial_is_a_line_of_its_type(drawn: Path) -> None:
    found = lines_of((drawn / "parallel_coordinates.html").read_text())
    assert sum(map(len, found)) == sum(number % 7 < 4 for number in range(40)) + 2
    for lines in found:
        crossings = [[float(at) for at in line.get("data-at", "").split()] for line in lines]
        assert len({len(one) for one in crossings}) == 1, "every line crosses every axis"
        assert all(-0.03 <= at <= 1.03 for one in crossings for at in one)
        assert all(len(re.findall(r"[ML]", line.get("d", ""))) == len(crossings[0]) for line in lines)


def test_a_line_says_what_its_trial_is(drawn: Path) -> None:
    """Hostile names are text in SVG as well, and the best trial lies on top."""
    found = lines_of((drawn / "parallel_coordinates.html").read_text())
    titles = [line[0].text or "" for lines in found for line in lines]
    assert any(HOSTILE in title for title in titles)
    scores = [float(re.findall(rf"{F1} ([0-9.]+)", line[0].text or "")[0]) for line in found[0]]
    assert scores == sorted(scores)


def test_hundreds_of_trials_need_no_graphics_card(drawn: Path) -> None:
    page = (drawn / "parallel_coordinates.html").read_text()
    assert "Plotly" not in page, "its parallel coordinates take seconds to appear without one"


@pytest.mark.parametrize("colour", [colour_of(place / 10) for place in range(11)])
def test_lines_are_visible_on_white(colour: str) -> None:
    """A contrast of 2.5 or more: relative luminance as the guidelines for web content define it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) > 2.5


def test_shared_parameters_are_judged_over_all_types_together() -> None:
    """A rate that decides within each type is found, although the types differ by far more than it explains."""
    study = study_of(F1)
    rng = np.random.default_rng(0)
    for number in range(60):
        name, level = ("dense", 0.0) if number % 2 else ("moe", 10.0)
        rate, width = float(rng.uniform(0, 1)), int(rng.integers(1, 9))
        params = {
            "optimizer_params.lr": (rate, FloatDistribution(0, 1)),
            f"{name}.width": (width, IntDistribution(1, 8)),
        }
        if name == "moe":
            params["moe.top"] = (width % 3 + 1, IntDistribution(1, 3))
        add(study, level + rate, params=params, model_type=name)
    (found,) = charts_of(study, F1).pooled
    assert isinstance(found, dict)
    assert list(found) == ["optimizer_params.lr", "width"], "what one type alone has is not shared"
    assert found["optimizer_params.lr"].is_clear
    assert not found["width"].is_clear
    assert not charts_of(sampled(20, [F1], ["dense"]), F1).pooled, "one type shares nothing"


def test_a_list_without_a_clear_share_says_that_the_trials_do_not_suffice() -> None:
    study = study_of(F1)
    rng = np.random.default_rng(1)
    for _ in range(FEWEST):
        params = {f"dense.p{at}": (float(rng.uniform()), FloatDistribution(0, 1)) for at in range(10)}
        add(study, float(rng.uniform()), params=params, model_type="dense")
    charts = charts_of(study, F1)
    (found,) = charts.importances["dense"]
    assert isinstance(found, dict)
    assert any(one.is_clear for one in found.values()), "one of ten is above its own mark by chance"
    ((bars,),) = study_charts.importance_rows(charts)
    assert bars.note == f"{FEWEST} finished trials do not suffice: no share stands out from chance; and 2 more"
    assert len(bars.bars) == study_charts.MAX_BARS


@pytest.mark.parametrize("objectives", [(F1,), (F1, COST, "final_val_loss")])
def test_a_study_of_one_finished_trial_has_its_pictures(tmp_path: Path, objectives: tuple[str, ...]) -> None:
    study = study_of(*objectives)
    add(study, None, "pruned", reason="too many parameters")
    add(study, [0.5] * len(objectives), model_type="dense")
    files = StudyFiles.of("s", "synthetic", "parity", tmp_path)
    written = write_results(study, objectives, files, str(tmp_path / "none.db"))
    assert {path.stem for path in written[1:]} == set(PAGES[: 3 if len(objectives) == 1 else 4])
    again = {path: path.read_bytes() for path in written}
    write_results(study, objectives, files, str(tmp_path / "none.db"))
    assert {path: path.read_bytes() for path in written} == again  # equal data, equal files


def test_a_value_that_is_not_finite_is_no_point_of_a_picture(tmp_path: Path) -> None:
    study = study_of("final_val_loss")
    for value in (math.inf, 0.5, 0.4):
        add(study, value, model_type="dense")
    charts = charts_of(study, "final_val_loss")
    assert [record.number for record in charts.finished] == [1, 2]
    files = StudyFiles.of("s", "synthetic", "parity", tmp_path)
    assert len(write_results(study, ["final_val_loss"], files, str(tmp_path / "none.db"))) == 7
