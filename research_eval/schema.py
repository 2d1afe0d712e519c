"""JSON -> checked keyword arguments. The constructors of models and datasets are the schema; nothing is repeated here.

`python -m research_eval.schema` prints the JSON Schema of a config file for editors.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import CoreSchema, ErrorDetails, PydanticUndefined, to_jsonable_python
from pydantic_core.core_schema import ModelField

from research_eval.annotations import INT_MAX as INT_MAX
from research_eval.annotations import Aka as Aka
from research_eval.annotations import (
    Choice,
    Count,
    Kernels,
    Natural,
    Positive,
    Range,
    Share,
    Weight,
    When,
)
from research_eval.errors import ConfigError
from research_eval.files import MAX_NAME
from research_eval.registry import MODELS_MAP, SYNTHETIC_DATASETS
from research_eval.system.untrusted import read_limited, steers
from research_eval.wording import did_you_mean, hint, largest_of, shown

log = logging.getLogger(__name__)

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_TEXT = 4096  # characters of one string, which is what a path may have
MAX_PARAMETERS = 10**11
MAX_TENSORS = 10_000

MODEL_PROVIDED = frozenset({"vocab_size", "num_classes", "padding_idx", "max_length", "device"})
MAX_TASK_SIZE = 100_000  # of a task's own sizes: moduli, symbols, tables; its samples have their memory checked
SYNTHETIC_PROVIDED = frozenset({"seed"})
TEXT_PROVIDED = frozenset({"dataset_name"})

Location = tuple[str | int, ...]  # ("model_params", "embed_dim")


# ----------------------------------------------------------------------------------------------- the file's sections


class _Section(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class OptimizerParams(_Section):
    """The optimiser and what scales its gradients."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Update rule."""
    lr: Annotated[Positive, Range(3e-4, 1e-2, log=True)] = 1e-3
    """Largest learning rate."""
    weight_decay: Annotated[Weight, Range(1e-3, 0.3, log=True)] = 0.01
    """Decay of weight matrices: decoupled for adamw, added to the gradient for sgd."""
    grad_clip_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm; null for no clipping."""
    aux_loss_coeff: Weight = 1.0
    """Multiplies the model's whole auxiliary loss."""
    router_lr_mult: Weight = 1.0
    """Learning rate of routers relative to `lr`."""
    expert_lr_mult: Weight = 1.0
    """Learning rate of experts relative to `lr`."""
    edge_lr_mult: Weight = 10.0
    """Learning rate of the edge tables of scan experts relative to `lr`."""
    momentum: Annotated[Share, Range(0.5, 0.95), When("name", "sgd")] = 0.9
    """Momentum of sgd; an error with adamw."""

    @field_validator("momentum")  # runs for a given value only, never for the default
    @classmethod
    def _only_for_sgd(cls, momentum: float, info: Any) -> float:
        if info.data.get("name") == "adamw":
            raise ValueError("must be left out unless name is 'sgd'")
        return momentum


