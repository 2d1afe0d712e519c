"""Paired comparison of two model types: the best config of each, over the seeds that both have.

Equal seeds see the same data in the same order, so that the differences of pairs vary less than the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from research_eval.analysis.runs import Group, Results
from research_eval.analysis.samples import SampleTest, corrected, sample_test
from research_eval.analysis.statistics import PairedDifference, holm, paired_difference
from research_eval.analysis.summary import Options, without_samples
from research_eval.analysis.tables import Table, bounds_of, interval_text, metric_text
from research_eval.errors import ConfigError
from research_eval.store.metrics import direction

Pair = tuple[str, str]


@dataclass(frozen=True)
class Comparison:
    """The differences "first minus second", in the metric that chose both configs and in the test score."""

    task: str  # its label
    first: Group
    second: Group
    seeds: list[int | str]
    difference: PairedDifference
    test: PairedDifference | None  # None unless every common seed has the score on both sides
    samples: SampleTest  # the test score once more, on the samples of the test split
    adjusted_p: float | None = None  # with Holm's correction over all comparisons of a table


def all_pairs(model_types: Sequence[str]) -> list[Pair]:
    """Every two model types, each pair once."""
    return list(combinations(model_types, 2))


def parse_pair(text: str) -> Pair:
    """Read the pair `A,B` of the command line. Raises ConfigError."""
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise ConfigError(f"--compare: expected two model types such as goe,dense, got {text!r}")
    return names[0], names[1]


def compare(results: Results, best: Sequence[Group], pairs: Sequence[Pair], options: Options) -> list[Comparison]:
    """Compare every pair on every task on which both are among the best groups.

    Holm's correction covers all tests over seeds together, and all tests over samples together.
    """
    chosen = {(group.task, group.model_type): group for group in best}
    found: list[Comparison] = []
    for task, label in results.tasks.items():
        for first, second in pairs:
            if (task, first) in chosen and (task, second) in chosen:
                found.append(_compared(label, chosen[task, first], chosen[task, second], options))
    p_values = [one.difference.p_value for one in found if one.difference.p_value is not None]
    adjusted = iter(holm(p_values))
    samples = iter(corrected([one.samples for one in found]))
    return [
        replace(one, samples=next(samples), adjusted_p=None if one.difference.p_value is None else next(adjusted))
        for one in found
    ]


def _compared(label: str, first: Group, second: Group, options: Options) -> Comparison:
    """The comparison before the correction of its p-value, over the seeds that both groups have scores for."""
    scores = first.scores(options.metric), second.scores(options.metric)
    seeds = [seed for seed in scores[0] if seed in scores[1]]
    # A mean over some of the seeds would be compared with a mean over all of them: all or none.
    tests = first.scores(options.test_metric), second.scores(options.test_metric)
    tested = bool(seeds) and all(seed in one for one in tests for seed in seeds)
    return Comparison(
        label,
        first,
        second,
        seeds,
        _paired(scores, seeds, options.metric, options.confidence),
        _paired(tests, seeds, options.test_metric, options.confidence) if tested else None,
        sample_test(first, second, seeds if tested else [], options.test_metric, options.confidence),
    )


def _paired(
    scores: Sequence[dict[int | str, float]], seeds: Sequence[int | str], metric: str, confidence: float
) -> PairedDifference:
    """The statistics of the pairs: one pair for each of these seeds."""
    first, second = ([one[seed] for seed in seeds] for one in scores)
    return paired_difference(first, second, confidence, bounds_of(metric))


# ---------------------------------------------------------------------------------------------------------- as text


def comparison_table(results: Results, found: Sequence[Comparison], options: Options) -> Table:
    """The comparisons for people; `comparison_csv` is for programs."""
    percent = f"{100 * options.confidence:g} %"
    tasks, tests = len(results.tasks) > 1, any(one.test for one in found)
    samples = any(one.samples.difference is not None for one in found)
    columns = ["difference", *["task"] * tasks, "common seeds", options.metric, f"{percent} t-interval"]
    columns += ["effect size", "p", "p (Holm)", *[options.test_metric] * tests]
    columns += [f"{percent} over samples", "p (samples)", "p (samples, Holm)"] * samples + ["remark"]
    rows = []
    for one in found:
        line = [f"{one.first.model_type} - {one.second.model_type}", *[one.task] * tasks, str(len(one.seeds))]
        line += [_signed(one.difference, options.metric), interval_text(one.difference.interval, options.metric)]
        line += [_optional(one.difference.effect_size, "+.2f"), p_text(one.difference.p_value), p_text(one.adjusted_p)]
        line += [_signed(one.test, options.test_metric)] * tests
        if samples:
            line.append(interval_text(one.samples.interval, options.test_metric))
            line += [p_text(one.samples.p_value), p_text(one.samples.adjusted_p)]
        line.append(one.difference.note)
        rows.append(line)
    title = f"{results.dataset_name}: paired differences between the best configs by {options.metric}"
    return Table(title, columns, rows, ("difference", "task", "remark"), _notes(found, options))


def _signed(difference: PairedDifference | None, metric: str) -> str:
    """The mean difference with its sign; empty if there is none."""
    if difference is None or difference.mean is None:
        return ""
    return ("+" if difference.mean >= 0 else "") + metric_text(difference.mean, metric)


def _optional(value: float | None, form: str) -> str:
    """The value in this format; empty for None."""
    return "" if value is None else format(value, form)


def p_text(value: float | None) -> str:
    """Three decimals, and never 0: a p-value is not zero. Empty for None."""
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _notes(found: Sequence[Comparison], options: Options) -> list[str]:
    """What a reader has to know about the columns."""
    tests = sum(one.adjusted_p is not None for one in found)
    better = "positive" if direction(options.metric) == "maximize" else "negative"
    notes = [
        f"First minus second over the common seeds, each with its best config by {options.metric}; "
        f"{better} means that the first is better.",
        "Effect size: mean over standard deviation of the differences, corrected for few seeds (Hedges).",
        f"p: paired t-test, two-sided; Holm: adjusted for the {tests} tests of this table." if tests else "",
        *_sample_notes(found, options),
        "Both configs were chosen by the scores that are compared: where one of them had many more trials, "
        "compare fresh seeds.",
    ]
    return [note for note in notes if note]


def _sample_notes(found: Sequence[Comparison], options: Options) -> list[str]:
    """What the columns about the test samples mean, and which comparisons have none."""
    methods = {
        "McNemar": "McNemar's exact test on the samples that only one of the two runs answers correctly",
        "bootstrap": "paired bootstrap over the samples, of the difference of the means over seeds",
    }
    used = [text for method, text in methods.items() if any(one.samples.method == method for one in found)]
    notes = []
    if used:
        notes.append(
            f"Over samples: the difference in {options.test_metric} that another test split of this size would give "
            f"for these trained models; p (samples): {', or '.join(used)}. Other seeds are not a part of it."
        )
    names = [(f"{one.first.model_type} - {one.second.model_type}", one.samples.reason) for one in found]
    return notes + without_samples(names)


def comparison_csv(found: Sequence[Comparison], options: Options) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of a CSV file, with every number in full."""
    columns = ["first", "second", "task", "num_common_seeds", "common_seeds", "metric", "difference", "low", "high"]
    columns += ["effect_size", "p_value", "p_value_holm", "test_metric", "test_difference", "test_low", "test_high"]
    columns += ["sample_test", "num_test_samples", "samples_low", "samples_high", "p_value_samples"]
    columns += ["p_value_samples_holm", "only_first_right", "only_second_right"]
    columns += ["remark", "first_experiment_ids", "second_experiment_ids"]
    rows = []
    for one in found:
        low, high = one.difference.interval or (None, None)
        test_low, test_high = (one.test and one.test.interval) or (None, None)
        rows.append(
            [
                *(one.first.model_type, one.second.model_type, one.task, len(one.seeds), " ".join(map(str, one.seeds))),
                *(options.metric, one.difference.mean, low, high, one.difference.effect_size),
                *(one.difference.p_value, one.adjusted_p),
                *(options.test_metric, one.test.mean if one.test else None, test_low, test_high),
                *(one.samples.method, one.samples.num_samples or None, *(one.samples.interval or (None, None))),
                *(one.samples.p_value, one.samples.adjusted_p, one.samples.only_first, one.samples.only_second),
                one.difference.note,
                *(" ".join(run.experiment_id for run in group.runs) for group in (one.first, one.second)),
            ]
        )
    return columns, rows
