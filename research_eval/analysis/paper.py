"""The tables as a paper prints them, for LaTeX: means with intervals, the best in bold, nothing about operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from research_eval.analysis.comparison import Comparison, p_text
from research_eval.analysis.runs import Results
from research_eval.analysis.statistics import PairedDifference
from research_eval.analysis.summary import COSTS, Estimate, Options, Row, baseline_texts, spent_text
from research_eval.analysis.tables import Table, interval_text, metric_text, short_number
from research_eval.store.metrics import gain_sign

# Every paper needs sizes; the other columns are there if the user asks for them.
ALWAYS = ("param_count", "inference_flops_per_sample")
_FURTHER: dict[str, tuple[str, Callable[[Row], str]]] = {
    "trials_spent": ("trials spent", lambda row: spent_text(row.spent)),
    "experiment_ids": ("runs", lambda row: " ".join(run.experiment_id for run in row.group.runs)),
}
EXTRA_COLUMNS = (*(name for name in COSTS if name not in ALWAYS), *_FURTHER)


def summary_paper(results: Results, rows: Sequence[Row], options: Options, extra: Sequence[str] = ()) -> Table:
    """The best config of each model type: seeds, mean and interval of the metric and of the test score, size.

    In each task the best mean is bold. `extra` names more columns, of `EXTRA_COLUMNS`.
    """
    tasks = len(results.tasks) > 1
    metrics = [options.metric, *[options.test_metric] * any(row.test.values for row in rows)]
    costs = [*ALWAYS, *(name for name in COSTS if name in extra and name not in ALWAYS)]
    further = [one for name, one in _FURTHER.items() if name in extra]
    columns = [*["task"] * tasks, "model", "seeds", *map(metric_name, metrics), *(COSTS[name] for name in costs)]
    columns += [title for title, _ in further]
    cells = []
    for row in rows:
        line = [*[results.tasks[row.group.task]] * tasks, row.group.model_type, str(len(row.score.values))]
        line += [_with_interval(score, metric) for metric, score in zip(metrics, (row.score, row.test), strict=False)]
        line += [short_number(row.costs[name]) for name in costs]
        cells.append(line + [text(row) for _, text in further])
    for task in dict.fromkeys(row.group.task for row in rows):
        for name, *texts in baseline_texts(next(row for row in rows if row.group.task == task), options):
            line = [*[results.tasks[task]] * tasks, name, "", *texts[: len(metrics)]]
            cells.append(line + [""] * (len(columns) - len(line)))
    bold = {
        (line, 1 + tasks + place + 1)
        for place, metric in enumerate(metrics)
        for line in _best_lines([row.test if place else row.score for row in rows], rows, metric)
    }
    notes = [
        f"Mean over seeds, in brackets the {100 * options.confidence:g} % interval of the mean; bold: the best mean."
    ]
    if any(row.score.values and row.score.interval is None for row in rows):
        notes.append("Without brackets: fewer than three seeds, or all seeds equal.")
    title = f"{results.dataset_name}: best config of each model type by {metric_name(options.metric)}"
    return Table(title, columns, cells, ("task", "model", "trials spent", "runs"), notes, bold)


def comparison_paper(results: Results, found: Sequence[Comparison], options: Options) -> Table:
    """The paired differences with their intervals, effect sizes and corrected p-values."""
    tasks, tests = len(results.tasks) > 1, any(one.test for one in found)
    metrics = [options.metric, *[options.test_metric] * tests]
    columns = [*["task"] * tasks, "difference", "seeds", *map(metric_name, metrics)]
    columns += ["effect size", "p (Holm)"]
    rows = []
    for one in found:
        line = [*[one.task] * tasks, f"{one.first.model_type} - {one.second.model_type}", str(len(one.seeds))]
        line += [_signed(one.difference, options.metric), *[_signed(one.test, options.test_metric)] * tests]
        effect = one.difference.effect_size
        rows.append([*line, "" if effect is None else f"{effect:+.2f}", p_text(one.adjusted_p)])
    confidence = f"{100 * options.confidence:g} %"
    notes = [
        f"First minus second over common seeds, in brackets the {confidence} t-interval. Effect size: Hedges' g of the "
        "paired differences. p: paired t-test, corrected by Holm for all tests of the table."
    ]
    title = f"{results.dataset_name}: paired differences between the best configs by {metric_name(options.metric)}"
    return Table(title, columns, rows, ("task", "difference"), notes)


def metric_name(metric: str) -> str:
    """A metric as a paper names it, in the words of the field; other names stay.

    >>> metric_name("final_val_f1"), metric_name("test_acc"), metric_name("router_entropy")
    ('validation macro-F1', 'test accuracy', 'router_entropy')
    """
    words = {"f1": "macro-F1", "acc": "accuracy", "loss": "loss"}
    splits = {"final_val_": "validation", "best_val_": "best validation", "test_": "test"}
    for prefix, split in splits.items():
        score = metric.removeprefix(prefix).removesuffix("_across_epochs")
        if metric.startswith(prefix) and score in words:
            return f"{split} {words[score]}"
    return metric


def _with_interval(score: Estimate, metric: str) -> str:
    """`0.5783 [0.5645, 0.5921]`; only the mean if there is no interval, nothing without a value."""
    return f"{metric_text(score.mean, metric)} {interval_text(score.interval, metric)}".strip()


def _signed(difference: PairedDifference | None, metric: str) -> str:
    """`+0.0253 [0.0066, 0.0440]`; empty without a difference."""
    if difference is None or difference.mean is None:
        return ""
    sign = "+" if difference.mean >= 0 else ""
    return f"{sign}{metric_text(difference.mean, metric)} {interval_text(difference.interval, metric)}".strip()


def _best_lines(scores: Sequence[Estimate], rows: Sequence[Row], metric: str) -> list[int]:
    """The rows with the best mean of their task, as it is printed; none in a task of a single row."""
    sign = gain_sign(metric)
    groups: dict[str, dict[int, float]] = {}
    for line, (row, score) in enumerate(zip(rows, scores, strict=True)):
        if score.mean is not None:
            groups.setdefault(row.group.task, {})[line] = sign * score.mean
    found = []
    for means in groups.values():
        best = metric_text(sign * max(means.values()), metric)
        found += [line for line, mean in means.items() if len(means) > 1 and metric_text(sign * mean, metric) == best]
    return found
