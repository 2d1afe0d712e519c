"""`goe runs`: list, filter and sort runs, show one of them, compare two, or curate them.

goe runs --model_type goe --where 'final_val_f1>=0.9' --sort final_val_f1
goe runs show latest
goe runs diff 20260531 20260601
goe runs archive --name 'pilot*'
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import shutil
from typing import TYPE_CHECKING, Any

from research_eval.cli.common import DB_HELP, DEFAULT_HELP, add_flag, names_of
from research_eval.cli.curate import VERBS, add_curation_flags, curate
from research_eval.cli.filters import LIST_FILTERS, RUN_HELP, add_filters, filter_of
from research_eval.cli.text import changes_lines, differences_lines, number, pairs, print_table, short
from research_eval.errors import ConfigError
from research_eval.files import file_stem
from research_eval.store.metrics import latency_parts, with_remark
from research_eval.store.values import tags_of
from research_eval.system.best_effort import print_product
from research_eval.wording import did_you_mean, printable

if TYPE_CHECKING:
    from research_eval.store.store import Store

log = logging.getLogger(__name__)

DESCRIPTION = "list, filter and sort runs; show one; compare two; tag, archive, delete and restore them"
DEFAULT_LIMIT = 20
DEFAULT_COSTS = ("param_count", "training_duration_seconds")  # columns after the score, which depends on the runs
ORDER = ("sort", "reverse", "limit", "metrics", "json")  # flags of the list only
ACTIONS = {"show": 1, "diff": 2}  # word -> number of runs that follow it
CELL_WIDTH = 30  # characters of a metric that is no number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The first word with its runs, and the flags of the list."""
    words = "show ID | diff ID ID | " + " | ".join(VERBS.values())
    parser.add_argument("words", nargs="*", metavar="WORDS", help=f"nothing: the list. {words}. {RUN_HELP}")
    add_filters(parser, exact=True)
    add_curation_flags(parser)
    add_flag(
        parser, "sort", metavar="COLUMN_OR_METRIC", help="metrics best first, columns upwards; default: newest first"
    )
    add_flag(parser, "reverse", action="store_true", help="reverse the order")
    add_flag(
        parser,
        "limit",
        type=_natural,
        metavar="N",
        help=f"maximum number of runs to list (default {DEFAULT_LIMIT}; 0: all)",
    )
    add_flag(
        parser,
        "metrics",
        metavar="A,B",
        help=f"columns after the seed ({DEFAULT_HELP}, then {','.join(DEFAULT_COSTS)})",
    )
    add_flag(parser, "json", action="store_true", help="a JSON object per run and line")
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)


