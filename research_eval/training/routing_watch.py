"""The record of a run's routing after each epoch: a report, its alarms, and the path of every validation sample.

S samples  T steps of a path  N experts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.token_data import Batches, DataSplits, TokenData
from research_eval.layers.path.router import RunningStatistics
from research_eval.layers.stacked import Dropout
from research_eval.models.base_model import EvaluableModel, logits_of, routed_parameters
from research_eval.routing.alarms import SCORE, Circumstances, find_alarms, has_alarms
from research_eval.routing.record import EvaluationRecorder
from research_eval.routing.report import routing_report, transition_metrics
from research_eval.routing.roles import (
    MAX_STEPS,
    MAX_UNITS,
    Usage,
    expert_roles,
    flows_by_kind,
    members_of,
    path_usages,
    spread_evenly,
    token_members,
)
from research_eval.routing.trace_files import ROUTING_FOLDER, write_samples, write_trace
from research_eval.store.metrics import gain_sign
from research_eval.tasks.base import Evaluation, Task
from research_eval.training.evaluate import evaluate
from research_eval.training.length import Length
from research_eval.training.runtime import Runtime
from research_eval.wording import printable

TRAINING_MODE_SAMPLES = 1000  # enough for an accuracy to within about 0.03
KEPT_LISTS = ("path_length_histogram", "step_entropy")
# These stay in evaluation mode when only the noise of routing is of interest.
QUIET = (Dropout, nn.modules.dropout._DropoutNd, RunningStatistics)


class RoutingWatch:
    """Reports on the routing of a run, epoch by epoch.

    Create it before the training starts: it keeps a copy of the router's initial weights.
    """

    def __init__(
        self,
        model: EvaluableModel,
        validation: Batches,
        task: Task,
        data: DataSplits,
        config: ExperimentConfig,
        runtime: Runtime,
        folder: Path,
    ) -> None:
        self._validation = validation
        self._task = task
        self._selected_by = config.training_params.select_by or task.selected_by
        self._num_classes = data.num_classes
        self._runtime = runtime
        self._folder = folder / ROUTING_FOLDER if config.training_params.trace_routing else None
        self._params = config.model_params
        self._data = data
        evaluations = Length.of(config, data.train).evaluations
        self._circumstances = Circumstances.of(evaluations, config.model_params)
        self._initial = [parameter.detach().clone() for parameter in routed_parameters(model, "router")]

    def epoch_end(
        self, epoch: int, model: EvaluableModel, evaluation: Evaluation, reports: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The metrics of the last evaluation, with the alarms that this epoch raises.

        It appends a short form of the metrics to `reports` and writes a trace if the config asks for one.
        """
        metrics = {**model.get_model_specific_metrics(), **self._parameter_metrics(model)}
        if self._folder is not None:
            metrics |= routing_metrics(model, evaluation, self._validation.data, self._num_classes, self._task)
            metrics |= training_mode_metrics(model, self._validation, evaluation, self._runtime, self._task)
        kept = {name: value for name, value in metrics.items() if _is_kept(name, value)}
        score = gain_sign(f"val_{self._selected_by}") * evaluation.metric(self._selected_by)
        is_best = all(score > report[SCORE] for report in reports if SCORE in report)
        reports.append(kept | {SCORE: score})
        # Each alarm fires once per run: report it in its own epoch only.
        alarms = [alarm for alarm in find_alarms(reports, self._circumstances) if alarm.epoch == epoch]
        if self._folder is not None:
            split = self._data.validation
            write_samples(self._folder, split.tokens, split.offsets, _names(self._data))
            summary = {
                "epoch": epoch,
                **metrics,
                "alarms": [asdict(alarm) for alarm in alarms],
                "best_so_far": bool(is_best),
                "router": _router_facts(model, self._params),
            }
            write_trace(self._folder, _columns(model, self._validation.data, evaluation), summary)
        return {**metrics, **{f"alarm_{alarm.name}": alarm.value for alarm in alarms}, "alarms": alarms}

    def _parameter_metrics(self, model: EvaluableModel) -> dict[str, float]:
        """Similarity of the experts' weights, and relative change of the router's weights since the start."""
        metrics = {}
        similarity = expert_similarity(model)
        if similarity is not None:
            metrics["expert_similarity"] = similarity
        if self._initial:
            metrics["router_change"] = relative_change(self._initial, list(routed_parameters(model, "router")))
        return metrics


