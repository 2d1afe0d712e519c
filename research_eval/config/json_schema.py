"""The JSON Schema of config files, with which editors complete keys and mark mistakes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import CoreSchema
from pydantic_core.core_schema import ModelField

from research_eval.config.sections import ExperimentConfig
from research_eval.config.signatures import MODEL_PROVIDED, dataset_model, signature_model
from research_eval.datasets.kinds import DATASET_KINDS
from research_eval.registry import LANGUAGE_MODELS, MODELS_MAP, NEXT_TOKEN


class _JsonSchema(GenerateJsonSchema):
    """Without titles, which would repeat the keys, and with a rule for defaults and types that JSON cannot hold."""

    ignored_warning_kinds = GenerateJsonSchema.ignored_warning_kinds | {"non-serializable-default"}

    def field_title_should_be_set(self, schema: ModelField | CoreSchema | Any) -> bool:
        return False

    def handle_invalid_for_json_schema(self, schema: CoreSchema, error_info: str) -> JsonSchemaValue:
        return {"not": {}}  # no JSON value can be given


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a config file with all registered models and datasets."""
    models, language_models = (
        {name: signature_model(cls, MODEL_PROVIDED) for name, cls in sorted(registry.items())}
        for registry in (MODELS_MAP, LANGUAGE_MODELS)
    )
    datasets = _dataset_models()
    every: list[type[BaseModel]] = [ExperimentConfig, *models.values(), *language_models.values(), *datasets.values()]
    every = list(dict.fromkeys(every))  # without repetitions: names may share a constructor
    references, document = models_json_schema([(model, "validation") for model in every], schema_generator=_JsonSchema)
    definitions = document["$defs"]
    root = definitions.pop(references[ExperimentConfig, "validation"]["$ref"].rpartition("/")[2])

    def when(conditions: dict[str, Any], section: str, model: type[BaseModel]) -> dict[str, Any]:
        """The rule that a section follows this model if the keys have these values, or fit these schemas."""
        then: dict[str, Any] = {"properties": {section: references[model, "validation"]}}
        if any(field.is_required() for field in model.model_fields.values()):
            then["required"] = [section]
        chosen = {key: value if isinstance(value, dict) else {"const": value} for key, value in conditions.items()}
        return {"if": {"properties": chosen, "required": list(conditions)}, "then": then}

    root["properties"] |= {"$schema": {"type": "string"}}
    root["properties"]["model_type"]["enum"] = list(dict.fromkeys([*models, *language_models]))
    kinds = {dataset_type: cls() for dataset_type, cls in DATASET_KINDS.items()}
    texts = [name for name, kind in kinds.items() if kind.task(next(iter(kind.names()), "")) == NEXT_TOKEN]
    tasks = (({"not": {"enum": texts}}, models), ({"enum": texts}, language_models))
    root["allOf"] = [
        when({"model_type": name, "dataset_type": types}, "model_params", model)
        for types, known in tasks
        for name, model in known.items()
    ]
    for dataset_type in DATASET_KINDS:
        names = [name for kind, name in datasets if kind == dataset_type and name is not None]
        if names and (dataset_type, None) not in datasets:
            chosen = {"properties": {"dataset_type": {"const": dataset_type}}, "required": ["dataset_type"]}
            root["allOf"].append({"if": chosen, "then": {"properties": {"dataset_name": {"enum": names}}}})
        for (kind, name), model in datasets.items():
            if kind == dataset_type:
                others = [other for same, other in datasets if same == kind and other is not None]
                conditions: dict[str, Any] = {"dataset_type": kind}
                if name is not None:
                    conditions["dataset_name"] = name
                elif others:
                    conditions["dataset_name"] = {"not": {"enum": others}}
                root["allOf"].append(when(conditions, "dataset_params", model))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _dataset_models() -> dict[tuple[str, str | None], type[BaseModel]]:
    """The options of every dataset by its type and name; the name is None if one constructor serves all names."""
    found: dict[tuple[str, str | None], type[BaseModel]] = {}
    for dataset_type, cls in DATASET_KINDS.items():
        kind = cls()
        if kind.any_name:
            usual = found[dataset_type, None] = dataset_model(dataset_type, "")
            own = {name: dataset_model(dataset_type, name) for name in kind.names()}
            found |= {(dataset_type, name): model for name, model in own.items() if model is not usual}
        else:
            found |= {(dataset_type, name): dataset_model(dataset_type, name) for name in sorted(kind.names())}
    return found
