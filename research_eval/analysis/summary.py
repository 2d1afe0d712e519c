"""The summary table: for each model type its best config, chosen on validation, with statistics over its seeds.

The table also shows how many trials were spent on each model type, because the best of many trials looks better than
the best of few, and the test score, by which nothing is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from research_eval.analysis.data import TaskData
from research_eval.analysis.runs import COUNTED, Group, Results
from research_eval.analysis.samples import SampleError, sample_error
from research_eval.analysis.statistics import FEWEST, Interval, mean_interval, no_spread, wilson_interval
from research_eval.analysis.tables import Table, bounds_of, interval_text, is_score, metric_text, short_number
from research_eval.store.data_facts import BASELINES, Baselines, baseline_score
from research_eval.store.metrics import (
    DEFAULT_METRIC,
    LATENCY,
    MEASURED_LATENCY,
    SPREAD_LIMIT,
    direction,
    latency_parts,
    latency_remark,
    score_of_epoch,
)

# Metric of a cost -> its title in tables. The tables for people show a few of them, the CSV file shows all.
COSTS = {
    "param_count": "parameters",
    "active_param_count": "active",
    "inference_latency_ms_batch": "latency ms",
    "inference_flops_per_sample": "FLOPs/sample",
    "train_flops": "training FLOPs",
    "training_duration_seconds": "training s",
}
LATENCIES = (  # columns of the CSV file: how far to trust the latency, and the latency of `goe measure`
    *latency_parts(f"{LATENCY}_ms_batch").values(),
    f"{MEASURED_LATENCY}_ms_batch",
    *latency_parts(f"{MEASURED_LATENCY}_ms_batch").values(),
)
SHOWN_COSTS = ("param_count", "inference_latency_ms_batch", "inference_flops_per_sample")
NO_DATA: Mapping[str, TaskData] = {}


@dataclass(frozen=True)
class Options:
    """The choices of the user: the metric that selects configs, the level of intervals, and when a task is solved.

    `default` is the metric that selects configs if the user names none.
    """

    metric: str
    confidence: float
    solved_at: float
    default: str = DEFAULT_METRIC

    @property
    def test_metric(self) -> str:
        """The test score that the tables show beside the metric: of the same kind, else of the kind of the default."""
        series = score_of_epoch(self.metric) or score_of_epoch(self.default) or "val_loss"
        return f"test_{series.removeprefix('val_')}"


@dataclass(frozen=True)
class Estimate:
    """A metric over the seeds of a group."""

    values: list[float]
    mean: float | None
    interval: Interval | None  # None for fewer than `FEWEST` seeds, or if all have the same value
    solved: int | None  # how many seeds solved the task; None if the metric is no score
    solve_rate: Interval | None

    @property
    def saturated(self) -> bool:
        """Whether several seeds have one and the same value, so that there is no spread to estimate."""
        return len(self.values) > 1 and no_spread(self.values)

    @property
    def has_telling_rate(self) -> bool:
        """Whether the solve rate tells a reader something: one or two unsolved seeds do not."""
        return self.solved is not None and (self.solved > 0 or self.saturated or len(self.values) >= FEWEST)


def estimate(group: Group, metric: str, confidence: float, solved_at: float) -> Estimate:
    """Estimate a metric over the seeds of a group. A score has a solve rate, also if no seed has solved the task."""
    values = group.values(metric)
    if not values:
        return Estimate([], None, None, None, None)
    solved = sum(value >= solved_at for value in values)
    return Estimate(
        values,
        fmean(values),
        mean_interval(values, confidence, bounds_of(metric)),
        solved if is_score(metric) else None,
        wilson_interval(solved, len(values), confidence) if is_score(metric) else None,
    )


@dataclass(frozen=True)
class Row:
    """The best config of a model type on a task."""

    group: Group
    score: Estimate
    test: Estimate
    test_samples: SampleError
    costs: dict[str, float | None]
    spent: dict[str, int]  # status -> runs of this model type on this task
    baselines: Baselines = field(default_factory=dict)  # of the task

    @property
    def trials(self) -> int:
        """The runs of this model type on this task: finished, pruned or diverged."""
        return sum(self.spent.values())


def summary_rows(
    results: Results, best: Sequence[Group], options: Options, data: Mapping[str, TaskData] = NO_DATA
) -> list[Row]:
    """A row for each of the best groups. The groups have to contain all metrics (`with_all_metrics`)."""
    return [
        Row(
            group,
            estimate(group, options.metric, options.confidence, options.solved_at),
            estimate(group, options.test_metric, options.confidence, options.solved_at),
            sample_error(group, options.test_metric, options.confidence),
            {name: group.cost(name) for name in COSTS},
            {status: results.spent[group.task, group.model_type][status] for status in COUNTED},
            data[group.task].baselines if group.task in data else {},
        )
        for group in best
    ]


# ---------------------------------------------------------------------------------------------------------- as text


def summary_table(results: Results, rows: Sequence[Row], options: Options) -> Table:
    """The table for people; `summary_csv` is for programs."""
    percent = f"{100 * options.confidence:g} %"
    tests = any(row.test.values for row in rows)
    rates = any(row.score.has_telling_rate for row in rows)
    tasks = len(results.tasks) > 1
    columns = ["model", *["task"] * tasks, "seeds", options.metric, f"{percent} interval"]
    columns += [f"solved (≥ {options.solved_at:g})", f"{percent} Wilson"] * rates
    # Of the two intervals of the test score, the table leaves out one that no row has.
    over_seeds = any(row.test.interval is not None or row.test.saturated for row in rows)
    over_samples = any(row.test_samples.interval is not None for row in rows)
    columns += [options.test_metric] * tests
    columns += [f"{percent} over seeds"] * over_seeds + [f"{percent} over samples"] * over_samples
    columns += [COSTS[name] for name in SHOWN_COSTS] + ["trials spent"]
    measured = shown_latency(rows)
    cells = []
    for row in rows:
        line = [row.group.model_type, *[results.tasks[row.group.task]] * tasks, str(len(row.score.values))]
        line += [metric_text(row.score.mean, options.metric), spread_text(row.score, options.metric)]
        # Columns that would tell nothing are left out of the table, see above.
        line += rate_texts(row.score) if rates else []
        line += [_test_text(row, options.test_metric)] * tests
        line += [spread_text(row.test, options.test_metric) if row.test.values else ""] * over_seeds
        line += [interval_text(row.test_samples.interval, options.test_metric)] * over_samples
        line += [
            latency_text(row.group, measured) if latency_parts(name) else short_number(row.costs[name])
            for name in SHOWN_COSTS
        ]
        line.append(spent_text(row.spent))
        cells.append(line)
    for task in dict.fromkeys(row.group.task for row in rows):
        for name, score, test in baseline_texts(next(row for row in rows if row.group.task == task), options):
            shown = {"model": name, "task": results.tasks[task], options.metric: score, options.test_metric: test}
            cells.append([shown.get(column, "") for column in columns])
    return Table(
        f"{results.dataset_name}: best config of each model type by {options.metric}",
        columns,
        cells,
        left=("model", "task", "trials spent"),
        notes=_notes(results, rows, options),
    )


def baseline_texts(row: Row, options: Options) -> list[tuple[str, str, str]]:
    """Name, score and test score of each baseline of the row's task that has a score of this kind."""
    lines = []
    for name, scores in row.baselines.items():
        values = [baseline_score(scores, metric) for metric in (options.metric, options.test_metric)]
        if any(value is not None for value in values):
            texts = [metric_text(value, options.metric) for value in values]
            lines.append((BASELINES[name], texts[0], texts[1]))
    return lines


