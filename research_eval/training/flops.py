"""What counts as a FLOP: torch's counter, with formulas for the operations that it leaves out.

B batch  L length  I in  O out  H hidden width
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

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


def flop_counter() -> FlopCounterMode:
    """Torch's counter of executed FLOPs, with formulas for the operations that torch 2.13 does not count."""
    aten = torch.ops.aten
    mapping: dict[Any, Callable[..., int]] = {
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
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    for name in ("addmm", "baddbmm"):  # the same products, added in place
        counter.flop_registry.setdefault(getattr(aten, f"{name}_"), counter.flop_registry[getattr(aten, name)])
    return counter
