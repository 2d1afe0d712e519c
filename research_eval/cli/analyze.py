"""`goe analyze` and the script `analyze_results.py`: tables, plots and a report of the results on one dataset.

    goe analyze --dataset_name parity --run_all
    goe analyze --dataset_name parity --compare goe,dense

All mistakes of the user are found before the first file is written. `analysis` computes and draws; this module chooses
what is made, names the files and prints the tables.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_eval.cli.common import DB_HELP, DEFAULT_HELP, add_flag, guarded, names_of, parse_or_suggest
from research_eval.cli.filters import add_filters, filter_of, in_words
from research_eval.errors import ConfigError
from research_eval.files import file_stem, write_atomically
from research_eval.store.metrics import DEFAULT_METRIC, check_selectable, direction
from research_eval.system.best_effort import print_product
from research_eval.wording import did_you_mean

if TYPE_CHECKING:
    from research_eval.analysis.comparison import Comparison, Pair
    from research_eval.analysis.data import TaskData
    from research_eval.analysis.points import Curve, Score
    from research_eval.analysis.runs import Group, Results
    from research_eval.analysis.summary import Options, Row
    from research_eval.analysis.tables import Table
    from research_eval.store.store import Store

    Curves = Mapping[str, Mapping[str, Sequence[Curve]]]  # task -> series -> one for each of the best configs

log = logging.getLogger(__name__)

DESCRIPTION = "tables, plots and reports"
KNOWN_NAMES = 20  # in a message about an unknown one
PLOTS = {  # flag -> metric on the horizontal axis, end of the file's name
    "run_f1_vs_params_plot": ("param_count", "vs_params"),
    "run_f1_vs_latency_plot": ("inference_latency_ms_batch", "vs_latency"),
    "run_f1_vs_flops_plot": ("inference_flops_per_sample", "vs_flops"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags. Most of them choose what is made."""

    def flag(name: str, **options: Any) -> None:
        add_flag(parser, name, **options)

    flag("dataset_name", metavar="NAME", help="the dataset to analyze (not needed for --list_metrics)")
    flag("model_types", metavar="A,B", nargs="+", help="these model types only, with commas or blanks between them")
    flag("output_dir", metavar="DIR", default="analysis_reports/", help="where files go (default: %(default)s)")
    flag(
        "metric_to_optimize",
        metavar="METRIC",
        help=f"chooses the best config of each model type ({DEFAULT_HELP}); no test score",
    )
    flag("run_summary_table", action="store_true", help="best config of each model type; also without any --run flag")
    flag(
        "run_f1_vs_params_plot",
        action="store_true",
        help="F1 (if there is none: the chosen metric) against the parameters",
    )
    flag("run_f1_vs_latency_plot", action="store_true", help="the same against the inference latency")
    flag("run_f1_vs_flops_plot", action="store_true", help="the same against the inference FLOPs")
    flag("run_learning_curves", action="store_true", help="this score and the loss on validation over the epochs")
    flag(
        "compare",
        metavar="A,B",
        action="append",
        default=[],
        help="paired comparison of two model types over common seeds; may be given again",
    )
    flag("run_comparison", action="store_true", help="paired comparison of every two model types")
    flag("run_report", action="store_true", help="one HTML page with everything, which needs no network")
    flag("run_all", action="store_true", help="all of these")
    flag("list_metrics", action="store_true", help="print the stored metrics with their ranges")
    flag("solved_at", metavar="SCORE", type=float, default=0.99, help="a run with this score has solved its task")
    flag("confidence", metavar="LEVEL", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    flag(
        "latex_columns",
        metavar="A,B",
        nargs="+",
        help="more columns in the LaTeX table, such as inference_latency_ms_batch or experiment_ids",
    )
    add_filters(parser)
    flag("db", metavar="URL_OR_PATH", help=DB_HELP)
    flag("quiet", action="store_true", help="print tables and warnings only")


def analyze_command(arguments: argparse.Namespace) -> int:
    """Make what the flags ask for. Raises ConfigError for mistakes of the user, before anything is written."""
    from research_eval.store.store import Store  # after parsing, so that --help stays quick

    pairs = _check(arguments)
    with Store(arguments.db, read_only=True) as store:
        if arguments.dataset_name is not None:
            _check_known("--dataset_name", [arguments.dataset_name], store.dataset_names(), store.location)
        if arguments.list_metrics:
            text = _metrics_table(store, arguments.dataset_name).text()
            if not _wanted(arguments):
                print_product(f"{text}\n")
                return 0
            print(text)  # the files are worth writing even if nobody reads this
        _analyze(arguments, store, pairs)
    return 0


def _wanted(arguments: argparse.Namespace) -> bool:
    """Whether a flag asks for more than the list of metrics."""
    return bool(arguments.compare) or any(value for name, value in vars(arguments).items() if name.startswith("run_"))


def _check(arguments: argparse.Namespace) -> list[Pair]:
    """Check the flags that need no database; return the pairs of --compare. Raises ConfigError."""
    from research_eval.analysis.comparison import parse_pair
    from research_eval.analysis.paper import EXTRA_COLUMNS

    if arguments.dataset_name is None and (_wanted(arguments) or not arguments.list_metrics):
        raise ConfigError("--dataset_name: missing. Give the dataset to analyze, or --list_metrics alone.")
    if arguments.metric_to_optimize is not None:
        check_selectable(arguments.metric_to_optimize, "--metric_to_optimize")
    if not 0 < arguments.confidence < 1:
        raise ConfigError(f"--confidence: expected a number between 0 and 1, got {arguments.confidence:g}")
    if not 0 < arguments.solved_at <= 1:
        raise ConfigError(f"--solved_at: expected a score above 0 and up to 1, got {arguments.solved_at:g}")
    for name in names_of(arguments.latex_columns):
        if name not in EXTRA_COLUMNS:
            hint = did_you_mean(name, EXTRA_COLUMNS) or f" There is {', '.join(EXTRA_COLUMNS)}."
            raise ConfigError(f"--latex_columns: no column {name!r}.{hint}")
    if arguments.model_types is not None and not names_of(arguments.model_types):
        raise ConfigError("--model_types: no name given")
    output_dir = Path(arguments.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"--output_dir: {output_dir} is a file. Give a folder.")
    return [parse_pair(text) for text in arguments.compare]


def _check_known(option: str, names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise ConfigError for the first name that is not among the known ones; `where` says where they are known."""
    from research_eval.analysis.tables import one_line

    for name in names:
        if name not in known:
            listed = one_line(", ".join(known[:KNOWN_NAMES])) or "nothing yet"
            hint = did_you_mean(name, known) or f" There is {listed}."
            raise ConfigError(f"{option}: no results for {name!r} in {where}.{hint}")


def _analyze(arguments: argparse.Namespace, store: Store, pairs: Sequence[Pair]) -> None:
    """Read the runs, choose the best configs, and write everything. Raises ConfigError."""
    from research_eval.analysis.points import Score
    from research_eval.analysis.runs import load_results, with_all_metrics
    from research_eval.analysis.summary import Options
    from research_eval.store.find import default_metric_of

    default = default_metric_of(store, arguments.dataset_name)
    metric = default if arguments.metric_to_optimize is None else arguments.metric_to_optimize
    options = Options(metric, arguments.confidence, arguments.solved_at, default)
    # Reading all metrics of all runs would be slow: read what ranks configs and what the plots show.
    plotting = arguments.run_all or arguments.run_report or any(getattr(arguments, flag) for flag in PLOTS)
    metrics = [options.metric]
    if plotting or arguments.run_learning_curves:
        metrics.append(DEFAULT_METRIC)
    if plotting:
        metrics += [cost for cost, _ in PLOTS.values()]
    wanted, selection = filter_of(arguments, store), in_words(arguments)
    results = load_results(store, arguments.dataset_name, list(dict.fromkeys(metrics)), wanted)
    results = replace(results, selection=selection)
    if not results.spent and not results.left_out:
        raise ConfigError(f"no run on {results.dataset_name!r} in {store.location} fits {selection}")
    chosen, where = names_of(arguments.model_types), f"the runs on {arguments.dataset_name!r}"
    known = sorted({*results.model_types, *(run.model_type for run in results.left_out)})
    _check_known("--model_types", chosen, known, where)
    results = results.only(chosen or known)
    _check_known("--compare", (name for pair in pairs for name in pair), chosen or known, where)
    # The tables show more metrics, but only of the few best configs.
    best = [with_all_metrics(store, group) for group in results.best(options.metric)]
    if not best:
        _explain_no_score(store, results, options.metric)
    _warn(results, best, options.metric)
    score = Score.of(results, options.metric).with_baselines(store, results)
    Writer(arguments, store, results, best, options, score).write(pairs)


def _explain_no_score(store: Store, results: Results, metric: str) -> None:
    """Raise ConfigError for a metric that no run has: say what there is instead."""
    if not results.groups:
        statuses: Counter[str] = sum(results.spent.values(), Counter(run.status for run in results.left_out))
        counts = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        raise ConfigError(f"no finished run on {results.dataset_name!r} to analyze ({counts})")
    summaries = store.metric_summaries(results.dataset_name)
    known = [one.name for one in summaries if one.low is not None and not one.name.startswith("test_")]
    if metric in known:
        raise ConfigError(f"--metric_to_optimize: no finished run of these model types has a finite {metric!r}")
    _check_known("--metric_to_optimize", [metric], known, f"the runs on {results.dataset_name!r}")
    raise AssertionError("a known metric has values")


def _warn(results: Results, best: Sequence[Group], metric: str) -> None:
    """Log what the tables do not show: several tasks, and model types without a result."""
    from research_eval.analysis.runs import without_data
    from research_eval.analysis.tables import one_line

    num_params = len({without_data(task) for task in results.tasks})
    if num_params > 1:  # that the data have changed is said where the runs are read
        log.warning(
            "%s was run with %d different dataset_params, which are different tasks: they are kept apart, "
            "and scores of different tasks are not comparable",
            one_line(results.dataset_name),
            num_params,
        )
    found = {(group.task, group.model_type) for group in best}
    for (task, model_type), count in results.spent.items():
        if (task, model_type) not in found:
            name = model_type + f" ({results.tasks[task]})" * (len(results.tasks) > 1)
            log.warning("%s: none of its %d runs finished with a %s", one_line(name), count.total(), metric)


@contextmanager
def _collected(problems: list[OSError]) -> Iterator[None]:
    """Note a file that cannot be written, so that it does not cost the files after it."""
    try:
        yield
    except OSError as problem:
        problems.append(problem)


@dataclass(frozen=True)
class Writer:
    """Writes the files that the flags ask for. `best` has the best config of each model type, with all metrics.

    `score` is what the pictures show.
    """

    arguments: argparse.Namespace
    store: Store
    results: Results
    best: list[Group]
    options: Options
    score: Score

    def write(self, pairs: Sequence[Pair]) -> None:
        """Write everything, in the order of the flags. `pairs` are those of --compare.

        Raises OSError if a file cannot be written, after the others are written.
        """
        from research_eval.analysis.comparison import all_pairs, compare
        from research_eval.analysis.data import data_of_tasks
        from research_eval.analysis.summary import summary_rows

        wants, everything = vars(self.arguments), self.arguments.run_all
        _make_folder(Path(self.arguments.output_dir))
        data = data_of_tasks(self.store, self.best)
        rows = summary_rows(self.results, self.best, self.options, data)
        problems: list[OSError] = []
        if wants["run_summary_table"] or everything or not _wanted(self.arguments):
            with _collected(problems):
                self._write_summary(rows)
        for flag, (cost, name) in PLOTS.items():
            if wants[flag] or everything:
                with _collected(problems):
                    self._draw(cost, name)
        curves = self._curves() if wants["run_learning_curves"] or wants["run_report"] or everything else {}
        if wants["run_learning_curves"] or everything:
            with _collected(problems):
                self._draw_curves(curves)
        asked = list(pairs)
        if wants["run_comparison"] or everything or (wants["run_report"] and not asked):
            asked += [pair for pair in all_pairs(self.results.model_types) if not {pair, pair[::-1]} & set(pairs)]
        comparisons = compare(self.results, self.best, asked, self.options) if asked else []
        if pairs or wants["run_comparison"] or everything:
            with _collected(problems):
                self._write_comparisons(comparisons)
        if wants["run_report"] or everything:
            with _collected(problems):
                self._write_report(rows, comparisons, curves, data)
        for problem in problems[1:]:
            log.warning("%s: %s", problem.filename, problem.strerror)
        if problems:
            raise problems[0]

    def _path(self, name: str) -> Path:
        """The path of a file, whose name begins with the dataset."""
        return Path(self.arguments.output_dir) / f"{file_stem(self.results.dataset_name)}_{name}"

    def _save(self, name: str, text: str) -> None:
        """Write a text file and log its path."""
        write_atomically(self._path(name), text.encode())
        log.info("wrote %s", self._path(name))

    def _save_table(
        self, name: str, table: Table, paper: Table, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Print the table, and save it as CSV (with all numbers in full) and Markdown, and that of a paper as LaTeX."""
        from research_eval.store.csv_file import csv_text

        print(f"{table.text()}\n")
        self._save(f"{name}.csv", csv_text(columns, rows))
        self._save(f"{name}.md", table.markdown())
        self._save(f"{name}.tex", paper.latex())

    def _write_summary(self, rows: Sequence[Row]) -> None:
        """The best config of each model type, as a table and as files."""
        from research_eval.analysis.paper import summary_paper
        from research_eval.analysis.summary import summary_csv, summary_table

        name = f"summary_table_best_{file_stem(self.options.metric.replace('_', ''))}"
        table = summary_table(self.results, rows, self.options)
        paper = summary_paper(self.results, rows, self.options, names_of(self.arguments.latex_columns))
        self._save_table(name, table, paper, *summary_csv(self.results, rows, self.options))

    def _write_comparisons(self, found: Sequence[Comparison]) -> None:
        """The paired comparisons, as a table and as files."""
        from research_eval.analysis.comparison import comparison_csv, comparison_table
        from research_eval.analysis.paper import comparison_paper

        if not found:
            log.warning("comparison: no task has results of two model types, so there is none")
            return
        table = comparison_table(self.results, found, self.options)
        paper = comparison_paper(self.results, found, self.options)
        self._save_table("comparison", table, paper, *comparison_csv(found, self.options))

    def _draw(self, cost: str, name: str) -> None:
        """Draw the score against a cost; `name` is the end of the file's name."""
        from research_eval.analysis.result_plots import draw_cost_plot

        path = self._path(f"{file_stem(self.score.name.lower())}_{name}.png")
        drawn = draw_cost_plot(self.results, cost, self.score, self.options.confidence, path)
        self._report_drawn(drawn, path, cost)

    def _draw_curves(self, curves: Curves) -> None:
        """Draw the learning curves of the best configs."""
        from research_eval.analysis.result_plots import draw_learning_curves

        path = self._path("learning_curves.png")
        drawn = draw_learning_curves(self.results, curves, self.score, self.options.confidence, path)
        self._report_drawn(drawn, path, "series in the history")

    def _report_drawn(self, drawn: bool, path: Path, what: str) -> None:
        """Log the files of a picture, or that there was nothing to draw."""
        if drawn:
            log.info("wrote %s\nwrote %s", path, path.with_suffix(".svg"))
        else:
            log.warning("%s: not drawn, no run has a %s to show", path.name, what)

    def _curves(self) -> Curves:
        """The learning curves of the best configs: task -> series -> curves."""
        from research_eval.analysis.points import curve_of, panels

        found: dict[str, dict[str, list[Curve]]] = {}
        for task in panels(self.results):
            groups = [group for group in self.best if group.task == task]
            for series in self.score.curves:
                curves = (curve_of(self.store, group, series, self.options.confidence) for group in groups)
                found.setdefault(task, {})[series] = [curve for curve in curves if curve is not None]
        return found

    def _write_report(
        self, rows: Sequence[Row], comparisons: Sequence[Comparison], curves: Curves, data: Mapping[str, TaskData]
    ) -> None:
        """Write the HTML page."""
        from research_eval.analysis.report import report_html

        page = report_html(self.store, self.results, rows, comparisons, curves, self.score, self.options, data)
        self._save("report.html", page)


def _make_folder(path: Path) -> None:
    """Create the output folder. Raises ConfigError if that is not possible, or if nothing may be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir: {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir: {path} may not be written to. Give another folder.")


def _metrics_table(store: Store, dataset_name: str | None) -> Table:
    """The stored metrics with their ranges, and whether --metric_to_optimize accepts each."""
    from research_eval.analysis.tables import Table, short_number

    rows = []
    for one in store.metric_summaries(dataset_name):
        numeric = one.low is not None
        use = "no: not a number" if not numeric else "no: test score" if one.name.startswith("test_") else "yes"
        way = direction(one.name) if numeric else ""
        rows.append([one.name, str(one.num_runs), way, short_number(one.low), short_number(one.high), use])
    where = f"the runs on {dataset_name}" if dataset_name is not None else "all runs"
    columns = ["metric", "runs", "direction", "lowest", "highest", "may choose"]
    return Table(f"Metrics of {where}", columns, rows, ("metric", "direction", "may choose"))


def main(argv: list[str] | None, description: str | None) -> int:
    """The script `analyze_results.py`."""
    parser = argparse.ArgumentParser(prog="analyze_results.py", description=description, allow_abbrev=False)
    add_arguments(parser)
    arguments = parse_or_suggest(parser, argv)
    return guarded(analyze_command, arguments, arguments.quiet)
