"""Routed layers of a foreign model, found by their structure.

E experts  I width of the states
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from research_eval.errors import ConfigError
from research_eval.wording import hint

GATE_NAMES = ("gate", "router")


@dataclass(frozen=True)
class RoutedLayer:
    """A module that holds experts and, if one was found, the gate that chooses among them.

    `is_list` says that every expert is a module of its own, which is called with its own rows. Otherwise all experts
    are one module with stacked weights, which is called with the numbers of the chosen ones.
    """

    name: str
    block: nn.Module
    experts: nn.Module
    gate: nn.Module | None
    num_experts: int
    is_list: bool


def find_layers(model: nn.Module, names: Sequence[str] = ()) -> list[RoutedLayer]:
    """The routed layers in the order of the model; with `names`, those whose experts have these names.

    A layer is a module with a child whose name ends in "experts" (and has no "shared" in it) that holds a list of two
    or more modules, or parameters of three dimensions with one common first size. The gate is a sibling with a matrix
    [E, I], if possible one with "gate" or "router" in its name. Raises ConfigError if there is no layer, and for a name
    that is none.
    """
    found = [layer for name, block in model.named_modules() for layer in _layers_of(name, block)]
    known = [layer.name for layer in found]
    for name in names:
        if name not in known:
            raise ConfigError(f"trace: {name!r} is no routed layer.{hint(name, known)}")
    if not found:
        raise ConfigError(
            f"trace: {type(model).__name__} has no routed layer: no module named ...experts with stacked weights or a "
            "list of modules"
        )
    return [layer for layer in found if not names or layer.name in names]


def _layers_of(name: str, block: nn.Module) -> list[RoutedLayer]:
    children = dict(block.named_children())
    found = []
    for key, experts in children.items():
        size = _num_experts(experts)
        if not key.endswith("experts") or "shared" in key or size < 2:
            continue
        gates = {
            other: child
            for other, child in children.items()
            if other != key and any(one.ndim == 2 and len(one) == size for one in child.parameters())
        }
        gate = min(gates, key=lambda other: not any(part in other for part in GATE_NAMES), default=None)
        full = f"{name}.{key}" if name else key
        is_list = isinstance(experts, nn.ModuleList | nn.ModuleDict)
        found.append(RoutedLayer(full, block, experts, gates[gate] if gate else None, size, is_list))
    return found


def _num_experts(experts: nn.Module) -> int:
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return len(experts)
    sizes = {len(one) for one in experts.parameters(recurse=False) if one.ndim == 3}
    return sizes.pop() if len(sizes) == 1 else 0
