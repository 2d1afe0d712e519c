"""What the pages cost: CPU of the server for 30,000 runs and for 10,000 paths, of a live poll, and of the statistics.

The server's work is measured without a network, as CPU time of this process; the first answer of each kind is left out.
`--page` also opens the pages in Chromium and prints how long a reader waits there (wall time), and how long a page
takes to follow a choice (by its own clock, the median of seven). `--planted` trains a model on planted paths of 8
functions (half a minute of CPU) and counts the panels of its experts that show the function which the expert has
learned, and those that show anything for labels in random order.

`--watched` trains a model and measures its speed in turns of SLICE seconds. In every other turn, twenty browsers ask
for its history once a second; in the turns between, no browser asks. In turns so short, the machine changes its own
speed little. It prints two ratios of the speed with browsers to the speed without: in steps per second, and in steps
per second of the training's own CPU time. It also prints the CPU time of the server.

S samples  T steps
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from store_scale import fill, trained

from research_eval.analysis.statistics import half_width
from research_eval.dashboard import atlas, queries
from research_eval.dashboard.server import Options, Pages
from research_eval.db_utils import DB_FILE, HistoryRow, Store
from research_eval.routing.trace_files import ROUTING_FOLDER, read_samples, write_samples, write_trace

QUERIES = {
    "newest runs": {},
    "sorted by name": {"sort": "name"},
    "sorted by final_val_f1": {"sort": "final_val_f1"},
    "sorted by param_count, backwards": {"sort": "param_count", "dir": "desc"},
    "rows from 29,000": {"offset": "29000"},
    "name has '99'": {"q": "99"},
    "model and status": {"model": "goe", "status": "failed"},
    "final_val_f1>=0.9": {"where": "final_val_f1>=0.9"},
    "final_val_f1>=0.5, most runs": {"where": "final_val_f1>=0.5"},
    "sorted by final_val_f1, rows from 20,000": {"sort": "final_val_f1", "offset": "20000"},
}

ROOT = Path(__file__).resolve().parent.parent
PORT = 8198
SLICE = 1.2
ADDRESS = f"http://127.0.0.1:{PORT}"
PLANTED = {
    "experiment_name": "planted",
    "model_type": "goe_original",
    "dataset_type": "synthetic",
    "dataset_name": "planted_paths",
    "epochs": 6,
    "batch_size": 64,
    "dataset_params": {"num_samples": 12_000, "num_functions": 8, "depth": 2, "num_values": 8, "num_operands": 2},
    "model_params": {
        "embed_dim": 32,
        "num_heads": 2,
        "dim_feedforward": 64,
        "dropout": 0.0,
        "pool": "last",
        "num_total_experts": 8,
        "max_path_len": 2,
        "router_input": "cursor",
        "router_init": 1.0,
        "balance_bias_rate": 0.01,
        "balance_decay": 0.2,
    },
    "optimizer_params": {"lr": 0.002, "router_lr_mult": 0.2},
    "scheduler_params": {"name": "cosine_warmup", "warmup_factor": 0.02},
    "training_params": {"trace_routing": True, "eval_batch_size": 512, "num_threads": 1, "device": "cpu"},
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
    parser.add_argument("--planted", action="store_true", help="only what the panels show on planted paths")
    parser.add_argument(
        "--watched", type=int, metavar="PAIRS", default=0, help="only how much browsers slow a run down"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/dashboard.json"))
    arguments = parser.parse_args()
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        if arguments.watched:
            rows = watched(arguments.watched)
        else:
            rows = planted() if arguments.planted else measured(arguments)
    measured_now = {row["what"] for row in rows}
    kept = [row for row in known if row["what"] not in measured_now]
    arguments.output.write_text(json.dumps([*kept, *rows], indent=1) + "\n")
    width = max(len(row["what"]) for row in rows)
    for row in rows:
        if "ratio" in row:
            print(f"{row['what']:<{width}}  {row['ratio']:.4f} ± {row['half_width']:.4f} ({row['pairs']} pairs)")
            continue
        if "shown" in row:
            print(f"{row['what']:<{width}}  {row['shown']} of {row['panels']}")
            continue
        size = f"{row['bytes'] / 1000:8.1f} kB" if row.get("bytes") else ""
        print(f"{row['what']:<{width}}  {row['ms']:8.1f} ms {row['of']:<4} {size}")


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

    served = Store(DB_FILE, read_only=True)  # stays open, as in the server
    for name, query in QUERIES.items():
        add(name, lambda query=query: queries.runs_page(served, queries.Wanted.of(query)))  # type: ignore[misc]
    newest = served.find_runs(sort="timestamp", descending=True, limit=1)[0]["experiment_id"]
    add("groups of one data set", lambda: queries.groups(served, queries.Wanted.of({"data": "parity"})))
    traced = Path("runs/20260101-000000-trace")
    add(f"an epoch of {arguments.samples:,} paths", lambda: atlas.epoch_columns(traced, 1))
    add("its samples, once", lambda: atlas.samples_of(traced))
    histories = queries.Histories(lambda: served)
    with Store(DB_FILE) as store:
        store.add_history(newest, [HistoryRow(10_000 + step, 1.0, "train_loss", 0.5) for step in range(100)])

    def twenty() -> Any:
        """A second of twenty browsers: two reads of the store, eighteen of what is known."""
        histories._known.get(newest, queries.Series()).read_at = float("-inf")
        return [histories.behind(newest, 10_090) for _ in range(20)]

    add("twenty browsers, one poll each", twenty)
    return rows + (in_browser(newest) if arguments.page else [])


@contextlib.contextmanager
def opened_page() -> Iterator[Any]:
    """A page of Chromium, and a server for the results in the working directory."""
    import uvicorn
    from playwright.sync_api import sync_playwright

    server = uvicorn.Server(uvicorn.Config(Pages(Options(DB_FILE)).app(), port=PORT, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        time.sleep(1)
        yield browser.new_page()
        browser.close()


def in_browser(run: str) -> list[dict[str, Any]]:
    """How long a reader waits for the pages."""
    rows = []
    with opened_page() as page:

        def timed(what: str, action: Callable[[], Any]) -> None:
            begun = time.monotonic()
            action()
            page.locator("html[data-ready]").wait_for(state="attached", timeout=60_000)
            rows.append({"what": what, "ms": round(1000 * (time.monotonic() - begun), 1), "of": "wall"})

        address = ADDRESS
        timed("page of all runs", lambda: page.goto(f"{address}/runs"))
        timed("atlas of 10,000 paths", lambda: page.goto(f"{address}/atlas/20260101-000000-trace"))
        page.wait_for_timeout(1500)

        def inside(what: str, selectors: list[tuple[str, str | None]]) -> None:
            times = [page.evaluate(IN_PAGE, list(one)) for one in selectors]
            rows.append({"what": what, "ms": round(statistics.median(times), 1), "of": "page"})

        inside("atlas, a class chosen", [("#filters select", str(label)) for label in range(3, 10)])
        experts = [page.locator(".node[role=button]").nth(n).get_attribute("data-node") for n in range(7)]
        nodes: list[tuple[str, str | None]] = [(f'[data-node="{node}"]', None) for node in experts]
        inside("atlas, an expert chosen (300 shuffles)", nodes)
    return rows


IN_PAGE = """async ([selector, value]) => {
  const page = document.documentElement;
  const shown = new Promise((done) => {
    const observer = new MutationObserver(() => {
      if (!page.dataset.ready) return;
      observer.disconnect();
      done();
    });
    observer.observe(page, { attributes: true });
  });
  const element = document.querySelector(selector);
  const begun = performance.now();
  if (value !== null) element.value = value;
  element.dispatchEvent(new Event(value === null ? "click" : "change", { bubbles: true }));
  await shown;
  return performance.now() - begun;
}"""  # milliseconds from a reader's choice until the page shows it, by the page's own clock


TRAINING = """
import json, sys
from research_eval import experiment
from research_eval.schema import config_from_dict
from research_eval.training import fit
inner, count = fit.take_step, 0
file = open("steps", "wb", buffering=0)
def counted(*arguments):
    global count
    count += 1
    file.seek(0)
    file.write(count.to_bytes(8, "little"))
    return inner(*arguments)
