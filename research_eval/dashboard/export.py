"""The Path Atlas as one file that needs no server and no network: the same scripts, with the data inside."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from research_eval.dashboard import atlas
from research_eval.dashboard.probe import Probe, Probes
from research_eval.dashboard.queries import static_folder
from research_eval.errors import ConfigError
from research_eval.files import write_atomically

SCRIPTS = ("dom.js", "stats.js", "charts.js", "graph.js", "pair.js", "atlas.js")  # each imports earlier ones only
MOST_EPOCHS = 12
MOST_BYTES = 20_000_000
MOST_DETAILED = 5_000  # samples whose probabilities the file holds


def write_atlas(path: Path, experiment_id: str, epoch: int | None, db: str | None, ablate: bool) -> None:
    """Write the file, or replace it. Raises ConfigError for a run without a trace, and for too many data.

    It keeps at most 12 epochs, spread evenly, among them the last one and that of the weights. `ablate` adds the
    evaluations without each expert.
    """
    folder = atlas.trace_folder(experiment_id)
    every = atlas.epoch_list(folder)
    kept = _kept(every, epoch)
    base = f"/api/run/{experiment_id}"
    answers: dict[str, Any] = {f"{base}/atlas": {"epochs": kept}, f"{base}/samples": atlas.samples_of(folder)}
    for one in kept:
        answers[f"{base}/atlas/{one['epoch']}"] = atlas.epoch_columns(folder, one["epoch"])
    shown = next((one["epoch"] for one in kept if one["saved"]), kept[-1]["epoch"])
    table = atlas.read(folder, shown).samples
    if table.num_rows <= MOST_DETAILED:
        for sample, row in enumerate(table.to_pylist()):
            answers[f"{base}/atlas/{shown}/{sample}"] = {name: atlas.plain(value) for name, value in row.items()}
    data: dict[str, Any] = {"run": experiment_id, "answers": answers}
    if ablate:
        experts = answers[f"{base}/atlas/{shown}"]["experts"]
        data |= _effects(experiment_id, experts, db)
    content = page(f"Path Atlas of {experiment_id}", data).encode()
    if len(content) > MOST_BYTES:
        raise ConfigError(
            f"--out: the file would have {len(content) // 10**6} MB, more than {MOST_BYTES // 10**6}. Give --epoch."
        )
    write_atomically(path, content)


def _kept(every: list[dict[str, Any]], epoch: int | None) -> list[dict[str, Any]]:
    if epoch is not None:
        found = [one for one in every if one["epoch"] == epoch]
        if not found:
            raise ConfigError(f"--epoch: epoch {epoch} was not traced; there are {[one['epoch'] for one in every]}")
        return found
    if not every:
        raise ConfigError("--run: no epoch of this run was traced")
    step = max(1, -(-len(every) // MOST_EPOCHS))
    kept = every[::-1][::step][::-1]
    return [one for one in every if one in kept or one["saved"]]


def _effects(experiment_id: str, experts: int, db: str | None) -> dict[str, Any]:
    """The evaluations without each expert, left out and with the next best one."""
    probes = Probes(db)
    try:
        own = probes.ask(Probe(experiment_id), anyway=True)
        effects = []
        for expert in range(experts):
            for kind in ("skip", "forbid"):
                found = probes.ask(Probe(experiment_id, kind, expert), anyway=True)
                effects.append({**found, "body": {"kind": kind, "expert": expert}})
    finally:
        probes.close()
    return {"own": own, "effects": effects}


def page(title: str, data: dict[str, Any]) -> str:
    """The whole page. The policy allows this one script, and no address."""
    script = bundle()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (static_folder() / "style.css").read_text()
    style_digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'sha256-{style_digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    # "<" would end the element; in JSON it can be written as an escape.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{html.escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{style}</style>\n</head>\n'
        f'<body>\n<main id="page" tabindex="-1"></main>\n'
        f'<script type="application/json" id="goe-data">{text}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def bundle() -> str:
    """The modules as one script: no name of one is used by another but what it exports."""
    parts = []
    for name in SCRIPTS:
        text = (static_folder() / name).read_text()
        text = re.sub(r"^import [^;]*;\n", "", text, flags=re.MULTILINE)
        parts.append(re.sub(r"^export ", "", text, flags=re.MULTILINE))
    start = (
        "atlasPage(document.getElementById('page'), DATA.run).catch((error) => {"
        "document.getElementById('page').textContent = error.message; });"
    )
    return f"(function () {{\n'use strict';\n{''.join(parts)}\n{start}\n}})();\n"
