"""`model_params` and `dataset_params` -> checked arguments of the constructor, tried out on a construction.

Only a constructor knows which values go together, so the check constructs the model (without memory) or the task.
Models and datasets are imported inside the functions, since torch takes a second to import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from pydantic import BaseModel

from research_eval.annotations import build, grouped_arguments
from research_eval.config.complaints import Report
from research_eval.config.defaults import defaults_of_kind
from research_eval.config.signatures import (
    MODEL_PROVIDED,
    context_arguments,
    fields_of,
    json_text,
    signature_model,
    spellings_of,
    younger_fields,
)
from research_eval.datasets.kinds import DATASET_KINDS, DatasetKind, task_name
from research_eval.errors import ConfigError
from research_eval.registry import models_for
from research_eval.wording import largest_of

log = logging.getLogger(__name__)

MAX_PARAMETERS = 10**11
MAX_TENSORS = 10_000


# ------------------------------------------------------------------------------------------------------- arguments


def model_arguments(model_type: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """`model_params` of a model under canonical names, with all defaults. Raises ConfigError with all mistakes."""
    report = Report("model_params", {})
    arguments = model_params({"model_type": model_type, "model_params": dict(params)}, report)
    report.raise_if_any()
    return arguments or {}


def model_params(data: Mapping[str, Any], report: Report) -> dict[str, Any] | None:
    """The arguments of a config's model; None after mistakes, which are then in the report."""
    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        return None  # reported with the sections
    try:
        cls = models_for(task_name(data)).get_or_explain(model_type)
    except ConfigError as error:
        report.add((), str(error), at=("model_type",))
        return None
    arguments = _arguments("model_params", cls, MODEL_PROVIDED, data, report)
    if arguments is not None:
        _try_model(cls, arguments, report)
    return arguments


def dataset_params(data: Mapping[str, Any], report: Report) -> dict[str, Any] | None:
    """The arguments of a config's dataset; None after mistakes, which are then in the report."""
    dataset_type = data.get("dataset_type")
    if not isinstance(dataset_type, str) or dataset_type not in DATASET_KINDS:
        return None  # reported with the sections
    kind = DATASET_KINDS[dataset_type]()
    name = _known_name(kind, data, report)
    if name is None and not kind.any_name:
        return None  # the name decides which parameters there are
    arguments = _arguments("dataset_params", kind.constructor(name or ""), kind.provided, data, report)
    if arguments is not None and name is not None:
        too_large = kind.too_large(name, arguments)
        for parameter, message in too_large.items():
            report.add(("dataset_params", parameter), message)
        if not too_large:
            _try(lambda: kind.build(name, arguments), "dataset_params", report)
    return arguments


def _known_name(kind: DatasetKind, data: Mapping[str, Any], report: Report) -> str | None:
    """The config's dataset_name if the kind accepts it; else None, and the report says why."""
    name, params = data.get("dataset_name"), data.get("dataset_params")
    if not isinstance(name, str):
        return None  # reported with the sections
    try:
        kind.check_name(name, params if isinstance(params, dict) else {})
    except ConfigError as error:
        report.add((), str(error), at=("dataset_name",))
        return None
    return name


def _arguments(
    section: str, cls: type, provided: frozenset[str], data: Mapping[str, Any], report: Report
) -> dict[str, Any] | None:
    """The flat arguments of a constructor with all defaults that JSON can hold; None after mistakes."""
    given: dict[str, Any] = data.get(section, {})
    if not isinstance(given, dict):
        return None  # reported with the sections
    model = signature_model(cls, provided)
    kept = defaults_of_kind(data, section)  # no config leaves them out: their absence says the age of a stored one
    given = _without_replaced(section, given, model, report)
    spelled = _spelled(section, given, provided, model, report)
    values = _without_defaults({name: given[key] for name, key in spelled.items()}, model)
    checked = report.validated(model, values, (section,), spelled)
    if checked is None or len(spelled) < len(given):
        return None
    arguments = {
        name: getattr(checked, field) for field, name in zip(model.model_fields, fields_of(model), strict=True)
    }
    arguments |= checked.model_extra or {}
    # What JSON cannot hold stays with the constructor, and so does the default of a younger option.
    left_out = younger_fields(model) - set(kept)
    arguments = {
        name: value
        for name, value in arguments.items()
        if name in values or (name not in left_out and json_text(value) is not None)
    }
    fit_each_other = _try(lambda: grouped_arguments(cls, arguments), section, report)
    return arguments if fit_each_other else None


