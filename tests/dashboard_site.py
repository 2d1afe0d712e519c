"""A dashboard with a few small runs, and pages whose errors are noted. Test files import the fixtures.

The fixtures need the packages of `requirements-dev.txt` and, for pages, Chromium.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import small_settings

from research_eval.dashboard.server import Options, serve
from research_eval.db_utils import DB_FILE, Store
from research_eval.experiment import run
from research_eval.schema import config_from_dict
from research_eval.store.records import HistoryRow

HOSTILE = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
THEMES = ("light", "dark")
STUDY, TRIALS = "sizes & rates", 60


@dataclass
class Site:
    """A server that runs, and the runs that it shows."""

    address: str
    folder: Path
    goe: str
    moe: str
    twin: str  # as `goe`, with another seed on the same data
    hostile: str
    running: str

    def fetch(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, content and headers of an answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address.rstrip("/") + path, data, headers)
        try:
            with urllib.request.urlopen(request) as response:
                status, content, found = response.status, response.read(), dict(response.headers)
        except urllib.error.HTTPError as error:
            status, content, found = error.code, error.read(), dict(error.headers)
        kind = found.get("content-type", "")
        return status, json.loads(content) if "json" in kind else content.decode(), found

    def get(self, path: str) -> Any:
        status, content, _ = self.fetch(path)
        assert status == 200, content
        return content

    def token(self) -> str:
        """What the page sends with a request for an evaluation."""
        found = re.search(r'name="goe-page" content="([^"]+)"', self.get("/runs"))
        assert found is not None
        return found[1]

    def probe(self, name: str, **body: Any) -> tuple[int, Any]:
        asked = {**body, "anyway": True}
        status, content, _ = self.fetch(f"/api/run/{name}/probe", asked, **{"x-goe-page": self.token()})
        return status, content


def served(options: Options) -> tuple[str, threading.Thread]:
    """The address of a server in a thread of this process."""
    address: list[str] = []
    is_ready = threading.Event()

    def ready(found: str) -> None:
        address.append(found)
        is_ready.set()

    thread = threading.Thread(target=serve, args=(options, ready), daemon=True)
    thread.start()
    assert is_ready.wait(20)
    return address[0], thread


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Planted paths for a model with paths, the same for one that routes tokens, and a run that never ends."""
    folder = tmp_path_factory.mktemp("site")
    settings = {
        "dataset_name": "planted_paths",
        "dataset_params": {"num_samples": 400, "num_functions": 4, "depth": 2, "num_values": 4, "num_operands": 1},
        "epochs": 3,
        "training_params": {"trace_routing": True},
    }
    sizes = {"num_total_experts": 4, "max_path_len": 2, "dropout": 0.0}
    with contextlib.chdir(folder):
        ids = {}
        for name, changes in {
            "goe": {"model_type": "goe_original", "model_params": sizes},
            "moe": {"model_type": "moe", "model_params": {"num_experts": 3}},
            "hostile": {"model_type": "goe", "experiment_name": HOSTILE},
        }.items():
            config = config_from_dict(small_settings(**settings, **changes))
            ids[name] = run(config, db=DB_FILE, quiet=True).experiment_id
        ids["twin"], ids["running"] = f"{ids['goe']}-twin", "20260101-000000-00000001"
        shutil.copytree(Path("runs") / ids["goe"], Path("runs") / ids["twin"])
        with Store(DB_FILE) as store:
            row = store.find_id(ids["goe"])
            assert row is not None
            keys = ("run_type", "experiment_name", "model_type", "dataset_name", "dataset_type", "epochs", "batch_size")
            for name in ("twin", "running"):
                facts = {key: row[key] for key in keys}
                config_json, environment = json.loads(row["full_config_json"]), json.loads(row["env_details_json"])
                store.start_experiment(
                    experiment_id=ids[name], seed=7, config=config_json, environment=environment, **facts
                )
            store.finish_experiment(ids["twin"], store.metrics(ids["goe"]))
            store.add_history(
                ids["running"], [HistoryRow(step, step / 10, "train_loss", 1 / step) for step in (1, 2, 3)]
            )
        address, _ = served(Options(DB_FILE, port=0))
        yield Site(address, folder, **ids)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Watched:
    """A page whose errors and requests are noted. The context keeps the policy of the server."""

    def __init__(self, browser: Any, site: Site, **options: Any) -> None:
        self.site, self.errors, self.requests = site, list[str](), list[str]()
        self.page = browser.new_page(viewport={"width": 1400, "height": 950}, **options)
        self.page.on("console", lambda found: self.errors.append(found.text) if found.type == "error" else None)
        self.page.on("pageerror", lambda found: self.errors.append(str(found)))
        self.page.on("request", lambda found: self.requests.append(found.url))

    def open(self, path: str, name: str) -> Any:
        self.page.goto(self.site.address.rstrip("/") + path)
        self.ready(name)
        return self.page

    def ready(self, name: str) -> None:
        self.page.locator(f'html[data-ready="{name}"]').wait_for(state="attached", timeout=20_000)

    def close(self) -> None:
        """Nothing went wrong, and nothing was asked of others."""
        assert not self.errors, self.errors
        assert [url for url in self.requests if not url.startswith((self.site.address, "data:"))] == []
        self.page.close()


