"""What all commands share: flags in two spellings, suggestions for unknown flags, errors as messages.

Every command ends with one of these exit codes: 0 success; 1 the work failed or something around the program did; 2 the
user has to change something; 128 + n a signal n stopped the program.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from research_eval.errors import ConfigError, signal_of
from research_eval.system.best_effort import OutputLost, best_effort_output
from research_eval.system.untrusted import message, steers
from research_eval.wording import did_you_mean, printable

log = logging.getLogger(__name__)

MAX_WORD = 4096  # characters of a word on the command line
SHOWN_WORD = 80  # characters of a refused word in a message
PATHS = ("PATH", "FILE", "DIR", "FOLDER", "URL", "URL_OR_PATH", "OTHER_DB")  # words for paths in the help texts
DEFAULT_HELP = "default: final_val_f1, or the score that the task selects by"
DB_HELP = "the results (default: $GOE_DB, else experiment_results.db)"

PASSWORD = re.compile(r"[a-z0-9+]+://[^/@:]*:[^/@]+@")  # in a URL of a database

Explain = Callable[[str, Sequence[str]], str | None]


def add_flag(parser: argparse._ActionsContainer, name: str, **options: Any) -> None:
    """Add `--name_with_underscores` and its spelling with dashes. `parser` may be an argument group."""
    parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), dest=name, **options)


def parse_or_suggest(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    explain: Explain = lambda *_: None,
) -> argparse.Namespace:
    """Parse the command line. For an unknown flag the program ends with exit code 2 and names the nearest known one.

    `explain` may have a better sentence for an unknown flag, beside the names of the known ones.
    """
    with best_effort_output():
        return _parsed(parser, argv, explain)


def _parsed(parser: argparse.ArgumentParser, argv: list[str] | None, explain: Explain) -> argparse.Namespace:
    """The checked flags."""
    arguments, unknown = parser.parse_known_args(argv)
    if hasattr(arguments, "words") and not any(word.startswith("-") for word in unknown):
        # argparse takes the words of such a command only up to the first flag.
        arguments.words += unknown
    elif unknown:
        flags = [f"--{name.replace('_', dash)}" for name in vars(arguments) for dash in "_-"]
        hint = explain(unknown[0], list(vars(arguments))) or did_you_mean(unknown[0].split("=")[0], flags)
        parser.error(f"unknown argument {unknown[0]!r}.{hint}")
    paths = _names_of_paths(parser)
    for name, value in vars(arguments).items():
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and name in paths and not word.strip():
                parser.error(f"argument {name}: an empty path, which names no file or folder")
            if isinstance(word, str) and (problem := _problem(word, name)):
                parser.error(f"argument {name}: {problem}, got {printable(word[:SHOWN_WORD])!r}")
    # argparse takes the value of `--name=--` for the separator of positional arguments and loses it.
    if any(word.endswith("=--") for word in (sys.argv[1:] if argv is None else argv)):
        parser.error("'--' is no value of a flag")
    return arguments


def _names_of_paths(parser: argparse.ArgumentParser) -> set[str]:
    """The names of all arguments, those of subcommands too, whose value is a path or a URL."""
    names: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names = names.union(*map(_names_of_paths, action.choices.values()))
        elif action.metavar in PATHS:
            names.add(action.dest)
    return names


def _problem(word: str, name: str) -> str | None:
    """What is wrong with a word of the command line, or None.

    A text to be classified (`name` "text") may be long and contain any characters.
    """
    if name != "text" and len(word) > MAX_WORD:
        return f"expected at most {MAX_WORD} characters"
    if any("\ud800" <= letter <= "\udfff" for letter in word):
        return "expected UTF-8"
    return "control characters are not allowed" if name != "text" and any(map(steers, word)) else None


class _Printable(logging.Formatter):
    """Makes log lines safe to print: escapes replace characters that would steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, quiet: bool = False) -> int:
    """Run a command and return its exit code. Expected errors become messages on stderr.

    A mistake of the user has exit code 2. A failure around the program (a disk, a network, the memory) has exit code 1.
    Any other exception is a bug of the program and keeps its traceback. A terminal, a pipe or a disk that does not
    accept what is printed changes nothing, unless it is what the user has asked for (`print_product`).
    """
    with best_effort_output():
        return _guarded(command, arguments, quiet)


def _guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, quiet: bool) -> int:
    """What `guarded` does while output may fail."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    # Only the project becomes quiet: warnings of libraries always reach the user.
    logging.getLogger("research_eval").setLevel(logging.WARNING if quiet else logging.INFO)
    for flag in ("db", "storage"):
        if PASSWORD.match(str(getattr(arguments, flag, ""))):
            log.warning(
                "--%s: everyone on this machine can read the password in the list of processes. Put it into "
                "~/.pgpass, or the URL into GOE_%s",
                *(flag, flag.upper()),
            )
    try:
        return command(arguments)
    except OutputLost as lost:
        return lost.exit_code
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
        if not type(error).__module__.startswith("sqlalchemy"):  # by its name, because importing it takes long
            raise
        text = str(getattr(error, "orig", None) or error)
        print(message(f"database: {text}"), file=sys.stderr)
        return 2 if text.startswith("Could not decode") else 1  # not UTF-8: another program wrote it
    except KeyboardInterrupt as interruption:
        print("interrupted", file=sys.stderr)
        return 128 + signal_of(interruption)


def is_imported_by_a_process_of_ours() -> bool:
    """Whether a new process of `multiprocessing` imports the user's script, whose models it has to know.

    Such a script may call `main()` at its own level. There the call must do nothing: the process has its own task.
    """
    process = sys.modules.get("multiprocessing.process")  # not imported: then this is no such process
    return process is not None and getattr(process.current_process(), "_inheriting", False)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. numpy and Python raise MemoryError; torch raises RuntimeError with one of these texts."""
    return (
        isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate|bad_alloc", str(error)) is not None
    )


def names_of(values: list[str] | None) -> list[str]:
    """The entries of a flag that accepts words, commas or both; no entry if the flag was not given.

    >>> names_of(["dense,moe", "goe"])
    ['dense', 'moe', 'goe']
    """
    return list(dict.fromkeys(name for value in values or () for part in value.split(",") if (name := part.strip())))
