"""CPU seconds to a validation score on AG News: the shipped recipe, and the Trainer of transformers with an equal BERT.

Both get the same training and validation rows, the same word ids and one thread, and are trained once per length of
training, each with a schedule of its own. `--tune` chooses the rates of both on seed 100, with the same number of
trials. `--draw` only prints and draws what was measured before. The Trainer needs `accelerate`, which is in no
requirements file.

N samples  L length  C classes
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from sklearn.metrics import f1_score
from timing import machine

from research_eval import experiment
from research_eval.analysis.statistics import half_width
from research_eval.config.jsonc import load_json
from research_eval.datasets.providers import load_splits
from research_eval.datasets.token_data import DataSplits, TokenData
from research_eval.schema import config_from_dict
from research_eval.training.fit import fit

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "examples" / "configs" / "ag_news_one_epoch.json"
RATES = {"ours": (0.002, 0.004, 0.008, 0.016), "trainer": (0.0005, 0.001, 0.002, 0.004)}
TAKEN = {"ours": 0.008, "trainer": 0.002}
DROPOUT = {"trainer": 0.0, "trainer with dropout": 0.1}
ARMS = ("ours", *DROPOUT)
STEPS = 501  # of an epoch
PICTURE = ROOT / "docs/images/time_to_score.png"
COLOURS = {"ours": "#1F6FB2", "trainer": "#C8553D", "trainer with dropout": "#8A8A8A"}
EPOCHS = (0.5, 0.65, 1.0, 2.0)


def ours(epochs: float, rate: float, seed: int, data_dir: Path) -> dict[str, float]:
    """Train the recipe for so many epochs: CPU seconds with the evaluations, and the validation score at the end."""
    config = load_json(RECIPE) | {"epochs": math.ceil(epochs), "seed": seed}
    config["dataset_params"] |= {"data_dir": str(data_dir)}
    config["optimizer_params"] |= {"lr": rate}
    config["training_params"] |= {"test": False, "max_steps": round(epochs * STEPS)}
    inner, seconds = fit, []

    def timed(*arguments: Any) -> Any:
        begun = time.process_time()
        ended = inner(*arguments)
        seconds.append(time.process_time() - begun)
        return ended

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), mock.patch.object(experiment, "fit", timed):
        result = experiment.run(config_from_dict(config), db="results.db", quiet=True)
    return {"cpu_s": seconds[0], "f1": result.metrics["final_val_f1"], "parameters": result.metrics["param_count"]}


def trainer(epochs: float, rate: float, seed: int, data_dir: Path, dropout: float) -> dict[str, float]:
    """The same with transformers' Trainer: AdamW, 10 % warm-up, linear decay, batches of similar lengths."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    recipe = config_from_dict(load_json(RECIPE) | {"seed": seed})
    params = recipe.dataset_params | {"data_dir": str(data_dir)}
    splits: DataSplits = load_splits(recipe.dataset_type, recipe.dataset_name, params, seed)
    torch.set_num_threads(1)
    first = splits.vocab_size
    config = BertConfig(
        vocab_size=first + 1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=192,
        max_position_embeddings=160,
        num_labels=splits.num_classes,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            learning_rate=rate,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=256,
            warmup_steps=0.1,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=seed,
            disable_tqdm=True,
            logging_strategy="no",
        )
        begun = time.process_time()
        engine = Trainer(model, arguments, train_dataset=rows(splits.train, first), data_collator=padded)
        engine.train()
        predicted = engine.predict(rows(splits.validation, first))  # in an order of its own
        seconds = time.process_time() - begun
    f1 = f1_score(predicted.label_ids, np.asarray(predicted.predictions).argmax(-1), average="macro")
    return {"cpu_s": seconds, "f1": float(f1), "parameters": sum(one.numel() for one in model.parameters())}


def rows(data: TokenData, first: int) -> list[dict[str, Any]]:
    """The samples as the Trainer reads them, each behind a first token for the class."""
    parts = np.split(data.tokens, data.offsets[1:-1])
    return [
        {"input_ids": [first, *part.tolist()], "labels": int(label)}
        for part, label in zip(parts, data.labels, strict=True)
    ]


