"""What eight seeds of a small model cost beside one: whole experiments, with evaluation, checkpoints and the store.

`--seeds 0-7` takes the steps of all as one where that gives the same numbers in less time.
"""

from __future__ import annotations

import contextlib
import tempfile

from timing import Row, Settings, argument_parser, measure, report

from research_eval.experiment import run_all
from research_eval.schema import ExperimentConfig, config_from_dict

SEEDS = 8
SHAPES = [(16, 8, 8), (16, 8, 16), (16, 8, 32), (64, 16, 32)]  # width, tokens, batch
STEPS = 1000


def config_of(shape: tuple[int, int, int], seed: int, settings: Settings) -> ExperimentConfig:
    """Two layers on parity, five epochs of `STEPS` steps in all."""
    width, length, batch = shape
    epochs, steps = (1, 4) if settings.tiny else (5, STEPS)
    return config_from_dict(
        {
            "model_type": "dense",
            "dataset_type": "synthetic",
            "dataset_name": "parity",
            "epochs": epochs,
            "batch_size": batch,
            "seed": seed,
            "dataset_params": {"num_samples": steps // epochs * batch * 5 // 4, "seq_len": length},
            "model_params": {"embed_dim": width, "num_heads": 2},
            "training_params": {"num_threads": settings.threads, "device": "cpu"},
        }
    )


def main() -> None:
    settings = Settings(**vars(argument_parser(__doc__).parse_args()))
    rows: list[Row] = []
    shapes = [(8, 6, 4)] if settings.tiny else SHAPES
    for number, shape in enumerate(shapes):
        configs = [config_of(shape, seed, settings) for seed in range(SEEDS)]

        def trained(count: int, configs: list[ExperimentConfig] = configs) -> None:
            results = list(run_all(configs[:count], db="benchmark.db", quiet=True))
            assert [result.status for result in results] == ["finished"] * count

        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            contestants = {"one": lambda: trained(1), "eight": lambda: trained(SEEDS)}
            rounds = measure(contestants, settings.share(len(shapes) - number), settings)
        rows.append(
            {
                "width, tokens, batch": "d{} s{} b{}".format(*shape),
                "one seed, s": rounds.median("one"),
                f"{SEEDS} seeds, s": rounds.median("eight"),
                "ratio": rounds.ratio("eight", "one"),
            }
        )
    report("seeds", settings, {f"{SEEDS} seeds together beside one": rows})


if __name__ == "__main__":
    main()