def _is_kept(name: str, value: Any) -> bool:
    """Whether a metric belongs to the short form: numbers, and the lists that alarms and pictures need.

    A user's model may return anything under these names, so their form is checked.
    """
    if name == "expert_load":
        sizes = {len(row) if isinstance(row, list) else 0 for row in value} if isinstance(value, list) else set()
        return len(sizes) == 1 and 0 not in sizes
    return isinstance(value, list) if name in KEPT_LISTS else isinstance(value, int | float)


def alarm_metrics(reports: Sequence[dict[str, Any]], config: ExperimentConfig, evaluations: int) -> dict[str, Any]:
    """All alarms of a run and their number; empty for a short run of a model without experts."""
    if not has_alarms(reports):
        return {}
    alarms = find_alarms(reports, Circumstances.of(evaluations, config.model_params))
    return {"alarms": [asdict(alarm) for alarm in alarms], "num_alarms": len(alarms)}


def routing_metrics(
    model: EvaluableModel, evaluation: Evaluation, data: TokenData, num_classes: int, task: Task
) -> dict[str, Any]:
    """How the recorded paths depend on classes, groups and planted paths; empty for a model without routing.

    If a model routes tokens, a sample's path is the most used expert of every layer.
    """
    recorder = model.recorder()
    paths_ST = None if recorder is None else recorder.paths()
    if recorder is None or paths_ST is None or not len(paths_ST):
        return {}
    rows_S = evaluation.rows_N
    classes_S = task.targets_for_report(data.labels[rows_S])
    groups_S = None if data.groups is None else data.groups[rows_S]
    about_tokens = recorder.is_about_tokens()
    metrics = routing_report(
        paths_ST, classes_S, num_classes, groups_S, recorder.values(), with_lengths=not about_tokens
    )
    if about_tokens:
        metrics |= transition_metrics(paths_ST, recorder.num_experts)
    if data.paths is not None:
        from research_eval.routing.recovery import path_recovery  # scipy is slow to import

        found = path_recovery(paths_ST, data.paths[rows_S], recorder.num_experts)
        metrics |= {
            "planted_recovery": found.overall,
            "planted_recovery_by_chance": found.overall_by_chance,
            "planted_step_recovery": found.per_step,
            "planted_step_recovery_by_chance": found.per_step_by_chance,
            "planted_same_length": found.same_length,
            "planted_experts": found.experts_F.tolist(),
        }
    return metrics


def role_metrics(model: EvaluableModel, evaluation: Evaluation, data: DataSplits, task: Task) -> dict[str, Any]:
    """What the experts do, and the paths of each group or class; empty for a model without routing.

    Call it after an evaluation of the validation split.
    """
    recorder = model.recorder()
    paths_ST = None if recorder is None else recorder.paths()
    if recorder is None or paths_ST is None or not len(paths_ST):
        return {}
    split = data.validation
    groupings: dict[str, tuple[Any, Sequence[str]]] = {}
    if split.groups is not None:
        number = int(split.groups.max()) + 1
        groupings["group"] = split.groups[evaluation.rows_N], [f"group {group}" for group in range(number)]
    classes_S = task.targets_for_report(split.labels[evaluation.rows_N])
    if classes_S is not None:
        groupings["class"] = classes_S, [printable(str(name)) for name in data.label_names]
    metrics: dict[str, Any] = {"expert_roles": expert_roles(_usages(recorder, paths_ST, evaluation, data, groupings))}
    for grouping, (kinds_S, names) in list(groupings.items())[:1]:
        metrics["path_flows"] = flows_by_kind(paths_ST, kinds_S, names, grouping, recorder.num_experts)
    return metrics