def padded(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(sample["input_ids"]) for sample in samples]
    ids_NL = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths_N = torch.tensor([len(one) for one in ids])
    return {
        "input_ids": ids_NL,
        "attention_mask": (torch.arange(ids_NL.shape[1]) < lengths_N[:, None]).long(),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, help="folder of AG News")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--epochs", type=float, nargs="+", default=EPOCHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--tune", action="store_true", help="one epoch per rate, on seed 100")
    parser.add_argument("--draw", action="store_true", help="train nothing: read --output")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--one", nargs=4, metavar=("ARM", "EPOCHS", "RATE", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/time_to_score.json")
    arguments = parser.parse_args()
    if arguments.draw:
        show(json.loads(arguments.output.read_text())["runs"], arguments.picture)
        return
    if arguments.data_dir is None:
        parser.error("--data_dir: which folder has AG News?")
    if arguments.one:
        arm, epochs, rate, seed = arguments.one
        settings = float(epochs), float(rate), int(seed), arguments.data_dir.absolute()
        print(json.dumps(ours(*settings) if arm == "ours" else trainer(*settings, DROPOUT[arm])))
        return

    def trained(arm: str, epochs: float, rate: float, seed: int) -> dict[str, Any]:
        """One training, in a process of its own."""
        command = [sys.executable, __file__, "--data_dir", str(arguments.data_dir)]
        command += ["--one", arm, str(epochs), str(rate), str(seed)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        found = {"arm": arm, "epochs": epochs, "rate": rate, "seed": seed, **json.loads(answer)}
        print(found, flush=True)
        return found

    kind = {arm: "ours" if arm == "ours" else "trainer" for arm in arguments.arms}
    if arguments.tune:
        for arm in arguments.arms:
            for rate in RATES[kind[arm]]:
                trained(arm, 1.0, rate, 100)
        return
    found = [
        trained(arm, epochs, TAKEN[kind[arm]], seed)
        for seed in arguments.seeds
        for epochs in arguments.epochs
        for arm in arguments.arms
    ]
    arguments.output.write_text(json.dumps({"machine": machine("cpu"), "runs": found}, indent=1) + "\n")
    show(found, arguments.picture)


def show(found: list[dict[str, Any]], picture: Path) -> None:
    """Print the table, and how many times sooner ours has the best mean score of each other arm; draw the curves."""
    print(table(found))
    curves = {arm: curve(found, arm) for arm in dict.fromkeys(one["arm"] for one in found)}
    for arm, (seconds, scores) in curves.items():
        if arm != "ours" and "ours" in curves:
            best = int(np.argmax(scores))
            needed = time_to(float(scores[best]), *curves["ours"])
            print(f"{arm}: {scores[best]:.4f} after {seconds[best]:.0f} s; ours after {needed:.0f} s")
            print(f"ours is {seconds[best] / needed:.2f} times as fast to this score")
    draw(found, curves, picture)


def curve(found: list[dict[str, Any]], arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean seconds and mean score of an arm, from the shortest to the longest training."""
    groups = [
        [one for one in found if (one["arm"], one["epochs"]) == (arm, epochs)]
        for epochs in sorted({one["epochs"] for one in found})
    ]
    means = [[statistics.mean(one[name] for one in group) for name in ("cpu_s", "f1")] for group in groups if group]
    return np.array(means)[:, 0], np.array(means)[:, 1]


def time_to(score: float, seconds: np.ndarray, scores: np.ndarray) -> float:
    """When a curve of straight pieces first has the score; NaN if never."""
    for number in range(1, len(scores)):
        if scores[number - 1] <= score <= scores[number]:
            share = (score - scores[number - 1]) / (scores[number] - scores[number - 1])
            return float(seconds[number - 1] + share * (seconds[number] - seconds[number - 1]))
    return float(seconds[0]) if scores[0] >= score else math.nan


def draw(found: list[dict[str, Any]], curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Validation score against CPU seconds: a dot per training, a line through the means."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        for arm, (seconds, scores) in curves.items():
            own = [one for one in found if one["arm"] == arm]
            dots = [one["cpu_s"] for one in own], [one["f1"] for one in own]
            axes.plot(*dots, "o", color=COLOURS[arm], markersize=3, alpha=0.6)
            axes.plot(seconds, scores, color=COLOURS[arm], label=arm)
        axes.set_xlabel("CPU seconds of the training, with its evaluations")
        axes.set_ylabel("validation macro-F1")
        axes.legend(frameon=False, loc="lower right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| | epochs | CPU seconds | validation macro-F1 |", "|---|---|---|---|"]
    for arm, epochs in dict.fromkeys((one["arm"], one["epochs"]) for one in found):
        group = [one for one in found if (one["arm"], one["epochs"]) == (arm, epochs)]
        scores, seconds = [one["f1"] for one in group], [one["cpu_s"] for one in group]
        half = f" ± {half_width(scores):.4f}" if len(scores) > 1 else ""
        lines.append(f"| {arm} | {epochs} | {statistics.mean(seconds):.0f} | {statistics.mean(scores):.4f}{half} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
