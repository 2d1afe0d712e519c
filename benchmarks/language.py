"""The tables of language models: arms of equal active FLOPs on `tiny_shakespeare`, each with its own learning rate.

The rate of an arm is chosen without the validation text: on the last tenth of the training text, with a seed that is
not reported and half of the steps. The reported seeds train on the whole training text, and every target of the
validation text is scored once. `--data_dir` holds the folder `tiny_shakespeare`; `--work` keeps the runs, so that a
second call continues.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from pyarrow import parquet

from research_eval.analysis.statistics import half_width as interval
from research_eval.experiment import run
from research_eval.schema import config_from_dict

TUNING_SEED = 100
RATES = (0.02, 0.04, 0.08)  # of muon; the parameters that it leaves to AdamW have 3e-3 in every arm
STEPS, TUNING_STEPS, BLOCK, BATCH = 800, 400, 64, 32
WIDTH = {"embed_dim": 64, "num_heads": 2}
# Each arm: model type, its parameters beside WIDTH, parameters of the optimiser, share of the steps.
ARMS: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "dense": ("dense", {}, {}, 1.0),
    "goe, bigram table": ("goe", {"route": "bigram"}, {}, 1.0),
    "goe, learned from features": ("goe", {}, {}, 1.0),
    "moe, learned from states": ("moe", {}, {}, 1.0),
    "moe, bigram table": ("moe", {"route": "bigram"}, {}, 1.0),
    "dense, hashed bigrams": ("dense", {"bigram_buckets": 2048}, {}, 1.0),
    "dense, as many parameters": ("dense", {"dim_feedforward": 1024}, {}, 1.0),
    "dense, more steps": ("dense", {}, {}, 1.35),
    "goe, router that never learns": ("goe", {}, {"router_lr_mult": 0.0}, 1.0),
    "goe, hash of four tokens": ("goe", {"route": "random"}, {}, 1.0),
    "goe, learned from states": ("goe", {"router_input": "state"}, {}, 1.0),
    "goe, learned bigram table": (
        "goe",
        {"route": "bigram", "learned_table": True, "straight_through": True},
        {},
        1.0,
    ),
    "goe, trigram table": ("goe", {"route": "trigram"}, {}, 1.0),
    "goe, bigram table, hashed bigrams": ("goe", {"route": "bigram", "bigram_buckets": 2048}, {}, 1.0),
    "looped": ("looped", {}, {}, 1.0),
    "lstm": ("lstm", {"num_heads": None}, {}, 1.0),
}


def config_of(arm: str, seed: int, rate: float, data_dir: Path, steps: int) -> dict[str, Any]:
    """The config of one run of an arm."""
    model_type, params, optimizer, share = ARMS[arm]
    params = {name: value for name, value in {**WIDTH, **params}.items() if value is not None}
    total = round(steps * share)
    return {
        "model_type": model_type,
        "dataset_type": "language_modeling",
        "dataset_name": data_dir.name,
        "experiment_name": f"lm_{arm}",
        "batch_size": BATCH,
        "seed": seed,
        "dataset_params": {"data_dir": str(data_dir), "block_size": BLOCK, "ngram_baseline": False},
        "model_params": params,
        "optimizer_params": {"name": "muon", "lr": rate, "adam_lr": 3e-3, **optimizer},
        "scheduler_params": {
            "name": "wsd",
            "warmup_factor": 0.0625,
            "decay_factor": 1.0,
            "min_lr_factor": 0.05,
        },
        "training_params": {"max_steps": total, "eval_every": total, "device": "cpu", "num_threads": 1},
    }


def tuning_text(source: Path, folder: Path) -> Path:
    """Write the training text as two parts, nine tenths for training and the rest to choose rates."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(parquet.read_table(source / "train.parquet").column("text").to_pylist())
    cut = text.rindex("\n", 0, len(text) * 9 // 10) + 1
    (folder / "train.txt").write_text(text[:cut], encoding="utf-8", newline="")
    (folder / "validation.txt").write_text(text[cut:], encoding="utf-8", newline="")
    return folder


def metrics(config: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a run; a finished run of the same config is not repeated."""
    result = run(config_from_dict(config), db="results.db", resume=True, quiet=True, to_csv=False, show_data=False)
    found = result.metrics
    print(
        config["experiment_name"], config["seed"], config["optimizer_params"]["lr"], found["final_val_loss"], flush=True
    )
    return found


def cell(arm: str, seeds: list[int], source: Path, tuning: Path) -> dict[str, Any]:
    """Choose the rate of an arm, then train the reported seeds."""
    tried = {rate: metrics(config_of(arm, TUNING_SEED, rate, tuning, TUNING_STEPS))["final_val_loss"] for rate in RATES}
    rate = min(tried, key=tried.__getitem__)
    runs = [metrics(config_of(arm, seed, rate, source, STEPS)) for seed in seeds]
    return {
        "arm": arm,
        "rate": rate,
        "at_the_edge": rate in (RATES[0], RATES[-1]),
        "tuning": tried,
        "seeds": seeds,
        "losses": [found["final_val_loss"] for found in runs],
        "bits_per_byte": [found["final_val_bits_per_byte"] for found in runs],
        "parameters": runs[0]["param_count"],
        "active_parameters": runs[0]["active_param_count"],
        "flops_per_token": runs[0]["inference_flops_per_token"],
        "tokens_per_second": statistics.median(found["tokens_per_second"] for found in runs),
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: a row per arm, with the difference to dense over the seeds that both have."""
    lines = [
        "| arm | nats per character | minus dense | rate | MFLOPs per token | parameters | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    base = next(entry for entry in cells if entry["arm"] == "dense")
    dense = dict(zip(base["seeds"], base["losses"], strict=True))
    for entry in cells:
        losses = entry["losses"]
        gaps = [loss - dense[seed] for seed, loss in zip(entry["seeds"], losses, strict=True) if seed in dense]
        gap = "" if entry is base else f"{statistics.mean(gaps):+.3f} ± {interval(gaps):.3f}"
        edge = " (edge)" if entry["at_the_edge"] else ""
        lines.append(
            f"| {entry['arm']} | {statistics.mean(losses):.3f} ± {interval(losses):.3f} | {gap} "
            f"| {entry['rate']:g}{edge} "
            f"| {entry['flops_per_token'] / 1e6:.3f} | {entry['parameters'] / 1e3:,.0f} k "
            f"| {entry['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("language"), help="folder for the texts and the runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/language.json"))
    arguments = parser.parse_args()
    source, output = (arguments.data_dir / "tiny_shakespeare").resolve(), arguments.output.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.work)
    tuning = tuning_text(source, Path("tuning").resolve())
    cells: list[dict[str, Any]] = []
    for arm in arguments.arms:
        cells.append(cell(arm, arguments.seeds, source, tuning))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(cells, indent=1) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
