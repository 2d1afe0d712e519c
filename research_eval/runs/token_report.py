"""What a language model does with each token of a text: its loss, the class of the token, and the path of its row.

B batch  L block  U tokens  T steps
"""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from research_eval.datasets.language.stream import StreamBatches
from research_eval.datasets.language.vocabulary import piece_texts
from research_eval.models.language.base import LanguageModel, LanguageWalk
from research_eval.routing.token_classes import TokenReport, class_numbers
from research_eval.training.runtime import Runtime

MAX_TOKENS = 100_000


@torch.no_grad()
def token_report(
    model: LanguageModel, batches: StreamBatches, tokenizer: Tokenizer, runtime: Runtime, max_tokens: int = MAX_TOKENS
) -> TokenReport:
    """One evaluation pass over whole blocks, at most `max_tokens` tokens, spread evenly over the text."""
    model.eval()
    starts = np.concatenate(batches.order(0))
    wanted = max(1, max_tokens // batches.data.block_size)
    if len(starts) > wanted:
        starts = starts[np.linspace(0, len(starts) - 1, wanted).astype(int)]
    inputs, targets, losses, paths = [], [], [], []
    for first in range(0, len(starts), batches.batch_size):
        batch = batches.take(starts[first : first + batches.batch_size])
        with runtime.autocast():
            outcome = model.pass_over(batch.input_ids, batch.documents)
        logits_SV, labels_S = outcome.outputs.float().flatten(0, 1), batch.labels.flatten()
        kept = labels_S >= 0
        losses.append(F.cross_entropy(logits_SV[kept], labels_S[kept], reduction="none").cpu())
        inputs.append(batch.input_ids.flatten()[kept].cpu())
        targets.append(labels_S[kept].cpu())
        walk = outcome.details
        if isinstance(walk, LanguageWalk) and walk.experts:
            paths.append(walk.paths()[kept.cpu().numpy()])
    pieces = [piece.decode("utf-8", "replace") for piece in piece_texts(tokenizer)]
    targets_U = torch.cat(targets).numpy()
    return TokenReport(
        torch.cat(inputs).numpy(),
        targets_U,
        torch.cat(losses).numpy(),
        class_numbers(pieces)[targets_U],
        np.concatenate(paths) if paths else None,
        pieces,
    )
