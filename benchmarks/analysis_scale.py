"""How long the analysis of many runs takes: fills a store in a temporary folder, then times the commands on it."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from research_eval.db_utils import DB_FILE, Store, canonical_json, experiments_table, metrics_table
from research_eval.schema import config_from_dict

ROOT = Path(__file__).resolve().parent.parent
MODEL_TYPES = ("dense", "moe", "goe", "goe_original")
RUN_FLAGS = (
    ["--list_metrics"],
    ["--run_summary_table"],
    ["--run_comparison"],
    ["--run_f1_vs_params_plot"],
    ["--run_learning_curves"],
    ["--run_report"],
    ["--run_all"],
)


def metrics_of(generator: random.Random, size: int, num_metrics: int) -> dict[str, Any]:
    """The usual metrics, and others up to their number; every tenth is a list."""
    score = min(1.0, generator.gauss(0.8, 0.1))
    named = {
        "final_val_f1": score,
        "final_val_acc": score,
        "final_val_loss": 1 - score,
        "test_f1": score - 0.02,
        "param_count": 1000.0 * size,
        "inference_latency_ms_batch": generator.uniform(1, 9),
        "inference_flops_per_sample": 4000.0 * size,
        "training_duration_seconds": generator.uniform(10, 20),
    }
    others = {
        f"other_{number}": generator.random() if number % 10 else [generator.random()] * 4
        for number in range(num_metrics - len(named))
    }
    return named | others


def fill(folder: Path, num_runs: int, num_seeds: int, num_metrics: int) -> None:
    """Runs as a study leaves them: every config another learning rate, `num_seeds` runs of each."""
    generator = random.Random(0)  # noqa: S311 - made-up results
    task = {"dataset_type": "synthetic", "dataset_name": "parity", "epochs": 10, "batch_size": 32}
    base = {name: config_from_dict({"model_type": name, **task}).to_dict() for name in MODEL_TYPES}
    with Store(str(folder / DB_FILE)):
        pass
    start = datetime.now(UTC) - timedelta(days=30)

    def rows() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        for number in range(num_runs):
            name = MODEL_TYPES[number // num_seeds % len(MODEL_TYPES)]
            config_number, seed = divmod(number, num_seeds)
            config = base[name] | {"seed": seed, "experiment_name": f"study_{name}"}
            config["optimizer_params"] = base[name]["optimizer_params"] | {"lr": 1e-3 * (1 + config_number)}
            row = {
                "experiment_id": f"run-{generator.getrandbits(64):016x}",
                "run_type": "optuna_trial",
                "timestamp": start + timedelta(seconds=number),
                "experiment_name": config["experiment_name"],
                "model_type": name,
                "dataset_name": "parity",
                "dataset_type": "synthetic",
                "epochs": config["epochs"],
                "batch_size": config["batch_size"],
                "full_config_json": canonical_json(config),
                "env_details_json": "{}",
                "status": "finished",
                "seed": seed,
            }
            yield row, metrics_of(generator, 1 + config_number % 997, num_metrics)

    engine = sa.create_engine(f"sqlite:///{folder / DB_FILE}")
    with engine.begin() as connection:
        for row, metrics in rows():
            connection.execute(experiments_table.insert(), row)
            connection.execute(
                metrics_table.insert(),
                [
                    {"experiment_id": row["experiment_id"], "metric_name": name, "metric_value": value}
                    for name, value in metrics.items()
                ],
            )
    engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each config")
    parser.add_argument("--metrics", type=int, default=40, help="metrics of each run")
    parser.add_argument("--repeats", type=int, default=3, help="the shortest of so many times counts")
    parser.add_argument("--folder", type=Path, help="keep the store here and use it again (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="also write the times into this JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / DB_FILE).exists():
            folder.mkdir(parents=True, exist_ok=True)
            fill(folder, arguments.runs, arguments.seeds, arguments.metrics)
        script = str(ROOT / "research_eval" / "analyze_results.py")
        times: dict[str, float] = {}
        for flags in RUN_FLAGS:
            command = [sys.executable, script, "--dataset_name", "parity", *flags]
            for _ in range(arguments.repeats):
                begin = time.perf_counter()
                subprocess.run(command, cwd=folder, check=True, capture_output=True)
                seconds = time.perf_counter() - begin
                times[flags[0]] = min(times.get(flags[0], seconds), seconds)
            print(f"{flags[0]:<24} {times[flags[0]]:6.2f} s", flush=True)
    if arguments.output:
        settings = {name: getattr(arguments, name) for name in ("runs", "seeds", "metrics")}
        arguments.output.write_text(json.dumps({**settings, "seconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
