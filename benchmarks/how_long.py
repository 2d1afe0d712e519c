"""How long the shipped configs train on this machine: one epoch of each, in a process of its own with one thread.

The figure is `training_duration_seconds`: without reading the data, and with the evaluation after the epoch. Configs of
real text need `--data_dir`, a folder with one folder per set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from timing import RESULTS, machine

from research_eval.config.jsonc import load_json
from research_eval.datasets.providers import load_splits
from research_eval.db_utils import Store
from research_eval.files import CONFIG_FILE
from research_eval.schema import load_config

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("dense", "moe", "goe", "goe_original")
CONFIGS = (
    *("quickstart", "looped_hop", "planted_learned", "scan_parity", "hybrid_parity_majority"),
    *(f"trec_{model}" for model in MODELS),
    *(f"ag_news_{model}" for model in MODELS),
    "imdb_dense",
)


def measured(name: str, data_dir: Path | None, device: str) -> dict[str, Any] | None:
    """The seconds of an epoch; None if the config needs data that are not there."""
    path = ROOT / "examples" / "configs" / f"{name}.json"
    config = load_json(path)
    flags = ["--epochs", "1", "--device", device, "--db", "results.db", "--quiet"]
    flags += ["--set", "training_params.num_threads=1"]
    if config["dataset_type"] == "real_world":
        if data_dir is None:
            return None
        of_set = data_dir.absolute() / config["dataset_name"]
        flags += ["--set", "training_params.test=false", "--data_dir", str(of_set)]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        command = [sys.executable, "-m", "research_eval.main", "--json_config_path", str(path), *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with Store("results.db", read_only=True) as store:
            (row,) = store.experiments()
            metrics = store.metrics(row["experiment_id"])
        checked = load_config(Path("runs") / row["experiment_id"] / CONFIG_FILE)
        data = load_splits(checked.dataset_type, checked.dataset_name, checked.dataset_params, checked.seed)
    seconds, samples, epochs = metrics["training_duration_seconds"], data.train.samples_per_epoch, config["epochs"]
    return {"config": name, "samples": samples, "epochs": epochs, "epoch_s": seconds, "all_s": seconds * epochs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, choices=CONFIGS)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/how_long_DEVICE.json")
    arguments = parser.parse_args()
    rows = []
    print("| config | samples | one epoch, s | samples per second | epochs of the config | all, min |")
    print("|---|---|---|---|---|---|")
    for name in arguments.configs:
        row = measured(name, arguments.data_dir, arguments.device)
        if row is None:
            continue
        rows.append(row)
        speed = row["samples"] / row["epoch_s"]
        print(
            f"| `{name}` | {row['samples']:,} | {row['epoch_s']:.1f} | {speed:,.0f} | {row['epochs']} "
            f"| {row['all_s'] / 60:.1f} |",
            flush=True,
        )
    output = arguments.output or RESULTS / f"how_long_{arguments.device}.json"
    output.write_text(json.dumps({"machine": machine(arguments.device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