def _natural(text: str) -> int:
    """A whole number of the command line, from 0."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 for all, got {text!r}")
    return int(text)


def runs_command(arguments: argparse.Namespace) -> int:
    """List runs, show one, compare two, or curate some. Raises ConfigError for flags that would have no effect."""
    from research_eval.store.store import Store

    action, *runs = arguments.words or [""]
    if action and action not in VERBS and (action not in ACTIONS or len(runs) != ACTIONS[action]):
        text = f"expected nothing, `show ID`, `diff ID ID` or one of {', '.join(VERBS)}"
        near = "" if action in ACTIONS else did_you_mean(action, [*ACTIONS, *VERBS])
        raise ConfigError(f"goe runs: {text}, got {' '.join(arguments.words)!r}.{near}")
    others = ORDER if action in VERBS else (*LIST_FILTERS, *ORDER) if action else ()
    given = [name for name in others if getattr(arguments, name) is not None and getattr(arguments, name) is not False]
    if given:
        raise ConfigError(f"--{given[0]}: chooses runs for the list, not for `{action}`: leave it out")
    if action in VERBS:
        return curate(arguments, action, runs)
    flag = next((name for name in ("yes", "purge", "remove") if getattr(arguments, name)), None)
    if flag is not None:
        raise ConfigError(f"--{flag}: has no effect on `goe runs{f' {action}' if action else ''}`: leave it out")
    with Store(arguments.db, read_only=True) as store:
        if action == "show":
            print_product(describe(store, *runs))
        elif action == "diff":
            print_product(compare(store, *runs))
        else:
            _list(store, arguments)
    return 0


def _list(store: Store, arguments: argparse.Namespace) -> None:
    """Print the runs that the flags choose, as a table or as JSON lines."""
    from research_eval.store.find import COLUMNS, SHORT_NAMES, check_metric, default_metric_of, find_runs

    wanted, sort = filter_of(arguments, store, exact=True), arguments.sort
    limit = DEFAULT_LIMIT if arguments.limit is None else arguments.limit
    if arguments.metrics is None:
        metrics = [default_metric_of(store, wanted.dataset_name), *DEFAULT_COSTS]
    else:
        metrics = names_of([arguments.metrics])
        for name in metrics:
            check_metric(store, name, "--metrics")
    shown = dict.fromkeys(metrics)
    # A list that is sorted by a metric also shows it.
    if sort is not None and SHORT_NAMES.get(sort, sort) not in COLUMNS:
        shown[SHORT_NAMES.get(sort, sort)] = None
    rows = find_runs(
        store,
        wanted,
        sort=sort,
        reverse=arguments.reverse,
        limit=limit or None,
        metrics=[*shown, *(part for name in shown for part in latency_parts(name).values())],
    )
    if arguments.json:
        from research_eval.store.values import strict_json

        print_product("".join(strict_json({**row, **_times(row), "tags": tags_of(row["tags"])}) + "\n" for row in rows))
    elif rows:
        print_table(*runs_table(rows, list(shown)))
    if len(rows) == limit and (total := store.count_runs(wanted)) > limit:
        log.info("%d of %s runs; --limit 0 lists all", limit, f"{total:,}")
    if not rows:
        log.info("no runs in %s%s", store.location, " fit" if store.count_runs() else _elsewhere(store))


def _elsewhere(store: Store) -> str:
    """How many hidden runs there are, for a list without runs."""
    from research_eval.store.records import ARCHIVED, DELETED, RunFilter

    counts = {view: store.count_runs(RunFilter(view=view)) for view in (ARCHIVED, DELETED)}
    texts = [f"{count:,} {view} (--{view} lists them)" for view, count in counts.items() if count]
    return f" but {' and '.join(texts)}" if texts else ""


def _times(row: dict[str, Any]) -> dict[str, Any]:
    """The times of a run as text, because JSON has no times."""
    from research_eval.store.find import TIMES

    return {name: row[name] and row[name].isoformat() for name in TIMES}


def runs_table(rows: list[dict[str, Any]], metrics: list[str]) -> tuple[list[str], list[list[str]], set[int]]:
    """The header, the cells, and the indices of the columns with numbers."""
    from research_eval.store.find import SHORT_NAMES

    titles = {name: short for short, name in SHORT_NAMES.items()}
    # Missing values are shown as a dash, so that they do not look like an empty text.
    names = ["experiment_id", "status", "run_type", "experiment_name", "model_type", "dataset_name", "seed"]
    columns = [[row[name] for row in rows] for name in names]
    texts = [["-" if value is None else str(value) for value in column] for column in columns]
    for name in metrics:
        column = _metric_column([row["metrics"].get(name) for row in rows])
        texts.append([with_remark(text, name, row["metrics"]) for text, row in zip(column, rows, strict=True)])
    texts.append([f"{row['timestamp']:%Y-%m-%d %H:%M:%S}" if row["timestamp"] else "-" for row in rows])
    header = [titles.get(name, name) for name in [*names, *metrics, "timestamp"]]
    numbers = set(range(len(names) - 1, len(header) - 1))
    if any(row["tags"] for row in rows):
        header.append("tags")
        texts.append([", ".join(tags_of(row["tags"])) or "-" for row in rows])
    return header, [list(row) for row in zip(*texts, strict=True)], numbers


def _metric_column(values: list[Any]) -> list[str]:
    """The cells of a metric. All numbers of a column have the same format, which depends on their size.

    >>> _metric_column([0.5, None]), _metric_column([1200.0, 3.0]), _metric_column([0.00001, 0.5])
    (['0.5000', '-'], ['1,200', '3'], ['1e-05', '0.5'])
    """
    sizes = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value)]
    largest = max(sizes, default=0)
    if largest > 1 and all(size.is_integer() for size in sizes):
        form = ",.0f"
    elif any(0 < size < 1e-3 for size in sizes):
        form = ".4g"
    else:
        form = ".4f" if largest < 10 else ",.1f"
    return [
        "-" if value is None else format(value, form) if isinstance(value, float) else short(value, CELL_WIDTH)
        for value in values
    ]


def describe(store: Store, name: str) -> str:
    """All that the store knows of a run, for people. Raises ConfigError for an unknown run."""
    from research_eval.store.changes import flatten, json_object
    from research_eval.store.data_facts import FACTS, facts_lines, facts_of, facts_table
    from research_eval.store.find import find_run

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
        "archived": row["archived_at"] and f"{row['archived_at']:%Y-%m-%d %H:%M:%S} UTC",
        "tags": ", ".join(tags_of(row["tags"])) or None,
        "note": row["note"],
        "parent": row["parent_id"],
        "children": ", ".join(store.children(experiment_id)) or None,
        "folder": f"runs/{file_stem(experiment_id)}",
    }
    metrics = store.metrics(experiment_id)
    numbers = {
        name: with_remark(number(value), name, metrics) for name, value in metrics.items() if isinstance(value, float)
    }
    others = {name: short(value) for name, value in metrics.items() if not isinstance(value, float)}
    record = json_object(row["env_details_json"])
    data = facts_of(row["env_details_json"])
    if facts_table(data)[1]:  # the section `data` shows these
        record = {**record, "data": {name: value for name, value in data.items() if name not in FACTS}}
    environment = {name: short(value) for name, value in flatten(record).items()}
    config = [printable(line) for line in json.dumps(json_object(row["full_config_json"]), indent=2).splitlines()]
    sections = {
        f"run {printable(experiment_id)}": pairs({name: value for name, value in facts.items() if value is not None}),
        "config": [f"  {line}" for line in config],
        "data": [f"  {line}" for line in facts_lines(data, shutil.get_terminal_size().columns - 2)],
        "environment": pairs(environment),
        "metrics": pairs(numbers),
        "lists": pairs(others),
    }
    return "\n".join(line for title, lines in sections.items() if lines for line in [title, *lines]) + "\n"


def compare(store: Store, left: str, right: str) -> str:
    """The differences between two runs in config, metrics and environment. Raises ConfigError for an unknown run."""
    from research_eval.store.changes import changes, environment_changes, json_object, metric_differences
    from research_eval.store.find import find_run

    rows = [find_run(store, name) for name in (left, right)]
    ids = [row["experiment_id"] for row in rows]
    header = [f"{letter} {row['experiment_id']} ({row['status']})" for letter, row in zip("AB", rows, strict=True)]
    configs = [json_object(row["full_config_json"]) for row in rows]
    environments = [json_object(row["env_details_json"]) for row in rows]
    sections = {
        "config": changes_lines(changes(*configs), "A", "B"),
        "metrics": differences_lines(metric_differences(*(store.metrics(key) for key in ids)), "A", "B"),
        "environment": changes_lines(environment_changes(*environments), "A", "B"),
    }
    lines = [printable(line) for line in header]
    for title, found in sections.items():
        lines += [title, *found] if found else [f"{title}: no difference"]
    return "\n".join(lines) + "\n"