def spread_text(score: Estimate, metric: str) -> str:
    """The interval, or the reason in words why there is none."""
    if score.interval is not None:
        return interval_text(score.interval, metric)
    if score.saturated:
        return "all seeds equal"
    return "no interval"


def shown_latency(rows: Sequence[Row]) -> str:
    """The metric that the column of the latency shows: that of `goe measure --store` if all rows have it.

    Figures with other batch sizes or numbers of threads do not compare.
    """
    settings = {
        tuple(
            value
            for part in ("batch_size", "num_threads")
            for value in row.group.values(f"{MEASURED_LATENCY}_{part}")[:1]
        )
        for row in rows
    }
    every = all(row.group.values(f"{MEASURED_LATENCY}_ms_batch") for row in rows)
    return f"{MEASURED_LATENCY if every and len(settings) == 1 else LATENCY}_ms_batch"


def latency_text(group: Group, metric: str) -> str:
    """The median over the seeds with how far to trust it: `24.8 (spread 8 %)`, `93 (busy, spread 31 %)`.

    A group is busy if one of its runs was. Its spread is the largest of its runs, or their range if that is more.
    """
    values, parts = group.values(metric), latency_parts(metric)
    if not values:
        return ""
    spreads = group.values(parts["spread"])
    if spreads:
        spreads.append((max(values) - min(values)) / median(values))
    remark = latency_remark(max(group.values(parts["load"]), default=None), max(spreads, default=None))
    return short_number(median(values)) + f" ({remark})" * bool(remark)


