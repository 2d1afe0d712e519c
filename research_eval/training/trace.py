"""What a run records about its routing after each epoch: a report, its alarms, and every validation sample's path.

S samples  T steps of a path  A actions  N experts
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from research_eval.analysis.alarms import Circumstances, find_alarms
from research_eval.analysis.routing_report import routing_report
from research_eval.datasets.token_data import Batches, TokenData
from research_eval.db_utils import canonical_json
from research_eval.errors import ConfigError
from research_eval.files import write_atomically
from research_eval.layers.router import RunningStatistics
from research_eval.layers.stacked import Dropout
from research_eval.models.base_model import EvaluableModel, logits_of, routed_parameters
from research_eval.schema import ExperimentConfig
from research_eval.training.evaluate import Evaluation, evaluate
from research_eval.training.runtime import Runtime

ROUTING_FOLDER = "routing"
TRAINING_MODE_SAMPLES = 1000
QUIET = (Dropout, nn.modules.dropout._DropoutNd, RunningStatistics)  # in training they change more than the routing


class RoutingWatch:
    """Reports on the routing of a run, epoch by epoch. To be made while the model has its initial weights."""

    def __init__(
        self,
        model: EvaluableModel,
        validation: Batches,
        num_classes: int,
        config: ExperimentConfig,
        runtime: Runtime,
        folder: Path,
    ) -> None:
        self._validation = validation
        self._num_classes = num_classes
        self._runtime = runtime
        self._folder = folder / ROUTING_FOLDER if config.training_params.trace_routing else None
        self._circumstances = Circumstances.of(config.epochs, config.model_params)
        self._initial = [parameter.detach().clone() for parameter in routed_parameters(model, "router")]

    def epoch_end(
        self, epoch: int, model: EvaluableModel, evaluation: Evaluation, reports: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The metrics of the epoch just evaluated, with the alarms that it set off; its short form joins `reports`."""
        metrics = {**model.get_model_specific_metrics(), **self._parameter_metrics(model)}
        if self._folder is not None:
            metrics |= routing_metrics(model, evaluation, self._validation.data, self._num_classes)
            metrics |= training_mode_metrics(model, self._validation, evaluation, self._runtime)
        reports.append({name: value for name, value in metrics.items() if _is_kept(name, value)})
        alarms = [alarm for alarm in find_alarms(reports, self._circumstances) if alarm.epoch == epoch]
        if self._folder is not None:
            summary = {"epoch": epoch, **metrics, "alarms": [asdict(alarm) for alarm in alarms]}
            write_trace(self._folder, model, self._validation.data, evaluation, summary)
        return {**metrics, **{f"alarm_{alarm.name}": alarm.value for alarm in alarms}, "alarms": alarms}

    def _parameter_metrics(self, model: EvaluableModel) -> dict[str, float]:
        metrics = {}
        similarity = expert_similarity(model)
        if similarity is not None:
            metrics["expert_similarity"] = similarity
        if self._initial:
            metrics["router_change"] = relative_change(self._initial, list(routed_parameters(model, "router")))
        return metrics


def _is_kept(name: str, value: Any) -> bool:
    """Numbers, and the two lists that alarms and pictures need; a model of one's own may give anything these names."""
    if name == "expert_load":
        sizes = {len(row) if isinstance(row, list) else 0 for row in value} if isinstance(value, list) else set()
        return len(sizes) == 1 and 0 not in sizes
    return isinstance(value, list) if name == "path_length_histogram" else isinstance(value, int | float)


def alarm_metrics(reports: Sequence[dict[str, Any]], config: ExperimentConfig) -> dict[str, Any]:
    """All alarms of a run and their number; nothing for a model without experts."""
    if not any("expert_load" in report for report in reports):
        return {}
    alarms = find_alarms(reports, Circumstances.of(config.epochs, config.model_params))
    return {"alarms": [asdict(alarm) for alarm in alarms], "num_alarms": len(alarms)}


def routing_metrics(model: EvaluableModel, evaluation: Evaluation, data: TokenData, num_classes: int) -> dict[str, Any]:
    """What the recorded paths have to do with classes, groups and planted paths; nothing for a model without paths."""
    paths_ST = model.recorded_paths()
    if paths_ST is None or not len(paths_ST):
        return {}
    rows_S = evaluation.rows_N
    groups_S = None if data.groups is None else data.groups[rows_S]
    metrics = routing_report(paths_ST, data.labels[rows_S], num_classes, groups_S, model.recorded_values())
    if data.paths is not None:
        from research_eval.analysis.path_recovery import path_recovery  # scipy takes its time

        num_experts = len(model.get_model_specific_metrics()["expert_load"][0])
        found = path_recovery(paths_ST, data.paths[rows_S], num_experts)
        metrics |= {
            "planted_recovery": found.overall,
            "planted_recovery_by_chance": found.overall_by_chance,
            "planted_step_recovery": found.per_step,
            "planted_step_recovery_by_chance": found.per_step_by_chance,
            "planted_same_length": found.same_length,
            "planted_experts": found.experts_F.tolist(),
        }
    return metrics


