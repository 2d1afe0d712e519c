"""Classes of tokens, what experts tell about them, and how far the routes of two models agree.

U tokens  T steps  N experts  C classes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLASSES = ("letter", "capital", "digit", "punctuation", "space", "break", "other")
SHUFFLES = 20

Ints = NDArray[np.int64]


def class_of(piece: str) -> str:
    """The class of a token's text: that of its first character that is no blank. A line break decides for itself."""
    if "\n" in piece:
        return "break"
    text = piece.strip()
    if not text:
        return "space" if piece else "other"
    first = text[0]
    if first.isalpha():
        return "capital" if first.isupper() else "letter"
    if first.isdigit():
        return "digit"
    return "punctuation" if first.isprintable() and first != "�" else "other"


def class_numbers(pieces: Sequence[str]) -> Ints:
    """The number in CLASSES of each piece."""
    return np.array([CLASSES.index(class_of(piece)) for piece in pieces], np.int64)


def information(experts_U: Ints, classes_U: Ints) -> float:
    """Mutual information of expert and class in bits, from counts."""
    joint = np.zeros((int(experts_U.max(initial=0)) + 1, int(classes_U.max(initial=0)) + 1))
    np.add.at(joint, (experts_U, classes_U), 1)
    joint /= max(joint.sum(), 1)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def class_information(experts_U: Ints, classes_U: Ints, rng: np.random.Generator) -> tuple[float, float]:
    """The information in bits, and its mean over shuffled experts: a small sample has some by chance."""
    by_chance = [information(experts_U[rng.permutation(len(experts_U))], classes_U) for _ in range(SHUFFLES)]
    return information(experts_U, classes_U), float(np.mean(by_chance))


def means_by_class(values_U: NDArray[Any], classes_U: Ints) -> list[list[Any]]:
    """[class, mean] for each class that occurs."""
    return [
        [name, float(values_U[classes_U == number].mean())]
        for number, name in enumerate(CLASSES)
        if (classes_U == number).any()
    ]


def route_agreement(first_UT: Ints, second_UT: Ints, rng: np.random.Generator) -> tuple[list[float], list[float]]:
    """Per step the share of tokens with the same expert in two models, and the same for shuffled tokens.

    Experts have no order, so those of the second model are renamed to agree as often as possible, at each step.
    Raises ValueError for paths of different shape.
    """
    if first_UT.shape != second_UT.shape:
        raise ValueError(f"paths of {first_UT.shape} and {second_UT.shape} cannot be compared")
    pairs = list(zip(first_UT.T, second_UT.T, strict=True))
    by_chance = [_matched_share(one, other[rng.permutation(len(other))]) for one, other in pairs]
    return [_matched_share(one, other) for one, other in pairs], by_chance


def _matched_share(first_U: Ints, second_U: Ints) -> float:
    """The largest share of equal experts over all ways to rename those of the second model."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    size = int(max(first_U.max(initial=0), second_U.max(initial=0))) + 1
    both = (first_U >= 0) & (second_U >= 0)
    counts = np.zeros((size, size))
    np.add.at(counts, (first_U[both], second_U[both]), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / max(both.sum(), 1))


@dataclass(frozen=True)
class TokenReport:
    """Row u predicts `targets_U[u]` with the loss `losses_U[u]`; it stands at the token `inputs_U[u]`.

    `paths_UT` are its experts, -1 after the end of its path; None for a model without experts.
    """

    inputs_U: NDArray[np.int64]
    targets_U: NDArray[np.int64]
    losses_U: NDArray[np.float32]
    classes_U: NDArray[np.int64]
    paths_UT: NDArray[np.int64] | None
    pieces: list[str]  # text of every id

    def metrics(self) -> dict[str, Any]:
        """Loss by class of the target; for a model with experts what they tell about the class, and path lengths."""
        found: dict[str, Any] = {"loss_by_class": means_by_class(self.losses_U, self.classes_U)}
        if self.paths_UT is None:
            return found
        rng = np.random.default_rng(0)
        steps = []
        for experts_U in self.paths_UT.T:
            runs_U = experts_U >= 0
            steps.append(
                class_information(experts_U[runs_U], self.classes_U[runs_U], rng) if runs_U.any() else (0.0, 0.0)
            )
        lengths_U = (self.paths_UT >= 0).sum(1)
        found["expert_class_information"] = [round(bits, 5) for bits, _ in steps]
        found["expert_class_information_by_chance"] = [round(bits, 5) for _, bits in steps]
        if lengths_U.min() < lengths_U.max():
            found["length_by_class"] = means_by_class(lengths_U, self.classes_U)
        return found
