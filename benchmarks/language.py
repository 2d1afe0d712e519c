"""The tables of language models: arms of equal active FLOPs on `tiny_shakespeare`, each with its own learning rate.

The rate of an arm is chosen without the validation text: on the last tenth of the training text, with a seed that is
not reported and half of the steps. The reported seeds train on the whole training text, and every target of the
validation text is scored once. `--data_dir` holds the folder `tiny_shakespeare`; `--work` keeps the runs, so that a
second call continues.

`--curve` trains some of the arms with fewer steps, at the rates of the results in `--known`. A schedule always ends
with its run. The last point of the curve is the one of the results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyarrow import parquet
from rates import best, beyond
from research import write_page

from research_eval.analysis.statistics import half_width as interval
from research_eval.experiment import run
from research_eval.schema import config_from_dict

TUNING_SEED = 100
RATES = (0.02, 0.04, 0.08)  # of muon; the parameters that it leaves to AdamW have 3e-3 in every arm
STEPS, TUNING_SHARE, BLOCK, BATCH = 800, 0.5, 64, 32
WIDTH = {"embed_dim": 64, "num_heads": 2}
ADAMW = {"name": "adamw", "adam_beta2": 0.95}
ADAMW_RATES = (0.003, 0.006, 0.012)
POOL = 32  # experts of the arms whose active parameters are less than a quarter of all


@dataclass(frozen=True)
class Arm:
    """What one arm has beside WIDTH. `rate_of` is the arm whose rate it takes, instead of a choice of its own."""

    model_type: str
    params: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    rates: tuple[float, ...] = RATES
    rate_of: str | None = None


BIGRAM, HASHED = {"route": "bigram"}, {"bigram_buckets": 2048}
SHARED, DROPOUT = {"dim_feedforward": 128, "shared_expert_dim": 128}, {"dropout": 0.1}
STATE, FROZEN = {"router_input": "state"}, {"router_lr_mult": 0.0}
ARMS: dict[str, Arm] = {
    "dense": Arm("dense"),
    "goe, bigram table": Arm("goe", BIGRAM),
    "goe, learned from features": Arm("goe"),
    "moe, learned from states": Arm("moe"),
    "moe, bigram table": Arm("moe", BIGRAM),
    "dense, hashed bigrams": Arm("dense", HASHED),
    # A row for nearly every pair of characters, and as many parameters as the pool of 32.
    "dense, hashed bigrams, large": Arm("dense", {"bigram_buckets": 14336}),
    "dense, as many parameters": Arm("dense", {"dim_feedforward": 1024}),
    "dense, more steps": Arm("dense", steps=round(1.35 * STEPS)),
    "goe, router that never learns": Arm("goe", optimizer=FROZEN),
    "goe, hash of four tokens": Arm("goe", {"route": "random"}),
    "goe, learned from states": Arm("goe", STATE),
    "goe, learned bigram table": Arm("goe", BIGRAM | {"learned_table": True, "straight_through": True}),
    "goe, trigram table": Arm("goe", {"route": "trigram"}),
    "goe, bigram table, hashed bigrams": Arm("goe", BIGRAM | HASHED),
    "looped": Arm("looped"),
    "lstm": Arm("lstm", {"num_heads": None}),
    # One change each of the learned routes.
    "goe, learned bigram table, gate 2 p": Arm("goe", BIGRAM | {"learned_table": True}),
    "goe, learned from states, slow router": Arm("goe", STATE, {"router_lr_mult": 0.2}),
    "goe, learned from states, two experts": Arm("goe", STATE | {"top_k_experts": 2, "dim_feedforward": 128}),
    "dense, AdamW": Arm("dense", optimizer=ADAMW, rates=ADAMW_RATES),
    "goe, bigram table, AdamW": Arm("goe", BIGRAM, ADAMW, rates=ADAMW_RATES),
    "goe_original, bigram table, exits": Arm("goe_original", BIGRAM | {"halt": "confidence"}),
    "goe, queries and outputs too, bigram table": Arm("goe", BIGRAM | {"routed_parts": "qo_ffn"}),
    "goe, learned from states, starts as layers": Arm("goe", STATE | {"home_bias": 4.0}),
    "goe, learned from states, gate 1 + p - sg(p)": Arm("goe", STATE | {"straight_through": True}),
    # Half of the feed-forward part is the same for all tokens, and the routed half comes from twice as many experts.
    "goe, learned from states, half of it shared": Arm("goe", STATE | SHARED | {"num_total_experts": 32}),
    "moe, learned from states, half of it shared": Arm("moe", SHARED | {"num_experts": 8}),
    "goe, bigram table, half of it shared": Arm("goe", BIGRAM | SHARED | {"num_total_experts": 32}),
    "goe, bigram table, dropout": Arm("goe", BIGRAM | DROPOUT),
    "goe, learned from states, dropout": Arm("goe", STATE | DROPOUT),
    "dense, deep": Arm("dense", {"num_layers": 12}),
}
# The pool of 32, at the rates of the pool of 16.
for NAME in ("goe, bigram table", "goe, learned from states", "goe, hash of four tokens", "moe, learned from states"):
    SIZE = {"num_experts": POOL // 4} if ARMS[NAME].model_type == "moe" else {"num_total_experts": POOL}
    ARMS[f"{NAME}, pool of {POOL}"] = replace(ARMS[NAME], params=ARMS[NAME].params | SIZE, rate_of=NAME)
ARMS[f"goe, states, router that never learns, pool of {POOL}"] = replace(
    ARMS[f"goe, learned from states, pool of {POOL}"], optimizer=FROZEN
)

CURVE_STEPS = (200, 400)
CURVE_ARMS = (
    *("dense", "dense, hashed bigrams"),
    *(f"moe, learned from states, pool of {POOL}", f"goe, bigram table, pool of {POOL}"),
    *(f"goe, states, router that never learns, pool of {POOL}", f"goe, learned from states, pool of {POOL}"),
)
Points = dict[str, dict[int, list[float]]]  # by arm and number of steps, the losses of the seeds 0, 1, ...


def config_of(arm: str, seed: int, rate: float, data_dir: Path, share: float = 1.0) -> dict[str, Any]:
    """The config of one run of an arm, with this share of its steps."""
    one = ARMS[arm]
    params = {name: value for name, value in {**WIDTH, **one.params}.items() if value is not None}
    optimizer = {"name": "muon", "lr": rate, **one.optimizer}
    if optimizer["name"] == "muon":
        optimizer["adam_lr"] = 3e-3
    total = round(one.steps * share)
    return {
        "model_type": one.model_type,
        "dataset_type": "language_modeling",
        "dataset_name": data_dir.name,
        "experiment_name": f"lm_{arm}",
        "batch_size": BATCH,
        "seed": seed,
        "dataset_params": {"data_dir": str(data_dir), "block_size": BLOCK, "ngram_baseline": False},
        "model_params": params,
        "optimizer_params": optimizer,
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


def chosen_rate(arm: str, tuning: Path) -> tuple[float, dict[float, float]]:
    """The rate with the lowest loss, and the losses of all rates."""
    losses: dict[float, float] = {}
    wanted = list(ARMS[arm].rates)
    while wanted:
        for rate in wanted:
            losses[rate] = metrics(config_of(arm, TUNING_SEED, rate, tuning, TUNING_SHARE))["final_val_loss"]
        scores = {rate: -loss for rate, loss in losses.items()}
        wanted = [rate for rate in (beyond(scores),) if rate is not None]
    return best(scores), losses


def cell(arm: str, seeds: list[int], source: Path, tuning: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Choose the rate of an arm, or take that of another arm from `known`; then train the reported seeds."""
    other = known.get(ARMS[arm].rate_of or "")
    if other is None:
        rate, tried = chosen_rate(ARMS[arm].rate_of or arm, tuning)
    else:
        rate, tried = other["rate"], other["tuning"]
    runs = [metrics(config_of(arm, seed, rate, source)) for seed in seeds]
    return {
        "arm": arm,
        "rate": rate,
        "tuning": tried,
        "seeds": seeds,
        "steps": ARMS[arm].steps,
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
        "| arm | seeds | nats per character | minus dense | rate | MFLOPs per token | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = {
        seed: loss
        for entry in cells
        if entry["arm"] == "dense"
        for seed, loss in zip(entry["seeds"], entry["losses"], strict=True)
    }
    for entry in cells:
        losses = entry["losses"]
        gaps = [loss - dense[seed] for seed, loss in zip(entry["seeds"], losses, strict=True) if seed in dense]
        is_other = gaps and entry["arm"] != "dense"
        gap = f"{statistics.mean(gaps):+.3f} ± {interval(gaps):.3f}" if is_other else ""
        lines.append(
            f"| {entry['arm']} | {len(losses)} | {statistics.mean(losses):.3f} ± {interval(losses):.3f} | {gap} "
            f"| {entry['rate']:g} | {entry['flops_per_token'] / 1e6:.3f} | {entry['parameters'] / 1e3:,.0f} k |"
        )
    return "\n".join(lines)


