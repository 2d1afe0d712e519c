"""`goe measure`: the latency of several finished models, measured again, in turn, and with repetitions.

goe measure --run 20260531 20260601
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from research_eval.cli.common import DB_HELP, add_flag
from research_eval.cli.filters import RUN_HELP
from research_eval.cli.text import print_table
from research_eval.errors import ConfigError
from research_eval.system.best_effort import print_product

if TYPE_CHECKING:
    from research_eval.runs.measure import Measured

log = logging.getLogger(__name__)

DESCRIPTION = "measure the latency of several finished models, interleaved"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe measure`."""
    add_flag(parser, "run", nargs="+", action="extend", required=True, metavar="ID", help=RUN_HELP)
    add_flag(parser, "repetitions", type=int, metavar="N", help="passes over the same batches (default: 30)")
    add_flag(parser, "batch_size", type=int, metavar="N", help="samples per batch (default: as in the first run)")
    add_flag(parser, "num_threads", type=int, metavar="N", help="CPU threads (default: as each run had)")
    add_flag(parser, "device", help="auto, cpu, cuda, cuda:N or mps (default: that of each config)")
    add_flag(parser, "store", action="store_true", help="keep the figures in the results, as measured_latency_...")
    form = parser.add_mutually_exclusive_group()
    add_flag(form, "json", action="store_true", help="a JSON object per run and line")
    add_flag(form, "csv", action="store_true", help="a CSV table")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)


def measure_command(arguments: argparse.Namespace) -> int:
    """Measure, print and, if asked for, store. Raises ConfigError."""
    for name in ("repetitions", "batch_size", "num_threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: expected a number from 1 on, got {value}")
    from research_eval.runs.measure import REPETITIONS, differing_conditions, measure, subjects  # imports torch
    from research_eval.store.csv_file import csv_text
    from research_eval.store.store import Store
    from research_eval.store.values import strict_json

    with Store(arguments.db, read_only=not arguments.store) as store:
        found = subjects(
            store,
            arguments.run,
            batch_size=arguments.batch_size,
            num_threads=arguments.num_threads,
            device=arguments.device,
        )
        for sentence in differing_conditions(found):
            log.warning("not comparable: %s", sentence)
        measured = measure(found, arguments.repetitions or REPETITIONS)
        if arguments.store:
            for one in measured:
                store.replace_metrics(one.subject.experiment_id, one.metrics)
    records = [record(one) for one in measured]
    if arguments.json:
        print_product("".join(strict_json(one) + "\n" for one in records))
    elif arguments.csv:
        print_product(csv_text(list(records[0]), [list(one.values()) for one in records]))
    else:
        print_table(*_table(measured))
    if measured[0].remark.startswith("busy"):
        log.warning("other programs used %.0f %% of the machine: measure again when it is free", 100 * measured[0].load)
    if arguments.store:
        log.info("stored as measured_latency_ms_batch; inference_latency_ms_batch stays as it was")
    return 0


def record(one: Measured) -> dict[str, Any]:
    """All figures of a model, for JSON and CSV. The ratio is that to the first model."""
    low, high = one.ratio_interval() or (None, None)
    subject = one.subject
    return {
        "experiment_id": subject.experiment_id,
        "experiment_name": subject.config.experiment_name,
        "model_type": subject.config.model_type,
        "dataset_name": subject.config.dataset_name,
        "seed": subject.config.seed,
        "device": str(subject.timed.runtime.device),
        "precision": subject.timed.runtime.precision,
        **one.metrics,
        "samples_per_second": one.samples_per_second,
        "ratio_to_first": one.ratio,
        "ratio_low": low,
        "ratio_high": high,
        "remark": one.remark,
    }


def _table(measured: Sequence[Measured]) -> tuple[list[str], list[list[str]], set[int]]:
    """Header, cells, and the indices of the columns with numbers."""
    header = ["id", "model", "seed", "batch", "threads", "ms/batch", "ratio", "95 % interval", "samples/s", "remark"]
    rows = []
    for one in measured:
        interval, is_first = one.ratio_interval(), one is measured[0]
        rows.append(
            [
                one.subject.experiment_id,
                one.subject.config.model_type,
                str(one.subject.config.seed),
                str(one.subject.batch_size),
                str(one.subject.num_threads),
                f"{one.milliseconds:.4g}",
                f"{one.ratio:.3f}",
                "-" if interval is None or is_first else f"[{interval.low:.3f}, {interval.high:.3f}]",
                f"{one.samples_per_second:,.0f}",
                one.remark,
            ]
        )
    return header, rows, set(range(2, len(header) - 1))
