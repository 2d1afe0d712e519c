"""Data beside plain loops: generating samples, and making a batch of them."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import torch
from timing import Contestant, Row, Settings, argument_parser, measure, report
from torch.utils.data import DataLoader

from research_eval.datasets.addition import AdditionDataset
from research_eval.datasets.base_dataset import SequenceBaseDataset
from research_eval.datasets.parity import ParityDataset
from research_eval.datasets.token_data import Batches, TokenData

BATCH, LENGTH = 32, 64


def parity_loop(num_samples: int, length: int = 16) -> list[dict[str, Any]]:
    """One token at a time."""
    samples = []
    for _ in range(num_samples):
        ids = [random.randint(1, 2) for _ in range(length)]  # noqa: S311
        samples.append({"input_ids": ids, "label": sum(token == 1 for token in ids) % 2})
    return samples


def addition_loop(num_samples: int, digits: int = 3) -> list[dict[str, Any]]:
    """As the task has it: a + b = and the known digits of the sum, which comes the other way round."""
    samples = []
    for _ in range(num_samples):
        a, b = random.randrange(10**digits), random.randrange(10**digits)  # noqa: S311
        known = random.randint(0, digits)  # noqa: S311
        total = f"{a + b:0{digits + 1}}"[::-1]
        text = f"{a:0{digits}}+{b:0{digits}}={total[:known]}"
        ids = [11 if sign == "+" else 12 if sign == "=" else int(sign) + 1 for sign in text]
        samples.append({"input_ids": ids, "label": int(total[known])})
    return samples


def generation(settings: Settings) -> list[Row]:
    """The arrays alone, and the whole way to what is trained on, with its checks."""
    few, many = (200, 400) if settings.tiny else (2_000, 200_000)
    tasks: dict[str, tuple[SequenceBaseDataset, Any]] = {
        "parity, 16 tokens": (ParityDataset(num_samples=many, seq_len=16, vocab_size=2), parity_loop),
        "addition, 3 digits": (AdditionDataset(num_samples=many, seq_len=11, vocab_size=12), addition_loop),
    }
    rows = []
    for number, (name, (dataset, loop)) in enumerate(tasks.items()):

        def checked(dataset: SequenceBaseDataset = dataset) -> TokenData:
            dataset.generate(0)
            return dataset.to_token_data()

        contestants: dict[str, Contestant] = {
            "arrays": partial(dataset.generate, 0),
            "checked": checked,
            "loop": partial(loop, few),
        }
        rounds = measure(contestants, settings.share(2 * len(tasks) - number), settings)
        rows.append(
            {
                "what": name,
                "loop, samples/s": few / rounds.median("loop"),
                "ours, samples/s": many / rounds.median("arrays"),
                "times faster": rounds.ratio("loop", "arrays", many / few),
                "with checks and packing": rounds.ratio("loop", "checked", many / few),
            }
        )
    return rows


def batches(settings: Settings) -> list[Row]:
    """A batch from a split of full samples, and of samples of any length."""
    rows = []
    for number, name in enumerate(("full", "1 to 64 tokens")):
        rng = np.random.default_rng(0)
        samples = 50 * BATCH
        lengths = np.full(samples, LENGTH) if name == "full" else rng.integers(1, LENGTH, samples, endpoint=True)
        ids_NL = rng.integers(1, 1000, (samples, LENGTH)) * (np.arange(LENGTH) < lengths[:, None])
        split = Batches(TokenData.from_padded(ids_NL, rng.integers(0, 4, samples)), BATCH, seed=0)
        items = [
            {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(ids != 0), "label": 0}
            for ids in ids_NL
        ]
        loader: DataLoader[Any] = DataLoader(items, batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]
        order = split.order(0)

        def take_all(split: Batches = split, order: Any = order) -> None:
            for chosen in order:
                split.take(chosen)

        contestants: dict[str, Contestant] = {
            "take": take_all,
            "epoch": partial(list, split),
            "loader": partial(list, loader),
        }
        rounds = measure(contestants, settings.share(2 - number), settings)
        rows.append(
            {
                "batches of 32 x 64": name,
                "DataLoader, us": 1e6 * rounds.median("loader") / len(order),
                "Batches.take, us": 1e6 * rounds.median("take") / len(order),
                "with the epoch's order, us": 1e6 * rounds.median("epoch") / len(order),
                "times faster": rounds.faster("epoch", "loader"),
            }
        )
    return rows


def main() -> None:
    settings = Settings(**vars(argument_parser(__doc__).parse_args()))
    settings.runtime()
    tables = {
        "Generation against a Python loop": generation(settings),
        "Batches against a DataLoader": batches(settings),
    }
    report("data", settings, tables)


if __name__ == "__main__":
    main()
