"""What the names of metrics say: which way is better, which may be chosen by, and which a clock has measured."""

from __future__ import annotations

import difflib
import re
from typing import Literal

from research_eval.errors import ConfigError

Direction = Literal["maximize", "minimize"]

DEFAULT_METRIC = "final_val_f1"
USUAL = (  # that every finished run has and something may be chosen by; models add their own
    *("final_val_f1", "final_val_acc", "final_val_loss", "best_val_f1_across_epochs"),
    *("param_count", "active_param_count", "inference_flops_per_sample", "train_flops", "peak_memory_mb"),
    *("inference_latency_ms_batch", "inference_latency_ms_batch_p95", "inference_samples_per_second"),
    *("active_flops_per_sample", "training_duration_seconds"),
)
_COSTS = re.compile(r"loss|latency|seconds|duration|flops|param_count|memory|regret|num_alarms|(^|_)gap($|_)")
_RATES = re.compile(r"per_second")
_MEASURED = re.compile(r"latency|second|memory")


def direction(name: str) -> Direction:
    """Costs (losses, latency, FLOPs, sizes) are minimised, everything else, models' own metrics too, is maximised.

    >>> direction("final_val_f1"), direction("final_val_loss"), direction("inference_samples_per_second")
    ('maximize', 'minimize', 'maximize')
    """
    return "minimize" if _COSTS.search(name) and not _RATES.search(name) else "maximize"


def is_measured(name: str) -> bool:
    """Whether a clock or the operating system gave the value, so that an equal run gives another one."""
    return bool(_MEASURED.search(name))


def check_selectable(name: str, option: str) -> None:
    """Raise ConfigError for a metric of a test split: whoever chooses by it has no honest score left to report."""
    if name.startswith("test_"):
        raise ConfigError(
            f"{option}: {name!r} is a score of the test split, by which nothing is chosen. "
            f"Give one of the validation split, such as {DEFAULT_METRIC!r}; test scores are shown beside it."
        )


def check_spelling(name: str, option: str) -> None:
    """Raise ConfigError for what is nearly a usual metric, where no results can tell yet whether it exists."""
    near = difflib.get_close_matches(name, USUAL, n=1, cutoff=0.85)
    if name not in USUAL and near:
        raise ConfigError(f"{option}: unknown metric {name!r}. Did you mean {near[0]!r}?")
