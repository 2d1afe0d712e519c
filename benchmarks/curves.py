"""The curves of docs/research.md: the score of an arm over the training samples, and over the size of the pool.

An arm is that of `research.py` with one setting changed; its learning rate stays. The size of a pool changes at equal
FLOPs: the arms without a pool get as many parameters, in n-gram memory or in experts per layer. The middle point of a
curve is the study itself, from `--known`. Finished runs in the results database are not repeated. `--page` writes the
tables of the points whose runs are all finished.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research import config_of, interval_text, train_all, write_page

from research_eval.db_utils import Store

# What an arm has instead of a pool of so many experts, with as many parameters.
BUCKETS = {8: 2100, 16: 4800, 32: 10_200}
EXPERTS_PER_LAYER = {8: 11, 16: 23, 32: 47}
POINTS = {"exposures": (60_000, 120_000, 240_000, 480_000), "pool": (8, 16, 32)}
KNOWN = {"exposures": 240_000, "pool": 16}
TABLES_ARMS = ("dense_bigrams", "moe", "hash", "goe_frozen_router", "goe")
PLANTED_ARMS = ("dense_bigrams", "moe", "hash", "goe_frozen_router", "goe_cursor")


@dataclass(frozen=True)
class Curve:
    """A study, what changes in it, and the metric that the table shows."""

    study: str
    kind: str
    arms: tuple[str, ...]
    metric: str = "test_acc"

    @property
    def title(self) -> str:
        unseen = " unseen" if "unseen" in self.metric else ""
        return f"{self.study} {self.kind}{unseen}"


CURVES = [
    *(Curve("tables_wide", kind, TABLES_ARMS) for kind in POINTS),
    *(Curve("planted", kind, PLANTED_ARMS) for kind in POINTS),
    *(Curve("planted", kind, PLANTED_ARMS, "test_unseen_acc") for kind in POINTS),
]


def change(kind: str, arm: str, value: int) -> dict[str, Any]:
    """The keys of the config that make a point of an arm."""
    if kind == "exposures":
        return {"dataset_params.num_samples": value}
    if arm == "dense_bigrams":
        return {"model_params.bigram_buckets": BUCKETS[value]}
    if arm == "moe":
        return {"model_params.num_experts": EXPERTS_PER_LAYER[value]}
    return {"model_params.num_total_experts": value}


def scores(curve: Curve, arm: str, value: int, seeds: int, known: dict[str, Any], store: Store) -> list[float]:
    """The metric of every seed; fewer values while runs are missing."""
    if value == KNOWN[curve.kind]:
        return list(known[curve.study][arm][curve.metric])[:seeds]
    found = []
    for seed in range(seeds):
        config = config_of(curve.study, arm, seed, changed=change(curve.kind, arm, value))
        row = store.find_experiment(config.to_dict())
        if row is not None and row["status"] == "finished":
            found.append(float(store.metrics(row["experiment_id"])[curve.metric]))
    return found


def table(points: dict[str, dict[int, list[float]]], seeds: int) -> str:
    """Markdown: a row per arm, a column for each value that has finished runs; an empty cell where some are missing."""
    complete = {value for of_arm in points.values() for value, found in of_arm.items() if len(found) == seeds}
    values = sorted(complete)
    lines = [f"| arm | {' | '.join(f'{value:,}' for value in values)} |", "|---" * (1 + len(values)) + "|"]
    for arm, of_arm in points.items():
        whole = [of_arm[value] if len(of_arm[value]) == seeds else [] for value in values]
        cells = [f"{statistics.mean(found):.3f}{interval_text(found)}" if found else "" for found in whole]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _is_measured(points: dict[str, dict[int, list[float]]]) -> bool:
    """Whether a curve has more than the point that is known."""
    return any(sum(map(bool, of_arm.values())) > 1 for of_arm in points.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", nargs="+", default=["tables_wide", "planted"], choices=["tables_wide", "planted"])
    parser.add_argument("--kinds", nargs="+", default=list(POINTS), choices=POINTS)
    parser.add_argument("--arms", nargs="+", choices=sorted({*TABLES_ARMS, *PLANTED_ARMS}), help="train these alone")
    parser.add_argument("--values", nargs="+", type=int, help="train these points alone")
    parser.add_argument("--seeds", type=int, default=5, help="runs per point, with the seeds 0, 1, ...")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time; each uses one thread")
    parser.add_argument("--db", default="research.db")
    parser.add_argument("--known", type=Path, default=Path("benchmarks/results/research.json"))
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/curves.json"))
    arguments = parser.parse_args()
    wanted = {
        (curve.study, curve.kind, arm, value)
        for curve in CURVES
        for arm in curve.arms
        for value in POINTS[curve.kind]
        if curve.study in arguments.studies
        and curve.kind in arguments.kinds
        and arm in (arguments.arms or curve.arms)
        and value in (arguments.values or POINTS[curve.kind])
        and value != KNOWN[curve.kind]
    }
    train_all(
        [
            config_of(study, arm, seed, changed=change(kind, arm, value))
            for study, kind, arm, value in sorted(wanted)
            for seed in range(arguments.seeds)
        ],
        arguments,
    )
    known = json.loads(arguments.known.read_text())
    with Store(arguments.db, read_only=True) as store:
        found = {
            curve.title: {
                arm: {value: scores(curve, arm, value, arguments.seeds, known, store) for value in POINTS[curve.kind]}
                for arm in curve.arms
            }
            for curve in CURVES
        }
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    texts = {title: table(points, arguments.seeds) for title, points in found.items() if _is_measured(points)}
    print("\n\n".join(f"{title}\n\n{text}" for title, text in texts.items()))
    if arguments.page:
        write_page(arguments.page, texts)


if __name__ == "__main__":
    main()