fit.take_step = counted
experiment.run(config_from_dict(json.load(open("config.json"))), db=sys.argv[1], quiet=True)
"""


def watched(pairs: int) -> list[dict[str, Any]]:
    """Steps per second of a run with twenty browsers over those without, in slices of SLICE seconds."""
    config = {
        "model_type": "dense",
        "dataset_type": "synthetic",
        "dataset_name": "majority",
        "epochs": 1,
        "batch_size": 32,
        "dataset_params": {"num_samples": 2_000_000, "seq_len": 32},  # no evaluation disturbs a slice
        "model_params": {"embed_dim": 64},
        "training_params": {"max_steps": 1_000_000, "num_threads": 1, "log_every": 10, "device": "cpu"},
    }
    Path("config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", TRAINING, DB_FILE]
    training = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    serving = "from research_eval.cli.app import goe; goe()"
    command = [sys.executable, "-c", serving, "dashboard", "--port", str(PORT), "--db", DB_FILE]
    while not Path("steps").exists() or not Path("steps").read_bytes():
        time.sleep(0.2)
    server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    time.sleep(6)
    with Store(DB_FILE, read_only=True) as store:
        (run,) = (row["experiment_id"] for row in store.experiments())
    asks, ends = threading.Event(), threading.Event()

    def browser(number: int) -> None:
        time.sleep(number / 20)
        since = -1
        connection = http.client.HTTPConnection("127.0.0.1", PORT)  # a browser keeps its connection, too
        while not ends.is_set():
            if asks.is_set():
                connection.request("GET", f"/api/run/{run}/history?since={since}")
                since = json.loads(connection.getresponse().read())["since"]
            else:
                connection.close()  # the next request opens it again
            ends.wait(1)

    browsers = [threading.Thread(target=browser, args=(number,), daemon=True) for number in range(20)]
    for one in browsers:
        one.start()

    def speeds() -> tuple[float, float, float]:
        """Steps per second, steps per second of CPU time, and CPU seconds of the server per second."""
        begun = np.array([_steps(), time.monotonic(), _cpu_seconds(training.pid), _cpu_seconds(server.pid)])
        time.sleep(SLICE)
        ended = np.array([_steps(), time.monotonic(), _cpu_seconds(training.pid), _cpu_seconds(server.pid)])
        steps, seconds, cpu, serving = ended - begun
        return steps / seconds, steps / cpu, serving / seconds

    by_wall, by_cpu, served = [], [], []
    for number in range(pairs):
        found = {}
        for is_asked in (number % 2 == 0, number % 2 == 1):
            (asks.set if is_asked else asks.clear)()
            time.sleep(0.2)
            found[is_asked] = speeds()
        by_wall.append(found[True][0] / found[False][0])
        by_cpu.append(found[True][1] / found[False][1])
        served.append(1000 * found[True][2])
    ends.set()
    for process in (training, server):
        process.kill()
        process.wait()
    named = {"steps per second": by_wall, "steps per CPU second": by_cpu}
    return [
        *(
            {
                "what": f"{name} with twenty browsers, over those without",
                "ratio": statistics.mean(ratios),
                "half_width": half_width(ratios),
                "pairs": pairs,
            }
            for name, ratios in named.items()
        ),
        {"what": "server, per second of twenty browsers", "ms": round(statistics.median(served), 1), "of": "CPU"},
    ]


def _steps() -> int:
    return int.from_bytes(Path("steps").read_bytes(), "little")


def _cpu_seconds(process: int) -> float:
    """The CPU time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


