"""A comparison as tables, as files for papers and programs, and as one page that needs no network."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from research_eval.analysis.comparison import p_text
from research_eval.analysis.samples import seed_and_sample_interval
from research_eval.analysis.statistics import SHARE, Interval, mean_interval, wilson_interval
from research_eval.analysis.tables import Table, bounds_of, interval_text, metric_text, short_number
from research_eval.comparing.certificate import certificate
from research_eval.comparing.protocol import Outcome
from research_eval.comparing.tuning import RATE, Arm
from research_eval.comparing.verdicts import Verdict
from research_eval.files import file_stem, write_atomically
from research_eval.store.data_facts import BASELINES, baseline_score
from research_eval.store.store import Store

ROUTED = 0.75  # of the total parameters are active at most, or a model does not count as routed
PERCENT = "95 %"


def summary(outcome: Outcome, solved_at: float) -> Table:
    """A row for each arm and for each simple baseline."""
    metric, plan = outcome.test_metric, outcome.plan
    further = further_metrics(outcome)
    columns = ["arm", metric, f"{PERCENT} interval", "seeds × samples", "solved", *further, "seeds", outcome.metric]
    columns += ["parameters", "active"]
    columns += ["MFLOPs", "latency ms", f"{plan.axis} / base", "trials", "rate", "remark"]
    rows = [_row(outcome, arm, solved_at) for arm in outcome.arms]
    for name, scores in outcome.baselines().items():
        value = baseline_score(scores, metric)
        if value is not None:
            rows.append([BASELINES[name], metric_text(value, metric), *[""] * (len(columns) - 2)])
    means = [(fmean(outcome.scores(arm)), place) for place, arm in enumerate(outcome.arms)]
    best = max(((outcome.sign * mean, place) for mean, place in means if math.isfinite(mean)), default=None)
    bold = frozenset() if best is None else frozenset({(best[1], 1)})
    title = f"{outcome.base.dataset_name}: {len(outcome.arms)} models matched by {plan.axis}"
    return Table(title, columns, rows, ("arm", "remark"), _notes(outcome, solved_at), bold)


def _row(outcome: Outcome, arm: Arm, solved_at: float) -> list[str]:
    metric, scores = outcome.test_metric, outcome.scores(arm)
    runs = [found.metrics for found in outcome.results[arm.name]]
    finite = [score for score in scores if math.isfinite(score)]
    is_complete = len(finite) == len(scores)
    mean = fmean(finite) if is_complete else None
    interval = mean_interval(finite, bounds=bounds_of(metric)) if is_complete else None

    def cost(name: str) -> float | None:
        values = [one[name] for one in runs if isinstance(one.get(name), int | float)]
        return fmean(values) if values else None

    flops = cost("inference_flops_per_sample")
    validation = cost(outcome.metric)
    return [
        arm.name,
        metric_text(mean, metric) if mean is not None else "",
        interval_text(interval, metric),
        interval_text(seed_and_sample_interval(outcome.results[arm.name], metric) if is_complete else None, metric),
        solved_text(finite, len(scores), solved_at, metric),
        *(_mean_text(runs, name) for name in further_metrics(outcome)),
        str(len(scores)),
        "" if validation is None else metric_text(validation, outcome.metric),
        short_number(cost("param_count")),
        short_number(cost("active_param_count")),
        short_number(None if flops is None else flops / 1e6),
        short_number(cost("inference_latency_ms_batch")),
        f"{outcome.matches[arm.name].ratio:.3f}",
        str(len(arm.trials)),
        f"{arm.best.changes[RATE]:g}",
        "; ".join(remarks(outcome, arm)),
    ]


def further_metrics(outcome: Outcome) -> list[str]:
    """The same score on the other test splits, such as those of longer samples."""
    score = outcome.test_metric.removeprefix("test_")
    names = {name: None for runs in outcome.results.values() for run in runs for name in run.metrics}
    return [name for name in names if re.fullmatch(rf"test_.+_{re.escape(score)}", name)]


def _mean_text(runs: Sequence[dict[str, Any]], name: str) -> str:
    values = [one[name] for one in runs if isinstance(one.get(name), int | float)]
    return metric_text(fmean(values), name) if len(values) == len(runs) else ""


def solved_text(scores: Sequence[float], trials: int, solved_at: float, metric: str) -> str:
    """How many runs solved the task, with Wilson's interval; empty for scores that are not shares."""
    if bounds_of(metric) != SHARE:
        return ""
    solved = sum(score >= solved_at for score in scores)
    low, high = wilson_interval(solved, trials)
    return f"{solved}/{trials} [{low:.2f}, {high:.2f}]"


