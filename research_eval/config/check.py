"""Read and check a config: a file, its text, or a dict from the results store -> `ExperimentConfig`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research_eval.annotations import INT_MAX
from research_eval.config.complaints import Location, Report
from research_eval.config.construction import dataset_params, model_params
from research_eval.config.defaults import add_defaults, add_former_defaults
from research_eval.config.jsonc import MAX_DEPTH, read_object, read_text
from research_eval.config.sections import ExperimentConfig
from research_eval.errors import ConfigError
from research_eval.registry import load_extensions
from research_eval.system.untrusted import steers, user_path
from research_eval.wording import shown

MAX_TEXT = 4096  # characters of one string, which is the length that a path may have


def check_early(path: str | Path, overrides: Mapping[str, Any], needs_data: bool) -> None:
    """Find the mistakes that need no torch, whose import takes seconds on a busy machine.

    These are a file that is no JSON and, if it `needs_data`, text data that are not there. `load_config` finds all
    others together: most of them follow from constructors. Raises ConfigError.
    """
    data, _, _ = read_object(read_text(path), str(path))
    _override(data, overrides, {})
    params = data.get("dataset_params")
    if needs_data and data.get("dataset_type") == "real_world" and isinstance(params, dict):
        check_data_paths("dataset_params.data_dir", params.get("data_dir"))
        check_data_paths("dataset_params.sources", params.get("sources"))


def check_data_paths(field: str, given: Any) -> None:
    """Raise ConfigError for a path, or a list of paths, of which one leads nowhere. Any other value passes."""
    for text in given if isinstance(given, list) else [given]:
        # A text that is no path at all has its complaint later.
        if isinstance(text, str) and text and not any(map(steers, text)):
            path = user_path(text, field)
            if not os.path.lexists(path):
                raise ConfigError(f"{field}: there is no file or folder {str(path)!r}")


def load_config(
    path: str | Path, overrides: Mapping[str, Any] | None = None, origins: Mapping[str, str] | None = None
) -> ExperimentConfig:
    """Read and check a config file. The others as in `parse_config`. Raises ConfigError with all mistakes."""
    return parse_config(read_text(path), str(path), overrides, origins)


def parse_config(
    text: str, source: str, overrides: Mapping[str, Any] | None = None, origins: Mapping[str, str] | None = None
) -> ExperimentConfig:
    """Check the text of a config; `source` names it in messages.

    `overrides` are values of command-line flags under dotted keys ("epochs", "training_params.device"); None is a
    value like any other. `origins` are what messages call them, if that is not a flag of their own name. Raises
    ConfigError with all mistakes, one a line.
    """
    data, lines, duplicates = read_object(text, source)
    places: dict[Location, int | str] = {**lines, **_override(data, overrides or {}, origins or {})}
    report = Report(source, places)
    report.add_duplicates(duplicates)
    return _check(data, report)


def config_from_dict(config: Mapping[str, Any], source: str = "config") -> ExperimentConfig:
    """Check a config that is no text. Raises ConfigError with all mistakes."""
    return _check(dict(config), Report(source, {}))


def stored_config(config: Mapping[str, Any], source: str) -> ExperimentConfig:
    """Check the config of a run, from the results or from the run's folder. Raises ConfigError with all mistakes.

    An option that is younger than the run has the value that stands for the program without the option.
    """
    data = dict(config)
    add_former_defaults(data)
    return _check(data, Report(source, {}))


def _override(data: dict[str, Any], overrides: Mapping[str, Any], origins: Mapping[str, str]) -> dict[Location, str]:
    """Write the values of flags into the data; returns the flag of each place, for messages."""
    flags: dict[Location, str] = {}
    for key, value in overrides.items():
        *sections, name = path = tuple(key.split("."))
        target: Any = data
        for section in sections:
            target = target.setdefault(section, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):  # else the section is no object, which the check reports
            target[name] = value
            flags[path] = origins.get(key, f"--{name}")
    return flags


def _check(data: dict[str, Any], report: Report) -> ExperimentConfig:
    load_extensions()  # before the report: a file that fails is no mistake of the config
    data.pop("$schema", None)
    _check_values(data, (), report)
    add_defaults(data)
    config = report.validated(ExperimentConfig, data)
    sections = {"dataset_params": dataset_params(data, report), "model_params": model_params(data, report)}
    report.raise_if_any()
    assert isinstance(config, ExperimentConfig)
    return config.model_copy(update=sections)


def _check_values(value: Any, path: Location, report: Report) -> None:
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
