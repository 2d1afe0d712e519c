"""The options of a constructor as a pydantic model, which checks the values of `model_params` and `dataset_params`.

`research_eval.annotations.options_of` reads the constructor; nothing here looks at a raw signature.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticUndefined, to_jsonable_python

from research_eval.annotations import REQUIRED, Aka, Younger, options_of, takes_any_option
from research_eval.datasets.kinds import RealWorld, Synthetic, dataset_kind

# The options that the program sets itself, so that no config may set them.
MODEL_PROVIDED = frozenset({"vocab_size", "num_classes", "padding_idx", "max_length", "device"})
SYNTHETIC_PROVIDED = Synthetic.provided
TEXT_PROVIDED = RealWorld.provided


def context_arguments(cls: type, available: Mapping[str, Any]) -> dict[str, Any]:
    """The `available` values that the constructor takes. `**kwargs` takes vocab_size, num_classes and padding_idx."""
    wanted = set(options_of(cls))
    if takes_any_option(cls):
        wanted |= {"vocab_size", "num_classes", "padding_idx"}
    return {name: value for name, value in available.items() if name in wanted}


@functools.cache
def signature_model(cls: type, provided: frozenset[str]) -> type[BaseModel]:
    """The constructor's options, without those that the program provides, as the fields of a pydantic model.

    Options without annotation accept any value. `**kwargs` accepts other keys.
    """
    fields: dict[str, Any] = {}
    for name, option in options_of(cls).items():
        if name not in provided:
            default = PydanticUndefined if option.default is REQUIRED else option.default
            fields[_field_name(name)] = (option.annotation, Field(default=default, alias=name))
    config = ConfigDict(
        strict=True,
        extra="allow" if takes_any_option(cls) else "forbid",
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        json_schema_extra=_add_aliases,
    )
    model: type[BaseModel] = create_model(cls.__name__, __config__=config, __module__=cls.__module__, **fields)
    return model


def _field_name(option: str) -> str:
    """pydantic refuses fields with names such as `schema` and `_x`; they get a prefix and keep the alias."""
    return f"p_{option}" if option.startswith("_") or option in dir(BaseModel) else option


def dataset_model(dataset_type: str, dataset_name: str) -> type[BaseModel]:
    """The options of a dataset. Raises ConfigError for an unknown kind, and for a name that its kind does not know."""
    kind = dataset_kind(dataset_type)
    return signature_model(kind.constructor(dataset_name), kind.provided)


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


def younger_fields(model: type[BaseModel]) -> set[str]:
    """The canonical names of the options that a stored config leaves out where they have their default."""
    return {
        name for name, field in fields_of(model).items() if any(isinstance(word, Younger) for word in field.metadata)
    }


def json_text(value: Any) -> str | None:
    """The value as JSON; None for a value that JSON cannot hold (a function, infinity)."""
    try:
        return json.dumps(to_jsonable_python(value), allow_nan=False)
    except (ValueError, TypeError):
        return None


def _add_aliases(schema: JsonSchemaValue, model: type[BaseModel]) -> None:
    """Add a property per spelling to the JSON Schema of a model; one spelling of a required key has to be there."""
    properties = schema.setdefault("properties", {})
    others: dict[str, list[str]] = {}  # canonical name -> its other spellings
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
