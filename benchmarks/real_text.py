"""The table of real text: every shipped config over several seeds, beside TF-IDF with logistic regression.

Reads local copies (`--data_dir` holds one folder per set). Finished runs in the results database are not repeated.
Scores are of the test split where there is one with labels, else of the validation split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from research_eval.analysis.statistics import half_width as interval
from research_eval.datasets.text import TextDataset
from research_eval.datasets.text.baselines import linear_scores
from research_eval.db_utils import Store
from research_eval.schema import load_config

ROOT = Path(__file__).resolve().parent.parent
SETS = ("ag_news", "imdb", "sst2", "trec")
MODELS = ("dense", "moe", "goe", "goe_original")


def baseline(dataset: str, data_dir: Path) -> float:
    """Macro-F1 of logistic regression on TF-IDF of words and word pairs, fitted to every training row."""
    rows, _ = TextDataset(dataset_name=dataset, data_dir=str(data_dir / dataset)).read(data_dir / dataset)
    scores = linear_scores(rows)
    return scores["test_f1" if "test" in rows else "val_f1"]


def train(job: tuple[str, str, int], arguments: argparse.Namespace) -> None:
    """One run in a process of its own; a run of the same config that is finished stays as it is."""
    dataset, model, seed = job
    command = [sys.executable, "-m", "research_eval.main", "--resume", "--quiet", "--seed", str(seed)]
    command += ["--json_config_path", str(config_path(dataset, model)), "--db", arguments.db]
    subprocess.run([*command, "--data_dir", str(arguments.data_dir / dataset)], check=True)


def config_path(dataset: str, model: str) -> Path:
    return ROOT / "examples" / "configs" / f"{dataset}_{model}.json"


def row(dataset: str, model: str, seeds: list[int], store: Store, data_dir: Path) -> dict[str, Any]:
    """Scores and costs of one config over its seeds."""
    runs = []
    for seed in seeds:
        overrides = {"seed": seed, "dataset_params.data_dir": str(data_dir / dataset)}
        known = store.find_experiment(load_config(config_path(dataset, model), overrides).to_dict())
        assert known is not None
        runs.append(store.metrics(known["experiment_id"]))
    scored = "test_f1" if "test_f1" in runs[0] else "final_val_f1"
    scores = [run[scored] for run in runs]
    means = {
        name: statistics.mean(run[name] for run in runs)
        for name in ("param_count", "active_param_count", "inference_flops_per_sample", "training_duration_seconds")
    }
    return {
        "dataset": dataset,
        "model": model,
        "metric": scored,
        "scores": scores,
        "interval": interval(scores),
        **means,
    }


def table(rows: list[dict[str, Any]], baselines: dict[str, float]) -> str:
    """Markdown."""
    lines = [
        "| set | model | macro-F1 (mean, 95 % t-interval) | parameters | active | MFLOPs per sample | training s |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        mean = statistics.mean(entry["scores"])
        # A pool of two experts and a path of two steps: nothing is conditional.
        is_whole = entry["model"] != "dense" and entry["active_param_count"] == entry["param_count"]
        name = entry["model"] + " (all active)" * is_whole
        lines.append(
            f"| {entry['dataset']} | {name} | {mean:.4f} ± {entry['interval']:.4f} "
            f"| {entry['param_count'] / 1e6:.2f} M | {entry['active_param_count'] / 1e6:.2f} M "
            f"| {entry['inference_flops_per_sample'] / 1e6:.2f} | {entry['training_duration_seconds']:.0f} |"
        )
        if entry["model"] == MODELS[-1] and entry["dataset"] in baselines:
            lines.append(
                f"| {entry['dataset']} | TF-IDF + logistic regression | {baselines[entry['dataset']]:.4f} | | | | |"
            )
    return "\n".join([*lines, "", flops_text(rows)])


def flops_text(rows: list[dict[str, Any]]) -> str:
    """How far the forward FLOPs of all models of a set lie apart: they are meant to be equal."""
    costs: dict[str, list[float]] = {}
    for entry in rows:
        costs.setdefault(entry["dataset"], []).append(entry["inference_flops_per_sample"] / 1e6)
    parts = [
        f"{name} {min(found):.2f} to {max(found):.2f} (spread {100 * (max(found) / min(found) - 1):.0f} %)"
        for name, found in costs.items()
    ]
    return f"MFLOPs per sample over all models: {', '.join(parts)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time; each config uses one thread")
    parser.add_argument("--db", default="real_text.db")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/real_text.json"))
    arguments = parser.parse_args()
    jobs = [
        (dataset, model, seed) for dataset in arguments.sets for seed in arguments.seeds for model in arguments.models
    ]
    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(lambda job: train(job, arguments), jobs))
    baselines = {dataset: baseline(dataset, arguments.data_dir) for dataset in arguments.sets}
    with Store(arguments.db, read_only=True) as store:
        rows = [
            row(dataset, model, arguments.seeds, store, arguments.data_dir)
            for dataset in arguments.sets
            for model in arguments.models
        ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"rows": rows, "baselines": baselines}, indent=1))
    print(table(rows, baselines))


if __name__ == "__main__":
    main()
