"""Variations of a config: steps away from it inside its search space.

A step may produce values that do not fit together, such as a number of heads that does not divide the width. Such a
value is replaced by the nearest one that fits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from research_eval.annotations import Choice, Range
from research_eval.config.sections import ExperimentConfig
from research_eval.config.signatures import MODEL_PROVIDED, fields_of, signature_model, spellings_of
from research_eval.studies.distributions import contains
from research_eval.studies.space import SECTIONS, TOP_LEVEL, Parameter, SearchSpace, build_space

MOVES_PER_MAGNITUDE = 3.0  # a discrete value moves with this probability times the magnitude: 30% at 0.1

Config = dict[str, Any]


# -------------------------------------------------------------------------------------- the space around a config


@dataclass(frozen=True)
class Space:
    """The parameters that may change around a config.

    `narrowed` names the parameters that the user has given values for: a variation uses these values only. The other
    parameters have a domain from an annotation. A good config may lie outside it, so that only the type of the
    parameter (its adapter) limits a variation.
    """

    search: SearchSpace
    narrowed: frozenset[str]
    adapters: dict[str, TypeAdapter[Any]]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters of the one model type."""
        (parameters,) = self.search.parameters.values()
        return parameters

    def start(self, config: Config) -> Config:
        """The config with the values that the user has fixed."""
        changed: Config = json.loads(json.dumps(config))
        (fixed,) = self.search.fixed.values()
        for section in SECTIONS:
            changed[section] |= self.search.base[section]
        changed["model_params"] |= fixed
        return changed | {key: self.search.base[key] for key in TOP_LEVEL if key in self.search.base}

    def accepts(self, parameter: Parameter, value: Any) -> bool:
        """Whether the type and the bounds of the parameter accept the value."""
        try:
            self.adapters[parameter.name].validate_json(json.dumps(value), strict=True)
        except ValidationError:
            return False
        return True


def space_around(config: ExperimentConfig, narrowing: Mapping[str, Any]) -> Space:
    """The space around a config: it searches the parameters for which an annotation or the narrowing has values.

    Everything else stays as in the config. `narrowing` has the form that `build_space` explains. Raises ConfigError if
    it does not fit.
    """
    base = config.to_dict()
    dropped: dict[tuple[str, str], Any] = {}
    narrowed: set[str] = set()
    infos: dict[str, FieldInfo] = {}
    for section, model in _models(config).items():
        values = base[section] if section else base
        prefix = config.model_type if section == "model_params" else section
        given = set(_given(narrowing, section, config.model_type, model))
        for key, info in fields_of(model).items():
            name = f"{prefix}.{key}".lstrip(".")
            infos[name] = info
            annotated = bool(section) and any(isinstance(word, Choice | Range) for word in info.metadata)
            if key in values and (annotated or key in given):
                dropped[section, key] = values.pop(key)
            if key in given:
                narrowed.add(name)
    search = build_space([config.model_type], base, narrowing)
    parameters = search.parameters[config.model_type]
    searched = {(parameter.section, parameter.key) for parameter in parameters}
    for (section, key), value in dropped.items():  # a value whose condition is not met is not searched, but stays
        if (section, key) not in searched:
            fixed = search.base[section] if section else search.base
            (search.fixed[config.model_type] if section == "model_params" else fixed).setdefault(key, value)
    adapters = {parameter.name: _adapter(infos[parameter.name]) for parameter in parameters}
    return Space(search, frozenset(narrowed), adapters)


def widened(space: Space, configs: Iterable[Config]) -> Space:
    """The space, widened by the values of these complete configs, except for parameters that the user has narrowed.

    Past runs may have values that no study tries, and defaults such as null.
    """
    configs = list(configs)
    parameters = []
    for parameter in space.parameters:
        domain = parameter.domain
        found = [values_of(config, parameter) for config in configs]
        seen = [values.get(parameter.key) for values in found if parameter.applies(values)]
        if parameter.name not in space.narrowed:
            domain = _with_choices(domain, seen) if isinstance(domain, Choice) else _with_numbers(domain, seen)
        parameters.append(replace(parameter, domain=domain))
    (model_type,) = space.search.model_types
    return replace(space, search=replace(space.search, parameters={model_type: tuple(parameters)}))


