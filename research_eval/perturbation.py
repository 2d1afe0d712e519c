"""Steps away from a config inside its search space, repaired where the values changed no longer go together."""

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
from research_eval.registry import MODELS_MAP
from research_eval.schema import MODEL_PROVIDED, ExperimentConfig, fields_of, signature_model, spellings_of
from research_eval.search_space import SECTIONS, TOP_LEVEL, Parameter, SearchSpace, build_space, contains

MOVES_PER_MAGNITUDE = 3.0  # a discrete value moves with this probability times the magnitude: 30% at 0.1

Config = dict[str, Any]


# -------------------------------------------------------------------------------------- the space around a config


@dataclass(frozen=True)
class Space:
    """The parameters that may change around a config.

    `narrowed` names those that the user has given values for: a variation keeps to these. Where only an annotation
    says what a study searches, a good config may lie outside, and the type of the parameter is the only bound.
    """

    search: SearchSpace
    narrowed: frozenset[str]
    adapters: dict[str, TypeAdapter[Any]]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        (parameters,) = self.search.parameters.values()
        return parameters

    def start(self, config: Config) -> Config:
        """The config with what the user has fixed."""
        changed: Config = json.loads(json.dumps(config))
        (fixed,) = self.search.fixed.values()
        for section in SECTIONS:
            changed[section] |= self.search.base[section]
        changed["model_params"] |= fixed
        return changed | {key: self.search.base[key] for key in TOP_LEVEL if key in self.search.base}

    def accepts(self, parameter: Parameter, value: Any) -> bool:
        """Whether the parameter's type and bounds do."""
        try:
            self.adapters[parameter.name].validate_json(json.dumps(value), strict=True)
        except ValidationError:
            return False
        return True


def space_around(config: ExperimentConfig, narrowing: Mapping[str, Any]) -> Space:
    """What an annotation or the narrowing gives values for is searched, everything else is as in the config.

    `narrowing` as in `build_space`. Raises ConfigError for one that does not fit.
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
    for (section, key), value in dropped.items():  # what nothing calls for is neither searched nor lost
        if (section, key) not in searched:
            fixed = search.base[section] if section else search.base
            (search.fixed[config.model_type] if section == "model_params" else fixed).setdefault(key, value)
    adapters = {parameter.name: _adapter(infos[parameter.name]) for parameter in parameters}
    return Space(search, frozenset(narrowed), adapters)


def widened(space: Space, configs: Iterable[Config]) -> Space:
    """The space with the values of these complete configs in it, as far as the user has not narrowed it.

    Runs are made with other values than those that a study tries, and with defaults that none does, such as null.
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
    known = {json.dumps(value): value for value in [*domain.values, *seen]}
    numbers = sorted(value for value in known.values() if is_number(value))
    return Choice(*numbers, *(value for value in known.values() if not is_number(value)))


def _with_numbers(domain: Range, seen: Iterable[Any]) -> Range:
    numbers = [value for value in seen if is_number(value) and (value > 0 or not domain.log)]
    if domain.step is not None:
        return domain
    low, high = min([domain.low, *numbers]), max([domain.high, *numbers])
    return Range(low, high, log=domain.log)


def _models(config: ExperimentConfig) -> dict[str, type[BaseModel]]:
    """The sections whose values may change."""
    own = signature_model(MODELS_MAP.get_or_explain(config.model_type), MODEL_PROVIDED)
    sections = {name: type(getattr(config, name)) for name in SECTIONS[2:]}
    return {"": ExperimentConfig, "model_params": own, **sections}


def _given(narrowing: Mapping[str, Any], section: str, model_type: str, model: type[BaseModel]) -> Iterator[str]:
    """The canonical names of the parameters that the narrowing has values for; `build_space` checks them."""
    values = narrowing.get(section, {}) if section else {key: None for key in TOP_LEVEL if key in narrowing}
    values = values if isinstance(values, dict) else {}
    own = values.get(model_type) if section == "model_params" else None
    spellings = spellings_of(model)
    for key in [*values, *(own if isinstance(own, dict) else ())]:
        if key in spellings:
            yield spellings[key]


