"""The table of small text: the default `goe_original` against a dense model of equal FLOPs, on thousands of rows.

Every model gets the same tuning: each learning rate of a grid with two seeds that are not reported, judged by macro-F1
on validation rows. The reported seeds are scored on test rows that no choice has seen. `--data_dir` holds the sets (one
folder each, with `train.parquet` and a test split); the small sets are written to `--work`, with its results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet
from research import equal_text

from research_eval.analysis.statistics import half_width as interval
from research_eval.datasets.text.splits import folded
from research_eval.experiment import run
from research_eval.routing.alarms import STILL_LEARNING
from research_eval.schema import config_from_dict

TUNING_SEEDS = (100, 101)
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)  # within the range of a study
# The same width for all: three blocks, or a path of three steps. Gated experts have a third matrix and fewer columns.
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"num_layers": 3, "dim_feedforward_factor": 3},
    "goe_original": {},
    "goe_original, own gradients": {"expert_sharing": 0.0},  # the model type stands before the comma
    "moe": {"num_layers": 3, "dim_feedforward_factor": 3},
}


@dataclass(frozen=True)
class SmallSet:
    """Rows of a set: how many for training and validation, which split is the test, and which classes are kept."""

    source: str
    max_length: int
    train: int
    validation: int
    test: str
    classes: tuple[str, ...] = ()


NEWSGROUPS = (  # six of twenty that are hard to tell apart
    *("comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware"),
    *("comp.sys.mac.hardware", "comp.windows.x", "misc.forsale"),
)
SETS = {
    "ag_news": SmallSet("ag_news", 64, 3000, 1000, "test"),
    "mr": SmallSet("mr", 64, 4000, 1000, "validation"),
    "newsgroups6": SmallSet("newsgroups20", 128, 2161, 800, "test", NEWSGROUPS),
    "sst2": SmallSet("sst2", 64, 4000, 1000, "validation"),
    "trec": SmallSet("trec", 40, 4000, 900, "validation"),
}
MAX_TEST = 3000  # rows
Rows = tuple[NDArray[np.object_], NDArray[np.object_]]  # texts, class names


def prepare(name: str, data_dir: Path, folder: Path) -> None:
    """Write the three splits of a set. Training and validation share no text with each other or with the test."""
    wanted, rng = SETS[name], np.random.default_rng(0)
    train, test = (_read(data_dir / wanted.source, split, wanted.classes) for split in ("train", wanted.test))
    test_texts = set(map(folded, test[0]))
    fresh = {folded(text): row for row, text in reversed(list(enumerate(train[0])))}
    rows = rng.permutation([row for text, row in fresh.items() if text not in test_texts])
    _write(folder / "validation.parquet", train, rows[: wanted.validation])
    _write(folder / "train.parquet", train, rows[wanted.validation : wanted.validation + wanted.train])
    _write(folder / "test.parquet", test, rng.permutation(len(test[0]))[:MAX_TEST])


def _read(folder: Path, split: str, classes: tuple[str, ...]) -> Rows:
    names = json.loads((folder / "dataset_info.json").read_text())["label_names"]
    table = parquet.read_table(folder / f"{split}.parquet").to_pydict()
    kept = [
        (text, names[label])
        for text, label in zip(table["text"], table["label"], strict=True)
        if not classes or names[label] in classes
    ]
    texts, labels = zip(*kept, strict=True)
    return np.array(texts, object), np.array(labels, object)


def _write(path: Path, rows: Rows, chosen: NDArray[np.int64]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"text": rows[0][chosen].tolist(), "label": rows[1][chosen].tolist()}), path)


def train(name: str, model: str, lr: float, seed: int, work: Path, test: bool) -> dict[str, Any]:
    """The metrics of one run; a finished run of the same config is not repeated."""
    config = {
        "model_type": model.split(",")[0],
        "dataset_type": "real_world",
        "dataset_name": name,
        "experiment_name": f"{name}_{model}",
        "epochs": 4,
        "batch_size": 32,
        "seed": seed,
        "dataset_params": {"data_dir": str(work / name), "max_length": SETS[name].max_length},
        "model_params": MODELS[model],
        "optimizer_params": {"lr": lr},
        "training_params": {"device": "cpu", "num_threads": 1, "test": test},
    }
    result = run(config_from_dict(config), db=str(work / "results.db"), resume=True, quiet=True, to_csv=False)
    score = "test_f1" if test else "final_val_f1"
    print(f"{name} {model} lr {lr:g} seed {seed}: {score} {result.metrics[score]:.4f}", flush=True)
    return result.metrics


def cell(name: str, model: str, work: Path, seeds: int) -> dict[str, Any]:
    """Choose the learning rate of a model on a set, then train and score the reported seeds."""
    tuning = {
        lr: statistics.mean(train(name, model, lr, seed, work, test=False)["final_val_f1"] for seed in TUNING_SEEDS)
        for lr in LEARNING_RATES
    }
    lr = max(tuning, key=tuning.__getitem__)
    runs = [train(name, model, lr, seed, work, test=True) for seed in range(seeds)]
    return {
        "set": name,
        "model": model,
        "lr": lr,
        "at_the_edge": lr in (LEARNING_RATES[0], LEARNING_RATES[-1]),
        "tuning": tuning,
        "scores": [found["test_f1"] for found in runs],
        "still_learning": sum(STILL_LEARNING in str(found["alarms"]) for found in runs),
        "flops": runs[0]["inference_flops_per_sample"],
        "parameters": runs[0]["param_count"],
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: a row per set and model, with the paired difference to the dense model."""
    lines = [
        "| set | model | macro-F1 (mean, 95 % t-interval) | minus dense | lr | MFLOPs per sample | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = {entry["set"]: entry for entry in cells if entry["model"] == "dense"}
    for entry in cells:
        scores, base = entry["scores"], dense[entry["set"]]["scores"]
        gaps = [score - other for score, other in zip(scores, base, strict=True)]
        gap = (
            ""
            if entry["model"] == "dense"
            else f"{statistics.mean(gaps):+.4f} ± {interval(gaps):.4f}{equal_text(gaps)}"
        )
        edge = " (edge)" if entry["at_the_edge"] else ""
        lines.append(
            f"| {entry['set']} | `{entry['model']}` | {statistics.mean(scores):.4f} ± {interval(scores):.4f} | {gap} "
            f"| {entry['lr']:g}{edge} | {entry['flops'] / 1e6:.2f} | {entry['parameters'] / 1e6:.2f} M |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument(
        "--models", nargs="+", default=("dense", "goe_original", "goe_original, own gradients"), choices=MODELS
    )
    parser.add_argument("--seeds", type=int, default=10, help="number of reported seeds")
    parser.add_argument("--work", type=Path, default=Path("small_text"), help="folder for the sets and the runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/small_text.json"))
    arguments = parser.parse_args()
    data_dir, output = arguments.data_dir.resolve(), arguments.output.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.work)
    for name in arguments.sets:
        prepare(name, data_dir, Path(name))
    cells = [cell(name, model, Path(), arguments.seeds) for name in arguments.sets for model in arguments.models]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(cells, indent=1) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
