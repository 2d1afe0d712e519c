"""The documented names for configs: the words of annotations, the checked config, and its JSON Schema.

`research_eval.annotations` and `research_eval.config` hold the code. This module keeps the import path that models,
datasets and scripts of users have, and `python -m research_eval.schema` prints the JSON Schema of a config file.
"""

from __future__ import annotations

import json

from research_eval.annotations import (
    INT_MAX,
    Aka,
    Choice,
    Count,
    Divides,
    Kernels,
    Natural,
    Positive,
    Range,
    Share,
    Steps,
    Weight,
    When,
    build,
    grouped_arguments,
    options_of,
)
from research_eval.config.check import MAX_TEXT, config_from_dict, load_config, parse_config
from research_eval.config.complaints import Location
from research_eval.config.construction import (
    MAX_PARAMETERS,
    MAX_TENSORS,
    model_arguments,
    without_draws,
)
from research_eval.config.json_schema import json_schema
from research_eval.config.jsonc import MAX_BYTES, MAX_DEPTH, load_json
from research_eval.config.sections import (
    ExperimentConfig,
    OptimizerParams,
    ParallelParams,
    SchedulerParams,
    TrainingParams,
)
from research_eval.config.signatures import (
    MODEL_PROVIDED,
    SYNTHETIC_PROVIDED,
    TEXT_PROVIDED,
    context_arguments,
    dataset_model,
    fields_of,
    signature_model,
    spellings_of,
)
from research_eval.datasets.kinds import MAX_TASK_SIZE
from research_eval.wording import hint, largest_of

__all__ = [
    "INT_MAX",
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_PARAMETERS",
    "MAX_TASK_SIZE",
    "MAX_TENSORS",
    "MAX_TEXT",
    "MODEL_PROVIDED",
    "SYNTHETIC_PROVIDED",
    "TEXT_PROVIDED",
    "Aka",
    "Choice",
    "Count",
    "Divides",
    "ExperimentConfig",
    "Kernels",
    "Location",
    "Natural",
    "OptimizerParams",
    "ParallelParams",
    "Positive",
    "Range",
    "SchedulerParams",
    "Share",
    "Steps",
    "TrainingParams",
    "Weight",
    "When",
    "build",
    "config_from_dict",
    "context_arguments",
    "dataset_model",
    "fields_of",
    "grouped_arguments",
    "hint",
    "json_schema",
    "largest_of",
    "load_config",
    "load_json",
    "model_arguments",
    "options_of",
    "parse_config",
    "signature_model",
    "spellings_of",
    "without_draws",
]

if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
