"""What eight seeds of a small model cost beside one: whole experiments, with evaluation, checkpoints and the store.

One seed runs in this process. Eight seeds run in the pool of `--seeds 0-7`: one process per core at a time, all of
which write to the same store. The clock is the wall clock, because the processes of the pool do the work.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple

from timing import Row, Settings, argument_parser, measure, report

from research_eval.schema import ExperimentConfig, config_from_dict
from research_eval.studies.seeds import pool_size, run_all

SEEDS = 8
STEPS = 1000


class Shape(NamedTuple):
    """A model on parity."""

    model_type: str
    width: int
    length: int
    batch: int

    def __str__(self) -> str:
        return f"{self.model_type} d{self.width} s{self.length} b{self.batch}"


SHAPES = [Shape("dense", 16, 8, 8), Shape("moe", 32, 8, 32), Shape("goe_original", 32, 8, 32)]
TINY = [Shape("dense", 8, 6, 4)]


@dataclass
class WallClock(Settings):
    """The flags, and a clock that sees what other processes do."""

    def clock(self) -> float:
        return time.perf_counter()


def config_of(shape: Shape, seed: int, settings: Settings) -> ExperimentConfig:
    """Five epochs of `STEPS` steps in all; a fifth of the samples are for validation."""
    epochs, steps = (1, 4) if settings.tiny else (5, STEPS)
    return config_from_dict(
        {
            "model_type": shape.model_type,
            "dataset_type": "synthetic",
            "dataset_name": "parity",
            "epochs": epochs,
            "batch_size": shape.batch,
            "seed": seed,
            "dataset_params": {"num_samples": steps // epochs * shape.batch * 5 // 4, "seq_len": shape.length},
            "model_params": {"embed_dim": shape.width, "num_heads": 2},
            "training_params": {"num_threads": settings.threads, "device": "cpu"},
        }
    )


def main() -> None:
    settings = WallClock(**vars(argument_parser(__doc__).parse_args()))
    rows: list[Row] = []
    shapes = TINY if settings.tiny else SHAPES
    for number, shape in enumerate(shapes):
        configs = [config_of(shape, seed, settings) for seed in range(SEEDS)]

        def trained(count: int, configs: list[ExperimentConfig] = configs) -> None:
            results = [result for _, result in run_all(configs[:count], db="benchmark.db", quiet=True)]
            assert [result.status for result in results] == ["finished"] * count

        # The runs of the pool work in the directory that this process is in when they start.
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            contestants = {"one": lambda: trained(1), "eight": lambda: trained(SEEDS)}
            rounds = measure(contestants, settings.share(len(shapes) - number), settings)
        rows.append(
            {
                "model": str(shape),
                "one seed, s": rounds.median("one"),
                f"{SEEDS} seeds, s": rounds.median("eight"),
                "ratio": rounds.ratio("eight", "one"),
                "runs at a time": pool_size(configs),
            }
        )
    report("seeds", settings, {f"{SEEDS} seeds beside one": rows})


if __name__ == "__main__":
    main()
