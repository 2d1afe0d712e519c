"""The words in the pictures of a study: names of model types, parameters and objectives, and what a point says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from research_eval.analysis.figures import label
from research_eval.analysis.study_trials import TrialRecord
from research_eval.analysis.tables import metric_text, short_number
from research_eval.registry import MODEL_TYPE
from research_eval.store.metrics import direction

UNKNOWN = "unknown"  # model type of a trial that ended before it had one

# The longest texts, in characters.
STUDY_LENGTH, DATASET_LENGTH, OBJECTIVE_LENGTH = 50, 30, 40
MODEL_LENGTH, PARAMETER_LENGTH, VALUE_LENGTH = 24, 28, 16
LINE_LENGTH = 120
PARAMETERS_PER_LINE = 3


def model_type_of(record: TrialRecord) -> str:
    """The model type of a trial, or `UNKNOWN`."""
    return record.model_type or UNKNOWN


def model_label(model_type: str) -> str:
    """A model type as titles and legends show it."""
    return label(model_type, MODEL_LENGTH)


def objective_label(objective: str) -> str:
    """An objective with the direction that is better, as an axis shows it: `final_val_f1 (higher is better)`."""
    better = "higher" if direction(objective) == "maximize" else "lower"
    return f"{label(objective, OBJECTIVE_LENGTH)} ({better} is better)"


def heading(what: str, study: str, dataset_name: str) -> str:
    """The title of a picture: `Pareto front: my_study on parity`."""
    return f"{what}: {label(study, STUDY_LENGTH)} on {label(dataset_name, DATASET_LENGTH)}"


def counted_trials(number: int) -> str:
    """`1 finished trial`, `12 finished trials`."""
    return f"{number:,} finished trial{'s' * (number != 1)}"


def described(record: TrialRecord, objectives: Sequence[str]) -> list[str]:
    """The lines of text that a trial's point shows under the mouse: values, parameters, reason of its end, run."""
    lines = [f"trial {record.number}: {model_type_of(record)}, {record.status}"]
    for index, name in enumerate(objectives):
        value = record.value(objectives, index)
        lines += [] if value is None else [f"{name} {metric_text(value, name)}"]
    params = {name: value for name, value in record.plain_params.items() if name != MODEL_TYPE}
    named = [f"{short} {value_text(params[name])}" for name, short in short_names(params).items()]
    lines += [
        ", ".join(named[start : start + PARAMETERS_PER_LINE]) for start in range(0, len(named), PARAMETERS_PER_LINE)
    ]
    lines += [record.reason] if record.reason else []
    lines += [f"run {record.experiment_ids[0]}"] if record.experiment_ids else []
    return [label(line, LINE_LENGTH) for line in lines]


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Map each full name of a parameter to a short one: without its section, unless two names would be equal then.

    >>> short_names(["dense.num_heads", "optimizer_params.lr", "scheduler_params.name"])
    {'dense.num_heads': 'num_heads', 'optimizer_params.lr': 'lr', 'scheduler_params.name': 'scheduler name'}
    """
    short: dict[str, str] = {}
    for name in names:
        # "name" alone would not say of what: it is kept with its section.
        section, _, rest = name.partition(".")
        short[name] = f"{section.removesuffix('_params')} name" if rest == "name" else rest or name
    counts = Counter(short.values())
    return {name: label(one if counts[one] == 1 else name, PARAMETER_LENGTH) for name, one in short.items()}


def value_text(value: Any) -> str:
    """The value of a parameter: a text as it is, a number in three digits, anything else as JSON."""
    if isinstance(value, str):
        return label(value, VALUE_LENGTH)
    if isinstance(value, float):
        return short_number(value)
    return label(json.dumps(value, default=str), VALUE_LENGTH)
