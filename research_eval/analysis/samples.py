"""The error that a test split of limited size leaves in a test score, and comparisons on the same test samples.

An interval over seeds asks: would other seeds do as well? An interval over samples asks: would these trained models do
as well on another test split of the same size? Runs store their answers in their folder (`store.predictions`).

N samples  R runs  K cells: different combinations of a label and the predictions of all runs
P pairs of a label and the prediction of one run  D draws  C classes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from research_eval.analysis.runs import Group
from research_eval.analysis.statistics import Interval, holm, mcnemar, normal_interval, share_interval
from research_eval.errors import ConfigError
from research_eval.store.predictions import TEST_FILE, Predictions, read_predictions

if TYPE_CHECKING:
    from research_eval.store.records import RunRow

DRAWS = 2000
MAX_CELLS = 4_000_000  # draws times cells in memory at once
TOLERANCE = 1e-6  # between a stored score and the one that follows from the file: it was written by this run

Scores = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[Any]], NDArray[np.float64]]
Seed = int | str


class Run(Protocol):
    """A finished run."""

    @property
    def experiment_id(self) -> str: ...
    @property
    def metrics(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class SampleError:
    """The interval of a mean test score over the samples of the test split; without one, `reason` says why."""

    interval: Interval | None = None
    num_samples: int = 0
    reason: str = ""


@dataclass(frozen=True)
class SampleTest:
    """Two groups of runs on the same test samples: the difference of their mean test scores, first minus second.

    `p_value` is that of McNemar's exact test for one run on each side, and else that of the paired bootstrap; `method`
    says which. `only_first` and `only_second` count the samples that only one of two runs answers correctly. Without a
    difference, `reason` says why.
    """

    difference: float | None = None
    interval: Interval | None = None
    num_samples: int = 0
    p_value: float | None = None
    adjusted_p: float | None = None  # with Holm's correction over all comparisons of a table
    method: str = ""
    only_first: int | None = None
    only_second: int | None = None
    reason: str = ""


def sample_error(group: Group, metric: str, confidence: float) -> SampleError:
    """How far the mean of a test score over the seeds depends on the samples of the test split.

    Wilson's interval for the accuracy, with the variance over the samples of the mean over the seeds; the percentile
    bootstrap over the samples for macro-F1; and the normal interval for the loss. Other scores have none.
    """
    seeds = list(group.scores(metric))
    if not seeds or metric not in ("test_f1", "test_acc", "test_loss"):
        return SampleError()
    found, reason = _predictions(_of_seeds(group, seeds), metric)
    if reason:
        return SampleError(reason=reason)
    splits = _by_split(found)
    shares = [len(runs) / len(found) for runs in splits]
    size = sum(len(runs[0]) for runs in splits)
    if metric == "test_f1":
        rng, draws_D = np.random.default_rng(0), np.zeros(DRAWS)
        for share, runs in zip(shares, splits, strict=True):
            draws_D += share * _mean_draws(runs, [1] * len(runs), _macro_f1, rng)
        return SampleError(_percentiles(draws_D, confidence), size)
    # The values of a sample, averaged over the runs that share it.
    means = [np.mean([_values(one, metric) for one in runs], 0) for runs in splits]
    mean = sum(share * float(values_N.mean()) for share, values_N in zip(shares, means, strict=True))
    variance = sum(share**2 * values_N.var() / len(values_N) for share, values_N in zip(shares, means, strict=True))
    interval = share_interval if metric == "test_acc" else normal_interval
    return SampleError(interval(mean, float(variance), size, confidence), size)


def sample_test(first: Group, second: Group, seeds: Sequence[Seed], metric: str, confidence: float) -> SampleTest:
    """Compare two groups over common seeds, whose runs have to share their test samples."""
    if not seeds or metric not in ("test_f1", "test_acc"):
        return SampleTest()
    sides = []
    for group in (first, second):
        found, reason = _predictions(_of_seeds(group, seeds), metric)
        if reason:
            return SampleTest(reason=reason)
        sides.append(found)
    pairs = list(zip(*sides, strict=True))
    if any(_samples_of(one) != _samples_of(other) for one, other in pairs):
        return SampleTest(reason=f"{first.model_type} and {second.model_type} have other test samples in the same seed")
    splits = _by_split([one for pair in pairs for one in pair])
    rng, draws_D = np.random.default_rng(0), np.zeros(DRAWS)
    for runs in splits:
        # The mean over all runs of a pair's two scores with their signs is half of the mean difference.
        signed_D = _mean_draws(runs, [1, -1] * (len(runs) // 2), _macro_f1 if metric == "test_f1" else _accuracy, rng)
        draws_D += 2 * signed_D * len(runs) / (2 * len(pairs))
    difference = fmean(_score(one, metric) - _score(other, metric) for one, other in pairs)
    size, interval = sum(len(runs[0]) for runs in splits), _percentiles(draws_D, confidence)
    if len(pairs) == 1:
        right, other_right = (_values(one, "test_acc") > 0 for one in pairs[0])
        only = int((right & ~other_right).sum()), int((other_right & ~right).sum())
        return SampleTest(difference, interval, size, mcnemar(*only), None, "McNemar", *only)
    tail = 1 + min(int((draws_D <= 0).sum()), int((draws_D >= 0).sum()))
    p_value = None if interval is None else min(1.0, 2 * tail / (DRAWS + 1))
    return SampleTest(difference, interval, size, p_value, None, "bootstrap")


def seed_and_sample_interval(runs: Sequence[Run], metric: str, confidence: float = 0.95) -> Interval | None:
    """The interval of a mean test score over other seeds *and* other test samples: the bootstrap over both.

    Each draw takes seeds and samples with replacement; seeds that share the test split take the same samples. The
    deviations of the R seeds from their mean are widened by sqrt(R / (R - 1)), because a bootstrap of few seeds is too
    narrow by this factor. None for fewer than two seeds, for other scores than accuracy and macro-F1, and without the
    answers of all runs.
    """
    if len(runs) < 2 or metric not in ("test_f1", "test_acc"):
        return None
    found, reason = _predictions(runs, metric)
    if reason:
        return None
    rng, scores = np.random.default_rng(0), _macro_f1 if metric == "test_f1" else _accuracy
    draws_RD = np.concatenate([_draws(split, scores, rng) for split in _by_split(found)])
    size = len(draws_RD)
    means_R = draws_RD.mean(1)
    weights_DR = rng.multinomial(size, np.full(size, 1 / size), DRAWS) / size
    widened = (math.sqrt(size / (size - 1)) - 1) * weights_DR @ (means_R - means_R.mean())
    means_D = (weights_DR * draws_RD.T).sum(1) + widened
    return _percentiles(means_D.clip(0, 1), confidence)


def corrected(tests: Sequence[SampleTest]) -> list[SampleTest]:
    """The tests with Holm's correction over all of them."""
    adjusted = iter(holm([one.p_value for one in tests if one.p_value is not None]))
    return [one if one.p_value is None else replace(one, adjusted_p=next(adjusted)) for one in tests]


