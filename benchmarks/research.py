"""The results of docs/research.md: every arm of every study over its seeds, with paired differences and intervals.

An arm is a config in `examples/research/<study>/`. Finished runs in the results database are not repeated, so an
interrupted call goes on where it was. `--page` writes the tables into the page; studies that need local data are left
out unless `--data_dir` is given.

`--tune` trains every tuned arm with each learning rate of a grid on the tuning seed, and writes the table of validation
scores. The configs contain the best rate of this table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rates import best, beyond

from research_eval.analysis.statistics import SHARE, equivalence, mean_interval
from research_eval.analysis.statistics import half_width as interval
from research_eval.comparing.verdicts import LEVEL, MARGIN
from research_eval.db_utils import Store
from research_eval.schema import ExperimentConfig, load_config

# Seeds up to 99 are reported, seeds from 100 on are for choosing settings. What a task draws for itself (tables,
# functions, withheld compositions) follows from this group, so no setting was chosen on a reported task.
SEEDS_PER_GROUP = 100
TUNING_SEED = 100
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
FEWER_RATES = (2e-3, 4e-3, 8e-3)
TASKS_WITH_SEED = ("tables", "planted_paths")

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
    tuned: tuple[str, ...] = ()  # arms whose learning rate `--tune` chooses
    rates: tuple[float, ...] = LEARNING_RATES  # the grid; it is widened for an arm whose best rate is at its edge
    equal_flops: tuple[str, ...] = ()  # arms that are meant to have the same forward FLOPs per sample


def against(arm: str, *others: str) -> list[tuple[str, str]]:
    """The differences of one arm to others."""
    return [(arm, other) for other in others]


SCAN_TASKS = ("parity", "even_pairs", "cycle_navigation", "s3", "modular_arithmetic", "s5", "majority")
SCAN_MODELS = ("scan", "lstm", "moe", "looped")
LONG = {"test_len_41_100_acc": "41-100", "test_len_200_acc": "200", "test_len_500_acc": "500"}
TABLES = (
    *("dense_flops", "dense_params", "dense_bigrams", "dense_bigrams_wide", "dense_flops_4x_steps", "looped", "moe"),
    *("token", "hash", "published", "state_router", "goe", "goe_frozen_router", "goe_bigrams"),
)
# The arms with 16 experts, and everything without a learned router that may explain their scores.
TABLES_WIDE = (
    *("dense_flops", "dense_wide", "dense_deep", "dense_bigrams", "looped", "moe"),
    *("random", "hash", "goe_frozen_router", "goe", "goe_bigrams"),
)
# Pools of other sizes at the same FLOPs: n-gram memory, MoE and the controls, with as many parameters.
POOLED = ("dense_bigrams", "moe", "hash", "goe_frozen_router", "goe")
POOL = Study(
    list(POOLED),
    against("goe", *POOLED[:-1]),
    tuned=POOLED,
    rates=FEWER_RATES,
    equal_flops=POOLED,
)
PLANTED_TUNED = (
    *("dense_flops", "dense_params", "dense_deep", "dense_bigrams", "looped", "moe"),
    *("hash", "goe_frozen_router", "goe_pooled", "goe_cursor"),
)
STUDIES = {
    "tables": Study(
        list(TABLES),
        [
            *against("goe", "dense_flops", "dense_params", "dense_bigrams", "moe", "looped"),
            *against("goe", "token", "hash", "state_router", "goe_frozen_router"),
            *against("goe_bigrams", "dense_bigrams", "dense_bigrams_wide"),
            *against("state_router", "dense_flops"),
            *against("published", "dense_flops"),
        ],
        tuned=TABLES,
        equal_flops=tuple(arm for arm in TABLES if arm != "dense_params"),
    ),
    "tables_wide": Study(
        list(TABLES_WIDE),
        [
            *against("goe", "dense_flops", "dense_wide", "dense_deep", "dense_bigrams", "looped", "moe"),
            *against("goe", "random", "hash", "goe_frozen_router"),
            *against("goe_bigrams", "dense_bigrams"),
        ],
        tuned=TABLES_WIDE,
        rates=FEWER_RATES,
        equal_flops=tuple(arm for arm in TABLES_WIDE if arm not in ("dense_wide", "dense_deep")),
    ),
    "tables_8": POOL,
    "tables_32": POOL,
    "planted": Study(
        [
            *("dense_flops", "dense_params", "dense_deep", "dense_bigrams", "looped", "moe", "random", "hash"),
            *("oracle", "goe_frozen_router", "goe_pooled", "goe_cursor"),
        ],
        [
            *against("goe_cursor", "dense_flops", "dense_params", "dense_deep", "dense_bigrams", "looped", "moe"),
            *against("goe_cursor", "hash", "goe_frozen_router", "oracle"),
            *against("goe_pooled", "dense_flops", "dense_params", "oracle"),
        ],
        {"test_acc": "accuracy", "test_unseen_acc": "unseen", "planted_step_recovery": "recovery"}
        | {"router_regret": "regret", "test_unseen_router_regret": "regret, unseen"},
        compared=("test_acc", "test_unseen_acc"),
        tuned=PLANTED_TUNED,
        rates=FEWER_RATES,
        equal_flops=(
            *("dense_flops", "dense_bigrams", "looped", "moe", "random", "hash"),
            *("goe_frozen_router", "goe_pooled", "goe_cursor"),
        ),
    ),
    "hop": Study(
        ["dense", "moe", "looped", "loop", "loop_confidence", "goe_confidence"],
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
        [f"{task}_{model}" for task in SCAN_TASKS for model in SCAN_MODELS],
        metrics=LONG | {"certified": "certified"},
        seeds={f"{task}_{model}": 1 for task in SCAN_TASKS for model in SCAN_MODELS[1:]}
        | {"modular_arithmetic_scan": 3, "s5_scan": 3},
    ),
    "hybrid": Study(
        ["attention", "looped", "moe", "scan", "pool"],
        metrics={"group_0": "parity, 1-40", "group_1": "majority, 1-40"} | LONG,
        seeds=dict.fromkeys(("attention", "looped", "moe", "scan", "pool"), 3),
    ),
    "text": Study(
        ["dense_flops", "dense_params", "looped", "moe", "oracle", "goe"],
        [*against("goe", "dense_flops", "dense_params", "looped", "moe", "oracle"), *against("moe", "dense_flops")],
        {"final_val_acc": "accuracy", "path_group_nmi_adjusted": "information path-domain"},
        compared=("final_val_acc",),
        seeds={"oracle": 1, "dense_params": 2},
        needs_data=True,
        equal_flops=("dense_flops", "looped", "moe", "oracle", "goe"),
    ),
}
COSTS = ("param_count", "inference_flops_per_sample", "training_duration_seconds")
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


def config_of(
    study: str,
    arm: str,
    seed: int,
    data_dir: Path | None = None,
    learning_rate: float | None = None,
    changed: Mapping[str, Any] | None = None,
) -> ExperimentConfig:
    """The config of an arm with a seed. The seed's group decides which instance of the task it gets."""
    overrides: dict[str, Any] = {"seed": seed, **(changed or {})}
    if STUDIES[study].needs_data and data_dir is not None:
        overrides["dataset_params.sources"] = [str(data_dir / source) for source in TEXT_SOURCES]
    if learning_rate is not None:
        overrides |= {"optimizer_params.lr": learning_rate, "training_params.test": False}
    path = CONFIGS / study / f"{arm}.json"
    if json.loads(path.read_text())["dataset_name"] in TASKS_WITH_SEED:
        overrides["dataset_params.task_seed"] = seed // SEEDS_PER_GROUP
    return load_config(path, overrides)


