"""Traces of models that transformers has saved: safetensors only, and no code from the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from research_eval.errors import ConfigError
from research_eval.system.phases import phase
from research_eval.tracing.record import Recorder

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def traced_texts(
    folder: Path,
    texts_by_domain: Mapping[str, Sequence[str]],
    batch_size: int,
    max_length: int,
    *,
    every: int = 1,
    device: str = "cpu",
) -> Recorder:
    """The trace of a saved language model on the texts of one or several domains.

    Raises ConfigError for a folder that holds no such model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ConfigError("goe trace: needs the library transformers: pip install transformers") from error
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model: {folder} holds no config.json: name the folder of a saved model of transformers")
    try:
        with phase("reading the model"):
            tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
            model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **LOCAL).to(device).eval()
    except Exception as error:  # transformers, safetensors and tokenizers have many kinds of errors
        raise ConfigError(f"--model: {folder}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ConfigError(f"--model: the tokenizer in {folder} has no token to pad with (padding, end or unknown word)")
    tokenizer.padding_side = "right"
    with Recorder(model, tokenizer=tokenizer, every=every) as record, torch.no_grad():
        record.domains = list(texts_by_domain)
        for domain, texts in enumerate(texts_by_domain.values()):
            for start in range(0, len(texts), batch_size):
                some = list(texts[start : start + batch_size])
                batch = tokenizer(some, return_tensors="pt", padding=True, truncation=True, max_length=max_length)
                record.sequence_domains += [domain] * len(some)
                model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
    return record