def _usages(
    recorder: EvaluationRecorder,
    paths_ST: NDArray[np.int64],
    evaluation: Evaluation,
    data: DataSplits,
    groupings: dict[str, tuple[Any, Sequence[str]]],
) -> list[Usage]:
    """The experts of classes, groups and tokens, for decisions about samples and about tokens."""
    split, names = data.validation, partial(token_names, data)
    kept_S = spread_evenly(len(paths_ST), MAX_UNITS)
    rows_S = evaluation.rows_N[kept_S]
    members = {name: members_of(kinds_S[kept_S], kinds) for name, (kinds_S, kinds) in groupings.items()}
    shares_STN = recorder.expert_shares()
    if shares_STN is None:
        inside = np.concatenate([np.arange(*split.offsets[row : row + 2]) for row in rows_S])
        unit_of_token = np.repeat(np.arange(len(rows_S)), split.lengths[rows_S])
        tokens, member_KU = token_members(split.tokens[inside].astype(np.int64), unit_of_token, len(rows_S))
        return path_usages(paths_ST[kept_S], recorder.num_experts, members | {"token": (names(tokens), member_KU)})
    usages = []
    for layer in spread_evenly(recorder.num_steps, MAX_STEPS).tolist():
        title = f"layer {layer + 1}"
        usages.append(Usage(title, shares_STN[kept_S, layer], members))
        sample_D, token_D, expert_D = recorder.token_choices(layer)
        kept_D = spread_evenly(len(sample_D), MAX_UNITS) if len(sample_D) else np.arange(0)
        places = split.offsets[evaluation.rows_N[sample_D[kept_D]]] + token_D[kept_D]
        tokens, member_KU = token_members(split.tokens[places].astype(np.int64), np.arange(len(kept_D)), len(kept_D))
        shares_DN = np.eye(recorder.num_experts, dtype=np.float32)[expert_D[kept_D]]
        usages.append(Usage(title, shares_DN, {"token": (names(tokens), member_KU)}))
    return usages


def token_names(data: DataSplits, tokens: Sequence[int]) -> list[str]:
    """The tokens as text; ids of generated data stay numbers."""
    if data.tokenizer is None:
        return [str(token) for token in tokens]
    return [printable(data.tokenizer.id_to_token(token) or str(token)) for token in tokens]


def regret_metrics(
    model: EvaluableModel, splits: dict[str, Batches], num_outputs: int, runtime: Runtime, task: Task
) -> dict[str, float]:
    """The accuracy that the router's own routes lose against the planted ones, for each split.

    A split's key is the prefix of its metric's name. The first split decides which expert stands for which function.
    The result is empty for a task without known paths, and for a model that cannot follow them.
    """
    from research_eval.routing.recovery import path_recovery, router_regret

    own = {}
    metrics: dict[str, float] = {}
    mapping_TF = None
    for prefix, batches in splits.items():
        own[prefix] = evaluate(model, batches, num_outputs, runtime, task)
        recorder, planted = model.recorder(), batches.data.paths
        if mapping_TF is None:
            if recorder is None or planted is None:
                return {}
            found = path_recovery(recorder.paths(), planted[own[prefix].rows_N], recorder.num_experts)
            mapping_TF = torch.from_numpy(found.experts_TF).to(runtime.device)
    if not model.follow(mapping_TF):
        return {}
    for prefix, batches in splits.items():
        forced = evaluate(model, batches, num_outputs, runtime, task)
        before, after = own[prefix].correct_N, forced.correct_N
        if before is not None and after is not None:
            metrics[f"{prefix}router_regret"] = float(router_regret(after, before).regret)
    model.follow(None)
    return metrics