def rate_texts(score: Estimate) -> list[str]:
    """The solved seeds of all seeds, and the interval of that rate; empty texts without a rate."""
    if score.solved is None or score.solve_rate is None:
        return ["", ""]
    low, high = score.solve_rate
    return [f"{score.solved}/{len(score.values)}", f"[{low:.2f}, {high:.2f}]"]


def spent_text(spent: dict[str, int]) -> str:
    """`12 (9 finished, 3 pruned)`."""
    parts = [f"{count} {status}" for status, count in spent.items() if count]
    total = sum(spent.values())
    return str(total) if parts == [f"{total} finished"] else f"{total} ({', '.join(parts)})"


def _test_text(row: Row, metric: str) -> str:
    """The mean test score, with the number of seeds if not all of them have one."""
    if not row.test.values:
        return ""
    missing = len(row.test.values) != len(row.score.values)
    return metric_text(row.test.mean, metric) + f" ({len(row.test.values)} seeds)" * missing


def _notes(results: Results, rows: Sequence[Row], options: Options) -> list[str]:
    """What a reader has to know to interpret the table correctly."""
    way = "highest" if direction(options.metric) == "maximize" else "lowest"
    notes = [
        f"Chosen by the {way} mean of {options.metric} over the seeds of a config. The best of many tries looks better "
        "than it is: compare the trials spent, and train the choice again with fresh seeds.",
    ]
    notes += _passed_over(results, rows, options)
    if any(row.test.values for row in rows):
        notes.append(f"{options.test_metric} is shown for the chosen config; nothing was chosen by it.")
    if any(row.test_samples.interval is not None for row in rows):
        notes.append(
            "Over seeds: what other seeds would give. Over samples: what another test split of this size would give "
            "for these trained models."
        )
    notes += without_samples([(row.group.model_type, row.test_samples.reason) for row in rows])
    notes += _latency_notes(rows)
    if any(len(row.score.values) < FEWEST for row in rows):
        notes.append(f"No interval: fewer than {FEWEST} seeds.")
    if any(row.score.saturated for row in rows):
        rate = " Read the solve rate." if is_score(options.metric) else ""
        notes.append(f"All seeds equal: no spread to make an interval from.{rate}")
    for row in rows:
        if row.group.lost:
            notes.append(
                f"{row.group.model_type}: {row.group.lost} more of the chosen config's seeds ended without a result; "
                "its scores leave them out."
            )
    if results.selection:
        notes.append(f"Only runs that were chosen by {results.selection}.")
    left_out = results.left_out_text([row.group for row in rows])
    return notes + [left_out] * bool(left_out)


