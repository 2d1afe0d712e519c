"""How the next token is drawn from logits.

B samples  V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from research_eval.errors import ConfigError
from research_eval.seeding import derive_seed


@dataclass(frozen=True)
class SamplingSettings:
    """What shapes a generated text. Raises ConfigError for a value outside its range.

    The order is: repetition penalty, temperature (0: the most probable token), top-k, top-p, min-p.
    """

    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    num_samples: int = 1
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole = {"max_new_tokens": 1, "num_samples": 1, "seed": 0} | ({"top_k": 1} if self.top_k is not None else {})
        for name, low in whole.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name}: expected a whole number of at least {low}, got {getattr(self, name)}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name}: expected a number above 0 and at most 1, got {value}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: expected a number of at least 0, got {self.temperature}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"repetition_penalty: expected a number above 0, got {self.repetition_penalty}")
        if "" in self.stop:
            raise ConfigError("stop: an empty text stops at once. Leave it out.")


def generators(settings: SamplingSettings) -> list[torch.Generator]:
    """A generator for each sample, so that a sample does not depend on how many there are."""
    made = []
    for number in range(settings.num_samples):
        made.append(torch.Generator().manual_seed(derive_seed(settings.seed, "generation", number)))
    return made


def next_tokens(
    logits_BV: Tensor,
    seen: Sequence[Sequence[int]],
    settings: SamplingSettings,
    draws: Sequence[torch.Generator],
    never: Sequence[int] = (),
) -> list[int]:
    """Draw a token for each sample. `seen` are its tokens so far, `never` the ids that no sample may draw."""
    logits_BV = logits_BV.double().cpu()
    if never:
        logits_BV[:, list(never)] = -torch.inf
    if settings.repetition_penalty != 1.0:
        logits_BV = _penalised(logits_BV, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return [int(row.argmax()) for row in logits_BV]
    shares_BV, order_BV = kept_shares(logits_BV / settings.temperature, settings)
    chosen = []
    for shares_V, order_V, draw in zip(shares_BV, order_BV, draws, strict=True):
        reached_V = shares_V.cumsum(0)
        at = torch.rand((), generator=draw, dtype=torch.float64) * reached_V[-1]
        chosen.append(int(order_V[torch.searchsorted(reached_V, at, right=True).clamp_max(len(reached_V) - 1)]))
    return chosen


def kept_shares(logits_BV: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """Probabilities from the largest to the smallest, 0 for what the settings cut off, and the ids in this order.

    Of equal logits the smaller id comes first, so that top-k keeps exactly k.
    """
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    if settings.top_k is not None:
        sorted_BV[:, settings.top_k :] = -torch.inf
    shares_BV = sorted_BV.softmax(-1)
    if settings.top_p is not None:
        before_BV = shares_BV.cumsum(-1) - shares_BV  # the mass of the larger ones: the first is always kept
        shares_BV = torch.where(before_BV < settings.top_p, shares_BV, 0.0)
    if settings.min_p is not None:
        shares_BV = torch.where(shares_BV >= settings.min_p * shares_BV[:, :1], shares_BV, 0.0)
    return shares_BV, order_BV


def _penalised(logits_BV: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Positive logits of seen tokens divided by the penalty, negative ones times it (CTRL, Keskar et al., 2019)."""
    logits_BV = logits_BV.clone()
    for row_V, tokens in zip(logits_BV, seen, strict=True):
        known = torch.tensor(sorted(set(tokens)), dtype=torch.long)
        values = row_V[known]
        row_V[known] = torch.where(values > 0, values / penalty, values * penalty)
    return logits_BV
