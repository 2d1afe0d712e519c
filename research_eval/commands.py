"""What every command does the same way: flags in two spellings, suggestions for unknown ones, errors as messages."""

from __future__ import annotations

import argparse
import difflib
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

from research_eval.errors import ConfigError
from research_eval.system.untrusted import message, steers
from research_eval.wording import printable

MAX_WORD = 4096
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
    for name, value in vars(arguments).items():
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and (problem := _problem(word, name)):
                parser.error(f"argument {name}: {problem}, got {printable(word[:80])!r}")
    if any(word.endswith("=--") for word in (sys.argv[1:] if argv is None else argv)):
        parser.error("'--' is no value of a flag")
    return arguments


def _problem(word: str, name: str) -> str | None:
    """What is wrong with a word of the command line; a text to be classified may be long."""
    if name != "text" and len(word) > MAX_WORD:
        return f"expected at most {MAX_WORD} characters"
    if any("\ud800" <= letter <= "\udfff" for letter in word):
        return "expected UTF-8"
    return "control characters are not allowed" if name != "text" and any(map(steers, word)) else None


class _Printable(logging.Formatter):
    """Log lines that cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, quiet: bool = False) -> int:
    """Run a command; a mistake of the user becomes its message on stderr and exit code 2.

    So does, with exit code 1, what goes wrong around a program that is right: a disk, a network, the memory.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("research_eval").setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        return command(arguments)
    except ConfigError as error:
        print(message(error), file=sys.stderr)
        return 2
    except OSError as error:
        print(message(f"{error.filename or 'the operating system'}: {error.strerror or error}"), file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(message(f"not enough memory: {error}. Make model, batch_size or data smaller."), file=sys.stderr)
        return 1
    except Exception as error:
        if not type(error).__module__.startswith("sqlalchemy"):  # which is not imported for this
            raise
        text = str(getattr(error, "orig", None) or error)
        print(message(f"database: {text}"), file=sys.stderr)
        return 2 if text.startswith("Could not decode") else 1  # bytes where text belongs: no run of ours wrote them
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: numpy and Python say it by the type, torch by its words."""
    return (
        isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate|bad_alloc", str(error)) is not None
    )


def names_of(values: list[str] | None) -> list[str]:
    """The entries of a flag that takes several words, commas or both; none where it was not given.

    >>> names_of(["dense,moe", "goe"])
    ['dense', 'moe', 'goe']
    """
    return list(dict.fromkeys(name for value in values or () for part in value.split(",") if (name := part.strip())))
