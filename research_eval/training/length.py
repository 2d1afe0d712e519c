"""How long a training is, and when it is evaluated, in optimiser steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.token_data import TokenData
from research_eval.training.optimizers import steps_per_epoch


@dataclass(frozen=True)
class Length:
    """Steps of one pass over the training split, steps in all, and steps between two evaluations."""

    per_epoch: int
    total: int
    period: int

    @classmethod
    def of(cls, config: ExperimentConfig, train: TokenData) -> Length:
        """The length that a config asks for: `max_tokens` or `max_steps` if it has one of them, else its epochs."""
        options = config.training_params
        per_epoch = steps_per_epoch(config, train.samples_per_epoch)
        total = per_epoch * config.epochs
        if options.max_steps is not None:
            total = options.max_steps
        elif options.max_tokens is not None:
            per_step = config.batch_size * options.gradient_accumulation_steps * int(train.lengths.max(initial=1))
            total = math.ceil(options.max_tokens / per_step)
        return cls(per_epoch, total, options.eval_every or per_epoch)

    @property
    def passes(self) -> float:
        """Passes over the training split: the epochs, unless steps or tokens give the length."""
        return self.total / self.per_epoch

    @property
    def evaluations(self) -> int:
        """The number of evaluations: one after each period, and one at the last step."""
        return math.ceil(self.total / self.period)

    def number(self, step: int) -> int:
        """The number of the evaluation after this step, from 1."""
        return math.ceil(step / self.period)

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation follows step `step` (from 1)."""
        return step % self.period == 0 or step == self.total
