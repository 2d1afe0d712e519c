"""`goe runs`, `goe export`, `goe merge`, `goe replay` and `goe doctor`: their flags and what they print."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_eval.commands import DB_HELP, add_flag, names_of
from research_eval.errors import ConfigError
from research_eval.files import file_stem
from research_eval.metrics import DEFAULT_METRIC
from research_eval.wording import printable

if TYPE_CHECKING:
    from research_eval.db_utils import RunFilter, Store
    from research_eval.store_tools import Change, MetricDifference, Replay

log = logging.getLogger(__name__)

DEFAULT_LIMIT = 20
DEFAULT_METRICS = (DEFAULT_METRIC, "param_count", "training_duration_seconds")
FILTERS = {
    "dataset_name": "runs on this dataset",
    "model_type": "runs of this model",
    "status": "running, finished, failed, interrupted, pruned or diverged",
    "experiment_name": "runs of exactly this name",
    "run_type": "json or optuna_trial",
    "study": "trials of this study",
}
LISTING = (*FILTERS, "since", "where", "sort", "reverse", "limit", "metrics", "json")
RUN_HELP = "A run is named by its id, the beginning of one, or latest."
ACTIONS = {"show": 1, "diff": 2}  # and how many runs they are about
MAX_WIDTH = 100  # of a value on one line


# --- Flags ------------------------------------------------------------------------------------------------------------


def add_runs_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do (list where nothing is said), and the flags of the list."""
    parser.add_argument("words", nargs="*", metavar="show ID | diff ID ID", help=f"nothing: the list. {RUN_HELP}")
    _add_filters(parser)
    add_flag(
        parser, "sort", metavar="COLUMN_OR_METRIC", help="metrics best first, columns upwards; default: newest first"
    )
    add_flag(parser, "reverse", action="store_true", help="the other way round")
    add_flag(parser, "limit", type=_natural, metavar="N", help=f"so many runs (default {DEFAULT_LIMIT}; 0: all)")
    add_flag(parser, "metrics", metavar="A,B", help=f"columns after the seed (default {','.join(DEFAULT_METRICS)})")
    add_flag(parser, "json", action="store_true", help="a JSON object per run and line")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a name that ends in .csv or .parquet")
    _add_filters(parser)
    add_flag(parser, "history", action="store_true", help="the time series, a row per point, instead of the runs")
    add_flag(parser, "force", action="store_true", help="replace the file if it exists")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("other", metavar="OTHER_DB", help="the database whose runs are copied; it is only read")
    add_flag(parser, "db", metavar="URL_OR_PATH", help="where they go (default: $GOE_DB, else experiment_results.db)")


def add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="ID", help=f"a finished run. {RUN_HELP}")
    add_flag(parser, "tolerance", type=_tolerance, metavar="T", help="exit with 1 if a metric differs by more than T")
    add_flag(parser, "device", help="auto, cpu, cuda, cuda:N or mps instead of the run's own")
    add_flag(parser, "quiet", action="store_true", help="no progress, only the comparison")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    add_flag(parser, "repair", action="store_true", help="repair what is safe, after a backup of the database")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which runs")
    for name, text in FILTERS.items():
        add_flag(group, name, help=text)
    add_flag(group, "since", metavar="DATE", help="started then or later (UTC), such as 2026-05-31")
    add_flag(group, "where", action="append", metavar="CONDITION", help="such as 'final_val_f1>=0.9'; may be repeated")


def _natural(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 for all, got {text!r}")
    return int(text)


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text!r}")
    return value


def filter_of(arguments: argparse.Namespace) -> RunFilter:
    """The runs that the flags of `_add_filters` describe. Raises ConfigError."""
    from research_eval.db_utils import RunFilter
    from research_eval.store_tools import parse_condition, parse_since

    return RunFilter(
        **{name: getattr(arguments, name) for name in FILTERS},
        since=None if arguments.since is None else parse_since(arguments.since),
        where=tuple(map(parse_condition, arguments.where or ())),
    )


# --- Commands ---------------------------------------------------------------------------------------------------------


def runs_command(arguments: argparse.Namespace) -> int:
    """List runs, show one, or compare two."""
    from research_eval.db_utils import Store

    given = [name for name in LISTING if getattr(arguments, name) is not None and getattr(arguments, name) is not False]
    action, *runs = arguments.words or [""]
    if action and (action not in ACTIONS or len(runs) != ACTIONS[action]):
        raise ConfigError(f"goe runs: expected nothing, `show ID` or `diff ID ID`, got {' '.join(arguments.words)!r}")
    if action and given:
        raise ConfigError(f"--{given[0]}: chooses runs for the list, not for `{action}`: leave it out")
    with Store(arguments.db, read_only=True) as store:
        if action == "show":
            _print(describe(store, *runs))
        elif action == "diff":
            _print(compare(store, *runs))
        else:
            _list(store, arguments)
    return 0


