"""The parts of the HTML page that come from the folders of single runs: pictures of routing, and written texts.

Tables of what the experts do come from the store.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
from pydantic.dataclasses import dataclass as checked

from research_eval.analysis.runs import Results
from research_eval.analysis.summary import Options, Row
from research_eval.files import RUNS_FOLDER, SAMPLES_FILE, file_stem
from research_eval.store.metrics import gain_sign
from research_eval.system.untrusted import read_limited

if TYPE_CHECKING:
    from research_eval.store.records import RunRow
    from research_eval.store.store import Store

PICTURES = {
    "expert_graph.png": "The way of the validation samples through the experts.",
    "expert_load.png": "The share of each expert over the epochs.",
    "router_entropy.png": "How undecided the router is: 0 certain, 1 undecided.",
    "path_lengths.png": "How long the paths of each class or group are.",
    "automaton.png": "The automaton that the scan experts have learned.",
}
ROUTED = ("router_entropy", "mean_path_length")  # only models with routes have these metrics
MAX_SAMPLES = 20_000_000  # bytes of a file of samples
WRITTEN_EXPERTS = 24  # in a table of more experts, cells have no numbers, only colours
MORE, LESS = (0, 114, 178), (213, 94, 0)  # colours of more and less than expected: blue and vermilion


@checked
class RoleTable:
    """A table of the metric `expert_roles` (`routing.roles`), as a store has it."""

    grouping: str
    step: str
    has_end: bool
    kinds: list[str]
    num_kinds: int
    units: list[int]
    share: list[list[float]]
    expected: list[float]
    band: list[list[float]]

    @property
    def is_whole(self) -> bool:
        """Whether the parts have sizes that fit each other."""
        widths = {len(row) for row in (*self.share, *self.band)}
        return len({len(self.kinds), len(self.units), len(self.share), len(self.band)}) == 1 and (
            widths == {len(self.expected)}
        )


@checked
class Sample:
    """A line of the file with the texts that a language model wrote during its training."""

    step: int
    text: str


def routing_parts(store: Store, results: Results, rows: Sequence[Row], options: Options) -> list[dict[str, Any]]:
    """For each best config with routes its best run, with the pictures in the run's folder and its tables.

    The config with the best score comes first.
    """
    sign = gain_sign(options.metric)
    routed = [row for row in rows if any(row.group.values(metric) for metric in ROUTED)]
    routed.sort(key=lambda row: -sign * (row.score.mean or 0.0))
    parts = []
    for row in routed:
        run = _best_run(row, options)
        folder = _folder_of(run)
        pictures = [
            {"source": f"data:image/png;base64,{base64.b64encode((folder / name).read_bytes()).decode()}", "text": text}
            for name, text in PICTURES.items()
            if (folder / name).is_file()
        ]
        roles = role_tables(store.metrics(run.experiment_id).get("expert_roles"))
        one = {"model": row.group.model_type, "run": run, "folder": str(folder), "pictures": pictures, "roles": roles}
        parts.append(one | {"task": results.tasks[row.group.task]})
    return parts


def written_texts(results: Results, rows: Sequence[Row], options: Options) -> list[dict[str, Any]]:
    """What the best run of each best config wrote during its training, if it is a language model that did so."""
    parts = []
    for row in rows:
        if not row.group.values(options.metric):
            continue
        run = _best_run(row, options)
        samples = read_samples(_folder_of(run))
        if samples:
            parts.append({"model": row.group.model_type, "run": run, "samples": samples})
    return parts


def read_samples(folder: Path) -> list[Sample]:
    """The samples in a run's folder; empty if there are none, or damaged ones."""
    try:
        lines = read_limited(folder / SAMPLES_FILE, MAX_SAMPLES, "a file of samples").splitlines()
        return [pydantic.TypeAdapter(Sample).validate_json(line) for line in lines]
    except ValueError:
        return []


def _best_run(row: Row, options: Options) -> RunRow:
    scored = [run for run in row.group.runs if options.metric in run.metrics]
    sign = gain_sign(options.metric)
    return max(scored, key=lambda run: sign * run.metrics[options.metric])


def _folder_of(run: RunRow) -> Path:
    """The run's folder. The id may come from a foreign database and contain any characters."""
    return RUNS_FOLDER / file_stem(run.experiment_id)


def role_tables(stored: Any) -> list[dict[str, Any]]:
    """Grouping -> its tables by step, ready to be drawn; empty if the store has no such tables, or damaged ones."""
    try:
        found = pydantic.TypeAdapter(list[RoleTable]).validate_python(stored)
    except pydantic.ValidationError:
        return []
    groupings: dict[str, list[dict[str, Any]]] = {}
    for table in found:
        if table.is_whole:
            groupings.setdefault(table.grouping, []).append(_drawn(table))
    return [{"name": name, "tables": tables} for name, tables in groupings.items()]


def _drawn(table: RoleTable) -> dict[str, Any]:
    """Headings and rows of a table; the cells outside the null band have a colour."""
    experts = [str(expert) for expert in range(len(table.expected) - table.has_end)] + ["ended"] * table.has_end
    rows: list[dict[str, Any]] = []
    for kind, units, share_N, band_N in zip(table.kinds, table.units, table.share, table.band, strict=True):
        cells = [_cell(*cell) for cell in zip(share_N, table.expected, band_N, strict=True)]
        rows.append({"kind": kind, "units": f"{units:,}", "cells": cells})
    expected = [f"{value:.0%}" for value in table.expected]
    num_clear = sum(bool(cell["colour"]) for row in rows for cell in row["cells"])
    return {
        "step": table.step,
        "experts": experts,
        "rows": rows,
        "expected": expected,
        "num_clear": num_clear,
        "hidden": table.num_kinds - len(table.kinds),
        "is_written": len(experts) <= WRITTEN_EXPERTS,
    }


def _cell(share: float, expected: float, band: float) -> dict[str, str]:
    """The text, the explanation and the colour of a cell; inside the band it has no colour."""
    distance = share - expected
    said = f"{share:.1%}; by chance {expected:.1%} ± {band:.1%}"
    colour = ""
    if abs(distance) > band + 1e-9:
        room = (1 - expected) if distance > 0 else expected
        strength = 0.2 + 0.6 * min(abs(distance) / max(room, 1e-9), 1.0)
        colour = f"rgba({', '.join(map(str, MORE if distance > 0 else LESS))}, {strength:.2f})"
    return {"text": f"{share:.0%}", "said": said, "colour": colour}
