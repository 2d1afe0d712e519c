"""What a trace costs: a forward pass with and without it, in turn, and a trace of a million tokens from start to page.

The first part needs transformers: a Mixtral of 50 million parameters with random weights. The second part takes layers
whose experts do nothing, so that only the trace is measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from research_eval.dashboard.foreign import write_trace_atlas
from research_eval.tracing.contracts import contract_lines
from research_eval.tracing.microscope import Trace


class Idle(nn.Module):
    """Experts that are asked, and do nothing."""

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, width, 1))

    def forward(self, states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return states


class Block(nn.Module):
    """A gate and experts, as in transformers."""

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(width, num_experts, bias=False), Idle(num_experts, width)

    def forward(self, h_BnI: Tensor) -> Tensor:
        rows_RI = h_BnI.flatten(0, 1)
        weights_RK, chosen_RK = self.gate(rows_RI).softmax(-1).topk(2, dim=-1)
        return self.experts(rows_RI, chosen_RK, weights_RK).view_as(h_BnI)


class Layers(nn.Module):
    """Only routing."""

    def __init__(self, layers: int, num_experts: int, vocab: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(num_experts, width) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h_BnI = self.embedding(input_ids)
        for block in self.blocks:
            h_BnI = block(h_BnI)
        return h_BnI


def overhead(repeats: int) -> dict[str, Any]:
    """The time of a forward pass with a trace, over that without one; medians of rounds in turn."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = AutoConfig.for_model(
        "mixtral", vocab_size=8000, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids_Bn = torch.randint(8000, (4, 128))
    times: dict[bool, list[float]] = {False: [], True: []}
    with torch.no_grad():
        model(input_ids=ids_Bn)
        for _ in range(repeats):
            for traced in (False, True):
                begun = time.perf_counter()
                if traced:
                    with Trace(model):
                        model(input_ids=ids_Bn)
                else:
                    model(input_ids=ids_Bn)
                times[traced].append(time.perf_counter() - begun)
    ratios = [with_trace / without for without, with_trace in zip(times[False], times[True], strict=True)]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ms": round(1000 * statistics.median(times[False]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio from": round(min(ratios), 3),
        "ratio to": round(max(ratios), 3),
    }


def million(tokens: int, layers: int) -> dict[str, Any]:
    """Seconds to record and write, to report, and to make the page; and the largest memory of this process."""
    torch.manual_seed(0)
    model = Layers(layers, 16, 5000).eval()
    begun = time.perf_counter()
    with Trace(model) as record, torch.no_grad():
        for _ in range(-(-tokens // 16384)):
            model(input_ids=torch.randint(5000, (64, 256)))
    with tempfile.TemporaryDirectory() as place:
        folder = record.save(place)
        written = time.perf_counter()
        contract_lines(record)
        reported = time.perf_counter()
        write_trace_atlas(Path(place) / "atlas.html", folder)
        size = (folder / "tokens.parquet").stat().st_size
    return {
        "tokens": record.num_tokens,
        "layers": layers,
        "recorded and written, s": round(written - begun, 1),
        "reported, s": round(reported - written, 1),
        "page, s": round(time.perf_counter() - reported, 1),
        "file, MB": round(size / 1e6, 1),
        "largest memory, MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tracing.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {"a million tokens": million(arguments.tokens, arguments.layers), "overhead": overhead(arguments.repeats)}
    for title, row in found.items():
        print(title, *(f"  {name}: {value:,}" for name, value in row.items()), sep="\n")
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