def curve(seeds: list[int], source: Path, known: dict[str, Any]) -> Points:
    """The losses of the arms with fewer steps, and those of `known`. All arms get a seed before the next one."""
    points: Points = {arm: {steps: [] for steps in CURVE_STEPS} for arm in CURVE_ARMS}
    for seed in seeds:
        for steps in CURVE_STEPS:
            for arm in CURVE_ARMS:
                config = config_of(arm, seed, known[arm]["rate"], source, steps / ARMS[arm].steps)
                points[arm][steps].append(metrics(config)["final_val_loss"])
    for arm, of_arm in points.items():
        losses = dict(zip(known[arm]["seeds"], known[arm]["losses"], strict=True))
        of_arm[known[arm]["steps"]] = [losses[seed] for seed in seeds]
    return points


def curve_table(points: Points) -> str:
    """Markdown: the losses over the steps, then what the last arm gains on each other one, paired by seed."""
    *others, last = points
    head = [f"{steps:,} steps" for steps in points[last]]
    rule = "|---" * (1 + len(head)) + "|"
    lines = [f"| nats per character | {' | '.join(head)} |", rule]
    for arm, of_arm in points.items():
        cells = [f"{statistics.mean(losses):.3f} ± {interval(losses):.3f}" for losses in of_arm.values()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", f"| {last}, minus | {' | '.join(head)} |", rule]
    for arm in others:
        pairs = [zip(points[last][steps], losses, strict=True) for steps, losses in points[arm].items()]
        gaps = [[own - other for own, other in pair] for pair in pairs]
        cells = [f"{statistics.mean(gap):+.3f} ± {interval(gap):.3f}" for gap in gaps]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("language"), help="folder for the texts and the runs")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/language.json or language_curve.json")
    parser.add_argument("--known", type=Path, help="earlier results, for the rates that arms take from others")
    parser.add_argument("--curve", action="store_true", help="train fewer steps; --known defaults to the results")
    parser.add_argument("--page", type=Path, help="write the table of the curve into this page")
    arguments = parser.parse_args()
    results = Path("benchmarks/results")
    if arguments.curve:
        arguments.known = arguments.known or results / "language.json"
    known = {} if arguments.known is None else {one["arm"]: one for one in json.loads(arguments.known.read_text())}
    default = "language_curve.json" if arguments.curve else "language.json"
    output = (arguments.output or results / default).resolve()
    source = (arguments.data_dir / "tiny_shakespeare").resolve()
    page = arguments.page and arguments.page.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.work)
    if arguments.curve:
        points = curve(arguments.seeds, source, known)
        output.write_text(json.dumps(points, indent=1) + "\n")
        print(curve_table(points))
        if page:
            write_page(page, {"language curve": curve_table(points)})
        return
    tuning = tuning_text(source, Path("tuning").resolve())
    cells: list[dict[str, Any]] = []
    for arm in arguments.arms:
        cells.append(cell(arm, arguments.seeds, source, tuning, known))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(cells, indent=1) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
