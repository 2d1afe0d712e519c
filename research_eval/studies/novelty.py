"""Whether a new config is worth suggesting: no run has it yet, and its model makes a training step.

The checks go from cheap to expensive: equal text, valid config, equal computation, one training step.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from research_eval.config.check import config_from_dict
from research_eval.config.sections import ExperimentConfig
from research_eval.errors import ConfigError
from research_eval.store.values import canonical_json
from research_eval.studies.past_runs import PastRun, identity
from research_eval.studies.perturbation import Config

if TYPE_CHECKING:
    from research_eval.datasets.token_data import DataSplits

log = logging.getLogger(__name__)

REHEARSED_SAMPLES = 4096  # of the training data, for models that prepare themselves with it
KNOWN = "what was drawn has been run, suggested or turned down before"


class Novelty:
    """Remembers which configs were run, suggested or refused, and counts the reasons of refusals."""

    def __init__(self, past: Iterable[PastRun]) -> None:
        self._known = {run.identity for run in past}
        self._tried: set[str] = set()
        self._reasons = Counter[str]()

    def admit(self, config: Config) -> ExperimentConfig | None:
        """The checked config, if it is valid, new and can be trained; it counts as suggested then. Otherwise None."""
        text = canonical_json(config)
        if text in self._tried:
            self.refuse(KNOWN)
            return None
        self._tried.add(text)
        try:
            checked = config_from_dict(config, source="suggestion")
        except ConfigError as error:
            self.refuse(str(error))
            return None
        key = identity(checked.to_dict())
        problem = KNOWN if key in self._known else rehearse(checked)
        if problem is not None:
            self.refuse(problem)
            return None
        self._known.add(key)
        return checked

    def refuse(self, reason: str) -> None:
        """Count a refusal."""
        self._reasons[reason] += 1

    def reason(self) -> str:
        """The most frequent reason of a refusal."""
        ((reason, _),) = self._reasons.most_common(1)
        return reason


def rehearse(config: ExperimentConfig) -> str | None:
    """Make one training step. Returns the reason why the model cannot make it; None if it can.

    A model may need more of the data than its constructor knows, as one with a given route does. Data that are not
    generated are not read, because their files may be on another machine: such a config is not rehearsed.
    """
    from research_eval.datasets.kinds import dataset_kind

    if not dataset_kind(config.dataset_type).generated:
        return None
    import torch

    from research_eval.models.base_model import adapt
    from research_eval.runs.prepare import create_model, model_context
    from research_eval.tasks.base import task_of

    data = _splits_of(config.dataset_type, config.dataset_name, canonical_json(config.dataset_params), config.seed)
    context = model_context(config, data)
    samples = np.arange(min(len(data.train), REHEARSED_SAMPLES))
    batches = data.train.batches(config.batch_size)
    try:
        with torch.random.fork_rng(devices=[]):
            params, cpu = config.model_params, torch.device("cpu")
            made = create_model(config.model_type, params, context, cpu, config.task_name)
            model = adapt(made, config.model_type)
            with torch.no_grad():  # more samples than one batch: some may have a path that the model cannot follow
                model.run(batches.take(samples))
            batch = batches.take(samples[: config.batch_size])
            task, terms = model.losses(model.run(batch), batch.labels, task_of(config.task, data))
            sum((term.weight * term.raw for term in terms.values()), start=task).backward()
    except Exception as problem:  # a model class of a user may raise anything
        log.debug("rehearsal", exc_info=True)
        return f"{type(problem).__name__}: {problem}" if not isinstance(problem, ConfigError) else str(problem)
    return None


@functools.lru_cache(maxsize=1)
def _splits_of(dataset_type: str, dataset_name: str, params: str, seed: int) -> DataSplits:
    """The data of a config. Cached, because all variations of a template use the same data."""
    from research_eval.datasets.providers import load_splits

    return load_splits(dataset_type, dataset_name, json.loads(params), seed)
