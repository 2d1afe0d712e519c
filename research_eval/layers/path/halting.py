"""When a path ends: one class per value of `halt`.

B batch  L length  D width  C classes  N samples  X exits, in the order of depth
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from research_eval.annotations import Range, Share, Weight, When
from research_eval.datasets.token_data import Batch
from research_eval.errors import ConfigError
from research_eval.layers.collective import in_shares
from research_eval.layers.losses import AuxiliaryLoss
from research_eval.layers.path.exits import (
    calibrated_threshold,
    exit_probabilities,
    expected_length,
    geometric_prior_kl,
)
from research_eval.layers.path.walk import PathSettings, View, Walk
from research_eval.layers.routing import mean_of_rows

Halt = Literal["off", "confidence", "ponder", "action"]
Head = Callable[[], Tensor]  # computes the outputs [B, C] of samples that end here
LossPerSample = Callable[[Tensor], Tensor]  # outputs [B, C] -> the task loss of each sample [B]
LossMean = Callable[[Tensor], Tensor]  # outputs [B, C] -> the mean task loss


@dataclass(frozen=True)
class HaltingSettings:
    """The halting rule, and the options of single rules. Raises ConfigError for an option of another rule."""

    halt: Halt = "off"
    exit_threshold: Share | None = None
    path_penalty_coef: Annotated[Weight, Range(1e-4, 0.1, log=True), When("halt", "ponder", "action")] = 0.0
    ponder_kl_coef: Weight = 0.01
    halt_warmup: Share = 0.5

    def __post_init__(self) -> None:
        if self.exit_threshold is not None and self.halt != "confidence":
            raise ConfigError(f'exit_threshold={self.exit_threshold} needs halt="confidence", not {self.halt!r}')

    def rule(self, path: PathSettings) -> Halting:
        """The object that ends paths by this rule."""
        return RULES[self.halt](self, path)


class Halting(nn.Module):
    """Rule "off": a path has `max_path_len` steps, unless the sample has visited every expert `max_visits` times."""

    decided_by_router = False  # stopping is the router's last action
    sampled = False  # the router may choose to stop in training
    has_exits = False  # training uses the outputs after every step
    scores_exits = False  # evaluation computes the outputs before every step

    def __init__(self, settings: HaltingSettings, path: PathSettings) -> None:
        super().__init__()
        self.settings = settings
        self.path = path

    def continuing(self, view: View, head: Head, walk: Walk, all_exits: bool) -> Tensor | None:
        """True at samples that continue with this step, [B]; None if no sample can end here.

        `all_exits` is for the calibration: it stores the outputs of every exit in the walk and ends no path early.
        """
        return None

    def task_loss(self, walk: Walk, outputs: Tensor, done: float, mean: LossMean, per_sample: LossPerSample) -> Tensor:
        """The task loss of a pass, a scalar; `done` is the finished share of the training."""
        return mean(outputs)

    def losses(self, walk: Walk, done: float, price_is_in_reward: bool) -> dict[str, AuxiliaryLoss]:
        """The price of long paths, and the rule's other auxiliary terms."""
        return {}

    def scheduled_options(self) -> tuple[str, ...]:
        """The options whose effect follows the finished share of the training."""
        return ()

    def step_price(self) -> float:
        """The price of an executed step in the reward, for modes that learn from the reward."""
        return self.settings.path_penalty_coef

    def calibrates(self) -> bool:
        """Whether `calibrate` does anything."""
        return False

    def calibrate(self, batches: Iterable[Batch], exits_of: Callable[[Batch], list[Tensor]]) -> None:
        """Adapt to the validation split. `exits_of` makes a pass: its exits are [X][B, C]."""

    def metrics(self) -> dict[str, Any]:
        """The rule's own metrics of an evaluation."""
        return {}


