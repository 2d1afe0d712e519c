"""The pictures in the folder of a finished run: the graph of experts, and plots of the routing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.token_data import DataSplits
from research_eval.runs.journal import Result

log = logging.getLogger(__name__)

GRAPH_FILE = "expert_graph.png"


def draw_pictures(
    result: Result, reports: Sequence[dict[str, Any]], config: ExperimentConfig, data: DataSplits
) -> None:
    """Draw the pictures that the metrics allow.

    The run is already stored, so a failure to write a picture is only logged.
    """
    if "step_transitions" not in result.metrics and not config.training_params.trace_routing:
        return
    from research_eval.analysis.expert_graph import draw_expert_graph  # import matplotlib only if needed
    from research_eval.analysis.routing_plots import draw_routing

    title = f"{config.experiment_name}: paths of {len(data.validation):,} validation samples"
    try:
        if "step_transitions" in result.metrics:
            draw_expert_graph(result.metrics, result.folder / GRAPH_FILE, title)
        if config.training_params.trace_routing:
            draw_routing(result.metrics, reports, data.label_names, result.folder, config.experiment_name)
    except OSError as problem:
        log.warning("run %s: no pictures: %s", result.experiment_id, problem)
