"""What every command does the same way: flags in two spellings, suggestions for unknown ones, errors as messages."""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Callable
from typing import Any

from research_eval.errors import ConfigError

DB_HELP = "the results (default: $GOE_DB, else experiment_results.db)"


def add_flag(parser: argparse._ActionsContainer, name: str, **options: Any) -> None:
    """`--name_with_underscores` and its spelling in dashes; `parser` may be an argument group."""
    parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), dest=name, **options)


def parse_or_suggest(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse; an unknown flag ends the program with exit code 2 and the nearest known one."""
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [f"--{name.replace('_', dash)}" for name in vars(arguments) for dash in "_-"]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        parser.error(f"unknown argument {unknown[0]!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
    return arguments


def guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, quiet: bool = False) -> int:
    """Run a command; a mistake of the user becomes its message on stderr and exit code 2."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("research_eval").setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        return command(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def names_of(values: list[str] | None) -> list[str]:
    """The entries of a flag that takes several words, commas or both; none where it was not given.

    >>> names_of(["dense,moe", "goe"])
    ['dense', 'moe', 'goe']
    """
    return list(dict.fromkeys(name for value in values or () for part in value.split(",") if (name := part.strip())))
