"""Words for constructor signatures: accepted spellings, bounds, and what a study may try.

The constructor of a model, a dataset or a settings group is its schema. These words say in its annotations what the
type alone cannot: `num_experts: Annotated[Count, Aka("num_experts_per_layer"), Choice(2, 4, 8)] = 4`. The module
imports nothing of the project, so that every other module may use it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

INT_MAX = 2**31 - 1  # the largest number that an INTEGER column holds in every database


class Aka:
    """Other accepted spellings of a parameter: `num_experts: Annotated[Count, Aka("num_experts_per_layer")]`."""

    def __init__(self, *names: str) -> None:
        self.names = names


class Choice:
    """The values that a study tries: `embed_dim: Annotated[Count, Choice(32, 64, 128)]`."""

    def __init__(self, *values: Any) -> None:
        self.values = values


class Range:
    """The interval that a study searches, both ends included; whole numbers if the parameter is an int.

    `upto` names parameters of the same section; their product is an additional upper bound.
    """

    def __init__(
        self, low: float, high: float, *, log: bool = False, step: float | None = None, upto: tuple[str, ...] = ()
    ) -> None:
        self.low, self.high, self.log, self.step, self.upto = low, high, log, step, upto


class Divides:
    """A study tries only values that divide another parameter of the section."""

    def __init__(self, name: str) -> None:
        self.name = name


class When:
    """A study searches the parameter only if another parameter of the section has one of these values."""

    def __init__(self, name: str, *values: Any) -> None:
        self.name, self.values = name, values


Count = Annotated[int, Field(ge=1, le=INT_MAX)]
Natural = Annotated[int, Field(ge=0, le=INT_MAX)]
Steps = Annotated[int, Field(ge=1, le=10_000)]  # executed one after the other, so that a large number never ends
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

Kernels = Literal["auto", "plain", "slices", "grouped"]  # how experts are executed: layers/kernels explains the names
