"""Words for constructor signatures, and the one place that reads such a signature.

The constructor of a model, a dataset or a settings group is its schema. The words say in its annotations what the
type alone cannot: `num_experts: Annotated[Count, Aka("num_experts_per_layer"), Choice(2, 4, 8)] = 4`. `options_of`
reads the options of a constructor; `build` calls the constructor with their values. The module imports nothing of the
project, so that every other module may use it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

log = logging.getLogger(__name__)

T = TypeVar("T")

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


class Younger:
    """Marks an option that is younger than stored configs: a config leaves it out where it has its default.

    A config that does not use the option then stays equal to those that were stored before there was one.
    """


Count = Annotated[int, Field(ge=1, le=INT_MAX)]
Natural = Annotated[int, Field(ge=0, le=INT_MAX)]
Steps = Annotated[int, Field(ge=1, le=10_000)]  # executed one after the other, so that a large number never ends
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

Precision = Literal["fp32", "tf32", "bf16"]  # of products; tf32 rounds their inputs on CUDA, elsewhere it is fp32
Kernels = Literal["auto", "plain", "slices", "grouped"]  # how experts are executed: layers/kernels explains the names
AttentionRows = Literal["padded", "varlen"]  # what attention reads: grids of samples and positions, or rows of tokens


# ------------------------------------------------------------------------------------------------- settings groups

# A settings group is a frozen dataclass that a constructor takes as one parameter. Its fields are options like the
# other parameters: JSON, messages, the JSON Schema and search spaces show them flat, beside the constructor's own. A
# group may hold groups.

REQUIRED: Any = inspect.Parameter.empty  # the default of an option that has none


@dataclass(frozen=True)
class Option:
    """One value that a constructor takes, under its flat name."""

    name: str
    annotation: Any = Any
    """The type with its `Annotated` words; `Any` if the constructor names none."""
    default: Any = REQUIRED
    group: tuple[str, ...] = ()
    """The way to the value: the parameter that is a group, then the fields that are groups. Empty without a group."""


def is_group(annotation: Any) -> bool:
    """Whether a parameter with this annotation is a settings group."""
    if not isinstance(annotation, type) or not dataclasses.is_dataclass(annotation):
        return False
    return bool(getattr(annotation, "__dataclass_params__").frozen)  # noqa: B009 - unknown to type checkers


def options_of(cls: type) -> dict[str, Option]:
    """The options of a constructor by flat name: its parameters, and the fields of its groups in their place.

    The options that the class lists in `OPTION_ORDER` stand first, in that order. `*args` and `**kwargs` are no
    options (see `takes_any_option`). Raises TypeError if two options have one name.
    """
    parameters = _parameters(cls)
    options: dict[str, Option] = {}
    for option in (option for parameter in parameters for option in _expanded(parameter)):
        if option.name in options:
            raise TypeError(f"{cls.__qualname__}: {_place(options[option.name])} and {_place(option)} have one name")
        options[option.name] = option
    for parameter in parameters:
        if is_group(parameter.annotation) and parameter.name in options:
            raise TypeError(f"{cls.__qualname__}: the group {parameter.name!r} and an option have one name")
    first = _option_order(cls)
    unknown = sorted(set(first) - set(options))
    if unknown:
        raise TypeError(f"{cls.__qualname__}.OPTION_ORDER: the constructor has no option {', '.join(unknown)}")
    return {name: options[name] for name in dict.fromkeys([*first, *options])}


def takes_any_option(cls: type) -> bool:
    """Whether the constructor has `**kwargs`, which accept options that its signature does not name."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(cls).parameters.values())


