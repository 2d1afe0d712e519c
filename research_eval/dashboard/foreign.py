"""The Path Atlas of a trace of any model: its samples are tokens, and the steps of a path are layers.

R tokens  L layers  K experts per token
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from research_eval.dashboard.atlas import packed
from research_eval.dashboard.export import page
from research_eval.errors import ConfigError
from research_eval.files import write_atomically
from research_eval.routing.token_classes import CLASSES, class_numbers
from research_eval.routing.trace_files import damage_is_said
from research_eval.system.untrusted import in_folder, parse_json, read_limited

FACTS_FILE, TOKENS_FILE = "trace.json", "tokens.parquet"  # as research_eval.tracing writes them
MAX_FACTS_BYTES = 100_000_000
SHOWN_TOKENS = 20_000


def write_trace_atlas(out: Path, folder: Path) -> None:
    """Write the Atlas of a trace as one file. Raises ConfigError for a folder that holds none."""
    path = in_folder(folder, FACTS_FILE)
    facts = parse_json(read_limited(path, MAX_FACTS_BYTES, "the facts of a trace"), str(path))
    tokens = in_folder(folder, TOKENS_FILE)
    if not isinstance(facts, dict) or facts.get("version") != 1 or not tokens.is_file():
        raise ConfigError(f"--trace: {folder} holds no trace of `goe trace` (or of a newer program)")
    with damage_is_said(folder):
        content = page(f"Path Atlas of {facts['model']}", {"run": "trace", "answers": _answers(tokens, facts)})
    write_atomically(out, content.encode())


def _answers(tokens: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What the page would ask a server."""
    columns = _columns(tokens, facts)
    number = len(columns["token"])
    names = {str(key): str(value) for key, value in facts.get("names", {}).items()}
    pieces = [names.get(str(token), "") for token in columns["token"].tolist()]
    base = "/api/run/trace"
    epoch: dict[str, Any] = {
        "epoch": 1,
        "samples": number,
        "steps": len(facts["layers"]),
        "experts": int(max(facts["num_experts"])),
        "about_tokens": True,
        "unit": f"tokens, out of {facts['tokens']:,}",
        "router": {},
        "columns": {
            "path": packed(columns["path"].astype(np.int16)),
            "chosen": packed(columns["chosen"]),
            "label": packed(class_numbers([_plain_piece(one) for one in pieces]).astype(np.int16)),
        },
    }
    domains = facts.get("sequence_domains") or []
    if len(facts.get("domains", [])) > 1 and len(domains) > int(columns["sequence"].max(initial=0)):
        epoch["columns"]["group"] = packed(np.array(domains, np.int16)[columns["sequence"]])
    samples = {
        "names": {"labels": list(CLASSES), "tokens": names, "groups": facts.get("domains", [])},
        "columns": {
            "tokens": packed(columns["token"].astype(np.int32)),
            "offsets": packed(np.arange(number + 1, dtype=np.int32)),
        },
    }
    return {
        f"{base}/atlas": {"epochs": [{"epoch": 1, "saved": False, "alarms": []}]},
        f"{base}/atlas/1": epoch,
        f"{base}/samples": samples,
    }


def _columns(path: Path, facts: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """At most `SHOWN_TOKENS` real tokens, spread evenly: their numbers, and the expert with the most weight per layer.

    The file is read group by group, so that a trace of millions of tokens needs little memory.
    """
    file = pq.ParquetFile(path)
    stride = max(1, -(-file.metadata.num_rows // SHOWN_TOKENS))
    found: dict[str, list[NDArray[Any]]] = {"token": [], "sequence": [], "path": [], "chosen": []}
    layers, seen = len(facts["layers"]), 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["token", "sequence", "real", "experts", "weights"])
        kept_R = ((seen + np.arange(table.num_rows)) % stride == 0) & np.asarray(table["real"])
        seen += table.num_rows
        rows = int(kept_R.sum())
        experts_RLK, weights_RLK = (
            np.asarray(table[name].combine_chunks().values).reshape(table.num_rows, layers, -1)[kept_R]
            for name in ("experts", "weights")
        )
        weights_RLK = np.nan_to_num(weights_RLK.astype(np.float32), nan=0.0)
        best_RL = weights_RLK.argmax(2)[..., None]
        for name in ("token", "sequence"):
            found[name].append(np.asarray(table[name])[kept_R])
        found["path"].append(np.take_along_axis(experts_RLK, best_RL, 2).reshape(rows * layers))
        chosen_RL = np.take_along_axis(weights_RLK, best_RL, 2)[..., 0]
        found["chosen"].append(np.rint(255 * chosen_RL.clip(0, 1)).astype(np.uint8).reshape(rows * layers))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _plain_piece(piece: str) -> str:
    """A piece of a tokenizer without its marks for a blank before it, or for the middle of a word."""
    return piece.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n").removeprefix("##").removesuffix("</w>")
