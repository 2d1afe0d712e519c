"""Which of the processes of one training this one is, as torchrun says in environment variables."""

from __future__ import annotations

import os

from research_eval.errors import ConfigError


def rank_and_size() -> tuple[int, int]:
    """The number of this process and the number of all; (0, 1) without torchrun. Raises ConfigError for nonsense."""
    words = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, size = map(int, words)
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size or (size > 1 and "RANK" not in os.environ):
        raise ConfigError(
            f"RANK={os.environ.get('RANK')!r} and WORLD_SIZE={words[1]!r} in the environment: expected what torchrun "
            "sets. Start the command with torchrun, or unset both."
        )
    return rank, size


def refuse_many_processes(what: str) -> None:
    """Raise ConfigError if torchrun started several processes: together they train one run and nothing else."""
    size = rank_and_size()[1]
    if size > 1:
        raise ConfigError(
            f"{what}: torchrun started {size} processes, which train one run together. Drop torchrun; docs/scale.md "
            "says how many machines share the runs of a study"
        )
