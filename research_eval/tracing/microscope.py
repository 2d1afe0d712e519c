"""`research_eval.trace`: a recorder with its contract report."""

from __future__ import annotations

from typing import Any

from torch import nn

from research_eval.tracing.contracts import contract_lines
from research_eval.tracing.record import Recorder


class Trace(Recorder):
    """What the routers of a model decide within a block: `with trace(model) as record: model(**batch)`."""

    def report(self, checks: bool = True) -> str:
        """The contract report, as text: a line for each contract with its figure and verdict.

        `checks` also calls the model again, with a part of its first input, for the contracts that need this.
        """
        return "\n".join(contract_lines(self, checks))


def trace(model: nn.Module, **options: Any) -> Trace:
    """A recorder of what the routers of a model decide. The options are those of `Recorder`."""
    return Trace(model, **options)
