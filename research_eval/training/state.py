"""The progress of a training, and the exceptions that end it early."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

from research_eval.annotations import Natural


class Diverged(RuntimeError):
    """The loss is NaN or infinite."""


class Pruned(RuntimeError):
    """The observer ends the run; the message gives the reason."""


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM arrived. The loop has written a checkpoint of the last finished step."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"signal {number} after step {step}")
        self.signal = number


@dataclass
class TrainingState:
    """The progress of a run. Together with a checkpoint's tensors it suffices to continue exactly."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: Natural = 0
    best_score: float | None = None  # validation value of the metric that selects the weights
    best_step: Natural = 0
    best_loss: float | None = None  # validation loss at the best step
    best_others: dict[str, float] = field(default_factory=dict)  # of the metric of early stopping and the task's score
    epochs_without_gain: Natural = 0
    stopped_early: bool = False
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    train_loss: float | None = None  # mean task loss of the steps of the last report
    step_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # without evaluations
    step_tokens: Natural = 0  # real tokens of the inputs, in these seconds
    reports: list[dict[str, Any]] = field(default_factory=list)  # short routing report of every epoch


_STATE = TypeAdapter(TrainingState)


def state_from(values: Mapping[str, Any]) -> TrainingState:
    """The state in a checkpoint. Raises pydantic's ValidationError, a ValueError, for values that no run writes."""
    values = dict(values)
    if "best_f1" in values:  # version 0.1 used this name, and -1 before the first evaluation
        best = values.pop("best_f1")
        values["best_score"] = None if best == -1 else best
    return _STATE.validate_json(json.dumps(values), strict=True)
