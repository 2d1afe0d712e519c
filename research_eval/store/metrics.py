"""The meaning of a metric by its name: which direction is better, which curve belongs to it, what may use it.

This module needs no SQLAlchemy, so the command line may import it before `--help` is printed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from research_eval.errors import ConfigError
from research_eval.wording import nearest

Direction = Literal["maximize", "minimize"]

DEFAULT_METRIC = "final_val_f1"

# The version of the rules that count FLOPs of trainings. Version 1 left out the weight gradients of experts and the
# products of LSTM kernels; where that made a difference, the metric of older runs is called `train_flops_v1`.
FLOPS_VERSION = 2
OLD_COUNTS = ("train_flops_v1",)  # no new run has them
USUAL = (  # every finished run has these, and a choice may use them; models add their own
    *("final_val_f1", "final_val_acc", "final_val_loss", "best_val_f1_across_epochs"),
    *("param_count", "active_param_count", "inference_flops_per_sample", "train_flops", "peak_memory_mb"),
    *("inference_latency_ms_batch", "inference_latency_ms_batch_p95", "inference_samples_per_second"),
    *("inference_latency_spread", "inference_latency_repetitions", "inference_latency_load"),
    *("active_flops_per_sample", "training_duration_seconds"),
)
LATENCY, MEASURED_LATENCY = "inference_latency", "measured_latency"  # beginnings of names: after the run, `goe measure`
# Beyond these limits a measured time is marked: other programs used this share of the machine, or the distance of the
# quartiles of the repetitions has this share of their median.
LOAD_LIMIT, SPREAD_LIMIT = 0.2, 0.2
_COSTS = re.compile(r"loss|latency|seconds|duration|flops|param_count|memory|regret|num_alarms")
# Whole words, because short ones such as "mae" may also be a part of other names.
_ERRORS = re.compile(r"(^|_)(gap|rmse|mse|mae|error|distance|perplexity|nats|bits)($|_)")
_RATES = re.compile(r"per_second")  # contains "second", but more is better
_MEASURED = re.compile(r"latency|second|memory")
_OF_EPOCHS = re.compile(r"final_val_(?P<final>.+)|best_val_(?P<best>.+)_across_epochs")


def direction(name: str) -> Direction:
    """Costs (losses, errors, latency, FLOPs, sizes) are minimised; all others, those of models too, are maximised.

    >>> direction("final_val_f1"), direction("final_val_loss"), direction("inference_samples_per_second")
    ('maximize', 'minimize', 'maximize')
    >>> direction("test_rmse"), direction("val_bits_per_byte")
    ('minimize', 'minimize')
    """
    is_cost = _COSTS.search(name) or _ERRORS.search(name)
    return "minimize" if is_cost and not _RATES.search(name) else "maximize"


def gain_sign(name: str) -> Literal[1, -1]:
    """1 if a larger value of the metric is better, else -1: the product of sign and value is larger for better values.

    >>> gain_sign("final_val_f1"), gain_sign("final_val_loss")
    (1, -1)
    """
    return 1 if direction(name) == "maximize" else -1


def score_of_epoch(metric: str) -> str | None:
    """The series over the epochs whose last or best value the metric is; None for a metric without such a series.

    >>> score_of_epoch("final_val_f1"), score_of_epoch("best_val_rmse_across_epochs"), score_of_epoch("param_count")
    ('val_f1', 'val_rmse', None)
    """
    match = _OF_EPOCHS.fullmatch(metric)
    return None if match is None else f"val_{match['final'] or match['best']}"


def default_metric(names: Collection[str]) -> str:
    """The metric that chooses runs if the user names none; `names` are the metrics that the runs have.

    It is F1 if any run has it, or if there are no runs yet. Else it is the score that the task selects by: the training
    stores the best value of this score alone.

    >>> default_metric(["best_val_rmse_across_epochs", "final_val_mae", "final_val_rmse"])
    'final_val_rmse'
    """
    if names and DEFAULT_METRIC not in names:
        for name in names:
            match = _OF_EPOCHS.fullmatch(name)
            if match is not None and match["best"]:
                return f"final_val_{match['best']}"
    return DEFAULT_METRIC


def is_measured(name: str) -> bool:
    """Whether a clock or the operating system measured the value, so that an equal run gets another one."""
    return bool(_MEASURED.search(name))


def latency_parts(metric: str) -> dict[str, str]:
    """For a measured time: the metrics that say how far to trust it, as "load" and "spread". Empty for other metrics.

    >>> latency_parts("inference_latency_ms_batch")
    {'load': 'inference_latency_load', 'spread': 'inference_latency_spread'}
    """
    known = {f"{prefix}_ms_batch": prefix for prefix in (LATENCY, MEASURED_LATENCY)}
    return {part: f"{known[metric]}_{part}" for part in ("load", "spread")} if metric in known else {}


def latency_remark(load: float | None, spread: float | None) -> str:
    """How far to trust a measured time, in words; empty if nothing is known, as for runs of earlier versions.

    >>> latency_remark(0.0, 0.08), latency_remark(0.9, 0.35), latency_remark(None, None)
    ('spread 8 %', 'busy, unsteady, spread 35 %', '')
    """
    is_busy = load is not None and load > LOAD_LIMIT
    words = ["busy"] if is_busy else []
    if spread is not None and math.isfinite(spread):
        words += ["unsteady"] * (spread > SPREAD_LIMIT) + [f"spread {100 * spread:.0f} %"]
    return ", ".join(words)


def with_remark(text: str, metric: str, metrics: Mapping[str, Any]) -> str:
    """The text of a metric's value; a measured time gets the remark that the other metrics of the run give it."""
    parts = latency_parts(metric)
    values = {part: metrics.get(name) for part, name in parts.items()}
    known = {part: value if isinstance(value, float) else None for part, value in values.items()}
    remark = latency_remark(known["load"], known["spread"]) if parts else ""
    return f"{text} ({remark})" if remark else text


def check_selectable(name: str, option: str) -> None:
    """Raise ConfigError for a metric of the test split: after a choice by it, the test score is no longer honest."""
    if name.startswith("test_"):
        raise ConfigError(
            f"{option}: {name!r} is a score of the test split, by which nothing is chosen. "
            f"Give one of the validation split, such as {DEFAULT_METRIC!r}; test scores are shown beside it."
        )


def check_spelling(name: str, option: str, selected_by: str = "f1") -> None:
    """Raise ConfigError for a name that is nearly a usual metric. For a store without results, which has no names.

    `selected_by` is the score that the task selects the weights by. The other scores of a task are not known before a
    run: there a score is compared without the words around it, which would make all scores similar.
    """
    if f"final_val_{selected_by}" == DEFAULT_METRIC:
        near = nearest(name, USUAL, cutoff=0.85)
    else:
        costs = [usual for usual in USUAL if score_of_epoch(usual) is None]
        usual = [f"final_val_{selected_by}", "final_val_loss", *costs]
        stems = {_stem(metric): metric for metric in usual}
        near = stems.get(nearest(_stem(name), stems, cutoff=0.85) or "")
        near = None if near is None or _stem(near) == _stem(name) else near
    if name not in USUAL and near:
        raise ConfigError(f"{option}: unknown metric {name!r}. Did you mean {near!r}?")


def _stem(metric: str) -> str:
    """`rmse` of `final_val_rmse`; a metric that is no score of the epochs stays as it is."""
    return (score_of_epoch(metric) or metric).removeprefix("val_")