PANELS = """async ({ path, label, steps, experts, turns }) => {
  const { enrichment, generator } = await import("/static/stats.js");
  const random = generator(7);
  let shown = 0;
  let panels = 0;
  for (let step = 0; step < steps; step += 1) {
    const reached = label.map((_, row) => row).filter((row) => path[row * steps + step] >= 0);
    for (let expert = 0; expert < experts; expert += 1) {
      const inside = reached.map((row) => (path[row * steps + step] === expert ? 1 : 0));
      if (!inside.includes(1)) continue;
      for (let turn = 0; turn < turns; turn += 1) {
        const mixed = reached.map((row) => label[row]);
        for (let place = mixed.length - 1; place > 0; place -= 1) {
          const other = Math.floor(random() * (place + 1));
          [mixed[place], mixed[other]] = [mixed[other], mixed[place]];
        }
        const members = [...new Set(mixed)].map((kind) => mixed.flatMap((one, place) => (one === kind ? [place] : [])));
        shown += enrichment(members, inside, 300, turn + 1).rows.some((row) => row.outside);
        panels += 1;
      }
    }
  }
  return [shown, panels];
}"""


def planted() -> list[dict[str, Any]]:
    """What the panels of a trained model show: the planted function of each matched expert, and shuffled labels."""
    from scipy.optimize import linear_sum_assignment

    from research_eval.experiment import run
    from research_eval.schema import config_from_dict

    trained_run = run(config_from_dict(PLANTED), db=DB_FILE, quiet=True)
    folder = Path("runs") / trained_run.experiment_id
    epoch = next(one["epoch"] for one in atlas.epoch_list(folder) if one["saved"])
    table = atlas.read(folder, epoch).samples
    paths, wanted, labels = table["path"].to_pylist(), table["planted_path"].to_pylist(), np.asarray(table["label"])
    columns, names = read_samples(folder)
    assert columns is not None
    tokens = columns.to_pylist()  # the instructions of a sample come first
    found, panels = 0, 0
    with opened_page() as page:
        for step in range(2):
            counts, marks = np.zeros((8, 8)), dict[int, set[int]]()
            for row, (path, functions) in enumerate(zip(paths, wanted, strict=True)):
                if len(path) > step and len(functions) > step:
                    counts[path[step], functions[step]] += 1
                    marks.setdefault(functions[step], set()).add(tokens[row][step])
            for expert, function in zip(*linear_sum_assignment(-counts), strict=True):
                if not counts[expert, function]:
                    continue  # fewer experts than functions are used in this step
                (mark,) = marks[function]
                page.goto("about:blank")
                page.goto(f"{ADDRESS}/atlas/{trained_run.experiment_id}?epoch={epoch}&node={step + 1}.{expert}")
                section = page.locator("#panel section", has_text="Tokens (")
                section.wait_for(timeout=60_000)
                outside = section.locator("tbody td:first-child:not(.inside)").all_text_contents()
                found += names["tokens"].get(str(mark), f"token {mark}") in outside
                panels += 1
        paths_ST = np.full((len(paths), 2), -1)
        for row, path in enumerate(paths):
            paths_ST[row, : len(path)] = path
        given = {"path": paths_ST.ravel().tolist(), "label": labels.tolist(), "steps": 2, "experts": 8, "turns": 60}
        shuffled = page.evaluate(PANELS, given)
    return [
        {"what": "planted paths: panels that show the expert's function", "shown": found, "panels": panels},
        {"what": "shuffled labels: panels that show anything", "shown": shuffled[0], "panels": shuffled[1]},
    ]


if __name__ == "__main__":
    main()
