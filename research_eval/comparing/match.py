"""Models of equal cost: sizes with which each model type costs what a given config costs.

An axis is what shall be equal. FLOPs are counted on an executed forward pass. The search uses the model's own formula,
which is fast, and corrects it by the executed count.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, get_args

import numpy as np
import torch

from research_eval.annotations import options_of
from research_eval.comparing.sizes import Coarse, Fine, Found, Sizes, around, nearest
from research_eval.comparing.speeds import Bracket, Speed, compare_speeds
from research_eval.config.check import config_from_dict
from research_eval.config.construction import without_draws
from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.token_data import DataSplits
from research_eval.errors import ConfigError
from research_eval.models.base_model import EvaluableModel, adapt, formula_of
from research_eval.registry import models_for
from research_eval.runs.prepare import create_model, model_context, prepare
from research_eval.system.phases import phase
from research_eval.tasks.base import task_of
from research_eval.training.evaluate import measure_forward_flops
from research_eval.training.latency import Timed, timed_batches
from research_eval.wording import hint

Axis = Literal["total_params", "active_params", "flops", "latency"]
AXES: tuple[Axis, ...] = get_args(Axis)
CORRECTIONS = 4  # of a formula by what was executed, for one depth and width, and then for all
LOOSE = 0.02  # a search without any correction need not be more exact
CANDIDATES = 8  # models of other sizes that are timed, for each number of blocks
log = logging.getLogger(__name__)

DEPTH_OPTIONS = ("num_loops", "max_path_len", "num_layers")  # of a class with several, the first one
DEPTHS = (0, 1, -1)  # blocks more than the base has


@dataclass(frozen=True)
class Match:
    """A config whose model has the wanted cost. `target` is the cost of the base."""

    config: ExperimentConfig
    axis: str
    cost: float
    target: float
    tol: float
    sizes: Sizes
    speed: Speed | None = None  # of a latency: with an interval

    @property
    def ratio(self) -> float:
        """Its cost as a multiple of the base's."""
        return self.cost / self.target

    @property
    def is_matched(self) -> bool:
        """Whether the cost is within the tolerance; for a latency, whether its whole interval is."""
        if self.speed is not None:
            return self.speed.is_within(self.tol)
        return abs(self.ratio - 1) <= self.tol


def check_axis(axis: str) -> None:
    """Raise ConfigError for an unknown axis."""
    if axis not in AXES:
        raise ConfigError(f"--axis: expected one of {', '.join(AXES)}, got {axis!r}.{hint(axis, AXES)}")


def match(
    base: ExperimentConfig,
    model_type: str,
    axis: str,
    tol: float,
    data: DataSplits,
    params: Mapping[str, Any] | None = None,
) -> Match:
    """The config of a model type that costs what the base costs, with the data and the training of the base.

    Options that both models have are those of the base; `params` are others, which stay as they are. Raises ConfigError
    for parameters that no model can have.
    """
    check_axis(axis)
    target = cost_of(base, axis, data)
    started = _begin(base, model_type, dict(params or {}))
    if model_type == base.model_type and not params:
        return Match(base, axis, target, target, tol, {})
    if axis == "latency":
        return _by_latency(base, started, tol, data, params or {})
    found = _solved(started, axis, target, tol, data, params or {})
    return Match(_with(started, found.sizes), axis, found.cost, target, tol, found.sizes)


def _begin(base: ExperimentConfig, model_type: str, params: dict[str, Any]) -> ExperimentConfig:
    """The config of the base with another model: with its depth, and with its values of the options that both have."""
    models = models_for(base.task_name)
    cls, before = models.get_or_explain(model_type), models.get_or_explain(base.model_type)
    options = options_of(cls)
    shared = {name: value for name, value in base.model_params.items() if name in options} if cls is not before else {}
    depth, name = base.model_params.get(_depth_option(before)), _depth_option(cls)
    if depth is not None and name:
        shared[name] = depth
        if name != "num_layers":  # layers and loops would multiply
            shared.pop("num_layers", None)
    if "dim_feedforward" in params or "dim_feedforward_factor" in params:
        shared = {name: value for name, value in shared.items() if not name.startswith("dim_feedforward")}
    given = base.model_params if cls is before else {}
    changes = {"model_type": model_type, "model_params": {**given, **shared, **params}}
    return config_from_dict(base.to_dict() | changes, source=f"{base.experiment_name} as {model_type}")


def _depth_option(cls: type) -> str:
    """The option that says how many blocks a sample passes, one after the other; "" if the model has none."""
    return next((name for name in DEPTH_OPTIONS if name in options_of(cls)), "")


