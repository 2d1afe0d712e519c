"""What is known of the data before the training, as a block of text."""

from __future__ import annotations

import shutil

from research_eval.datasets.token_data import DataSplits
from research_eval.store.data_facts import facts_lines

MARGIN = 12  # columns for the indentation, and for "seed 1: " before each line


def data_block(dataset_name: str, data: DataSplits) -> list[str]:
    """The facts about the splits as lines, for a screen of the present width."""
    source = data.fingerprint.get("source")
    title = f"{dataset_name} ({source})" if isinstance(source, str) else dataset_name
    lines = facts_lines(data.fingerprint, shutil.get_terminal_size().columns - MARGIN)
    return [f"data: {title}", *(f"  {line}" for line in lines)]