@torch.no_grad()
def relative_change(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """|after - before| / |before|, as Euclidean norms over all entries."""
    change = sum(float((new - old).square().sum()) for old, new in zip(before, after, strict=True))
    size = sum(float(old.square().sum()) for old in before)
    return float((change / max(size, 1e-12)) ** 0.5)


@torch.no_grad()
def expert_similarity(model: nn.Module) -> float | None:
    """Mean cosine between the weights of two experts, in the pool with the largest mean.

    1 means copies, 0 unrelated weights. A pool is a module named `experts` whose matrices have the experts as their
    first dimension. Biases and norms do not count, because all experts start with the same values. None if no pool has
    two experts.
    """
    means = []
    for name, pool in model.named_modules():
        matrices = [parameter for parameter in pool.parameters() if parameter.ndim > 2]
        if name.split(".")[-1] != "experts" or len({len(matrix) for matrix in matrices}) != 1:
            continue
        num_experts = len(matrices[0])
        if num_experts > 1:
            products_NN = sum(m_NP @ m_NP.T for m_NP in (matrix.detach().flatten(1).float() for matrix in matrices))
            assert isinstance(products_NN, torch.Tensor)
            size_N = products_NN.diagonal().clamp_min(1e-12).sqrt()
            cosines_NN = products_NN / (size_N * size_N.unsqueeze(1))
            others = num_experts * (num_experts - 1)
            means.append(float((cosines_NN.sum() - cosines_NN.diagonal().sum()) / others))
    return max(means, default=None)


@torch.no_grad()
def training_mode_metrics(
    model: EvaluableModel, batches: Batches, evaluation: Evaluation, runtime: Runtime, task: Task
) -> dict[str, float]:
    """Accuracy with the routing noise of training but without dropout, and its gap to the evaluation.

    It uses at most TRAINING_MODE_SAMPLES samples, spread evenly over the lengths. Generators, buffers and records are
    the same afterwards.
    """
    if evaluation.correct_N is None:
        return {}
    rows_S = np.concatenate(batches.order(0))
    chosen = rows_S[np.linspace(0, len(rows_S) - 1, min(len(rows_S), TRAINING_MODE_SAMPLES)).astype(int)]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    hits = 0
    model.train()
    for module in model.modules():
        if isinstance(module, QUIET):
            module.eval()
    # The draws of this pass must not change those of the training.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for start in range(0, len(chosen), batches.batch_size):
            batch = batches.take(chosen[start : start + batches.batch_size])
            with runtime.autocast():
                logits_BC = logits_of(model, batch)
            hits += int((task.answers(logits_BC) == batch.labels).sum())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.eval()
    # The evaluation's answers on the same samples, indexed by their place in the split.
    correct_S = np.zeros(len(rows_S), np.bool_)
    correct_S[evaluation.rows_N] = evaluation.correct_N
    accuracy = hits / max(len(chosen), 1)
    return {
        "training_mode_accuracy": accuracy,
        "training_mode_gap": accuracy - float(correct_S[chosen].mean()) if len(chosen) else 0.0,
    }


def _names(data: DataSplits) -> dict[str, Any]:
    """The names of the classes, and those of the tokens that occur in the validation split."""
    tokens = np.unique(data.validation.tokens).tolist()
    names = [] if data.tokenizer is None else token_names(data, tokens)
    return {"labels": list(data.label_names), "tokens": {str(t): n for t, n in zip(tokens, names, strict=False)}}


def _router_facts(model: EvaluableModel, params: dict[str, Any]) -> dict[str, Any]:
    """How the router chooses: the options that say so, and the bias that may overturn its probabilities."""
    names = ("router_mode", "halt", "route", "gate_scale", "max_visits", "top_k_experts")
    facts = {name: params[name] for name in names if name in params}
    buffers = dict(model.named_buffers())
    bias = [buffer.tolist() for name, buffer in buffers.items() if name.endswith("balance_bias")]
    if bias:
        facts["balance_bias"] = bias[0] if len(bias) == 1 else bias  # of a path's steps, or of layers
    return facts | {name: float(buffers[f"halting.{name}"]) for name in ("threshold",) if f"halting.{name}" in buffers}


def _columns(model: EvaluableModel, data: TokenData, evaluation: Evaluation) -> dict[str, Any]:
    """The columns of a trace: one row per sample, in the order of the split.

    The evaluation visits samples in another order, sorted by length. Arrays per step keep their shape.
    """
    order_S = evaluation.rows_N.argsort(kind="stable")
    rows_S = evaluation.rows_N[order_S]
    columns: dict[str, Any] = {"sample": rows_S, "label": data.labels[rows_S]}
    if evaluation.correct_N is not None:
        columns["correct"] = evaluation.correct_N[order_S]
        if evaluation.answers_N is not None and evaluation.answers_N.ndim == 1:
            columns["prediction"] = evaluation.answers_N[order_S]
    columns["loss"] = evaluation.losses_N[order_S]
    if data.groups is not None:
        columns["group"] = data.groups[rows_S]
    if data.paths is not None:
        columns["planted_path"] = data.paths[rows_S]
    recorder = model.recorder()
    paths_ST = None if recorder is None else recorder.paths()
    if recorder is not None and paths_ST is not None and len(paths_ST):
        columns["path"] = paths_ST[order_S]
        recorded = {
            "probabilities": recorder.probabilities(),
            "values": recorder.values(),
            "expert_share": recorder.expert_shares(),
            "strength": recorder.strengths(),
        }
        columns |= {name: found[order_S] for name, found in recorded.items() if found is not None}
    return columns
