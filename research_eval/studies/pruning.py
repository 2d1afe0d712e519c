"""Pruning: trials that will not become good are stopped after a few epochs.

For one objective an algorithm of Optuna decides. Optuna has none for several objectives; there a trial is stopped if
several finished trials dominate it (`dominated`).

Both compare trials after the same epoch. What they compare is the score that predicts the objective (`CURVES`); an
objective without such a score, such as the number of parameters, does not change while a trial trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import optuna
from optuna.trial import TrialState

from research_eval.config.sections import ExperimentConfig
from research_eval.store.metrics import gain_sign, score_of_epoch
from research_eval.studies.adapter import StoredTrial
from research_eval.studies.options import StudyOptions
from research_eval.studies.proposals import COSTS, costs
from research_eval.training.state import Pruned

STARTUP_TRIALS = 5  # finished trials before any trial is pruned
DOMINATED_BY = 3  # finished trials that have to dominate a trial of several objectives before it is pruned


def make_pruner(options: StudyOptions) -> optuna.pruners.BasePruner:
    """Optuna's pruner for one objective; one that never prunes for several objectives."""
    epochs = options.space.base["epochs"]
    if len(options.objectives) > 1 or options.method.pruner == "none":
        return optuna.pruners.NopPruner()
    if options.method.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3)
    return optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=epochs // 10)


class PruningCallback:
    """Stores the scores of a trial's epochs and stops the trial if it is not worth another epoch.

    Only the first seed of a trial is judged (`judges`): once it has passed, the other seeds are trained to the end.
    """

    def __init__(self, trial: StoredTrial, options: StudyOptions, config: ExperimentConfig, judges: bool) -> None:
        self._trial, self._options = trial, options
        self._epochs, self._judges = config.epochs, judges
        self._costs: dict[str, float] = {}
        several = len(options.objectives) > 1 and options.method.pruner != "none"
        if several and judges:
            self._costs = costs(config, [name for name in options.objectives if name in COSTS])
            trial.set_attribute("costs", self._costs)

    def epoch_end(self, epoch: int, scores: dict[str, float]) -> None:
        """Receive the scores of an epoch. Raises Pruned to stop the trial."""
        self._trial.set_attribute("epochs", self._epochs_before() + epoch)
        if not self._judges:
            return
        if len(self._options.objectives) == 1:
            self._judge_one(epoch, scores)
        else:
            self._judge_several(epoch, scores)

    def _epochs_before(self) -> int:
        """The epochs of the seeds that were trained before this one."""
        ids = self._trial.attributes["experiment_ids"]
        return self._epochs * (len(ids) - 1)

    def _judge_one(self, epoch: int, scores: dict[str, float]) -> None:
        """Let Optuna's pruner decide, if the objective has a score in every epoch.

        The last epoch is never pruned, because nothing would be saved.
        """
        score = score_of_epoch(self._options.objectives[0])
        if score is None or score not in scores:
            return
        self._trial.report(epoch, scores[score])
        if epoch < self._epochs and self._trial.should_stop():
            raise Pruned(f"{self._options.method.pruner} pruner after epoch {epoch}: {score} {scores[score]:.4f}")

    def _judge_several(self, epoch: int, scores: dict[str, float]) -> None:
        """Compare the trial with the finished ones after the same epoch."""
        curves = self._trial.attributes.get("curves", {})
        for name in self._options.objectives:
            score = score_of_epoch(name)
            if score in scores:
                curve = dict(curves.get(name, {}))
                curve[str(epoch)] = scores[score]
                curves = {**curves, name: curve}
        self._trial.set_attribute("curves", curves)
        if self._options.method.pruner == "none" or epoch == self._epochs:
            return
        own = standing(self._options.objectives, curves, self._costs, epoch)
        others = [
            standing(self._options.objectives, trial.user_attrs["curves"], trial.user_attrs.get("costs", {}), epoch)
            for trial in self._trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if "curves" in trial.user_attrs
        ]
        if len(others) >= STARTUP_TRIALS and dominated(own, others):
            raise Pruned(f"after epoch {epoch} {DOMINATED_BY} finished trials were better in every objective")


def standing(
    objectives: Sequence[str], curves: Mapping[str, Mapping[str, float]], known: Mapping[str, float], epoch: int
) -> dict[str, float]:
    """What is known of a trial's objectives after an epoch: the best scores so far, and the `known` costs.

    `curves` maps an objective to its scores by epoch. All values get a sign that makes larger ones better.
    """
    found = {}
    for name in objectives:
        sign = gain_sign(name)
        until = [sign * value for at, value in curves.get(name, {}).items() if int(at) <= epoch]
        if until:
            found[name] = max(until)
        elif name in known:
            found[name] = sign * known[name]
    return found


def dominated(own: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> bool:
    """Whether at least `DOMINATED_BY` other trials dominate this one; all values as `standing` returns them.

    A trial dominates if it is nowhere worse, and better in some score that training changes. A smaller model alone does
    not dominate: training may still make this one better.
    """
    moving = [name for name in own if score_of_epoch(name) is not None]
    better = sum(
        all(other.get(name, -math.inf) >= value for name, value in own.items())
        and any(other.get(name, -math.inf) > own[name] for name in moving)
        for other in others
    )
    return better >= DOMINATED_BY
