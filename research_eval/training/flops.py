"""What counts as a FLOP: torch's formulas, and those for the operations that it leaves out.

B batch  L length  I in  O out  H hidden width
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from research_eval.training.compiler import leave_out

# The formulas take shapes, as torch's own do.
Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def _matrix_times_vector(matrix: Shape, vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _added_matrix_times_vector(start: Shape, matrix: Shape, vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _grouped(rows: Shape, matrices: Shape, *_: Any, **__: Any) -> int:
    """Rows [R, I] by the matrix [N, I, O] of their group, or, for the gradient, [I, R] by [R, O] with groups of R."""
    return 2 * prod(rows) * matrices[-1]


def _lstm_layer(x: Shape, weight_HI: Shape, weight_HH: Shape, *_: Any, **__: Any) -> int:
    """One layer of an LSTM on a CPU, in one direction: x [L, B, I]."""
    return 2 * prod(x[:2]) * (prod(weight_HI) + prod(weight_HH))


def _lstm(x: Shape, weights: list[Shape], *_: Any, **__: Any) -> int:
    """All layers of an LSTM or GRU on a GPU: x [L, B, I] or [B, L, I]."""
    return 2 * prod(x[:2]) * sum(prod(weight) for weight in weights if len(weight) > 1)


def _twice(formula: Callable[..., int]) -> Callable[..., int]:
    """The backward pass of linear maps: one product for the inputs and one for the weights."""
    return lambda *shapes, **keywords: 2 * formula(*shapes, **keywords)


def _formulas() -> dict[Any, Callable[..., int]]:
    """The formula of every operation that counts: those of torch, and those that torch 2.13 does not have."""
    aten = torch.ops.aten
    own: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten.mv: _matrix_times_vector,
        aten.addmv: _added_matrix_times_vector,
        aten._grouped_mm: _grouped,
        aten.mkldnn_rnn_layer: _lstm_layer,
        aten.mkldnn_rnn_layer_backward: _twice(_lstm_layer),
        aten._cudnn_rnn: _lstm,
        aten._cudnn_rnn_backward: _twice(_lstm),
    }
    found = {**flop_registry, **{packet: shape_wrapper(formula) for packet, formula in own.items()}}
    for name in ("addmm", "baddbmm"):  # the same products, added in place
        found.setdefault(getattr(aten, f"{name}_"), found[getattr(aten, name)])
    return found


class FlopCounter(TorchDispatchMode):
    """Sums the FLOPs of all operations inside its block.

    Torch's `FlopCounterMode` gives the same sum. Its account for each module takes most of its time.
    """

    _leaves: ClassVar[set[Any]] = set()  # operations that consist of no others

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.formulas = _formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._leaves:
            with self:  # a mode is off while it handles an operation
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self._leaves.add(func)
        result = func(*args, **kwargs)
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


leave_out(FlopCounter)