def train_all(configs: list[ExperimentConfig], arguments: argparse.Namespace) -> None:
    """Every run that is not finished yet, several at the same time."""
    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(lambda config: train(config, arguments), configs))


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


def collect(study: str, arm: str, seeds: int, store: Store, data_dir: Path | None) -> dict[str, list[float | None]]:
    """What the tables need of every run of an arm, in the order of the seeds."""
    plan = STUDIES[study]
    runs = [metrics_of(config_of(study, arm, seed, data_dir), store) for seed in range(plan.seeds.get(arm, seeds))]
    return {name: [value(run, name) for run in runs] for name in (*plan.metrics, *COSTS)}


def runs_of(figures: Mapping[str, list[float | None]]) -> list[dict[str, float | None]]:
    """The runs of an arm, from what `collect` found."""
    return [dict(zip(figures, values, strict=True)) for values in zip(*figures.values(), strict=True)]


def metrics_of(config: ExperimentConfig, store: Store) -> dict[str, Any]:
    """The metrics of a finished run. Ends the program if the run is not finished."""
    known = store.find_experiment(config.to_dict())
    if known is None or known["status"] != "finished":
        raise SystemExit(f"{config.experiment_name}, seed {config.seed}: not finished")
    return store.metrics(known["experiment_id"])


