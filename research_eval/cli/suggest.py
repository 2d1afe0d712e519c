"""`goe suggest` and the script `suggest_configs.py`: write new configs, made from the best past runs.

    goe suggest --dataset_name parity --model_type goe --top_n 2

`studies.suggestion` explains the strategies.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from research_eval.cli.common import DB_HELP, DEFAULT_HELP, add_flag, guarded, parse_or_suggest
from research_eval.cli.filters import add_filters, filter_of
from research_eval.errors import ConfigError
from research_eval.store.metrics import DEFAULT_METRIC
from research_eval.wording import printable

if TYPE_CHECKING:
    from research_eval.studies.suggestion import Suggestion


DESCRIPTION = "new configs from the best runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe suggest`."""
    add_flag(parser, "dataset_name", required=True, metavar="D", help="the dataset of the past runs")
    add_flag(parser, "model_type", required=True, metavar="M", help="the model type of the past runs")
    add_flag(parser, "metric_name", metavar="NAME", help=f"ranks them ({DEFAULT_HELP})")
    add_flag(
        parser, "top_n", type=int, default=3, metavar="N", help="number of best configs to start from (default: 3)"
    )
    number = "new configs from each of them (default: 2)"
    add_flag(parser, "num_variations_per_config", type=int, default=2, metavar="N", help=number)
    size = "how far numbers move, as a share of their interval (default: 0.1)"
    add_flag(parser, "perturbation_magnitude", type=float, metavar="X", help=size)
    strategies = "steps away from the best configs (default), or a TPE sampler fitted on all runs"
    add_flag(parser, "strategy", choices=["perturb", "tpe"], default="perturb", help=strategies)
    add_flag(parser, "search_space", metavar="FILE", help="JSON that narrows or fixes what may change")
    add_flag(parser, "seed", type=int, default=0, metavar="N", help="another seed gives other suggestions (default: 0)")
    folder = "where the configs are written (default: suggested_configs/)"
    add_flag(parser, "output_dir", default="suggested_configs/", metavar="PATH", help=folder)
    add_filters(parser)
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)
    add_flag(parser, "quiet", action="store_true", help="print the paths only")


def suggest_command(arguments: argparse.Namespace) -> int:
    """Write the configs and print where each comes from. Raises ConfigError, also if there is nothing to suggest."""
    from research_eval.store.find import default_metric_of
    from research_eval.store.store import Store  # after parsing, so that --help stays quick
    from research_eval.studies.space import read_search_space
    from research_eval.studies.suggestion import DEFAULT_MAGNITUDE, Request, suggest, write_suggestions

    # The flag has no default in the parser, so that a given one can be told from the default.
    if arguments.strategy == "tpe" and arguments.perturbation_magnitude is not None:
        raise ConfigError("--perturbation_magnitude: is of no use with --strategy tpe. Leave it out.")
    magnitude = arguments.perturbation_magnitude
    request = Request(
        dataset_name=arguments.dataset_name,
        model_type=arguments.model_type,
        metric_name=DEFAULT_METRIC if arguments.metric_name is None else arguments.metric_name,
        top_n=arguments.top_n,
        num_variations_per_config=arguments.num_variations_per_config,
        perturbation_magnitude=DEFAULT_MAGNITUDE if magnitude is None else magnitude,
        strategy=arguments.strategy,
        seed=arguments.seed,
        narrowing=None if arguments.search_space is None else read_search_space(arguments.search_space),
    )
    with Store(arguments.db, read_only=True) as store:
        if arguments.metric_name is None:
            request = replace(request, metric_name=default_metric_of(store, request.dataset_name))
        suggestions = suggest(store, replace(request, wanted=filter_of(arguments, store)))
    paths = write_suggestions(suggestions, Path(arguments.output_dir))
    if arguments.quiet:
        print("\n".join(map(str, paths)))
    else:
        print(report(suggestions, paths, arguments.db))
    return 0


def report(suggestions: Sequence[Suggestion], paths: Sequence[Path], db: str | None) -> str:
    """For each file where its config comes from and what is new in it; then the command that runs the first one."""
    lines = []
    for suggestion, path in zip(suggestions, paths, strict=True):
        lines += [str(path), f"  {suggestion.source}"]
        lines += [f"  {change.name} {_shown(change.left)} -> {_shown(change.right)}" for change in suggestion.changes]
    command = ["python", "research_eval/main.py", "--json_config_path", str(paths[0])]
    command += [] if db is None else ["--db", db]
    # The command is quoted for a shell instead: escapes would change a path with unusual characters.
    lines = list(map(printable, lines))
    return "\n".join([*lines, "", f"To run the first: {shlex.join(command)}"])


def _shown(value: object) -> str:
    """A text as it is, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def main(argv: list[str] | None, description: str | None) -> int:
    """The script `suggest_configs.py`."""
    parser = argparse.ArgumentParser(prog="suggest_configs.py", description=description, allow_abbrev=False)
    add_arguments(parser)
    arguments = parse_or_suggest(parser, argv)
    return guarded(suggest_command, arguments, arguments.quiet)