class SchedulerParams(_Section):
    """The learning rate over the steps."""

    name: Annotated[Literal["none", "cosine_warmup", "wsd"], Choice("none", "cosine_warmup")] = "none"
    """Course of the learning rate: constant, a linear rise and half a cosine, or rise, flat and linear fall."""
    warmup_factor: Annotated[Share, Range(0.02, 0.2), When("name", "cosine_warmup", "wsd")] = 0.1
    """Share of the steps that the rise takes."""
    min_lr_factor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the last step relative to the largest."""
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 1 / 3
    """Share of the steps that the fall of wsd takes."""


def _known_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", device):
        raise ValueError("expected auto, cpu, cuda, cuda:N or mps")
    return device


class TrainingParams(_Section):
    """How the training runs; none of it changes what is trained."""

    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """auto (the best one there is), cpu, cuda, cuda:N or mps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward and backward pass; weights stay fp32."""
    compile: bool = False
    """Compile the model's blocks with torch.compile."""
    gradient_accumulation_steps: Count = 1
    """Batches whose gradients are averaged into one optimiser step."""
    label_smoothing: Share = 0.0
    """Share of each target that is spread evenly over the classes."""
    ema_decay: Share = 0.0
    """Decay of the moving average of the weights that is evaluated; 0 for no average."""
    early_stopping_patience: Count | None = None
    """Stop after so many epochs without a better validation score; null for never."""
    eval_batch_size: Count | None = None
    """Samples per batch in evaluation; null for the training batch size."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; null for one at the end of every epoch."""
    log_every: Count = 50
    """Steps between log lines."""
    curriculum: Share = 0.0
    """Share of the epochs over which the longest training sample admitted grows from the shortest to the longest."""
    trace_routing: bool = False
    """Write every validation sample's path and action probabilities after each epoch."""
    test: bool = False
    """Score the test splits once, after training."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of torch; null for torch's own choice."""
    kernels: Kernels = "auto"
    """How experts are executed: auto (what suits the device), plain (with the padding), slices or grouped."""
    keep_memory: bool = False
    """Linux: let the process keep freed memory instead of giving it back to the system after every step."""


class ExperimentConfig(_Section):
    """A checked config. `dataset_params` and `model_params` hold every parameter under its canonical name."""

    model_type: str
    """Key in MODELS_MAP: dense, moe, goe, goe_original or one of your own."""
    dataset_type: Literal["synthetic", "real_world"]
    """Generated by a task, or read from files."""
    dataset_name: Annotated[str, Field(max_length=MAX_NAME)]
    """Key in SYNTHETIC_DATASETS, entry of REAL_WORLD_DATASETS, or any name beside `dataset_params.data_dir`."""
    epochs: Count
    """Passes over the training split."""
    batch_size: Count
    """Samples per batch."""
    experiment_name: str = Field(
        default_factory=lambda given: f"{given['model_type']}_{given['dataset_name']}",
        min_length=1,
        max_length=MAX_NAME,
    )
    """Name of the run in the results; the default is made of model_type and dataset_name."""
    seed: Natural = 0
    """Data, weights, batch order and noise all follow from it."""
    dataset_params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the dataset."""
    model_params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the model."""
    optimizer_params: OptimizerParams = Field(default_factory=OptimizerParams)
    scheduler_params: SchedulerParams = Field(default_factory=SchedulerParams)
    training_params: TrainingParams = Field(default_factory=TrainingParams)

    def to_dict(self) -> dict[str, Any]:
        """The complete config for JSON; `config_from_dict` makes an equal config of it."""
        config = self.model_dump(mode="json")
        if self.optimizer_params.name != "sgd":
            del config["optimizer_params"]["momentum"]
        return config


# ------------------------------------------------------------------------------------------- signatures as models


def context_arguments(cls: type, available: Mapping[str, Any]) -> dict[str, Any]:
    """The `available` values that the constructor takes. `**kwargs` takes vocab_size, num_classes and padding_idx."""
    parameters = inspect.signature(cls).parameters
    wanted = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        wanted |= {"vocab_size", "num_classes", "padding_idx"}
    return {name: value for name, value in available.items() if name in wanted}


@functools.cache
def signature_model(cls: type, provided: frozenset[str]) -> type[BaseModel]:
    """The constructor's parameters, without those that the program provides, as a pydantic model.

    Parameters without annotation accept anything, and `**kwargs` accepts further keys.
    """
    try:
        hints = typing.get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    except NameError as error:  # names that the class imports for type checkers only
        log.debug("%s: the types of the parameters are not checked: %s", cls.__qualname__, error)
        hints = {}
    fields: dict[str, Any] = {}
    extra: Literal["allow", "forbid"] = "forbid"
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        if name in provided or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = PydanticUndefined if parameter.default is parameter.empty else parameter.default
        # pydantic keeps names such as `schema` and `_x` to itself.
        field = f"p_{name}" if name.startswith("_") or name in dir(BaseModel) else name
        fields[field] = (hints.get(name, Any), Field(default=default, alias=name))
    config = ConfigDict(
        strict=True,
        extra=extra,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        json_schema_extra=_add_aliases,
    )
    model: type[BaseModel] = create_model(cls.__name__, __config__=config, __module__=cls.__module__, **fields)
    return model