def tune(study: str, arguments: argparse.Namespace) -> tuple[str, dict[str, list[float | None]]]:
    """Train the tuned arms with every learning rate; the table of their validation accuracy, and its numbers."""
    found: dict[str, dict[float, float]] = {arm: {} for arm in STUDIES[study].tuned}
    wanted = [(arm, rate) for arm in found for rate in STUDIES[study].rates]
    while wanted:
        configs = [config_of(study, arm, TUNING_SEED, arguments.data_dir, rate) for arm, rate in wanted]
        train_all(configs, arguments)
        with Store(arguments.db, read_only=True) as store:
            for (arm, rate), config in zip(wanted, configs, strict=True):
                found[arm][rate] = float(metrics_of(config, store)["final_val_acc"])
        wanted = [(arm, further) for arm, scores in found.items() if (further := beyond(scores))]
    rates = sorted({rate for scores in found.values() for rate in scores})
    lines = [f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} | taken |"]
    lines.append("|---" * (2 + len(rates)) + "|")
    for arm, scores in found.items():
        cells = [f"{scores[rate]:.3f}" if rate in scores else "" for rate in rates]
        lines.append(f"| {arm} | {' | '.join(cells)} | {best(scores):g} |")
    return "\n".join(lines), {arm: [scores.get(rate) for rate in rates] for arm, scores in found.items()}


