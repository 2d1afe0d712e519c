"""A page that shows a text with every token in the colour of its expert, for one run or for two side by side.

U tokens  T steps  N experts
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from research_eval.files import write_atomically
from research_eval.routing.roles import role_table
from research_eval.routing.token_classes import CLASSES, TokenReport, route_agreement

TOP_TOKENS = 12
MAX_UNITS = 20_000  # tokens in the permutation test
SHOWN_TOKENS = 4_000  # in the text


@dataclass(frozen=True)
class PageRun:
    """A run on the page: its title, what it did with the tokens, and the names of experts (their number)."""

    title: str
    report: TokenReport
    num_experts: int


def write_token_page(path: Path, runs: list[PageRun], heading: str) -> None:
    """Write the page, or replace it. Two runs have to show the same tokens. It loads nothing from elsewhere."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    data = {
        "runs": [_run(run) for run in runs],
        "agreement": _agreement(runs) if len(runs) > 1 else None,
    }
    # "<" would end the script element; in JSON it can be written as an escape.
    text = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    page = environment.get_template("token_page.html.j2").render(heading=heading, data=text)
    write_atomically(path, page.encode())


def _run(run: PageRun) -> dict[str, Any]:
    """What the script of the page needs of a run."""
    report = run.report
    assert report.paths_UT is not None
    count = min(SHOWN_TOKENS, len(report.inputs_U))
    used = sorted(set(report.inputs_U[:count].tolist()))
    number = {token: place for place, token in enumerate(used)}
    losses = [0.0, *report.losses_U[: count - 1].tolist()]  # the row before predicts a token
    return {
        "title": run.title,
        "experts": run.num_experts,
        "pieces": [report.pieces[token] for token in used],
        "tokens": [number[token] for token in report.inputs_U[:count].tolist()],
        "losses": [round(loss, 3) for loss in losses],
        "paths": report.paths_UT[:count].tolist(),
        "steps": [_step(run, step) for step in range(report.paths_UT.shape[1])],
    }


def _step(run: PageRun, step: int) -> dict[str, Any]:
    """Load, table of classes with its permutation control, and the most frequent tokens of each expert."""
    report = run.report
    assert report.paths_UT is not None
    chosen = np.linspace(0, len(report.paths_UT) - 1, min(MAX_UNITS, len(report.paths_UT))).astype(int)
    experts_U = report.paths_UT[chosen, step]
    runs_U = experts_U >= 0
    experts_U, inputs_U = experts_U[runs_U], report.inputs_U[chosen][runs_U]
    classes_U = report.classes_U[chosen][runs_U]
    share_UN = np.eye(run.num_experts, dtype=np.float32)[experts_U]
    present = [number for number in range(len(CLASSES)) if (classes_U == number).any()]
    member_KU = np.stack([classes_U == number for number in present]).astype(np.float32)
    share_KN, expected_N, band_KN = role_table(member_KU, share_UN)
    tops = []
    for expert in range(run.num_experts):
        counts = np.bincount(inputs_U[experts_U == expert], minlength=len(report.pieces))
        best = np.argsort(-counts, kind="stable")[:TOP_TOKENS]
        tops.append([[report.pieces[token], int(counts[token])] for token in best.tolist() if counts[token]])
    return {
        "load": np.round(expected_N, 4).tolist(),
        "running": float(runs_U.mean()),
        "classes": [CLASSES[number] for number in present],
        "shares": np.round(share_KN, 4).tolist(),
        "beyond": (np.abs(share_KN - expected_N) > band_KN).tolist(),
        "tops": tops,
    }


def _agreement(runs: list[PageRun]) -> dict[str, Any]:
    """How far the routes of the two runs agree, per step, and what shuffled tokens give."""
    paths = [run.report.paths_UT for run in runs[:2]]
    assert paths[0] is not None
    assert paths[1] is not None
    found, by_chance = route_agreement(paths[0], paths[1], np.random.default_rng(0))
    return {"steps": [round(share, 4) for share in found], "by_chance": [round(share, 4) for share in by_chance]}