def _with(config: ExperimentConfig, sizes: Sizes) -> ExperimentConfig:
    """The checked config with other sizes. Raises ConfigError for sizes that do not fit each other."""
    params = {name: value for name, value in config.model_params.items() if name not in sizes}
    if "dim_feedforward" in sizes:
        params.pop("dim_feedforward_factor", None)
    changes = {"model_params": {**params, **sizes}}
    return config_from_dict(config.to_dict() | changes, source=f"{config.model_type} of another size")


# ---------------------------------------------------------------------------------------------------------- the search


def _solved(
    start: ExperimentConfig, axis: str, target: float, tol: float, data: DataSplits, fixed: Mapping[str, Any]
) -> Found:
    """Sizes whose cost is the target, as measured."""
    if axis != "flops":
        return _searched(start, lambda config: _counted(config, axis, data), target, tol / 2, fixed)

    def count(config: ExperimentConfig) -> float:
        return _formula(config, data)

    fine = _size_names(start, fixed)[:1]
    best, corrections = None, 0
    found = _searched(start, count, target, max(tol, LOOSE) / 4, fixed)
    while True:
        executed = cost_of(_with(start, found.sizes), axis, data)
        if best is None or abs(executed / target - 1) < best.error(target):
            best = Found(found.sizes, executed)
        if best.error(target) <= tol / 2 or not executed or not found.cost:
            return best
        aim = target * found.cost / executed
        if corrections < CORRECTIONS:  # what was executed holds for this depth and width
            kept = {name: value for name, value in found.sizes.items() if name not in fine}
            near = _searched(_resized(start, kept), count, aim, 0.0, {**fixed, **kept})
            other = Found({**kept, **near.sizes}, near.cost)
            if other.sizes == found.sizes:
                corrections = CORRECTIONS
        if corrections >= CORRECTIONS:
            other = _searched(start, count, aim, tol / 4, fixed)
        corrections += 1
        if other.sizes == found.sizes or corrections > 2 * CORRECTIONS:
            return best
        found = other


def _size_names(start: ExperimentConfig, fixed: Mapping[str, Any]) -> list[str]:
    """The options that the search may change; it changes the first one in steps of one."""
    cls = models_for(start.task_name).get_or_explain(start.model_type)
    options = options_of(cls)
    names = [name for name in getattr(cls, "size_options", EvaluableModel.size_options) if name in options]
    return [name for name in names if name not in fixed]


def _searched(
    start: ExperimentConfig,
    measure: Callable[[ExperimentConfig], float],
    target: float,
    tol: float,
    fixed: Mapping[str, Any],
) -> Found:
    """The sizes that `start` needs for this cost; a model that has none that may change stays as it is."""
    cls = models_for(start.task_name).get_or_explain(start.model_type)
    options = options_of(cls)
    names = _size_names(start, fixed)
    if not names:
        log.warning("%s has none of its `size_options`: it is compared as it is", start.model_type)
        return Found({}, measure(start))

    def cost(sizes: Sizes) -> float | None:
        try:
            return measure(_resized(start, sizes))
        except (ConfigError, ValueError, RuntimeError):
            return None

    def fine(sizes: Sizes) -> Fine:
        width = int(sizes.get("embed_dim", start.model_params.get("embed_dim", 64)))
        return Fine(names[0], 1, 16 * width)

    depth, coarse = _depth_option(cls), []
    heads = int(start.model_params.get("num_heads") or 1)
    for name in names[1:]:
        value = int(start.model_params.get(name) or start.model_params["embed_dim"])
        step = 2 * heads if name == "embed_dim" and "num_heads" in options else 1
        coarse.append(Coarse(name, around(value, step, 4)))
    if isinstance(start.model_params.get(depth), int) and depth not in fixed:
        blocks = [start.model_params[depth] + more for more in DEPTHS]
        coarse.append(Coarse(depth, [number for number in blocks if number > 0]))
    try:
        return nearest(cost, fine, coarse, target, tol)
    except ValueError as error:
        raise ConfigError(f"{start.model_type}: {error}") from error


def _resized(start: ExperimentConfig, sizes: Sizes) -> ExperimentConfig:
    """The config with other sizes, unchecked: a search builds thousands of them."""
    params = {name: value for name, value in start.model_params.items() if name not in sizes}
    if "dim_feedforward" in sizes:
        params.pop("dim_feedforward_factor", None)
    return start.model_copy(update={"model_params": {**params, **sizes}})


# -------------------------------------------------------------------------------------------------------------- costs