def export_command(arguments: argparse.Namespace) -> int:
    """Write the runs to a file."""
    from research_eval.db_utils import Store
    from research_eval.store_tools import export

    wanted = filter_of(arguments)
    with Store(arguments.db, read_only=True) as store:
        path = Path(arguments.file)
        num_rows = export(store, path, wanted, history=arguments.history, force=arguments.force)
    print(f"{_counted(num_rows, 'point' if arguments.history else 'run')} in {path}")
    return 0


def merge_command(arguments: argparse.Namespace) -> int:
    """Copy the runs of another store; exit code 1 if some conflict with ours."""
    from research_eval.store_tools import merge

    report = merge(arguments.other, arguments.db)
    print(
        f"{_counted(report.copied, 'run')} copied, {report.updated:,} brought up to date, "
        f"{report.skipped:,} skipped (here already), {len(report.conflicts):,} in conflict"
    )
    for experiment_id in report.conflicts:
        print(f"  conflict: {printable(experiment_id)} is another run here; both were left as they are")
    if report.copied or report.updated:
        print("The files in runs/ (weights, pictures, traces) are not in the database: copy those folders yourself.")
    return 1 if report.conflicts else 0


def replay_command(arguments: argparse.Namespace) -> int:
    """Run a run again and compare; exit code 1 beyond the tolerance or where it did not finish."""
    from research_eval.store_tools import replay

    done = replay(arguments.run, db=arguments.db, device=arguments.device, quiet=arguments.quiet)
    _print(replay_report(done))
    if done.result.status != "finished":
        return done.result.exit_code or 1
    return int(arguments.tolerance is not None and done.exceeds(arguments.tolerance))


def doctor_command(arguments: argparse.Namespace) -> int:
    """A line per check; exit code 1 where a problem is left."""
    from research_eval.doctor import PROBLEM, examine

    exit_code = 0
    for finding in examine(arguments.db, arguments.repair):
        _print(printable(str(finding)) + "\n")
        exit_code |= finding.level == PROBLEM
    return int(exit_code)


# --- The list ---------------------------------------------------------------------------------------------------------


def _list(store: Store, arguments: argparse.Namespace) -> None:
    from research_eval.store_tools import COLUMNS, SHORT_NAMES, check_metric, find_runs

    wanted, sort = filter_of(arguments), arguments.sort
    limit = DEFAULT_LIMIT if arguments.limit is None else arguments.limit
    metrics = names_of([arguments.metrics]) if arguments.metrics is not None else list(DEFAULT_METRICS)
    for name in metrics if arguments.metrics is not None else ():
        check_metric(store, name, "--metrics")
    shown = dict.fromkeys(metrics)
    if sort is not None and SHORT_NAMES.get(sort, sort) not in COLUMNS:
        shown[SHORT_NAMES.get(sort, sort)] = None
    rows = find_runs(
        store,
        wanted,
        sort=sort,
        reverse=arguments.reverse,
        limit=limit or None,
        metrics=list(shown),
    )
    if arguments.json:
        from research_eval.db_utils import strict_json

        _print("".join(strict_json({**row, **_times(row)}) + "\n" for row in rows))
    elif rows:
        _print_table(*runs_table(rows, list(shown)))
    if len(rows) == limit and (total := store.count_runs(wanted)) > limit:
        log.info("%d of %s runs; --limit 0 lists all", limit, f"{total:,}")
    if not rows:
        log.info("no runs in %s" + (" fit" if store.count_runs() else ""), store.location)


def _times(row: dict[str, Any]) -> dict[str, Any]:
    from research_eval.store_tools import TIMES

    return {name: row[name] and row[name].isoformat() for name in TIMES}


def runs_table(rows: list[dict[str, Any]], metrics: list[str]) -> tuple[list[str], list[list[str]], set[int]]:
    """Header, cells, and which columns are numbers."""
    from research_eval.store_tools import SHORT_NAMES

    titles = {name: short for short, name in SHORT_NAMES.items()}
    names = ["experiment_id", "status", "run_type", "experiment_name", "model_type", "dataset_name", "seed"]
    columns = [[row[name] for row in rows] for name in names]
    texts = [["-" if value is None else str(value) for value in column] for column in columns]
    texts += [_metric_column([row["metrics"].get(name) for row in rows]) for name in metrics]
    texts.append([f"{row['timestamp']:%Y-%m-%d %H:%M:%S}" if row["timestamp"] else "-" for row in rows])
    header = [titles.get(name, name) for name in [*names, *metrics, "timestamp"]]
    numbers = set(range(len(names) - 1, len(header) - 1))
    return header, [list(row) for row in zip(*texts, strict=True)], numbers