def dataset_model(dataset_type: str, dataset_name: str) -> type[BaseModel]:
    """The parameters of a data set. Raises ConfigError for a synthetic task that is not registered."""
    if dataset_type == "real_world":
        from research_eval.datasets.text import TextDataset

        return signature_model(TextDataset, TEXT_PROVIDED)
    return signature_model(SYNTHETIC_DATASETS.get_or_explain(dataset_name), SYNTHETIC_PROVIDED)


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields by their canonical names."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def spellings_of(model: type[BaseModel]) -> dict[str, str]:
    """Accepted spelling -> canonical name."""
    return {
        spelling: name
        for name, field in fields_of(model).items()
        for spelling in (name, *(other for aka in field.metadata if isinstance(aka, Aka) for other in aka.names))
    }


def _json_text(value: Any) -> str | None:
    """The value as JSON, or None for what JSON cannot hold (a function, infinity)."""
    try:
        return json.dumps(to_jsonable_python(value), allow_nan=False)
    except (ValueError, TypeError):
        return None


# ------------------------------------------------------------------------------------------------ reading JSON text

# A string (perhaps not closed), a comment, one sign, or a run of anything else.
_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*+"?|//[^\r\n]*|/\*.*?(?:\*/|\Z)|[{}\[\]:,]|[^\s{}\[\]:,"/]+|/', re.DOTALL)

_SYNTAX = {  # the parser's words -> ours
    "Expecting value": "expected a value, found {found}",
    "Expecting property name": "expected a key in double quotes, found {found}",
    "Expecting ':'": "expected ':', found {found}",
    "Expecting ','": "expected ',' or a closing bracket, found {found}",
    "Extra data": "expected the end of the file, found {found}",
    "Unterminated string": "this string is not closed",
    "Invalid control character": "a line break or control character inside a string: close the string, or write \\n",
    "Invalid \\": "unknown escape in a string: write \\\\ for a backslash",
}


