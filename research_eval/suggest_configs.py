"""Write new configs that are worth a run, made from the best of the past ones."""

from __future__ import annotations

if not __package__:  # run as a file: put the repository root where this folder was
    import sys
    from pathlib import Path

    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(p for p in sys.path if Path(p).resolve() != _here)]

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research_eval.commands import DB_HELP, add_flag, guarded, parse_or_suggest
from research_eval.errors import ConfigError
from research_eval.metrics import DEFAULT_METRIC
from research_eval.wording import printable

if TYPE_CHECKING:
    from research_eval.suggestion import Suggestion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flag(parser, "dataset_name", required=True, metavar="D", help="the dataset of the past runs")
    add_flag(parser, "model_type", required=True, metavar="M", help="the model type of the past runs")
    add_flag(parser, "metric_name", default=DEFAULT_METRIC, metavar="NAME", help="ranks them (default: %(default)s)")
    add_flag(parser, "top_n", type=int, default=3, metavar="N", help="so many of the best configs (default: 3)")
    number = "new configs from each of them (default: 2)"
    add_flag(parser, "num_variations_per_config", type=int, default=2, metavar="N", help=number)
    size = "how far numbers move, as a share of their interval (default: 0.1)"
    add_flag(parser, "perturbation_magnitude", type=float, metavar="X", help=size)
    strategies = "steps away from the best configs (default), or a TPE sampler fitted on all runs"
    add_flag(parser, "strategy", choices=["perturb", "tpe"], default="perturb", help=strategies)
    add_flag(parser, "search_space", metavar="FILE", help="JSON that narrows or fixes what may change")
    add_flag(parser, "seed", type=int, default=0, metavar="N", help="another one, other suggestions (default: 0)")
    folder = "where the configs are written (default: suggested_configs/)"
    add_flag(parser, "output_dir", default="suggested_configs/", metavar="PATH", help=folder)
    add_flag(parser, "db", metavar="URL_OR_PATH", help=DB_HELP)
    add_flag(parser, "quiet", action="store_true", help="print the paths only")


def suggest_command(arguments: argparse.Namespace) -> int:
    """Exit code 0 where something was suggested. Raises ConfigError."""
    from research_eval.db_utils import Store  # after parsing: --help has to be quick
    from research_eval.search_space import read_search_space
    from research_eval.suggestion import DEFAULT_MAGNITUDE, Request, suggest, write_suggestions

    if arguments.strategy == "tpe" and arguments.perturbation_magnitude is not None:
        raise ConfigError("--perturbation_magnitude: is of no use with --strategy tpe. Leave it out.")
    magnitude = arguments.perturbation_magnitude
    request = Request(
        dataset_name=arguments.dataset_name,
        model_type=arguments.model_type,
        metric_name=arguments.metric_name,
        top_n=arguments.top_n,
        num_variations_per_config=arguments.num_variations_per_config,
        perturbation_magnitude=DEFAULT_MAGNITUDE if magnitude is None else magnitude,
        strategy=arguments.strategy,
        seed=arguments.seed,
        narrowing=None if arguments.search_space is None else read_search_space(arguments.search_space),
    )
    with Store(arguments.db, read_only=True) as store:
        suggestions = suggest(store, request)
    paths = write_suggestions(suggestions, Path(arguments.output_dir))
    if arguments.quiet:
        print("\n".join(map(str, paths)))
    else:
        print(report(suggestions, paths, arguments.db))
    return 0


def report(suggestions: Sequence[Suggestion], paths: Sequence[Path], db: str | None) -> str:
    """What was written, where each comes from and what is new in it, and how to run one."""
    lines = []
    for suggestion, path in zip(suggestions, paths, strict=True):
        lines += [str(path), f"  {suggestion.source}"]
        lines += [f"  {change.name} {_shown(change.left)} -> {_shown(change.right)}" for change in suggestion.changes]
    command = ["python", "research_eval/main.py", "--json_config_path", str(paths[0])]
    command += [] if db is None else ["--db", db]
    lines = list(map(printable, lines))
    return "\n".join([*lines, "", f"To run the first: {shlex.join(command)}"])


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def main(argv: list[str] | None = None) -> int:
    """`python research_eval/suggest_configs.py --dataset_name D --model_type M ...`."""
    parser = argparse.ArgumentParser(prog="suggest_configs.py", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    arguments = parse_or_suggest(parser, argv)
    return guarded(suggest_command, arguments, arguments.quiet)


if __name__ == "__main__":
    raise SystemExit(main())