@pytest.fixture
def watched(browser: Any, site: Site) -> Iterator[Watched]:
    found = Watched(browser, site)
    yield found
    found.close()


def findings(page: Any, theme: str = "light") -> list[str]:
    """The serious and critical findings of axe-core. Only colours differ between the themes."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if theme == "dark":
        options["runOnly"] = {"type": "rule", "values": ["color-contrast"]}
    found = axe.run(page, options=options).response["violations"]
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def made_up_study(store: Store, name: str = STUDY, trials: int = TRIALS) -> None:
    """Trials whose score follows from the learning rate alone, two seeds each.

    Trial 5 is pruned, and of trial 11 one seed has failed.
    """
    rng = np.random.default_rng(0)
    for number in range(trials):
        model = ("dense", "moe")[number % 2]
        rate = float(10 ** rng.uniform(-4, -2))
        sizes = {"embed_dim": int(rng.choice([16, 32, 64])), "dropout": float(rng.uniform(0, 0.3))}
        if model == "moe":
            sizes["num_experts"] = int(rng.choice([2, 4, 8]))
        for seed in (0, 1):
            config = {"experiment_name": name, "seed": seed, "model_type": model, "model_params": sizes}
            config |= {"optimizer_params": {"lr": rate}, "training_params": {"device": f"cpu:{number}"}}
            experiment_id = f"20260102-{number:06}-{seed:08}"
            store.start_experiment(
                experiment_id=experiment_id,
                run_type="optuna_trial",
                experiment_name=name,
                model_type=model,
                dataset_name="parity",
                dataset_type="synthetic",
                epochs=3,
                batch_size=16,
                seed=seed,
                config=config,
                environment={"study": {"name": name, "trial": number}},
            )
            if number == 5 or (number == 11 and seed):
                store.set_status(experiment_id, "pruned" if number == 5 else "failed")
                continue
            score = 1 / (1 + abs(np.log10(rate) + 3)) - 0.01 * seed
            cost = 100.0 * sizes["embed_dim"] * sizes.get("num_experts", 1)
            metrics = {"final_val_f1": score, "final_val_loss": 1 - score, "param_count": cost, "test_f1": 0.5}
            metrics["training_duration_seconds"] = 1.0 + number
            store.finish_experiment(experiment_id, metrics)


@pytest.fixture(scope="module")
def study_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A study of made-up trials."""
    with contextlib.chdir(folder := tmp_path_factory.mktemp("study")):
        with Store(DB_FILE) as store:
            made_up_study(store)
        address, _ = served(Options(str(folder / DB_FILE), port=0))
        yield Site(address, folder, *[""] * 5)