def _metric_column(values: list[Any]) -> list[str]:
    """Counts as whole numbers, anything else with as many decimals as its size deserves, equal in a column."""
    sizes = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value)]
    largest = max(sizes, default=0)
    if largest > 1 and all(size.is_integer() for size in sizes):
        form = ",.0f"
    elif any(0 < size < 1e-3 for size in sizes):
        form = ".4g"
    else:
        form = ".4f" if largest < 10 else ",.1f"
    return [
        "-" if value is None else format(value, form) if isinstance(value, float) else short(value, 30)
        for value in values
    ]


# --- One run and two --------------------------------------------------------------------------------------------------


def describe(store: Store, name: str) -> str:
    """Everything about a run, for a person."""
    from research_eval.store_tools import find_run, flatten, json_object

    row = find_run(store, name)
    experiment_id = row["experiment_id"]
    facts = {
        "status": row["status"],
        "error": row["error"],
        "name": row["experiment_name"],
        "type": row["run_type"],
        "model": row["model_type"],
        "dataset": f"{row['dataset_name']} ({row['dataset_type']})",
        "seed": row["seed"],
        "started": row["timestamp"] and f"{row['timestamp']:%Y-%m-%d %H:%M:%S} UTC",
        "last written": row["heartbeat"] and f"{row['heartbeat']:%Y-%m-%d %H:%M:%S} UTC",
        "parent": row["parent_id"],
        "children": ", ".join(store.children(experiment_id)) or None,
        "folder": f"runs/{file_stem(experiment_id)}",
    }
    metrics = store.metrics(experiment_id)
    numbers = {name: number(value) for name, value in metrics.items() if isinstance(value, float)}
    others = {name: short(value) for name, value in metrics.items() if not isinstance(value, float)}
    environment = {name: short(value) for name, value in flatten(json_object(row["env_details_json"])).items()}
    config = [printable(line) for line in json.dumps(json_object(row["full_config_json"]), indent=2).splitlines()]
    sections = {
        f"run {printable(experiment_id)}": _pairs({name: value for name, value in facts.items() if value is not None}),
        "config": [f"  {line}" for line in config],
        "environment": _pairs(environment),
        "metrics": _pairs(numbers),
        "lists": _pairs(others),
    }
    return "\n".join(line for title, lines in sections.items() if lines for line in [title, *lines]) + "\n"


def compare(store: Store, left: str, right: str) -> str:
    """What differs between two runs: config, metrics, environment."""
    from research_eval.store_tools import changes, environment_changes, find_run, json_object, metric_differences

    rows = [find_run(store, name) for name in (left, right)]
    ids = [row["experiment_id"] for row in rows]
    header = [f"{letter} {row['experiment_id']} ({row['status']})" for letter, row in zip("AB", rows, strict=True)]
    configs = [json_object(row["full_config_json"]) for row in rows]
    environments = [json_object(row["env_details_json"]) for row in rows]
    sections = {
        "config": _changes(changes(*configs), "A", "B"),
        "metrics": _differences(metric_differences(*(store.metrics(key) for key in ids)), "A", "B"),
        "environment": _changes(environment_changes(*environments), "A", "B"),
    }
    lines = [printable(line) for line in header]
    for title, found in sections.items():
        lines += [title, *found] if found else [f"{title}: no difference"]
    return "\n".join(lines) + "\n"


def replay_report(done: Replay) -> str:
    """What a replay found; the data first, because other data explain everything else."""
    from research_eval.store_tools import data_changed

    lines = [f"replay {done.result.experiment_id} of {printable(done.original)}: {done.result.status}"]
    if done.result.error:
        lines.append(f"  {printable(done.result.error)}")
    if data_changed(done.environment):
        lines.append("The data are not those of the original: that alone explains other metrics.")
    if done.result.status == "finished":
        compared = f"{done.num_compared} metrics compared, {done.num_measured} measured by a clock left out"
        if done.largest is not None:
            lines.append(
                f"largest difference: {done.largest.difference:.3g} in {printable(done.largest.name)} ({compared})"
            )
        elif not done.differences:
            lines.append(f"identical: {compared}")
        lines += _differences(done.differences, "original", "replay")
    found = _changes(done.environment, "original", "replay")
    lines += ["environment", *found] if found else ["environment: no difference"]
    return "\n".join(lines) + "\n"


def _changes(found: Sequence[Change], left: str, right: str) -> list[str]:
    return _columns(["  ", left, right], [[f"  {name}", short(one), short(other)] for name, one, other in found])


