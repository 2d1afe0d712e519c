"""What a study may try: the annotations of constructors, narrowed by a file and by fixed values.

A search space is walked in one order (model type, then every section by its dependencies), so that no value is asked
for that cannot go with those before it. `pick(name, distribution)` gives the values: a sampler's, or those of a config.
"""

from __future__ import annotations

import graphlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from research_eval.annotations import Choice, Divides, Range, When
from research_eval.errors import ConfigError
from research_eval.registry import MODELS_MAP
from research_eval.schema import (
    MODEL_PROVIDED,
    ExperimentConfig,
    dataset_model,
    fields_of,
    load_json,
    signature_model,
    spellings_of,
)
from research_eval.wording import hint

SECTIONS = ("dataset_params", "model_params", "optimizer_params", "scheduler_params", "training_params")
TOP_LEVEL = ("batch_size",)
MODEL_TYPE = "model_type"
GRID_POINTS = 3  # of an interval that names no step

Pick = Callable[[str, BaseDistribution], Any]
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One searched value of a config, `config[section][key]` (section "" is the top level).

    `defaults` holds what the other parameters of the section are where nothing else says so.
    """

    name: str
    section: str
    key: str
    domain: Choice | Range
    is_float: bool
    divides: str | None
    upto: tuple[str, ...]
    conditions: tuple[When, ...]
    defaults: dict[str, Any] = field(compare=False)

    def applies(self, values: Values) -> bool:
        """Whether the values of the section before this one call for it."""
        return all(self._other(when.name, values) in when.values for when in self.conditions)

    def distribution(self, values: Values) -> tuple[str, BaseDistribution]:
        """The name and the values that can go with those of the section chosen before.

        Raises Infeasible where there are none. Optuna allows no categorical distribution to change: one that is
        narrowed by the values before it goes by a name of its own.
        """
        target: Any = None if self.divides is None else self._other(self.divides, values)
        most = math.prod(self._other(name, values) for name in self.upto) if self.upto else math.inf
        domain = self.domain
        if isinstance(domain, Range) and target is None:
            return self.name, self._interval(domain, most)
        if isinstance(domain, Range):
            listed: Sequence[Any] = range(int(domain.low), int(min(domain.high, target)) + 1, int(domain.step or 1))
        else:
            listed = domain.values
        possible = tuple(value for value in listed if _goes_with(value, target, most))
        if not possible:
            raise self._infeasible(target, most)
        narrowed = isinstance(domain, Range) or len(possible) < len(listed)
        name = f"{self.name} of {', '.join(map(json.dumps, possible))}" if narrowed else self.name
        return name, CategoricalDistribution(possible)

    def _interval(self, domain: Range, most: float) -> BaseDistribution:
        high = min(domain.high, most)
        if high < domain.low:
            raise self._infeasible(None, most)
        if not self.is_float:
            low, step = int(domain.low), int(domain.step or 1)
            return IntDistribution(low, int(high) - (int(high) - low) % step, domain.log, step)
        if domain.step is not None:
            high = domain.low + math.floor((high - domain.low) / domain.step + 1e-9) * domain.step
        return FloatDistribution(float(domain.low), float(high), log=domain.log, step=domain.step)

    def _infeasible(self, target: Any, most: float) -> Infeasible:
        limits = [] if target is None else [f"divides {self.divides}={target}"]
        limits += [f"is at most {' * '.join(self.upto)}={most:g}"] if self.upto else []
        return Infeasible(f"no value of {self.name} {' and '.join(limits)}")

    def _other(self, key: str, values: Values) -> Any:
        return values.get(key, self.defaults.get(key))

    def needs(self) -> set[str]:
        """The parameters of the section that have to be chosen before."""
        return {*self.upto, *(when.name for when in self.conditions), *([self.divides] if self.divides else [])}

    def __str__(self) -> str:
        if isinstance(self.domain, Choice):
            text = f"one of {', '.join(map(json.dumps, self.domain.values))}"
        else:
            text = f"{self.domain.low:g} to {self.domain.high:g}"
            text += f" in steps of {self.domain.step:g}" if self.domain.step else ""
            text += ", log scale" if self.domain.log else ""
        text += f", at most {' * '.join(self.upto)}" if self.upto else ""
        text += f", divides {self.divides}" if self.divides else ""
        for when in self.conditions:
            text += f", if {when.name} is {' or '.join(map(json.dumps, when.values))}"
        return text


def _goes_with(value: Any, target: Any, most: float) -> bool:
    """Whether it divides the target, where there is one, and is not above the bound."""
    if target is not None and (not value or target % value):
        return False
    return not isinstance(value, int | float) or value <= most


class Infeasible(Exception):
    """The values chosen so far leave none for another parameter."""


@dataclass(frozen=True)
class SearchSpace:
    """The configs of a study. `base` is a config with what is fixed; `fixed` the model parameters fixed per type."""

    base: dict[str, Any]
    fixed: dict[str, dict[str, Any]]
    parameters: dict[str, tuple[Parameter, ...]]  # per model type, in the order of the walk

    @property
    def model_types(self) -> tuple[str, ...]:
        return tuple(self.parameters)

    def sample(self, pick: Pick) -> dict[str, Any]:
        """A config (not checked yet) with the values that `pick` gives. Raises Infeasible."""
        types = self.model_types
        model_type = pick(MODEL_TYPE, CategoricalDistribution(types)) if len(types) > 1 else types[0]
        config: dict[str, Any] = json.loads(json.dumps(self.base)) | {MODEL_TYPE: model_type}
        config["model_params"] = {**config.get("model_params", {}), **self.fixed[model_type]}
        for parameter in self.parameters[model_type]:
            values = config.setdefault(parameter.section, {}) if parameter.section else config
            if parameter.applies(values):
                values[parameter.key] = pick(*parameter.distribution(values))
        return config

    def locate(self, config: Values) -> tuple[dict[str, Any], dict[str, BaseDistribution]] | None:
        """The values with which `sample` would give this complete config, and their distributions.

        None where a value lies outside. What is not searched is for the caller to compare.
        """
        if config[MODEL_TYPE] not in self.parameters:
            return None
        places = {parameter.name: parameter for parameter in self.parameters[config[MODEL_TYPE]]}
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}

        def pick(name: str, distribution: BaseDistribution) -> Any:
            parameter = places.get(name.partition(" of ")[0])
            if parameter is None:
                value = config[MODEL_TYPE]
            else:
                value = (config.get(parameter.section, {}) if parameter.section else config).get(parameter.key)
            if not contains(distribution, value):
                raise Infeasible(f"{name}={value!r}")
            params[name], distributions[name] = value, distribution
            return value

        try:
            self.sample(pick)
        except Infeasible:
            return None
        return params, distributions

    def grid(self) -> Iterator[dict[str, Any]]:
        """The values of every config of a grid: all choices and whole numbers, a few points of an interval."""
        waiting: list[list[Any]] = [[]]
        while waiting:
            chosen = waiting.pop()
            params, options = self._follow(chosen)
            if options is not None:
                waiting.extend([*chosen, option] for option in reversed(options))
            elif params is not None:
                yield params

    def _follow(self, chosen: list[Any]) -> tuple[dict[str, Any] | None, list[Any] | None]:
        """The walk along the values chosen: (all values, None) at its end, (None, the options) where one is missing.

        (None, None) where the walk cannot go on.
        """
        params: dict[str, Any] = {}

        def pick(name: str, distribution: BaseDistribution) -> Any:
            if len(params) == len(chosen):
                raise _Missing(grid_values(distribution))
            params[name] = chosen[len(params)]
            return params[name]

        try:
            self.sample(pick)
        except _Missing as missing:
            return None, missing.options
        except Infeasible:
            return None, None
        return params, None

    def describe(self) -> str:
        """A line per model type and searched parameter."""
        lines = []
        shared = set.intersection(*({p.name for p in parameters} for parameters in self.parameters.values()))
        for model_type, parameters in self.parameters.items():
            own = [parameter for parameter in parameters if parameter.name not in shared]
            lines += [f"{model_type}: {len(own)} searched", *(f"  {p.name}: {p}" for p in own)]
        first = next(iter(self.parameters.values()))
        common = [parameter for parameter in first if parameter.name in shared]
        return "\n".join([*lines, f"for all: {len(common)} searched", *(f"  {p.name}: {p}" for p in common)])


class _Missing(Exception):
    """The walk has come to a value that is not chosen yet."""

    def __init__(self, options: list[Any]) -> None:
        super().__init__()
        self.options = options


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a sampler could have given the value."""
    if isinstance(distribution, CategoricalDistribution):
        return any(type(value) is type(choice) and value == choice for choice in distribution.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if isinstance(distribution, IntDistribution) and value != int(value):
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return bool(distribution.low <= value <= distribution.high and abs(steps - round(steps)) < 1e-8)


def known_values(params: Mapping[str, Any]) -> Pick:
    """For `SearchSpace.sample`: the values of a config that is known."""
    return lambda name, _distribution: params[name]


def random_pick(rng: np.random.Generator) -> Pick:
    """Draws for `SearchSpace.sample`: uniform, on a log scale where the distribution has one."""

    def pick(_name: str, distribution: BaseDistribution) -> Any:
        if isinstance(distribution, CategoricalDistribution):
            return distribution.choices[rng.integers(len(distribution.choices))]
        assert isinstance(distribution, IntDistribution | FloatDistribution)
        low, high, step = distribution.low, distribution.high, distribution.step
        if distribution.log:
            value = math.exp(rng.uniform(math.log(low), math.log(high)))
            return round(value) if isinstance(distribution, IntDistribution) else min(max(value, low), high)
        if step:
            return low + step * int(rng.integers(round((high - low) / step), endpoint=True))
        return float(rng.uniform(low, high))

    return pick


def grid_values(distribution: BaseDistribution) -> list[Any]:
    """All values of a finite distribution, else its ends and what lies between at equal distances (of logarithms)."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.step and not distribution.log:
        count = round((high - low) / distribution.step) + 1
        return list(dict.fromkeys(min(low + index * distribution.step, high) for index in range(count)))
    shares = [index / (GRID_POINTS - 1) for index in range(GRID_POINTS)]
    if distribution.log:
        points = [low * (high / low) ** share for share in shares[:-1]] + [high]
    else:
        points = [low + (high - low) * share for share in shares[:-1]] + [high]
    if isinstance(distribution, IntDistribution):
        points = [round(point) for point in points]
    return list(dict.fromkeys(points))


# ------------------------------------------------------------------------------------------------- building a space


def build_space(model_types: Iterable[str], base: Mapping[str, Any], narrowing: Mapping[str, Any]) -> SearchSpace:
    """The space of these model types.

    `base` is a config whose values are fixed (dataset_type, dataset_name, epochs and so on). `narrowing` has the form
    of a config in which a plain value fixes a parameter, a list gives choices and {"low", "high", "log", "step"} a
    range; in `model_params` the name of a model type opens a section for that type alone. Raises ConfigError.
    """
    types = list(dict.fromkeys(model_types))
    classes = {model_type: MODELS_MAP.get_or_explain(model_type) for model_type in types}
    reader = _Narrowing(narrowing, types)
    config: dict[str, Any] = json.loads(json.dumps(dict(base)))
    shared: list[Parameter] = []
    sections: dict[str, type[BaseModel]] = {
        "": ExperimentConfig,
        "dataset_params": dataset_model(base["dataset_type"], base["dataset_name"]),
    }
    sections |= {name: _section_model(name) for name in SECTIONS[2:]}
    for section, model in sections.items():
        fixed = config if not section else config.setdefault(section, {})
        shared += _parameters(section, section, model, reader.section(section, model), fixed)
    fixed_params: dict[str, dict[str, Any]] = {}
    parameters: dict[str, tuple[Parameter, ...]] = {}
    for model_type, cls in classes.items():
        model = signature_model(cls, MODEL_PROVIDED)
        fixed_params[model_type] = dict(config.get("model_params", {}))
        own = _parameters("model_params", model_type, model, reader.model(model_type, model), fixed_params[model_type])
        parameters[model_type] = (*own, *shared)
    reader.check_used()
    return SearchSpace(config, fixed_params, parameters)


def read_search_space(path: str | Path) -> dict[str, Any]:
    """The content of a search space file. Raises ConfigError for what is no JSON object."""
    content = load_json(path)
    content.pop("$schema", None)
    return content


def _section_model(name: str) -> type[BaseModel]:
    model = ExperimentConfig.model_fields[name].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model


def _parameters(
    section: str, prefix: str, model: type[BaseModel], narrowed: dict[str, Any], fixed: dict[str, Any]
) -> list[Parameter]:
    """The searched parameters of a section in an order that respects their rules; fixed values go into `fixed`."""
    fields = fields_of(model)
    domains: dict[str, Choice | Range] = {}
    for key, info in fields.items():
        if key in fixed:  # by a flag, which goes before annotations and files
            continue
        domain = narrowed.get(key, next((word for word in info.metadata if isinstance(word, Choice | Range)), None))
        if key in narrowed and not isinstance(domain, Choice | Range):
            fixed[key] = domain
        elif isinstance(domain, Choice | Range):
            domains[key] = domain
    defaults = {key: info.default for key, info in fields.items() if not info.is_required()} | fixed
    found: dict[str, Parameter] = {}
    for key, domain in domains.items():
        words = fields[key].metadata
        found[key] = Parameter(
            name=f"{prefix}.{key}" if prefix else key,
            section=section,
            key=key,
            domain=domain,
            is_float=_takes(fields[key], 0.5),
            divides=next((word.name for word in words if isinstance(word, Divides)), None),
            upto=next((word.upto for word in words if isinstance(word, Range)), ()),
            conditions=tuple(word for word in words if isinstance(word, When)),
            defaults=defaults,
        )
    for key, parameter in list(found.items()):  # without those whose condition is settled, and not met
        if any(when.name not in found and defaults.get(when.name) not in when.values for when in parameter.conditions):
            del found[key]
    order = graphlib.TopologicalSorter(
        {key: sorted(parameter.needs() & set(found)) for key, parameter in found.items()}
    )
    return [found[key] for key in order.static_order()]


def _type_of(info: FieldInfo) -> Any:
    return info.annotation


def _takes(info: FieldInfo, value: Any) -> bool:
    """Whether the type of a parameter, its bounds aside, takes the value."""
    try:
        TypeAdapter(_type_of(info)).validate_python(value, strict=True)
    except ValidationError as error:
        return not any(detail["type"] in ("int_type", "int_from_float", "string_type") for detail in error.errors())
    return True


class _Narrowing:
    """Reads a narrowing, value by value, and knows what nobody has asked for."""

    def __init__(self, narrowing: Mapping[str, Any], model_types: list[str]) -> None:
        known = [*TOP_LEVEL, *SECTIONS]
        for name, value in narrowing.items():
            if name not in known:
                raise ConfigError(f"--search_space: unknown key {name!r}.{hint(name, known)}")
            if name in SECTIONS and not isinstance(value, dict):
                raise ConfigError(f"--search_space: {name}: expected an object, got {json.dumps(value)}")
        self._values = narrowing
        self._types = model_types
        self._used: set[str] = set()

    def section(self, section: str, model: type[BaseModel]) -> dict[str, Any]:
        """The narrowed values of a section that all model types share, under canonical names."""
        given = (
            self._values.get(section, {})
            if section
            else {key: self._values[key] for key in TOP_LEVEL if key in self._values}
        )
        spellings = spellings_of(model)
        for key in given:
            if key not in spellings:
                raise ConfigError(f"--search_space: {section}: unknown key {key!r}.{hint(key, spellings)}")
        return self._read(section, given, model)

    def model(self, model_type: str, model: type[BaseModel]) -> dict[str, Any]:
        """The narrowed values for one model type: those for all that it knows, and its own."""
        given = self._values.get("model_params", {})
        spellings = spellings_of(model)
        common = {key: value for key, value in given.items() if key in spellings and key not in MODELS_MAP}
        self._used |= set(common)
        own = given.get(model_type, {})
        if not isinstance(own, dict):
            raise ConfigError(f"--search_space: model_params.{model_type}: expected an object, got {json.dumps(own)}")
        for key in own:
            if key not in spellings:
                raise ConfigError(
                    f"--search_space: model_params.{model_type}: unknown key {key!r}.{hint(key, spellings)}"
                )
        return self._read("model_params", common, model) | self._read(f"model_params.{model_type}", own, model)

    def check_used(self) -> None:
        """Raise ConfigError for a model parameter that no model type of the study has."""
        for key in self._values.get("model_params", {}):
            if key in MODELS_MAP and key not in self._types:
                raise ConfigError(
                    f"--search_space: model_params.{key}: not among --model_types {','.join(self._types)}"
                )
            if key not in MODELS_MAP and key not in self._used:
                raise ConfigError(
                    f"--search_space: model_params: unknown key {key!r}: no parameter of {', '.join(self._types)}. "
                    "For one model type alone, write it into an object under the type's name."
                )

    def _read(self, place: str, given: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
        spellings, fields = spellings_of(model), fields_of(model)
        return {
            spellings[key]: _domain(f"{place}.{key}".lstrip("."), value, fields[spellings[key]])
            for key, value in given.items()
        }


def _domain(place: str, value: Any, info: FieldInfo) -> Any:
    """A Choice, a Range, or the one value that is fixed. Raises ConfigError for values that the parameter refuses."""
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"--search_space: {place}: an empty list leaves no value. Give at least one.")
        return Choice(*dict.fromkeys(_checked(place, item, info) for item in value))
    if isinstance(value, dict):
        unknown = set(value) - {"low", "high", "log", "step"}
        if unknown or not {"low", "high"} <= set(value):
            raise ConfigError(
                f"--search_space: {place}: a range has the keys low, high and perhaps log and step, "
                f"got {json.dumps(value)}"
            )
        return _range(place, value, info)
    return _checked(place, value, info)


def _range(place: str, value: dict[str, Any], info: FieldInfo) -> Range:
    low, high = (_checked(place, value[end], info) for end in ("low", "high"))
    log, step = value.get("log", False), value.get("step")
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or low > high or not isinstance(log, bool):
        raise ConfigError(f"--search_space: {place}: expected numbers low <= high, got {json.dumps(value)}")
    if log and (low <= 0 or step is not None):
        raise ConfigError(f"--search_space: {place}: a log scale needs low > 0 and no step, got {json.dumps(value)}")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int | float) or step <= 0):
        raise ConfigError(f"--search_space: {place}: step has to be a positive number, got {json.dumps(step)}")
    if step is not None and not _takes(info, 0.5) and step != int(step):
        raise ConfigError(f"--search_space: {place}: step has to be a whole number, got {json.dumps(step)}")
    return Range(low, high, log=log, step=step)


def _checked(place: str, value: Any, info: FieldInfo) -> Any:
    kind = _type_of(info)
    adapter = TypeAdapter(Annotated[kind, *info.metadata] if info.metadata else kind)
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        reasons = " or ".join(dict.fromkeys(detail["msg"].lower() for detail in error.errors()))
        raise ConfigError(f"--search_space: {place}: {reasons}, got {json.dumps(value)}") from error