class _Source:
    """The text of a config and the parts it consists of; comments and trailing commas are not among them."""

    def __init__(self, text: str, name: str) -> None:
        self.text = text.removeprefix("\ufeff")
        self.name = name
        tokens = list(_TOKEN.finditer(self.text))
        comments = [token for token in tokens if token[0].startswith(("//", "/*"))]
        parts = [token for token in tokens if not token[0].startswith(("//", "/*"))]
        commas = {
            comma
            for before, comma, after in zip(parts, parts[1:], parts[2:], strict=False)
            if comma[0] == "," and after[0] in "]}" and before[0] not in "[{:,"
        }
        self.blank = [*comments, *commas]
        self.parts = [part for part in parts if part not in commas]

    def complaint(self, position: int, message: str) -> ConfigError:
        """An error at a place that the parser did not understand."""
        line, column = self.text.count("\n", 0, position) + 1, position - self.text.rfind("\n", 0, position)
        return ConfigError(f"{self.name}:{line}:{column}: {message}")

    def values(self) -> Any:
        """What the text says. Raises ConfigError for what is no JSON."""
        characters = list(self.text)
        for blank in self.blank:
            if blank[0].startswith("/*") and not re.fullmatch(r"/\*.*\*/", blank[0], re.DOTALL):
                raise self.complaint(blank.start(), "this comment is not closed")
            characters[blank.start() : blank.end()] = re.sub(r"\S", " ", blank[0])
        depth = 0
        for part in self.parts:
            depth += (part[0] in "{[") - (part[0] in "}]")
            if depth > MAX_DEPTH:
                raise self.complaint(part.start(), f"nested deeper than {MAX_DEPTH} levels")
            if re.fullmatch(r"-?(NaN|Infinity)", part[0]):
                raise self.complaint(part.start(), f"expected a value, found {part[0]!r}")
            if re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", part[0]) and math.isinf(float(part[0])):
                raise self.complaint(part.start(), "this number is too large")
        try:  # blanks in place of what was taken out: the parser meets every character at its place in the file
            return json.loads("".join(characters))
        except json.JSONDecodeError as error:
            near = _TOKEN.match(self.text, error.pos)
            found = repr(near[0][:20]) if near else "the end of the file"
            plain = next((ours for theirs, ours in _SYNTAX.items() if error.msg.startswith(theirs)), error.msg)
            raise self.complaint(error.pos, plain.replace("{found}", found)) from None

    def lines(self) -> tuple[dict[Location, int], list[tuple[Location, str]]]:
        """The line of every key and list item, and the duplicate keys, of a text that `values` understands."""
        lines: dict[Location, int] = {}
        duplicates = []
        path: list[Any] = []  # per open bracket: the index in a list; the key in an object, None where one comes next
        line, seen = 1, 0
        for part in self.parts:
            line, seen = line + self.text.count("\n", seen, part.start()), part.start()
            sign = part[0]
            if sign[0] == '"' and re.search("[\ud800-\udfff]", json.loads(sign)):
                raise self.complaint(part.start(), "this string holds half of a \\u pair")
            if sign == ",":
                path[-1] = path[-1] + 1 if isinstance(path[-1], int) else None
            elif sign in "}]":
                path.pop()
            elif path and path[-1] is None:
                path[-1] = json.loads(sign)
                key = tuple(path)
                if key in lines:
                    duplicates.append((key, f"duplicate key {key[-1]!r}, first on line {lines[key]}"))
                    lines = {known: number for known, number in lines.items() if known[: len(key)] != key}
                lines[key] = line
            elif sign != ":":
                lines.setdefault(tuple(path), line)
                if sign in "{[":
                    path.append(None if sign == "{" else 0)
        return lines, duplicates


# ------------------------------------------------------------------------------------------------- errors in words


_EXPECTED = {
    "int_type": "expected int",
    "int_parsing": "expected int",
    "int_from_float": "expected int",
    "float_type": "expected float",
    "bool_type": "expected bool",
    "string_type": "expected str",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "set_type": "expected a list",
    "dict_type": "expected an object",
    "model_type": "expected an object",
    "none_required": "expected null",
    "literal_error": "expected one of {expected}",
    "enum": "expected one of {expected}",
    "greater_than_equal": "must be >= {ge}",
    "greater_than": "must be > {gt}",
    "less_than_equal": "must be <= {le}",
    "less_than": "must be < {lt}",
    "finite_number": "must be finite",
    "string_too_short": "must not be empty",
    "string_too_long": "must not have more than {max_length} characters",
    "needs_python_object": "must be left out, JSON has no such values",
    "callable_type": "must be left out, JSON has no functions",
    "value_error": "{error}",
}


def _in_words(error: ErrorDetails) -> str:
    context = {
        name: f"{value:g}" if isinstance(value, float) else value for name, value in error.get("ctx", {}).items()
    }
    if error["type"] in ("literal_error", "enum"):
        context["expected"] = context["expected"].replace(" or ", ", ")
    return _EXPECTED.get(error["type"], error["msg"][:1].lower() + error["msg"][1:]).format(**context)