# -------------------------------------------------------------------------------------------------- reading the files


def _of_seeds(group: Group, seeds: Sequence[Seed]) -> list[RunRow]:
    runs = group.by_seed()
    return [runs[seed] for seed in seeds]


def _predictions(runs: Sequence[Run], metric: str) -> tuple[list[Predictions], str]:
    """The answers of these runs, or the reason why one of them has none that can be used."""
    found = []
    for run in runs:
        where = f"runs/{run.experiment_id}/{TEST_FILE}"
        try:
            one = read_predictions(run.experiment_id)
        except ConfigError as problem:
            return [], str(problem)
        if one is None:
            return [], f"{where} is not here: the folder was moved or deleted, or the run is older than such files"
        if metric != "test_loss" and (
            one.task != "classification" or one.labels_N is None or one.predictions_N is None
        ):
            return [], f"{where} has no classes"
        if not math.isclose(_score(one, metric), run.metrics[metric], rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            return [], f"{where} is not of this run: its {metric} is another one"
        found.append(one)
    return found, ""


def _samples_of(one: Predictions) -> tuple[str, bytes]:
    """Equal for answers to the same samples in the same order. The labels are compared too, to be safe."""
    return one.split_sha256, b"" if one.labels_N is None else one.labels_N.tobytes()


def _by_split(found: Sequence[Predictions]) -> list[list[Predictions]]:
    """The runs of each test split: with generated data every seed has its own."""
    splits: dict[tuple[str, bytes], list[Predictions]] = {}
    for one in found:
        splits.setdefault(_samples_of(one), []).append(one)
    return list(splits.values())


def _labels(one: Predictions) -> NDArray[Any]:
    assert one.labels_N is not None, "`_predictions` returns classes only"
    return one.labels_N


def _answers(one: Predictions) -> NDArray[Any]:
    assert one.predictions_N is not None, "`_predictions` returns classes only"
    return one.predictions_N


def _values(one: Predictions, metric: str) -> NDArray[np.float64]:
    """The value of every sample whose mean is the score."""
    values_N = one.losses_N if metric == "test_loss" else _labels(one) == _answers(one)
    return np.asarray(values_N, np.float64)


def _score(one: Predictions, metric: str) -> float:
    """The score of all samples, as the run has stored it."""
    if metric != "test_f1":
        return float(_values(one, metric).mean())
    return float(_macro_f1(_labels(one), _answers(one), np.ones((1, len(one))))[0])


# --------------------------------------------------------------------------------------------------------- bootstrap


def _mean_draws(
    runs: Sequence[Predictions], signs: Sequence[int], scores: Scores, rng: np.random.Generator
) -> NDArray[np.float64]:
    """For each draw of test samples with replacement, the mean over the runs of sign times score; [D]."""
    return np.array(signs) @ _draws(runs, scores, rng) / len(runs)


def _draws(runs: Sequence[Predictions], scores: Scores, rng: np.random.Generator) -> NDArray[np.float64]:
    """The score of each run on each draw of the test samples, with replacement; [R, D].

    Samples with the same label and the same answers of all runs are exchangeable, so that a draw is a number of samples
    for each of these cells.
    """
    table_XK, counts_K = np.unique(np.stack([_labels(runs[0]), *map(_answers, runs)]), axis=1, return_counts=True)
    size, found = int(counts_K.sum()), []
    step = max(1, MAX_CELLS // len(counts_K))
    for start in range(0, DRAWS, step):
        drawn_DK = rng.multinomial(size, counts_K / size, min(step, DRAWS - start))
        found.append([scores(table_XK[0], row_K, drawn_DK) for row_K in table_XK[1:]])
    return np.concatenate(found, axis=1)


def _accuracy(
    labels_K: NDArray[np.int64], predictions_K: NDArray[np.int64], counts_DK: NDArray[Any]
) -> NDArray[np.float64]:
    """The accuracy of each draw, [D]."""
    return counts_DK @ (labels_K == predictions_K).astype(np.float64) / counts_DK.sum(1)


def _macro_f1(
    labels_K: NDArray[np.int64], predictions_K: NDArray[np.int64], counts_DK: NDArray[Any]
) -> NDArray[np.float64]:
    """Mean F1 over the classes that occur in the labels or the predictions of the draw, [D]; as in the task."""
    from scipy.sparse import csr_array

    # One run has far fewer pairs of a label and an answer than all runs together have cells.
    pairs_XP, numbers_K = np.unique(np.stack([labels_K, predictions_K]), axis=1, return_inverse=True)
    size = pairs_XP.shape[1]
    counts_DP = np.stack([np.bincount(numbers_K.ravel(), weights=counts_K, minlength=size) for counts_K in counts_DK])
    classes, numbers = np.unique(pairs_XP, return_inverse=True)
    truth_P, guess_P = numbers.reshape(2, size)

    def of_classes(numbers_P: NDArray[Any], weights_P: NDArray[np.float64]) -> NDArray[np.float64]:
        """The weighted counts of the pairs of each class, [D, C]."""
        return counts_DP @ csr_array((weights_P, (np.arange(size), numbers_P)), shape=(size, len(classes)))

    every_P = np.ones(size)
    hits_DC = of_classes(truth_P, (truth_P == guess_P).astype(np.float64))
    total_DC = of_classes(truth_P, every_P) + of_classes(guess_P, every_P)
    f1_DC = 2 * hits_DC / np.maximum(total_DC, 1)
    return f1_DC.sum(1) / (total_DC > 0).sum(1)


def _percentiles(draws_D: NDArray[np.float64], confidence: float) -> Interval | None:
    """The middle part of the draws; None if they do not vary, as for models without an error."""
    if np.ptp(draws_D) < TOLERANCE:
        return None
    low, high = np.percentile(draws_D, [50 * (1 - confidence), 50 * (1 + confidence)])
    return Interval(float(low), float(high))
