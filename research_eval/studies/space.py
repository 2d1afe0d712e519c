"""What a study may try: the annotations of constructors, narrowed by a file and by fixed values.

A search space is walked in one order: first the model type, then the parameters of every section, each after those that
it depends on. Each value is therefore drawn from the values that fit the values before it.

An example with two parameters of a model, `embed_dim: Choice(32, 64)` and `num_heads: Divides("embed_dim")` with
`Choice(1, 2, 64)`: the walk asks for `embed_dim` first. If the answer is 32, it asks for `num_heads` with the choices 1
and 2, because 64 does not divide 32.

The same walk serves all purposes; only the answers differ. A sampler answers with draws (`proposals`), a stored config
with its own values (`locate`), and a grid with every combination in turn (`grid`).
"""

from __future__ import annotations

import graphlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from research_eval.annotations import Choice, Divides, Range, When
from research_eval.config.defaults import defaults_of_kind
from research_eval.config.jsonc import load_json
from research_eval.config.sections import ExperimentConfig
from research_eval.config.signatures import MODEL_PROVIDED, dataset_model, fields_of, signature_model, spellings_of
from research_eval.datasets.kinds import dataset_kind, task_name
from research_eval.errors import ConfigError
from research_eval.registry import MODEL_TYPE, MODELS_MAP, models_for
from research_eval.studies.distributions import Infeasible, Pick, contains, grid_values
from research_eval.studies.names import narrowed_name, plain_name
from research_eval.wording import hint

# The sections of a config that hold arguments of constructors. A walk visits the model's first.
SECTIONS = ("dataset_params", "model_params", "optimizer_params", "scheduler_params", "training_params")
TOP_LEVEL = ("batch_size",)  # searched values that lie in no section

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One searched value of a config: `config[section][key]`, or `config[key]` if the section is "".

    `divides`, `upto` and `conditions` are its rules (see `annotations`); each names other parameters of the section.
    `defaults` has the values of those that a config does not mention.
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
        """Whether the values chosen before in the section satisfy the conditions of this parameter."""
        return all(self._other(when.name, values) in when.values for when in self.conditions)

    def distribution(self, values: Values) -> tuple[str, BaseDistribution]:
        """The stored name of the parameter, and the values of it that fit those chosen before in the section.

        Raises Infeasible if there are none. A parameter with narrowed choices has a name of its own (see `names`).
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
        return narrowed_name(self.name, possible) if narrowed else self.name, CategoricalDistribution(possible)

    def _interval(self, domain: Range, most: float) -> BaseDistribution:
        """The range with `most` as an additional upper bound. Optuna wants an upper end that the steps reach."""
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
        """The exception that names the rules which leave no value."""
        limits = [] if target is None else [f"divides {self.divides}={target}"]
        limits += [f"is at most {' * '.join(self.upto)}={most:g}"] if self.upto else []
        return Infeasible(f"no value of {self.name} {' and '.join(limits)}")

    def _other(self, key: str, values: Values) -> Any:
        """The value of another parameter of the section."""
        return values.get(key, self.defaults.get(key))

    def needs(self) -> set[str]:
        """The parameters of the section that have to be chosen before this one."""
        return {*self.upto, *(when.name for when in self.conditions), *([self.divides] if self.divides else [])}

    def __str__(self) -> str:
        """The domain and the rules in words, as `goe tune --dry_run` and docs/studies.md show them."""
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
    """Whether the value divides the target (if there is one) and is at most `most`."""
    if target is not None and (not value or target % value):
        return False
    return not isinstance(value, int | float) or value <= most


@dataclass(frozen=True)
class SearchSpace:
    """All configs that a study may try.

    `base` is a config with the fixed values; `fixed` has the fixed model parameters of each model type.
    """

    base: dict[str, Any]
    fixed: dict[str, dict[str, Any]]
    parameters: dict[str, tuple[Parameter, ...]]  # per model type, in the order of the walk

    @property
    def model_types(self) -> tuple[str, ...]:
        """The model types of the study, in the order of the flag."""
        return tuple(self.parameters)

    def sample(self, pick: Pick) -> dict[str, Any]:
        """A config with the values that `pick` returns. It is not checked yet. Raises Infeasible."""
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
        """The values with which `sample` would return this complete config, and their distributions.

        None if a searched value lies outside the space. The caller compares the values that are not searched.
        """
        if config[MODEL_TYPE] not in self.parameters:
            return None
        places = {parameter.name: parameter for parameter in self.parameters[config[MODEL_TYPE]]}
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}

        def pick(name: str, distribution: BaseDistribution) -> Any:
            parameter = places.get(plain_name(name))
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
        """The values of every config of a grid: all choices and all steps, a few points of an interval.

        The walk is repeated from its start for every prefix of values, because the values decide what comes next.
        """
        waiting: list[list[Any]] = [[]]
        while waiting:
            chosen = waiting.pop()
            params, options = self._follow(chosen)
            if options is not None:
                waiting.extend([*chosen, option] for option in reversed(options))
            elif params is not None:
                yield params

    def _follow(self, chosen: list[Any]) -> tuple[dict[str, Any] | None, list[Any] | None]:
        """Walk along the chosen values.

        Returns (all values, None) at the end of the walk, (None, options) at the first value that is not chosen yet,
        and (None, None) if the chosen values leave none for the next parameter.
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
        """A text with a line for each model type and for each searched parameter."""
        lines = []
        shared = set.intersection(*({p.name for p in parameters} for parameters in self.parameters.values()))
        for model_type, parameters in self.parameters.items():
            own = [parameter for parameter in parameters if parameter.name not in shared]
            lines += [f"{model_type}: {len(own)} searched", *(f"  {p.name}: {p}" for p in own)]
        first = next(iter(self.parameters.values()))
        common = [parameter for parameter in first if parameter.name in shared]
        return "\n".join([*lines, f"for all: {len(common)} searched", *(f"  {p.name}: {p}" for p in common)])