class _Report:
    """Collects the mistakes of one source. `origins` says where a value comes from: a line, or a flag."""

    def __init__(self, source: str, origins: Mapping[Location, int | str]) -> None:
        self.source = source
        self.origins = origins
        self._found: list[tuple[int, str]] = []

    def add(self, path: Location, message: str, at: Location | None = None) -> None:
        """A mistake in the value at `path`; its place is that of `at` where that differs."""
        at = path if at is None else at
        known = next((at[:length] for length in range(len(at), -1, -1) if at[:length] in self.origins), None)
        origin = None if known is None else self.origins[known]
        if isinstance(origin, str):
            place, line = origin, 0
            path = () if path == known else path
        else:
            place, line = (f"{self.source}:{origin}", origin) if origin else (self.source, 0)
        name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
        self._found.append((line, ": ".join(part for part in (place, name, " ".join(message.split())) if part)))

    def __bool__(self) -> bool:
        return bool(self._found)

    def raise_if_any(self) -> None:
        """Raise one ConfigError with a line per mistake, in the order of the file."""
        if self._found:
            raise ConfigError("\n".join(dict.fromkeys(text for _, text in sorted(self._found, key=lambda one: one[0]))))

    def add_validation_errors(
        self, error: ValidationError, section: Location, values: Any, spelled: Mapping[str, str], known: type[BaseModel]
    ) -> None:
        """What pydantic found in `values`; `spelled` leads from canonical names to those in the file."""
        alternatives: dict[Location, list[ErrorDetails]] = {}
        for detail in error.errors(include_url=False):
            if detail["type"] == "default_factory_not_called":
                continue  # only says that another field is wrong
            inner, value = [], values
            for step in detail["loc"]:  # behind the value's own place, pydantic names the branch of a union
                if not (
                    step in value if isinstance(value, dict) else isinstance(value, list) and step in range(len(value))
                ):
                    break
                inner.append(step)
                value = value[step]
            path = section + tuple(spelled.get(str(step), step) if not n else step for n, step in enumerate(inner))
            if detail["type"] == "missing":
                self.add(path, f"missing key {detail['loc'][-1]!r}")
            elif detail["type"] == "extra_forbidden":
                names = _keys_at(known, detail["loc"][:-1])
                self.add(path[:-1], f"unknown key {path[-1]!r}.{hint(str(path[-1]), names)}", at=path)
            else:
                alternatives.setdefault(path, []).append(detail)
        for path, details in alternatives.items():
            words = " or ".join(dict.fromkeys(map(_in_words, details)))
            value = details[0]["input"]
            choices = re.findall(r"'([^']*)'", words)
            near = did_you_mean(value, choices) if isinstance(value, str) else ""
            self.add(path, f"{words}, got {shown(value)}.{near}")


def _keys_at(model: type[BaseModel], path: Iterable[str | int]) -> list[str]:
    """The spellings that the section at `path` knows; none for a type that is no pydantic model."""
    for step in path:
        field = fields_of(model).get(str(step))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(spellings_of(model))


# --------------------------------------------------------------------------------------------------------- checking


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """Read and check a config file. `overrides` as in `parse_config`. Raises ConfigError with all mistakes."""
    return parse_config(_read_text(path), str(path), overrides)


def load_json(path: str | Path) -> dict[str, Any]:
    """An object from a file of JSON with comments. Raises ConfigError for duplicate keys and what is no object."""
    reader = _Source(_read_text(path), str(path))
    data = reader.values()
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected an object {{...}}, got {shown(data)}")
    lines, duplicates = reader.lines()
    report = _Report(str(path), lines)
    for location, message in duplicates:
        report.add(location[:-1], message, at=location)
    report.raise_if_any()
    return data