class ConfidenceExit(Halting):
    """Rule "confidence": training uses all exits; evaluation takes the first confident one.

    An exit is confident if its largest class probability exceeds a threshold. The threshold is calibrated on the
    validation split, unless `exit_threshold` is given.
    """

    has_exits = True
    scores_exits = True
    threshold: Tensor

    def __init__(self, settings: HaltingSettings, path: PathSettings) -> None:
        super().__init__(settings, path)
        given = settings.exit_threshold
        self.register_buffer("threshold", torch.tensor(1.0 if given is None else given))
        self.full_depth_accuracy: float | None = None

    def continuing(self, view: View, head: Head, walk: Walk, all_exits: bool) -> Tensor | None:
        if walk.training or all_exits:
            walk.exits.append(head())
            return None
        return head().softmax(-1).amax(-1) <= self.threshold

    def task_loss(self, walk: Walk, outputs: Tensor, done: float, mean: LossMean, per_sample: LossPerSample) -> Tensor:
        if not walk.training:
            return mean(outputs)
        return torch.stack([per_sample(exit_BC) for exit_BC in walk.exits]).mean()

    def calibrates(self) -> bool:
        return self.settings.exit_threshold is None

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch], exits_of: Callable[[Batch], list[Tensor]]) -> None:
        def known(batch: Batch) -> dict[str, Tensor]:
            exits = exits_of(batch)
            # If all paths of a batch end early, its last exit also replaces the missing later ones.
            missing = self.path.max_path_len - self.path.min_path_len + 1 - len(exits)
            exits_XBC = torch.stack(exits + exits[-1:] * missing).float()
            return {"confidence": exits_XBC.softmax(-1).amax(-1), "correct": exits_XBC.argmax(-1) == batch.labels}

        parts = list(in_shares(batches, known))
        confidence_XN, correct_XN = (torch.cat([part[name] for part in parts], 1) for name in ("confidence", "correct"))
        self.threshold.fill_(calibrated_threshold(confidence_XN, correct_XN))
        self.full_depth_accuracy = float(correct_XN[-1].double().mean())

    def metrics(self) -> dict[str, Any]:
        found: dict[str, Any] = {"exit_threshold": float(self.threshold)}
        if self.full_depth_accuracy is not None:
            found["full_depth_val_acc"] = self.full_depth_accuracy
        return found


class DecidedByRouter(Halting):
    """The router's last action stops; evaluation stops once its probability exceeds 1/2."""

    decided_by_router = True

    def continuing(self, view: View, head: Head, walk: Walk, all_exits: bool) -> Tensor | None:
        if self.has_exits and (walk.training or all_exits):
            walk.exits.append(head())
        if view.router is None:
            return None
        stop_B = view.router.logits_BA.softmax(-1)[:, -1]
        if walk.training:
            walk.stop.append(stop_B)
            return None
        return None if view.given_B is not None else stop_B <= 0.5


class Ponder(DecidedByRouter):
    """Rule "ponder": training weights the loss of every exit by its probability (PonderNet, Banino et al., 2021).

    Over the first `halt_warmup` of the training only the last exit counts.
    """

    has_exits = True

    def task_loss(self, walk: Walk, outputs: Tensor, done: float, mean: LossMean, per_sample: LossPerSample) -> Tensor:
        if not walk.training or not walk.stop or done < self.settings.halt_warmup:
            return mean(outputs)
        losses_XB = torch.stack([per_sample(exit_BC) for exit_BC in walk.exits])
        return (exit_probabilities(torch.stack(walk.stop)) * losses_XB).sum(0).mean()

    def losses(self, walk: Walk, done: float, price_is_in_reward: bool) -> dict[str, AuxiliaryLoss]:
        if not walk.training or not walk.stop:
            return {}
        pi_XB = exit_probabilities(torch.stack(walk.stop))
        on = 0.0 if done < self.settings.halt_warmup else 1.0
        kl = geometric_prior_kl(pi_XB, 1 / (self.path.max_path_len / 2 + 1))
        length = expected_length(pi_XB, self.path.min_path_len)
        return {
            "ponder_kl": AuxiliaryLoss(kl, on * self.settings.ponder_kl_coef),
            "path_penalty": AuxiliaryLoss(length, on * self.settings.path_penalty_coef),
        }

    def scheduled_options(self) -> tuple[str, ...]:
        return ("halt_warmup",) if self.settings.halt_warmup else ()

    def step_price(self) -> float:
        """Zero: the expected length is a loss term of its own."""
        return 0.0


class StopAction(DecidedByRouter):
    """Rule "action": training samples the decision to stop. `path_penalty_coef` is the price of one expected step."""

    sampled = True

    def losses(self, walk: Walk, done: float, price_is_in_reward: bool) -> dict[str, AuxiliaryLoss]:
        if not walk.training or not walk.stop:
            return {}
        paid = 0.0 if price_is_in_reward else self.settings.path_penalty_coef
        return {"path_penalty": AuxiliaryLoss(_expected_steps(walk), paid)}


def _expected_steps(walk: Walk) -> Tensor:
    """E[length] = sum_t prod_{k<=t} (1 - p_stop,k), summed up to the last decision of each sampled path."""
    decided_TB = torch.stack([decision.decided_B for decision in walk.decisions])
    stop_TB = torch.stack([decision.view.own_BA.softmax(-1)[:, -1] for decision in walk.decisions])
    return mean_of_rows(((1 - stop_TB * decided_TB).cumprod(0) * decided_TB).sum(0))


RULES: dict[str, type[Halting]] = {
    "off": Halting,
    "confidence": ConfidenceExit,
    "ponder": Ponder,
    "action": StopAction,
}
