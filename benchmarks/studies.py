"""Do the sampler and the pruner of a study earn their place? Each against doing without, on the same budget.

`--question sampler`: the best validation macro-F1 after N trials of TPE and of random search on the addition task, in
several repetitions with seeds of their own. `--question pruner`: the epochs that the median pruner leaves out of a
study of parity over all four model types, and the best score with and without it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from research_eval.analysis.statistics import mean_interval
from research_eval.main import main as run_main
from research_eval.studies.adapter import trial_records

DATA = {
    "sampler": "--dataset_name addition --syn_num_samples 2000 --syn_seq_len 8 --syn_vocab_size 8 --model_types dense",
    "pruner": "--dataset_name parity --syn_num_samples 1000 --syn_seq_len 8",
}
TRAINING = {"sampler": "--epochs 8 --batch_size 64", "pruner": "--epochs 10 --batch_size 64"}
SMALL = {"model_params": {"embed_dim": [16, 32]}}  # so that a study takes minutes
ARMS = {
    "sampler": {"tpe": ["--pruner", "none"], "random": ["--sampler", "random", "--pruner", "none"]},
    "pruner": {"median": ["--pruner", "median"], "none": ["--pruner", "none"]},
}


@dataclass(frozen=True)
class Repetition:
    """One study: its best score, and after each trial the best so far."""

    arm: str
    seed: int
    best: float
    best_so_far: list[float]
    epochs: int
    finished: int
    pruned: int


def repeat(question: str, arm: str, seed: int, num_trials: int) -> Repetition:
    """Run a study in a folder of its own."""
    import optuna

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        command = ["--study_name", f"{arm}_{seed}", "--storage", "studies.db", "--n_trials", str(num_trials), "--quiet"]
        Path("space.json").write_text(json.dumps(SMALL))
        command += [
            "--search_space",
            "space.json",
            *DATA[question].split(),
            *TRAINING[question].split(),
            *ARMS[question][arm],
            "--seed",
            str(seed),
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            code = run_main(command)
        if code:
            raise SystemExit(f"{arm}, seed {seed}: exit code {code}")
        records = trial_records(optuna.load_study(study_name=f"{arm}_{seed}", storage="sqlite:///studies.db"))
    so_far = [0.0]
    for record in records:
        so_far.append(max(so_far[-1], record.values[0] if record.values and record.status == "finished" else 0.0))
    print(f"{arm}, seed {seed}: best {so_far[-1]:.4f}", flush=True)
    counts = [sum(record.status == status for record in records) for status in ("finished", "pruned")]
    return Repetition(arm, seed, so_far[-1], so_far[1:], sum(record.epochs for record in records), *counts)


def table(question: str, found: list[Repetition], num_trials: int) -> str:
    """Markdown: one row per arm, then the paired difference."""
    lines = ["| arm | N | median best | mean best | epochs trained |", "|---|---|---|---|---|"]
    scores = {}
    for arm in ARMS[question]:
        runs = [one for one in found if one.arm == arm]
        scores[arm] = [one.best for one in runs]
        interval = mean_interval(scores[arm])
        half = f" ± {(interval.high - interval.low) / 2:.4f}" if interval is not None else ""
        epochs = statistics.mean(one.epochs for one in runs)
        lines.append(
            f"| {arm} | {len(runs)} x {num_trials} trials | {statistics.median(scores[arm]):.4f} "
            f"| {statistics.mean(scores[arm]):.4f}{half} | {epochs:.0f} |"
        )
    first, second = scores.values()
    wins = sum(a > b for a, b in zip(first, second, strict=True))
    ties = sum(a == b for a, b in zip(first, second, strict=True))
    lines += ["", f"{' against '.join(scores)}, paired by seed: {wins} better, {ties} equal of {len(first)}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--question", choices=ARMS, default="sampler")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="studies at the same time")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/studies.json"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [
        (arguments.question, arm, seed, arguments.trials)
        for seed in range(arguments.seeds)
        for arm in ARMS[arguments.question]
    ]
    with ProcessPoolExecutor(arguments.workers) as pool:
        found = list(pool.map(repeat, *zip(*jobs, strict=True)))
    text = table(arguments.question, found, arguments.trials)
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    known[arguments.question] = [asdict(one) for one in found]
    arguments.output.write_text(json.dumps(known, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