def _differences(found: Sequence[MetricDifference], left: str, right: str) -> list[str]:
    """A line per metric, but one for all that only one side has."""
    from research_eval.store_tools import MISSING

    rows = [
        [f"  {name}", exact(one), exact(other), f"{gap:.3g}" if gap < math.inf else "-"]
        for name, one, other, gap in found
        if MISSING not in (one, other)
    ]
    only_left = [pair.name for pair in found if pair.right == MISSING]
    only_right = [pair.name for pair in found if pair.left == MISSING]
    return _columns(["  ", left, right, "difference"], rows) + [
        f"  only {side}: {', '.join(map(printable, names))}"
        for side, names in ((left, only_left), (right, only_right))
        if names
    ]


# --- Text -------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """For reading.

    >>> number(1234567.0), number(0.98765432), number(1e-7)
    ('1,234,567', '0.987654', '1e-07')
    """
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"


def exact(value: Any) -> str:
    """For comparing: every digit of a number, of anything else the beginning."""
    return repr(value) if isinstance(value, float) else short(value, MAX_WIDTH // 3)


def short(value: Any, width: int = MAX_WIDTH) -> str:
    """A value on one line, cut where it is long; before a long list the number of its entries.

    >>> short("a"), short([1, 2]), short(list(range(50)), 30)
    ('a', '[1, 2]', '50 entries: [0, 1, 2, 3, 4,...')
    """
    from research_eval.db_utils import strict_json

    text = value if isinstance(value, str) else strict_json(value)
    if isinstance(value, list) and len(text) > width:
        text = f"{len(value)} entries: {text}"
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _pairs(values: dict[str, Any]) -> list[str]:
    names = [printable(name) for name in values]
    width = max(map(len, names), default=0)
    return [f"  {name:<{width}}  {printable(str(value))}" for name, value in zip(names, values.values(), strict=True)]


def _columns(header: list[str], rows: list[list[str]], right: frozenset[int] | set[int] = frozenset()) -> list[str]:
    """Aligned lines, nothing wrapped; none without rows."""
    if not rows:
        return []
    from rich.cells import cell_len

    table = [header, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]

    def padded(cell: str, index: int) -> str:
        blanks = " " * (widths[index] - cell_len(cell))
        return blanks + cell if index in right else cell + blanks

    return ["  ".join(padded(cell, index) for index, cell in enumerate(row)).rstrip() for row in table]


def _print_table(header: list[str], rows: list[list[str]], numbers: set[int]) -> None:
    """Colours and columns that fit on a terminal, plain aligned text elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        _print("\n".join(_columns(header, rows, numbers)) + "\n")
        return
    styles = {"finished": "green", "failed": "red", "diverged": "red", "running": "cyan", "interrupted": "yellow"}
    hidden = _hidden(header, rows, console.width)
    if hidden:
        log.info("left out for want of width: %s; --json has everything", ", ".join(header[index] for index in hidden))
    shown = [index for index in range(len(header)) if index not in hidden]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index in shown:
        table.add_column(
            Text(header[index]),
            justify="right" if index in numbers else "left",
            no_wrap=True,
            min_width=max(len(row[index]) for row in rows) if index == 0 else None,
        )
    for row in rows:
        cells = [Text(printable(cell)) for cell in row]
        cells[1].stylize(styles.get(row[1], ""))
        table.add_row(*(cells[index] for index in shown))
    console.print(table)


def _hidden(header: list[str], rows: list[list[str]], width: int) -> list[int]:
    """The columns to leave out, the least telling first, until a line fits; ids are never cut."""
    from rich.cells import cell_len

    widths = {
        index: max(cell_len(printable(row[index])) for row in [header, *rows]) + 2 for index in range(len(header))
    }
    hidden: list[int] = []
    for name in ("type", "started", "seed", "seconds", "param_count", "name"):
        if sum(widths.values()) - 2 > width and name in header:
            hidden.append(header.index(name))
            del widths[hidden[-1]]
    return hidden


def _print(text: str) -> None:
    """To stdout; a reader that has seen enough, such as `head`, is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end


# What `goe` offers of this file: the flags, the command, and the line that explains it.
COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "runs": (add_runs_arguments, runs_command),
    "export": (add_export_arguments, export_command),
    "merge": (add_merge_arguments, merge_command),
    "replay": (add_replay_arguments, replay_command),
    "doctor": (add_doctor_arguments, doctor_command),
}
DESCRIPTIONS = {
    "runs": "list, filter and sort runs; show one; compare two",
    "export": "runs or their time series as a CSV or Parquet file",
    "merge": "copy the runs of another database into this one",
    "replay": "run a run again and tell what differs",
    "doctor": "check database, runs, checkpoints and environment; repair what is safe",
}
