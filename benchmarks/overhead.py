"""What an experiment costs beyond a bare loop over the same batches, as an interleaved ratio.

The bare loop does forward, loss, backward, clipping, optimiser and schedule, and nothing else. The experiment is the
real `fit` with its journal in SQLite, its meters and its checkpoint; its evaluation is kept to one small batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from research_eval.datasets.token_data import Batches, DataSplits, TokenData
from research_eval.db_utils import Store
from research_eval.experiment import prepare
from research_eval.models.base_model import EvaluableModel, auxiliary_terms
from research_eval.runs.journal import Journal, start_row
from research_eval.schema import ExperimentConfig, config_from_dict
from research_eval.system.progress import Progress
from research_eval.training.fit import fit
from research_eval.training.optimizers import build_optimizer, build_schedule
from research_eval.training.runtime import Runtime


def shape(model_type: str, steps: int, threads: int) -> ExperimentConfig:
    """Width 128, 64 tokens, batches of 32."""
    return config_from_dict(
        {
            "model_type": model_type,
            "dataset_type": "synthetic",
            "dataset_name": "copying",
            "epochs": 1,
            "batch_size": 32,
            "dataset_params": {"num_samples": 40 * steps, "seq_len": 64},
            "model_params": {"embed_dim": 128},
            "training_params": {"num_threads": threads},
        }
    )


def prepared(config: ExperimentConfig) -> tuple[Runtime, DataSplits, EvaluableModel]:
    runtime, data, model = prepare(config)
    split = data.validation
    small = TokenData(split.tokens[: split.offsets[32]], split.offsets[:33], split.labels[:32])
    return runtime, replace(data, validation=small), model


def bare_loop(config: ExperimentConfig) -> float:
    """Seconds of one epoch."""
    _, data, model = prepared(config)
    batches = Batches(data.train, config.batch_size, seed=config.seed)
    optimizer = build_optimizer(model, config.optimizer_params)
    schedule = build_schedule(optimizer, config.scheduler_params, len(batches))
    model.train()
    start = time.perf_counter()
    for step, batch in enumerate(batches.epoch(0), start=1):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask)
        loss = model.task_loss(logits, batch.labels)
        loss = loss + sum(term.weight * term.raw for term in auxiliary_terms(model).values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        model.after_step(step / len(batches))
    return time.perf_counter() - start


def experiment(config: ExperimentConfig, folder: Path) -> float:
    """Seconds of one epoch with everything that a run does around it."""
    runtime, data, model = prepared(config)
    with Store(str(folder / "results.db")) as store:
        start_row(store, name := str(time.time_ns()), config, {})
        (folder / name).mkdir()
        start = time.perf_counter()
        fit(model, data, config, runtime, folder / name, Journal(store, name, Progress(1, quiet=True)))
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="training steps per epoch")
    parser.add_argument("--repeats", type=int, default=5, help="pairs, after one that is not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/overhead.json"))
    arguments = parser.parse_args()
    rows = []
    print(f"{'model':<14}{'bare loop s':>12}{'experiment s':>14}{'ratio (median of pairs)':>26}{'min':>8}{'max':>8}")
    for model_type in ("dense", "goe_original"):
        config = shape(model_type, arguments.steps, arguments.threads)
        pairs = []
        with tempfile.TemporaryDirectory() as folder:
            for repeat in range(arguments.repeats + 1):  # who goes first alternates
                first = bare_loop(config) if repeat % 2 else None
                full = experiment(config, Path(folder))
                pairs.append((bare_loop(config) if first is None else first, full))
        del pairs[0]
        ratios = [full / bare for bare, full in pairs]
        bare, full = (statistics.median(times) for times in zip(*pairs, strict=True))
        row = {"model": model_type, "bare_seconds": bare, "experiment_seconds": full, "ratios": ratios}
        rows.append({**row, "ratio": statistics.median(ratios)})
        middle = statistics.median(ratios)
        print(f"{model_type:<14}{bare:>12.2f}{full:>14.2f}{middle:>26.3f}{min(ratios):>8.3f}{max(ratios):>8.3f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps({"steps": arguments.steps, "threads": arguments.threads, "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
