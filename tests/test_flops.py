"""FLOPs of a training step: counted whole, for every model, and equal to the analytic count.

B batch  L length
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support import Build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from research_eval.datasets.token_data import Batch
from research_eval.layers.block import Attention, Block
from research_eval.layers.dispatch import no_spare_rows
from research_eval.models.base_model import EvaluableModel
from research_eval.models.goe import GoEClassifier
from research_eval.models.goe_original import GoEOriginalClassifier
from research_eval.registry import CHOICES
from research_eval.tasks.classification import Classification
from research_eval.training.flops import FlopCounter

TRAINED = [
    ("dense", {"num_layers": 3}),
    ("looped", {"num_layers": 1, "num_loops": 3}),
    ("lstm", {"num_layers": 2}),
    ("moe", {"num_experts": 5, "top_k_experts": 2}),
    ("goe", {}),
    ("goe", {"num_layers": 2, "max_path_len": 2}),
    *(("goe_original", {"router_mode": mode}) for mode in CHOICES),
    ("goe_original", {"expert_layers": 2, "max_path_len": 4, "router_input": "state"}),
    *(("goe_original", {"route": route}) for route in ("hash", "token", "random")),
    *(("goe_original", {"halt": halt}) for halt in ("confidence", "ponder")),
    ("goe_original", {"num_total_experts": 2, "num_scan_experts": 1, "pool": "last", "route": "token"}),
    ("goe_scan", {}),
]


def attention_flops(model: EvaluableModel, length: int) -> float:
    """Those of the two products of attention, in every block that one sample passes."""
    blocks = sum(isinstance(module, Block) for module in model.modules())
    if isinstance(model, GoEOriginalClassifier | GoEClassifier):
        blocks *= model.path.max_path_len if isinstance(model, GoEOriginalClassifier) else model.max_path_len
    elif model.model_type == "moe":
        blocks = sum(isinstance(module, Attention) for module in model.modules())
    elif model.model_type == "looped":
        blocks *= 3
    return 4.0 * length**2 * 16 * blocks


def router_flops(model: EvaluableModel) -> float:
    """What the training of a `goe_original` router costs beside three forward passes.

    No product leads back to fixed features. If the router reads states, the regularisers see their own pass.
    """
    if not isinstance(model, GoEOriginalClassifier) or model.policy.router is None:
        return 0.0
    router = model.policy.router
    summary, policy = (part.weight.numel() / router.num_copies for part in (router.summary, router.policy))
    passes, into_summary = (2, summary) if model.policy.features is None else (1, 0.0)
    visits = router.visits.weight.numel()
    one_pass = 2 * (summary + policy + visits) + policy  # forward, the weights' gradients, and that of the hidden layer
    return model.path.max_path_len * 2.0 * (passes * one_pass + into_summary - 3 * (summary + policy + visits))


@pytest.mark.parametrize(("name", "arguments"), TRAINED)
def test_a_training_step_costs_three_forward_passes(name: str, arguments: dict[str, Any], build_model: Build) -> None:
    """Forward, the gradients of the inputs, and the gradients of the weights; attention computes its scores twice."""
    model, length = build_model(name, **arguments).train(), 9
    batch = Batch(ids_BL := torch.randint(1, 13, (64, length)), ids_BL > 0, torch.zeros(64, dtype=torch.long))
    with no_spare_rows(model, torch.device("cpu")), FlopCounter() as forward:
        task_loss, terms = model.losses(model.run(batch), batch.labels, Classification())
    with FlopCounter() as backward:
        sum((term.weight * term.raw for term in terms.values()), start=task_loss).backward()
    executed = (forward.total + backward.total) / 64
    assert 2.9 < executed / (forward.total / 64) < 3.2
    if arguments.get("router_mode") == "st_dense" or "num_scan_experts" in arguments or name == "goe_scan":
        return  # training executes more than an evaluation, for which the formula is
    flops = model.get_flops_per_sample(length)
    assert flops is not None
    analytic = 3 * flops + attention_flops(model, length) / 2 + router_flops(model)
    assert executed == pytest.approx(analytic, rel=0.02)


@pytest.mark.parametrize(("name", "arguments"), TRAINED)
def test_no_product_is_left_uncounted(name: str, arguments: dict[str, Any], build_model: Build) -> None:
    """Every executed operation whose name speaks of products has a formula."""
    model = build_model(name, **arguments).train()
    batch = Batch(ids_BL := torch.randint(1, 13, (8, 9)), ids_BL > 0, torch.zeros(8, dtype=torch.long))
    executed: set[Any] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            executed.add(function.overloadpacket)
            return function(*args, **(kwargs or {}))

    with Names():
        task_loss, terms = model.losses(model.run(batch), batch.labels, Classification())
        sum((term.weight * term.raw for term in terms.values()), start=task_loss).backward()
    products = {op for op in executed if re.search(r"mm|mv|matmul|linear|attention|rnn|lstm|gru|conv", str(op))}
    assert products
    assert products - set(FlopCounter().formulas) == set()


def torch_counter() -> FlopCounterMode:
    """With the formulas of ours."""
    counter = FlopCounterMode(display=False)
    counter.flop_registry.update(FlopCounter().formulas)
    return counter


@pytest.mark.parametrize("name", ["dense", "moe", "goe", "goe_original", "lstm", "looped", "goe_scan"])
def test_the_sum_is_that_of_torchs_counter(name: str, build_model: Build, ids_BL: torch.Tensor) -> None:
    model = build_model(name)
    totals = []
    counter: FlopCounter | FlopCounterMode
    for counter in (FlopCounter(), torch_counter()):
        torch.manual_seed(0)
        with counter:
            model(ids_BL).sum().backward()
        totals.append(counter.total if isinstance(counter, FlopCounter) else counter.get_total_flops())
    assert totals[0] == totals[1] > 0
