"""The curves of docs/research.md: the score of each arm over the number of training samples, and over the pool.

Over the samples, an arm is that of `research.py` with another number of them; its learning rate stays. The last point
is the study itself, from `--known`. Over the pool, all points are studies from there. Finished runs in the results
database are not repeated. `--page` writes the tables of the points whose runs are all finished.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research import POOLED, config_of, interval_text, stored, train_all, write_page

from research_eval.db_utils import Store

SAMPLES, KNOWN = (60_000, 120_000), 240_000
KEY = "dataset_params.num_samples"


@dataclass(frozen=True)
class Curve:
    """A study, its arms, and the metric that the table shows."""

    title: str
    study: str
    arms: tuple[str, ...]
    metric: str = "test_acc"


ROUTED = ("hash", "goe_frozen_router")
PLANTED = ("dense_bigrams", "moe", *ROUTED, "goe_cursor")
CURVES = (
    Curve("tables_wide exposures", "tables_wide", ("dense_bigrams", "moe", *ROUTED, "goe")),
    Curve("planted exposures", "planted", PLANTED),
    Curve("planted exposures unseen", "planted", PLANTED, "test_unseen_acc"),
)
POOLS = {"tables pool": {4: "tables", 8: "tables_8", 16: "tables_wide", 32: "tables_32"}}


def over_the_pool(studies: dict[int, str], seeds: int, known: dict[str, Any]) -> dict[str, dict[int, list[float]]]:
    """The test accuracy of every arm by the size of the pool; fewer values while runs are missing."""
    return {
        arm: {
            size: list(known.get(study, {}).get(arm, {}).get("test_acc", []))[:seeds] for size, study in studies.items()
        }
        for arm in POOLED
    }


def scores(curve: Curve, arm: str, samples: int, seeds: int, known: dict[str, Any], store: Store) -> list[float]:
    """The metric of every seed; fewer values while runs are missing."""
    if samples == KNOWN:
        return list(known[curve.study][arm][curve.metric])[:seeds]
    rows = [
        store.find_experiment(config_of(curve.study, arm, seed, changed={KEY: samples}).to_dict())
        for seed in range(seeds)
    ]
    done = [row["experiment_id"] for row in rows if row is not None and row["status"] == "finished"]
    return [float(store.metrics(run)[curve.metric]) for run in done]


def table(points: dict[str, dict[int, list[float]]], seeds: int) -> str:
    """Markdown: a row per arm, a column for each number of samples with finished runs; empty where some are missing."""
    values = sorted({value for of_arm in points.values() for value, found in of_arm.items() if len(found) == seeds})
    lines = [f"| arm | {' | '.join(f'{value:,}' for value in values)} |", "|---" * (1 + len(values)) + "|"]
    for arm, of_arm in points.items():
        whole = [of_arm[value] if len(of_arm[value]) == seeds else [] for value in values]
        cells = [f"{statistics.mean(found):.3f}{interval_text(found)}" if found else "" for found in whole]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", nargs="*", type=int, default=SAMPLES, help="train these points; none for the page")
    parser.add_argument("--seeds", type=int, default=5, help="runs per point, with the seeds 0, 1, ...")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time; each uses one thread")
    parser.add_argument("--db", default="research.db")
    parser.add_argument("--known", type=Path, default=Path("benchmarks/results/research.json"))
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/curves.json"))
    arguments = parser.parse_args()
    cells = sorted({(curve.study, arm) for curve in CURVES for arm in curve.arms})
    train_all(
        [
            config_of(study, arm, seed, changed={KEY: samples})
            for samples in arguments.samples
            for study, arm in cells
            for seed in range(arguments.seeds)
        ],
        arguments,
    )
    known = stored(arguments.known)
    with Store(arguments.db, read_only=True) as store:
        found = {
            curve.title: {
                arm: {
                    samples: scores(curve, arm, samples, arguments.seeds, known, store) for samples in (*SAMPLES, KNOWN)
                }
                for arm in curve.arms
            }
            for curve in CURVES
        } | {title: over_the_pool(studies, arguments.seeds, known) for title, studies in POOLS.items()}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    texts = {title: table(points, arguments.seeds) for title, points in found.items()}
    print("\n\n".join(f"{title}\n\n{text}" for title, text in texts.items()))
    if arguments.page:
        write_page(arguments.page, texts)


if __name__ == "__main__":
    main()