def _with_choices(domain: Choice, seen: Iterable[Any]) -> Choice:
    """The choices and the values seen: numbers first and in order, as steps to a neighbour need it."""
    known = {json.dumps(value): value for value in [*domain.values, *seen]}
    numbers = sorted(value for value in known.values() if is_number(value))
    return Choice(*numbers, *(value for value in known.values() if not is_number(value)))


def _with_numbers(domain: Range, seen: Iterable[Any]) -> Range:
    """The smallest range that holds the domain and the numbers seen; a range with steps stays as it is."""
    numbers = [value for value in seen if is_number(value) and (value > 0 or not domain.log)]
    if domain.step is not None:
        return domain
    low, high = min([domain.low, *numbers]), max([domain.high, *numbers])
    return Range(low, high, log=domain.log)


def _models(config: ExperimentConfig) -> dict[str, type[BaseModel]]:
    """The pydantic models of the sections whose values may change. Section "" is the top level of the config."""
    own = signature_model(config.model_class(), MODEL_PROVIDED)
    sections = {name: type(getattr(config, name)) for name in SECTIONS[2:]}
    return {"": ExperimentConfig, "model_params": own, **sections}


def _given(narrowing: Mapping[str, Any], section: str, model_type: str, model: type[BaseModel]) -> Iterator[str]:
    """The canonical names of the parameters for which the narrowing has values; `build_space` checks the values."""
    values = narrowing.get(section, {}) if section else {key: None for key in TOP_LEVEL if key in narrowing}
    values = values if isinstance(values, dict) else {}
    own = values.get(model_type) if section == "model_params" else None
    spellings = spellings_of(model)
    for key in [*values, *(own if isinstance(own, dict) else ())]:
        if key in spellings:
            yield spellings[key]


def _adapter(info: FieldInfo) -> TypeAdapter[Any]:
    """Checks values of one parameter: its type and its bounds."""
    kind: Any = info.annotation
    return TypeAdapter(Annotated[kind, *info.metadata] if info.metadata else kind)


# ---------------------------------------------------------------------------------------------------------- steps


def perturbed(config: Config, space: Space, magnitude: float, rng: np.random.Generator) -> Config:
    """A variation of a complete config. It is not checked yet. Raises Infeasible.

    A real number makes a normally distributed step with a deviation of `magnitude` times its interval, on a log scale
    if the interval has one. A whole number makes such a step of at least 1, and a choice becomes a neighbouring one,
    both with a probability of `MOVES_PER_MAGNITUDE` times `magnitude`. One parameter moves in any case. A value that
    does not fit those changed before it becomes the nearest value that fits. A value whose condition is no longer met
    becomes its default.
    """
    changed = space.start(config)
    movable = [parameter for parameter in space.parameters if parameter.applies(values_of(config, parameter))]
    forced = movable[rng.integers(len(movable))] if movable else None
    # The parameters are in the order of a walk, so that each is repaired after those that it depends on.
    for parameter in space.parameters:
        values = values_of(changed, parameter)
        if not parameter.applies(values):
            if parameter in movable:
                values.pop(parameter.key, None)
            continue
        bounds = parameter.distribution(values)[1] if parameter.name in space.narrowed else None
        value = values.get(parameter.key, parameter.defaults.get(parameter.key))
        # Both numbers are drawn for every parameter, so that a draw does not depend on the kinds of those before.
        size, luck = rng.normal() * magnitude, rng.random()
        if parameter is forced or not _is_discrete(parameter) or luck < MOVES_PER_MAGNITUDE * magnitude:
            value = _moved(parameter, value, size, space, bounds, rng)
        values[parameter.key] = _repaired(parameter, value, values) if bounds is None else _nearest_in(bounds, value)
    return changed


def values_of(config: Config, parameter: Parameter) -> Config:
    """The section of a config that holds the parameter."""
    section: Config = config[parameter.section] if parameter.section else config
    return section