def _without_replaced(section: str, given: dict[str, Any], model: type[BaseModel], report: Report) -> dict[str, Any]:
    """The values without those of the file that a flag replaces under another spelling of their key."""
    spellings = spellings_of(model)
    from_flags = {spellings.get(key, key) for key in given if report.is_from_flag((section, key))}
    return {
        key: value
        for key, value in given.items()
        if report.is_from_flag((section, key)) or spellings.get(key, key) not in from_flags
    }


def _spelled(
    section: str, given: Mapping[str, Any], provided: frozenset[str], model: type[BaseModel], report: Report
) -> dict[str, str]:
    """Canonical name -> key in the file. Reports, and leaves out, keys of the program and second spellings."""
    spellings = spellings_of(model)
    spelled: dict[str, str] = {}
    for key in given:
        name = spellings.get(key, key)
        if key in provided:
            report.add((section,), f"{key!r} is set by the program: leave it out", at=(section, key))
        elif name in spelled:
            message = f"{spelled[name]!r} and {key!r} are two spellings of one key: keep one"
            report.add((section,), message, at=(section, key))
        else:
            spelled[name] = key
    return spelled


def _without_defaults(values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """The values that differ from the default, which is right even if its type is not (`size: int = None`)."""
    fields = fields_of(model)

    def is_default(name: str, value: Any) -> bool:
        default = None if name not in fields or fields[name].is_required() else json_text(fields[name].default)
        return default is not None and json_text(value) == default

    return {name: value for name, value in values.items() if not is_default(name, value)}


# ----------------------------------------------------------------------------------------------- trial construction


def _try(construct: Callable[[], object], section: str, report: Report) -> bool:
    """Report what a constructor or a group says about values that do not fit each other; False if it says so."""
    try:
        construct()
    except (ValueError, MemoryError, OverflowError) as error:
        report.add((section,), (str(error) or "too large").split("\nException raised from")[0])
        return False
    except Exception:
        # A foreign constructor may need real numbers or more context. If it is wrong, the run shows its traceback.
        log.debug("%s: the trial construction failed", section, exc_info=True)
    return True


def _try_model(cls: type, arguments: Mapping[str, Any], report: Report) -> None:
    """Construct a model without memory for its weights. Classes that do not inherit from ours are not constructed."""
    import torch

    from research_eval.models.base_model import EvaluableModel

    if not issubclass(cls, EvaluableModel):
        return
    meta = torch.device("meta")  # tensors with a shape and no values: any size is built at once
    context = {"vocab_size": 8, "num_classes": 2, "padding_idx": 0, "max_length": 16, "device": meta}

    def construct() -> None:
        with meta, without_draws(), _counted_parameters(arguments):
            build(cls, {**context_arguments(cls, context), **arguments})

    _try(construct, "model_params", report)


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


def without_draws() -> AbstractContextManager[object]:
    """Within the block torch draws no values for meta tensors, and scales none.

    They have no values, and torch would import its compiler, which takes seconds, for the attempt.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    init = torch.nn.init
    draws = (init.normal_, init.uniform_, init.kaiming_uniform_, torch.Tensor.normal_, torch.Tensor.uniform_)
    drawn = (torch.randn, torch.rand)
    products = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)

    class WithoutDraws(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            tensor: torch.Tensor
            if func in draws:
                tensor = args[0] if args else kwargs["tensor"]
                if tensor.is_meta:
                    return tensor
            if func in drawn and "device" not in kwargs:
                return torch.empty(*args, **kwargs)
            if func in products and not kwargs and isinstance(args[1], int | float):
                tensor = args[0]
                return tensor if tensor.is_meta and tensor.is_floating_point() else func(*args)
            return func(*args, **kwargs)

    return WithoutDraws()
