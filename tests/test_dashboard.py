"""The dashboard and the Path Atlas: what the server answers and refuses, what the page computes, and how it behaves.

Tests with a browser need the packages of `requirements-dev.txt` and Chromium.

S samples  T steps of a path
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.optimize import linear_sum_assignment
from support import command

from research_eval.analysis.statistics import holm, mcnemar, wilson_interval
from research_eval.cli.app import goe
from research_eval.db_utils import DB_FILE, Store
from research_eval.errors import ConfigError
from research_eval.routing.trace_files import read_trace
from research_eval.runs.folder import claimed_folder
from research_eval.store.records import HistoryRow, RunFilter

pytest.importorskip("starlette", reason="needs the extra `dashboard`")
from dashboard_site import HOSTILE, Site, Watched, browser, served, site, watched
from test_dashboard_live import start

from research_eval import files
from research_eval.dashboard import atlas, queries, server
from research_eval.dashboard.export import bundle
from research_eval.dashboard.server import Options

STATIC = queries.static_folder()
STATES = 30 if int(os.environ.get("GOE_REPETITIONS", "1")) > 1 else 6


def numbers(columns: dict[str, dict[str, str]], name: str) -> Any:
    """A column that was sent to the page."""
    return np.frombuffer(base64.b64decode(columns[name]["data"]), columns[name]["type"])


# ------------------------------------------------------------------------------------------------------ the answers


def test_the_table_of_runs_is_that_of_the_store(site: Site) -> None:
    everything = site.get("/api/runs")
    assert everything["total"] == 5
    assert {row["id"] for row in everything["rows"]} == {site.goe, site.moe, site.twin, site.hostile, site.running}
    with Store(DB_FILE, read_only=True) as store:
        by_score = store.find_runs(RunFilter(), sort="final_val_f1", descending=True)
    found = site.get("/api/runs?sort=final_val_f1")["rows"]
    assert [row["id"] for row in found][:4] == [row["experiment_id"] for row in by_score][:4]
    windows = [site.get(f"/api/runs?sort=final_val_f1&offset={offset}&limit=2")["rows"] for offset in (0, 2, 4)]
    assert [row["id"] for window in windows for row in window] == [row["id"] for row in found]
    by_name = [site.get(f"/api/runs?sort=name&offset={offset}&limit=2")["rows"] for offset in (0, 2, 4)]
    assert [row["id"] for rows in by_name for row in rows] == [
        row["id"] for row in site.get("/api/runs?sort=name")["rows"]
    ]
    assert [row["id"] for row in site.get("/api/runs?model=moe")["rows"]] == [site.moe]
    assert site.get("/api/runs?q=script")["rows"][0]["name"] == HOSTILE
    best = max(row["metrics"]["final_val_f1"] for row in found if row["metrics"])
    assert site.get(f"/api/runs?where=final_val_f1>={best - 1e-9}")["total"] >= 1


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/api/runs?limit=x", "limit: expected a whole number"),
        ("/api/runs?limit=501", "limit: expected a whole number from 1 to 500"),
        ("/api/runs?offset=-1", "offset"),
        ("/api/runs?sort=test_f1", "test"),
        ("/api/runs?where=nonsense", "where"),
        ("/api/runs?status=lost", "status"),
        ("/api/run/{goe}/history?since=1e9", "since"),
        ("/api/run/{goe}/atlas/99", "epoch 99 was not traced"),
        ("/api/run/{goe}/atlas/1/5000", "sample: expected a number"),
        ("/api/run/{running}/atlas", "trace_routing"),
    ],
)
def test_a_bad_question_is_answered_with_what_is_wrong(site: Site, path: str, words: str) -> None:
    status, content, _ = site.fetch(path.format(goe=site.goe, running=site.running))
    assert status == 400
    assert words in content["error"]


def test_groups_are_all_runs_of_a_config(site: Site) -> None:
    found = site.get("/api/groups?data=planted_paths")
    groups = {group["model"]: group for group in found["groups"]}
    assert [member["id"] for member in groups["goe_original"]["runs"]] == [site.goe, site.twin]
    assert groups["goe_original"]["n"] == 2
    assert groups["moe"]["n"] == 1
    values = [member["value"] for member in groups["goe_original"]["runs"]]
    assert groups["goe_original"]["mean"] == pytest.approx(np.mean(values))


def test_live_points_come_by_a_cursor_and_begin_anew_after_a_resume(site: Site) -> None:
    first = site.get(f"/api/run/{site.running}/history?since=-1")
    assert first["status"] in ("running", "interrupted")  # no process holds its folder
    assert [step for step, *_ in first["series"]["train_loss"]] == [1, 2, 3]
    assert site.get(f"/api/run/{site.running}/history?since={first['since']}")["series"] == {}
    histories = queries.Histories(lambda: Store(DB_FILE, read_only=True))
    histories.behind(site.running, -1)
    with Store(DB_FILE) as store:
        store.add_history(site.running, [HistoryRow(4, 0.4, "train_loss", 0.2)])
        histories._known[site.running].read_at = -math.inf
        assert histories.behind(site.running, 3)["series"] == {"train_loss": [[4, 0.4, 0.2]]}
        before = histories.behind(site.running, 4)["start"]
        store.truncate_history(site.running, 2)
        store.take_over(site.running)
    histories._known[site.running].read_at = -math.inf
    again = histories.behind(site.running, -1)
    assert again["start"] == before + 1
    assert [step for step, *_ in again["series"]["train_loss"]] == [1, 2]


def test_results_that_take_the_place_of_others_are_the_ones_shown(tmp_path: Path) -> None:
    here, there = str(tmp_path / "here.db"), tmp_path / "there.db"
    Store(here).close()
    pages = server.Pages(Options(db=here))
    opened = pages._store()
    assert pages._store() is opened
    with Store(str(there)) as store:
        start(store, "new", "a name")
    there.replace(here)
    assert [row["experiment_id"] for row in pages._store().experiments()] == ["new"]


def test_the_columns_of_an_epoch_are_those_of_its_trace(site: Site) -> None:
    for name in (site.goe, site.moe):
        epoch = list(read_trace(Path("runs") / name))[-1]
        found = site.get(f"/api/run/{name}/atlas/{epoch.epoch}")
        table = epoch.samples.to_pydict()
        paths_ST = numbers(found["columns"], "path").reshape(found["samples"], found["steps"])
        assert [[expert for expert in path if expert >= 0] for path in paths_ST.tolist()] == table["path"]
        assert numbers(found["columns"], "prediction").tolist() == table["prediction"]
        assert numbers(found["columns"], "correct").astype(bool).tolist() == table["correct"]
        assert numbers(found["columns"], "loss") == pytest.approx(table["loss"], rel=1e-6)
        given = table["probabilities" if name == site.goe else "expert_share"]
        chosen_ST = numbers(found["columns"], "chosen").reshape(paths_ST.shape) / 255
        assert chosen_ST[5, 0] == pytest.approx(given[5][0][paths_ST[5, 0]], abs=1 / 255)
        assert found["experts"] == (4 if name == site.goe else 3)
        assert found["about_tokens"] == (name == site.moe)
        row = site.get(f"/api/run/{name}/atlas/{epoch.epoch}/5")
        assert row["path"] == table["path"][5]
        assert np.allclose(row["probabilities" if name == site.goe else "expert_share"], given[5], atol=1e-6)
    samples = site.get(f"/api/run/{site.goe}/samples")
    offsets = numbers(samples["columns"], "offsets")
    assert len(offsets) == found["samples"] + 1
    epochs = site.get(f"/api/run/{site.goe}/atlas")["epochs"]
    assert [one["epoch"] for one in epochs] == [1, 2, 3]
    assert sum(one["saved"] for one in epochs) == 1


def test_a_damaged_trace_is_said_and_the_other_epochs_are_shown(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(site.folder / "runs" / site.goe, folder)
    routing = folder / "routing"
    good = [one["epoch"] for one in atlas.epoch_list(folder)]
    summary = routing / f"epoch_{good[0]:04}.json"
    text = summary.read_text()
    summary.write_text(text.replace('"epoch":', '"router_entropy": NaN, "epoch":', 1))
    assert len(atlas.epoch_list(folder)) == len(good), "a figure that is no number is left out"
    for damage in ("[]", "{", '{"epoch": "1"}', "[" * 10_000):
        summary.write_text(damage)
        assert [one["epoch"] for one in atlas.epoch_list(folder)] == good[1:]
        with pytest.raises(ConfigError, match=summary.name):
            atlas.epoch_columns(folder, good[0])
    summary.write_text(text)
    table = routing / f"epoch_{good[0]:04}.parquet"
    content = table.read_bytes()
    other = io.BytesIO()
    pq.write_table(pa.table({"path": [1, 2], "loss": ["a", "b"]}), other)
    for damage in (content[: len(content) // 2], b"", other.getvalue()):
        table.write_bytes(damage)
        with pytest.raises(ConfigError, match=table.name):
            atlas.epoch_columns(folder, good[0])
    samples = routing / "samples.parquet"
    for damage in (b"PAR1", other.getvalue()):
        samples.write_bytes(damage)
        with pytest.raises(ConfigError, match=samples.name):
            atlas.samples_of(folder)


def test_a_probe_without_a_change_is_the_trace_and_one_with_a_change_is_another_answer(site: Site) -> None:
    saved = next(one["epoch"] for one in site.get(f"/api/run/{site.goe}/atlas")["epochs"] if one["saved"])
    traced = site.get(f"/api/run/{site.goe}/atlas/{saved}")["columns"]
    status, same = site.probe(site.goe, kind="none")
    assert status == 200, same
    for column in ("prediction", "path", "correct"):
        assert (numbers(same["columns"], column) == numbers(traced, column)).all()
    used = int(numbers(traced, "path")[0])
    _, without = site.probe(site.goe, kind="forbid", expert=used)
    assert used not in numbers(without["columns"], "path")
    _, forced = site.probe(site.goe, kind="path", path=[1, 2])
    assert (numbers(forced["columns"], "path").reshape(-1, 2) == [1, 2]).all()
    for body, words in (
        ({"kind": "skip", "expert": 99}, "there is no expert 99"),
        ({"kind": "skip"}, "needs expert"),
        ({"kind": "burn"}, "kind: expected one of"),
        ({"kind": "path", "path": [1] * 9}, "a path has 1 to 2 experts"),
        ({"kind": "skip", "expert": "1"}, "expected whole numbers"),
    ):
        status, answer = site.probe(site.goe, **body)
        assert status == 400, body
        assert words in answer["error"]
    _, tokens = site.probe(site.moe, kind="tokens", sample=5)
    shares = site.get(f"/api/run/{site.moe}/atlas/3/5")["expert_share"]
    assert len(tokens["layers"]) == len(shares) == 2
    assert "for tokens" in site.probe(site.goe, kind="tokens", sample=5)[1]["error"]
    assert "sample" in site.probe(site.moe, kind="tokens", sample=10**5)[1]["error"]
    status, answer = site.probe(site.running, kind="none")
    assert (status, "its weights are not here" in answer["error"]) == (400, True)


# ----------------------------------------------------------------------------------------------------- the refusals


def test_foreign_names_paths_and_pages_are_refused(site: Site) -> None:
    assert site.fetch("/runs", Host="evil.example")[0] == 421
    assert site.fetch("/api/runs", Host="evil.example:80")[0] == 421
    assert site.fetch("/api/runs", Host="localhost:9")[0] == 200
    for path in (
        *("/api/run/..%2f..%2fetc/history", "/api/run/%2fetc%2fpasswd", "/api/run/a%00b", "/api/run/%2e%2e"),
        *("/static/..%2fserver.py", "/static/%2fetc%2fpasswd", "/static/index.html", "/api/nothing", "/api/run/none"),
        *("/api/study/none", "/api/compare?sel=../x", f"/api/run/{'a' * 101}"),
    ):
        status, content, _ = site.fetch(path)
        assert status == 404, (path, content)
    link = Path("runs") / "linked"
    link.symlink_to(Path("runs").resolve() / site.goe)
    try:
        assert site.fetch("/api/run/linked/atlas")[0] == 400
        assert queries.traced_epochs("linked") == []
    finally:
        link.unlink()
    status, _, headers = site.fetch("/runs")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
    assert site.fetch(f"/api/run/{site.goe}/probe", {"kind": "none"})[0] == 403
    assert site.fetch(f"/api/run/{site.goe}/probe", {"kind": "none"}, **{"x-goe-page": "guess"})[0] == 403
    connection = HTTPConnection(site.address.removeprefix("http://").rstrip("/"))
    for method in ("PUT", "DELETE", "POST"):
        connection.request(method, "/api/runs")
        assert connection.getresponse().read() is not None
        connection.request(method, "/api/runs")
        assert connection.getresponse().status == 405
        connection.close()


def test_another_address_needs_the_token_and_gets_no_evaluations(site: Site) -> None:
    options = Options(DB_FILE, host="0.0.0.0", port=0)
    address, _ = served(options)
    port = int(re.findall(r":(\d+)/", address)[0])
    assert address.endswith(f"?token={options.token}")

    def ask(path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", port)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return found

    assert ask("/api/runs")[0] == 403
    assert ask("/api/runs?token=wrong")[0] == 403
    status, headers, _ = ask(f"/runs?token={options.token}")
    assert status == 303
    assert "HttpOnly" in headers["set-cookie"]
    assert "samesite=strict" in headers["set-cookie"].lower()
    cookie = headers["set-cookie"].split(";")[0]
    assert ask("/api/runs", Cookie=cookie)[0] == 200
    choices = json.loads(ask("/api/choices", Cookie=cookie)[2])
    assert choices["probes"] is False
    assert Options(host="0.0.0.0", allow_probes=True).has_probes
    assert Options().has_probes


def test_mistakes_of_the_command_are_messages(site: Site, tmp_path: Path) -> None:
    port = site.address.rstrip("/").rpartition(":")[2]
    for words, text in (
        (["dashboard", "--port", port], "cannot be used"),
        (["dashboard", "--runs", str(tmp_path / "none")], "--runs: "),
        (["dashboard", "--port", "70000"], "--port: expected a number"),
        (["dashboard", "--db", str(tmp_path / "none.db")], "none.db"),
        (["atlas", "--run", site.running], "trace_routing"),
        (["atlas", "--run", site.goe, "--epoch", "9"], "epoch 9 was not traced"),
    ):
        ended = command(goe, *words)
        assert (ended.code, text in ended.err) == (2, True), ended.err


def test_the_folder_of_the_runs_can_be_named(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RUNS_FOLDER", files.RUNS_FOLDER)
    monkeypatch.setenv("GOE_RUNS", "")
    shutil.copytree(Path("runs") / site.goe, tmp_path / "elsewhere" / "copied")
    seen: list[list[int]] = []
    monkeypatch.setattr(server, "serve", lambda options, ready: seen.append(queries.traced_epochs("copied")))
    assert command(goe, "dashboard", "--runs", str(tmp_path / "elsewhere")).code == 0
    assert seen == [[1, 2, 3]]
    assert os.environ["GOE_RUNS"] == str(tmp_path / "elsewhere"), "for the process of the evaluations"


def test_the_scripts_make_no_markup_of_texts_and_name_no_address() -> None:
    for path in STATIC.iterdir():
        text = path.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert word not in text, (path.name, word)
        assert set(re.findall(r"https?://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"}, path.name


def test_a_module_of_the_bundle_uses_earlier_ones_only() -> None:
    text = bundle()
    assert not re.search(r"^(import|export) ", text, re.MULTILINE)
    names = re.findall(r"^(?:async )?(?:function|const|class|let) (\w+)", text, re.MULTILINE)
    assert len(names) == len(set(names)), "two modules have one name"


# ----------------------------------------------------------------------------------------- what the page computes


def in_node(script: str, value: Any) -> Any:
    """The result of a script of the page: `stats` is the module, `given` a value."""
    driver = pytest.importorskip("playwright._impl._driver", reason="needs playwright, which has a JavaScript engine")
    node = driver.compute_driver_executable()
    program = (
        f"import * as stats from {json.dumps((STATIC / 'stats.js').as_uri())};\nimport fs from 'node:fs';\n"
        f"const given = JSON.parse(fs.readFileSync(0));\nconsole.log(JSON.stringify({script}));"
    )
    done = subprocess.run(
        [str(node[0] if isinstance(node, tuple) else node), "--input-type=module", "-e", program],
        input=json.dumps(value),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NODE_NO_WARNINGS": "1"},
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("share", [0.25, 0.65])  # the page draws the smaller part: the node or all others
def test_enrichment_is_that_of_numpy(share: float) -> None:
    rng = np.random.default_rng(0)
    kind_U = rng.integers(5, size=400)
    inside_U = (rng.random(400) < np.where(kind_U == 2, share + 0.3, share)).astype(int)
    members = [np.flatnonzero(kind_U == kind).tolist() for kind in range(5)]
    members += [np.flatnonzero(kind_U % 2 == 0).tolist(), []]  # tokens: a sample has several, or none
    found = in_node(
        "stats.enrichment(given.members, given.inside, 1000)", {"members": members, "inside": inside_U.tolist()}
    )
    total, node = 400, int(inside_U.sum())

    def scores(mask_U: np.ndarray) -> np.ndarray:
        size_K = np.array([len(places) for places in members])
        both_K = np.array([mask_U[places].sum() for places in members])
        mean_K = node * size_K / total
        variance_K = mean_K * (total - size_K) * (total - node) / (total * (total - 1))
        return (both_K - mean_K) / np.sqrt(np.maximum(variance_K, 1e-12))

    assert [row["z"] for row in found["rows"]] == pytest.approx(scores(inside_U), abs=1e-9)
    band = np.percentile([np.abs(scores(rng.permutation(inside_U))).max() for _ in range(4000)], 95)
    assert found["band"] == pytest.approx(band, rel=0.06)
    assert [row["outside"] for row in found["rows"]][2] is True


def test_without_a_signal_few_panels_show_anything() -> None:
    rng = np.random.default_rng(1)
    cases = []
    for _ in range(200):
        kind_U, inside_U = rng.integers(16, size=300), rng.integers(2, size=300)
        cases.append(
            {"members": [np.flatnonzero(kind_U == k).tolist() for k in range(16)], "inside": inside_U.tolist()}
        )
    found = in_node(
        "given.map((one, n) => stats.enrichment(one.members, one.inside, 300, n + 1).rows.some((row) => row.outside))",
        cases,
    )
    low, high = wilson_interval(sum(found), len(found))
    assert low <= 0.05 <= high


def test_intervals_tests_and_assignments_are_those_of_python() -> None:
    rng = np.random.default_rng(2)
    pairs = [(0, 0), (0, 5), (3, 10), (10, 10), (400, 1000)]
    for (hits, trials), found in zip(pairs, in_node("given.map(([a, b]) => stats.wilson(a, b))", pairs), strict=True):
        assert found == pytest.approx(wilson_interval(hits, trials) if trials else (0, 1), abs=1e-9)
    changes = [(0, 0), (1, 0), (3, 9), (40, 41), (100, 300)]
    assert in_node("given.map(([a, b]) => stats.mcnemar(a, b))", changes) == pytest.approx(
        [mcnemar(a, b) for a, b in changes], rel=1e-6
    )
    values = rng.random(7).tolist()
    assert in_node("stats.holm(given)", values) == pytest.approx(holm(values), abs=1e-12)
    costs = [rng.random((size, size)).tolist() for size in (1, 2, 5, 9)]
    for cost, order in zip(costs, in_node("given.map(stats.assignment)", costs), strict=True):
        best = np.array(cost)[linear_sum_assignment(np.array(cost))].sum()
        assert sum(row[place] for row, place in zip(cost, order, strict=True)) == pytest.approx(best)
    first = rng.integers(4, size=200)
    second = np.array([2, 0, 3, 1])[first]
    found = in_node("stats.matching(given[0], given[1], 2, 4)", [first.tolist(), second.tolist()])
    assert (found["order"], found["overlap"], found["fits"]) == ([2, 0, 3, 1], 1, True)
    before, after = rng.integers(2, size=60), rng.integers(2, size=60)
    change = in_node(
        "stats.pairedChange(given[0], given[1], given[2])", [before.tolist(), after.tolist(), list(range(60))]
    )
    difference = after - before
    assert change["mean"] == pytest.approx(difference.mean())
    assert change["half"] == pytest.approx(1.959964 * difference.std(ddof=1) / math.sqrt(60), rel=1e-6)


def test_runs_without_a_connection_are_seldom_matched() -> None:
    """The best numbers for two unrelated runs agree more than random numbers do; that is no match."""
    rng = np.random.default_rng(4)
    pairs = [(rng.integers(4, size=200).tolist(), rng.integers(4, size=200).tolist()) for _ in range(200)]
    found = in_node("given.map(([a, b], n) => stats.matching(a, b, 2, 4, 100, n + 1))", pairs)
    low, high = wilson_interval(sum(one["fits"] for one in found), len(found))
    assert low <= 0.05 <= high
    assert np.mean([one["overlap"] > one["chance"] for one in found]) > 0.9


def test_runs_with_other_samples_are_matched_by_the_classes_of_their_experts() -> None:
    rng = np.random.default_rng(5)

    def drawn(order: list[int] | None, samples: int) -> dict[str, Any]:
        """Two steps; expert order[k] gets class k in three of four cases, or any expert any class."""
        label = rng.integers(4, size=samples)
        path_ST = rng.integers(4, size=(samples, 2))
        if order is not None:
            path_ST = np.where(rng.random((samples, 2)) < 0.75, np.array(order)[label][:, None], path_ST)
        return {"path": path_ST.ravel().tolist(), "label": label.tolist(), "steps": 2}

    pair = [drawn([0, 1, 2, 3], 300), drawn([2, 0, 3, 1], 240)]
    found = in_node("stats.profileMatching(given[0], given[1], 4)", pair)
    assert (found["order"], found["fits"]) == ([2, 0, 3, 1], True)
    assert found["overlap"] > found["band"] > found["chance"]
    unlike = [(drawn([0, 1, 2, 3], 200), drawn(None, 200)) for _ in range(200)]
    fits = in_node("given.map(([a, b], n) => stats.profileMatching(a, b, 4, 100, n + 1).fits)", unlike)
    low, high = wilson_interval(sum(fits), len(fits))
    assert low <= 0.05 <= high


# --------------------------------------------------------------------------------------------------- in a browser


def test_the_table_sorts_filters_groups_and_compares(watched: Watched, site: Site) -> None:
    page = watched.open("/runs", "runs")
    assert page.locator("tbody a").count() == 5
    assert page.get_by_text(HOSTILE, exact=True).count() == 1, "a name is text"
    page.get_by_role("button", name="final_val_f1").click()
    page.wait_for_url("**sort=final_val_f1**")
    page.get_by_label("model").select_option("goe_original")
    page.wait_for_url("**model=goe_original**")
    watched.ready("runs")
    assert page.locator("tbody a").count() == 3
    for name in (site.goe, site.twin):
        page.get_by_label(f"choose {name}", exact=True).check()
    page.locator("#compare").click()
    watched.ready("compare")
    assert page.get_by_role("heading", name="2 runs side by side").count() == 1
    assert page.locator(".chart").count() >= 1
    page.go_back()
    watched.ready("runs")
    assert page.get_by_label(f"choose {site.goe}", exact=True).is_checked(), "the address holds the choice"
    page.get_by_label("show").select_option("seed")
    page.locator("table.groups").wait_for()
    assert "2" in page.locator("table.groups tbody tr").first.inner_text()


def test_a_run_shows_its_curves_and_leads_to_its_atlas(watched: Watched, site: Site) -> None:
    page = watched.open(f"/run/{site.goe}", "run")
    assert page.locator("#curves .chart").count() >= 4
    page.get_by_label("series").select_option("train_loss")
    assert page.locator("#curves .chart").count() == 1
    assert page.get_by_text("null", exact=True).count() == 0
    page.locator("#atlas").click()
    watched.ready("atlas")
    assert page.locator(".graph").count() == 1


def test_an_expert_is_chosen_by_mouse_and_by_keyboard(watched: Watched, site: Site) -> None:
    page = watched.open(f"/atlas/{site.goe}", "atlas")
    nodes = page.locator(".node[role=button]")
    name = nodes.first.get_attribute("aria-label")
    assert re.fullmatch(r"expert \d at step 1: \d+ samples, \d+\.\d %", name)
    nodes.first.click()
    page.locator("#panel h2").get_by_text("Expert").wait_for()
    assert "node=1." in page.url
    assert page.locator("#panel table.shares").count() >= 2, "classes and tokens"
    page.keyboard.press("Escape")
    page.wait_for_url(lambda url: "node=" not in url)
    page.locator('.node[tabindex="0"]').focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_url("**node=2.**")
    focused = page.locator(":focus")
    assert focused.get_attribute("data-node").startswith("2."), "the focus outlives the redraw"
    page.go_back()
    page.wait_for_url(lambda url: "node=" not in url)


def test_filters_and_epochs_change_what_is_drawn(watched: Watched, site: Site) -> None:
    page = watched.open(f"/atlas/{site.goe}", "atlas")
    count = page.locator("#said").inner_text
    total = int(count().split(" of ")[0].replace(",", ""))
    page.get_by_label("answer").select_option("0")
    page.wait_for_url("**correct=0**")
    watched.ready("atlas")
    assert "Selected on the outcome" in count()
    assert int(count().split(" of ")[0].replace(",", "")) < total
    page.get_by_role("button", name="all samples").click()
    page.wait_for_url(lambda url: "correct" not in url)
    page.locator("#slider").focus()
    page.keyboard.press("Home")
    page.wait_for_url("**epoch=1**")
    watched.ready("atlas")
    assert page.locator(":focus").get_attribute("id") == "slider", "the focus outlives the redraw"
    page.locator("#play").click()
    page.wait_for_url("**epoch=2**", timeout=5000)
    page.locator("#play").click()


def test_difficulty_is_that_of_the_shown_or_of_the_last_epoch(watched: Watched, site: Site) -> None:
    page = watched.open(f"/atlas/{site.goe}?epoch=1&hard=hard", "atlas")

    def listed() -> list[int]:
        return [int(text) for text in page.locator("[data-sample]").all_text_contents()]

    def hardest(epoch: int) -> list[int]:
        loss = numbers(site.get(f"/api/run/{site.goe}/atlas/{epoch}")["columns"], "loss")
        place = np.argsort(np.argsort(loss, kind="stable"))
        return np.flatnonzero(3 * place // len(loss) == 2).tolist()

    assert listed() == hardest(1)
    page.get_by_label("of the loss in").select_option("last")
    page.wait_for_url("**of=last**")
    watched.ready("atlas")
    assert listed() == hardest(3) != hardest(1)
    assert "epoch=1" in page.url, "the picture is still that of the chosen epoch"


def test_a_sample_shows_its_path_and_probabilities(watched: Watched, site: Site) -> None:
    page = watched.open(f"/atlas/{site.goe}", "atlas")
    page.locator("[data-sample]").nth(3).click()
    page.locator("#panel").get_by_text("step 2:").wait_for()
    assert page.locator(".own").count() == 1
    assert page.locator("#panel .taken").count() == 2
    page = watched.open(f"/atlas/{site.moe}?sample=2", "atlas")
    page.locator("#panel").get_by_text("layer 2:").wait_for()
    page.get_by_label("tokens by their expert in").select_option("1")
    assert re.fullmatch(r"expert \d", page.locator("#panel .tokens span").first.get_attribute("title"))


def test_taking_an_expert_away_is_computed_and_told(watched: Watched, site: Site) -> None:
    page = watched.open(f"/atlas/{site.goe}?node=1.0", "atlas")
    page.locator("#forbid").click()
    while page.get_by_role("button", name="evaluate anyway").count() == 0 and page.locator(".effect").count() == 0:
        page.wait_for_timeout(100)
    if page.get_by_role("button", name="evaluate anyway").count():  # a busy machine
        page.get_by_role("button", name="evaluate anyway").click()
    page.locator(".effect").wait_for(timeout=60_000)
    text = page.locator(".effect").inner_text()
    assert re.search(r"Accuracy changes by [+-]\d+\.\d ± \d+\.\d points", text)
    assert "McNemar p" in text


def test_two_runs_stand_side_by_side(watched: Watched, site: Site) -> None:
    page = watched.open(f"/atlas/{site.goe}?with={site.twin}", "atlas")
    page.get_by_role("heading", name=re.compile(site.twin)).wait_for()
    assert "100.0 % of all decisions agree" in page.locator("#graph").inner_text()
    assert page.locator(".graph").count() == 2


def test_a_link_shows_what_it_showed(browser: Any, site: Site) -> None:
    """Random states of the Atlas, each opened twice from its address."""
    draw = random.Random(3)
    first, second = Watched(browser, site), Watched(browser, site)
    for _ in range(STATES):
        options = {
            "epoch": draw.choice(["", "1", "2", "3"]),
            "class": draw.choice(["", "0", "1"]),
            "correct": draw.choice(["", "0", "1"]),
            "hard": draw.choice(["", "easy", "hard"]),
            "of": draw.choice(["", "last"]),
            **draw.choice(
                [{}, {"node": f"{draw.randint(1, 2)}.{draw.randint(0, 3)}"}, {"sample": str(draw.randint(0, 50))}]
            ),
        }
        query = "&".join(f"{key}={value}" for key, value in options.items() if value)
        seen = []
        for one in (first, second):
            page = one.open(f"/atlas/{draw.choice([site.goe])}?{query}", "atlas")
            page.wait_for_timeout(50)
            seen.append((page.url, page.locator("#graph").inner_text(), page.locator("#said").inner_text()))
        assert seen[0] == seen[1], query
        assert query in seen[0][0] or not query
    first.close()
    second.close()


def test_live_points_arrive_without_disturbing_a_choice(watched: Watched, site: Site) -> None:
    with Store(DB_FILE) as store:
        store.take_over(site.running)
    folder = Path("runs") / site.running
    with claimed_folder(site.running):  # so that the run counts as running
        page = watched.open(f"/run/{site.running}", "run")
        page.get_by_label("smooth").select_option("0.9")
        page.get_by_label("smooth").focus()
        with Store(DB_FILE) as store:
            store.add_history(site.running, [HistoryRow(50, 5.0, "train_loss", 0.125)])
        page.locator("#curves .legend").get_by_text(re.compile("train_loss")).wait_for()
        page.locator("#curves .tick").get_by_text("50", exact=True).wait_for(timeout=10_000)
        assert page.get_by_label("smooth").input_value() == "0.9"
        assert page.locator(":focus").count() == 1
    shutil.rmtree(folder)


def test_the_file_needs_no_server(browser: Any, site: Site, tmp_path: Path) -> None:
    out = tmp_path / "atlas.html"
    ended = command(goe, "atlas", "--run", site.goe, "--out", str(out), "--ablate")
    assert ended.code == 0, ended.err
    text = out.read_text()
    assert set(re.findall(r"https?://[^\s\"'`\\]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert len(text) < 5_000_000
    page = browser.new_page()
    errors, requests = list[str](), list[str]()
    page.on("console", lambda found: errors.append(found.text) if found.type == "error" else None)
    page.on("pageerror", lambda found: errors.append(str(found)))
    page.on("request", lambda found: requests.append(found.url))
    page.goto(out.as_uri())
    page.locator('html[data-ready="atlas"]').wait_for(state="attached")
    page.locator(".node[role=button]").first.click()
    page.locator(".effect").first.wait_for()
    page.keyboard.press("Escape")
    page.locator("[data-sample]").first.click()
    page.locator("#panel").get_by_text("step 1:").wait_for()
    assert "sample=0" in page.url
    assert errors == []
    assert requests == [out.as_uri()]
    page.close()


def test_dark_is_remembered(watched: Watched) -> None:
    page = watched.open("/runs", "runs")
    before = page.locator("html").get_attribute("data-theme")
    page.locator("#theme").click()
    after = page.locator("html").get_attribute("data-theme")
    assert after in ("dark", "light")
    assert after != before
    page.reload()
    watched.ready("runs")
    assert page.locator("html").get_attribute("data-theme") == after
