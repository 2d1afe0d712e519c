"""Access for everyone: axe-core on all pages in both themes, keys alone, no motion, the graph as a table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `dashboard`")
from dashboard_site import THEMES, Site, Watched, browser, findings, site
from support import command

from research_eval.cli.app import goe


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing_serious(browser: Any, site: Site, theme: str, tmp_path: Path) -> None:
    out = tmp_path / "atlas.html"
    assert command(goe, "atlas", "--run", site.goe, "--out", str(out)).code == 0
    pages = [
        ("/runs?sort=final_val_f1", "runs"),
        ("/runs?group=seed", "runs"),
        (f"/compare?sel={site.goe},{site.moe}", "compare"),
        (f"/run/{site.goe}", "run"),
        ("/run/none", "error"),
        (f"/atlas/{site.goe}", "atlas"),
        (f"/atlas/{site.goe}?node=1.0&correct=1", "atlas"),
        (f"/atlas/{site.goe}?sample=3&with={site.twin}", "atlas"),
        (f"/atlas/{site.moe}?sample=2", "atlas"),
    ]
    if theme == "dark":  # one of each kind
        pages = [pages[0], *pages[2:4], pages[6]]
    found = {}
    for path, name in pages:
        watched = Watched(browser, site, color_scheme=theme)
        page = watched.open(path, name)
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        page.locator("#columns .columns label").first.wait_for() if "sort" in path else None
        found[path] = findings(page, theme)
        page.close()
    page = browser.new_page(color_scheme=theme)
    for state in ("", "#node=1.0", "#sample=1") if theme == "light" else ("#node=1.0",):
        page.goto("about:blank")
        page.goto(out.as_uri() + state)
        page.locator('html[data-ready="atlas"]').wait_for(state="attached")
        found[f"file {state}"] = findings(page, theme)
    page.close()
    assert {path: problems for path, problems in found.items() if problems} == {}


def tab_to(page: Any, target: Any, backwards: bool = False) -> None:
    """Press Tab until the target has the focus."""
    for _ in range(120):
        page.keyboard.press("Shift+Tab" if backwards else "Tab")
        if target.evaluate("(node) => node === document.activeElement"):
            return
    pytest.fail(f"no Tab leads to {target}")


def test_the_whole_way_can_be_gone_with_keys_alone(browser: Any, site: Site) -> None:
    watched = Watched(browser, site)
    page = watched.open("/runs", "runs")
    tab_to(page, page.get_by_role("button", name="final_val_f1"))
    page.keyboard.press("Enter")
    page.wait_for_url("**sort=final_val_f1**")
    watched.ready("runs")
    assert page.locator(":focus").inner_text() == "final_val_f1", "the focus outlives the new order"
    for name in sorted((site.goe, site.moe), key=lambda one: page.content().index(f"choose {one}")):
        tab_to(page, page.get_by_label(f"choose {name}", exact=True))
        page.keyboard.press("Space")
    page.keyboard.press("Shift+Tab")
    page.reload()  # the focus begins at the top again
    watched.ready("runs")
    tab_to(page, page.locator("#compare"))
    page.keyboard.press("Enter")
    watched.ready("compare")
    tab_to(page, page.get_by_role("link", name=site.goe))
    page.keyboard.press("Enter")
    watched.ready("run")
    tab_to(page, page.locator("#atlas"))
    page.keyboard.press("Enter")
    watched.ready("atlas")
    page.locator("[data-sample]").first.wait_for()
    tab_to(page, page.locator('.node[tabindex="0"]'))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_url("**node=2.**")
    watched.ready("atlas")
    tab_to(page, page.locator("#forbid"))
    page.keyboard.press("Escape")
    page.wait_for_url(lambda url: "node=" not in url)
    tab_to(page, page.locator("[data-sample]").nth(1))
    page.keyboard.press("Enter")
    page.wait_for_url("**sample=1**")
    page.locator("#panel").get_by_text("step 2:").wait_for()
    assert page.locator(":focus").get_attribute("data-sample") == "1", "the focus outlives the redraw"
    tab_to(page, page.get_by_role("button", name="close"), backwards=True)
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: "sample=" not in url)
    page.locator("[data-sample='1']:focus").wait_for()
    watched.close()


def test_the_graph_is_a_table_too(browser: Any, site: Site) -> None:
    watched = Watched(browser, site)
    page = watched.open(f"/atlas/{site.goe}", "atlas")
    page.locator("#flows summary").click()
    assert page.locator("#flows thead th").all_text_contents() == [
        *("from", "to", "samples", "share of all", "share of from")
    ]
    rows = [row.locator("td").all_text_contents() for row in page.locator("#flows tbody tr").all()]
    count = {(one, other): int(number.replace(",", "")) for one, other, number, *_ in rows}
    total = int(page.locator("#said").inner_text().split(" of ")[0].replace(",", ""))
    assert sum(number for (one, _), number in count.items() if one == "input") == total
    assert sum(number for (_, other), number in count.items() if other.endswith("answer")) == total
    spoken = page.locator(".node[role=button]").all()
    for name in (node.get_attribute("aria-label") for node in spoken):
        expert, number = re.match(r"(.*): ([\d,]+) samples", name).groups()
        assert sum(n for (_, other), n in count.items() if other == expert) == int(number.replace(",", ""))
    page.get_by_label("answer").select_option("1")
    page.wait_for_url("**correct=1**")
    watched.ready("atlas")
    assert page.locator("#flows[open] tbody").count() == 1, "an open table stays open"
    assert "wrong answer" not in page.locator("#flows").inner_text()
    watched.close()


def test_nothing_moves_for_those_who_want_no_motion(browser: Any, site: Site) -> None:
    for motion, is_off in (("no-preference", False), ("reduce", True)):
        watched = Watched(browser, site, reduced_motion=motion)
        page = watched.open(f"/atlas/{site.goe}", "atlas")
        assert page.locator("#play").is_disabled() is is_off
        watched.close()