def grouped_arguments(cls: type, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the constructor: groups as objects with their flat values, all other values as given.

    A value under the name of a group is such an object; flat values replace its fields. Names that the constructor
    does not know stay, so that the constructor raises its TypeError. Errors of a group's `__post_init__` pass through.
    """
    arguments = dict(flat)
    for parameter in _parameters(cls):
        if is_group(parameter.annotation):
            start = arguments.pop(parameter.name, parameter.default)
            arguments[parameter.name] = _filled(parameter.annotation, start, arguments)
    return arguments


def build(cls: type[T], flat: Mapping[str, Any]) -> T:
    """An object of the class, made of its options' flat values."""
    return cls(**grouped_arguments(cls, flat))


def accept_flat_options(cls: type) -> None:
    """Let the constructor of a new class take the options of its groups as flat keywords, too.

    Call it from `__init_subclass__`. Raises TypeError for options that share a name, for an `OPTION_ORDER` that
    does not fit, and for a group that is not keyword-only.
    """
    constructor = vars(cls).get("__init__")
    if constructor is None:  # the class inherits its constructor, which has this treatment already
        return
    groups = {option.group[0] for option in options_of(cls).values() if option.group}
    if not groups:
        return
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in groups and parameter.kind is not parameter.KEYWORD_ONLY:
            raise TypeError(f"{cls.__qualname__}: the group {name!r} has to be keyword-only")

    @functools.wraps(constructor)  # signature and annotations stay those of the constructor
    def with_groups(self: Any, *args: Any, **flat: Any) -> None:
        constructor(self, *args, **grouped_arguments(cls, flat))

    cls.__init__ = with_groups  # type: ignore[misc]


def _parameters(cls: type) -> list[Option]:
    """The constructor's parameters, groups among them as they are."""
    try:
        hints = _hints(cls.__init__)  # type: ignore[misc]
    except NameError as error:  # names that the class imports for type checkers only
        log.debug("%s: the types of the parameters are not checked: %s", cls.__qualname__, error)
        hints = {}
    parameters = []
    for name, parameter in inspect.signature(cls).parameters.items():
        annotation, default = hints.get(name, Any), parameter.default
        if is_group(annotation) and not isinstance(default, annotation):
            default = REQUIRED  # such as None, or the mark that dataclasses leave for a default_factory
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            parameters.append(Option(name, annotation, default))
    return parameters


@functools.cache
def _hints(constructor_or_group: Callable[..., Any]) -> dict[str, Any]:
    """The annotations with their words. Raises NameError, and keeps nothing, if a name is not defined (yet)."""
    return typing.get_type_hints(constructor_or_group, include_extras=True)


def _expanded(option: Option) -> Iterator[Option]:
    """The option itself, or the options that it holds if it is a group."""
    if not is_group(option.annotation):
        yield option
        return
    for field in _fields(option):
        yield from _expanded(field)


def _fields(group: Option) -> list[Option]:
    """The fields of a group. Their defaults are those of the group's own default, if it has one."""
    hints, place = _hints(group.annotation), (*group.group, group.name)
    return [
        Option(field.name, hints[field.name], _default(field, group.default), place)
        for field in dataclasses.fields(group.annotation)
        if field.init
    ]


def _default(field: dataclasses.Field[Any], group: Any) -> Any:
    if group is not REQUIRED:
        return getattr(group, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def _filled(kind: Any, start: Any, flat: dict[str, Any]) -> Any:
    """A group with the values that `flat` has for it, which are taken out of `flat`; the other values are `start`'s."""
    values: dict[str, Any] = {}
    for field in _fields(Option("", kind, start)):
        if is_group(field.annotation):
            values[field.name] = _filled(field.annotation, field.default, flat)
        elif field.name in flat:
            values[field.name] = flat.pop(field.name)
    return kind(**values) if start is REQUIRED else dataclasses.replace(start, **values)


def _option_order(cls: type) -> tuple[str, ...]:
    """`OPTION_ORDER` of the class that wrote the constructor: a subclass with another one may have other options."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    order: tuple[str, ...] = vars(owner).get("OPTION_ORDER", ())
    return order


def _place(option: Option) -> str:
    return repr(".".join((*option.group, option.name)))