def cost_of(config: ExperimentConfig, axis: str, data: DataSplits) -> float:
    """What the freshly initialised model of a config costs on an axis: counted, executed or timed."""
    if axis in ("total_params", "active_params"):
        return _counted(config, axis, data)
    runtime, _, model = prepare(config, data)
    if axis == "flops":
        batches = data.validation.batches(config.training_params.eval_batch_size or config.batch_size, runtime.device)
        return measure_forward_flops(model, batches, runtime, task=task_of(config.task, data))
    return 1000 * median(_timed(config, data).repetition())


def _counted(config: ExperimentConfig, axis: str, data: DataSplits) -> float:
    model = _without_memory(config, data)
    return float(model.get_parameter_count() if axis == "total_params" else model.get_active_parameter_count())


def _formula(config: ExperimentConfig, data: DataSplits) -> float:
    """The model's own count of FLOPs, averaged over the lengths of the validation split; executed ones without it."""
    model = _without_memory(config, data)
    lengths, counts = _lengths(data)
    found = [formula_of(model, length) for length in lengths]
    if None in found:
        return cost_of(config, "flops", data)
    return float(np.average(np.array(found, float), weights=counts))


def _lengths(data: DataSplits) -> tuple[list[int], list[int]]:
    lengths, counts = np.unique(data.validation.lengths, return_counts=True)
    return lengths.tolist(), counts.tolist()


def _without_memory(config: ExperimentConfig, data: DataSplits) -> EvaluableModel:
    """The model on torch's "meta" device, where tensors have shapes and no values."""
    meta = torch.device("meta")
    context = model_context(config, data)
    with meta, without_draws():
        made = create_model(config.model_type, config.model_params, context, meta, config.task_name)
    return adapt(made, config.model_type)


# ------------------------------------------------------------------------------------------------------------- latency


def _timed(config: ExperimentConfig, data: DataSplits) -> Timed:
    runtime, _, model = prepare(config, data)
    batches = data.validation.batches(config.training_params.eval_batch_size or config.batch_size, runtime.device)
    # Where one thread computes, its CPU time does not count the time that other programs had the core.
    alone = runtime.device.type == "cpu" and torch.get_num_threads() == 1
    timed = Timed(model, timed_batches(batches), runtime, time.thread_time if alone else None)
    timed.repetition()  # warm-up
    return timed


def _by_latency(
    base: ExperimentConfig, start: ExperimentConfig, tol: float, data: DataSplits, fixed: Mapping[str, Any]
) -> Match:
    """Sizes with which a batch takes as long as with the base. Both are timed in turn, and FLOPs guide the search.

    A model that is too slow however small it is gets fewer blocks, down to half of them, and one that is too fast
    however large it is gets more, up to twice as many.
    """
    first, flops = _timed(base, data), cost_of(base, "flops", data)
    depth = _depth_option(models_for(start.task_name).get_or_explain(start.model_type))
    blocks = start.model_params.get(depth) or 0
    few, many = (max(blocks // 2, 1), 2 * blocks) if blocks and depth not in fixed else (0, 0)
    tried: list[Match] = []
    number, direction = blocks, 0
    while True:
        held = {} if number == blocks else {depth: number}
        found = _as_fast(first, flops, _with(start, held), tol, data, {**fixed, depth: number})
        tried += found
        best = min(tried, key=lambda one: (not one.is_matched, abs(math.log(one.ratio))))
        wanted = -1 if all(one.ratio > 1 for one in found) else int(all(one.ratio < 1 for one in found))
        is_over = abs(best.ratio - 1) <= tol or wanted in (0, -direction)
        if is_over or not few <= number + wanted <= many:
            break
        number, direction = number + wanted, wanted
    of_best = best.config.model_params.get(depth) or 0
    return replace(best, sizes={**({depth: of_best} if of_best != blocks else {}), **best.sizes})


def _as_fast(
    first: Timed, flops: float, start: ExperimentConfig, tol: float, data: DataSplits, fixed: Mapping[str, Any]
) -> list[Match]:
    """Models that come closer and closer to the speed of the first one, down to one that is matched."""
    bracket = Bracket(flops)
    found: list[Match] = []

    def formula(config: ExperimentConfig) -> float:
        return _formula(config, data)

    while len(found) < CANDIDATES:
        with phase("timing"):
            known = [other.sizes for other in found]
            near = (_searched(start, formula, flops, tol / 4, fixed) for flops in bracket.proposals())
            one = next((one for one in near if one.sizes not in known), None)
            if one is None:
                break  # the smallest or the largest one, or none lies between
            config = _with(start, one.sizes)
            speed = compare_speeds(first, _timed(config, data), tol)
        cost = speed.ratio * speed.milliseconds
        found.append(Match(config, "latency", cost, speed.milliseconds, tol, one.sizes, speed))
        if speed.is_within(tol) or speed.is_unknown(tol):
            break
        bracket.add(one.cost, speed.ratio)
    return found
