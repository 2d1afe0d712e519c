"""The results of docs/research.md: every arm of every study over its seeds, with paired differences and intervals.

An arm is a config in `examples/research/<study>/`. Finished runs in the results database are not repeated, so an
interrupted call goes on where it was. `--page` writes the tables into the page; studies that need local data are left
out unless `--data_dir` is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from research_eval.analysis.statistics import half_width as interval
from research_eval.db_utils import Store
from research_eval.schema import ExperimentConfig, load_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "examples" / "research"
BEGIN, END = "<!-- begin {} -->", "<!-- end {} -->"


@dataclass(frozen=True)
class Study:
    """A question: its arms in the order of the table, which differences are asked for, and what else to show."""

    arms: list[str]
    pairs: list[tuple[str, str]] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=lambda: {"test_acc": "accuracy"})  # key: name in the table
    compared: tuple[str, ...] = ("test_acc",)  # metrics whose paired differences are shown
    seeds: dict[str, int] = field(default_factory=dict)  # arms with another number of seeds than the rest
    needs_data: bool = False


def against(arm: str, *others: str) -> list[tuple[str, str]]:
    """The differences of one arm to others."""
    return [(arm, other) for other in others]


SCAN_TASKS = ("parity", "even_pairs", "cycle_navigation", "s3", "modular_arithmetic", "s5", "majority")
LONG = {"test_len_41_100_acc": "41-100", "test_len_200_acc": "200", "test_len_500_acc": "500"}
STUDIES = {
    "tables": Study(
        ["dense_flops", "dense_params", "token", "hash", "published", "state_router", "goe", "goe_frozen_router"],
        [
            *against("goe", "dense_flops", "dense_params", "token", "hash", "state_router", "goe_frozen_router"),
            *against("state_router", "dense_flops"),
            *against("published", "dense_flops"),
        ],
    ),
    "planted": Study(
        ["dense_flops", "dense_params", "random", "oracle", "goe_pooled", "goe_cursor"],
        [
            *against("goe_cursor", "dense_flops", "dense_params", "oracle"),
            *against("goe_pooled", "dense_flops", "dense_params", "oracle"),
        ],
        {"test_acc": "accuracy", "test_unseen_acc": "unseen", "planted_step_recovery": "recovery"}
        | {"router_regret": "regret", "test_unseen_router_regret": "regret, unseen"},
        compared=("test_acc", "test_unseen_acc"),
        seeds={"random": 2, "oracle": 3, "goe_pooled": 3},
    ),
    "hop": Study(
        ["dense", "loop", "loop_confidence", "goe_confidence"],
        against("loop_confidence", "loop", "dense"),
        {
            "test_acc": "accuracy",
            "exit_gain": "exit - full depth",
            "depth_gain": "full depth",
            "mean_path_length": "steps",
        }
        | {f"steps_{hops}": f"{hops} hops" for hops in (1, 2, 3)}
        | {"rising": "rising with hops"},
        compared=("test_acc", "depth_gain"),
        seeds={"goe_confidence": 1},
    ),
    "scan": Study(
        [f"{task}_{model}" for task in SCAN_TASKS for model in ("scan", "lstm")],
        metrics=LONG | {"certified": "certified"},
        seeds={f"{task}_lstm": 1 for task in SCAN_TASKS} | {"modular_arithmetic_scan": 3, "s5_scan": 3},
    ),
    "hybrid": Study(
        ["attention", "scan", "pool"],
        metrics={"group_0": "parity, 1-40", "group_1": "majority, 1-40"} | LONG,
        seeds={"attention": 3, "scan": 3, "pool": 3},
    ),
    "text": Study(
        ["dense_flops", "dense_params", "oracle", "goe"],
        [("goe", "dense_flops"), ("goe", "dense_params"), ("goe", "oracle")],
        {"final_val_acc": "accuracy", "path_group_nmi_adjusted": "information path-domain"},
        compared=("final_val_acc",),
        seeds={"oracle": 1, "dense_params": 2},
        needs_data=True,
    ),
}
TEXT_SOURCES = ("ag_news", "sst2", "trec", "mpqa")


def value(run: dict[str, Any], name: str) -> float | None:
    """A metric of a run, or what follows from its lists; None where it has none."""
    lengths = {
        group: np.average(np.arange(len(counts)), weights=counts)
        for group, counts in run.get("path_length_by_group", [])
    }
    derived: dict[str, Any] = {
        "steps_1": lengths.get(1),
        "steps_2": lengths.get(2),
        "steps_3": lengths.get(3),
        "rising": float(lengths[1] < lengths[2] < lengths[3]) if len(lengths) == 3 else None,
        "depth_gain": run.get("full_depth_val_acc", run["final_val_acc"]),
        "exit_gain": run["final_val_acc"] - run["full_depth_val_acc"] if "full_depth_val_acc" in run else None,
        **{f"group_{group}": accuracy for group, accuracy in run.get("val_acc_by_group", [])},
    }
    found = derived.get(name, run.get(name))
    if isinstance(found, list):  # per step, the whole path last
        found = found[-1]
    return None if found is None else float(found)


def overrides_of(study: str, seed: int, data_dir: Path | None) -> dict[str, Any]:
    overrides: dict[str, Any] = {"seed": seed}
    if STUDIES[study].needs_data and data_dir is not None:
        overrides["dataset_params.sources"] = [str(data_dir / source) for source in TEXT_SOURCES]
    return overrides


def train(config: ExperimentConfig, arguments: argparse.Namespace) -> None:
    """One run in a process of its own; a finished run of the same config stays as it is."""
    with Store(arguments.db) as store:
        known = store.find_experiment(config.to_dict())
    if known is not None and known["status"] == "finished":
        return
    print(f"{config.experiment_name}, seed {config.seed}", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config.to_dict(), file)
        file.flush()
        command = [sys.executable, "-m", "research_eval.main", "--resume", "--quiet", "--json_config_path", file.name]
        subprocess.run([*command, "--db", arguments.db], check=True)


def collect(study: str, seeds: int, store: Store, data_dir: Path | None) -> dict[str, list[dict[str, Any]]]:
    """The metrics of every arm's runs, in the order of the seeds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for arm in STUDIES[study].arms:
        for seed in range(STUDIES[study].seeds.get(arm, seeds)):
            config = load_config(CONFIGS / study / f"{arm}.json", overrides_of(study, seed, data_dir))
            known = store.find_experiment(config.to_dict())
            if known is None or known["status"] != "finished":
                raise SystemExit(f"{study}/{arm}, seed {seed}: not finished")
            runs.setdefault(arm, []).append(store.metrics(known["experiment_id"]))
    return runs