def regret_metrics(
    model: EvaluableModel, splits: dict[str, Batches], num_classes: int, runtime: Runtime
) -> dict[str, float]:
    """What the router's own routes cost against the planted ones, in accuracy, per split; its prefix begins the name.

    The experts that stand for the functions are those that match best on the first split. Nothing for a task without
    known paths, or a model that cannot be sent along them.
    """
    from research_eval.analysis.path_recovery import path_recovery, router_regret

    own = {}
    metrics: dict[str, float] = {}
    mapping_TF = None
    for prefix, batches in splits.items():
        own[prefix] = evaluate(model, batches, num_classes, runtime)
        paths_ST, planted = model.recorded_paths(), batches.data.paths
        if mapping_TF is None:
            if paths_ST is None or planted is None:
                return {}
            num_experts = len(model.get_model_specific_metrics()["expert_load"][0])
            found = path_recovery(paths_ST, planted[own[prefix].rows_N], num_experts)
            mapping_TF = torch.from_numpy(found.experts_TF).to(runtime.device)
    if not model.follow(mapping_TF):
        return {}
    for prefix, batches in splits.items():
        forced = evaluate(model, batches, num_classes, runtime)
        metrics[f"{prefix}router_regret"] = float(router_regret(forced.correct_N, own[prefix].correct_N).regret)
    model.follow(None)
    return metrics


@torch.no_grad()
def relative_change(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """|after - before| / |before| over all entries."""
    change = sum(float((new - old).square().sum()) for old, new in zip(before, after, strict=True))
    size = sum(float(old.square().sum()) for old in before)
    return float((change / max(size, 1e-12)) ** 0.5)


@torch.no_grad()
def expert_similarity(model: nn.Module) -> float | None:
    """Mean cosine between the weights of two experts, in the pool where it is largest: 1 for copies, 0 for strangers.

    A pool is a module called `experts`, whose matrices have the number of experts as their leading dimension. Biases
    and norms do not count, since all experts start with the same. None where no pool has two experts.
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
    model: EvaluableModel, batches: Batches, evaluation: Evaluation, runtime: Runtime
) -> dict[str, float]:
    """Accuracy when routing draws as in training, without dropout, and how far it is from that of the evaluation.

    On at most 1,000 samples, spread evenly over the lengths. Generators, buffers and records are left as they were.
    """
    rows_S = np.concatenate(batches.order(0))
    chosen = rows_S[np.linspace(0, len(rows_S) - 1, min(len(rows_S), TRAINING_MODE_SAMPLES)).astype(int)]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    hits = 0
    model.train()
    for module in model.modules():
        if isinstance(module, QUIET):
            module.eval()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for start in range(0, len(chosen), batches.batch_size):
            batch = batches.take(chosen[start : start + batches.batch_size])
            with runtime.autocast():
                logits_BC = logits_of(model, batch)
            hits += int((logits_BC.argmax(-1) == batch.labels).sum())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.eval()
    correct_S = np.zeros(len(rows_S), np.bool_)
    correct_S[evaluation.rows_N] = evaluation.correct_N
    accuracy = hits / max(len(chosen), 1)
    return {
        "training_mode_accuracy": accuracy,
        "training_mode_gap": accuracy - float(correct_S[chosen].mean()) if len(chosen) else 0.0,
    }


# ------------------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class TracedEpoch:
    """One row per validation sample, and all metrics of the epoch."""

    epoch: int
    samples: pa.Table
    summary: dict[str, Any]


def write_trace(
    folder: Path, model: EvaluableModel, data: TokenData, evaluation: Evaluation, summary: dict[str, Any]
) -> None:
    """`epoch_0001.parquet` with one row per sample in the order of the split, and `epoch_0001.json` beside it."""
    folder.mkdir(exist_ok=True)
    order_S = evaluation.rows_N.argsort(kind="stable")
    rows_S = evaluation.rows_N[order_S]
    columns: dict[str, Any] = {
        "sample": rows_S,
        "label": data.labels[rows_S],
        "correct": evaluation.correct_N[order_S],
        "loss": evaluation.losses_N[order_S],
    }
    if data.groups is not None:
        columns["group"] = data.groups[rows_S]
    if data.paths is not None:
        columns["planted_path"] = _ragged(data.paths[rows_S])
    paths_ST = model.recorded_paths()
    if paths_ST is not None and len(paths_ST):
        columns["path"] = _ragged(paths_ST[order_S])
        recorded = {"probabilities": model.recorded_probabilities(), "values": model.recorded_values()}
        columns |= {name: _nested(found[order_S]) for name, found in recorded.items() if found is not None}
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content, compression="zstd")
    stem = f"epoch_{summary['epoch']:04}"
    write_atomically(folder / f"{stem}.json", canonical_json(summary).encode())
    write_atomically(folder / f"{stem}.parquet", content.getvalue())  # the last: who finds it finds both


def _ragged(paths_ST: NDArray[np.int64]) -> pa.Array:
    """Paths without what stands behind their end."""
    taken_ST = paths_ST >= 0
    offsets = np.append(0, taken_ST.sum(1).cumsum()).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, paths_ST[taken_ST])


def _nested(values_STA: NDArray[np.float32]) -> pa.Array:
    """Lists of lists, [T][A] per sample."""
    samples, steps, actions = values_STA.shape
    inner = pa.ListArray.from_arrays(np.arange(0, values_STA.size + 1, actions, dtype=np.int32), values_STA.ravel())
    return pa.ListArray.from_arrays(np.arange(0, samples * steps + 1, steps, dtype=np.int32), inner)


def read_trace(folder: Path) -> Iterator[TracedEpoch]:
    """The traced epochs of a run's folder, in order.

    Raises ConfigError when there are none.
    """
    files = sorted((folder / ROUTING_FOLDER).glob("epoch_*.parquet"))
    if not files:
        raise ConfigError(f"{folder}: no routing trace; train with training_params.trace_routing: true")
    for file in files:
        summary = json.loads(file.with_suffix(".json").read_text())
        yield TracedEpoch(summary["epoch"], pq.read_table(file), summary)