def remarks(outcome: Outcome, arm: Arm) -> list[str]:
    """What a reader has to know before using the row."""
    found = []
    if not outcome.matches[arm.name].is_matched:
        found.append("NOT MATCHED")
    lost = sum(not math.isfinite(score) for score in outcome.scores(arm))
    if lost:
        found.append(f"{lost} of {len(outcome.scores(arm))} seeds did not finish")
    if arm.edge:
        found.append("rate at an end of the grid")
    if arm.best.is_learning:
        found.append("still learning at the end")
    costs = outcome.results[arm.name][0].metrics
    active, total = costs.get("active_param_count", 0), costs.get("param_count", 0)
    if ROUTED * total < active < total:
        found.append("more than three quarters of the parameters are active: hardly a routed model")
    return found


def _notes(outcome: Outcome, solved_at: float) -> list[str]:
    plan = outcome.plan
    trials, runs = outcome.arms[0].trials, sum(len(trial.experiment_ids) for trial in outcome.arms[0].trials)
    more = runs - len(trials) * plan.tuning_seeds
    confirmed = f", and its best ones {more} further runs" if more else ""
    notes = [
        f"Each arm had {len(trials)} trials of {plan.tuning_seeds} seed(s) on validation rows{confirmed}; the seeds of "
        "the table are others, and their runs scored the test split once.",
        f"{PERCENT} interval: over other seeds. seeds × samples: over other seeds and other test samples, by a "
        "bootstrap over both.",
        f"solved: seeds with at least {solved_at:g}, with Wilson's interval.",
        "Latency depends on the load of the machine; FLOPs are those of a forward pass over one sample.",
    ]
    if outcome.num_added:
        notes.append(f"The grid of rates grew by {outcome.num_added} for all arms, because a best rate was at its end.")
    if outcome.num_lengthened:
        notes.append("A best trial was still learning at the end: all arms were tuned with twice the training.")
    return notes


def pairs_table(outcome: Outcome, found: Sequence[Verdict], margin: float) -> Table:
    """A row for each two arms."""
    metric = outcome.test_metric
    columns = ["difference", metric, f"{PERCENT} interval", "effect size", "p", "p (Holm)", "p (equal)", "verdict"]
    rows = []
    for one in found:
        mean, effect = one.difference.mean, one.difference.effect_size
        rows.append(
            [
                f"{one.first} - {one.second}",
                "" if mean is None else f"{mean:+.4f}",
                interval_text(one.difference.interval, metric),
                "" if effect is None else f"{effect:+.2f}",
                *(p_text(one.difference.p_value), p_text(one.adjusted_p), p_text(one.equal_p), one.text),
            ]
        )
    notes = [
        "p: paired t-test over seeds, two-sided; Holm: adjusted for all pairs. A claim needs a value below 0.05.",
        "Tests and intervals allow for luck in the tuning: all seeds of an arm share the settings that it has chosen.",
        f"p (equal): of a difference of {margin:g} or more (two one-sided tests).",
        "The tests are about other seeds, and not about other test samples.",
    ]
    return Table("Paired differences", columns, rows, ("difference", "verdict"), notes)


# --------------------------------------------------------------------------------------------------------------- files


