"""The two entry points: `main` for the script with one set of flags, `goe` for the console command.

`python research_eval/main.py` guesses from its flags whether to run an experiment or a study. `goe` has a subcommand
for each of them, and for everything else.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

from research_eval.cli import run, tune
from research_eval.cli.common import SHOWN_WORD, guarded, is_imported_by_a_process_of_ours, parse_or_suggest
from research_eval.errors import ConfigError
from research_eval.wording import hint, printable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """A subcommand of `goe`: how it adds its flags, what it does, and a line that explains it.

    `run` returns the exit code of the program.
    """

    name: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    description: str


def commands() -> tuple[Command, ...]:
    """The subcommands in the order of the help text. A new one is a new module with two functions and a line here.

    They are imported here, because the script `main.py` needs only two of them and answers sooner without the others.
    """
    from research_eval.cli import (
        analyze,
        benchmark,
        compare,
        dashboard,
        doctor,
        export,
        generate,
        init_db,
        match,
        measure,
        merge,
        predict,
        replay,
        routes,
        runs,
        suggest,
        trace,
        worker,
    )

    return (
        Command("run", run.add_arguments, run.run_command, run.DESCRIPTION),
        Command("tune", tune.add_arguments, tune.tune_command, tune.DESCRIPTION),
        Command("analyze", analyze.add_arguments, analyze.analyze_command, analyze.DESCRIPTION),
        Command("worker", worker.add_arguments, worker.worker_command, worker.DESCRIPTION),
        Command("suggest", suggest.add_arguments, suggest.suggest_command, suggest.DESCRIPTION),
        Command("runs", runs.add_arguments, runs.runs_command, runs.DESCRIPTION),
        Command("export", export.add_arguments, export.export_command, export.DESCRIPTION),
        Command("merge", merge.add_arguments, merge.merge_command, merge.DESCRIPTION),
        Command("replay", replay.add_arguments, replay.replay_command, replay.DESCRIPTION),
        Command("doctor", doctor.add_arguments, doctor.doctor_command, doctor.DESCRIPTION),
        Command("init-db", init_db.add_arguments, init_db.init_db_command, init_db.DESCRIPTION),
        Command("compare", compare.add_arguments, compare.compare_command, compare.DESCRIPTION),
        Command("benchmark", benchmark.add_arguments, benchmark.benchmark_command, benchmark.DESCRIPTION),
        Command("match", match.add_arguments, match.match_command, match.DESCRIPTION),
        Command("measure", measure.add_arguments, measure.measure_command, measure.DESCRIPTION),
        Command("dashboard", dashboard.add_arguments, dashboard.dashboard_command, dashboard.DESCRIPTION),
        Command("atlas", dashboard.add_atlas_arguments, dashboard.atlas_command, dashboard.ATLAS_DESCRIPTION),
        Command("trace", trace.add_arguments, trace.trace_command, trace.DESCRIPTION),
        Command("predict", predict.add_arguments, predict.predict_command, predict.DESCRIPTION),
        Command("generate", generate.add_arguments, generate.generate_command, generate.DESCRIPTION),
        Command("routes", routes.add_arguments, routes.routes_command, routes.DESCRIPTION),
        Command("export-model", generate.add_export_arguments, generate.export_command, generate.EXPORT_DESCRIPTION),
    )


def goe(argv: list[str] | None = None) -> int:
    """Parse the flags of a subcommand, run it, and return its exit code."""
    if is_imported_by_a_process_of_ours():
        return 0
    parser = argparse.ArgumentParser(
        prog="goe", description="Train and compare dense, MoE and Graph-of-Experts models."
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands():
        text = command.description
        subparser = subparsers.add_parser(command.name, help=text, description=text, allow_abbrev=False)
        subparser.set_defaults(command=command.run)
        command.add_arguments(subparser)
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-") and words[0] not in subparsers.choices:
        parser.error(f"unknown command {printable(words[0][:SHOWN_WORD])!r}.{hint(words[0], subparsers.choices)}")
    if words[:1] in (["run"], ["tune"]):
        arguments = parse_or_suggest(parser, run.with_keys_as_sets(words), run.key_for)
    else:
        arguments = parse_or_suggest(parser, words)
    return guarded(arguments.command, arguments, getattr(arguments, "quiet", False))


def main(argv: list[str] | None, description: str | None) -> int:
    """The script `main.py`: one experiment or a study, depending on its flags."""
    if is_imported_by_a_process_of_ours():
        return 0
    parser = argparse.ArgumentParser(prog="main.py", description=description, allow_abbrev=False)
    run.add_common_arguments(parser.add_argument_group("experiments and studies"))
    run.add_run_arguments(parser.add_argument_group("one experiment"), required=False)
    tune.add_study_arguments(parser.add_argument_group("a study (without --json_config_path)"))
    words = sys.argv[1:] if argv is None else argv
    arguments = parse_or_suggest(parser, run.with_keys_as_sets(words), run.key_for)
    return guarded(run_or_tune, arguments, arguments.quiet)


def run_or_tune(arguments: argparse.Namespace) -> int:
    """Run one experiment if --json_config_path is given, else a study.

    Raises ConfigError for flags of the other one.
    """
    single = arguments.json_config_path is not None
    others = tune.STUDY_ONLY if single else run.RUN_ONLY
    given = [name for name in others if getattr(arguments, name) not in (None, False)]
    if single and given:
        key = tune.key_of(given[0])
        instead = "drop one" if key is None else f"write {key} into the file, or give --set {key}=VALUE"
        raise ConfigError(f"--{given[0]}: is a flag of studies, and --json_config_path runs one experiment: {instead}")
    if given == ["resume"]:
        log.info("--resume: a study continues by itself")
    elif given:
        raise ConfigError("--seeds: is a flag of one experiment; a study takes --seed and --seeds_per_trial")
    if not single and arguments.dataset_name is None:
        raise ConfigError(
            "give --json_config_path FILE for one experiment, or at least --dataset_name for a study of many (--help)"
        )
    return run.run_command(arguments) if single else tune.tune_command(arguments)
