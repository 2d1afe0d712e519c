"""What the pages cost: CPU of the server for 30,000 runs and for 10,000 paths, of a live poll, and of the statistics.

The server's work is measured without a network, as CPU time of this process; the first answer of each kind is left out.
`--page` also opens the pages in Chromium and prints how long a reader waits there (wall time).
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from store_scale import fill, trained

from research_eval.dashboard import atlas, queries
from research_eval.dashboard.server import Options, Pages
from research_eval.db_utils import DB_FILE, HistoryRow, Store
from research_eval.routing.trace_files import ROUTING_FOLDER, write_samples, write_trace

QUERIES = {
    "newest runs": {},
    "sorted by name": {"sort": "name"},
    "sorted by final_val_f1": {"sort": "final_val_f1"},
    "sorted by param_count, backwards": {"sort": "param_count", "dir": "desc"},
    "rows from 29,000": {"offset": "29000"},
    "name has '99'": {"q": "99"},
    "model and status": {"model": "goe", "status": "failed"},
    "final_val_f1>=0.9": {"where": "final_val_f1>=0.9"},
}


def cpu_ms(action: Callable[[], Any], repeats: int) -> tuple[float, int]:
    """Median CPU time of an answer in ms, and its size in bytes as it is sent."""
    content = action()
    size = len(gzip.compress(json.dumps(content, separators=(",", ":")).encode(), 5))
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        gzip.compress(json.dumps(action(), separators=(",", ":")).encode(), 5)
        times.append(1000 * (time.process_time() - begun))
    return statistics.median(times), size


def made_up_trace(folder: Path, samples: int, steps: int, experts: int) -> None:
    """A trace of random paths."""
    rng = np.random.default_rng(0)
    probabilities_STA = rng.dirichlet(np.ones(experts + 1), (samples, steps)).astype(np.float32)
    columns = {
        "sample": np.arange(samples),
        "label": rng.integers(16, size=samples),
        "correct": rng.random(samples) < 0.8,
        "prediction": rng.integers(16, size=samples),
        "loss": rng.random(samples).astype(np.float32),
        "path": probabilities_STA[..., :-1].argmax(-1),
        "probabilities": probabilities_STA,
    }
    folder.mkdir(parents=True)
    write_trace(folder / ROUTING_FOLDER, columns, {"epoch": 1, "alarms": [], "best_so_far": True, "router": {}})
    offsets = np.arange(0, 20 * samples + 1, 20)
    write_samples(folder / ROUTING_FOLDER, rng.integers(2, 2000, offsets[-1]), offsets, {"labels": [], "tokens": {}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30_000)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--page", action="store_true", help="also in Chromium")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/dashboard.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        rows = measured(arguments)
    width = max(len(row["what"]) for row in rows)
    for row in rows:
        size = f"{row['bytes'] / 1000:8.1f} kB" if row.get("bytes") else ""
        print(f"{row['what']:<{width}}  {row['ms']:8.1f} ms {row['of']:<4} {size}")
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of the table, from made-up results in the working directory."""
    Path("template").mkdir()
    template = trained(Path("template"))
    with Store(DB_FILE) as store:
        fill(store, template, arguments.runs, 20)
    made_up_trace(Path("runs/20260101-000000-trace"), arguments.samples, 4, 16)
    rows: list[dict[str, Any]] = []

    def add(what: str, action: Callable[[], Any]) -> None:
        ms, size = cpu_ms(action, arguments.repeats)
        rows.append({"what": what, "ms": round(ms, 2), "of": "CPU", "bytes": size})

    def answer(query: dict[str, str]) -> Any:
        with Store(DB_FILE, read_only=True) as store:
            return queries.runs_page(store, queries.Wanted.of(query))

    for name, query in QUERIES.items():
        add(name, lambda query=query: answer(query))  # type: ignore[misc]
    with Store(DB_FILE, read_only=True) as store:
        newest = store.find_runs(sort="timestamp", descending=True, limit=1)[0]["experiment_id"]

    def grouped() -> Any:
        with Store(DB_FILE, read_only=True) as store:
            return queries.groups(store, queries.Wanted.of({"data": "parity"}))

    add("groups of one data set", grouped)
    traced = Path("runs/20260101-000000-trace")
    add(f"an epoch of {arguments.samples:,} paths", lambda: atlas.epoch_columns(traced, 1))
    add("its samples, once", lambda: atlas.samples_of(traced))
    histories = queries.Histories(lambda: Store(DB_FILE, read_only=True))
    with Store(DB_FILE) as store:
        store.add_history(newest, [HistoryRow(10_000 + step, 1.0, "train_loss", 0.5) for step in range(100)])

    def twenty() -> Any:
        """A second of twenty browsers: two reads of the store, eighteen of what is known."""
        histories._known.get(newest, queries.Series()).read_at = float("-inf")
        return [histories.behind(newest, 10_090) for _ in range(20)]

    add("twenty browsers, one poll each", twenty)
    return rows + (in_browser(newest) if arguments.page else [])


def in_browser(run: str) -> list[dict[str, Any]]:
    """How long a reader waits for the pages."""
    import uvicorn
    from playwright.sync_api import sync_playwright

    server = uvicorn.Server(uvicorn.Config(Pages(Options(DB_FILE)).app(), port=8198, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    rows = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        time.sleep(1)

        def timed(what: str, action: Callable[[], Any]) -> None:
            begun = time.monotonic()
            action()
            page.locator("html[data-ready]").wait_for(state="attached", timeout=60_000)
            rows.append({"what": what, "ms": round(1000 * (time.monotonic() - begun), 1), "of": "wall"})

        address = "http://127.0.0.1:8198"
        timed("page of all runs", lambda: page.goto(f"{address}/runs"))
        timed("atlas of 10,000 paths", lambda: page.goto(f"{address}/atlas/20260101-000000-trace"))
        page.wait_for_timeout(1500)
        timed("atlas, a class chosen", lambda: page.get_by_label("class").select_option("3"))
        timed("atlas, an expert chosen (300 shuffles)", lambda: page.locator(".node[role=button]").first.click())
        browser.close()
    return rows


if __name__ == "__main__":
    main()
