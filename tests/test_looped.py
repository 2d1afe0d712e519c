"""The looped encoder against the dense one, of which it is a special case with shared weights.

B batch  L length
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from research_eval.datasets.token_data import Batches, TokenData
from research_eval.models.base_model import EvaluableModel
from research_eval.training.evaluate import measure_flops
from research_eval.training.runtime import Runtime

Build = Callable[..., EvaluableModel]


def unrolled(looped: EvaluableModel, build_model: Build, num_layers: int, num_loops: int) -> EvaluableModel:
    """A dense model with a copy of the looped blocks for every loop."""
    dense = build_model("dense", num_layers=num_layers * num_loops)
    state = {key: value for key, value in looped.state_dict().items() if not key.startswith("layers.")}
    for place in range(num_layers * num_loops):
        block = looped.get_submodule(f"layers.{place % num_layers}")
        state |= {f"layers.{place}.{key}": value for key, value in block.state_dict().items()}
    dense.load_state_dict(state)
    return dense


@pytest.mark.parametrize(("num_layers", "num_loops"), [(2, 1), (1, 3), (2, 2)])
def test_looped_is_dense_with_the_blocks_repeated(
    num_layers: int, num_loops: int, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Also its gradient: the sum over the copies."""
    looped = build_model("looped", num_layers=num_layers, num_loops=num_loops)
    dense = unrolled(looped, build_model, num_layers, num_loops)
    assert torch.equal(looped.eval()(ids_BL), dense.eval()(ids_BL))
    for model in (looped, dense):
        model.task_loss(model(ids_BL), labels_B).backward()
    for layer in range(num_layers):
        copies = [dense.get_submodule(f"layers.{layer + loop * num_layers}") for loop in range(num_loops)]
        for key, shared in looped.get_submodule(f"layers.{layer}").named_parameters():
            total = torch.stack([copy.get_parameter(key).grad for copy in copies]).sum(0)
            assert_close(shared.grad, total, rtol=1e-4, atol=1e-6)


def test_weights_count_once_and_work_every_time(build_model: Build) -> None:
    one, three = build_model("looped", num_loops=1), build_model("looped", num_loops=3)
    assert one.get_parameter_count() == build_model("dense", num_layers=1).get_parameter_count()
    assert three.get_parameter_count() == three.get_active_parameter_count() == one.get_parameter_count()
    assert three.get_flops_per_sample(9) == build_model("dense", num_layers=3).get_flops_per_sample(9)


@pytest.mark.parametrize(("num_layers", "num_loops"), [(1, 4), (2, 3)])
def test_the_flops_of_the_formula_are_those_that_run(num_layers: int, num_loops: int, build_model: Build) -> None:
    model = build_model("looped", num_layers=num_layers, num_loops=num_loops)
    data = TokenData(np.ones(72, np.int32), np.arange(0, 73, 9), np.zeros(8, np.int64))
    executed, _ = measure_flops(model, Batches(data, batch_size=4), Runtime("cpu"))
    assert model.get_flops_per_sample(9) == executed