def tables(study: str, runs: Mapping[str, list[dict[str, Any]]]) -> str:
    """Markdown: one row per arm, how equal their FLOPs are, and the paired differences of the compared metrics."""
    plan = STUDIES[study]
    lines = [f"| arm | N | {' | '.join(plan.metrics.values())} | parameters | MFLOPs | training s |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for arm, results in runs.items():
        cells = []
        for name in plan.metrics:
            values = [found for found in (run.get(name) for run in results) if found is not None]
            spread = interval_text(values) if name in plan.compared else ""
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
    if plan.equal_flops:
        lines += ["", flops_text(plan, runs)]
    if plan.pairs:
        names = " | ".join(plan.metrics[metric] for metric in plan.compared)
        lines += ["", f"| difference, paired by seed | {names} |", "|---" * (1 + len(plan.compared)) + "|"]
    for first, second in plan.pairs:
        cells = []
        for metric in plan.compared:
            pairs = [(a.get(metric), b.get(metric)) for a, b in zip(runs[first], runs[second], strict=False)]
            differences = [a - b for a, b in pairs if a is not None and b is not None]
            half = f"± {interval(differences):.3f}{equal_text(differences)}" if len(differences) > 1 else "(one pair)"
            cells.append(f"{statistics.mean(differences):+.3f} {half}" if differences else "")
        lines.append(f"| {first} - {second} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval_text(shares: list[float]) -> str:
    """` [0.980, 0.998]`; empty without an interval. All compared metrics are accuracies."""
    found = mean_interval(shares, bounds=SHARE)
    return "" if found is None else f" [{found.low:.3f}, {found.high:.3f}]"


def equal_text(differences: list[float]) -> str:
    """What the equivalence test says of two arms; empty if they differ, or if the test does not exist.

    An open result names the smallest margin within which the arms would be equal: one that is chosen after the fact.
    """
    p_value = equivalence(differences, [0.0] * len(differences), MARGIN)
    if p_value is None:
        return ""
    if p_value < LEVEL:
        return f", equal within {MARGIN:g} (p {'< 0.001' if p_value < 0.001 else f'{p_value:.3f}'})"
    mean = abs(statistics.mean(differences))
    if mean > interval(differences):
        return ""
    smallest = math.ceil(1000 * (mean + interval(differences, 1 - 2 * LEVEL))) / 1000
    return f", open (p {p_value:.2f}; ±{smallest:.3f})"


def flops_text(plan: Study, runs: Mapping[str, list[dict[str, Any]]]) -> str:
    """A sentence on forward FLOPs: the range over the arms that are meant to be equal, then each other arm."""
    costs = {
        arm: statistics.mean(float(run["inference_flops_per_sample"]) for run in results) / 1e6
        for arm, results in runs.items()
    }
    equal = [costs[arm] for arm in plan.equal_flops]
    others = "".join(f"; {arm}: {cost:.3f}" for arm, cost in costs.items() if arm not in plan.equal_flops)
    spread = f"{min(equal):.3f} to {max(equal):.3f} MFLOPs over the {len(equal)} arms that are meant to be equal"
    return f"Forward FLOPs: {spread} (spread {100 * (max(equal) / min(equal) - 1):.0f} %){others}."


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


def tuned_texts(chosen: list[str], arguments: argparse.Namespace) -> tuple[dict[str, str], dict[str, Any]]:
    """The tables of the learning rates, and their numbers, by the name of the table."""
    found = {f"{study} tuning": tune(study, arguments) for study in chosen if STUDIES[study].tuned}
    return {name: text for name, (text, _) in found.items()}, {name: numbers for name, (_, numbers) in found.items()}


def reported_texts(chosen: list[str], arguments: argparse.Namespace) -> tuple[dict[str, str], dict[str, Any]]:
    """The tables of the studies, and what they need of every run, by study."""
    known = stored(arguments.output) if arguments.known else {}
    missing = [(study, arm) for study in chosen for arm in STUDIES[study].arms if arm not in known.get(study, {})]
    configs = [
        config_of(study, arm, seed, arguments.data_dir)
        for seed in range(arguments.seeds)
        for study, arm in missing
        if seed < STUDIES[study].seeds.get(arm, arguments.seeds)
    ]
    train_all(configs, arguments)
    figures = {study: {arm: known.get(study, {}).get(arm, {}) for arm in STUDIES[study].arms} for study in chosen}
    if missing:
        with Store(arguments.db, read_only=True) as store:
            for study, arm in missing:
                figures[study][arm] = collect(study, arm, arguments.seeds, store, arguments.data_dir)
    runs = {study: {arm: runs_of(found) for arm, found in arms.items()} for study, arms in figures.items()}
    return {study: tables(study, runs[study]) for study in chosen}, figures


def stored(path: Path) -> dict[str, Any]:
    """The figures of earlier calls; none without a file."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=5, help="runs per arm, with the seeds 0, 1, ...")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time; each config uses one thread")
    parser.add_argument("--tune", action="store_true", help="choose the learning rates instead of making the tables")
    parser.add_argument("--known", action="store_true", help="train no arm whose figures are in --output")
    parser.add_argument("--data_dir", type=Path, help="folder with one folder per real dataset")
    parser.add_argument("--db", default="research.db")
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/research.json"))
    arguments = parser.parse_args()
    chosen = [name for name in arguments.studies if arguments.data_dir or not STUDIES[name].needs_data]
    texts, figures = (tuned_texts if arguments.tune else reported_texts)(chosen, arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(stored(arguments.output) | figures, indent=1) + "\n")
    print("\n\n".join(f"{study}\n\n{text}" for study, text in texts.items()))
    if arguments.page:
        write_page(arguments.page, texts)


if __name__ == "__main__":
    main()