def write_files(
    folder: Path, outcome: Outcome, found: Sequence[Verdict], db: str | None, solved_at: float, margin: float
) -> list[Path]:
    """Write tables, configs, page and certificate into the folder. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = [summary(outcome, solved_at), pairs_table(outcome, found, margin)]
    with Store(db, read_only=True) as store:
        text = json.dumps(certificate(store, outcome, found, margin), indent=1, allow_nan=False)
        page = _page(outcome, tables, _curves(store, outcome))
    files = {
        "table.md": "\n\n".join(table.markdown() for table in tables) + "\n",
        "table.tex": "\n\n".join(table.latex() for table in tables) + "\n",
        "scores.csv": _csv(outcome),
        "report.html": page,
        "certificate.json": text + "\n",
    }
    for arm in outcome.arms:
        files[f"config_{file_stem(arm.name)}.json"] = json.dumps(arm.configured().to_dict(), indent=2) + "\n"
    for name, content in files.items():
        write_atomically(folder / name, content.encode())
    return [folder / name for name in files]


def _csv(outcome: Outcome) -> str:
    """A line for each arm and seed."""
    from research_eval.store.csv_file import csv_lines

    costs = ("param_count", "active_param_count", "inference_flops_per_sample", "inference_latency_ms_batch")
    names = [outcome.test_metric, outcome.metric, *costs, "training_duration_seconds"]
    rows = [
        [arm.name, seed, run.experiment_id, *(run.metrics.get(name) for name in names)]
        for arm in outcome.arms
        for seed, run in enumerate(outcome.results[arm.name])
    ]
    return "".join(csv_lines([["arm", "seed", "experiment_id", *names], *rows]))


def _curves(store: Store, outcome: Outcome) -> dict[str, list[tuple[float, float, Interval | None]]]:
    """Arm -> (epoch, mean over seeds, interval) of the validation score after each evaluation."""
    name = f"val_{outcome.metric.removeprefix('final_val_')}"
    found = {}
    for arm in outcome.arms:
        by_step: dict[int, list[tuple[float, float]]] = {}
        for run in outcome.results[arm.name]:
            for row in store.history(run.experiment_id, name) if run.status == "finished" else ():
                by_step.setdefault(row.step, []).append((row.epoch, row.value))
        found[arm.name] = [
            (
                pairs[0][0],
                fmean(value for _, value in pairs),
                mean_interval([value for _, value in pairs], bounds=bounds_of(name)),
            )
            for _, pairs in sorted(by_step.items())
        ]
    return found


def _page(outcome: Outcome, tables: Sequence[Table], curves: dict[str, Any]) -> str:
    """The text of the page."""
    from research_eval.system.drawing import encoded

    pictures = [
        Picture("Learning curves", _embedded(encoded(_drawn(outcome, curves), "svg", "curves"), "image/svg+xml"))
    ]
    for arm in outcome.arms:
        graph = outcome.results[arm.name][0].folder / "expert_graph.png"
        if graph.is_file():
            title = f"Paths of the validation samples: {arm.name}, seed 0"
            pictures.append(Picture(title, _embedded(graph.read_bytes(), "image/png")))
    trials = [_trials(outcome, arm) for arm in outcome.arms]
    return page(tables[0].title, [replace(tables[0], title="Test scores"), *tables[1:]], pictures, trials)


def _trials(outcome: Outcome, arm: Arm) -> Table:
    """The settings that an arm tried; the best one in bold."""
    rows = [
        [
            ", ".join(f"{key} {value}" for key, value in trial.changes.items()),
            "did not finish" if trial.score is None else metric_text(trial.score, outcome.metric),
        ]
        for trial in arm.trials
    ]
    best = arm.trials.index(arm.best)
    return Table(f"Tuning of {arm.name}", ["settings", outcome.metric], rows, ("settings",), (), frozenset({(best, 1)}))


class Picture(NamedTuple):
    """A picture of a page: its title, and its content as a data URL."""

    title: str
    source: str


def page(title: str, tables: Sequence[Table], pictures: Sequence[Picture] = (), more: Sequence[Table] = ()) -> str:
    """An HTML page with tables, pictures and more tables, which needs no network."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.j2").render(title=title, tables=tables, pictures=pictures, more=more)


def _embedded(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _drawn(outcome: Outcome, curves: dict[str, Any]) -> Any:
    """The learning curves: means over seeds with their intervals."""
    from research_eval.system.drawing import new_figure

    figure, axes = new_figure(8, 4)
    for name, points in curves.items():
        epochs, means = [point[0] for point in points], [point[1] for point in points]
        (line,) = axes.plot(epochs, means, marker="o", markersize=3, label=name)
        known = [(epoch, interval) for epoch, _, interval in points if interval is not None]
        axes.fill_between(
            [epoch for epoch, _ in known],
            [interval.low for _, interval in known],
            [interval.high for _, interval in known],
            alpha=0.15,
            color=line.get_color(),
            linewidth=0,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel(outcome.metric.removeprefix("final_"))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
