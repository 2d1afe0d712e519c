"""`goe trace`: what the routers of a saved Mixture-of-Experts model decide about the texts of a file.

goe trace --model mixtral-tiny --data news.txt code.txt --out traces/mixtral
goe atlas --trace traces/mixtral --out atlas.html
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from research_eval.errors import ConfigError
from research_eval.system.best_effort import print_product
from research_eval.system.phases import import_torch, phase
from research_eval.system.untrusted import user_path

DESCRIPTION = "record the routing of a saved transformers model on your texts, and check its contracts"
MODEL_HELP = "a folder as save_pretrained writes it: config, safetensors, tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `goe trace`."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help=MODEL_HELP)
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help="UTF-8 texts, one per line; several files are domains"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the trace")
    parser.add_argument("--agree", metavar="FOLDER", help="another checkpoint: how often both choose alike")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=8, metavar="N", help="texts per call (8)")
    parser.add_argument(
        "--max_length", "--max-length", type=int, default=256, metavar="N", help="tokens per text (256)"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="keep each n-th token (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps (default: cpu)")
    parser.add_argument("--quiet", action="store_true", help="print the report only")


def trace_command(arguments: argparse.Namespace) -> int:
    """Record, write the trace and print the report. Exit code 1 if a contract fails."""
    from research_eval.runs.inputs import read_text

    for flag in ("batch_size", "max_length", "every"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag}: expected at least 1, got {getattr(arguments, flag)}")
    texts: dict[str, list[str]] = {}
    for name in arguments.data:
        lines = [line for line in read_text(name, "--data").split("\n") if line.strip()]
        if not lines or Path(name).stem in texts:
            problem = "has the name of another file" if lines else "has no text"
            raise ConfigError(f"--data: {name} {problem}")
        texts[Path(name).stem] = lines
    import_torch()
    with phase("importing transformers"):
        from research_eval.tracing.contracts import FAILS, agreement, contract_lines
        from research_eval.tracing.saved import traced_texts

    def traced(folder: str) -> Any:
        return traced_texts(
            user_path(folder, "--model"),
            texts,
            arguments.batch_size,
            arguments.max_length,
            every=arguments.every,
            device=arguments.device,
        )

    record = traced(arguments.model)
    out = record.save(user_path(arguments.out, "--out"))
    lines = contract_lines(record)
    if arguments.agree is not None:
        pairs = agreement(record, traced(arguments.agree))
        lines += [f"agreement    {name}: {share:.3f} (by chance {chance:.3f})" for name, share, chance in pairs]
    print_product("\n".join(lines) + f"\n{out}\n")
    return 1 if any(f" {FAILS} " in line for line in lines) else 0