def tables(study: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: one row per arm, then the paired differences of the first metric."""
    plan = STUDIES[study]
    lines = [f"| arm | N | {' | '.join(plan.metrics.values())} | parameters | MFLOPs | training s |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for arm, results in runs.items():
        cells = []
        for name in plan.metrics:
            values = [found for found in (value(run, name) for run in results) if found is not None]
            spread = f" ± {interval(values):.3f}" if name in plan.compared and len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        cost = [
            statistics.mean(float(run[name]) for run in results)
            for name in ("param_count", "inference_flops_per_sample")
        ]
        seconds = statistics.mean(float(run["training_duration_seconds"]) for run in results)
        lines.append(
            f"| {arm} | {len(results)} | {' | '.join(cells)} "
            f"| {cost[0] / 1e3:.1f} k | {cost[1] / 1e6:.3f} | {seconds:.0f} |"
        )
    if plan.pairs:
        names = " | ".join(plan.metrics[metric] for metric in plan.compared)
        lines += ["", f"| difference, paired by seed | {names} |", "|---" * (1 + len(plan.compared)) + "|"]
    for first, second in plan.pairs:
        cells = []
        for metric in plan.compared:
            pairs = [(value(a, metric), value(b, metric)) for a, b in zip(runs[first], runs[second], strict=False)]
            differences = [a - b for a, b in pairs if a is not None and b is not None]
            half = f"± {interval(differences):.3f}" if len(differences) > 1 else "(one pair)"
            cells.append(f"{statistics.mean(differences):+.3f} {half}")
        lines.append(f"| {first} - {second} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_page(page: Path, texts: dict[str, str]) -> None:
    """Replace what stands between the marks of each study."""
    content = page.read_text()
    for study, text in texts.items():
        before, _, rest = content.partition(BEGIN.format(study))
        _, found, after = rest.partition(END.format(study))
        if not found:
            raise SystemExit(f"{page}: no marks for {study}")
        content = f"{before}{BEGIN.format(study)}\n{text}\n{END.format(study)}{after}"
    page.write_text(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=5, help="runs per arm, with the seeds 0, 1, ...")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time; each config uses one thread")
    parser.add_argument("--data_dir", type=Path, help="folder with one folder per real dataset")
    parser.add_argument("--db", default="research.db")
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/research.json"))
    arguments = parser.parse_args()
    chosen = [name for name in arguments.studies if arguments.data_dir or not STUDIES[name].needs_data]
    configs = [
        load_config(CONFIGS / study / f"{arm}.json", overrides_of(study, seed, arguments.data_dir))
        for study in chosen
        for seed in range(arguments.seeds)
        for arm in STUDIES[study].arms
        if seed < STUDIES[study].seeds.get(arm, arguments.seeds)
    ]
    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(lambda config: train(config, arguments), configs))
    with Store(arguments.db, read_only=True) as store:
        runs = {study: collect(study, arguments.seeds, store, arguments.data_dir) for study in chosen}
    texts = {study: tables(study, runs[study]) for study in chosen}
    figures = {
        study: {
            arm: {name: [value(run, name) for run in results] for name in STUDIES[study].metrics}
            for arm, results in arms.items()
        }
        for study, arms in runs.items()
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    arguments.output.write_text(json.dumps(known | figures, indent=1) + "\n")
    print("\n\n".join(f"{study}\n\n{text}" for study, text in texts.items()))
    if arguments.page:
        write_page(arguments.page, texts)


if __name__ == "__main__":
    main()
