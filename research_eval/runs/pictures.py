"""The pictures in the folder of a finished run: the graph of experts, and plots of the routing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.token_data import DataSplits
from research_eval.routing.alarms import Circumstances
from research_eval.runs.journal import Result
from research_eval.system.best_effort import attempted

log = logging.getLogger(__name__)

GRAPH_FILE = "expert_graph.png"


def draw_pictures(
    result: Result, reports: Sequence[dict[str, Any]], config: ExperimentConfig, data: DataSplits
) -> None:
    """Draw the pictures that the metrics allow. The run is already stored: a picture that fails is only a warning."""
    with attempted(log, f"run {result.experiment_id}: no pictures"):
        _draw(result, reports, config, data)


def _draw(result: Result, reports: Sequence[dict[str, Any]], config: ExperimentConfig, data: DataSplits) -> None:
    """Draw each picture that the metrics allow, or warn that it is missing."""
    # The imports are inside, because matplotlib takes long, and because they may fail too.
    if "step_transitions" in result.metrics:
        with attempted(log, f"run {result.experiment_id}: no {GRAPH_FILE}"):
            from research_eval.analysis.expert_graph import draw_expert_graph
            from research_eval.analysis.figures import routes_in_layers

            what = "most used expert in each layer," if routes_in_layers(result.metrics) else "paths of"
            title = f"{config.experiment_name}: {what} {len(data.validation):,} validation samples"
            draw_expert_graph(result.metrics, result.folder / GRAPH_FILE, title)
    if config.training_params.trace_routing:
        with attempted(log, f"run {result.experiment_id}: not all pictures of the routing"):
            from research_eval.analysis.routing_plots import draw_routing

            halts = Circumstances.of(config.epochs, config.model_params).halting
            draw_routing(result.metrics, reports, data.label_names, result.folder, config.experiment_name, halts)
