"""What a reader has chosen survives: live updates, another visit, and a table of other columns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("starlette", reason="needs the extra `dashboard`")
from dashboard_site import STUDY, TRIALS, Site, Watched, browser, study_site

from research_eval.dashboard import queries
from research_eval.db_utils import DB_FILE, Store
from research_eval.runs.folder import claimed_folder
from research_eval.store.records import HistoryRow

UPDATES = 60
RUNS = 2 * TRIALS
LIVE = "20260103-000000-00000000"


def start(store: Store, experiment_id: str, name: str) -> None:
    """A run that has just begun."""
    sizes = {
        "model_type": "dense",
        "dataset_name": "parity",
        "dataset_type": "synthetic",
        "epochs": 3,
        "batch_size": 16,
    }
    store.start_experiment(
        experiment_id=experiment_id, run_type="json", experiment_name=name, seed=0, config={}, environment={}, **sizes
    )


@pytest.fixture
def watched(browser: Any, study_site: Site) -> Iterator[Watched]:
    found = Watched(browser, study_site)
    yield found
    found.close()


def heads(page: Any) -> list[str]:
    return page.locator("table.runs thead th button").all_text_contents()


def test_the_columns_are_chosen_and_remembered_and_stand_in_no_address(watched: Watched) -> None:
    page = watched.open("/runs?sort=final_val_f1", "runs")
    usual = heads(page)
    assert usual[:6] == ["id", "name", "model", "data", "status", "seed"]
    page.locator("#columns summary").click()
    page.locator("#columns").get_by_label("final_val_loss").check()
    page.locator("table.runs thead").get_by_text("final_val_loss").wait_for()
    assert page.locator("#columns").get_by_label("final_val_loss").is_checked(), "the chooser stays open"
    assert page.locator("#columns").get_by_label("test_f1").count() == 0
    page.locator("#columns").get_by_label("data").uncheck()
    page.locator("table.runs thead").get_by_text("data", exact=True).wait_for(state="detached")
    chosen = [*(name for name in usual if name != "data"), "final_val_loss"]
    assert heads(page) == chosen
    assert page.url.endswith("/runs?sort=final_val_f1")
    cells = page.locator("table.runs tbody tr").nth(1).locator("td").all_text_contents()
    assert float(cells[-1]) == pytest.approx(1 - float(cells[chosen.index("final_val_f1") + 1]), abs=1e-3)
    watched.open("/runs", "runs")
    assert heads(page) == chosen, "another visit"
    page.evaluate('localStorage.setItem(\'goe-columns\', \'{"fixed": ["name"], "metrics": ["gone"]}\')')
    watched.open("/runs", "runs")
    assert heads(page) == ["id", "name"], "a metric that this store lacks is left out"
    page.locator("#columns summary").click()
    page.get_by_role("button", name="usual columns").click()
    page.locator("table.runs thead").get_by_text("status").wait_for()
    assert heads(page) == usual


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("test_f1", "columns: 'test_f1' is a score of the test split"),
        ("nothing", "columns: no metric 'nothing'"),
        (",".join(f"m{number}" for number in range(21)), "columns: expected at most 20"),
    ],
)
def test_columns_that_nobody_may_choose_are_refused(study_site: Site, columns: str, words: str) -> None:
    status, content, _ = study_site.fetch(f"/api/runs?columns={columns}")
    assert status == 400
    assert words in content["error"]


def test_a_choice_in_the_table_survives_live_updates(watched: Watched, study_site: Site) -> None:
    """Sixty runs begin while a reader has filtered, chosen runs and scrolled, and types."""
    page = watched.page
    page.clock.install()
    with Store(str(study_site.folder / DB_FILE)) as store, claimed_folder(LIVE):
        start(store, LIVE, STUDY)
        watched.open(f"/runs?q={quote(STUDY)}", "runs")
        page.get_by_label("choose 20260102-000050-00000001").check()
        scroller = page.locator(".scroller")
        scroller.evaluate("(node) => { node.scrollTop = 900; }")
        row = page.get_by_role("link", name="20260102-000035-00000001")
        page.clock.run_for(100)
        where = page.get_by_role("textbox", name="where")
        where.fill("final_val")
        before = row.bounding_box()["y"]
        for number in range(UPDATES):
            start(store, f"20260103-{number:06}-00000009", STUDY)
            page.clock.fast_forward(2000)
            page.locator(".bar").get_by_text(f"{RUNS + 2 + number} runs").wait_for()
            if number == UPDATES // 2:
                assert page.locator(":focus").input_value() == "final_val", "a filter that is being typed"
                where.fill("")
                row.focus()
    assert page.locator(":focus").inner_text() == "20260102-000035-00000001"
    assert row.bounding_box()["y"] == pytest.approx(before, abs=2), "the rows that are read stay where they are"
    assert page.get_by_role("textbox", name="name").input_value() == STUDY
    scroller.evaluate("(node) => { node.scrollTop = 0; }")
    page.clock.run_for(100)
    page.get_by_role("link", name="20260103-000059-00000009").wait_for()
    assert "sel=20260102-000050-00000001" in page.url


def test_a_choice_on_a_run_survives_live_updates(
    watched: Watched, study_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "HISTORY_SECONDS", 0.0)
    run, page = "20260104-000000-00000000", watched.page
    page.clock.install()
    with Store(str(study_site.folder / DB_FILE)) as store, claimed_folder(run):
        start(store, run, "live")
        store.add_history(run, [HistoryRow(1, 0.1, name, 1.0) for name in ("train_loss", "val_loss", "val_f1")])
        watched.open(f"/run/{run}?smooth=0.6", "run")
        page.get_by_label("series").select_option("train_loss")
        page.locator("summary").get_by_text("Config").click()
        page.locator("summary").get_by_text("Environment").focus()
        page.evaluate("window.scrollTo(0, 120)")
        page.evaluate("getSelection().selectAllChildren(document.querySelector('h1'))")
        at = page.evaluate("scrollY")
        for number in range(UPDATES):
            store.add_history(run, [HistoryRow(2 + number, 0.2, "train_loss", 2.0 + number)])
            page.clock.fast_forward(1000)
            page.locator("#curves .tick").get_by_text(str(2 + number), exact=True).first.wait_for()
    assert page.get_by_label("series").input_value() == "train_loss"
    assert page.get_by_label("smooth").input_value() == "0.6"
    assert page.locator("#curves .chart").count() == 1
    assert page.locator(":focus").inner_text() == "Environment"
    assert page.locator("details[open]").count() == 2, "metrics, and the config that was opened"
    assert page.evaluate("String(getSelection())") == "live"
    assert page.evaluate("scrollY") == at
    assert re.search(r"series=train_loss", page.url)