def without_samples(reasons: Sequence[tuple[str, str]]) -> list[str]:
    """One line for all that has no interval over the test samples, with the first reason; no line if all have one."""
    missing = {name: reason for name, reason in reversed(reasons) if reason}
    if not missing:
        return []
    names = list(dict.fromkeys(name for name, reason in reasons if reason))
    return [f"No interval over test samples for {', '.join(names)}: {missing[names[0]].removesuffix('.')}."]


def _latency_notes(rows: Sequence[Row]) -> list[str]:
    """Where the shown latency comes from, and what to do about one that cannot be trusted."""
    metric = shown_latency(rows)
    texts = [latency_text(row.group, metric) for row in rows]
    notes = ["The latency is that of `goe measure`."] if metric.startswith(MEASURED_LATENCY) else []
    if any("busy" in text or "unsteady" in text for text in texts):
        notes.append(
            "Busy: other programs ran while the latency was measured. Unsteady: its repetitions or seeds differ by "
            f"more than {100 * SPREAD_LIMIT:.0f} %. Measure again: goe measure --store --run ID ID."
        )
    return notes


def _passed_over(results: Results, rows: Sequence[Row], options: Options) -> list[str]:
    """For each config with a better mean that has too few seeds to be chosen: which run it is, and what to do."""
    way = "higher" if direction(options.metric) == "maximize" else "lower"
    notes = []
    for chosen, better in results.passed_over([row.group for row in rows], options.metric):
        label = results.tasks[chosen.task]
        place = chosen.model_type + f" ({label})" * bool(label)
        values = better.values(options.metric)
        run = next(run for run in better.runs if math.isfinite(run.metrics.get(options.metric, math.nan)))
        seeds = f"{len(values)} seed{'s' * (len(values) > 1)}"
        mean = metric_text(better.mean(options.metric), options.metric)
        notes.append(
            f"{place}: a config with {seeds} has a {way} mean ({mean}, run {run.experiment_id}), which may be luck. "
            f"It was passed over: train it with {FEWEST} seeds or more."
        )
    return notes


def summary_csv(results: Results, rows: Sequence[Row], options: Options) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of a CSV file, with every number in full."""
    # A record is a dictionary, so that names and values cannot get out of step; the columns are its keys.
    records = []
    for row in rows:
        rate = row.score.solve_rate or (None, None)
        record: dict[str, Any] = {"model_type": row.group.model_type}
        if len(results.tasks) > 1:
            record["task"] = results.tasks[row.group.task]
        record |= {"experiment_name": row.group.name, "num_seeds": len(row.score.values)}
        record |= _figures(options.metric, row.score)
        record |= {"solved": row.score.solved, "solve_rate_low": rate[0], "solve_rate_high": rate[1]}
        record |= _figures(options.test_metric, row.test)
        low, high = row.test_samples.interval or (None, None)
        record |= {f"{options.test_metric}_samples_low": low, f"{options.test_metric}_samples_high": high}
        record |= {"num_test_samples": row.test_samples.num_samples or None}
        record |= {f"{name}_{options.metric}": baseline_of(row, name, options.metric) for name in BASELINES}
        record |= row.costs | {name: row.group.cost(name) for name in LATENCIES} | {"trials_spent": row.trials}
        record |= {f"trials_{status}": count for status, count in row.spent.items()}
        record |= {"seeds_lost": row.group.lost}
        record |= {"seeds": " ".join(str(run.seed) for run in row.group.runs if run.seed is not None)}
        record |= {"experiment_ids": " ".join(run.experiment_id for run in row.group.runs)}
        record |= {"config_json": row.group.runs[0].config_json}
        records.append(record)
    columns = list(records[0]) if records else []
    return columns, [list(record.values()) for record in records]


def baseline_of(row: Row, name: str, metric: str) -> float | None:
    """The score of a baseline on the row's task; None if it has none in this metric."""
    return baseline_score(row.baselines.get(name, {}), metric)


def _figures(metric: str, score: Estimate) -> dict[str, Any]:
    """The mean and both ends of the interval, as columns."""
    low, high = score.interval or (None, None)
    return {metric: score.mean, f"{metric}_low": low, f"{metric}_high": high}
