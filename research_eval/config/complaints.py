"""All mistakes of a config in one report: place, key, what was expected, what was given, what is near.

runs/a.json:8: model_params.top_k_experts: expected int, got true.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from research_eval.config.signatures import fields_of, spellings_of
from research_eval.errors import ConfigError
from research_eval.wording import did_you_mean, hint, shown

Location = tuple[str | int, ...]  # the way to a value: ("model_params", "embed_dim"), ("model_params", "widths", 1)

_EXPECTED = {  # pydantic's name of an error -> our words
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


class Report:
    """Collects the mistakes of one source. `origins` says where a value comes from: a line, or a flag."""

    def __init__(self, source: str, origins: Mapping[Location, int | str]) -> None:
        self._source = source
        self._origins = origins
        self._found: list[tuple[int, str]] = []  # line, or 0 for a flag or a source without lines; and the message

    def is_from_flag(self, path: Location) -> bool:
        """Whether the value at this place, or its whole section, was given on the command line."""
        return any(isinstance(self._origins.get(path[:length]), str) for length in range(1, len(path) + 1))

    def add(self, path: Location, message: str, at: Location | None = None) -> None:
        """Add a mistake in the value at `path`. `at` is the value whose line is shown, if it is another one."""
        at = path if at is None else at
        known = next((at[:length] for length in range(len(at), -1, -1) if at[:length] in self._origins), None)
        origin = None if known is None else self._origins[known]
        if isinstance(origin, str):
            place, line = origin, 0
            path = () if path == known else path
        else:
            place, line = (f"{self._source}:{origin}", origin) if origin else (self._source, 0)
        name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
        self._found.append((line, ": ".join(part for part in (place, name, " ".join(message.split())) if part)))

    def add_duplicates(self, duplicates: Iterable[tuple[Location, str]]) -> None:
        """Add keys that stand twice in one object, each with its message."""
        for location, message in duplicates:
            self.add(location[:-1], message, at=location)

    def raise_if_any(self) -> None:
        """Raise one ConfigError with a line per mistake, in the order of the file."""
        if self._found:
            raise ConfigError("\n".join(dict.fromkeys(text for _, text in sorted(self._found, key=lambda one: one[0]))))

    def validated(
        self, model: type[BaseModel], values: dict[str, Any], section: Location = (), spelled: Mapping[str, str] = {}
    ) -> BaseModel | None:
        """The values of a section as an object of its model; None after mistakes, which are then in the report.

        `spelled` leads from canonical names to the spellings in the file.
        """
        try:  # as JSON: there a list is the way to write a tuple, and a string that of an enum
            return model.model_validate_json(json.dumps(values, default=os.fspath))
        except ValidationError as error:
            self._add_validation_errors(error, section, values, spelled, model)
            return None

    def _add_validation_errors(
        self, error: ValidationError, section: Location, values: Any, spelled: Mapping[str, str], known: type[BaseModel]
    ) -> None:
        """Add what pydantic found in `values`. The branches of a union become one message."""
        alternatives: dict[Location, list[ErrorDetails]] = {}
        for detail in error.errors(include_url=False):
            if detail["type"] == "default_factory_not_called":
                continue  # only says that another field is wrong
            inner = _place_in(values, detail["loc"])
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
            if details[0]["type"] == "string_type" and self.is_from_flag(path) and isinstance(value, int | float):
                near = f""" For text, give it in quotes of JSON, such as '"{value}"' in a shell."""
            self.add(path, f"{words}, got {shown(value)}.{near}")


def _place_in(values: Any, location: Location) -> Location:
    """The steps of pydantic's location that exist in `values`; after them pydantic names the branch of a union."""
    place: list[str | int] = []
    for step in location:
        exists = step in values if isinstance(values, dict) else isinstance(values, list) and step in range(len(values))
        if not exists:
            break
        place.append(step)
        values = values[step]
    return tuple(place)


def _in_words(error: ErrorDetails) -> str:
    context = {
        name: f"{value:g}" if isinstance(value, float) else value for name, value in error.get("ctx", {}).items()
    }
    if error["type"] in ("literal_error", "enum"):
        context["expected"] = context["expected"].replace(" or ", ", ")
    return _EXPECTED.get(error["type"], error["msg"][:1].lower() + error["msg"][1:]).format(**context)


def _keys_at(model: type[BaseModel], path: Iterable[str | int]) -> list[str]:
    """The spellings that the section at `path` knows; none for a type that is no pydantic model."""
    for step in path:
        field = fields_of(model).get(str(step))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(spellings_of(model))
