"""Changes of a trained model's routing, to see what an expert or a path is good for.

D decisions  K experts per decision  N experts  T steps or layers
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from research_eval.errors import ConfigError


@dataclass(frozen=True)
class Intervention:
    """What is changed: an expert's work is left out, an expert is never chosen, or another one works in its place.

    `path` is the path of every sample. A `step` limits the change to one step or layer.
    """

    skip: frozenset[int] = frozenset()
    forbid: frozenset[int] = frozenset()
    swap: tuple[tuple[int, int], ...] = ()
    path: tuple[int, ...] | None = None
    step: int | None = None

    def at(self, step: int) -> Intervention:
        """What is changed at this step; the path has this step alone."""
        if self.step not in (None, step):
            return NOTHING
        return self if self.path is None else replace(self, path=self.path[step : step + 1])

    def permitted(self, scores_DN: Tensor) -> Tensor:
        """The scores by which experts are chosen, with -inf at those that must not be chosen."""
        if not self.forbid:
            return scores_DN
        return scores_DN.masked_fill(self.forbidden(scores_DN.shape[-1], scores_DN.device), float("-inf"))

    def forbidden(self, num_experts: int, device: torch.device) -> Tensor:
        """True at experts that must not be chosen, [N]."""
        numbers_N = torch.arange(num_experts, device=device)
        return torch.isin(numbers_N, torch.tensor(sorted(self.forbid), dtype=torch.long, device=device))

    def rerouted(self, chosen: Tensor, num_experts: int) -> Tensor:
        """The choices of a route that has no scores: a forbidden expert gives way to the next one that is permitted."""
        allowed = [number for number in range(num_experts) if number not in self.forbid]
        targets = [next((n for n in [*allowed, *allowed] if n >= number), allowed[0]) for number in range(num_experts)]
        table_N = torch.tensor([*targets, num_experts], device=chosen.device)  # the last action, to stop, stays
        return table_N[chosen] if self.forbid else chosen

    def changed(self, chosen_DK: Tensor, weights_DK: Tensor) -> tuple[Tensor, Tensor]:
        """The experts that work and the factors of their work: forced, swapped, then left out."""
        if self.path:
            chosen_DK = torch.full_like(chosen_DK, self.path[0])
        for before, after in self.swap:
            chosen_DK = chosen_DK.masked_fill(chosen_DK == before, after)
        for expert in self.skip:
            weights_DK = weights_DK.masked_fill(chosen_DK == expert, 0.0)
        return chosen_DK, weights_DK


NOTHING = Intervention()


def intervention_of(
    skip: Collection[int],
    forbid: Collection[int],
    swap: Mapping[int, int] | None,
    path: Sequence[int] | None,
    step: int | None,
) -> Intervention:
    """What the arguments of `intervene` ask for. Raises ConfigError for anything but whole numbers."""
    try:
        return Intervention(
            frozenset(map(operator.index, skip)),
            frozenset(map(operator.index, forbid)),
            tuple((operator.index(before), operator.index(after)) for before, after in (swap or {}).items()),
            None if path is None else tuple(map(operator.index, path)),
            None if step is None else operator.index(step),
        )
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"intervene: expected whole numbers: lists for skip, forbid and path, a dict for swap ({error})"
        ) from error


class Intervened:
    """A part of a model that chooses experts. The model sets the change of its choices."""

    intervention: Intervention = NOTHING