def _adapter(info: FieldInfo) -> TypeAdapter[Any]:
    kind: Any = info.annotation
    return TypeAdapter(Annotated[kind, *info.metadata] if info.metadata else kind)


# ---------------------------------------------------------------------------------------------------------- steps


def perturbed(config: Config, space: Space, magnitude: float, rng: np.random.Generator) -> Config:
    """A variation of a complete config, not checked yet. Raises Infeasible.

    A real number takes a normal step with a deviation of `magnitude` times its interval, on a log scale where the
    interval has one. A whole number takes such a step of at least 1, and a choice goes to a neighbouring one, with a
    probability of `MOVES_PER_MAGNITUDE` times `magnitude`. One parameter moves in any case. A value that does not go
    with those changed before it becomes the nearest that does; one whose condition is no longer met its default.
    """
    changed = space.start(config)
    movable = [parameter for parameter in space.parameters if parameter.applies(values_of(config, parameter))]
    forced = movable[rng.integers(len(movable))] if movable else None
    for parameter in space.parameters:
        values = values_of(changed, parameter)
        if not parameter.applies(values):
            if parameter in movable:
                values.pop(parameter.key, None)
            continue
        bounds = parameter.distribution(values)[1] if parameter.name in space.narrowed else None
        value = values.get(parameter.key, parameter.defaults.get(parameter.key))
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
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_discrete(parameter: Parameter) -> bool:
    return isinstance(parameter.domain, Choice) or not parameter.is_float or parameter.domain.step is not None


def _moved(
    parameter: Parameter,
    value: Any,
    size: float,
    space: Space,
    bounds: BaseDistribution | None,
    rng: np.random.Generator,
) -> Any:
    """Another value where there is one. `size` is a share of the interval."""
    domain = parameter.domain
    if isinstance(bounds, CategoricalDistribution):
        domain = Choice(*bounds.choices)
    if isinstance(domain, Choice):
        others = _neighbours(domain.values, value)
        return others[rng.integers(len(others))] if others else value
    if not is_number(value):  # such as None: the way into the interval
        return _drawn(parameter, domain, rng.random())
    size = math.copysign(min(abs(size), 1.0), size)  # no step is longer than the interval
    for step in (size, -size):  # where there is no way on, the other way
        moved = _stepped(parameter, domain, value, step)
        moved = moved if bounds is None else _nearest_in(bounds, moved)
        if moved != value and space.accepts(parameter, moved):
            return moved
    return value


def _neighbours(choices: Sequence[Any], value: Any) -> list[Any]:
    """The next smaller and the next larger number; of what has no order all others."""
    others = [choice for choice in choices if type(choice) is not type(value) or choice != value]
    if not is_number(value) or not all(map(is_number, choices)):
        return others
    below = [choice for choice in others if choice < value]
    above = [choice for choice in others if choice > value]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _stepped(parameter: Parameter, domain: Range, value: float, size: float) -> float:
    if domain.high == domain.low:
        return value
    width = domain.high - domain.low
    # On a log scale 0 is off, and stays off.
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
    """Four digits, for the reader of the file."""
    return float(f"{value:.4g}")


def _cleaned(value: float) -> float:
    """Without the last digits that sums of steps leave."""
    return float(f"{value:.12g}")


# --------------------------------------------------------------------------------------------------------- repairs


def _nearest_in(bounds: BaseDistribution, value: Any) -> Any:
    """The value of the distribution that is nearest; of what has no order the first."""
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
    """The nearest value that goes with those of the section before it, inside the domain or not."""

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
    """By ratio where it can be; of two equally near the smaller."""

    def distance(candidate: float) -> tuple[float, float]:
        if candidate > 0 and value > 0:
            return abs(math.log(candidate / value)), candidate
        return abs(candidate - value), candidate

    return min(candidates, key=distance)


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