def _read_text(path: str | Path) -> str:
    content = read_limited(path, MAX_BYTES, "a config file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def parse_config(text: str, source: str, overrides: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """Check the text of a config; `source` names it in messages.

    `overrides` are values of command-line flags under dotted keys ("epochs", "training_params.device"); None is a
    value like any other. Raises ConfigError with all mistakes, one a line.
    """
    reader = _Source(text, source)
    data = reader.values()
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected an object {{...}}, got {shown(data)}")
    lines, duplicates = reader.lines()
    origins: dict[Location, int | str] = dict(lines)
    for key, value in (overrides or {}).items():
        *sections, name = path = tuple(key.split("."))
        target: Any = data
        for section in sections:
            target = target.setdefault(section, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target[name] = value
            origins[path] = f"--{name}"
    report = _Report(source, origins)
    for location, message in duplicates:
        report.add(location[:-1], message, at=location)
    return _check(data, report)


def config_from_dict(config: Mapping[str, Any], source: str = "config") -> ExperimentConfig:
    """Check a config that is no text, such as one from the results. Raises ConfigError with all mistakes."""
    return _check(dict(config), _Report(source, {}))


def _check(data: dict[str, Any], report: _Report) -> ExperimentConfig:
    data.pop("$schema", None)
    _check_values(data, (), report)
    config = _validated(ExperimentConfig, data, {}, (), report)
    sections = {
        "dataset_params": _dataset_params(data, report),
        "model_params": _model_params(data, report),
    }
    report.raise_if_any()
    assert isinstance(config, ExperimentConfig)
    return config.model_copy(update=sections)


def _check_values(value: Any, path: Location, report: _Report) -> None:
    """Report whole numbers that no column holds, and strings that are endless or that a terminal would act on."""
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            report.add(path, f"expected at most {MAX_TEXT} characters, got {len(value)}")
        elif any(map(steers, value)):
            report.add(path, f"control characters are not allowed, got {shown(value)}")
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > INT_MAX:
        limit = f"<= {INT_MAX}" if value > 0 else f">= {-INT_MAX}"
        report.add(path, f"must be {limit}, got {shown(value)}.")
    elif len(path) > MAX_DEPTH:
        report.add(path[:2], f"nested deeper than {MAX_DEPTH} levels")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_values(str(key), path, report)
            _check_values(inner, (*path, str(key)), report)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _check_values(inner, (*path, number), report)


def _validated(
    model: type[BaseModel], values: dict[str, Any], spelled: Mapping[str, str], section: Location, report: _Report
) -> BaseModel | None:
    try:  # as JSON: there a list is the way to write a tuple, and a string that of an enum
        return model.model_validate_json(json.dumps(values, default=os.fspath))
    except ValidationError as error:
        report.add_validation_errors(error, section, values, spelled, model)
        return None


def _arguments(
    section: str, cls: type, provided: frozenset[str], data: Mapping[str, Any], report: _Report
) -> dict[str, Any] | None:
    """The constructor's arguments with all defaults that JSON can hold; None after mistakes."""
    given: dict[str, Any] = data.get(section, {})
    if not isinstance(given, dict):
        return None  # reported with the sections
    model = signature_model(cls, provided)
    spellings = spellings_of(model)
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    mistakes = False
    for key, value in given.items():
        name = spellings.get(key, key)
        message = ""
        if key in provided:
            message = f"{key!r} is set by the program: leave it out"
        elif name in spelled:
            message = f"{spelled[name]!r} and {key!r} are two spellings of one key: keep one"
        if message:
            report.add((section,), message, at=(section, key))
            mistakes = True
            continue
        spelled[name], values[name] = key, value
    for name, field in fields_of(model).items():
        # A default is right by definition, also one that its annotation does not cover (`size: int = None`).
        default = None if field.is_required() else _json_text(field.default)
        if name in values and default is not None and _json_text(values[name]) == default:
            del values[name]
    checked = _validated(model, values, spelled, (section,), report)
    if checked is None or mistakes:
        return None
    arguments = {
        name: getattr(checked, field) for field, name in zip(model.model_fields, fields_of(model), strict=True)
    }
    arguments |= checked.model_extra or {}
    # What JSON cannot hold stays with the constructor.
    return {name: value for name, value in arguments.items() if name in values or _json_text(value) is not None}


@contextmanager
def _counted_parameters(sizes: Mapping[str, Any]) -> Iterator[None]:
    """Within the block a module that would get too large raises ValueError, which names the largest `sizes`."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    tensors, elements = 0, 0
    largest = largest_of(sizes)

    def count(_module: object, _name: str, parameter: Any) -> None:
        nonlocal tensors, elements
        if parameter is not None:
            tensors, elements = tensors + 1, elements + parameter.numel()
        if tensors > MAX_TENSORS or elements > MAX_PARAMETERS:
            raise ValueError(f"the model is too large, more than {MAX_PARAMETERS:.0e} parameters: lower {largest}")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError(f"the model is too large to be counted: lower {largest}") from error
    finally:
        hook.remove()


def _try(build: Callable[[], object], section: str, report: _Report) -> None:
    """Report what a constructor says about parameters that do not fit each other."""
    try:
        build()
    except (ValueError, MemoryError, OverflowError) as error:
        report.add((section,), (str(error) or "too large").split("\nException raised from")[0])
    except Exception:
        # A foreign constructor may need real numbers or more context. If it is wrong, the run shows its traceback.
        log.debug("%s: the trial construction failed", section, exc_info=True)


def _model_params(data: Mapping[str, Any], report: _Report) -> dict[str, Any] | None:
    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        return None
    try:
        cls = MODELS_MAP.get_or_explain(model_type)
    except ConfigError as error:
        report.add((), str(error), at=("model_type",))
        return None
    arguments = _arguments("model_params", cls, MODEL_PROVIDED, data, report)
    if arguments is not None:
        import torch

        from research_eval.models.base_model import EvaluableModel

        if issubclass(cls, EvaluableModel):
            meta = torch.device("meta")  # shapes without memory: any size is built at once
            context = {"vocab_size": 8, "num_classes": 2, "padding_idx": 0, "max_length": 16, "device": meta}

            def build() -> None:
                with meta, without_draws(), _counted_parameters(arguments):
                    cls(**context_arguments(cls, context), **arguments)

            _try(build, "model_params", report)
    return arguments


def without_draws() -> AbstractContextManager[object]:
    """Meta tensors have no values to draw, and torch would import its compiler, a second's work, for the attempt."""
    import torch
    from torch.overrides import TorchFunctionMode

    class WithoutDraws(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            if func in (torch.nn.init.normal_, torch.Tensor.normal_):
                tensor: torch.Tensor = args[0] if args else kwargs["tensor"]
                if tensor.is_meta:
                    return tensor
            return func(*args, **kwargs)

    return WithoutDraws()


def model_arguments(model_type: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """`model_params` of a model under canonical names, with all defaults. Raises ConfigError with all mistakes."""
    report = _Report("model_params", {})
    arguments = _model_params({"model_type": model_type, "model_params": dict(params)}, report)
    report.raise_if_any()
    return arguments or {}


def _dataset_params(data: Mapping[str, Any], report: _Report) -> dict[str, Any] | None:
    dataset_type, dataset_name = data.get("dataset_type"), data.get("dataset_name")
    if dataset_type == "real_world":
        from research_eval.datasets.providers import REAL_WORLD_DATASETS
        from research_eval.datasets.text import TextDataset

        params = data.get("dataset_params")
        own_files = isinstance(params, dict) and (params.get("data_dir") or params.get("sources"))
        if isinstance(dataset_name, str) and not own_files and dataset_name not in REAL_WORLD_DATASETS:
            near = hint(dataset_name, REAL_WORLD_DATASETS)
            message = f"unknown {dataset_name!r}.{near} A set of your own needs dataset_params.data_dir or sources."
            report.add(("dataset_name",), message)
        return _arguments("dataset_params", TextDataset, TEXT_PROVIDED, data, report)
    if dataset_type != "synthetic" or not isinstance(dataset_name, str):
        return None
    try:
        cls = SYNTHETIC_DATASETS.get_or_explain(dataset_name)
    except ConfigError as error:
        report.add((), str(error), at=("dataset_name",))
        return None
    arguments = _arguments("dataset_params", cls, SYNTHETIC_PROVIDED, data, report)
    if arguments is not None and _task_is_small(cls, arguments, report):
        _try(lambda: cls(**context_arguments(cls, {"seed": 0}), **arguments), "dataset_params", report)
    return arguments


def _task_is_small(cls: type, arguments: Mapping[str, Any], report: _Report) -> bool:
    """Whether a task of ours can be made at all; the number and length of its samples are looked at elsewhere."""
    own = cls.__module__.startswith("research_eval.")
    sizes = {name: value for name, value in arguments.items() if own and isinstance(value, int) and "seed" not in name}
    large = {name for name, value in sizes.items() if value > MAX_TASK_SIZE} - {"num_samples", "seq_len"}
    for name in sorted(large):
        report.add(("dataset_params", name), f"expected at most {MAX_TASK_SIZE:,}, got {sizes[name]:,}")
    return not large


# ------------------------------------------------------------------------------------------------------ JSON Schema


def _add_aliases(schema: JsonSchemaValue, model: type[BaseModel]) -> None:
    """Every spelling is a property; of the spellings of a required key one has to be there."""
    properties = schema.setdefault("properties", {})
    others: dict[str, list[str]] = {}
    for spelling, name in spellings_of(model).items():
        if spelling != name:
            properties[spelling] = {**properties[name], "description": f"Other spelling of {name}."}
            others.setdefault(name, []).append(spelling)
    rules: list[dict[str, Any]] = [
        {"not": {"required": [name, other]}} for name, names in others.items() for other in names
    ]
    for name in set(others) & set(schema.get("required", [])):
        schema["required"].remove(name)
        rules.append({"anyOf": [{"required": [spelling]} for spelling in (name, *others[name])]})
    if rules:
        schema["allOf"] = rules


class _JsonSchema(GenerateJsonSchema):
    ignored_warning_kinds = GenerateJsonSchema.ignored_warning_kinds | {"non-serializable-default"}

    def field_title_should_be_set(self, schema: ModelField | CoreSchema | Any) -> bool:
        return False

    def handle_invalid_for_json_schema(self, schema: CoreSchema, error_info: str) -> JsonSchemaValue:
        return {"not": {}}  # no JSON value can be given


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a config file with all registered models and datasets."""
    from research_eval.datasets.text import TextDataset

    models = {name: signature_model(cls, MODEL_PROVIDED) for name, cls in sorted(MODELS_MAP.items())}
    tasks = {name: signature_model(cls, SYNTHETIC_PROVIDED) for name, cls in sorted(SYNTHETIC_DATASETS.items())}
    text = signature_model(TextDataset, TEXT_PROVIDED)
    every: list[type[BaseModel]] = list(dict.fromkeys([ExperimentConfig, *models.values(), *tasks.values(), text]))
    references, document = models_json_schema([(model, "validation") for model in every], schema_generator=_JsonSchema)
    definitions = document["$defs"]
    root = definitions.pop(references[ExperimentConfig, "validation"]["$ref"].rpartition("/")[2])

    def when(conditions: dict[str, str], section: str, model: type[BaseModel]) -> dict[str, Any]:
        reference = references[model, "validation"]
        then: dict[str, Any] = {"properties": {section: reference}}
        if any(field.is_required() for field in model.model_fields.values()):
            then["required"] = [section]
        chosen = {key: {"const": value} for key, value in conditions.items()}
        return {"if": {"properties": chosen, "required": list(conditions)}, "then": then}

    root["properties"] |= {"$schema": {"type": "string"}}
    root["properties"]["model_type"]["enum"] = list(models)
    synthetic = {"properties": {"dataset_type": {"const": "synthetic"}}, "required": ["dataset_type"]}
    root["allOf"] = [
        *(when({"model_type": name}, "model_params", model) for name, model in models.items()),
        {"if": synthetic, "then": {"properties": {"dataset_name": {"enum": list(tasks)}}}},
        *(
            when({"dataset_type": "synthetic", "dataset_name": name}, "dataset_params", model)
            for name, model in tasks.items()
        ),
        when({"dataset_type": "real_world"}, "dataset_params", text),
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


if __name__ == "__main__":
    # Not this module's own function: the models know the copy that is called `research_eval.schema`.
    from research_eval import schema

    print(json.dumps(schema.json_schema(), indent=2))