def is_number(value: Any) -> bool:
    """Whether the value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_discrete(parameter: Parameter) -> bool:
    """Whether the parameter has choices, whole numbers or steps, so that small moves would change nothing."""
    return isinstance(parameter.domain, Choice) or not parameter.is_float or parameter.domain.step is not None


def _moved(
    parameter: Parameter,
    value: Any,
    size: float,
    space: Space,
    bounds: BaseDistribution | None,
    rng: np.random.Generator,
) -> Any:
    """Another value, if there is one, else the same. `size` is the step as a share of the interval."""
    domain = parameter.domain
    if isinstance(bounds, CategoricalDistribution):
        domain = Choice(*bounds.choices)
    if isinstance(domain, Choice):
        others = _neighbours(domain.values, value)
        return others[rng.integers(len(others))] if others else value
    if not is_number(value):  # such as None: a random value of the interval
        return _drawn(parameter, domain, rng.random())
    size = math.copysign(min(abs(size), 1.0), size)  # no step is longer than the interval
    for step in (size, -size):  # in the other direction if there is no value in this one
        moved = _stepped(parameter, domain, value, step)
        moved = moved if bounds is None else _nearest_in(bounds, moved)
        if moved != value and space.accepts(parameter, moved):
            return moved
    return value


def _neighbours(choices: Sequence[Any], value: Any) -> list[Any]:
    """The next smaller and the next larger number; all other choices if they have no order."""
    others = [choice for choice in choices if type(choice) is not type(value) or choice != value]
    if not is_number(value) or not all(map(is_number, choices)):
        return others
    below = [choice for choice in others if choice < value]
    above = [choice for choice in others if choice > value]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _stepped(parameter: Parameter, domain: Range, value: float, size: float) -> float:
    """The value after a step of `size` times the interval; a discrete value moves by at least one step of its grid."""
    if domain.high == domain.low:
        return value
    width = domain.high - domain.low
    # On a log scale 0 means "switched off", and stays 0.
    moved = value * (domain.high / domain.low) ** size if domain.log else value + size * width
    if not _is_discrete(parameter):
        return rounded(moved)
    grid = domain.step or 1
    steps = max(1, round(abs(moved - value) / grid))
    moved = value + math.copysign(steps * grid, size)
    return _cleaned(moved) if parameter.is_float else round(moved)


def _drawn(parameter: Parameter, domain: Range, share: float) -> float:
    """The value at this share of the way from the low end of the interval to the high one."""
    width = domain.high - domain.low
    value = domain.low * (domain.high / domain.low) ** share if domain.log else domain.low + width * share
    return rounded(value) if parameter.is_float else round(value)


def rounded(value: float) -> float:
    """The number with four digits, which are easy to read."""
    return float(f"{value:.4g}")


def _cleaned(value: float) -> float:
    """The number without the rounding errors of sums of steps."""
    return float(f"{value:.12g}")


# --------------------------------------------------------------------------------------------------------- repairs


def _nearest_in(bounds: BaseDistribution, value: Any) -> Any:
    """The value of the distribution that is nearest; the first choice if they have no order."""
    if isinstance(bounds, CategoricalDistribution):
        if contains(bounds, value):
            return value
        numbers = [choice for choice in bounds.choices if is_number(choice)]
        return _nearest(numbers, value) if numbers and is_number(value) else bounds.choices[0]
    assert isinstance(bounds, IntDistribution | FloatDistribution)
    low, high, step = bounds.low, bounds.high, bounds.step
    value = min(max(value, low), high) if is_number(value) else low
    if not step:
        return float(value)
    value = low + round((value - low) / step) * step
    return value if isinstance(bounds, IntDistribution) else min(_cleaned(value), high)


def _repaired(parameter: Parameter, value: Any, values: Config) -> Any:
    """The nearest value that fits those before it in the section; it may lie outside the domain."""

    def other(key: str) -> Any:
        return values.get(key, parameter.defaults.get(key))

    if not is_number(value):
        return value
    target: Any = None if parameter.divides is None else other(parameter.divides)
    if is_number(target) and (not value or target % value):
        choices = parameter.domain.values if isinstance(parameter.domain, Choice) else ()
        return _nearest([choice for choice in choices if choice and target % choice == 0] or _divisors(target), value)
    return min(value, math.prod(map(other, parameter.upto))) if parameter.upto else value


def _nearest(candidates: Iterable[Any], value: float) -> Any:
    """The nearest candidate, by ratio if both numbers are positive; the smaller of two equally near ones."""

    def distance(candidate: float) -> tuple[float, float]:
        if candidate > 0 and value > 0:
            return abs(math.log(candidate / value)), candidate
        return abs(candidate - value), candidate

    return min(candidates, key=distance)


def _divisors(number: int) -> list[int]:
    """All divisors in ascending order.

    >>> _divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