class _Missing(Exception):
    """The walk has reached a parameter whose value is not chosen yet."""

    def __init__(self, options: list[Any]) -> None:
        super().__init__()
        self.options = options


# ------------------------------------------------------------------------------------------------- building a space


def build_space(model_types: Iterable[str], base: Mapping[str, Any], narrowing: Mapping[str, Any]) -> SearchSpace:
    """The space of these model types.

    `base` is a config whose values are fixed (dataset_type, dataset_name, epochs and so on). `narrowing` has the form
    of a config. In it a plain value fixes a parameter, a list names the choices, and an object with the keys "low",
    "high", "log" and "step" is a range. In `model_params`, an object under the name of a model type is for that type
    alone. Raises ConfigError.
    """
    types = list(dict.fromkeys(model_types))
    classes = {model_type: models_for(task_name(base)).get_or_explain(model_type) for model_type in types}
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
        usual = dataset_kind(base["dataset_type"]).search_space.get(section, {})
        shared += _parameters(section, section, model, {**usual, **reader.section(section, model)}, fixed)
    fixed_params: dict[str, dict[str, Any]] = {}
    parameters: dict[str, tuple[Parameter, ...]] = {}
    for model_type, cls in classes.items():
        model = signature_model(cls, MODEL_PROVIDED)
        fixed_params[model_type] = dict(config.get("model_params", {}))
        own = _parameters("model_params", model_type, model, reader.model(model_type, model), fixed_params[model_type])
        usual = defaults_of_kind({**config, MODEL_TYPE: model_type}, "model_params")
        not_searched = usual.keys() - {parameter.key for parameter in own}
        fixed_params[model_type] = {name: usual[name] for name in not_searched} | fixed_params[model_type]
        parameters[model_type] = (*own, *shared)
    reader.check_used()
    return SearchSpace(config, fixed_params, parameters)


def read_search_space(path: str | Path) -> dict[str, Any]:
    """The content of a search space file. Raises ConfigError if it is no JSON object."""
    content = load_json(path)
    content.pop("$schema", None)
    return content


def _section_model(name: str) -> type[BaseModel]:
    """The pydantic model of a section of the config."""
    model = ExperimentConfig.model_fields[name].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model


def _parameters(
    section: str, prefix: str, model: type[BaseModel], narrowed: dict[str, Any], fixed: dict[str, Any]
) -> list[Parameter]:
    """The searched parameters of a section, each after those that its rules name.

    `narrowed` has domains and values from the user; this function moves the values into `fixed`.
    """
    fields = fields_of(model)
    domains: dict[str, Choice | Range] = {}
    for key, info in fields.items():
        if key in fixed:  # a flag has fixed it; flags come before files and annotations
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
    for key, parameter in list(found.items()):  # remove those whose condition can never be met
        if any(when.name not in found and defaults.get(when.name) not in when.values for when in parameter.conditions):
            del found[key]
    order = graphlib.TopologicalSorter(
        {key: sorted(parameter.needs() & set(found)) for key, parameter in found.items()}
    )
    return [found[key] for key in order.static_order()]


def _type_of(info: FieldInfo) -> Any:
    """The type of a parameter, without its bounds."""
    return info.annotation


def _takes(info: FieldInfo, value: Any) -> bool:
    """Whether the type of a parameter accepts the value, apart from its bounds."""
    try:
        TypeAdapter(_type_of(info)).validate_python(value, strict=True)
    except ValidationError as error:
        return not any(detail["type"] in ("int_type", "int_from_float", "string_type") for detail in error.errors())
    return True


class _Narrowing:
    """Reads a narrowing section by section, and knows which of its keys no section has used."""

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
        """The domains and values for a section that all model types share, under canonical names."""
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
        """The domains and values for one model type: those for all types that it has, and those for it alone."""
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
        """Raise ConfigError for a model parameter that none of the study's model types has."""
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
        """Turn the values of one object of the narrowing into domains, under canonical names."""
        spellings, fields = spellings_of(model), fields_of(model)
        return {
            spellings[key]: _domain(f"{place}.{key}".lstrip("."), value, fields[spellings[key]])
            for key, value in given.items()
        }


def _domain(place: str, value: Any, info: FieldInfo) -> Any:
    """A Choice for a list, a Range for an object, any other value as it is. Raises ConfigError.

    The type and the bounds of the parameter check every value.
    """
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
    """The range that an object of a narrowing describes. Raises ConfigError."""
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
    """The value, if the type and the bounds of the parameter accept it. Raises ConfigError."""
    kind = _type_of(info)
    adapter = TypeAdapter(Annotated[kind, *info.metadata] if info.metadata else kind)
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        reasons = " or ".join(dict.fromkeys(detail["msg"].lower() for detail in error.errors()))
        raise ConfigError(f"--search_space: {place}: {reasons}, got {json.dumps(value)}") from error
